"""The tree of a batch: passes that read every prefix once give every row all its tokens, and no more than that."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import pytest
from batches import FREE, batch_of
from hypothesis import given, settings
from hypothesis import strategies as st

from logitgen.split.batch import Batch, checked
from logitgen.split.tree import CPU_COST, GPU_COST, PassCost, steps


def common(first: list[int], second: list[int]) -> int:
    """Tokens that two rows begin with alike, counted one by one."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count


def tree_batch(rows: list[list[int]], batch_tokens: int, pass_cost: PassCost = FREE) -> Batch:
    """A batch of rows in the order of their tokens; the last token of each is only a target."""
    read = [row[:-1] for row in rows]
    shared = [0, *(common(*pair) for pair in pairwise(read))]
    return batch_of(rows, shared=shared, batch_tokens=batch_tokens, pass_cost=pass_cost)


def tokens_by_slot(batch: Batch) -> list[list[int]]:
    """All tokens that the teacher has seen at each place of the passes, its own included."""
    seen: list[list[int]] = []
    trunk: list[list[int]] = []
    for each in batch.passes:
        start = [[] for _ in each.input_ids] if each.parents is None else [trunk[parent] for parent in each.parents]
        lines = [before + ids.tolist() for before, ids in zip(start, each.input_ids, strict=True)]
        for before, line in zip(start, lines, strict=True):
            seen += [line[: at + 1] for at in range(len(before), len(line))]
        if each.is_trunk:
            trunk = lines
    return seen


alike = st.lists(st.lists(st.integers(0, 2), min_size=2, max_size=24), min_size=1, max_size=14).map(sorted)
budgets = st.sampled_from([1, 64, 128, 256, 1024])
costs = st.sampled_from([FREE, CPU_COST, GPU_COST, PassCost(1, 0), PassCost(0, 12), PassCost(2, 5)])


@settings(max_examples=300, deadline=None)
@given(alike, budgets, costs)
def test_the_teacher_sees_every_position_behind_its_own_tokens(
    rows: list[list[int]], batch_tokens: int, pass_cost: PassCost
) -> None:
    batch = tree_batch(rows, batch_tokens, pass_cost)
    seen = tokens_by_slot(batch)
    for row, position, slot in zip(batch.row_of_position, batch.positions, batch.slots, strict=True):
        assert seen[slot] == rows[row][: position + 1]


@settings(max_examples=300, deadline=None)
@given(alike, budgets, costs)
def test_no_pass_takes_more_than_it_may(rows: list[list[int]], batch_tokens: int, pass_cost: PassCost) -> None:
    lengths = np.array([len(row) - 1 for row in rows])
    shared = np.array([0, *(common(*pair) for pair in pairwise([row[:-1] for row in rows]))])
    planned = steps(lengths, shared, batch_tokens, pass_cost)
    assert sum(step.num_tokens for step in planned) <= lengths.sum()
    if not shared.any():
        assert len(planned) == 1
        return
    for step in planned:
        assert not (step.is_trunk and len(step.rows) * step.length > step.num_tokens)
        if len(step.rows) > 1:
            assert len(step.rows) * step.ends.max() <= 4 * batch_tokens
            assert step.is_trunk or len(step.rows) * step.length <= batch_tokens


def ways_to_group(items: list[int]) -> Iterator[list[list[int]]]:
    """All ways to put items into groups."""
    if not items:
        yield []
        return
    for groups in ways_to_group(items[1:]):
        yield [[items[0]], *groups]
        for index, group in enumerate(groups):
            yield [*groups[:index], [items[0], *group], *groups[index + 1 :]]


