"""Capture the same rows in every way people have done it, and compare.

    python -m benchmarks.comparison --teacher FOLDER --dataset ROWS.jsonl

Whole commands in turns, from their start to a file that can be trained from, in another order each round. What they
leave is compared with ours row by row; a difference ends the benchmark.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks.check import MismatchError, check
from benchmarks.contenders import CEILING, OURS, Contender, code_lines, contenders
from benchmarks.harness import ROOT, Measured, Spread, measure, median_and_spread, plot_style, write_report
from logitgen.file.reader import LogitsFile

_FIRST_OF_OURS = "First rows are in the file."
_TOKENS_OF_CEILING = "tokens "

_OTHERS, _REDUCED = "other ways", "logitgen with one piece replaced"
_COLORS = {OURS: "#1f5fa8", _OTHERS: "#b8b8b8", _REDUCED: "#9dbfe3"}
_ERROR_BARS = {"elinewidth": 1, "capsize": 2}
_LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1}

Run = dict[str, float]
"""What was measured of one run of one contender."""


def measure_contender(contender: Contender, folder: Path, options: argparse.Namespace) -> Measured:
    """Run a contender's command, with the same threads for all, and caches of its own."""
    env = {
        "HF_DATASETS_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // options.ranks)),
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHON": sys.executable,
    }
    filled = [word.replace("{folder}", str(folder)) for word in contender.command]
    return measure(filled, env)


def files_of(contender: Contender, folder: Path) -> list[Path]:
    """The files, or the one store, that a contender left."""
    return sorted(folder.glob(contender.files))


def disk_use(paths: Sequence[Path]) -> tuple[int, int]:
    """Bytes that files, or all files of a store, take on the disk, and how many there are."""
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return sum(file.stat().st_blocks * 512 for file in files), len(files)


def first_row_seconds(measured: Measured, folder: Path) -> float | None:
    """When the first rows were in the file: as a competitor said, or as our log says; None if neither does."""
    said = measured.seconds_of("first row")
    for log in folder.glob("logs/**/rank_0.log"):
        for line in log.read_text(encoding="utf-8").splitlines():
            if _FIRST_OF_OURS in line:
                at = datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp() - measured.started
                said = min(at, said or at)
    return said


def useful_tokens(ours: LogitsFile) -> int:
    """Tokens the teacher must read: those up to the last captured position of each row."""
    return ours.layout.num_positions


def in_turn(found: Sequence[Contender], turn: int) -> list[Contender]:
    """Put the contenders into another order each round; one that goes on from another stays behind it."""
    starters = [contender for contender in found if not contender.after]
    shift = turn % len(starters)
    return [
        contender
        for starter in starters[shift:] + starters[:shift]
        for contender in found
        if starter.name in (contender.name, contender.after)
    ]


def play_round(found: Sequence[Contender], turn: int, folder: Path, options: argparse.Namespace) -> dict[str, Run]:
    """Run all contenders once, check what they left, and return what was measured by name."""
    shutil.rmtree(folder, ignore_errors=True)
    runs: dict[str, Run] = {}
    left: dict[str, list[Path]] = {}
    for contender in in_turn(found, turn):
        own = folder / (contender.after or contender.name).replace(" ", "_").replace(",", "")
        own.mkdir(parents=True, exist_ok=True)
        runs[contender.name] = run(contender, own, runs.get(contender.after, {}), options)
        left[contender.name] = [hold(path) for path in files_of(contender, own)]
        print(f"round {turn + 1}: {contender.name}, {runs[contender.name]['wall_seconds']:.1f} s", flush=True)
    ours = LogitsFile(left[OURS][0])
    for contender in found:
        _verify(contender, left[contender.name], runs[contender.name], ours)
        runs[contender.name]["tokens_per_second"] = useful_tokens(ours) / runs[contender.name]["wall_seconds"]
    return runs


