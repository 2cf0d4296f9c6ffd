"""Rows of several files as one dataset, also where the files' columns or types differ.

`datasets` would turn every file's values into the types of the first: a number into text, without a word.
"""

import json
import logging
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from datasets import Features, LargeList, List, Value
from datasets.fingerprint import Hasher

from logitgen.config import Config
from logitgen.errors import UsageError
from logitgen.split.cache import cached
from logitgen.split.chats import CHAT_COLUMNS
from logitgen.split.messages import without_filled
from logitgen.split.shapes import columns_read

Parts = list[tuple[str, datasets.Dataset]]
"""Files in their order, each with its rows."""

logger = logging.getLogger(__name__)

_OPTIONAL = {"tools", "chat_template_kwargs", "attention_mask", "position_ids", "seq_lengths"}
"""Columns of which a row without a value is as good as a row without the column."""

_MAY_BE_JSON = {*CHAT_COLUMNS, "tools", "chat_template_kwargs"}
"""Columns in which a value and its JSON text are read alike."""

_NOTHING, _TEXT = Value("null"), Value("string")


def joined(parts: Parts, config: Config, folder: Path) -> datasets.Dataset:
    """Join the rows of files. Where the files differ, leave only the columns that are read.

    Args:
        parts: The rows of each file.
        config: The options.
        folder: The place of rows whose types must be changed.

    Raises:
        UsageError: A file lacks a column that is read of the others, or has another type there.
    """
    if any(_types(rows) != _types(parts[0][1]) for _, rows in parts):
        names = _columns(parts, config)
        common = {name: _type_of(name, parts, config) for name in names}
        parts = [(file, _as_types(rows, common, folder)) for file, rows in parts]
    return datasets.concatenate_datasets([rows for _, rows in parts])


def _columns(parts: Parts, config: Config) -> list[str]:
    """Name the columns that are read, the same of every file."""
    every = {name: feature for _, rows in parts for name, feature in rows.features.items()}
    names = columns_read(every, config)
    for file, rows in parts:
        found = columns_read(rows.features, config)
        if not found or set(found) - set(names) or set(names) - set(found) - _OPTIONAL:
            others = f"of other files {', '.join(names)} would be read" if names else "none of them can be read"
            raise UsageError(
                f"--dataset {config.dataset} has files with different columns: {file} has "
                f"{', '.join(rows.column_names)}, {others}. Give all files the same, or name a column of text with "
                "--text_column."
            )
    if unused := [name for name in every if name not in names]:
        logger.info(f"The files' columns differ. Columns not used: {', '.join(unused)}.")
    return names


def _types(rows: datasets.Dataset) -> dict[str, pa.DataType]:
    """Return Arrow's types by column. They tell the order of members, which a chat template shows."""
    return {field.name: field.type for field in rows.features.arrow_schema}


def _type_of(name: str, parts: Parts, config: Config) -> Any:
    """Return the type that holds a column's values of all files unchanged."""
    may_be_json = name in (*_MAY_BE_JSON, config.messages_column)
    if may_be_json and len({_types(rows).get(name, pa.null()) for _, rows in parts} - {pa.null()}) > 1:
        return _TEXT
    common, first = _NOTHING, ""
    for file, rows in parts:
        kind = rows.features.get(name, _NOTHING)
        try:
            merged = _common(common, kind)
        except TypeError as error:
            raise UsageError(
                f"--dataset {config.dataset} has files with different types: '{name}' is {_shown(common)} in {first} "
                f"and {_shown(kind)} in {file}. Give all files the same."
            ) from error
        first = file if common == _NOTHING else first
        common = merged
    return common


def _shown(kind: Any) -> str:
    return f"{kind.dtype}" if isinstance(kind, Value) else f"{kind!r:.100}"


def _common(one: Any, other: Any) -> Any:
    """Return the type that holds the values of two types unchanged. Nulls fill the members that one lacks.

    Raises:
        TypeError: There is none.
    """
    if _NOTHING in (one, other) or one == other:
        return other if one == _NOTHING else one
    if isinstance(one, dict) and isinstance(other, dict):
        return {name: _common(one.get(name, _NOTHING), other.get(name, _NOTHING)) for name in {**one, **other}}
    if isinstance(one, List | LargeList) and isinstance(other, List | LargeList):
        return List(_common(one.feature, other.feature))
    if isinstance(one, Value) and isinstance(other, Value):
        for kind, widest in (("int", Value("int64")), ("string", _TEXT)):
            if kind in one.dtype and kind in other.dtype:
                return widest
    raise TypeError


def _as_types(rows: datasets.Dataset, common: dict[str, Any], folder: Path) -> datasets.Dataset:
    """Give the columns of a file these types. A column it lacks stays away, and joining fills it with nulls."""
    rows = rows.select_columns([name for name in common if name in rows.features])
    features = Features({name: common[name] for name in rows.column_names})
    if _types(rows) == {field.name: field.type for field in features.arrow_schema}:
        return rows
    fingerprint = Hasher.hash((rows._fingerprint, features))
    path = folder / f"{fingerprint}.arrow"

    def convert(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {
            name: [_json(value, rows.features[name]) for value in values] if name in texts else values
            for name, values in batch.items()
        }

    def make() -> datasets.Dataset:
        options = {"features": features, "new_fingerprint": fingerprint, "cache_file_name": str(path)}
        return rows.map(convert, batched=True, **options)

    texts = {name for name in rows.column_names if features[name] == _TEXT}
    return cached(path, len(rows), make)


def _json(value: Any, feature: Any) -> str | None:
    """Write a value of some type as JSON text, without the members that Arrow has filled in."""
    if value is None or isinstance(value, str):
        return value
    return json.dumps(without_filled(value, feature), ensure_ascii=False)
