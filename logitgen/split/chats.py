"""Conversations, rendered by a chat template and turned into tokens."""

import json
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from logitgen.config import Config
from logitgen.errors import UsageError
from logitgen.split.encoded import NOTHING, Note, Tokens
from logitgen.split.messages import Chat, checked_chat, counts, from_json, without_filled
from logitgen.split.template import ChatTemplate, Options, checked_options

CHAT_COLUMNS = ("messages", "conversations")
"""Columns of conversations; the first one found is read."""

_REASONING = ("reasoning_content", "reasoning", "thinking")
"""Names of the member that holds a message's reasoning."""

_GIVEN: dict[str, type] = {"tools": list, "chat_template_kwargs": dict}
"""Columns beside the messages that go into every rendering."""


@dataclass(frozen=True)
class Conversation:
    """The messages of a row, in the form that the template reads.

    Attributes:
        row: Number of the row in the split.
        messages: Each with role and content.
        first_turn: Messages before it are part of the prompt.
        given: Variables for the template.
        notes: What must be known of the row.
    """

    row: int
    messages: Chat
    first_turn: int
    given: Options
    notes: Note

    @property
    def turns(self) -> list[int]:
        """The messages that are completions."""
        return [turn for turn, said in enumerate(self.messages) if turn >= self.first_turn and counts(said)]


@dataclass
class _Rendering:
    """A text with the characters of its completions, from start to end each."""

    text: str
    spans: list[tuple[int, int]] = field(default_factory=list)
    notes: Note = NOTHING


def encode_chats(
    rows: Any, indices: list[int], features: Any, columns: list[str], template: ChatTemplate, config: Config
) -> Tokens:
    """Render conversations, then tokenise all of them at once, which uses all cores.

    Args:
        rows: A batch of rows, column by column.
        indices: Their numbers in the split.
        features: The types of the columns.
        columns: The column of the messages, or those of prompt and completion.
        template: The chat template.
        config: The options of the run.
    """
    rows = {name: [without_filled(value, features[name]) for value in values] for name, values in rows.items()}
    found = [_conversation(rows, number, row, columns, template) for number, row in enumerate(indices)]
    tokens = Tokens()
    if config.completion_only:
        check_fast(template.tokenizer, "messages")
    texts = [(chat, shown) for chat in found for shown in _renderings(chat, template, config)]
    encoded = template.tokenizer(  # the template has written the special tokens
        [shown.text for _, shown in texts],
        add_special_tokens=False,
        return_offsets_mapping=config.completion_only,
        verbose=False,
    )
    for number, (chat, shown) in enumerate(texts):
        ids = packed_end(encoded["input_ids"][number], template.tokenizer, config)
        mask = _mask(encoded["offset_mapping"][number], shown.spans) if config.completion_only else ()
        tokens.add(chat.row, ids, mask, shown.notes | chat.notes)
    return tokens


def _mask(places: list[tuple[int, int]], spans: list[tuple[int, int]]) -> list[int]:
    """Return 1 for each token, given with the characters it covers, that has any character of a span."""
    starts, ends = np.array(places, dtype=np.int64).reshape(-1, 2).T
    mask = np.zeros(len(starts), dtype=np.int64)
    for first, last in spans:
        mask |= (starts < last) & (first < ends)
    return list(mask.tolist())


def _conversation(rows: Any, number: int, row: int, columns: list[str], template: ChatTemplate) -> Conversation:
    """Read the messages of a row, and what it gives the template."""
    prompt, said = ([], *(checked_chat(rows[name][number], name, row) for name in columns))[-2:]
    given = {name: from_json(rows[name][number], name, kind, row) for name, kind in _GIVEN.items() if name in rows}
    tools = {"tools": given["tools"]} if given.get("tools") else {}
    options = tools | checked_options(given.get("chat_template_kwargs") or {}, f"Row {row}: ")
    notes = Note.NULLS if _has_null([*prompt, *said, options]) else NOTHING
    return Conversation(row, template.prepared(prompt + said), len(prompt), options, notes)


def _has_null(value: Any) -> bool:
    members = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(member is None or _has_null(member) for member in members)


def _renderings(chat: Conversation, template: ChatTemplate, config: Config) -> list[_Rendering]:
    """Render a conversation as often as it takes to show every completion the way the teacher reads it.

    The whole conversation shows all of them, unless the template renders earlier turns differently once later ones
    follow. Then such a turn has a rendering of its own, which ends with it.
    """
    if not chat.messages:
        return [_Rendering("")]
    if config.completion_only and template.marks_turns:
        return [_marked(chat, template)]
    turns = chat.turns if config.completion_only else []
    found = [_Rendering(template.render(chat.messages, chat.given, chat.row))]
    if config.completion_only and not turns:
        found[0].notes |= Note.NO_TURN
    for turn, message in enumerate(chat.messages):
        if turn not in turns:
            found[0].notes |= _left_out(message, found[0].text)
    for turn in reversed(turns):
        until, start = _turn(chat, turn, template)
        if not found[0].text.startswith(until):
            if found[0].spans:
                found.insert(0, _Rendering(until))
            found[0].text = until
        _mark(found[0], chat, turn, template, (start, len(until)))
    if len(found) > 1:
        for shown in found:
            shown.notes |= Note.REWRITTEN
    return found


