"""A layout at another size as an exported folder, its weights as they are initialised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workbench import config as configs
from workbench.builder import Builder
from workbench.environment import package_versions
from workbench.exporter import ExportReport
from workbench.files import refuse_existing, replacing
from workbench.layout import Layout

# As the model card of the built-in exporter describes every model.
TRAINED = ", found and trained with workbench."
UNTRAINED = (
    ", found with workbench and scaled.\n\n**It is not trained: its weights are random, as its "
    "layers initialise them.**"
)
COPIES = 3  # the model, the copy that an exporter proves, and the fresh process's


def export_bytes(builder: Builder, layout: Layout) -> int:
    """Bytes that an export holds at once, at the least: quantizers need one more copy."""
    parameters = builder.costs(layout, length=1).total.parameters
    stored = any(block.quantizer is not None for block in layout.blocks)
    return 4 * parameters * (COPIES + stored)


def export_untrained(
    builder: Builder, layout: Layout, out: Path, exporter: str, metadata: dict[str, Any]
) -> ExportReport:
    """Write a freshly initialised model to the new folder `out`; its card says so.

    Args:
        metadata: for the record, besides versions and that it is not trained.

    Raises:
        UnknownNameError: no such exporter.
        WorkbenchError: `out` is there, or the proof failed.
    """
    exporter_class = builder.exporters[exporter]
    refuse_existing(out)
    model = builder.build(layout).eval()
    config: Any = configs.from_dict(exporter_class.Config, {})
    facts = {"trained": False, "versions": package_versions(), **metadata}
    report = exporter_class.export(model, builder, out, config, facts)
    _say_untrained(out / "README.md")
    return report


def _say_untrained(card: Path) -> None:
    if not card.exists():
        return
    text = card.read_text(encoding="utf-8")
    notice = UNTRAINED.partition("\n\n")[2]
    said = text.replace(TRAINED, UNTRAINED, 1) if TRAINED in text else f"{text}\n{notice}\n"
    with replacing(card) as temporary:
        temporary.write_text(said, encoding="utf-8")
