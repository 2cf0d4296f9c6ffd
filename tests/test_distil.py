"""The example that distils: what it compares is comparable, and it reports what it found."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_llama
from transformers import AutoModelForCausalLM

import logitgen
from examples import distil
from logitgen import LogitsDataset

Capture = Callable[..., Path]


def test_a_student_of_all_layers_is_the_teacher() -> None:
    teacher = make_llama(num_hidden_layers=3)
    batch = {"input_ids": torch.arange(12)[None], "attention_mask": torch.ones(1, 12, dtype=torch.int64)}
    expected = teacher(**batch).logits
    torch.testing.assert_close(distil.logits_of(distil.cut_down(teacher, 3), batch), expected)
    shorter = distil.cut_down(teacher, 2)
    for layer, index in zip(shorter.model.layers, (0, 2), strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, teacher.model.layers[index].mlp.up_proj.weight)
    frozen = {name for name, weight in shorter.named_parameters() if not weight.requires_grad}
    assert frozen == {"model.embed_tokens.weight", "lm_head.weight"}


def test_the_teacher_in_memory_and_a_file_of_all_tokens_give_the_same_loss(
    capture: Capture, teacher: Path, ragged: Path
) -> None:
    dataset = LogitsDataset(capture(teacher=teacher, dataset=ragged, top_k=384))
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    student, batch = distil.cut_down(model, 1), next(distil.batches(dataset, seed=0))
    online = distil.online(model)(student, batch)
    offline = distil.of_file(logitgen.distil(student, dataset), batch)
    assert online.item() > 0.1
    assert offline.item() == pytest.approx(online.item(), rel=1e-2)
    weight = student.model.layers[0].mlp.up_proj.weight
    gradients = [torch.autograd.grad(loss, weight)[0].flatten() for loss in (online, offline)]
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def test_every_seed_has_its_own_order_and_every_way_the_same(capture: Capture, teacher: Path, ragged: Path) -> None:
    dataset = LogitsDataset(capture(teacher=teacher, dataset=ragged, top_k=2))
    first, again, other = (next(distil.batches(dataset, seed))["input_ids"] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


@pytest.mark.slow
def test_a_run_reports_every_way_and_draws_it(
    teacher: Path, ragged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kind = next(iter(distil.KINDS))
    words = [f"--teacher={teacher}", f"--dataset={ragged}", f"--output={tmp_path}", f"--kinds={kind}", "--losses=JSD"]
    words += ["--steps=4", "--seeds=2", "--layers=2"]  # all of the teacher's: the students start as the teacher
    monkeypatch.setattr(sys, "argv", ["distil", *words])
    distil.main()
    data = json.loads((tmp_path / "distil.json").read_text())["data"]
    assert list(data) == ["cross-entropy", "teacher in memory", f"file, {kind}, JSD"]
    for runs in data.values():
        for run in runs:
            assert abs(run["points"]["divergence"][0]) < 1e-4
            assert run["points"]["agreement"][0] > 0.99
            assert run["points"]["step"][-1] == len(run["step_seconds"]) == 4
    ends = {name: [run["points"]["divergence"][-1] for run in runs] for name, runs in data.items()}
    for alone, online, offline in zip(*ends.values(), strict=True):
        assert alone > 3 * max(online, offline)  # on tokens alone it moves away, with the teacher it only trembles
    printed = capsys.readouterr().out
    assert all(f"| {name} " in printed for name in data)
    assert (tmp_path / "distil.png").stat().st_size > 10_000
    assert re.search(r"The student starts -?0\.00 nats away", printed)
    assert "The whole took" in printed
