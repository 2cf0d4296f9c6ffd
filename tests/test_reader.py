"""The reader, over files that h5py alone has written after the format's description."""

import hashlib
import json
import math
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from logitgen import FormatError, LogitsFile
from logitgen.file import reader
from logitgen.file.header import create
from logitgen.file.layout import Layout

SCALARS = {
    "logsumexp": np.array([3.5, 4.5, 5.5, 6.5], "<f4"),
    "target_logprob": np.array([-1, -2, -0.5, -0.5], "<f4"),  # the mean is -1
}
TOP_2 = {
    "kept_ids": np.array([[2, 7], [9, 3], [7, 0], [9, 1]], "<u2"),
    "kept_logprobs": np.array([[-1, -1.25], [-0.25, -2], [-0.5, -3], [-0.5, -1.25]], "<f2"),
}
ROWS = {
    "done": np.ones(3, "u1"),
    "crc32": np.zeros(3, "<u4"),
    "source_row": np.array([0, 1, 5], "<i8"),
    "offsets": np.array([0, 3, 4, 9], "<i8"),
    "position_offsets": np.array([0, 2, 2, 4], "<i8"),
    "input_ids": np.array([1, 2, 3, 4, 5, 6, 7, 8, 9], "<u2"),
    "positions": np.array([0, 1, 1, 3], "<i4"),
}


