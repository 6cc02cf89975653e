"""Judges trials on a Ray cluster: one that is there, or one that is started on this machine.

The runs folder must be on a file system that all nodes share: workers leave curves, checkpoints
and weights in it. Records and storage are written by the study's process alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import secrets
import socket
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workbench.errors import DiskError, WorkbenchError
from workbench.executors.base import Ended, Executor, Heard, Job, Task
from workbench.executors.ray_actors import Mailbox, Slot, sees
from workbench.storage_url import hidden_passwords
from workbench.verdict import Verdict

if TYPE_CHECKING:
    from workbench.trial import Workplace

REACH = 5.0  # seconds for a connection to a cluster's port
CHECK = 120.0  # seconds for all nodes to say whether they share the runs folder
TURN = 0.5  # seconds between looks at a pressed Ctrl-C, and at the nodes
STOPPING = 10.0  # seconds for a slot to end its worker
TOKEN = "RAY_AUTH_MODE"  # how Ray is told that its clusters ask for one
SETTINGS = b"\0\0\0\4\0\0\0\0\0"  # HTTP/2's first frame of both sides, here an empty one (RFC 9113)
GREETING = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + SETTINGS  # Ray's servers speak gRPC
STORE = 100 * 2**20  # bytes of a local cluster's object store, which only ever holds JSON


def open_executor(place: Workplace, cache_dir: Path) -> RayExecutor:
    """The executor of a study.

    Raises:
        WorkbenchError: Ray is not installed, the cluster cannot be reached, has no room for a
            worker, or does not share the runs folder.
    """
    from workbench.identity import used_plugins

    config, device = place.config, place.device
    if not device.startswith("cuda"):
        runtime = dataclasses.replace(config.runtime, threads=place.threads)
        config = dataclasses.replace(config, runtime=runtime)
    job = Job(
        config=config,
        device="cuda:0" if device.startswith("cuda:") else device,
        cache_dir=cache_dir.resolve(),
        plugins=used_plugins(place.config, place.builder),
    )
    return RayExecutor(job)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would hide all devices from workers that asked for none, and warns that it will not.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import ray
    except ImportError:
        raise WorkbenchError(
            "executor = 'ray' needs Ray, which is not installed: pip install 'lm-workbench[ray]'"
        ) from None
    return ray


def _connect(ray: Any, address: str | None, cpus: int | None) -> None:
    """Join the cluster at `address`, or start one of `cpus` (None: all) on this machine.

    Raises:
        WorkbenchError: it cannot be reached; says what to do.
    """
    quiet = {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if address is None:
                with hidden_passwords():
                    ray.init(
                        address="local",
                        num_cpus=cpus,
                        include_dashboard=False,
                        object_store_memory=STORE,
                        **quiet,
                    )
            else:
                _refuse_others(address)
                _join(ray, address, quiet)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        reason = _first_line(error)
        if address is None:
            raise WorkbenchError(f"no Ray cluster could be started here: {reason}") from None
        raise WorkbenchError(
            f"no Ray cluster answers at {address}: {reason}. Start one (ray start --head), give "
            "its --address, or leave the address away to start one on this machine alone."
        ) from None


def _join(ray: Any, address: str, quiet: dict[str, Any]) -> None:
    try:
        ray.init(address=address, **quiet)
    except (OSError, RuntimeError) as error:
        if TOKEN in os.environ:
            raise
        # To an address that it is given Ray sends no token by itself, and says no more than this.
        raise ConnectionError(
            f"{_first_line(error)}; if it asks for a token: {TOKEN}=token"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


def _refuse_others(address: str) -> None:
    """Refuse an address at which no Ray listens: Ray itself would try for minutes.

    Raises:
        OSError, ValueError: what is wrong with it.
    """
    if address == "auto":
        return
    scheme, _, rest = address.rpartition("://")
    host, _, port = rest.partition("/")[0].rpartition(":")
    if scheme not in ("", "ray") or not port.isdigit():
        raise ValueError("the address is not auto, host:port or ray://host:port")
    with socket.create_connection((host.strip("[]"), int(port)), REACH) as there:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return  # what is said there is said under TLS
        there.sendall(GREETING)
        with there.makefile("rb") as answer:
            if answer.read(len(SETTINGS))[3:4] != SETTINGS[3:4]:
                raise ValueError("what listens there is not Ray")
    if scheme and find_spec("grpc") is None:
        raise ValueError("ray:// needs Ray's client: pip install 'ray[client]'")


@dataclasses.dataclass
class _Flight:
    """A task on its way.

    Attributes:
        there: a reference that is ready once the actor has found a node and started.
        heard: messages of the task that came so far.
    """

    task: Task
    actor: Any
    there: Any
    heard: int = 0


class RayExecutor(Executor):
    """One actor a slot; one that died, with its node or alone, is replaced where there is room.

    Args:
        job: what the workers must know.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.runtime = job.config.runtime
        self._ray = ray = _import_ray()
        self._on_gpus = job.device.startswith("cuda")
        self._cpus = self.runtime.threads or 1
        self._busy: dict[Any, _Flight] = {}  # by the reference to its verdict
        self._idle: list[Any] = []
        self._mailbox: Any = None
        self._counted, self._slots = 0.0, 0
        self._token = _write_token(job.cache_dir)
        self._owns = not ray.is_initialized()
        try:
            if self._owns:
                workers = self.runtime.workers
                _connect(ray, self.runtime.address, workers and workers * self._cpus)
            if self._count() < 1:
                raise WorkbenchError(
                    f"the Ray cluster has no node with {self._needs()}: add one, or change "
                    "runtime.device or runtime.threads."
                )
            self._refuse_strangers()
            self._open_mailbox()
        except BaseException:
            self.close()
            raise

    def _needs(self) -> str:
        return "a GPU" if self._on_gpus else f"{self._cpus} CPUs"

    def _count(self) -> int:
        """Slots that the nodes which are alive have room for."""
        resource, each = ("GPU", 1) if self._on_gpus else ("CPU", self._cpus)
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        room = sum(int(node.get(resource, 0) // each) for node in nodes)
        return min(room, self.runtime.workers or room)

    @property
    def slots(self) -> int:
        if time.monotonic() - self._counted > TURN:
            self._counted, self._slots = time.monotonic(), self._count()
        if not self._slots and not self._busy:
            raise WorkbenchError(
                f"the Ray cluster has no node with {self._needs()} left: start some, and run the "
                "study again."
            )
        return self._slots

    def _refuse_strangers(self) -> None:
        """Refuse nodes that do not see the runs folder."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        look = self._ray.remote(num_cpus=0, max_retries=0)(sees)
        asked = {
            look.options(scheduling_strategy=On(node["NodeID"], soft=False)).remote(
                str(self._token)
            ): node["NodeManagerAddress"]
            for node in self._ray.nodes()
            if node["Alive"]
        }
        answered, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=CHECK)
        blind = [name for ref, name in asked.items() if ref in answered and not self._get(ref)]
        if blind or not answered:
            raise WorkbenchError(
                f"nodes of the Ray cluster do not share {self._token.parent.parent}: "
                f"{', '.join(blind) or 'none answers'}. Put the runs folder (--runs) on a file "
                "system that all nodes mount at the same place."
            )

    def _get(self, ref: Any) -> Any:
        """What a reference holds; None if its node is gone."""
        try:
            return self._ray.get(ref)
        except self._ray.exceptions.RayError:
            return None

    def _open_mailbox(self) -> None:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On

        options: dict[str, Any] = {"num_cpus": 0, "max_restarts": -1}
        if not self._ray.util.client.ray.is_connected():  # a client is on no node
            here = self._ray.get_runtime_context().get_node_id()
            options["scheduling_strategy"] = On(here, soft=True)
        self._mailbox = self._ray.remote(Mailbox).options(**options).remote()
        self._ray.wait([self._mailbox.is_there.remote()], timeout=CHECK)
        self._mail = self._mailbox.take.remote()

    def submit(self, task: Task) -> None:
        while self._idle:
            actor = self._idle.pop()
            there = actor.is_there.remote()
            answered, _ = self._ray.wait([there], timeout=REACH)
            if answered and self._get(there):
                self._send(task, actor, there)
                return
            self._kill(actor)  # its node is gone, or as good as gone
        actor = self._new_slot()
        self._send(task, actor, actor.is_there.remote())

    def _send(self, task: Task, actor: Any, there: Any) -> None:
        ref = actor.judge.remote(task.to_dict(), self._mailbox)
        self._busy[ref] = _Flight(task, actor, there)

    def _relocate(self) -> None:
        """Give tasks whose actors have found no node yet to actors that have nothing to do.

        After the loss of a node the idle ones may hold all the room that is left.
        """
        for ref, flight in list(self._busy.items()):
            if not self._idle:
                return
            if not self._ray.wait([flight.there], timeout=0)[0]:
                del self._busy[ref]
                self._kill(flight.actor)
                self.submit(flight.task)

    def _new_slot(self) -> Any:
        needs = {"num_gpus": 1, "num_cpus": 0} if self._on_gpus else {"num_cpus": self._cpus}
        kind = self._ray.remote(Slot).options(
            **needs,
            scheduling_strategy="SPREAD",
            max_restarts=0,
            max_concurrency=2,  # for `stop` beside `judge`
        )
        return kind.remote(self.job.to_dict(), str(self._token))

    def wait(self, heard: Heard, timeout: float | None = None) -> list[Ended]:
        until = None if timeout is None else time.monotonic() + timeout
        while self._busy or until is not None:
            left = TURN if until is None else min(TURN, until - time.monotonic())
            refs = [self._mail, *self._busy]
            ready, _ = self._ray.wait(refs, num_returns=len(refs), timeout=0)
            if not ready:
                self._relocate()
                refs = [self._mail, *self._busy]
                ready, _ = self._ray.wait(refs, num_returns=1, timeout=max(0.0, left))
            self._deliver(ready, heard)
            ended = [self._end(ref, heard) for ref in ready if ref in self._busy]
            if ended or (until is not None and time.monotonic() >= until):
                return ended
        return []

    def _deliver(self, ready: list[Any], heard: Heard) -> None:
        if self._mail not in ready:
            return
        messages = self._get(self._mail) or []
        self._mail = self._mailbox.take.remote()
        flying = {flight.task.number: flight for flight in self._busy.values()}
        for number, message in messages:
            if number in flying:  # not of a trial that was given up
                flying[number].heard += 1
                heard(number, message)

    def _catch_up(self, flight: _Flight, sent: int, heard: Heard) -> None:
        """Deliver what was sent before a verdict, which may overtake it."""
        until = time.monotonic() + REACH  # a mailbox that died has lost its messages
        while flight.heard < sent and (left := until - time.monotonic()) > 0:
            ready, _ = self._ray.wait([self._mail], timeout=left)
            self._deliver(ready, heard)

    def _end(self, ref: Any, heard: Heard) -> Ended:
        flight = self._busy[ref]
        number, actor = flight.task.number, flight.actor
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            del self._busy[ref]
            self._kill(actor)
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            reason = f"its Ray node or actor is gone: {lines[0] if lines else error!r}"
            return number, Verdict(outcome="crashed", reason=reason)
        self._catch_up(flight, answer.get("sent", 0), heard)
        del self._busy[ref]
        self._idle.append(actor)
        if "failed" in answer:
            raise WorkbenchError(f"no worker could be started on {answer['failed']}")
        return number, Verdict(**answer["verdict"])

    def _kill(self, actor: Any) -> None:
        with contextlib.suppress(self._ray.exceptions.RayError, ValueError):
            self._ray.kill(actor, no_restart=True)

    def cancel(self) -> None:
        actors = [flight.actor for flight in self._busy.values()]
        self._busy.clear()
        self._stop(actors)

    def _stop(self, actors: list[Any]) -> None:
        stopping = [actor.stop.remote() for actor in actors]
        if stopping:
            self._ray.wait(stopping, num_returns=len(stopping), timeout=STOPPING)
        for actor in actors:
            self._kill(actor)

    def close(self) -> None:
        self._token.unlink(missing_ok=True)
        if not self._ray.is_initialized():
            return
        self.cancel()
        self._stop(self._idle)
        self._idle.clear()
        if self._mailbox is not None:
            self._kill(self._mailbox)
        if self._owns:
            self._ray.shutdown()


def _write_token(cache_dir: Path) -> Path:
    """A file by which nodes show that they share the runs folder."""
    token = cache_dir / f"ray-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        token.write_text("of a study that runs on Ray; of no use once it ended\n")
    except OSError as error:
        raise DiskError(f"cannot write to {cache_dir}: {error.strerror}") from None
    return token
