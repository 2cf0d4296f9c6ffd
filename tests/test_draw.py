"""The draw: every token's share by integrating over all random numbers, and the plain algorithm beside it."""

import threading
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitgen.student.events import certain_tokens, sample_level, sample_weights
from logitgen.teacher import draw as draw_module
from logitgen.teacher import shard as shard_module
from logitgen.teacher.keep import sample, top_k
from logitgen.teacher.noise import position_keys
from logitgen.teacher.shard import WHOLE, VocabShard

STANDARD_ERRORS = 4.5
"""How far a mean of independent draws may be from what is expected; further with a chance of 7e-6."""

PEAKED = [0.9, 0.06, 0.02, 0.01, 0.006, 0.003, 0.001]
FLAT = [0.2, 0.17, 0.16, 0.15, 0.12, 0.11, 0.09]
TIED = [0.25, 0.25, 0.125, 0.125, 0.125, 0.0625, 0.0625]
CERTAIN = [1 - 1e-9, 4e-10, 3e-10, 2e-10, 5e-11, 3e-11, 2e-11]
FEW = [0.5, 0.5, 0, 0, 0, 0, 0]
DISTRIBUTIONS = {"peaked": PEAKED, "flat": FLAT, "tied": TIED, "all but certain": CERTAIN, "few": FEW}


def keys(num_positions: int) -> torch.Tensor:
    return position_keys(1, torch.zeros(num_positions, dtype=torch.int64), torch.arange(num_positions))


def drawn_from(
    logits_CV: torch.Tensor, k: int | Sequence[int], num_ids: int | None = None, shard: VocabShard = WHOLE
) -> dict[str, Any]:
    """Draw k tokens of each position, or as many as there is room for."""
    num_positions = len(logits_CV)
    target_C = torch.zeros(num_positions, dtype=torch.int64)
    room = [k] * (k + 1) if isinstance(k, int) else k
    return sample(logits_CV, target_C, room, keys(num_positions), num_ids or logits_CV.shape[1], shard)


def level_of(probabilities: list[Any], k: int) -> Any:
    """The level as it is defined: the rest's share, with the fewest certain that leave nobody above it."""
    ordered = sorted(probabilities, reverse=True)
    levels = ((sum(ordered[certain:]) / (k - certain), ordered[certain]) for certain in range(k))
    return next(level for level, likeliest_left in levels if likeliest_left <= level)


def drawn_plainly(probabilities: list[float], k: int, offset: float) -> set[int]:
    """The draw as it is defined, a token at a time."""
    level, end, num_marks = level_of(probabilities, k), 0.0, 0
    found = {token for token, p in enumerate(probabilities) if p > level}
    for token in sorted(set(range(len(probabilities))) - found):
        end += probabilities[token]
        if end > (num_marks + offset) * level:
            found.add(token)
            num_marks += 1
    return found


def weights_of(drawn: dict[str, Any], vocab_size: int) -> np.ndarray:
    """The weight of every token at every position, 0 where it was not drawn, in float64."""
    weights = np.zeros((len(drawn["kept_ids"]), vocab_size))
    np.put_along_axis(weights, drawn["kept_ids"].numpy(), sample_weights(drawn["kept_logprobs"].double()).numpy(), 1)
    return weights


