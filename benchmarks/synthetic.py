"""Teachers, rows and payloads made up for the benchmarks, of any number in little memory."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import LlamaConfig, LlamaForCausalLM

from logitgen.config import Config
from logitgen.file import header
from logitgen.file.header import Header
from logitgen.file.layout import ATTRIBUTES, HEAD_ATTRIBUTES, Array, Layout
from logitgen.leader.places import write_known
from logitgen.split import job
from logitgen.split.plan import Plan
from logitgen.split.rows import Rows

_REPEATED_ROWS = 64
_SPREAD = 0.7
_DRAWN_AT_ONCE = 2**20


def small_llama(vocab_size: int, **sizes: Any) -> LlamaForCausalLM:
    """Make a Llama of random weights whose forward pass costs next to nothing, unless other sizes are given."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(small | sizes)))


def ragged_lengths(num_rows: int, mean: float, longest: int, seed: int = 0, shortest: int = 2) -> Array:
    """Draw row lengths as those of real prose: log-normal, most of them short, some very long; int32[N]."""
    generator = np.random.default_rng(seed)
    lengths = np.empty(num_rows, dtype=np.int32)
    for start in range(0, num_rows, _DRAWN_AT_ONCE):
        part = lengths[start : start + _DRAWN_AT_ONCE]
        part[:] = generator.lognormal(np.log(mean) - _SPREAD**2 / 2, _SPREAD, len(part)).clip(shortest, longest)
    return lengths


@dataclass(frozen=True)
class Job(job.Job):
    """A job of made-up rows, and the file it goes into."""

    def shares(self, num_ranks: int) -> list[Array]:
        """Batches of each rank, in order."""
        return self.plan.shares(np.arange(self.plan.num_batches), num_ranks)

    def create_file(self, path: Path, **attributes: Any) -> Header:
        """Make the file as a run does, its space reserved, with all that is known beforehand."""
        kinds = ATTRIBUTES | (HEAD_ATTRIBUTES if self.layout.head else {})
        attributes = {name: kind() for name, kind in kinds.items()} | attributes
        places = header.create(path, self.layout, attributes)
        with path.open("r+b", buffering=0) as file:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
            write_known(file, places, self.layout, self.rows)
        prepare_memory(path)
        return Header(attributes, self.layout, places)


def job_of(rows: Rows, batch_tokens: int, **kind: Any) -> Job:
    """Lay out the file of these rows, and plan their batches."""
    sizes = {"num_rows": len(rows), "num_tokens": rows.num_tokens, "num_positions": rows.num_captured}
    return Job(rows, Plan(rows.forward_lengths, batch_tokens), Layout(**sizes, **kind))


def make_job(size_bytes: int, top_k: int, vocab_size: int, batch_tokens: int, row_tokens: int) -> Job:
    """Make up as many ragged rows as fill a file of that size.

    Every 64 rows are the same: their tokens are in memory once, however large the file is to be.
    """
    lengths = ragged_lengths(_REPEATED_ROWS, row_tokens, min(4 * row_tokens, batch_tokens))
    kind = {"capture": "topk", "vocab_size": vocab_size, "top_k": top_k}
    position_bytes = Layout(num_rows=1, num_tokens=1, num_positions=1, **kind).bytes_per_position
    repeats = max(1, round(size_bytes / position_bytes / int((lengths - 1).sum())))
    return job_of(make_rows(lengths, vocab_size, repeats), batch_tokens, **kind)


def make_rows(lengths: Array, vocab_size: int, repeats: int = 1) -> Rows:
    """Make up rows of these lengths from random tokens, all of them so many times."""
    ends = np.cumsum(lengths, dtype=np.int32)
    tokens = np.random.default_rng(0).integers(vocab_size, size=int(ends[-1]), dtype=np.int32)
    once = pa.ListArray.from_arrays(np.concatenate([np.zeros(1, np.int32), ends]), tokens)
    split = datasets.Dataset(pa.table({"input_ids": pa.chunked_array([once] * repeats)}))
    return Rows(split, Config(teacher="none", dataset="none", output="none"), max_length=None)


def random_payload(size_bytes: int) -> Array:
    """Make up a payload: random bytes, uint8, of which none is so large that a float in them could be infinite."""
    return np.random.default_rng(0).integers(64, size=size_bytes, dtype=np.uint8)


def prepare_memory(path: Path) -> None:
    """Use and free as much memory as a file will take in the page cache, and let the disk come to rest.

    A virtual machine's host takes back memory that is free for seconds; to get it again costs more than the writing.
    """
    beside = path.with_suffix(".memory")
    with beside.open("wb", buffering=0) as file:
        while file.tell() < path.stat().st_size:
            file.write(bytes(2**22))
    beside.unlink()
    os.sync()
