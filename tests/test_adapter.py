"""Adapters: what they change in a teacher is captured as peft itself computes it, or they are refused."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from conftest import PAGES, launch, make_llama, make_tokenizer, save_teacher, write_jsonl
from families import ROWS, VOCAB, make
from launches import drawn, error_lines, exit_statuses
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedModel

from logitgen import LogitsFile, UsageError
from logitgen.__main__ import main
from logitgen.config import Config
from logitgen.facts import facts
from logitgen.report import overview
from logitgen.teacher import adapter
from logitgen.teacher.adapter import with_base
from logitgen.teacher.describe import describe_teacher
from logitgen.teacher.model import load_model

Capture = Callable[..., Path]
CAUSAL: dict[str, Any] = {"task_type": "CAUSAL_LM"}
LORA: dict[str, Any] = CAUSAL | {"r": 4, "target_modules": ["q_proj", "down_proj"]}
BOUND = 1e-4
"""How far a log-prob may be from the adapter's own, in nats: a merge rounds otherwise."""


def train(model: PreTrainedModel, how: peft.PeftConfig, folder: Path, seed: int = 1) -> Path:
    """Save an adapter with weights that matter."""
    adapted = peft.get_peft_model(model, how)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=generator)
    adapted.save_pretrained(folder)
    return folder


def own_logprobs(base: Path, folder: Path, loader: Any = AutoModelForCausalLM, **options: Any) -> list[Tensor]:
    """What peft itself says for every row, the adapter not merged."""
    plain = loader.from_pretrained(base, adapter_kwargs={"subfolder": "none"}, **options)
    model = peft.PeftModel.from_pretrained(plain, folder).eval()
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1) for ids in ROWS]


def assert_file_says(path: Path, expected: list[Tensor], bound: float = BOUND) -> None:
    file = LogitsFile(path)
    for index, logprobs_TV in enumerate(expected):
        row = file.row(index)
        ids_PK = torch.from_numpy(row["kept_ids"].astype(np.int64))
        own_PK = logprobs_TV[: len(ids_PK)].gather(-1, ids_PK)
        np.testing.assert_allclose(row["kept_logprobs"], own_PK, atol=bound, rtol=2**-11)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in ROWS])


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_teacher(tmp_path / "base", make_llama(VOCAB), None)


@pytest.fixture
def lora(tmp_path: Path, base: Path) -> Path:
    """An adapter that names its base."""
    return train(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**LORA), tmp_path / "lora")


