"""Packed records: ids exact for any vocabulary, values within the stated rounding, as small as promised."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logitgen.file import scale
from logitgen.file.packing import Packing


def packing(vocab_size: int, k: int, value_bits: int = 8) -> Packing:
    return Packing(vocab_size=vocab_size, k=k, value_bits=value_bits)


def top(vocab_size: int, k: int, seed: int, positions: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The k likeliest of random distributions, by numpy alone: ids and float64 log-probs, descending."""
    logits = np.random.default_rng(seed).normal(scale=scale, size=(positions, vocab_size))
    logprobs = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    logprobs -= logits.max(1, keepdims=True)
    ids = np.argsort(-logprobs, axis=1, kind="stable")[:, :k]
    return ids, np.take_along_axis(logprobs, ids, axis=1)


def packed(how: Packing, ids: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    records = how.pack(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(logprobs.astype(np.float32)))
    assert records.dtype == torch.uint8
    assert records.shape == (len(ids), how.record_bytes)
    return records.numpy()


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2**20), st.data(), st.sampled_from([8, 16]), st.booleans())
def test_ids_come_back_exactly_whatever_the_vocabulary(
    vocab_size: int, data: st.DataObject, value_bits: int, ends: bool
) -> None:
    k, positions = data.draw(st.integers(1, min(vocab_size, 200))), data.draw(st.integers(1, 4))
    random = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    ids = np.stack([random.choice(vocab_size, k, replace=False) for _ in range(positions)])
    if ends and k > 1:  # the first and the last token, and all that lie between neighbours
        ids[0] = np.concatenate([np.arange(k - 1), [vocab_size - 1]])
    how = packing(vocab_size, k, value_bits)
    ranks = -np.arange(k, dtype=np.float64)  # distinct values above the scale's end keep the order
    found, values = how.unpack(packed(how, ids, np.broadcast_to(ranks / k * 2, ids.shape)))
    assert values.shape == ids.shape
    assert [set(row) for row in found.tolist()] == [set(row) for row in ids.tolist()]
    if value_bits == 16:
        assert found.tolist() == ids.tolist()


