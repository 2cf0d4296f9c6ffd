"""A power cut at any moment: every state the disk can be in is made, opened and resumed.

The system calls of a real run are recorded. What had been written before a sync began that has ended is on the disk;
of what had not, each write may be there, missing or torn, and a rename may have happened or not.
"""

import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import ROOT, SENTENCES, write_jsonl

from logitgen import LogitsFile, generate
from logitgen.leader.output import Output
from logitgen.leader.places import write_known
from logitgen.leader.status import Watch
from logitgen.leader.writer import Writer
from logitgen.ranks.agree import Ranks

SECTOR = 512
NUM_STATES = 600
CALLS = "openat,lseek,write,pwrite64,ftruncate,fallocate,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat"

pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")


@dataclass
class Call:
    """A system call on the output: its name, the file's number, and where it wrote what."""

    name: str
    inode: int = 0
    offset: int = 0
    data: bytes = b""
    names: tuple[str, ...] = ()


def system_calls(folder: Path, arguments: list[str]) -> list[Call]:
    """Run the main program on one rank, and return its system calls on files of a folder."""
    script = folder / "run.py"
    change = (
        "from logitgen import generate\nfrom logitgen.leader import writer\n"
        "writer.COMMIT_SECONDS = 0.0\ngenerate.main()\n"
    )
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{change}")
    log = folder / "strace.log"
    tracer = ["strace", "-f", "-qq", "-y", "-xx", "-s", "10000000", "-e", f"trace={CALLS}", "-o", str(log)]
    command = [*tracer, sys.executable, str(script), *arguments]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    if "ptrace" in ended.stderr:
        pytest.skip("strace may not trace here")
    assert ended.returncode == 0, ended.stderr
    return list(calls_on(folder / "out", joined_lines(log)))


def joined_lines(log: Path) -> Iterator[str]:
    """Lines of a trace, calls that another thread's interrupted put together again; of a sync also where it began."""
    begun: dict[str, str] = {}
    for line in log.read_text().splitlines():
        thread, text = line.split(maxsplit=1)
        if text.endswith("<unfinished ...>"):
            begun[thread] = text.removesuffix("<unfinished ...>").rstrip()
            if text.startswith("fsync"):
                yield begun[thread].replace("fsync", "begin") + ") = 0"
        elif resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", text):
            yield begun.pop(thread) + resumed[1]
        else:
            yield text


def decoded(text: str) -> bytes:
    """What strace writes as \\xNN for every byte."""
    return bytes.fromhex(text.replace("\\x", ""))


def calls_on(folder: Path, lines: Iterator[str]) -> Iterator[Call]:
    """Understand the calls on files of a folder; a file keeps its number when it is renamed."""
    inodes: dict[str, int] = {}
    opened: dict[str, int] = {}  # by descriptor; the folder itself has number 0
    offsets: dict[str, int] = {}
    for line in lines:
        call = re.match(r"(\w+)\((?:(\d+)<[^>]*>, |(\d+)<[^>]*>)?(.*)\)\s+= (\d+)(?:<(.*)>)?", line)
        if not call:
            continue
        name, descriptor, arguments, result = call[1], call[2] or call[3], call[4], int(call[5])
        texts = [decoded(text) for text in re.findall(r'"([^"]*)"', arguments)]
        if name == "openat":
            path = Path(os.fsdecode(decoded(call[6])))
            opened.pop(call[5], None)
            if path == folder:
                opened[call[5]] = 0
            elif path.parent == folder and "O_TMPFILE" not in arguments:
                if path.name not in inodes:
                    inodes[path.name] = 1 + max(inodes.values(), default=0)
                    yield Call("create", inodes[path.name], names=(path.name,))
                opened[call[5]], offsets[call[5]] = inodes[path.name], 0
        elif name.startswith(("rename", "unlink")):
            paths = [Path(os.fsdecode(text)) for text in texts]
            names = tuple(path.name for path in paths if path.parent == folder)
            if len(names) == 2:
                inodes[names[1]] = inodes.pop(names[0])
            if names:
                yield Call(name[:6], names=names)
        elif descriptor in opened:
            inode = opened[descriptor]
            if name == "lseek":
                offsets[descriptor] = result
            elif name == "write":
                yield Call("write", inode, offsets[descriptor], texts[0][:result])
                offsets[descriptor] += result
            elif name == "pwrite64":
                yield Call("write", inode, int(arguments.rsplit(",", 1)[1]), texts[0][:result])
            elif name in ("ftruncate", "fallocate"):
                size = int(arguments.rsplit(",", 1)[-1])
                yield Call("cut" if name == "ftruncate" else "size", inode, size)
            else:
                yield Call("begin" if name == "begin" else "sync", inode)


