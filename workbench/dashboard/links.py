"""Which study and trial a page shows: the link says, else this session, else the command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import streamlit as st

from workbench.dashboard.reading import CachedStudy
from workbench.errors import WorkbenchError
from workbench.records import Trial

# Not "pages": Streamlit would serve what lies in such a folder by itself, without our page map, to
# whoever opens a link before anyone has opened the first page.
VIEWS = Path(__file__).parent / "views"
STUDIES = str(VIEWS / "studies.py")
STUDY = str(VIEWS / "study.py")
TRIAL = str(VIEWS / "trial.py")


def chosen_study(studies: Sequence[CachedStudy]) -> CachedStudy | None:
    """The study to show; None when there are several and nothing says which.

    Raises:
        WorkbenchError: the link (or the command line) names one that is not there.
    """
    name = (
        st.query_params.get("study")
        or st.session_state.get("study")
        or os.environ.get("WORKBENCH_STUDY")
    )
    if name is None:
        return studies[0] if len(studies) == 1 else None
    for study in studies:
        if study.name == name:
            return study
    known = ", ".join(study.name for study in studies)
    raise WorkbenchError(f"There is no study {name!r} in this runs folder. There is: {known}.")


def chosen_trial(study: CachedStudy) -> Trial | None:
    """The trial of `study` to show; None when nothing says which.

    Raises:
        WorkbenchError: the link names one that is not there.
    """
    of, number = st.session_state.get("trial", (None, None))
    text = st.query_params.get("trial") or (str(number) if of == study.name else None)
    if text is None:
        return None
    if not text.isdecimal():
        raise WorkbenchError(f"{text!r} is no trial: a link ends with trial=NUMBER, such as 7.")
    return study.trial(int(text))


def remember(study: CachedStudy, trial: Trial | None = None) -> None:
    """Make the address of this page a link to what it shows, and other pages show the same."""
    st.session_state["study"] = study.name
    st.query_params["study"] = study.name
    if trial is not None:
        st.session_state["trial"] = (study.name, trial.number)
        st.query_params["trial"] = str(trial.number)


def open_study(name: str) -> None:
    """Leave this page for a study's."""
    st.session_state["study"] = name
    st.switch_page(STUDY)


def open_trial(study: str, number: int) -> None:
    """Leave this page for a trial's."""
    st.session_state["study"] = study
    st.session_state["trial"] = (study, number)
    st.switch_page(TRIAL)
