"""What the benchmarks share: options, turns, the measure of a command, reports, plots."""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import psutil
from rich import box
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
BLUE = "#1f5fa8"

_HELP = {
    "teacher": "folder of a causal language model and its tokenizer",
    "dataset": "a .jsonl file with a column `text`",
    "output": "folder of the report, and the disk that is measured",
    "rows": "number of rows",
    "rounds": "how often each way takes its turn",
}
_POLL_SECONDS = 0.15
_TAIL_LINES = 80
_PLAIN_WIDTH = 200
_LAUNCHERS = re.compile(r"(/accelerate|/torchrun|-m (accelerate\.commands\.\w+|torch\.distributed\.run)) ")

T = TypeVar("T")
Row = dict[str, Any]
"""A row of a table: texts and numbers, keyed by column."""


def parse(description: str | None, **options: Any) -> argparse.Namespace:
    """Read the command line: an option for every default, and `--output`.

    A type instead of a default makes the option required. A list takes several values, and a type in it stands for
    none. False is a switch.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (options | {"output": ROOT / ".bench"}).items():
        value: Any = {"default": default, "type": type(default)}
        told = f"{_HELP.get(name, '')} (default: %(default)s)"
        if isinstance(default, type):
            value, told = {"required": True, "type": default}, _HELP.get(name, "")
        elif isinstance(default, list):
            kinds = [each for each in default if isinstance(each, type)]
            value = {"default": [] if kinds else default, "type": (kinds or [type(default[0])])[0], "nargs": "*"}
        elif default is False:
            value = {"action": "store_true"}
        parser.add_argument(f"--{name}", help=told, **value)
    found = parser.parse_args()
    found.output = found.output.resolve()
    found.output.mkdir(parents=True, exist_ok=True)
    return found


@contextmanager
def scratch(options: argparse.Namespace) -> Iterator[Path]:
    """Make an empty folder beside the report, and remove it at the end."""
    with TemporaryDirectory(prefix="files_", dir=options.output) as folder:
        yield Path(folder)


class Spread(NamedTuple):
    """A number measured in several rounds; as text, the median with the least and the most in brackets."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float], base: Sequence[float] | None = None) -> "Spread":
        """Sum up the rounds of a number, or of its ratio to another one within each round."""
        if base is not None:
            values = [value / other for value, other in zip(values, base, strict=True)]
        return cls(median(values), min(values), max(values))

    def __format__(self, pattern: str) -> str:
        return f"{self.median:{pattern}} ({self.least:{pattern}}-{self.most:{pattern}})"


def in_turns(ways: Mapping[str, Callable[[], T]], num_rounds: int) -> dict[str, list[T]]:
    """Run all ways one after the other, round after round; return the result of each round by way."""
    found: dict[str, list[T]] = {name: [] for name in ways}
    for _ in range(num_rounds):
        for name, way in ways.items():
            found[name].append(way())
    return found


class Process(NamedTuple):
    """A process of a command's tree; private memory leaves out what it shares, such as mapped files."""

    command: str
    peak_bytes: int
    peak_private_bytes: int

    @property
    def is_rank(self) -> bool:
        """Whether it is Python at work: neither a shell nor a launcher that waits for its children."""
        return "python" in self.command.partition(" ")[0] and not _LAUNCHERS.search(self.command)


@dataclass
class Measured:
    """A command from its start to its end: its lines with the second of their arrival, its processes by id."""

    started: float  # as `time.time()` counts
    wall_seconds: float = 0.0
    lines: list[tuple[float, str]] = field(default_factory=list)
    processes: dict[int, Process] = field(default_factory=dict)

    @property
    def ranks(self) -> list[Process]:
        """The processes that worked."""
        return [process for process in self.processes.values() if process.is_rank]

    @property
    def peak_rank_bytes(self) -> int:
        """Resident memory of the largest rank at its peak."""
        return max((rank.peak_bytes for rank in self.ranks), default=0)

    def seconds_of(self, text: str) -> float | None:
        """When the first line that holds a text arrived, in seconds after the start; None if none did."""
        return next((seconds for seconds, line in self.lines if text in line), None)

    def log_lines(self, log: Path) -> list[tuple[float, str]]:
        """Messages of a rank's log, each with its time in seconds after the start."""
        found = []
        for line in log.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a line that continues another has no time
                at = datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()
                found.append((at - self.started, line.partition(": ")[2]))
        return found

    def look(self, root: psutil.Process) -> None:
        """Note the memory of a process and of all that descend from it."""
        with suppress(psutil.Error):
            for process in [root, *root.children(recursive=True)]:
                with suppress(psutil.Error):  # it has just ended
                    known = self.processes.get(process.pid, Process("", 0, 0))
                    memory = process.memory_info()
                    peaks = memory.rss, memory.rss - getattr(memory, "shared", 0)
                    if peaks[0] > known.peak_bytes or peaks[1] > known.peak_private_bytes:
                        # The name again each time: a forked child is its parent until it runs a program of its own.
                        highest = map(max, peaks, known[1:])
                        self.processes[process.pid] = Process(" ".join(process.cmdline()), *highest)


