"""How time and memory grow with the rows, with the ranks, and what the plan alone takes.

    python -m benchmarks.growth

Whole runs of `generate.py` over made-up rows of token ids, with a teacher so small that what grows is ours; and the
plan in a process of its own. All ranks share this machine's CPU cores: with more ranks than cores the table shows what
a rank costs, not what it gains. GPUs are not measured.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

from benchmarks.harness import launch, measure, plot_style, write_report
from benchmarks.synthetic import ragged_lengths
from logitgen.estimate import forget_peak, peak_bytes
from logitgen.split.plan import Plan

MEAN_TOKENS, MOST_TOKENS, VOCAB_SIZE, TOP_K = 60, 512, 1000, 8
BATCH_TOKENS = 8192
RANKS_OF_ROWS = 2
RANKS_OF_PLAN = 16
BLUE = "#1f5fa8"


def main() -> None:
    """Measure all three, or be the process that makes a plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--rows", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4, 8, 16], help="All over --rows_of_ranks rows.")
    parser.add_argument("--rows_of_ranks", type=int, default=10_000)
    parser.add_argument("--plan_rows", type=int, nargs="*", default=[10**6, 10**7, 10**8])
    parser.add_argument("--out", type=Path, default=Path(".bench"))
    parser.add_argument("--plan", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plan:
        sys.stdout.write(json.dumps(make_plan(options.plan)) + "\n")
        return
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_teacher(folder / "teacher")
        found = {
            "rows": [run(folder, num_rows, RANKS_OF_ROWS) for num_rows in options.rows],
            "ranks": [run(folder, options.rows_of_ranks, num_ranks) for num_ranks in options.ranks],
            "plan": [plan_alone(num_rows) for num_rows in options.plan_rows],
        }
    write_report(options.out, "growth", found, [cells(line) for lines in found.values() for line in lines])
    plot(found, options.out / "growth.png")


def save_teacher(folder: Path) -> None:
    """Save a Llama of random weights whose forward pass costs next to nothing."""
    logging.disable_progress_bar()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCAB_SIZE, max_position_embeddings=MOST_TOKENS, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def save_rows(path: Path, num_rows: int) -> int:
    """Save ragged rows of random token ids, and return how many tokens they have."""
    ends = np.cumsum(np.concatenate([[0], ragged_lengths(num_rows, MEAN_TOKENS, MOST_TOKENS)]), dtype=np.int64)
    tokens = np.random.default_rng(0).integers(VOCAB_SIZE, size=int(ends[-1]), dtype=np.int32)
    pq.write_table(pa.table({"input_ids": pa.LargeListArray.from_arrays(ends, tokens)}), path)
    return int(ends[-1])


def run(folder: Path, num_rows: int, num_ranks: int) -> dict[str, Any]:
    """Capture so many rows on so many ranks; the time until the first forward pass is apart."""
    rows, output = folder / f"{num_rows}.parquet", folder / "out.h5"
    num_tokens = save_rows(rows, num_rows)
    words = [f"--teacher={folder / 'teacher'}", f"--dataset={rows}", f"--output={output}", f"--top_k={TOP_K}"]
    words += [f"--batch_tokens={BATCH_TOKENS}", f"--log_dir={folder / 'logs'}"]
    env = {"HF_DATASETS_CACHE": str(folder / f"cache_{num_rows}_{num_ranks}"), "HF_HUB_OFFLINE": "1"}
    measured = measure([*launch(num_ranks), "generate.py", *words], env | {"OMP_NUM_THREADS": "1"})
    output.unlink()
    return {
        "what": "run",
        "num_rows": num_rows,
        "num_ranks": num_ranks,
        "num_tokens": num_tokens,
        "seconds": measured.wall_seconds,
        "seconds_before": measured.seconds_of("Capturing "),
        "peak_bytes": sorted(
            (found.peak_bytes for found in measured.processes.values() if found.is_rank), reverse=True
        )[:num_ranks],
    }


def plan_alone(num_rows: int) -> dict[str, Any]:
    """Have a process of its own plan so many rows."""
    measured = measure([sys.executable, "-m", "benchmarks.growth", "--plan", str(num_rows)])
    return json.loads(measured.lines[-1][1])


def make_plan(num_rows: int) -> dict[str, Any]:
    """Plan so many rows in this process, and deal the batches to ranks."""
    lengths = ragged_lengths(num_rows, MEAN_TOKENS, MOST_TOKENS)
    forget_peak()
    before_bytes, start = peak_bytes(), time.perf_counter()
    plan = Plan(lengths, BATCH_TOKENS)
    planned = time.perf_counter()
    plan.shares(plan.pending(np.zeros(num_rows, dtype=bool)), RANKS_OF_PLAN)
    return {
        "what": "plan alone",
        "num_rows": num_rows,
        "num_ranks": RANKS_OF_PLAN,
        "num_tokens": int(lengths.sum(dtype=np.int64)),
        "num_batches": plan.num_batches,
        "padding_share": plan.padding_share,
        "seconds": time.perf_counter() - start,
        "plan_seconds": planned - start,
        "peak_bytes": [peak_bytes() - before_bytes],
    }


def cells(line: dict[str, Any]) -> dict[str, str]:
    """Turn a measurement into a row of the table."""
    before = line.get("seconds_before")
    return {
        "what": line["what"],
        "rows": f"{line['num_rows']:,}",
        "tokens": f"{line['num_tokens']:,}",
        "ranks": str(line["num_ranks"]),
        "seconds": f"{line['seconds']:.1f}",
        "before capturing": f"{before:.1f}" if before else "",
        "us per row": f"{line['seconds'] / line['num_rows'] * 1e6:,.2f}",
        "largest MB": f"{max(line['peak_bytes']) / 1e6:,.0f}",
        "smallest rank's MB": f"{min(line['peak_bytes']) / 1e6:,.0f}",
    }


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Draw seconds and memory over rows, ranks, and rows of the plan alone."""
    plot_style()
    figure, panels = plt.subplots(2, 3, figsize=(9.5, 5.2), sharex="col")
    titles = {
        "rows": ("rows", f"Rows, {RANKS_OF_ROWS} ranks", "num_rows"),
        "ranks": ("ranks", "Ranks, same rows and cores", "num_ranks"),
        "plan": ("rows", "Plan alone", "num_rows"),
    }
    for (name, (label, title, key)), (above, below) in zip(titles.items(), panels.T, strict=True):
        at = [line[key] for line in found[name]]
        draw(above, at, [line["seconds"] for line in found[name]])
        draw(below, at, [max(line["peak_bytes"]) / 1e6 for line in found[name]])
        above.set_title(title)
        below.set_xlabel(label)
    panels[0, 0].set_ylabel("seconds")
    panels[1, 0].set_ylabel("largest process, MB")
    panels[1, 2].set_ylabel("more than the lengths, MB")
    figure.savefig(path)


def draw(panel: Any, at: Sequence[int], values: Sequence[float]) -> None:
    """Draw one line, its points labelled, over at least two decades: what is flat must look flat."""
    panel.loglog(at, values, marker="o", color=BLUE)
    for x, y in zip(at, values, strict=True):
        label = f"{y:,.0f}" if y >= 100 else f"{y:.2g}"
        panel.annotate(label, (x, y), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8)
    if values:
        panel.set_ylim(min(min(values) / 2, max(values) / 30), max(max(values) * 3, min(values) * 10))
    panel.margins(x=0.15)
    panel.minorticks_off()
    panel.set_xticks(at, [short(x) for x in at])


def short(count: int) -> str:
    """Write a count with a letter for its thousands."""
    for factor, letter in ((10**6, "M"), (10**3, "k")):
        if count % factor == 0:
            return f"{count // factor}{letter}"
    return str(count)


if __name__ == "__main__":
    main()