def run(contender: Contender, folder: Path, before: Run, options: argparse.Namespace) -> Run:
    """Run a contender once, in a folder and with caches of its own; its numbers include the one it goes on from."""
    measured = measure_contender(contender, folder, options)
    seconds_before = before.get("wall_seconds", 0.0)
    first_seconds = first_row_seconds(measured, folder) if contender.read else None
    size_bytes, num_files = disk_use(files_of(contender, folder))
    numbers: Run = {
        "wall_seconds": seconds_before + measured.wall_seconds,
        "peak_rank_bytes": max(measured.peak_rank_bytes, before.get("peak_rank_bytes", 0)),
        "disk_bytes": size_bytes,
        "files": num_files,
    }
    if first_seconds is not None:
        numbers["first_row_seconds"] = seconds_before + first_seconds
    if contender.read is None:
        told = [line for _, line in measured.lines if line.startswith(_TOKENS_OF_CEILING)]
        numbers["read_tokens"] = sum(int(line.split()[1]) for line in told)
    return numbers


def hold(path: Path) -> Path:
    """Give a file a second name under which it stays, whatever runs later; a store keeps its own."""
    if path.is_dir():
        return path
    held = path.parent / "held" / path.name
    held.parent.mkdir(exist_ok=True)
    held.hardlink_to(path)
    return held


def _verify(contender: Contender, left: list[Path], measured: Run, ours: LogitsFile) -> None:
    """Check that a contender did the same work.

    Raises:
        MismatchError: It did not.
    """
    try:
        if contender.read is not None:
            measured["rows_verified"] = check(contender.read(left), ours)
        elif measured["read_tokens"] != useful_tokens(ours):
            raise MismatchError(f"The teacher read {measured['read_tokens']:,} tokens, not {useful_tokens(ours):,}.")
    except MismatchError as error:
        raise MismatchError(f"'{contender.name}' does not yield what ours does. {error}") from error


def summarise(found: Sequence[Contender], rounds: Sequence[dict[str, Run]]) -> dict[str, dict[str, Any]]:
    """Sum up the rounds of every contender; speeds relative to ours and the ceiling are taken within each round."""
    summary: dict[str, dict[str, Any]] = {}
    for contender in found:
        runs = [measured[contender.name] for measured in rounds]
        known = {name: [run[name] for run in runs] for name in runs[0] if all(name in run for run in runs)}
        for base, name in ((OURS, "relative_to_ours"), (CEILING, "relative_to_ceiling")):
            pairs = zip(known["tokens_per_second"], rounds, strict=True)
            known[name] = [speed / measured[base]["tokens_per_second"] for speed, measured in pairs]
        spreads = {name: median_and_spread(values)._asdict() for name, values in known.items()}
        summary[contender.name] = spreads | {"lines_of_code": code_lines(contender.code)}
    return summary


