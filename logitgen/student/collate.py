"""Rows become one batch, padded or one after another.

Shape letters: B rows of a batch, T tokens, K kept per position, V vocabulary.
"""

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from logitgen.errors import UsageError
from logitgen.file.layout import Array
from logitgen.student.dataset import IGNORED_LABEL, Row


def collate(rows: Sequence[Row], pad_token_id: int = 0, *, padding_free: bool = False) -> Row:
    """Join rows into one batch, everything aligned with the student's logits of shape [B, T, V].

    Args:
        rows: Rows of a `LogitsDataset`.
        pad_token_id: Token that fills up `input_ids`, on the right.
        padding_free: Put the rows one after another instead, [1, T] with the T tokens of all.

    Returns:
        `input_ids` and `attention_mask` int64[B, T]; `captured` bool[B, T], true where the teacher's distribution is
        known; the captured values at these places (`kept_ids` int64[B, T, K], ...) and 0 elsewhere; `labels`
        int64[B, T], the tokens that captured positions predict, -100 elsewhere, unshifted as transformers wants them.
        With `padding_free`, `position_ids` int64[1, T], which start at 0 in each row, instead of `attention_mask`.

    Raises:
        UsageError: There are no rows, or a row's positions or values do not fit its tokens.

    Source: `DataCollatorForLanguageModeling` of TRL, whose `padding_free` leaves out the mask too: with one, attention
    kernels would take the rows for a single one.
    """
    if not len(rows):
        raise UsageError("A batch needs at least one row, got none. Leave empty batches out.")
    # In numpy: torch would share each small copy out among threads, which can take ten times as long as the copy.
    arrays = [{name: tensor.numpy() for name, tensor in row.items()} for row in rows]
    lengths = [len(row["input_ids"]) for row in arrays]
    shape = (1, sum(lengths)) if padding_free else (len(rows), max(lengths))
    batch = {
        "input_ids": np.full(shape, pad_token_id),
        "position_ids" if padding_free else "attention_mask": np.zeros(shape, np.int64),
        "captured": np.zeros(shape, np.bool_),
        "labels": np.full(shape, IGNORED_LABEL),
    }
    for name, values in arrays[0].items():
        if name not in ("input_ids", "positions"):
            batch[name] = np.zeros((*shape, *values.shape[1:]), values.dtype)
    for index, (row, length, end) in enumerate(zip(arrays, lengths, accumulate(lengths), strict=True)):
        _check_whole(row)
        place = (0, slice(end - length, end)) if padding_free else (index, slice(length))
        _fill({name: array[place] for name, array in batch.items()}, row)
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _fill(part: dict[str, Array], row: dict[str, Array]) -> None:
    """Write a row of T tokens into its part of a batch, views of shape [T, ...]."""
    tokens, positions = row["input_ids"], row["positions"]
    part["input_ids"][:] = tokens
    if "position_ids" in part:
        part["position_ids"][:] = np.arange(len(tokens))
    else:
        part["attention_mask"][:] = 1
    part["captured"][positions] = True
    part["labels"][positions + 1] = tokens[positions + 1]
    for name in row.keys() - {"input_ids", "positions"}:
        part[name][positions] = row[name]


def _check_whole(row: dict[str, Array]) -> None:
    """Refuse a row that was cut by hand in one place and not in another."""
    num_tokens, positions = len(row["input_ids"]), row["positions"]
    remedy = "Cut rows with LogitsDataset(..., max_length=...)."
    if len(positions) and positions.max() >= num_tokens - 1:
        raise UsageError(
            f"A row of {num_tokens} tokens must have positions below {num_tokens - 1}, got {positions.max()}. {remedy}"
        )
    for name, values in row.items():
        if name != "input_ids" and len(values) != len(positions):
            raise UsageError(
                f"A row of {len(positions)} positions must have as many {name}, got {len(values)}. {remedy}"
            )
