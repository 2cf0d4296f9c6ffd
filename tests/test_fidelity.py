"""The fidelity benchmark: its closed forms are those of the real losses, and others' records are what they document."""

import json
import math
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import programs
import pytest
import torch
from conftest import make_llama
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import rivals
from benchmarks.fidelity import errors, with_noise
from benchmarks.methods import Method, certain
from benchmarks.targets import LEAST_TAIL, Kept, Target, angle, dense, divergence, gradient
from logitgen.student.events import sample_weights
from logitgen.student.losses import DistillationLoss
from logitgen.teacher.keep import sample
from logitgen.teacher.noise import position_keys

VOCAB = 40
POSITIONS = 6
QWEN_VOCAB, SMOLLM_VOCAB = 151_936, 49_152


def some_logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(POSITIONS, VOCAB, generator=torch.Generator().manual_seed(seed))


def top(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs, ids = some_logits(0).log_softmax(-1).topk(k)
    return ids, logprobs


def loss_gradient(capture: str, tail: str | None = None, **values: torch.Tensor) -> torch.Tensor:
    """What autograd makes of the project's loss, for one student logit at a time; the loss is a mean over positions."""
    attributes = {"capture": capture, "vocab_size": VOCAB, "tokenizer_size": VOCAB}
    loss = DistillationLoss(SimpleNamespace(attributes=attributes, head=None), tail=tail)
    student = some_logits(1)[None].requires_grad_()
    captured = torch.ones(1, POSITIONS, dtype=torch.bool)
    labels = torch.zeros(1, POSITIONS, dtype=torch.int64)
    batch = {"captured": captured, "labels": labels} | {name: value[None] for name, value in values.items()}
    loss(student, batch).backward()
    return student.grad[0] * POSITIONS


def closed_form(target: Target) -> torch.Tensor:
    return gradient(target, some_logits(1).softmax(-1))


def test_the_gradient_of_a_top_k_with_a_tail_is_that_of_our_loss():
    ids, logprobs = top(5)
    expected = loss_gradient("topk", kept_ids=ids, kept_logprobs=logprobs)
    assert torch.allclose(closed_form(Kept(ids, logprobs.double().exp(), has_tail=True)), expected, atol=1e-6)


def test_the_gradient_of_a_sample_is_that_of_our_loss():
    ids, logprobs = top(5)
    expected = loss_gradient("sample", kept_ids=ids, kept_logprobs=logprobs)
    weights = sample_weights(logprobs.double())
    assert torch.allclose(closed_form(Kept(ids, weights, has_tail=False)), expected, atol=1e-5)


def test_the_gradient_of_the_certain_tokens_of_a_sample_is_that_of_our_loss_with_a_ghost_token():
    logits = some_logits(0)
    keys = position_keys(0, torch.zeros(POSITIONS, dtype=torch.int64), torch.arange(POSITIONS))
    drawn = sample(logits, torch.zeros(POSITIONS, dtype=torch.int64), [12] * 13, keys, VOCAB)
    ids, logprobs = drawn["kept_ids"], drawn["kept_logprobs"].half()
    batch = SimpleNamespace(logits=logits, kept=lambda k, seed: drawn)
    target = certain({"capture": "sample", "top_k": 12, "encoding": "plain"}, batch, 0)
    assert set(target.is_kept.sum(-1).tolist()) <= set(range(1, 12))
    expected = loss_gradient("sample", tail="ghost", kept_ids=ids, kept_logprobs=logprobs)
    assert torch.allclose(closed_form(target), expected, atol=1e-6)
    others = loss_gradient("sample", kept_ids=ids, kept_logprobs=logprobs)
    assert not torch.allclose(expected, others, atol=1e-2)


def test_noise_is_a_share_of_the_spread_of_a_matrix():
    model = make_llama(num_hidden_layers=1)
    exact = {name: weight.clone() for name, weight in model.named_parameters()}
    for name, weight in with_noise(model, 0.1).named_parameters():
        if weight.ndim == 2:
            noise = weight - exact[name]
            assert (noise.std() / exact[name].std()).item() == pytest.approx(0.1, rel=0.1)
            assert abs(noise.mean() / noise.std()) < 5 / math.sqrt(weight.numel())


def test_the_gradient_of_everything_is_that_of_our_loss():
    expected = loss_gradient("full", logits=some_logits(0))
    assert torch.allclose(closed_form(some_logits(0).softmax(-1)), expected, atol=1e-6)


def test_without_a_tail_the_gradient_is_that_of_cross_entropy_to_the_weights():
    ids, logprobs = top(5)
    target = rivals.renormalised(ids, logprobs)
    student = some_logits(1).requires_grad_()
    (-(target.weights.float() * student.log_softmax(-1).gather(-1, ids)).sum()).backward()
    assert torch.allclose(closed_form(target), student.grad, atol=1e-6)
    assert torch.allclose(target.weights.sum(-1), torch.ones(POSITIONS).double())


def test_padding_of_a_short_record_belongs_to_the_tail():
    ids, logprobs = top(5)
    weights = logprobs.double().exp()
    short, padded = Kept(ids[:, :3], weights[:, :3], has_tail=True), weights.clone()
    padded[:, 3:] = 0
    padded = Kept(ids, padded, has_tail=True)
    true = some_logits(0).softmax(-1)
    assert torch.allclose(closed_form(short), closed_form(padded))
    assert torch.allclose(dense(short, VOCAB), dense(padded, VOCAB))
    assert torch.allclose(divergence(short, true), divergence(padded, true))


@given(k=st.integers(1, VOCAB - 1), factor=st.floats(0.2, 1.0), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_a_distribution_is_written_out_with_its_tail_spread_evenly(k: int, factor: float, seed: int):
    true = some_logits(seed).double().softmax(-1)
    weights, ids = (true * factor).topk(k)
    target = Kept(ids, weights, has_tail=True)
    written_out = torch.empty_like(true)
    for position in range(POSITIONS):
        tail = max(1 - weights[position].sum().item(), LEAST_TAIL)
        written_out[position] = tail / (VOCAB - k)
        for token, weight in zip(ids[position].tolist(), weights[position].tolist(), strict=True):
            written_out[position, token] = weight
    assert torch.allclose(dense(target, VOCAB).double(), written_out, atol=1e-6)


def test_the_divergence_with_the_tail_as_one_is_that_of_one_more_token():
    ids, logprobs = top(4)
    weights = logprobs.double().exp() * 0.9
    true = torch.cat([logprobs.double().exp(), 1 - logprobs.double().exp().sum(-1, keepdim=True)], dim=-1)
    found = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], dim=-1)
    as_one = divergence(Kept(ids, weights, has_tail=True), some_logits(0).softmax(-1))
    assert torch.allclose(as_one, (true * (true / found).log()).sum(-1), atol=1e-5)


