"""The reader, over files that h5py alone has written after the format's description."""

import json
import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from logitgen import FormatError, LogitsFile, reader

SCALARS = {
    "logsumexp": np.array([3.5, 4.5, 5.5, 6.5], "<f4"),
    "target_logprob": np.array([-1, -2, -0.5, -0.5], "<f4"),  # the mean is -1
}
TOP_2 = {
    "kept_ids": np.array([[2, 7], [9, 3], [7, 0], [1, 9]], "<u2"),
    "kept_logprobs": np.array([[-1, -1.25], [-0.125, -2], [-0.5, -3], [-0.25, -0.5]], "<f2"),
}
ROWS = {
    "done": np.ones(3, "u1"),
    "crc32": np.array([11, 12, 13], "<u4"),
    "source_row": np.array([0, 1, 5], "<i8"),
    "offsets": np.array([0, 3, 4, 9], "<i8"),
    "position_offsets": np.array([0, 2, 2, 4], "<i8"),
    "input_ids": np.array([1, 2, 3, 4, 5, 6, 7, 8, 9], "<u2"),
    "positions": np.array([0, 1, 1, 3], "<i4"),
}
ARRAYS = ROWS | SCALARS | TOP_2
"""A row of three tokens, one without a position, and one of which only the tokens at 2 and 4 were predicted."""
FULL = ROWS | SCALARS | {"logits": np.arange(40, dtype="<f2").reshape(4, 10)}
ATTRIBUTES: dict[str, Any] = {
    "format": "logitgen",
    "version": 1,
    "capture": "topk",
    "top_k": 2,
    "vocab_size": 10,
    "tokenizer_size": 10,
    "teacher": "some/teacher",
    "teacher_dtype": "bfloat16",
    "commit": "c0ffee",
    "teacher_fingerprint": "a" * 64,
    "tokenizer_fingerprint": "b" * 64,
    "dataset_fingerprint": "c" * 64,
    "settings": {"dataset": "some/text", "dataset_config": None, "split": "train", "seed": 0},
    "packages": {"torch": "2.13.0"},
}


def write_file(path: Path, arrays: dict[str, np.ndarray] = ARRAYS, **changes: Any) -> Path:
    with h5py.File(path, "w") as file:
        for name, value in (ATTRIBUTES | changes).items():
            file.attrs[name] = json.dumps(value) if isinstance(value, dict) else value
        for name, values in arrays.items():
            file[name] = values
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_file(tmp_path / "out.h5")


