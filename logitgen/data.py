"""The split: loaded by `datasets` from wherever it is."""

import re
from pathlib import Path

import datasets

from logitgen.config import Config
from logitgen.errors import UsageError, first_line

_FILE_FORMATS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".csv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}


def load_split(config: Config) -> datasets.Dataset:
    """Load the rows the options name: from the hub, a file, a folder of files or a `save_to_disk` folder.

    Raises:
        UsageError: The dataset, its configuration or the split does not exist, cannot be read or has no rows.
    """
    path = Path(config.dataset)
    try:
        if path.is_file():
            split = _load_file(path, config)
        elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            split = _load_saved(path, config.split)
        else:
            split = datasets.load_dataset(config.dataset, config.dataset_config, split=config.split)
    except UsageError:
        raise
    except Exception as error:
        if not path.exists() and not _is_hub_id(config.dataset):
            raise UsageError(
                f"--dataset {config.dataset} does not exist. Give a file, a folder or a hub id."
            ) from error
        cause = first_line(error.__cause__ or error)
        raise UsageError(f"--dataset {config.dataset} cannot be loaded with --split {config.split}: {cause}") from error
    if not len(split):
        raise UsageError(f"--split {config.split} of {config.dataset} has no rows.")
    return split.select(range(min(config.limit or len(split), len(split))))


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and Path(name).suffix not in _FILE_FORMATS


def _load_file(path: Path, config: Config) -> datasets.Dataset:
    if (file_format := _FILE_FORMATS.get(path.suffix.lower())) is None:
        raise UsageError(f"--dataset {path} must end in one of {' '.join(_FILE_FORMATS)}, got '{path.suffix}'.")
    return datasets.load_dataset(file_format, data_files=str(path), split=config.split)


def _load_saved(path: Path, split: str) -> datasets.Dataset:
    """Load a `save_to_disk` folder; a slice of a split is understood as `load_dataset` understands it."""
    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.Dataset):
        saved = datasets.DatasetDict({str(saved.split or split.partition("[")[0]): saved})
    lengths = {name: len(rows) for name, rows in saved.items()}
    spans = datasets.ReadInstruction.from_spec(split).to_absolute(lengths)
    return datasets.concatenate_datasets([saved[span.splitname].select(range(span.from_, span.to)) for span in spans])
