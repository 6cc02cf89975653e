"""Where compiled kernels are kept: beside the studies, so that each is compiled once a machine.

Triton and torch.compile write what they compiled and tuned into folders that environment
variables name. Left alone these lie under the user's home and the system's temporary folder, where
a reboot or a container's end takes them away. Here they are
`runs/.cache/kernels/<device and versions>/`, for every process that runs on a CUDA device; a
variable that the user set stays as it is. The folder may be deleted whenever nothing runs.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

from workbench import environment
from workbench.files import make_folder

FOLDER = "kernels"
# Folders in the cache, and switches; both are read by the libraries at their import or later.
FOLDERS = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
SWITCHES = {
    "TRITON_CACHE_AUTOTUNING": "1",  # else tuning is done again in every process
    "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
    "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
}

_set_here: dict[str, str] = {}  # what this process set, and may set anew for another runs folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class KernelCache:
    """The kernels of one device under one torch and Triton.

    Attributes:
        in_use: whether this process compiles into it, or would.
    """

    name: str
    path: Path
    num_bytes: int
    num_files: int
    in_use: bool


def use_kernel_caches(cache_dir: Path, device: str) -> Path | None:
    """Let torch's compiler and Triton keep what they compile beside the studies.

    To be called before either is imported; their processes inherit it. What the user's environment
    says stays. Does nothing for a CPU, which compiles nothing.

    Args:
        cache_dir: what all studies of a runs folder share, `runs/.cache`.

    Returns:
        The folder of this device and these versions; None for a CPU.

    Raises:
        DiskError: it cannot be made.
    """
    if not device.startswith("cuda"):
        return None
    folder = kernels_folder(cache_dir) / cache_name(device)
    wanted = {name: str(folder / part) for name, part in FOLDERS.items()} | SWITCHES
    for name, value in wanted.items():
        if os.environ.get(name, value) not in (value, _set_here.get(name)):
            continue  # the user's own
        if name in FOLDERS:
            make_folder(Path(value))
        os.environ[name] = _set_here[name] = value
    return folder


def kernels_folder(cache_dir: Path) -> Path:
    """What holds the caches of all devices; absolute, for processes that stand elsewhere."""
    return cache_dir.resolve() / FOLDER


def cache_name(device: str) -> str:
    """A folder's name for what kernels depend on: the device's product, torch and Triton."""
    versions = environment.package_versions(("torch", "triton"))
    parts = [
        environment.device_name(device),
        *(f"{name}-{found}" for name, found in versions.items() if found),
    ]
    return re.sub(r"[^a-z0-9.+]+", "-", "-".join(parts).lower()).strip("-")


def read_kernel_caches(cache_dir: Path) -> list[KernelCache]:
    """What is kept, by name, and the folders outside it that the user's environment names."""
    folder = kernels_folder(cache_dir)
    inside = [path for path in sorted(folder.glob("*")) if path.is_dir()]
    named = {Path(os.environ[name]).resolve() for name in FOLDERS if os.environ.get(name)}
    outside = sorted(path for path in named if not path.is_relative_to(folder))
    return [
        *(_read(path.name, path, any(p.is_relative_to(path) for p in named)) for path in inside),
        *(_read(str(path), path, True) for path in outside),
    ]


def _read(name: str, path: Path, in_use: bool) -> KernelCache:
    sizes = []
    for file in path.rglob("*"):
        try:
            if file.is_file():
                sizes.append(file.stat().st_size)
        except OSError:
            continue  # another process has just replaced it
    return KernelCache(
        name=name, path=path, num_bytes=sum(sizes), num_files=len(sizes), in_use=in_use
    )
