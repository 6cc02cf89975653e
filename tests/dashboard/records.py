"""Records written by hand: what a study leaves behind, without running one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS = {"loss": "bits/byte", "speed": "tokens/s", "size": "bytes", "parameters": "parameters"}
OBJECTIVES = [
    {"name": "loss", "unit": "bits/byte", "direction": "minimize"},
    {"name": "speed", "unit": "tokens/s", "direction": "maximize"},
    {"name": "size", "unit": "bytes", "direction": "minimize"},
]
STAGES = {"loss": "quantized", "speed": "measured", "size": "static", "parameters": "static"}
ENVIRONMENT = {
    "device": "cpu",
    "device_name": "Test Processor",
    "threads": 1,
    "cuda": None,
    "versions": {"torch": "2.13.0", "lm-workbench": "0.1.0", "triton": None},
}
# Trials 0, 1 and 2 are the front: best loss, best speed, best size; 3 is dominated by all.
FIGURES = {
    0: {"loss": 2.0, "speed": 100.0, "size": 3 * 2**20, "parameters": 400_000},
    1: {"loss": 3.0, "speed": 900.0, "size": 2 * 2**20, "parameters": 300_000},
    2: {"loss": 4.0, "speed": 200.0, "size": 1 * 2**20, "parameters": 200_000},
    3: {"loss": 5.0, "speed": 50.0, "size": 4 * 2**20, "parameters": 500_000},
}


def write_study(runs: Path, name: str = "tiny", **changes: Any) -> Path:
    """A study without trials."""
    data = {
        "name": name,
        "description": "a study of a test",
        "objectives": OBJECTIVES,
        "units": METRICS,
        "stages": STAGES,
        "config": {"name": name, "space": {"mlps": ["swiglu"]}, "rungs": {"at": [0.5]}},
        **changes,
    }
    path = runs / name
    (path / "trials").mkdir(parents=True)
    (path / "study.json").write_text(json.dumps(data))
    return path


def write_trial(
    study: Path, number: int, outcome: str = "complete", pattern: str = "M-A-", **record: Any
) -> Path:
    """A trial; of a pattern there is a layout, and a complete one has a curve and weights."""
    folder = study / "trials" / f"{number:05d}"
    folder.mkdir()
    data = {
        "number": number,
        "outcome": outcome,
        "pattern": pattern,
        "params": {"d_model": 16, "quantizer": "int8"},
        "stage_seconds": {"static": 0.01, "training": 1.25},
        "environment": ENVIRONMENT,
        "seconds": 1.5,
        **record,
    }
    if pattern:
        (folder / "layout.json").write_text(json.dumps(layout_data(pattern)))
    if outcome == "complete":
        write_curve(folder, steps=20)
        (folder / "model.safetensors").write_bytes(b"no real weights")
    (folder / "trial.json").write_text(json.dumps(data))
    return folder


def write_curve(folder: Path, steps: int) -> None:
    """A curve whose loss falls from 5 as 1/step."""
    rows = [
        {"step": n, "tokens": 512 * n, "seconds": 0.1 * n, "loss": 5.0 / n, "lr": 1e-3}
        for n in range(1, steps + 1)
    ]
    (folder / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def layout_data(pattern: str) -> dict[str, Any]:
    """A layout of the layers that a pattern's glyphs stand for; mixers are stored as int8."""
    names = {"M": "mamba", "A": "attention", "-": "swiglu"}
    blocks: list[dict[str, Any]] = []
    for glyph in pattern:
        block: dict[str, Any] = {"layer": names[glyph], "config": {"expand": 2, "bias": False}}
        if glyph != "-":
            block["quantizer"] = {"name": "int8", "config": {"group_size": 128}}
        blocks.append(block)
    return {"format": 1, "d_model": 16, "vocab_size": 256, "blocks": blocks}


def write_zoo(runs: Path) -> Path:
    """A study with a trial of every outcome but `running`."""
    study = write_study(runs)
    patterns = ["M-A-", "M-", "A-A-", "M-M-M-"]
    for number, figures in FIGURES.items():
        extras = {"speed.spread": 0.125}
        write_trial(study, number, pattern=patterns[number], metrics=figures, extras=extras)
    write_trial(study, 4, "infeasible", pattern="", reason="periodic.offset: 3 is beyond 2 layers")
    write_trial(
        study, 5, "duplicate", "M-", reason="the same layout as trial 1", duplicate_of=1,
        metrics=FIGURES[1],
    )  # fmt: skip
    write_curve(write_trial(study, 6, "diverged", reason="loss is nan at step 3"), steps=3)
    failed = write_trial(study, 7, "error", reason="ValueError: planted fault")
    (failed / "log.txt").write_text("Traceback\nValueError: planted fault\n")
    for number, outcome in enumerate(("out_of_memory", "timeout", "crashed", "interrupted"), 8):
        write_trial(study, number, outcome, reason=f"{outcome} for a test")
    rung = {"share": 0.5, "step": 10, "seconds": 1.0, "decision": "stop", "metrics": {"loss": 4.5}}
    reason = "trial 0 dominated it at step 10 (50% of the training)"
    write_trial(study, 12, "stopped", reason=reason, rungs=[rung])
    return study
