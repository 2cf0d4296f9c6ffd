"""Rows of tokens on their way into the cache, and what a user must know about them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any

import datasets
import numpy as np

FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "completion_mask": datasets.List(datasets.Value("uint8")),
        "source_row": datasets.Value("int64"),
        "notes": datasets.Value("uint16"),
    }
)


class Note(IntFlag):
    """A property of a row that its reader may not expect. The cache keeps it, so a later run warns again."""

    CONTENT_LEFT_OUT = 1
    REASONING_LEFT_OUT = 2
    CALLS_LEFT_OUT = 4
    TWO_BOS = 8
    NO_EOS = 16
    REWRITTEN = 32
    PACKED = 64
    NO_TURN = 128
    NULLS = 256


NOTHING = Note(0)

NOTES = {
    Note.CONTENT_LEFT_OUT: "the chat template leaves out part of a message's content",
    Note.REASONING_LEFT_OUT: "the chat template leaves out the reasoning of a message",
    Note.CALLS_LEFT_OUT: "the chat template leaves out a tool call",
    Note.TWO_BOS: "the text begins with the beginning-of-text token, and the tokenizer adds another. "
    "Leave it out with --add_special_tokens false",
    Note.NULLS: "tools, tool calls or other objects have null members, which the chat template gets. Leave them out of "
    "the file if they stand for nothing, as in files that datasets has exported",
    Note.NO_TURN: "the conversation has no turn of the assistant to capture",
    Note.NO_EOS: "no completion ends with the end-of-text token, so a student would not learn to stop. "
    "Add it with --append_eos",
}
"""Warnings about rows."""

SPLIT_NOTES = {
    Note.REWRITTEN: "the chat template renders earlier turns differently once later ones follow",
    Note.PACKED: "they hold packed documents",
}
"""Reasons why a row of the split became several rows."""


@dataclass
class Tokens:
    """Rows of tokens, column by column.

    Attributes:
        input_ids: The tokens of each row.
        completion_mask: 1 for each token of a completion, 0 for the others.
        source_row: Row of the split that each row comes from.
        notes: `Note` flags of each row.
    """

    input_ids: list[list[int]] = field(default_factory=list)
    completion_mask: list[list[int]] = field(default_factory=list)
    source_row: list[int] = field(default_factory=list)
    notes: list[int] = field(default_factory=list)

    def add(self, source_row: int, ids: list[int], mask: Iterable[int] = (), notes: Note = NOTHING) -> None:
        """Append a row. Tokens behind the end of its mask belong to no completion."""
        marked = list(mask)
        self.input_ids.append(ids)
        self.completion_mask.append(marked + [0] * (len(ids) - len(marked)))
        self.source_row.append(source_row)
        self.notes.append(int(notes))

    def columns(self, names: Iterable[str]) -> dict[str, list[Any]]:
        """Return these columns."""
        return {name: getattr(self, name) for name in names}


Encode = Callable[[dict[str, list[Any]], list[int]], Tokens]
"""Turns a batch of rows, column by column, and their numbers in the split into tokens."""


@dataclass(frozen=True)
class Remark:
    """A warning about rows of the split.

    Attributes:
        text: The reason.
        num_rows: Number of rows of the split it holds for.
        first: The first of them.
    """

    text: str
    num_rows: int
    first: int

    def __str__(self) -> str:
        rows = "1 row (" if self.num_rows == 1 else f"{self.num_rows:,} rows (first: "
        return f"{rows}row {self.first}): {self.text}."


def remarks(tokens: datasets.Dataset) -> list[Remark]:
    """Collect the warnings about a tokenised split."""
    notes, source_row = (tokens.data.column(name).to_numpy() for name in ("notes", "source_row"))
    found = []
    for note in Note:
        rows, counts = np.unique(source_row[(notes & note) != 0], return_counts=True)
        became = f"they became {counts.sum():,} rows, because {SPLIT_NOTES.get(note)}"
        text = NOTES.get(note, became)
        if len(rows) and (note is not Note.NO_EOS or len(rows) == len(np.unique(source_row))):
            found.append(Remark(text, len(rows), int(rows[0])))
    return found
