"""Kill and stop runs at random and at delicate moments, and count what is lost.

    python tests/chaos.py --rounds 300 --launches 30

A round starts a run of one to three ranks, disturbs it, and then checks: the file opens or is cleanly absent, no row
marked done is wrong, no process is left, and the same command with another number of ranks finishes a copy of it to the
bytes of an undisturbed run. Before that, the cache of tokens may be damaged; or the teacher's configuration is changed,
with which the command has to be refused. The next round goes on with what this one left, so resumed runs are disturbed
too.

Most rounds fork their ranks from this process, which has imported everything, under a small launcher that does what
torch's does; the last `--launches` rounds start the real one, `accelerate launch`.
"""

import argparse
import json
import os
import pty
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import numpy as np
import psutil
import torch.distributed as dist
from conftest import ROOT, SENTENCES, launch_command, make_llama, make_tokenizer, save_teacher, write_jsonl
from rich.console import Console
from rich.table import Table

import logitgen.leader.writer
from logitgen import LogitsFile, generate
from logitgen.config import Config
from logitgen.file import header
from logitgen.file.layout import row_crc32
from logitgen.leader.progress import Progress
from logitgen.split.job import job_of
from logitgen.split.prefixes import neighbours
from logitgen.split.rows import Rows

messages = Console(stderr=True, width=160)

COMMIT_SECONDS = 0.1
BATCH_TOKENS = 200

LISTS = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
BATCH_SECONDS = 0.004
"""How long a forward pass takes at least, so that there is something to disturb."""
ENDS_WITHIN_SECONDS = 60

FOREIGN = b"Somebody else's file."

DELICATE = ("create", "known", "first rename", "fsync", "done", "last rename")
"""Moments at which the leader kills itself."""


@dataclass(frozen=True)
class Fault:
    """What happens to a run.

    Attributes:
        target: `leader`, `worker`, `launcher` or `nobody`; `terminal` or `file` for what is no process.
        action: Name of the signal; SIGSTOP is followed by SIGCONT. A terminal is closed, a file swapped for
            another one.
        moment: A time after the first forward pass in seconds, or one of `DELICATE` moments.
        count: The how-manieth such moment it is.
        then: What else happens before the run is taken up again: the `cache` is damaged, the `configuration` changed.
    """

    target: str
    action: str
    moment: float | str = 0.0
    count: int = 1
    then: str = ""

    @property
    def name(self) -> str:
        when = "at random" if isinstance(self.moment, float) else f"at {self.moment}"
        return f"{self.action} {self.target} {when}" + (f", other {self.then}" if self.then else "")


def draw_fault(chance: random.Random) -> Fault:
    if chance.random() < 0.45:
        moment = chance.choice(DELICATE)
        count = {"known": chance.randint(1, 20), "fsync": chance.randint(2, 9), "done": chance.randint(1, 60)}
        return Fault("leader", chance.choice(["SIGKILL", "SIGKILL", "SIGTERM", "SIGHUP"]), moment, count.get(moment, 1))
    moment = chance.uniform(0, 1.0)
    if chance.random() < 0.25:
        return chance.choice(
            [
                Fault("terminal", "close", moment),
                Fault("file", "swap", moment),
                Fault("leader", "SIGKILL", moment, then="cache"),
                Fault("leader", "SIGTERM", moment, then="configuration"),
            ]
        )
    target = chance.choice(["leader", "worker", "launcher"])
    action = chance.choice(["SIGKILL", "SIGTERM", "SIGHUP"] + ["SIGSTOP"] * (target != "launcher"))
    return Fault(target, action, moment)


def be_rank(fault: Fault, written: Path) -> None:
    """Run the main program, slowed down, with what it writes noted and a delicate moment armed."""
    logitgen.leader.writer.COMMIT_SECONDS = COMMIT_SECONDS
    compute, note = generate.capture_batch, Progress.written

    def slow(*arguments: Any) -> Any:
        time.sleep(BATCH_SECONDS)
        return compute(*arguments)

    def noted(self: Progress, batch: int, writer_seconds: float) -> None:
        note(self, batch, writer_seconds)
        with written.open("ab") as file:
            file.write(np.int64(batch).tobytes())

    generate.capture_batch, Progress.written = slow, noted  # type: ignore[method-assign]
    if os.environ.get("RANK", "0") == "0" and fault.moment in DELICATE:
        arm(fault)
    generate.main()