def _mark(shown: _Rendering, chat: Conversation, turn: int, template: ChatTemplate, span: tuple[int, int]) -> None:
    """Mark a turn in a rendering. It ends with its own end mark, or with the mark of the next speaker."""
    message, following = chat.messages[turn], chat.messages[turn + 1 : turn + 2]
    start, end = span
    mark = template.next_role(message, following[0] if following else None)
    if len(shown.text) == end:
        shown.text += mark
    if shown.text.startswith(mark, end):
        end += len(mark)
    shown.spans.append((start, end))
    said_from = max(0, start - len(_content(message)))  # the generation prompt may be a part of the content
    shown.notes |= _left_out(message, shown.text[said_from:end])


def _turn(chat: Conversation, turn: int, template: ChatTemplate) -> tuple[str, int]:
    """Render a conversation up to the end of a turn, and find where that turn starts in it.

    It starts where the text parts from the conversation before it with the generation prompt.
    """

    def render(end: int, *, asking: bool = False) -> str:
        return template.render(chat.messages[:end], chat.given, chat.row, asking=asking)

    until = render(turn + 1)
    if not turn:
        return until, _first_start(chat, until, render(1, asking=True))
    asked = render(turn, asking=True)
    if until.startswith(asked):
        return until, len(asked)
    before = len(render(turn))
    if until[:before] == asked[:before]:  # a generation prompt may open a block of thought
        return until, before + _num_shared(until[before:], asked[before:], template.tokenizer)
    raise UsageError(
        f"Row {chat.row}, message {turn}: the chat template renders the messages before it differently once it "
        "follows, so its tokens cannot be told. Put {% generation %} ... {% endgeneration %} around them there."
    )


def _first_start(chat: Conversation, until: str, asked: str) -> int:
    """Find the start of a turn that nothing stands before: the text behind it shows the generation prompt."""
    prompt = asked[len(until) :] if asked.startswith(until) else ""
    content = until.find(_content(chat.messages[0]))
    place = until.rfind(prompt, 0, len(until) if content < 0 else content)
    if not prompt or place < 0:
        raise UsageError(
            f"Row {chat.row}: the conversation begins with the assistant, and the chat template does not show where "
            "such a turn starts. Put {% generation %} ... {% endgeneration %} around its tokens in the template."
        )
    return place + len(prompt)


def _num_shared(until: str, asked: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the characters before the first token of a generation prompt that a text does not share."""
    places = tokenizer(asked, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    ends: list[int] = [0, *(end for _, end in places)]
    return ends[bisect_left(ends, True, key=lambda end: until[:end] != asked[:end]) - 1]


def _content(message: dict[str, Any]) -> str:
    content = message["content"]
    return str(content[0]["text"]) if isinstance(content, list) else str(content)


def _left_out(message: dict[str, Any], text: str) -> Note:
    """Note the parts of a message that a rendering does not show. Templates may change the space around them."""
    parts: dict[Note, list[Any]] = {
        Note.CONTENT_LEFT_OUT: [_content(message)],
        Note.REASONING_LEFT_OUT: [message.get(name) for name in _REASONING],
        Note.CALLS_LEFT_OUT: _called(message),
    }
    notes = NOTHING
    for note, shown in parts.items():
        if not all(_shows(text, part) for part in shown if isinstance(part, str)):
            notes |= note
    return notes


def _shows(text: str, part: str) -> bool:
    if part in text or json.dumps(part, ensure_ascii=False)[1:-1] in text:
        return True
    return "".join(part.split()) in "".join(text.split())


def _called(message: dict[str, Any]) -> list[Any]:
    """Name the functions that a message calls."""
    calls = message.get("tool_calls")
    found = [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
    return [function.get("name") for function in found if isinstance(function, dict)]


def _marked(chat: Conversation, template: ChatTemplate) -> _Rendering:
    """Render a conversation whose template marks the tokens of the assistant by generation blocks."""
    spoken = [turn for turn, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if spoken != chat.turns:
        raise UsageError(
            f"Row {chat.row}: only some of the assistant's messages are completions, but the chat template's "
            "generation blocks mark all of them. Remove the blocks from the template."
        )
    text, spans = template.render_marked(chat.messages, chat.given, chat.row)
    if spoken and not spans:
        raise UsageError(f"Row {chat.row}: the chat template's generation block marks none of the assistant's turns.")
    notes = NOTHING if spoken else Note.NO_TURN
    for message in chat.messages:
        notes |= _left_out(message, text)
    return _Rendering(text, spans, notes)


def check_fast(tokenizer: PreTrainedTokenizerBase, over: str) -> None:
    """Refuse a tokenizer that does not know where its tokens stand in the text."""
    if not tokenizer.is_fast:
        raise UsageError(f"--completion_only over {over} needs a fast tokenizer: only those know where a token stands.")


def packed_end(ids: list[int], tokenizer: PreTrainedTokenizerBase, config: Config) -> list[int]:
    """With packing, end a row with the end-of-text token, if the tokenizer has it."""
    end = tokenizer.eos_token_id
    return ids if not config.packing or end is None or (ids[-1:] == [end] and ids) else [*ids, end]
