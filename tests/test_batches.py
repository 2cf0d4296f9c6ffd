"""The rows of every training batch: budgets, padding, epochs, ranks, and the loss of both forms of a batch."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from conftest import PAGES, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from logitgen import DistillationLoss, LogitsDataset, TokenBatches, UsageError, collate

Capture = Callable[..., Path]

LENGTHS = np.random.default_rng(0).lognormal(4, 0.7, 500).astype(int).clip(2, 900)
"""Log-normal, as those of prose: 2 to 900 tokens."""


def sizes(batches: TokenBatches, *, padded: bool) -> list[int]:
    """Tokens of every batch."""
    rows = [LENGTHS[batch] for batch in batches]
    return [len(lengths) * max(lengths) if padded else sum(lengths) for lengths in rows]


@pytest.mark.parametrize("padding_free", [False, True])
def test_every_row_is_in_a_batch_once_and_no_batch_exceeds_its_budget(padding_free: bool) -> None:
    batches = TokenBatches(LENGTHS, 1000, padding_free=padding_free)
    assert len(batches) == len(list(batches)) > 10
    assert sorted(row for batch in batches for row in batch) == list(range(500))
    assert max(sizes(batches, padded=not padding_free)) <= 1000


def test_similar_rows_share_a_batch_so_that_hardly_anything_is_padding() -> None:
    for max_tokens in (1000, 4000):
        padded = sum(sizes(TokenBatches(LENGTHS, max_tokens), padded=True))
        assert 0 < 1 - LENGTHS.sum() / padded < 0.05
    shuffled = np.random.default_rng(0).permutation(LENGTHS).reshape(-1, 4)
    assert 1 - LENGTHS.sum() / (4 * shuffled.max(1).sum()) > 0.3


def test_batches_are_cut_as_worked_out_by_hand() -> None:
    lengths = [10, 30, 10, 29, 100]
    assert sorted(map(sorted, TokenBatches(lengths, 60))) == [[0, 2], [1, 3], [4]]
    assert sorted(map(sorted, TokenBatches(lengths, 59))) == [[0, 2], [1], [3], [4]]
    assert sorted(map(len, TokenBatches(lengths, 1000, padding_free=True))) == [5]


def test_rows_of_any_length_share_a_batch_that_needs_no_padding() -> None:
    batches = TokenBatches(LENGTHS, 2000, padding_free=True)
    full = sorted(sizes(batches, padded=False))[1:]  # the last batch has what is left
    assert min(full) > 2000 - LENGTHS.max()
    spread = [LENGTHS[batch].std() for batch in batches if len(batch) > 2]
    assert np.median(spread) > LENGTHS.std() / 3


@pytest.mark.parametrize("padding_free", [False, True])
def test_rows_without_tokens_are_in_no_batch(padding_free: bool) -> None:
    batches = TokenBatches([0, 2, 0, 3], 2, padding_free=padding_free, num_replicas=2)
    assert sorted(batches) == [[1], [3]]


@pytest.mark.parametrize("padding_free", [False, True])
def test_an_epoch_has_its_own_order_that_only_the_seed_decides(padding_free: bool) -> None:
    batches, again = (TokenBatches(LENGTHS, 1000, seed=3, padding_free=padding_free) for _ in range(2))
    first = list(batches)
    assert list(batches) == first == list(again)
    batches.set_epoch(1)
    assert list(batches) != first
    assert sorted(map(sorted, batches)) != sorted(map(sorted, first))
    batches.set_epoch(0)
    assert list(batches) == first
    assert list(TokenBatches(LENGTHS, 1000, seed=4, padding_free=padding_free)) != first


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 100), st.integers(1, 5), st.booleans())
def test_ranks_get_as_many_batches_and_each_row_goes_to_one(
    lengths: list[int], max_tokens: int, num_replicas: int, padding_free: bool
) -> None:
    if len(lengths) < num_replicas:
        return
    options = {"padding_free": padding_free, "num_replicas": num_replicas}
    shares = [list(TokenBatches(lengths, max_tokens, **options, rank=rank)) for rank in range(num_replicas)]
    assert len({len(share) for share in shares}) == 1
    rows = [row for share in shares for batch in share for row in batch]
    assert set(rows) == set(range(len(lengths)))
    repeats = len(rows) - len(lengths)
    assert not repeats or (repeats < num_replicas and all(len(batch) == 1 for share in shares for batch in share))
    together = list(TokenBatches(lengths, max_tokens, **options))
    assert together == [batch for step in zip(*shares, strict=True) for batch in step]


def test_an_epoch_goes_on_where_it_stopped() -> None:
    batches = TokenBatches(LENGTHS, 1000, num_replicas=2, rank=1)
    batches.set_epoch(2)
    whole = list(batches)
    batches.set_epoch(2, skip=5)
    assert list(batches) == whole[5:]
    assert len(batches) == len(whole) - 5


def test_accelerate_splits_skips_and_shuffles_the_batches_as_the_sampler_does() -> None:
    def loader(rank: int) -> DataLoader:
        sampler = TokenBatches(LENGTHS, 1000, num_replicas=2)
        plain = DataLoader(range(500), batch_sampler=sampler, collate_fn=list)
        ready = prepare_data_loader(
            plain, num_processes=2, process_index=rank, even_batches=False, put_on_device=False, rng_types=[]
        )
        sampler.set_epoch(1)
        return ready

    for rank in range(2):
        expected = TokenBatches(LENGTHS, 1000, num_replicas=2, rank=rank)
        expected.set_epoch(1)
        sharded = loader(rank).batch_sampler
        assert list(sharded) == list(expected)
        assert len(sharded) == len(expected)
    alone = DataLoader(range(500), batch_sampler=TokenBatches(LENGTHS, 1000), collate_fn=list)
    assert list(skip_first_batches(alone, 4)) == list(alone)[4:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, r"max_tokens must be at least 1, got 0\. Give"),
        ({"rank": 1}, r"rank must be between 0 and 0, got 1\. Count"),
        ({"num_replicas": 501}, r"Every rank needs a row, got 500 rows for 501 ranks\. Use fewer"),
    ],
)
def test_batches_that_cannot_be_made_are_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        TokenBatches(LENGTHS, **({"max_tokens": 100} | options))


def test_the_loss_is_the_same_with_padding_and_without(capture: Capture, teacher: Path, ragged: Path) -> None:
    dataset = LogitsDataset(capture(teacher=teacher, dataset=ragged, top_k=16))
    loss = DistillationLoss(dataset, cross_entropy_weight=0.3)
    student = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float64)
    with torch.no_grad():
        student.lm_head.weight *= 1.5
    rows = [dataset[row] for row in (3, 20, 1, 9)]
    padded, free = collate(rows), collate(rows, padding_free=True)
    expected = loss(student(padded["input_ids"], attention_mask=padded["attention_mask"]).logits, padded)
    logits = student(free["input_ids"], position_ids=free["position_ids"], use_cache=False).logits
    assert loss(logits, free).item() == pytest.approx(expected.item(), rel=1e-9)
    assert expected.item() > 0.01


def test_the_recipe_gives_each_file_its_share_of_the_positions(
    capture: Capture, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the whole training, and of batches by tokens, whatever lengths and numbers of rows the files have."""
    monkeypatch.chdir(tmp_path)
    lengths = {"chat": [5, 9, 30, 1, 12], "code": [60, 2, 41, 55, 17, 80, 33, 0, 21, 10, 44, 62]}
    for first_id, (name, sizes) in zip((10, 200), lengths.items(), strict=True):
        data = write_jsonl(tmp_path / f"{name}.jsonl", [{"input_ids": [first_id] * size} for size in sizes])
        capture(teacher=teacher, dataset=data, output=tmp_path / f"{name}.h5", top_k=2)
    (code,) = re.findall(r"```python\n([^`]*code\.h5.*?)```", PAGES["docs/training.md"], re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    dataset = names["dataset"]
    assert len(dataset) == 20_000
    found = {10: 0, 200: 0}
    batches = TokenBatches(dataset.lengths, 4096)
    for batch in DataLoader(dataset, batch_sampler=batches, collate_fn=collate):
        for first_id in found:
            found[first_id] += int((batch["captured"] & (batch["input_ids"] == first_id)).sum())
    # A row of the shorter file has 10.4 positions, of the longer 34.5. The standard error of the share is 0.003.
    assert found[10] / sum(found.values()) == pytest.approx(0.7, abs=0.012)
    assert len(batches) > 50
