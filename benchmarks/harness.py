"""What the benchmarks share: options, turns, the measure of a command, tables and reports, plots."""

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

ROOT = Path(__file__).parents[1]
BLUE = "#1f5fa8"
_POLL_SECONDS = 0.1

T = TypeVar("T")
Row = dict[str, Any]
"""A row of a table: texts and numbers, keyed by column."""


def parse(description: str | None, **options: Any) -> argparse.Namespace:
    """Read the command line: an option for every default, and `--output`, the folder of the report.

    A type instead of a default makes the option required. A list takes several values, texts if it is empty. False is
    a switch.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (options | {"output": ROOT / ".bench"}).items():
        how: Any = {"default": default, "type": type(default), "help": "(default: %(default)s)"}
        if isinstance(default, type):
            how = {"type": default, "required": True}
        elif default is False:
            how = {"action": "store_true"}
        elif isinstance(default, list):
            how |= {"type": type(default[0]) if default else str, "nargs": "*"}
        parser.add_argument(f"--{name}", **how)
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


@dataclass
class Measured:
    """A command from its start to its end.

    Attributes:
        lines: What it printed and logged, each line with the second after the start.
        peaks: The most memory of each process, in bytes, by id: all that is resident, and without mapped files.
        wall_seconds: The time from start to end.
        killed: Whether it was ended before its time.
    """

    lines: list[tuple[float, str]] = field(default_factory=list)
    peaks: dict[int, tuple[int, int]] = field(default_factory=dict)
    wall_seconds: float = 0.0
    killed: bool = False

    def seconds_of(self, pattern: str) -> float | None:
        """When the first line came that a regular expression is found in; None if none did."""
        return min((seconds for seconds, line in self.lines if re.search(pattern, line)), default=None)

    def largest(self, num_processes: int) -> list[tuple[int, int]]:
        """Peaks of the largest processes, which are the ranks: a launcher that waits for them has none of the rows."""
        return sorted(self.peaks.values(), reverse=True)[:num_processes]

    def look(self, root: psutil.Process) -> None:
        """Note the memory of a process and of all that descend from it."""
        with suppress(psutil.Error):
            for process in [root, *root.children(recursive=True)]:
                with suppress(psutil.Error):  # it has just ended
                    memory = process.memory_info()
                    now = memory.rss, memory.rss - getattr(memory, "shared", 0)
                    most = self.peaks.get(process.pid, (0, 0))
                    self.peaks[process.pid] = max(most[0], now[0]), max(most[1], now[1])


def measure(
    command: Sequence[str], logs: Path | None = None, until: Callable[[], bool] | None = None, **env: str
) -> Measured:
    """Run a command to its end, or kill it once it has come so far.

    Args:
        command: The words of the command.
        logs: A folder where the leader's log is found at the end.
        until: Tells whether the command, and all that it has started, is to be killed.
        env: Variables on top of those of this process.

    Raises:
        RuntimeError: It failed; the message holds the end of what it printed.
    """
    found, start, ended = Measured(), time.time(), threading.Event()

    def watch(process: psutil.Popen) -> None:
        while not ended.wait(_POLL_SECONDS):
            found.look(process)
            if until and until():
                found.killed = True
                for each in [process, *process.children(recursive=True)]:
                    with suppress(psutil.NoSuchProcess):
                        each.kill()
                return

    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with psutil.Popen(list(command), env=os.environ | env, cwd=ROOT, **pipes) as process:
        watcher = threading.Thread(target=watch, args=[process], daemon=True)
        watcher.start()
        for line in process.stdout:
            found.lines.append((time.time() - start, line.rstrip("\n")))
    found.wall_seconds = time.time() - start
    ended.set()
    watcher.join()
    if process.returncode and not found.killed:
        tail = "\n".join(line for _, line in found.lines[-80:])
        raise RuntimeError(f"{' '.join(command)}\nended with status {process.returncode}:\n{tail}")
    for log in logs.rglob("rank_0.log") if logs else ():
        for line in log.read_text(encoding="utf-8").splitlines():
            with suppress(ValueError):  # a line that continues another has no time
                at = datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S,%f").timestamp()
                found.lines.append((at - start, line))
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


def write_report(
    folder: Path, name: str, table: Sequence[Row], forms: Mapping[str, str] | None = None, data: Any = None
) -> None:
    """Print a table in Markdown, and leave `NAME.json` in a folder, with the table or other data.

    A number has the form of its column, or is whole. A row may lack some columns.
    """
    forms = {column: (forms or {}).get(column, ",.0f") for row in table for column in row}
    lines = [[*forms], *([text_of(row.get(column), form) for column, form in forms.items()] for row in table)]
    widths = [max(4, *map(len, cells)) for cells in zip(*lines, strict=True)]
    lines.insert(1, ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])])
    for first, *rest in lines:
        print("|", " | ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]), "|", flush=True)
    found = {"machine": machine(), "data": table if data is None else data}
    (folder / f"{name}.json").write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")


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