def test_rows_are_what_the_offsets_say(path: Path) -> None:
    file = LogitsFile(path)
    assert len(file) == 3
    rows = [{name: values.tolist() for name, values in file.row(number).items()} for number in range(3)]
    assert [row["input_ids"] for row in rows] == [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    assert [row["positions"] for row in rows] == [[0, 1], [], [1, 3]]
    assert [row["logsumexp"] for row in rows] == [[3.5, 4.5], [], [5.5, 6.5]]
    assert [row["target_logprob"] for row in rows] == [[-1, -2], [], [-0.5, -0.5]]
    assert [row["kept_ids"] for row in rows] == [[[2, 7], [9, 3]], [], [[7, 0], [1, 9]]]
    assert [row["kept_logprobs"] for row in rows] == [[[-1, -1.25], [-0.125, -2]], [], [[-0.5, -3], [-0.25, -0.5]]]


def test_a_captured_file_is_read_as_plain_h5py_reads_it(
    capture: Callable[..., Path], teacher: Path, ragged: Path
) -> None:
    path = capture(teacher=teacher, dataset=ragged, top_k=3)
    file = LogitsFile(str(path))
    with h5py.File(path, "r") as plain:
        assert set(file.arrays) == set(plain)
        for name, array in file.arrays.items():
            assert array.dtype == plain[name].dtype
            np.testing.assert_array_equal(array, plain[name][()], err_msg=name)
        offsets, position_offsets = plain["offsets"][()], plain["position_offsets"][()]
        for number in range(len(file)):
            row = file.row(number)
            tokens = slice(offsets[number], offsets[number + 1])
            span = slice(position_offsets[number], position_offsets[number + 1])
            np.testing.assert_array_equal(row.pop("input_ids"), plain["input_ids"][tokens])
            assert set(row) == {"positions", "logsumexp", "target_logprob", "kept_ids", "kept_logprobs"}
            for name, values in row.items():
                np.testing.assert_array_equal(values, plain[name][span])


def test_a_full_capture_hands_out_logits(tmp_path: Path) -> None:
    row = LogitsFile(write_file(tmp_path / "out.h5", FULL, capture="full", top_k=0)).row(2)
    assert set(row) == {"input_ids", "positions", "logsumexp", "target_logprob", "logits"}
    assert row["logits"].dtype == np.float16
    assert row["logits"].tolist() == [list(range(20, 30)), list(range(30, 40))]


def test_attributes_are_plain_values_and_dictionaries(path: Path) -> None:
    attributes = LogitsFile(path).attributes
    assert attributes == ATTRIBUTES
    assert type(attributes["top_k"]) is int


def test_a_row_of_a_huge_file_costs_no_memory(tmp_path: Path) -> None:
    path = write_file(tmp_path / "out.h5", ROWS | SCALARS, capture="full", top_k=0, vocab_size=2**30)
    with h5py.File(path, "r+") as file:  # ids of such a vocabulary take 4 bytes, its logits 8 GiB, all of them a hole
        del file["input_ids"]
        file["input_ids"] = ROWS["input_ids"].astype("<u4")
        creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        creation.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        space = h5py.h5s.create_simple((4, 2**30))
        h5py.h5d.create(file.id, b"logits", h5py.h5t.IEEE_F16LE, space, creation)
        file["logits"][3, -1] = 2.5
    tracemalloc.start()
    try:
        logits = LogitsFile(path).row(2)["logits"]
        assert logits[1, -2:].tolist() == [0, 2.5]
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_nothing_can_be_written_through_a_reader(path: Path) -> None:
    with pytest.raises(ValueError, match="read-only"):
        LogitsFile(path).row(0)["kept_ids"][0] = 1


def test_negative_rows_count_from_the_end(path: Path) -> None:
    file = LogitsFile(path)
    assert file.row(-1)["input_ids"].tolist() == [5, 6, 7, 8, 9]
    assert file.row(-3)["input_ids"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("row", [3, -4, 1000])
def test_a_row_that_does_not_exist_is_an_index_error(path: Path, row: int) -> None:
    with pytest.raises(IndexError, match=rf"Row must be between 0 and 2, got {row}\."):
        LogitsFile(path).row(row)


@pytest.mark.parametrize("block", [1, 3, 4, 2**22])
def test_perplexity_is_worked_out_by_hand(path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(reader, "_BLOCK_POSITIONS", block)
    assert LogitsFile(path).perplexity() == pytest.approx(math.e)


def test_perplexity_is_that_of_the_teacher_itself(capture: Callable[..., Path], teacher: Path, ragged: Path) -> None:
    file = LogitsFile(capture(teacher=teacher, dataset=ragged))
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    losses = []
    for number in range(len(file)):
        ids = torch.from_numpy(file.row(number)["input_ids"].astype(np.int64))
        if len(ids) > 1:
            with torch.no_grad():
                logits_TV = model(ids[None]).logits[0]
            losses.append(torch.nn.functional.cross_entropy(logits_TV[:-1], ids[1:], reduction="none"))
    assert file.perplexity() == pytest.approx(torch.cat(losses).double().mean().exp().item(), rel=1e-4)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"/out\.h5 is not a file\.$"):
        LogitsFile(tmp_path / "out.h5")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"is not a file\.$"):
        LogitsFile(tmp_path)


def test_a_capture_that_is_not_finished_is_hinted_at(tmp_path: Path) -> None:
    (tmp_path / "out.h5.partial").touch()
    with pytest.raises(FormatError, match=r"out\.h5 is not a file\. .* left its \.partial; finish it first\."):
        LogitsFile(tmp_path / "out.h5")


@pytest.mark.parametrize("content", [b"", b"not HDF5 at all" * 100])
def test_a_file_that_is_not_hdf5_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out.h5").write_bytes(content)
    with pytest.raises(FormatError, match=r"out\.h5 cannot be read as HDF5: .*"):
        LogitsFile(tmp_path / "out.h5")


@pytest.mark.parametrize("attributes", [{}, {"format": "another", "version": 1}])
def test_a_foreign_hdf5_file_is_refused(tmp_path: Path, attributes: dict[str, Any]) -> None:
    with h5py.File(tmp_path / "out.h5", "w") as file:
        file.attrs.update(attributes)
    with pytest.raises(FormatError, match=r"out\.h5 is an HDF5 file, but not one of logitgen: its format attribute"):
        LogitsFile(tmp_path / "out.h5")


def test_a_newer_version_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "out.h5", version=2)
    with pytest.raises(FormatError, match=r"has format version 2, this logitgen reads up to 1\. Update logitgen\."):
        LogitsFile(path)


@pytest.mark.parametrize("name", ["capture", "top_k", "vocab_size", "settings", "packages"])
def test_a_missing_attribute_is_named(path: Path, name: str) -> None:
    with h5py.File(path, "r+") as file:
        del file.attrs[name]
    with pytest.raises(FormatError, match=rf"out\.h5 is damaged: attribute {name} is missing or not (str|int)\."):
        LogitsFile(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("version", "x", "attribute version is missing or not int"),
        ("vocab_size", 1.5, "attribute vocab_size is missing or not int"),
        ("teacher", 5, "attribute teacher is missing or not str"),
        ("settings", "5", "attribute settings is not a JSON object"),
        ("packages", "[1]", "attribute packages is not a JSON object"),
        ("capture", "everything", "capture, vocab_size and top_k do not fit"),
        ("vocab_size", -1, "capture, vocab_size and top_k do not fit"),
    ],
)
def test_an_attribute_that_cannot_be_is_named(path: Path, name: str, value: object, message: str) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs[name] = value
    with pytest.raises(FormatError, match=rf"out\.h5 is damaged: .*{message}"):
        LogitsFile(path)


