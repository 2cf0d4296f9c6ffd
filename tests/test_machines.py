"""Two machines: network namespaces of Linux with a launcher in each and a wire in between that can be slow or cut."""

import fcntl
import os
import queue
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from conftest import ROOT
from launches import SLOW, Ended, error_lines, ranks_of, ranks_that_ran

from logitgen import LogitsFile

Run = subprocess.Popen[str]
Packets: TypeAlias = "queue.Queue[tuple[float, bytes]]"
"""And when they are due."""

NAMES = [f"logitgen-{os.getpid()}-{number}" for number in range(2)]
ADDRESSES = ["10.77.0.1", "10.77.0.2"]
TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h


class Wire:
    """All that the machines send each other passes through this process; netem would do it, but many kernels lack it.

    Attributes:
        is_cut: Whether nothing arrives any more, and nobody is told.
        delay_seconds: How long a packet takes.
        seconds_per_byte: How long it keeps the next one waiting.
        lost_share: How many of them are lost.
        num_lost: How many were.
    """

    def __init__(self) -> None:
        self.mend()
        ends = [self._plug(number) for number in range(2)]
        for source, target in (ends, ends[::-1]):
            on_its_way: Packets = queue.Queue()
            threading.Thread(target=until_unplugged, args=(self._take, source, on_its_way), daemon=True).start()
            threading.Thread(target=until_unplugged, args=(self._hand_over, target, on_its_way), daemon=True).start()

    def mend(self) -> None:
        self.is_cut, self.delay_seconds, self.seconds_per_byte, self.lost_share, self.num_lost = False, 0.0, 0.0, 0.0, 0

    def _plug(self, number: int) -> int:
        end = os.open("/dev/net/tun", os.O_RDWR)
        name = f"wire{os.getpid()}{number}"
        fcntl.ioctl(end, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TUN | IFF_NO_PI))
        ip("link", "set", name, "netns", NAMES[number])
        ip("-n", NAMES[number], "addr", "add", f"{ADDRESSES[number]}/24", "dev", name)
        for device in (name, "lo"):
            ip("-n", NAMES[number], "link", "set", device, "up")
        return end

    def _take(self, source: int, on_its_way: Packets) -> None:
        free = 0.0
        while True:
            packet = os.read(source, 65536)
            if self.is_cut or random.random() < self.lost_share:
                self.num_lost += 1
                continue
            free = max(time.monotonic(), free) + len(packet) * self.seconds_per_byte
            on_its_way.put((free + self.delay_seconds, packet))

    def _hand_over(self, target: int, on_its_way: Packets) -> None:
        while True:
            due, packet = on_its_way.get()
            time.sleep(max(0.0, due - time.monotonic()))
            if not self.is_cut:
                os.write(target, packet)


def until_unplugged(work: Callable[[int, Packets], None], end: int, on_its_way: Packets) -> None:
    with suppress(OSError):
        work(end, on_its_way)


def ip(*words: str) -> str:
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def plugged() -> Iterator[Wire]:
    if shutil.which("ip") is None or not Path("/dev/net/tun").exists():
        pytest.skip("needs Linux, iproute2 and /dev/net/tun")
    with ExitStack() as made:
        try:
            for name in NAMES:
                ip("netns", "add", name)
                made.callback(ip, "netns", "del", name)
            wire = Wire()
        except (subprocess.CalledProcessError, OSError) as error:
            pytest.skip(f"network namespaces are not permitted here: {getattr(error, 'stderr', error)}")
        yield wire


@pytest.fixture
def wire(plugged: Wire) -> Iterator[Wire]:
    """The wire between two machines, whole at first; what a test leaves running on them is killed."""
    plugged.mend()
    yield plugged
    for name in NAMES:
        for process in ip("netns", "pids", name).split():
            os.kill(int(process), signal.SIGKILL)