def tell(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def options(**given: Any) -> Config:
    return Config(**{"dataset": "d", "output": "o", "top_k": 5} | {name: str(value) for name, value in given.items()})


def loaded(**given: Any) -> PreTrainedModel:
    config = with_base(options(**given))
    describe_teacher(config)
    return load_model(config, torch.device("cpu"))


KINDS: dict[str, tuple[peft.PeftConfig, bool]] = {
    "lora": (peft.LoraConfig(**LORA), False),
    "dora": (peft.LoraConfig(**CAUSAL, r=4, target_modules="all-linear", use_dora=True), True),
    "a trained head": (peft.LoraConfig(**LORA, modules_to_save=["lm_head"]), False),
    "a trained head that was tied": (peft.LoraConfig(**LORA, modules_to_save=["lm_head"]), True),
    "trained embeddings that were tied": (peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"]), True),
    "lora on embeddings and head": (
        peft.LoraConfig(**CAUSAL, r=4, target_modules=["q_proj", "embed_tokens", "lm_head"]),
        False,
    ),
    "lora on tied embeddings": (peft.LoraConfig(**CAUSAL, r=4, target_modules=["q_proj", "embed_tokens"]), True),
    "lora on a tied head": (peft.LoraConfig(**CAUSAL, r=4, target_modules=["q_proj", "lm_head"]), True),
    "a few trained tokens": (peft.LoraConfig(**LORA, trainable_token_indices=[3, 5]), True),
    "ia3": (peft.IA3Config(**CAUSAL, target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]), False),
    "without a task": (peft.LoraConfig(r=4, target_modules=["q_proj"]), False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_gives_the_logprobs_that_peft_computes_unmerged(
    kind: str, tmp_path: Path, capture: Capture, data: Path
) -> None:
    how, tied = KINDS[kind]
    base = save_teacher(tmp_path / "base", make_llama(VOCAB, tie_word_embeddings=tied), None)
    folder = train(AutoModelForCausalLM.from_pretrained(base), how, tmp_path / "adapter")
    before = (base / "model.safetensors").read_bytes()
    file = capture(teacher=base, adapter=folder, dataset=data, top_k=11, batch_tokens=64)
    expected = own_logprobs(base, folder)
    assert_file_says(file, expected)
    assert (base / "model.safetensors").read_bytes() == before
    plain = capture(teacher=base, dataset=data, top_k=11, output=tmp_path / "plain.h5")
    with pytest.raises(AssertionError):
        assert_file_says(plain, expected)


@pytest.mark.parametrize("family", ["qwen2.5 vl", "llava", "gemma3 that sees"])
def test_an_adapter_of_a_model_that_sees_is_merged(family: str, tmp_path: Path, capture: Capture, data: Path) -> None:
    base = save_teacher(tmp_path / "base", make(family), None)
    how = peft.LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|down_proj)")
    folder = train(AutoModelForMultimodalLM.from_pretrained(base), how, tmp_path / "adapter")
    file = capture(teacher=folder, dataset=data, top_k=11, batch_tokens=64)
    assert_file_says(file, own_logprobs(base, folder, AutoModelForMultimodalLM))


def test_all_three_ways_to_name_an_adapter_write_the_same_rows(
    tmp_path: Path, capture: Capture, data: Path, base: Path, lora: Path
) -> None:
    both = tmp_path / "both"
    shutil.copytree(base, both)
    shutil.copytree(lora, both, dirs_exist_ok=True)
    expected = own_logprobs(base, lora)
    prints = set()
    for number, named in enumerate(({"teacher": base, "adapter": lora}, {"teacher": lora}, {"teacher": both})):
        file = capture(**named, dataset=data, top_k=11, batch_tokens=64, output=tmp_path / f"{number}.h5")
        assert_file_says(file, expected)
        prints.add(LogitsFile(file).attributes["teacher_fingerprint"])
    assert len(prints) == 1
    assert LogitsFile(tmp_path / "1.h5").attributes["settings"]["adapter"] == str(lora)
    assert LogitsFile(tmp_path / "1.h5").attributes["settings"]["teacher"] == str(base)


def test_a_merged_adapter_has_the_fingerprint_of_a_folder_merged_as_the_documentation_says(
    tmp_path: Path, capture: Capture, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = save_teacher(tmp_path / "base", make_llama(VOCAB), make_tokenizer())
    lora = train(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**LORA), tmp_path / "lora")
    (code,) = re.findall(r"```python\n(.*?)```", PAGES["docs/capture.md"], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(code.replace("BASE", str(base)).replace("ADAPTER", str(lora)), {})
    saved = tmp_path / "merged"
    other = train(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**LORA), tmp_path / "other", seed=2)
    files = [
        capture(**named, dataset=data, top_k=5, output=tmp_path / f"{number}.h5")
        for number, named in enumerate(({"teacher": saved}, {"teacher": lora}, {"teacher": other}, {"teacher": base}))
    ]
    prints = [LogitsFile(file).attributes["teacher_fingerprint"] for file in files]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_adapter_and_base_come_from_the_hub(
    tmp_path: Path, data: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, folder in (("base", base), ("lora", tell(lora, base_model_name_or_path="org/base"))):
        repository, commit = tmp_path / "hf" / "hub" / f"models--org--{name}", "a" * 40
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    for number, named in enumerate(({"teacher": "org/lora"}, {"teacher": "org/base", "adapter": "org/lora"})):
        places = {"output": tmp_path / f"{number}.h5", "log_dir": tmp_path / "logs"}
        ended = launch(2, **named, dataset=data, top_k=11, **places)
        assert ended.returncode == 0, ended.stderr
        assert_file_says(tmp_path / f"{number}.h5", own_logprobs(base, lora))
    assert (tmp_path / "0.h5").read_bytes() == (tmp_path / "1.h5").read_bytes()
    assert "org/base  float32" in (shown := " ".join(drawn(overview(facts(LogitsFile(tmp_path / "0.h5"))))))
    assert "adapter org/lora" in shown


def test_verify_loads_the_adapter_too(
    tmp_path: Path, capture: Capture, data: Path, base: Path, lora: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(capture(teacher=lora, dataset=data, top_k=5))
    assert main(["verify", file, "--teacher"]) == 0
    assert main(["verify", file, "--teacher", str(base)]) == 0
    moved = shutil.copytree(lora, tmp_path / "moved")
    assert main(["verify", file, "--teacher", str(moved)]) == 0
    capsys.readouterr()
    other = train(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**LORA), tmp_path / "other", seed=2)
    assert main(["verify", file, "--teacher", str(other)]) == 1
    assert "the teacher's weights differ from the file's" in " ".join(capsys.readouterr().out.split())


def test_another_adapter_does_not_resume_a_file(
    tmp_path: Path, capture: Capture, data: Path, base: Path, lora: Path
) -> None:
    capture(teacher=base, adapter=lora, dataset=data, top_k=5)
    other = shutil.copytree(lora, tmp_path / "other")
    with pytest.raises(UsageError, match=f"--adapter {lora} and {other}"):
        capture(teacher=base, adapter=other, dataset=data, top_k=5)


def test_the_tokenizer_of_an_adapter_wins_over_that_of_its_base(tmp_path: Path, capture: Capture) -> None:
    base = save_teacher(tmp_path / "base", make_llama(), make_tokenizer())
    folder = train(AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**LORA), tmp_path / "adapter")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": "To be read"}])
    of_base = LogitsFile(capture(teacher=folder, dataset=data, top_k=5)).attributes["tokenizer_fingerprint"]
    own = make_tokenizer(pad_token="<|user|>")
    own.save_pretrained(folder)
    second = capture(teacher=folder, dataset=data, top_k=5, output=tmp_path / "second.h5")
    assert of_base
    assert LogitsFile(second).attributes["tokenizer_fingerprint"] != of_base


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_keeps_the_adapter_apart(tmp_path: Path, capture: Capture, data: Path, bits: int) -> None:
    plain = save_teacher(tmp_path / "plain", make_llama(VOCAB, hidden_size=64, intermediate_size=64), None)
    how = transformers.BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    model = AutoModelForCausalLM.from_pretrained(plain, quantization_config=how, device_map={"": "cpu"}).eval()
    base = save_teacher(tmp_path / "base", model, None)
    folder = train(AutoModelForCausalLM.from_pretrained(plain), peft.LoraConfig(**LORA), tmp_path / "adapter")
    file = capture(teacher=base, adapter=folder, dataset=data, top_k=11, batch_tokens=64)
    # To 8 bits a token is rounded together with the others of its batch.
    assert_file_says(file, own_logprobs(base, folder, device_map={"": "cpu"}), {4: 0.02, 8: 0.5}[bits])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merge_in_half_precision_is_as_near_as_its_rounding(
    dtype: str, capture: Capture, data: Path, base: Path, lora: Path
) -> None:
    file = capture(teacher=lora, dataset=data, top_k=11, dtype=dtype)
    expected = own_logprobs(base, lora, dtype=getattr(torch, dtype))
    assert_file_says(file, expected, {"bfloat16": 0.5, "float16": 0.05}[dtype])


def test_layers_spread_by_device_map_take_an_adapter(capture: Capture, data: Path, base: Path, lora: Path) -> None:
    file = capture(teacher=lora, dataset=data, top_k=11, device_map="auto")
    assert_file_says(file, own_logprobs(base, lora))


def test_without_peft_a_teacher_with_an_adapter_is_refused(
    tmp_path: Path, base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "is_peft_available", lambda: False)
    shutil.copytree(base, lora, dirs_exist_ok=True)
    for named in ({"teacher": lora}, {"teacher": base, "adapter": lora}):
        with pytest.raises(UsageError, match=f"The adapter {lora} needs peft. Install it"):
            loaded(**named)


@pytest.mark.parametrize("size", ["tp_size", "fsdp_size"])
def test_ranks_that_share_a_teacher_take_no_adapter(tmp_path: Path, data: Path, lora: Path, size: str) -> None:
    places = {"output": tmp_path / "out.h5", "log_dir": tmp_path / "logs"}
    ended = launch(2, teacher=lora, dataset=data, **{size: 2}, **places)
    assert exit_statuses(ended) == [2, 2]
    assert len(error_lines(ended)) == 1
    assert f"The adapter {lora} cannot be merged: with --tp_size and --fsdp_size no rank has whole" in ended.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_model_name_or_path": None}, "is an adapter that does not name its base. Give the base as --teacher"),
        ({"base_model_name_or_path": "/nowhere"}, "is an adapter, and its base /nowhere is not there. Give the base"),
        ({"peft_type": None}, "is none that this peft can read: "),
        ({"peft_type": "LORA9"}, "is none that this peft can read: "),
        ({"sparkle": 3}, "sets sparkle, which this peft does not know. Upgrade peft"),
        ({"task_type": "SEQ_CLS"}, "it is for SEQ_CLS, not for a causal language model"),
        (
            {"alora_invocation_tokens": [1]},
            "cannot be merged: LORA: aLoRA does not support safe merging. Merge it with",
        ),
        ({"target_modules": ["nothing"]}, "cannot be merged: it does not fit .*: Target modules "),
        ({"r": 8}, "cannot be merged: it does not fit .*size mismatch"),
        ({"target_modules": ["q_proj", "down_proj", "up_proj"]}, "it lacks 4 of its weights, base_model.*up_proj"),
        ({"target_modules": ["q_proj"]}, "has no place for 4 weights, base_model.*down_proj"),
        ({"modules_to_save": ["lm_head"]}, "cannot be merged: it does not fit .*lm_head"),
    ],
)
def test_an_adapter_that_cannot_be_honoured_is_refused(changes: dict[str, Any], message: str, lora: Path) -> None:
    with pytest.raises(UsageError, match=message):
        loaded(teacher=tell(lora, **changes))


