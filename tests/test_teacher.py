"""Every family of causal language models gives the logits of a direct, unbatched, unpadded forward pass."""

import json
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from conftest import enlarge_weights, make_llama, save_teacher, write_jsonl
from families import (
    FAMILIES,
    READ_BY_ANOTHER_CLASS,
    ROWS,
    SEEING,
    USUAL,
    VOCAB,
    DoublingLlama,
    assert_row_is_right,
    make,
)
from launches import drawn
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from logitgen import LogitsFile, UsageError
from logitgen.config import Config
from logitgen.facts import facts
from logitgen.report import overview
from logitgen.split.batch import Pass
from logitgen.teacher import model as teacher
from logitgen.teacher.describe import describe_teacher
from logitgen.teacher.model import Teacher, load_model
from logitgen.teacher.probes import close


@pytest.mark.parametrize("family", [*FAMILIES, *READ_BY_ANOTHER_CLASS])
def test_every_kept_logprob_equals_a_direct_forward_pass(
    family: str, tmp_path: Path, capture: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "CHUNK_LOGITS", 5 * VOCAB)  # several chunks per batch, the last one not full
    model = make(family)
    folder = save_teacher(tmp_path / "teacher", model, None)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in ROWS])
    file = LogitsFile(capture(teacher=folder, dataset=data, top_k=11, batch_tokens=64))
    for index, ids in enumerate(ROWS):
        row = file.row(index)
        assert row["input_ids"].tolist() == ids
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([ids])).logits[0].float()
        np.testing.assert_allclose(row["logsumexp"], logits_TV[: len(ids) - 1].logsumexp(-1), atol=1e-3)
        if len(ids) > 1:
            assert_row_is_right(row, logits_TV.log_softmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_needs_the_full_logits_of_a_batch(
    family: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher, "CHUNK_LOGITS", 5 * VOCAB)
    model = make(family)
    wrapped = Teacher(model, VOCAB)
    assert "cannot be run in chunks" not in caplog.text
    widths: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: widths.append(output[0].shape[0])
    )
    slots = np.arange(20).reshape(2, 10)[:, :8].flatten()
    chunks = list(wrapped.logits([Pass(np.arange(20).reshape(2, 10))], slots))
    assert widths == [5, 5, 5, 1]
    assert [len(logits_CV) for _, logits_CV, _ in chunks] == [5, 5, 5, 1]


def test_a_model_whose_head_cannot_run_apart_is_run_whole(caplog: pytest.LogCaptureFixture) -> None:
    model = enlarge_weights(DoublingLlama(transformers.LlamaConfig(**USUAL)))
    wrapped = Teacher(model, VOCAB)
    assert "cannot be run in chunks, its logits differ" in caplog.text
    input_ids_BT = torch.arange(20).view(2, 10)
    chunks = wrapped.logits([Pass(input_ids_BT.numpy())], np.arange(20))
    logits_PV = torch.cat([logits_CV for _, logits_CV, _ in chunks])
    with torch.no_grad():
        torch.testing.assert_close(logits_PV, model(input_ids=input_ids_BT).logits.flatten(0, 1))


def test_a_model_that_looks_at_later_tokens_is_refused() -> None:
    bert = transformers.BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(UsageError, match="logits depend on later tokens: it is no causal language model"):
        Teacher(enlarge_weights(AutoModelForCausalLM.from_config(bert)), VOCAB)


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_masked_token_does_not_hide_that_the_head_cannot_run_apart(
    masked: float, caplog: pytest.LogCaptureFixture
) -> None:
    model = enlarge_weights(DoublingLlama(transformers.LlamaConfig(**USUAL)))
    model.lm_head.register_forward_hook(
        lambda module, inputs, output: output.index_fill(-1, torch.tensor([7]), masked / 2)
    )
    Teacher(model, VOCAB)
    assert "cannot be run in chunks" in caplog.text


@pytest.mark.parametrize(
    ("logits", "expected", "same"),
    [
        ([4.0, 1.0, -torch.inf], [4.0, 1.0, -torch.inf], True),
        ([4.0, 1.0, 0.5], [4.0, 1.0, -torch.inf], False),
        ([4.0, -torch.inf, 0.5], [4.0, 1.0, 0.5], False),
        ([4.0, 1.03, 0.5], [4.0, 1.0, 0.5], True),
        ([4.0, 1.05, 0.5], [4.0, 1.0, 0.5], False),
    ],
)
def test_logits_are_the_same_where_the_same_are_masked_and_the_rest_isclose(
    logits: list[float], expected: list[float], same: bool
) -> None:
    assert close(torch.tensor(logits), torch.tensor(expected), relative=0.01) is same


def config(**changes: Any) -> Config:
    return Config(**{"teacher": "t", "dataset": "d", "output": "o", **changes})


