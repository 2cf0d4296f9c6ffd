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
from collections import defaultdict
from collections.abc import Callable
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

_COLORS = {"forward": BLUE, "checksum": "#e0a030", "wait": "#c03030", "write": "#60a060", "sync": "#204020"}
SHARES = ("forward", "checksum", "wait")

Events = list[tuple[str, float, float]]
"""What was done, from when to when, in seconds of the machine's clock."""

Trace = dict[int, Events]
"""What each rank did."""

events: Events = []
"""What this rank did."""


def trace(kind: str, owner: Any, name: str) -> None:
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


def be_rank(folder: Path, arguments: list[str]) -> None:
    """Run as `generate.py` does, and leave `rank_N.json` in the folder."""
    trace("forward", generate, "capture_batch")
    trace("checksum", generate, "seal")
    trace("hand over", deliver.Outbox, "put")
    trace("write", writer.Writer, "_write_batch")
    trace("sync", os, "fsync")
    if "--slow_disk" in arguments:
        arguments.remove("--slow_disk")
        places.Arrays.put_parts = slowed(places.Arrays.put_parts)
    progress.PLAIN_SECONDS = 2.0
    sys.argv[1:] = arguments
    generate.main()
    (folder / f"rank_{os.environ.get('RANK', 0)}.json").write_text(json.dumps(events), encoding="utf-8")


def run(folder: Path, options: argparse.Namespace, *words: str) -> tuple[Trace, Measured]:
    """Capture with several ranks, and read what they wrote down."""
    folder.mkdir()
    command = [*launch(options.ranks), "-m", "benchmarks.overlap", str(folder), f"--dataset={options.dataset}", *words]
    command += [f"--output={folder}/out.h5", f"--log_dir={folder}/logs", "--batch_tokens=1024"]
    measured = measure(command, HF_HUB_OFFLINE="1")
    return {rank: json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(options.ranks)}, measured


def shares(name: str, trace: Trace, measured: Measured) -> list[Row]:
    """Say which share of each rank's time, from first forward pass to last hand-over, went into what."""
    named = [found[1] for _, line in measured.lines if (found := re.search(r"bottleneck (\w+)", line))]
    table = []
    for rank, events in trace.items():
        spent: dict[str, float] = defaultdict(float)
        main = [event for event in events if event[0] in ("forward", "hand over")]
        seconds = max(end for _, _, end in main) - min(start for _, start, _ in main)
        for kind, start, end in events:
            spent[kind] += (end - start) / seconds
        row = {"run": f"{name}, rank {rank}"} | {kind: spent[kind] for kind in SHARES}
        row |= {"seconds": measured.wall_seconds, "peak MB": measured.peak_rank_bytes / 1e6}
        table.append(row | {"named": mode(named) if named else None})
    return table


def draw(traces: dict[str, Trace], path: Path) -> None:
    """Draw what happened when: a line for each rank, and one for each thread of the leader's writer."""
    from matplotlib.patches import Patch

    legend = [Patch(color=color, label=kind) for kind, color in _COLORS.items()]
    with drawing(path, len(traces), 1, figsize=(9, 1.8 * len(traces) + 0.8)) as (figure, panels):
        for axes, (title, trace) in zip(panels[:, 0], traces.items(), strict=True):
            start = min(event[1] for events in trace.values() for event in events)
            lines = [f"rank {rank}" for rank in trace] + ["write", "sync"]
            for rank, events in trace.items():
                for kind, begin, end in (event for event in events if event[0] in _COLORS):
                    line = lines.index(kind) if kind in lines else rank
                    edge = 0.5 if kind in lines else 0.0  # else most are narrower than what is drawn at all
                    look = {"height": 0.7, "linewidth": edge, "color": _COLORS[kind], "edgecolor": _COLORS[kind]}
                    axes.barh(line, end - begin, left=begin - start, **look)
            axes.set_yticks(range(len(lines)), lines)
            axes.invert_yaxis()
            axes.grid(visible=False, axis="y")
            axes.set_title(title)
        panels[-1, 0].set_xlabel("seconds")
        figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)


def main() -> None:
    """Run the three and compare, or be a rank."""
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        be_rank(Path(sys.argv[1]), sys.argv[2:])
        return
    options = parse(__doc__, teacher=str, dataset=str, split="train[:6%]", ranks=2)
    with scratch(options) as folder:
        tokenizer = AutoTokenizer.from_pretrained(options.teacher)
        for part in (tokenizer, small_llama(len(tokenizer))):
            part.save_pretrained(folder / "small")
        small = [f"--teacher={folder / 'small'}", "--split=train[:20%]"]
        runs = {"teacher as it is": [f"--teacher={options.teacher}", f"--split={options.split}"]}
        runs |= {"fast teacher": small, "fast teacher, slow disk": [*small, "--slow_disk"]}
        found = {name: run(folder / name, options, *words) for name, words in runs.items()}
        fast, slow = ((folder / name / "out.h5").read_bytes() for name in list(runs)[1:])
    if fast != slow:
        raise SystemExit("error: the slow disk has changed the file.")
    traces = {name: trace for name, (trace, _) in found.items()}
    table = [row for name in found for row in shares(name, *found[name])]
    write_report(options.output, "overlap", table, dict.fromkeys(SHARES, ".1%") | {"seconds": ".1f"})
    draw(traces, options.output / "overlap.png")


if __name__ == "__main__":
    main()
