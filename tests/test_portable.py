"""Systems that are not at hand: Windows, as tests/windows.py pretends it, and Apple's GPUs, as a mode of torch does."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import programs
import pytest
import torch
from batches import batch_of, captured, layout_of
from conftest import ROOT, launch_command, make_llama
from torch.overrides import TorchFunctionMode

from logitgen import CaptureError, LogitsFile, generate
from logitgen.file.states import HeadForm
from logitgen.leader.lock import sync_folder
from logitgen.ranks import deliver, ending, environment
from logitgen.ranks.agree import Ranks

Capture = Callable[..., Path]
WINDOWS = str(ROOT / "tests" / "windows.py")


def run_on_windows(*words: object, num_ranks: int = 0) -> subprocess.CompletedProcess[str]:
    """Run a program as if on Windows, directly or by the launcher."""
    command = [sys.executable, WINDOWS, *map(str, words)]
    if num_ranks:
        launcher = launch_command(num_ranks)
        command = [*launcher[: launcher.index("generate.py")], *command[1:]]
    return programs.run(command)


# Windows.


@pytest.fixture
def words(teacher: Path, ragged: Path, tmp_path: Path) -> list[str]:
    """A command that captures into out.h5."""
    places = {"teacher": teacher, "dataset": ragged, "output": tmp_path / "out.h5", "log_dir": tmp_path / "logs"}
    return ["generate.py", "--batch_tokens=100", *(f"--{name}={value}" for name, value in places.items())]


@pytest.fixture
def expected(capture: Capture, teacher: Path, ragged: Path, tmp_path: Path) -> bytes:
    """What that command writes on this system."""
    return capture(teacher=teacher, dataset=ragged, batch_tokens=100, output=tmp_path / "usual.h5").read_bytes()


@pytest.mark.parametrize("num_ranks", [0, 2])
def test_a_capture_on_windows_has_the_same_bytes(
    words: list[str], expected: bytes, tmp_path: Path, num_ranks: int
) -> None:
    ended = run_on_windows(*words, num_ranks=num_ranks)
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out.h5").read_bytes() == expected
    assert [path.name for path in tmp_path.glob("out.h5*")] == ["out.h5"]
    assert "out.h5.partial.new cannot be locked here. Start only one run at a time with this --output." in ended.stderr


def test_a_run_that_was_stopped_goes_on_on_windows_over_a_file_it_overwrites(
    words: list[str], expected: bytes, capture: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A complete file in the way, a `.partial` with some rows, and what a killed creation left."""
    number, compute = iter(range(100)), generate.capture_batch

    def fails(*arguments: Any) -> torch.Tensor:
        if next(number) == 5:
            raise KeyboardInterrupt
        return compute(*arguments)

    monkeypatch.setattr(generate, "capture_batch", fails)
    options = dict(word.removeprefix("--").split("=", 1) for word in words[1:])
    with pytest.raises(KeyboardInterrupt):
        capture(**options)
    done = LogitsFile(tmp_path / "out.h5.partial", partial=True).arrays["done"]
    assert 0 < np.count_nonzero(done) < len(done)
    (tmp_path / "out.h5").write_bytes(expected[:-1])
    (tmp_path / "out.h5.partial.new").write_bytes(bytes(9000))
    ended = run_on_windows(*words, "--overwrite")
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "out.h5").read_bytes() == expected
    assert [path.name for path in tmp_path.glob("out.h5*")] == ["out.h5"]


def test_what_pretends_to_be_windows_refuses_what_windows_refuses(tmp_path: Path) -> None:
    probe = tmp_path / "probe.py"
    probe.write_text(
        "import mmap, multiprocessing, os, pathlib, signal, sys\n"
        "def refused(what, error):\n"
        "    try: what()\n"
        "    except error: return\n"
        "    raise SystemExit(f'line {sys._getframe(1).f_lineno} was allowed')\n"
        "path, other = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[1] + '.other')\n"
        "path.write_bytes(b'1' * 5000)\n"
        "with path.open('r+b') as file:\n"
        "    refused(lambda: path.rename(other), PermissionError)\n"
        "    refused(lambda: os.replace(path, other), PermissionError)\n"
        "    refused(path.unlink, PermissionError)\n"
        "    mapped = mmap.mmap(file.fileno(), 0)\n"
        "refused(lambda: path.rename(other), PermissionError)\n"
        "mapped.close()\n"
        "path.rename(other)\n"
        "with other.open('rb'):\n"
        "    path.touch()\n"
        "    refused(lambda: path.replace(other), PermissionError)\n"
        "    refused(lambda: path.parent.rename(sys.argv[1] + '.folder'), PermissionError)\n"
        "path.replace(other)\n"
        "refused(lambda: __import__('fcntl'), ImportError)\n"
        "refused(lambda: pathlib.Path('/proc/meminfo').read_text(), FileNotFoundError)\n"
        "assert multiprocessing.get_start_method() == 'spawn'\n"
        "assert not hasattr(os, 'fork') and not hasattr(signal, 'pthread_kill')\n"
        "print('all')\n"
    )
    ended = run_on_windows(probe, tmp_path / "file")
    assert (ended.returncode, ended.stdout) == (0, "all\n"), ended.stderr


def test_a_folder_is_not_synced_on_windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "missing"
    monkeypatch.setattr(os, "name", "nt")
    sync_folder(missing)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        sync_folder(missing)


