"""The supported shapes of rows, recognised by their columns and turned into tokens."""

import itertools
import logging
from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any, cast

import datasets
from transformers import PreTrainedTokenizerBase

from logitgen.config import Config
from logitgen.errors import UsageError
from logitgen.split.chats import CHAT_COLUMNS, check_fast, encode_chats
from logitgen.split.encoded import NOTHING, Encode, Note, Tokens
from logitgen.split.messages import kind_of
from logitgen.split.template import ChatTemplate

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a token that is no completion, as transformers has it."""

COMPLETION_COLUMNS = ("completion_mask", "assistant_masks", "loss_mask", "labels")
"""Columns beside `input_ids` that say which tokens are the completion; the first one found is believed."""


_FOR_CHATS = ("chat_template", "chat_template_kwargs")
_FOR_TEXT = ("add_special_tokens", "append_eos")
"""Options for some shapes of rows."""


def columns_read(columns: Mapping[str, Any], config: Config) -> list[str]:
    """Name the columns, given with their features, that decide what the teacher reads or what is captured."""
    if config.text_column is not None:
        names = [config.text_column]
    elif chat := chat_columns(columns, config):
        names = [*chat, "tools", "chat_template_kwargs"]
    elif "input_ids" in columns:
        marks = [name for name in COMPLETION_COLUMNS if name in columns and config.completion_only][:1]
        names = ["input_ids", "attention_mask", "position_ids", "seq_lengths", *marks]
    elif {"prompt", "completion"} <= set(columns):
        names = ["prompt", "completion"]
    else:
        names = ["text"]
    return [name for name in names if name in columns]


def chat_columns(columns: Mapping[str, Any], config: Config) -> list[str]:
    """Name the columns of messages that are read: a conversation's, or those of prompt and completion, or none."""
    if config.text_column is not None:
        return []
    if config.messages_column is not None:
        return [config.messages_column]
    if "input_ids" in columns:
        return []
    if found := [name for name in CHAT_COLUMNS if name in columns][:1]:
        return found
    pair = ["prompt", "completion"]
    return pair if all(name in columns and _holds_objects(columns[name]) for name in pair) else []


def _holds_objects(feature: Any) -> bool:
    return not any(isinstance(each, datasets.Value) for each in (feature, getattr(feature, "feature", None)))


def template_of(
    split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase | None, config: Config
) -> ChatTemplate | None:
    """Return the chat template of rows of messages, or None for other rows."""
    return ChatTemplate.of(tokenizer, config) if tokenizer and chat_columns(split.features, config) else None


def encoder(split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase | None, config: Config) -> Encode:
    """Choose the function that turns a batch of rows into tokens, by the columns of the split."""
    columns = split.column_names
    chat = chat_columns(split.features, config)
    _check_columns(columns, chat, config)
    is_ready = config.text_column is None and not chat and "input_ids" in columns
    _tell_unused(() if is_ready else _FOR_CHATS if chat else _FOR_TEXT, config)
    if is_ready:
        return partial(_ready, config=config)
    if tokenizer is None:
        raise UsageError(
            f"--teacher {config.teacher} has no tokenizer that can be loaded, and the rows are text. "
            "Add the tokenizer's files to the folder, or give a dataset with input_ids."
        )
    if template := template_of(split, tokenizer, config):
        if "tools" in columns and not template.shows_tools:
            logger.warning("The rows have tools, but the teacher's chat template shows it none.")
        return partial(encode_chats, features=split.features, columns=chat, template=template, config=config)
    if config.append_eos and tokenizer.eos_token_id is None:
        raise UsageError("--append_eos needs a tokenizer with an end-of-text token, the teacher's has none.")
    if config.text_column is None and {"prompt", "completion"} <= set(columns):
        return partial(_pairs, tokenizer=tokenizer, config=config)
    return partial(_texts, column=config.text_column or "text", tokenizer=tokenizer, config=config)


def _tell_unused(used: tuple[str, ...], config: Config) -> None:
    """Log the options that other shapes of rows have use for."""
    defaults = {each.name: each.default for each in fields(Config)}
    others = [name for name in (*_FOR_CHATS, *_FOR_TEXT) if name not in used]
    if given := [f"--{name}" for name in others if getattr(config, name) != defaults[name]]:
        logger.warning(f"Not used for rows of this shape: {', '.join(given)}.")


def _check_columns(columns: list[str], chat: list[str], config: Config) -> None:
    """Refuse a split whose columns have no supported shape, or no completions where only those count."""
    known = f"the split has columns {', '.join(columns)}" if columns else "the split has no columns"
    for option in ("text_column", "messages_column"):
        if (name := getattr(config, option)) not in (None, *columns):
            raise UsageError(f"--{option} {name} is not a column; {known}. Name one of them.")
    if config.text_column is None and not chat and "input_ids" in columns:
        if config.completion_only and not set(COMPLETION_COLUMNS) & set(columns):
            raise UsageError(
                "--completion_only with ready input_ids needs a completion_mask column (1 for a completion's token) or "
                f"one of {', '.join(COMPLETION_COLUMNS[1:])}; {known}."
            )
    elif not chat and (config.text_column or not {"prompt", "completion"} <= set(columns)):
        if not config.text_column and "text" not in columns:
            raise UsageError(
                f"Rows need input_ids, messages, prompt and completion, or text; {known}. "
                "Name a column of text with --text_column, or one of messages with --messages_column."
            )
        if config.completion_only:
            raise UsageError(
                "--completion_only needs rows that say what the completion is (prompt and completion, messages, or "
                f"input_ids with completion_mask); '{config.text_column or 'text'}' is plain text."
            )


