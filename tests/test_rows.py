"""The rows of a run: cut, packed, masked and put together in batches, against plain lists."""

from itertools import pairwise
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitgen.config import Config
from logitgen.errors import UsageError
from logitgen.file.layout import Layout
from logitgen.split import rows as rows_module
from logitgen.split.batch import Batch
from logitgen.split.job import Job
from logitgen.split.plan import Plan
from logitgen.split.rows import Rows

Lists = list[list[int]]
FEATURES = datasets.Features(
    {"input_ids": datasets.List(datasets.Value("int32")), "completion_mask": datasets.List(datasets.Value("uint8"))}
)


def make_tokens(ids: Lists, masks: Lists | None = None, chunk_starts: tuple[int, ...] = ()) -> datasets.Dataset:
    """Build a tokenised split whose Arrow columns start a new chunk at each of these rows."""
    bounds = [0, *sorted(set(chunk_starts) - {0, len(ids)}), len(ids)]
    columns = {"input_ids": ids} | ({} if masks is None else {"completion_mask": masks})
    features = datasets.Features({name: FEATURES[name] for name in columns})
    parts = [
        datasets.Dataset.from_dict({name: rows[start:end] for name, rows in columns.items()}, features=features)
        for start, end in pairwise(bounds)
    ]
    return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def make_rows(
    ids: Lists,
    masks: Lists | None = None,
    max_length: int | None = None,
    chunk_starts: tuple[int, ...] = (),
    **options: Any,
) -> Rows:
    config = Config(teacher="m", dataset="d", output="o.h5", completion_only=masks is not None, **options)
    return Rows(make_tokens(ids, masks, chunk_starts), config, max_length)


def tokens_of(rows: Rows) -> Lists:
    return [rows.input_ids(row).tolist() for row in range(len(rows))]


def positions_of(rows: Rows) -> Lists:
    return [rows.positions(row).tolist() for row in range(len(rows))]


def cut_lists(rows: list[list[Any]], max_length: int, cut: str) -> list[tuple[int, list[Any]]]:
    """Source row and items of every row of the file, on plain lists."""
    if cut == "truncate":
        return [(source, items[:max_length]) for source, items in enumerate(rows)]
    if cut == "split":
        return [
            (source, items[start : start + max_length])
            for source, items in enumerate(rows)
            for start in range(0, max(len(items), 1), max_length)
        ]
    stream = [(source, item) for source, items in enumerate(rows) for item in items]
    blocks = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
    return [(block[0][0], [item for _, item in block]) for block in blocks if len(block) == max_length]


# Without cutting.


def test_every_token_that_has_a_next_one_is_a_position() -> None:
    rows = make_rows([[5, 6, 7], [], [8], [9, 9]])
    assert len(rows) == 4
    assert tokens_of(rows) == [[5, 6, 7], [], [8], [9, 9]]
    assert positions_of(rows) == [[0, 1], [], [], [0]]
    assert rows.lengths.tolist() == [3, 0, 1, 2]
    assert rows.num_positions.tolist() == [2, 0, 0, 1]
    assert rows.forward_lengths.tolist() == [2, 0, 0, 1]
    assert rows.source_row.tolist() == [0, 1, 2, 3]
    assert (rows.num_tokens, rows.num_captured, rows.num_dropped_tokens, rows.num_cut) == (6, 3, 0, 0)


def test_a_mask_leaves_the_positions_that_predict_a_completions_token() -> None:
    rows = make_rows(
        [[1, 2, 3, 4, 5], [1, 2], [3, 4], [5], [], [6, 7, 8]],
        [[0, 0, 1, 1, 0], [0, 0], [1, 0], [1], [], [1, 1, 1]],
    )
    assert positions_of(rows) == [[1, 2], [], [], [], [], [0, 1]]
    assert rows.num_positions.tolist() == [2, 0, 0, 0, 0, 2]
    assert rows.forward_lengths.tolist() == [3, 0, 0, 0, 0, 2]
    assert (rows.num_tokens, rows.num_captured) == (13, 4)


def test_the_numbers_have_the_dtypes_the_docstring_names() -> None:
    for rows in (
        make_rows([[1, 2, 3], [4]]),
        make_rows([[1, 2, 3], [4]], [[0, 1, 0], [0]]),
        make_rows([[1, 2, 3], [4]], max_length=2),
        make_rows([[1, 2, 3], [4]], max_length=2, overflow="split"),
        make_rows([[1, 2, 3], [4]], max_length=2, packing=True),
    ):
        assert rows.lengths.dtype == rows.num_positions.dtype == rows.forward_lengths.dtype == np.int32
        assert rows.source_row.dtype == np.int64
        assert rows.input_ids(0).dtype == rows.positions(0).dtype == np.int32


