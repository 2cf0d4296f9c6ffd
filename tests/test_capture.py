"""What is kept, against the definition in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from logitgen import CaptureError
from logitgen.capture import capture_batch, full, seal, top_k
from logitgen.rows import Batch
from logitgen.schema import Layout
from logitgen.teacher import Teacher


@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(2, 50), st.floats(0.1, 30), st.data())
def test_the_largest_logprobs_are_kept_in_order(
    seed: int, positions: int, vocab_size: int, scale: float, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, vocab_size))
    generator = np.random.default_rng(seed)
    logits = generator.normal(scale=scale, size=(positions, vocab_size)).astype(np.float32)
    targets = generator.integers(vocab_size, size=positions)
    kept = top_k(torch.from_numpy(logits), torch.from_numpy(targets), k)
    exact = logits.astype(np.float64)
    logsumexp = np.log(np.exp(exact - exact.max(1, keepdims=True)).sum(1)) + exact.max(1)
    logprobs = exact - logsumexp[:, None]
    np.testing.assert_allclose(kept["logsumexp"], logsumexp, atol=1e-4)
    np.testing.assert_allclose(kept["target_logprob"], logprobs[np.arange(positions), targets], atol=1e-4)
    np.testing.assert_allclose(kept["kept_logprobs"], -np.sort(-logprobs, axis=1)[:, :k], atol=1e-4)
    np.testing.assert_allclose(
        np.take_along_axis(logprobs, kept["kept_ids"].numpy(), 1), kept["kept_logprobs"], atol=1e-4
    )
    assert all(len(set(ids.tolist())) == k for ids in kept["kept_ids"])


def test_full_keeps_the_logits_themselves() -> None:
    logits_CV = torch.tensor([[0.0, 1.0, 2.0]])
    kept = full(logits_CV, torch.tensor([1]))
    assert kept["logits"].tolist() == [[0, 1, 2]]
    assert kept["logsumexp"].item() == pytest.approx(np.log(1 + np.e + np.e**2))
    assert kept["target_logprob"].item() == pytest.approx(1 - np.log(1 + np.e + np.e**2))


def batch_of(tokens: list[list[int]], first_row: int = 0) -> Batch:
    arrays = [np.array(ids, dtype=np.int32) for ids in tokens]
    longest = max(len(ids) - 1 for ids in tokens)
    return Batch(
        rows=np.arange(first_row, first_row + len(tokens)),
        tokens=arrays,
        input_ids=np.array([ids[:-1] + [0] * (longest - len(ids) + 1) for ids in tokens]),
        num_positions=np.array([len(ids) - 1 for ids in tokens]),
        row_of_position=np.repeat(np.arange(len(tokens)), [len(ids) - 1 for ids in tokens]),
        positions=np.concatenate([np.arange(len(ids) - 1) for ids in tokens]),
        targets=np.concatenate([ids[1:] for ids in arrays]).astype(np.int64),
    )


def layout_of(batch: Batch, **changes: Any) -> Layout:
    sizes = {"num_rows": 10, "num_tokens": 99, "num_positions": len(batch.positions), "vocab_size": 50}
    return Layout(**{"capture": "topk", "top_k": 3, **sizes, **changes})


def captured(batch: Batch, layout: Layout, model: Any = None) -> dict[str, np.ndarray]:
    payload = capture_batch(Teacher(model or make_llama(50), 50), batch, layout).numpy()
    seal(payload, batch, layout)
    slices = layout.payload_slices(len(batch.rows), len(batch.positions))
    arrays = {name: payload[slices[name]].view(dtype) for name, (_, dtype) in layout.captured.items()}
    return arrays | {"crc32": payload[slices["crc32"]].view("<u4")}


def test_a_masked_token_is_stored_as_a_finite_number() -> None:
    model = make_llama(50)
    model.lm_head.register_forward_hook(
        lambda module, inputs, output: output.index_fill(-1, torch.tensor([7]), -torch.inf)
    )
    batch = batch_of([[1, 2, 7]])
    arrays = captured(batch, layout_of(batch, top_k=50), model)
    assert np.isfinite(arrays["target_logprob"]).all()
    assert np.isfinite(arrays["kept_logprobs"]).all()
    assert arrays["kept_ids"].reshape(2, 50)[:, -1].tolist() == [7, 7]
    assert np.exp(arrays["kept_logprobs"].astype(np.float64)).sum() == pytest.approx(2, rel=1e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_reported_with_row_and_position(value: float) -> None:
    model = make_llama(50)
    teacher = Teacher(model, 50)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.index_fill(1, torch.tensor([3]), value))
    batch = batch_of([[1, 2, 3], [4, 5, 6]], first_row=6)  # positions 0 1 | 0 1: the fourth is row 7, position 1
    payload = capture_batch(teacher, batch, layout_of(batch)).numpy()
    with pytest.raises(CaptureError, match=r"not finite at row 7, position 1: .* Try --dtype bfloat16 or float32"):
        seal(payload, batch, layout_of(batch))


def test_a_batch_that_does_not_fit_into_memory_says_what_to_lower() -> None:
    model = make_llama(50)
    teacher = Teacher(model, 50)

    def no_memory(module: Any, inputs: Any) -> None:
        raise torch.OutOfMemoryError

    model.lm_head.register_forward_pre_hook(no_memory)
    batch = batch_of([[1, 2, 3], [4, 5, 6]])
    with pytest.raises(CaptureError, match=r"A batch of 2 rows of 2 tokens does not fit .* Lower --batch_tokens"):
        capture_batch(teacher, batch, layout_of(batch))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2), st.integers(0, 5))
def test_a_rows_checksum_covers_its_number_tokens_and_what_was_captured(row: int, bit: int) -> None:
    tokens = [[1, 2, 3, 4], [5, 6, 7], [8, 9]]
    batch, layout = batch_of(tokens), layout_of(batch_of(tokens))
    before = captured(batch, layout)["crc32"].tolist()
    assert len(set(before)) == 3
    tokens[row][0] ^= 1 << bit if tokens[row][0] ^ 1 << bit < 50 else 0
    changed = captured(batch_of(tokens), layout)["crc32"].tolist()
    same_input = tokens[row][0] == [1, 5, 8][row]
    assert [left == right for left, right in zip(before, changed, strict=True)] == [
        index != row or same_input for index in range(3)
    ]
    moved = captured(batch_of([[1, 2, 3, 4]], first_row=1), layout_of(batch_of([[1, 2, 3, 4]])))["crc32"]
    assert moved[0] != before[0]
