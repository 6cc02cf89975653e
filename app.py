"""The dashboard from a clone: `streamlit run app.py`. Once installed: `workbench dashboard`."""

from workbench.dashboard.app import main

main()
