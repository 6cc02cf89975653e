"""Latency predicted from a table of single layers: known before anything is built.

The table is measured by `workbench latency`; how it predicts is in `workbench.latency`. Predicted
figures have names of their own and never stand in for measured ones; beside a measured one they
tell how far such a table can be believed.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from workbench.errors import WorkbenchError
from workbench.metric import Metric, Subject
from workbench_metrics.bounds import folder_of
from workbench_metrics.config import AUTO, Predicted, PredictedDecode, PredictedPrefill

if TYPE_CHECKING:
    from workbench.latency import LatencyModel
    from workbench.latency_machine import Phase


def report_prediction(subject: Subject, phase: Phase, batch_size: int, length: int) -> None:
    """Leave `predicted_ms` beside a measured time, where this machine's table knows the layout.

    A table that cannot be used leaves a note; none, or parts that it lacks, leave nothing.
    """
    from workbench.latency import LatencyModel
    from workbench.latency_machine import Machine
    from workbench.latency_table import LatencyTable
    from workbench.measuring import stepper_of

    timer, _ = stepper_of("auto", subject.device)
    dtype = str(subject.built.embedding.weight.dtype).removeprefix("torch.")
    folder, machine = folder_of(subject), Machine.here(subject.device, dtype, timer, None)
    if not (folder / f"{machine.slug}.json").exists():
        return
    try:
        table = LatencyTable.open(folder, machine)
    except WorkbenchError as error:
        subject.notes["predicted"] = str(error)
        return
    model = LatencyModel.fitted(table, subject.builder)
    prediction = model.predict(subject.layout, phase, batch_size, length)
    if prediction.seconds is not None:
        subject.extras["predicted_ms"] = prediction.seconds * 1000


class _PredictedMilliseconds(Metric):
    unit = "ms"
    stage = "static"
    phase: ClassVar[Phase]

    def __init__(self, config: Predicted) -> None:
        super().__init__(config)
        self._models: dict[tuple[Path, str], LatencyModel] = {}

    def measure(self, subject: Subject) -> float:
        length = getattr(self.config, "context" if self.phase == "decode" else "length")
        model = self._model(subject)
        prediction = model.predict(subject.layout, self.phase, self.config.batch_size, length)
        if prediction.seconds is None:
            raise WorkbenchError(
                f"the latency table {model.table.path} lacks {len(prediction.missing)} of this "
                f"layout's parts at {self.phase}, batch {self.config.batch_size}, length {length} "
                f"({prediction.missing[0]}): run `workbench latency STUDY.toml`."
            )
        correction = model.corrections[self.phase]
        subject.extras.update(
            overhead_ms=correction.overhead * 1000, fitted_to=correction.observations
        )
        return prediction.seconds * 1000

    def _model(self, subject: Subject) -> LatencyModel:
        """The model of the table, read once.

        Raises:
            WorkbenchError: there is no table of this machine, or it is another's.
        """
        # Here, for whoever never asks: most studies do without.
        from workbench.latency import LatencyModel
        from workbench.latency_machine import Machine
        from workbench.latency_table import LatencyTable
        from workbench.measuring import stepper_of

        config = self.config
        timer, _ = stepper_of(config.steps, subject.device)
        machine = Machine.here(subject.device, config.dtype, timer, config.threads)
        folder = folder_of(subject) if config.table == AUTO else Path(config.table)
        key = (folder, machine.slug)
        if key not in self._models:
            if config.table == AUTO:
                table = LatencyTable.open(folder, machine, must_exist=True)
            else:
                table = LatencyTable.read(folder)
                machine.require(table.machine, str(folder))
            self._models[key] = LatencyModel.fitted(table, subject.builder)
        return self._models[key]


class PredictedDecodeMilliseconds(_PredictedMilliseconds):
    """Predicted time of a decode step; `decode_ms` measures it."""

    Config: ClassVar[type] = PredictedDecode
    label = "Decode time a token, predicted"
    phase = "decode"


class PredictedPrefillMilliseconds(_PredictedMilliseconds):
    """Predicted time to take in a batch of prompts; `prefill_ms` measures it."""

    Config: ClassVar[type] = PredictedPrefill
    label = "Prefill time, predicted"
    phase = "prefill"
