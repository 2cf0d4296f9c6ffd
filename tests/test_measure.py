"""What a student measures, against both models' own logits, position by position."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama
from test_student import LLAMA_ROWS, Doubling, Known
from test_training import make_student, on_two_ranks, whole_step
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from logitgen import LogitsDataset, Measured, UsageError, collate, distil, measures

Capture = Callable[..., Path]


@torch.no_grad()
def expected(student: Any, teacher: Any, rows: Any, weight: float, k: int = 0) -> dict[str, float]:
    """The measures, from whole distributions of both models in float64, of the k likeliest tokens if k is given."""
    found: dict[str, list[Tensor]] = {}

    def note(**values: Tensor) -> None:
        for name, value in values.items():
            found.setdefault(name, []).append(value)

    for row in rows:
        ids = row["input_ids"]
        of = (row["logits"] if teacher is None else teacher(ids[None]).logits[0, :-1]).double().log_softmax(-1)
        at = student(ids[None]).logits[0, :-1].double().log_softmax(-1)
        note(cross_entropy=cross_entropy(at, ids[1:], reduction="none"), agreement=of.argmax(-1) == at.argmax(-1))
        if k:
            kept = of.topk(k).indices
            both = [logprobs.gather(-1, kept) for logprobs in (of, at)]
            teacher_tail, tail = (1 - logprobs.exp().sum(-1) for logprobs in both)
            of, at = (torch.cat([logprobs, (1 - logprobs.exp().sum(-1, keepdim=True)).log()], -1) for logprobs in both)
            note(tail=tail, teacher_tail=teacher_tail)
        note(divergence=(of.exp() * (of - at)).sum(-1))
    means = {name: torch.cat(values).double().mean().item() for name, values in found.items()}
    return means | {"loss": (1 - weight) * means["divergence"] + weight * means["cross_entropy"]}


@pytest.mark.parametrize("weight", [0.0, 0.5])
@pytest.mark.parametrize("way", ["chunked", "plain", "compiled", "autocast"])
def test_measures_are_those_of_both_models_logits(way: str, weight: float) -> None:
    rows, student = Known(384, LLAMA_ROWS), make_llama()
    if way == "plain":
        student.lm_head = Doubling(student.lm_head)
    known = expected(student, None, rows, weight)
    run = student = distil(student, rows, measure=True, cross_entropy_weight=weight)
    if way == "compiled":
        run = torch.compile(student, backend="eager")
    with torch.autocast("cpu", enabled=way == "autocast"):
        run(**collate(rows[:2])).loss.backward()
        run(**collate(rows[2:])).loss.backward()
    assert measures(run) == pytest.approx(known, rel=3e-2 if way == "autocast" else 1e-5)
    assert measures(student) == {}


@pytest.mark.parametrize("kind", ["topk", "sample", "hidden", "full"])
def test_every_kind_of_file_measures_what_it_knows(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, kind: str
) -> None:
    dataset = LogitsDataset(capture(teacher=teacher, dataset=ragged, capture=kind, limit=9, top_k=8))
    rows = [row for row in dataset if len(row["positions"])]
    model, student = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32), make_student()
    known = expected(student, model, rows, 0, 8 if kind == "topk" else 0)
    student = distil(student, dataset, measure=True)
    loss = student(**collate(rows)).loss.item()
    found = measures(student)
    assert found["loss"] == found["divergence"] == pytest.approx(loss, rel=1e-5)
    if kind == "sample":
        assert found.keys() == {"loss", "divergence", "cross_entropy"}
        assert found["cross_entropy"] == pytest.approx(known["cross_entropy"], rel=1e-4)
    else:
        assert found == pytest.approx(known, rel=1e-2)  # the file rounds


def test_a_student_that_became_its_teacher_agrees_with_it(capture: Capture, teacher: Path, ragged: Path) -> None:
    dataset = LogitsDataset(capture(teacher=teacher, dataset=ragged, top_k=8))
    student = distil(AutoModelForCausalLM.from_pretrained(teacher), dataset, measure=True)
    student(**collate([dataset[row] for row in range(9)]))
    found = measures(student)
    assert found["agreement"] == 1
    assert found["divergence"] < 1e-4
    assert found["tail"] == pytest.approx(found["teacher_tail"], rel=1e-3)


def test_training_and_evaluation_are_measured_apart() -> None:
    rows = Known(384, LLAMA_ROWS)
    student = distil(make_llama(), rows, measure=True)
    student.train()(**collate(rows[:1]))
    student.eval()(**collate(rows[1:]))
    other = measures(student)
    first = measures(student.train())
    whole = distil(make_llama(), rows, measure=True)
    whole(**collate(rows))
    counts = [len(row["positions"]) for row in rows]
    mean = (counts[0] * first["loss"] + sum(counts[1:]) * other["loss"]) / sum(counts)
    assert first["loss"] != pytest.approx(other["loss"], rel=1e-3)
    assert measures(whole)["loss"] == pytest.approx(mean, rel=1e-6)


def test_a_student_that_does_not_measure_says_so() -> None:
    rows = Known(384, LLAMA_ROWS)
    with pytest.raises(UsageError, match=r"must measure.* Make it with distil\(\.\.\., measure=True\)\."):
        measures(distil(make_llama(), rows))


class MeasuredTrainer(Measured, Trainer):
    pass


def test_a_trainer_logs_means_over_the_positions_of_all_steps_since(tmp_path: Path) -> None:
    """Of batches of different sizes, two to a step, three steps to a line."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 40, (12,), generator=generator).tolist()
    rows = Known(384, [torch.randint(384, (length,), generator=generator).tolist() for length in lengths])
    student = make_llama()
    known = expected(student, None, rows, 0.5)
    student = distil(student, rows, measure=True, cross_entropy_weight=0.5)
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, learning_rate=0, max_steps=3, logging_steps=3, report_to="none",
        per_device_train_batch_size=2, gradient_accumulation_steps=2, save_strategy="no",
    )  # fmt: skip
    trainer = MeasuredTrainer(student, args, train_dataset=rows, eval_dataset=rows, data_collator=collate)
    trainer.train()
    (logged,) = (line for line in trainer.state.log_history if "loss" in line)
    assert {name: logged[name] for name in known} == pytest.approx(known, rel=1e-5)
    args.per_device_eval_batch_size = 5
    found = trainer.evaluate(metric_key_prefix="held_out")
    assert {name: found[f"held_out_{name}"] for name in known} == pytest.approx(known, rel=1e-5)
    plain = Trainer(student, args, eval_dataset=rows, data_collator=collate).evaluate()["eval_loss"]
    assert plain != pytest.approx(known["loss"], rel=1e-4)  # Trainer's own mean is over rows


