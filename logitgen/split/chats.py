"""Conversations, rendered by the tokenizer's chat template and turned into tokens."""

import itertools
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from logitgen.config import Config
from logitgen.errors import UsageError, first_line
from logitgen.split.messages import Chat, checked_chat, counts, from_json

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")

CHAT_COLUMNS = ("messages", "conversations")
"""Columns of conversations; the first one found is read."""


Options = dict[str, Any]
"""What the template is given besides the messages: `tools`, and a row's `chat_template_kwargs`."""

Tokens = dict[str, list[list[int]]]
"""`input_ids` and `completion_mask` (1 where a token belongs to a completion) of several rows."""


def chats(rows: Any, indices: list[int], tokenizer: PreTrainedTokenizerBase, config: Config) -> Tokens:
    """Render the conversations, then tokenise all of them at once, which uses all cores."""
    (name,) = set(CHAT_COLUMNS) & rows.keys()
    checked = [checked_chat(chat, name, index) for chat, index in zip(rows[name], indices, strict=True)]
    options = [_options(rows, number, index) for number, index in enumerate(indices)]
    if config.completion_only:
        check_fast(tokenizer, "messages")
        if _GENERATION_BLOCK.search(str(tokenizer.chat_template)):
            return _marked_chats(checked, options, indices, tokenizer, config)
    texts = [
        _render(tokenizer, index, chat, given, tokenize=False) if chat else ""
        for chat, given, index in zip(checked, options, indices, strict=True)
    ]
    if not config.completion_only:
        return {"input_ids": ended(_encode(tokenizer, texts)["input_ids"], tokenizer, config)}
    encoded = _encode(tokenizer, texts, return_offsets_mapping=True)
    masks = []
    for number, places in enumerate(encoded["offset_mapping"]):
        spans = _assistant_spans(checked[number], texts[number], indices[number], tokenizer, options[number])
        masks.append([int(any(start < last and first < end for first, last in spans)) for start, end in places])
    return _masked(encoded["input_ids"], masks, tokenizer, config)


def chat_pairs(rows: Any, indices: list[int], tokenizer: PreTrainedTokenizerBase, config: Config) -> Tokens:
    """Render prompts and completions that are lists of messages.

    The completion begins where the whole conversation and the prompt with its generation prompt part.
    """
    if config.completion_only:
        check_fast(tokenizer, "messages")
    texts, starts = [], []
    for number, index in enumerate(indices):
        prompt, completion = (checked_chat(rows[name][number], name, index) for name in ("prompt", "completion"))
        given = _options(rows, number, index)
        texts.append(_render(tokenizer, index, prompt + completion, given, tokenize=False))
        if config.completion_only:
            starts.append(_completion_start(prompt, texts[-1], index, tokenizer, given))
    if not config.completion_only:
        return {"input_ids": ended(_encode(tokenizer, texts)["input_ids"], tokenizer, config)}
    encoded = _encode(tokenizer, texts, return_offsets_mapping=True)
    masks = [
        [int(end > start) for _, end in places] for places, start in zip(encoded["offset_mapping"], starts, strict=True)
    ]
    return _masked(encoded["input_ids"], masks, tokenizer, config)


def _completion_start(prompt: Chat, whole: str, index: int, tokenizer: PreTrainedTokenizerBase, given: Options) -> int:
    """Find where a conversation parts from its prompt with the generation prompt."""
    if not whole.startswith(_render(tokenizer, index, prompt, given, tokenize=False)):
        raise UsageError(
            f"Row {index}: the chat template renders the prompt differently once the completion follows, so the "
            "completion cannot be told. Give rows of text, or of input_ids with a completion_mask."
        )
    asked = _render(tokenizer, index, prompt, given, tokenize=False, add_generation_prompt=True)
    return _num_shared(whole, asked)


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str], **options: bool) -> Any:
    """Tokenise rendered texts, whose special tokens the template has written."""
    return tokenizer(texts, add_special_tokens=False, verbose=False, **options)


def _options(rows: Any, number: int, index: int) -> Options:
    """Collect what a row's own columns give the template."""
    given = {name: from_json(rows[name][number], name, kind, index) for name, kind in _GIVEN.items() if name in rows}
    tools = {"tools": given["tools"]} if given.get("tools") else {}
    return tools | (given.get("chat_template_kwargs") or {})


_GIVEN: dict[str, type] = {"tools": list, "chat_template_kwargs": dict}
"""Columns beside `messages` that go into every rendering."""