def test_soft_prompts_are_refused(tmp_path: Path, base: Path) -> None:
    how = peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=3)
    folder = train(AutoModelForCausalLM.from_pretrained(base), how, tmp_path / "prompt")
    with pytest.raises(UsageError, match="cannot be merged: PROMPT_TUNING puts tokens of its own before every row"):
        loaded(teacher=base, adapter=folder)


def test_an_adapter_for_a_larger_vocabulary_is_refused(tmp_path: Path, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(VOCAB + 3)
    how = peft.LoraConfig(**LORA, modules_to_save=["embed_tokens", "lm_head"])
    folder = train(model, how, tmp_path / "larger")
    with pytest.raises(UsageError, match=r"cannot be merged: it does not fit .*size mismatch"):
        loaded(teacher=base, adapter=folder)


def test_a_merge_that_changes_the_logits_is_refused(lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peft.tuners.lora.Linear, "get_delta_weight", lambda *_: torch.tensor(0.0))
    with pytest.raises(UsageError, match="the logits change with the merge"):
        loaded(teacher=lora)


def test_a_base_whose_layers_wait_elsewhere_takes_no_adapter(base: Path, lora: Path) -> None:
    with pytest.raises(UsageError, match="the base does not fit onto the GPUs with --device_map auto"):
        adapter.merged(make_llama(VOCAB).to("meta"), options(teacher=base, adapter=lora))


def test_an_adapter_is_named_once(tmp_path: Path, base: Path, lora: Path) -> None:
    with pytest.raises(UsageError, match=f"--teacher {lora} has an adapter of its own, besides --adapter {base}"):
        with_base(options(teacher=lora, adapter=base))
    with pytest.raises(UsageError, match=f"--adapter {base} is not there, or has no adapter_config.json"):
        loaded(teacher=base, adapter=base)
    other = shutil.copytree(lora, tmp_path / "other")
    with pytest.raises(UsageError, match=f"is an adapter for {other}, an adapter itself"):
        with_base(options(teacher=tell(lora, base_model_name_or_path=str(other))))
    with pytest.raises(UsageError, match="--revision is for whole teachers"):
        with_base(options(teacher=lora, revision="main"))


@pytest.mark.parametrize("text", ["{", "[]", "{}"])
def test_a_damaged_configuration_of_an_adapter_is_refused(text: str, lora: Path) -> None:
    (lora / "adapter_config.json").write_text(text)
    with pytest.raises(
        UsageError, match=r"adapter_config.json (of the adapter cannot be read|is not the adapter conf)"
    ):
        with_base(options(teacher=lora))


def test_an_adapter_without_weights_is_refused(lora: Path) -> None:
    (lora / "adapter_model.safetensors").unlink()
    with pytest.raises(
        UsageError, match=r"has an adapter_config\.json, but no adapter_model\.safetensors\. Complete it"
    ):
        loaded(teacher=lora)


def test_an_adapter_for_sound_is_no_part_of_the_text_side(tmp_path: Path, base: Path, lora: Path) -> None:
    folder = shutil.copytree(base, lora, dirs_exist_ok=True)
    transformers.GraniteSpeechConfig().save_pretrained(folder)
    with pytest.raises(UsageError, match="has an adapter for sound, which text does not pass"):
        describe_teacher(with_base(options(teacher=folder)))


def test_another_base_than_the_adapters_is_told(
    tmp_path: Path, base: Path, lora: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = shutil.copytree(base, tmp_path / "other")
    describe_teacher(options(teacher=other, adapter=lora))
    assert f"The adapter {lora} was trained on {base}, the teacher is {other}." in caplog.text
