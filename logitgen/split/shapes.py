"""The supported shapes of rows, recognised by their columns and turned into tokens."""

import re
from collections.abc import Callable
from typing import Any, cast

import datasets
from transformers import PreTrainedTokenizerBase

from logitgen.config import Config
from logitgen.errors import UsageError, first_line

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


Chat = list[dict[str, Any]]


Tokens = dict[str, list[list[int]]]
"""`input_ids` and `completion_mask` (1 where a token belongs to a completion) of several rows."""


Encode = Callable[[dict[str, list[Any]], list[int]], Tokens]


def encoder(split: datasets.Dataset, tokenizer: PreTrainedTokenizerBase | None, config: Config) -> Encode:
    """Choose the function that turns a batch of rows into tokens, by the columns of the split."""
    columns = split.column_names
    if config.text_column is None and "input_ids" in columns:
        if config.completion_only and "completion_mask" not in columns:
            raise UsageError(
                "--completion_only with ready input_ids needs a completion_mask column (1 for a completion's token); "
                f"the split has {_names(columns)}."
            )
        return lambda rows, indices: _ready(rows, indices, config)
    if tokenizer is None:
        raise UsageError(
            f"--teacher {config.teacher} has no tokenizer that can be loaded, and the rows are text. "
            "Add the tokenizer's files to the folder, or give a dataset with input_ids."
        )
    if config.text_column is None and "messages" in columns:
        if tokenizer.chat_template is None:
            raise UsageError(
                f"The rows are messages, but the tokenizer of {config.teacher} has no chat template. "
                "Use a teacher that has one, or name a column of plain text with --text_column."
            )
        return lambda rows, indices: _chat(rows, indices, tokenizer, config)
    if config.text_column is None and {"prompt", "completion"} <= set(columns):
        return lambda rows, indices: _pairs(rows, indices, tokenizer, config)
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
    return lambda rows, indices: _texts(rows, indices, column, tokenizer, config)


def _names(columns: list[str]) -> str:
    return f"columns {', '.join(columns)}" if columns else "no columns"


def _texts(rows: Any, indices: list[int], column: str, tokenizer: PreTrainedTokenizerBase, config: Config) -> Tokens:
    return {"input_ids": _ended(_encode(tokenizer, _strings(rows, indices, column)), tokenizer, config)}


def _pairs(rows: Any, indices: list[int], tokenizer: PreTrainedTokenizerBase, config: Config) -> Tokens:
    """Tokenise prompt and completion together. A token with any character of the completion belongs to it."""
    prompts, completions = (_strings(rows, indices, column) for column in ("prompt", "completion"))
    texts = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    if not config.completion_only:
        return {"input_ids": _ended(_encode(tokenizer, texts), tokenizer, config)}
    _check_fast(tokenizer, "text")
    encoded = tokenizer(texts, verbose=False, return_offsets_mapping=True)
    whole = _ended(encoded["input_ids"], tokenizer, config)
    prompt_tokens = map(_num_tokens_within, encoded["offset_mapping"], map(len, prompts))
    masks = [[0] * count + [1] * (len(ids) - count) for ids, count in zip(whole, prompt_tokens, strict=True)]
    return {"input_ids": whole, "completion_mask": masks}


def _num_tokens_within(offsets: list[tuple[int, int]], length: int) -> int:
    """Count the tokens before the first that reaches beyond `length` characters."""
    return next((index for index, (_, end) in enumerate(offsets) if end > length), len(offsets))


def _check_fast(tokenizer: PreTrainedTokenizerBase, over: str) -> None:
    if not tokenizer.is_fast:
        raise UsageError(f"--completion_only over {over} needs a fast tokenizer: only those know where a token stands.")


def _chat(rows: Any, indices: list[int], tokenizer: PreTrainedTokenizerBase, config: Config) -> Tokens:
    """Render the conversations, then tokenise all of them at once, which uses all cores."""
    chats = [_checked_chat(chat, index) for chat, index in zip(rows["messages"], indices, strict=True)]
    if config.completion_only:
        _check_fast(tokenizer, "messages")
        if _GENERATION_BLOCK.search(str(tokenizer.chat_template)):
            return _marked_chats(chats, indices, tokenizer, config)
    texts = [
        _render(tokenizer, index, chat, tokenize=False) if chat else ""
        for chat, index in zip(chats, indices, strict=True)
    ]
    offsets = {"return_offsets_mapping": True} if config.completion_only else {}
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False, **offsets)
    if not config.completion_only:
        return {"input_ids": _ended(encoded["input_ids"], tokenizer, config)}
    masks = []
    for chat, text, index, places in zip(chats, texts, indices, encoded["offset_mapping"], strict=True):
        spans = _assistant_spans(chat, text, index, tokenizer)
        masks.append([int(any(start < last and first < end for first, last in spans)) for start, end in places])
    return _masked(encoded["input_ids"], masks, tokenizer, config)


