"""Rows that share prefixes find each other, and share batches where that saves tokens."""

from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitgen.config import Config
from logitgen.split import prefixes
from logitgen.split.plan import Plan
from logitgen.split.prefixes import Neighbours, neighbours
from logitgen.split.rows import Rows

Lists = list[list[int]]


def rows_of(ids: Lists, **options: Any) -> Rows:
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    split = datasets.Dataset.from_dict({"input_ids": ids}, features=features)
    return Rows(split, Config(teacher="t", dataset="d", output="o", **options), max_length=None)


def common(first: list[int], second: list[int]) -> int:
    """Tokens that two rows begin with alike, counted one by one."""
    same = [one == other for one, other in zip(first, second, strict=False)]
    return same.index(False) if False in same else len(same)


@st.composite
def families_of_rows(draw: st.DrawFn) -> Lists:
    """Rows that branch off from one another at any depth, in any order."""
    random = draw(st.randoms(use_true_random=False))
    rows: Lists = [[random.randrange(50) for _ in range(random.randrange(2, 120))]]
    for _ in range(draw(st.integers(0, 14))):
        stem = random.choice(rows)
        stem = stem[: random.randrange(len(stem) + 1)]
        rows.append(stem + [random.randrange(50) for _ in range(random.randrange(2, 60))])
    random.shuffle(rows)
    return rows


@settings(max_examples=200, deadline=None)
@given(families_of_rows(), st.sampled_from([60, 2**27]))
def test_rows_stand_beside_those_they_share_most_with(ids: Lists, window: int) -> None:
    read = [row[:-1] for row in ids]
    before, prefixes._WINDOW_TOKENS = prefixes._WINDOW_TOKENS, window
    try:
        found = neighbours(rows_of(ids))
    finally:
        prefixes._WINDOW_TOKENS = before
    assert found.num_positions.tolist() == [len(read[row]) for row in found.rows]
    for index, (row, shared) in enumerate(zip(found.rows, found.shared, strict=True)):
        own = common(read[found.rows[index - 1]], read[row]) if index else 0
        assert shared <= own
        assert shared % 8 == 0
    if window == 2**27:
        most = {row: max((common(read[row], other) for at, other in enumerate(read) if at != row), default=0)
                for row in range(len(ids))}  # fmt: skip
        assert sorted(found.rows) == [row for row, shared in most.items() if shared >= 32]
        reach = np.maximum(found.shared, np.append(found.shared[1:], 0))
        assert reach.tolist() == [most[row] // 8 * 8 for row in found.rows]


def test_the_branch_with_the_longest_row_comes_first() -> None:
    stem, other = list(range(40)), list(range(100, 140))
    ids = [
        other + [1] * 9,
        stem + [1] * 5,
        other + [2] * 30,
        [*stem, 7, *range(300, 320)],
        [*stem, 7, *range(400, 409)],
    ]
    found = neighbours(rows_of(ids))
    assert found.rows.tolist() == [2, 0, 3, 4, 1]
    assert found.shared.tolist() == [0, 40, 0, 40, 40]


def test_the_branch_that_shares_most_comes_before_longer_rows() -> None:
    """Prompts of 80 and of 40 tokens in turns, with a short and a long completion each."""
    prompts = [[*range(100 * number, 100 * number + (40, 80)[number % 2])] for number in range(4)]
    ids = [[*prompt, *range(1000 * more, 1001 * more)] for prompt in prompts for more in (20, 200 - len(prompt))]
    found = neighbours(rows_of(ids))
    assert found.rows.tolist() == [3, 2, 7, 6, 1, 0, 5, 4]
    assert found.shared.tolist() == [0, 80, 0, 80, 0, 40, 0, 40]


def test_rows_longer_than_the_switch_share_nothing() -> None:
    ids = [[*range(50), 1, 2], [*range(50), 3, 4], [*range(50), 5, 6, 7]]
    assert neighbours(rows_of(ids), longest=51).rows.tolist() == [0, 1]


def test_rows_without_a_common_prefix_have_no_neighbours() -> None:
    ids = [[row, *range(60)] for row in range(20)] + [list(range(31)), list(range(31)), []]
    found = neighbours(rows_of(ids))
    assert len(found.rows) == len(found.shared) == len(found.num_positions) == 0


def test_only_tokens_the_teacher_reads_are_shared() -> None:
    features = datasets.Features(
        dict.fromkeys(["input_ids", "completion_mask"], datasets.List(datasets.Value("int32")))
    )
    split = datasets.Dataset.from_dict(
        {"input_ids": [[*range(50)]] * 2, "completion_mask": [[0] * 33 + [1] * 3 + [0] * 14, [0] * 49 + [1]]},
        features=features,
    )
    rows = Rows(split, Config(teacher="t", dataset="d", output="o", completion_only=True), max_length=None)
    found = neighbours(rows)
    assert found.rows.tolist() == [1, 0]
    assert found.shared.tolist() == [0, 32]  # of 35 tokens
    assert found.num_positions.tolist() == [1, 3]


@settings(max_examples=100, deadline=None)
@given(families_of_rows(), st.sampled_from([32, 100, 300, 2000]))
def test_every_row_is_in_one_batch_and_batches_keep_to_the_budget(ids: Lists, batch_tokens: int) -> None:
    rows = rows_of(ids)
    lengths = rows.forward_lengths
    plan = Plan(lengths, batch_tokens, None, neighbours(rows))
    planned = [plan.rows(number).tolist() for number in range(plan.num_batches)]
    assert sorted(row for batch in planned for row in batch) == list(range(len(ids)))
    longest = [max(lengths[row] for row in batch) for batch in planned]
    assert longest == sorted(longest, reverse=True)
    assert plan.num_tokens == lengths.sum()
    read, padded, costs = 0, [], []
    for number, batch in enumerate(planned):
        shared = plan.shared(number)
        assert shared[0] == 0
        collected = rows.batch(plan.rows(number), shared, batch_tokens)
        assert collected.shared.tolist() == shared.tolist()  # the tokens are equal
        sizes = [each.input_ids.size for each in collected.passes]
        padded.append(sum(sizes))
        read += len(np.unique(collected.slots))  # every token of these rows is captured
        is_sharing = number in plan.sharing
        costs.append(sum(sizes) + 16 * len(sizes) * is_sharing)
        assert is_sharing == bool(shared.any())
        if is_sharing:
            assert sum(len(ids[row]) - 1 for row in batch) <= batch_tokens
            assert sum(sizes) < 0.9 * sum(lengths[row] for row in batch)
        elif len(batch) > 1:
            assert sizes == [len(batch) * longest[number]]
            assert sizes[0] <= batch_tokens
    assert plan.padded_tokens.tolist() == padded
    assert plan.costs.tolist() == costs
    assert plan.num_read == read
    assert plan.padding_share == pytest.approx(1 - read / sum(padded))
    assert plan.saved_share == pytest.approx(1 - read / lengths.sum())
    assert plan.sums(lengths).tolist() == [sum(lengths[row] for row in batch) for batch in planned]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(2, 100), min_size=1, max_size=40), st.sampled_from([64, 300]))
