"""What the benchmarks share: measure a command, sum up rounds, write a report."""

import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]

POLL_SECONDS = 0.15
_TAIL_LINES = 80
_PLAIN_WIDTH = 200
_LAUNCHERS = re.compile(r"(/accelerate|/torchrun|-m (accelerate\.commands\.\w+|torch\.distributed\.run)) ")


class Process(NamedTuple):
    """A process of a command's tree: its command line, and the most memory it was seen to hold.

    `peak_private_bytes` is without what it shares with others, such as mapped files.
    """

    command: str
    peak_bytes: int
    peak_private_bytes: int

    @property
    def is_rank(self) -> bool:
        """Whether it is Python at work: neither a shell nor a launcher that waits for its children."""
        return "python" in self.command.partition(" ")[0] and not _LAUNCHERS.search(self.command)


@dataclass(frozen=True)
class Measured:
    """What a command did.

    Attributes:
        wall_seconds: From its start to its end.
        processes: Every process of its tree by id, itself included.
        lines: What it printed to either stream, line by line, each with the second at which it arrived.
        exit_status: 0.
        started: When it was started, as `time.time()` counts.
    """

    wall_seconds: float
    processes: dict[int, Process]
    lines: list[tuple[float, str]]
    exit_status: int
    started: float

    @property
    def peak_rank_bytes(self) -> int:
        """Resident memory of the largest rank at its peak."""
        return max((found.peak_bytes for found in self.processes.values() if found.is_rank), default=0)

    def seconds_of(self, text: str) -> float | None:
        """When the first line that holds a text arrived, in seconds after the start; None if none did."""
        return next((seconds for seconds, line in self.lines if text in line), None)


class Spread(NamedTuple):
    """A number measured in several rounds."""

    median: float
    least: float
    most: float


@dataclass
class _Peaks:
    processes: dict[int, Process] = field(default_factory=dict)

    def look(self, root: psutil.Process) -> None:
        for process in tree(root):
            try:
                known = self.processes.get(process.pid, Process("", 0, 0))
                memory = process.memory_info()
                peaks = memory.rss, memory.rss - getattr(memory, "shared", 0)
                if peaks[0] > known.peak_bytes or peaks[1] > known.peak_private_bytes:
                    # Read again each time: a forked child is its parent until it runs a program of its own.
                    highest = map(max, peaks, (known.peak_bytes, known.peak_private_bytes))
                    self.processes[process.pid] = Process(" ".join(process.cmdline()), *highest)
            except psutil.Error:  # it has just ended
                continue


def tree(root: psutil.Process) -> list[psutil.Process]:
    """A process and all that descend from it."""
    try:
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def measure(command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> Measured:
    """Run a command to its end.

    Args:
        command: Its words.
        env: Variables on top of this process's own.
        cwd: Where it runs.

    Raises:
        RuntimeError: It failed; the message holds the end of what it printed.
    """
    lines: list[tuple[float, str]] = []
    peaks = _Peaks()
    started, start = time.time(), time.monotonic()
    process = subprocess.Popen(
        list(command),
        env={**os.environ, **(env or {})},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )

    def listen() -> None:
        for line in process.stdout or ():
            lines.append((time.monotonic() - start, line.rstrip("\n")))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    root = psutil.Process(process.pid)
    try:
        while process.poll() is None:
            peaks.look(root)
            try:
                process.wait(POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
    finally:
        wall_seconds = time.monotonic() - start
        for left in tree(root) if process.poll() is None else ():
            left.kill()
    listener.join(timeout=10)
    if process.returncode:
        tail = "\n".join(line for _, line in lines[-_TAIL_LINES:])
        raise RuntimeError(f"{' '.join(command)}\nended with status {process.returncode}:\n{tail}")
    return Measured(wall_seconds, peaks.processes, lines, process.returncode, started)


def launch(num_ranks: int, profile: str = "cpu") -> list[str]:
    """Words of the command that starts so many ranks with a profile; the script's come after them."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", str(num_ranks)]
    return [*command, "--main_process_port", "0", "--config_file", f"accelerate_configs/{profile}.yaml"]


def median_and_spread(values: Sequence[float]) -> Spread:
    """Sum up the rounds of a number."""
    return Spread(median(values), min(values), max(values))


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    models: list[str] = []
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    with suppress(OSError):  # only Linux tells
        cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
        models = [line.partition(":")[2].strip() for line in cpuinfo if "model name" in line][:1]
    packages = {name: version(name) for name in ("torch", "transformers", "accelerate", "h5py")}
    cpu = models[0] if models else platform.processor()
    return {"cpu": cpu, "cores": os.cpu_count(), "gpus": gpus, "python": sys.version.split()[0], "packages": packages}


def markdown(table: Sequence[Mapping[str, str]]) -> str:
    """Write rows of cells, keyed by column, as a Markdown table; all but the first column are numbers."""
    columns = list(table[0])
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *([row[name] for name in columns] for row in table)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write_report(folder: Path, name: str, data: Any, table: Sequence[Mapping[str, str]]) -> None:
    """Leave `NAME.json` and `NAME.md` in a folder, and show the table on the terminal.

    Args:
        folder: Where to; made if it is not there.
        name: What the files are called.
        data: All that was measured, as JSON holds it.
        table: Rows of cells, keyed by column; the first column names the row.
    """
    folder.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "data": data}
    (folder / f"{name}.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / f"{name}.md").write_text(markdown(table), encoding="utf-8")
    show(table)


def show(table: Sequence[Mapping[str, str]]) -> None:
    """Show a table on the terminal."""
    shown = Table(box=box.SIMPLE)
    for index, column in enumerate(table[0]):
        shown.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in table:
        shown.add_row(*row.values())
    Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH).print(shown)


def plot_style() -> None:
    """Give every plot the same plain look: call it before the figure is made."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update(
        {
            "figure.dpi": 150,
            "figure.constrained_layout.use": True,
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e6e6e6",
            "axes.titlelocation": "left",
        }
    )
