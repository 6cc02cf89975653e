"""`workbench doctor`: what this machine offers, and how to install what is missing."""

from __future__ import annotations

import dataclasses
from typing import Any

from workbench.cli.common import (
    Json,
    PluginDirs,
    Runs,
    builder,
    count,
    print_json,
    print_table,
    say,
)
from workbench.figures import figure
from workbench.text_table import Column

EXAMPLES = """\
  workbench doctor
  workbench doctor --json"""

KERNELS = {
    "mamba-ssm": "fused Mamba-1 and Mamba-2 scans",
    "causal-conv1d": "fused causal convolution",
    "flash-attn": "flash attention",
}


def doctor(runs: Runs = None, plugin_dir: PluginDirs = None, json: Json = False) -> None:
    """Check device, versions, kernels and plugins."""
    from workbench import kernels
    from workbench.environment import available_memory, environment, resolve_device
    from workbench.kernel_caches import kernels_folder, read_kernel_caches, use_kernel_caches
    from workbench.records import runs_folder

    device = resolve_device("auto")
    cache_dir = runs_folder(runs) / ".cache"
    use_kernel_caches(cache_dir, device)  # trying kernels compiles them
    plugins = builder(plugin_dir).plugins
    report: dict[str, Any] = {
        **environment(device),
        "available_memory": available_memory(device),
        "plugins": sorted(plugins.loaded),
        "failed_plugins": {name: f.reason for name, f in plugins.failures.items()},
        "backends": [dataclasses.asdict(status) for status in kernels.statuses()],
        "demanded_backends": {
            name: wanted
            for name in kernels.operations()
            if (wanted := kernels.preference(name)) is not None
        },
    }
    report["kernels_folder"] = str(kernels_folder(cache_dir))
    report["kernel_caches"] = [
        {**dataclasses.asdict(cache), "path": str(cache.path)}
        for cache in read_kernel_caches(cache_dir)
    ]
    if json:
        print_json(report)
    else:
        _print(report)


def _print(report: dict[str, Any]) -> None:
    say(
        f"{report['device_name']} ({report['device']}), {count(report['cores'], 'core')}, "
        f"{count(report['threads'], 'torch thread')}, "
        f"{figure(report['available_memory'], 'bytes')} of memory available, "
        f"Python {report['python']}"
    )
    print()
    versions: dict[str, str | None] = report["versions"]
    print_table(
        [
            Column(heading="package", cells=list(versions)),
            Column(heading="version", cells=[found or "–" for found in versions.values()]),
            Column(heading="for", cells=[KERNELS.get(name, "") for name in versions]),
        ]
    )
    _print_backends(report)
    _print_caches(report)
    say(f"Plugins: {', '.join(report['plugins'])}")
    for name, reason in report["failed_plugins"].items():
        say(f"Plugin {name!r} did not load: {reason}. workbench plugins --traceback shows where.")


def _print_caches(report: dict[str, Any]) -> None:
    """A row a cache of compiled kernels, and how to be rid of them; nothing where there is none."""
    caches = report["kernel_caches"]
    if not caches:
        return
    print_table(
        [
            Column(heading="compiled kernels", cells=[cache["name"] for cache in caches]),
            Column(
                heading="size",
                cells=[figure(cache["num_bytes"], "bytes") for cache in caches],
                right=True,
            ),
            Column(
                heading="files", cells=[f"{cache['num_files']:,}" for cache in caches], right=True
            ),
            Column(heading="in use", cells=["yes" if cache["in_use"] else "" for cache in caches]),
        ]
    )
    say(f"Kept in {report['kernels_folder']}; delete it while nothing runs to compile anew.")


def _print_backends(report: dict[str, Any]) -> None:
    """A row a backend of each operation, the preferred first; one line without a CUDA device."""
    rows = report["backends"]
    names = list(dict.fromkeys(row["operation"] for row in rows))
    if report["device"] != "cuda":
        say(f"No CUDA device: everything runs on torch ({', '.join(names)}).")
        return
    by_operation = [row for name in names for row in rows if row["operation"] == name]
    print_table(
        [
            Column(heading="operation", cells=[row["operation"] for row in by_operation]),
            Column(heading="backend", cells=[row["backend"] for row in by_operation]),
            Column(
                heading="works", cells=["yes" if row["works"] else "no" for row in by_operation]
            ),
            Column(
                heading="why not, and what to do",
                cells=[_advice(row) for row in by_operation],
                fit="wrap",
            ),
        ]
    )
    for name, wanted in report["demanded_backends"].items():
        say(f"WORKBENCH_BACKENDS demands {wanted} of {name}.")


def _advice(row: dict[str, Any]) -> str:
    if row["works"]:
        return ""
    return f"{row['reason']}; {row['install']}" if row["install"] else str(row["reason"])