@pytest.mark.parametrize("vocab_size", [2**17 - 1, 2**17, 2**17 + 1, 2**18, 2**18 + 1, 262_144, 2**20])
def test_ids_of_18_bits_and_more_do_not_wrap(vocab_size: int) -> None:
    ids = np.array([[vocab_size - 1, 0, vocab_size // 2, 131_071 % vocab_size, 131_070, 65_536]])
    how = packing(vocab_size, 6)
    found, _ = how.unpack(packed(how, ids, np.array([[-1.0, -2, -3, -4, -5, -6]])))
    assert found.tolist() == ids.tolist()


def test_a_record_is_laid_out_as_worked_out_by_hand() -> None:
    """V = 20, K = 3: L = 2, ids 1 (0,1), 10 (2,2) and 19 (4,3): low bits 10 01 11, high bits 0, 1 + 2, 2 + 4."""
    records = packed(packing(20, 3, value_bits=16), np.array([[19, 1, 10]]), np.array([[-0.5, -1.0, -2.0]]))
    bits = "10" + "01" + "11" + "10010010"
    ids = [int(bits[start : start + 8][::-1], 2) for start in (0, 8)]
    values = np.array([-1, -2, -0.5], "<f2").tobytes()
    assert records.tobytes() == bytes(ids) + values


def test_an_8_bit_code_is_the_fourth_root_of_the_probability() -> None:
    probabilities = [1, (255 / 256) ** 4, (128 / 256) ** 4, (1 / 256) ** 4, 1e-30]
    records = packed(packing(5, 5), np.arange(5)[None], np.log([probabilities]))
    assert records[0, -6:-1].tolist() == [0, 1, 128, 255, 255]
    values = scale.logprobs_of(scale.codes(records[:, -6:-1], 8))[0]
    assert values[0] == 0
    np.testing.assert_allclose(values, np.log([*probabilities[:4], (1 / 256) ** 4]), rtol=1e-6)


@pytest.mark.parametrize(("k", "most_bytes"), [(128, 325), (50, 136), (12, 37)])
def test_records_are_as_small_as_promised(k: int, most_bytes: int) -> None:
    record_bytes = packing(151_936, k).record_bytes
    assert record_bytes <= most_bytes
    least_bits = math.log2(math.comb(151_936, k))  # no code for sets can do with less
    assert (record_bytes - k - 1) * 8 < least_bits + 0.6 * k + 8


@settings(max_examples=150, deadline=None)
@given(st.integers(2, 3000), st.data(), st.sampled_from([0.1, 1.0, 3.0, 9.0, 30.0]), st.sampled_from([8, 16]))
def test_log_probs_of_the_likeliest_come_back_within_the_rounding(
    vocab_size: int, data: st.DataObject, scale: float, value_bits: int
) -> None:
    k = data.draw(st.integers(1, min(vocab_size, 130)))
    ids, logprobs = top(vocab_size, k, data.draw(st.integers(0, 2**32)), 3, scale)
    how = packing(vocab_size, k, value_bits)
    found, values = how.unpack(packed(how, ids, logprobs))
    assert values.dtype == {8: np.float32, 16: np.float16}[value_bits]
    assert (values <= 0).all()
    assert (np.diff(values, axis=1) <= 0).all()
    assert np.exp(values.astype(np.float64)).sum(1).max() < 1 + 1e-3
    where = np.argsort(ids, axis=1), np.argsort(found, axis=1)
    true, read = (np.take_along_axis(of, at, 1) for of, at in zip((logprobs, values), where, strict=True))
    allowed = how.rounding(read) if value_bits == 8 else np.abs(true) * 2**-11
    assert (np.abs(true - read) <= allowed + 1e-5).all()


def test_the_rounding_is_no_more_than_it_has_to_be() -> None:
    """A bound twice as large as what happens proves little."""
    ids, logprobs = top(5000, 64, 0, 500, 3.0)
    how = packing(5000, 64)
    found, values = how.unpack(packed(how, ids, logprobs))
    where = np.argsort(ids, axis=1), np.argsort(found, axis=1)
    true, read = (np.take_along_axis(of, at, 1) for of, at in zip((logprobs, values), where, strict=True))
    allowed = how.rounding(read)
    assert np.isfinite(allowed).all()
    assert (np.abs(true - read) / allowed).max() > 0.5


@pytest.mark.parametrize("tail", [0.3, 1e-2, 1e-4, 1e-6])
def test_the_mass_of_the_tail_is_right_however_small_it_is(tail: float) -> None:
    probabilities = np.array([[0.9, 0.06, 0.03, 0.01]]) * (1 - tail)
    how = packing(1000, 4)
    _, values = how.unpack(packed(how, np.array([[5, 7, 900, 2]]), np.log(probabilities)))
    step = (1 + 1 / (2 * 256 * tail**0.25)) ** 4
    assert tail / step * 0.999 < 1 - np.exp(values.astype(np.float64)).sum() < tail * step * 1.001


def test_the_divergence_is_small_and_most_of_it_is_the_tails() -> None:
    """Of peaked and flat distributions alike, against a computation in float64, and the same codes without the tail."""
    how, divergences = packing(5000, 50), {"with the tail": 0.0, "without": 0.0}
    for scale_of_logits in (1.0, 3.0, 5.0):
        ids, logprobs = top(5000, 50, 1, 200, scale_of_logits)
        _, values = how.unpack(packed(how, ids, logprobs))
        p = np.exp(logprobs)
        read = {"with the tail": np.exp(values.astype(np.float64)), "without": (np.round(256 * p**0.25) / 256) ** 4}
        for name, q in read.items():
            p_tail, q_tail = (np.maximum(1 - x.sum(1), 1e-12) for x in (p, q))
            q_sum = q.sum(1) + q_tail
            kl = (p * np.log(p / q)).sum(1) + p_tail * np.log(p_tail / q_tail) + np.log(q_sum)
            divergences[name] += kl.mean() / 3
    assert divergences["with the tail"] < 8e-5
    assert divergences["with the tail"] < divergences["without"] / 4


def test_records_that_hold_another_number_of_ids_are_refused() -> None:
    how = packing(1000, 4)
    records = packed(how, np.array([[1, 2, 3, 4], [5, 6, 7, 8]]), np.full((2, 4), -1.5))
    records[1, how._id_bytes - 1] ^= 1
    with pytest.raises(ValueError, match="a packed record does not hold 4 ids"):
        how.unpack(records)


def test_no_position_gives_no_record() -> None:
    ids, values = packing(1000, 4).unpack(np.zeros((0, packing(1000, 4).record_bytes), "u1"))
    assert ids.shape == values.shape == (0, 4)


def test_the_order_of_what_is_packed_does_not_matter() -> None:
    ids, logprobs = top(700, 20, 3, 1, 2.0)
    shuffle = np.random.default_rng(0).permutation(20)
    how = packing(700, 20)
    assert packed(how, ids, logprobs).tolist() == packed(how, ids[:, shuffle], logprobs[:, shuffle]).tolist()


def test_the_whole_vocabulary_can_be_kept() -> None:
    ids, logprobs = top(37, 37, 3, 2, 2.0)
    how = packing(37, 37)
    found, values = how.unpack(packed(how, ids, logprobs))
    assert [sorted(row) for row in found.tolist()] == [list(range(37))] * 2
    assert Fraction(how.record_bytes) == Fraction(-(-(37 + 36) // 8) + 37 + 1)
    np.testing.assert_allclose(np.exp(values).sum(1), 1, atol=1e-6)
