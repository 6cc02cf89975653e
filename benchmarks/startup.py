"""How long commands that only read take: prints a markdown table, `--check` holds the target.

    python benchmarks/startup.py [--rounds 15] [--check]

Wall seconds of whole processes, from their start to their end. The contestants take turns, so
that whatever else the machine does hits them alike; a figure is the median over the rounds.
Descriptions are kept in a cache folder, empty before each first one. The first one of a preset
was made before, as make does when it installs. After a change of sources (in a copy of them), it
is computed, and then found in the cache folder.
"""

import argparse
import datetime
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from workbench.environment import processor_name

TARGET = 0.3  # seconds
DESCRIBE = "workbench describe bamba-9b"
FIRST = f"{DESCRIBE} (first)"
CHANGED = f"{DESCRIBE} (first after a change of sources)"
AGAIN = f"{DESCRIBE} (repeated after that)"
CHANGED_TARGET = 0.3  # seconds besides torch's own import, which it cannot do without
ROOT = Path(__file__).parents[1]
TRIALS = 100
PEERS = ("python -c pass", 'python -c "import optuna"', 'python -c "import torch"')
WARM_UP_ROUNDS = 1  # writes bytecode, fills the disk cache


def make_study(runs: Path) -> None:
    """A study of `TRIALS` complete trials, as its records lie on disk."""
    objectives = [
        {"name": name, "unit": unit, "direction": "minimize"}
        for name, unit in (("bits_per_byte", "bits/byte"), ("decode_ms", "ms"))
    ]
    units = {objective["name"]: objective["unit"] for objective in objectives}
    study = runs / "many"
    study.mkdir(parents=True)
    data = {"name": "many", "objectives": objectives, "units": units}
    (study / "study.json").write_text(json.dumps(data))
    for number in range(TRIALS):
        folder = study / "trials" / f"{number:05d}"
        folder.mkdir(parents=True)
        record = {
            "number": number,
            "outcome": "complete",
            "pattern": "M-M-A-" * 4,
            "params": {f"parameter_{index}": index for index in range(12)},
            "metrics": {"bits_per_byte": 2 + number % 10 / 10, "decode_ms": 5 - number % 7 / 7},
        }
        (folder / "trial.json").write_text(json.dumps(record, indent=2))


def make_descriptions() -> None:
    """Describe the presets as the sources are now."""
    command = [sys.executable, "-m", "workbench.description_making"]
    subprocess.run(command, check=True, cwd=ROOT)


def changed_sources(folder: Path) -> str:
    """A copy of the sources in which one differs: the folders for PYTHONPATH."""
    no_bytecode = shutil.ignore_patterns("__pycache__")
    for package in (ROOT / "workbench", *ROOT.glob("plugins/workbench_*")):
        shutil.copytree(package, folder / package.relative_to(ROOT), ignore=no_bytecode)
    with (folder / "workbench/costs.py").open("a") as source:
        source.write("# changed\n")
    return os.pathsep.join(map(str, (folder, folder / "plugins")))


def contestants(folder: Path) -> dict[str, list[str]]:
    """Commands by name, the peers last."""
    make_study(folder / "many")
    command = str(Path(sys.executable).with_name("workbench"))
    return {
        'python -c "import workbench"': [sys.executable, "-c", "import workbench"],
        "workbench --help": [command, "--help"],
        "workbench show (no study)": [command, "show", "--runs", str(folder / "empty")],
        f"workbench show ({TRIALS} trials)": [command, "show", "--runs", str(folder / "many")],
        f"workbench show STUDY ({TRIALS} trials)": [
            *(command, "show", "many", "--runs", str(folder / "many"))
        ],
        FIRST: [command, *DESCRIBE.split()[1:]],
        CHANGED: [command, *DESCRIBE.split()[1:]],
        AGAIN: [command, *DESCRIBE.split()[1:]],
        PEERS[0]: [sys.executable, "-c", "pass"],
        PEERS[1]: [sys.executable, "-c", "import optuna"],
        PEERS[2]: [sys.executable, "-c", "import torch"],
    }


def seconds_of(command: list[str], **variables: str) -> float:
    """Wall seconds of one process, which must succeed."""
    environment = {**os.environ, "COLUMNS": "120", **variables}
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    return time.perf_counter() - started


def measure(commands: dict[str, list[str]], rounds: int, folder: Path) -> dict[str, list[float]]:
    """Seconds of every round by name."""
    changed = {"PYTHONPATH": changed_sources(folder / "sources")}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for index in range(WARM_UP_ROUNDS + rounds):
        for name, command in commands.items():
            if name in (FIRST, CHANGED):
                shutil.rmtree(folder / "cache", ignore_errors=True)
            variables = changed if name in (CHANGED, AGAIN) else {}
            spent = seconds_of(command, WORKBENCH_CACHE=str(folder / "cache"), **variables)
            if index >= WARM_UP_ROUNDS:
                seconds[name].append(spent)
    return seconds


def report(seconds: dict[str, list[float]], rounds: int) -> str:
    """The markdown table, under a line that says where and when."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("lm-workbench", "typer", "optuna"))
    lines = [
        f"{datetime.date.today()}, {processor_name()}, {os.cpu_count()} cores, "
        f"Python {platform.python_version()}, {packages}; {rounds} rounds",
        "",
        "| process | median s | fastest s | slowest s |",
        "|---|---:|---:|---:|",
    ]
    for name, spent in seconds.items():
        cells = (statistics.median(spent), min(spent), max(spent))
        lines.append(f"| `{name}` | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--check", action="store_true", help="fail above a target")
    options = parser.parse_args()
    make_descriptions()
    with tempfile.TemporaryDirectory() as folder:
        commands = contestants(Path(folder) / "runs")
        seconds = measure(commands, options.rounds, Path(folder))
    print(report(seconds, options.rounds))
    medians = {name: statistics.median(spent) for name, spent in seconds.items()}
    targets = {name: TARGET for name in seconds if name not in PEERS}
    targets[CHANGED] = medians[PEERS[2]] + CHANGED_TARGET
    slow = [name for name, target in targets.items() if medians[name] > target]
    for name in slow:
        print(f"{name} takes more than {targets[name]:.3g} s", file=sys.stderr)
    return int(options.check and bool(slow))


if __name__ == "__main__":
    sys.exit(main())
