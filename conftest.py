"""What all tests share, those of `tests/` and those beside each package in `plugins/`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.prepared import Prepared


@pytest.fixture(scope="session", autouse=True)
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prepared]:
    """Where the Hugging Face exporter proves its folders, when it runs in a test's process."""
    from workbench_export import proof

    source = Prepared(tmp_path_factory.mktemp("prepared"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "subprocess", source)
        yield source
    source.close()
