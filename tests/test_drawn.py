"""Packed draws: as many tokens as a record has room for, without bias, and what is read of them is consistent."""

import contextlib
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_draw import drawn_from, keys, level_of, weights_of

from logitgen import DistillationLoss
from logitgen.file.drawn import DrawnPacking, is_certain
from logitgen.student.events import certain_tokens, sample_weights
from logitgen.teacher.keep import sample
from logitgen.teacher.noise import position_keys

LOSSES: list[dict[str, Any]] = [{"tail": "drawn"}, {"tail": "ignore"}]
LOSSES += [{"tail": "ghost", "divergence": divergence} for divergence in ("forward_kl", "reverse_kl", "jsd")]


def packing(vocab_size: int, k: int, value_bits: int = 8, num_ids: int | None = None) -> DrawnPacking:
    return DrawnPacking(vocab_size=vocab_size, num_ids=num_ids or vocab_size, k=k, value_bits=value_bits)


def packed(how: DrawnPacking, drawn: dict[str, torch.Tensor]) -> np.ndarray:
    records = how.pack(*(drawn[name] for name in ("kept_ids", "kept_logprobs", "num_certain", "rest_logprob")))
    assert records.dtype == torch.uint8
    assert records.shape == (len(drawn["kept_ids"]), how.record_bytes)
    return records.numpy()


def some_logits(positions: int, vocab_size: int, scale: float, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn((positions, vocab_size), generator=torch.Generator().manual_seed(seed))


def given_draw(ids: list[int], probabilities: list[float], num_certain: int) -> dict[str, torch.Tensor]:
    """A draw of one position as `sample` returns it."""
    return {
        "kept_ids": torch.tensor([ids]),
        "kept_logprobs": torch.tensor([probabilities]).log(),
        "num_certain": torch.tensor([num_certain]),
        "rest_logprob": torch.tensor([1 - sum(probabilities[:num_certain])]).clamp(min=0).log(),
    }


def test_a_record_is_laid_out_as_worked_out_by_hand() -> None:
    """V = 20, K = 3: numbers below 40 with 3 low bits; ids 10, certain, 1 and 19 are 21 (2, 5), 2 (0, 2), 38 (4, 6).

    The rest is 0.5, the level 0.25, and the mean log-prob -3 is 1.61 below its log: 10 (12/31)^2 is 1.50.
    """
    how = packing(20, 3, value_bits=16)
    assert (how.record_bytes, how.room) == (11, (15, 11, 7, 3))  # 10 + 4 n bits for n ids, 2 bytes for each value
    drawn = given_draw([10, 1, 19, *[0] * 12], [0.5, math.exp(-2), math.exp(-4), *[0] * 12], 1)
    records = packed(how, drawn)
    bits = ("00110" + "10010010" + "010" + "101" + "011").ljust(56, "0")  # zeros: one after each of the parts 0 to 4
    ids = [int(bits[start : start + 8][::-1], 2) for start in range(0, 56, 8)]
    values = np.array([math.log(0.5), math.log(0.5)], "<f2").tobytes()
    assert records.tobytes() == bytes(ids) + values
    found, logprobs = how.unpack(records)
    assert found.tolist() == [[10, 1, 19, *[0] * 12]]
    mean = math.log(0.25) - 10 * (12 / 31) ** 2
    np.testing.assert_allclose(logprobs, [[math.log(0.5), mean, mean, *[-math.inf] * 12]], rtol=1e-3)


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 2**20), st.data(), st.sampled_from([8, 16]))
def test_any_draw_that_fits_comes_back(vocab_size: int, data: st.DataObject, value_bits: int) -> None:
    """Ids exactly, whichever are certain, also a record of any other number of ids."""
    k = data.draw(st.integers(1, min(vocab_size, 100)))
    how = packing(vocab_size, k, value_bits)
    num_certain = data.draw(st.integers(0, k))
    num_ids = data.draw(st.integers(max(1, num_certain), how.room[num_certain]))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ids = random.choice(vocab_size, num_ids, replace=False)
    if data.draw(st.booleans()) and num_ids > 1:  # the last token, and all that lie between neighbours
        ids = random.permutation(np.concatenate([np.arange(num_ids - 1), [vocab_size - 1]]))
    shares = np.sort(random.random(num_ids) + 0.5)[::-1]
    certain = shares[:num_certain] / shares.sum() * (0.5 if num_certain < num_ids else 1)
    others = 0.4 * (1 - certain.sum()) / max(1, num_ids - num_certain) * np.ones(num_ids - num_certain)
    filled = [0] * (how.num_columns - num_ids)
    drawn = given_draw([*ids.tolist(), *filled], [*certain.tolist(), *others.tolist(), *filled], num_certain)
    found, logprobs = how.unpack(packed(how, drawn))
    assert found.shape == logprobs.shape == (1, how.num_columns)
    assert set(found[0, :num_ids].tolist()) == set(ids.tolist())
    assert (found[0, num_ids:] == 0).all()
    assert np.isfinite(logprobs[0, :num_ids]).all()
    assert np.isneginf(logprobs[0, num_ids:]).all()
    if certain.min(initial=1) > 1.1 * (1 - certain.sum()) / max(1, num_ids - num_certain):
        are_certain = certain_tokens(torch.from_numpy(logprobs).double())[0].numpy()
        assert set(found[0][are_certain].tolist()) == set(ids[:num_certain].tolist())