@settings(max_examples=300, deadline=None)
@given(st.sets(st.integers(1, 40), min_size=2, max_size=6), st.integers(1, 60), st.integers(1, 250), costs)
def test_rows_behind_a_prefix_are_read_at_the_least_cost(
    suffixes: set[int], prefix: int, batch_tokens: int, pass_cost: PassCost
) -> None:
    """Of all ways to group them, also those in which no neighbours in length go together."""
    lengths = np.array([prefix + suffix for suffix in suffixes])
    planned = steps(lengths, np.append(0, np.full(len(lengths) - 1, prefix)), batch_tokens, pass_cost)
    found = [step for step in planned if not step.is_trunk]
    (start,) = {step.start for step in found}

    def cost(group: list[int]) -> float:
        tokens, keys = (len(group) * (max(group) - before) for before in (start, 0))
        may = len(group) == 1 or (tokens <= batch_tokens and keys <= 4 * batch_tokens)
        return max(tokens, pass_cost.least) + pass_cost.extra if may else np.inf

    least = min(sum(map(cost, groups)) for groups in ways_to_group(lengths.tolist()))
    assert sum(cost(lengths[step.rows].tolist()) for step in found) == least


@pytest.mark.parametrize(("batch_tokens", "pass_rows"), [(210, [4, 4, 2]), (1000, [10])])
def test_equally_long_rows_fill_their_passes(batch_tokens: int, pass_rows: list[int]) -> None:
    lengths, shared = np.full(10, 90), np.append(0, np.full(9, 40))
    planned = steps(lengths, shared, batch_tokens, CPU_COST)
    assert [(step.start, len(step.rows)) for step in planned] == [(0, 1), *((40, rows) for rows in pass_rows)]


@settings(max_examples=300, deadline=None)
@given(alike)
def test_where_passes_cost_nothing_every_prefix_is_read_once(rows: list[list[int]]) -> None:
    batch = tree_batch(rows, batch_tokens=127)
    prefixes = {tuple(row[:end]) for row in rows for end in range(1, len(row))}
    if batch.shared.any():
        assert sum(each.input_ids.size for each in batch.passes) == len(prefixes)


def test_a_prefix_and_its_suffixes_worked_by_hand() -> None:
    prefix = list(range(10, 20))
    batch = tree_batch([[*prefix, 1, 2, 3, 0], [*prefix, 4, 5, 0], [*prefix, 6, 7, 8, 0]], 128, PassCost(1, 0))
    trunk, suffixes = batch.passes
    assert trunk.input_ids.tolist() == [prefix]
    assert trunk.parents is None
    assert trunk.is_trunk
    assert suffixes.input_ids.tolist() == [[1, 2, 3], [6, 7, 8], [4, 5, 0]]  # one token of padding is cheaper
    assert suffixes.parents is not None
    assert suffixes.parents.tolist() == [0, 0, 0]
    assert not suffixes.is_trunk
    assert batch.slots.tolist() == [
        *(*range(10), 10, 11, 12),
        *(*range(10), 16, 17),
        *(*range(10), 13, 14, 15),
    ]


def test_nested_prefixes_worked_by_hand() -> None:
    """A conversation of three turns, each a row: the second and third turn begin with the first's question."""
    rows = [[1, 2, 3, 4, 9, 0], [1, 2, 3, 5, 6, 7, 8, 0], [1, 2, 3, 5, 6, 7, 3, 3, 0]]
    batch = tree_batch(rows, batch_tokens=1)
    assert [(each.input_ids.tolist(), each.is_trunk) for each in batch.passes] == [
        ([[1, 2, 3]], True),
        ([[4, 9]], False),
        ([[5, 6, 7]], True),
        ([[3, 3]], False),
        ([[8]], False),
    ]
    assert [each.parents.tolist() for each in batch.passes if each.parents is not None] == [[0]] * 4


def test_a_prefix_of_several_prompts_worked_by_hand() -> None:
    """Each prompt has two completions, so no row parts from its neighbours where the prompts part."""
    system, prompts = [1, 2, 3], [[4, 5], [6, 7]]
    rows = [[*system, *prompt, completion, 0] for prompt in prompts for completion in (8, 9)]
    assert [(each.input_ids.tolist(), each.is_trunk) for each in tree_batch(rows, batch_tokens=16).passes] == [
        ([system], True),
        (prompts, True),
        ([[8], [9], [8], [9]], False),
    ]


def test_rows_that_are_equal_are_read_once() -> None:
    batch = tree_batch([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 9]], batch_tokens=8)
    assert [each.input_ids.tolist() for each in batch.passes] == [[[1, 2, 3]]]
    assert batch.slots.tolist() == [0, 1, 2] * 3


