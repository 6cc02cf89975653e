"""`workbench doctor`: what this machine offers, and how to install what is missing."""

from __future__ import annotations

from typing import Any

from workbench.cli.common import Json, PluginDirs, builder, count, print_json, print_table, say
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


def doctor(plugin_dir: PluginDirs = None, json: Json = False) -> None:
    """Check device, versions, kernels and plugins."""
    from workbench.environment import available_memory, environment, resolve_device

    device = resolve_device("auto")
    plugins = builder(plugin_dir).plugins
    report: dict[str, Any] = {
        **environment(device),
        "available_memory": available_memory(device),
        "plugins": sorted(plugins.loaded),
        "failed_plugins": {name: f.reason for name, f in plugins.failures.items()},
        "layer_backend": "torch",
    }
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
    say("Layers run on torch: fast CPU scans, SDPA attention; CUDA devices work, unfused.")
    missing = [name for name in KERNELS if versions[name] is None]
    if missing and report["device"] == "cuda":
        say(
            f"Not installed: {', '.join(missing)}. "
            "pip install --no-build-isolation 'lm-workbench[cuda]'"
        )
    say(f"Plugins: {', '.join(report['plugins'])}")
    for name, reason in report["failed_plugins"].items():
        say(f"Plugin {name!r} did not load: {reason}. workbench plugins --traceback shows where.")
