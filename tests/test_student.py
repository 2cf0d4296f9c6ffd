"""A distilled student: its loss is that of its logits in every family, and inside of all that wraps a model."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import make_llama
from families import FAMILIES, ROWS, VOCAB, make
from test_losses import captured
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from logitgen import DistillationLoss, LogitsDataset, UsageError, collate, distil
from logitgen.student import distil as module

Capture = Callable[..., Path]


class Known(list[dict[str, Tensor]]):
    """Rows as a dataset has them, with every token's whole distribution of a teacher at random."""

    def __init__(self, vocab_size: int, rows: list[list[int]]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.attributes, self.head = captured("full", words=vocab_size).attributes, None
        super().__init__(
            {
                "input_ids": torch.tensor(row),
                "positions": torch.arange(len(row) - 1),
                "logits": torch.randn(len(row) - 1, vocab_size, generator=generator),
            }
            for row in rows
        )


@pytest.fixture(autouse=True)
def warnings(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    module._warn_once.cache_clear()
    caplog.set_level(logging.WARNING, logger="logitgen")
    return caplog


def expected_loss(student: Any, rows: Known) -> Tensor:
    """Of the plain logits, row by row: KL(teacher || student) as cross-entropy less the teacher's entropy."""
    total, count = torch.zeros(()), 0
    for row in rows:
        logits = student(input_ids=row["input_ids"][None]).logits[0, :-1].float()
        teacher = row["logits"].softmax(-1)
        total = total + cross_entropy(logits, teacher, reduction="sum") - torch.special.entr(teacher).sum()
        count += len(logits)
    return total / count


def gradients(student: nn.Module) -> dict[str, Tensor]:
    found = {name: weight.grad for name, weight in student.named_parameters() if weight.grad is not None}
    student.zero_grad()
    return found


def check(student: Any, rows: Known, run: Any = None, tolerance: float = 1e-5) -> None:
    """Compare loss and all gradients of a distilled student with those of its plain logits."""
    expected = expected_loss(student, rows)
    expected.backward()
    plain = gradients(student)
    output = (student if run is None else run)(**collate(rows))
    output.loss.backward()
    assert output.logits is None
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    found = gradients(student)
    assert found.keys() == plain.keys()
    largest = max(gradient.norm() for gradient in plain.values())
    for name, gradient in plain.items():
        assert (found[name] - gradient).norm() <= tolerance * largest, name


TEXT = [name for name in FAMILIES if not name.startswith(("mamba", "phi3", "kimi", "qwen3.5"))]


@pytest.mark.parametrize("family", TEXT)
def test_every_familys_loss_is_that_of_its_logits(family: str, warnings: pytest.LogCaptureFixture) -> None:
    rows = Known(VOCAB, [list(map(int, row))[:9] for row in ROWS[:3]])
    student = distil(make(family).eval(), rows)
    check(student, rows)
    assert "as a whole" not in warnings.text


class Doubling(nn.Module):
    """A head that is no plain product."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight = head.weight

    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * hidden @ self.weight.T


LLAMA_ROWS = [[3, 4, 5, 6, 7, 8], [9, 10], [11, 12, 13, 14]]


def test_a_head_that_is_no_product_takes_the_plain_way(warnings: pytest.LogCaptureFixture) -> None:
    student, rows = make_llama().eval(), Known(384, LLAMA_ROWS)
    student.lm_head = Doubling(student.lm_head)
    check(distil(student, rows), rows)
    assert "logits are computed as a whole, which takes more memory: its head is a Doubling" in warnings.text


def test_steps_between_head_and_logits_that_are_unknown_take_the_plain_way(
    warnings: pytest.LogCaptureFixture,
) -> None:
    student, rows = make_llama().eval(), Known(384, LLAMA_ROWS)
    plain = student.forward

    def shifted(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        output.logits = output.logits + torch.linspace(0, 1, output.logits.shape[-1])
        return output

    student.forward = shifted
    check(distil(student, rows), rows)
    assert "they are not a product of its last hidden states and its head" in warnings.text


def test_a_student_that_refuses_another_head_takes_the_plain_way(warnings: pytest.LogCaptureFixture) -> None:
    student, rows = make_llama().eval(), Known(384, LLAMA_ROWS)
    plain = student.forward

    def strict(*args: Any, **kwargs: Any) -> Any:
        output = plain(*args, **kwargs)
        if output.logits.numel() and output.logits.max() > 1000:
            raise ValueError("logits above 1000")
        return output

    student.forward = strict
    check(distil(student, rows), rows)
    assert "running it with another head fails: logits above 1000" in warnings.text


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("adapted", ["q_proj", "lm_head"])
def test_an_adapter_may_come_before_or_after(before: bool, adapted: str) -> None:
    rows, student = Known(384, LLAMA_ROWS), make_llama().eval()
    config = peft.LoraConfig(target_modules=["q_proj", adapted], task_type="CAUSAL_LM", init_lora_weights=False)
    student = peft.get_peft_model(student, config) if before else distil(student, rows)
    student = distil(student, rows) if before else peft.get_peft_model(student, config)
    check(student.eval(), rows)


def test_a_compiled_student_and_one_with_checkpoints_have_the_same_loss() -> None:
    rows = Known(384, LLAMA_ROWS)
    student = distil(make_llama(), rows)
    check(student, rows, torch.compile(student, backend="eager"))
    student.gradient_checkpointing_enable()
    check(student, rows)


def test_without_captured_values_the_student_is_what_it_was(tmp_path: Path) -> None:
    plain, rows = make_llama().eval(), Known(384, LLAMA_ROWS)
    student = distil(copy.deepcopy(plain), rows)
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(student(ids).logits, plain(ids).logits)
    expected = plain.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(student.generate(ids, max_new_tokens=5, do_sample=False), expected)
    student.save_pretrained(tmp_path)
    assert type(student).from_pretrained(tmp_path).forward.__func__ is type(plain).forward


def test_a_copy_has_its_own_weights() -> None:
    rows = Known(384, LLAMA_ROWS)
    student = distil(make_llama(), rows)
    other = copy.deepcopy(student)
    with torch.no_grad():
        other.lm_head.weight.zero_()
    check(other, rows)
    other(**collate(rows)).loss.backward()
    assert not gradients(student)


def test_options_of_the_loss_are_passed_on() -> None:
    rows = Known(384, LLAMA_ROWS)
    student, batch = distil(make_llama(), rows, temperature=2.0, divergence="jsd"), collate(rows)
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = DistillationLoss(rows, temperature=2.0, divergence="jsd")(logits, batch)
    assert student(**batch).loss.item() == pytest.approx(expected.item(), rel=1e-5)
    with pytest.raises(UsageError, match="temperature must be a number above 0"):
        distil(make_llama(), rows, temperature=0.0)


@pytest.mark.parametrize("way", ["chunked", "plain"])
def test_many_small_batches_are_one_large_batch(way: str) -> None:
    """As each is divided by the positions of all, a position of a short row weighs as much as that of a long one."""
    rows, student = Known(384, LLAMA_ROWS), make_llama().eval()
    if way == "plain":
        student.lm_head = Doubling(student.lm_head)
    student = distil(student, rows)
    whole = student(**collate(rows)).loss
    whole.backward()
    expected = gradients(student)
    num_items = sum(len(row["positions"]) for row in rows)
    losses = [student(**collate([row]), num_items_in_batch=num_items).loss for row in rows]
    sum(losses).backward()
    assert sum(losses).item() == pytest.approx(whole.item(), rel=1e-5)
    for name, gradient in gradients(student).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-6)


def test_a_student_trains_from_every_kind_of_file(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path
) -> None:
    for kind in ("topk", "sample", "hidden", "full"):
        dataset = LogitsDataset(
            capture(teacher=teacher, dataset=ragged, limit=4, capture=kind, output=tmp_path / f"{kind}.h5")
        )
        student: PreTrainedModel = distil(make_llama(), dataset)
        batch = collate([dataset[row] for row in range(4)])
        logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        value = student(**batch).loss
        assert value.item() == pytest.approx(DistillationLoss(dataset)(logits, batch).item(), rel=1e-5)