def arm(fault: Fault) -> None:
    left = fault.count

    def strike() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), getattr(signal, fault.action))

    def after(owner: Any, name: str, counts: Callable[..., bool] = lambda *_: True) -> None:
        before = getattr(owner, name)

        def wrapped(*arguments: Any) -> Any:
            result = before(*arguments)
            if counts(*arguments):
                strike()
            return result

        setattr(owner, name, wrapped)

    arrays = logitgen.leader.writer.Arrays
    match fault.moment:
        case "create":
            after(header, "create", lambda path, *_: path.suffix == ".new")
        case "known":
            after(arrays, "put")
        case "fsync":
            after(os, "fsync")
        case "done":
            after(arrays, "put_parts", lambda _, name, *__: name == "done")
        case "first rename":
            after(os, "replace", lambda old, new: str(new).endswith(".partial"))
        case "last rename":
            after(os, "replace", lambda old, new: str(new).endswith(".h5"))


class Forked:
    """A run whose ranks are forked from this process, under a launcher that does what torch's does."""

    def __init__(self, num_ranks: int, arguments: list[str], fault: Fault, written: Path, console: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self._pids = written.with_suffix(".pids")
        self._pids.unlink(missing_ok=True)
        self.launcher = os.fork()
        if self.launcher == 0:
            os.setsid()
            os.dup2(console, 1)
            os.dup2(console, 2)
            ranks = [self._fork_rank(rank, num_ranks, port, arguments, fault, written) for rank in range(num_ranks)]
            self._pids.with_suffix(".new").write_text(json.dumps(ranks))
            self._pids.with_suffix(".new").rename(self._pids)
            os._exit(self._watch(ranks, port))
        self.status: int | None = None

    @staticmethod
    def _fork_rank(rank: int, num_ranks: int, port: int, arguments: list[str], fault: Fault, written: Path) -> int:
        if pid := os.fork():
            return pid
        status = 70
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num_ranks)}
            os.environ |= {"LOCAL_WORLD_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "chaos"}
            sys.argv[1:] = arguments
            be_rank(fault, written)
            status = 0
        except SystemExit as ended:
            status = int(ended.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    @staticmethod
    def _watch(ranks: list[int], port: int) -> int:
        stopped = False

        def stop(*_: object) -> None:
            nonlocal stopped
            stopped = True

        signal.signal(signal.SIGTERM, stop)
        store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        alive, status = set(ranks), 0
        while alive and not status and not stopped:
            time.sleep(0.05)
            for pid in list(alive):
                found, how = os.waitpid(pid, os.WNOHANG)
                if found:
                    alive.discard(pid)
                    status = status or int(os.waitstatus_to_exitcode(how) != 0)
        for pid in alive:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 30
        for pid in alive:
            while not os.waitpid(pid, os.WNOHANG)[0]:
                time.sleep(0.02)
                if time.monotonic() > deadline:
                    os.kill(pid, signal.SIGKILL)
        del store
        return status or int(stopped)

    def poll(self) -> int | None:
        if self.status is None:
            found, how = os.waitpid(self.launcher, os.WNOHANG)
            if found:
                self.status = os.waitstatus_to_exitcode(how)
        return self.status

    def pid(self, target: str) -> int | None:
        if target == "launcher":
            return self.launcher
        ranks = json.loads(self._pids.read_text()) if self._pids.exists() else []
        return ranks[0 if target == "leader" else -1] if ranks else None

    def processes(self) -> list[int]:
        return [pid for pid in psutil.pids() if session_of(pid) == self.launcher and is_running(pid)]


class Launched:
    """A run started by `accelerate launch`."""

    def __init__(self, num_ranks: int, arguments: list[str], fault: Fault, written: Path, console: int) -> None:
        command = launch_command(num_ranks)
        script = command.index("generate.py")
        command[script:] = [__file__, "--as_rank", json.dumps([asdict(fault), str(written)]), *arguments]
        self._mark = f"chaos_{os.getpid()}_{time.monotonic_ns()}"
        self._run = subprocess.Popen(
            command, cwd=ROOT, stdout=console, stderr=console, env=os.environ | {"CHAOS": self._mark}
        )
        self.launcher = self._run.pid

    def poll(self) -> int | None:
        return self._run.poll()

    def pid(self, target: str) -> int | None:
        if target == "launcher":
            return self.launcher
        ranks = {}
        for pid in self.processes():
            try:
                environment = psutil.Process(pid).environ()
            except psutil.Error:
                continue
            if "RANK" in environment:
                ranks[int(environment["RANK"])] = pid
        return ranks.get(0 if target == "leader" else max(ranks, default=0))

    def processes(self) -> list[int]:
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("CHAOS") == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process.pid)
            except psutil.Error:
                continue
        return found


def session_of(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class Lab:
    """A folder with a teacher, a split, and the file of an undisturbed run."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder = folder
        self._chance = chance
        teacher = save_teacher(folder / "teacher", make_llama(), make_tokenizer())
        rows = [{"text": SENTENCES[index % 40][: 1 + 17 * index % 230]} for index in range(900)] + [{"text": ""}]
        data = write_jsonl(folder / "data.jsonl", rows)
        self._arguments = [f"--teacher={teacher}", f"--dataset={data}", f"--batch_tokens={BATCH_TOKENS}", "--top_k=16"]
        self.undisturbed = folder / "undisturbed.h5"
        status = self.run(Forked, self.undisturbed, Fault("nobody", "none"), num_ranks=1)
        if status != 0:
            raise SystemExit((folder / "undisturbed.log").read_text())
        self.expected = LogitsFile(self.undisturbed)
        self.bytes = self.undisturbed.read_bytes()
        tokens = [self.expected.row(row)["input_ids"].tolist() for row in range(len(self.expected))]
        config = Config(teacher="t", dataset="d", output="o")
        rows = Rows(datasets.Dataset.from_dict({"input_ids": tokens}, features=LISTS), config, max_length=None)
        self.plan = job_of(rows, self.expected.layout, BATCH_TOKENS, None, neighbours(rows)).plan
        assert len(self.plan.sharing)

    def run(self, kind: Any, output: Path, fault: Fault, num_ranks: int) -> int | None:
        """Run once, disturb it, wait for its end; returns the launcher's status, None if processes are left."""
        log_dir = output.with_suffix(".logs")
        shutil.rmtree(log_dir, ignore_errors=True)
        written = output.with_suffix(".written")
        written.unlink(missing_ok=True)
        arguments = [*self._arguments, f"--output={output}", f"--log_dir={log_dir}"]
        closed = threading.Event()
        log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        console = open_terminal(closed) if fault.target == "terminal" else log
        run = kind(num_ranks, arguments, fault, written, console)
        for descriptor in {console, log}:
            os.close(descriptor)
        if isinstance(fault.moment, float) and fault.target != "nobody":
            self._wait_for(run, fault.moment, log_dir / "rank_0.log")
            if fault.target == "terminal":
                closed.set()
            elif fault.target == "file":
                swap(Path(f"{output}.partial"))
            else:
                self._signal(run, fault)
        deadline = time.monotonic() + ENDS_WITHIN_SECONDS
        while (run.poll() is None or run.processes()) and time.monotonic() < deadline:
            time.sleep(0.02)
        left = run.processes()
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return None if left else run.poll()

    @staticmethod
    def _wait_for(run: Any, seconds: float, log: Path) -> None:
        """Wait until so long after the first forward pass, or until the run has ended."""
        deadline = time.monotonic() + ENDS_WITHIN_SECONDS
        while run.poll() is None and time.monotonic() < deadline:
            if log.exists() and "Capturing" in log.read_text():
                break
            time.sleep(0.01)
        time.sleep(seconds)

    def _signal(self, run: Any, fault: Fault) -> None:
        pid = run.pid(fault.target)
        if pid is None or run.poll() is not None:
            return
        try:
            os.kill(pid, getattr(signal, fault.action))
            if fault.action == "SIGSTOP":
                time.sleep(self._chance.uniform(0.3, 2))
                os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            pass

    def damage_cache(self) -> None:
        """Spoil the tokens that are kept between runs, as a power cut does."""
        for path in (self.folder / "cache" / "logitgen").glob("*.arrow"):
            content = bytearray(path.read_bytes())
            content[self._chance.randrange(len(content)) :] = b"\0" * self._chance.choice([0, 1, 5000])
            path.unlink()
            path.write_bytes(content)

    def accepts_another_teacher(self, copy: Path) -> bool:
        """Whether a run is taken up with a teacher that computes otherwise, or leaves a trace of having tried."""
        config, partial = self.folder / "teacher" / "config.json", Path(f"{copy}.partial")
        own, before = config.read_text(), partial.read_bytes()
        config.write_text(json.dumps(json.loads(own) | {"rms_norm_eps": 0.5}))
        status = self.run(Forked, copy, Fault("nobody", "none"), 2)
        config.write_text(own)
        return status != 1 or partial.read_bytes() != before

    def wrong_rows(self, left: Path) -> int:
        """Rows of a partial file that are marked done, and are not what they should be."""
        file = LogitsFile(left, partial=True)
        wrong = 0
        for row in np.flatnonzero(file.arrays["done"]):
            data, expected = file.row(row), self.expected.row(row)
            same = all(np.array_equal(data[name], values) for name, values in expected.items())
            checksum = row_crc32(row, file.arrays["source_row"][row], data.values())
            wrong += not same or checksum != file.arrays["crc32"][row]
        return wrong


def open_terminal(closed: threading.Event) -> int:
    """Open a terminal that somebody reads until it is closed; return the end for the programs."""
    ours, theirs = pty.openpty()

    def read() -> None:
        while not closed.is_set():
            if select.select([ours], [], [], 0.02)[0]:
                try:
                    os.read(ours, 65536)
                except OSError:  # all programs have ended
                    break
        os.close(ours)

    threading.Thread(target=read, daemon=True).start()
    return theirs


def swap(partial: Path) -> None:
    """Move a file away and put another one under its name."""
    if partial.exists():
        partial.rename(partial.with_suffix(".moved"))
        partial.write_bytes(FOREIGN)


def swap_back(partial: Path) -> bool:
    """Undo it; whether the other file is as it was."""
    moved = partial.with_suffix(".moved")
    if not moved.exists():
        return True
    untouched = partial.exists() and partial.read_bytes() == FOREIGN
    moved.rename(partial)
    return untouched


@dataclass
class Count:
    """What was found over all rounds with one kind of fault."""

    rounds: int = 0
    struck: int = 0
    unreadable: int = 0
    wrong_rows: int = 0
    left_processes: int = 0
    unfinished: int = 0
    other_bytes: int = 0
    batches_lost: int = 0

    @property
    def failures(self) -> int:
        return self.unreadable + self.wrong_rows + self.left_processes + self.unfinished + self.other_bytes


def play_round(lab: Lab, chance: random.Random, kind: Any, count: Count, fault: Fault) -> None:
    """Disturb a run, check what it left, finish a copy of it."""
    output = lab.folder / "out.h5"
    partial, copy = Path(f"{output}.partial"), lab.folder / "copy.h5"
    if output.exists() or chance.random() < 0.2:  # begin anew
        for path in lab.folder.glob("out.h5*"):
            path.unlink()
    done_before = done_rows(partial)
    count.rounds += 1
    status = lab.run(kind, output, fault, chance.randint(1 if fault.target != "worker" else 2, 3))
    count.struck += status != 0
    count.left_processes += status is None
    count.other_bytes += not swap_back(partial)
    for path in lab.folder.glob("copy.h5*"):
        path.unlink()
    if output.exists():
        shutil.copy(output, copy)
    elif partial.exists():
        try:
            count.wrong_rows += lab.wrong_rows(partial)
            written = output.with_suffix(".written")
            num_written = len(written.read_bytes()) // 8 if written.exists() else 0
            lost = num_written - batches_between(lab, done_before, done_rows(partial))
            count.batches_lost = max(count.batches_lost, lost)
        except Exception as error:
            messages.print(f"{fault}: {error}")
            count.unreadable += 1
        shutil.copy(partial, f"{copy}.partial")
        if fault.then == "configuration":
            count.other_bytes += lab.accepts_another_teacher(copy)
    if fault.then == "cache":
        lab.damage_cache()
    count.unfinished += lab.run(Forked, copy, Fault("nobody", "none"), chance.randint(1, 3)) != 0
    count.other_bytes += not copy.exists() or copy.read_bytes() != lab.bytes


def done_rows(partial: Path) -> np.ndarray:
    return np.array(LogitsFile(partial, partial=True).arrays["done"]) if partial.exists() else np.empty(0, "u1")


def batches_between(lab: Lab, before: np.ndarray, after: np.ndarray) -> int:
    """Batches that were committed: those with a row that was not done before and is done now."""
    if len(before) == 0:
        before = np.zeros_like(after)
    return len(lab.plan.pending(before == 1)) - len(lab.plan.pending(after == 1))


def table(counts: dict[str, Count], seconds: float) -> Table:
    drawn = Table(title=f"{sum(count.rounds for count in counts.values())} rounds in {seconds:,.0f} s", box=None)
    drawn.add_column("fault")
    names = list(asdict(Count()))
    for name in names:
        drawn.add_column(name.replace("_", " "), justify="right")
    total = Counter[str]()
    for fault, count in sorted(counts.items()):
        drawn.add_row(fault, *map(str, asdict(count).values()))
        total.update(asdict(count))
    total["batches_lost"] = max(count.batches_lost for count in counts.values())
    drawn.add_row("all", *(str(total[name]) for name in names), style="bold")
    return drawn


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--launches", type=int, default=30, help="rounds with the real launcher")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    counts: dict[str, Count] = {}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = str(Path(folder) / "cache")
        lab = Lab(Path(folder), chance)
        for number in range(options.rounds + options.launches):
            kind = Forked if number < options.rounds else Launched
            fault = draw_fault(chance)
            count = counts.setdefault(fault.name, Count())
            play_round(lab, chance, kind, count, fault)
            if count.failures:
                messages.print(f"round {number}: {kind.__name__} {fault} {count}")
                messages.print((lab.folder / "out.log").read_text()[-3000:], markup=False)
    Console(width=160).print(table(counts, time.monotonic() - start))
    return int(any(count.failures for count in counts.values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--as_rank"]:
        fault, written = json.loads(sys.argv[2])
        del sys.argv[1:3]
        be_rank(Fault(**fault), Path(written))
    else:
        sys.exit(main())