def test_a_missing_teacher_is_named() -> None:
    with pytest.raises(UsageError, match="--teacher nobody/nothing cannot be loaded: "):
        describe_teacher(config(teacher="nobody/nothing"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--teacher {tmp_path} has no config.json. Give the folder of a"):
        describe_teacher(config(teacher=str(tmp_path)))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere", "a/b/c"])
def test_a_missing_folder_is_not_taken_for_a_hub_id(name: str) -> None:
    with pytest.raises(UsageError, match=f"--teacher {name} does not exist. Give a folder or a hub id."):
        describe_teacher(config(teacher=name))


def test_weights_the_configuration_has_no_use_for_are_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_teacher(tmp_path, make_llama(VOCAB), None)
    transformers.LlamaConfig(**USUAL | {"num_hidden_layers": 1, "num_key_value_heads": 4}).save_pretrained(tmp_path)
    options = config(teacher=str(tmp_path))
    load_model(options, torch.device("cpu"))
    assert "9 weights its configuration has no use for: model.layers.1." in caplog.text


def test_a_model_that_is_no_causal_language_model_is_refused(tmp_path: Path) -> None:
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="is a vit model, which has no causal language model"):
        describe_teacher(config(teacher=str(tmp_path)))


def test_only_code_that_is_trusted_makes_another_model_a_causal_one(tmp_path: Path) -> None:
    """T5 is no causal language model of transformers; the code beside it may be one."""
    written = {"model_type": "t5", "vocab_size": 40, "auto_map": {"AutoModelForCausalLM": "model.Causal"}}
    (tmp_path / "config.json").write_text(json.dumps(written))
    with pytest.raises(UsageError, match="is a t5 model, which has no causal language model"):
        describe_teacher(config(teacher=str(tmp_path), top_k=4))
    assert describe_teacher(config(teacher=str(tmp_path), top_k=4, trust_remote_code=True)).vocab_size == 40


@pytest.mark.parametrize(("name", "sizes"), [("Pix2Struct", {}), ("Florence2", {})])
def test_an_encoder_with_a_decoder_is_refused(name: str, sizes: dict[str, Any], tmp_path: Path) -> None:
    getattr(transformers, f"{name}Config")(**sizes).save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="model, which has no causal language model"):
        describe_teacher(config(teacher=str(tmp_path)))


def test_a_model_that_reads_no_text_without_an_image_is_refused() -> None:
    text = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    blip = transformers.BlipConfig(text_config=text | {"encoder_hidden_size": 32}, vision_config=SEEING)
    model = enlarge_weights(transformers.BlipForConditionalGeneration(blip))
    with pytest.raises(UsageError, match=r"cannot be run on text alone: .*'pixel_values'\. Give a model that predicts"):
        Teacher(model, VOCAB)


@pytest.mark.parametrize("family", ["qwen2.5 vl with a tied head", "llava next", "qwen2 audio"])
def test_vocabulary_and_context_of_a_model_that_sees_are_those_of_its_text(family: str, tmp_path: Path) -> None:
    make(family).config.save_pretrained(tmp_path)
    info = describe_teacher(config(teacher=str(tmp_path)))
    assert (info.vocab_size, info.max_length) == (VOCAB, 64)
    with pytest.raises(UsageError, match="--top_k must be between 1 and the vocabulary size 97, got 98"):
        describe_teacher(config(teacher=str(tmp_path), top_k=98))


def test_a_token_that_stands_for_an_image_is_read_as_the_plain_forward_reads_it() -> None:
    """Some families embed it otherwise, even in rows of text."""
    model = make("gemma4 with embeddings per layer")
    wrapped = Teacher(model, VOCAB)
    ids_1T = torch.tensor([[7, model.config.image_token_id, 9, model.config.image_token_id]])
    chunks = wrapped.logits([Pass(ids_1T.numpy())], np.arange(4))
    with torch.no_grad():
        torch.testing.assert_close(torch.cat([logits for _, logits, _ in chunks]), model(input_ids=ids_1T).logits[0])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_a_checkpoint_with_another_head_is_refused(head: str, tied: bool, tmp_path: Path) -> None:
    sizes = LlamaConfig(**USUAL | {"tie_word_embeddings": tied})
    save_teacher(tmp_path, getattr(transformers, f"LlamaFor{head}")(sizes), None)
    with pytest.raises(UsageError, match=f"is a LlamaFor{head} by its config.json, whose head does not predict"):
        describe_teacher(config(teacher=str(tmp_path)))


