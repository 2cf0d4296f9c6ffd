"""Where rows come from: every file format, folders, saved datasets, slices, and what is refused."""

import base64
import csv
import errno
import gzip
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import write_jsonl
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from logitgen.config import Config
from logitgen.errors import UsageError
from logitgen.split.csv_rows import CsvRows
from logitgen.split.json_rows import JsonRows
from logitgen.split.load import load_split

TEXTS = [f"row {index}, “quoted” 模型" for index in range(20)]
ROWS = [{"text": text, "number": str(index)} for index, text in enumerate(TEXTS)]


def load(path: Path | str, **options: Any) -> datasets.Dataset:
    return load_split(Config(teacher="m", dataset=str(path), output="o.h5", **options))


def write_json(path: Path) -> None:
    path.write_text(json.dumps(ROWS), encoding="utf-8")


def write_csv(path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "number"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_tsv(path: Path) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["text", "number"], dialect="excel-tab")
        writer.writeheader()
        writer.writerows(ROWS)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return bytes(sink.getvalue())


COMPRESS = {".gz": gzip.compress, ".zst": zstd}


def write_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same twenty rows as split `train` of every kind of source."""
    folder = tmp_path_factory.mktemp("sources")
    data = folder / "data"
    data.mkdir()
    write_jsonl(data / "train.jsonl", ROWS)
    write_jsonl(data / "test.jsonl", ROWS[:3])
    rows = datasets.Dataset.from_list(ROWS)
    rows.save_to_disk(folder / "saved")
    datasets.DatasetDict(train=rows, test=rows.select(range(3))).save_to_disk(folder / "saved_dict")
    return {
        "file": write_jsonl(folder / "rows.jsonl", ROWS),
        "folder": data,
        "saved": folder / "saved",
        "saved_dict": folder / "saved_dict",
    }


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.json", write_json),
        ("rows.jsonl", lambda path: write_jsonl(path, ROWS)),
        ("rows.parquet", lambda path: pq.write_table(pa.Table.from_pylist(ROWS), path)),
        ("rows.csv", write_csv),
        ("rows.tsv", write_tsv),
        ("rows.arrow", write_arrow_stream),
        ("rows_file.arrow", write_arrow_file),
        ("ROWS.JSONL", lambda path: write_jsonl(path, ROWS)),
        ("rows [1]*.jsonl", lambda path: write_jsonl(path, ROWS)),
        ("模型 ü.jsonl", lambda path: write_jsonl(path, ROWS)),
    ],
)
def test_a_file_gives_its_rows_in_order(tmp_path: Path, name: str, write: Callable[[Path], object]) -> None:
    write(tmp_path / name)
    assert load(tmp_path / name).to_list() == ROWS


def test_a_text_file_gives_one_row_per_line(tmp_path: Path) -> None:
    (tmp_path / "lines.txt").write_text("first\n\n third \nfou\u2028rth\nlast without end", encoding="utf-8")
    expected = ["first", "", " third ", "fou\u2028rth", "last without end"]
    assert load(tmp_path / "lines.txt").to_list() == [{"text": text} for text in expected]


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("rows.json", write_json),
        ("rows.jsonl", lambda path: write_jsonl(path, ROWS)),
        ("rows.csv", write_csv),
        ("rows.tsv", write_tsv),
        ("ROWS.JSONL", lambda path: write_jsonl(path, ROWS)),
        ("模型 (1)*.jsonl", lambda path: write_jsonl(path, ROWS)),
    ],
)
def test_a_compressed_file_gives_the_rows_of_its_content(
    tmp_path: Path, name: str, write: Callable[[Path], object], ending: str
) -> None:
    write(tmp_path / name)
    path = tmp_path / (name + (ending.upper() if name.isupper() else ending))
    path.write_bytes(COMPRESS[ending]((tmp_path / name).read_bytes()))
    (tmp_path / name).unlink()
    assert load(path).to_list() == ROWS
    if not name.isupper():  # `datasets` finds no such files in a folder
        assert load(tmp_path).to_list() == ROWS


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_compressed_text_file_gives_one_row_per_line(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"lines.txt{ending}"
    path.write_bytes(COMPRESS[ending]("first\n\nfou\u2028rth\nlast without end".encode()))
    assert [row["text"] for row in load(path)] == ["first", "", "fou\u2028rth", "last without end"]


def test_a_zst_file_of_several_frames_is_read_to_its_end(tmp_path: Path) -> None:
    """Made with the program `zstd`: a frame with a checksum and one without."""
    frames = "KLUv/SQlDQEA2HsidGV4dCI6ICJmaXJzdCJ9Cnp3w7ZsZiJ9CgEAapthB0Si4ii1L/0gEpEAAHsidGV4dCI6ICJ0aGlyZCJ9Cg=="
    (tmp_path / "rows.jsonl.zst").write_bytes(base64.b64decode(frames))
    assert [row["text"] for row in load(tmp_path / "rows.jsonl.zst")] == ["first", "zwölf", "third"]


def test_a_gz_file_of_several_members_is_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.txt.gz"
    path.write_bytes(gzip.compress(b"first\n") + gzip.compress(b"second\n"))
    assert load(path).to_list() == [{"text": "first"}, {"text": "second"}]


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize(
    ("name", "content"), [("a.jsonl", b'{"text": "%d"}\n'), ("a.csv", b"%d,b\n"), ("a.txt", b"%d\n")]
)
def test_a_compressed_file_that_was_cut_off_is_refused(tmp_path: Path, name: str, content: bytes, ending: str) -> None:
    path = tmp_path / (name + ending)
    whole = COMPRESS[ending](b"".join(content % (number**9) for number in range(2000)))
    for length in (len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(
            UsageError, match=rf"^--dataset .*{name}{ending} cannot be loaded .*(ended before|Truncated)"
        ):
            load(path)


@pytest.mark.parametrize(("ending", "reason"), [(".gz", "Not a gzipped file"), (".zst", "ZSTD decompress failed")])
def test_a_file_that_is_not_compressed_as_its_name_says_is_refused(tmp_path: Path, ending: str, reason: str) -> None:
    path = write_jsonl(tmp_path / f"rows.jsonl{ending}", ROWS)
    with pytest.raises(UsageError, match=rf"^--dataset .*rows\.jsonl{ending} cannot be loaded .*{reason}") as raised:
        load(path)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.csv", "rows.tsv", "rows.txt"])
def test_a_compressed_file_without_content_has_no_rows(tmp_path: Path, name: str, ending: str) -> None:
    (tmp_path / (name + ending)).write_bytes(COMPRESS[ending](b""))
    with pytest.raises(UsageError, match=rf"^--split train of .*{name}{ending} has no rows\.$"):
        load(tmp_path / (name + ending))


def test_brackets_in_the_name_of_a_compressed_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows[1].jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    for path in (tmp_path / "rows[1].jsonl.gz", tmp_path):
        with pytest.raises(
            UsageError, match=r"rows\[1\]\.jsonl\.gz: the name .* cannot have brackets. Rename the file\.$"
        ):
            load(path)


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv", "rows.csv.gz", "rows.tsv.zst"])
def test_na_is_a_word_in_a_table_of_text(tmp_path: Path, name: str) -> None:
    separator = "\t" if ".tsv" in name else ","
    content = f"text{separator}number\nNA{separator}1\nnull{separator}2\n".encode()
    (tmp_path / name).write_bytes(COMPRESS.get(Path(name).suffix, bytes)(content))
    for path in (tmp_path / name, tmp_path):
        assert load(path).to_list() == [{"text": "NA", "number": "1"}, {"text": "null", "number": "2"}]


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3)
objects = st.dictionaries(
    st.sampled_from("abc"),
    st.recursive(
        scalars | st.dates().map(str),
        lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=3),
        max_leaves=5,
    ),
)


@settings(max_examples=60, deadline=None)
@example(["{}"] * 3, [{"d": "2024-05-01"}, {"d": "2024-06-01"}])
@example(["[{}]", "{}"], [{"x": 1, "y": None}, {"y": 0.12345678901234, "x": 1.5}])
@given(st.lists(st.sampled_from(["{}", "[{}]", "[[], {}]"]), min_size=1, max_size=3), st.lists(objects, max_size=3))
def test_objects_in_json_files_are_read_as_they_are_written(
    tmp_path_factory: pytest.TempPathFactory, forms: list[str], found: list[dict[str, Any]]
) -> None:
    values = [json.loads(form.replace("{}", json.dumps(value))) for form, value in zip(forms, found, strict=False)]
    rows = [{"text": "a", "messages": value} for value in [{"a": 1}, *values]]
    folder = tmp_path_factory.mktemp("objects")
    write_jsonl(folder / "rows.jsonl", rows)
    (folder / "rows.json").write_text(json.dumps(rows))
    for name in ("rows.jsonl", "rows.json"):
        assert json.dumps(load(folder / name).to_list()) == json.dumps(rows)


@pytest.mark.parametrize(
    "columns",
    [
        {"id": "1", "source": "s", "model": "m", "system_prompt": "p"},
        {"type": "session_start", "id": "1", "version": 1, "cwd": "/"},
        {"type": "user", "message": {"a": 1}},
        {"type": "user", "payload": {"a": 1}},
    ],
)
def test_conversations_are_no_traces_of_agents(tmp_path: Path, columns: dict[str, Any]) -> None:
    rows = [{**columns, "messages": [{"role": "user", "content": "Hi"}]}]
    assert load(write_jsonl(tmp_path / "rows.jsonl", rows)).to_list() == rows


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Files with one row each, in two folders, beside other files."""
    write_jsonl(tmp_path / "part-10.jsonl", [{"text": "ten"}])
    write_jsonl(tmp_path / "part-2.jsonl", [{"text": "two"}])
    (tmp_path / "part-3.json.gz").write_bytes(gzip.compress(b'[{"text": "three"}]'))
    write_jsonl(tmp_path / "test.jsonl", [{"text": "test"}])
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write_jsonl(tmp_path / "deep" / "er" / "part-1ü.jsonl", [{"text": "one"}])
    (tmp_path / "notes.txt").write_text("a note\n")
    return tmp_path


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("part-*", ["ten", "two", "three"]),
        ("*.jsonl", ["ten", "two", "test"]),
        ("part-[23].*", ["two", "three"]),
        ("**/part-*.jsonl", ["one", "ten", "two"]),
        ("deep/**", ["one"]),
        ("*/er/*ü.jsonl", ["one"]),
    ],
)
def test_a_pattern_gives_the_rows_of_the_files_it_matches_sorted_by_name(
    shards: Path, pattern: str, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(shards / pattern).to_list() == [{"text": text} for text in expected]
    monkeypatch.chdir(shards)
    assert load(pattern).to_list() == [{"text": text} for text in expected]
    assert load(pattern, split="train[-1:]", limit=5).to_list() == [{"text": expected[-1]}]


def test_a_file_whose_name_is_a_pattern_is_that_file(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "part-*.jsonl", [{"text": "literal"}])
    write_jsonl(tmp_path / "part-1.jsonl", [{"text": "matched"}])
    assert load(tmp_path / "part-*.jsonl").to_list() == [{"text": "literal"}]


def test_a_file_more_that_a_pattern_matches_gives_its_rows_and_other_tokens(shards: Path) -> None:
    before = load(shards / "part-*.jsonl")
    write_jsonl(shards / "part-3.jsonl", [{"text": "new"}])
    after = load(shards / "part-*.jsonl")
    assert [row["text"] for row in after] == ["ten", "two", "new"]
    write_jsonl(shards / "part-3.jsonl", [{"text": "anew"}])
    changed = load(shards / "part-*.jsonl")
    assert [row["text"] for row in changed] == ["ten", "two", "anew"]
    assert len({rows._fingerprint for rows in (before, after, changed)}) == 3
    assert load(shards / "part-*.jsonl")._fingerprint == changed._fingerprint


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("part-*.csv", r" does not exist, and as a pattern it matches no file\.$"),
        ("dee[p]", r" does not exist, and as a pattern it matches no file, only folders such as .*/deep\.$"),
        ("[np]*", r" matches files of several formats, such as .*/notes\.txt and .*/part-10\.jsonl\. Narrow it down"),
        ("folder*", r" matches .*/folder\.jsonl, which is no file\. Narrow the pattern down to files\.$"),
        ("link*", r" matches .*/link\.jsonl, which is no file\. Narrow the pattern down to files\.$"),
        ("same*", r" matches .*/same-1\.jsonl and .*/same-2\.jsonl, the same file\. Narrow it down to one\.$"),
        ("*.md", r"/read\.md must end in one of .*, got '\.md'\.$"),
    ],
)
def test_a_pattern_that_matches_anything_but_files_of_one_format_is_refused(
    shards: Path, pattern: str, message: str
) -> None:
    (shards / "folder.jsonl").mkdir()
    (shards / "read.md").write_text("text")
    (shards / "link.jsonl").symlink_to("nowhere")
    for name in ("same-1.jsonl", "same-2.jsonl"):
        (shards / name).symlink_to(shards / "part-2.jsonl")
    with pytest.raises(UsageError, match=rf"^--dataset {re.escape(str(shards))}.*{message}"):
        load(shards / pattern)


