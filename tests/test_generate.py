"""The main job on one rank, against logits the teacher gives when asked directly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_llama, make_tokenizer, save_teacher, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitgen import LogitsFile, UsageError
from logitgen.errors import CaptureError

Capture = Callable[..., Path]
FLOAT16_STEP = 2**-11
"""Largest relative error of rounding to float16."""


def direct_logprobs(teacher: Path, input_ids: np.ndarray) -> torch.Tensor:
    """Log-probs of an unbatched, unpadded forward pass, float32[T, V]."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(input_ids.astype(np.int64))[None]).logits[0].log_softmax(-1)


def assert_row_is_right(row: dict[str, Any], logprobs_TV: torch.Tensor) -> None:
    positions = row["positions"].astype(np.int64)
    expected_PV = logprobs_TV[positions]
    targets = torch.from_numpy(row["input_ids"].astype(np.int64)[positions + 1])
    np.testing.assert_allclose(row["target_logprob"], expected_PV.gather(1, targets[:, None])[:, 0], atol=1e-3)
    k = row["kept_ids"].shape[1]
    expected_PK, expected_ids_PK = expected_PV.topk(k)
    np.testing.assert_allclose(row["kept_logprobs"], expected_PK, atol=1e-3, rtol=FLOAT16_STEP)
    kept = expected_PV.gather(1, torch.from_numpy(row["kept_ids"].astype(np.int64)))
    np.testing.assert_allclose(kept, expected_PK, atol=1e-4)
    gap = (expected_PK[:, :-1] - expected_PK[:, 1:]).min(1).values > 1e-4
    assert (row["kept_ids"].astype(np.int64) == expected_ids_PK.numpy())[gap.numpy()].all()


def test_every_row_of_ragged_text_equals_a_direct_forward_pass(capture: Capture, teacher: Path, ragged: Path) -> None:
    file = LogitsFile(capture(teacher=teacher, dataset=ragged, top_k=7, batch_tokens=300))
    texts = [json.loads(line)["text"] for line in ragged.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    assert len(file) == len(texts)
    for index, text in enumerate(texts):
        row = file.row(index)
        assert row["input_ids"].tolist() == tokenizer(text)["input_ids"]
        assert row["positions"].tolist() == list(range(len(row["input_ids"]) - 1))
        if len(row["positions"]):
            assert_row_is_right(row, direct_logprobs(teacher, row["input_ids"]))


def test_full_capture_keeps_every_logit(capture: Capture, teacher: Path, ragged: Path) -> None:
    row = LogitsFile(capture(teacher=teacher, dataset=ragged, capture="full", limit=9)).row(8)
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        logits_TV = model(torch.from_numpy(row["input_ids"].astype(np.int64))[None]).logits[0]
    np.testing.assert_allclose(row["logits"], logits_TV[:-1], atol=1e-3, rtol=FLOAT16_STEP)
    np.testing.assert_allclose(row["logsumexp"], logits_TV[:-1].logsumexp(-1), atol=1e-3)


def test_completion_only_keeps_the_positions_that_predict_the_completion(
    capture: Capture, teacher: Path, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "Who wrote it? ", "completion": "Nobody knows."},
        {"prompt": "No answer", "completion": ""},
        {"prompt": "", "completion": "No question"},
    ]
    file = LogitsFile(capture(teacher=teacher, dataset=write_jsonl(tmp_path / "d.jsonl", rows), completion_only=True))
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    for index, row in enumerate(rows):
        found = file.row(index)
        predicted = found["input_ids"][found["positions"] + 1].tolist()
        expected = tokenizer(row["completion"])["input_ids"]
        assert predicted == (expected if row["prompt"] else expected[1:])
        if predicted:
            assert_row_is_right(found, direct_logprobs(teacher, found["input_ids"]))


@pytest.mark.parametrize("vocab_size", [65_536, 65_537, 131_073])
def test_large_vocabularies_keep_their_ids(capture: Capture, tmp_path: Path, vocab_size: int) -> None:
    model = make_llama(vocab_size, hidden_size=8, intermediate_size=8, num_attention_heads=1, num_hidden_layers=1)
    with torch.no_grad():
        model.lm_head.weight[-3:] *= 20  # the highest ids win or lose by a wide margin
    teacher = save_teacher(tmp_path / "teacher", model, None)
    ids = [5, vocab_size - 1, 7, vocab_size - 2, 9]
    file = LogitsFile(
        capture(teacher=teacher, dataset=write_jsonl(tmp_path / "d.jsonl", [{"input_ids": ids}]), top_k=16)
    )
    row = file.row(0)
    assert row["input_ids"].tolist() == ids
    assert row["kept_ids"].max() >= vocab_size - 3
    assert row["kept_ids"].dtype == (np.uint16 if vocab_size <= 65_536 else np.uint32)
    assert_row_is_right(row, direct_logprobs(teacher, row["input_ids"]))


