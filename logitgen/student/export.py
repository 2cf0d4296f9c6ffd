"""A file in the columns of trainers that read stored log-probs from rows: a folder, a Parquet or an ArrayRecord file.

Every row is one training example. The columns of axolotl's knowledge distillation, for T tokens:

    input_ids, attention_mask, labels   int32[T], labels unshifted, -100 where nothing is trained
    target_token_ids, target_logprobs   int32[T, K] and float32[T, K]; entry t is the distribution of token t+1
    target_mask                         int8[T, K], 1 where the teacher's distribution is known

Source: axolotl 0.19.0, `integrations/kd/collator.py` (the columns) and `kernels/liger.py`, which compares entry t with
the student's output at t and shifts the labels alone.

Those of DistillKit's offline distillation, for a packed row of T + 1 tokens, all captured:

    input_ids    int32[T], the last token left out, because nothing is known of the one after it
    token_ids    int32[T, K], entry t is the distribution of token t+1
    top_values   float32[T, K], log-probs as they are

Source: DistillKit 1.0.0, `compression/compressor.py` (the raw form of a row) and `trainer.py`, which compares entry t
with the student's output at t. It trains position t where there is a label of token t, not of token t+1. Where all
positions are trained, as here, that is no matter.

The features of MaxText's offline distillation, for T tokens, all captured but the last:

    inputs          int64[T]
    top_k_logits    float32[T, K], log-probs as they are, for the softmax over them is that over logits
    top_k_indices   int64[T, K], entry t is the distribution of token t+1

Source: MaxText 0.2.4, `input_pipeline/grain_data_processing.py` and `input_pipeline_utils.py` (ParseFeatures, and
ShiftData, which shifts the targets alone), `distillation_utils.py` (the loss, both sides renormalised over the K). It
trains every position before a token that is no padding. Where it packs rows, that includes the last of a row. So the
last entry is one token, K times over: its loss is 0 for every student.

Shape letters: T tokens of a row, P captured positions, K kept per position, E entries of several rows together.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from logitgen.errors import UsageError, reason
from logitgen.file.layout import WITH_KEPT_IDS, Array
from logitgen.file.reader import LogitsFile
from logitgen.file.verify import sound_row
from logitgen.student.dataset import IGNORED_LABEL
from logitgen.student.events import sample_weights
from logitgen.student.records import write_records

MASKED_LOGPROB = -1e9
"""Filler for unknown log-probs, equal to axolotl's padding. It is finite, so that nothing computed from it is NaN."""

_ENTRIES_AT_ONCE = 2**21

_IDS, _WIDE_IDS, _WIDE_VALUES = (
    pa.list_(pa.int32()),
    pa.list_(pa.list_(pa.int32())),
    pa.list_(pa.list_(pa.float32())),
)

Example = dict[str, Array]


Format = Literal["axolotl", "distillkit", "maxtext"]


def export(file: LogitsFile, output: Path, form: Format = "axolotl") -> int:
    """Write a file's rows as Parquet where the output's name ends in `.parquet`, else as a `save_to_disk` folder.

    MaxText reads neither, so its rows become an ArrayRecord file, whose name ends in `.array_record`. It cannot read
    rows without tokens, so those without a captured position are left out.

    Rows are streamed. A folder takes twice its size on the disk during the write. The output appears in full or not at
    all.

    Returns:
        The number of rows written.

    Raises:
        UsageError: The trainer cannot use what the file holds, the output exists or cannot be written, or a package
            for it is missing.
        FormatError: A row is damaged.
    """
    kinds, _, _ = _FORMATS[form]
    if file.layout.capture not in kinds:
        raise UsageError(
            f"The export for {form} needs a file of --capture {' or '.join(kinds)}, {file.path} has --capture "
            f"{file.layout.capture}. Train from it with LogitsDataset."
        )
    if form == "distillkit":
        _check_packed(file)
    if form == "maxtext":
        _check_whole(file)
    _check_output(output, form)
    try:
        with TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as beside:
            num_rows = _write(file, form, Path(beside) / output.name)
            (Path(beside) / output.name).rename(output)
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {reason(error)}. Choose another place.") from error
    return num_rows