def test_a_pattern_has_no_split_but_train_and_no_configurations(shards: Path) -> None:
    with pytest.raises(UsageError, match=r"Unknown split \"test\"\. Should be one of \['train'\]"):
        load(shards / "*.jsonl", split="test")
    with pytest.raises(UsageError, match=r"^--dataset_config is for datasets that have several"):
        load(shards / "*.jsonl", dataset_config="one")


@pytest.mark.parametrize("source", ["", "*.jsonl"])
def test_an_empty_file_among_others_is_told(tmp_path: Path, source: str, caplog: pytest.LogCaptureFixture) -> None:
    write_jsonl(tmp_path / "a.jsonl", [])
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    assert load(tmp_path / source).to_list() == ROWS
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}/a.jsonl has no rows."]
    (tmp_path / "b.jsonl").write_text("")
    with pytest.raises(UsageError, match=r"^--split train of .* has no rows\.$"):
        load(tmp_path / source)


@pytest.mark.parametrize("source", ["", "*.jsonl"])
def test_a_broken_file_among_others_is_named(tmp_path: Path, source: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").write_text('{"text": \n')
    with pytest.raises(UsageError, match=r"^--dataset .* cannot be loaded .*: .*/b\.jsonl: Expecting value: line 2"):
        load(tmp_path / source)


def test_files_of_a_folder_that_are_not_read_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "NOTES.txt").write_text("a note\n")
    assert load(tmp_path).to_list() == ROWS
    told = (
        f"Not read: {tmp_path}/NOTES.txt. Most files of {tmp_path} have another format, or its card leaves these out."
    )
    assert [record.getMessage() for record in caplog.records] == [told]


