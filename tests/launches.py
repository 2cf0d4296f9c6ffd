"""Programs that are run, on several ranks or alone, and their words."""

import io
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import programs
import psutil
from conftest import ROOT, launch_command
from rich.console import Console, RenderableType

Ended = subprocess.CompletedProcess[str]


def error_lines(ended: Ended) -> list[str]:
    """What the program itself says went wrong; the launcher adds a report of its own."""
    return [line for line in ended.stderr.splitlines() if line.startswith("error: ")]


def exit_statuses(ended: Ended) -> list[int]:
    """Exit status of every rank, as the launcher reports it."""
    return [int(status) for status in re.findall(r"exitcode  : (-?\d+)", ended.stderr)]


def ranks_that_ran(log_dir: Path) -> list[str]:
    """The ranks whose logs say that they captured something."""
    return sorted(
        log.stem
        for log in log_dir.glob("*.log")
        if re.search(r"Capturing .* CPU threads per rank: \d+", log.read_text())
    )


def launch_changed(folder: Path, change: str, num_ranks: int = 2, **options: Any) -> Ended:
    """Launch the main program on several ranks after some Python that changes it."""
    script = folder / "changed.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{change}\nfrom logitgen import generate\ngenerate.main()\n"
    )
    places = {"output": folder / "out.h5", "log_dir": folder / "logs"}
    command = launch_command(num_ranks, **(places | options))
    command[command.index("generate.py")] = str(script)
    return programs.run(command)


SLOW = (
    "import os, time\nfrom logitgen import generate\ncompute = generate.capture_batch\nnumber = 0\n"
    "def changed(*arguments):\n"
    "    global number\n"
    "    number += 1\n"
    "    {}\n"
    "    return compute(*arguments)\n"
    "generate.capture_batch = changed"
)
"""Python that does something before every forward pass."""


def drawn(result: RenderableType) -> list[str]:
    screen = io.StringIO()
    Console(file=screen, width=1000).print(result)
    return [line.rstrip() for line in screen.getvalue().splitlines()]


def imported_by(code: str, *arguments: object) -> set[str]:
    """Run code in a fresh interpreter; return the top-level modules it has imported."""
    report = "\nimport sys; print(*{name.partition('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", code + report, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def ranks_of(run: subprocess.Popen[str] | programs.Program) -> dict[int, psutil.Process]:
    """The processes of a launch's ranks by number; one that has just been forked does not know its own yet."""
    found = {}
    for process in psutil.Process(run.pid).children(recursive=True):
        with suppress(psutil.Error):
            if rank := process.environ().get("RANK"):
                found[int(rank)] = process
    return found