def test_a_record_has_room_for_all_certain_and_for_more_if_fewer_are() -> None:
    how = packing(151_936, 12)
    assert how.record_bytes == 39
    assert how.room[12] == 12
    assert how.num_columns == how.room[0] == 18
    assert list(how.room) == sorted(how.room, reverse=True)
    assert packing(151_936, 12, num_ids=13).room[0] == 13  # no more than there are
    for k in (1, 2, 5, 64, 1000):
        for value_bits in (8, 16):
            room = packing(151_936, k, value_bits).room
            assert all(fits >= k for fits in room)
            assert room[k] == k  # a token more might be as likely as the last, and certain too


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 3000), st.data(), st.sampled_from([0.1, 1.0, 3.0, 9.0, 40.0]), st.sampled_from([8, 16]))
def test_as_many_are_drawn_as_fit_and_no_fewer(
    vocab_size: int, data: st.DataObject, scale: float, value_bits: int
) -> None:
    """By the plain definition in Python: the largest number whose certain tokens leave it room."""
    how = packing(vocab_size, data.draw(st.integers(1, min(vocab_size, 60))), value_bits)
    logits_CV = some_logits(3, vocab_size, scale, data.draw(st.integers(0, 2**32)))
    if data.draw(st.booleans()):
        logits_CV = logits_CV.bfloat16().float()  # many are equal
    drawn = drawn_from(logits_CV, how.room)
    there_CW = drawn["kept_logprobs"].exp() > 0
    for there_W, num_certain, p_V in zip(
        there_CW, drawn["num_certain"].tolist(), logits_CV.double().softmax(-1).tolist(), strict=True
    ):
        num_drawn = int(there_W.sum())
        if num_drawn < how.k:  # all others are too unlikely for float32
            assert sum(p > 1e-30 for p in p_V) <= num_drawn
        if num_drawn < how.k or level_of(p_V, how.num_columns) < 1e-29:
            continue
        assert num_drawn <= how.room[num_certain]
        fits = [n for n in range(how.k, how.num_columns + 1) if n <= how.room[min(how.k, certain_of(p_V, n))]]
        near = [n for n in fits if certain_of(p_V, n, 1e-4) == certain_of(p_V, n, -1e-4)]
        assert num_drawn >= max(near, default=how.k)
        assert num_drawn <= max(fits) or certain_of(p_V, num_drawn, 1e-4) != certain_of(p_V, num_drawn, -1e-4)


def certain_of(probabilities: list[float], num_drawn: int, off: float = 0.0) -> int:
    level = level_of(probabilities, num_drawn) * (1 + off)
    return sum(p > level for p in probabilities)


@pytest.mark.parametrize(("k", "scale"), [(3, 3.0), (12, 4.0)])
def test_over_many_draws_a_token_weighs_its_probability(k: int, scale: float) -> None:
    """Within the spread of independent draws: so the number of tokens does not depend on what was drawn."""
    num_draws, vocab_size = 4000, 200
    how, logits_V = packing(vocab_size, k), some_logits(1, vocab_size, scale)[0]
    key_C = position_keys(3, torch.zeros(num_draws, dtype=torch.int64), torch.arange(num_draws))
    target_C = torch.zeros(num_draws, dtype=torch.int64)
    drawn = sample(logits_V.expand(num_draws, -1), target_C, how.room, key_C, vocab_size)
    exact = logits_V.double().softmax(-1).numpy()
    weights = weights_of(drawn, vocab_size)
    num_drawn = (drawn["kept_logprobs"] > -torch.inf).sum(-1)
    assert len(set(num_drawn.tolist())) == 1
    often = exact / level_of(exact.tolist(), int(num_drawn[0])) * num_draws > 20
    assert often.sum() > 5 * k
    spread = weights.std(0) / math.sqrt(num_draws)
    assert (np.abs(weights.mean(0) - exact) <= 5 * spread + 1e-6)[often].all()