def measure(command: Sequence[str], **env: str) -> Measured:
    """Run a command to its end, with variables on top of this process's own.

    Raises:
        RuntimeError: It failed; the message holds the end of what it printed.
    """
    start = time.monotonic()
    found = Measured(time.time())
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    process = psutil.Popen(list(command), env=os.environ | env, cwd=ROOT, **pipes)

    def listen() -> None:
        for line in process.stdout:
            found.lines.append((time.monotonic() - start, line.rstrip("\n")))

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        while process.poll() is None:
            found.look(process)
            with suppress(psutil.TimeoutExpired, subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)
    finally:
        found.wall_seconds = time.monotonic() - start
        for left in [process, *process.children(recursive=True)] if process.poll() is None else ():
            left.kill()
    listener.join(timeout=10)
    if process.returncode:
        tail = "\n".join(line for _, line in found.lines[-_TAIL_LINES:])
        raise RuntimeError(f"{' '.join(command)}\nended with status {process.returncode}:\n{tail}")
    return found


def launch(num_ranks: int, profile: str = "cpu") -> list[str]:
    """Words of the command that starts so many ranks with a profile; the script's come after them."""
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--num_processes", str(num_ranks)]
    return [*command, "--main_process_port", "0", "--config_file", f"accelerate_configs/{profile}.yaml"]


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    cpu = platform.processor()
    with suppress(OSError, StopIteration):  # only Linux tells
        cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.partition(":")[2].strip() for line in cpuinfo if "model name" in line)
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    packages = {name: version(name) for name in ("torch", "transformers", "accelerate", "h5py")}
    return {"cpu": cpu, "cores": os.cpu_count(), "gpus": gpus, "python": sys.version.split()[0], "packages": packages}


def text_of(value: Any, form: str) -> str:
    """Write a cell: a number in a form, a text as it is, None or not-a-number as a dash."""
    if value is None or value != value:
        return "-"
    return value if isinstance(value, str) else f"{value:{form}}"


def table_of(table: Sequence[Row], forms: Mapping[str, str]) -> str:
    """Show a table on the terminal, and return it in Markdown; a number has the form of its column, or is whole."""
    columns = list(table[0])
    lines = [[text_of(row[column], forms.get(column, ",.0f")) for column in columns] for row in table]
    shown = Table(box=box.SIMPLE)
    for index, column in enumerate(columns):
        shown.add_column(column, justify="right" if index else "left", no_wrap=True)
    for line in lines:
        shown.add_row(*line)
    Console(width=None if sys.stdout.isatty() else _PLAIN_WIDTH).print(shown)
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(folder: Path, name: str, markdown: str, data: Any) -> None:
    """Leave `NAME.md` and `NAME.json` in a folder."""
    (folder / f"{name}.md").write_text(markdown, encoding="utf-8")
    found = {"machine": machine(), "data": data}
    (folder / f"{name}.json").write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")


def write_report(
    folder: Path, name: str, table: Sequence[Row], forms: Mapping[str, str] | None = None, data: Any = None
) -> None:
    """Show a table, and leave it and the data in a folder; the table is the data if there is nothing else."""
    write(folder, name, table_of(table, forms or {}), table if data is None else data)


@contextmanager
def drawing(path: Path, rows: int, columns: int, **options: Any) -> Iterator[tuple[Any, Any]]:
    """Draw into a file, in the plain look of all plots: yield the figure and an array of its panels."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    look: Any = {"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left"}
    look |= {"axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e6e6"}
    with mpl.rc_context(look | {"figure.dpi": 150, "figure.constrained_layout.use": True, "font.size": 10}):
        figure, panels = plt.subplots(rows, columns, squeeze=False, **options)
        yield figure, panels
        figure.savefig(path)
        plt.close(figure)
