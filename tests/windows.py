"""Run a program as if on Windows, as far as Linux can pretend.

    python tests/windows.py generate.py --teacher ...

What only POSIX has is gone, new processes are spawned, and a file that this process has open or mapped, or a folder
with such a file, can be neither renamed, replaced nor removed. Libraries are imported before: on a real Windows they
bring code of their own.
"""

import errno
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import accelerate
import datasets
import h5py
import torch.distributed.elastic
from transformers import LlamaForCausalLM

LIBRARIES = (accelerate, datasets, h5py, torch.distributed.elastic, LlamaForCausalLM)
MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
OF_OS = ("O_DIRECTORY", "O_NOFOLLOW", "fdatasync", "fork", "forkpty", "getpgid", "getuid", "killpg", "posix_fallocate")
OF_OS += ("pread", "pwrite", "sched_getaffinity", "setsid", "sync", "sysconf", "wait4")
OF_SIGNAL = ("SIGALRM", "SIGHUP", "SIGUSR1", "alarm", "pthread_kill", "setitimer", "sigwait")


def pretend() -> None:
    """Make a Windows of this process, for good."""
    for name in MODULES:
        sys.modules[name] = None
    for owner, names in ((os, OF_OS), (signal, OF_SIGNAL)):
        for name in names:
            delattr(owner, name)
    multiprocessing.set_start_method("spawn")
    sys.addaudithook(_refuse)


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Raise what Windows raises; `os.replace` reports itself as a rename."""
    if event == "open" and str(arguments[0]).startswith("/proc/") and arguments[0] != "/proc/self/maps":
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), arguments[0])
    if event in ("os.rename", "os.remove"):
        names = [Path(os.fsdecode(name)).absolute() for name in arguments[: 2 if event == "os.rename" else 1]]
        if any(name in (file, *file.parents) for file in _open_files() for name in names):
            raise PermissionError(errno.EACCES, "The file is being used by another process", *map(str, names))


def _open_files() -> set[Path]:
    found = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            found.add(descriptor.readlink())
        except FileNotFoundError:  # what the folder was listed with
            continue
    with open("/proc/self/maps", encoding="utf-8") as maps:
        return found | {Path(line.split(maxsplit=5)[5].rstrip("\n")) for line in maps if len(line.split()) > 5}


if __name__ == "__main__":
    pretend()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(Path(__file__).parents[1])
    runpy.run_path(sys.argv[0], run_name="__main__")
