"""The plan: every row in one batch, longest first, within the budget, the same for any number of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitgen.plan import Plan

row_lengths = st.lists(st.integers(0, 60), max_size=60)
budgets = st.integers(1, 250)


def make_plan(lengths: list[int], batch_tokens: int) -> Plan:
    return Plan(np.array(lengths, dtype=np.int32), batch_tokens)


def batches(plan: Plan) -> list[list[int]]:
    return [plan.rows(batch).tolist() for batch in range(plan.num_batches)]


def test_a_plan_worked_by_hand() -> None:
    plan = make_plan([3, 0, 10, 4, 1, 4, 25, 0, 3], batch_tokens=12)
    # 25 is alone for it is over the budget, 10 because two would be; three rows of at most 4 just fit.
    assert batches(plan) == [[6], [2], [3, 5, 0], [8, 4]]
    assert plan.num_batches == 4
    assert plan.num_rows.tolist() == [1, 1, 3, 2]
    assert plan.num_tokens == 3 + 10 + 4 + 1 + 4 + 25 + 3
    assert plan.num_padded_tokens == 25 + 10 + 3 * 4 + 2 * 3
    assert plan.padding_share == pytest.approx(1 - 50 / 53)
    assert plan.sums(np.array([100, 1, 2, 3, 4, 5, 6, 7, 8])).tolist() == [6, 2, 3 + 5 + 100, 8 + 4]
    done = np.array([1, 1, 0, 1, 1, 1, 1, 0, 0], dtype=bool)  # 2 is in batch 1, 8 in batch 3, and 7 needs no pass
    assert plan.pending(done).tolist() == [1, 3]


@settings(max_examples=100, deadline=None)
@given(row_lengths, budgets)
def test_every_row_that_needs_a_forward_pass_is_in_exactly_one_batch(lengths: list[int], batch_tokens: int) -> None:
    planned = [row for batch in batches(make_plan(lengths, batch_tokens)) for row in batch]
    assert sorted(planned) == [row for row, length in enumerate(lengths) if length > 0]


@settings(max_examples=100, deadline=None)
@given(row_lengths, budgets)
def test_a_batch_stays_within_the_budget_unless_it_is_a_single_row(lengths: list[int], batch_tokens: int) -> None:
    for batch in batches(make_plan(lengths, batch_tokens)):
        assert len(batch) * max(lengths[row] for row in batch) <= batch_tokens or len(batch) == 1


@settings(max_examples=100, deadline=None)
@given(row_lengths, budgets)
def test_a_batch_is_full_before_the_next_one_starts(lengths: list[int], batch_tokens: int) -> None:
    for batch in batches(make_plan(lengths, batch_tokens))[:-1]:
        assert (len(batch) + 1) * max(lengths[row] for row in batch) > batch_tokens


@settings(max_examples=100, deadline=None)
@given(row_lengths, budgets)
def test_rows_go_longest_first_and_equal_ones_in_their_order(lengths: list[int], batch_tokens: int) -> None:
    planned = [row for batch in batches(make_plan(lengths, batch_tokens)) for row in batch]
    assert planned == sorted(planned, key=lambda row: (-lengths[row], row))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.booleans()), max_size=60), budgets)
def test_the_batches_with_a_row_that_is_not_done_are_pending(rows: list[tuple[int, bool]], batch_tokens: int) -> None:
    plan = make_plan([length for length, _ in rows], batch_tokens)
    done = [flag for _, flag in rows]
    expected = [number for number, batch in enumerate(batches(plan)) if not all(done[row] for row in batch)]
    flags = np.array(done, dtype=bool)
    assert plan.pending(flags).tolist() == expected
    assert flags.tolist() == done


@settings(max_examples=100, deadline=None)
@given(row_lengths, budgets)
def test_all_batches_are_pending_at_first_and_none_at_last(lengths: list[int], batch_tokens: int) -> None:
    plan = make_plan(lengths, batch_tokens)
    assert plan.pending(np.zeros(len(lengths), bool)).tolist() == list(range(plan.num_batches))
    assert plan.pending(np.ones(len(lengths), bool)).tolist() == []


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(-5, 1000)), max_size=60), budgets)
def test_sums_and_counts_are_those_of_the_batches_rows(rows: list[tuple[int, int]], batch_tokens: int) -> None:
    lengths, values = [length for length, _ in rows], [value for _, value in rows]
    plan = make_plan(lengths, batch_tokens)
    planned = batches(plan)
    assert plan.sums(np.array(values, dtype=np.int32)).tolist() == [sum(values[row] for row in b) for b in planned]
    assert plan.num_rows.tolist() == [len(batch) for batch in planned]
    assert plan.num_tokens == sum(lengths)
    assert plan.num_padded_tokens == sum(len(batch) * max(lengths[row] for row in batch) for batch in planned)
    padding = plan.num_padded_tokens - sum(lengths)
    assert plan.padding_share == pytest.approx(padding / plan.num_padded_tokens if planned else 0)


def test_a_plan_without_rows_has_no_batches() -> None:
    for lengths in ([], [0, 0, 0]):
        plan = make_plan(lengths, batch_tokens=8)
        assert plan.num_batches == 0
        assert plan.pending(np.zeros(len(lengths), bool)).tolist() == []
        assert plan.sums(np.array([5] * len(lengths), dtype=np.int32)).tolist() == []
        assert (plan.num_tokens, plan.num_padded_tokens, plan.padding_share) == (0, 0, 0.0)


def test_more_tokens_than_32_bits_can_count_are_counted() -> None:
    lengths = np.full(3, 2**30, dtype=np.int32)
    plan = Plan(lengths, batch_tokens=2**40)
    assert plan.num_tokens == plan.num_padded_tokens == 3 * 2**30
    assert plan.sums(lengths).tolist() == [3 * 2**30]


def test_the_plan_leaves_the_lengths_as_they_are() -> None:
    lengths = np.array([2, 9, 4], dtype=np.int32)
    Plan(lengths, batch_tokens=8)
    assert lengths.tolist() == [2, 9, 4]


@given(st.lists(st.integers(0, 40), max_size=60), st.integers(1, 200), st.integers(1, 40))
def test_no_batch_mixes_rows_on_both_sides_of_a_length_switch(lengths: list[int], budget: int, switch: int) -> None:
    plan = Plan(np.array(lengths, dtype=np.int32), budget, switch)
    batches = [[lengths[row] for row in plan.rows(batch)] for batch in range(plan.num_batches)]
    assert sorted(length for batch in batches for length in batch) == sorted(filter(None, lengths))
    assert all(min(batch) > switch or max(batch) <= switch for batch in batches)
    assert all(len(batch) == 1 or max(batch) * len(batch) <= budget for batch in batches)
