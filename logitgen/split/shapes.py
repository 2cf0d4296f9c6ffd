"""The supported shapes of rows, recognised by their columns and turned into tokens."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, cast

import datasets
from transformers import PreTrainedTokenizerBase

from logitgen.config import Config
from logitgen.errors import UsageError
from logitgen.split.chats import CHAT_COLUMNS, Tokens, chat_pairs, chats, check_fast, ended
from logitgen.split.messages import kind_of

Encode = Callable[[dict[str, list[Any]], list[int]], Tokens]

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that is no completion, as transformers has it."""

COMPLETION_COLUMNS = ("completion_mask", "assistant_masks", "loss_mask", "labels")
"""Columns beside `input_ids` that say which tokens are the completion; the first one found is believed."""


def columns_read(columns: Mapping[str, Any], config: Config) -> list[str]:
    """Name the columns, given with their features, that decide what the teacher reads or what is captured."""
    if config.text_column is not None:
        return [name for name in columns if name == config.text_column]
    if "input_ids" in columns:
        marks = [name for name in COMPLETION_COLUMNS if name in columns and config.completion_only][:1]
        names = ["input_ids", "attention_mask", "position_ids", "seq_lengths", *marks]
    elif chats_in := [name for name in CHAT_COLUMNS if name in columns]:
        names = [chats_in[0], "tools", "chat_template_kwargs"]
    elif {"prompt", "completion"} <= set(columns):
        names = ["prompt", "completion", *(["tools", "chat_template_kwargs"] if _pairs_of_messages(columns) else [])]
    else:
        names = ["text"]
    return [name for name in names if name in columns]


def encoder(split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase | None, config: Config) -> Encode:
    """Choose the function that turns a batch of rows into tokens, by the columns of the split."""
    columns = split.column_names
    if config.text_column is None and "input_ids" in columns:
        if config.completion_only and not set(COMPLETION_COLUMNS) & set(columns):
            raise UsageError(
                "--completion_only with ready input_ids needs a completion_mask column (1 for a completion's token) or "
                f"one of {', '.join(COMPLETION_COLUMNS[1:])}; the split has {_names(columns)}."
            )
        return lambda rows, indices: _ready(rows, indices, config)
    if tokenizer is None:
        raise UsageError(
            f"--teacher {config.teacher} has no tokenizer that can be loaded, and the rows are text. "
            "Add the tokenizer's files to the folder, or give a dataset with input_ids."
        )
    if config.text_column is None and (set(CHAT_COLUMNS) & set(columns) or _pairs_of_messages(split.features)):
        if tokenizer.chat_template is None:
            raise UsageError(
                f"The rows are messages, but the tokenizer of {config.teacher} has no chat template. "
                "Use a teacher that has one, or name a column of plain text with --text_column."
            )
        if "tools" in columns and "tools" not in str(tokenizer.chat_template):
            logger.warning("The rows have tools, but the teacher's chat template shows it none.")
        render = chats if set(CHAT_COLUMNS) & set(columns) else chat_pairs
        return lambda rows, indices: render(rows, indices, tokenizer, config)
    if config.text_column is None and {"prompt", "completion"} <= set(columns):
        return lambda rows, indices: _pairs(rows, indices, tokenizer, config)
    column = _text_column(columns, config)
    return lambda rows, indices: _texts(rows, indices, column, tokenizer, config)


def _pairs_of_messages(columns: Mapping[str, Any]) -> bool:
    """Tell whether prompt and completion are lists of messages, by their features."""
    sides = [getattr(columns.get(name), "feature", None) for name in ("prompt", "completion")]
    return all(isinstance(side, dict) for side in sides)


def _text_column(columns: list[str], config: Config) -> str:
    """Return the column of plain text."""
    column = config.text_column or "text"
    if column not in columns:
        expected = (
            f"--text_column {column} is not a column"
            if config.text_column
            else "Rows need input_ids, messages, prompt and completion, or text"
        )
        raise UsageError(f"{expected}; the split has {_names(columns)}. Name a column of text with --text_column.")
    if config.completion_only:
        raise UsageError(
            f"--completion_only needs rows that say what the completion is (prompt and completion, messages, or "
            f"input_ids with completion_mask); '{column}' is plain text."
        )
    return column


def _names(columns: list[str]) -> str:
    return f"columns {', '.join(columns)}" if columns else "no columns"


def _texts(rows: Any, indices: list[int], column: str, tokenizer: PreTrainedTokenizerBase, config: Config) -> Tokens:
    return {"input_ids": ended(_encode(tokenizer, _strings(rows, indices, column)), tokenizer, config)}


