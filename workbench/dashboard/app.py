"""The page map: what `workbench dashboard` serves."""

from __future__ import annotations

import os

import streamlit as st

from workbench.dashboard import links

# Streamlit leaves a sixth of the screen empty above every title, and its figures and tables leave
# the width of the page unused.
STYLE = """<style>
.stMainBlockContainer { padding-top: 4rem; padding-bottom: 3rem; }
.stMainBlockContainer h1 { font-size: 2rem; padding: 0.25rem 0; }
[data-testid="stMetricValue"] { font-size: 1.5rem; }
[data-testid="stTable"] td * { max-width: none !important; }
</style>"""


def main() -> None:
    """One run of the app: the navigation, then the page that the browser asks for."""
    st.set_page_config(page_title="workbench", page_icon=":material/account_tree:", layout="wide")
    pages = [
        st.Page(links.STUDIES, title="Studies", icon=":material/folder_open:", default=True),
        st.Page(links.STUDY, title="Study", icon=":material/scatter_plot:", url_path="study"),
        st.Page(links.TRIAL, title="Trial", icon=":material/science:", url_path="trial"),
    ]
    st.html(STYLE)
    page = st.navigation(pages, position="top")
    first_visit = not st.session_state.get("visited", False)
    st.session_state["visited"] = True
    if first_visit and page is pages[0] and os.environ.get("WORKBENCH_STUDY"):
        st.switch_page(links.STUDY)
    page.run()


if __name__ == "__main__":
    main()
