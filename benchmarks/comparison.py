"""Capture the same rows in every way people have done it, and compare.

    python -m benchmarks.comparison --teacher FOLDER --dataset ROWS.jsonl

Whole commands in turns, from their start to a file that can be trained from, in another order each round. What they
leave is compared with ours row by row; a difference ends the benchmark. `--batch_tokens` is for ours and for the
forward passes alone, `--no_ablation` leaves out ours with one piece taken away. `--only` names rows of the table; ours
and the forward passes are always there.
"""

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from statistics import median

import torch

from benchmarks.check import MismatchError, check
from benchmarks.contenders import CEILING, OURS, Contender, code_lines, contenders
from benchmarks.harness import BLUE, Measured, Row, Spread, drawing, measure, parse, scratch, write_report
from logitgen.file.reader import LogitsFile

_OTHERS, _REDUCED = "other ways", "logitgen with one piece replaced"
_COLORS = {OURS: BLUE, _OTHERS: "#b8b8b8", _REDUCED: "#9dbfe3"}

Run = dict[str, float]
"""What was measured of one run of one contender."""


def first_row_seconds(measured: Measured, folder: Path) -> float | None:
    """When the first rows were in the file: as a competitor said, or as our log says; None if neither does."""
    said = [seconds for seconds, line in measured.lines if "first row" in line]
    for log in folder.glob("logs/**/rank_0.log"):
        said += [seconds for seconds, message in measured.log_lines(log) if "First rows are in the file." in message]
    return min(said, default=None)


def in_order(found: dict[str, Contender], turn: int) -> list[str]:
    """Put the names into another order each round; one that goes on from another stays behind it."""
    starters = [name for name, contender in found.items() if not contender.after]
    shift = turn % len(starters)
    return [
        name
        for starter in starters[shift:] + starters[:shift]
        for name, contender in found.items()
        if starter in (name, contender.after)
    ]


def play_round(found: dict[str, Contender], turn: int, folder: Path, options: argparse.Namespace) -> dict[str, Run]:
    """Run all contenders once, check what they left, and return what was measured by name."""
    runs: dict[str, Run] = {}
    names = {name: re.sub(r"\W+", "_", contender.after or name) for name, contender in found.items()}
    folders = {name: folder / f"round_{turn}" / own for name, own in names.items()}
    for name in in_order(found, turn):
        folders[name].mkdir(parents=True, exist_ok=True)
        runs[name] = run(found[name], folders[name], runs.get(found[name].after, {}), options)
        print(f"round {turn + 1}: {name}, {runs[name]['wall_seconds']:.1f} s", flush=True)
    ours = LogitsFile(folders[OURS] / "out.h5")
    needed = ours.layout.num_positions  # the tokens up to the last captured position of each row
    for name, contender in found.items():
        try:
            if contender.read:
                runs[name]["rows_verified"] = check(contender.read(sorted(folders[name].glob(contender.files))), ours)
            elif runs[name]["read_tokens"] != needed:
                raise MismatchError(f"The teacher read {runs[name]['read_tokens']:,} tokens, not {needed:,}.")
        except MismatchError as error:
            raise MismatchError(f"'{name}' does not yield what ours does. {error}") from error
        runs[name]["tokens_per_second"] = needed / runs[name]["wall_seconds"]
    return runs


