"""How time and memory grow with the rows, with the ranks, and what the plan alone takes.

    python -m benchmarks.growth

Whole runs of `generate.py` over made-up rows of token ids, with a teacher so small that what grows is ours; and the
plan. All ranks share this machine's CPU cores: with more ranks than cores the table shows what a rank costs, not what
it gains. `--ranks` all capture `--rows_of_ranks` rows.
"""

import time
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.harness import Row, launch, measure, parse, scratch, write_report
from benchmarks.synthetic import ragged_lengths, small_llama
from logitgen.config import Config
from logitgen.estimate import _taken_bytes
from logitgen.split.plan import Plan
from logitgen.split.prefixes import neighbours
from logitgen.split.rows import Rows

MEAN_TOKENS, MOST_TOKENS, VOCAB_SIZE = 60, 512, 1000
BATCH_TOKENS = 8192
RANKS_OF_ROWS = 2
RANKS_OF_PLAN = 16
MOST_SEARCHED = 10**7
"""Rows whose tokens fit into memory."""


def main() -> None:
    """Measure all three; the plan first, before anything else has filled the heap."""
    runs: Row = {"rows": [1_000, 10_000, 100_000], "ranks": [1, 2, 4, 8, 16], "rows_of_ranks": 10_000}
    options = parse(__doc__, **runs, plan_rows=[10**6, 10**7, 10**8])
    plans = [plan(num_rows) for num_rows in options.plan_rows]
    plans += [search(num_rows) for num_rows in options.plan_rows if num_rows <= MOST_SEARCHED]
    with scratch(options) as folder:
        small_llama(VOCAB_SIZE, max_position_embeddings=MOST_TOKENS).save_pretrained(folder / "teacher")
        sizes = [(num_rows, RANKS_OF_ROWS) for num_rows in options.rows]
        sizes += [(options.rows_of_ranks, num_ranks) for num_ranks in options.ranks]
        table = [run(folder, *size) for size in sizes]
    write_report(options.output, "growth", table + plans, {"seconds": ".1f", "before capturing": ".1f"})


def run(folder: Path, num_rows: int, num_ranks: int) -> Row:
    """Capture so many ragged rows of random tokens on so many ranks; the time until the first forward pass is apart."""
    rows, output = folder / f"{num_rows}.parquet", folder / "out.h5"
    made = random_rows(num_rows)
    pq.write_table(made, rows)
    words = [f"--teacher={folder / 'teacher'}", f"--dataset={rows}", f"--output={output}", "--top_k=8"]
    words += [f"--batch_tokens={BATCH_TOKENS}", f"--log_dir={folder / 'logs'}"]
    env = {"HF_DATASETS_CACHE": str(folder / f"cache_{num_rows}_{num_ranks}"), "HF_HUB_OFFLINE": "1"}
    measured = measure([*launch(num_ranks), "generate.py", *words], OMP_NUM_THREADS="1", **env)
    output.unlink()
    peaks = [resident for resident, _ in measured.largest(num_ranks)]
    return {
        "what": "run",
        "rows": num_rows,
        "tokens": len(made.column("input_ids").combine_chunks().flatten()),
        "ranks": num_ranks,
        "seconds": measured.wall_seconds,
        "before capturing": measured.seconds_of("Capturing "),
        "largest MB": max(peaks) / 1e6,
        "smallest rank's MB": min(peaks) / 1e6,
    }


def random_rows(num_rows: int) -> pa.Table:
    """Make ragged rows of random tokens."""
    ends = np.cumsum(np.concatenate([[0], ragged_lengths(num_rows, MEAN_TOKENS, MOST_TOKENS)]), dtype=np.int64)
    tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=int(ends[-1]), dtype=np.int32)
    return pa.table({"input_ids": pa.LargeListArray.from_arrays(ends, tokens)})


def search(num_rows: int) -> Row:
    """Look for shared prefixes in rows that have none."""
    config = Config(teacher="none", dataset="none", output="none")
    rows = Rows(datasets.Dataset(random_rows(num_rows)), config, max_length=None)
    start = time.perf_counter()
    taken_bytes = _taken_bytes(torch.device("cpu"), lambda: neighbours(rows))
    found = {"seconds": time.perf_counter() - start, "largest MB": taken_bytes / 1e6}
    return {"what": "search for prefixes", "rows": num_rows, "tokens": rows.num_tokens, "ranks": 1} | found


def plan(num_rows: int) -> Row:
    """Plan so many rows in this process, and deal the batches to ranks."""
    lengths = ragged_lengths(num_rows, MEAN_TOKENS, MOST_TOKENS)

    def work() -> None:
        plan = Plan(lengths, BATCH_TOKENS)
        plan.shares(plan.pending(np.zeros(num_rows, dtype=bool)), RANKS_OF_PLAN)

    start = time.perf_counter()
    taken_bytes = _taken_bytes(torch.device("cpu"), work)
    seconds = time.perf_counter() - start
    sizes = {"rows": num_rows, "tokens": int(lengths.sum(dtype=np.int64)), "ranks": RANKS_OF_PLAN}
    return {"what": "plan alone", **sizes, "seconds": seconds, "largest MB": taken_bytes / 1e6}


if __name__ == "__main__":
    main()
