"""The rows of a run before it starts: token by token as the teacher reads them, without its weights."""

from typing import Any

import numpy as np

from logitgen.config import Config
from logitgen.errors import UsageError
from logitgen.split.encoded import remarks
from logitgen.split.load import load_split
from logitgen.split.rows import Rows
from logitgen.split.shapes import columns_read
from logitgen.split.tokens import load_tokenizer, tokenize
from logitgen.teacher.adapter import with_base
from logitgen.teacher.describe import describe_teacher

NUM_SHOWN = 3
"""Rows shown where none is named."""


def preview_facts(config: Config, source_row: int | None) -> dict[str, Any]:
    """Collect the facts of the rows as a run with these options reads them.

    Args:
        config: The options of the run.
        source_row: Row of the split to show, or None for the first rows.

    Raises:
        UsageError: The run would be refused, or there is no such row.
    """
    config = with_base(config)
    info = describe_teacher(config)
    tokenizer = load_tokenizer(config)
    split = load_split(config)
    if source_row is not None and not 0 <= source_row < len(split):
        raise UsageError(f"--row must be between 0 and {len(split) - 1}, got {source_row}.")
    tokens = tokenize(split, tokenizer, config)
    rows = Rows(tokens, config, info.max_length, info.length_switch)
    rows.check_ids(info.vocab_size)
    read = columns_read(split.features, config)
    shown = range(min(NUM_SHOWN, len(rows))) if source_row is None else _rows_of(rows, source_row, config)
    return {
        "teacher": config.teacher,
        "dataset": config.dataset,
        "split": config.split,
        "columns_read": read,
        "columns_not_used": [name for name in split.column_names if name not in read],
        "rows_of_split": len(split),
        "rows": len(rows),
        "rows_cut": rows.num_cut,
        "rows_emptied": rows.num_emptied,
        "tokens": rows.num_tokens,
        "tokens_dropped": rows.num_dropped_tokens,
        "positions": rows.num_captured,
        "longest_row": int(rows.lengths.max()),
        "max_length": info.max_length,
        "warnings": [str(remark) for remark in remarks(tokens)],
        "shown": [_row_facts(rows, int(row), tokenizer) for row in shown],
    }


def _rows_of(rows: Rows, source_row: int, config: Config) -> list[int]:
    """Return the rows that come from a row of the split, or with packing the blocks it may lie in."""
    found = np.flatnonzero(rows.source_row == source_row).tolist()
    if config.packing:
        before = int(np.searchsorted(rows.source_row, source_row)) - 1
        found = [before, *found] if before >= 0 else found
    return list(found)


def _row_facts(rows: Rows, row: int, tokenizer: Any) -> dict[str, Any]:
    """Collect the tokens of a row: id, text, and whether a captured position predicts it."""
    ids, predicted = rows.input_ids(row), set((rows.positions(row) + 1).tolist())
    texts = [tokenizer.decode([token]) if tokenizer else str(token) for token in ids.tolist()]
    return {
        "row": row,
        "source_row": int(rows.source_row[row]),
        "tokens": [
            {"id": token, "text": text, "captured": place in predicted}
            for place, (token, text) in enumerate(zip(ids.tolist(), texts, strict=True))
        ],
    }