def run(contender: Contender, folder: Path, before: Run, options: argparse.Namespace) -> Run:
    """Run a contender once, with as many threads as all and caches of its own; add what it goes on from."""
    measured = measure(
        [word.replace("{folder}", str(folder)) for word in contender.command],
        HF_DATASETS_CACHE=str(folder / "cache"),
        HF_HUB_OFFLINE="1",
        OMP_NUM_THREADS=str(max(1, len(os.sched_getaffinity(0)) // options.ranks)),
        TOKENIZERS_PARALLELISM="false",
        PYTHON=sys.executable,
    )
    seconds_before = before.get("wall_seconds", 0.0)
    numbers: Run = {
        "wall_seconds": seconds_before + measured.wall_seconds,
        "peak_rank_bytes": max(measured.peak_rank_bytes, before.get("peak_rank_bytes", 0)),
    }
    if contender.read is None:
        told = [line for _, line in measured.lines if line.startswith("tokens ")]
        return numbers | {"read_tokens": sum(int(line.split()[1]) for line in told)}
    files = [file for path in folder.glob(contender.files) for file in (path, *path.rglob("*")) if file.is_file()]
    numbers |= {"disk_bytes": sum(file.stat().st_blocks * 512 for file in files), "files": len(files)}
    first_seconds = first_row_seconds(measured, folder)
    return numbers if first_seconds is None else numbers | {"first_row_seconds": seconds_before + first_seconds}


def relative(rounds: Sequence[dict[str, Run]], name: str, base: str) -> Spread:
    """A contender's speed as a share of another one's, within each round."""
    return Spread.of(*([runs[one]["tokens_per_second"] for runs in rounds] for one in (name, base)))


COLUMNS = {
    "tokens/s": ("tokens_per_second", 1, ",.0f"),
    "seconds": ("wall_seconds", 1, ",.1f"),
    "first row, s": ("first_row_seconds", 1, ",.1f"),
    "MB per rank": ("peak_rank_bytes", 1e6, ",.0f"),
    "MB on disk": ("disk_bytes", 1e6, ",.1f"),
    "files": ("files", 1, ",.0f"),
}
"""What is in a column, in which unit and form."""

RATIO, LINES = "speed, ours = 1 (least-most)", "own lines of code"


def summarise(rounds: Sequence[dict[str, Run]], code: dict[str, str]) -> Iterator[Row]:
    """Sum up the rounds of every contender."""
    for name in rounds[0]:
        row: Row = {"approach": name, "tokens/s": None, RATIO: relative(rounds, name, OURS)}
        for column, (key, unit, _) in COLUMNS.items():
            values = [runs[name][key] / unit for runs in rounds if key in runs[name]]
            row[column] = median(values) if values else None
        yield row | {LINES: code_lines(code[name]) if code[name] or name == OURS else None}


def draw(rounds: Sequence[dict[str, Run]], path: Path, note: str) -> None:
    """Draw the speed of everything but the ceiling as a share of it, with the spread over the rounds."""
    from matplotlib.patches import Patch

    shares = {name: relative(rounds, name, CEILING) for name in rounds[0] if name != CEILING}
    kinds = [OURS if name == OURS else _REDUCED if name.startswith("ours") else _OTHERS for name in shares]
    medians = [share.median for share in shares.values()]
    spread = [[share.median - share.least for share in shares.values()], [s.most - s.median for s in shares.values()]]
    with drawing(path, 1, 1, figsize=(8, 1.4 + 0.36 * len(shares))) as (figure, ((axes,),)):
        axes.barh(list(shares), medians, color=[_COLORS[kind] for kind in kinds], xerr=spread, error_kw={"capsize": 2})
        for index, share in enumerate(shares.values()):
            axes.text(share.most + 0.015, index, f"{share.median:.0%}", va="center", backgroundcolor="white")
        axes.axvline(1, color="#444444", linewidth=1, linestyle="--")
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlim(0, max(1.1, *(share.most + 0.12 for share in shares.values())))
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel(f"end-to-end tokens/s, relative to forward passes alone (dashed)\n{note}")
        legend = [Patch(color=_COLORS[kind], label=kind) for kind in dict.fromkeys(kinds)]
        figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)


def main() -> None:
    """Run all rounds; the report is there from the first one on."""
    sizes = {"rows": 200, "rounds": 2, "ranks": torch.cuda.device_count() or 2, "top_k": 64, "batch_tokens": 1024}
    options = parse(__doc__, teacher=Path, dataset=Path, **sizes, no_ablation=False, only=[str])
    options.teacher = options.teacher.resolve()
    forms = {RATIO: ".2f"} | {column: form for column, (_, _, form) in COLUMNS.items()}
    rounds: list[dict[str, Run]] = []
    with scratch(options) as folder:
        split = folder / "split.jsonl"
        with options.dataset.open(encoding="utf-8") as lines:
            split.write_text("".join(islice(lines, options.rows)), encoding="utf-8")
        found = contenders(options, split)
        if options.only:
            found = {name: found[name] for name in found if name in (OURS, CEILING, *options.only)}
        for turn in range(options.rounds):
            rounds.append(play_round(found, turn, folder, options))
            table = list(summarise(rounds, {name: one.code for name, one in found.items()}))
            data = {"settings": vars(options), "rounds": rounds}
            write_report(options.output, "comparison", table, forms, data)
            num_tokens = f"{rounds[0][CEILING]['read_tokens']:,.0f} tokens"
            note = f"{options.rows:,} rows, {num_tokens}, {options.ranks} ranks, whole commands, rounds: {len(rounds)}"
            draw(rounds, options.output / "comparison.png", note)
    print(f"All checked against ours, row by row. The report is in {options.output}.")


if __name__ == "__main__":
    main()
