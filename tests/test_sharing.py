"""Captures that read shared prefixes once say what a direct forward pass over every row says.

    PYTHONPATH=. python tests/test_sharing.py

Prints how far every family is from direct passes, as docs/benchmarks.md shows it.
"""

import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from batches import batch_of, captured, layout_of
from conftest import make_llama, write_jsonl
from families import FAMILIES, TREES, VOCAB, assert_row_is_right, make
from torch import Tensor
from transformers.integrations import sdpa_attention

from logitgen import LogitsFile, UsageError
from logitgen.__main__ import main
from logitgen.split.batch import Batch
from logitgen.split.tree import PassCost
from logitgen.teacher import model as teacher_module
from logitgen.teacher.model import Teacher
from logitgen.teacher.prefix import reads_on

Capture = Callable[..., Path]

CONTINUES_WRONGLY = "mamba"
"""A family whose state transformers does not continue with several tokens at once."""

SHARING = [name for name in FAMILIES if name not in (CONTINUES_WRONGLY, "phi3 with long rope")]
"""Of the last one only rows within its short context share prefixes, which are too long for that here."""


@pytest.fixture
def trees(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "trees.jsonl", [{"input_ids": ids} for ids in TREES])


def tree_of(rows: list[list[int]]) -> Batch:
    """All rows as one batch, which reads what they share once, with as many cuts as there are."""
    rows = sorted(rows)
    shared = [0]
    for before, row in pairwise(rows):
        same = [one == other for one, other in zip(before[:-1], row[:-1], strict=False)]
        shared.append(same.index(False) if False in same else len(same))
    return batch_of(rows, shared=shared, batch_tokens=127)


