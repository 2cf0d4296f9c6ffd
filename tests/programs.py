"""Python programs of several processes without the time that imports take: tests/forked.py runs them."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]

_idle: dict[object, list[subprocess.Popen[str]]] = {}
"""Processes that fork programs and have nothing to do. They end with this process, which closes their input."""


class Program:
    """A program in a session of its own, with what tests need of `subprocess.Popen`."""

    def __init__(self, command: Sequence[object], cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> None:
        self.args = [str(word) for word in command]
        self.returncode: int | None = None
        environment = dict(os.environ if env is None else env)
        # The libraries of the hub read these when they are imported.
        of_hub = tuple(sorted(item for item in environment.items() if item[0].startswith("HF_")))
        self._idle = _idle.setdefault(of_hub, [])
        self._forks = self._idle.pop() if self._idle else _new_process(environment)
        asked = {"command": self.args, "environment": environment, "folder": str(cwd)}
        assert self._forks.stdin
        self._forks.stdin.write(json.dumps(asked) + "\n")
        self._forks.stdin.flush()
        self.pid = int(self._answer()["pid"])

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the program's end, and return what it wrote."""
        if self.returncode is None:
            if not select.select([self._forks.stdout], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout)
            ended = self._answer()
            self.returncode, self._written = ended["returncode"], (ended["stdout"], ended["stderr"])
            self._idle.append(self._forks)
        return self._written

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self._forks.stdout], [], [], 0)[0]:
            self.communicate()
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def _answer(self) -> dict[str, Any]:
        assert self._forks.stdout
        line = self._forks.stdout.readline()
        assert line, f"tests/forked.py has ended with status {self._forks.wait()}"
        answer: dict[str, Any] = json.loads(line)
        return answer


def run(
    command: Sequence[object], cwd: Path = ROOT, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    program = Program(command, cwd, env)
    try:
        out, err = program.communicate()
    except subprocess.TimeoutExpired:
        os.killpg(program.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(program.args, int(program.returncode or 0), out, err)


def _new_process(environment: dict[str, str]) -> subprocess.Popen[str]:
    """Start a process that forks programs, with space in its environment for theirs."""
    command = [sys.executable, str(ROOT / "tests" / "forked.py")]
    with_space = environment | {"SPACE": " " * 10_000}
    return subprocess.Popen(command, env=with_space, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