CARD_OF_TYPES = "---\ndataset_info:\n  features:\n  - {name: text, dtype: string}\n---\n"
CARD_OF_TWO = """---
configs:
- {config_name: one, data_files: one.jsonl}
- {config_name: two, data_files: two.csv, sep: ";"}
---
"""


def test_a_card_that_gives_the_types_is_followed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", [{"text": "five"}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": 5}])
    (tmp_path / "README.md").write_text(CARD_OF_TYPES)
    assert load(tmp_path).to_list() == [{"text": "five"}, {"text": "5"}]


def test_a_card_with_configurations_is_followed(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "one.jsonl", ROWS)
    (tmp_path / "two.csv").write_text("text;number\nNA;1\n")
    (tmp_path / "README.md").write_text(CARD_OF_TWO)
    assert load(tmp_path, dataset_config="one").to_list() == ROWS
    assert load(tmp_path, dataset_config="two").to_list() == [{"text": "NA", "number": "1"}]


def test_every_source_gives_the_rows_of_its_train_split(sources: dict[str, Path]) -> None:
    for path in sources.values():
        assert load(path).to_list() == ROWS


def test_another_split_is_taken_by_its_name(sources: dict[str, Path]) -> None:
    for source in ("folder", "saved_dict"):
        assert load(sources[source], split="test").to_list() == ROWS[:3]


