"""Runs of several ranks that are forked from one process, which imports everything only once.

    python tests/forked.py RUNS.json

RUNS.json holds a list of {"num_ranks": N, "options": {...}}. Writes, as JSON, the exit statuses of every run's ranks
and what they wrote to standard error.
"""

import json
import os
import socket
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from logitgen import generate


def run(num_ranks: int, options: dict[str, Any]) -> dict[str, Any]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = [f"--{name}={value}" for name, value in options.items()]
    with tempfile.TemporaryFile("w+") as said:
        pids = [_fork(rank, num_ranks, port, arguments, said.fileno()) for rank in range(num_ranks)]
        statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        said.seek(0)
        return {"statuses": statuses, "stderr": said.read()}


def _fork(rank: int, num_ranks: int, port: int, arguments: list[str], stderr: int) -> int:
    if pid := os.fork():
        return pid
    os.dup2(stderr, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    sys.argv[1:] = arguments
    status = 70
    try:
        generate.main()
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    runs = json.loads(Path(sys.argv[1]).read_text())
    sys.stdout.write(json.dumps([run(**each) for each in runs]))