def _marked_chats(
    checked: list[Chat], options: list[Options], indices: list[int], tokenizer: PreTrainedTokenizerBase, config: Config
) -> Tokens:
    """Tokenise conversations whose template marks the assistant's tokens."""
    encoded = [
        _encode_marked(chat, index, tokenizer, given)
        for chat, given, index in zip(checked, options, indices, strict=True)
    ]
    return _masked([ids for ids, _ in encoded], [mask for _, mask in encoded], tokenizer, config)


def _masked(
    rows: list[list[int]], masks: list[list[int]], tokenizer: PreTrainedTokenizerBase, config: Config
) -> Tokens:
    """End the rows, and mark the added end tokens as no completion."""
    whole = ended(rows, tokenizer, config)
    longer = [mask + [0] * (len(ids) - len(mask)) for ids, mask in zip(whole, masks, strict=True)]
    return {"input_ids": whole, "completion_mask": longer}


def _encode_marked(
    chat: Chat, index: int, tokenizer: PreTrainedTokenizerBase, given: Options
) -> tuple[list[int], list[int]]:
    """Return a conversation's tokens, and 1 for each token in a generation block of its template."""
    if not chat:
        return [], []
    if any(message["role"] == "assistant" and not counts(message) for message in chat):
        raise UsageError(
            f"Row {index}: a message is left out by its weight, but the chat template's generation blocks mark all "
            "turns of the assistant. Remove the blocks from the template."
        )
    how = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    encoded = _render(tokenizer, index, chat, given, **how)
    mask = encoded["assistant_masks"]
    if not any(mask) and any(message["role"] == "assistant" for message in chat):
        raise UsageError(
            f"Row {index}: the chat template's generation block marks no token of the assistant's turns. "
            "Use a tokenizer that keeps every character, or remove the block from the template."
        )
    return encoded["input_ids"], mask


def _assistant_spans(
    chat: Chat, text: str, index: int, tokenizer: PreTrainedTokenizerBase, given: Options
) -> list[tuple[int, int]]:
    """Find the assistant's turns in a rendered conversation whose template marks none.

    A turn starts where the conversation up to and with it parts from the generation prompt before it, and ends at its
    end. That is well defined as long as the template renders a conversation's beginning the same, whatever follows.
    """
    spans = []
    for turn, message in enumerate(chat):
        if not counts(message):
            continue
        after = _render(tokenizer, index, chat[: turn + 1], given, tokenize=False)
        start = _start_of(chat[: turn + 1], after, index, tokenizer, given)
        if start is None or not text.startswith(after):
            raise UsageError(
                f"Row {index}: the chat template has no generation block and renders earlier turns differently once "
                "later ones follow, so the assistant's tokens cannot be told. "
                "Add {% generation %} ... {% endgeneration %} around them in the template."
            )
        spans.append((start, len(after)))
    return spans


def _start_of(chat: Chat, after: str, index: int, tokenizer: PreTrainedTokenizerBase, given: Options) -> int | None:
    """Find where the last turn starts in the text of a conversation; None where the turns before it are rewritten."""
    before = chat[:-1]
    if not before:  # nothing can be rendered before the first turn: the text behind it shows the generation prompt
        shown = _render(tokenizer, index, chat, given, tokenize=False, add_generation_prompt=True)
        prompt = shown[len(after) :]
        return after.find(prompt) + len(prompt) if prompt in after else None
    asked = _render(tokenizer, index, before, given, tokenize=False, add_generation_prompt=True)
    if after.startswith(asked):
        return len(asked)
    said = _render(tokenizer, index, before, given, tokenize=False)  # a generation prompt may open a block of thought
    return _num_shared(after, asked) if after.startswith(said) else None


def _num_shared(one: str, other: str) -> int:
    """Count the characters before the first that differs."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _render(tokenizer: PreTrainedTokenizerBase, index: int, chat: Chat, given: Options, **how: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(chat, **how, **given)  # here, because a row may name an option twice
    except Exception as error:  # a template raises errors of any type: jinja errors, TypeError, its own
        raise UsageError(f"Row {index}: the chat template refuses the messages: {first_line(error)}") from error


def check_fast(tokenizer: PreTrainedTokenizerBase, over: str) -> None:
    """Refuse a tokenizer that does not know where its tokens stand in the text."""
    if not tokenizer.is_fast:
        raise UsageError(f"--completion_only over {over} needs a fast tokenizer: only those know where a token stands.")


def ended(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, config: Config) -> list[list[int]]:
    """With packing, end every text with the end-of-text token, if the tokenizer has it."""
    end = tokenizer.eos_token_id
    if not config.packing or end is None:
        return rows
    return [ids if ids and ids[-1] == end else [*ids, end] for ids in rows]