RANKS = """
from torch import distributed
from transformers import AutoModelForCausalLM
from logitgen import LogitsDataset, collate, distil, measures

distributed.init_process_group("gloo")
rank, dataset = distributed.get_rank(), LogitsDataset("teacher.h5")
student = distil(AutoModelForCausalLM.from_pretrained("student_of_all"), dataset, measure=True)
if rank == 0:
    student(**collate([dataset[row] for row in range(3, 6)]))
first = measures(student)
for rows in ([range(3, 5)], [range(5, 9), range(9, 16)])[rank]:
    student(**collate([dataset[row] for row in rows]))
second = measures(student)
if rank == 1:
    print("ranks", distributed.get_world_size())
    print("logged", first["loss"], second["loss"])
distributed.destroy_process_group()
"""


def test_measures_are_means_over_all_ranks(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where one of them has seen no batch yet."""
    monkeypatch.chdir(tmp_path)
    dataset = LogitsDataset(capture(teacher=teacher, dataset=ragged, top_k=8, output=tmp_path / "teacher.h5"))
    student = make_student()
    student.save_pretrained("student_of_all")
    expected = [whole_step(student, dataset, rows)[0] for rows in (range(3, 6), range(3, 16))]
    (tmp_path / "rank.py").write_text(RANKS)
    assert on_two_ranks(tmp_path / "rank.py") == pytest.approx(expected, rel=1e-5)
