"""Tables of text as rows: every value is the text that the file has.

The reader that `datasets` has looks for numbers in every 10,000 rows anew, and makes 7 of 007.
"""

import csv
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from datasets import Value
from datasets.builder import Key
from datasets.packaged_modules.csv import csv as csv_files

# In a column of text, "NA" is a word. Python's own `csv` gives a value that a row lacks as null, not as empty text.
_OPTIONS = {"keep_default_na": False, "engine": "python", "skip_blank_lines": False, "dtype": str}

_TEXTS = (Value("string"), Value("large_string"))


class CsvRows(csv_files.Csv):  # type: ignore[misc]
    """The builder of `datasets` for .csv and .tsv files. Where a card gives another type, empty values are nulls."""

    VERSION = "1.1.0"  # keeps copies in the cache apart from those that the reader of `datasets` made

    def _generate_tables(self, base_files: Any, files_iterables: Any) -> Iterator[tuple[Key, pa.Table]]:
        csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters
        nulls = list(csv_files.pd.io.parsers.readers.STR_NA_VALUES)
        others = [name for name, feature in (self.info.features or {}).items() if feature not in _TEXTS]
        options = {**self.config.pd_read_csv_kwargs, **_OPTIONS}
        if others:
            options["na_values"] = dict.fromkeys(others, nulls)
        for shard, files in enumerate(files_iterables):
            for file in files:
                options["skiprows"] = self.config.skiprows or _num_blank_lines(file)
                for number, frame in enumerate(csv_files.pd.read_csv(file, iterator=True, **options)):
                    has_index = not isinstance(frame.index, csv_files.pd.RangeIndex)
                    if has_index and self.config.index_col is None:
                        raise ValueError("its rows have more values than its header has names")
                    rows = frame.dropna(how="all")  # without blank lines
                    yield Key(shard, number), pa.Table.from_pandas(rows, preserve_index=has_index)


def _num_blank_lines(path: str) -> int:
    """Count the blank lines before the header."""
    with open(path, "rb") as file:
        return next((number for number, line in enumerate(file) if line.strip(b"\xef\xbb\xbf \r\n")), 0)
