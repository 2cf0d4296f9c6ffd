"""JSON files as rows, as Python's own `json` reads them.

The reader that `datasets` has goes by the first 10 MB of a file. Behind them it puts text that stands beside numbers
into quotes, and refuses lists where nulls were. It makes times of texts that look like one, and structs of objects:
with one order of members and one type of each for all rows.
"""

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
from datasets import Features, Json, LargeList, List, SplitGenerator, Value
from datasets.builder import Key
from datasets.packaged_modules.json import json as json_files
from datasets.utils import tqdm

_BATCH_CHARACTERS = 2**22
_SPACE = re.compile(r"\s*")
_MIXED = pa.struct([])
"""The type of columns that hold objects, or values of several types. They stay JSON."""


class JsonRows(json_files.Json):  # type: ignore[misc]
    """The builder of `datasets` for JSON files. A column has the one type that all its values have, or stays JSON."""

    VERSION = "1.1.0"  # keeps copies in the cache apart from those that the reader of `datasets` made

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        splits: list[SplitGenerator] = super()._split_generators(dl_manager)
        if self.info.features is None:
            found = [files for split in splits for files in split.gen_kwargs["files_iterables"]]
            self.info.features = _features(rows for files in found for rows in self._batches(files))
        return splits

    def _generate_tables(
        self, base_files: Any, files_iterables: Any, original_files: Any, allow_full_read: bool = True
    ) -> Iterator[tuple[Key, pa.Table]]:
        if not allow_full_read:  # asked for the types of the first rows alone
            raise json_files.FullReadDisallowed
        features = self.info.features
        for shard, files in enumerate(files_iterables):
            for number, rows in enumerate(self._batches(files)):
                columns = _columns(rows, features)
                encoded = {name: _encoded(values, List(features.get(name))) for name, values in columns.items()}
                yield Key(shard, number), self._cast_table(pa.table(encoded))

    def _batches(self, files: Iterable[str]) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows of files, about `_BATCH_CHARACTERS` at a time. A value that is no object is a row's text."""
        for file in files:
            rows, size = [], 0
            for value, num_characters in self._values(file):
                rows.append(value if isinstance(value, dict) else {"text": value})
                size += num_characters
                if size >= _BATCH_CHARACTERS:
                    yield rows
                    rows, size = [], 0
            if rows:
                yield rows

    def _values(self, path: str) -> Iterator[tuple[Any, int]]:
        """Pair the values of a file with the characters that each takes: one per line, or else those of the whole file.

        Raises:
            ValueError: The file is not JSON, or not in its encoding.
        """
        encoding = "utf-8-sig" if self.config.encoding == "utf-8" else self.config.encoding
        with open(path, encoding=encoding, errors=self.config.encoding_errors, newline="\n") as file:
            lines = enumerate(file, start=1)
            number, line = next(((number, line) for number, line in lines if line.strip()), (1, ""))
            if self.config.field is None and _is_whole(line):
                yield _decoded(line, number), len(line)
                yield from ((_decoded(line, number), len(line)) for number, line in lines if line.strip())
                return
            text = "\n" * (number - 1) + line + file.read()
        values = _several(text)
        if self.config.field is not None:
            values = [values[0][self.config.field]]
        if len(values) == 1 and isinstance(values[0], list):
            values = values[0]
        yield from ((value, len(text) // len(values)) for value in values)


def _is_whole(line: str) -> bool:
    """Whether the first line of a file is a row. A list may be the whole file."""
    if line.lstrip().startswith("["):
        return False
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def _decoded(line: str, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"line {number} is not JSON, at character {error.colno}: {error.msg}") from None


def _several(text: str) -> list[Any]:
    """Decode values that follow each other."""
    values, decoder, place = [], json.JSONDecoder(), 0
    while (place := _SPACE.match(text, place).end()) < len(text):  # type: ignore[union-attr]
        value, place = decoder.raw_decode(text, place)
        values.append(value)
    return values


def _encoded(value: Any, feature: Any) -> Any:
    """Write the parts of a value that have the type of JSON as text. A card may put it inside of lists and objects."""
    if isinstance(feature, Json):
        return None if value is None else json.dumps(value)
    if isinstance(value, list) and isinstance(feature, List | LargeList) and not isinstance(feature.feature, Value):
        return [_encoded(member, feature.feature) for member in value]
    if isinstance(value, dict) and isinstance(feature, dict):
        return {name: _encoded(member, feature.get(name)) for name, member in value.items()}
    return value


def _columns(rows: list[dict[str, Any]], names: Iterable[str] = ()) -> dict[str, list[Any]]:
    """Return the values of all members of rows by their names, and of these."""
    every = dict.fromkeys([*names, *(name for row in rows for name in row)])
    return {name: [row.get(name) for row in rows] for name in every}


def _features(batches: Iterable[list[dict[str, Any]]]) -> Features:
    """Find the types that hold the values of all rows unchanged."""
    types: dict[str, pa.DataType] = {}
    with tqdm(desc="Finding the types of columns", unit=" examples") as bar:
        for rows in batches:
            for name, values in _columns(rows).items():
                types[name] = _common(types.get(name, pa.null()), _type_of(values))
            bar.update(len(rows))
    plain = Features.from_arrow_schema(pa.schema({name: kind for name, kind in types.items() if kind != _MIXED}))
    return Features({name: plain.get(name, Json()) for name in types})


def _type_of(values: list[Any]) -> pa.DataType:
    try:
        kind = inner = pa.array(values).type
    except (pa.ArrowException, OverflowError, UnicodeEncodeError):  # there is none
        return _MIXED
    while pa.types.is_list(inner):
        inner = inner.value_type
    return _MIXED if pa.types.is_struct(inner) else kind


def _common(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """Return the type of the values of both."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_list(one) and pa.types.is_list(other):
        inner = _common(one.value_type, other.value_type)
        return inner if inner == _MIXED else pa.list_(inner)
    return _MIXED
