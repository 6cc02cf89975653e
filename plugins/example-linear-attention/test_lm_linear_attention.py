"""The workbench's contract suite on the layer of this package, and a study that searches it."""

from lm_linear_attention import LinearAttention

from workbench.testing import LayerContract


class TestLinearAttention(LayerContract):
    layer = LinearAttention
    configs = (LinearAttention.Config(), LinearAttention.Config(num_heads=1))


def test_a_study_searches_it(workbench_study):
    study = workbench_study(layers=[LinearAttention, "attention"], trials=3)
    assert study.summary()["outcomes"]["complete"] == 3
    assert any("L" in trial.pattern for trial in study.trials())