def _check_packed(file: LogitsFile) -> None:
    """Refuse rows that DistillKit would train at the wrong positions, or could not stack into a batch."""
    lengths, counts = (np.diff(file.arrays[name]) for name in ("offsets", "position_offsets"))
    if np.any(lengths != lengths[0]) or np.any(counts != lengths - 1):
        raise UsageError(
            f"The export for distillkit needs packed rows of one length with all positions captured, {file.path} has "
            f"rows of {lengths.min():,} to {lengths.max():,} tokens, {counts.sum():,} positions in all. Capture with "
            "--packing, without --completion_only."
        )


def _check_whole(file: LogitsFile) -> None:
    """Refuse rows of which MaxText would train positions that are not captured."""
    lengths = np.diff(file.arrays["offsets"])
    if uncaptured := np.maximum(lengths - 1, 0).sum() - file.layout.num_positions:
        raise UsageError(
            f"The export for maxtext needs rows with all positions captured, {file.path} lacks {uncaptured:,}. Capture "
            "without --completion_only."
        )


def _check_output(output: Path, form: Format) -> None:
    if form == "maxtext" and output.suffix != ".array_record":
        raise UsageError(f"The output for maxtext must end in .array_record, got {output.name}.")
    if form != "maxtext" and output.suffix not in ("", ".parquet"):
        raise UsageError(f"The output must end in .parquet, or be a folder's name without a dot, got {output.name}.")
    if output.exists():
        raise UsageError(f"{output} exists already. Name another output, or remove it.")


def _of_maxtext(file: LogitsFile) -> Iterator[Example]:
    """Yield the rows that have positions one by one in MaxText's features."""
    for number in np.flatnonzero(np.diff(file.arrays["position_offsets"])):
        row = sound_row(file, int(number))
        one_more = ((0, 1), (0, 0))  # of zeros: logits and token alike
        yield {
            "inputs": row["input_ids"],
            "top_k_logits": np.pad(row["kept_logprobs"].astype(np.float32), one_more),
            "top_k_indices": np.pad(row["kept_ids"], one_more),
        }


def _of_distillkit(file: LogitsFile) -> Iterator[Example]:
    """Yield the rows one by one in DistillKit's columns."""
    for number in range(len(file)):
        row = sound_row(file, number)
        yield {
            "input_ids": row["input_ids"][:-1].astype(np.int32),
            "token_ids": row["kept_ids"].astype(np.int32),
            "top_values": row["kept_logprobs"].astype(np.float32),
        }


def _of_axolotl(file: LogitsFile) -> Iterator[Example]:
    """Yield the rows one by one in axolotl's columns."""
    for number in range(len(file)):
        row = sound_row(file, number)
        num_tokens, positions = len(row["input_ids"]), row["positions"]
        wide = (num_tokens, row["kept_ids"].shape[-1])
        example: Example = {
            "input_ids": row["input_ids"].astype(np.int32),
            "attention_mask": np.ones(num_tokens, np.int32),
            "labels": np.full(num_tokens, IGNORED_LABEL, np.int32),
            "target_token_ids": np.zeros(wide, np.int32),
            "target_logprobs": np.full(wide, MASKED_LOGPROB, np.float32),
            "target_mask": np.zeros(wide, np.int8),
        }
        example["labels"][positions + 1] = row["input_ids"][positions + 1]
        example["target_token_ids"][positions] = row["kept_ids"]
        example["target_logprobs"][positions] = target_logprobs(row["kept_logprobs"], file.layout.capture)
        example["target_mask"][positions] = 1
        yield example


