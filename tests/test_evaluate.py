"""A student compared with a file's teacher: the numbers against both models' own logits, and who is refused."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from conftest import make_llama, make_phi, make_tokenizer, save_teacher
from test_training import make_student
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from logitgen import LogitsFile
from logitgen.__main__ import main
from logitgen.rerun import sample_rows

Capture = Callable[..., Path]


@pytest.fixture
def student(tmp_path: Path, tokenizer: Any) -> Path:
    return save_teacher(tmp_path / "student", make_student(), tokenizer)


def evaluated(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@torch.no_grad()
def expected(teacher: Any, student: Any, file: LogitsFile, rows: Any, k: int | None = None) -> dict[str, Any]:
    """All that is printed, from both models' logits of whole rows in float64; of the k likeliest tokens if given."""
    of, at, targets = [], [], []
    for row in rows:
        data = file.row(int(row))
        ids, positions = (torch.from_numpy(data[name].astype("int64")) for name in ("input_ids", "positions"))
        for model, found in ((teacher, of), (student, at)):
            found.append(model(ids[None]).logits[0].double().log_softmax(-1)[positions])
        targets.append(ids[positions + 1])
    of_PV, at_PV, target_P = torch.cat(of), torch.cat(at), torch.cat(targets)
    losses = [cross_entropy(logprobs, target_P).item() for logprobs in (at_PV, of_PV)]
    known = {"rows": len(rows), "positions": len(target_P)}
    known |= {"cross_entropy": losses[0], "teacher_cross_entropy": losses[1]}
    known |= {"perplexity": math.exp(losses[0]), "teacher_perplexity": math.exp(losses[1])}
    known["agreement"] = (of_PV.argmax(-1) == at_PV.argmax(-1)).double().mean().item()
    if k:
        kept = of_PV.topk(k).indices
        both = [logprobs.gather(-1, kept) for logprobs in (of_PV, at_PV)]
        tails = [1 - logprobs.exp().sum(-1, keepdim=True) for logprobs in both]
        known |= {"teacher_tail": tails[0].mean().item(), "tail": tails[1].mean().item()}
        of_PV, at_PV = (torch.cat([kept, tail.log()], -1) for kept, tail in zip(both, tails, strict=True))
    known["forward_kl"] = kl_div(at_PV, of_PV, reduction="batchmean", log_target=True).item()
    known["reverse_kl"] = kl_div(of_PV, at_PV, reduction="batchmean", log_target=True).item()
    return known


@pytest.mark.parametrize("kind", ["topk", "sample", "hidden", "full"])
def test_the_numbers_are_those_of_both_models_logits(
    kind: str, capture: Capture, teacher: Path, ragged: Path, student: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = capture(teacher=teacher, dataset=ragged, capture=kind, top_k=16)
    file = LogitsFile(path)
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (teacher, student)]
    filled = np.flatnonzero(np.diff(file.arrays["position_offsets"]))
    known = expected(*models, file, filled, 16 if kind == "topk" else None)
    found = evaluated(capsys, student, "--file", path)
    assert found["rows_of_file"] == len(file)
    if kind == "sample":
        estimate = found.pop("forward_kl")
        assert estimate == pytest.approx(known.pop("forward_kl"), abs=0.2)  # it is drawn
        assert [found[name] for name in ("reverse_kl", "agreement", "tail", "teacher_tail")] == [None] * 4
        known = {name: value for name, value in known.items() if found[name] is not None}
    assert {name: found[name] for name in known} == pytest.approx(known, rel=2e-3)


