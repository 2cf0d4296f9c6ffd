"""The teacher's identity: nothing that changes a number stays unseen, nothing that does not is looked at."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, save_teacher, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, LlamaConfig, PreTrainedModel

from logitgen import LogitsFile, UsageError
from logitgen.__main__ import main
from logitgen.teacher.identity import (
    _hash,
    _hash_of_part,
    _sum,
    _sum_on_cpu,
    describe_adapters,
    describe_config,
    fingerprint,
    weights_of,
)
from logitgen.teacher.model import Teacher

Capture = Callable[..., Path]

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.uint8, torch.bool]
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def some_weight(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(3)) * 5
    return (
        (values > 0)
        if dtype == torch.bool
        else values.to(torch.int32).to(dtype)
        if dtype.itemsize == 1
        else values.to(dtype)
    )


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.bool])
def test_every_bit_of_every_value_counts(dtype: torch.dtype) -> None:
    weight = some_weight(dtype, 5, 3)
    bits = weight.view(BITS[dtype.itemsize])
    seen = {_hash(weight)}
    for place in range(15):
        for bit in range(8 * dtype.itemsize):
            flip = torch.tensor(1).bitwise_left_shift(torch.tensor(bit)).to(bits.dtype)
            bits.view(-1)[place] ^= flip
            seen.add(_hash(weight))
            bits.view(-1)[place] ^= flip
    assert len(seen) == 1 + 15 * 8 * dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES)
def test_changes_at_two_places_do_not_cancel_out(dtype: torch.dtype) -> None:
    weight = some_weight(dtype, 6, 4)
    others = [weight.flip(0), weight.flip(1), weight.roll(1), weight.t().contiguous().view(6, 4)]
    others += [-weight] if dtype.is_floating_point else []
    for first in range(24 if dtype.is_floating_point else 0):
        for second in range(first):
            signs = torch.ones(24)
            signs[[first, second]] = -1  # in float64 the highest bits of two numbers: their sum is 0 modulo 2**64
            others.append(weight * signs.view(6, 4).to(dtype))
    assert _hash(weight) not in {_hash(other) for other in others if not torch.equal(other, weight)}


@given(st.lists(st.integers(1, 8), min_size=1, max_size=4), st.data(), st.sampled_from(DTYPES))
def test_parts_add_up_to_the_whole_wherever_it_is_cut(
    shape: list[int], data: st.DataObject, dtype: torch.dtype
) -> None:
    weight = some_weight(dtype, *shape)
    before = weight.clone()
    whole = _hash_of_part(weight, tuple(shape), (0,) * len(shape))
    dimension = data.draw(st.integers(0, len(shape) - 1))
    cut = data.draw(st.integers(0, shape[dimension]))
    if dimension == len(shape) - 1 and shape[-1] * weight.element_size() % 8 == 0:
        cut -= cut % (8 // weight.element_size())  # as ranks do, or they join the weight
    offsets = [0] * len(shape)
    first = _hash_of_part(weight.narrow(dimension, 0, cut), tuple(shape), tuple(offsets))
    offsets[dimension] = cut
    second = _hash_of_part(weight.narrow(dimension, cut, shape[dimension] - cut), tuple(shape), tuple(offsets))
    assert torch.equal(first + second, whole)
    assert torch.equal(weight, before)


def test_scalars_empty_and_complex_weights_have_a_hash() -> None:
    for weight in (torch.tensor(3.5), torch.zeros(0, 4), torch.zeros(0), torch.tensor([1 + 2j, 3j])):
        assert _hash(weight) == _hash(weight.clone())
    assert _hash(torch.tensor([1 + 2j])) != _hash(torch.tensor([2 + 1j]))
    assert _hash(torch.tensor(3.5)) != _hash(torch.tensor(3.0))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("way", [_sum, _sum_on_cpu])
def test_cpu_and_gpu_add_up_the_words_as_whole_numbers_do(way: Callable[..., Any], dtype: torch.dtype) -> None:
    most = torch.iinfo(dtype).max
    words_RC = torch.tensor([[-most - 1, -1, 0, 5], [most, 3, most // 3, -7], [1, 2, -most // 5, most]], dtype=dtype)
    key_R, key_C = torch.tensor([2**62 + 1, -3, 7]), torch.tensor([5, -(2**63) + 1, 11, 2**40 + 1])
    expected = 0
    for row, key in zip(words_RC.tolist(), key_R.tolist(), strict=True):
        for word, other in zip(row, key_C.tolist(), strict=True):
            product = (word * 0x9E3779B97F4A7C15) % 2**64
            signed = product - 2**64 if product >= 2**63 else product
            expected += (signed ^ (signed >> 32)) * key * other
    assert int(way(words_RC, key_R, key_C)) % 2**64 == expected % 2**64


def test_a_tied_weight_is_hashed_once_and_a_changed_one_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_llama(tie_word_embeddings=True)
    hashed = list[int]()
    monkeypatch.setattr("logitgen.teacher.identity._hash", lambda tensor: hashed.append(tensor.data_ptr()) or 0)
    names = [name for name, _ in weights_of(model)]
    fingerprint(weights_of(model))
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(names)
    assert len(hashed) == len(set(hashed)) == len(names) - 1
    monkeypatch.undo()
    before = fingerprint(weights_of(model))
    with torch.no_grad():
        model.lm_head.weight[3, 1] += 1
    assert fingerprint(weights_of(model)) != before


def test_names_order_shapes_dtypes_and_adapters_count() -> None:
    weight = some_weight(torch.float32, 4, 3)
    prints = [
        fingerprint([("a", weight), ("b", weight)]),
        fingerprint([("b", weight), ("a", weight)]),
        fingerprint([("a", weight)]),
        fingerprint([("a", weight.view(3, 4)), ("b", weight)]),
        fingerprint([("a", weight.view(torch.int32)), ("b", weight)]),
        fingerprint([("a", weight), ("b", weight)], '{"default": {"lora_alpha": 16}}'),
    ]
    assert len(set(prints)) == len(prints)


def test_a_configuration_omits_names_versions_and_entries_without_effect() -> None:
    config = LlamaConfig(vocab_size=100, id2label={0: "x"}, num_hidden_layers=3)
    before = describe_config(config)
    assert before["vocab_size"] == 100
    assert before["num_hidden_layers"] == 3
    assert "rope_theta" in before["rope_parameters"]
    config._name_or_path, config.transformers_version, config.use_cache = "elsewhere", "6", False
    config.dtype = torch.bfloat16
    assert describe_config(config) == before
    for name, value in (("rms_norm_eps", 1e-3), ("hidden_act", "gelu"), ("attention_bias", True), ("pad_token_id", 7)):
        assert describe_config(LlamaConfig(vocab_size=100, num_hidden_layers=3, **{name: value})) != before
    longer = describe_config(LlamaConfig(some_list=list(range(1000))))
    assert longer["some_list"].startswith("SHA-256 ")
    assert longer != describe_config(LlamaConfig(some_list=list(range(999))))


class Adapter:
    def __init__(self, **values: Any) -> None:
        self.values = {"target_modules": {"q", "v"}, "r": 8, "base_model_name_or_path": "there", **values}

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)


def adapted(**values: Any) -> PreTrainedModel:
    model = make_llama()
    model.peft_config = {"default": Adapter(**values)}
    return model


def test_an_adapters_scale_counts_and_where_it_came_from_does_not() -> None:
    def of(**values: Any) -> str:
        return describe_adapters(adapted(**values))

    assert of(lora_alpha=16) == of(lora_alpha=16, base_model_name_or_path="elsewhere")
    assert of(lora_alpha=16) != of(lora_alpha=32)
    assert describe_adapters(make_llama()) == ""


def test_a_teacher_with_another_scale_of_its_adapter_is_another_teacher() -> None:
    vocab_size = make_llama().config.vocab_size
    prints = [Teacher(adapted(lora_alpha=alpha), vocab_size).fingerprint for alpha in (16, 16, 32)]
    assert prints[0] == prints[1] != prints[2]


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Any]:
    rows = [{"input_ids": [(7 * row + 3 * index) % 384 for index in range(9)]} for row in range(6)]
    folder = save_teacher(tmp_path / "teacher", make_llama(), None)
    return {"teacher": folder, "dataset": write_jsonl(tmp_path / "rows.jsonl", rows), "top_k": 5}


CHANGES = {
    "rope_theta": ("rope_parameters", {"rope_type": "default", "rope_theta": 77.0}),
    "an epsilon": ("rms_norm_eps", 0.01),
    "the activation": ("hidden_act", "gelu"),
    "YaRN": (
        "rope_parameters",
        {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
    ),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_run_is_not_resumed_after_a_change_in_the_teachers_configuration(
    capture: Capture, inputs: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    from logitgen.leader.output import Output

    def stop(output: Output) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Output, "done", stop)
        with pytest.raises(KeyboardInterrupt):
            capture(**inputs)
    partial = (tmp_path / "out.h5.partial").read_bytes()
    path, (name, value) = inputs["teacher"] / "config.json", CHANGES[kind]
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UsageError, match=rf"the teacher's {name} .* and "):
        capture(**inputs)
    assert (tmp_path / "out.h5.partial").read_bytes() == partial


def test_one_row_of_the_embedding_is_another_teacher(capture: Capture, inputs: dict[str, Any], tmp_path: Path) -> None:
    capture(**inputs)
    changed = make_llama()
    with torch.no_grad():
        changed.model.embed_tokens.weight[77, 5] += 1e-6
    save_teacher(inputs["teacher"], changed, None)
    other = capture(**inputs, output=tmp_path / "other.h5")
    first, second = (LogitsFile(path).attributes for path in (tmp_path / "out.h5", other))
    assert first["teacher_fingerprint"] != second["teacher_fingerprint"]
    assert first["teacher_config"] == second["teacher_config"]


def test_a_copy_of_a_teacher_elsewhere_is_the_same_teacher(
    capture: Capture, inputs: dict[str, Any], tmp_path: Path
) -> None:
    first = LogitsFile(capture(**inputs)).attributes
    copy = save_teacher(tmp_path / "copy", make_llama(), None)
    second = LogitsFile(capture(**inputs | {"teacher": copy}, output=tmp_path / "other.h5")).attributes
    same = ("teacher_fingerprint", "teacher_config", "computation")
    assert [first[name] for name in same] == [second[name] for name in same]
    assert first["computation"]["attention"] == "sdpa"
    assert first["computation"]["float32 products"] == "highest"
    assert first["teacher_config"] == describe_config(AutoConfig.from_pretrained(copy))


def test_verify_names_what_a_teachers_configuration_has_otherwise(
    capture: Capture, inputs: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture(**inputs)
    path = inputs["teacher"] / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1.1e-6})
    )  # nobody would see it in numbers
    assert main(["verify", str(tmp_path / "out.h5"), "--teacher", str(inputs["teacher"])]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "the teacher's rms_norm_eps is 1.1e-06, in the file 1e-06" in shown