def test_a_tail_that_is_forgotten_is_infinitely_far():
    assert divergence(rivals.renormalised(*top(4)), some_logits(0).softmax(-1)).isinf().all()


def test_an_angle_is_exact_however_small():
    exact = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    found = torch.tensor([[0.0, 3.0], [1.0, 1.0], [1.0, 1e-5], [-1.0, 0.0]])
    assert torch.allclose(angle(found, exact), torch.tensor([90.0, 45.0, math.degrees(1e-5), 180.0]), rtol=1e-4)


def test_records_of_distillkit_have_the_sizes_it_documents():
    assert [rivals.BUDGET.size_bytes(size) for size in (SMOLLM_VOCAB, QWEN_VOCAB)] == [114, 127]
    assert [rivals.RECOMMENDED.size_bytes(size) for size in (SMOLLM_VOCAB, QWEN_VOCAB)] == [312, 344]


def test_a_curve_that_is_one_of_distillkit_comes_back():
    ranks = torch.arange(49.0)
    curve = torch.cat([torch.tensor([-0.3333]), -2 - 0.01 * ranks - 0.5 * ranks.sqrt()])
    found = rivals.BUDGET.approximate(curve[None])[0]
    assert torch.allclose(found[1:], curve[1:], atol=1e-4)
    assert found[0] == curve[0].bfloat16()


