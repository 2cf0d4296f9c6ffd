"""Several ranks, started by the real launcher."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import programs
import psutil
import pytest
import torch
from conftest import ROOT, SENTENCES, launch, launch_command, make_llama, save_teacher, write_jsonl
from launches import Ended, error_lines, exit_statuses, launch_changed, ranks_of, ranks_that_ran
from programs import Program

from logitgen import LogitsFile, UsageError
from logitgen.ranks import ending
from logitgen.ranks.environment import check_launch


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, teacher: Path, ragged: Path) -> Callable[..., Path]:
    """The file of so many ranks, made once per number and options."""
    made: dict[Any, Path] = {}

    def make(num_ranks: int, **options: Any) -> Path:
        key = num_ranks, *sorted(options.items())
        if key not in made:
            folder = tmp_path_factory.mktemp("files")
            places = {"output": folder / "out.h5", "log_dir": folder / "logs"}
            ended = launch(num_ranks, teacher=teacher, dataset=ragged, batch_tokens=100, **places, **options)
            assert ended.returncode == 0, ended.stderr
            assert ranks_that_ran(folder / "logs") == [f"rank_{rank}" for rank in range(num_ranks)]
            made[key] = folder / "out.h5"
        return made[key]

    return make


@pytest.mark.parametrize(
    ("num_ranks", "options"),
    [
        pytest.param(2, {}, id="topk, 2"),
        pytest.param(3, {}, id="topk, 3", marks=pytest.mark.slow),
        pytest.param(3, {"limit": 4}, id="few", marks=pytest.mark.slow),
        pytest.param(2, {"capture": "sample", "encoding": "packed", "top_k": 12}, id="draws", marks=pytest.mark.slow),
        pytest.param(2, {"capture": "hidden"}, id="hidden", marks=pytest.mark.slow),
        pytest.param(2, {"capture": "hidden", "encoding": "packed", "layers": "0,1"}, id="layers"),
        pytest.param(2, {"capture": "full", "limit": 11}, id="full", marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_writes_the_same_bytes(
    files: Callable[..., Path], num_ranks: int, options: dict[str, Any]
) -> None:
    one, several = (files(number, **options) for number in (1, num_ranks))
    assert one.read_bytes() == several.read_bytes()


def test_the_file_of_two_ranks_has_every_row_once_in_split_order(files: Callable[..., Path]) -> None:
    file = LogitsFile(files(2))
    assert file.arrays["source_row"].tolist() == list(range(53))
    assert file.arrays["done"].tolist() == [1] * 53
    assert list(files(2).parent.glob("out.h5*")) == [files(2)]


def test_a_users_mistake_is_one_line_and_status_2_on_every_rank(teacher: Path, ragged: Path, tmp_path: Path) -> None:
    ended = launch(2, teacher=teacher, dataset=ragged, output=tmp_path / "out.h5", top_k=1000, log_dir=tmp_path)
    assert error_lines(ended) == [
        "error: --top_k must be between 1 and the vocabulary size 384, got 1000. "
        "Lower it, or keep every token with --capture full."
    ]
    assert exit_statuses(ended) == [2, 2]
    assert 'generate.py", line' not in ended.stderr
    assert not list(tmp_path.glob("out.h5*"))


def test_a_mistake_only_the_leader_sees_ends_every_rank(teacher: Path, ragged: Path, tmp_path: Path) -> None:
    (tmp_path / "out.h5").write_text("precious")
    ended = launch(2, teacher=teacher, dataset=ragged, output=tmp_path / "out.h5", log_dir=tmp_path)
    assert len(error_lines(ended)) == 1
    assert "out.h5 exists" in error_lines(ended)[0]
    assert exit_statuses(ended) == [2, 2]
    assert (tmp_path / "out.h5").read_text() == "precious"


def test_help_is_printed_once(tmp_path: Path) -> None:
    ended = programs.run([*launch_command(2), "--help"])
    assert ended.returncode == 0
    assert ended.stdout.count("usage: generate.py") == 1


def test_a_launch_is_as_large_as_its_ranks_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_launch(2)
    with pytest.raises(UsageError, match=r"^The launcher started 2 processes, .* \(Accelerate reports 1\)\."):
        check_launch(1)


@pytest.mark.slow
def test_ranks_that_do_not_see_each_other_are_refused(teacher: Path, ragged: Path, tmp_path: Path) -> None:
    """Accelerate leaves ranks alone on a machine whose accelerator is not of the profile's kind."""
    change = (
        "import torch\ntorch.accelerator.is_available = lambda: True\n"
        "torch.accelerator.current_accelerator = lambda: torch.device('cuda')"
    )
    result = launch_changed(tmp_path, change, teacher=teacher, dataset=ragged)
    assert len(error_lines(result)) == 1
    assert "The launcher started 2 processes, but they do not see each other (Accelerate reports 1)" in result.stderr
    assert exit_statuses(result) == [2, 2]
    assert not list(tmp_path.glob("out.h5*"))