@torch.no_grad()
def logprobs(model: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probs of all captured positions, read with shared prefixes, as a padded batch and row by row."""
    wrapped = Teacher(model, VOCAB)
    distinct = batch.distinct(of_each_row=True)
    shared_UV = torch.cat([logits_CV for _, logits_CV, _ in wrapped.logits(batch.passes, batch.slots[distinct.index])])
    whole = batch_of([ids.tolist() for ids in batch.tokens])
    batched_PV = model(input_ids=torch.from_numpy(whole.passes[0].input_ids), use_cache=False).logits.flatten(0, 1)
    alone = [
        model(input_ids=torch.from_numpy(ids[:-1].astype(np.int64))[None], use_cache=False).logits[0]
        for ids in batch.tokens
    ]
    order = torch.from_numpy(np.argsort(distinct.index))
    every = (shared_UV[order], batched_PV[torch.from_numpy(whole.slots)], torch.cat(alone))
    shared_PV, batched_PV, alone_PV = (values.float().log_softmax(-1) for values in every)
    return shared_PV, batched_PV, alone_PV


@pytest.mark.parametrize("family", SHARING)
def test_every_family_reads_on_from_a_shared_prefix(family: str) -> None:
    batch = tree_of(TREES)
    assert len(batch.passes) > 5
    shared_PV, _, alone_PV = logprobs(make(family), batch)
    torch.testing.assert_close(shared_PV, alone_PV, atol=1e-4 if "qwen3.5" in family else 2e-5, rtol=0)
    for dtype in (torch.float32, torch.bfloat16):
        assert Teacher(make(family).to(dtype), VOCAB).share_prefixes()


def test_keys_are_not_copied_for_every_head_that_shares_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def repeat_kv(states: Tensor, times: int) -> Tensor:
        raise AssertionError(f"{times} copies of {states.shape}")

    monkeypatch.delenv("TRANSFORMERS_SDPA_FORCE_GQA", raising=False)
    monkeypatch.setattr(sdpa_attention, "repeat_kv", repeat_kv)
    wrapped, batch = Teacher(make_llama(VOCAB, num_key_value_heads=2), VOCAB), tree_of(TREES)
    assert list(wrapped.logits(batch.passes, batch.slots[batch.distinct(of_each_row=False).index]))


@pytest.mark.parametrize("family", ["llama", "mistral with a sliding window", "gemma2 with both soft-caps", "mixtral"])
def test_bfloat16_is_as_far_from_float32_as_rows_read_whole(family: str) -> None:
    batch = tree_of(TREES)
    _, _, exact_PV = logprobs(make(family), batch)
    shared_PV, _, alone_PV = logprobs(make(family).bfloat16(), batch)
    assert (shared_PV - exact_PV).abs().mean() <= 1.2 * (alone_PV - exact_PV).abs().mean()


def test_a_family_that_reads_on_wrongly_is_read_whole(
    capture: Capture, trees: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make(CONTINUES_WRONGLY)
    model.save_pretrained(tmp_path / "teacher")
    file = LogitsFile(capture(teacher=tmp_path / "teacher", dataset=trees, top_k=11, max_length=64))
    assert "are read again in every row: the logits differ." in capsys.readouterr().err
    assert "prefixes" not in file.attributes["computation"]
    for index, ids in enumerate(TREES):
        with torch.no_grad():
            assert_row_is_right(file.row(index), model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Mamba", "FalconMamba"])
def test_a_state_that_is_not_continued_is_found_with_small_weights_too(name: str, dtype: torch.dtype) -> None:
    """As they are before any training, when prefixes hardly matter."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**sizes))
    assert not Teacher(model.to(dtype).eval(), VOCAB).share_prefixes()


@pytest.mark.parametrize(
    ("error", "effect", "expected"),
    [(0.0, 0.0, True), (1e-5, 1.0, True), (0.9e-4, 3.7e-4, True), (0.9e-4, 3.5e-4, False), (1.1e-4, 1.0, False)],
)
def test_logits_must_be_near_those_of_whole_rows_and_far_from_others(
    error: float, effect: float, expected: bool
) -> None:
    whole_PV = torch.tensor([[1.0, -1.0, -torch.inf, torch.finfo(torch.float32).min]])  # two ids are masked
    shift_PV = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert reads_on(whole_PV + error * shift_PV, whole_PV, whole_PV + effect * shift_PV) is expected


def test_a_teacher_that_returns_no_cache_is_read_whole(caplog: pytest.LogCaptureFixture) -> None:
    config = transformers.OpenAIGPTConfig(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4)
    assert not Teacher(transformers.AutoModelForCausalLM.from_config(config).eval(), VOCAB).share_prefixes()
    assert "are read again in every row: it returns no cache that could be continued." in caplog.text


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 11},
        {"top_k": 11, "encoding": "packed"},
        {"top_k": 11, "encoding": "packed16"},
        {"capture": "full"},
        {"capture": "hidden"},
        {"capture": "hidden", "encoding": "packed"},
    ],
)
def test_every_kind_keeps_what_rows_read_whole_keep(
    options: dict[str, Any], capture: Capture, trees: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teacher_module, "CHUNK_LOGITS", 7 * VOCAB)  # chunks end inside prefixes and suffixes
    make("llama").save_pretrained(tmp_path / "teacher")
    common = {"teacher": tmp_path / "teacher", "dataset": trees, "batch_tokens": 256} | options
    shared = LogitsFile(capture(**common))
    whole = LogitsFile(capture(**common, share_prefixes=False, output=tmp_path / "whole.h5"))
    assert shared.attributes["computation"]["prefixes"] == "read once"
    assert "prefixes" not in whole.attributes["computation"]
    for index in range(len(shared)):
        here, there = shared.row(index), whole.row(index)
        assert here.keys() == there.keys()
        for name, values in here.items():
            packed, plain = {"kept_logprobs": 0.2, "hidden": 0.1}, {"kept_logprobs": 2e-3, "logits": 2e-3}
            bound = packed if "encoding" in options else plain
            if name != "kept_ids":  # of equal rounded values either may be kept
                np.testing.assert_allclose(values, there[name], atol=bound.get(name, 2e-5), rtol=2e-3, err_msg=name)
    assert main(["verify", str(shared.path), "--teacher"]) == 0


def test_draws_of_rows_that_share_a_prefix_are_each_rows_own(capture: Capture, tmp_path: Path) -> None:
    """They are those of rows read whole: they depend on the row, the position and the seed alone."""
    make("llama").save_pretrained(tmp_path / "teacher")
    data = write_jsonl(tmp_path / "rows.jsonl", [{"input_ids": ids} for ids in TREES])
    common = {"teacher": tmp_path / "teacher", "dataset": data, "capture": "sample", "top_k": 12, "batch_tokens": 256}
    shared = LogitsFile(capture(**common))
    whole = LogitsFile(capture(**common, share_prefixes=False, output=tmp_path / "whole.h5"))
    same = [shared.row(row)["kept_ids"] == whole.row(row)["kept_ids"] for row in range(len(shared))]
    assert np.concatenate(same).mean() > 0.99  # a draw on the edge may go the other way
    first, second = (shared.row(row)["kept_ids"][:30] for row in (0, 1))
    assert (first != second).any()


