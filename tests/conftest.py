"""Tiny teachers, tokenizers and datasets, made on disk, offline."""

import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import programs
import pytest
import torch
from hypothesis import HealthCheck, settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PhiConfig, PreTrainedModel, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
"""The text of the README and of every page of docs/, by name."""
SENTENCES = [" ".join(topics[name].split()) for name in sorted(topics)][:40]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT_TEMPLATE_WITH_GENERATION = (
    "{% for message in messages %}<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}{% else %}{{ message['content'] }}<|end|>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")
"""However busy it is."""


def pytest_configure() -> None:
    """A script ignores SIGINT in its background, nohup ignores SIGHUP: all that the tests start would inherit it."""
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the `datasets` cache of a test run to itself."""
    import datasets

    folder = tmp_path_factory.mktemp("datasets_cache")
    os.environ["HF_DATASETS_CACHE"] = str(folder)
    before, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, str(folder)
    yield
    datasets.config.HF_DATASETS_CACHE = before


@functools.cache
def trained_tokenizer() -> str:
    """Train a byte-level BPE tokenizer of 384 tokens, and return it as JSON."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=384, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return str(tokenizer.to_str())


def make_tokenizer(**special_tokens: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer of 384 tokens: any Unicode goes in and comes out."""
    tokenizer = Tokenizer.from_str(trained_tokenizer())
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", **special_tokens)


def enlarge_weights(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Make random weights large enough that soft-caps, scales and routing matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3, generator=generator)
    return model.eval()


def make_llama(vocab_size: int = 384, **changes: Any) -> PreTrainedModel:
    """Build a Llama small enough for thousands of forward passes."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=vocab_size, max_position_embeddings=256, **{**sizes, **changes})
    return enlarge_weights(AutoModelForCausalLM.from_config(config))


def make_phi() -> PreTrainedModel:
    """Build a small Phi, whose head has a bias."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = PhiConfig(vocab_size=384, max_position_embeddings=256, **sizes)
    return enlarge_weights(AutoModelForCausalLM.from_config(config))


def save_teacher(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None) -> Path:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer without a pad token."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a tiny Llama and its tokenizer."""
    return save_teacher(tmp_path_factory.mktemp("teacher"), make_llama(), tokenizer)


@pytest.fixture(scope="session")
def ragged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifty-three rows of text of very different lengths, an empty one and a one-token one among them."""
    lengths = [(7 * index) % 151 for index in range(51)]
    texts = ["", "e", *(SENTENCES[index % 40][:length] for index, length in enumerate(lengths))]
    return write_jsonl(tmp_path_factory.mktemp("ragged") / "ragged.jsonl", [{"text": text} for text in texts])


@pytest.fixture
def capture(tmp_path: Path) -> Callable[..., Path]:
    """Run the main job on this process alone; returns the output's path, raises what the run raises."""
    from logitgen import generate
    from logitgen.ranks.agree import Ranks

    def run(**options: Any) -> Path:
        options = {"output": tmp_path / "out.h5", "log_dir": tmp_path / "logs"} | options
        arguments = [f"--{name}={value}" for name, value in options.items() if value is not None]
        generate.capture(Ranks([]), arguments)
        return Path(options["output"])

    return run


def interrupted(capture: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Run the main job on this process, and have it fail after its second batch."""
    from logitgen import CaptureError, generate

    compute, numbers = generate.capture_batch, iter(range(99))

    def fail_third(*arguments: Any) -> torch.Tensor:
        if next(numbers) == 2:
            raise CaptureError("The power is gone.")
        return compute(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(generate, "capture_batch", fail_third)
        with pytest.raises(CaptureError, match="The power is gone"):
            capture(**options)
    gc.collect()  # the error knew the frames of the run, they its output, and that the lock


def launch_command(num_ranks: int, **options: Any) -> list[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    profile = ["--config_file", "accelerate_configs/cpu.yaml", "--num_processes", str(num_ranks)]
    words = [f"--{name}={value}" for name, value in options.items()]
    return [*launcher, *profile, "--main_process_port", str(port), "generate.py", *words]


def launch(num_ranks: int, **options: Any) -> subprocess.CompletedProcess[str]:
    """Start the real launcher with so many CPU ranks, and wait for its end."""
    return programs.run(launch_command(num_ranks, **options))
