"""The file format: names, dtypes and shapes, the layout of a payload, and the checksum of a row."""

import zlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitgen.errors import UsageError
from logitgen.file.layout import (
    ENCODINGS,
    WITH_KEPT_IDS,
    CaptureKind,
    Encoding,
    Layout,
    id_dtype,
    nbytes,
    row_crc32,
)
from logitgen.file.states import HeadForm

encodings = st.sampled_from(["plain", "packed", "packed16"])
captures = st.sampled_from(["topk", "sample", "hidden", "full"])
vocab_sizes = st.one_of(st.integers(1, 300), st.sampled_from([65_535, 65_536, 65_537, 131_073]))


FORM = HeadForm(hidden_size=33, dtype=np.dtype("<u2"), has_bias=True, layers=((3, 7),))


def make_layout(
    capture: CaptureKind = "topk",
    vocab_size: int = 100,
    top_k: int = 3,
    num_rows: int = 2,
    num_positions: int = 7,
    encoding: Encoding = "plain",
) -> Layout:
    return Layout(
        capture=capture,
        num_rows=num_rows,
        num_tokens=num_positions + num_rows,
        num_positions=num_positions,
        vocab_size=vocab_size,
        top_k=top_k if capture in WITH_KEPT_IDS else 0,
        encoding=encoding if encoding in ENCODINGS[capture] else "plain",
        head=FORM if capture == "hidden" else None,
    )


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(1, "<u2"), (65_535, "<u2"), (65_536, "<u2"), (65_537, "<u4"), (131_073, "<u4"), (2**32, "<u4")],
)
def test_the_id_dtype_is_the_smallest_that_holds_every_id(vocab_size: int, dtype: str) -> None:
    assert id_dtype(vocab_size) == np.dtype(dtype)
    assert np.array([vocab_size - 1]).astype(id_dtype(vocab_size)).tolist() == [vocab_size - 1]


def test_the_datasets_of_a_top_k_file_are_exactly_these() -> None:
    layout = Layout(capture="topk", num_rows=4, num_tokens=50, num_positions=30, vocab_size=65_537, top_k=8)
    assert list(layout.datasets.items()) == [
        ("done", ((4,), np.dtype("u1"))),
        ("crc32", ((4,), np.dtype("<u4"))),
        ("source_row", ((4,), np.dtype("<i8"))),
        ("offsets", ((5,), np.dtype("<i8"))),
        ("position_offsets", ((5,), np.dtype("<i8"))),
        ("input_ids", ((50,), np.dtype("<u4"))),
        ("positions", ((30,), np.dtype("<i4"))),
        ("logsumexp", ((30,), np.dtype("<f4"))),
        ("target_logprob", ((30,), np.dtype("<f4"))),
        ("kept_ids", ((30, 8), np.dtype("<u4"))),
        ("kept_logprobs", ((30, 8), np.dtype("<f2"))),
    ]
    by_hand = 4 * (1 + 4 + 8) + 2 * 5 * 8 + 50 * 4 + 30 * (4 + 4 + 4 + 8 * 4 + 8 * 2)
    assert layout.data_bytes == by_hand


@pytest.mark.parametrize(("encoding", "record_bytes"), [("packed", 28 + 50 + 1), ("packed16", 28 + 100)])
def test_a_packed_file_has_one_record_per_position_instead(encoding: Encoding, record_bytes: int) -> None:
    """V = 300, K = 50: 2 low bits of each id, 50 + 74 for the high parts, so 28 bytes; an 8-bit code for the tail."""
    layout = make_layout(vocab_size=300, top_k=50, encoding=encoding)
    assert list(layout.captured.items()) == [
        ("target_logprob", ((), np.dtype("<f2"))),
        ("kept", ((record_bytes,), np.dtype("u1"))),
    ]
    assert layout.bytes_per_position == 2 + record_bytes


def test_the_datasets_of_a_full_file_are_exactly_these() -> None:
    layout = Layout(capture="full", num_rows=4, num_tokens=50, num_positions=30, vocab_size=1000, top_k=0)
    assert list(layout.datasets.items()) == [
        ("done", ((4,), np.dtype("u1"))),
        ("crc32", ((4,), np.dtype("<u4"))),
        ("source_row", ((4,), np.dtype("<i8"))),
        ("offsets", ((5,), np.dtype("<i8"))),
        ("position_offsets", ((5,), np.dtype("<i8"))),
        ("input_ids", ((50,), np.dtype("<u2"))),
        ("positions", ((30,), np.dtype("<i4"))),
        ("logsumexp", ((30,), np.dtype("<f4"))),
        ("target_logprob", ((30,), np.dtype("<f4"))),
        ("logits", ((30, 1000), np.dtype("<f2"))),
    ]
    assert layout.data_bytes == 4 * (1 + 4 + 8) + 2 * 5 * 8 + 50 * 2 + 30 * (4 + 4 + 4 + 1000 * 2)


