"""The export, read back by `datasets` and pyarrow, and by what axolotl does with its columns."""

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import ROOT, make_llama, write_jsonl
from files import ARRAYS, FULL, write_file
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from logitgen import DistillationLoss, LogitsDataset, LogitsFile, UsageError, collate
from logitgen.__main__ import main
from logitgen.config import Config
from logitgen.student import export as module
from logitgen.student.export import export, target_logprobs

Capture = Callable[..., Path]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_file(tmp_path / "out.h5")


def load(output: Path) -> datasets.Dataset:
    if output.suffix:
        return datasets.load_dataset("parquet", data_files=str(output), split="train")
    return datasets.load_from_disk(output)


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_rows_become_the_columns_worked_out_by_hand(path: Path, tmp_path: Path, name: str) -> None:
    export(LogitsFile(path), tmp_path / name)
    rows = load(tmp_path / name).to_list()
    nothing = [0, 0]
    assert [row["input_ids"] for row in rows] == [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    assert [row["attention_mask"] for row in rows] == [[1] * 3, [1], [1] * 5]
    assert [row["labels"] for row in rows] == [[-100, 2, 3], [-100], [-100, -100, 7, -100, 9]]
    assert [row["target_token_ids"] for row in rows] == [
        [[2, 7], [9, 3], nothing],
        [nothing],
        [nothing, [7, 0], nothing, [9, 1], nothing],
    ]
    assert [row["target_mask"] for row in rows] == [
        [[1, 1], [1, 1], nothing],
        [nothing],
        [nothing, [1, 1], nothing, [1, 1], nothing],
    ]
    of_position = {  # two kept log-probs, made to sum to 1
        (0, 0): [-1, -1.25],
        (0, 1): [-0.25, -2],
        (2, 1): [-0.5, -3],
        (2, 3): [-0.5, -1.25],
    }
    for number, row in enumerate(rows):
        for position, found in enumerate(row["target_logprobs"]):
            kept = of_position.get((number, position))
            total = kept and sum(math.exp(value) for value in kept)
            expected = [value - math.log(total) for value in kept] if kept else [-1e9, -1e9]
            assert found == pytest.approx(expected, rel=1e-6)


def test_the_folder_and_the_parquet_file_hold_the_same_types(path: Path, tmp_path: Path) -> None:
    for name in ("out.parquet", "out"):
        export(LogitsFile(path), tmp_path / name)
    assert load(tmp_path / "out").features == load(tmp_path / "out.parquet").features


def test_axolotls_loss_over_the_columns_is_0_for_the_teacher_itself(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path
) -> None:
    """As its kernel computes it with renormalised students: entry t against the student's output at t."""
    export(LogitsFile(capture(teacher=teacher, dataset=ragged, top_k=8)), tmp_path / "out.parquet")
    student = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    rows = load(tmp_path / "out.parquet").with_format("torch")
    num_compared = 0
    for number in (3, 20, 9):
        row = rows[number]
        with torch.no_grad():
            logits_TV = student(row["input_ids"][None]).logits[0]
        student_TK = logits_TV.gather(-1, row["target_token_ids"].long()).log_softmax(-1)
        known = row["target_mask"].bool()
        divergence = (row["target_logprobs"].exp() * (row["target_logprobs"] - student_TK))[known].sum()
        assert known.all(-1).tolist() == [True] * (len(known) - 1) + [False]
        assert abs(divergence.item()) < 1e-3 * len(known)
        num_compared += len(known)
        shifted = student_TK.roll(1, 0)  # one position off is nothing like it
        assert (row["target_logprobs"].exp() * (row["target_logprobs"] - shifted))[known].sum() > 0.1 * len(known)
    assert num_compared > 50


@pytest.mark.parametrize("encoding", ["plain", "packed16", "packed"])
@pytest.mark.parametrize("kind", ["topk", "sample"])
def test_every_kind_and_encoding_of_kept_tokens_is_exported(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, kind: str, encoding: str
) -> None:
    file = LogitsFile(capture(teacher=teacher, dataset=ragged, limit=20, capture=kind, top_k=8, encoding=encoding))
    export(file, tmp_path / "out.parquet")
    rows = load(tmp_path / "out.parquet").to_list()
    assert len(rows) == 20
    for number, row in enumerate(rows):
        kept = file.row(number)
        assert row["target_token_ids"][:-1] == kept["kept_ids"].tolist()
        probabilities = np.exp(kept["kept_logprobs"].astype(np.float64))
        found = np.exp(np.array(row["target_logprobs"][:-1]).reshape(probabilities.shape))
        if kind == "topk":
            np.testing.assert_allclose(found, probabilities / probabilities.sum(-1, keepdims=True), rtol=1e-5)
            continue
        np.testing.assert_allclose(found.sum(-1), 1, rtol=1e-5)
        is_raised = found > probabilities * (1 + 1e-5)
        assert is_raised.any() or not len(probabilities)
        for raised, weights, probs in zip(is_raised, found, probabilities, strict=True):
            assert (weights[probs == 0] == 0).all()  # what fills up a packed record
            np.testing.assert_allclose(weights[raised], weights[probs > 0].min(), rtol=1e-5)  # to one level
            np.testing.assert_allclose(weights[~raised], probs[~raised], rtol=1e-5)


def test_a_drawn_token_of_no_probability_weighs_nothing() -> None:
    targets = target_logprobs(np.array([[-0.1, -65504]], "<f2"), "sample")
    assert np.isfinite(targets).all()
    assert np.exp(targets[0, 1]) == 0


def test_rows_are_written_in_parts_of_bounded_size(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(LogitsFile(path), tmp_path / "whole.parquet")
    monkeypatch.setattr(module, "_ENTRIES_AT_ONCE", 1)
    export(LogitsFile(path), tmp_path / "parts.parquet")
    assert pq.ParquetFile(tmp_path / "whole.parquet").num_row_groups == 1
    assert pq.ParquetFile(tmp_path / "parts.parquet").num_row_groups == 3
    assert load(tmp_path / "parts.parquet").to_list() == load(tmp_path / "whole.parquet").to_list()


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=8), st.data())
def test_drawn_weights_recover_every_probability_on_average(shares: list[float], data: st.DataObject) -> None:
    """Each token as often as its probability over its weight says, the others certain."""
    probabilities = sorted(np.array(shares) / sum(shares), reverse=True)
    k = data.draw(st.integers(1, len(shares) - 1))
    level = next(
        level for i in range(k) if probabilities[i] <= (level := sum(probabilities[i:]) / (k - i)) * (1 + 1e-12)
    )
    num_certain = sum(p > level * (1 + 1e-12) for p in probabilities)
    line = np.cumsum(probabilities[num_certain:]) / level
    sums, num_draws = np.zeros(len(shares)), 200
    for offset in (np.arange(num_draws) + 0.5) / num_draws:
        marks = np.arange(k - num_certain) + offset
        ids = [*range(num_certain), *(num_certain + np.searchsorted(line[:-1], marks, side="right"))]
        sums[ids] += np.exp(target_logprobs(np.log(probabilities)[ids][None], "sample")[0])
    assert sums / num_draws == pytest.approx(probabilities, abs=1.5 * level / num_draws * 2)