def target_logprobs(kept_logprobs: Array, capture: str) -> Array:
    """Turn kept log-probs [P, K] into targets for a sum over kept tokens, target * (log target - log student).

    The top k are renormalised over themselves, as such trainers expect. Drawn tokens have the weights that make the
    sum's gradient unbiased. They sum to 1 as well.

    Returns:
        float32[P, K], nats.
    """
    logprobs_PK = torch.from_numpy(kept_logprobs.astype(np.float64))
    targets_PK = sample_weights(logprobs_PK).log() if capture == "sample" else logprobs_PK.log_softmax(-1)
    return targets_PK.clamp(min=MASKED_LOGPROB).float().numpy()


_FORMATS: dict[Format, tuple[Sequence[str], pa.Schema | None, Callable[[LogitsFile], Iterator[Example]]]] = {
    "axolotl": (
        WITH_KEPT_IDS,
        pa.schema(
            dict.fromkeys(("input_ids", "attention_mask", "labels"), _IDS)
            | {"target_token_ids": _WIDE_IDS, "target_logprobs": _WIDE_VALUES}
            | {"target_mask": pa.list_(pa.list_(pa.int8()))}
        ),
        _of_axolotl,
    ),
    "distillkit": (
        ("topk",),
        pa.schema({"input_ids": _IDS, "token_ids": _WIDE_IDS, "top_values": _WIDE_VALUES}),
        _of_distillkit,
    ),
    "maxtext": (("topk",), None, _of_maxtext),
}
"""By format: the kinds of capture it takes, its columns unless it takes records, and the rows. Only axolotl has a place
for the weights of drawn tokens."""


def _write(file: LogitsFile, form: Format, path: Path) -> int:
    _, schema, examples = _FORMATS[form]
    if schema is None:
        return write_records(examples(file), path)
    write = _write_parquet if path.suffix else _write_folder
    write(schema, _tables(file, schema, examples), path)
    return len(file)


def _write_parquet(schema: pa.Schema, tables: Iterator[pa.Table], path: Path) -> None:
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for table in tables:
            writer.write_table(table)


def _write_folder(schema: pa.Schema, tables: Iterator[pa.Table], path: Path) -> None:
    """Write the rows as one Arrow stream, which `datasets` maps into memory and saves in its own way."""
    from datasets import Dataset  # takes a second: only for a folder

    stream = path.with_suffix(".arrow")
    with pa.ipc.new_stream(stream, schema) as writer:
        for table in tables:
            writer.write_table(table)
    Dataset.from_file(str(stream)).save_to_disk(path)


def _tables(
    file: LogitsFile, schema: pa.Schema, examples: Callable[[LogitsFile], Iterator[Example]]
) -> Iterator[pa.Table]:
    """Yield the rows as tables of a bounded number of entries."""
    collected: list[Example] = []
    num_entries = 0
    for example in examples(file):
        collected.append(example)
        num_entries += max(array.size for array in example.values())
        if num_entries >= _ENTRIES_AT_ONCE:
            yield _table(collected, schema)
            collected, num_entries = [], 0
    if collected or not len(file):
        yield _table(collected, schema)


def _table(rows: Sequence[Example], schema: pa.Schema) -> pa.Table:
    columns = [_column([row[field.name] for row in rows], field.type) for field in schema]
    return pa.Table.from_arrays(columns, schema=schema)


def _column(arrays: Sequence[Array], kind: pa.ListType) -> pa.ListArray:
    """Join arrays of shape [T] or [T, K] into one column of lists, or of lists of lists."""
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    if pa.types.is_list(kind.value_type):
        joined_EK = np.concatenate(arrays) if arrays else np.zeros((0, 1))
        num_entries, width = joined_EK.shape
        inner = pa.array(joined_EK.ravel(), kind.value_type.value_type)
        values = pa.ListArray.from_arrays(np.arange(num_entries + 1, dtype=np.int32) * width, inner)
    else:
        values = pa.array(np.concatenate(arrays) if arrays else np.zeros(0), kind.value_type)
    return pa.ListArray.from_arrays(ends, values)