@pytest.mark.parametrize(
    ("names", "is_refused"),
    [
        (["LlamaForRewardModel"], True),
        (["GPTNeoXRewardModel"], True),
        (["Qwen2ForProcessRewardModel"], True),
        (["LlamaForSequenceClassification", "LlamaForCausalLM"], False),
        (["RoFormerForCausalLM"], False),
        (["GPT2Model"], False),
        (["GPT2LMHeadModel"], False),
        (["IdeficsForVisionText2Text"], False),
        ([], False),
        (None, False),
    ],
)
def test_the_head_of_a_checkpoint_is_told_by_the_classes_it_names(
    names: list[str] | None, is_refused: bool, tmp_path: Path
) -> None:
    LlamaConfig(**USUAL | {"tie_word_embeddings": True}, architectures=names).save_pretrained(tmp_path)
    refused = pytest.raises(UsageError, match="whose head does not predict tokens") if is_refused else nullcontext()
    with refused:
        describe_teacher(config(teacher=str(tmp_path)))


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    model = make_llama(VOCAB)
    weights = {name: tensor for name, tensor in model.state_dict().items() if "layers.1.mlp" not in name}
    model.save_pretrained(tmp_path, state_dict=weights)
    options = config(teacher=str(tmp_path))
    with pytest.raises(UsageError, match=r"lacks 3 weights, model.layers.1.mlp.down_proj.weight the first"):
        load_model(options, torch.device("cpu"))


def test_a_family_that_transformers_cuts_wrongly_is_told_from_a_wrong_checkpoint(
    teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mismatch(*_: Any, **__: Any) -> None:
        raise RuntimeError("You set `ignore_mismatched_sizes` to `False`")  # Qwen3-VL's experts, in transformers 5.23

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", mismatch)
    for changes, end in (({}, r"says\.$"), ({"fsdp_size": 2}, "says, or transformers cannot cut them for --tp_size")):
        with pytest.raises(UsageError, match=f"its weights have other shapes than its config.json {end}"):
            load_model(config(teacher=str(teacher), **changes), torch.device("cpu"))


def test_an_unknown_attention_is_refused(teacher: Path) -> None:
    options = config(teacher=str(teacher), attn_implementation="telepathy")
    with pytest.raises(UsageError, match=r"--attn_implementation must be one of .*sdpa, got telepathy\."):
        describe_teacher(options)


def test_the_precision_is_the_saved_one_unless_another_is_asked_for(tmp_path: Path) -> None:
    save_teacher(tmp_path, make_llama(VOCAB).to(torch.bfloat16), None)
    for dtype, expected in (("auto", torch.bfloat16), ("float32", torch.float32), ("float16", torch.float16)):
        options = config(teacher=str(tmp_path), dtype=dtype)
        assert load_model(options, torch.device("cpu")).dtype == expected


def test_rows_may_be_as_long_as_the_teachers_context(teacher: Path) -> None:
    folder = str(teacher)
    assert describe_teacher(config(teacher=folder)).max_length == 256
    assert describe_teacher(config(teacher=folder, max_length=256)).max_length == 256
    assert describe_teacher(config(teacher=folder, max_length=9)).max_length == 9
    with pytest.raises(UsageError, match="--max_length must be at most the teacher's context length 256, got 257"):
        describe_teacher(config(teacher=folder, max_length=257))


def test_a_teacher_without_a_context_length_sets_no_limit(tmp_path: Path) -> None:
    make("mamba").config.save_pretrained(tmp_path)
    assert describe_teacher(config(teacher=str(tmp_path))).max_length is None


def test_top_k_may_be_the_whole_vocabulary_and_no_more(teacher: Path) -> None:
    folder = str(teacher)
    assert describe_teacher(config(teacher=folder, top_k=384)).vocab_size == 384
    assert describe_teacher(config(teacher=folder, top_k=385, capture="full")).vocab_size == 384
    with pytest.raises(UsageError, match="--top_k must be between 1 and the vocabulary size 384, got 385"):
        describe_teacher(config(teacher=folder, top_k=385))


def test_a_configuration_that_lies_about_the_vocabulary_is_refused() -> None:
    with pytest.raises(UsageError, match="logits are 97 wide, its configuration says 96"):
        Teacher(make_llama(VOCAB), 96)


def test_a_changed_weight_changes_the_fingerprint() -> None:
    model = make_llama(VOCAB)
    before = Teacher(model, VOCAB).fingerprint
    assert Teacher(make_llama(VOCAB), VOCAB).fingerprint == before
    with torch.no_grad():
        model.model.norm.weight *= 1.01
    assert Teacher(model, VOCAB).fingerprint != before


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_teacher_agrees_with_itself_and_is_recorded(
    tmp_path: Path, capture: Callable[..., Path], bits: int
) -> None:
    """Quantised by transformers, saved, and loaded as any other teacher."""
    plain = save_teacher(tmp_path / "plain", make_llama(hidden_size=64, intermediate_size=64), None)
    how = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, device_map={"": "cpu"}).eval()
    teacher = save_teacher(tmp_path / "teacher", model, None)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in ROWS])
    file = LogitsFile(capture(teacher=teacher, dataset=data, top_k=11, batch_tokens=64))
    recorded = json.loads(file.attributes["quantization"])
    assert recorded["quant_method"] == "bitsandbytes"
    assert "float32, quantised by bitsandbytes" in " ".join(drawn(overview(facts(file))))
    assert [recorded["load_in_4bit"], recorded["load_in_8bit"]] == [bits == 4, bits == 8]
    for index, ids in enumerate(ROWS):
        with torch.no_grad():
            logprobs_TV = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
        row = file.row(index)
        own_PK = logprobs_TV[: len(ids) - 1].gather(-1, torch.from_numpy(row["kept_ids"].astype(np.int64))).numpy()
        # To 8 bits a token is rounded together with the others of its batch.
        np.testing.assert_allclose(row["kept_logprobs"], own_PK, atol={4: 0.02, 8: 0.5}[bits])