def test_a_row_that_another_goes_on_from_is_read_once() -> None:
    batch = tree_batch([[1, 2, 3], [1, 2, 3, 4, 5]], batch_tokens=8)
    assert [each.input_ids.tolist() for each in batch.passes] == [[[1, 2]], [[3, 4]]]
    assert batch.slots.tolist() == [0, 1, 0, 1, 2, 3]


def test_a_short_prefix_is_not_worth_a_pass_of_its_own() -> None:
    rows = [[1, 2, 3, *range(10, 40)], [1, 2, 3, *range(50, 80)]]
    assert [each.input_ids.shape for each in tree_batch(rows, 64).passes] == [(1, 3), (2, 29)]
    assert [each.input_ids.shape for each in tree_batch(rows, 64, PassCost(4, 0)).passes] == [(2, 32)]


def test_a_pass_that_a_gpu_waits_for_is_filled() -> None:
    """A prefix of 400 tokens with 20 completions of 5 to 24 tokens."""
    rows = [[*range(400), *range(1000 * length, 1001 * length), 0] for length in range(5, 25)]
    whole, few, many = (tree_batch(rows, 16_384, PassCost(0, least)) for least in (2**20, 600, 0))
    assert [each.input_ids.shape for each in whole.passes] == [(20, 424)]
    assert [each.input_ids.shape for each in few.passes] == [(1, 400), (20, 24)]
    assert [each.input_ids.shape for each in many.passes] == [(1, 400), *((1, length) for length in range(24, 4, -1))]


@pytest.mark.parametrize("of_each_row", [False, True])
def test_what_rows_share_is_captured_once_unless_it_is_drawn(of_each_row: bool) -> None:
    batch = tree_batch([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 9]], batch_tokens=8)
    distinct = batch.distinct(of_each_row)
    # The third position's next token is 4 or 9.
    assert len(distinct.index) == (9 if of_each_row else 4)
    assert (np.diff(batch.slots[distinct.index]) >= 0).all()
    found = {}
    for start in range(0, len(distinct.index), 2):  # in chunks of two
        places, sources = distinct.of_span(slice(start, start + 2))
        found |= dict(zip(places.tolist(), distinct.index[start : start + 2][sources].tolist(), strict=True))
    assert sorted(found) == list(range(9))
    for place, computed in found.items():
        assert batch.slots[place] == batch.slots[computed]
        assert batch.targets[place] == batch.targets[computed]
        assert place == computed or not of_each_row


def test_every_position_of_rows_read_whole_is_captured_in_its_place() -> None:
    distinct = batch_of([[1, 2, 3], [4, 5]]).distinct(of_each_row=False)
    assert distinct.index.tolist() == [0, 1, 2]
    assert distinct.copies is None


@settings(max_examples=100, deadline=None)
@given(alike.filter(lambda rows: len(rows) > 1), budgets)
def test_halves_of_a_tree_are_the_trees_of_their_rows(rows: list[list[int]], batch_tokens: int) -> None:
    middle = len(rows) // 2
    for half, alone in zip(tree_batch(rows, batch_tokens).halves(), (rows[:middle], rows[middle:]), strict=True):
        expected = tree_batch(alone, batch_tokens)
        read, expected_read = ([each.input_ids.tolist() for each in part.passes] for part in (half, expected))
        assert read == expected_read
        assert half.slots.tolist() == expected.slots.tolist()


def test_rows_that_differ_after_all_share_nothing() -> None:
    rows = [np.array([1, 2, 3, 4]), np.array([1, 2, 3, 5]), np.array([1, 2, 9, 5]), np.array([1, 2, 9])]
    assert checked(rows, np.array([0, 3, 3, 3])).tolist() == [0, 3, 0, 3]


def test_trunks_keep_no_more_tokens_than_the_budget() -> None:
    """A document of 600 tokens, and 4 questions of 50 about it with 3 answers each."""
    lengths = np.full(12, 700)
    shared = np.where(np.arange(12) % 3, 650, 600) * (np.arange(12) > 0)
    for budget, trunks in {2048: [(0, 1)], 4096: [(0, 1), (600, 4)]}.items():
        planned = steps(lengths, shared, budget, FREE)
        assert [(step.start, len(step.rows)) for step in planned if step.is_trunk] == trunks