@pytest.mark.parametrize(
    ("vocab_size", "k", "value_bits", "probabilities"),
    [
        (20, 3, 16, [0.25] * 4),
        (2, 1, 8, [0.5, 0.5]),
        (13, 12, 8, [1 / 13] * 13),
        (10, 4, 8, [0.22, 0.21, 0.2, 0.19, 0.15, 0.01, 0.008, 0.006, 0.004, 0.002]),
        (1000, 64, 8, [1 / 65] * 65),
        (500, 12, 8, [0.3, 0.3, *[0.1] * 4]),
    ],
)
def test_tokens_as_likely_as_the_last_that_can_be_certain_keep_their_share(
    vocab_size: int, k: int, value_bits: int, probabilities: list[float]
) -> None:
    """None is drawn twice or never, where more are as long as the level than a record may have certain."""
    logits_V = torch.full((vocab_size,), -torch.inf)
    logits_V[: len(probabilities)] = torch.tensor(probabilities).log()
    how = packing(vocab_size, k, value_bits)
    ids, logprobs = how.unpack(packed(how, drawn_from(logits_V.expand(3000, -1), how.room)))
    for row, there in zip(ids, np.isfinite(logprobs), strict=True):
        assert len(set(row[there].tolist())) == there.sum()
    read = {"kept_ids": torch.from_numpy(ids), "kept_logprobs": torch.from_numpy(logprobs)}
    weights = np.zeros((3000, vocab_size))
    np.add.at(weights, (np.arange(3000)[:, None], ids), sample_weights(read["kept_logprobs"].double()).numpy())
    off = np.abs(weights.mean(0)[: len(probabilities)] - probabilities)
    assert (off <= 5 * weights.std(0)[: len(probabilities)] / math.sqrt(3000) + 0.02 * np.array(probabilities)).all()


@pytest.mark.parametrize("rest", [0.3, 0.03, 0.0075, 1e-3, 1e-5])
def test_what_certain_tokens_leave_is_right_however_little_it_is(rest: float) -> None:
    logits_CV = some_logits(200, 2000, 2.0)
    logits_CV[:, 7] = -torch.inf
    logits_CV[:, 7] = logits_CV.logsumexp(-1) + math.log((1 - rest) / rest)
    how = packing(2000, 12)
    ids, logprobs = how.unpack(packed(how, drawn_from(logits_CV, how.room)))
    read = {"kept_ids": torch.from_numpy(ids), "kept_logprobs": torch.from_numpy(logprobs)}
    left = np.delete(weights_of(read, 2000), 7, axis=1).sum(1)
    step = 4 / (256 * rest**0.25)
    assert abs(left.mean() / rest - 1) < step / 2
    np.testing.assert_allclose(left, rest, rtol=max(0.1, step))  # a level is never above a certain token
    assert (certain_tokens(read["kept_logprobs"])[:, 1:].sum(-1) < 12).all()


@pytest.mark.parametrize(("value_bits", "most_off"), [(8, 0.01), (16, 1e-3)])
@pytest.mark.parametrize("scale", [1.5, 3.0, 6.0])
def test_packed_draws_keep_their_weights(value_bits: int, most_off: float, scale: float) -> None:
    """On average over positions: the rounding of all weights together."""
    logits_CV = some_logits(400, 2000, scale, 1)
    for k in (12, 64):
        how = packing(2000, k, value_bits)
        drawn = drawn_from(logits_CV, how.room)
        ids, logprobs = how.unpack(packed(how, drawn))
        read = weights_of({"kept_ids": torch.from_numpy(ids), "kept_logprobs": torch.from_numpy(logprobs)}, 2000)
        assert np.abs(read - weights_of(drawn, 2000)).sum(1).mean() < most_off


