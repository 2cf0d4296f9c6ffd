"""Rows of JSON files are what Python's own `json` reads, wherever in a file they stand and however it is written."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from logitgen.config import Config
from logitgen.errors import UsageError
from logitgen.split import json_rows
from logitgen.split.load import load_split
from logitgen.split.tokens import tokenize

Row = dict[str, Any]

DATES = {"text": "2024-05-01", "tags": ["2024-05-01T10:00:00"]}
CALL = {"messages": [{"role": "assistant", "args": {"day": "2024-05-01", "x": 1, "none": None}}]}


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row is a batch of its own, so what stands behind the first 10 MB is told by a few rows."""
    monkeypatch.setattr(json_rows, "_BATCH_CHARACTERS", 1)


def load(path: Path, content: str, **options: Any) -> datasets.Dataset:
    path.write_text(content, encoding="utf-8", newline="")
    return load_split(Config(teacher="m", dataset=str(path), output="o", **options))


def lines(rows: list[Row]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def filled(rows: list[Row]) -> list[Row]:
    """Rows with a null for every column that they lack."""
    names = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name) for name in names} for row in rows]


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.text(st.characters(codec="utf-8"), max_size=3),
    st.dates().map(str),
    st.lists(st.integers(0, 9), max_size=2),
    st.lists(st.dictionaries(st.sampled_from("xy"), st.none() | st.floats(allow_nan=False) | st.dates().map(str))),
)


@settings(max_examples=150, deadline=None)
@example([{"text": "a"}, {"text": "b"}, {"text": 5}])
@example([{"text": "a", "tools": None}, {"text": "b", "tools": [{"x": 1.0}]}])
@example([{"text": "a"}, {"text": "b", "tools": []}, {"text": "b", "tools": [{"x": None}]}])
@example([{"text": "a", "tools": 2**70}, {"text": "b", "tools": [2**70]}])
@example([{"text": "a", "input_ids": [1]}, {"text": "b", "input_ids": ["1"]}, {"text": "c", "input_ids": [[]]}])
@given(st.lists(st.dictionaries(st.sampled_from(["text", "tools", "input_ids"]), values, min_size=1), min_size=1))
def test_every_row_is_read_as_it_is_written(tmp_path_factory: pytest.TempPathFactory, rows: list[Row]) -> None:
    folder = tmp_path_factory.mktemp("rows")
    for path, content in ((folder / "a.jsonl", lines(rows)), (folder / "b.json", json.dumps(rows, indent=1))):
        assert json.dumps(load(path, content).to_list()) == json.dumps(filled(rows))


@pytest.mark.parametrize(
    "form",
    [
        "{0}\n{1}\n\n",
        "{0}\n  \n{1}",
        "\n{0}\n{1}\n",
        "\ufeff{0}\n{1}\n",
        "{0}\r\n{1}\r\n\r\n",
        "{0}{1}",
        "[{0},\n{1}]\n",
        "\n [{0}, {1}]",
        "\ufeff[{0}, {1}]",
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("row", [DATES, CALL])
def test_however_a_file_is_written_its_rows_are_the_same(
    tmp_path: Path, form: str, indent: int | None, row: Row
) -> None:
    content = form.format(*[json.dumps(row, indent=indent)] * 2)
    assert json.dumps(load(tmp_path / "rows.jsonl", content).to_list()) == json.dumps([row, row])


def test_line_separators_within_text_end_no_row(tmp_path: Path) -> None:
    rows = [{"text": "a\u2028b\x85c\u2029d\x0ce\x1cf", "more": {"a": "a\u2028b\x85c"}}]
    assert load(tmp_path / "rows.jsonl", lines(rows)).to_list() == rows


def test_half_a_surrogate_pair_is_refused_only_where_it_is_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = load(tmp_path / "rows.jsonl", '{"text": "a", "b": ""}\n{"text": "ab", "b": "b\\ud83d"}\n')
    config = Config(teacher="m", dataset="rows.jsonl", output="o")
    assert tokenize(rows, tokenizer, config)["input_ids"][:] == tokenizer(["a", "ab"])["input_ids"]
    with pytest.raises(UsageError, match=r"^Row 1: character 1 of 'b' is half a surrogate pair, .* Remove it\.$"):
        tokenize(rows, tokenizer, dataclasses.replace(config, text_column="b"))


def test_texts_without_objects_are_rows_of_text(tmp_path: Path) -> None:
    assert load(tmp_path / "rows.json", '["2024-05-01", "b"]').to_list() == [{"text": "2024-05-01"}, {"text": "b"}]


def test_the_splits_of_a_folder_have_types_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: a.json}\n"
        "  - {split: test, path: b.json}\n  field: data\n---\n"
    )
    train, test = [{"text": "2024-05-01"}], [{"text": "a", "tools": [{"x": 1}]}]
    (tmp_path / "b.json").write_text(json.dumps({"version": 1, "data": test}))
    (tmp_path / "a.json").write_text(json.dumps({"version": 1, "data": train}))
    for split, rows in (("train", train), ("test", test)):
        assert load_split(Config(teacher="m", dataset=str(tmp_path), output="o", split=split)).to_list() == rows


def test_objects_that_a_card_has_within_lists_get_no_members(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\ndataset_info:\n  features: [{name: messages, list: json}]\n---\n")
    rows = [
        {"messages": [CALL["messages"][0], {"role": "5", "args": {"x": [1, "a"], "y": {}}}, None]},
        {"messages": None},
    ]
    (tmp_path / "train.jsonl").write_text(lines(rows))
    assert load_split(Config(teacher="m", dataset=str(tmp_path), output="o")).to_list() == rows


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"text": "a"}\n{"text": \n', "line 2 is not JSON, at character 1: Expecting value"),
        ('{"text": "a"}\n\n{"text": "b"} x\n', "line 3 is not JSON, at character 15: Extra data"),
        ('\n{"text": \n', r"Expecting value: line 3 column 1"),
    ],
)
def test_a_file_that_is_not_json_is_refused_with_the_place(tmp_path: Path, content: str, reason: str) -> None:
    with pytest.raises(UsageError, match=rf"^--dataset .*rows\.jsonl cannot be loaded .*: .*{reason}"):
        load(tmp_path / "rows.jsonl", content)
