"""How near a measured time comes to what the device allows: left beside the figure."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from workbench.metric import Subject
from workbench.records import runs_folder

if TYPE_CHECKING:
    from workbench.latency_machine import Phase


def folder_of(subject: Subject) -> Path:
    """Where tables and ceilings of a subject's study are: beside its data."""
    from workbench.latency_table import latency_folder

    cache = runs_folder() / ".cache" if subject.data is None else subject.data.cache_dir
    return latency_folder(cache)


def report_bound(
    subject: Subject, phase: Phase, batch_size: int, length: int, seconds: float
) -> None:
    """Leave `bound_ms`, `mfu` and `mbu` of a measured time in the subject's extras.

    The device's ceilings are measured where its study's cache does not hold them yet.
    """
    from workbench.roofline import Roofline, ceilings

    dtype = str(subject.built.embedding.weight.dtype).removeprefix("torch.")
    limits = ceilings(subject.device, dtype, folder_of(subject))
    bound = Roofline(subject.builder, limits).bound(subject.layout, phase, batch_size, length)
    subject.extras.update(
        bound_ms=bound.seconds * 1000, mfu=bound.mfu(seconds), mbu=bound.mbu(seconds)
    )