def test_a_split_without_shared_prefixes_has_the_plan_it_had(lengths: list[int], batch_tokens: int) -> None:
    rows = rows_of([[row, *range(1, length)] for row, length in enumerate(lengths)])
    plan, without = (Plan(rows.forward_lengths, batch_tokens, None, shared) for shared in (neighbours(rows), None))
    for number in range(without.num_batches):
        assert plan.rows(number).tolist() == without.rows(number).tolist()
        assert not plan.shared(number).any()
    assert plan.padded_tokens.tolist() == without.padded_tokens.tolist()
    assert plan.saved_share == 0


def test_batches_end_where_the_least_is_read_twice() -> None:
    """Ten prompts with five completions each; 600 tokens are seven and a half prompts, so five and a half fit."""
    lengths = np.full(50, 60, dtype=np.int32)
    shared = np.where(np.arange(50) % 5, 40, 0)
    plan = Plan(lengths, 600, None, Neighbours(np.arange(50), shared, np.full(50, 12)))
    assert [len(plan.rows(number)) for number in range(plan.num_batches)] == [20, 20, 10]
    assert all(plan.rows(number)[0] % 5 == 0 for number in range(plan.num_batches))


def test_a_batch_has_no_more_prefixes_than_one_pass_reads() -> None:
    """Prompts of 304 tokens with two completions of 16: the rows of three prompts fit, their prefixes do not."""
    lengths, shared = np.full(12, 320, dtype=np.int32), np.where(np.arange(12) % 2, 304, 0)
    plan = Plan(lengths, 800, None, Neighbours(np.arange(12), shared, np.full(12, 16)))
    assert [plan.rows(number).tolist() for number in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert plan.num_read == 6 * (304 + 2 * 16)


def test_a_batch_captures_no_more_positions_than_it_may() -> None:
    """The payload of a batch grows with them, however few tokens are read."""
    lengths = np.full(40, 110, dtype=np.int32)
    shared = np.append(0, np.full(39, 104))
    near = Neighbours(np.arange(40), shared, np.full(40, 109))
    for most_positions, rows in ((0, 4), (600, 5), (10_000, 40)):
        plan = Plan(lengths, 512, None, near, most_positions)
        assert [len(plan.rows(number)) for number in range(plan.num_batches)] == [rows] * (40 // rows)


def test_what_saves_too_little_is_read_whole() -> None:
    """Forty tokens shared by two rows of 400 are 5 % of what they read."""
    lengths = np.full(2, 400, dtype=np.int32)
    for shared, expected in ((40, []), (200, [0])):
        plan = Plan(lengths, 1024, None, Neighbours(np.arange(2), np.array([0, shared]), np.full(2, 399)))
        assert plan.sharing.tolist() == expected


def test_rows_that_are_equal_in_all_the_teacher_reads_share_a_batch() -> None:
    """Their tree is one pass, of one line."""
    rows = rows_of([[*range(40), row] for row in range(6)])
    plan = Plan(rows.forward_lengths, 1024, None, neighbours(rows))
    assert plan.sharing.tolist() == [0]
    assert plan.padded_tokens.tolist() == [40]
    assert plan.saved_share == pytest.approx(5 / 6)
