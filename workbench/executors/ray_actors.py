"""What runs on the nodes of a Ray cluster. Ray itself is not imported here.

Each slot is an actor that keeps a worker process of its own, as the process executor does: logs,
time and memory limits hold there as they do here, and a worker that dies takes nothing with it.
"""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path
from typing import Any

from workbench.executors.base import Ended, Job, Task
from workbench.executors.process import ProcessExecutor


def sees(token: str) -> bool:
    """Whether this node has the file that the study's process wrote."""
    return Path(token).exists()


class Slot:
    """One worker on whatever node has room for it.

    Args:
        job: what the worker must know.
        token: a file of the runs folder.
    """

    def __init__(self, job: dict[str, Any], token: str) -> None:
        self._token = token
        self._executor = ProcessExecutor(Job.from_dict(job))

    def judge(self, task: dict[str, Any], mailbox: Any) -> dict[str, Any]:
        """The `verdict` on a task, and how many messages were `sent` before it.

        Where no trial can be judged: why, as `failed`.
        """
        if not sees(self._token):
            folder = Path(self._token).parent.parent
            return {"failed": f"the node {socket.gethostname()} does not share {folder}"}

        sent = 0

        def heard(number: int, message: dict[str, Any]) -> None:
            nonlocal sent
            sent += 1
            mailbox.put.remote(number, message)

        try:
            self._executor.submit(Task.from_dict(task))
            ended: list[Ended] = []
            while not ended:
                ended = self._executor.wait(heard)
        except Exception as error:  # as words: not every exception survives the way back
            return {"failed": f"{socket.gethostname()}: {error}"}
        return {"verdict": ended[0][1].to_dict(), "sent": sent}

    def is_there(self) -> bool:
        """Answers once the actor has found a node and started."""
        return True

    def stop(self) -> None:
        """End the worker, while `judge` waits for it in another thread."""
        self._executor.interrupt()


class Mailbox:
    """Progress on its way from the slots to the study's process."""

    def __init__(self) -> None:
        self._messages: list[tuple[int, dict[str, Any]]] = []
        self._arrived = asyncio.Event()

    async def is_there(self) -> bool:
        """Answers once the actor has started."""
        return True

    async def put(self, number: int, message: dict[str, Any]) -> None:
        self._messages.append((number, message))
        self._arrived.set()

    async def take(self) -> list[tuple[int, dict[str, Any]]]:
        """All that came since the last time, at least one message."""
        await self._arrived.wait()
        self._arrived.clear()
        messages, self._messages = self._messages, []
        return messages