def test_ranks_with_different_options_are_refused(teacher: Path, ragged: Path, tmp_path: Path) -> None:
    """As happens when the command is typed on each of several machines."""
    change = "import os\nif os.environ['RANK'] == '1': sys.argv.append('--top_k=32')"
    result = launch_changed(tmp_path, change, teacher=teacher, dataset=ragged)
    assert error_lines(result) == [
        "error: Rank 1 has another --top_k than the leader: 32, not 64. "
        "Give every rank the same command, packages and files."
    ]
    assert exit_statuses(result) == [2, 2]
    assert not list(tmp_path.glob("out.h5*"))


def test_a_killed_rank_is_named_even_if_the_leader_is_busy(teacher: Path, ragged: Path, tmp_path: Path) -> None:
    """The leader sleeps where no signal wakes Python, as in a long kernel; the launcher's SIGTERM comes meanwhile."""
    change = (
        "import ctypes, os, signal\nfrom logitgen import generate\ncompute = generate.capture_batch\n"
        "def slow(*arguments):\n"
        "    if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    for _ in range(4): ctypes.CDLL(None).sleep(1)\n"
        "    return compute(*arguments)\n"
        "generate.capture_batch = slow"
    )
    result = launch_changed(tmp_path, change, teacher=teacher, dataset=ragged, batch_tokens=40)
    assert len(error_lines(result)) == 1
    assert "Rank 1 ended without an error message" in error_lines(result)[0]


def test_a_writer_that_fails_ends_every_rank_with_its_message(teacher: Path, ragged: Path, tmp_path: Path) -> None:
    change = (
        "import errno, os\nfrom logitgen.leader.writer import Writer\n"
        "def full_disk(self, batch, payload):\n"
        "    if batch < 9: return write(self, batch, payload)\n"
        "    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))\n"
        "write, Writer._write_batch = Writer._write_batch, full_disk"
    )
    result = launch_changed(tmp_path, change, teacher=teacher, dataset=ragged, batch_tokens=40)
    partial = tmp_path / "out.h5.partial"
    assert error_lines(result) == [f"error: Rank 0: {partial} cannot be written: No space left on device."]
    assert result.returncode == 1
    assert partial.exists()
    assert not (tmp_path / "out.h5").exists()


@pytest.fixture
def long_run(teacher: Path, tmp_path: Path) -> Iterator[Program]:
    """A run of two ranks that takes long enough to be disturbed, caught in the middle of its rows."""
    rows = [{"text": f"{index} {SENTENCES[index % 40][: 300 + index % 97]}"} for index in range(6000)]
    data = write_jsonl(tmp_path / "long.jsonl", rows)
    command = launch_command(
        2, teacher=teacher, dataset=data, output=tmp_path / "out.h5", log_dir=tmp_path / "logs", batch_tokens=256
    )
    run = Program(command)
    log = tmp_path / "logs" / "rank_0.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and "Capturing" in log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    yield run
    if run.poll() is None:
        os.killpg(run.pid, signal.SIGKILL)
    run.communicate()


