"""Where a study's storage is: a URL, checked before use and never shown with its password."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import FieldError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL

ENVIRONMENT = "WORKBENCH_STORAGE"
SECRETS = (ENVIRONMENT, "PGPASSWORD")  # variables that hold a password, or may
PATIENCE = 300.0
HIDDEN = "***"
SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9_.+-]*)://")
DRIVERS = {"postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}
KNOWN = ("sqlite", "postgresql+psycopg")


@dataclasses.dataclass(frozen=True, repr=False)
class Store:
    """A study's storage: its URL and how long it may be away.

    Attributes:
        url: with its password, if it has one: never print it. None: `optuna.db` in the study's
            folder.
        patience: seconds for which a storage that fails is tried again.
    """

    url: str | None = None
    patience: float = PATIENCE

    @property
    def shown(self) -> str | None:
        """The URL as records may have it."""
        return None if self.url is None else redacted(self.url)

    def __repr__(self) -> str:
        return f"Store({self.shown!r}, {self.patience:g})"


def chosen(option: str | None, configured: str | None, patience: float = PATIENCE) -> Store:
    """The storage that was asked for: the option's, else `WORKBENCH_STORAGE`'s, else the file's.

    Raises:
        FieldError: it is no URL of a storage; names who gave it, without repeating it.
    """
    for url, source in ((option, "--storage"), (configured, "runtime.storage")):
        if url == "":  # of a variable that is not set, say: not a wish for the default
            raise FieldError(source, "is empty: give a URL, or leave it away for the default")
    for url, source in (
        (option, "--storage"),
        (os.environ.get(ENVIRONMENT), ENVIRONMENT),
        (configured, "runtime.storage"),
    ):
        if url:
            return Store(checked(url, source), patience)
    return Store(None, patience)


def public_environment() -> dict[str, str]:
    """This process's environment without its storage's passwords: for children that run plugins."""
    return {name: value for name, value in os.environ.items() if name not in SECRETS}


@contextlib.contextmanager
def hidden_passwords() -> Iterator[None]:
    """Inside, this process's own environment is that: for a library that starts children itself."""
    hidden = {name: os.environ.pop(name) for name in SECRETS if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


def default_url(folder: Path) -> str:
    """The URL of the SQLite file in a study's folder."""
    from sqlalchemy.engine import URL

    return _rendered(URL.create("sqlite", database=str(folder / "optuna.db")))


def checked(url: str, source: str) -> str:
    """A URL in full: with its driver, a file's path from the root.

    Args:
        source: who gave it: an option, a variable or a field.

    Raises:
        FieldError: it cannot be read, or names another kind of storage.
    """
    parsed = _parsed(url)
    if parsed is None:
        raise FieldError(
            source,
            "is no storage URL: write sqlite:////path/to/file.db or "
            "postgresql+psycopg://user:password@host:5432/database, with @, / and % in a "
            "password written as %40, %2F and %25",
        )
    driver = DRIVERS.get(parsed.drivername, parsed.drivername)
    if driver not in KNOWN:
        raise FieldError(source, f"unknown storage {driver!r}. Known: {', '.join(KNOWN)}")
    parsed = parsed.set(drivername=driver)
    if driver == "sqlite":
        if parsed.database in (None, "", ":memory:"):
            raise FieldError(source, "names no file: a storage in memory ends with its process")
        return _rendered(parsed.set(database=str(Path(parsed.database).resolve())))
    if not parsed.database:
        raise FieldError(source, f"{redacted(url)} names no database: add /NAME")
    return _rendered(parsed)


def redacted(url: str) -> str:
    """A URL as it may be printed and recorded: its passwords are replaced by `***`.

    Of text that is no URL only the scheme is left, for nobody knows what of it is secret.
    """
    parsed = _parsed(url)
    if parsed is None:
        scheme = SCHEME.match(url)
        return f"{scheme.group(1)}://{HIDDEN}" if scheme else HIDDEN
    query = {name: HIDDEN if _secret(name) else value for name, value in parsed.query.items()}
    return parsed.set(query=query).render_as_string(hide_password=True)


def has_password(url: str) -> bool:
    """Whether a URL holds a password, or is so broken that it may."""
    parsed = _parsed(url)
    return parsed is None or bool(_passwords(parsed))


def scrubbed(text: str, url: str | None) -> str:
    """`text` (a database's message, say) without the passwords of `url`."""
    parsed = None if url is None else _parsed(url)
    if url is None or parsed is None:
        return text
    from urllib.parse import quote, quote_plus

    text = text.replace(url, redacted(url))
    for password in _passwords(parsed):
        for form in {password, quote(password, safe=""), quote_plus(password), quote(password)}:
            text = text.replace(form, HIDDEN)
    return text


def _passwords(parsed: URL) -> list[str]:
    in_query = [value for name, value in parsed.query.items() if _secret(name)]
    flat = [text for value in in_query for text in ([value] if isinstance(value, str) else value)]
    return [text for text in (parsed.password, *flat) if text]


def _secret(name: str) -> bool:
    """Whether an option of a connection is a secret: libpq's are passwords, keys and a secret."""
    words = ("password", "passwd", "pwd", "secret", "scram_", "token")
    return any(word in name.lower() for word in words)


def _parsed(url: str) -> URL | None:
    """The parts of a URL; None where it is none, or its password may reach into other parts."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        return None
    # A second @ is one of a password that is not quoted: its rest would be a host, or an option.
    if parsed.drivername != "sqlite" and url.count("@") > 1:
        return None
    return parsed


def _rendered(parsed: URL) -> str:
    return parsed.render_as_string(hide_password=False)