def to_table(summary: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """Write the summary for people."""

    def number(values: dict[str, Any], name: str, form: str = "{:,.0f}", unit: float = 1) -> str:
        return form.format(values[name]["median"] / unit) if name in values else "-"

    rows = []
    for name, values in summary.items():
        relative = Spread(**values["relative_to_ours"])
        is_own_code = name != CEILING and not name.startswith((OURS, "ours"))
        rows.append(
            {
                "approach": name,
                "tokens/s": number(values, "tokens_per_second"),
                "speed, ours = 1 (least-most)": f"{relative.median:.2f} ({relative.least:.2f}-{relative.most:.2f})",
                "seconds": number(values, "wall_seconds", "{:,.1f}"),
                "first row, s": number(values, "first_row_seconds", "{:,.1f}"),
                "MB per rank": number(values, "peak_rank_bytes", unit=1e6),
                "MB on disk": number(values, "disk_bytes", "{:,.1f}", 1e6) if name != CEILING else "-",
                "files": number(values, "files") if name != CEILING else "-",
                "own lines of code": str(values["lines_of_code"]) if is_own_code else "0" if name == OURS else "-",
            }
        )
    return rows


def draw(summary: dict[str, dict[str, Any]], path: Path, note: str) -> None:
    """Draw the speed of everything but the ceiling as a share of it, with the spread over the rounds."""
    plot_style()
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    shares = {name: Spread(**values["relative_to_ceiling"]) for name, values in summary.items() if name != CEILING}
    kinds = [OURS if name == OURS else _REDUCED if name.startswith("ours") else _OTHERS for name in shares]
    medians = [share.median for share in shares.values()]
    spread = [[share.median - share.least for share in shares.values()], [s.most - s.median for s in shares.values()]]
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.36 * len(shares)))
    axes.barh(list(shares), medians, color=[_COLORS[kind] for kind in kinds], xerr=spread, error_kw=_ERROR_BARS)
    for index, share in enumerate(shares.values()):
        axes.text(share.most + 0.015, index, f"{share.median:.0%}", va="center", bbox=_LABEL_BOX)
    axes.axvline(1, color="#444444", linewidth=1, linestyle="--")
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, max(1.1, *(share.most + 0.12 for share in shares.values())))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    axes.set_xlabel(f"end-to-end tokens/s, relative to forward passes alone (dashed)\n{note}")
    legend = [Patch(color=_COLORS[kind], label=kind) for kind in dict.fromkeys(kinds)]
    figure.legend(handles=legend, loc="outside lower center", ncols=len(legend), frameon=False)
    axes.set_title("Capturing the same rows with the same teacher")
    figure.savefig(path)
    plt.close(figure)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="Folder of a causal language model and its tokenizer.")
    parser.add_argument("--dataset", required=True, help="A .jsonl file with a column `text`.")
    parser.add_argument("--rows", type=int, default=200, help="How many of its rows, the first ones.")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--ranks", type=int, default=torch.cuda.device_count() or 2)
    parser.add_argument("--top_k", type=int, default=64)
    parser.add_argument("--batch_tokens", type=int, default=1024, help="Of ours, and of the forward passes alone.")
    parser.add_argument("--output", type=Path, default=ROOT / ".bench", help="Folder of the report and of all files.")
    parser.add_argument("--no_ablation", action="store_true", help="Leave out ours with one piece taken away.")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="NAME",
        help="Only these, by their names in the table; ours and the forward passes are always there.",
    )
    options = parser.parse_args(arguments)
    options.teacher, options.output = Path(options.teacher).resolve(), options.output.resolve()
    return options


def report(found: Sequence[Contender], rounds: Sequence[dict[str, Run]], options: argparse.Namespace) -> None:
    """Leave what the rounds so far have shown."""
    summary = summarise(found, rounds)
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    data = {"settings": settings, "summary": summary, "rounds": list(rounds)}
    write_report(options.output, "comparison", data, to_table(summary))
    num_tokens = int(rounds[0][CEILING]["read_tokens"])
    note = f"{options.rows:,} rows, {num_tokens:,} tokens, {options.ranks} ranks, whole commands, rounds: {len(rounds)}"
    draw(summary, options.output / "comparison.png", note)


def main() -> None:
    """Run all rounds; the report is there from the first one on."""
    options = parse_options()
    options.output.mkdir(parents=True, exist_ok=True)
    split = options.output / "comparison.jsonl"
    with open(options.dataset, encoding="utf-8") as lines:
        split.write_text("".join(islice(lines, options.rows)), encoding="utf-8")
    wanted = (OURS, CEILING, *(options.only or ()))
    found = [one for one in contenders(options, split) if options.only is None or one.name in wanted]
    folder = options.output / "comparison_files"
    rounds: list[dict[str, Run]] = []
    for turn in range(options.rounds):
        rounds.append(play_round(found, turn, folder, options))
        report(found, rounds, options)
    shutil.rmtree(folder)
    print(f"All checked against ours, row by row. The report is in {options.output}.")


if __name__ == "__main__":
    main()