def test_a_folder_without_split_names_is_one_train_split(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "part_a.jsonl", ROWS[:12])
    write_jsonl(tmp_path / "part_b.jsonl", ROWS[12:])
    assert load(tmp_path).to_list() == ROWS


def test_a_relative_path_is_taken_from_the_working_folder(
    sources: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(sources["file"].parent)
    for path in ("rows.jsonl", "./rows.jsonl", "data", "./data", "saved"):
        assert load(path).to_list() == ROWS


@pytest.mark.parametrize("source", ["file", "folder", "saved", "saved_dict"])
@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:10%]", ROWS[:2]),
        ("train[10%:20%]", ROWS[2:4]),
        ("train[2:5]", ROWS[2:5]),
        ("train[-3:]", ROWS[-3:]),
        ("train[15:99]", ROWS[15:99]),
        ("train[:2]+train[5:7]", ROWS[:2] + ROWS[5:7]),
        ("train[5:7]+train[:2]", ROWS[5:7] + ROWS[:2]),
    ],
)
def test_a_slice_gives_the_rows_the_slice_of_a_list_has(
    sources: dict[str, Path], source: str, split: str, expected: list[dict[str, Any]]
) -> None:
    assert load(sources[source], split=split).to_list() == expected


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["file", "saved_dict"]), st.integers(-20, 19), st.integers(-20, 25))
def test_any_slice_that_has_rows_gives_those_of_the_list(
    sources: dict[str, Path], source: str, start: int, end: int
) -> None:
    assume(ROWS[start:end])
    assert load(sources[source], split=f"train[{start}:{end}]").to_list() == ROWS[start:end]