@dataclass
class Disk:
    """What is on a disk: files by number, and their names."""

    files: dict[int, bytearray] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)

    def do(self, call: Call, torn: random.Random | None = None) -> None:
        if call.name == "create":
            self.names[call.names[0]] = call.inode
            self.files.setdefault(call.inode, bytearray())
        elif call.name == "rename":
            self.names[call.names[1]] = self.names.pop(call.names[0])
        elif call.name == "unlink":
            self.names.pop(call.names[0], None)
        elif call.name in ("size", "cut"):
            self._grow(call.inode, call.offset)
            if call.name == "cut":
                del self.files[call.inode][call.offset :]
        elif call.name == "write":
            self._grow(call.inode, call.offset + len(call.data))
            for start, end in sectors(call.offset, len(call.data)):
                if torn is None or torn.random() < 0.5:
                    piece = call.data[start - call.offset : end - call.offset]
                    self.files[call.inode][start:end] = piece

    def _grow(self, inode: int, size: int) -> None:
        self.files[inode].extend(bytes(max(0, size - len(self.files[inode]))))

    def write_to(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, inode in self.names.items():
            (folder / name).write_bytes(self.files[inode])


def sectors(offset: int, size: int) -> Iterator[tuple[int, int]]:
    """Pieces of a write that a disk writes whole."""
    start = offset
    while start < offset + size:
        end = min(offset + size, (start // SECTOR + 1) * SECTOR)
        yield start, end
        start = end


def disk_after(calls: list[Call], cut: int, chance: random.Random) -> Disk:
    """A state of the disk after a power cut behind so many calls."""
    begun: dict[int, int] = {}
    last_sync: dict[int, int] = {}
    for index, call in enumerate(calls[:cut]):
        if call.name == "begin":
            begun[call.inode] = index
        elif call.name == "sync":
            last_sync[call.inode] = begun.pop(call.inode, index)
    fate = chance.choice(["all", "none", "some", "torn"])
    names_kept = chance.random() < 0.5
    disk = Disk()
    for index, call in enumerate(calls[:cut]):
        of_folder = call.name in ("rename", "unlink")
        if call.name in ("create", "size") or index < last_sync.get(0 if of_folder else call.inode, -1):
            disk.do(call)
        elif of_folder:
            if names_kept:
                disk.do(call)
        elif fate != "none" and (fate != "some" or chance.random() < 0.5):
            disk.do(call, torn=chance if fate == "torn" else None)
    return disk


@dataclass
class Run:
    """A recorded run: its calls, its file, and what is needed to do the rest of it without a teacher."""

    calls: list[Call]
    complete: LogitsFile
    claim: dict[str, Any]
    payloads: dict[int, np.ndarray]

    def resume(self, path: Path) -> int:
        """Do what is missing; returns how many batches that were."""
        output = Output(path, overwrite=False)
        output.claim()
        output.check(self.claim["attributes"])
        if output.is_complete():
            output.complete()
            return 0
        job = self.claim["job"]
        known = partial(write_known, layout=job.layout, rows=job.rows)
        header = output.create(job.layout, self.claim["attributes"], known)
        done = output.done()
        pending = job.plan.pending(done)
        with Writer(output.partial, header, job, done) as writer:
            for batch in pending:
                writer.submit(int(batch), self.payloads[int(batch)])
            writer.finish()
        output.complete()
        return len(pending)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, teacher: Path) -> Run:
    """Record a run under strace, and the same run in this process with what went into its writer."""
    folder = tmp_path_factory.mktemp("powercut")
    (folder / "out").mkdir()
    texts = [SENTENCES[index][: 1 + 13 * index % 90] for index in range(24)] + [""]
    data = write_jsonl(folder / "data.jsonl", [{"text": text} for text in texts])
    options = {"teacher": teacher, "dataset": data, "batch_tokens": 64, "top_k": 8, "log_dir": folder / "logs"}
    words = [f"--{name}={value}" for name, value in options.items()]
    calls = system_calls(folder, [*words, f"--output={folder / 'out' / 'out.h5'}"])
    claim: dict[str, Any] = {}
    payloads: dict[int, np.ndarray] = {}

    class Recorder(Writer):
        def __init__(self, path: Path, header: Any, job: Any, *others: Any) -> None:
            claim.update(job=job)
            super().__init__(path, header, job, *others)

        def submit(self, batch: int, payload: np.ndarray) -> Any:
            payloads[int(batch)] = payload.copy()
            return super().submit(batch, payload)

    class Claimed(Output):
        def create(self, layout: Any, attributes: Any, known: Callable[..., None]) -> Any:
            claim.update(attributes=attributes)
            return super().create(layout, attributes, known)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "Writer", Recorder)
        patch.setattr(generate, "Output", Claimed)
        generate.capture(Ranks([]), [*words, f"--output={folder / 'again.h5'}"])
    again = (folder / "again.h5").read_bytes()
    assert again == (folder / "out" / "out.h5").read_bytes()
    return Run(calls, LogitsFile(folder / "again.h5"), claim, payloads)


def test_the_record_is_the_whole_run(run: Run) -> None:
    """All calls together make the file, so none was missed."""
    disk = Disk()
    for call in run.calls:
        disk.do(call)
    assert list(disk.names) == ["out.h5"]
    assert disk.files[disk.names["out.h5"]] == run.complete.path.read_bytes()
    assert len([call for call in run.calls if call.name == "sync"]) > 10


def test_rows_are_on_the_disk_before_they_are_marked_done(run: Run) -> None:
    with h5py.File(run.complete.path) as file:
        first_positions = file["position_offsets"][()]
        places = {name: (item.id.get_offset(), item.nbytes, item.nbytes // len(item)) for name, item in file.items()}

    def written(call: Call) -> tuple[str, int]:
        """The dataset in which a call wrote, and the row."""
        for name, (start, num_bytes, entry_bytes) in places.items():
            if start <= call.offset < start + num_bytes:
                entry = (call.offset - start) // entry_bytes
                of_row = name in ("done", "crc32")
                return name, entry if of_row else int(np.searchsorted(first_positions, entry, "right")) - 1
        return "status", -1

    unsynced: set[int] = set()
    syncing: set[int] | None = None
    num_flags = 0
    for call in run.calls[next(index for index, call in enumerate(run.calls) if call.name == "rename") :]:
        if call.name == "begin":
            syncing, unsynced = unsynced, set()
        elif call.name == "sync" and syncing is None:
            unsynced = set()
        elif call.name == "sync":
            syncing = None
        elif call.name == "write":
            name, row = written(call)
            if name == "done":
                assert row not in unsynced | (syncing or set())
                num_flags += 1
            elif name != "status":
                unsynced.add(row)
    assert num_flags >= len(run.payloads)


def test_every_state_after_a_power_cut_is_opened_and_resumed_right(run: Run, tmp_path: Path) -> None:
    chance = random.Random(0)
    expected = run.complete.path.read_bytes()
    resumed = []
    for number in range(NUM_STATES):
        cut = number * (len(run.calls) + 1) // NUM_STATES
        disk_after(run.calls, cut, chance).write_to(tmp_path / "out")
        path = tmp_path / "out" / "out.h5"
        if path.exists():
            assert path.read_bytes() == expected, f"cut {cut}"
        if (left := path.with_name("out.h5.partial")).exists():
            file = LogitsFile(left, partial=True)
            assert Watch(path).look().num_done == np.count_nonzero(file.arrays["done"])
            for row in np.flatnonzero(file.arrays["done"]):
                for name, values in run.complete.row(row).items():
                    np.testing.assert_array_equal(file.row(row)[name], values, err_msg=f"cut {cut}, row {row}")
        resumed.append(run.resume(path))
        assert path.read_bytes() == expected, f"cut {cut}"
        assert os.listdir(tmp_path / "out") == ["out.h5"], f"cut {cut}"  # noqa: PTH208
    assert 0 in resumed
    assert len(run.payloads) in resumed
    assert len(set(resumed)) > len(run.payloads) / 2