@pytest.mark.parametrize("value_bits", [8, 16])
@pytest.mark.parametrize("scale", [0.0, 0.3, 3.0, 6.0])
def test_what_is_read_tells_which_were_certain_and_adds_up(value_bits: int, scale: float) -> None:
    logits_CV = some_logits(400, 2000, scale, 1)
    for k in (1, 12, 64):
        how = packing(2000, k, value_bits)
        drawn = drawn_from(logits_CV, how.room)
        _, logprobs = how.unpack(packed(how, drawn))
        weights = sample_weights(torch.from_numpy(logprobs).double())
        np.testing.assert_allclose(weights.sum(-1), 1, atol=2e-3)
        found = certain_tokens(torch.from_numpy(logprobs).double())
        assert (found.sum(-1) == drawn["num_certain"]).double().mean() > 0.97  # the rest of some is lost in rounding
        place_W = torch.arange(how.num_columns)
        is_likely = (place_W < drawn["num_certain"][:, None]) & (drawn["kept_logprobs"] > -12.9)
        known = torch.from_numpy(is_certain(logprobs)).sum(-1)
        assert (is_likely.sum(-1) <= known).double().mean() > 0.97
        assert (known <= drawn["num_certain"]).all()
        num_others = (drawn["kept_logprobs"] > -torch.inf).sum(-1) - drawn["num_certain"]
        there = np.isfinite(logprobs)
        for number, (row, others) in enumerate(zip(drawn["kept_logprobs"], num_others.tolist(), strict=True)):
            if others:
                mean = row[row > -torch.inf][-others:].mean().item()
                gap = drawn["rest_logprob"][number].item() - math.log(others) - mean
                half = 10 * (31 * math.sqrt(max(0, gap) / 10) + 0.75) / 31**2
                assert abs(logprobs[number][there[number]][-1] - mean) < half + (0.3 if value_bits == 8 else 0.05)


@pytest.mark.parametrize("scale", [1.0, 3.0, 6.0])
def test_values_come_back_within_the_rounding(scale: float) -> None:
    logits_CV = some_logits(300, 2000, scale, 2)
    exact_CV = logits_CV.double().log_softmax(-1).numpy()
    largest = 0.0
    for k in (4, 12, 64):
        how = packing(2000, k)
        ids, logprobs = how.unpack(packed(how, drawn_from(logits_CV, how.room)))
        own, allowed = is_certain(logprobs), how.rounding(logprobs)
        off = np.abs(np.take_along_axis(exact_CV, ids, 1) - logprobs)
        assert (off <= allowed + 1e-5)[own].all()
        usual = own & np.isfinite(allowed)
        largest = max(largest, (off[usual] / allowed[usual]).max(initial=0))
    assert largest > 0.2  # a bound far above what happens proves little


@pytest.mark.parametrize("probabilities", [[1.0], [0.5, 0.5], [0.9, 0.06, 0.04], [0.25] * 4], ids=str)
@pytest.mark.parametrize("value_bits", [8, 16])
def test_masked_tokens_are_not_stored_and_those_left_are_certain(probabilities: list[float], value_bits: int) -> None:
    """Where a few tokens have all of the probability, a record holds them alone, and they sum to 1."""
    logits_V = torch.full((1000,), -torch.inf)
    at = torch.tensor([7, 400, 999, 0][: len(probabilities)])
    logits_V[at] = torch.tensor(probabilities).log()
    how = packing(1000, 12, value_bits)
    ids, logprobs = how.unpack(packed(how, drawn_from(logits_V.expand(5, -1), how.room)))
    num_left = len(probabilities)
    assert np.isneginf(logprobs[:, num_left:]).all()
    expected = np.sort(probabilities)[::-1]
    np.testing.assert_allclose(np.exp(logprobs[:, :num_left]), np.tile(expected, (5, 1)), rtol=0.05)
    assert certain_tokens(torch.from_numpy(logprobs)).sum(-1).tolist() == [num_left] * 5
    np.testing.assert_allclose(sample_weights(torch.from_numpy(logprobs)).sum(-1), 1, atol=2e-3)
    assert all(set(row[:num_left]) == set(at.tolist()) for row in ids.tolist())


def test_what_fills_up_is_never_certain_even_where_nothing_is_left_of_1() -> None:
    logprobs = torch.tensor([[0.0, -50.0, -torch.inf]])
    assert certain_tokens(logprobs).tolist() == [[True, True, False]]
    assert sample_weights(logprobs)[0, 2] == 0


def test_the_order_of_batches_and_their_size_do_not_matter() -> None:
    logits_CV, how = some_logits(64, 3000, 3.0), packing(3000, 12)
    whole = packed(how, drawn_from(logits_CV, how.room))
    target_1, key_C = torch.zeros(1, dtype=torch.int64), keys(64)
    for at in (0, 17, 63):
        alone = sample(logits_CV[at : at + 1], target_1, how.room, key_C[at : at + 1], 3000)
        assert packed(how, alone).tolist() == whole[at : at + 1].tolist()


