"""Errors of other libraries become one line."""

import pytest

from logitgen.errors import first_line, reason


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("the cause\nat great length\n"), "the cause"),
        (ValueError("\n   \n  the cause  \nat great length"), "the cause"),
        (ValueError(""), "ValueError"),
        (RuntimeError("\n\n"), "RuntimeError"),
        (KeyError(), "KeyError"),
    ],
)
def test_the_first_line_that_says_something_stands_for_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "h5py's own page of text (errno = 28)"), "No space left on device"),
        (OSError("h5py's own words"), "h5py's own words"),
    ],
)
def test_the_systems_own_words_come_before_a_librarys(error: OSError, words: str) -> None:
    assert reason(error) == words