def test_some_rows_are_drawn_and_the_teacher_is_at_no_distance_from_itself(
    capture: Capture, teacher: Path, ragged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = capture(teacher=teacher, dataset=ragged, top_k=384)
    model, file = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32), LogitsFile(path)
    known = expected(model, model, file, sample_rows(file, 7))
    found = evaluated(capsys, teacher, "--file", path, "--rows", 7)
    assert (found["rows"], found["positions"], found["agreement"]) == (7, known["positions"], 1)
    assert found["perplexity"] == pytest.approx(known["perplexity"], rel=1e-5)
    assert found["forward_kl"] < 1e-3  # it keeps all tokens, rounded
    assert main(["evaluate", str(teacher), "--file", str(path), "--rows", "7"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert f"rows 7 of 53, {known['positions']:,} positions" in text
    assert "top-1 agreement 100.00%" in text
    assert f"perplexity student {found['perplexity']:,.3f}, teacher {found['teacher_perplexity']:,.3f}" in text
    assert "mass of the tail student 0.0000, teacher 0.0000" in text


def test_an_adapter_is_a_student(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = capture(teacher=teacher, dataset=ragged)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    plain = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    file = LogitsFile(path)
    rows = np.flatnonzero(np.diff(file.arrays["position_offsets"]))
    found = evaluated(capsys, tmp_path / "adapter", "--file", path)
    known = expected(plain, adapted, file, rows, 64)
    assert found["forward_kl"] > 0.01
    assert {name: found[name] for name in known} == pytest.approx(known, rel=2e-3)


def refused(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    capsys.readouterr()
    assert main(["evaluate", *map(str, words)]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.count("error: ") == 1
    assert "Traceback" not in error
    return error


@pytest.fixture
def path(capture: Capture, teacher: Path, ragged: Path) -> Path:
    return capture(teacher=teacher, dataset=ragged, top_k=4)


def test_bad_input_is_refused_in_one_line(
    path: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "The student /no/student does not exist." in refused(capsys, "/no/student", "--file", path)
    (tmp_path / "empty").mkdir()
    assert "The student" in (said := refused(capsys, tmp_path / "empty", "--file", path))
    assert "has no config.json" in said
    assert "no.h5" in refused(capsys, teacher, "--file", tmp_path / "no.h5")
    assert "--rows must be at least 1, got 0." in refused(capsys, teacher, "--file", path, "--rows", 0)
    assert "required" in refused(capsys, teacher)


def test_a_student_of_another_vocabulary_or_tokenizer_is_refused(
    path: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    small = save_teacher(tmp_path / "small", make_llama(200), tokenizer)
    assert "must have 384 to 1408 columns" in refused(capsys, small, "--file", path)
    padding = save_teacher(tmp_path / "padding", make_llama(), make_tokenizer(pad_token="<|end|>"))
    assert evaluated(capsys, padding, "--file", path)["agreement"] == 1
    other = save_teacher(tmp_path / "other", make_llama(), make_tokenizer(bos_token="<|end|>"))
    said = refused(capsys, other, "--file", path)
    assert "The student's tokenizer must be that of the teacher" in said
    assert "add --other_tokenizer if only chat template or special tokens differ." in said
    assert evaluated(capsys, other, "--file", path, "--other_tokenizer")["agreement"] == 1


def test_a_student_without_a_tokenizer_is_named(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    bare = save_teacher(tmp_path / "bare", make_llama(), None)
    evaluated(capsys, bare, "--file", path, "--rows", 3)
    assert "The student has no tokenizer to compare. Make sure that it is the teacher's." in caplog.text


def test_a_student_worse_than_chance_is_named(
    path: Path, teacher: Path, student: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """As one is that knows the tokens by other numbers."""
    found = evaluated(capsys, student, "--file", path)
    assert found["cross_entropy"] > math.log(384)
    assert "predicts the tokens worse than by chance" in caplog.text


def test_targets_that_are_masked_make_a_perplexity_beyond_all_numbers(
    capture: Capture, ragged: Path, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_phi()
    with torch.no_grad():
        model.lm_head.bias[::2] = -1e9
    masking = save_teacher(tmp_path / "masking", model, tokenizer)
    path = capture(teacher=masking, dataset=ragged, top_k=8)
    found = evaluated(capsys, masking, "--file", path)
    assert found["cross_entropy"] > math.log(torch.finfo(torch.float64).max)
    assert found["perplexity"] is found["teacher_perplexity"] is None  # JSON knows no infinity
    assert main(["evaluate", str(masking), "--file", str(path)]) == main(["inspect", str(path)]) == 0
    assert capsys.readouterr().out.count(" inf") >= 3
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["perplexity"] is None


def test_rows_are_cut_at_the_students_context(
    path: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = make_llama()
    model.config.max_position_embeddings = 16
    short = save_teacher(tmp_path / "short", model, tokenizer)
    found, file = evaluated(capsys, short, "--file", path), LogitsFile(path)
    lengths = np.diff(file.arrays["offsets"])
    assert lengths.max() > 16
    assert found["positions"] == np.maximum(lengths.clip(max=16) - 1, 0).sum()
    assert found["agreement"] == 1
    assert "Rows are cut at 16 tokens, the student's context." in caplog.text
