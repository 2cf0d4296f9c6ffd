"""A teacher run once more over a file's rows: the numbers against a direct forward pass, and what is too far."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_llama, make_phi, save_teacher, write_jsonl
from transformers import AutoModelForCausalLM

from logitgen import LogitsFile, UsageError
from logitgen.__main__ import main
from logitgen.file.layout import Layout
from logitgen.rerun import TOLERANCES, Rerun, _compare, load_teacher_of, rerun, sample_rows
from logitgen.split.batch import Pass
from logitgen.teacher import model as teacher_module
from logitgen.teacher.model import Teacher

Capture = Callable[..., Path]

ROWS = [[(7 * row + 3 * index) % 384 for index in range(length)] for row, length in enumerate((23, 0, 4, 1, 17, 9))]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in ROWS])


def changed_llama(scale: float, seed: int = 1) -> Any:
    """The usual teacher with a little noise on its head."""
    model = make_llama()
    with torch.no_grad():
        noise = torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(seed))
        model.lm_head.weight += scale * noise
    return model


def direct(model: Any, file: LogitsFile, rows: list[int]) -> tuple[int, float, float, float]:
    """Positions, largest and mean difference, and agreement, from whole rows through the plain model, in float64.

    What rounding to float16 explains does not count: half a step, that is 2**-11 of what was rounded.
    """
    differences, agreements = [], []
    for row in rows:
        data = file.row(row)
        with torch.no_grad():
            logits_TV = model(torch.tensor([data["input_ids"].tolist()])).logits[0].double().numpy()
        logits_PV = logits_TV[data["positions"]]
        now_PV = logits_PV - np.log(np.exp(logits_PV).sum(1, keepdims=True))
        if "logits" in data:
            stored_PK = data["logits"].astype(np.float64) - data["logsumexp"][:, None]
            now_PK, top_P, rounded_PK = now_PV, data["logits"].argmax(1), data["logits"].astype(np.float64)
        else:
            stored_PK, top_P = data["kept_logprobs"].astype(np.float64), data["kept_ids"][:, 0]
            now_PK, rounded_PK = np.take_along_axis(now_PV, data["kept_ids"].astype(np.int64), 1), stored_PK
        differences.append(np.maximum(np.abs(stored_PK - now_PK) - np.abs(rounded_PK) / 2048, 0).ravel())
        agreements.append(top_P == now_PV.argmax(1))
    all_differences, all_agreements = np.concatenate(differences), np.concatenate(agreements)
    return len(all_agreements), all_differences.max(), all_differences.mean(), all_agreements.mean()


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@pytest.mark.parametrize("kept", [{"top_k": 11}, {"capture": "full"}], ids=["topk", "full"])
@pytest.mark.parametrize("scale", [0.0, 0.05, 1.0])
def test_the_numbers_are_those_of_a_direct_forward_pass(
    kept: dict[str, Any],
    scale: float,
    capture: Capture,
    teacher: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(teacher_module, "CHUNK_LOGITS", 5 * 384)  # several chunks per row, the last one not full
    file = LogitsFile(capture(teacher=teacher, dataset=data, **kept))
    model = changed_llama(scale)
    compared = rerun(file, Teacher(model, 384), np.array([0, 2, 4]))
    num_positions, largest, mean, agreement = direct(model, file, [0, 2, 4])
    assert compared.num_positions == num_positions == 22 + 3 + 16
    assert compared.largest == pytest.approx(largest, abs=2e-5)
    assert compared.mean == pytest.approx(mean, abs=2e-6)
    assert compared.top1_agreement == pytest.approx(agreement)
    assert bool(compared.problems) == (scale > 0)


def test_a_shift_of_what_is_stored_is_the_difference(capture: Capture, teacher: Path, data: Path) -> None:
    file = LogitsFile(capture(teacher=teacher, dataset=data, top_k=4))
    file.arrays["kept_logprobs"] = file.arrays["kept_logprobs"] - np.float16(0.25)
    file.arrays["kept_ids"] = file.arrays["kept_ids"].copy()
    own = load_teacher_of(file, None, trust_remote_code=False)[0]
    compared = rerun(file, own, np.array([4]))
    assert compared.mean == pytest.approx(0.25, abs=0.01)  # less what rounding explains
    assert compared.top1_agreement == 1
    assert compared.problems == ["the teacher's log-probs differ from the stored ones"]


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_masked_token_makes_no_difference(masked: float, capture: Capture, teacher: Path, data: Path) -> None:
    file = LogitsFile(capture(teacher=teacher, dataset=data, capture="full"))
    logits_PV = file.arrays["logits"].copy()
    logits_PV[:, 7] = -65504  # as it is stored
    exact_PV = np.delete(logits_PV, 7, axis=1).astype(np.float64)
    file.arrays |= {"logits": logits_PV, "logsumexp": np.log(np.exp(exact_PV).sum(1)).astype("<f4")}
    model = make_llama()
    own = Teacher(model, 384)
    model.lm_head.register_forward_hook(lambda module, inputs, output: output.index_fill(-1, torch.tensor([7]), masked))
    compared = rerun(file, own, np.array([0, 4]))
    assert compared.largest < 0.02
    assert compared.problems == []


def test_nothing_to_compare_is_no_agreement(capture: Capture, teacher: Path, data: Path) -> None:
    file = LogitsFile(capture(teacher=teacher, dataset=data, capture="full"))
    file.arrays |= {"logits": np.full_like(file.arrays["logits"], -65504)}  # all masked
    compared = rerun(file, Teacher(make_llama(), 384), np.array([0]))
    assert compared.problems == ["the teacher's log-probs differ from the stored ones"]


@pytest.mark.parametrize("kept", [{"capture": "hidden", "encoding": "packed"}, {"capture": "hidden"}, {"top_k": 9}])
def test_a_head_that_masks_tokens_agrees_with_itself(
    kept: dict[str, Any], capture: Capture, data: Path, tokenizer: Any, tmp_path: Path
) -> None:
    model = make_phi()
    with torch.no_grad():
        model.lm_head.bias[200:] = -torch.inf
    masking = save_teacher(tmp_path / "masking", model, tokenizer)
    assert main(["verify", str(capture(teacher=masking, dataset=data, **kept)), "--teacher"]) == 0


def test_a_masked_token_is_no_value_that_would_make_the_mean_smaller() -> None:
    layout = Layout(capture="topk", num_rows=1, num_tokens=2, num_positions=1, vocab_size=3, top_k=3)
    stored = {"kept_ids": np.array([[2, 0, 1]], "<u2"), "kept_logprobs": np.array([[-0.25, -2.0, -65504.0]], "<f2")}
    difference, same = _compare(stored, torch.tensor([[-2.0, -torch.inf, -0.5]]), layout)
    assert difference.tolist() == pytest.approx([0.25 - 0.25 * 2**-11, 0])
    assert same.tolist() == [True]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    "kept",
    [
        {"top_k": 16},
        {"top_k": 16, "encoding": "packed"},
        {"top_k": 16, "encoding": "packed16"},
        {"capture": "sample", "top_k": 16, "encoding": "packed"},
        {"capture": "hidden"},
        {"capture": "hidden", "encoding": "packed"},
        {"capture": "full"},
    ],
    ids=lambda kept: " ".join(map(str, kept.values())),
)
def test_a_captured_file_agrees_with_its_own_teacher(
    dtype: str,
    kept: dict[str, Any],
    capture: Capture,
    teacher: Path,
    ragged: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = capture(teacher=teacher, dataset=ragged, dtype=dtype, batch_tokens=300, **kept)
    capsys.readouterr()
    status = main(["verify", str(path), "--teacher"])
    out = printed(capsys)
    assert status == 0, out
    max_mean, min_agreement = TOLERANCES[dtype]
    assert re.search(
        r"over [1-9][\d,]* positions largest difference \d\.\d{4} nats beyond rounding, mean \d\.\d{5}", out
    )
    assert f"(at most {max_mean})" in out
    assert f"(at least {min_agreement:.0%})" in out
    assert "verified: every row is present once" in out


def test_a_teacher_is_compared_by_the_packed_states_it_would_give(capture: Capture, teacher: Path, data: Path) -> None:
    """Packing itself is no difference, however far it moves the log-probs. A changed code is one."""
    file = LogitsFile(capture(teacher=teacher, dataset=data, capture="hidden", encoding="packed"))
    model = AutoModelForCausalLM.from_pretrained(teacher)
    own = Teacher(model, 384)
    compared = rerun(file, own, np.array([0, 4]))
    assert compared.largest < 1e-3
    row, head = file.row(0), model.lm_head
    with torch.no_grad():
        exact_PV = model(torch.tensor([ROWS[0]])).logits[0, :-1].log_softmax(-1)
        moved_PV = head(torch.tensor(row["hidden"])).log_softmax(-1) - exact_PV
    assert moved_PV.abs().max() > 5e-3
    file.arrays["hidden"] = file.arrays["hidden"].copy()
    file.arrays["hidden"][:, :4] = -file.arrays["hidden"][:, :4]
    assert rerun(file, own, np.array([0, 4])).problems == ["the teacher's log-probs differ from the stored ones"]


def test_a_teacher_saved_in_float64_can_be_run_again(capture: Capture, tmp_path: Path, data: Path) -> None:
    folder = save_teacher(tmp_path / "teacher", make_llama().double(), None)
    path = capture(teacher=folder, dataset=data, top_k=4)
    assert main(["verify", str(path), "--teacher"]) == 0


@pytest.mark.parametrize("kind", ["topk", "sample", "hidden", "hidden, packed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_slightly_changed_teacher_is_too_far_for_any_precision(
    dtype: str, kind: str, capture: Capture, teacher: Path, data: Path, tmp_path: Path, tokenizer: Any, capsys: Any
) -> None:
    encoding = {"encoding": "packed"} if "packed" in kind else {}
    path = capture(teacher=teacher, dataset=data, dtype=dtype, top_k=16, capture=kind.split(",")[0], **encoding)
    other = save_teacher(tmp_path / "other", changed_llama(0.2), tokenizer)
    capsys.readouterr()
    assert main(["verify", str(path), "--teacher", str(other)]) == 1
    out = printed(capsys)
    assert "NOT verified, 2 problems" in out
    assert "the teacher's weights differ from the file's" in out
    assert "the teacher's log-probs differ from the stored ones" in out


@pytest.mark.parametrize(
    ("mean", "agreement", "right"),
    [(0.01, 0.9, True), (0.0101, 0.9, False), (0.01, 0.8999, False), (0.0, 1.0, True), (float("nan"), 1.0, False)],
)
def test_a_teacher_is_right_up_to_both_tolerances(mean: float, agreement: float, right: bool) -> None:
    compared = Rerun(5, largest=3.0, mean=mean, top1_agreement=agreement, max_mean=0.01, min_agreement=0.9)
    assert compared.problems == ([] if right else ["the teacher's log-probs differ from the stored ones"])


def test_a_teacher_of_another_vocabulary_is_refused_in_one_line(
    capture: Capture, teacher: Path, data: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = capture(teacher=teacher, dataset=data, top_k=4)
    other = save_teacher(tmp_path / "other", make_llama(448), tokenizer)
    message = "must have the file's vocabulary of 384 tokens, got 448. Give the file's teacher."
    with pytest.raises(UsageError, match=re.escape(f"--teacher {other} {message}")):
        load_teacher_of(LogitsFile(path), str(other), trust_remote_code=False)
    capsys.readouterr()
    assert main(["verify", str(path), "--teacher", str(other)]) == 2
    assert capsys.readouterr().err.splitlines() == [f"error: --teacher {other} {message}"]


def test_without_a_name_the_files_own_teacher_is_run(
    capture: Capture, data: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    own = save_teacher(tmp_path / "own", make_llama(), tokenizer)
    path = capture(teacher=own, dataset=data, top_k=4)
    assert main(["verify", str(path), "--teacher"]) == 0
    own.rename(tmp_path / "moved")
    capsys.readouterr()
    assert main(["verify", str(path), "--teacher"]) == 2
    assert f"error: --teacher {own} does not exist. Give a folder or a hub id." in printed(capsys)
    assert main(["verify", str(path), "--teacher", str(tmp_path / "moved")]) == 0


def test_the_teacher_is_loaded_as_it_was(capture: Capture, teacher: Path, data: Path) -> None:
    options = {"dtype": "bfloat16", "attn_implementation": "eager", "max_length": 8, "top_k": 4}
    loaded, differences = load_teacher_of(LogitsFile(capture(teacher=teacher, dataset=data, **options)), None, False)
    assert loaded.dtype == torch.bfloat16
    assert differences == []
    assert loaded._model.config._attn_implementation == "eager"


def test_so_many_rows_are_run_as_were_asked_for(
    capture: Capture, teacher: Path, ragged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = capture(teacher=teacher, dataset=ragged, top_k=4)
    logits, shapes = Teacher.logits, []

    def watched(self: Teacher, passes: list[Pass], slots: Any) -> Any:
        shapes.extend(each.input_ids.shape for each in passes)
        return logits(self, passes, slots)

    monkeypatch.setattr(Teacher, "logits", watched)
    for options, expected in (([], 16), (["--rows", "3"], 3), (["--rows", "999"], 50)):
        shapes.clear()
        assert main(["verify", str(path), "--teacher", *options]) == 0
        assert len(shapes) == expected
        assert all(num_rows == 1 for num_rows, _ in shapes)


def test_only_rows_with_captured_positions_are_drawn(capture: Capture, teacher: Path, data: Path) -> None:
    file = LogitsFile(capture(teacher=teacher, dataset=data, top_k=4))
    filled = [row for row, ids in enumerate(ROWS) if len(ids) > 1]
    assert sample_rows(file, 99).tolist() == filled
    drawn = {tuple(sample_rows(file, 2, seed).tolist()) for seed in range(60)}
    assert drawn == {(left, right) for left in filled for right in filled if left < right}
    assert sample_rows(file, 2).tolist() == sample_rows(file, 2).tolist()


def test_the_teacher_is_compared_where_completions_were_captured(
    capture: Capture, teacher: Path, tmp_path: Path
) -> None:
    rows = [{"input_ids": [3, 1, 4, 1, 5, 9, 2], "completion_mask": [0, 0, 1, 0, 1, 1, 0]}]
    dataset = write_jsonl(tmp_path / "d.jsonl", rows)
    file = LogitsFile(capture(teacher=teacher, dataset=dataset, completion_only=True, top_k=9))
    model = AutoModelForCausalLM.from_pretrained(teacher)
    compared = rerun(file, Teacher(model, 384), np.array([0]))
    assert compared.num_positions == 3
    assert compared.mean == pytest.approx(direct(model, file, [0])[2], abs=2e-6)
    assert compared.problems == []
