"""Faults inside a run of two ranks: every rank ends, one line names the rank and the cause, the run can go on."""

import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
import pytest
from conftest import ROOT, launch_command
from launches import SLOW, Ended, error_lines, exit_statuses, launch_changed

Capture = Callable[..., Path]


RANK_1 = "os.environ['RANK'] == '1' and number == 5"


@pytest.fixture
def finished(capture: Capture, teacher: Path, ragged: Path, tmp_path: Path) -> Callable[[], None]:
    """Run the same command again, and compare with a run that nothing happened to."""

    def finish() -> None:
        options = {"teacher": teacher, "dataset": ragged, "batch_tokens": 40, "log_dir": tmp_path / "again"}
        again = capture(output=tmp_path / "out.h5", **options)
        assert again.read_bytes() == capture(output=tmp_path / "undisturbed.h5", **options).read_bytes()

    return finish


@pytest.fixture
def run(teacher: Path, ragged: Path, tmp_path: Path) -> Callable[..., Ended]:
    """Launch two ranks after some Python that changes the program."""

    def launch(change: str, **options: Any) -> Ended:
        return launch_changed(tmp_path, change, teacher=teacher, dataset=ragged, batch_tokens=40, **options)

    return launch


def test_an_error_in_the_middle_of_a_forward_pass(run: Callable[..., Ended], finished: Callable[[], None]) -> None:
    result = run(SLOW.format(f"if {RANK_1}: raise ValueError('a broken kernel')"))
    assert error_lines(result) == [
        "error: Rank 1: ValueError: a broken kernel (traceback in this rank's log file)",
    ]
    assert result.returncode == 1
    finished()


def test_a_disk_that_is_full_in_the_middle(
    run: Callable[..., Ended], finished: Callable[[], None], tmp_path: Path
) -> None:
    """A limit on the size of files stands in for the disk: the end of the file cannot be written any more."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, -1))"
    result = run(SLOW.format(f"if os.environ['RANK'] == '0' and number == 5: {limit}"))
    partial = tmp_path / "out.h5.partial"
    assert error_lines(result) == [f"error: Rank 0: {partial} cannot be written: File too large."]
    finished()


@pytest.mark.slow
def test_a_file_that_is_too_large_from_the_start(run: Callable[..., Ended], tmp_path: Path) -> None:
    result = run("import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, -1))")
    assert len(error_lines(result)) == 1
    assert re.search(r"out\.h5 cannot be created: File too large\. Choose another place\.", error_lines(result)[0])
    assert exit_statuses(result) == [2, 2]
    assert not list(tmp_path.glob("out.h5*"))


@pytest.mark.slow
def test_a_folder_that_vanishes(run: Callable[..., Ended], finished: Callable[[], None], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    move = f"os.rename({str(folder)!r}, {str(tmp_path / 'moved')!r})"
    result = run(SLOW.format(f"if {RANK_1}: {move}"), output=folder / "out.h5")
    assert len(error_lines(result)) == 1
    assert "out.h5.partial is no longer this run's file" in error_lines(result)[0]
    assert f"rows are in {tmp_path / 'moved' / 'out.h5.partial'}." in error_lines(result)[0]
    (tmp_path / "moved" / "out.h5.partial").rename(tmp_path / "out.h5.partial")
    finished()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_hangs_is_named(run: Callable[..., Ended], finished: Callable[[], None], rank: int) -> None:
    result = run(SLOW.format(f"if os.environ['RANK'] == '{rank}' and number == 5: time.sleep(3600)"), rank_timeout=4)
    assert len(error_lines(result)) == 1
    assert (
        f"Rank {rank} made no progress for 4 s (--rank_timeout). It hangs, or its machine is down."
        in error_lines(result)[0]
    )
    assert result.returncode == 1
    finished()


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_among_others_that_have_finished(
    run: Callable[..., Ended], finished: Callable[[], None]
) -> None:
    """The last of three ranks is stopped from outside, as by a debugger; the others wait for each other by then."""
    stop = "import signal; os.kill(os.getpid(), signal.SIGSTOP)"
    result = run(SLOW.format(f"if os.environ['RANK'] == '2' and number == 3: {stop}"), num_ranks=3, rank_timeout=4)
    assert len(error_lines(result)) == 1
    assert "Rank 2 made no progress for 4 s" in error_lines(result)[0]
    finished()


def test_a_run_goes_on_when_nobody_listens_any_more(
    teacher: Path, ragged: Path, tmp_path: Path, finished: Callable[[], None]
) -> None:
    """As with `| head`, or a terminal that is gone: the progress lines find no reader."""
    change = "import logitgen.leader.progress as progress\nprogress.PLAIN_SECONDS = 0.0\nfrom logitgen import generate"
    script = tmp_path / "changed.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{change}\ngenerate.main()\n")
    words = [f"--teacher={teacher}", f"--dataset={ragged}", "--batch_tokens=40", f"--log_dir={tmp_path / 'logs'}"]
    command = [sys.executable, str(script), *words, f"--output={tmp_path / 'out.h5'}"]
    run = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert run.stderr
    run.stderr.readline()
    run.stderr.close()
    assert run.wait(timeout=120) == 0
    finished()


@pytest.mark.slow
def test_a_rank_that_hangs_while_it_loads_is_named(run: Callable[..., Ended], tmp_path: Path) -> None:
    hang = "if os.environ['RANK'] == '1': generate.load_model = lambda *_: time.sleep(3600)"
    result = run(f"import os, time\nfrom logitgen import generate\n{hang}", rank_timeout=4)
    assert len(error_lines(result)) == 1
    assert "Rank 1 made no progress for 4 s" in error_lines(result)[0]
    assert not list(tmp_path.glob("out.h5*"))


@pytest.mark.slow
@pytest.mark.parametrize(("sharing", "rank"), [("tp_size", 1), ("fsdp_size", 0)])
def test_a_rank_that_hangs_with_a_part_of_the_teacher_ends_the_run(
    run: Callable[..., Ended], finished: Callable[[], None], tmp_path: Path, sharing: str, rank: int
) -> None:
    """The others wait for it inside torch, where no signal reaches them."""
    hang = f"if os.environ['RANK'] == '{rank}' and number == 5: time.sleep(3600)"
    result = run(SLOW.format(hang), rank_timeout=4, **{sharing: 2})
    assert len(error_lines(result)) == 1
    assert "made no progress for 4 s (--rank_timeout). It hangs, or its machine is down." in error_lines(result)[0]
    assert (tmp_path / "out.h5.partial").exists()
    if sharing == "fsdp_size":  # which computes the same numbers as one rank
        finished()


@pytest.mark.parametrize("place", ["load_model", "Teacher"])
def test_a_rank_out_of_memory_while_it_loads_its_part_is_named(
    run: Callable[..., Ended], tmp_path: Path, place: str
) -> None:
    fail = f"""