@pytest.mark.parametrize("source", ["folder", "saved_dict"])
def test_slices_of_two_splits_are_joined_in_the_order_they_are_named(sources: dict[str, Path], source: str) -> None:
    assert load(sources[source], split="test[1:]+train[18:]").to_list() == ROWS[1:3] + ROWS[18:]


def test_a_saved_slice_of_a_split_is_that_split(sources: dict[str, Path], tmp_path: Path) -> None:
    part = datasets.load_dataset("json", data_files=str(sources["file"]), split="train[:50%]")
    part.save_to_disk(tmp_path / "half")
    assert load(tmp_path / "half").to_list() == ROWS[:10]
    assert load(tmp_path / "half", split="train[2:4]").to_list() == ROWS[2:4]


def test_limit_takes_the_first_rows_and_never_more_than_there_are(sources: dict[str, Path]) -> None:
    for path in sources.values():
        assert load(path, limit=4).to_list() == ROWS[:4]
        assert load(path, limit=1000).to_list() == ROWS
        assert load(path, limit=2, split="train[5:9]").to_list() == ROWS[5:7]


def test_a_changed_file_gives_its_new_rows(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "before"}])
    assert load(path).to_list() == [{"text": "before"}]
    write_jsonl(path, [{"text": "after it"}])
    assert load(path).to_list() == [{"text": "after it"}]


