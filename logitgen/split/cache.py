"""The cache of tokens between runs: trusted only if complete and unchanged.

A power cut leaves files that were renamed but never synced: short, empty, or full of zeros. A file therefore counts
only with a seal beside it that holds its size and checksum. The seal is written after the file is on the disk.
"""

import errno
import json
import logging
import os
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

from logitgen.errors import CaptureError

logger = logging.getLogger(__name__)

_BLOCK_BYTES = 2**24

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_CUT_OFF = "Expected to be able to read"
"""Arrow's words for a file that ends too early, in an OSError without a number."""


def cached(path: Path, num_rows: int, make: Callable[[], datasets.Dataset]) -> datasets.Dataset:
    """Return the rows of a cache file, or make them anew.

    Args:
        path: The file, of the `datasets` library.
        num_rows: Number of rows it must have, or of different `source_row` values if it has that column.
        make: Returns the rows, from the file if it exists. Otherwise it writes the file, if it keeps one.

    Raises:
        CaptureError: Rows of the split are missing even after the rows were made anew.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and (fault := _fault(path, num_rows)):
        logger.warning(f"The tokens in {path} are made anew: {fault}.")
        path.unlink(missing_ok=True)
    is_new = not path.exists()
    rows = make()
    num_read = len(np.unique(rows.data.column("source_row"))) if "source_row" in rows.column_names else len(rows)
    if num_read != num_rows:
        raise CaptureError(
            f"{num_rows:,} rows became {num_read:,}. The datasets cache is damaged: remove {path.parent}."
        )
    if is_new:
        with suppress(FileNotFoundError):  # nothing is kept, or another run makes the same file anew
            _seal(path, num_rows)
    return rows


def remedy(error: BaseException, copies: Iterable[str]) -> str:
    """Return a hint for an error of the cache, or no text if the dataset is the cause.

    Args:
        error: The error of the read or the write.
        copies: Files or folders that were read, including those of the cache.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    copies = [copy for copy in copies if Path(copy).is_relative_to(folder) and Path(copy).exists()]
    if copies and (isinstance(error, pa.ArrowInvalid | pa.ArrowIndexError) or _CUT_OFF in str(error)):
        return f" If the dataset is sound, its copy in the cache is damaged: remove {', '.join(copies[:3])}."
    if isinstance(error, OSError) and (error.errno in _FULL or _lies_along(error.filename, folder)):
        return f" The rows are copied into {folder}: free space there, or name another folder in HF_DATASETS_CACHE."
    return ""


def _lies_along(name: str | None, folder: Path) -> bool:
    """Tell whether a path is a folder, above it or below it."""
    return name is not None and (folder.is_relative_to(name) or Path(name).is_relative_to(folder))


def _seal_of(path: Path) -> Path:
    return path.with_suffix(".json")


def _fault(path: Path, num_rows: int) -> str:
    """Return the fault of a file, or no text if it has none."""
    try:
        said = json.loads(_seal_of(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "they were not finished, or are of an older logitgen"
    if said == {"bytes": path.stat().st_size, "crc32": _crc32(path), "rows": num_rows}:
        return ""
    return "the file is damaged"


def _seal(path: Path, num_rows: int) -> None:
    with path.open("r+b") as file:
        os.fsync(file.fileno())
    facts = {"bytes": path.stat().st_size, "crc32": _crc32(path), "rows": num_rows}
    new = path.with_suffix(f".{os.getpid()}.new")
    with new.open("w", encoding="utf-8") as file:
        json.dump(facts, file)
        file.flush()
        os.fsync(file.fileno())
    new.replace(_seal_of(path))


def _crc32(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            checksum = zlib.crc32(block, checksum)
    return checksum
