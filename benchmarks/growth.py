"""How time and memory grow with the rows, with the ranks, and what the plan alone takes.

    python -m benchmarks.growth

Whole runs of `generate.py` over made-up rows of token ids, with a teacher so small that what grows is ours; and the
plan in a process of its own. All ranks share this machine's CPU cores: with more ranks than cores the table shows what
a rank costs, not what it gains. `--ranks` all capture `--rows_of_ranks` rows.
"""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.harness import BLUE, Row, drawing, launch, measure, parse, scratch, write_report
from benchmarks.synthetic import ragged_lengths, small_llama
from logitgen.estimate import forget_peak, peak_bytes
from logitgen.split.plan import Plan

MEAN_TOKENS, MOST_TOKENS, VOCAB_SIZE, TOP_K = 60, 512, 1000, 8
BATCH_TOKENS = 8192
RANKS_OF_ROWS = 2
RANKS_OF_PLAN = 16


def main() -> None:
    """Measure all three, or be the process that makes a plan."""
    runs: Row = {"rows": [1_000, 10_000, 100_000], "ranks": [1, 2, 4, 8, 16], "rows_of_ranks": 10_000}
    options = parse(__doc__, **runs, plan_rows=[10**6, 10**7, 10**8], only_plan=0)
    if options.only_plan:
        print(json.dumps(make_plan(options.only_plan)))
        return
    with scratch(options) as folder:
        small_llama(VOCAB_SIZE, max_position_embeddings=MOST_TOKENS).save_pretrained(folder / "teacher")
        alone = [sys.executable, "-m", "benchmarks.growth", f"--output={folder}", "--only_plan"]
        found = {
            "rows": [run(folder, num_rows, RANKS_OF_ROWS) for num_rows in options.rows],
            "ranks": [run(folder, options.rows_of_ranks, num_ranks) for num_ranks in options.ranks],
            "plan": [json.loads(measure([*alone, str(number)]).lines[-1][1]) for number in options.plan_rows],
        }
    table = [line for lines in found.values() for line in lines]
    write_report(options.output, "growth", table, {"seconds": ".1f", "before capturing": ".1f"})
    plot(found, options.output / "growth.png")


def save_rows(path: Path, num_rows: int) -> int:
    """Save ragged rows of random token ids, and return how many tokens they have."""
    ends = np.cumsum(np.concatenate([[0], ragged_lengths(num_rows, MEAN_TOKENS, MOST_TOKENS)]), dtype=np.int64)
    tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=int(ends[-1]), dtype=np.int32)
    pq.write_table(pa.table({"input_ids": pa.LargeListArray.from_arrays(ends, tokens)}), path)
    return int(ends[-1])


def run(folder: Path, num_rows: int, num_ranks: int) -> Row:
    """Capture so many rows on so many ranks; the time until the first forward pass is apart."""
    rows, output = folder / f"{num_rows}.parquet", folder / "out.h5"
    num_tokens = save_rows(rows, num_rows)
    words = [f"--teacher={folder / 'teacher'}", f"--dataset={rows}", f"--output={output}", f"--top_k={TOP_K}"]
    words += [f"--batch_tokens={BATCH_TOKENS}", f"--log_dir={folder / 'logs'}"]
    env = {"HF_DATASETS_CACHE": str(folder / f"cache_{num_rows}_{num_ranks}"), "HF_HUB_OFFLINE": "1"}
    measured = measure([*launch(num_ranks), "generate.py", *words], OMP_NUM_THREADS="1", **env)
    output.unlink()
    peaks = sorted((rank.peak_bytes for rank in measured.ranks), reverse=True)[:num_ranks]
    return line("run", num_rows, num_tokens, num_ranks, measured.wall_seconds, peaks) | {
        "before capturing": measured.seconds_of("Capturing ")
    }


def line(what: str, num_rows: int, num_tokens: int, num_ranks: int, seconds: float, peaks: list[int]) -> Row:
    """Put together a row of the table."""
    sizes = {"what": what, "rows": num_rows, "tokens": num_tokens, "ranks": num_ranks}
    memory = {"largest MB": max(peaks) / 1e6, "smallest rank's MB": min(peaks) / 1e6}
    return sizes | {"seconds": seconds, "before capturing": None} | memory


def make_plan(num_rows: int) -> Row:
    """Plan so many rows in this process, and deal the batches to ranks."""
    lengths = ragged_lengths(num_rows, MEAN_TOKENS, MOST_TOKENS)
    forget_peak()
    before_bytes, start = peak_bytes(), time.perf_counter()
    plan = Plan(lengths, BATCH_TOKENS)
    plan.shares(plan.pending(np.zeros(num_rows, dtype=bool)), RANKS_OF_PLAN)
    seconds, num_tokens = time.perf_counter() - start, int(lengths.sum(dtype=np.int64))
    return line("plan alone", num_rows, num_tokens, RANKS_OF_PLAN, seconds, [peak_bytes() - before_bytes])


def plot(found: dict[str, list[Row]], path: Path) -> None:
    """Draw seconds and memory over rows, ranks, and rows of the plan alone."""
    titles = {"rows": f"Rows, {RANKS_OF_ROWS} ranks", "ranks": "Ranks, same rows and cores", "plan": "Rows, plan alone"}
    with drawing(path, 2, 3, figsize=(9.5, 5.2), sharex="col") as (_, panels):
        for (name, title), column in zip(titles.items(), panels.T, strict=True):
            column[0].set_title(title)
            at = [line["ranks" if name == "ranks" else "rows"] for line in found[name]]
            for panel, shown in zip(column, ("seconds", "largest MB"), strict=True):
                values = [line[shown] for line in found[name]]
                panel.loglog(at, values, marker="o", color=BLUE)
                for x, y in zip(at, values, strict=True):
                    panel.annotate(f"{y:,.3g}", (x, y), textcoords="offset points", xytext=(0, 7), ha="center")
                panel.set_ylim(min(values, default=1) / 10, max(values, default=1) * 10)  # flat must look flat
                panel.margins(x=0.15)
                panel.minorticks_off()
                panel.set_xticks(at, [f"{x:,}" for x in at])
        panels[0, 0].set_ylabel("seconds")
        panels[1, 0].set_ylabel("largest process, MB")
        panels[1, 2].set_ylabel("more than the lengths, MB")


if __name__ == "__main__":
    main()
