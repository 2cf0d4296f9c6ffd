"""Every value of a table of text is the text that the file has."""

import csv
import gzip
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


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz"])
@pytest.mark.parametrize("start", ["\n", "\r\n\r\n", "\ufeff\n", "  \n", "\n\n\n"])
def test_blank_lines_may_stand_before_the_header(tmp_path: Path, start: str, name: str) -> None:
    content = f'{start}prompt,completion\n"a",\n\nb,c\n'.encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    rows = load_split(Config(teacher="m", dataset=str(tmp_path / name), output="o"))
    assert rows.to_list() == [{"prompt": "a", "completion": ""}, {"prompt": "b", "completion": "c"}]


CARD = """---
dataset_info:
  features: [{name: text, dtype: string}, {name: number, dtype: int64}]
  splits: [{name: train, num_bytes: 1, num_examples: 3}]
---
"""


def test_a_card_gives_types_and_leaves_texts_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "train.csv").write_text('text,number\nNA,007\n"",\nnull,NA\n')
    config = Config(teacher="m", dataset=str(tmp_path), output="o")
    assert load_split(config)["number"][:] == [7, None, None]
    assert load_split(config)["text"][:] == ["NA", "", "null"]


def test_options_of_a_card_are_heeded(tmp_path: Path) -> None:
    options = "{config_name: default, data_files: train.csv, skiprows: 1, index_col: 0, sep: ;}"
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- {options}\n---\n")
    (tmp_path / "train.csv").write_text("a table\nname;text\nx;NA\nx;\n")
    rows = load_split(Config(teacher="m", dataset=str(tmp_path), output="o"))
    assert rows.to_list() == [{"text": "NA", "name": "x"}, {"text": "", "name": "x"}]


def test_words_for_nothing_are_rows_also_where_datasets_gives_no_options(tmp_path: Path) -> None:
    """As it does for a dataset of the hub, or one whose card tells its size."""
    (tmp_path / "README.md").write_text(CARD.replace("  features", "  # features"))
    (tmp_path / "train.csv").write_text('text\nNA\n""\nnull\n')
    rows = load_split(Config(teacher="m", dataset=str(tmp_path), output="o"))
    assert rows["text"][:] == ["NA", "", "null"]


def test_a_text_may_be_long(tmp_path: Path) -> None:
    assert load(tmp_path / "rows.csv", f"text\n{'a' * 200_000}\n")[0] == {"text": "a" * 200_000}


def test_a_mark_of_the_byte_order_is_no_text(tmp_path: Path) -> None:
    for name, content in (("rows.csv", "\ufefftext\na\n"), ("rows.txt", "\ufeffa\n")):
        assert load(tmp_path / name, content).to_list() == [{"text": "a"}]