def ended(run: Program, ranks: dict[int, psutil.Process]) -> Ended:
    """Wait for the end of a run, and check that no process of it is left."""
    out, err = run.communicate(timeout=60)
    _, alive = psutil.wait_procs(ranks.values(), timeout=10)
    assert not alive
    return subprocess.CompletedProcess(run.args, int(run.returncode or 0), out, err)


@pytest.mark.parametrize(
    ("rank", "message"),
    [(1, "Rank 1 ended without an error message"), (0, "The leader ended without an error message")],
)
def test_a_rank_that_is_killed_ends_the_others_and_is_named(
    long_run: Program, tmp_path: Path, rank: int, message: str
) -> None:
    ranks = ranks_of(long_run)
    assert sorted(ranks) == [0, 1]
    ranks[rank].kill()
    result = ended(long_run, ranks)
    assert result.returncode == 1
    assert len(error_lines(result)) == 1
    assert message in error_lines(result)[0]
    assert [path.name for path in tmp_path.glob("out.h5*")] == ["out.h5.partial"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_every_rank_with_one_line(long_run: Program, tmp_path: Path, number: signal.Signals) -> None:
    ranks = ranks_of(long_run)
    if number == signal.SIGINT:
        os.killpg(long_run.pid, number)  # as Ctrl-C in a terminal does
    else:
        long_run.send_signal(number)  # as a scheduler does
    result = ended(long_run, ranks)
    assert result.returncode != 0
    assert error_lines(result) == [f"error: The run was stopped by {number.name}."]
    safe = re.search(r"([\d,]+) of 6,000 rows are safe in (.*)\. Run the same command again", result.stderr)
    assert safe
    assert safe[2] == str(tmp_path / "out.h5.partial")
    assert int(safe[1].replace(",", "")) == np.count_nonzero(LogitsFile(safe[2], partial=True).arrays["done"]) > 0


def test_an_error_on_one_rank_ends_all_with_its_message(tmp_path: Path) -> None:
    """Rank 1 computes the second batch; its token's embedding is not a number."""
    model = make_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[300] = float("nan")
    teacher = save_teacher(tmp_path / "teacher", model, None)
    rows = [
        {"input_ids": [1] * 20},
        {"input_ids": [2] * 9 + [300] + [2] * 9},
        *({"input_ids": [3] * 9} for _ in range(99)),
    ]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    output = {"output": tmp_path / "out.h5", "log_dir": tmp_path / "logs"}
    result = launch(2, teacher=teacher, dataset=data, batch_tokens=20, **output)
    assert result.returncode == 1
    assert len(error_lines(result)) == 1
    assert error_lines(result)[0].startswith("error: Rank 1: The teacher's logits are not finite at row 1, position 0")
    assert not (tmp_path / "out.h5").exists()


def test_a_partial_file_that_is_not_ours_is_refused_and_kept(teacher: Path, ragged: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.h5.partial"
    partial.write_text("half of it")
    result = launch(2, teacher=teacher, dataset=ragged, output=tmp_path / "out.h5", log_dir=tmp_path)
    assert len(error_lines(result)) == 1
    assert "out.h5.partial exists and is not a logitgen file." in error_lines(result)[0]
    assert exit_statuses(result) == [2, 2]
    assert partial.read_text() == "half of it"


def peak_memory_mb(**options: Any) -> float:
    """Peak resident memory of a whole run on one rank, as the operating system counts it."""
    words = [f"--{name}={value}" for name, value in options.items()]
    run = subprocess.Popen(
        [sys.executable, "generate.py", *words], cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(run.pid, 0)
    assert status == 0
    return usage.ru_maxrss / 1024


@pytest.mark.slow
def test_memory_does_not_grow_with_the_rows(teacher: Path, tmp_path: Path) -> None:
    """Twenty times the rows, a file of over 200 MB. 120 MB are left to allocators, which took 60 to 105 for them."""
    places = {"teacher": teacher, "log_dir": tmp_path, "batch_tokens": 2048, "top_k": 128}
    peaks = []
    for num_rows in (1_000, 20_000):
        rows = [{"input_ids": list(range(5 + index % 40))} for index in range(num_rows)]
        data = write_jsonl(tmp_path / f"{num_rows}.jsonl", rows)
        peaks.append(peak_memory_mb(dataset=data, output=tmp_path / f"{num_rows}.h5", **places))
    assert (tmp_path / "20000.h5").stat().st_size > 200e6
    assert peaks[1] < peaks[0] + 120


@pytest.mark.parametrize(
    ("dead", "line"),
    [
        ([0], "The leader ended without an error message"),
        ([2], "Rank 2 ended without an error message"),
        ([1, 2], "Rank 1, 2 ended without an error message"),
        ([], "stopped by SIGTERM"),
    ],
)
def test_the_dead_are_named_where_the_launchers_signal_comes_first(
    dead: list[int], line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[BaseException] = []
    for name, stand_in in {
        "_dead_neighbours": lambda: dead,
        "ignore_signals": lambda: None,
        "leave": left.append,
    }.items():
        monkeypatch.setattr(ending, name, stand_in)
    monkeypatch.setattr(ending, "_NOTICE_SECONDS", 0.0)
    ending.end_run(ending.Stopped(signal.SIGTERM), [])
    assert str(left[0]).startswith(line)


def test_a_rank_that_had_ended_before_the_signal_came_is_found(tmp_path: Path) -> None:
    """Three children of one launcher: the second is gone before the third looks, the first still there."""
    (tmp_path / "launcher.py").write_text(
        "import os, subprocess, sys\n"
        "look = 'from logitgen.ranks.ending import _dead_neighbours as dead; print(dead())'\n"
        "codes = ['import time; time.sleep(300)', '', look]\n"
        "children = []\n"
        "for rank, code in enumerate(codes, start=4):\n"
        "    env = os.environ | {'RANK': str(rank), 'LOCAL_RANK': str(rank - 4), 'LOCAL_WORLD_SIZE': '3'}\n"
        "    children.append(subprocess.Popen([sys.executable, '-c', code], env=env))\n"
        "    if not code: os.waitid(os.P_PID, children[-1].pid, os.WEXITED | os.WNOWAIT)\n"
        "children[2].wait()\n"
        "children[0].kill()\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHELASTIC_RUN_ID": "x"}
    command = [sys.executable, str(tmp_path / "launcher.py")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == "[5]\n", done.stderr


def test_a_precision_this_machine_cannot_train_in_is_refused_in_one_line(
    teacher: Path, ragged: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "generate.py", f"--teacher={teacher}", f"--dataset={ragged}"]
    command += [f"--output={tmp_path / 'out.h5'}", f"--log_dir={tmp_path}"]
    env = {**os.environ, "ACCELERATE_MIXED_PRECISION": "fp8"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert re.match(
        r"error: The launch profile does not fit this machine: .*fp8.* Use one from accelerate_configs/\.$", line
    )


def test_an_installed_package_captures_without_the_checkout(
    capture: Callable[..., Path], teacher: Path, ragged: Path, tmp_path: Path
) -> None:
    """From another folder, with the package on Python's path only: `accelerate launch -m logitgen.generate`."""
    options = {"teacher": teacher, "dataset": ragged, "limit": 12}
    command = launch_command(2, output=tmp_path / "module.h5", log_dir=tmp_path / "module_logs", **options)
    at = command.index("generate.py")
    command[at : at + 1] = ["-m", "logitgen.generate"]
    command[command.index("accelerate_configs/cpu.yaml")] = str(ROOT / "accelerate_configs" / "cpu.yaml")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "Ranks: 2" in ended.stderr
    assert (tmp_path / "module.h5").read_bytes() == capture(**options).read_bytes()
