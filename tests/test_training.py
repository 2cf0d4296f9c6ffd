"""The training recipes of the README and docs/ run as they stand, and the student comes closer to the teacher."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import PAGES, make_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from logitgen import DistillationLoss, LogitsDataset, TokenBatches, collate

Capture = Callable[..., Path]

TRAINING = [
    code for text in PAGES.values() for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "student" in code
]
"""All Python that trains; test_docs runs the rest."""

RECIPES = dict(zip(["loop", "padding_free", "trainer", "trl"], TRAINING, strict=True))


@pytest.fixture
def dataset(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> LogitsDataset:
    """A capture in the folder that the recipes run in."""
    monkeypatch.chdir(tmp_path)
    return LogitsDataset(capture(teacher=teacher, dataset=ragged, top_k=64, output=tmp_path / "teacher.h5"))


def make_student() -> PreTrainedModel:
    """Take the teacher's weights, disturbed: what can be won back in a few steps."""
    torch.manual_seed(1)
    student = make_llama()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return student


def run(code: str, teacher: Path, student: PreTrainedModel, *changes: tuple[str, str]) -> dict[str, Any]:
    """Run a recipe as it stands, or with some of its text changed, and return what it has defined."""
    for before, after in changes:
        assert before in code
        code = code.replace(before, after)
    names = {"student": student, "tokenizer": AutoTokenizer.from_pretrained(teacher)}
    exec(code.replace('("student", ', '("student", use_cpu=True, '), names)
    return names


@torch.no_grad()
def divergence(dataset: LogitsDataset, teacher: PreTrainedModel, student: PreTrainedModel) -> float:
    """KL(teacher || student) over the whole vocabulary, from both models' own logits, in nats per position."""
    total, num_positions = 0.0, 0
    for row in dataset:
        if len(row["positions"]):
            of, at = (
                (m.eval()(row["input_ids"][None]).logits[0, :-1]).double().log_softmax(-1) for m in (teacher, student)
            )
            total += (of.exp() * (of - at)).sum().item()
            num_positions += len(of)
    return total / num_positions


@pytest.mark.parametrize("name", RECIPES)
def test_the_student_of_a_recipe_comes_closer_to_the_teacher(name: str, dataset: LogitsDataset, teacher: Path) -> None:
    model, student = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32), make_student()
    before = divergence(dataset, model, student)
    changes = [("=1e-3", "=3e-3")]  # a learning rate for some 20 steps
    if name == "padding_free":
        changes.append(("max_tokens=4096", "max_tokens=512"))
    run(RECIPES[name], teacher, student, *changes)
    after = divergence(dataset, model, student.float())
    assert after < 0.7 * before


@pytest.mark.parametrize("name", ["trainer", "trl"])
def test_with_gradient_accumulation_the_loss_is_the_mean_of_its_batches(
    name: str, dataset: LogitsDataset, teacher: Path
) -> None:
    student = make_student()
    loss = DistillationLoss(dataset)
    batches = [collate([dataset[row] for row in rows]) for rows in (range(8, 12), range(12, 16))]
    expected = [loss(student(**inputs(batch)).logits, batch).item() for batch in batches]
    once = "max_steps=1, logging_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=4"
    once += ", bf16=False, train_sampling_strategy='sequential'"
    names = run(
        RECIPES[name],
        teacher,
        student,
        ("learning_rate=1e-3", once),
        ("\ntrainer = ", "\ndataset = [dataset[row] for row in range(8, 16)]\ntrainer = "),
    )
    logged = [entry["loss"] for entry in names["trainer"].state.log_history if "loss" in entry]
    assert logged == pytest.approx([sum(expected) / 2], rel=1e-3)


def test_a_trainer_with_batches_by_tokens_reads_every_row_once_per_epoch(
    dataset: LogitsDataset, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n([^`]*class TokenTrainer.*?)```", PAGES["docs/training.md"], re.DOTALL)
    read: list[list[list[int]]] = []

    def noting(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        read.append([example["input_ids"].tolist() for example in examples])
        return collate(examples)

    changes = [
        ("remove_unused_columns=False", "remove_unused_columns=False, accelerator_config={'even_batches': False}"),
        ("\ntrainer = Trainer(", f"\n{code}\ntrainer = TokenTrainer("),
        ("max_tokens=4096", "max_tokens=512"),
        ("batch = collate(rows)", "batch = noting(rows)"),
    ]
    monkeypatch.setattr("builtins.noting", noting, raising=False)
    run(RECIPES["trainer"], teacher, make_student(), *changes)
    expected = []
    for epoch in range(3):
        batches = TokenBatches(dataset.lengths, 512)
        batches.set_epoch(epoch)
        expected += [[dataset[row]["input_ids"].tolist() for row in batch] for batch in batches]
    assert read == expected


def inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask")}
