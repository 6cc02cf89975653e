"""The scans and the convolution of Mamba and Mamba-2 in plain torch, for any device.

Each fast function has an obvious twin (`..._ref`) that it is tested against, and an in-place step
for decoding. Needs nothing but torch, and only relative imports: copy the folder to reuse it.
"""

from .convolution import causal_conv1d, causal_conv1d_update, last_inputs
from .selective import selective_scan, selective_scan_ref, selective_state_update
from .state_space_duality import ssd, ssd_ref, ssd_state_update

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "last_inputs",
    "selective_scan",
    "selective_scan_ref",
    "selective_state_update",
    "ssd",
    "ssd_ref",
    "ssd_state_update",
]
