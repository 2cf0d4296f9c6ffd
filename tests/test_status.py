"""A run seen from elsewhere: what its files tell of it, while it goes on, once it was killed, and when it is done."""

import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
from conftest import ROOT, launch_command
from files import ARRAYS, ATTRIBUTES, write_file
from launches import imported_by
from programs import Program
from rich.console import Console

import logitgen.__main__
import logitgen.leader.writer
from logitgen import FormatError, LogitsFile, UsageError, generate
from logitgen.__main__ import main
from logitgen.facts import status_facts
from logitgen.leader import status
from logitgen.leader.progress import Snapshot
from logitgen.leader.status import Status, Watch, decode, encode
from logitgen.report import status_line, status_view
from logitgen.split.plan import Plan

Capture = Callable[..., Path]

UNFINISHED = ARRAYS | {"done": np.array([0, 1, 0], "u1")}
SNAPSHOT = Snapshot(
    seconds=65.0, recent_rate=15.0, tokens_before=100, stream_tokens=[500, 150], stream_totals=[1000, 300]
)
"""650 of 1,300 tokens in 65 s: 10 a second, so 65 s more."""


def line_of(snapshot: dict[str, Any]) -> bytes:
    """The line behind the data, as the module's description says."""
    text = json.dumps(snapshot).encode()
    return f"logitgen status {zlib.crc32(text):08x} ".encode() + text + b"\n"


def write_unfinished(path: Path, line: bytes = b"", **changes: Any) -> Path:
    partial = write_file(path.with_name(path.name + ".partial"), UNFINISHED, **changes)
    with partial.open("ab") as file:
        file.write(line)
    return partial


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.h5"


# The line behind the data.


def test_a_line_is_read_back_whatever_follows_it() -> None:
    assert decode(encode(SNAPSHOT)) == SNAPSHOT
    assert decode(line_of(asdict(SNAPSHOT)) + b"the end of a longer one\n") == SNAPSHOT


def test_a_torn_line_is_none() -> None:
    line = encode(SNAPSHOT)
    assert all(decode(line[:size]) is None for size in range(len(line)))
    other = encode(replace(SNAPSHOT, seconds=70.0, stream_tokens=[519, 168]))
    assert len(other) == len(line)
    torn = [line[:size] + other[size:] for size in range(len(line))]
    assert {decode(data) for data in torn if data not in (line, other)} == {None}
    assert decode(bytes(1000)) is None


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": 0},
        {"seconds": "long"},
        {"seconds": math.inf},
        {"recent_rate": math.nan},
        {"recent_rate": math.inf},
        {"tokens_before": -1},
        {"tokens_before": None},
        {"stream_tokens": [500]},
        {"stream_tokens": [500, 301]},
        {"stream_tokens": [500, -1]},
        {"stream_tokens": 7},
        {"stream_tokens": [], "stream_totals": [], "tokens_before": 0},
        {"stream_totals": [1000, 10**30]},
        {"of_another_version": 1},
    ],
)
def test_a_line_that_makes_no_sense_is_none(changes: dict[str, Any]) -> None:
    assert decode(line_of(asdict(SNAPSHOT) | changes)) is None


@pytest.mark.parametrize("text", [b"[]", b"7", b"{", b"[" * 9999, b"\xff"])
def test_a_line_of_other_json_is_none(text: bytes) -> None:
    assert decode(b"logitgen status %08x %b\n" % (zlib.crc32(text), text)) is None


def test_there_is_room_for_a_thousand_ranks_and_no_line_for_more_than_fit() -> None:
    of_each = [123_456_789_012] * 1000
    many = replace(SNAPSHOT, stream_tokens=of_each, stream_totals=of_each)
    assert decode(encode(many)) == many
    assert encode(replace(many, stream_tokens=of_each * 9, stream_totals=of_each * 9)) == b""


# What is found.


def test_nothing_is_a_run_that_has_not_started(path: Path) -> None:
    assert Watch(path).look() == Status(path=path, state="not started")
    with pytest.raises(UsageError, match=r"The folder .*missing does not exist\. Give the run's --output\.$"):
        Watch(path.parent / "missing" / "out.h5").look()


