"""What only shows something cannot end a run or decide its status: a real process, its terminal or its pipe gone."""

import errno
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT

from logitgen import LogitsFile
from logitgen.console import _Stream

Capture = Callable[..., Path]

GATED = (
    "import os, sys, time\nfrom logitgen import generate\n"
    "compute, number = generate.capture_batch, 0\n"
    "def gated(*arguments):\n"
    "    global number\n"
    "    number += 1\n"
    "    for _ in range(5000 * (number == 10)):\n"
    "        if os.path.exists({gate!r}): break\n"
    "        time.sleep(0.02)\n"
    "    return compute(*arguments)\n"
    "generate.capture_batch = gated\n"
    "generate.main()\n"
)
"""The main program, which waits for a file after nine batches, but not for ever: a test that fails shall end."""


def command(tmp_path: Path, teacher: Path, ragged: Path, name: str = "out.h5", is_open: bool = True) -> list[str]:
    if is_open:
        (tmp_path / "gate").touch()
    options = {"teacher": teacher, "dataset": ragged, "output": tmp_path / name, "log_dir": tmp_path / "logs"}
    words = [f"--{option}={value}" for option, value in options.items()]
    return [sys.executable, "-c", GATED.format(gate=str(tmp_path / "gate")), *words, "--batch_tokens=100", "--top_k=4"]


def log_of(tmp_path: Path) -> str:
    path = tmp_path / "logs" / "rank_0.log"
    return path.read_text() if path.exists() else ""


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("hangs_up", [False, True], ids=["the run is shielded from SIGHUP", "the run gets SIGHUP"])
def test_a_closed_terminal_costs_nothing_but_the_display(
    tmp_path: Path, teacher: Path, ragged: Path, capture: Capture, hangs_up: bool
) -> None:
    leader, follower = pty.openpty()
    with subprocess.Popen(
        command(tmp_path, teacher, ragged, is_open=False),
        cwd=ROOT,
        stdin=follower,
        stdout=follower,
        stderr=follower,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm"},
    ) as run:
        os.close(follower)
        shown = b""
        while b"capture" not in shown:
            shown += os.read(leader, 4096)
        os.close(leader)
        if hangs_up:
            run.send_signal(signal.SIGHUP)
        else:
            (tmp_path / "gate").touch()
        status = run.wait(120)
    options = {"teacher": teacher, "dataset": ragged, "batch_tokens": 100, "top_k": 4}
    if hangs_up:
        assert status == 75
        assert "rows are safe in" in log_of(tmp_path)
        assert LogitsFile(tmp_path / "out.h5.partial", partial=True).arrays["done"].any()
        capture(output=tmp_path / "out.h5", **options)
    assert status == (75 if hangs_up else 0)
    expected = capture(output=tmp_path / "expected.h5", **options)
    assert (tmp_path / "out.h5").read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_broken_pipe_does_not_change_the_status(tmp_path: Path, teacher: Path, ragged: Path, stream: str) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, stream: writing}
    done = subprocess.run(command(tmp_path, teacher, ragged), cwd=ROOT, timeout=120, check=False, **streams)
    os.close(writing)
    assert done.returncode == 0
    assert len(LogitsFile(tmp_path / "out.h5")) == 53


def test_a_path_that_the_console_cannot_spell_is_shown_escaped(tmp_path: Path, teacher: Path, ragged: Path) -> None:
    done = subprocess.run(
        command(tmp_path, teacher, ragged, "\N{SNOWMAN}.h5"),
        cwd=ROOT,
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert rb"\u2603.h5" in done.stdout
    assert len(LogitsFile(tmp_path / "\N{SNOWMAN}.h5")) == 53


def test_a_run_that_nohup_shields_goes_on_after_sighup(tmp_path: Path, teacher: Path, ragged: Path) -> None:
    with subprocess.Popen(
        ["nohup", *command(tmp_path, teacher, ragged, is_open=False)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as run:
        wait_for(lambda: "First rows" in log_of(tmp_path))
        run.send_signal(signal.SIGHUP)
        (tmp_path / "gate").touch()
        assert run.wait(120) == 0


def test_a_stream_that_failed_once_is_not_written_to_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        encoding = "utf-8"

        def write(self, text: str) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        flush = write

        def fileno(self) -> int:
            raise ValueError("none")

    monkeypatch.setattr(sys, "stdout", Gone())
    assert _Stream("stdout").write("abc") == 3
    assert _Stream("stdout").encoding == "utf-8"


def test_a_summary_that_cannot_be_drawn_leaves_the_run_a_success(
    tmp_path: Path, capture: Capture, teacher: Path, ragged: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from logitgen import generate

    def out_of_memory(path: Path) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(generate, "LogitsFile", out_of_memory)
    output = capture(teacher=teacher, dataset=ragged)
    assert len(LogitsFile(output)) > 0
    assert f"{output} is complete, but its summary cannot be shown: [Errno 12]" in log_of(tmp_path)