@pytest.mark.parametrize("name", ["offsets", "position_offsets"])
@pytest.mark.parametrize("end", [0, -1])
def test_offsets_that_do_not_span_the_data_are_refused(path: Path, name: str, end: int) -> None:
    with h5py.File(path, "r+") as file:
        file[name][end] += 1
    with pytest.raises(FormatError, match=rf"out\.h5 is damaged: {name} must run from 0 to \d+\."):
        LogitsFile(path)


@pytest.mark.parametrize("name", ["/", "", "x" * 5000, "a\0b"])
def test_a_path_that_cannot_be_a_file_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match=r"is not a file\."):
        LogitsFile(name)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_missing_dataset_is_named(path: Path, name: str) -> None:
    with h5py.File(path, "r+") as file:
        del file[name]
    with pytest.raises(FormatError, match=rf"out\.h5 is damaged: dataset {name} is missing\."):
        LogitsFile(path)


@pytest.mark.parametrize("name", ["done", "kept_ids"])
def test_a_group_in_a_datasets_place_is_named(path: Path, name: str) -> None:
    with h5py.File(path, "r+") as file:
        del file[name]
        file.create_group(name)
    with pytest.raises(FormatError, match=rf"out\.h5 is damaged: dataset {name} is missing\."):
        LogitsFile(path)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("positions", ARRAYS["positions"].astype("<i8"), r"positions is int64\[4\], expected int32\[4\]"),
        ("input_ids", ARRAYS["input_ids"].astype("<u4"), r"input_ids is uint32\[9\], expected uint16\[9\]"),
        ("logsumexp", ARRAYS["logsumexp"].astype(">f4"), r"logsumexp is >f4\[4\], expected float32\[4\]"),
        ("offsets", ARRAYS["offsets"][:-1], r"offsets is int64\[3\], expected int64\[4\]"),
        ("kept_ids", np.zeros((4, 3), "<u2"), r"kept_ids is uint16\[4, 3\], expected uint16\[4, 2\]"),
        ("kept_logprobs", np.zeros(8, "<f2"), r"kept_logprobs is float16\[8\], expected float16\[4, 2\]"),
        ("positions", ARRAYS["positions"][:-1], r"expected .*\[3"),
        ("done", np.uint8(1), "done"),
    ],
)
def test_a_dataset_of_another_dtype_or_shape_is_named(path: Path, name: str, values: Any, message: str) -> None:
    with h5py.File(path, "r+") as file:
        del file[name]
        file[name] = values
    with pytest.raises(FormatError, match=rf"out\.h5 is damaged: .*{message}"):
        LogitsFile(path)


@pytest.mark.parametrize("missing_bytes", [10, 4000])
def test_a_file_cut_off_in_a_copy_is_refused(path: Path, missing_bytes: int) -> None:
    path.write_bytes(path.read_bytes()[:-missing_bytes])
    with pytest.raises(FormatError, match=r"out\.h5 is cut off.*Copy it again\."):
        LogitsFile(path)


def test_a_file_garbled_in_a_copy_is_refused(path: Path) -> None:
    content = path.read_bytes()
    at = content.index(b"vocab_size\0") + 16  # the name is padded to 16 bytes; then comes the attribute's type
    path.write_bytes(content[:at] + bytes(8) + content[at + 8 :])
    with pytest.raises(FormatError, match=r"out\.h5 (is damaged|cannot be read as HDF5)"):
        LogitsFile(path)


@pytest.mark.parametrize("name", ["settings", "packages"])
def test_settings_that_are_not_json_are_refused(tmp_path: Path, name: str) -> None:
    path = write_file(tmp_path / "out.h5", **{name: "{"})
    with pytest.raises(FormatError, match=rf"out\.h5 is damaged: .*{name}"):
        LogitsFile(path)


def test_a_file_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "out.h5", ARRAYS | {"done": np.array([1, 0, 1], "u1")})
    with pytest.raises(FormatError, match=r"is not complete: 1 of 3 rows are missing\. Finish the run\."):
        LogitsFile(path)


@pytest.mark.parametrize("options", [{"chunks": (2, 2)}, {"chunks": (4, 2), "compression": "gzip"}])
def test_a_file_rewritten_in_chunks_is_refused(path: Path, options: dict[str, Any]) -> None:
    with h5py.File(path, "r+") as file:
        del file["kept_ids"]
        file.create_dataset("kept_ids", data=ARRAYS["kept_ids"], **options)
    with pytest.raises(FormatError, match=r"rewritten by another .*: kept_ids is no longer contiguous\. Use the orig"):
        LogitsFile(path)