def test_without_signals_to_threads_the_main_one_is_interrupted_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    try:
        monkeypatch.delattr(signal, "pthread_kill")
        thread = threading.Thread(target=ending.interrupt_main, args=(signal.SIGTERM,))
        thread.start()
        thread.join()
        sum(range(1000))  # the handler runs between two bytecodes
    finally:
        signal.signal(signal.SIGTERM, before)
    assert came == [signal.SIGTERM]


def test_a_lost_rank_ends_the_wait_for_another_where_no_signal_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(signal, "pthread_kill")
    inbox = deliver.Inbox(None, lambda *_: Future(), lambda *_: None, np.zeros(1), 1.0, "Rank {}", [])
    gives_up, gave_up = threading.Event(), []
    inbox._threads = [threading.Thread(target=lambda: gave_up.append(gives_up.wait(20)), daemon=True)]
    inbox._threads[0].start()
    threading.Timer(0.3, inbox._fail, [CaptureError("Rank 2 ended.")]).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            inbox.join()
        assert not gave_up
    finally:
        gives_up.set()


# Apple's GPUs.


@pytest.mark.parametrize(("found", "num_ranks", "cpu"), [("mps", 1, False), ("mps", 2, True), ("cuda", 2, False)])
def test_apples_gpu_serves_a_single_rank(
    monkeypatch: pytest.MonkeyPatch, found: str, num_ranks: int, cpu: bool
) -> None:
    asked: list[bool] = []

    def accelerator(cpu: bool) -> SimpleNamespace:
        asked.append(cpu)
        facts = {"process_index": 0, "num_processes": 1, "is_main_process": True, "is_local_main_process": True}
        return SimpleNamespace(device=torch.device("cpu" if cpu else found), **facts)

    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(found))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(environment, "Accelerator", accelerator)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, str(num_ranks))
    assert Ranks([]).device.type == ("cpu" if cpu else found)
    assert asked == [cpu]


class AppleGpu(TorchFunctionMode):
    """The CPU under another name, without what `mps` lacks: float64, and memory that is pinned."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.device.__get__:
            return torch.device("mps")
        if func == torch.Tensor.pin_memory:
            raise AssertionError("memory was pinned")
        args, kwargs = ([self._here(value) for value in args], {k: self._here(v) for k, v in (kwargs or {}).items()})
        result = func(*args, **kwargs)
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result

    def _here(self, value: Any) -> Any:
        return torch.device("cpu") if isinstance(value, torch.device) else value


@pytest.fixture
def apple_gpu() -> Iterator[None]:
    with AppleGpu():
        yield


HEAD = HeadForm(hidden_size=32, dtype=np.dtype("<f4"), has_bias=False)
KEPT: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk, packed": {"encoding": "packed"},
    "topk, packed16": {"encoding": "packed16"},
    "sample": {"capture": "sample"},
    "sample, packed": {"capture": "sample", "encoding": "packed"},
    "hidden": {"capture": "hidden", "top_k": 0, "head": HEAD},
    "hidden, packed": {"capture": "hidden", "top_k": 0, "head": HEAD, "encoding": "packed"},
    "full": {"capture": "full", "top_k": 0},
}


@pytest.mark.parametrize("kept", KEPT.values(), ids=KEPT)
def test_what_is_kept_on_apples_gpu_is_what_the_cpu_keeps(kept: dict[str, Any]) -> None:
    batch, model = batch_of([[1, 2, 3, 4, 5, 6], [9, 8, 7]]), make_llama(50)
    here = captured(batch, layout_of(batch, **kept), model)
    with AppleGpu():
        there = captured(batch, layout_of(batch, **kept), model)
    assert here.keys() == there.keys()
    for name in here:
        if kept.get("capture") != "sample":
            np.testing.assert_array_equal(here[name], there[name])
        elif name != "crc32":  # only the line that ids are drawn from is added up in float64 elsewhere
            np.testing.assert_allclose(there[name], here[name], rtol=2**-10 if here[name].dtype.kind == "f" else 0)


def test_what_stands_for_apples_gpu_refuses_float64(apple_gpu: None) -> None:
    assert torch.zeros(3).device.type == "mps"
    with pytest.raises(TypeError, match="float64"):
        torch.zeros(3).double()


# Without make.


def commands_of_make(target: str) -> list[list[str]]:
    """The words of every command a target runs from nothing on, as one types them in the environment made by it."""
    dry_run = ["make", "--no-print-directory", "-n", "-B", "PYTHON=python", target]
    lines = subprocess.run(dry_run, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    typed = lines.replace("\\\n", " ").replace(".venv/bin/", "")
    hidden = {"TQDM_DISABLE=1", "--quiet", "--disable-pip-version-check"}
    commands = [[word for word in shlex.split(line) if word not in hidden] for line in typed.splitlines()]
    return [words for words in commands if words[0] != "touch"]


def test_the_commands_without_make_are_those_of_make() -> None:
    page = (ROOT / "docs" / "platforms.md").read_text(encoding="utf-8")
    block = re.search(r"Without\smake:\n\n```\n(.*?)```", page, re.DOTALL)
    assert block
    lines = block[1].replace("\\\n", " ").splitlines()
    activates = [line for line in lines if "activate" in line]
    typed = [shlex.split(line, comments=True) for line in lines if line not in activates]
    assert len(activates) == 1
    run, test, check = (commands_of_make(target) for target in ("run", "test", "check"))
    assert typed == [*run, *test[-1:], *(words for words in check if words not in [*run, *test])]
