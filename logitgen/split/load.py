"""The split: loaded by `datasets` from the hub or from local files."""

import glob
import logging
import re
import sys
from pathlib import Path
from typing import Any, cast

import datasets
from datasets.fingerprint import Hasher

from logitgen.config import Config
from logitgen.errors import UsageError, first_line
from logitgen.split.cache import remedy
from logitgen.split.files import checked_format, format_of, matched, read_exactly, stamp
from logitgen.split.join import Parts, joined

Splits = dict[str, Parts]

logger = logging.getLogger(__name__)

_NO_DATA = (
    "corresponds to no data",
    "BatchSize must be greater than 0, got 0",
    "at least one example",
    "No columns to parse from file",
    "StopIteration",
)
"""Words of `datasets`, pandas and the Parquet reader for a file without rows."""


def load_split(config: Config) -> datasets.Dataset:
    """Load the rows that the options name: from the hub, a file, several files or a `save_to_disk` folder.

    Raises:
        UsageError: The dataset, its configuration or the split does not exist, cannot be read or has no rows.
    """
    read_exactly()
    sources: list[Path] = []
    try:
        sources = _sources(config.dataset)
        splits = _load(sources, config)
        lengths = {name: sum(len(rows) for _, rows in parts) for name, parts in splits.items()}
        # load_dataset could cut the split too, but reads some slices that end before they start up to the end.
        spans = datasets.ReadInstruction.from_spec(config.split).to_absolute(lengths)
        parts = [part for span in spans for part in _between(splits[span.splitname], span.from_, span.to)]
        if not parts:
            raise _no_rows(config)
        rows = joined(_between(parts, 0, config.limit or sys.maxsize), config, _cache_of(sources))
    except UsageError:
        raise
    except Exception as error:  # `datasets` and the readers below it raise errors of any type
        if _is_empty(error):
            raise _no_rows(config) from error
        raise _unreadable(error, config, sources) from error
    if sources:  # the cache looks up the tokens by this fingerprint
        rows._fingerprint = Hasher.hash((rows._fingerprint, stamp(sources)))
    return rows


def _between(parts: Parts, start: int, end: int) -> Parts:
    """Take the rows from `start` to `end` of files that follow each other."""
    found, offset = [], 0
    for file, rows in parts:
        first, last = max(start - offset, 0), min(end - offset, len(rows))
        if first < last:
            found.append((file, rows.select(range(first, last))))
        offset += len(rows)
    return found


def _sources(name: str) -> list[Path]:
    """Return the local files or the folder that an existing source consists of, or nothing for a hub id."""
    if Path(name).exists():
        return [Path(name)]
    return matched(name) if glob.has_magic(name) else []


def _cache_of(sources: list[Path]) -> Path:
    """Give local files with a new stamp their own cache: `datasets` knows them only by name and time."""
    folder = Path(datasets.config.HF_DATASETS_CACHE)
    return folder / "logitgen" / stamp(sources) if sources else folder


def _load(sources: list[Path], config: Config) -> Splits:
    path = Path(config.dataset)
    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if config.dataset_config and (is_saved or any(source.is_file() for source in sources)):
        raise UsageError(f"--dataset_config is for datasets that have several, {path} has one. Leave it out.")
    if is_saved:
        return _whole(_load_saved(path, config), config)
    if path.is_dir():
        return _load_folder(path, config)
    if path.exists() and not path.is_file():
        raise UsageError(f"--dataset {path} is neither a file nor a folder. Give one of them, or a hub id.")
    if sources:
        return {"train": _load_files(sources, config)}
    if not _is_hub_id(config.dataset):
        raise UsageError(f"--dataset {config.dataset} does not exist. Give a file, a folder or a hub id.")
    return _whole(_prepared(config.dataset, config, sources, name=config.dataset_config), config)


def _whole(splits: datasets.DatasetDict, config: Config) -> Splits:
    return {str(name): [(config.dataset, rows)] for name, rows in splits.items()}


