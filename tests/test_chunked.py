"""The loss from hidden states and head is that from logits, in value and in every gradient, and holds few logits."""

from typing import Any

import pytest
import torch
from test_losses import (
    HIDDEN,
    KINDS,
    LENGTHS,
    OPTIONS,
    WORDS,
    Head,
    LiveMemory,
    captured,
    make_case,
    random_batch,
)
from test_losses import reference as reference_of
from torch import Tensor
from torch.nn.functional import linear

from logitgen import DistillationLoss, UsageError
from logitgen.head import Head as StudentHead
from logitgen.student import chunks
from logitgen.student.chunked import loss_of_hidden

SIZE = 5
"""Of the student's hidden states."""


def make_student(
    dtype: torch.dtype = torch.float64, scale: float = 1.0, soft_cap: float = 0.0, bias: bool = True
) -> tuple[Tensor, StudentHead]:
    generator = torch.Generator().manual_seed(2)
    shapes = (len(LENGTHS), max(LENGTHS), SIZE), (WORDS, SIZE), (WORDS,)
    hidden_BTD, weight_VD, bias_V = (
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes
    )
    head = StudentHead(weight_VD=weight_VD, bias_V=bias_V if bias else None, scale=scale, soft_cap=soft_cap)
    return hidden_BTD, head


def with_gradients(value: Tensor, hidden_BTD: Tensor, head: StudentHead) -> list[Tensor]:
    leaves = [leaf for leaf in (hidden_BTD, head.weight_VD, head.bias_V) if leaf is not None]
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def logits_of(hidden_BTD: Tensor, head: StudentHead) -> Tensor:
    logits = head.scale * linear(hidden_BTD, head.weight_VD, head.bias_V)
    return head.soft_cap * (logits / head.soft_cap).tanh() if head.soft_cap else logits


@pytest.mark.parametrize("weight", [0.0, 0.25])
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_value_and_gradients_are_those_of_formulas_over_whole_logits(
    kind: str, options: dict[str, Any], weight: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_LOGITS", 4 * WORDS)
    case, (hidden_BTD, head) = make_case(kind), make_student(scale=0.5, soft_cap=3.0)
    loss = DistillationLoss(case.dataset, **options, beta=0.3, cross_entropy_weight=weight)
    found = with_gradients(loss_of_hidden(loss, head, hidden_BTD, case.batch), hidden_BTD, head)
    logits = logits_of(hidden_BTD, head)
    value = reference_of(case, logits, **options, beta=0.3, cross_entropy_weight=weight)
    torch.testing.assert_close(found, with_gradients(value, hidden_BTD, head), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_in_float32_all_is_equal_to_the_plain_way_to_one_in_a_million(
    kind: str, bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "CHUNK_LOGITS", 4 * WORDS)
    case, (hidden_BTD, head) = make_case(kind), make_student(torch.float32, bias=bias)
    if case.dataset.head:
        case.dataset.head = case.dataset.head.to(torch.device("cpu"), torch.float32)
    loss = DistillationLoss(case.dataset)
    found = with_gradients(loss_of_hidden(loss, head, hidden_BTD, case.batch), hidden_BTD, head)
    plain = with_gradients(loss(logits_of(hidden_BTD, head), case.batch), hidden_BTD, head)
    for ours, theirs in zip(found, plain, strict=True):
        assert (ours - theirs).norm() <= 1e-6 * theirs.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_products_are_bfloat16_and_sums_float32(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, (hidden_BTD, head) = make_case(kind), make_student(torch.float32)
    loss = DistillationLoss(case.dataset)
    with torch.autocast("cpu", torch.bfloat16):
        found = with_gradients(loss_of_hidden(loss, head, hidden_BTD, case.batch), hidden_BTD, head)
        plain = with_gradients(loss(logits_of(hidden_BTD, head), case.batch), hidden_BTD, head)
    assert all(tensor.dtype == torch.float32 for tensor in found)
    assert torch.equal(found[0], plain[0])  # the same products, rounded alike
    torch.testing.assert_close(found, plain, rtol=0.02, atol=2e-3)
    exact = with_gradients(loss_of_hidden(loss, head, hidden_BTD, case.batch), hidden_BTD, head)
    assert not torch.equal(found[0], exact[0])


def test_a_frozen_head_gets_no_gradient() -> None:
    case, (hidden_BTD, head) = make_case("topk"), make_student()
    expected = with_gradients(
        loss_of_hidden(DistillationLoss(case.dataset), head, hidden_BTD, case.batch), hidden_BTD, head
    )
    head.weight_VD.requires_grad_(False)
    loss_of_hidden(DistillationLoss(case.dataset), head, hidden_BTD, case.batch).backward()
    assert head.weight_VD.grad is None
    torch.testing.assert_close([hidden_BTD.grad, head.bias_V.grad], [expected[1], expected[3]])


def test_without_gradients_there_is_the_value_alone() -> None:
    case, (hidden_BTD, head) = make_case("topk"), make_student()
    loss = DistillationLoss(case.dataset)
    with torch.no_grad():
        value = loss_of_hidden(loss, head, hidden_BTD, case.batch)
    assert not value.requires_grad
    assert value.item() == pytest.approx(loss(logits_of(hidden_BTD, head), case.batch).item(), rel=1e-9)


def test_a_batch_without_a_captured_position_gives_gradients_of_zero() -> None:
    """Ranks wait for each other's gradients."""
    case, (hidden_BTD, head) = make_case("topk"), make_student()
    case.batch["captured"][:] = False
    for num_items in (None, 0, 7, torch.tensor(0)):
        loss = loss_of_hidden(DistillationLoss(case.dataset), head, hidden_BTD, case.batch, num_items)
        found = with_gradients(loss, hidden_BTD, head)
        assert not any(tensor.any() for tensor in found)


def test_a_second_backward_pass_is_refused() -> None:
    case, (hidden_BTD, head) = make_case("topk"), make_student()
    value = loss_of_hidden(DistillationLoss(case.dataset), head, hidden_BTD, case.batch)
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"are used up\. Compute the loss again"):
        value.backward()


def test_another_vocabulary_is_refused() -> None:
    case, (hidden_BTD, head) = make_case("topk", words=WORDS + 9), make_student()
    with pytest.raises(UsageError, match=f"must have {WORDS + 9} to .* columns .* got {WORDS}"):
        loss_of_hidden(DistillationLoss(case.dataset), head, hidden_BTD, case.batch)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_that_of_two_chunks_however_large_the_batch(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words, length, size = 1000, 9, 4
    monkeypatch.setattr(chunks, "CHUNK_LOGITS", 8 * words)
    chunk_bytes, of_weight = 4 * 8 * words, 4 * words * size
    for num_rows in (4, 32):
        generator = torch.Generator().manual_seed(0)
        batch = random_batch(kind, num_rows, length, words, generator)
        teacher_head = Head(torch.randn(words, HIDDEN, generator=generator))
        loss = DistillationLoss(captured(kind, teacher_head, words))
        hidden_BTD = torch.randn(num_rows, length, size, generator=generator, requires_grad=True)
        weight_VD = torch.randn(words, size, generator=generator, requires_grad=True)
        head = StudentHead(weight_VD=weight_VD, bias_V=None, scale=1.0, soft_cap=0.0)
        with LiveMemory() as memory:
            loss_of_hidden(loss, head, hidden_BTD, batch).backward()
        copies = 5 * 4 * num_rows * length * size  # hidden states and their gradients
        assert memory.largest_bytes <= max(chunk_bytes, copies)
        assert memory.peak_bytes - of_weight - copies <= 2.1 * chunk_bytes