def test_the_datasets_of_a_file_of_hidden_states_are_exactly_these() -> None:
    form = HeadForm(hidden_size=70, dtype=np.dtype("<u2"), has_bias=True)
    sizes = {"num_rows": 4, "num_tokens": 50, "num_positions": 30, "vocab_size": 1000, "top_k": 0}
    plain = Layout(capture="hidden", head=form, **sizes)
    known = list(replace(plain, capture="full").datasets.items())[:7]
    head = [("head_weight", ((1000, 70), np.dtype("<u2"))), ("head_bias", ((1000,), np.dtype("<u2")))]
    scalars = [("logsumexp", ((30,), np.dtype("<f4"))), ("target_logprob", ((30,), np.dtype("<f4")))]
    assert list(plain.datasets.items()) == [*known, *head, *scalars, ("hidden", ((30, 70), np.dtype("<u2")))]
    packed = [("hidden_scale", ((30, 3), np.dtype("<u2"))), ("hidden", ((30, 70), np.dtype("i1")))]
    layout = replace(plain, encoding="packed")
    assert list(layout.datasets.items()) == [*known, *head, ("target_logprob", ((30,), np.dtype("<f2"))), *packed]
    assert layout.bytes_per_position == 2 + 70 + 3 * 2
    assert layout.packing is None
    assert layout.kept == "hidden states, packed"


def test_states_of_other_layers_follow_the_last_ones_whatever_their_size() -> None:
    form = HeadForm(hidden_size=16, dtype=np.dtype("<f2"), has_bias=False, layers=((0, 70), (12, 32)))
    sizes = {"num_rows": 4, "num_tokens": 50, "num_positions": 30, "vocab_size": 1000, "top_k": 0}
    plain = Layout(capture="hidden", head=form, **sizes)
    states = {"hidden": ((16,), np.dtype("<f2")), "hidden_0": ((70,), np.dtype("<f2"))}
    states |= {"hidden_12": ((32,), np.dtype("<f2"))}
    assert list(plain.captured.items())[2:] == list(states.items())
    assert plain.bytes_per_position == 8 + 2 * (16 + 70 + 32)
    assert plain.kept == "hidden states (layers 0, 12, last)"
    packed = replace(plain, encoding="packed")
    scales = {f"{name}_scale": ((groups,), np.dtype("<u2")) for name, groups in zip(states, (1, 3, 1), strict=True)}
    codes = {name: (shape, np.dtype("i1")) for name, (shape, _) in states.items()}
    assert list(packed.captured.items())[1:] == [*scales.items(), *codes.items()]
    assert packed.bytes_per_position == 2 + 2 * 5 + 16 + 70 + 32


def test_a_position_takes_two_scalars_and_what_is_kept_of_it() -> None:
    assert make_layout(vocab_size=65_536, top_k=64).bytes_per_position == 8 + 64 * (2 + 2)
    assert make_layout(vocab_size=65_537, top_k=64).bytes_per_position == 8 + 64 * (4 + 2)
    assert make_layout("full", vocab_size=32_000).bytes_per_position == 8 + 32_000 * 2


@pytest.mark.parametrize(
    ("shape", "dtype", "size"),
    [((), "<f4", 4), ((0,), "<f4", 0), ((3, 5), "<u2", 30), ((70_000, 70_000), "<i8", 39_200_000_000)],
)
def test_the_bytes_of_a_field_are_items_times_item_size(shape: tuple[int, ...], dtype: str, size: int) -> None:
    assert nbytes((shape, np.dtype(dtype))) == size


@settings(max_examples=200, deadline=None)
@given(captures, encodings, vocab_sizes, st.integers(1, 70), st.integers(1, 50), st.integers(0, 200))
def test_a_payloads_fields_lie_without_gaps_and_aligned(
    capture: CaptureKind, encoding: Encoding, vocab_size: int, top_k: int, num_rows: int, num_positions: int
) -> None:
    layout = make_layout(capture, vocab_size, min(top_k, vocab_size), encoding=encoding)
    slices = layout.payload_slices(num_rows, num_positions)
    fields = {"crc32": ((), np.dtype("<u4"))} | layout.captured
    assert list(slices) == list(fields)
    end = 0
    for name, (entry, dtype) in fields.items():
        count = num_rows if name == "crc32" else num_positions
        assert slices[name].start == end
        assert slices[name].start % dtype.itemsize == 0
        end = slices[name].stop
        assert end - slices[name].start == np.empty((count, *entry), dtype).nbytes
    assert layout.payload_bytes(np.array([num_rows]), np.array([num_positions])).tolist() == [end]


def test_payload_sizes_beyond_32_bits_are_right() -> None:
    layout = make_layout("full", vocab_size=131_072)
    sizes = layout.payload_bytes(np.array([10, 1]), np.array([20_000, 0]))
    assert sizes.tolist() == [10 * 4 + 20_000 * (8 + 131_072 * 2), 4]