@pytest.mark.parametrize("name", ["none.jsonl", "nowhere/none.parquet", "nowhere", "nowhere/deep/er"])
def test_a_path_that_does_not_exist_is_named(tmp_path: Path, name: str) -> None:
    message = rf"^--dataset {tmp_path / name} does not exist\. Give a file, a folder or a hub id\.$"
    with pytest.raises(UsageError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize(
    "name", ["none.jsonl", "none/none.tsv.gz", "nowhere/none.csv", "./nowhere", "../nowhere", "a/b/c", "nowhere/"]
)
def test_a_relative_path_that_does_not_exist_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"^--dataset {name} does not exist"):
        load(name)


@pytest.mark.parametrize("name", ["some-user/unknown.set", "unknown_set"])
def test_a_hub_id_that_cannot_be_reached_is_refused_quickly(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(UsageError, match=rf"^--dataset {name} cannot be loaded with --split train: .*'{name}'"):
        load(name)
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(("theirs", "ours"), [(Json, JsonRows), (Csv, CsvRows)])
def test_a_copy_that_datasets_made_alone_lies_elsewhere(tmp_path: Path, theirs: Any, ours: Any) -> None:
    files = {"train": [str(write_jsonl(tmp_path / "rows.jsonl", ROWS))]}
    options = {"cache_dir": str(tmp_path), "dataset_name": "name", "hash": "0", "data_files": files}
    assert theirs(**options).cache_dir != ours(**options).cache_dir


@pytest.mark.parametrize("reader", [Json, JsonRows])
def test_a_copy_of_a_dataset_of_the_hub_that_datasets_made_alone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, reader: type[Json]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "2024-05-01"}])
    builder = reader(cache_dir=str(tmp_path), dataset_name="name", hash="0", data_files={"train": [str(path)]})
    builder.download_and_prepare()
    copy = tmp_path / "cache" / "some-user___name" / "default" / str(builder.config.version) / "0"
    copy.parent.mkdir(parents=True)
    Path(builder.cache_dir).rename(copy)
    told = "some-user/name cannot be reached. Its copy in the cache was made by datasets alone"
    assert load("some-user/name").num_rows == 1
    assert (told in caplog.text) == (reader is Json)


@pytest.mark.parametrize(
    ("name", "ending"),
    [
        ("rows.xml", ".xml"),
        ("rows", ""),
        ("rows.jsonl.bak", ".bak"),
        ("rows.parquet.gz", ".parquet.gz"),
        ("r.gz", ".gz"),
    ],
)
def test_an_unknown_kind_of_file_is_told_what_there_is(tmp_path: Path, name: str, ending: str) -> None:
    (tmp_path / name).write_text("a\n")
    known = r".json .jsonl .csv .tsv .txt \(each also with .gz or .zst behind\) .parquet .arrow"
    message = rf"--dataset .*{name} must end in one of {known}, got '{ending}'\.$"
    with pytest.raises(UsageError, match=message):
        load(tmp_path / name)


@pytest.mark.parametrize(
    ("source", "there"),
    [("file", r"\['train'\]"), ("folder", r"\['train', 'test'\]"), ("saved_dict", r"\['train', 'test'\]")],
)
@pytest.mark.parametrize("split", ["validation", "validation[:5]", "train+validation"])
def test_an_unknown_split_is_told_what_there_is(sources: dict[str, Path], source: str, split: str, there: str) -> None:
    with pytest.raises(UsageError, match=rf'^--dataset .* cannot be loaded with --split .*"validation".*{there}'):
        load(sources[source], split=split)


def test_a_saved_dataset_that_knows_its_split_has_no_other(tmp_path: Path) -> None:
    datasets.Dataset.from_list(ROWS, split="validation").save_to_disk(tmp_path / "saved")
    assert load(tmp_path / "saved", split="validation").to_list() == ROWS
    with pytest.raises(UsageError, match=r'Unknown split "train".*\[\'validation\'\]'):
        load(tmp_path / "saved")


@pytest.mark.parametrize("source", ["file", "saved"])
@pytest.mark.parametrize("split", ["train[", "train[a:b]", "train[:5", "train[::2]"])
def test_a_split_that_cannot_be_read_is_named(sources: dict[str, Path], source: str, split: str) -> None:
    with pytest.raises(UsageError) as raised:
        load(sources[source], split=split)
    assert f"cannot be loaded with --split {split}: Unrecognized instruction format: {split}" in str(raised.value)


