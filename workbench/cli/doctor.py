"""`workbench doctor`: what this machine offers, and how to install what is missing."""

from __future__ import annotations

from typing import Any

from workbench.cli.common import Json, PluginDirs, builder, console, print_json, table

EXAMPLE = "Example: workbench doctor --json"

KERNELS = {
    "mamba-ssm": "fused Mamba-1 and Mamba-2 scans",
    "causal-conv1d": "fused causal convolution",
    "flash-attn": "flash attention",
}


def doctor(plugin_dir: PluginDirs = None, json: Json = False) -> None:
    """Check device, versions, kernels and plugins."""
    from workbench.environment import environment, resolve_device

    facts = environment(resolve_device("auto"))
    plugins = builder(plugin_dir).plugins
    report: dict[str, Any] = {
        **facts,
        "plugins": sorted(plugins.loaded),
        "failed_plugins": {name: f.reason for name, f in plugins.failures.items()},
        "layer_backend": "torch",
    }
    if json:
        print_json(report)
        return
    out = console()
    out.print(
        f"{facts['device_name']} ({facts['device']}), {facts['cores']} cores, "
        f"{facts['threads']} torch threads, Python {facts['python']}"
    )
    rows = [[name, found or "not installed"] for name, found in facts["versions"].items()]
    out.print(table(None, ["package", "version"], rows))
    out.print("Layers run on torch: fast CPU scans, SDPA attention; CUDA devices work, unfused.")
    missing = [name for name in KERNELS if facts["versions"][name] is None]
    if missing and facts["device"] == "cuda":
        names = ", ".join(f"{name} ({KERNELS[name]})" for name in missing)
        out.print(f"Not installed: {names}. pip install --no-build-isolation 'lm-workbench[cuda]'")
    out.print(f"Plugins: {', '.join(report['plugins'])}")
    for name, reason in report["failed_plugins"].items():
        out.print(f"Plugin {name!r} did not load: {reason}", markup=False)