@pytest.mark.parametrize("capture_kind", ["topk", "hidden"])
def test_the_length_of_a_checkpoints_metadata_moves_no_weight_and_no_bit(
    tmp_path: Path, capture: Callable[..., Path], capture_kind: str
) -> None:
    """Weights are mapped where the file's header ends; a row of one token to read is a product of a single row."""
    folder = save_teacher(tmp_path / "teacher", make_llama(tie_word_embeddings=True), None)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in (*ROWS, [5, 6], [7, 8])])
    weights, config = load_file(folder / "model.safetensors"), Config(teacher=str(folder), dataset="x", output="y")
    starts, files = set(), set()
    for length in range(1, 64):
        save_file(weights, folder / "model.safetensors", {"format": "pt", "padding": "x" * length})
        starts |= {(8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")) % 64}
        loaded = load_model(config, torch.device("cpu"))
        assert {weight.data_ptr() % 64 for weight in loaded.parameters()} == {0}
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        if length % 8 == 1:
            run = capture(teacher=folder, dataset=data, top_k=7, batch_tokens=1, capture=capture_kind, overwrite=True)
            files.add(run.read_bytes())
    assert len(starts) == 8
    assert len(files) == 1


def test_a_checkpoint_that_changes_under_a_run_changes_no_weight(tmp_path: Path) -> None:
    folder = save_teacher(tmp_path / "teacher", make_llama(), None)
    path, config = folder / "model.safetensors", Config(teacher=str(folder), dataset="x", output="y")
    weights = load_file(path)
    for length in range(1, 64, 8):  # at one of these lengths, the weights of the mapped file are aligned
        save_file(weights, path, {"format": "pt", "padding": "x" * length})
        loaded = load_model(config, torch.device("cpu"))
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
        assert all(torch.equal(weight, weights[name]) for name, weight in loaded.named_parameters())


def test_a_weight_within_a_larger_tensor_is_moved_to_an_aligned_address() -> None:
    model = make_llama()
    weight = model.model.norm.weight
    expected = torch.arange(32.0)
    weight.data = torch.cat([torch.zeros(1), expected])[1:]
    assert weight.untyped_storage().resizable()
    assert weight.data_ptr() % 64
    teacher._own_weights(model)
    assert not weight.data_ptr() % 64
    assert torch.equal(weight, expected)


def test_one_chunk_of_logits_at_a_time_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher, "CHUNK_LOGITS", 4 * 384)
    wrapped = Teacher(make_llama(), 384)
    seen: list[weakref.ref[Tensor]] = []
    head = teacher.run_head

    def watched(*arguments: Any) -> Tensor:
        assert not any(chunk() is not None for chunk in seen)
        seen.append(weakref.ref(logits_CV := head(*arguments)))
        return logits_CV

    monkeypatch.setattr(teacher, "run_head", watched)
    for _, logits_CV, hidden in wrapped.logits([Pass(np.arange(20)[None])], np.arange(20)):
        assert not logits_CV.requires_grad
        del logits_CV, hidden
    assert len(seen) == 5


def test_every_forward_pass_is_spared_the_look_for_packed_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer comes from the device, which the host would wait for."""
    wrapped, looks = Teacher(make_llama(), 384), []
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda ids: looks.append(ids))
    wrapped._model(input_ids=torch.arange(6).view(2, 3), use_cache=False)
    assert len(looks) == 1
    list(wrapped.logits([Pass(np.arange(6).reshape(2, 3))], np.array([2, 5])))
    assert len(looks) == 1
    wrapped._model(input_ids=torch.arange(6).view(2, 3), use_cache=False)
    assert len(looks) == 2