def test_a_nucleus_has_the_fewest_ids_that_hold_the_mass():
    probs = torch.tensor([[0.5, 0.25, 0.125, 0.0625], [0.96, 0.02, 0.01, 0.005]])
    kept = rivals.nucleus(torch.tensor([[7, 3, 9, 1], [2, 4, 6, 8]]), probs.log(), 0.7)
    assert kept.is_kept.tolist() == [[True, True, False, False], [True, False, False, False]]
    assert torch.allclose(kept.tail, torch.tensor([0.25, 0.04]).double(), atol=1e-3)
    assert rivals.nucleus_bytes(1.5, SMOLLM_VOCAB) == 6


def test_draws_with_replacement_are_counted():
    probs = some_logits(0).softmax(-1)
    kept = rivals.with_replacement(probs, 25, 3)
    drawn = torch.multinomial(probs, 25, replacement=True, generator=torch.Generator().manual_seed(3))
    for ids, weights, expected in zip(kept.ids.tolist(), (kept.weights * 25).tolist(), drawn.tolist(), strict=True):
        assert {token: round(count) for token, count in zip(ids, weights, strict=True) if count} == Counter(expected)


def test_a_drawn_id_and_its_count_take_three_bytes_while_they_fit():
    assert rivals.drawn_bytes(12.0, QWEN_VOCAB, 50) == 36
    assert rivals.drawn_bytes(12.0, QWEN_VOCAB, 100) == 48  # 18 bits and 7
    assert rivals.drawn_bytes(12.0, 2**17, 100) == 36


def test_the_error_of_draws_is_what_theory_says_and_none_of_it_is_bias():
    def draw(batch: SimpleNamespace, seed: int) -> Kept:
        return rivals.with_replacement(batch.probs, 20, seed)

    method = Method(name="", family="", target=draw, total_bytes=max, is_random=True)
    probs = some_logits(0).softmax(-1)
    square, bias_square = errors(method, SimpleNamespace(probs=probs), 400)
    expected = ((1 - probs.square().sum(-1)) / 20).mean().item()
    assert square == pytest.approx(expected, rel=0.1)
    assert abs(bias_square) < 0.02 * expected


def test_the_report_has_every_method_and_knows_which_is_exact(teacher: Path, ragged: Path, tmp_path: Path):
    options = {"teacher": teacher, "dataset": ragged, "batches": 2, "positions": 32, "seeds": 2}
    words = [f"--{name}={value}" for name, value in (options | {"output": tmp_path}).items()]
    command = [sys.executable, "-m", "benchmarks.fidelity", *words]
    done = programs.run(command)
    assert done.returncode == 0, done.stderr
    lines = {line["method"].strip("*"): line for line in json.loads((tmp_path / "fidelity.json").read_text())["data"]}
    assert all(0 <= lines[name]["angle, all"] < 0.1 for name in ("hidden, float32", "full, float16"))
    assert lines["hidden, float32"]["KL, tail as one"] < 1e-6
    for encoding in ("plain", "packed", "packed16"):
        biases = [lines[f"topk {k}, {encoding}"]["bias of p"] for k in (8, 32, 128)]
        assert biases == sorted(biases, reverse=True)
        assert lines[f"sample 32, {encoding}"]["bias of p"] < lines[f"sample 32, {encoding}"]["RMSE of p"]
    assert lines["sample 32, plain"]["total B"] == lines["topk 32, plain"]["total B"]
    assert lines["topk 32, packed"]["tail mass"] < lines["sample 32, packed, ghost"]["tail mass"] < 1
    assert lines["hidden, float16"]["record B"] == 2 * 32
    assert lines["hidden, packed"]["record B"] == 32 + 2
    assert lines["hidden, float32"]["RMSE of p"] < lines["hidden, packed"]["RMSE of p"] < 0.01
    assert lines["RS-KD, 50 draws"]["total B"] < 3 * 50
    assert all(name in done.stdout for name in lines)
    assert (tmp_path / "fidelity.png").stat().st_size > 10_000
