"""The main job on one rank, against logits the teacher gives when asked directly."""

import gc
import json
import re
import runpy
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, make_llama, make_tokenizer, save_teacher, write_jsonl
from families import FLOAT16_STEP, assert_row_is_right
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitgen import LogitsFile, UsageError, generate
from logitgen.errors import CaptureError
from logitgen.ranks.agree import Ranks

Capture = Callable[..., Path]


def direct_logprobs(teacher: Path, input_ids: np.ndarray) -> torch.Tensor:
    """Log-probs of an unbatched, unpadded forward pass, float32[T, V]."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.from_numpy(input_ids.astype(np.int64))[None]).logits[0].log_softmax(-1)


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
    assert attributes["packages"]["torch"] == version("torch")
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
    message = rf"not finite at row 1, position {first_nan}, in float32\. The weights are damaged"
    with pytest.raises(CaptureError, match=message):
        capture(teacher=teacher, dataset=data)
    assert not (tmp_path / "out.h5").exists()


# A run that is stopped, and goes on.


class Stop:
    """Counts the forward passes of a run, and ends it in the middle of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[list[int]] = []
        self.after: int | None = None
        compute = generate.capture_batch

        def capture_batch(teacher: Any, batch: Any, layout: Any) -> torch.Tensor:
            if self.after is not None and len(self.batches) == self.after:
                raise CaptureError("The lights went out.")
            self.batches.append(sorted(batch.rows.tolist()))
            return compute(teacher, batch, layout)

        monkeypatch.setattr(generate, "capture_batch", capture_batch)

    def run(self, job: Capture, after: int, /, **options: Any) -> None:
        """Have a run stopped after so many batches."""
        self.batches, self.after = [], after
        with pytest.raises(CaptureError, match=r"The lights went out\."):
            job(**options)
        self.batches, self.after = [], None
        gc.collect()  # the error knew the frames of the run, they its output, and that the lock


