"""The package as a user meets it: its README's study, its figures, and an exported model."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import optuna
import pytest

from workbench.builder import Builder
from workbench.layout import Block, Layout, Named
from workbench.space import Space
from workbench.study_config import StudyConfig

README = Path(__file__).with_name("README.md").read_text(encoding="utf-8")


def test_the_readmes_study_draws_layouts_with_experts(builder_with_moe: Builder) -> None:
    (text,) = re.findall(r"```toml\n(.+?)```", README, re.DOTALL)
    config = StudyConfig.from_dict(tomllib.loads(text))
    for name in config.objectives:
        assert name in builder_with_moe.metrics
    space = Space(config.space, builder_with_moe, 256)
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    seen = set()
    for _ in range(30):
        layout = space.suggest(study.ask())
        total = builder_with_moe.costs(layout, length=16).total
        experts = [block for block in layout.blocks if block.layer == "moe"]
        dense = all(block.config["top_k"] == block.config["num_experts"] for block in experts)
        assert (total.active_parameters == total.parameters) == dense
        seen |= {block.config["num_experts"] for block in experts}
    assert seen == {4, 8, 16}


def test_the_readmes_figures_are_the_exact_counts(builder_with_moe: Builder) -> None:
    rows = re.findall(r"\| `(\S+)` \| ([\d,]+) \| ([\d,]+) \|", README)
    assert len(rows) == 3
    for name, parameters, active in rows:
        total = builder_with_moe.costs(builder_with_moe.presets[name].layout(), length=1).total
        assert f"{total.parameters:,}" == parameters
        assert f"{total.active_parameters:,}" == active


@pytest.mark.slow
def test_an_exported_model_computes_the_same_in_a_fresh_process(
    builder_with_moe: Builder, tmp_path: Path
) -> None:
    config = {"num_experts": 4, "shared_expand": 1.0, "shared_gate": True}
    experts = Block(
        layer="moe", config=config, quantizer=Named(name="int8", config={"group_size": 32})
    )
    layout = Layout(d_model=32, vocab_size=64, blocks=(Block(layer="mamba"), experts))
    model = builder_with_moe.build(layout, seed=1).eval()
    report = builder_with_moe.exporters["huggingface"].export(
        model, builder_with_moe, tmp_path / "model", None, {"study": "test", "trial": 0}
    )
    assert report.max_difference <= 1e-5
    files = {Path(name).name for name in report.files}
    assert {"workbench_plugin_lm_moe.py", "workbench_mlp_swiglu.py"} <= files
    assert "workbench_plugin_lm_moe_presets.py" not in files
