"""What plugins do to what all share, during one trial: put back, and the trial's outcome."""

from __future__ import annotations

import contextlib

from workbench import sanity
from workbench.builder import Builder
from workbench.guard import Guard, describe_changes
from workbench.layout import Layout
from workbench.verdict import PAUSED, Verdict


class TrialGuard:
    """Puts back what plugins changed of what all share; a trial that did is an error.

    Args:
        guard: of the builder's plugins; it is renewed.
    """

    def __init__(self, verdict: Verdict, builder: Builder, layout: Layout, guard: Guard) -> None:
        self.verdict, self.builder, self.layout = verdict, builder, layout
        self.guard = guard

    def __enter__(self) -> None:
        self.guard.renew()

    def __exit__(self, *error: object) -> None:
        changes = self.guard.restore()
        if not changes or self.verdict.outcome == "interrupted":
            return
        reason = f"{self._who({change.module for change in changes})} {describe_changes(changes)}"
        if self.verdict.outcome not in ("complete", PAUSED):
            reason += f" It also ended as {self.verdict.outcome}: {self.verdict.reason}"
        self.verdict.outcome, self.verdict.reason = "error", reason

    def _who(self, modules: set[str]) -> str:
        """Whose code it is, as far as the changes tell, or which layer does it again."""
        builder = self.builder
        tops = {module.partition(".")[0] for module in modules}
        for plugin in builder.plugins.loaded.values():
            if plugin.module.partition(".")[0] in tops:
                return f"plugin {plugin.plugin!r}"
        for block in dict.fromkeys(self.layout.blocks):
            guard = Guard(builder.plugins.packages)
            # A layer that needs others before it cannot be tried alone; then nobody is named.
            with contextlib.suppress(BaseException):
                sanity.check_outputs(builder.build(self.layout.replace(blocks=(block,))), 2)
            if guard.restore():
                plugin = builder.layers.provenance(block.layer)
                return f"layer {block.layer!r} (plugin {plugin.plugin!r})"
        return "a plugin of this trial"