def test_a_capture_of_all_logits_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "out.h5", FULL, capture="full", top_k=0)
    with pytest.raises(
        UsageError,
        match=r"for axolotl needs a file of --capture topk or sample, .* has --capture full.*Train from it with",
    ):
        export(LogitsFile(path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_what_exists_is_left_alone(path: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / name
    output.write_text("mine")
    with pytest.raises(UsageError, match=r"exists already\. Name another output, or remove it\."):
        export(LogitsFile(path), output)
    assert output.read_text() == "mine"


def test_an_ending_that_promises_something_else_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"must end in \.parquet, or be a folder's name .*, got rows\.jsonl"):
        export(LogitsFile(path), tmp_path / "rows.jsonl")


def test_a_place_that_is_not_there_is_refused(path: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"out cannot be written: No such file or directory\. Choose another place\."):
        export(LogitsFile(path), tmp_path / "nowhere" / "out")


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_an_export_that_fails_leaves_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    file = LogitsFile(path)
    monkeypatch.setattr(module, "target_logprobs", fail)
    with pytest.raises(UsageError, match="cannot be written: No space left on device"):
        export(file, tmp_path / name)
    assert [found.name for found in tmp_path.iterdir()] == ["out.h5"]


def test_the_command_says_what_it_did(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(path), str(tmp_path / "out.parquet")]) == 0
    assert "Exported 3 rows to" in capsys.readouterr().out
    assert main(["export", str(path), str(tmp_path / "out.parquet")]) == 2
    error = capsys.readouterr().err
    assert "exists already" in error
    assert "Traceback" not in error


def test_an_incomplete_file_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "out.h5", ARRAYS | {"done": np.array([0, 0, 1], "u1")})
    assert main(["export", str(path), str(tmp_path / "out.parquet")]) == 2