def test_an_empty_row_has_an_empty_array_of_tokens() -> None:
    rows = make_rows([[1, 2], [], [3]], chunk_starts=(1, 2))
    assert rows.input_ids(1).shape == rows.positions(1).shape == (0,)
    assert rows.input_ids(1).dtype == np.int32


# Cutting.


def test_truncated_rows_lose_their_ends() -> None:
    rows = make_rows([[1, 2, 3, 4, 5], [6, 7], [8, 9, 1]], max_length=3)
    assert tokens_of(rows) == [[1, 2, 3], [6, 7], [8, 9, 1]]
    assert rows.source_row.tolist() == [0, 1, 2]
    assert (rows.num_cut, rows.num_dropped_tokens) == (1, 2)


def test_split_rows_become_several_rows_of_the_same_source() -> None:
    rows = make_rows([[1, 2, 3, 4, 5, 6, 7], [], [8], [1, 2, 3]], max_length=3, overflow="split")
    assert tokens_of(rows) == [[1, 2, 3], [4, 5, 6], [7], [], [8], [1, 2, 3]]
    assert rows.source_row.tolist() == [0, 0, 0, 1, 2, 3]
    assert positions_of(rows) == [[0, 1], [0, 1], [], [], [], [0, 1]]
    assert (rows.num_cut, rows.num_dropped_tokens) == (1, 0)


def test_packed_blocks_run_over_the_ends_of_rows() -> None:
    rows = make_rows([[1, 2], [], [3, 4, 5, 6, 7], [8], [9, 1]], max_length=3, packing=True)
    assert tokens_of(rows) == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    assert rows.source_row.tolist() == [0, 2, 2]
    assert rows.num_dropped_tokens == 1


def test_a_mask_is_cut_like_its_tokens() -> None:
    ids, masks = [[1, 2, 3, 4, 5], [6, 7]], [[0, 1, 0, 1, 1], [0, 1]]
    assert positions_of(make_rows(ids, masks, max_length=3)) == [[0], [0]]
    assert positions_of(make_rows(ids, masks, max_length=3, overflow="split")) == [[0], [0], [0]]
    assert positions_of(make_rows(ids, masks, max_length=3, packing=True)) == [[0], [0]]


def test_a_completion_that_opens_a_block_loses_its_first_token() -> None:
    rows = make_rows([[1, 2, 3, 4]], [[0, 0, 1, 1]], max_length=2, overflow="split")
    assert positions_of(rows) == [[], [0]]
    assert rows.forward_lengths.tolist() == [0, 1]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(0, 99), st.booleans()), max_size=12), min_size=1, max_size=10),
    st.integers(2, 8),
    st.sampled_from(["truncate", "split", "packing"]),
    st.booleans(),
    st.sets(st.integers(1, 9), max_size=3),
    st.sampled_from([1, 5, 1000]),
)
def test_rows_are_cut_as_plain_lists_would_be(
    split: list[list[tuple[int, bool]]],
    max_length: int,
    cut: str,
    completion_only: bool,
    chunk_starts: set[int],
    block_tokens: int,
) -> None:
    ids = [[token for token, _ in row] for row in split]
    masks = [[int(marked) for _, marked in row] for row in split] if completion_only else None
    options: dict[str, Any] = {"packing": True} if cut == "packing" else {"overflow": cut}
    expected = cut_lists(split, max_length, cut)
    positions = [[at for at in range(len(row) - 1) if row[at + 1][1] or not completion_only] for _, row in expected]
    starts = tuple(start for start in chunk_starts if start < len(ids))
    emptied = [
        not found and any(marked for _, marked in row[max_length:])
        for row, found in zip(split, positions, strict=False)
        if completion_only and cut == "truncate"
    ]
    if not any(positions):
        reason = "cuts off every completion" if any(emptied) else "no position to capture|--packing with --max_length"
        with pytest.raises(UsageError, match=reason):
            make_rows(ids, masks, max_length, starts, **options)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_module, "_BLOCK_TOKENS", block_tokens)
        rows = make_rows(ids, masks, max_length, starts, **options)
        blocks = list(rows.blocks())
    assert [token for tokens, _ in blocks for token in tokens] == [token for _, row in expected for token, _ in row]
    assert [at for _, found in blocks for at in found] == [at for found in positions for at in found]
    assert rows.num_positions.tolist() == [len(found) for found in positions]
    assert rows.forward_lengths.tolist() == [found[-1] + 1 if found else 0 for found in positions]
    assert len(rows) == len(expected)
    assert tokens_of(rows) == [[token for token, _ in row] for _, row in expected]
    assert rows.source_row.tolist() == [source for source, _ in expected]
    assert rows.lengths.tolist() == [len(row) for _, row in expected]
    assert positions_of(rows) == positions
    assert rows.num_positions.tolist() == [len(found) for found in positions]
    assert rows.forward_lengths.tolist() == [max(found, default=-1) + 1 for found in positions]
    assert rows.num_tokens == sum(len(row) for _, row in expected)
    assert rows.num_captured == sum(map(len, positions))
    assert rows.num_dropped_tokens == sum(map(len, ids)) - sum(len(row) for _, row in expected)
    assert rows.num_emptied == sum(emptied)
    assert rows.num_cut == (0 if cut == "packing" else sum(len(row) > max_length for row in ids))