def test_damaged_records_are_refused() -> None:
    how = packing(1000, 4)
    records = packed(how, drawn_from(some_logits(2, 1000, 3.0), how.room))
    for damaged in (np.zeros_like(records), np.full_like(records, 255)):
        with pytest.raises(ValueError, match="a packed record does not hold the ids of a draw"):
            how.unpack(damaged)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 5000), st.data())
def test_no_bytes_make_the_reader_fail_otherwise(vocab_size: int, data: st.DataObject) -> None:
    how = packing(vocab_size, data.draw(st.integers(1, min(vocab_size, 40))), data.draw(st.sampled_from([8, 16])))
    records = np.random.default_rng(data.draw(st.integers(0, 2**32))).integers(0, 256, (3, how.record_bytes), "u1")
    with contextlib.suppress(ValueError):
        ids, logprobs = how.unpack(records)
        assert ids.shape == logprobs.shape == (3, how.num_columns)
        assert (logprobs <= 0).all()


def test_no_position_gives_no_record() -> None:
    how = packing(1000, 4)
    ids, logprobs = how.unpack(np.zeros((0, how.record_bytes), "u1"))
    assert ids.shape == logprobs.shape == (0, how.num_columns)


def loss_of(student_PV: torch.Tensor, ids_PW: torch.Tensor, logprobs_PW: torch.Tensor, **options: Any) -> torch.Tensor:
    """The loss over positions, each with the same number of tokens."""
    num_positions, vocab_size = student_PV.shape
    attributes = {"capture": "sample", "vocab_size": vocab_size, "tokenizer_size": vocab_size}
    batch = {"kept_ids": ids_PW[None], "kept_logprobs": logprobs_PW[None]}
    batch |= {"captured": torch.ones(1, num_positions, dtype=torch.bool)}
    batch |= {"labels": torch.zeros(1, num_positions, dtype=torch.int64)}
    return DistillationLoss(SimpleNamespace(attributes=attributes, head=None), **options)(student_PV[None], batch)


@pytest.mark.parametrize("options", LOSSES, ids=lambda options: " ".join(options.values()))
def test_what_fills_up_a_record_changes_no_loss(options: dict[str, Any]) -> None:
    logits_PV, how = some_logits(20, 300, 4.0), packing(300, 12)
    logits_PV[3, 2:] = -torch.inf
    logits_PV[4:8, 9] += torch.tensor([15.0, 25.0, 40.0, 80.0])  # all but certain: float32 has nothing left of 1
    ids, logprobs = map(torch.from_numpy, how.unpack(packed(how, drawn_from(logits_PV, how.room))))
    num_P = (logprobs > -torch.inf).sum(-1).tolist()
    assert len(set(num_P)) > 3
    student_PV = some_logits(20, 300, 2.0, 1).requires_grad_()
    loss_of(student_PV, ids, logprobs, **options).backward()
    alone = student_PV.detach().clone().requires_grad_()
    for at, num in enumerate(num_P):
        of_one = alone[at : at + 1]
        (loss_of(of_one, ids[at : at + 1, :num], logprobs[at : at + 1, :num], **options) / 20).backward()
    assert student_PV.grad is not None
    assert alone.grad is not None
    torch.testing.assert_close(student_PV.grad, alone.grad, rtol=1e-5, atol=1e-7)
    assert student_PV.grad.abs().max() > 1e-3


def test_the_value_of_the_loss_is_that_of_each_tokens_own_log_prob() -> None:
    """The mean of the drawn tokens' log-probs gives what their own would give."""
    logits_PV, student_PV = some_logits(200, 300, 4.0), some_logits(200, 300, 4.0, 1)
    how = packing(300, 12, 16)
    drawn = drawn_from(logits_PV, how.room)
    own = loss_of(student_PV, drawn["kept_ids"], drawn["kept_logprobs"])
    ids, logprobs = map(torch.from_numpy, how.unpack(packed(how, drawn)))
    assert loss_of(student_PV, ids, logprobs).item() == pytest.approx(own.item(), rel=0.01)
    exact = (logits_PV.softmax(-1) * (logits_PV.log_softmax(-1) - student_PV.log_softmax(-1))).sum(-1).mean()
    assert own.item() == pytest.approx(exact.item(), rel=0.1)
    others_raised = logprobs.where(certain_tokens(logprobs), sample_weights(logprobs).log())  # without the mean
    assert abs(loss_of(student_PV, ids, others_raised).item() - exact.item()) > abs(own.item() - exact.item()) + 0.02
