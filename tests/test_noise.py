"""Noise that is a function of seed, row, position and token: reproduced by plain integers, uniform, and unrelated."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitgen.teacher import noise
from logitgen.teacher.noise import gumbel, position_keys

WORD = 2**64 - 1


def keys(seed: int, rows: list[int], positions: list[int]) -> torch.Tensor:
    return position_keys(seed, torch.tensor(rows), torch.tensor(positions))


def uniforms(key_C: torch.Tensor, num_ids: int) -> np.ndarray:
    """The distribution function of the standard Gumbel distribution makes of its draws uniform numbers."""
    return np.exp(-np.exp(-gumbel(key_C, num_ids).double().numpy()))


def splitmix64(state: int) -> int:
    state = (state + 0x9E3779B97F4A7C15) & WORD
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & WORD
    return state ^ (state >> 31)


def by_plain_integers(seed: int, row: int, position: int, token: int) -> float:
    key = splitmix64((splitmix64((splitmix64(seed) + row) & WORD) + position) & WORD)
    bits = (token * 0x9E3779B9 & 0xFFFFFFFF) ^ (key >> 32)
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    bits = (bits ^ (bits >> 15) ^ (key & 0xFFFFFFFF)) * 0x846CA68B & 0xFFFFFFFF
    return ((bits ^ (bits >> 16)) & 0x7FFFFFFF) / 2**31


def test_the_key_generator_is_the_published_one() -> None:
    """The first number of splitmix64 for the seed 0."""
    assert splitmix64(0) == 0xE220A8397B1DCDAF
    assert noise.mixed(torch.tensor([0])).item() & WORD == 0xE220A8397B1DCDAF


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**40), st.integers(0, 2**31 - 1), st.integers(1, 300))
def test_every_draw_is_the_hash_of_its_place(seed: int, row: int, position: int, num_ids: int) -> None:
    drawn = gumbel(keys(seed, [row], [position]), num_ids)[0]
    assert drawn.dtype == torch.float32
    u = np.array([by_plain_integers(seed, row, position, token) + 2.0**-32 for token in range(num_ids)])
    # u is made smaller by 2**-23, so that it stays below 1, and rounded: near 1, where the small draws come from, that
    # is much of 1 - u.
    rounding = 1.5 * 2.0**-23 / ((1 - u) * -np.log1p(-u))
    assert (np.abs(drawn.numpy() + np.log(-np.log1p(-u))) <= rounding + 1e-4).all()


def test_the_draws_of_a_position_do_not_depend_on_what_is_drawn_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    places = list(product(range(3), range(5)))
    together = gumbel(keys(7, *map(list, zip(*places, strict=True))), 500)
    for cached in (1, 1200, 2**18):
        monkeypatch.setattr(noise, "_CACHED", cached)
        alone = torch.cat([gumbel(keys(7, [row], [position]), 500) for row, position in places])
        assert torch.equal(alone, together)
    assert torch.equal(gumbel(keys(7, [2], [3]), 300)[0], together[13, :300])


def test_a_shard_draws_what_the_whole_vocabulary_draws_for_its_ids() -> None:
    key_C = keys(7, [0, 1, 2], [5, 4, 3])
    assert torch.equal(gumbel(key_C, 200, first_id=300), gumbel(key_C, 500)[:, 300:])


def distance_from_uniform(values: np.ndarray) -> float:
    """Kolmogorov-Smirnov statistic times the root of the number of values; beyond 2.3 with a chance of 5e-5."""
    ordered = np.sort(values.ravel())
    steps = np.arange(len(ordered) + 1) / len(ordered)
    return float(np.sqrt(len(ordered)) * max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max()))


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_draws_are_uniform_over_tokens_positions_and_rows(seed: int) -> None:
    assert distance_from_uniform(uniforms(keys(seed, [0], [0]), 200_000)) < 2.3
    assert distance_from_uniform(uniforms(keys(seed, [3] * 20_000, list(range(20_000))), 10)) < 2.3
    assert distance_from_uniform(uniforms(keys(seed, list(range(20_000)), [0] * 20_000), 10)) < 2.3


@pytest.mark.parametrize(
    ("seeds", "rows", "positions"),
    [((0, 1), (0, 0), (0, 0)), ((0, 0), (0, 1), (0, 0)), ((0, 0), (0, 0), (0, 1)), ((0, 0), (0, 1), (1, 0))],
    ids=["seed", "row", "position", "row and position exchanged"],
)
def test_neighbours_have_nothing_to_do_with_each_other(
    seeds: tuple[int, int], rows: tuple[int, int], positions: tuple[int, int]
) -> None:
    """Correlations of as many independent numbers are beyond 4.5 standard deviations with a chance of 7e-6."""
    left, right = (
        uniforms(keys(seed, [row], [position]), 100_000)[0]
        for seed, row, position in zip(seeds, rows, positions, strict=True)
    )
    for shift in range(4):
        assert abs(np.corrcoef(left, np.roll(right, shift))[0, 1]) < 4.5 / math.sqrt(100_000)
    ranks = np.floor(16 * np.stack([left, right])).astype(int)
    counts = np.bincount(ranks[0] * 16 + ranks[1], minlength=256)
    chi_square = ((counts - 100_000 / 256) ** 2 / (100_000 / 256)).sum()
    assert abs(chi_square - 255) < 4.5 * math.sqrt(2 * 255)


def test_no_draw_is_infinite() -> None:
    """Not even that of the largest or smallest hash there is."""
    for bits in (0, 0x7FFFFFFF):
        hashed = torch.full((1, 1), bits, dtype=torch.int32)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(noise, "_hashed", lambda *arguments, hashed=hashed: hashed)
            drawn = gumbel(torch.tensor([0]), 1).item()
        assert math.isfinite(drawn)
        assert -2.9 < drawn < 22.3


def test_no_two_positions_of_many_have_the_same_key() -> None:
    rows, positions = zip(*product(range(300), range(300)), strict=True)
    assert len(set(keys(0, list(rows), list(positions)).tolist())) == 90_000
