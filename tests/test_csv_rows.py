"""Every value of a table of text is the text that the file has."""

import csv
import io
from pathlib import Path

import datasets
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from logitgen.config import Config
from logitgen.errors import UsageError
from logitgen.split.load import load_split


def load(path: Path, content: str) -> datasets.Dataset:
    path.write_text(content, encoding="utf-8", newline="")
    return load_split(Config(teacher="m", dataset=str(path), output="o"))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(["4", "007", "1.50", "True", "NA", "", "2024-05-01", "a", "inf", 'a "b"\r\n c,d'])))
def test_a_value_stays_the_text_that_it_is(tmp_path_factory: pytest.TempPathFactory, found: list[str]) -> None:
    assume(found)
    file = io.StringIO(newline="")
    csv.writer(file).writerows([["prompt", "completion"], *(["a", value] for value in found)])
    rows = load(tmp_path_factory.mktemp("rows") / "rows.csv", file.getvalue())
    assert rows.to_list() == [{"prompt": "a", "completion": value} for value in found]


def test_numbers_behind_thousands_of_texts_keep_their_digits(tmp_path: Path) -> None:
    rows = load(tmp_path / "rows.csv", "text\n" + "a\n" * 10_000 + "007\n1.50\n")
    assert rows[10_000:]["text"] == ["007", "1.50"]


def test_rows_with_more_values_than_the_header_has_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot be loaded .* rows have more values than its header has names\.$"):
        load(tmp_path / "rows.csv", "prompt,completion\na,b,\nc,d,\n")


def test_a_value_that_a_row_lacks_is_no_empty_text(tmp_path: Path) -> None:
    """A line break without quotes around it begins such a row."""
    rows = load(tmp_path / "rows.csv", "prompt,completion\na,first line\nsecond line\nb,\n")
    assert rows["completion"][:] == ["first line", None, ""]


def test_blank_lines_are_no_rows_and_empty_texts_are(tmp_path: Path) -> None:
    assert load(tmp_path / "rows.csv", 'text\n\na\n""\n\n\nb\r\n  \n\n').to_list() == [
        {"text": text} for text in ("a", "", "b", "  ")
    ]


def test_a_text_may_be_long(tmp_path: Path) -> None:
    assert load(tmp_path / "rows.csv", f"text\n{'a' * 200_000}\n")[0] == {"text": "a" * 200_000}


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    for name, content in (("rows.csv", "\ufefftext\na\n"), ("rows.txt", "\ufeffa\n")):
        assert load(tmp_path / name, content).to_list() == [{"text": "a"}]
