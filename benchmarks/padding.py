"""The share of padding in shuffled training batches: of random rows, of transformers' sampler, of `TokenBatches`.

    python -m benchmarks.padding --teacher FOLDER --dataset ROWS.jsonl

All ways make batches of about as many tokens, out of the rows of a dataset and of made-up rows of log-normal lengths.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import BatchSampler, RandomSampler
from transformers import AutoTokenizer
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.harness import Row, parse, write_report
from benchmarks.synthetic import ragged_lengths
from logitgen import TokenBatches
from logitgen.file.layout import Array

MAX_TOKENS = 4096
FREE = "TokenBatches, padding_free"


def ways(lengths: Array) -> Iterator[tuple[str, Iterable[list[int]]]]:
    """Yield every way to make the batches of an epoch."""
    num_rows = max(1, int(MAX_TOKENS / lengths.mean()))
    generator = torch.Generator().manual_seed(0)
    grouped = LengthGroupedSampler(num_rows, lengths=lengths.tolist(), generator=generator)
    yield "random rows", BatchSampler(RandomSampler(lengths, generator=generator), num_rows, drop_last=False)
    yield "LengthGroupedSampler", BatchSampler(grouped, num_rows, drop_last=False)
    yield "TokenBatches", TokenBatches(lengths, MAX_TOKENS)
    yield FREE, TokenBatches(lengths, MAX_TOKENS, padding_free=True)


def line_of(way: str, lengths: Array, batches: list[list[int]]) -> Row:
    """Count the batches, their tokens and the share of padding."""
    tokens = [int(lengths[batch].sum()) for batch in batches]
    padded = tokens if way == FREE else [len(batch) * int(lengths[batch].max()) for batch in batches]
    return {
        "way": way,
        "batches": len(batches),
        "padding, %": 100 * (1 - sum(tokens) / sum(padded)),
        "tokens, median": float(np.median(tokens)),
        "least": min(tokens),
        "most, with padding": max(padded),
    }


def main() -> None:
    """Make the batches of one epoch in every way."""
    options = parse(__doc__, teacher=str, dataset=Path, rows=10_000)
    texts = [json.loads(line)["text"] for line in options.dataset.read_text(encoding="utf-8").splitlines()]
    tokenized = AutoTokenizer.from_pretrained(options.teacher)(texts)["input_ids"]
    rows = {
        options.dataset.name: np.array([len(ids) for ids in tokenized]),
        "log-normal": ragged_lengths(options.rows, 256, MAX_TOKENS),
    }
    table = [
        {"rows": f"{name}, {len(lengths):,}"} | line_of(way, lengths, list(batches))
        for name, lengths in rows.items()
        for way, batches in ways(lengths)
    ]
    write_report(options.output, "padding", table, {"padding, %": ".1f"})


if __name__ == "__main__":
    main()
