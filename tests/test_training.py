"""The training recipes of the README and docs/ run as they stand, and the student comes closer to the teacher."""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest
import torch
from conftest import PAGES, ROOT, make_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from logitgen import DistillationLoss, LogitsDataset, TokenBatches, collate, distil

Capture = Callable[..., Path]

TRAINING = [
    code for text in PAGES.values() for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "student" in code
]
"""All Python that trains; test_docs runs the rest."""

RECIPES = dict(zip(["loop", "padding_free", "measured", "step", "trainer", "trl"], TRAINING, strict=True))


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


@pytest.mark.parametrize("name", ["loop", "trainer", "trl"])
def test_the_student_of_a_recipe_comes_closer_to_the_teacher(name: str, dataset: LogitsDataset, teacher: Path) -> None:
    model, student = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32), make_student()
    before = divergence(dataset, model, student)
    changes = [("=1e-3", "=3e-3")]  # a learning rate for some 20 steps
    if name == "padding_free":
        changes.append(("max_tokens=4096", "max_tokens=512"))
    run(RECIPES[name], teacher, student, *changes)
    after = divergence(dataset, model, student.float())
    assert after < 0.7 * before


@pytest.mark.parametrize("num_rows", [1, 4, 8])
@pytest.mark.parametrize("name", ["trainer", "trl"])
def test_a_step_is_the_same_however_many_batches_it_takes(
    name: str, num_rows: int, dataset: LogitsDataset, teacher: Path
) -> None:
    """Loss and gradient are those of all its positions at once."""
    student = make_student()
    loss, gradient_norm = whole_step(student, dataset, range(8, 16))
    once = f"max_steps=1, logging_steps=1, gradient_accumulation_steps={8 // num_rows}"
    once += f", per_device_train_batch_size={num_rows}, bf16=False, train_sampling_strategy='sequential'"
    changes = [("learning_rate=1e-3", once)]
    if name == "trainer":
        changes += [("train_dataset=dataset", "train_dataset=[dataset[row] for row in range(8, 16)]")]
    else:
        changes += [("range(len(dataset))", "range(8, 16)")]
    names = run(RECIPES[name], teacher, student, *changes)
    logged = names["trainer"].state.log_history[0]
    assert logged["loss"] == pytest.approx(loss, rel=1e-5)
    assert logged["grad_norm"] == pytest.approx(gradient_norm, rel=1e-5)