def test_a_folder_that_may_not_be_looked_into_is_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(found: Path) -> bool:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "exists", refuse)
    with pytest.raises(UsageError, match=r"out\.h5 cannot be read: Permission denied\.$"):
        Watch(path).look()


@pytest.mark.parametrize("content", [b"", bytes(9000)])
def test_a_file_that_is_created_is_seen(path: Path, content: bytes) -> None:
    write_file(path)  # the one that is replaced with --overwrite
    (path.parent / "out.h5.partial.new").write_bytes(content)
    found = Watch(path).look()
    assert (found.state, found.num_rows) == ("being created", None)
    assert 0 <= found.idle_seconds < 60


@pytest.mark.parametrize("argument", ["out.h5", "out.h5.partial"])
def test_a_complete_file_is_complete_by_either_name(path: Path, argument: str) -> None:
    write_file(path)
    assert Watch(path.with_name(argument)).look() == Status(path=path, state="complete", num_rows=3, num_done=3)


@pytest.mark.parametrize("argument", ["out.h5", "out.h5.partial"])
def test_an_unfinished_file_tells_its_rows_and_its_line(path: Path, argument: str) -> None:
    write_unfinished(path, encode(SNAPSHOT))
    found = Watch(path.with_name(argument)).look()
    assert (found.path, found.state, found.num_done, found.num_rows) == (path, "running", 1, 3)
    assert found.snapshot == SNAPSHOT


def test_a_row_with_a_damaged_flag_is_not_counted_as_done(path: Path) -> None:
    flags = np.array([2, 1, 0], "u1")
    write_file(path.with_name("out.h5.partial"), ARRAYS | {"done": flags})
    assert Watch(path).look().num_done == 1


@pytest.mark.parametrize("line", [b"", bytes(10), b"\0" + encode(SNAPSHOT)[1:]])
def test_without_a_line_no_run_is_under_way(path: Path, line: bytes) -> None:
    write_unfinished(path, line)
    found = Watch(path).look()
    assert (found.state, found.num_done, found.snapshot) == ("stopped", 1, None)


def test_a_full_file_without_a_line_is_about_to_be_renamed(path: Path) -> None:
    partial = write_file(path).rename(path.with_name("out.h5.partial"))
    assert Watch(path).look().state == "running"
    os.utime(partial, (time.time() - 700,) * 2)  # killed between the two
    assert Watch(path).look().state == "stalled"


@pytest.mark.parametrize(
    ("snapshot", "batch_tokens", "patience"),
    [
        (SNAPSHOT, 20, 60),  # 2 ranks of 5 tokens a second take 4 s for a batch each: a minute is more than three
        (SNAPSHOT, 1000, 600),  # 200 s for a batch each
        (SNAPSHOT, "many", 600),
        (replace(SNAPSHOT, stream_tokens=[0, 0]), 20, 600),  # the first batch is not there yet
    ],
)
def test_a_run_is_stalled_once_several_batches_are_overdue(
    path: Path, snapshot: Snapshot, batch_tokens: Any, patience: float
) -> None:
    settings = ATTRIBUTES["settings"] | {"batch_tokens": batch_tokens}
    partial = write_unfinished(path, encode(snapshot), settings=settings)
    for idle_seconds, state in ((patience - 20, "running"), (patience + 20, "stalled")):
        os.utime(partial, (time.time() - idle_seconds,) * 2)
        found = Watch(path).look()
        assert found.state == state
        assert found.idle_seconds == pytest.approx(idle_seconds, abs=10)