def test_a_block_may_run_over_many_arrow_chunks() -> None:
    ids = [[number] for number in range(10)]
    tokens = make_tokens(ids, chunk_starts=tuple(range(1, 10)))
    assert tokens.data.column("input_ids").num_chunks == 10
    config = Config(teacher="m", dataset="d", output="o.h5", packing=True)
    assert tokens_of(Rows(tokens, config, 4)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_rows_of_a_part_of_a_split_are_those_of_the_part() -> None:
    ids = [[1, 2], [3, 4, 5], [6], [7, 8], [9, 1]]
    masks = [[0, 1], [0, 0, 1], [1], [1, 1], [0, 1]]
    part = make_tokens(ids, masks, chunk_starts=(2,)).select(range(1, 4))
    config = Config(teacher="m", dataset="d", output="o.h5", completion_only=True)
    rows = Rows(part, config, None)
    assert tokens_of(rows) == [[3, 4, 5], [6], [7, 8]]
    assert positions_of(rows) == [[1], [], [0]]


# What is refused.


def test_a_row_that_is_too_long_is_refused_where_that_is_an_error() -> None:
    message = (
        r"^Row 2 of the split has 5 tokens, --max_length is 3\. Raise it, or choose --overflow truncate or split\.$"
    )
    with pytest.raises(UsageError, match=message):
        make_rows([[1], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4]], max_length=3, overflow="error")
    assert len(make_rows([[1], [1, 2, 3]], max_length=3, overflow="error")) == 2


def test_packing_needs_a_block_length() -> None:
    message = r"^--packing needs --max_length: the teacher's configuration names no context length\.$"
    with pytest.raises(UsageError, match=message):
        make_rows([[1, 2, 3]], packing=True)


def test_too_few_tokens_for_one_block_are_refused() -> None:
    message = (
        r"^--packing with --max_length 4 needs at least that many tokens, the split has 3\. "
        r"Lower --max_length or leave --packing out\.$"
    )
    with pytest.raises(UsageError, match=message):
        make_rows([[1], [2, 3]], max_length=4, packing=True)
    assert len(make_rows([[1], [2, 3]], max_length=3, packing=True)) == 1


@pytest.mark.parametrize(
    ("ids", "masks"), [([[]], None), ([[], [5]], None), ([[1, 2, 3]], [[1, 0, 0]]), ([[1, 2], []], [[0, 0], []])]
)
def test_a_split_with_nothing_to_capture_is_refused(ids: Lists, masks: Lists | None) -> None:
    with pytest.raises(UsageError, match=r"^The split has no position to capture: every row is empty or"):
        make_rows(ids, masks)


# Token ids.


@pytest.mark.parametrize("token", [100, 2**31 - 1, -1])
@pytest.mark.parametrize("chunk_starts", [(), (2,), (1, 2, 3)])
def test_an_id_outside_the_vocabulary_is_named_with_its_row(token: int, chunk_starts: tuple[int, ...]) -> None:
    rows = make_rows([[0, 99], [], [5, 6, token], [7, token]], chunk_starts=chunk_starts)
    message = (
        rf"^Row 2 of the split has token id {token}, but the teacher's vocabulary is 0 to 99\. "
        r"Use the teacher's own tokenizer\.$"
    )
    with pytest.raises(UsageError, match=message):
        rows.check_ids(100)


def test_ids_inside_the_vocabulary_pass() -> None:
    make_rows([[0, 99], [], [5]], chunk_starts=(1,)).check_ids(100)


def test_a_wrong_id_in_a_split_row_is_named_with_its_source() -> None:
    rows = make_rows([[1, 2, 3, 4], [1, 2, 3, 4, 900]], max_length=2, overflow="split")
    with pytest.raises(UsageError, match=r"^Row 1 of the split has token id 900"):
        rows.check_ids(100)