def test_a_trainer_with_batches_by_tokens_reads_every_row_once_per_epoch(
    dataset: LogitsDataset, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (code,) = re.findall(r"```python\n([^`]*class TokenTrainer.*?)```", PAGES["docs/training.md"], re.DOTALL)
    read: list[list[list[int]]] = []

    def noting(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        read.append([example["input_ids"].tolist() for example in examples])
        return collate(examples)

    changes = [
        ("learning_rate=1e-3", "learning_rate=1e-3, accelerator_config={'even_batches': False}"),
        ("\ntrainer = Trainer(", f"\n{code}\ntrainer = TokenTrainer("),
        ("max_tokens=4096", "max_tokens=512"),
        ("data_collator=collate", "data_collator=noting"),
    ]
    monkeypatch.setattr("builtins.noting", noting, raising=False)
    run(RECIPES["trainer"], teacher, make_student(), *changes)
    expected = []
    for epoch in range(3):
        batches = TokenBatches(dataset.lengths, 512)
        batches.set_epoch(epoch)
        expected += [[dataset[row]["input_ids"].tolist() for row in batch] for batch in batches]
    assert read == expected


def test_the_step_of_a_loop_is_the_same_however_many_batches_it_takes(dataset: LogitsDataset, teacher: Path) -> None:
    student = make_student()
    _, gradient_norm = whole_step(student, dataset, range(8, 16))
    names = run(RECIPES["step"], teacher, student)
    names["step"](distil(student, dataset), [collate([dataset[row]]) for row in range(8, 16)])
    assert norm_of(student) == pytest.approx(gradient_norm, rel=1e-5)


def test_a_trainer_evaluates(dataset: LogitsDataset, teacher: Path) -> None:
    student = make_student()
    expected, _ = whole_step(student, dataset, range(8))
    change = "train_dataset=dataset", "eval_dataset=[dataset[row] for row in range(8)]"
    names = run(RECIPES["trainer"], teacher, student, change, ("trainer.train()", "found = trainer.evaluate()"))
    assert names["found"]["eval_loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["measured", "trl"])
def test_a_trainer_logs_what_its_student_measures(name: str, dataset: LogitsDataset, teacher: Path) -> None:
    changes = [("=1e-3", "=3e-3, save_strategy='no', per_device_eval_batch_size=2, bf16=False")]
    if name == "trl":
        changes += [("(SFTTrainer)", "(logitgen.Measured, SFTTrainer)"), ("=3e-3", "=3e-3, logging_steps=5")]
        changes += [("distil(student, dataset)", "distil(student, dataset, measure=True, cross_entropy_weight=0.5)")]
    names = run("import logitgen\n" + RECIPES[name], teacher, make_student(), *changes)
    history = names["trainer"].state.log_history
    logged = [line for line in history if "loss" in line]
    for line in logged:
        assert line["loss"] == pytest.approx((line["divergence"] + line["cross_entropy"]) / 2, rel=1e-5)
        assert 0 < line["teacher_tail"] < line["tail"] < 1
    assert len(logged) >= 3
    assert logged[-1]["divergence"] < 0.9 * logged[0]["divergence"]
    assert logged[-1]["agreement"] > logged[0]["agreement"]
    if name == "measured":
        test, student = names["test"], names["student"].eval()
        expected = DistillationLoss(dataset, cross_entropy_weight=0.5)
        batch = collate([row for row in test if len(row["positions"])])
        with torch.no_grad():
            logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        (*_, evaluated) = (line for line in history if "eval_loss" in line)
        assert evaluated["eval_loss"] == pytest.approx(expected(logits, batch).item(), rel=1e-4)
        assert evaluated["eval_divergence"] > 0


REPORT = """
if trainer.is_world_process_zero():
    print("logged", trainer.state.log_history[0]["loss"], trainer.state.log_history[0]["grad_norm"])
    print("ranks", trainer.args.world_size)
"""


RANK = """
import sys
from transformers import AutoModelForCausalLM
student = AutoModelForCausalLM.from_pretrained("student_of_all")
{code}
"""


def test_two_ranks_make_the_same_step_as_one(dataset: LogitsDataset, teacher: Path, tmp_path: Path) -> None:
    """With rows of different lengths, and two batches to the step of each rank."""
    student = make_student()
    loss, gradient_norm = whole_step(student, dataset, range(8, 16))
    student.save_pretrained("student_of_all")
    once = "use_cpu=True, max_steps=1, logging_steps=1, gradient_accumulation_steps=2, per_device_train_batch_size=2"
    code = (
        RECIPES["trainer"]
        .replace(", tokenizer=tokenizer", "")
        .replace("learning_rate=1e-3", once + ", train_sampling_strategy='sequential'")
    )
    code = code.replace("train_dataset=dataset", "train_dataset=[dataset[row] for row in range(8, 16)]")
    (tmp_path / "rank.py").write_text((RANK + REPORT).format(code=code))
    assert on_two_ranks(tmp_path / "rank.py") == pytest.approx((loss, gradient_norm), rel=1e-5)


SHARDED = """
import torch
from torch import distributed
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from logitgen import LogitsDataset, collate, distil

distributed.init_process_group("gloo")
rank, dataset = distributed.get_rank(), LogitsDataset("teacher.h5")
student = distil(AutoModelForCausalLM.from_pretrained("student_of_all"), dataset)
for part in (*student.model.layers, student.lm_head, student):
    fully_shard(part)
num_items = sum(len(dataset[row]["positions"]) for row in range(8, 16))
value = student(**collate([dataset[row] for row in range(8 + rank, 16, 2)]), num_items_in_batch=num_items / 2).loss
value.backward()
norm = torch.cat([weight.grad.full_tensor().flatten() for weight in student.parameters()]).norm()
mean = value.detach() / 2
distributed.all_reduce(mean)
if rank == 0:
    print("logged", mean.item(), norm.item())
    print("ranks", distributed.get_world_size())
distributed.destroy_process_group()
"""


def test_two_ranks_that_share_a_student_make_the_same_step(
    dataset: LogitsDataset, teacher: Path, tmp_path: Path
) -> None:
    """Also where the head is sharded apart from the rest."""
    student = make_student()
    expected = whole_step(student, dataset, range(8, 16))
    student.save_pretrained("student_of_all")
    (tmp_path / "rank.py").write_text(SHARDED)
    assert on_two_ranks(tmp_path / "rank.py") == pytest.approx(expected, rel=1e-5)


def on_two_ranks(script: Path) -> tuple[float, float]:
    """Launch a script, and return the loss and the norm of the gradient that it logs."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script.name]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ended = programs.run(launcher, cwd=script.parent, env=environment)
    assert ended.returncode == 0, ended.stderr
    assert "ranks 2" in ended.stdout
    logged = re.search(r"logged (\S+) (\S+)", ended.stdout)
    assert logged
    return float(logged[1]), float(logged[2])


def whole_step(student: PreTrainedModel, dataset: LogitsDataset, rows: range) -> tuple[float, float]:
    """Loss and norm of the gradient of some rows as one batch, from the student's logits."""
    batch = collate([dataset[row] for row in rows])
    logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    value = DistillationLoss(dataset)(logits, batch)
    value.backward()
    norm = norm_of(student)
    student.zero_grad()
    return value.item(), norm


def norm_of(student: PreTrainedModel) -> float:
    """Norm of all gradients."""
    gradients = [weight.grad for weight in student.parameters() if weight.grad is not None]
    return torch.cat([gradient.flatten() for gradient in gradients]).norm().item()
