"""Python programs that are forked from one process, which has imported every library but nothing of logitgen.

    python tests/forked.py

Reads a line of JSON per program: {"command": [...], "environment": {...}, "folder": ...}. Answers with a line that
holds the number of its process, and at its end with one that holds its exit status and what it wrote to both streams.

What Accelerate's launcher starts, the ranks, is forked from that launcher's own process. All else is as it is with new
processes: arguments, environments, sessions, signals, exit statuses and the folder in /proc.
"""

import atexit
import ctypes
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import accelerate.commands.accelerate_cli
import accelerate.commands.launch
import datasets
import h5py
import psutil
import rich.progress
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.tensor.parallel
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

LIBRARIES = (AutoTokenizer, PreTrainedTokenizerFast, datasets, h5py, psutil, rich.progress, torch)


class Forked:
    """A program in a fork of this process, with what the launchers need of `subprocess.Popen`."""

    def __init__(
        self,
        args: Sequence[str],
        env: Mapping[str, str],
        stdout: IO[str] | None = None,
        stderr: IO[str] | None = None,
        cwd: str = ".",
        start_new_session: bool = False,
    ) -> None:
        self.args = args
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            status = 70
            try:
                if start_new_session:
                    os.setsid()
                _take_streams(stdout, stderr)
                _take_environment(env)
                os.chdir(cwd)
                status = _become(args[1:])
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float = float("inf")) -> int:
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(0.01)
        return status


def _take_streams(stdout: IO[str] | None, stderr: IO[str] | None) -> None:
    """Keep none of the parent's files but these, as a new process does."""
    nothing = os.open(os.devnull, os.O_RDONLY)
    for place, descriptor in enumerate([nothing, stdout.fileno() if stdout else 1, stderr.fileno() if stderr else 2]):
        os.dup2(descriptor, place)
    os.closerange(3, 4096)


def _take_environment(environment: Mapping[str, str]) -> None:
    """Set it also where other processes look: in the memory that this process got its own environment in."""
    os.environ.clear()  # so that the C library, too, reads nothing there any more
    os.environ |= environment
    start, end = map(int, Path("/proc/self/stat").read_text().rpartition(")")[2].split()[47:49])  # see proc(5)
    content = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in environment.items())
    assert len(content) <= end - start
    ctypes.memmove(start, content.ljust(end - start, b"\0"), end - start)


def _become(words: Sequence[str]) -> int:
    """Do what `python WORDS` does, and return its exit status."""
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = _status_of(words[words[0] == "-u" :])
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def _status_of(words: Sequence[str]) -> int:
    try:
        _run(words)
    except SystemExit as end:
        if isinstance(end.code, int | None):
            return end.code or 0
        sys.stderr.write(f"{end.code}\n")
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _run(words: Sequence[str]) -> None:
    sys.path[1:1] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if words[0] == "-m":
        sys.argv, sys.path[0] = list(words[1:]), str(Path.cwd())
        sys.modules.pop(words[1], None)
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = list(words), str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


def run(command: list[str], environment: dict[str, str], folder: str) -> Iterator[dict[str, Any]]:
    """Run a program to its end."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        program = Forked(command, environment, out, err, folder, start_new_session=True)
        yield {"pid": program.pid}
        status = program.wait()
        out.seek(0)
        err.seek(0)
        yield {"returncode": status, "stdout": out.read(), "stderr": err.read()}


def load_once() -> None:
    """Have transformers import and compile what it needs when it first loads a model."""
    disable_progress_bar()  # which would leave a thread behind
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(folder)
    enable_progress_bar()


def main() -> None:
    load_once()
    subprocess_handler.Popen = accelerate.commands.launch.subprocess.Popen = Forked
    for line in sys.stdin:
        for answer in run(**json.loads(line)):
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