@pytest.fixture
def start(wire: Wire, teacher: Path, ragged: Path, tmp_path: Path) -> Callable[..., list[Run]]:
    """Start the same command on two machines, with one rank on each; the second one lacks the output's folder."""
    (tmp_path / "disk" / "folder").mkdir(parents=True)

    def start_one(number: int, cache: Path, script: str, **options: Any) -> Run:
        places = {"output": tmp_path / "disk" / "folder" / "out.h5", "log_dir": tmp_path / "logs"}
        options = {"teacher": teacher, "dataset": ragged, "batch_tokens": 100} | places | options
        launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
        profile = ["--config_file", "accelerate_configs/multi_node.yaml", "--num_processes", "2"]
        machine = ["--machine_rank", str(number), "--main_process_ip", ADDRESSES[0]]
        command = [*launcher, *profile, *machine, script, *(f"--{name}={value}" for name, value in options.items())]
        if number:  # mounts are a namespace's own as well
            command = ["sh", "-c", 'mount -t tmpfs none "$0" && exec "$@"', str(tmp_path / "disk"), *command]
        return subprocess.Popen(
            ["ip", "netns", "exec", NAMES[number], *command],
            cwd=ROOT,
            env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_DATASETS_CACHE": str(cache)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start_both(caches: list[Path], change: str = "", **options: Any) -> list[Run]:
        script = "generate.py"
        if change:
            script = str(tmp_path / "changed.py")
            begin = f"import sys\nsys.path.insert(0, {str(ROOT)!r})"
            Path(script).write_text(f"{begin}\n{change}\nfrom logitgen import generate\ngenerate.main()\n")
        return [start_one(number, cache, script, **options) for number, cache in enumerate(caches)]

    return start_both


@pytest.fixture
def expected(capture: Callable[..., Path], teacher: Path, ragged: Path, tmp_path: Path) -> bytes:
    """The file of one rank."""
    options = {"teacher": teacher, "dataset": ragged, "batch_tokens": 100, "log_dir": tmp_path / "logs_of_one"}
    return capture(output=tmp_path / "one.h5", **options).read_bytes()


def ended(run: Run) -> Ended:
    out, err = run.communicate(timeout=120)
    return subprocess.CompletedProcess(run.args, run.returncode, out, err)


def wait_until(condition: Callable[[], object], run: Run) -> None:
    deadline = time.monotonic() + 120
    while not condition() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition(), run.communicate(timeout=10) if run.poll() is not None else "still running"


def namespaces_of(run: Run) -> dict[int, int]:
    """The inode of the network namespace of every rank that a launcher has started."""
    return {rank: Path(f"/proc/{process.pid}/ns/net").stat().st_ino for rank, process in ranks_of(run).items()}


@pytest.mark.slow
def test_two_machines_write_the_same_bytes_over_a_slow_wire(
    start: Callable[..., list[Run]], wire: Wire, expected: bytes, tmp_path: Path
) -> None:
    """Ten packets in a thousand are lost, and each machine has a cache of its own."""
    wire.delay_seconds, wire.seconds_per_byte, wire.lost_share = 0.05, 8 / 20e6, 0.01
    caches = [tmp_path / "cache_0", tmp_path / "cache_1"]
    runs = start(caches)
    for number, run in enumerate(runs):
        wait_until(lambda run=run: ranks_of(run), run)
        assert namespaces_of(run) == {number: Path("/run/netns", NAMES[number]).stat().st_ino}
    results = [ended(run) for run in runs]
    assert [result.returncode for result in results] == [0, 0], results
    assert ranks_that_ran(tmp_path / "logs") == ["rank_0", "rank_1"]
    assert (tmp_path / "disk" / "folder" / "out.h5").read_bytes() == expected
    assert [len(list((cache / "logitgen").glob("*.arrow"))) for cache in caches] == [1, 1]
    assert wire.num_lost > 0


@pytest.mark.slow
def test_a_machine_that_is_cut_off_ends_the_run_on_both(
    start: Callable[..., list[Run]], wire: Wire, expected: bytes, tmp_path: Path
) -> None:
    """Both machines fill the same cache at the same time."""
    caches = [tmp_path / "cache"] * 2
    runs = start(caches, SLOW.format("time.sleep(0.4)"), rank_timeout=5)
    wait_until(lambda: len(ranks_that_ran(tmp_path / "logs")) == 2, runs[0])
    time.sleep(2)
    wire.is_cut = True
    leader, worker = (ended(run) for run in runs)
    assert (leader.returncode, worker.returncode) == (1, 1)
    assert len(error_lines(leader)) == len(error_lines(worker)) == 1
    assert re.match(
        "error: Rank 0: Rank 1 (made no progress for 5 s|ended without an error message)", error_lines(leader)[0]
    )
    assert error_lines(worker)[0].startswith("error: Rank 1: The leader")
    partial = tmp_path / "disk" / "folder" / "out.h5.partial"
    assert 0 < np.count_nonzero(LogitsFile(partial, partial=True).arrays["done"]) < 53
    wire.mend()
    assert [ended(run).returncode for run in start(caches)] == [0, 0]
    assert (tmp_path / "disk" / "folder" / "out.h5").read_bytes() == expected


@pytest.mark.slow
def test_a_machine_that_dies_while_the_leader_waits_without_limit_is_noticed(
    start: Callable[..., list[Run]], wire: Wire, tmp_path: Path
) -> None:
    """The second machine takes long to read the split, for which it has all the time it wants."""
    change = (
        "import os, time, logitgen.ranks.agree\nfrom logitgen import generate\n"
        "logitgen.ranks.agree.SILENT_SECONDS = 3.0\n"
        "load = generate.load_split\n"
        "def slow(config):\n"
        "    time.sleep(8 * int(os.environ['RANK']))\n"
        "    return load(config)\n"
        "generate.load_split = slow"
    )
    runs = start([tmp_path / "cache_0", tmp_path / "cache_1"], change)
    log = tmp_path / "logs" / "rank_1.log"
    wait_until(lambda: log.exists() and "Reading" in log.read_text(), runs[0])
    time.sleep(2)
    wire.is_cut = True
    leader, worker = (ended(run) for run in runs)
    assert len(error_lines(leader)) == len(error_lines(worker)) == 1
    assert error_lines(leader)[0].startswith("error: Rank 0: Another rank ended without an error message")
    assert error_lines(worker)[0].startswith("error: Rank 1: The leader's launcher is unreachable")