def _marked_chats(chats: list[Chat], indices: list[int], tokenizer: PreTrainedTokenizerBase, config: Config) -> Tokens:
    """Tokenise conversations whose template marks the assistant's tokens."""
    encoded = [_encode_marked(chat, index, tokenizer) for chat, index in zip(chats, indices, strict=True)]
    return _masked([ids for ids, _ in encoded], [mask for _, mask in encoded], tokenizer, config)


def _masked(
    rows: list[list[int]], masks: list[list[int]], tokenizer: PreTrainedTokenizerBase, config: Config
) -> Tokens:
    """End the rows, and mark the added end tokens as no completion."""
    ended = _ended(rows, tokenizer, config)
    longer = [mask + [0] * (len(ids) - len(mask)) for ids, mask in zip(ended, masks, strict=True)]
    return {"input_ids": ended, "completion_mask": longer}


def _ready(rows: Any, indices: list[int], config: Config) -> Tokens:
    for index, ids in zip(indices, rows["input_ids"], strict=True):
        if not isinstance(ids, list):
            raise UsageError(f"Row {index}: 'input_ids' must be a list of token ids, got {_kind(ids)}.")
        for token in ids:
            if type(token) is not int or not 0 <= token < 2**31:
                raise UsageError(f"Row {index}: 'input_ids' must be a list of token ids, {token!r:.40} is none.")
    tokens = {"input_ids": rows["input_ids"]}
    if config.completion_only:
        for index, ids, mask in zip(indices, rows["input_ids"], rows["completion_mask"], strict=True):
            if not isinstance(mask, list) or len(mask) != len(ids) or any(flag not in (0, 1) for flag in mask):
                raise UsageError(
                    f"Row {index}: 'completion_mask' must be {len(ids)} zeros and ones, one per token, "
                    f"got {_kind(mask)}."
                )
        tokens["completion_mask"] = rows["completion_mask"]
    return tokens


def _strings(rows: Any, indices: list[int], column: str) -> list[str]:
    for index, value in zip(indices, rows[column], strict=True):
        if not isinstance(value, str):
            raise UsageError(f"Row {index}: '{column}' must be a string, got {_kind(value)}.")
    return cast(list[str], rows[column])


def _kind(value: object) -> str:
    if isinstance(value, list):
        return f"a list of {len(value)}" + (f" ({value[0]!r:.40}, ...)" if value else "")
    return "nothing" if value is None else f"{type(value).__name__} {value!r:.40}"


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return cast(list[list[int]], tokenizer(texts, verbose=False)["input_ids"])


def _ended(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, config: Config) -> list[list[int]]:
    """With packing, end every text with the end-of-text token, if the tokenizer has it."""
    end = tokenizer.eos_token_id
    if not config.packing or end is None:
        return rows
    return [ids if ids and ids[-1] == end else [*ids, end] for ids in rows]


def _checked_chat(chat: Any, index: int) -> Chat:
    fits = isinstance(chat, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in chat
    )
    if not fits:
        raise UsageError(f"Row {index}: 'messages' must be a list of role and content strings, got {_kind(chat)}.")
    return cast(Chat, chat)


def _encode_marked(chat: Chat, index: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return a conversation's tokens, and 1 for each token in a generation block of its template."""
    if not chat:
        return [], []
    encoded = _render(tokenizer, index, chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    mask = encoded["assistant_masks"]
    if not any(mask) and any(message["role"] == "assistant" for message in chat):
        raise UsageError(
            f"Row {index}: the chat template's generation block marks no token of the assistant's turns. "
            "Use a tokenizer that keeps every character, or remove the block from the template."
        )
    return encoded["input_ids"], mask


def _assistant_spans(chat: Chat, text: str, index: int, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]]:
    """Find the assistant's turns in a rendered conversation whose template marks none.

    A turn starts behind the generation prompt, and ends at the end of the conversation up to and with it. That is well
    defined as long as the template renders a conversation's beginning the same, whatever follows.
    """
    spans = []
    for turn, message in enumerate(chat):
        if message["role"] != "assistant":
            continue
        after = _render(tokenizer, index, chat[: turn + 1], tokenize=False)
        if turn:
            before = _render(tokenizer, index, chat[:turn], tokenize=False, add_generation_prompt=True)
        else:  # nothing can be rendered before the first turn: the text behind it shows the generation prompt
            prompt = _render(tokenizer, index, chat[:1], tokenize=False, add_generation_prompt=True)[len(after) :]
            before = after[: after.find(prompt) + len(prompt)]
        if not (text.startswith(after) and after.startswith(before)):
            raise UsageError(
                f"Row {index}: the chat template has no generation block and renders earlier turns differently once "
                "later ones follow, so the assistant's tokens cannot be told. "
                "Add {% generation %} ... {% endgeneration %} around them in the template."
            )
        spans.append((len(before), len(after)))
    return spans


def _render(tokenizer: PreTrainedTokenizerBase, index: int, chat: Chat, **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(chat, **options)
    except Exception as error:  # a template raises errors of any type: jinja errors, TypeError, its own
        raise UsageError(f"Row {index}: the chat template refuses the messages: {first_line(error)}") from error
