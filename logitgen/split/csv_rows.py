"""Tables of text as rows: every value is the text that the file has.

The reader that `datasets` has looks for numbers in every 10,000 rows anew, and makes 7 of 007.
"""

import csv
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from datasets.builder import Key
from datasets.packaged_modules.csv import csv as csv_files


class CsvRows(csv_files.Csv):  # type: ignore[misc]
    """The builder of `datasets` for .csv and .tsv files."""

    VERSION = "1.0.0"  # keeps copies in the cache apart from those that the reader of `datasets` made

    def _generate_tables(self, base_files: Any, files_iterables: Any) -> Iterator[tuple[Key, pa.Table]]:
        if self.config.features is not None:
            yield from super()._generate_tables(base_files, files_iterables)
            return
        csv.field_size_limit(2**31 - 1)  # the default is 131,072 characters
        for shard, files in enumerate(files_iterables):
            for file in files:
                frames = csv_files.pd.read_csv(file, iterator=True, dtype=str, **self.config.pd_read_csv_kwargs)
                for number, frame in enumerate(frames):
                    has_index = not isinstance(frame.index, csv_files.pd.RangeIndex)
                    if has_index and self.config.index_col is None:
                        raise ValueError("its rows have more values than its header has names")
                    rows = frame.dropna(how="all")  # without blank lines
                    yield Key(shard, number), pa.Table.from_pandas(rows, preserve_index=has_index)