@pytest.mark.parametrize(("source", "ids"), [(1, [[1, 2], [3, 900], [5, 6]]), (2, [[1, 2], [3, 4], [900, 6]])])
def test_a_wrong_id_in_a_packed_block_is_named_with_its_source(source: int, ids: Lists) -> None:
    rows = make_rows(ids, max_length=4, packing=True)
    with pytest.raises(UsageError, match=rf"^Row {source} of the split has token id 900"):
        rows.check_ids(100)


# Batches.


def test_a_batch_holds_what_the_teacher_needs() -> None:
    rows = make_rows([[1, 2], [3, 4, 5, 6, 7], [8], [9, 10, 11]])
    batch = rows.batch(np.array([1, 3, 0]))
    assert isinstance(batch, Batch)
    assert batch.rows.tolist() == batch.source_rows.tolist() == [1, 3, 0]
    assert [tokens.tolist() for tokens in batch.tokens] == [[3, 4, 5, 6, 7], [9, 10, 11], [1, 2]]
    assert batch.passes[0].input_ids.tolist() == [[3, 4, 5, 6], [9, 10, 0, 0], [1, 0, 0, 0]]
    assert batch.num_positions.tolist() == [4, 2, 1]
    assert batch.row_of_position.tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 0]
    assert batch.targets.tolist() == [4, 5, 6, 7, 10, 11, 2]
    for array in (
        batch.passes[0].input_ids,
        batch.num_positions,
        batch.row_of_position,
        batch.positions,
        batch.targets,
    ):
        assert array.dtype == np.int64


def test_a_batch_of_completions_ends_at_the_last_position() -> None:
    rows = make_rows([[1, 2, 3, 4, 5, 6], [7, 8, 9]], [[0, 1, 0, 1, 0, 0], [0, 0, 1]])
    batch = rows.batch(np.array([0, 1]))
    assert [tokens.tolist() for tokens in batch.tokens] == [[1, 2, 3, 4, 5, 6], [7, 8, 9]]
    assert batch.passes[0].input_ids.tolist() == [[1, 2, 3], [7, 8, 0]]
    assert batch.num_positions.tolist() == [2, 1]
    assert batch.row_of_position.tolist() == [0, 0, 1]
    assert batch.positions.tolist() == [0, 2, 1]
    assert batch.targets.tolist() == [2, 4, 9]


def test_the_tokens_of_a_job_are_those_the_teacher_reads() -> None:
    rows = make_rows([[1, 2, 3, 4, 5, 6], [7, 8, 9]], [[0, 1, 0, 1, 0, 0], [0, 0, 1]])
    layout = Layout(capture="full", num_rows=2, num_tokens=9, num_positions=3, vocab_size=10, top_k=0)
    job = Job(rows, Plan(rows.forward_lengths, batch_tokens=3), layout)
    assert job.forward_tokens.tolist() == [3, 2]
    # A checksum of 4 bytes per row; per position two scalars of 4 bytes, and ten logits of 2.
    assert job.payload_bytes.tolist() == [4 + 2 * (8 + 20), 4 + 8 + 20]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=2, max_size=9), min_size=1, max_size=8),
    st.booleans(),
    st.sets(st.integers(1, 7), max_size=2),
    st.randoms(use_true_random=False),
)
def test_every_position_of_a_batch_finds_its_tokens_and_its_target(
    split: list[list[tuple[int, bool]]], completion_only: bool, chunk_starts: set[int], random: Any
) -> None:
    ids = [[token for token, _ in row] for row in split]
    masks = [[0, *(int(marked) for _, marked in row[2:]), 1] for row in split]
    starts = tuple(start for start in chunk_starts if start < len(ids))
    rows = make_rows(ids, masks if completion_only else None, chunk_starts=starts)
    chosen = random.sample(range(len(ids)), random.randint(1, len(ids)))
    batch = rows.batch(np.array(chosen))
    found = zip(batch.row_of_position.tolist(), batch.positions.tolist(), batch.targets.tolist(), strict=True)
    assert list(found) == [
        (index, at, ids[row][at + 1])
        for index, row in enumerate(chosen)
        for at in range(len(ids[row]) - 1)
        if masks[row][at + 1] or not completion_only
    ]
    width = max(len(ids[row]) for row in chosen) - 1  # the last token is always in the completion
    assert batch.passes[0].input_ids.tolist() == [ids[row][:-1] + [0] * (width - len(ids[row]) + 1) for row in chosen]