def _pairs(rows: Any, indices: list[int], tokenizer: PreTrainedTokenizerBase, config: Config) -> Tokens:
    """Tokenise prompt and completion together. A token with any character of the completion belongs to it."""
    prompts, completions = (_strings(rows, indices, column) for column in ("prompt", "completion"))
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    if not config.completion_only:
        return {"input_ids": ended(_encode(tokenizer, texts), tokenizer, config)}
    check_fast(tokenizer, "text")
    encoded = tokenizer(texts, verbose=False, return_offsets_mapping=True)
    whole = ended(encoded["input_ids"], tokenizer, config)
    prompt_tokens = map(_num_tokens_within, encoded["offset_mapping"], map(len, prompts))
    masks = [[0] * count + [1] * (len(ids) - count) for ids, count in zip(whole, prompt_tokens, strict=True)]
    return {"input_ids": whole, "completion_mask": masks}


def _num_tokens_within(offsets: list[tuple[int, int]], length: int) -> int:
    """Count the tokens before the first that reaches beyond `length` characters."""
    return next((index for index, (_, end) in enumerate(offsets) if end > length), len(offsets))


def _ready(rows: Any, indices: list[int], config: Config) -> Tokens:
    """Take tokens as they are, without padding, and say which belong to the completion."""
    tokens: Tokens = {"input_ids": [], **({"completion_mask": []} if config.completion_only else {})}
    for number, index in enumerate(indices):
        row = {name: values[number] for name, values in rows.items()}
        ids = _checked_ids(row["input_ids"], index)
        read = _unpadded(row, len(ids), index)
        _check_single(row, read, index)
        tokens["input_ids"].append(ids[read])
        if config.completion_only:
            tokens["completion_mask"].append(_completion_of(row, ids, index)[read])
    return tokens


def _checked_ids(ids: Any, index: int) -> list[int]:
    if not isinstance(ids, list):
        raise UsageError(f"Row {index}: 'input_ids' must be a list of token ids, got {kind_of(ids)}.")
    for token in ids:
        if type(token) is not int or not 0 <= token < 2**31:
            raise UsageError(f"Row {index}: 'input_ids' must be a list of token ids, {token!r:.40} is none.")
    return ids


def _flags(row: dict[str, Any], name: str, length: int, index: int) -> list[int]:
    """Return a column of zeros and ones, one per token."""
    flags = row[name]
    if not isinstance(flags, list) or len(flags) != length or any(flag not in (0, 1) for flag in flags):
        raise UsageError(f"Row {index}: '{name}' must be {length} zeros and ones, one per token, got {kind_of(flags)}.")
    return flags


def _unpadded(row: dict[str, Any], length: int, index: int) -> slice:
    """Find the tokens between the padding at a row's ends, which its `attention_mask` marks with zeros."""
    if row.get("attention_mask") is None:
        return slice(0, length)
    mask = _flags(row, "attention_mask", length, index)
    start, num_read = (mask.index(1), sum(mask)) if 1 in mask else (0, 0)
    if not all(mask[start : start + num_read]):
        raise UsageError(
            f"Row {index}: 'attention_mask' hides tokens in the middle of the row, which a teacher cannot leave out. "
            "Remove them from the row."
        )
    return slice(start, start + num_read)


def _check_single(row: dict[str, Any], read: slice, index: int) -> None:
    """Refuse a row of several packed documents: each would be read with all documents before it."""
    ids = row.get("position_ids")
    restarts = isinstance(ids, list) and ids[read] != list(range(read.stop - read.start))
    lengths = row.get("seq_lengths")
    if restarts or (isinstance(lengths, list) and len(lengths) > 1):
        name, what = ("position_ids", "do not count 0, 1, 2, ...") if restarts else ("seq_lengths", "are several")
        raise UsageError(
            f"Row {index}: its '{name}' {what}, so it holds packed documents, and the teacher would read each with "
            "those before it. Give every document a row of its own."
        )


def _completion_of(row: dict[str, Any], ids: list[int], index: int) -> list[int]:
    """Return 1 for each token of the completion, by the first of the columns that can say so."""
    name = next(name for name in COMPLETION_COLUMNS if name in row)
    if name != "labels":
        return _flags(row, name, len(ids), index)
    labels = row["labels"]
    if not isinstance(labels, list) or len(labels) != len(ids):
        raise UsageError(f"Row {index}: 'labels' must be {len(ids)} token ids, one per token, got {kind_of(labels)}.")
    for place, (label, token) in enumerate(zip(labels, ids, strict=True)):
        if label not in (IGNORED, token):
            raise UsageError(
                f"Row {index}: label {place} is {label}, the row's token there {token}. Labels must be the row's own "
                f"tokens, not shifted, or {IGNORED}."
            )
    return [int(label != IGNORED) for label in labels]


def _strings(rows: Any, indices: list[int], column: str) -> list[str]:
    for index, value in zip(indices, rows[column], strict=True):
        if not isinstance(value, str):
            raise UsageError(f"Row {index}: '{column}' must be a string, got {kind_of(value)}.")
    return cast(list[str], rows[column])


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return cast(list[list[int]], tokenizer(texts, verbose=False)["input_ids"])