def test_a_head_larger_than_the_tokenizer_is_captured_as_the_model_has_it(
    capture: Capture, tmp_path: Path, ragged: Path
) -> None:
    tokenizer = make_tokenizer()
    teacher = save_teacher(tmp_path / "teacher", make_llama(len(tokenizer) + 64), tokenizer)
    file = LogitsFile(capture(teacher=teacher, dataset=ragged, limit=12))
    assert file.attributes["vocab_size"] == len(tokenizer) + 64
    assert file.attributes["tokenizer_size"] == len(tokenizer)
    assert_row_is_right(file.row(11), direct_logprobs(teacher, file.row(11)["input_ids"]))


def test_packed_blocks_are_full_and_lose_only_the_rest(capture: Capture, teacher: Path, ragged: Path) -> None:
    file = LogitsFile(capture(teacher=teacher, dataset=ragged, packing=True, max_length=32))
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    texts = [json.loads(line)["text"] for line in ragged.read_text().splitlines()]
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert len(file) == len(stream) // 32
    assert file.arrays["input_ids"].tolist() == stream[: len(file) * 32]
    assert_row_is_right(file.row(3), direct_logprobs(teacher, file.row(3)["input_ids"]))


def test_split_rows_come_back_together(capture: Capture, teacher: Path, ragged: Path) -> None:
    file = LogitsFile(capture(teacher=teacher, dataset=ragged, overflow="split", max_length=20))
    whole = LogitsFile(capture(teacher=teacher, dataset=ragged, overwrite=True))
    for source in range(len(whole)):
        pieces = [file.row(row)["input_ids"] for row in np.flatnonzero(file.arrays["source_row"] == source)]
        assert np.concatenate(pieces).tolist() == whole.row(source)["input_ids"].tolist()
        assert all(len(piece) == 20 for piece in pieces[:-1])


def test_the_file_says_where_it_comes_from(capture: Capture, teacher: Path, ragged: Path) -> None:
    attributes = LogitsFile(capture(teacher=teacher, dataset=ragged, top_k=5)).attributes
    assert attributes["teacher"] == str(teacher)
    assert attributes["settings"]["dataset"] == str(ragged)
    assert "output" not in attributes["settings"]
    assert attributes["packages"]["torch"] == torch.__version__
    assert all(len(attributes[f"{name}_fingerprint"]) == 64 for name in ("teacher", "tokenizer", "dataset"))


def test_another_teacher_tokenizer_or_split_has_another_fingerprint(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(bos_token="<|user|>")
    changed = make_llama()
    with torch.no_grad():
        changed.lm_head.weight += 0.001
    other = save_teacher(tmp_path / "other", changed, tokenizer)
    first = LogitsFile(capture(teacher=teacher, dataset=ragged)).attributes
    second = LogitsFile(capture(teacher=other, dataset=ragged, limit=20, overwrite=True)).attributes
    for name in ("teacher", "tokenizer", "dataset"):
        assert first[f"{name}_fingerprint"] != second[f"{name}_fingerprint"]


def test_a_teacher_that_returns_nan_is_refused_with_row_and_position(
    capture: Capture, tmp_path: Path, tokenizer: Any
) -> None:
    model = make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[300] = float("nan")
    teacher = save_teacher(tmp_path / "teacher", model, tokenizer)
    data = write_jsonl(tmp_path / "d.jsonl", [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 300, 6, 7]}])
    first_nan = int(direct_logprobs(teacher, np.array([4, 5, 300, 6])).isnan().any(-1).int().argmax())
    message = rf"not finite at row 1, position {first_nan}: their log-sum-exp is nan. Try --dtype bfloat16"
    with pytest.raises(CaptureError, match=message):
        capture(teacher=teacher, dataset=data)
    assert not (tmp_path / "out.h5").exists()


def test_an_existing_output_is_kept_until_a_new_one_is_complete(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.h5"
    output.write_text("precious")
    with pytest.raises(UsageError, match=r"--output .*out.h5 exists. .* --overwrite"):
        capture(teacher=teacher, dataset=ragged)
    with pytest.raises(UsageError, match="--top_k must be between 1 and the vocabulary size 384, got 999"):
        capture(teacher=teacher, dataset=ragged, overwrite=True, top_k=999)
    assert output.read_text() == "precious"
    capture(teacher=teacher, dataset=ragged, overwrite=True)
    assert len(LogitsFile(output)) == 53


def test_the_end_of_a_run_states_what_is_in_the_file(
    capture: Capture, teacher: Path, ragged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = capture(teacher=teacher, dataset=ragged)
    printed = " ".join(capsys.readouterr().out.split())
    file = LogitsFile(path)
    assert "53 expected, 53 present, 0 missing, 0 written twice" in printed
    assert f"teacher perplexity {np.exp(-file.arrays['target_logprob'].mean(dtype=np.float64)):,.3f}" in printed
    assert str(path.name) in printed


def test_options_come_from_a_file_too(capture: Capture, teacher: Path, ragged: Path, tmp_path: Path) -> None:
    options = tmp_path / "options.yaml"
    options.write_text(f"teacher: {teacher}\ndataset: {ragged}\ntop_k: 3\nlimit: 5\n")
    assert LogitsFile(capture(config=options, top_k=4)).attributes["top_k"] == 4