# DistillKit.


@pytest.fixture
def packed(capture: Capture, teacher: Path, ragged: Path) -> Path:
    return capture(teacher=teacher, dataset=ragged, packing=True, max_length=33, top_k=8)


def test_distillkits_columns_are_the_kept_values_and_the_tokens_without_the_last(packed: Path, tmp_path: Path) -> None:
    export(LogitsFile(packed), tmp_path / "rows", "distillkit")
    rows, file = load(tmp_path / "rows"), LogitsFile(packed)
    assert list(rows.features) == ["input_ids", "token_ids", "top_values"]
    for number, row in enumerate(rows.to_list()):
        kept = file.row(number)
        assert row["input_ids"] == kept["input_ids"][:32].tolist()
        assert row["token_ids"] == kept["kept_ids"].tolist()
        assert row["top_values"] == kept["kept_logprobs"].astype(float).tolist()


def test_distillkits_loss_over_the_columns_is_that_of_the_file(packed: Path, teacher: Path, tmp_path: Path) -> None:
    """As its `lossfuncs/kl.py` computes it with `symmetric_uniform`, entry t against the student's output at t."""
    export(LogitsFile(packed), tmp_path / "rows.parquet", "distillkit")
    rows, dataset = load(tmp_path / "rows.parquet").with_format("torch")[:4], LogitsDataset(packed)
    student = make_llama(num_hidden_layers=1).double()
    with torch.no_grad():
        logits_BTV = student(rows["input_ids"]).logits
        whole = collate([dataset[row] for row in range(4)])
        expected = DistillationLoss(dataset)(student(whole["input_ids"]).logits, whole)
    student_BTK = logits_BTV.log_softmax(-1).gather(-1, rows["token_ids"].long())
    teacher_BTK = rows["top_values"].double()
    missing = [torch.log1p(-kept.exp().sum(-1).clamp(1e-8, 1 - 1e-8)) for kept in (teacher_BTK, student_BTK)]
    total = (teacher_BTK.exp() * (teacher_BTK - student_BTK)).sum() + (
        missing[0].exp() * (missing[0] - missing[1])
    ).sum()
    assert expected.item() > 0.1
    assert total.item() / rows["input_ids"].numel() == pytest.approx(expected.item(), abs=1e-8)