def test_a_tree_that_does_not_fit_into_memory_is_halved(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_llama(50)
    rows = [[(3 * at) % 50 for at in range(20)] + [(row + 7 * at) % 50 for at in range(5)] for row in range(6)]
    batch = batch_of(rows, shared=[0] + [20] * 5, batch_tokens=128, pass_cost=PassCost(1, 0))
    layout = layout_of(batch)
    whole = captured(batch, layout, model)
    logits, tried = Teacher.logits, []

    def limited(self: Teacher, passes: Any, slots: Any) -> Any:
        tried.append([each.input_ids.shape for each in passes])
        if sum(each.input_ids.size for each in passes) > 36:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        yield from logits(self, passes, slots)

    monkeypatch.setattr(Teacher, "logits", limited)
    halved = captured(batch, layout, model)
    assert tried == [[(1, 20), (6, 4)], [(1, 20), (3, 4)], [(1, 20), (3, 4)]]
    assert "6 rows of 24 tokens do not fit into the memory of cpu: they are computed in halves." in caplog.text
    for name in whole.keys() - {"crc32"}:
        np.testing.assert_allclose(halved[name], whole[name], rtol=2**-10, atol=1e-5)


def test_a_file_is_resumed_as_it_was_begun(capture: Capture, teacher: Path, trees: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.h5.partial"
    with pytest.raises(UsageError, match=r"differ: --share_prefixes True and False\.") as refused:
        _begin(capture, teacher, trees, path)
    assert path.exists()
    assert "\n" not in str(refused.value)


def _begin(capture: Capture, teacher: Path, trees: Path, partial: Path) -> None:
    capture(teacher=teacher, dataset=trees, top_k=4).rename(partial)
    capture(teacher=teacher, dataset=trees, top_k=4, share_prefixes=False)


def test_what_is_saved_is_said_before_and_after_a_run(
    capture: Capture, teacher: Path, trees: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capture(teacher=teacher, dataset=trees, top_k=4, batch_tokens=256, dry_run=True)
    before = capsys.readouterr().out
    capture(teacher=teacher, dataset=trees, top_k=4, batch_tokens=256)
    after = capsys.readouterr().out
    (share,) = {line.split()[2] for text in (before, after) for line in text.splitlines() if "shared prefixes" in line}
    read = sum(len(ids) - 1 for ids in TREES)
    assert 0.3 < float(share.rstrip("%")) / 100 < 1 - 36 / read
    capture(teacher=teacher, dataset=trees, top_k=4, share_prefixes=False, overwrite=True)
    assert "shared prefixes" not in capsys.readouterr().out


def test_the_teacher_reads_fewer_tokens_where_rows_share_prefixes(
    capture: Capture, teacher: Path, trees: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, body = [], Teacher._body

    def counted(self: Teacher, input_ids_LT: Tensor, **options: Any) -> Any:
        read.append(input_ids_LT.numel())
        return body(self, input_ids_LT, **options)

    monkeypatch.setattr(Teacher, "share_prefixes", lambda self: True)  # which reads a few tokens itself
    monkeypatch.setattr(Teacher, "_body", counted)
    numbers = []
    for share in (True, False):
        read.clear()
        capture(teacher=teacher, dataset=trees, top_k=4, batch_tokens=256, share_prefixes=share, overwrite=True)
        numbers.append(sum(read))
    assert numbers[0] < 0.6 * numbers[1]


def table() -> str:
    """Write down how far every family is from direct passes, in nats."""
    batch = tree_of(TREES)
    lines = ["| family | float32 | batched | bfloat16 | batched | row by row |", "| --- |" + " ---: |" * 5]
    for family in SHARING:
        shared_PV, batched_PV, exact_PV = logprobs(make(family), batch)
        found = [f"{float((values - exact_PV).abs().max()):.1e}" for values in (shared_PV, batched_PV)]
        rounded = logprobs(make(family).bfloat16(), batch)
        found += [f"{float((values - exact_PV).abs().mean()):.4f}" for values in rounded]
        lines.append(f"| {family} | {' | '.join(found)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(f"{table()}\n")