def _prepared(path: str, config: Config, sources: list[Path], **options: Any) -> datasets.DatasetDict:
    """Have `datasets` prepare a dataset in the cache of its sources, and count the rows there."""
    cache = _cache_of(sources)
    splits = cast(datasets.DatasetDict, datasets.load_dataset(path, cache_dir=str(cache), **options))
    if {rows.info.builder_name for rows in splits.values()} & {"json", "csv"}:  # ours have other names
        logger.warning(
            f"{path} cannot be reached. Its copy in the cache was made by datasets alone, which changes dates, numbers "
            "and nulls of some JSON and CSV files. Run the same command once with a connection."
        )
    for name, rows in splits.items():
        expected = (rows.info.splits or {}).get(name)
        if expected and expected.num_examples != len(rows):
            raise UsageError(
                f"--dataset {config.dataset} has {expected.num_examples:,} rows in split {name}, its copy in the "
                f"cache {len(rows):,}: that is damaged. Remove {cache} and run the same command again."
            )
    return splits


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None and format_of(Path(name)) is None


def _load_folder(path: Path, config: Config) -> Splits:
    """Load a folder's files one by one, or together if its card gives the types or they are images and the like."""
    name = config.dataset_config
    builder = datasets.load_dataset_builder(str(path), name=name)
    splits = {str(split): [Path(file) for file in files] for split, files in (builder.config.data_files or {}).items()}
    read = {file for files in splits.values() for file in files}
    if left := sorted(str(file) for file in path.resolve().rglob("*") if format_of(file) and file not in read):
        names = ", ".join(left[:3]) + (f" and {len(left) - 3:,} more" if len(left) > 3 else "")
        logger.warning(f"Not read: {names}. Most files of {path} have another format, or its card leaves these out.")
    if builder.info.features is not None or builder.info.splits is not None or not all(map(format_of, read)):
        return _whole(_prepared(str(path), config, [path], name=name), config)
    return {split: _load_files(files, config, folder=str(path)) for split, files in splits.items()}


def _load_files(files: list[Path], config: Config, folder: str | None = None) -> Parts:
    """Load files one by one, each with the types of its own values. A folder's card may add options."""
    parts = []
    for file in files:
        loader, options = checked_format(file)
        if folder is not None:
            loader, options = folder, {"name": config.dataset_config, **options}
        parts += [(str(file), rows) for rows in _load_file(file, loader, options, config)]
    return parts


def _load_file(file: Path, loader: str, options: dict[str, Any], config: Config) -> list[datasets.Dataset]:
    """Load the rows of one file, or nothing if it is empty."""
    try:
        if file.stat().st_size:
            return list(_prepared(loader, config, [file], data_files=glob.escape(str(file)), **options).values())
    except UsageError:
        raise
    except Exception as error:
        if not _is_empty(error):
            raise _unreadable(error, config, [file]) from error
    if file != Path(config.dataset):
        logger.warning(f"{file} has no rows.")
    return []


def _load_saved(path: Path, config: Config) -> datasets.DatasetDict:
    try:
        saved = datasets.load_from_disk(str(path))
    except IndexError as error:  # `datasets` raises it for a saved dataset without files
        raise _no_rows(config) from error
    if isinstance(saved, datasets.DatasetDict):
        return saved
    name = str(saved.split or config.split).partition("[")[0]  # a saved slice is named after the slice
    return datasets.DatasetDict({name: saved})


def _no_rows(config: Config) -> UsageError:
    return UsageError(f"--split {config.split} of {config.dataset} has no rows.")


def _is_empty(error: Exception) -> bool:
    return any(words in first_line(error.__cause__ or error) for words in _NO_DATA)


def _unreadable(error: Exception, config: Config, sources: list[Path]) -> UsageError:
    cause = error.__cause__ or error
    place = f"{sources[0]}: " if len(sources) == 1 and sources[0] != Path(config.dataset) else ""
    return UsageError(
        f"--dataset {config.dataset} cannot be loaded with --split {config.split}: {place}"
        f"{first_line(cause).rstrip('.')}.{remedy(cause, [str(_cache_of(sources))])}"
    )
