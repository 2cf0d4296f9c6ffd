"""Random numbers that depend on seed, row and position alone: reproduced by plain integers, uniform, unrelated."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitgen.teacher import noise
from logitgen.teacher.noise import position_keys, uniform

WORD = 2**64 - 1


def keys(seed: int, rows: list[int], positions: list[int]) -> torch.Tensor:
    return position_keys(seed, torch.tensor(rows), torch.tensor(positions))


def uniforms(seed: int, rows: list[int], positions: list[int]) -> np.ndarray:
    return uniform(keys(seed, rows, positions), torch.float64).numpy()


def splitmix64(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
    return state ^ (state >> 31)


def test_the_key_generator_is_the_published_one() -> None:
    """The first number of splitmix64 for the seed 0."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert noise.mixed(torch.tensor([0])).item() & WORD == 0xE220A8397B1DCDAF


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**40), st.integers(0, 2**31 - 1))
def test_every_number_is_the_hash_of_its_place(seed: int, row: int, position: int) -> None:
    key = splitmix64((splitmix64((splitmix64(seed) + row) & WORD) + position) & WORD)
    assert uniforms(seed, [row], [position]).tolist() == [((key >> 32) + 0.5) / 2**32]


def test_a_number_does_not_depend_on_what_is_drawn_beside_it() -> None:
    rows, positions = (list(numbers) for numbers in zip(*product(range(3), range(5)), strict=True))
    together = uniforms(7, rows, positions)
    alone = [uniforms(7, [row], [position])[0] for row, position in zip(rows, positions, strict=True)]
    assert together.tolist() == alone


def distance_from_uniform(values: np.ndarray) -> float:
    """Kolmogorov-Smirnov statistic times the root of the number of values; beyond 2.3 with a chance of 5e-5."""
    ordered = np.sort(values.ravel())
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return float(np.sqrt(len(ordered)) * max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_numbers_are_uniform_over_positions_and_rows(seed: int) -> None:
    many, same = list(range(100_000)), [3] * 100_000
    assert distance_from_uniform(uniforms(seed, same, many)) < 2.3
    assert distance_from_uniform(uniforms(seed, many, same)) < 2.3


@pytest.mark.parametrize(
    ("seed", "row", "position"), [(1, 0, 0), (0, 1, 0), (0, 0, 1)], ids=["seed", "row", "position"]
)
def test_neighbours_have_nothing_to_do_with_each_other(seed: int, row: int, position: int) -> None:
    """Correlations of as many independent numbers are beyond 4.5 standard deviations with a chance of 7e-6."""
    rows, positions = (list(numbers) for numbers in zip(*product(range(300), range(300)), strict=True))
    left = uniforms(0, rows, positions)
    right = uniforms(seed, [number + row for number in rows], [number + position for number in positions])
    assert abs(np.corrcoef(left, right)[0, 1]) < 4.5 / math.sqrt(len(left))
    cells = np.floor(16 * np.stack([left, right])).astype(int)
    counts = np.bincount(cells[0] * 16 + cells[1], minlength=256)
    expected = len(left) / 256
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 4.5 * math.sqrt(2 * 255)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_number_is_below_0_or_above_1(dtype: torch.dtype) -> None:
    ends = uniform(torch.tensor([0, -1, 2**63 - 1, -(2**63)]), dtype)
    assert ends.dtype == dtype
    np.testing.assert_allclose(ends, [0, 1, 0.5, 0.5], atol=1e-7)
    assert (ends > 0).all()
    assert (ends <= 1).all()


def test_no_two_positions_of_many_have_the_same_key() -> None:
    rows, positions = zip(*product(range(300), range(300)), strict=True)
    assert len(set(keys(0, list(rows), list(positions)).tolist())) == 90_000
