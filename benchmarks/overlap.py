"""What the ranks did when: how long their forward passes waited for copies, transport or disk.

    python -m benchmarks.overlap --teacher FOLDER --dataset ROWS.jsonl

Once with the disk as it is, and once with one that is slower than the ranks: then memory must not grow, nothing may be
lost, and the run must say that it is the disk.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mode
from typing import Any

from transformers import AutoTokenizer

from benchmarks.harness import BLUE, Measured, Row, drawing, launch, measure, parse, scratch, write_report
from benchmarks.synthetic import small_llama
from logitgen import generate
from logitgen.leader import places, progress, writer
from logitgen.ranks import deliver

SLOW_BYTES_PER_SECOND = 1e5
"""Of the slow disk."""

COLORS = {"forward": BLUE, "checksum": "#e0a030", "wait": "#c03030", "write": "#60a060", "sync": "#204020"}
SHARES = ("forward", "checksum", "wait")

Trace = list[list[tuple[str, float, float]]]
"""Of each rank: what was done, from when to when, in seconds of the machine's clock."""


def trace(events: list[tuple[str, float, float]], kind: str, owner: Any, name: str) -> None:
    """Write down when some work is done, and at its begin for how long it has waited for a free buffer."""
    work = getattr(owner, name)

    def run(*arguments: Any, **options: Any) -> Any:
        start, before = time.time(), getattr(arguments[0], "waited_seconds", 0.0)
        try:
            return work(*arguments, **options)
        finally:
            events.append((kind, start, time.time()))
            if kind == "hand over":
                events.append(("wait", start, start + arguments[0].waited_seconds - before))

    setattr(owner, name, run)


def slowed(put: Callable[..., None]) -> Callable[..., None]:
    """Let a write take as long as a slow disk would."""

    def run(datasets: Any, name: str, data: Any, parts: Any) -> None:
        put(datasets, name, data, parts)
        if name == "kept_ids":
            time.sleep(data.nbytes / SLOW_BYTES_PER_SECOND)

    return run


def be_rank(folder: Path, slow_disk: bool, arguments: list[str]) -> None:
    """Run as `generate.py` does, and leave `rank_N.json` in the folder."""
    events: list[tuple[str, float, float]] = []
    trace(events, "forward", generate, "capture_batch")
    trace(events, "checksum", generate, "seal")
    trace(events, "hand over", deliver.Outbox, "put")
    trace(events, "write", writer.Writer, "_write_batch")
    trace(events, "sync", os, "fsync")
    if slow_disk:
        places.Arrays.put_parts = slowed(places.Arrays.put_parts)
    progress.PLAIN_SECONDS = 2.0
    sys.argv[1:] = arguments
    generate.main()
    (folder / f"rank_{os.environ.get('RANK', 0)}.json").write_text(json.dumps(events), encoding="utf-8")


def run(folder: Path, options: argparse.Namespace, disk: str, *words: str) -> tuple[Trace, Measured]:
    """Capture with several ranks, and read what they wrote down."""
    folder.mkdir()
    command = [*launch(options.ranks), "-m", "benchmarks.overlap", str(folder), disk, f"--dataset={options.dataset}"]
    command += [f"--output={folder}/out.h5", f"--log_dir={folder}/logs", "--batch_tokens=1024", *words]
    measured = measure(command, HF_HUB_OFFLINE="1")
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(options.ranks)], measured


def lines(name: str, trace: Trace, measured: Measured) -> Iterator[Row]:
    """Say which share of each rank's time, from first forward pass to last hand-over, went into what."""
    named = [found[1] for _, line in measured.lines if (found := re.search(r"bottleneck (\w+)", line))]
    for rank, events in enumerate(trace):
        times = [time for kind, *span in events if kind in ("forward", "hand over") for time in span]
        seconds = max(times) - min(times)
        yield {
            "run": f"{name}, rank {rank}",
            **{share: sum(end - start for kind, start, end in events if kind == share) / seconds for share in SHARES},
            "seconds": measured.wall_seconds,
            "peak MB": measured.largest(1)[0][0] / 1e6,
            "named": mode(named) if named else None,
        }


def draw(traces: dict[str, Trace], path: Path) -> None:
    """Draw what happened when: a line for each rank, and one for each thread of the leader's writer."""
    with drawing(path, len(traces), 1, figsize=(9, 1.8 * len(traces) + 0.8)) as (figure, panels):
        for axes, (title, trace) in zip(panels[:, 0], traces.items(), strict=True):
            first = min(start for events in trace for _, start, _ in events)
            for kind, color in COLORS.items():
                spans = [(rank, *span) for rank, events in enumerate(trace) for what, *span in events if what == kind]
                at = [f"rank {rank}" if kind in SHARES else kind for rank, _, _ in spans]
                widths, starts = [end - start for _, start, end in spans], [start - first for _, start, _ in spans]
                edge = 0.0 if kind in SHARES else 0.5  # else most are narrower than what is drawn at all
                axes.barh(at, widths, 0.7, starts, color=color, edgecolor=color, linewidth=edge, label=kind)
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.set_title(title)
        panels[-1, 0].set_xlabel("seconds")
        figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)


def main() -> None:
    """Run the three and compare, or be a rank."""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        be_rank(Path(sys.argv[1]), sys.argv[2] == "slow", sys.argv[3:])
        return
    options = parse(__doc__, teacher=str, dataset=str, split="train[:6%]", ranks=2)
    with scratch(options) as folder:
        tokenizer = AutoTokenizer.from_pretrained(options.teacher)
        for part in (tokenizer, small_llama(len(tokenizer))):
            part.save_pretrained(folder / "small")
        small = [f"--teacher={folder / 'small'}", "--split=train[:20%]"]
        runs = {"teacher as it is": ["as it is", f"--teacher={options.teacher}", f"--split={options.split}"]}
        runs |= {"fast teacher": ["as it is", *small], "fast teacher, slow disk": ["slow", *small]}
        found = {name: run(folder / name, options, *words) for name, words in runs.items()}
        fast, slow = ((folder / name / "out.h5").read_bytes() for name in list(runs)[1:])
    if fast != slow:
        raise SystemExit("error: the slow disk has changed the file.")
    table = [line for name in found for line in lines(name, *found[name])]
    write_report(options.output, "overlap", table, dict.fromkeys(SHARES, ".1%") | {"seconds": ".1f"})
    draw({name: trace for name, (trace, _) in found.items()}, options.output / "overlap.png")


if __name__ == "__main__":
    main()
