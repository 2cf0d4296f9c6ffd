"""The split: loaded by `datasets` from the hub or from local files."""

import glob
import re
from pathlib import Path
from typing import Any, cast

import datasets
from datasets.fingerprint import Hasher

from logitgen.config import Config
from logitgen.errors import UsageError, first_line
from logitgen.split.cache import remedy

_FILE_FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}

_NO_DATA = ("corresponds to no data", "BatchSize must be greater than 0, got 0")
"""Words of `datasets` and the Parquet reader for a file without rows."""


def load_split(config: Config) -> datasets.Dataset:
    """Load the rows that the options name: from the hub, a file, a folder of files or a `save_to_disk` folder.

    Raises:
        UsageError: The dataset, its configuration or the split does not exist, cannot be read or has no rows.
    """
    try:
        splits = _load(config)
        lengths = {name: len(rows) for name, rows in splits.items()}
        # load_dataset could cut the split too, but reads some slices that end before they start up to the end.
        spans = datasets.ReadInstruction.from_spec(config.split).to_absolute(lengths)
    except UsageError:
        raise
    except Exception as error:  # `datasets` and the readers below it raise errors of any type
        cause = error.__cause__ or error
        if any(words in first_line(cause) for words in _NO_DATA):
            raise _no_rows(config) from error
        raise UsageError(
            f"--dataset {config.dataset} cannot be loaded with --split {config.split}: "
            f"{first_line(cause).rstrip('.')}.{remedy(cause, [_cache_folder(config)])}"
        ) from error
    parts = [splits[span.splitname].select(range(span.from_, span.to)) for span in spans if span.from_ < span.to]
    if not parts:
        raise _no_rows(config)
    rows = datasets.concatenate_datasets(parts)
    rows = rows.select(range(min(config.limit or len(rows), len(rows))))
    if Path(config.dataset).exists():  # the cache looks up the tokens by this fingerprint
        rows._fingerprint = Hasher.hash((rows._fingerprint, _stamp(Path(config.dataset))))
    return rows


def _stamp(path: Path) -> str:
    """Hash facts that change with the content of a file or folder, even if a program sets their times back."""
    files = [path] if path.is_file() else sorted(found for found in path.rglob("*") if found.is_file())
    stats = [(found.relative_to(path).as_posix(), found.stat()) for found in files]
    return str(Hasher.hash([(name, st.st_size, st.st_mtime_ns, st.st_ctime_ns, st.st_ino) for name, st in stats]))


def _load(config: Config) -> datasets.DatasetDict:
    path = Path(config.dataset)
    is_saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
    if config.dataset_config and (path.is_file() or is_saved):
        raise UsageError(f"--dataset_config is for datasets that have several, {path} has one. Leave it out.")
    if path.is_file():
        return _load_file(path, config)
    if is_saved:
        return _load_saved(path, config)
    if path.exists() and not path.is_dir():
        raise UsageError(f"--dataset {path} is neither a file nor a folder. Give one of them, or a hub id.")
    if not path.exists() and not _is_hub_id(config.dataset):
        raise UsageError(f"--dataset {config.dataset} does not exist. Give a file, a folder or a hub id.")
    return _prepared(config.dataset, config, name=config.dataset_config)


def _prepared(path: str, config: Config, **options: Any) -> datasets.DatasetDict:
    """Have `datasets` prepare a dataset in its cache, and count the rows there."""
    cache_dir = _cache_dir(Path(config.dataset))
    splits = cast(datasets.DatasetDict, datasets.load_dataset(path, cache_dir=cache_dir, **options))
    for name, rows in splits.items():
        expected = (rows.info.splits or {}).get(name)
        if expected and expected.num_examples != len(rows):
            raise UsageError(
                f"--dataset {config.dataset} has {expected.num_examples:,} rows in split {name}, its copy in the "
                f"cache {len(rows):,}: that is damaged. Remove {_cache_folder(config)} and run the same command again."
            )
    return splits


def _cache_folder(config: Config) -> str:
    return _cache_dir(Path(config.dataset)) or str(datasets.config.HF_DATASETS_CACHE)


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", name) is not None and Path(name).suffix not in _FILE_FORMATS


def _load_file(path: Path, config: Config) -> datasets.DatasetDict:
    if (file_format := _FILE_FORMATS.get(path.suffix.lower())) is None:
        raise UsageError(f"--dataset {path} must end in one of {' '.join(_FILE_FORMATS)}, got '{path.suffix}'.")
    if not path.stat().st_size:
        raise _no_rows(config)
    # In a column of text, "NA" is a word.
    options = {"keep_default_na": False} if file_format == "csv" else {}
    return _prepared(file_format, config, data_files=glob.escape(str(path)), **options)


def _cache_dir(path: Path) -> str | None:
    """Give local files with a new stamp their own cache: `datasets` knows them only by name and time."""
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "logitgen" / _stamp(path)) if path.exists() else None


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
