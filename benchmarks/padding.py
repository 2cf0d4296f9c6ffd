"""The share of padding in shuffled training batches: of random rows, of transformers' sampler, of `TokenBatches`.

    python -m benchmarks.padding --teacher FOLDER --dataset ROWS.jsonl

All ways make batches of about as many tokens, out of the rows of a dataset and of made-up rows of log-normal lengths.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, RandomSampler
from transformers import AutoTokenizer
from transformers.trainer_pt_utils import LengthGroupedSampler

from benchmarks.harness import parse, write_report
from benchmarks.synthetic import ragged_lengths
from logitgen import TokenBatches
from logitgen.file.layout import Array

FREE = "TokenBatches, padding_free"


def lengths_of(teacher: str, dataset: str) -> Array:
    """Tokens of each row of a file of texts."""
    texts = [json.loads(line)["text"] for line in Path(dataset).read_text(encoding="utf-8").splitlines()]
    return np.array([len(ids) for ids in AutoTokenizer.from_pretrained(teacher)(texts)["input_ids"]])


def ways(lengths: Array, max_tokens: int) -> Iterator[tuple[str, Iterable[list[int]]]]:
    """Yield every way to make the batches of an epoch."""
    num_rows = max(1, int(max_tokens / lengths.mean()))
    generator = torch.Generator().manual_seed(0)
    grouped = LengthGroupedSampler(num_rows, lengths=lengths.tolist(), generator=generator)
    yield "random rows", BatchSampler(RandomSampler(lengths, generator=generator), num_rows, drop_last=False)
    yield "LengthGroupedSampler", BatchSampler(grouped, num_rows, drop_last=False)
    yield "TokenBatches", TokenBatches(lengths, max_tokens)
    yield FREE, TokenBatches(lengths, max_tokens, padding_free=True)


def line_of(way: str, lengths: Array, batches: list[list[int]]) -> dict[str, Any]:
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
    options = parse(__doc__, teacher=str, dataset=str, rows=10_000, max_tokens=4096)
    rows = {
        Path(options.dataset).name: lengths_of(options.teacher, options.dataset),
        "log-normal": ragged_lengths(options.rows, 256, options.max_tokens),
    }
    table = [
        {"rows": f"{name}, {len(lengths):,}"} | line_of(way, lengths, list(batches))
        for name, lengths in rows.items()
        for way, batches in ways(lengths, options.max_tokens)
    ]
    write_report(options.output, "padding", table, {"padding, %": ".1f"})


if __name__ == "__main__":
    main()
