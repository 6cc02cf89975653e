"""Out of memory as a message: refused beforehand where exact costs tell, explained where not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from workbench.environment import available_memory
from workbench.errors import WorkbenchError
from workbench.figures import figure


def require_memory(needed: int, device: str, advice: str) -> None:
    """Refuse what cannot fit.

    Args:
        needed: bytes that will be held at once, at the least.
        advice: what to do instead.

    Raises:
        WorkbenchError: the device has less.
    """
    available = available_memory(device)
    if needed > available:
        raise WorkbenchError(
            f"this needs at least {figure(needed, 'bytes')} of memory, and {device} has "
            f"{figure(available, 'bytes')}: {advice}"
        )


@contextmanager
def explained(advice: str) -> Iterator[None]:
    """Inside, running out of memory is a message.

    Raises:
        WorkbenchError: in place of what the allocator raised.
    """
    from workbench.verdict import classify

    try:
        yield
    except Exception as error:
        outcome, reason = classify(error)
        if outcome == "out_of_memory":
            raise WorkbenchError(f"out of memory ({reason}): {advice}") from None
        raise