def test_an_unknown_configuration_is_told_what_there_is(sources: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"cannot be loaded .*'nope' not found\. Available: \['default'\]"):
        load(sources["folder"], dataset_config="nope")


@pytest.mark.parametrize("source", ["file", "folder", "saved", "saved_dict"])
@pytest.mark.parametrize("span", ["5:2", "5:4", "0:0", ":1%", "20:", "50:60"])
def test_a_slice_without_rows_is_refused(sources: dict[str, Path], source: str, span: str) -> None:
    split = f"train[{span}]"
    with pytest.raises(UsageError, match=r"no rows|no data") as raised:
        load(sources[source], split=split)
    assert f"--split {split}" in str(raised.value)
    assert str(sources[source]) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [("rows.json", "[]"), ("rows.csv", "text\n"), ("rows.jsonl", ""), ("rows.txt", ""), ("rows.csv", "")],
)
def test_a_file_without_rows_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=rf"{name}.*(no rows|no data|No columns)|no rows.*{name}"):
        load(tmp_path / name)


def test_a_saved_dataset_without_rows_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    load(sources["saved"]).select([]).save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match=r"saved.*(no rows|no data)|no rows.*saved"):
        load(tmp_path / "saved")


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"^--dataset .* cannot be loaded .* doesn't contain any data files"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("rows.jsonl", '{"text": "a"}\n{"text": \n', "line 2 is not JSON, at character 1: Expecting value"),
        ("rows.json", '[{"text": "a"}, {"te', "Unterminated string"),
        ("rows.parquet", "text", "Parquet file size is 4 bytes"),
        ("rows.arrow", "text", "File is too small: 4"),
        ("rows.csv", 'text\n"a\nb', "unexpected end of data"),
    ],
)
def test_a_broken_file_is_refused_in_one_line_with_the_reason(
    tmp_path: Path, name: str, content: str, reason: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UsageError, match=rf"^--dataset .*{name} cannot be loaded .*{reason}") as raised:
        load(tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("damage", ["cut at a record batch", "cut inside a batch", "all zeros", "empty"])
def test_a_damaged_copy_in_the_cache_is_refused_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    from files import DAMAGES

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {number}"} for number in range(3000)])
    config = Config(teacher="m", dataset=str(path), output="o.h5")
    assert len(load_split(config)) == 3000
    (copy,) = (tmp_path / "cache").rglob("*.arrow")
    content = DAMAGES[damage](copy)
    copy.unlink()
    copy.write_bytes(content)
    place = re.escape(str(tmp_path / "cache" / "logitgen"))
    with pytest.raises(UsageError, match=rf"rows\.jsonl .*damaged.*[Rr]emove {place}"):
        load_split(config)


@pytest.mark.parametrize("place", ["a file is in the way", "the disk is full"])
def test_a_cache_that_cannot_be_written_is_named_as_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = tmp_path / "cache"
    if place == "the disk is full":
        monkeypatch.setattr(datasets.arrow_writer.ArrowWriter, "finalize", full)
    else:
        cache.write_text("no folder")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a row"}])
    reason = r"\[Errno \d+\] .*\. The rows are copied into .*cache: free space there, or .*HF_DATASETS_CACHE"
    with pytest.raises(UsageError, match=rf"^--dataset .*rows\.jsonl cannot be loaded .*{reason}"):
        load_split(Config(teacher="m", dataset=str(path), output="o.h5"))


def test_a_dataset_that_cannot_be_read_is_not_blamed_on_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "rows.jsonl"))

    monkeypatch.setattr(datasets, "load_dataset", denied)
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a row"}])
    with pytest.raises(UsageError, match=r"Permission denied: '.*rows\.jsonl'\.$"):
        load_split(Config(teacher="m", dataset=str(path), output="o.h5"))