@pytest.mark.parametrize("ahead", [0.0, 3600.0, -3600.0])
def test_a_wrong_clock_misleads_the_first_look_only(path: Path, monkeypatch: pytest.MonkeyPatch, ahead: float) -> None:
    """The clock of this machine is wrong; after a change that was seen it counts the seconds by itself."""
    partial = write_unfinished(path, encode(SNAPSHOT))
    own = SimpleNamespace(now=1000.0)
    clocks = SimpleNamespace(monotonic=lambda: own.now, time=lambda: own.now + ahead)
    monkeypatch.setattr(status, "time", clocks)
    watch = Watch(path)
    os.utime(partial, (own.now, own.now))
    assert watch.look().idle_seconds == max(ahead, 0)
    own.now += 5
    assert watch.look().idle_seconds == 5 + max(ahead, 0)
    own.now += 5
    os.utime(partial, (own.now - 2, own.now - 2))
    assert watch.look().idle_seconds == {0.0: 2, 3600.0: 5, -3600.0: 0}[ahead]
    own.now += 100
    assert watch.look().idle_seconds == {0.0: 102, 3600.0: 105, -3600.0: 100}[ahead]


def test_a_file_that_gets_its_name_during_the_look_is_complete(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    partial = path.with_name("out.h5.partial")
    write_file(path).rename(partial)
    read = status.header.read

    def renamed(found: Path) -> Any:
        if partial.exists():
            partial.rename(path)
        return read(found)

    monkeypatch.setattr(status.header, "read", renamed)
    assert Watch(path).look().state == "complete"


@pytest.mark.parametrize("name", ["out.h5", "out.h5.partial", "out.h5.partial.new"])
def test_what_is_no_file_of_logitgen_is_refused(path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    found = path.with_name(name)
    for make in (lambda: found.write_bytes(b"precious" * 99), found.mkdir):
        make()
        assert main(["status", str(path)]) == 2
        assert re.fullmatch(rf"error: \S*{name} is not a (logitgen )?file.*\n", capsys.readouterr().err)
        found.unlink() if found.is_file() else found.rmdir()


def test_a_complete_name_with_rows_missing_is_refused(path: Path) -> None:
    write_file(path, UNFINISHED)
    with pytest.raises(FormatError, match=r"out\.h5 has the name of a complete file, but lacks 2 rows\.$"):
        Watch(path).look()


def test_only_an_unfinished_file_may_have_a_line(path: Path) -> None:
    with write_file(path).open("ab") as file:
        file.write(encode(SNAPSHOT))
    with pytest.raises(FormatError, match=r"out\.h5 must have [\d,]+ bytes, got [\d,]+\."):
        Watch(path).look()


def test_an_unfinished_file_has_no_more_than_the_room_of_a_line(path: Path) -> None:
    write_unfinished(path, bytes(2**16))
    assert Watch(path).look().num_done == 1
    write_unfinished(path, bytes(2**16 + 1))
    with pytest.raises(FormatError, match=r"out\.h5\.partial must have [\d,]+ bytes, got [\d,]+\."):
        Watch(path).look()


# What is shown.

RUNNING = Status(
    path=Path("out.h5"), state="running", num_rows=3000, num_done=1000, idle_seconds=2.0, snapshot=SNAPSHOT
)


def drawn(shown: Status, width: int = 80, height: int | None = None) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(status_view(shown, width, height))
    return captured.get().splitlines()


@pytest.mark.parametrize("width", [60, 80, 160])
def test_a_run_is_shown_whole_at_any_width(width: int) -> None:
    lines = drawn(RUNNING, width)
    assert all(len(line) <= width for line in lines)
    text = " ".join(" ".join(lines).split())
    for words in (
        "out.h5: running, last write 0:02 ago",
        "1,000/3,000 rows, 750/1,400 tokens, 10 tok/s over 1:05, 15 tok/s recent",
    ):
        assert words in text
    assert re.search(r"capture \S+ +54% ETA 1:05", text)
    assert re.search(r"rank 0 \S+ +50% 8 tok/s", text)
    assert re.search(r"rank 1 \S+ +50% 2 tok/s", text)


def test_the_slowest_of_many_ranks_are_shown_where_lines_are_few() -> None:
    many = replace(SNAPSHOT, stream_tokens=[*range(40, 72)], stream_totals=[100] * 32)
    lines = drawn(replace(RUNNING, snapshot=many), height=12)
    assert len(lines) <= 12
    assert [line.split()[1] for line in lines if line.startswith("rank")] == list("0123456")
    assert lines[-1] == "and 25 faster ranks"
    assert len([line for line in drawn(replace(RUNNING, snapshot=many)) if line.startswith("rank")]) == 32


def test_the_plain_line_names_the_slowest_rank() -> None:
    slower = replace(SNAPSHOT, stream_tokens=[560, 90])
    assert status_line(replace(RUNNING, snapshot=slower)) == (
        "out.h5: running, last write 0:02 ago, 1,000/3,000 rows, 750/1,400 tokens, 10 tok/s over 1:05, "
        "15 tok/s recent, ETA 1:05, slowest rank 1 at 30%"
    )


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (Status(path=Path("out.h5"), state="not started"), "out.h5: not started: no file yet"),
        (
            Status(path=Path("out.h5"), state="being created", idle_seconds=3),
            "out.h5: being created, last write 0:03 ago",
        ),
        (
            replace(RUNNING, state="stopped", snapshot=None),
            "out.h5: stopped or starting (the same command resumes it), last write 0:02 ago, 1,000/3,000 rows (33%)",
        ),
        (
            Status(path=Path("out.h5"), state="complete", num_rows=3000, num_done=3000),
            "out.h5: complete, 3,000/3,000 rows (100%)",
        ),
    ],
)
def test_every_state_is_said_in_words(shown: Status, words: str) -> None:
    assert status_line(shown) == words
    assert ", ".join(drawn(shown)) == words


