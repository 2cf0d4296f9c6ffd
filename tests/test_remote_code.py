"""Code that comes with a teacher runs only where --trust_remote_code says so."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_llama, save_teacher, write_jsonl
from transformers import LlamaForCausalLM, dynamic_module_utils

from logitgen import LogitsFile, UsageError
from logitgen.__main__ import main

Capture = Callable[..., Path]

IDS = [5, 3, 200, 7, 1]
MODELING = """
with open({marker!r}, "a") as marker:
    marker.write("ran")

from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *arguments, **options):
        output = super().forward(*arguments, **options)
        output.logits = output.logits * 2
        return output
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """Written by the teacher's code when it runs."""
    return tmp_path / "ran"


@pytest.fixture(autouse=True)
def code_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where transformers copies a teacher's code to before it runs it."""
    cache = tmp_path / "hf" / "modules"
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(cache))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(cache))  # read from there at import
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield cache
    forget_code()


def forget_code() -> None:
    """Make the next load import the code again."""
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.fixture
def own(tmp_path: Path, marker: Path, tokenizer: Any) -> Path:
    """A teacher whose architecture only its own code knows: a Llama with doubled logits."""
    folder = save_teacher(tmp_path / "own", make_llama(), tokenizer)
    (folder / "modeling_own.py").write_text(MODELING.format(marker=str(marker)))
    settings = json.loads((folder / "config.json").read_text())
    settings |= {
        "model_type": "own_llama",
        "architectures": ["OwnForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": IDS}])


@pytest.fixture
def path(capture: Capture, own: Path, data: Path, marker: Path) -> Path:
    """A file such a teacher was trusted to make; its code has not run since."""
    path = capture(teacher=own, dataset=data, top_k=6, trust_remote_code=True)
    marker.unlink()
    forget_code()
    return path


def test_without_the_option_a_teachers_code_is_refused_in_one_line(
    capture: Capture, own: Path, data: Path, marker: Path, code_cache: Path
) -> None:
    message = rf"^--teacher {own} comes with code of its own\. Add --trust_remote_code"
    with pytest.raises(UsageError, match=message) as refused:
        capture(teacher=own, dataset=data)
    assert "\n" not in str(refused.value)
    assert not marker.exists()
    assert not list(code_cache.rglob("modeling_own.py"))


def test_with_the_option_the_teachers_code_computes(capture: Capture, own: Path, data: Path, marker: Path) -> None:
    row = LogitsFile(capture(teacher=own, dataset=data, top_k=6, trust_remote_code=True)).row(0)
    assert marker.exists()
    model: Any = make_llama()
    assert isinstance(model, LlamaForCausalLM)
    with torch.no_grad():
        logprobs_TV = (2 * model(torch.tensor([IDS])).logits[0]).log_softmax(-1)
    expected_PK, expected_ids_PK = logprobs_TV[:-1].topk(6)
    np.testing.assert_allclose(row["kept_logprobs"], expected_PK, atol=1e-3, rtol=2**-11)
    assert row["kept_ids"].tolist() == expected_ids_PK.tolist()


def test_the_file_says_whose_code_made_it(path: Path) -> None:
    """Transformers' code may be another: a run that does not trust the teacher's must not go on with this file."""
    assert LogitsFile(path).attributes["settings"]["trust_remote_code"] is True


def test_looking_into_a_file_never_runs_its_teachers_code(
    path: Path, own: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = json.loads((own / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["modeling_own.OwnTokenizer", None]}
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    for options in ([], ["--row", "0"], ["--row", "0", "--json"], ["--row", "0", "--tokenizer", str(own)]):
        main(["inspect", str(path), *options])
    assert main(["verify", str(path)]) == 0
    assert main(["inspect", str(path), "--row", "0"]) == 0
    assert not marker.exists()


def test_verifying_runs_a_teachers_code_only_if_trusted(
    path: Path, own: Path, marker: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    for teacher in (["--teacher"], ["--teacher", str(own)]):
        assert main(["verify", str(path), *teacher]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line == "error: The file's teacher needs its own code. Add --trust_remote_code if you trust it."
    assert not marker.exists()
    assert main(["verify", str(path), "--teacher", "--trust_remote_code"]) == 0
    assert marker.exists()