def test_a_batch_knows_where_its_rows_come_from() -> None:
    split = make_rows([[1, 2, 3, 4, 5], [6, 7], [8, 9, 1, 2]], max_length=2, overflow="split")
    assert split.batch(np.array([5, 0, 3])).source_rows.tolist() == [2, 0, 1]  # 3 rows of 0, 1 of 1, 2 of 2
    packed = make_rows([[1, 2], [3, 4, 5, 6], [7, 8, 9]], max_length=3, packing=True)
    assert packed.batch(np.array([2, 0, 1])).source_rows.tolist() == [2, 0, 1]
    assert packed.batch(np.array([1])).source_rows.dtype == np.int64


def test_a_batch_is_halved_as_worked_out_by_hand() -> None:
    rows = make_rows([[1, 2], [3, 4, 5, 6, 7], [8], [9, 10, 11]])
    first, second = rows.batch(np.array([1, 3, 0])).halves()
    assert (first.rows.tolist(), second.rows.tolist()) == ([1], [3, 0])
    assert (first.source_rows.tolist(), second.source_rows.tolist()) == ([1], [3, 0])
    assert [tokens.tolist() for tokens in second.tokens] == [[9, 10, 11], [1, 2]]
    assert first.passes[0].input_ids.tolist() == [[3, 4, 5, 6]]
    assert second.passes[0].input_ids.tolist() == [[9, 10], [1, 0]]
    assert (first.num_positions.tolist(), second.num_positions.tolist()) == ([4], [2, 1])
    assert (first.row_of_position.tolist(), second.row_of_position.tolist()) == ([0, 0, 0, 0], [0, 0, 1])
    assert (first.positions.tolist(), second.positions.tolist()) == ([0, 1, 2, 3], [0, 1, 0])
    assert (first.targets.tolist(), second.targets.tolist()) == ([4, 5, 6, 7], [10, 11, 2])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 9), min_size=2, max_size=9), st.booleans())
def test_halves_are_batches_of_their_rows(lengths: list[int], completion_only: bool) -> None:
    ids = [[row * 10 + at for at in range(length)] for row, length in enumerate(lengths)]
    masks = [[0, *(at % 2 for at in range(length - 2)), 1] for length in lengths] if completion_only else None
    rows = make_rows(ids, masks)
    numbers = np.arange(len(ids))
    batch = rows.batch(numbers)
    middle = len(ids) // 2
    for half, part in zip(batch.halves(), (numbers[:middle], numbers[middle:]), strict=True):
        alone = rows.batch(part)
        for name in ("rows", "source_rows", "num_positions", "row_of_position", "positions", "targets"):
            np.testing.assert_array_equal(getattr(half, name), getattr(alone, name), err_msg=name)
        np.testing.assert_array_equal(half.passes[0].input_ids, alone.passes[0].input_ids)
        assert [tokens.tolist() for tokens in half.tokens] == [tokens.tolist() for tokens in alone.tokens]


# The fingerprint.


def test_equal_rows_have_equal_fingerprints_however_they_are_stored() -> None:
    ids, masks = [[1, 2, 3], [], [4, 5]], [[0, 1, 0], [], [0, 1]]
    for both in (None, masks):
        fingerprints = {make_rows(ids, both, chunk_starts=starts).fingerprint for starts in ((), (1,), (1, 2))}
        assert len(fingerprints) == 1
        assert len(fingerprints.pop()) == 64


def test_rows_that_differ_in_anything_have_different_fingerprints() -> None:
    ids, masks = [[1, 2, 3], [4, 5], [6]], [[0, 1, 0], [0, 1], [0]]
    different = [
        make_rows(ids),
        make_rows(ids, masks),
        make_rows(ids, [[0, 1, 1], [0, 1], [0]]),
        make_rows([[1, 2, 7], [4, 5], [6]]),
        make_rows([[1, 2], [3, 4, 5], [6]]),
        make_rows([[4, 5], [1, 2, 3], [6]]),
        make_rows([[1, 2, 3], [4, 5], [6], []]),
        make_rows([[], [1, 2, 3], [4, 5], [6]]),
        make_rows(ids, max_length=2),
        make_rows(ids, max_length=2, overflow="split"),
        make_rows(ids, max_length=2, packing=True),
        make_rows(ids, max_length=3, packing=True),
    ]
    assert len({rows.fingerprint for rows in different}) == len(different)


def test_equal_blocks_of_other_source_rows_have_another_fingerprint() -> None:
    halves, whole = [[1, 2], [3, 4], [5, 6], [7, 8]], [[1, 2, 3, 4], [5, 6, 7, 8]]
    first, second = (make_rows(ids, max_length=4, packing=True) for ids in (halves, whole))
    assert tokens_of(first) == tokens_of(second)
    assert first.fingerprint != second.fingerprint
