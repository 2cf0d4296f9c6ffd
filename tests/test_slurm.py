"""The SLURM example, run with a stand-in for SLURM's own commands."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, SENTENCES, write_jsonl
from launches import ranks_that_ran

from logitgen import LogitsFile

Job = Callable[..., subprocess.Popen[str]]

SCONTROL = """#!/bin/sh
case "$1" in
    show) [ "$3" = "node[0-1]" ] && echo 127.0.0.1 && echo 127.0.0.2 ;;
    *) echo "$@" >> "$(dirname "$0")/asked" ;;
esac
"""
SRUN = """#!/bin/bash
shift
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node "$@" &
done
trap 'kill -TERM $(jobs -p)' TERM
status=0
for task in $(jobs -p); do
    while wait $task; code=$?; kill -0 $task 2>/dev/null; do :; done
    [ $code -eq 0 ] || status=$code
done
exit $status
"""
"""The command once per node, as a process of this machine; a signal goes to all of them, as from SLURM itself."""


@pytest.fixture
def job(tmp_path: Path, teacher: Path) -> Job:
    """Start the job script with two ranks, both on one node or one on each of two; scontrol notes what it is asked."""
    for name, script in {"scontrol": SCONTROL, "srun": SRUN}.items():
        (tmp_path / name).write_text(script)
        (tmp_path / name).chmod(0o755)
    rows = [{"text": f"{index} {SENTENCES[index % 40][: 300 + index % 97]}"} for index in range(1500)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)

    def start(num_nodes: int = 1, **environment: str) -> subprocess.Popen[str]:
        words = [f"--teacher={teacher}", f"--dataset={data}", "--batch_tokens=256", f"--log_dir={tmp_path / 'logs'}"]
        command = ["bash", "examples/slurm.sbatch", *words, f"--output={tmp_path / 'out.h5'}"]
        paths = {"PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
        slurm = {
            "SLURM_JOB_ID": "42",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_NNODES": str(num_nodes),
            "SLURM_GPUS_ON_NODE": str(2 // num_nodes),
            "CUDA_VISIBLE_DEVICES": "",
        }
        return subprocess.Popen(
            command, cwd=ROOT, env=os.environ | paths | slurm | environment, stderr=subprocess.PIPE, text=True
        )

    return start


@pytest.mark.slow
def test_a_stopped_job_is_requeued_and_finished_by_the_next(job: Job, tmp_path: Path) -> None:
    """On two nodes at first, then on one."""
    first = job(num_nodes=2)
    log = tmp_path / "logs" / "rank_0.log"
    while first.poll() is None and not (log.exists() and "First rows" in log.read_text()):
        time.sleep(0.05)
    [srun] = psutil.Process(first.pid).children()
    srun.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=120)
    assert first.returncode != 0
    assert "rows are safe" in errors
    assert (tmp_path / "asked").read_text() == "requeue 42\n"
    assert ranks_that_ran(tmp_path / "logs") == ["rank_0", "rank_1"]
    second = job(SLURM_RESTART_COUNT="1")
    second.communicate(timeout=240)
    assert second.returncode == 0
    assert "Ranks: 2," in (tmp_path / "logs" / "rank_0.log").read_text().split("Capturing")[-1]
    assert len(LogitsFile(tmp_path / "out.h5")) == 1500
    assert (tmp_path / "asked").read_text() == "requeue 42\n"


def test_a_mistake_of_the_users_is_not_put_back_into_the_queue(job: Job, tmp_path: Path) -> None:
    """Not even beside what an earlier start has left."""
    (tmp_path / "data.jsonl").unlink()
    (tmp_path / "out.h5.partial").write_text("logitgen file, of an earlier start")
    failed = job()
    failed.communicate(timeout=120)
    assert failed.returncode != 0
    assert not (tmp_path / "asked").exists()
