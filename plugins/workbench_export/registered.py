"""The layer types and quantizers that an exported model is made of, by their names in its layout.

Empty here: an export puts in its place the same two tables, filled from the registries.
"""

from __future__ import annotations

from workbench.layer import Layer
from workbench.quantizer import Quantizer

LAYERS: dict[str, type[Layer]] = {}
QUANTIZERS: dict[str, type[Quantizer]] = {}
