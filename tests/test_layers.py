"""Hidden states of other layers: those of a direct forward pass for every family, wherever they are read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import make_llama, save_teacher, write_jsonl
from families import FAMILIES, ROWS, TREES, VOCAB, make
from files import changing
from torch import Tensor

from logitgen import DistillationLoss, FormatError, LogitsDataset, LogitsFile, UsageError, collate, distil
from logitgen.__main__ import main
from logitgen.file.states import layers_among
from logitgen.file.verify import _value_problems
from logitgen.rerun import rerun, sample_rows
from logitgen.split.batch import Pass
from logitgen.teacher.model import Teacher

Capture = Callable[..., Path]
CHOSEN = ["llama", "opt with projections", "gemma2 with both soft-caps", "falcon", "mamba", "qwen2.5 vl"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in ROWS])


@torch.no_grad()
def direct(model: Any, ids: list[int], layer: int) -> Tensor:
    """States of a layer at the captured positions of a row, [P, D]."""
    states: Tensor = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer]
    return states[0, :-1]


def printed(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_layers_are_those_of_a_direct_forward_pass(family: str) -> None:
    model = make(family)
    teacher = Teacher(model, VOCAB, with_head=True, layers=(0, 1))
    lines = [ROWS[0], ROWS[2]]
    padded_LT = np.array([ids + [0] * (23 - len(ids)) for ids in lines])
    slots = np.concatenate([np.arange(22), 23 + np.arange(16)])
    chunks = list(teacher.logits([Pass(padded_LT)], slots))
    assert [set(hidden) for _, _, hidden in chunks] == [{"hidden", "hidden_0", "hidden_1"}] * len(chunks)
    assert teacher.head_form
    for layer in (0, 1):
        found_PD = torch.cat([hidden[f"hidden_{layer}"] for _, _, hidden in chunks])
        expected_PD = torch.cat([direct(model, ids, layer) for ids in lines])
        assert teacher.head_form.widths[f"hidden_{layer}"] == expected_PD.shape[1]
        torch.testing.assert_close(found_PD, expected_PD, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("encoding", ["plain", "packed"])
@pytest.mark.parametrize("family", CHOSEN)
def test_the_file_holds_the_layers_of_a_direct_forward_pass(
    family: str, encoding: str, capture: Capture, tmp_path: Path, data: Path
) -> None:
    model = make(family)
    folder = save_teacher(tmp_path / "teacher", model, None)
    options = {"teacher": folder, "dataset": data, "capture": "hidden", "encoding": encoding, "batch_tokens": 64}
    path = capture(**options, layers="1, 0")
    file, alone = LogitsFile(path), LogitsFile(capture(**options, output=tmp_path / "alone.h5"))
    assert file.attributes["settings"]["layers"] == "0,1"
    for row, ids in enumerate(ROWS):
        found = file.row(row)
        for name, values in alone.row(row).items():
            assert values.tobytes() == found[name].tobytes()
        for layer in (0, 1) if len(ids) > 1 else ():
            expected_PD = direct(model, ids, layer).numpy()
            room = 0 if encoding == "plain" else 127.5 / 127**2 * np.abs(expected_PD).max(1, keepdims=True)
            off_PD = np.abs(found[f"hidden_{layer}"] - expected_PD)
            assert (off_PD <= room + 1e-5 + 1e-4 * np.abs(expected_PD)).all()
    assert main(["verify", str(path)]) == 0
    assert main(["verify", str(path), "--teacher"]) == 0


def test_rows_that_share_prefixes_have_the_layers_of_whole_rows(
    capture: Capture, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make("llama")
    folder = save_teacher(tmp_path / "teacher", model, None)
    trees = write_jsonl(tmp_path / "trees.jsonl", [{"input_ids": ids} for ids in TREES])
    path = capture(teacher=folder, dataset=trees, capture="hidden", layers="0,1", batch_tokens=256)
    file = LogitsFile(path)
    assert file.attributes["computation"]["prefixes"] == "read once"
    for row, ids in enumerate(TREES):
        for layer in (0, 1):
            np.testing.assert_allclose(file.row(row)[f"hidden_{layer}"], direct(model, ids, layer), atol=1e-4)
    assert main(["verify", str(path), "--teacher"]) == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layers_are_stored_in_the_teachers_dtype(
    dtype: str, capture: Capture, teacher: Path, ragged: Path, tmp_path: Path
) -> None:
    path = capture(teacher=teacher, dataset=ragged, capture="hidden", layers="0", dtype=dtype, limit=9)
    with h5py.File(path) as file:
        assert file["hidden_0"].dtype == file["hidden"].dtype
    model = make_llama().to(getattr(torch, dtype))
    for row in LogitsDataset(path):
        expected_PD = model.get_input_embeddings()(row["input_ids"][:-1]).float()
        assert torch.equal(row["hidden_0"], expected_PD)


def test_a_family_that_adds_up_in_float32_has_its_layers_rounded_to_its_dtype() -> None:
    model = make("mamba").to(torch.bfloat16)
    expected_PD = direct(model, ROWS[0], 1)
    assert expected_PD.dtype == torch.float32
    ((_, _, hidden),) = Teacher(model, VOCAB, layers=(1,)).logits([Pass(np.array([ROWS[0]]))], np.arange(22))
    assert hidden["hidden_1"].dtype == torch.bfloat16
    torch.testing.assert_close(hidden["hidden_1"].float(), expected_PD, rtol=2**-8, atol=1e-6)


def test_a_teacher_without_such_states_is_refused() -> None:
    model = make("llama")
    whole = model.forward
    model.forward = lambda *args, **options: whole(*args, **options | {"output_hidden_states": False})
    message = r"^The teacher's body does not return the hidden states of layer 1, one per token, with transformers "
    with pytest.raises(UsageError, match=message):
        Teacher(model, VOCAB, layers=(1,))


@pytest.mark.parametrize("layers", ["2", "0,2", "1,999999"])
def test_a_layer_that_the_teacher_does_not_have_is_refused_before_it_is_loaded(
    layers: str, capture: Capture, teacher: Path, ragged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("logitgen.generate.load_model", None)
    most = layers.split(",")[-1]
    message = rf"^--layers must be below the teacher's number of layers 2, got {most}\. The state after the last one"
    with pytest.raises(UsageError, match=message):
        capture(teacher=teacher, dataset=ragged, capture="hidden", layers=layers)


def test_a_resumed_run_must_have_the_same_layers(capture: Capture, teacher: Path, ragged: Path) -> None:
    options = {"teacher": teacher, "dataset": ragged, "capture": "hidden"}
    capture(**options, layers="0")
    with pytest.raises(UsageError, match=r"Its values and this run's differ: --layers 0 and 0,1\."):
        capture(**options, layers="0,1")
    with pytest.raises(UsageError, match=r"Its values and this run's differ: --layers 0 and None\."):
        capture(**options)


@pytest.mark.parametrize("encoding", ["plain", "packed"])
def test_a_layer_that_differs_from_the_teachers_is_found(
    encoding: str, capture: Capture, teacher: Path, ragged: Path
) -> None:
    """Also by little, and beside another that does not."""
    file = LogitsFile(capture(teacher=teacher, dataset=ragged, capture="hidden", layers="0,1", encoding=encoding))
    own, rows = Teacher(make_llama(), 384, layers=(0, 1)), sample_rows(file, 99)
    assert rerun(file, own, rows).layers < 1e-3
    name = "hidden_1" if encoding == "plain" else "hidden_1_scale"
    file.arrays[name] = file.arrays[name].copy()
    file.arrays[name] += 1 if encoding == "packed" else 0.01 * np.abs(file.arrays[name]).max()
    compared = rerun(file, own, rows)
    assert 0.003 < compared.layers < 0.1
    assert compared.problems == ["the teacher's hidden states of other layers differ from the stored ones"]


def test_a_changed_layer_has_another_checksum(
    capture: Capture, teacher: Path, ragged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = capture(teacher=teacher, dataset=ragged, capture="hidden", layers="0,1")
    with h5py.File(path) as file:
        place, row = file["hidden_1"].id.get_offset(), int(np.flatnonzero(np.diff(file["position_offsets"]))[0])
    with path.open("r+b") as plain:
        plain.seek(place)
        plain.write(b"\x01")
    capsys.readouterr()
    assert main(["verify", str(path)]) == 1
    assert f"row {row} has checksum" in printed(capsys)


@pytest.mark.parametrize("encoding", ["plain", "packed"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_layers_of_other_batches_are_near_enough(
    dtype: str, encoding: str, capture: Capture, teacher: Path, ragged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"capture": "hidden", "layers": "0,1", "dtype": dtype, "encoding": encoding, "batch_tokens": 300}
    path = capture(teacher=teacher, dataset=ragged, **options)
    capsys.readouterr()
    assert main(["verify", str(path), "--teacher"]) == 0
    assert "layers hidden states of 0, 1 differ by 0.0" in printed(capsys)


def test_a_layer_that_is_not_finite_is_found(capture: Capture, teacher: Path, ragged: Path) -> None:
    path = capture(teacher=teacher, dataset=ragged, capture="hidden", layers="1")
    file = LogitsFile(path)
    file.arrays["hidden_1"] = file.arrays["hidden_1"].copy()
    file.arrays["hidden_1"][3, 5] = np.nan
    faults = [fault for row in range(len(file)) for fault in _value_problems(file.row(row), file.layout)]
    assert faults == ["has hidden states that are not finite"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(5, "<f4"), r"hidden_0 is float32\[5\], expected two axes, not empty"),
        (np.zeros((3, 32), "<f4"), r"hidden_0 is float32\[3, 32\], expected float32\[\d+, 32\]"),
        (None, r"hidden_1 starts at the wrong byte"),
    ],
    ids=["one axis", "too short", "missing"],
)
def test_a_damaged_dataset_of_a_layer_is_named(
    values: np.ndarray | None, message: str, capture: Capture, teacher: Path, ragged: Path
) -> None:
    path = capture(teacher=teacher, dataset=ragged, capture="hidden", layers="0,1", limit=9)
    with changing(path) as file:
        del file["hidden_0"]
        if values is not None:
            file["hidden_0"] = values
    with pytest.raises(FormatError, match=rf"out\.h5 is damaged: {message}"):
        LogitsFile(path)


def test_rows_and_batches_have_the_layers_by_their_names(capture: Capture, teacher: Path, ragged: Path) -> None:
    dataset = LogitsDataset(capture(teacher=teacher, dataset=ragged, capture="hidden", layers="1", limit=9))
    rows = list(dataset)
    batch = collate(rows)
    assert batch["hidden_1"].dtype == torch.float32
    assert torch.equal(batch["hidden_1"][batch["captured"]], torch.cat([row["hidden_1"] for row in rows]))
    assert not batch["hidden_1"][~batch["captured"]].any()


def test_a_student_trains_as_from_a_file_without_layers(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path
) -> None:
    options = {"teacher": teacher, "dataset": ragged, "capture": "hidden", "limit": 9}
    paths = [capture(**options), capture(**options, layers="0,1", output=tmp_path / "layers.h5")]
    losses = []
    for path in paths:
        dataset = LogitsDataset(path)
        student = distil(make_llama(num_hidden_layers=1), dataset)
        losses.append(student(**collate(list(dataset))).loss.item())
        assert DistillationLoss(dataset)
    assert losses[0] == losses[1]


def test_files_of_other_layers_are_not_joined(capture: Capture, teacher: Path, ragged: Path, tmp_path: Path) -> None:
    options = {"teacher": teacher, "dataset": ragged, "capture": "hidden", "limit": 5}
    paths = [capture(**options, layers=layers, output=tmp_path / f"{layers}.h5") for layers in ("0", "0,1")]
    with pytest.raises(FormatError, match=r"must have the layers of \S+0\.h5: expected 0, got 0,1\."):
        LogitsDataset(paths)


def test_inspect_names_the_layers(
    capture: Capture, teacher: Path, ragged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = capture(teacher=teacher, dataset=ragged, capture="hidden", layers="0,1", encoding="packed")
    capsys.readouterr()
    assert main(["inspect", str(path)]) == 0
    assert "hidden states (layers 0, 1, last), packed" in printed(capsys)
    assert main(["inspect", str(path), "--json"]) == 0
    known = json.loads(capsys.readouterr().out)
    assert known["bytes_per_position"] == 2 + 3 * (32 + 2)
    assert known["settings"]["layers"] == "0,1"
    assert main(["inspect", str(path), "--row", "1"]) == 0


def test_layers_are_found_by_the_names_of_datasets() -> None:
    names = ["hidden", "hidden_10", "hidden_2", "hidden_2_scale", "hidden_scale", "hidden_x", "head_weight"]
    assert layers_among(names) == [2, 10]