def example_row(num_positions: int, top_k: int, seed: int) -> list[np.ndarray]:
    """What is checksummed of a row, with random bytes in it."""
    random = np.random.default_rng(seed)
    shapes = {
        "input_ids": ((num_positions + 1,), "<u2"),
        "positions": ((num_positions,), "<i4"),
        "logsumexp": ((num_positions,), "<f4"),
        "target_logprob": ((num_positions,), "<f4"),
        "kept_ids": ((num_positions, top_k), "<u2"),
        "kept_logprobs": ((num_positions, top_k), "<f2"),
    }
    return [
        np.frombuffer(random.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)
        for shape, dtype in shapes.values()
    ]


def test_a_rows_checksum_is_the_crc32_of_its_number_its_source_and_its_bytes() -> None:
    arrays = [np.array([1, 515], dtype="<u2"), np.array([[-1.0], [0.5]], dtype="<f4")]
    joined = (
        *(b"\x07\x00\x00\x00\x00\x00\x00\x00", b"\x02\x01\x00\x00\x00\x00\x00\x00"),
        *(b"\x01\x00\x03\x02", b"\x00\x00\x80\xbf", b"\x00\x00\x00\x3f"),
    )  # 7 and 258 as int64, then 1 and 515, then -1 and 0.5
    assert row_crc32(7, 258, arrays) == zlib.crc32(b"".join(joined))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_flipped_bit_changes_a_rows_checksum(data: st.DataObject) -> None:
    row, source_row = data.draw(st.integers(0, 2**40)), data.draw(st.integers(0, 2**40))
    arrays = example_row(data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5)), data.draw(st.integers(0, 99)))
    damaged = [bytearray(array.tobytes()) for array in arrays]
    array = data.draw(st.integers(0, len(arrays) - 1))
    byte, bit = data.draw(st.integers(0, len(damaged[array]) - 1)), data.draw(st.integers(0, 7))
    damaged[array][byte] ^= 1 << bit
    changed = [np.frombuffer(raw, a.dtype).reshape(a.shape) for raw, a in zip(damaged, arrays, strict=True)]
    assert row_crc32(row, source_row, changed) != row_crc32(row, source_row, arrays)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_another_row_number_or_source_changes_the_checksum(row: int, other: int, num_positions: int) -> None:
    arrays = example_row(num_positions, top_k=2, seed=0)
    assert (row_crc32(row, 5, arrays) == row_crc32(other, 5, arrays)) == (row == other)
    assert (row_crc32(5, row, arrays) == row_crc32(5, other, arrays)) == (row == other)


def test_the_checksum_of_an_array_does_not_depend_on_how_it_lies_in_memory() -> None:
    table = np.arange(24, dtype="<f4").reshape(4, 6)
    assert row_crc32(0, 0, [table[:, ::2].T]) == row_crc32(0, 0, [table[:, ::2].T.copy()])


def test_row_numbers_may_be_numpy_integers() -> None:
    arrays = example_row(3, top_k=2, seed=1)
    assert row_crc32(np.int64(5), np.int64(4), arrays) == row_crc32(5, 4, arrays)  # type: ignore[arg-type]


def test_a_row_without_positions_has_a_checksum_of_its_tokens() -> None:
    ids = np.array([9, 8], dtype="<u2")
    nothing = [np.empty(0, "<i4"), np.empty(0, "<f4"), np.empty(0, "<f4"), np.empty((0, 4), "<u2")]
    joined = bytes([3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 9, 0, 8, 0])
    assert row_crc32(3, 2, [ids, *nothing]) == zlib.crc32(joined)


def test_what_is_kept_is_said_in_words() -> None:
    assert make_layout(top_k=3).kept == "top 3"
    assert make_layout(top_k=3, encoding="packed16").kept == "top 3, packed16"
    assert make_layout("sample", top_k=12, encoding="packed").kept == "12+ drawn, packed"
    assert make_layout("full").kept == "all logits"


@pytest.mark.parametrize(
    ("tokenizer_size", "num_ids"), [(0, 100), (90, 90), (100, 100), (120, 100)], ids=["unknown", "", "", "larger"]
)
def test_only_ids_that_the_tokenizer_has_are_drawn(tokenizer_size: int, num_ids: int) -> None:
    layout = replace(make_layout("sample", top_k=num_ids), tokenizer_size=tokenizer_size)
    assert layout.num_ids == num_ids
    layout.check()
    message = (
        rf"^--top_k must be at most the {num_ids} ids of the vocabulary with --capture sample, got {num_ids + 1}\."
    )
    with pytest.raises(UsageError, match=message):
        replace(layout, top_k=num_ids + 1).check()
    assert replace(layout, capture="topk").num_ids == 100
    replace(layout, capture="topk", top_k=100).check()


def test_a_file_of_draws_has_the_datasets_of_a_top_k() -> None:
    assert make_layout("sample").captured == make_layout("topk").captured
    packed = make_layout("sample", vocab_size=151_936, top_k=12, encoding="packed")
    assert packed.captured["kept"] == ((39,), np.dtype("u1"))
