"""Files of one source that differ in their columns or types: each is read as it is alone, or refused."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_tokenizer, write_jsonl
from files import DAMAGES
from hypothesis import given, settings
from hypothesis import strategies as st

from logitgen.config import Config
from logitgen.errors import UsageError
from logitgen.split.load import load_split
from logitgen.split.tokens import tokenize

Rows = list[dict[str, Any]]

TEMPLATE = "{{ tools | tojson if tools else '' }}{% for m in messages %}{{ m | tojson }}<|end|>{% endfor %}"
TOKENIZER = make_tokenizer()
TOKENIZER.chat_template = TEMPLATE
USER = {"role": "user", "content": "Hello"}


def load(path: Path, **options: Any) -> datasets.Dataset:
    return load_split(Config(teacher="m", dataset=str(path), output="o.h5", **options))


def tokens(path: Path, **options: Any) -> list[list[int]]:
    config = Config(teacher="m", dataset=str(path), output="o.h5", **options)
    return list(tokenize(load_split(config), TOKENIZER, config)["input_ids"])


def write(folder: Path, *files: Rows) -> Path:
    folder.mkdir(exist_ok=True)
    for number, rows in enumerate(files):
        write_jsonl(folder / f"{'abcdef'[number]}.jsonl", rows)
    return folder


def write_parquet(folder: Path, *files: Rows) -> Path:
    """Write files in which Arrow makes structs of objects."""
    folder.mkdir(exist_ok=True)
    for number, rows in enumerate(files):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{'abcdef'[number]}.parquet")
    return folder


def calling(arguments: Any, **members: Any) -> Rows:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"messages": [{"role": "assistant", "content": "", "tool_calls": [call], **members}]}]


def talking(arguments: Any) -> Rows:
    return [{"messages": [USER, *calling(arguments)[0]["messages"]]}]


def text(*contents: str, **others: Any) -> Rows:
    return [{"text": content, **others} for content in contents]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (text("a"), text("b", number=1)),
        (text("a", number=1), text("b", number="one")),
        (text("a", number=1, name={"a": 1}), text("b", name=[])),
        ([{"text": "a", "number": 1}], [{"number": 2, "text": "b"}]),
    ],
    ids=["one more", "other types", "nested", "another order"],
)
@pytest.mark.parametrize("source", ["", "*.jsonl"])
def test_columns_that_are_not_read_may_differ(tmp_path: Path, one: Rows, other: Rows, source: str) -> None:
    for first, second in ((one, other), (other, one)):
        rows = load(write(tmp_path, first, second) / source).select_columns("text").to_list()
        assert rows == [{"text": row["text"]} for row in first + second]


def test_the_columns_that_are_left_out_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "logitgen"):
        load(write(tmp_path, text("a", name=1), text("b", number=1)))
    assert "The files' columns differ. Columns not used: name, number." in caplog.text


def test_the_column_of_text_that_is_named_is_read_of_files_of_any_shape(tmp_path: Path) -> None:
    write(tmp_path, [{"story": "a", "messages": [USER]}], [{"story": "b", "text": "c"}])
    assert load(tmp_path, text_column="story").to_list() == [{"story": "a"}, {"story": "b"}]


def test_a_column_that_a_row_may_lack_may_be_missing_in_a_file(tmp_path: Path) -> None:
    rows = load(write(tmp_path, [{"input_ids": [1, 2], "attention_mask": [1, 0]}], [{"input_ids": [3, 4]}]))
    assert rows["input_ids"][:] == [[1, 2], [3, 4]]
    assert rows["attention_mask"][:] == [[1, 0], None]
    assert tokens(tmp_path) == [[1], [3, 4]]


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("large text", pa.table({"text": pa.array(["b"], pa.large_string())})),
        ("no value", pa.table({"text": pa.array(["b"]), "more": pa.nulls(1)})),
        ("smaller ids", pa.table({"input_ids": pa.array([[7]], pa.list_(pa.int32()))})),
        ("large lists", pa.table({"input_ids": pa.array([[7]], pa.large_list(pa.uint16()))})),
        ("no ids", pa.table({"input_ids": pa.array([[]], pa.list_(pa.null()))})),
    ],
)
def test_types_that_differ_in_width_alone_are_joined(tmp_path: Path, name: str, table: pa.Table) -> None:
    other = pa.table({"text": ["a"]}) if "text" in table.column_names else pa.table({"input_ids": [[2**30]]})
    pq.write_table(other, tmp_path / "a.parquet")
    pq.write_table(table, tmp_path / "b.parquet")
    names = other.column_names
    assert load(tmp_path).select_columns(names).to_list() == other.to_pylist() + table.select(names).to_pylist()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (calling({"x": 1}), calling({"y": 1})),
        (calling({"x": 1}), calling({"y": 1, "x": 1})),
        (calling({"x": 1, "y": 1}), calling({"y": 1, "x": 1})),
        (calling({"x": 1}), calling({"x": 1.5})),
        (calling({"x": 1}), calling({"x": "1"})),
        (calling({"x": "5"}), calling({"x": [1, {"y": None}]})),
        (calling({"x": 1}), calling({"x": 1}) + calling({"z": 0.123456789})),
        (calling({"x": 1}), talking({"x": 1}) + talking({"z": 0.5})),
        ([{"messages": [USER]}], talking({"x": "5"})),
        (calling({"x": 1}), calling('{"x": 1}')),
        (calling({"x": 1}, name="n"), calling({"x": 1}, content="c")),
        ([{"messages": [USER]}], [{"messages": json.dumps([USER | {"name": None}])}]),
        ([{"messages": [USER], "tools": [{"a": 1, "b": None}]}], [{"messages": [USER]}]),
        ([{"messages": [USER], "tools": [{"a": 1, "b": None}]}], [{"messages": [USER], "tools": [{"a": "1"}]}]),
        ([{"messages": [USER], "tools": [{"a": 1}, {"b": 2}]}], [{"messages": [USER], "tools": '[{"a": "1"}]'}]),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_chats_that_differ_give_the_tokens_that_each_file_gives_alone(
    tmp_path: Path, one: Rows, other: Rows, ending: str
) -> None:
    try:
        (write if ending == "jsonl" else write_parquet)(tmp_path / "data", one, other)
    except pa.ArrowInvalid:
        pytest.skip("no struct of Arrow has members of several types")
    alone = [*tokens(tmp_path / "data" / f"a.{ending}"), *tokens(tmp_path / "data" / f"b.{ending}")]
    assert tokens(tmp_path / "data") == alone
    assert tokens(tmp_path / "data" / f"*.{ending}") == alone


def test_pairs_of_messages_with_other_members_are_joined(tmp_path: Path) -> None:
    one = [{"prompt": [USER], "completion": [{"role": "assistant", "content": "a"}]}]
    other = [{"prompt": [{**USER, "name": "n"}], "completion": [{"role": "assistant", "content": "b"}]}]
    write(tmp_path, one, other)
    assert tokens(tmp_path) == [*tokens(tmp_path / "a.jsonl"), *tokens(tmp_path / "b.jsonl")]


members = st.dictionaries(
    st.sampled_from("xyz"), st.integers(-9, 9) | st.booleans() | st.text("5a", max_size=2) | st.lists(st.integers(0, 2))
)


@settings(max_examples=15)
@given(one=members, other=members)
def test_any_arguments_of_two_files_give_the_tokens_of_the_files_alone(
    tmp_path_factory: pytest.TempPathFactory, one: dict[str, Any], other: dict[str, Any]
) -> None:
    try:
        folder = write_parquet(tmp_path_factory.mktemp("calls"), calling(one), calling(other))
    except pa.ArrowException:  # Parquet has no struct without members
        return
    assert tokens(folder) == [*tokens(folder / "a.parquet"), *tokens(folder / "b.parquet")]


SEVERAL = "^--dataset .* has files with different "


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            [text("a"), [{"story": "b"}]],
            r"columns: .*/b\.jsonl has story, of other files text would be read\. Give all",
        ),
        ([text("a"), [{"messages": [USER]}]], r"columns: .*/a\.jsonl has text, of other files messages would be read"),
        ([[{"story": "a"}], [{"tale": "b"}]], r"columns: .*/a\.jsonl has story, none of them can be read\. Give all"),
        (
            [text("a"), text("b"), [{"text": 5}]],
            r"types: 'text' is string in .*/a\.jsonl and int64 in .*/c\.jsonl\. Give",
        ),
        (
            [[{"text": 5}], text("b")],
            r"types: 'text' is int64 in .*/a\.jsonl and string in .*/b\.jsonl\. Give all files",
        ),
        ([[{"input_ids": [1]}], [{"input_ids": [1.0]}]], r"types: 'input_ids' is List.*int64.* and List.*float64"),
        ([[{"input_ids": [1]}], [{"input_ids": ["1"]}]], r"types: 'input_ids' is List.*int64.* and List.*string"),
        (
            [[{"prompt": "a", "completion": "b"}], [{"prompt": [USER], "completion": [USER]}]],
            r"types: 'prompt' is string in .* and Json.* in .*/b\.jsonl\. Give all files the same\.$",
        ),
    ],
)
def test_files_that_do_not_agree_are_named(tmp_path: Path, files: list[Rows], message: str) -> None:
    for source in (write(tmp_path, *files), tmp_path / "*.jsonl"):
        with pytest.raises(UsageError, match=SEVERAL + message) as raised:
            load(source)
        assert "\n" not in str(raised.value)


def test_files_that_mark_the_completion_in_other_columns_are_named(tmp_path: Path) -> None:
    write(tmp_path, [{"input_ids": [1], "labels": [1]}], [{"input_ids": [1], "completion_mask": [1]}])
    assert tokens(tmp_path) == [[1], [1]]
    with pytest.raises(UsageError, match=SEVERAL + r"columns: .*/a\.jsonl has input_ids, labels, of other files input"):
        load(tmp_path, completion_only=True)


def test_files_outside_the_split_may_be_of_any_shape(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", text("a"))
    write_jsonl(tmp_path / "test.jsonl", [{"story": "b"}])
    assert load(tmp_path).to_list() == text("a")
    with pytest.raises(UsageError, match=SEVERAL + r"columns: .*/test\.jsonl has story"):
        load(tmp_path, split="train+test")


def test_a_compressed_and_a_plain_table_are_joined(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"text,number\nNA,1\n"))
    (tmp_path / "b.tsv").write_text("text\nb, c\n")
    assert load(tmp_path).to_list() == text("NA", "b, c")


@pytest.mark.parametrize("damage", ["cut at a record batch", "cut inside a batch", "all zeros", "empty"])
def test_damaged_rows_of_a_joined_file_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write_parquet(tmp_path / "data", calling({"x": 1}) * 3000, calling({"x": "1"}))
    expected = load(tmp_path / "data").to_list()
    seals = (tmp_path / "cache" / "logitgen").glob("*/*.json")  # of both files, in any order
    copy = max((seal.with_suffix(".arrow") for seal in seals), key=lambda path: path.stat().st_size)
    content = DAMAGES[damage](copy)
    copy.unlink()
    copy.write_bytes(content)
    assert load(tmp_path / "data").to_list() == expected
    assert re.search(r"made anew: the file is damaged", caplog.text)