@pytest.fixture
def with_offsets(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Draw with these random numbers."""

    def drawn(probabilities: list[float], k: int, offsets: list[float], **options: Any) -> dict[str, Any]:
        monkeypatch.setattr(draw_module, "uniform", lambda _, dtype: torch.tensor(offsets, dtype=dtype))
        logits_CV = torch.tensor(probabilities).double().log().add(3).float().expand(len(offsets), -1)
        return drawn_from(logits_CV, k, **options)

    return drawn


@pytest.mark.parametrize("k", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_over_all_random_numbers_a_token_weighs_its_probability(
    name: str, k: int, with_offsets: Callable[..., dict[str, Any]]
) -> None:
    """The draw changes only where a mark meets a border of a token; one draw stands for all numbers in between."""
    probabilities = DISTRIBUTIONS[name]
    exact = list(map(Fraction, probabilities))
    level = level_of(exact, k)
    line = [p for p in exact if p <= level]
    ends = [sum(line[: count + 1]) / level % 1 if level else Fraction(0) for count in range(len(line))]
    borders = sorted({Fraction(0), Fraction(1), *ends})
    borders = [
        border for border, after in zip(borders, [*borders[1:], Fraction(2)], strict=True) if after - border > 1e-6
    ]
    lengths = np.diff(np.array(borders, dtype=np.float64))
    middles = [float((left + right) / 2) for left, right in pairwise(borders)]
    drawn = with_offsets(probabilities, k, middles)
    assert all(len(set(ids)) == k for ids in drawn["kept_ids"].tolist())
    weights = weights_of(drawn, len(probabilities))
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    np.testing.assert_allclose(lengths @ weights, probabilities, rtol=2e-5, atol=1e-6)
    if level:
        inclusion = lengths @ np.array([np.isin(range(7), ids) for ids in drawn["kept_ids"].tolist()])
        expected = [min(1, float(p / level)) for p in exact]
        np.testing.assert_allclose(inclusion, expected, atol=1e-5)  # also of the tail that is 1e-9 of all


def test_the_likeliest_renormalised_would_fail_that() -> None:
    weights = np.array(PEAKED[:3]) / sum(PEAKED[:3])
    assert np.abs(weights - PEAKED[:3]).max() > 100 * 2e-5


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 150), st.data(), st.sampled_from([0.1, 3.0, 10.0, 60.0]), st.booleans())
def test_tokens_are_drawn_as_the_plain_algorithm_draws_them(
    vocab_size: int, data: st.DataObject, scale: float, rounded: bool
) -> None:
    """Ids, log-probs and scalars, also from a head that is padded, and from bfloat16, where many logits are equal."""
    num_ids = data.draw(st.integers(1, vocab_size))
    k = data.draw(st.integers(1, num_ids))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    logits_CV = torch.randn((4, vocab_size), generator=generator) * scale
    logits_CV = logits_CV.bfloat16() if rounded else logits_CV
    drawn = drawn_from(logits_CV, k, num_ids)
    exact_CV = logits_CV[:, :num_ids].double().log_softmax(-1)
    offsets = ((keys(4) >> 32) % 2**32 + 0.5).double() / 2**32
    relative_CV = (logits_CV[:, :num_ids].float() - logits_CV[:, :num_ids].float().amax(-1, keepdim=True)).exp()
    for ids, probabilities, offset in zip(drawn["kept_ids"], relative_CV.tolist(), offsets.tolist(), strict=True):
        assert len(set(ids.tolist())) == k
        nearby = [drawn_plainly(probabilities, k, offset + off) for off in (0, -1e-5, 1e-5)]
        assert set(ids.tolist()) in nearby or level_of(probabilities, k) < 1e-30
    near = {"rtol": 1e-5, "atol": 1e-4 + 1e-6 * scale}
    np.testing.assert_allclose(drawn["kept_logprobs"], exact_CV.gather(1, drawn["kept_ids"]).clamp(-65504), **near)
    assert (drawn["kept_logprobs"].diff(dim=1) <= 0).all()
    np.testing.assert_allclose(drawn["logsumexp"], logits_CV[:, :num_ids].double().logsumexp(-1), **near)
    np.testing.assert_allclose(drawn["target_logprob"], exact_CV[:, 0].clamp(-65504), **near)


@pytest.mark.parametrize(("vocab_size", "k"), [(3000, 12), (500, 64)])
def test_of_many_tokens_each_is_drawn_as_often_as_it_should_be(vocab_size: int, k: int) -> None:
    """Each count within its own spread, and all together: the sum of so many squares is near their number."""
    generator = torch.Generator().manual_seed(vocab_size)
    logits_V, num_positions = 3 * torch.randn(vocab_size, generator=generator), 4000
    chunks = position_keys(3, torch.zeros(num_positions, dtype=torch.int64), torch.arange(num_positions)).split(500)
    target_C = torch.zeros(500, dtype=torch.int64)
    drawn = [sample(logits_V.expand(500, -1), target_C, [k] * (k + 1), key_C, vocab_size) for key_C in chunks]
    ids = torch.cat([of_chunk["kept_ids"] for of_chunk in drawn])
    counts = np.bincount(ids.flatten().numpy(), minlength=vocab_size)
    probabilities = logits_V.double().softmax(-1).numpy()
    shares = np.minimum(1, probabilities / level_of(probabilities.tolist(), k))
    assert (counts[shares == 1] == num_positions).all()
    assert 2 <= (shares == 1).sum() < k
    expected, spread = num_positions * shares, np.sqrt(num_positions * shares * (1 - shares))
    often = expected * (1 - shares) > 20
    off = ((counts - expected) / np.where(spread, spread, 1))[often]
    assert often.sum() > 50
    assert np.abs(off).max() < 5
    assert abs(np.square(off).mean() - 1) < 0.5


def test_the_level_follows_from_the_drawn_tokens_alone() -> None:
    """So that a file need not hold it: exactly in theory, and to the rounding of what is stored."""
    logits_CV = 3 * torch.randn((200, 1000), generator=torch.Generator().manual_seed(0))
    for k in (1, 12, 64):
        drawn = drawn_from(logits_CV, k)
        levels = [level_of(p, k) for p in logits_CV.double().softmax(-1).tolist()]
        kept_CK = drawn["kept_logprobs"]
        np.testing.assert_allclose(sample_level(kept_CK.double())[:, 0], levels, rtol=1e-4)
        np.testing.assert_allclose(sample_level(kept_CK.half().double())[:, 0], levels, rtol=1e-2)
        certain = [(p > level).sum() for p, level in zip(logits_CV.double().softmax(-1), levels, strict=True)]
        assert certain_tokens(kept_CK.double()).sum(-1).tolist() == certain
        np.testing.assert_allclose(sample_weights(kept_CK.double()).sum(-1), 1, rtol=1e-6)


def test_padded_rows_of_the_head_are_never_drawn_and_have_no_share() -> None:
    logits_CV = torch.tensor([0.3, 0.2, 0.1, 0.4]).log().expand(500, -1)  # the last one has no token
    drawn = drawn_from(logits_CV, 2, num_ids=3)
    assert set(drawn["kept_ids"].flatten().tolist()) == {0, 1, 2}
    np.testing.assert_allclose(drawn["logsumexp"].exp(), 0.6, rtol=1e-5)
    expected = np.array([1 / 2, 1 / 3, 1 / 6])[drawn["kept_ids"]]
    np.testing.assert_allclose(drawn["kept_logprobs"].exp(), expected, rtol=1e-5)


@pytest.mark.parametrize("low", [-torch.inf, -200.0, -3e38])
def test_masked_tokens_are_drawn_only_for_want_of_others_and_weigh_nothing(low: float) -> None:
    drawn = drawn_from(torch.tensor([0.0, low, low, 0.0, low]).expand(100, -1), 3)
    assert all(set(ids[:2]) == {0, 3} and len(set(ids)) == 3 for ids in drawn["kept_ids"].tolist())
    assert (drawn["kept_logprobs"][:, 2] <= -200).all()
    for stored in (drawn["kept_logprobs"], drawn["kept_logprobs"].half()):
        weights = sample_weights(stored.double())
        np.testing.assert_allclose(weights, np.tile([0.5, 0.5, 0], (100, 1)), atol=1e-3)
    if low == -torch.inf:
        assert (drawn["kept_logprobs"][:, 2] == -torch.inf).all()
        assert (sample_weights(drawn["kept_logprobs"].clamp(-65504).half().double())[:, 2] == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 40, 69])
def test_logits_that_are_not_finite_make_the_scalars_not_finite(value: float, place: int) -> None:
    logits_CV = torch.randn((3, 70), generator=torch.Generator().manual_seed(0))
    logits_CV[1, place] = value
    drawn = drawn_from(logits_CV, 5)
    for name in ("logsumexp", "target_logprob"):
        assert drawn[name].isfinite().tolist() == [True, False, True]
    assert ((drawn["kept_ids"] >= 0) & (drawn["kept_ids"] < 70)).all()
    logits_CV[1] = -torch.inf
    for name in ("logsumexp", "target_logprob"):
        assert drawn_from(logits_CV, 5)[name].isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("layout", ["whole", "part", "repeated", "transposed", "none"])
def test_groups_are_picked_by_their_number_however_the_logits_lie(layout: str) -> None:
    values = torch.randn((6, 5, 32), generator=torch.Generator().manual_seed(0)).flatten(1)
    laid_out = {
        "whole": values,
        "part": torch.cat([values, values], dim=1)[1:, 160:],
        "repeated": values[:1].expand(4, -1),
        "transposed": values.T.contiguous().T,
        "none": values[:0],
    }[layout].unflatten(1, (5, 32))
    groups = torch.tensor([4, 0, 4]).expand(len(laid_out), -1)
    assert torch.equal(draw_module._pick(laid_out, groups), laid_out[:, [4, 0, 4]])


class Ranks:
    """Ranks as threads, which gather as `torch.distributed` does."""

    def __init__(self, num_ranks: int) -> None:
        self.barrier, self.given, self.own = (
            threading.Barrier(num_ranks),
            [torch.empty(0)] * num_ranks,
            threading.local(),
        )

    def size(self) -> int:
        return len(self.given)

    def rank(self) -> int:
        return int(self.own.rank)

    def all_gather(self, parts: list[torch.Tensor], values: torch.Tensor, group: "Ranks") -> None:
        self.given[self.rank()] = values
        self.barrier.wait()
        for part, others in zip(parts, self.given, strict=True):
            part.copy_(others)
        self.barrier.wait()

    def run(self, task: Callable[[], Any]) -> list[Any]:
        results: list[Any] = [None] * self.size()

        def work(rank: int) -> None:
            self.own.rank = rank
            results[rank] = task()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size())]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return results


@pytest.mark.parametrize("num_ids", [203, 150, 60])
@pytest.mark.parametrize(("num_ranks", "k"), [(2, 12), (4, 60), (3, 1), (7, 50)])
def test_ranks_with_a_part_of_the_vocabulary_each_draw_what_one_draws(
    num_ranks: int, k: int, num_ids: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a part has fewer tokens than are drawn, none but padding, or masked ones."""
    logits_CV = 3 * torch.randn((50, 203), generator=torch.Generator().manual_seed(num_ranks))
    logits_CV[7, 20:] = -torch.inf
    logits_CV[8, :190] = -torch.inf
    logits_CV[8, 30] = 0
    logits_CV[9] = 0
    ranks = Ranks(num_ranks)
    monkeypatch.setattr(shard_module.dist, "all_gather", ranks.all_gather)
    shard: Any = VocabShard(ranks, 203)  # type: ignore[arg-type]

    def part_of(keep: Callable[[torch.Tensor], dict[str, Any]]) -> dict[str, Any]:
        return keep(logits_CV[:, shard.start : shard.start + shard.size])

    alone = drawn_from(logits_CV, k, num_ids)
    for found in ranks.run(lambda: part_of(lambda logits_CS: drawn_from(logits_CS, k, num_ids, shard))):
        assert all(len(set(ids)) == k and max(ids) < num_ids for ids in found["kept_ids"].tolist())
        usual = torch.tensor([row not in (7, 8) for row in range(50)])  # where masked ones fill up
        assert torch.equal(found["kept_ids"].sort(-1).values[usual], alone["kept_ids"].sort(-1).values[usual])
        for name in ("logsumexp", "target_logprob", "kept_logprobs"):
            np.testing.assert_allclose(found[name].clamp(-65504), alone[name].clamp(-65504), atol=2e-6)
    top = top_k(logits_CV, torch.zeros(50, dtype=torch.int64), k)
    for found in ranks.run(
        lambda: part_of(lambda logits_CS: top_k(logits_CS, torch.zeros(50, dtype=torch.int64), k, shard))
    ):
        assert all(len(set(ids)) == k for ids in found["kept_ids"].tolist())
        np.testing.assert_allclose(found["kept_logprobs"].clamp(-65504), top["kept_logprobs"].clamp(-65504), atol=2e-6)
