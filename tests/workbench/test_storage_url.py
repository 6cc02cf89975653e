"""Storage URLs: refused where they cannot work, and never shown with their passwords."""

from __future__ import annotations

import traceback

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import URL, make_url

from tests.workbench.conftest import make_config
from workbench.errors import FieldError, UnknownNameError, WorkbenchError
from workbench.storage_url import (
    Store,
    checked,
    chosen,
    default_url,
    has_password,
    public_environment,
    redacted,
    scrubbed,
)

SECRET = "tops3cret"
passwords = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=6)


@given(passwords)
def test_no_password_survives_redaction(password):
    url = URL.create("postgresql+psycopg", "me", password, "host", 5432, "db")
    text = url.render_as_string(hide_password=False)
    assert has_password(text)
    assert redacted(text) == "postgresql+psycopg://me:***@host:5432/db"
    assert make_url(checked(text, "--storage")).password == password
    said = scrubbed(f"FATAL: no {text} for {password}", text)
    # What is left of the text is in the rest of the message as well.
    assert password not in said or password in "FATAL: no postgresql+psycopg://me:***@host:5432/db"


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{SECRET}@host/db",
        f"postgresql://me:a@{SECRET}@host/db",  # @ in a password, not quoted
        f"postgresql://me:a@{SECRET}:b@host/db",
        f"postgresql://me:a@b/{SECRET}@host/db",
        f"postgresql://me:a@{SECRET}?b@host/db",
        f"postgresql://me:a@b?{SECRET}@host/db",
        f"postgresql://me@host/db?scram_client_key={SECRET}",
        f"postgresql://me@host/db?oauth_client_secret={SECRET}",
        f"postgresql://me@host/db?password={SECRET}",
        f"postgresql://me@host/db?sslpassword={SECRET}",
        f"postgresql://me:{SECRET}@host:port/db",
        f"me:{SECRET}@host",
        f"mysql://me:{SECRET}@host/db",
        f"postgresql://me:{SECRET}@host",
    ],
)
def test_what_is_shown_or_said_of_a_url_holds_no_secret(url):
    assert SECRET not in redacted(url)
    assert has_password(url)
    assert SECRET not in repr(Store(url))
    said = ""
    try:
        assert SECRET in checked(url, "--storage")
    except WorkbenchError as error:
        said = "".join(traceback.format_exception(error))
    assert SECRET not in said


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("nonsense", "is no storage URL"),
        ("redis://host/0", "unknown storage 'redis'. Known: sqlite, postgresql"),
        ("sqlite://", "in memory"),
        ("sqlite:///:memory:", "in memory"),
        ("postgresql://host", "names no database"),
    ],
)
def test_what_is_no_storage_is_refused_naming_who_gave_it(url, words, monkeypatch):
    with pytest.raises(FieldError, match="--storage: .*" + words):
        chosen(url, None)
    monkeypatch.setenv("WORKBENCH_STORAGE", url)
    with pytest.raises(FieldError, match="WORKBENCH_STORAGE: .*" + words):
        chosen(None, None)


def test_the_option_goes_before_the_environment_and_that_before_the_file(monkeypatch, tmp_path):
    urls = [f"sqlite:///{tmp_path}/{name}.db" for name in ("option", "environment", "file")]
    monkeypatch.delenv("WORKBENCH_STORAGE", raising=False)
    assert chosen(None, None) == Store(None)
    assert chosen(None, urls[2]) == Store(urls[2])
    monkeypatch.setenv("WORKBENCH_STORAGE", urls[1])
    assert chosen(None, urls[2]) == Store(urls[1])
    assert chosen(urls[0], urls[2], 7.0) == Store(urls[0], 7.0)


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=8))
def test_no_password_survives_however_it_is_quoted(password):
    """Unquoted, a URL may be split anywhere; what is shown of it is of the host, or nothing."""
    shown = redacted(f"postgresql://me:{password}@host:5432/db")
    if "@" in password:
        assert shown == "postgresql://***"
    else:
        assert shown in ("postgresql://me:***@host:5432/db", "postgresql://***")


@pytest.mark.parametrize(("option", "configured"), [("", None), (None, ""), ("", "sqlite:///a.db")])
def test_an_empty_url_is_a_mistake_and_no_wish_for_the_default(option, configured, monkeypatch):
    monkeypatch.setenv("WORKBENCH_STORAGE", "")
    assert chosen(None, None) == Store(None)
    with pytest.raises(FieldError, match="is empty: give a URL"):
        chosen(option, configured)


def test_children_are_told_no_password(monkeypatch):
    monkeypatch.setenv("WORKBENCH_STORAGE", f"postgresql://me:{SECRET}@host/db")
    monkeypatch.setenv("PGPASSWORD", SECRET)
    monkeypatch.setenv("KEPT", "yes")
    told = public_environment()
    assert told["KEPT"] == "yes"
    assert not any(SECRET in value for value in told.values())


def test_files_are_named_from_the_root_and_drivers_in_full(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert checked("sqlite:///a.db", "") == f"sqlite:///{tmp_path}/a.db"
    for scheme in ("postgres", "postgresql", "postgresql+psycopg"):
        assert checked(f"{scheme}://me@host/db", "") == "postgresql+psycopg://me@host/db"


def test_the_default_survives_strange_folders(tmp_path):
    folder = tmp_path / "100% {of} it, née #1?"
    assert make_url(default_url(folder)).database == str(folder / "optuna.db")


def test_a_study_file_takes_a_url_but_no_password(study_data):
    url = "postgresql+psycopg://me@host/db"
    assert make_config(study_data, **{"runtime.storage": url}).runtime.storage == url
    for url in (f"postgresql://me:{SECRET}@host/db", f"postgresql://host/db?password={SECRET}"):
        with pytest.raises(FieldError, match=r"runtime.storage.*WORKBENCH_STORAGE") as caught:
            make_config(study_data, **{"runtime.storage": url})
        assert SECRET not in str(caught.value)
    with pytest.raises(FieldError, match=r"runtime.storage_patience"):
        make_config(study_data, **{"runtime.storage_patience": -1.0})
    with pytest.raises(UnknownNameError, match="Did you mean 'storage'"):
        make_config(study_data, **{"runtime.storag": "sqlite:///x.db"})
