"""The process that workers on the CPU are forked from: it imports what they need, once.

Importing torch takes seconds, which every worker would spend again: when a study begins, and after
each trial that ended its worker. Here they are spent once a study. Nothing but imports happens in
this process: no plugin is loaded, no thread started, no device touched. CUDA must not be touched
before a fork, and which devices a process sees is settled by its first imports, so workers on
devices start by themselves.

Standard input is a socket. A byte on it asks for a worker and brings three descriptors: its
standard input, its standard output, and a link. On the link the worker tells its process id and
this process how it ended (both as an `INT`). When the other side closes the link, or is gone, the
worker is killed with all that it started. Only then is its id free for another process, so that
whoever holds the link kills nobody else by it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import struct
import sys
import traceback
from typing import NoReturn

INT = struct.Struct("i")


def main() -> None:
    """Serve until the other side of standard input is gone."""
    from workbench.executors import worker

    control = socket.socket(fileno=os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    with worker.without_collections():
        worker.import_all("cpu")
    Source(control).serve()


class Source:
    """Forks workers, and ends them.

    Args:
        control: where workers are asked for.
    """

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._workers: dict[socket.socket, int] = {}  # link → process id
        self._running: set[socket.socket] = set()
        self._bell, ringing = socket.socketpair()
        self._bell.setblocking(False)
        ringing.setblocking(False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(ringing.detach())
        self._selector = selectors.DefaultSelector()
        for one in (self._control, self._bell):
            self._selector.register(one, selectors.EVENT_READ)

    def serve(self) -> None:
        """Until the other side is gone; then no worker is left."""
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is self._bell:
                    self._bell.recv(4096)
                    self._tell_ends()
                elif key.fileobj in self._workers:
                    self._end(key.fileobj)
                elif not self._fork():
                    for link in list(self._workers):
                        self._end(link)
                    return

    def _fork(self) -> bool:
        """Start the worker that is asked for; False if nobody can ask any more."""
        asked, descriptors, _, _ = socket.recv_fds(self._control, 1, 3)
        if not asked:
            return False
        process = os.fork()
        if process == 0:
            self._become_worker(*descriptors)
        link = socket.socket(fileno=descriptors.pop())
        for descriptor in descriptors:
            os.close(descriptor)
        self._workers[link] = process
        self._running.add(link)
        self._selector.register(link, selectors.EVENT_READ)
        return True

    def _become_worker(self, requests: int, answers: int, link: int) -> NoReturn:
        status = 1
        try:
            from workbench.executors import worker

            os.setsid()
            os.write(link, INT.pack(os.getpid()))
            os.close(signal.set_wakeup_fd(-1))
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(requests, 0)
            os.dup2(answers, 1)
            for key in list(self._selector.get_map().values()):
                os.close(key.fd)
            for descriptor in (requests, answers, link):
                os.close(descriptor)
            self._selector.close()
            worker.main()
            status = 0
        except BaseException:  # the worker ends here, whatever it is: it must not go on as a source
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)

    def _tell_ends(self) -> None:
        """Tell of the workers that ended by themselves, and keep their ids."""
        for link in list(self._running):
            options = os.WEXITED | os.WNOWAIT | os.WNOHANG
            ended = os.waitid(os.P_PID, self._workers[link], options)
            if ended is None:
                continue
            self._running.remove(link)
            exited = ended.si_code == os.CLD_EXITED
            with contextlib.suppress(OSError):  # nobody wants to know any more
                link.send(INT.pack(ended.si_status if exited else -ended.si_status))

    def _end(self, link: socket.socket) -> None:
        process = self._workers.pop(link)
        self._running.discard(link)
        for kill in (os.killpg, os.kill):  # it may not lead its group yet
            with contextlib.suppress(ProcessLookupError):
                kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        self._selector.unregister(link)
        link.close()


if __name__ == "__main__":
    main()
