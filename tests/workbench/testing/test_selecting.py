"""`--only`: what pytest would refuse is refused beforehand, in words that help."""

from __future__ import annotations

import pytest
from _pytest.mark.expression import Expression
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.errors import FieldError
from workbench.testing.selecting import check_names, refuse_malformed, resembling, selects_nothing

TOKENS = ["and", "or", "not", "(", ")", "costs", "mamba-130m", "a[b]", "=", "'", "AND"]


@settings(deadline=None)  # the first example imports the suites
@given(st.lists(st.sampled_from(TOKENS), min_size=1, max_size=7).map(" ".join))
def test_refused_is_what_pytest_refuses(only: str) -> None:
    try:
        Expression.compile(only)
    except Exception:
        with pytest.raises(FieldError):
            refuse_malformed(only)
    else:
        refuse_malformed(only)


@pytest.mark.parametrize(
    ("only", "words"),
    [
        ("costs and", "a name is missing after 'and'"),
        ("or costs", "a name is missing before 'or'"),
        ("costs or ()", "a name is missing before ')'"),
        ("left padding", "'padding' follows 'left', with no 'and' or 'or' between them"),
        ("costs not state", "'not' follows 'costs', with no 'and' or 'or' between them"),
        ("(costs or state", "a parenthesis is not closed"),
        ("costs)", "a parenthesis is closed that was not opened"),
        ("costs == 3", "'=' is in no name"),
        ("  ", "there is no name in it"),
    ],
)
def test_it_says_what_is_wrong_and_how_one_is_written(only: str, words: str) -> None:
    with pytest.raises(FieldError) as caught:
        refuse_malformed(only)
    message = str(caught.value)
    assert message.startswith(f"--only: {only!r}: {words}. Write parts of names of checks")
    assert "--only 'gradients or costs'" in message


def test_names_as_reports_print_them_are_found() -> None:
    assert "left_padding_leaks_nothing" in check_names()
    with pytest.raises(FieldError, match=r"Checks of such names: left_padding_leaks_nothing"):
        refuse_malformed("left padding leaks nothing")
    assert resembling("causalty or gradiants")[:2] == ["causality", "gradients"]
    assert "Checks of such names" not in str(selects_nothing("qqqq"))
    assert "Checks of such names: causality." in str(selects_nothing("test_causality"))
