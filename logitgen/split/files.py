"""The files of a source: their formats, the names that a pattern matches, and a stamp of their state."""

import glob
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import fsspec.compression
import pyarrow as pa
from datasets import packaged_modules
from datasets.features import features
from datasets.fingerprint import Hasher
from datasets.utils import json as json_values

from logitgen.errors import UsageError
from logitgen.split.csv_rows import CsvRows
from logitgen.split.json_rows import JsonRows


class Format(NamedTuple):
    """How `datasets` reads a file: the name of its loader and the loader's options."""

    loader: str
    options: dict[str, Any]


_TEXT_FORMATS = {
    ".json": Format("json", {}),
    ".jsonl": Format("json", {}),
    ".csv": Format("csv", {}),
    ".tsv": Format("csv", {"sep": "\t"}),
    ".txt": Format("text", {"encoding": "utf-8-sig"}),
}
_FORMATS = {**_TEXT_FORMATS, ".parquet": Format("parquet", {}), ".arrow": Format("arrow", {})}

_COMPRESSED = (".gz", ".zst")

_READING = "4"
"""Changes with what is read of a file, so that no older copy in the cache is taken for it."""


def format_of(path: Path) -> Format | None:
    """Return the format that a file's name tells, or None for a name that tells none."""
    suffix = path.suffix.lower()
    if suffix in _COMPRESSED:
        return _TEXT_FORMATS.get(path.with_suffix("").suffix.lower())
    return _FORMATS.get(suffix)


def checked_format(path: Path) -> Format:
    """Return the format that a file's name tells.

    Raises:
        UsageError: It tells none, or `datasets` cannot open a file of this name.
    """
    if (file_format := format_of(path)) is None:
        suffix = "".join(path.suffixes[-2:]) if path.suffix.lower() in _COMPRESSED else path.suffix
        others = [name for name in _FORMATS if name not in _TEXT_FORMATS]
        raise UsageError(
            f"--dataset {path} must end in one of {' '.join(_TEXT_FORMATS)} (each also with {' or '.join(_COMPRESSED)} "
            f"behind) {' '.join(others)}, got '{suffix}'."
        )
    if path.suffix.lower() in _COMPRESSED and set(path.name) & set(
        "[]"
    ):  # `datasets` takes them for part of an address
        raise UsageError(f"--dataset {path}: the name of a compressed file cannot have brackets. Rename the file.")
    return file_format


def matched(pattern: str) -> list[Path]:
    """Return the files that a pattern matches, sorted by name. Folders it matches are passed over.

    Raises:
        UsageError: It matches no file, files of several formats, one file twice, or anything else than files.
    """
    names = sorted(glob.glob(pattern, recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
    found = [Path(name) for name in names]
    files = [path for path in found if not path.is_dir() or format_of(path)]
    if not files:
        folders = f", only folders such as {found[0]}" if found else ""
        raise UsageError(f"--dataset {pattern} does not exist, and as a pattern it matches no file{folders}.")
    same: dict[Path, Path] = {}
    for path in files:
        if not path.is_file():
            raise UsageError(f"--dataset {pattern} matches {path}, which is no file. Narrow the pattern down to files.")
        if checked_format(path).loader != checked_format(files[0]).loader:
            raise UsageError(
                f"--dataset {pattern} matches files of several formats, such as {files[0]} and {path}. Narrow it down "
                "to one."
            )
        if (twin := same.setdefault(path.resolve(), path)) != path:
            raise UsageError(f"--dataset {pattern} matches {twin} and {path}, the same file. Narrow it down to one.")
    return files


def stamp(paths: Iterable[Path]) -> str:
    """Hash facts that change with the content of files or folders, even if a program sets their times back."""
    facts = []
    for path in paths:
        files = [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file())
        for file in files:
            st = file.stat()
            name = file.name if file == path else file.relative_to(path).as_posix()
            facts.append((name, st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_ino))
    return str(Hasher.hash((_READING, facts)))


def read_exactly() -> None:
    """Have `datasets` read files as they are.

    - Arrow decompresses .zst files. It reports a file that was cut off, and needs no other package. `zstandard`, which
      fsspec would take, returns the rows before the cut as if they were all.
    - `JsonRows` reads JSON files, `CsvRows` tables of text.
    - Python's own `json` reads and writes objects in rows. pandas' ujson rounds fractions to ten decimals.
    """
    fsspec.compression.register_compression("zstd", _zstd, "zst", force=True)
    for loader, builder in (("json", JsonRows), ("csv", CsvRows)):
        packaged_modules._PACKAGED_DATASETS_MODULES[loader] = (builder.__module__, builder.VERSION)
    for module in (features, json_values):
        vars(module).update(ujson_dumps=json.dumps, ujson_loads=json.loads)


def _zstd(file: Any, mode: str = "rb", **_: Any) -> io.BufferedReader:
    return io.BufferedReader(pa.CompressedInputStream(file, "zstd"))
