"""A stranger's distribution: once installed, commands list its layer, search it and export it.

It is installed into an empty folder, as pip installs it anywhere, and seen from fresh processes.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import TEXT_STUDY, Cli, process

SOURCE = Path(__file__).parents[2] / "plugins" / "example-linear-attention"

LOAD = """
import json, sys, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = torch.tensor([list(b"Das")])
made = model.generate(tokens, max_new_tokens=4, do_sample=False)
assert not any(name.split(".")[0] in ("workbench", "lm_linear_attention") for name in sys.modules)
print(json.dumps(made[0, 3:].tolist()))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with nothing but the installed example in it."""
    folder = tmp_path_factory.mktemp("third-party")
    # pip builds in the source folder: a copy keeps build/ and *.egg-info out of the checkout.
    ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    source = shutil.copytree(SOURCE, folder / "source", ignore=ignored)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--target", str(folder / "site")]
    subprocess.run([*pip, *options, str(source)], check=True, capture_output=True)
    return str(folder / "site")


def test_its_layer_is_listed_with_package_version_and_file(cli: Cli, site: str) -> None:
    rows = json.loads(process("plugins", "--json", PYTHONPATH=site).stdout)["registered"]
    (row,) = [row for row in rows if row["package"] == "example-linear-attention"]
    assert (row["kind"], row["name"]) == ("layers", "linear-attention")
    assert row["version"] == "0.1.0"
    assert row["file"] == str(Path(site) / "lm_linear_attention.py")
    without = cli("plugins", "--json").json["registered"]
    assert [r for r in rows if r != row] == without


@pytest.mark.slow
def test_a_study_searches_it_and_its_trial_is_exported(cli: Cli, site: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Das ist ein Text.\n" * 800)
    study = tmp_path / "study.toml"
    study.write_text(
        TEXT_STUDY.replace("{text}", str(text))
        .replace('["mamba", "attention"]', '["linear-attention"]')
        .replace("[space.layers.attention]\nnum_heads = 2\nnum_kv_heads = 1\n", "")
        .replace('quantizers = ["int8"]\n', "")
    )
    places = ("--runs", tmp_path / "runs")
    ran = process("run", study, *places, "--json", PYTHONPATH=site)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["front"] == ["notes:0"]
    record = json.loads((tmp_path / "runs/notes/trials/00000/trial.json").read_text())
    assert record["pattern"] == "LL"

    exported = process("export", "notes:0", tmp_path / "out", *places, "--json", PYTHONPATH=site)
    assert exported.returncode == 0, exported.stderr
    report = json.loads(exported.stdout)
    assert report["max_difference"] <= 1e-5
    assert set(report["files"]) == {path.name for path in Path(report["path"]).iterdir()}
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert loaded.returncode == 0, loaded.stderr
    assert len(json.loads(loaded.stdout)) == 4

    # Without the distribution its trials are still listed, and say what is missing.
    assert cli("show", "notes", *places).status == 0
    assert "unknown layer 'linear-attention'" in cli("describe", "notes:0", *places).refused()