def with_checksums(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Checksum every row over its number, its source, its tokens and all that is known of its positions."""
    crc32 = []
    for row in range(3):
        tokens, positions = (slice(*arrays[name][row : row + 2]) for name in ("offsets", "position_offsets"))
        of_positions = [arrays[name][positions] for name in list(arrays)[list(arrays).index("positions") :]]
        parts = [np.array([row, arrays["source_row"][row]], "<i8"), arrays["input_ids"][tokens], *of_positions]
        crc32.append(zlib.crc32(b"".join(part.tobytes() for part in parts)))
    return arrays | {"crc32": np.array(crc32, "<u4")}


ARRAYS = with_checksums(ROWS | SCALARS | TOP_2)
"""A row of three tokens, one without a position, and one of which only the tokens at 2 and 4 were predicted."""
FULL = with_checksums(ROWS | SCALARS | {"logits": np.arange(40, dtype="<f2").reshape(4, 10)})
ATTRIBUTES: dict[str, Any] = {
    "format": "logitgen",
    "version": 1,
    "capture": "topk",
    "encoding": "plain",
    "top_k": 2,
    "vocab_size": 10,
    "tokenizer_size": 10,
    "teacher": "some/teacher",
    "teacher_dtype": "bfloat16",
    "teacher_config": {"model_type": "llama", "rms_norm_eps": 1e-6},
    "computation": {"attention": "sdpa"},
    "quantization": "",
    "commit": "c0ffee",
    "teacher_fingerprint": "a" * 64,
    "tokenizer_fingerprint": "b" * 64,
    "dataset_fingerprint": "c" * 64,
    "settings": {
        "teacher": "some/teacher",
        "revision": None,
        "teacher_gguf": None,
        "attn_implementation": None,
        "dataset": "some/text",
        "dataset_config": None,
        "split": "train",
        "seed": 0,
    },
    "packages": {"torch": "2.13.0"},
}


def plain_attributes(**changes: Any) -> dict[str, Any]:
    """The attributes as a run hands them over: dictionaries as JSON."""
    values = ATTRIBUTES | changes
    return {name: json.dumps(value) if isinstance(value, dict) else value for name, value in values.items()}


def stored_attributes(**changes: Any) -> dict[str, Any]:
    """The attributes as they are stored: text in UTF-8 of a fixed length."""
    values = plain_attributes(**changes)
    return {name: np.bytes_(value.encode()) if isinstance(value, str) else value for name, value in values.items()}


def seal(path: Path, head_bytes: int | None = None, version: int | str = 1) -> Path:
    """Write the text a file begins with, true of what follows it: the head ends where the first dataset starts."""
    if head_bytes is None:
        with h5py.File(path, "r", locking=False) as file:
            found = [file[name] for name in file if isinstance(file.get(name, getlink=True), h5py.HardLink)]
            places = [item.id.get_offset() for item in found if isinstance(item, h5py.Dataset)]
        # With text before it, HDF5 gives the place of what has none as None or as the byte before its own first.
        head_bytes = min((place for place in places if place and place > 512), default=path.stat().st_size)
    with path.open("r+b") as plain:
        head = plain.read(max(head_bytes, 512))[512:]
        text = f"logitgen file, format version {version}\nHDF5 from byte 512 on\n"
        text += f"head_bytes {head_bytes}\nhead_sha256 {hashlib.sha256(head).hexdigest()}\n"
        plain.seek(0)
        plain.write(text.encode().ljust(512, b"\0"))
    return path


def write_file(path: Path, arrays: dict[str, np.ndarray] = ARRAYS, **changes: Any) -> Path:
    with h5py.File(path, "w", userblock_size=512, meta_block_size=2**14) as file:
        file.attrs.update(stored_attributes(**changes))
        for name, values in arrays.items():
            file[name] = values
    return seal(path)


@contextmanager
def changing(path: Path) -> Iterator[h5py.File]:
    """Let h5py change a file, and make its text true again."""
    with h5py.File(path, "r+") as file:
        yield file
    seal(path)


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
    assert [row["kept_ids"] for row in rows] == [[[2, 7], [9, 3]], [], [[7, 0], [9, 1]]]
    assert [row["kept_logprobs"] for row in rows] == [[[-1, -1.25], [-0.25, -2]], [], [[-0.5, -3], [-0.5, -1.25]]]


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
    path, vocab_size = tmp_path / "out.h5", 2**30  # its logits take 8 GiB, all of them a hole
    layout = Layout(capture="full", num_rows=3, num_tokens=9, num_positions=4, vocab_size=vocab_size, top_k=0)
    create(path, layout, plain_attributes(capture="full", top_k=0, vocab_size=vocab_size))
    with h5py.File(path, "r+") as file:
        for name, values in (ROWS | SCALARS).items():
            file[name][...] = values
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


@pytest.mark.parametrize("name", ["offsets", "position_offsets"])
@pytest.mark.parametrize("end", [0, -1])
def test_offsets_that_do_not_span_the_data_are_refused(path: Path, name: str, end: int) -> None:
    with h5py.File(path, "r+") as file:
        file[name][end] += 1
    with pytest.raises(FormatError, match=rf"out\.h5 is damaged: {name} must run from 0 to \d+\."):
        LogitsFile(path)


def test_a_file_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "out.h5", ARRAYS | {"done": np.array([1, 0, 1], "u1")})
    with pytest.raises(FormatError, match=r"is not complete: 1 of 3 rows are missing\. Finish the run\."):
        LogitsFile(path)


def test_a_file_that_is_not_complete_can_be_opened_on_request(tmp_path: Path) -> None:
    path = write_file(tmp_path / "out.h5", ARRAYS | {"done": np.array([1, 0, 1], "u1")})
    file = LogitsFile(path, partial=True)
    assert file.arrays["done"].tolist() == [1, 0, 1]
    assert file.row(2)["input_ids"].tolist() == [5, 6, 7, 8, 9]


def test_damage_is_refused_even_if_rows_may_be_missing(tmp_path: Path) -> None:
    path = write_file(tmp_path / "out.h5", ARRAYS | {"offsets": np.array([0, 3, 4, 8], "<i8")})
    with pytest.raises(FormatError, match=r"out\.h5 is damaged: offsets must run from 0 to 9\. Copy it again\.$"):
        LogitsFile(path, partial=True)


def test_what_is_wrong_with_the_head_is_said_as_the_head_says_it(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"/out\.h5 is not a file\.$"):
        LogitsFile(tmp_path / "out.h5")