def _texts(rows: Any, indices: list[int], column: str, tokenizer: PreTrainedTokenizerBase, config: Config) -> Tokens:
    tokens = Tokens()
    encoded = _encode(tokenizer, _strings(rows, indices, column), config)
    for row, ids in zip(indices, encoded["input_ids"], strict=True):
        tokens.add(row, _ended(ids, tokenizer, config), notes=_doubled(ids, tokenizer))
    return tokens


def _pairs(rows: Any, indices: list[int], tokenizer: PreTrainedTokenizerBase, config: Config) -> Tokens:
    """Tokenise prompt and completion together. A token with any character of the completion belongs to it."""
    if config.completion_only:
        check_fast(tokenizer, "text")
    prompts, completions = (_strings(rows, indices, column) for column in ("prompt", "completion"))
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    encoded = _encode(tokenizer, texts, config, return_offsets_mapping=config.completion_only)
    tokens = Tokens()
    for number, row in enumerate(indices):
        ids = encoded["input_ids"][number]
        notes = _doubled(ids, tokenizer)
        ids = _ended(ids, tokenizer, config)
        if tokenizer.eos_token_id not in (None, *ids[-1:]):
            notes |= Note.NO_EOS
        places = encoded["offset_mapping"][number] if config.completion_only else []
        num_prompt = _num_tokens_within(places, len(prompts[number]))
        tokens.add(row, ids, [0] * num_prompt + [1] * (len(ids) - num_prompt), notes)
    return tokens


def _num_tokens_within(offsets: list[tuple[int, int]], length: int) -> int:
    """Count the tokens before the first that reaches beyond `length` characters."""
    return next((index for index, (_, end) in enumerate(offsets) if end > length), len(offsets))


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], config: Config, **options: bool) -> Any:
    return tokenizer(texts, add_special_tokens=config.add_special_tokens, verbose=False, **options)


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase, config: Config) -> list[int]:
    """End a text with the end-of-text token where the options ask for it and the tokenizer has not added it."""
    end = tokenizer.eos_token_id
    wanted = end is not None and (config.packing or config.append_eos)
    return [*ids, end] if wanted and ids[-1:] != [end] else ids


def _doubled(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> Note:
    """Note a text that begins with the beginning-of-text token, which the tokenizer has added again."""
    start = tokenizer.bos_token_id
    return Note.TWO_BOS if start is not None and ids[:2] == [start, start] else NOTHING


def _ready(rows: Any, indices: list[int], config: Config) -> Tokens:
    """Take tokens as they are, without padding, document by document, and mark those of the completion."""
    tokens = Tokens()
    for number, index in enumerate(indices):
        row = {name: values[number] for name, values in rows.items()}
        ids = _checked_ids(row["input_ids"], index)
        read = _unpadded(row, len(ids), index)
        mask = _completion_of(row, ids, index) if config.completion_only else []
        documents = _documents(row, read, index)
        for document in documents:
            tokens.add(index, ids[document], mask[document], Note.PACKED if len(documents) > 1 else NOTHING)
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
    return list(map(int, flags))


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


def _documents(row: dict[str, Any], read: slice, index: int) -> list[slice]:
    """Find the packed documents of a row by its `seq_lengths`, or by where its `position_ids` start anew."""
    num_read = read.stop - read.start
    lengths, positions = row.get("seq_lengths"), row.get("position_ids")
    if lengths is not None and (not _are_numbers(lengths) or sum(lengths) != num_read or min(lengths, default=1) < 0):
        raise UsageError(f"Row {index}: 'seq_lengths' must sum to the row's {num_read} tokens, got {kind_of(lengths)}.")
    if positions is not None and not (_are_numbers(positions) and len(positions) >= read.stop):
        raise UsageError(f"Row {index}: 'position_ids' must be one number per token, got {kind_of(positions)}.")
    if lengths is None:
        if positions is None:
            return [read]
        starts = [place for place, position in enumerate(positions[read]) if position == 0]
        lengths = [end - start for start, end in itertools.pairwise([*starts, num_read])]
    if positions is not None and positions[read] != [place for length in lengths for place in range(length)]:
        raise UsageError(
            f"Row {index}: its 'position_ids' do not count 0, 1, 2, ... in every document, as a teacher would."
        )
    ends = list(itertools.accumulate(lengths, initial=read.start))
    return [slice(start, end) for start, end in itertools.pairwise(ends)] or [read]


def _are_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int for value in values)


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
        try:
            value.encode()
        except UnicodeEncodeError as error:
            place = f"Row {index}: character {error.start} of '{column}'"
            raise UsageError(f"{place} is half a surrogate pair, which is no text. Remove it.") from error
    return cast(list[str], rows[column])
