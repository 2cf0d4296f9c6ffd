"""What the ranks did when: how long their forward passes waited for copies, transport or disk.

    python -m benchmarks.overlap --teacher FOLDER --dataset ROWS.jsonl

Once with the disk as it is, and once with one that is slower than the ranks: then memory must not grow, nothing may be
lost, and the run must say that it is the disk.
"""

import argparse
import json
import re
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from benchmarks.harness import ROOT, Measured, launch, measure, plot_style, write_report

_COLORS = {"forward": "#1f5fa8", "checksum": "#e0a030", "wait": "#c03030", "write": "#60a060", "sync": "#204020"}

Trace = dict[int, list[tuple[str, float, float]]]


def small_teacher(like: Path, folder: Path) -> Path:
    """Make a teacher whose forward passes take no time to speak of, with the tokenizer of another."""
    tokenizer = AutoTokenizer.from_pretrained(like)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(folder: Path, options: argparse.Namespace, *more: str) -> tuple[Trace, Measured]:
    """Capture with several ranks, and read what they wrote down."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    command = [*launch(options.ranks), "-m", "benchmarks.traced", str(folder), f"--dataset={options.dataset}", *more]
    measured = measure([*command, f"--output={folder}/out.h5", f"--log_dir={folder}/logs"], {"HF_HUB_OFFLINE": "1"})
    traces = {int(path.stem.split("_")[1]): json.loads(path.read_text()) for path in folder.glob("rank_*.json")}
    return traces, measured


def shares(trace: list[tuple[str, float, float]]) -> dict[str, float]:
    """Which share of a rank's time, from its first forward pass to its last hand-over, went into what."""
    main = [event for event in trace if event[0] in ("forward", "hand over")]
    seconds = max(end for _, _, end in main) - min(start for _, start, _ in main)
    spent: dict[str, float] = defaultdict(float)
    for kind, start, end in trace:
        spent[kind] += (end - start) / seconds
    return spent


def draw(traces: dict[str, Trace], path: Path) -> None:
    """Draw what happened when: a line for each rank, and one for each thread of the leader's writer."""
    plot_style()
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    figure, panels = plt.subplots(len(traces), 1, figsize=(9, 1.8 * len(traces) + 0.8))
    for axes, (title, trace) in zip(panels, traces.items(), strict=True):
        start = min(event[1] for events in trace.values() for event in events)
        lines = [f"rank {rank}" for rank in sorted(trace)] + ["write", "sync"]
        for rank, events in trace.items():
            for kind, begin, end in events:
                if kind in _COLORS:
                    line = lines.index(kind) if kind in lines else rank
                    edge = 0.5 if kind in lines else 0.0  # else most are narrower than what is drawn at all
                    place = {"left": begin - start, "height": 0.7, "linewidth": edge}
                    axes.barh(line, end - begin, color=_COLORS[kind], edgecolor=_COLORS[kind], **place)
        axes.set_yticks(range(len(lines)), lines)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_title(title)
    panels[-1].set_xlabel("seconds")
    legend = [Patch(color=color, label=kind) for kind, color in _COLORS.items()]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    figure.savefig(path)
    plt.close(figure)


def bottlenecks(measured: Measured) -> list[str]:
    """What the run named as its bottleneck, line after line."""
    return [found[1] for _, line in measured.lines if (found := re.search(r"bottleneck (\w+)", line))]


def main() -> None:
    """Run the three, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--split", default="train[:6%]")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / ".bench")
    options = parser.parse_args()
    folder = options.output.resolve() / "overlap_files"
    small = small_teacher(options.teacher, folder / "small")
    teachers = {
        "teacher as it is": [f"--teacher={options.teacher}", f"--split={options.split}", "--batch_tokens=1024"],
        "fast teacher": [f"--teacher={small}", "--split=train[:20%]", "--batch_tokens=1024"],
        "fast teacher, slow disk": [f"--teacher={small}", "--split=train[:20%]", "--batch_tokens=1024", "--slow_disk"],
    }
    traces: dict[str, Trace] = {}
    table: list[dict[str, str]] = []
    data: dict[str, Any] = {}
    for name, words in teachers.items():
        traces[name], measured = run(folder / name.replace(" ", "_"), options, *words)
        for rank, trace in sorted(traces[name].items()):
            spent = shares(trace)
            named = bottlenecks(measured)
            table.append(
                {
                    "run": f"{name}, rank {rank}",
                    **{kind: f"{spent[kind]:.1%}" for kind in ("forward", "checksum", "wait")},
                    "seconds": f"{measured.wall_seconds:.1f}",
                    "peak MB": f"{measured.peak_rank_bytes / 1e6:,.0f}",
                    "named": max(set(named), key=named.count) if named else "-",
                }
            )
            data[f"{name}, rank {rank}"] = spent | {"named": named}
    fast, slow = ((folder / name.replace(" ", "_") / "out.h5").read_bytes() for name in list(teachers)[1:])
    if fast != slow:
        raise SystemExit("error: the slow disk has changed the file.")
    write_report(options.output, "overlap", data, table)
    draw(traces, options.output / "overlap.png")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
