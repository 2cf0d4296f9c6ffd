"""A chat template with all that goes into every rendering: its text, its options, the date it prints."""

import ast
import hashlib
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from logitgen.config import Config
from logitgen.errors import UsageError, first_line
from logitgen.split.messages import Chat, Message, with_arguments, with_parts

Options = dict[str, Any]
"""Variables for a template besides the messages: `tools`, and a row's `chat_template_kwargs`."""

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_DATE_CALL = re.compile(r"""strftime_now\s*\(\s*("[^"]*"|'[^']*')\s*\)""")
_DATE_TEST = re.compile(r"strftime_now\s+is\s+(not\s+)?defined")
_FIRST_WORD = re.compile(r"\s*\S+")

_ASKED, _SAID, _NEXT = "QUESTION", "ANSWER", "CONTINUATION"
_ARGUMENTS = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
_RESERVED = {"messages", *_ARGUMENTS} - {"tools", "documents"}
"""Names that a template's variables cannot have, because transformers' own arguments have them."""

_CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "OSLO"}}}


@dataclass(frozen=True)
class ChatTemplate:
    """The chat template of a run.

    Attributes:
        tokenizer: The teacher's tokenizer.
        texts: The template for rows without and with tools, with the date filled in.
        options: Variables for every rendering. Those of a row win.
        date: The day it prints, as YYYY-MM-DD, or no text if it prints none.
    """

    tokenizer: PreTrainedTokenizerBase
    texts: tuple[str, str]
    options: Options
    date: str

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, config: Config) -> "ChatTemplate":
        """Take the template that the options name, or the tokenizer's own.

        Raises:
            UsageError: There is none, or its date cannot be filled in.
        """
        texts = [_chosen(tokenizer, config, with_tools) for with_tools in (False, True)]
        day = date.fromisoformat(config.chat_template_date) if config.chat_template_date else date.today()
        with_date = (_dated(texts[0], day), _dated(texts[1], day))
        prints_date = list(with_date) != texts
        options = checked_options(json.loads(config.chat_template_kwargs or "{}"), "--")
        return cls(tokenizer, with_date, options, day.isoformat() if prints_date else "")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the rendering of a conversation."""
        return hashlib.sha256(repr((self.texts, sorted(self.options.items()))).encode()).hexdigest()

    @property
    def marks_turns(self) -> bool:
        """True if the template marks the assistant's tokens by generation blocks, for rows without and with tools."""
        return all(_GENERATION_BLOCK.search(_COMMENT.sub("", text)) for text in self.texts)

    @property
    def shows_tools(self) -> bool:
        """True if the template reads `tools`."""
        return "tools" in self.texts[1]

    def prepared(self, chat: Chat) -> Chat:
        """Return messages in the form that the template reads: arguments as objects or text, content as parts."""
        return self._in_parts([with_arguments(message, as_text=self._wants_text) for message in chat])

    def _in_parts(self, chat: Chat) -> Chat:
        return [with_parts(message) for message in chat] if self._wants_parts else chat

    def render(self, chat: Chat, given: Options, row: int, *, asking: bool = False) -> str:
        """Render prepared messages of a row of the split, with the generation prompt behind them if `asking`.

        Raises:
            UsageError: The template refuses them.
        """
        with _refused(row):
            text = self._apply(chat, given, asking=asking)
            text.encode()  # a lone surrogate, which JSON text may hold, is no character
            return text

    def render_marked(self, chat: Chat, given: Options, row: int) -> tuple[str, list[tuple[int, int]]]:
        """Render prepared messages, and find the characters of the template's generation blocks, from start to end.

        Raises:
            UsageError: The template refuses the messages.
        """
        variables: Options = self.tokenizer.special_tokens_map | self.options | given
        with _refused(row):
            shown: Any = render_jinja_template(
                [chat], chat_template=self._text(variables), return_assistant_tokens_mask=True, **variables
            )
            texts, spans = shown
            texts[0].encode()
            return texts[0], spans[0]

    def _apply(self, chat: Chat, given: Options, *, asking: bool = False) -> str:
        variables = self.options | given
        template = self._text(variables)
        how: Options = {"chat_template": template, "tokenize": False, "add_generation_prompt": asking}
        return str(self.tokenizer.apply_chat_template(chat, **how, **variables))

    def _text(self, variables: Options) -> str:
        without_tools, with_tools = self.texts
        return with_tools if variables.get("tools") else without_tools

    def next_role(self, last: Message, following: Message | None) -> str:
        """Return the mark of the next speaker, for a template that ends the assistant's turns with nothing else.

        Args:
            last: The assistant's message.
            following: The message after it, or None. Then it is a tool's if the assistant calls one, else the user's.
        """
        expected = "tool" if last.get("tool_calls") else "user"
        return self._role_marks.get(following["role"] if following else expected, "")

    @cached_property
    def _role_marks(self) -> dict[str, str]:
        """The marks of user and tool, empty if the template ends a turn of the assistant with a mark of its own."""
        asked: Message = {"role": "user", "content": _ASKED}
        said: Message = {"role": "assistant", "content": _SAID}
        if self._probe(self.prepared([asked, said])).rpartition(_SAID)[2].strip():
            return {}
        found = {}
        for role, before in {"user": [asked, said], "tool": [asked, said | {"tool_calls": [_CALL]}]}.items():
            before = self.prepared(before)
            shown = self._probe(before)
            longer = self._probe(before + self.prepared([{"role": role, "content": _NEXT}]))
            following = longer[len(shown) :] if shown and longer.startswith(shown) and _NEXT in longer else ""
            if mark := _FIRST_WORD.match(following):
                found[role] = mark[0].partition(_NEXT)[0]
        return found

    @cached_property
    def _wants_parts(self) -> bool:
        asked: Message = {"role": "user", "content": _ASKED}
        return _ASKED not in self._probe([asked]) and _ASKED in self._probe([with_parts(asked)])

    @cached_property
    def _wants_text(self) -> bool:
        chat: Chat = [{"role": "user", "content": _ASKED}, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
        texts = [with_arguments(message, as_text=True) for message in chat]
        as_object, as_text = (self._probe(self._in_parts(form)) for form in (chat, texts))
        return "OSLO" in as_text and ("OSLO" not in as_object or "'city'" in as_object)  # as Python writes it

    def _probe(self, chat: Chat) -> str:
        """Render messages, or return no text if the template refuses them."""
        with suppress(Exception):
            return self._apply(chat, {})
        return ""


def checked_options(options: Options, place: str) -> Options:
    """Refuse variables for a template under a name that is taken.

    Args:
        options: The variables.
        place: Where they stand, to begin the error with.

    Raises:
        UsageError: A name is taken.
    """
    if taken := sorted(_RESERVED & options.keys()):
        raise UsageError(f"{place}chat_template_kwargs cannot set {taken[0]}, which has another meaning. Leave it out.")
    return options


@contextmanager
def _refused(row: int) -> Iterator[None]:
    """Turn errors of a template into one of the row: jinja errors, TypeError, a template's own."""
    try:
        yield
    except Exception as error:
        raise UsageError(f"Row {row}: the chat template refuses the messages: {first_line(error)}") from error


def _chosen(tokenizer: PreTrainedTokenizerBase, config: Config, with_tools: bool) -> str:
    """Return the text of the template for rows with or without tools."""
    named, own = config.chat_template, tokenizer.chat_template
    if named is not None and Path(named).is_file():
        try:
            return Path(named).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--chat_template {named} cannot be read: {first_line(error)}") from error
    names = sorted(own) if isinstance(own, dict) else []
    if named is not None:
        if named in names:
            return str(own[named])
        known = f" nor one of the tokenizer's templates: {', '.join(names)}" if names else ""
        raise UsageError(f"--chat_template {named} is not a file{known}.")
    if own is None:
        raise UsageError(
            f"The rows are messages, but the tokenizer of {config.teacher} has no chat template. "
            "Give one with --chat_template FILE, or name a column of plain text with --text_column."
        )
    try:
        return tokenizer.get_chat_template(tools=[] if with_tools else None)
    except ValueError as error:
        raise UsageError(
            f"The tokenizer of {config.teacher} has several chat templates and no default. "
            f"Choose one with --chat_template: {', '.join(names)}."
        ) from error


def _dated(text: str, day: date) -> str:
    """Put a date into a template in place of the calls that ask for today's."""
    found = _DATE_CALL.sub(lambda call: json.dumps(day.strftime(ast.literal_eval(call[1]))), text)
    if "strftime_now" in _DATE_TEST.sub("", _COMMENT.sub("", found)):
        raise UsageError(
            "The chat template prints today's date in a format that it computes, so a resumed run would read other "
            "tokens. Give a template with a fixed date with --chat_template FILE."
        )
    return found
