"""Hidden states and the head in the file give back the model's own logits, for every family; others are refused."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import enlarge_weights, make_llama, save_teacher, write_jsonl
from families import FAMILIES, ROWS, USUAL, VOCAB, DoublingLlama, make
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from logitgen import DistillationLoss, FormatError, LogitsDataset, LogitsFile, UsageError, collate
from logitgen import head as head_module
from logitgen.file.header import create
from logitgen.file.layout import Layout
from logitgen.file.states import HeadForm
from logitgen.head import Head, restored, stored
from logitgen.teacher.model import Teacher

Capture = Callable[..., Path]
SCALES = {
    "cohere with a logit scale": 0.25,
    "granite with a logits scaling": 0.25,
}
SOFT_CAPS = {"gemma2": 3.0, "gemma3 with a soft-cap": 3.0, "gemma4": 3.0}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in ROWS])


def capped(family: str) -> float:
    return next((cap for name, cap in SOFT_CAPS.items() if family.startswith(name)), 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_head_is_found_with_its_scale_and_soft_cap(family: str) -> None:
    model = make(family)
    head = Teacher(model, VOCAB, with_head=True).head
    assert head
    assert head.scale == SCALES.get(family, 1.0)
    assert head.soft_cap == capped(family)
    assert (head.bias_V is not None) == (family == "phi")
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        hidden_TD = model.base_model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(head(hidden_TD), model(input_ids=ids).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "family", ["llama", "llama with a tied head", *SCALES, *(name for name in FAMILIES if capped(name)), "phi"]
)
def test_the_file_gives_back_the_models_own_logits(family: str, capture: Capture, tmp_path: Path, data: Path) -> None:
    model = make(family)
    if family == "phi":
        torch.nn.init.normal_(model.lm_head.bias)
    folder = save_teacher(tmp_path / "teacher", model, None)
    dataset = LogitsDataset(capture(teacher=folder, dataset=data, capture="hidden", batch_tokens=64))
    assert dataset.head
    for row, ids in zip(dataset, ROWS, strict=True):
        with torch.no_grad():
            expected_TV = model(input_ids=torch.tensor([ids])).logits[0, :-1]
        logits_PV = dataset.head(row["hidden"])
        torch.testing.assert_close(logits_PV, expected_TV, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(row["logsumexp"], logits_PV.logsumexp(-1), rtol=1e-4, atol=1e-4)


def test_a_head_is_the_same_however_many_of_its_rows_are_written_at_once(
    capture: Capture, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"teacher": save_teacher(tmp_path / "teacher", make("phi"), None), "dataset": data, "capture": "hidden"}
    whole = capture(**options, output=tmp_path / "whole.h5")
    monkeypatch.setattr(head_module, "_BLOCK_ROWS", 20)  # of 97: four blocks and a rest
    assert capture(**options, output=tmp_path / "blocks.h5").read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    ("dtype", "stored", "tolerance"),
    [("float32", "<f4", 1e-5), ("float16", "<f2", 2e-2), ("bfloat16", "<u2", 0.2)],
)
def test_the_teachers_precision_is_kept_bit_by_bit(
    dtype: str, stored: str, tolerance: float, capture: Capture, teacher: Path, ragged: Path
) -> None:
    path = capture(teacher=teacher, dataset=ragged, capture="hidden", dtype=dtype, limit=12)
    model = LlamaForCausalLM.from_pretrained(teacher, dtype=getattr(torch, dtype))
    with h5py.File(path) as file:
        assert file["hidden"].dtype == file["head_weight"].dtype == np.dtype(stored)
        assert file["head_weight"][...].tobytes() == model.lm_head.weight.detach().view(torch.uint8).numpy().tobytes()
        assert file.attrs["head_scale"] == 1
        assert file.attrs["head_soft_cap"] == 0
    dataset = LogitsDataset(path)
    head = dataset.head
    assert head
    assert head.weight_VD.dtype == getattr(torch, dtype)
    exact = head.to("cpu", torch.float32)
    row = dataset[11]
    assert row["hidden"].dtype == torch.float32
    assert torch.equal(row["hidden"], row["hidden"].to(getattr(torch, dtype)).float())
    with torch.no_grad():
        expected_TV = model(input_ids=row["input_ids"][None]).logits[0, :-1].float()
    assert (exact(row["hidden"]) - expected_TV).abs().max() < tolerance * expected_TV.abs().max()


def test_a_head_is_a_product_a_scale_and_a_soft_cap() -> None:
    generator = np.random.default_rng(0)
    hidden, weight, bias = (generator.normal(size=shape).astype("f4") for shape in ((5, 3), (7, 3), 7))
    head = Head(weight_VD=torch.tensor(weight), bias_V=torch.tensor(bias), scale=0.5, soft_cap=2.0)
    expected = 2 * np.tanh(0.5 * (hidden.astype("f8") @ weight.T + bias) / 2)
    np.testing.assert_allclose(head(torch.tensor(hidden)), expected, rtol=1e-5, atol=1e-6)
    low = head.to("cpu", torch.bfloat16)
    assert low.weight_VD.dtype == low.bias_V.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert low(torch.tensor(hidden)).dtype == torch.float32
    np.testing.assert_allclose(low(torch.tensor(hidden)), expected, atol=0.05)


class AfterTheProduct(LlamaForCausalLM):
    """Bends its logits in a way that is neither a scale nor a soft-cap."""

    def forward(self, **options: Any) -> Any:
        output = super().forward(**options)
        output.logits = output.logits.clamp(min=-1)
        return output


class BeforeTheProduct(LlamaForCausalLM):
    """Does something to the hidden states of which the body knows nothing."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.5,))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (DoublingLlama, "body and head cannot be run apart"),
        (AfterTheProduct, "something else is done to the logits after the product"),
        (BeforeTheProduct, "something is done to the hidden states before the product"),
    ],
)
def test_a_teacher_whose_head_is_something_else_is_refused(kind: type[LlamaForCausalLM], reason: str) -> None:
    model = enlarge_weights(kind(LlamaConfig(**USUAL)))
    Teacher(model, VOCAB)
    message = rf"^--capture hidden needs a teacher whose logits .*; with this one {reason}\. Use another --capture\.$"
    with pytest.raises(UsageError, match=message):
        Teacher(model, VOCAB, with_head=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_head_of_another_precision_than_can_be_stored_is_refused(dtype: torch.dtype) -> None:
    model = make_llama(VOCAB).to(dtype)
    if dtype != torch.float64:
        model.lm_head.float()
        model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    with pytest.raises(
        UsageError, match=r"are .*float(32|64), expected one of float32, float16, bfloat16 \(see --dtype\)\. Use"
    ):
        Teacher(model, VOCAB, with_head=True)


def test_a_refusal_leaves_no_file(capture: Capture, tmp_path: Path, data: Path) -> None:
    folder = save_teacher(tmp_path / "teacher", make_llama(VOCAB).double(), None)
    with pytest.raises(UsageError, match="--capture hidden needs"):
        capture(teacher=folder, dataset=data, capture="hidden")
    assert not list(tmp_path.glob("out.h5*"))


def test_a_batch_holds_the_hidden_states_at_their_positions(capture: Capture, teacher: Path, ragged: Path) -> None:
    dataset = LogitsDataset(capture(teacher=teacher, dataset=ragged, capture="hidden", dtype="bfloat16", limit=20))
    rows = [dataset[number] for number in (3, 1, 19)]
    batch = collate(rows)
    assert batch["hidden"].dtype == torch.float32
    assert batch["hidden"].shape == (3, max(len(row["input_ids"]) for row in rows), 32)
    assert torch.equal(batch["hidden"][batch["captured"]], torch.cat([row["hidden"] for row in rows]))
    assert not batch["hidden"][~batch["captured"]].any()


def test_other_captures_have_no_head(capture: Capture, teacher: Path, ragged: Path) -> None:
    assert LogitsDataset(capture(teacher=teacher, dataset=ragged, limit=5)).head is None


def test_opening_a_file_does_not_read_its_head(tmp_path: Path) -> None:
    form = HeadForm(hidden_size=64, dtype=np.dtype("<f4"), has_bias=False)
    sizes = {"num_rows": 1, "num_tokens": 2, "num_positions": 1, "vocab_size": 2**16, "top_k": 0}
    layout = Layout(capture="hidden", head=form, **sizes)
    from files import plain_attributes

    about = {"capture": "hidden", "top_k": 0, "vocab_size": 2**16, "teacher_dtype": "float32"}
    head = {"head_scale": 0.1, "head_soft_cap": 30.0, "head_crc32": 0}
    create(tmp_path / "out.h5", layout, plain_attributes(**about, **head))
    with h5py.File(tmp_path / "out.h5", "r+") as file:
        file["done"][0], file["offsets"][...], file["position_offsets"][...] = 1, [0, 2], [0, 1]
        file["input_ids"][...], file["positions"][...] = [1, 2], [0]
        file["head_weight"][5, 7] = 3
    tracemalloc.start()
    try:
        dataset = LogitsDataset(tmp_path / "out.h5")
        assert dataset[0]["hidden"].shape == (1, 64)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        read = dataset.head
        assert read
    finally:
        tracemalloc.stop()
    assert read.weight_VD[5, 7] == 3
    assert (read.scale, read.soft_cap) == (0.1, 30.0)  # exactly


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_scale": float("nan")}, "head_scale must be finite"),
        ({"head_soft_cap": -1.0}, "head_soft_cap finite and at least 0"),
        ({"head_soft_cap": float("inf")}, "head_soft_cap finite and at least 0"),
        ({"head_crc32": "text"}, "attribute head_crc32 is missing or not int"),
        ({"teacher_dtype": "float64"}, "teacher_dtype must be one of float32, float16, bfloat16"),
        ({"encoding": "packed16"}, "encoding must be one of plain, packed"),
        ({"encoding": "packed"}, "target_logprob is float32"),
    ],
)
def test_what_a_file_says_of_its_head_is_checked(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    from files import plain_attributes

    form = HeadForm(hidden_size=4, dtype=np.dtype("<f4"), has_bias=False)
    layout = Layout(capture="hidden", num_rows=1, num_tokens=2, num_positions=1, vocab_size=10, top_k=0, head=form)
    about = {"capture": "hidden", "top_k": 0, "teacher_dtype": "float32", "head_scale": 1.0, "head_soft_cap": 0.0}
    create(tmp_path / "out.h5", layout, plain_attributes(**{**about, "head_crc32": 0, **changes}))
    with pytest.raises(FormatError, match=message):
        LogitsFile(tmp_path / "out.h5", partial=True)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_packed_states_are_the_plain_ones_within_half_a_step(
    dtype: str, capture: Capture, teacher: Path, ragged: Path, tmp_path: Path
) -> None:
    options = {"teacher": teacher, "dataset": ragged, "capture": "hidden", "dtype": dtype}
    plain = LogitsFile(capture(**options))
    packed = LogitsFile(capture(**options, encoding="packed", output=tmp_path / "packed.h5"))
    for name in ("head_weight", "positions"):
        assert packed.arrays[name].tobytes() == plain.arrays[name].tobytes()
    assert packed.arrays["target_logprob"].tobytes() == plain.arrays["target_logprob"].astype("<f2").tobytes()
    assert packed.layout.bytes_per_position == 2 + 32 + 2
    errors = []
    for row in range(len(plain)):
        exact_PD, found_PD = plain.row(row)["hidden"].astype(np.float64), packed.row(row)["hidden"]
        assert found_PD.dtype == np.float32
        largest_P1 = np.abs(exact_PD).max(1, keepdims=True, initial=0)  # D = 32 is a single group
        errors.append(np.abs(found_PD - exact_PD) / largest_P1)
        code_PD = np.sqrt(np.abs(found_PD) / largest_P1) * 127
        assert (errors[-1] <= (code_PD + 0.5) / 127**2 * 1.01).all()
    assert np.concatenate(errors).mean() > 5e-4  # it is rounded indeed


def test_h5py_alone_reads_packed_states(capture: Capture, teacher: Path, ragged: Path) -> None:
    path = capture(teacher=teacher, dataset=ragged, capture="hidden", encoding="packed", limit=9)
    with h5py.File(path) as file:
        codes, bits = file["hidden"][...], file["hidden_scale"][...]
    expected = [
        [struct.unpack(">f", struct.pack(">I", int(bits[at, 0]) << 16))[0] * code * abs(code) / 127**2 for code in line]
        for at, line in enumerate(codes.tolist())
    ]
    rows = LogitsDataset(path)
    np.testing.assert_allclose(torch.cat([row["hidden"] for row in rows]), expected, rtol=1e-6)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_students_loss_from_packed_states_is_that_from_plain_ones(
    divergence: Any, capture: Capture, teacher: Path, ragged: Path, tmp_path: Path
) -> None:
    """As near as the distributions are: by their distance, times the largest slope of a divergence there."""
    options = {"teacher": teacher, "dataset": ragged, "capture": "hidden", "limit": 12}
    paths = [capture(**options), capture(**options, encoding="packed", output=tmp_path / "packed.h5")]
    student = make_llama(num_hidden_layers=1)
    values, logprobs = [], []
    for path in paths:
        dataset = LogitsDataset(path)
        batch = collate(list(dataset))
        with torch.no_grad():
            logits = student(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        values.append(DistillationLoss(dataset, divergence=divergence)(logits, batch).item())
        assert dataset.head
        logprobs.append(dataset.head(batch["hidden"][batch["captured"]]).double().log_softmax(-1))
    exact_PV, packed_PV = logprobs
    kl = (exact_PV.exp() * (exact_PV - packed_PV)).sum(-1).mean().item()
    assert 1e-8 < kl < 1e-2
    student_PV = logits[batch["captured"]].double().log_softmax(-1)
    distance_P = (exact_PV.exp() - packed_PV.exp()).abs().sum(-1)
    slope_P = 1 + (exact_PV - student_PV).abs().amax(-1) + (packed_PV - student_PV).abs().amax(-1)
    change_P = (exact_PV - packed_PV).abs().amax(-1)  # reverse: the student's weights of changed log-probs
    assert values[0] != values[1]
    assert abs(values[0] - values[1]) <= (distance_P * slope_P + change_P).mean().item()


def test_gradients_reach_what_is_compared_with_the_logits() -> None:
    head = Head(weight_VD=torch.ones(3, 2), bias_V=None, scale=1.0, soft_cap=0.0)
    student: Tensor = torch.zeros(1, 3, requires_grad=True)
    (student.log_softmax(-1) * head(torch.ones(1, 2)).softmax(-1)).sum().backward()
    assert student.grad is not None


def test_a_head_from_a_file_lies_where_torchs_own_tensors_do(tmp_path: Path) -> None:
    for dtype, name in (("<f4", "float32"), ("<f2", "float16"), ("<u2", "bfloat16")):
        mapped = np.memmap(tmp_path / name, np.uint8, "w+", shape=8001)[1:].view(dtype)
        mapped[:3] = 1
        assert not mapped.flags.aligned
        tensor = restored(mapped, name)
        assert tensor.data_ptr() % 64 == 0
        assert stored(tensor).numpy().tobytes() == mapped.tobytes()