def test_a_stalled_run_is_not_said_to_arrive() -> None:
    stalled = replace(RUNNING, state="stalled", idle_seconds=700)
    words = "out.h5: stalled or killed (the same command resumes it), last write 11:40 ago"
    assert drawn(stalled)[0] == words
    assert status_line(stalled).startswith(words)
    assert "ETA -:--" in status_line(stalled)
    assert "ETA -:--" in drawn(stalled)[2]


def test_facts_worked_by_hand() -> None:
    assert status_facts(RUNNING) == {
        "path": "out.h5",
        "state": "running",
        "rows_done": 1000,
        "rows": 3000,
        "seconds_since_write": 2.0,
        "seconds": 65.0,
        "tokens_done": 750,
        "tokens": 1400,
        "tokens_per_second": 10.0,
        "recent_tokens_per_second": 15.0,
        "eta_seconds": 65.0,
        "ranks": [{"tokens_done": 500, "tokens": 1000}, {"tokens_done": 150, "tokens": 300}],
    }


def test_watching_needs_no_torch(path: Path) -> None:
    write_unfinished(path, encode(SNAPSHOT))
    imported = imported_by("import sys; from logitgen.__main__ import main; main(['status', sys.argv[1]])", path)
    assert "h5py" in imported
    assert imported.isdisjoint({"torch", "transformers", "accelerate", "datasets"})


# Real runs.


def options_of(teacher: Path, ragged: Path, folder: Path) -> dict[str, Any]:
    return {"teacher": teacher, "dataset": ragged, "batch_tokens": 40, "log_dir": folder / "logs"}