@pytest.mark.parametrize(
    "options", [{}, {"packing": True, "max_length": 33, "completion_only": True}], ids=["ragged", "completions"]
)
def test_distillkit_takes_no_rows_of_which_it_would_train_the_wrong_positions(
    capture: Capture, teacher: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    data = [{"prompt": "say " * length, "completion": "nothing but this " * 9} for length in (3, 9, 4, 7)]
    file = LogitsFile(capture(teacher=teacher, dataset=write_jsonl(tmp_path / "rows.jsonl", data), **options))
    with pytest.raises(UsageError, match=r"needs packed rows of one length with all.*Capture with --packing, without"):
        export(file, tmp_path / "rows", "distillkit")
    assert not (tmp_path / "rows").exists()


def test_distillkit_takes_no_drawn_tokens(capture: Capture, teacher: Path, ragged: Path, tmp_path: Path) -> None:
    path = capture(teacher=teacher, dataset=ragged, packing=True, max_length=33, capture="sample", top_k=8)
    with pytest.raises(UsageError, match=r"The export for distillkit needs a file of --capture topk, .* sample"):
        export(LogitsFile(path), tmp_path / "rows", "distillkit")


def test_the_command_takes_the_format(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(packed), str(tmp_path / "rows"), "--format", "distillkit"]) == 0
    assert "token_ids" in load(tmp_path / "rows").features
    assert main(["export", str(packed), str(tmp_path / "other"), "--format", "megatron"]) == 2
    assert "invalid choice: 'megatron'" in capsys.readouterr().err.lower()


# The examples.


def example(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "examples" / f"{name}.yaml").read_text())


def test_axolotls_example_has_what_it_documents() -> None:
    """Of 0.19.0: `integrations/kd/args.py`, its README, and `docs/dataset-formats/tokenized.qmd`."""
    config = example("axolotl")
    kd = {"kd_trainer", "kd_ce_alpha", "kd_alpha", "kd_temperature", "kd_beta", "kd_normalize_topk"}
    assert {name for name in config if name.startswith("kd_")} <= kd
    assert (config["plugins"], config["kd_trainer"]) == (["axolotl.integrations.kd.KDPlugin"], True)
    assert (config["kd_temperature"], config["kd_normalize_topk"]) == (1.0, True)
    assert config["datasets"] == [{"path": "rows.parquet", "ds_type": "parquet", "type": None}]


def test_distillkits_example_has_what_it_documents() -> None:
    """Of 1.0.0: `configuration.py`, `compression/config.py` and `missing_probability.py`."""
    config = example("distillkit")
    run = {"project_name", "model", "dataset", "teacher", "sequence_length", "output_path", "loss_functions"}
    assert config.keys() == run | {"training_args"}
    assert config["dataset"] == {"train_dataset": {"disk_path": "rows"}, "prepacked": True}
    compressor = config["teacher"]["logprob_compressor"]
    assert config["teacher"].keys() == {"kind", "logprob_compressor"}
    assert compressor.keys() == {"d", "k", "exact_k", "residual_bins"}  # those that must be given
    assert compressor["k"] == compressor["exact_k"] == Config(teacher="t", dataset="d", output="o").top_k
    (loss,) = config["loss_functions"]
    assert loss["missing_probability_handling"] in ("zero", "symmetric_uniform")
    assert loss["function"] == "kl"
    assert config["training_args"]["remove_unused_columns"] is False
    assert config["training_args"].keys() <= {field.name for field in dataclasses.fields(SFTConfig)}


def test_the_examples_say_how_their_rows_are_made() -> None:
    for name in ("axolotl", "distillkit"):
        text = (ROOT / "examples" / f"{name}.yaml").read_text()
        (command,) = re.findall(r"python -m logitgen (export .*)", text)
        rows = command.split()[2]
        assert f": {rows}\n" in text


@pytest.mark.parametrize("form", ["axolotl", "distillkit", "maxtext"])
def test_nothing_is_written_of_a_damaged_file(
    form: str, capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = capture(teacher=teacher, dataset=ragged, packing=True, max_length=33, top_k=8)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    output = tmp_path / ("out.array_record" if form == "maxtext" else "out.parquet")
    capsys.readouterr()
    before = set(tmp_path.iterdir())
    assert main(["export", str(path), str(output), "--format", form]) == 2
    error = " ".join(capsys.readouterr().err.split())
    number = len(LogitsFile(path)) - 1
    assert re.search(rf"is damaged: row {number} has checksum \w+, expected \w+\. Copy it again\.$", error)
    assert set(tmp_path.iterdir()) == before