before = generate.{place}
def changed(*arguments, **options):
    if os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")
    return before(*arguments, **options)
generate.{place} = changed
"""
    result = run(f"import os, torch\nfrom logitgen import generate{fail}", tp_size=2)
    assert len(error_lines(result)) == 1
    assert "Rank 1: OutOfMemoryError: Tried to allocate 2.00 GiB." in error_lines(result)[0]
    assert not list(tmp_path.glob("out.h5*"))


@pytest.mark.slow
def test_a_slow_rank_is_waited_for(run: Callable[..., Ended], finished: Callable[[], None]) -> None:
    """Each pass takes less than the time-out, all of them together much more; the other rank has long finished."""
    result = run(SLOW.format("if os.environ['RANK'] == '1': time.sleep(0.4)"), rank_timeout=3)
    assert result.returncode == 0, result.stderr
    finished()


def test_the_launcher_brings_a_run_back(
    capture: Capture, teacher: Path, ragged: Path, tmp_path: Path, finished: Callable[[], None]
) -> None:
    script = tmp_path / "changed.py"
    died = tmp_path / "died"
    kill = f"open({str(died)!r}, 'x').close(); os.kill(os.getpid(), 9)"
    change = SLOW.format(f"if {RANK_1} and not os.path.exists({str(died)!r}): {kill}")
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{change}\ngenerate.main()\n")
    options = {"teacher": teacher, "dataset": ragged, "batch_tokens": 40, "log_dir": tmp_path / "logs"}
    command = launch_command(2, output=tmp_path / "out.h5", **options)
    command[command.index("generate.py")] = str(script)
    command.insert(command.index("--config_file"), "--max_restarts=1")
    result = programs.run(command)
    assert result.returncode == 0, result.stderr
    assert died.exists()
    began = re.findall(r"Capturing (\d+) of 53 rows", (tmp_path / "logs" / "rank_0.log").read_text())
    assert len(began) == 2
    assert int(began[1]) < int(began[0])
    finished()


def test_sigterm_keeps_what_is_computed_and_says_run_me_again(
    teacher: Path, ragged: Path, tmp_path: Path, finished: Callable[[], None]
) -> None:
    """Without the launcher in between, the exit status is the program's own."""
    stop = f"if number == 9: os.kill(os.getpid(), {int(signal.SIGTERM)}); time.sleep(9)"
    script = tmp_path / "changed.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{SLOW.format(stop)}\ngenerate.main()\n")
    words = [f"--teacher={teacher}", f"--dataset={ragged}", "--batch_tokens=40", f"--log_dir={tmp_path / 'logs'}"]
    command = [sys.executable, str(script), *words, f"--output={tmp_path / 'out.h5'}"]
    result = programs.run(command, cwd=tmp_path)
    assert error_lines(result) == ["error: The run was stopped by SIGTERM."]
    assert result.returncode == 75
    safe = re.search(r"(\d+) of 53 rows are safe", result.stderr)
    assert safe
    assert int(safe[1]) > 8
    finished()