def test_a_run_that_is_stopped_says_so_and_is_seen_under_way_again(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = options_of(teacher, ragged, tmp_path)
    compute, seen = generate.capture_batch, []

    def looked_at(*arguments: Any) -> Any:
        seen.append(Watch(tmp_path / "out.h5").look())
        if len(seen) == 9:
            raise KeyboardInterrupt
        return compute(*arguments)

    monkeypatch.setattr(generate, "capture_batch", looked_at)
    with pytest.raises(KeyboardInterrupt):
        capture(**options)
    assert [found.state for found in seen] == ["running"] * 9
    left = Watch(tmp_path / "out.h5").look()
    assert (left.state, left.snapshot) == ("stopped", None)
    assert 2 < left.num_done < left.num_rows  # two rows have nothing to capture
    path = capture(**options)
    assert {found.state for found in seen[9:]} == {"running"}
    assert (seen[0].snapshot.tokens_before, seen[0].snapshot.total) == (0, seen[9].snapshot.total)
    assert 0 < seen[9].snapshot.tokens_before < seen[9].snapshot.total
    assert Watch(path).look().state == "complete"


def test_a_disk_that_has_no_room_for_the_line_does_not_matter(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused = []

    def full(descriptor: int, data: Any, place: int) -> int:
        if not bytes(data).startswith(b"logitgen status"):
            return pwrite(descriptor, data, place)
        refused.append(bytes(data))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    options = options_of(teacher, ragged, tmp_path)
    undisturbed = capture(output=tmp_path / "undisturbed.h5", **options)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", full)
    assert capture(**options).read_bytes() == undisturbed.read_bytes()
    num_tokens = LogitsFile(undisturbed).layout.num_positions
    assert [decode(data).tokens for data in (refused[0], refused[-1])] == [0, num_tokens]


GATED = (
    "import os, sys, time\nfrom logitgen import generate\n"
    "from logitgen.leader import writer\nwriter.COMMIT_SECONDS = 0.2\n"
    "start, gate, most = {start!r}, {gate!r}, {most}[int(os.environ['RANK'])]\n"
    "compute, number = generate.capture_batch, 0\n"
    "def gated(*arguments):\n"
    "    global number\n"
    "    number += 1\n"
    "    while number > most and not os.path.exists(gate): time.sleep(0.02)\n"
    "    return compute(*arguments)\n"
    "generate.capture_batch = gated\n"
    "while not os.path.exists(start): time.sleep(0.02)\n"
    "generate.main()\n"
)
"""The main program on two ranks, each of which waits for a file to start, and for another after so many batches."""

MOST = [7, 3]


@pytest.fixture
def gated(teacher: Path, ragged: Path, tmp_path: Path) -> Iterator[Program]:
    script = tmp_path / "gated.py"
    text = GATED.format(start=str(tmp_path / "start"), gate=str(tmp_path / "gate"), most=MOST)
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{text}")
    command = launch_command(2, output=tmp_path / "out.h5", **options_of(teacher, ragged, tmp_path))
    command[command.index("generate.py")] = str(script)
    run = Program(command)
    yield run
    kill(run)


def kill(run: Program) -> tuple[str, str]:
    """End a run, and return what it wrote."""
    if run.poll() is None:
        processes = [psutil.Process(run.pid), *psutil.Process(run.pid).children(recursive=True)]
        for process in processes:
            process.kill()
        psutil.wait_procs(processes, timeout=10)
    return run.communicate()


def looked(path: Path) -> dict[str, Any]:
    """Ask for the status as a script does."""
    command = [sys.executable, "-m", "logitgen", "status", str(path), "--json"]
    return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def wait_for(path: Path, wanted: Callable[[Status], bool], run: Program) -> None:
    deadline = time.monotonic() + 120
    watch = Watch(path)
    while not wanted(watch.look()):
        assert time.monotonic() < deadline, kill(run)
        time.sleep(0.05)


def test_status_shows_the_numbers_of_the_flags_and_the_plan(
    gated: Program, capture: Capture, teacher: Path, ragged: Path, tmp_path: Path
) -> None:
    path, partial = tmp_path / "out.h5", tmp_path / "out.h5.partial"

    def both_wait(found: Status) -> bool:
        """Both ranks have done what they may, and nothing is about to be written."""
        return found.snapshot is not None and found.idle_seconds > 2 and all(found.snapshot.stream_tokens)

    (tmp_path / "start").touch()
    wait_for(path, both_wait, gated)
    before = partial.read_bytes(), partial.stat()
    found = looked(path)
    after = partial.read_bytes(), partial.stat()
    assert after[0] == before[0]
    assert (after[1].st_mtime_ns, after[1].st_ctime_ns) == (before[1].st_mtime_ns, before[1].st_ctime_ns)
    assert gated.poll() is None

    with h5py.File(partial, locking=False) as file:
        done, lengths = file["done"][:] == 1, np.maximum(np.diff(file["offsets"][:]) - 1, 0)
    plan = Plan(lengths, 40)
    shares = plan.shares(np.arange(plan.num_batches), 2)
    finished = [[batch for batch in share if done[plan.rows(batch)].all()] for share in shares]
    assert [len(batches) for batches in finished] == MOST

    def tokens(batches: Any) -> int:
        return sum(int(lengths[plan.rows(batch)].sum()) for batch in batches)

    assert found["state"] == "running"
    assert (found["rows_done"], found["rows"]) == (done.sum(), 53)
    assert found["tokens_done"] == lengths[done].sum()
    assert found["tokens"] == lengths.sum()
    assert found["ranks"] == [
        {"tokens_done": tokens(batches), "tokens": tokens(share)}
        for batches, share in zip(finished, shares, strict=True)
    ]
    assert found["tokens_per_second"] == pytest.approx(found["tokens_done"] / found["seconds"])
    assert 0 < found["seconds"] < 120
    left = found["tokens"] - found["tokens_done"]
    assert found["eta_seconds"] == pytest.approx(left / found["tokens_per_second"])

    kill(gated)
    killed = looked(path)
    assert {name: killed[name] for name in ("rows_done", "ranks")} == {
        name: found[name] for name in ("rows_done", "ranks")
    }
    options = options_of(teacher, ragged, tmp_path) | {"log_dir": tmp_path / "again"}
    again = capture(output=path, **options)
    assert again.read_bytes() == capture(output=tmp_path / "undisturbed.h5", **options).read_bytes()
    assert not partial.exists()
    complete = looked(path)
    assert (complete["state"], complete["rows_done"], complete["ranks"]) == ("complete", 53, [])


def test_a_run_that_is_watched_has_the_same_bytes(
    gated: Program,
    capture: Capture,
    teacher: Path,
    ragged: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(logitgen.__main__, "WATCH_SECONDS", 0.01)

    class Opening(Watch):
        def look(self) -> Status:
            assert gated.poll() in (None, 0), gated.communicate()
            found = super().look()
            (tmp_path / "start").touch()
            if found.snapshot and all(found.snapshot.stream_tokens):
                (tmp_path / "gate").touch()
            return found

    monkeypatch.setattr(logitgen.__main__, "Watch", Opening)
    assert main(["status", str(tmp_path / "out.h5"), "--watch", "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    states = [line["state"] for line in printed]
    assert (states[0], states[-1]) == ("not started", "complete")
    assert "running" in states
    assert states == sorted(states, key=["not started", "being created", "stopped", "running", "complete"].index)
    counts = [line["rows_done"] for line in printed if line["rows_done"] is not None]
    assert counts == sorted(counts)
    assert counts[-1] == 53
    gated.communicate()
    assert gated.returncode == 0
    options = options_of(teacher, ragged, tmp_path)
    unwatched = capture(output=tmp_path / "unwatched.h5", **options)
    assert (tmp_path / "out.h5").read_bytes() == unwatched.read_bytes()


def test_a_watch_goes_on_until_the_file_is_complete_whatever_the_run_does(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped and stalled runs go on one day, with the same command."""
    seen = ["not started", "being created", "running", "stalled", "stopped", "running", "complete", "running"]
    looks = iter(seen)
    monkeypatch.setattr(Watch, "look", lambda self: Status(path=path, state=next(looks)))
    monkeypatch.setattr(logitgen.__main__, "WATCH_SECONDS", 0)
    assert main(["status", str(path), "--watch", "--json"]) == 0
    assert [json.loads(line)["state"] for line in capsys.readouterr().out.splitlines()] == seen[:-1]


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_watch_that_is_interrupted_ends_without_a_traceback(path: Path, arguments: list[str]) -> None:
    write_unfinished(path, encode(SNAPSHOT))
    command = [sys.executable, "-u", "-m", "logitgen", "status", str(path), "--watch", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as watching:
        assert watching.stdout
        first = watching.stdout.readline()
        assert "running" in first
        watching.send_signal(signal.SIGINT)
        out, err = watching.communicate(timeout=30)
    assert (watching.returncode, out, err) == (130, "", "")
