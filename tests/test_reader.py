"""The reader, over files that h5py alone has written after the format's description."""

import math
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from files import ARRAYS, ATTRIBUTES, FULL, ROWS, SCALARS, TOP_2, plain_attributes, with_checksums, write_file
from transformers import AutoModelForCausalLM

from logitgen import FormatError, LogitsFile
from logitgen.file import reader
from logitgen.file.header import create
from logitgen.file.layout import Layout
from logitgen.file.packing import Packing
from logitgen.file.verify import problems


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


def test_a_packed_file_has_no_logsumexp_and_its_targets_in_half_precision(tmp_path: Path) -> None:
    packing = Packing(vocab_size=10, k=2, value_bits=16)
    kept = (
        torch.from_numpy(TOP_2[name].astype(dtype)) for name, dtype in (("kept_ids", "i8"), ("kept_logprobs", "f4"))
    )
    packed = {"target_logprob": SCALARS["target_logprob"].astype("<f2"), "kept": packing.pack(*kept).numpy()}
    file = LogitsFile(write_file(tmp_path / "out.h5", with_checksums(ROWS | packed), encoding="packed16"))
    row = file.row(2)
    assert set(row) == {"input_ids", "positions", "target_logprob", "kept_ids", "kept_logprobs"}
    assert row["target_logprob"].dtype == np.float16
    assert row["target_logprob"].tolist() == [-0.5, -0.5]
    assert row["kept_ids"].tolist() == [[7, 0], [9, 1]]
    assert row["kept_logprobs"].tolist() == [[-0.5, -3], [-0.5, -1.25]]
    assert file.perplexity() == pytest.approx(math.e)
    assert list(problems(file)) == []


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
