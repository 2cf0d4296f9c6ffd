"""A chat template with all that goes into every rendering: its text, its options, the date it prints."""

import hashlib
import json
import re
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from logitgen.config import Config
from logitgen.errors import UsageError, first_line
from logitgen.split.messages import Chat, Message, with_arguments, with_parts

Options = dict[str, Any]
"""Variables for a template besides the messages: `tools`, and a row's `chat_template_kwargs`."""

_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_DATE_CALL = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")
_FIRST_WORD = re.compile(r"\s*\S+")

_ASKED, _SAID, _NEXT = "QUESTION", "ANSWER", "CONTINUATION"
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
        options = json.loads(config.chat_template_kwargs or "{}")
        return cls(tokenizer, with_date, options, day.isoformat() if prints_date else "")

    @property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides the rendering of a conversation."""
        return hashlib.sha256(repr((self.texts, sorted(self.options.items()))).encode()).hexdigest()

    @property
    def marks_turns(self) -> bool:
        """True if the template marks the assistant's tokens by generation blocks, for rows without and with tools."""
        return all(_GENERATION_BLOCK.search(text) for text in self.texts)

    @property
    def shows_tools(self) -> bool:
        """True if the template reads `tools`."""
        return "tools" in self.texts[1]

    def prepared(self, chat: Chat) -> Chat:
        """Return messages in the form that the template reads: arguments as objects or text, content as parts."""
        return self._in_parts([with_arguments(message, as_text=self._wants_text) for message in chat])

    def _in_parts(self, chat: Chat) -> Chat:
        return [with_parts(message) for message in chat] if self._wants_parts else chat

    def render(self, chat: Chat, given: Options, row: int, **how: Any) -> Any:
        """Render prepared messages of a row of the split.

        Raises:
            UsageError: The template refuses them.
        """
        try:
            return self._apply(chat, given, **how)
        except Exception as error:  # a template raises errors of any type: jinja errors, TypeError, its own
            raise UsageError(f"Row {row}: the chat template refuses the messages: {first_line(error)}") from error

    def _apply(self, chat: Chat, given: Options, **how: Any) -> Any:
        without_tools, with_tools = self.texts
        options: Options = {"tokenize": False, "chat_template": with_tools if "tools" in given else without_tools} | how
        return self.tokenizer.apply_chat_template(chat, **options, **(self.options | given))

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
            if shown and longer.startswith(shown) and (mark := _FIRST_WORD.match(longer[len(shown) :])):
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
        return "OSLO" not in self._probe(self._in_parts(chat)) and "OSLO" in self._probe(self._in_parts(texts))

    def _probe(self, chat: Chat) -> str:
        """Render messages, or return no text if the template refuses them."""
        with suppress(Exception):
            return str(self._apply(chat, {}))
        return ""


def _chosen(tokenizer: PreTrainedTokenizerBase, config: Config, with_tools: bool) -> str:
    """Return the text of the template for rows with or without tools."""
    named, own = config.chat_template, tokenizer.chat_template
    if named is not None and Path(named).is_file():
        try:
            return Path(named).read_text(encoding="utf-8")
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
    found = _DATE_CALL.sub(lambda call: json.dumps(day.strftime(call[1] or call[2] or "")), text)
    if "strftime_now(" in found:
        raise UsageError(
            "The chat template prints today's date in a format that it computes, so a resumed run would read other "
            "tokens. Give a template with a fixed date with --chat_template FILE."
        )
    return found
