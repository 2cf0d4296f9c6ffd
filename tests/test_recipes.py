"""The recipes of docs/training.md in circumstances that people have: resumed, compiled, evaluated, on several ranks."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_training import (
    RECIPES,
    REPORT,
    Capture,
    dataset,
    make_student,
    on_two_ranks,
    run,
    whole_step,
)
from transformers import EvalPrediction

from logitgen import LogitsDataset

__all__ = ["Capture", "dataset"]  # the fixture

LONE_ROWS = {
    "trainer": ("train_dataset=dataset", "train_dataset=[dataset[row] for row in range(8, 16)]"),
    "trl": ("range(len(dataset))", "range(8, 16)"),
}
"""Changes that make a recipe train on eight rows."""

both = pytest.mark.parametrize("name", ["trainer", "trl"])


def with_options(**options: Any) -> tuple[str, str]:
    """A change that gives a recipe's arguments more options."""
    words = [f"{name}={value!r}" for name, value in ({"bf16": False, "save_strategy": "no"} | options).items()]
    return "learning_rate=1e-3", ", ".join(["learning_rate=1e-3", *words])


ONCE = {"max_steps": 1, "logging_steps": 1, "train_sampling_strategy": "sequential"}
"""Options for one step over the eight rows in order."""


@both
def test_a_resumed_training_ends_like_an_undisturbed_one(name: str, dataset: LogitsDataset, teacher: Path) -> None:
    student = make_student()
    options = with_options(max_steps=6, save_strategy="steps", save_steps=3, logging_steps=1)
    whole = run(RECIPES[name], teacher, copy.deepcopy(student), options)["trainer"]
    again = "trainer.train()", "trainer.train(resume_from_checkpoint='student/checkpoint-3')"
    resumed = run(RECIPES[name], teacher, copy.deepcopy(student), options, again)["trainer"]
    assert resumed.state.global_step == 6
    losses = [[line["loss"] for line in each.state.log_history if "loss" in line] for each in (whole, resumed)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for (key, left), right in zip(whole.model.state_dict().items(), resumed.model.state_dict().values(), strict=True):
        torch.testing.assert_close(left, right, msg=key)
    assert not torch.equal(next(whole.model.parameters()), next(student.parameters()))


@both
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_step_is_the_same(name: str, backend: str, dataset: LogitsDataset, teacher: Path) -> None:
    student = make_student()
    loss, gradient_norm = whole_step(student, dataset, range(8, 16))
    options = with_options(**ONCE, torch_compile_backend=backend, per_device_train_batch_size=8)
    logged = run(RECIPES[name], teacher, student, options, LONE_ROWS[name])["trainer"].state.log_history[0]
    assert (logged["loss"], logged["grad_norm"]) == pytest.approx((loss, gradient_norm), rel=1e-4)


@both
def test_a_step_in_bfloat16_is_nearly_the_same(name: str, dataset: LogitsDataset, teacher: Path) -> None:
    student = make_student()
    loss, gradient_norm = whole_step(student, dataset, range(8, 16))
    options = with_options(**ONCE | {"bf16": True}, per_device_train_batch_size=8)
    names = run(RECIPES[name], teacher, student, options, LONE_ROWS[name])
    logged = names["trainer"].state.log_history[0]
    assert (logged["loss"], logged["grad_norm"]) == pytest.approx((loss, gradient_norm), rel=0.1)
    assert logged["loss"] != pytest.approx(loss, rel=1e-6)  # it is another precision
    assert all(weight.dtype == torch.float32 for weight in student.parameters())


def test_metrics_of_an_evaluation_get_labels_and_no_logits(dataset: LogitsDataset, teacher: Path) -> None:
    seen: list[EvalPrediction] = []

    def compute(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"count": float((prediction.label_ids != -100).sum())}

    changes = ("train_dataset=", "eval_dataset="), ("trainer.train()", ""), with_options()
    trainer = run(RECIPES["trainer"], teacher, make_student(), *changes)["trainer"]
    trainer.compute_metrics = compute
    found = trainer.evaluate()
    assert found["eval_count"] == sum(len(row["positions"]) for row in dataset)
    assert not np.size(seen[0].predictions)


def test_trl_groups_rows_by_a_column_of_lengths_and_reads_none_for_it(
    dataset: LogitsDataset, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = count_reads(monkeypatch)
    columns = "range(len(dataset))}", "range(len(dataset)), 'length': dataset.lengths.tolist()}"
    options = with_options(train_sampling_strategy="group_by_length", num_train_epochs=1)
    run(RECIPES["trl"], teacher, make_student(), columns, options)
    assert sorted(read) == [0, *range(len(dataset))]  # `distil` looks at the first


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note every row that is read, from now on."""
    read: list[int] = []
    plain: Callable[..., Any] = LogitsDataset.__getitem__

    def noting(self: LogitsDataset, row: int) -> Any:
        read.append(row)
        return plain(self, row)

    monkeypatch.setattr(LogitsDataset, "__getitem__", noting)
    return read


RANK = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
student = AutoModelForCausalLM.from_pretrained("student_of_all")
tokenizer = AutoTokenizer.from_pretrained({teacher!r})
{code}
"""


def test_two_ranks_of_trl_make_the_same_step_as_one(dataset: LogitsDataset, teacher: Path, tmp_path: Path) -> None:
    student = make_student()
    expected = whole_step(student, dataset, range(8, 16))
    student.save_pretrained("student_of_all")
    code = RECIPES["trl"].replace(*LONE_ROWS["trl"])
    code = code.replace(
        *with_options(**ONCE, use_cpu=True, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    )
    (tmp_path / "rank.py").write_text((RANK + REPORT).format(code=code, teacher=str(teacher)))
    assert on_two_ranks(tmp_path / "rank.py") == pytest.approx(expected, rel=1e-5)
