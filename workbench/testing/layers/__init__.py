"""LayerContract: the tests that any layer must pass."""

from __future__ import annotations

from workbench.testing.layers.bookkeeping import BookkeepingTests
from workbench.testing.layers.conduct import ConductTests
from workbench.testing.layers.devices import DeviceTests
from workbench.testing.layers.execution import ExecutionTests
from workbench.testing.layers.exporting import ExportTests
from workbench.testing.layers.outputs import OutputTests
from workbench.testing.layers.sources import SourceTests
from workbench.testing.layers.training import TrainingTests


class LayerContract(
    OutputTests,
    ConductTests,
    TrainingTests,
    ExecutionTests,
    DeviceTests,
    BookkeepingTests,
    ExportTests,
    SourceTests,
):
    """Everything that the rest of the workbench relies on in a layer.

        class TestMyLayer(LayerContract):
            layer = MyLayer
            configs = [MyLayer.Config(), MyLayer.Config(num_heads=1)]

    Outputs are compared in float64, so that a difference is a mistake and no rounding. What takes
    seconds is done for the first of the configs alone: compiling, and the export round trip, which
    is marked slow.

    A layer that builds on an earlier block overrides `earlier`, and is tested together with it:

        def earlier(self, config):
            return [("attention", Attention, Attention.Config(num_heads=4))]

    Class attributes:
        layer: the class under test.
        configs: Config instances that can be built at `d_model`; cover every branch of the layer.
        d_model: residual width of the tests, 32.
        lengths: sequence lengths; one above the layer's chunk size finds mistakes at its borders.
        tolerance: in float64, relative to the largest output.
        float32_tolerance: of float32 against float64, likewise.
        straight_through: True for a layer with a straight-through estimator (quantization-aware
            training), whose gradients are no derivatives: they are then not held against finite
            differences.
        flops_factor: how many times the FLOPs that torch counts `costs` may state, 2: torch counts
            matrix products, and neither elementwise work nor fused attention on a CPU.
        captured: True for a layer whose steps a CUDA graph can replay: the check of its static
            steps then fails where they cannot, and is not skipped.
        name: the layer's own in the layouts that `Layer.source` is given, `"under-test"`.
        in_model: True for a layer that needs a model around it (`Context.embedding_BTD`).
    """


__all__ = ["LayerContract"]