@pytest.fixture
def stop(monkeypatch: pytest.MonkeyPatch) -> Stop:
    return Stop(monkeypatch)


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a run fail that loads the teacher."""

    def load_model(*arguments: Any) -> None:
        raise AssertionError("The teacher was loaded.")

    monkeypatch.setattr(generate, "load_model", load_model)


def done_rows(path: Path) -> list[int]:
    with h5py.File(path, "r", locking=False) as file:
        return np.flatnonzero(file["done"][()]).tolist()


def folder_content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


OPTIONS: list[dict[str, Any]] = [{"top_k": 5}, {"capture": "full"}, {"packing": True, "max_length": 24}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_resumed_run_computes_only_the_missing_rows(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, stop: Stop, options: dict[str, Any], after: int
) -> None:
    options |= {"teacher": teacher, "dataset": ragged, "batch_tokens": 300}
    whole = capture(output=tmp_path / "whole.h5", **options).read_bytes()
    batches = stop.batches
    stop.run(capture, after, **options)
    assert not (tmp_path / "out.h5").exists()
    done = done_rows(tmp_path / "out.h5.partial")
    empty = set(range(len(LogitsFile(tmp_path / "whole.h5")))) - {row for batch in batches for row in batch}
    assert done == sorted({row for batch in batches[:after] for row in batch} | empty)
    assert capture(**options).read_bytes() == whole
    assert stop.batches == batches[after:]
    assert not (tmp_path / "out.h5.partial").exists()


@pytest.mark.slow
def test_a_run_may_be_stopped_again_and_again(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, stop: Stop
) -> None:
    options = {"teacher": teacher, "dataset": ragged, "batch_tokens": 300, "top_k": 5}
    whole = capture(output=tmp_path / "whole.h5", **options).read_bytes()
    num_batches = len(stop.batches)
    for _ in range(num_batches - 1):
        stop.run(capture, 1, **options)
    assert capture(**options).read_bytes() == whole
    assert len(stop.batches) == 1


def test_a_batch_of_which_some_rows_are_done_is_computed_again(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, stop: Stop
) -> None:
    options = {"teacher": teacher, "dataset": ragged, "batch_tokens": 300, "top_k": 5}
    path = capture(**options)
    whole, batches = path.read_bytes(), stop.batches
    partial = path.rename(tmp_path / "out.h5.partial")
    row = batches[2][0]
    with h5py.File(partial, "r+", locking=False) as file:
        start = file["position_offsets"][row]
        file["done"][row] = 0
        file["logsumexp"][start] = 0
    stop.batches = []
    assert capture(**options).read_bytes() == whole
    assert stop.batches == [batches[2]]


def test_a_run_that_goes_on_says_so_and_counts_only_its_own_tokens(
    capture: Capture,
    teacher: Path,
    ragged: Path,
    stop: Stop,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    options = {"teacher": teacher, "dataset": ragged, "batch_tokens": 300}
    stop.run(capture, 4, **options)
    num_done = len(done_rows(tmp_path / "out.h5.partial"))
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert f"{num_done} of 53 rows are safe in {tmp_path / 'out.h5.partial'}. Run the same command again to" in log
    capsys.readouterr()
    file = LogitsFile(capture(**options))
    captured = capsys.readouterr()
    assert "53 expected, 53 present, 0 missing, 0 duplicates" in " ".join(captured.out.split())
    lengths = [len(file.row(row)["positions"]) for batch in stop.batches for row in batch]
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert f"Capturing {53 - num_done} of 53 rows, {sum(lengths):,} tokens in {len(stop.batches)} batches." in log


def test_a_finished_output_needs_no_teacher(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = capture(teacher=teacher, dataset=ragged)
    before = path.read_bytes()
    changed = path.stat().st_mtime_ns
    gc.collect()
    request.getfixturevalue("no_teacher")
    assert capture(teacher=teacher, dataset=ragged).read_bytes() == before
    assert path.stat().st_mtime_ns == changed
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert f"{path} is complete: all 53 rows are there. Nothing is left to do." in log


def test_a_file_that_only_lacks_its_name_is_given_it_without_a_teacher(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = capture(teacher=teacher, dataset=ragged)
    before = path.read_bytes()
    path.rename(tmp_path / "out.h5.partial")
    gc.collect()
    request.getfixturevalue("no_teacher")
    assert capture(teacher=teacher, dataset=ragged).read_bytes() == before
    assert not (tmp_path / "out.h5.partial").exists()


@pytest.mark.usefixtures("no_teacher")
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"top_k": 6}, "--top_k 5 and 6"),
        ({"batch_tokens": 301}, "--batch_tokens 300 and 301"),
        ({"limit": 9}, "--limit None and 9"),
        ({"seed": 1, "dtype": "bfloat16"}, "--dtype auto and bfloat16; --seed 0 and 1"),
    ],
)
def test_a_file_of_other_settings_is_refused_and_left_as_it_is(
    capture: Capture,
    half_captured: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    finished: bool,
    changes: dict[str, Any],
    difference: str,
) -> None:
    folder, options = half_captured
    name = "out.h5" if finished else "out.h5.partial"
    shutil.copy(folder / name, tmp_path)
    before = folder_content(tmp_path)
    message = (
        rf"{name} belongs to another run\. Its values and this run's differ: {difference}\. "
        r"Choose another --output, or replace it with --overwrite\.$"
    )
    with pytest.raises(UsageError, match=message):
        capture(**options | changes)
    assert folder_content(tmp_path) == before


@pytest.fixture(scope="module")
def half_captured(tmp_path_factory: pytest.TempPathFactory, teacher: Path, ragged: Path) -> tuple[Path, dict[str, Any]]:
    """A folder with a finished and an unfinished output of one run, one of another, and the options of the first."""
    folder = tmp_path_factory.mktemp("half")
    options = {"teacher": teacher, "dataset": ragged, "batch_tokens": 300, "top_k": 5}
    arguments = [f"--{name}={value}" for name, value in (options | {"log_dir": folder / "logs"}).items()]
    generate.capture(Ranks([]), [*arguments, f"--output={folder / 'out.h5'}"])
    with pytest.MonkeyPatch.context() as patch:
        made = Stop(patch)
        made.after = 4
        with pytest.raises(CaptureError, match="lights"):
            generate.capture(Ranks([]), [*arguments, f"--output={folder / 'half.h5'}"])
    gc.collect()
    (folder / "half.h5.partial").rename(folder / "out.h5.partial")
    generate.capture(Ranks([]), [*arguments, "--limit=9", f"--output={folder / 'other.h5'}"])
    return folder, options


def test_a_partial_file_of_other_weights_is_refused_and_kept(
    capture: Capture, half_captured: tuple[Path, dict[str, Any]], teacher: Path, tmp_path: Path
) -> None:
    """The folder is the same, and what is in it is not."""
    folder, options = half_captured
    partial = Path(shutil.copy(folder / "out.h5.partial", tmp_path))
    kept = Path(shutil.copytree(teacher, tmp_path / "kept"))
    try:
        changed = make_llama()
        with torch.no_grad():
            changed.lm_head.weight += 0.001
        changed.save_pretrained(teacher)
        before = partial.read_bytes()
        message = r"out\.h5\.partial belongs to another run\. Its values and this run's differ: the teacher's weights\."
        with pytest.raises(UsageError, match=message):
            capture(**options)
    finally:
        shutil.copytree(kept, teacher, dirs_exist_ok=True)
    assert partial.read_bytes() == before
    gc.collect()
    assert capture(**options).read_bytes() == (folder / "out.h5").read_bytes()


@pytest.mark.usefixtures("no_teacher")
def test_a_partial_file_of_another_split_of_this_name_is_refused(
    capture: Capture, half_captured: tuple[Path, dict[str, Any]], ragged: Path, tmp_path: Path
) -> None:
    folder, options = half_captured
    partial = Path(shutil.copy(folder / "out.h5.partial", tmp_path))
    before, text = partial.read_bytes(), ragged.read_text()
    try:
        ragged.write_text(text.replace('"e"', '"f"'))
        with pytest.raises(
            UsageError, match=r"Its values and this run's differ: the tokens of the rows\. Choose another"
        ):
            capture(**options)
    finally:
        ragged.write_text(text)
    assert partial.read_bytes() == before


@pytest.mark.parametrize("dry_run", [True, False])
def test_another_runs_partial_file_is_replaced_only_on_request(
    capture: Capture, half_captured: tuple[Path, dict[str, Any]], tmp_path: Path, stop: Stop, dry_run: bool
) -> None:
    folder, options = half_captured
    partial = Path(shutil.copy(folder / "out.h5.partial", tmp_path))
    before = partial.read_bytes()
    path = capture(**options | {"top_k": 7, "overwrite": True, "dry_run": dry_run})
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert "Its values and this run's differ: --top_k 5 and 7. This run replaces it." in log
    if dry_run:
        assert partial.read_bytes() == before
        assert not path.exists()
    else:
        assert LogitsFile(path).attributes["top_k"] == 7
        assert sum(map(len, stop.batches)) == np.count_nonzero(np.diff(LogitsFile(path).arrays["position_offsets"]))
        assert not partial.exists()


def test_overwrite_resumes_a_partial_file_of_the_same_run(
    capture: Capture, half_captured: tuple[Path, dict[str, Any]], tmp_path: Path, stop: Stop
) -> None:
    folder, options = half_captured
    partial = Path(shutil.copy(folder / "out.h5.partial", tmp_path))
    shutil.copy(folder / "other.h5", tmp_path / "out.h5")
    done = set(done_rows(partial))
    assert capture(**options, overwrite=True).read_bytes() == (folder / "out.h5").read_bytes()
    assert not {row for batch in stop.batches for row in batch} & done


def test_overwrite_makes_a_finished_file_of_the_same_run_anew(
    capture: Capture, half_captured: tuple[Path, dict[str, Any]], tmp_path: Path, stop: Stop
) -> None:
    folder, options = half_captured
    path = Path(shutil.copy(folder / "out.h5", tmp_path))
    before = path.read_bytes()
    stop.run(capture, 2, **options, overwrite=True)
    assert path.read_bytes() == before
    assert len(done_rows(tmp_path / "out.h5.partial")) < 53
    capture(**options, overwrite=True)
    assert path.read_bytes() == before
    assert stop.batches


def test_a_file_of_another_run_is_kept_until_the_new_one_is_complete(
    capture: Capture, half_captured: tuple[Path, dict[str, Any]], tmp_path: Path, stop: Stop
) -> None:
    folder, options = half_captured
    output = Path(shutil.copy(folder / "other.h5", tmp_path / "out.h5"))
    before = output.read_bytes()
    with pytest.raises(
        UsageError, match=r"out\.h5 belongs to another run.* --limit 9 and None\. .* with --overwrite\.$"
    ):
        capture(**options)
    with pytest.raises(UsageError, match="--top_k must be between 1 and the vocabulary size 384, got 999"):
        capture(**options | {"overwrite": True, "top_k": 999})
    stop.run(capture, 3, **options, overwrite=True)
    assert output.read_bytes() == before
    assert capture(**options, overwrite=True).read_bytes() == (folder / "out.h5").read_bytes()


@pytest.mark.usefixtures("no_teacher")
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_is_not_ours_is_never_touched(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, overwrite: bool
) -> None:
    output = tmp_path / "out.h5"
    output.write_text("precious")
    with pytest.raises(UsageError, match=r"out\.h5 exists and is not a logitgen file\. Choose"):
        capture(teacher=teacher, dataset=ragged, overwrite=overwrite)
    assert output.read_text() == "precious"


# A token budget that the memory decides.

Fitting = Callable[[int], list[int]]


@pytest.fixture
def fitting(monkeypatch: pytest.MonkeyPatch) -> Fitting:
    """Say how many tokens fit; returns how often that was asked for."""

    def set_to(num_tokens: int) -> list[int]:
        asked: list[int] = []

        def fitting_batch_tokens(*arguments: Any) -> int:
            asked.append(num_tokens)
            return num_tokens

        monkeypatch.setattr(generate, "fitting_batch_tokens", fitting_batch_tokens)
        return asked

    return set_to


def test_a_budget_that_auto_chose_gives_the_file_of_one_that_was_typed(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, fitting: Fitting
) -> None:
    options = {"teacher": teacher, "dataset": ragged, "top_k": 5}
    typed = capture(output=tmp_path / "typed.h5", batch_tokens=256, **options).read_bytes()
    asked = fitting(256)
    assert capture(batch_tokens="auto", **options).read_bytes() == typed
    assert asked == [256]
    assert "As many tokens as fit into memory: --batch_tokens 256." in (tmp_path / "logs" / "rank_0.log").read_text()


def test_auto_finds_a_budget_on_this_machine(capture: Capture, teacher: Path, ragged: Path, tmp_path: Path) -> None:
    options = {"teacher": teacher, "dataset": ragged, "top_k": 5}
    path = capture(batch_tokens="auto", **options)
    found = LogitsFile(path).attributes["settings"]["batch_tokens"]
    assert found in [2**power for power in range(16)]
    assert capture(output=tmp_path / "typed.h5", batch_tokens=found, **options).read_bytes() == path.read_bytes()


def test_the_rank_with_the_least_memory_decides(
    capture: Capture, teacher: Path, ragged: Path, fitting: Fitting, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered = Ranks.gathered

    def of_three_ranks(self: Ranks, value: Any, *patience: Any) -> list[Any]:
        return [value, 64, 128] if value == 256 else gathered(self, value, *patience)

    fitting(256)
    monkeypatch.setattr(Ranks, "gathered", of_three_ranks)
    file = LogitsFile(capture(teacher=teacher, dataset=ragged, top_k=5, batch_tokens="auto"))
    assert file.attributes["settings"]["batch_tokens"] == 64


@pytest.mark.parametrize("after", [0, 3])
def test_a_run_that_goes_on_keeps_the_budget_that_auto_chose(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, stop: Stop, fitting: Fitting, after: int
) -> None:
    options = {"teacher": teacher, "dataset": ragged, "top_k": 5}
    whole = capture(output=tmp_path / "whole.h5", batch_tokens=256, **options).read_bytes()
    batches = stop.batches
    fitting(256)
    stop.run(capture, after, batch_tokens="auto", **options)
    assert (tmp_path / "out.h5.partial").exists()
    asked = fitting(64)  # something else needs the memory now
    assert capture(batch_tokens="auto", **options).read_bytes() == whole
    assert stop.batches == batches[after:]
    assert asked == []


def test_a_finished_output_keeps_the_budget_that_auto_chose(
    capture: Capture,
    teacher: Path,
    ragged: Path,
    tmp_path: Path,
    fitting: Fitting,
    request: pytest.FixtureRequest,
) -> None:
    options = {"teacher": teacher, "dataset": ragged, "top_k": 5}
    fitting(256)
    path = capture(batch_tokens="auto", **options)
    before = folder_content(tmp_path)
    request.getfixturevalue("no_teacher")
    fitting(64)
    for batch_tokens in ("auto", 256):
        gc.collect()
        capture(batch_tokens=batch_tokens, **options)
        log = (tmp_path / "logs" / "rank_0.log").read_text().splitlines()[-1]
        assert log.endswith(f"{path} is complete: all 53 rows are there. Nothing is left to do.")
    assert folder_content(tmp_path) == before
    gc.collect()
    with pytest.raises(
        UsageError, match=r"Its values and this run's differ: --batch_tokens 256 and 64\. Choose another"
    ):
        capture(batch_tokens=64, **options)
    assert folder_content(tmp_path) == before


@pytest.mark.parametrize("finished", [True, False])
def test_auto_takes_the_budget_of_a_file_for_which_it_was_typed(
    capture: Capture, half_captured: tuple[Path, dict[str, Any]], tmp_path: Path, fitting: Fitting, finished: bool
) -> None:
    folder, options = half_captured
    shutil.copy(folder / ("out.h5" if finished else "out.h5.partial"), tmp_path)
    asked = fitting(64)
    assert capture(**options | {"batch_tokens": "auto"}).read_bytes() == (folder / "out.h5").read_bytes()
    assert asked == []


@pytest.mark.usefixtures("no_teacher")
def test_auto_does_not_hide_that_a_file_is_of_other_settings(
    capture: Capture, half_captured: tuple[Path, dict[str, Any]], tmp_path: Path, fitting: Fitting
) -> None:
    folder, options = half_captured
    shutil.copy(folder / "out.h5.partial", tmp_path)
    fitting(64)
    with pytest.raises(UsageError, match=r"Its values and this run's differ: --top_k 5 and 6\. Choose another"):
        capture(**options | {"batch_tokens": "auto", "top_k": 6})


def test_overwrite_has_auto_choose_anew(
    capture: Capture, half_captured: tuple[Path, dict[str, Any]], tmp_path: Path, fitting: Fitting
) -> None:
    folder, options = half_captured
    shutil.copy(folder / "out.h5", tmp_path)
    fitting(64)
    file = LogitsFile(capture(**options | {"batch_tokens": "auto", "overwrite": True}))
    assert file.attributes["settings"]["batch_tokens"] == 64


def test_a_dry_run_with_auto_plans_with_what_fits(
    capture: Capture, teacher: Path, ragged: Path, fitting: Fitting, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"teacher": teacher, "dataset": ragged, "top_k": 5, "dry_run": True}
    capture(batch_tokens=64, **options)
    typed = re.search(r"batches +(\d+), ", capsys.readouterr().out)
    fitting(64)
    capture(batch_tokens="auto", **options)
    auto = re.search(r"batches +(\d+), ", capsys.readouterr().out)
    assert typed
    assert auto
    assert auto[1] == typed[1]
    assert int(auto[1]) > 10


def test_a_dry_run_writes_nothing_beside_its_log(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = capture(teacher=teacher, dataset=ragged, dry_run=True)
    assert [found.name for found in tmp_path.iterdir()] == ["logs"]
    printed = " ".join(capsys.readouterr().out.split())
    assert f"{capture(teacher=teacher, dataset=ragged).stat().st_size:,} bytes" in printed
    assert path.exists()


def test_the_end_of_a_run_states_what_is_in_the_file(
    capture: Capture, teacher: Path, ragged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = capture(teacher=teacher, dataset=ragged)
    printed = " ".join(capsys.readouterr().out.split())
    file = LogitsFile(path)
    assert "53 expected, 53 present, 0 missing, 0 duplicates" in printed
    assert f"teacher perplexity {np.exp(-file.arrays['target_logprob'].mean(dtype=np.float64)):,.3f}" in printed
    assert str(path.name) in printed


def test_options_come_from_a_file_too(capture: Capture, teacher: Path, ragged: Path, tmp_path: Path) -> None:
    options = tmp_path / "options.yaml"
    options.write_text(f"teacher: {teacher}\ndataset: {ragged}\ntop_k: 3\nlimit: 5\n")
    assert LogitsFile(capture(config=options, top_k=4)).attributes["top_k"] == 4


def test_the_garbage_collector_takes_all_that_was_imported_for_old_and_goes_on() -> None:
    gc.disable()
    imported: list[list[None]] = [[] for _ in range(50_000)]
    runpy.run_path(str(ROOT / "generate.py"), run_name="generate")
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0  # libraries would report leaks at the end of the process
    assert len(gc.get_objects(generation=0)) + len(gc.get_objects(generation=1)) < len(imported)
