"""The writer, its files read back by h5py alone and its order of work recorded below it."""

import errno
import logging
import os
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import h5py
import numpy as np
import pytest
from files import plain_attributes
from hypothesis import given, settings
from hypothesis import strategies as st

from logitgen import CaptureError
from logitgen.config import Config
from logitgen.file import header
from logitgen.file.header import Header
from logitgen.file.layout import Layout
from logitgen.leader import writer
from logitgen.leader.places import write_known
from logitgen.leader.writer import Writer
from logitgen.split import rows
from logitgen.split.plan import Plan
from logitgen.split.rows import Rows

FEATURES = datasets.Features(
    input_ids=datasets.List(datasets.Value("int32")), completion_mask=datasets.List(datasets.Value("uint8"))
)


@dataclass
class Job:
    """What a writer is given, and what must be in the file afterwards."""

    rows: Rows
    plan: Plan
    layout: Layout
    expected: dict[str, np.ndarray]
    payloads: list[np.ndarray]

    def create(self, path: Path) -> Header:
        """Make the file, as a run does before its first forward pass."""
        sizes = {"capture": self.layout.capture, "top_k": self.layout.top_k, "vocab_size": self.layout.vocab_size}
        places = header.create(path, self.layout, plain_attributes(**sizes))
        with open(path, "r+b", buffering=0) as file:
            write_known(file, places, self.layout, self.rows)
        return Header({}, self.layout, places)

    def writer(self, path: Path, done: np.ndarray | None = None, **options: Any) -> Writer:
        """Start a writer, on a file that is made first unless it is there."""
        found = header.read(path) if path.exists() else self.create(path)
        if done is None:
            done = np.fromfile(path, "u1", self.layout.num_rows, offset=found.places["done"]) == 1
        return Writer(path, found, self, done, **options)

    def write(self, path: Path, order: Sequence[int] | None = None) -> Path:
        with self.writer(path) as made:
            futures = [made.submit(batch, self.payloads[batch]) for batch in order or range(self.plan.num_batches)]
            made.finish()
        assert all(future.result() is None for future in futures)
        return path


def make_job(
    ids: list[list[int]],
    masks: list[list[int]] | None = None,
    *,
    capture: Any = "topk",
    vocab_size: int = 10,
    top_k: int = 2,
    batch_tokens: int = 4,
    seed: int = 0,
) -> Job:
    """Make up rows and values, laid out by hand as the format's description says."""
    split = datasets.Dataset.from_dict(
        {"input_ids": ids, "completion_mask": masks or [[]] * len(ids)}, features=FEATURES
    )
    config = Config(teacher="t", dataset="d", output="o", completion_only=masks is not None)
    rows = Rows(split, config, None)
    plan = Plan(rows.forward_lengths, batch_tokens)
    positions = [
        [index for index in range(len(row) - 1) if masks is None or masks[number][index + 1]]
        for number, row in enumerate(ids)
    ]
    counts = [len(found) for found in positions]
    total = sum(counts)
    generator = np.random.default_rng(seed)
    id_dtype = "<u2" if vocab_size <= 65_536 else "<u4"
    captured = {
        "logsumexp": generator.normal(size=total).astype("<f4"),
        "target_logprob": -generator.random(total).astype("<f4"),
    }
    if capture == "full":
        captured["logits"] = generator.normal(size=(total, vocab_size)).astype("<f2")
    else:
        captured["kept_ids"] = generator.integers(vocab_size, size=(total, top_k)).astype(id_dtype)
        captured["kept_logprobs"] = -generator.random((total, top_k)).astype("<f2")
    ends = np.cumsum(counts)
    spans = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
    expected = {
        "done": np.ones(len(ids), "u1"),
        "crc32": generator.integers(2**32, size=len(ids), dtype="<u4"),
        "source_row": np.arange(len(ids), dtype="<i8"),
        "offsets": np.cumsum([0, *map(len, ids)], dtype="<i8"),
        "position_offsets": np.cumsum([0, *counts], dtype="<i8"),
        "input_ids": np.array([token for row in ids for token in row], id_dtype),
        "positions": np.array([position for found in positions for position in found], "<i4"),
        **captured,
    }
    for row in np.flatnonzero(np.array(counts) == 0):  # what no payload carries is known beforehand
        expected["crc32"][row] = zlib.crc32(np.array([row, row]).tobytes() + np.array(ids[row], id_dtype).tobytes())
    payloads = [
        np.concatenate(
            [expected["crc32"][batch_rows].view("u1")]
            + [np.concatenate([values[spans[row]].reshape(-1).view("u1") for row in batch_rows])
               for values in captured.values()]
        )
        for batch_rows in map(plan.rows, range(plan.num_batches))
    ]  # fmt: skip
    layout = Layout(
        capture=capture,
        num_rows=len(ids),
        num_tokens=sum(map(len, ids)),
        num_positions=total,
        vocab_size=vocab_size,
        top_k=0 if capture == "full" else top_k,
    )
    return Job(rows, plan, layout, expected, payloads)


@pytest.fixture
def job() -> Job:
    """Five rows in three batches: row 2, rows 0 and 4, row 3; row 1 has no position."""
    return make_job([[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 0], [2, 2, 2]])


def assert_file_holds(path: Path, expected: dict[str, np.ndarray]) -> None:
    with h5py.File(path, "r") as file:
        assert set(file) == set(expected)
        for name, values in expected.items():
            assert file[name].dtype == values.dtype, name
            np.testing.assert_array_equal(file[name][()], values, err_msg=name)


@st.composite
def jobs(draw: st.DrawFn) -> Job:
    lengths = draw(st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(lambda drawn: max(drawn) > 1))
    vocab_size = draw(st.sampled_from([1, 7, 65_536, 65_537, 200_000]))
    ids = [draw(st.lists(st.integers(0, vocab_size - 1), min_size=size, max_size=size)) for size in lengths]
    masks = None
    if draw(st.booleans()):
        masks = [draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)) for size in lengths]
        masks[lengths.index(max(lengths))][-1] = 1  # a split without any position is refused
    return make_job(
        ids,
        masks,
        capture="full" if vocab_size < 10 and draw(st.booleans()) else "topk",
        vocab_size=vocab_size,
        top_k=draw(st.integers(1, min(5, vocab_size))),
        batch_tokens=draw(st.integers(1, 30)),
        seed=draw(st.integers(0, 99)),
    )


@settings(deadline=None, max_examples=60)
@given(jobs(), st.data())
def test_what_is_written_in_any_order_is_read_back_by_plain_h5py(job: Job, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(job.plan.num_batches)))
    with tempfile.TemporaryDirectory() as folder:
        assert_file_holds(job.write(Path(folder) / "out.h5", order), job.expected)


def test_the_order_of_the_batches_leaves_no_trace_in_the_file(job: Job, tmp_path: Path) -> None:
    first = job.write(tmp_path / "first.h5", [0, 1, 2]).read_bytes()
    assert job.write(tmp_path / "second.h5", [2, 0, 1]).read_bytes() == first


def flags(path: Path) -> list[int]:
    with h5py.File(path, "r", locking=False) as file:
        return [int(flag) for flag in file["done"][()]]


# What is known before the first forward pass.


@settings(deadline=None, max_examples=40)
@given(jobs())
def test_all_that_is_known_is_written_before_the_first_forward_pass(job: Job) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.h5"
        job.create(path)
        empty = np.diff(job.expected["position_offsets"]) == 0
        with h5py.File(path, "r") as file:
            assert file["done"][()].tolist() == empty.tolist()
            assert file["crc32"][()][empty].tolist() == job.expected["crc32"][empty].tolist()
            for name in ("source_row", "offsets", "position_offsets", "input_ids", "positions"):
                np.testing.assert_array_equal(file[name][()], job.expected[name], err_msg=name)


@pytest.mark.parametrize("block_tokens", [1, 3, 4, 1000])
def test_tokens_are_written_in_blocks_of_any_size(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_tokens: int
) -> None:
    monkeypatch.setattr(rows, "_BLOCK_TOKENS", block_tokens)
    assert_file_holds(job.write(tmp_path / "out.h5"), job.expected)


def test_the_head_is_the_same_after_the_last_row_as_before_the_first(job: Job, tmp_path: Path) -> None:
    places = job.create(tmp_path / "out.h5").places
    before = (tmp_path / "out.h5").read_bytes()
    after = job.write(tmp_path / "out.h5").read_bytes()
    assert after[: places["done"]] == before[: places["done"]]
    assert len(after) == len(before)


# Resuming.


def test_an_unfinished_file_opens_and_says_what_is_done(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "COMMIT_SECONDS", -1.0)
    made = job.writer(tmp_path / "out.h5")
    made.submit(1, job.payloads[1]).result()
    wait_for(lambda: sum(flags(tmp_path / "out.h5")) > 1)
    with h5py.File(tmp_path / "out.h5", "r", locking=False) as file:
        done = file["done"][()].astype(bool)
        positions = np.repeat(done, np.diff(job.expected["position_offsets"]))
        assert np.flatnonzero(done).tolist() == [0, 1, 4]  # row 1 needs no forward pass
        assert file["crc32"][done].tolist() == job.expected["crc32"][done].tolist()
        for name in ("logsumexp", "kept_ids", "kept_logprobs"):
            np.testing.assert_array_equal(file[name][()][positions], job.expected[name][positions])


@settings(deadline=None, max_examples=40)
@given(jobs(), st.data())
def test_a_run_in_two_parts_ends_with_the_file_of_a_run_in_one(job: Job, data: st.DataObject) -> None:
    batches = list(range(job.plan.num_batches))
    first = data.draw(st.lists(st.sampled_from(batches), unique=True))
    with tempfile.TemporaryDirectory() as folder:
        path, whole = Path(folder) / "out.h5", job.write(Path(folder) / "whole.h5")
        stop(job.writer(path), job, first)
        second = job.plan.pending(np.array(flags(path), bool)).tolist()
        assert second == [batch for batch in batches if batch not in first]
        made = job.writer(path)
        for batch in second:
            made.submit(batch, job.payloads[batch])
        made.finish()
        assert path.read_bytes() == whole.read_bytes()


def stop(made: Writer, job: Job, batches: Sequence[int], error: type[BaseException] = ZeroDivisionError) -> None:
    """Have some batches written, and end as a run does that fails."""

    def run() -> None:
        with made:
            for batch in batches:
                made.submit(batch, job.payloads[batch])
            raise error

    with pytest.raises(error):
        run()


def test_a_row_that_is_done_is_never_written_again(job: Job, tmp_path: Path, disk: "Disk") -> None:
    path = tmp_path / "out.h5"
    stop(job.writer(path), job, [1])
    with h5py.File(path, "r+") as file:
        places = {name: file[name].id.get_offset() for name in file}
        file["done"][4] = 0  # the other row of the batch stays done
    payload = job.payloads[1].copy()
    payload[:] = 7  # as if the teacher had changed its mind
    disk.events.clear()
    made = job.writer(path)
    made.submit(1, payload).result()
    made.submit(0, job.payloads[0])
    made.submit(2, job.payloads[2])
    made.finish()
    writes = [(place, end) for kind, place, end in disk.events if kind == "write"]
    assert (places["crc32"] + 4 * 4, places["crc32"] + 4 * 5) in writes
    for start, end in ((places["crc32"], places["crc32"] + 4), (places["done"], places["done"] + 2)):
        assert not any(place < end and start < until for place, until in writes)
    positions = job.expected["position_offsets"]
    with h5py.File(path, "r") as file:
        assert file["crc32"][()].tolist() == [*job.expected["crc32"][:4].tolist(), 0x07070707]
        expected = job.expected["logsumexp"].copy()
        expected[positions[4] : positions[5]] = np.frombuffer(b"\7\7\7\7", "<f4")
        np.testing.assert_array_equal(file["logsumexp"][()], expected)
        assert file["done"][()].tolist() == [1] * 5


def test_a_writer_leaves_a_file_alone_in_which_all_is_done(job: Job, tmp_path: Path) -> None:
    path = job.write(tmp_path / "out.h5")
    content = path.read_bytes()
    job.writer(path).finish()
    assert path.read_bytes() == content


# Bookkeeping.


def test_every_batch_is_reported_once_it_is_written(job: Job, tmp_path: Path) -> None:
    reported = []

    def report(batch: int, busy_seconds: float) -> None:
        row = job.plan.rows(batch)[0]
        with h5py.File(tmp_path / "out.h5", "r", locking=False) as file:
            at = job.expected["position_offsets"][row]
            reported.append((batch, file["logsumexp"][at] == job.expected["logsumexp"][at]))

    made = job.writer(tmp_path / "out.h5", on_written=report)
    for batch in (2, 0, 1):
        made.submit(batch, job.payloads[batch])
    made.finish()
    assert reported == [(2, True), (0, True), (1, True)]


@pytest.mark.parametrize(
    ("commit_seconds", "expected"),
    [
        # A row's checksum and four values are five writes of 2 s, so batches of one, one and two rows take 10, 10, 20.
        (1e9, [10, 20, 40]),
        # A sync that is waited for before the next one begins, and a write for the row that is done: 102 s.
        (-1.0, [10, 20, 142]),
    ],
    ids=["synced at the end", "synced after every batch"],
)
def test_the_writer_says_how_long_writing_and_syncing_have_taken(
    job: Job,
    tmp_path: Path,
    disk: "Disk",
    monkeypatch: pytest.MonkeyPatch,
    commit_seconds: float,
    expected: list[int],
) -> None:
    job.create(tmp_path / "out.h5")
    disk.events.clear()
    reported: list[float] = []

    class Later(ThreadPoolExecutor):
        """Does nothing before somebody waits for it."""

        def submit(self, work: Any, *arguments: Any) -> Any:
            return SimpleNamespace(result=partial(work, *arguments), add_done_callback=lambda _: None)

    def now() -> float:
        """Time that passes only while the disk works, and 1,000 s after every report."""
        seconds = {"write": 2.0, "fsync": 100.0, "synced": 0.0}
        return sum(seconds[kind] for kind, _, _ in disk.events) + 1000.0 * len(reported)

    monkeypatch.setattr(writer, "ThreadPoolExecutor", Later)
    monkeypatch.setattr(writer, "COMMIT_SECONDS", commit_seconds)
    monkeypatch.setattr(writer, "time", SimpleNamespace(monotonic=now))
    made = job.writer(tmp_path / "out.h5", on_written=lambda batch, seconds: reported.append(seconds))
    for batch in (2, 0, 1):
        made.submit(batch, job.payloads[batch])
    made.finish()
    assert reported == expected


def test_a_missing_batch_is_reported_and_the_rest_is_kept(job: Job, tmp_path: Path) -> None:
    made = job.writer(tmp_path / "out.h5")
    made.submit(0, job.payloads[0])
    made.submit(2, job.payloads[2])
    with pytest.raises(CaptureError, match=r"2 rows are missing and 0 are duplicates\. .* in .*out\.h5\.$"):
        made.finish()
    assert flags(tmp_path / "out.h5") == [0, 1, 1, 1, 0]


def test_a_batch_written_twice_is_reported(job: Job, tmp_path: Path) -> None:
    made = job.writer(tmp_path / "out.h5")
    for batch in (0, 1, 2, 1):
        made.submit(batch, job.payloads[batch])
    with pytest.raises(CaptureError, match=r"0 rows are missing and 2 are duplicates\. .* in .*out\.h5\.$"):
        made.finish()
    assert made.num_duplicates == 2


def test_a_batch_that_is_done_already_counts_as_written_once(job: Job, tmp_path: Path) -> None:
    stop(job.writer(tmp_path / "out.h5"), job, [0])
    made = job.writer(tmp_path / "out.h5")
    for batch in (0, 1, 2):
        made.submit(batch, job.payloads[batch])
    made.finish()
    assert made.num_duplicates == 0
    assert_file_holds(tmp_path / "out.h5", job.expected)


# The order of work.


class Disk:
    """Stands between the writer and the disk: records the order of work, fails on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int, int]] = []
        self.write_error: OSError | None = None
        self.fsync_error: OSError | None = None
        self.most_bytes: int | None = None
        pwrite, fsync = os.pwrite, os.fsync

        def record_pwrite(descriptor: int, data: Any, place: int) -> int:
            if self.write_error is not None:
                raise self.write_error
            written = pwrite(descriptor, data[: self.most_bytes], place)
            self.events.append(("write", place, place + written))
            return written

        def record_fsync(descriptor: int) -> None:
            if self.fsync_error is not None:
                raise self.fsync_error
            self.events.append(("fsync", 0, 0))
            fsync(descriptor)
            self.events.append(("synced", 0, 0))

        monkeypatch.setattr(os, "pwrite", record_pwrite)
        monkeypatch.setattr(os, "fsync", record_fsync)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("commit_seconds", [-1.0, 1e9])
def test_data_is_on_the_disk_before_rows_are_called_done(
    job: Job, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, commit_seconds: float
) -> None:
    monkeypatch.setattr(writer, "COMMIT_SECONDS", commit_seconds)
    job.create(tmp_path / "out.h5")
    disk.events.clear()
    path = job.write(tmp_path / "out.h5")
    with h5py.File(path, "r") as file:
        places = {name: file[name].id.get_offset() for name in file}
    flagged = {place - places["done"]: at for at, (kind, place, _) in enumerate(disk.events)
               if kind == "write" and places["done"] <= place < places["done"] + 5}  # fmt: skip
    assert sorted(flagged) == [0, 2, 3, 4]  # row 1 was done before
    offsets = job.expected["position_offsets"]
    for row, at in flagged.items():
        starts = {places["crc32"] + 4 * row}
        for name, size in (("logsumexp", 4), ("target_logprob", 4), ("kept_ids", 4), ("kept_logprobs", 4)):
            starts.add(places[name] + size * int(offsets[row]))
        data = [index for index, (kind, place, _) in enumerate(disk.events) if kind == "write" and place in starts]
        assert len(data) == len(starts) == 5
        begun = disk.events.index(("fsync", 0, 0), max(data))  # what is written while a sync runs may not be in it
        assert ("synced", 0, 0) in disk.events[begun:at]
    assert disk.events[-2:] == [("fsync", 0, 0), ("synced", 0, 0)]  # flags too are on the disk in the end
    num_fsyncs = disk.events.count(("fsync", 0, 0))
    assert num_fsyncs == 2 if commit_seconds > 0 else num_fsyncs >= 4


def test_nothing_is_called_done_between_two_commits(job: Job, tmp_path: Path) -> None:
    made = job.writer(tmp_path / "out.h5")
    for batch in (0, 1, 2):
        made.submit(batch, job.payloads[batch]).result()
    assert flags(tmp_path / "out.h5") == [0, 1, 0, 0, 0]
    made.finish()
    assert flags(tmp_path / "out.h5") == [1, 1, 1, 1, 1]


def wait_for(met: Any) -> None:
    end = time.monotonic() + 10
    while not met():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_rows_become_durable_by_themselves_though_no_further_batch_comes(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.1)
    made = job.writer(tmp_path / "out.h5")
    made.submit(0, job.payloads[0]).result()
    wait_for(lambda: flags(tmp_path / "out.h5") == [0, 1, 1, 0, 0])
    made.submit(2, job.payloads[2]).result()  # and again after a pause
    wait_for(lambda: flags(tmp_path / "out.h5") == [0, 1, 1, 1, 0])


def test_rows_become_durable_once_there_are_many_bytes_of_them(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 1e9)
    monkeypatch.setattr(writer, "COMMIT_BYTES", len(job.payloads[0]) + len(job.payloads[1]))
    made = job.writer(tmp_path / "out.h5")
    made.submit(0, job.payloads[0]).result()
    time.sleep(0.1)
    assert flags(tmp_path / "out.h5") == [0, 1, 0, 0, 0]
    made.submit(1, job.payloads[1]).result()
    wait_for(lambda: flags(tmp_path / "out.h5") == [1, 1, 1, 0, 1])


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Syncs do not end before this is set."""
    event, fsync = threading.Event(), os.fsync

    def wait_and_sync(descriptor: int) -> None:
        assert event.wait(10)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", wait_and_sync)
    yield event
    event.set()


def test_no_row_is_called_done_before_its_own_sync(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: threading.Event
) -> None:
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 1e9)
    monkeypatch.setattr(writer, "COMMIT_BYTES", 1)
    made = job.writer(tmp_path / "out.h5")
    made.submit(0, job.payloads[0]).result(10)
    wait_for(lambda: made._sync is not None)
    for batch in (1, 2):
        made.submit(batch, job.payloads[batch]).result(10)
    assert flags(tmp_path / "out.h5") == [0, 1, 0, 0, 0]
    held.set()
    made.finish()
    assert_file_holds(tmp_path / "out.h5", job.expected)


def test_the_writer_waits_for_a_sync_that_is_not_over_when_the_next_is_due(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: threading.Event
) -> None:
    monkeypatch.setattr(writer, "COMMIT_SECONDS", -1.0)
    made = job.writer(tmp_path / "out.h5")
    for batch in (0, 1):
        made.submit(batch, job.payloads[batch]).result(10)
    last = made.submit(2, job.payloads[2])
    with pytest.raises(TimeoutError):
        last.result(0.2)
    held.set()
    assert last.result(10) is None
    made.finish()


def test_an_idle_writer_does_not_keep_the_disk_busy(
    job: Job, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.01)
    made = job.writer(tmp_path / "out.h5")
    made.submit(0, job.payloads[0]).result()
    wait_for(lambda: flags(tmp_path / "out.h5")[2] == 1)
    time.sleep(0.1)
    assert disk.events.count(("fsync", 0, 0)) == 1


def test_writes_the_disk_takes_in_pieces_are_completed(job: Job, tmp_path: Path, disk: Disk) -> None:
    disk.most_bytes = 3
    assert_file_holds(job.write(tmp_path / "out.h5"), job.expected)


# Failures.


def assert_nothing_more_is_taken(made: Writer, job: Job, path: Path, first: BaseException) -> None:
    """Once the disk has failed, it is not trusted again, even if it would work."""
    before = flags(path)
    for batch in (1, 2, 0):
        with pytest.raises(CaptureError) as caught:
            made.submit(batch, job.payloads[batch]).result()
        assert caught.value is first
    with pytest.raises(CaptureError) as caught:
        made.finish()
    assert caught.value is first
    assert flags(path) == before


def test_a_disk_that_fills_up_surfaces_through_every_future_with_its_cause(
    job: Job, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.01)
    made = job.writer(tmp_path / "out.h5")
    disk.write_error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(CaptureError, match=r"out\.h5 cannot be written: No space left on device\.$") as caught:
        made.submit(0, job.payloads[0]).result()
    assert caught.value.__cause__ is disk.write_error
    disk.write_error = None
    assert_nothing_more_is_taken(made, job, tmp_path / "out.h5", caught.value)
    assert flags(tmp_path / "out.h5") == [0, 1, 0, 0, 0]


def test_a_batch_before_a_failing_disk_is_not_called_done(job: Job, tmp_path: Path, disk: Disk) -> None:
    made = job.writer(tmp_path / "out.h5")
    made.submit(0, job.payloads[0]).result()
    disk.write_error = OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(CaptureError, match=r"Input/output error") as caught:
        made.submit(1, job.payloads[1]).result()
    disk.write_error = None
    assert_nothing_more_is_taken(made, job, tmp_path / "out.h5", caught.value)
    assert flags(tmp_path / "out.h5") == [0, 1, 0, 0, 0]


def test_a_failing_fsync_at_the_end_is_reported_with_its_cause(job: Job, tmp_path: Path, disk: Disk) -> None:
    made = job.writer(tmp_path / "out.h5")
    for batch in (0, 1, 2):
        made.submit(batch, job.payloads[batch]).result()
    disk.fsync_error = OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(CaptureError, match=r"out\.h5 cannot be written: Input/output error\.$") as caught:
        made.finish()
    assert caught.value.__cause__ is disk.fsync_error
    disk.fsync_error = None
    assert_nothing_more_is_taken(made, job, tmp_path / "out.h5", caught.value)
    assert flags(tmp_path / "out.h5") == [0, 1, 0, 0, 0]


def test_a_failing_fsync_between_two_batches_is_reported_by_the_next(
    job: Job, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.01)
    made = job.writer(tmp_path / "out.h5")
    disk.fsync_error = OSError(errno.EIO, os.strerror(errno.EIO))
    made.submit(0, job.payloads[0]).result()
    wait_for(lambda: made._error is not None)
    disk.fsync_error = None
    with pytest.raises(CaptureError, match=r"out\.h5 cannot be written: Input/output error\.$") as caught:
        made.submit(1, job.payloads[1]).result()
    assert isinstance(caught.value.__cause__, OSError)
    assert_nothing_more_is_taken(made, job, tmp_path / "out.h5", caught.value)
    assert flags(tmp_path / "out.h5") == [0, 1, 0, 0, 0]


def test_a_disk_that_fails_while_rows_are_marked_marks_no_more(
    job: Job, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = job.writer(tmp_path / "out.h5")
    for batch in (0, 1, 2):
        made.submit(batch, job.payloads[batch]).result()
    disk.write_error = OSError(errno.EIO, os.strerror(errno.EIO))
    with pytest.raises(CaptureError, match="Input/output error") as caught:
        made.finish()
    disk.write_error = None
    assert_nothing_more_is_taken(made, job, tmp_path / "out.h5", caught.value)


def test_an_error_nobody_expects_ends_the_run_too(job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "COMMIT_SECONDS", 0.01)
    made = job.writer(tmp_path / "out.h5")
    made._snapshot = lambda: 1 / 0
    made.submit(0, job.payloads[0]).result(10)
    wait_for(lambda: made._error is not None)
    for work in (lambda: made.submit(1, job.payloads[1]).result(10), made.finish):
        with pytest.raises(ZeroDivisionError):
            work()


def test_a_block_that_fails_keeps_what_was_written_and_says_how_much(
    job: Job, tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        stop(job.writer(tmp_path / "out.h5"), job, [0, 2])
    assert flags(tmp_path / "out.h5") == [0, 1, 1, 1, 0]
    assert disk.events[-2:] == [("fsync", 0, 0), ("synced", 0, 0)]
    assert caplog.messages == [f"3 of 5 rows are safe in {tmp_path / 'out.h5'}. Run the same command again to resume."]


def test_a_block_that_is_interrupted_keeps_what_was_written(job: Job, tmp_path: Path) -> None:
    stop(job.writer(tmp_path / "out.h5"), job, [1], KeyboardInterrupt)
    assert flags(tmp_path / "out.h5") == [1, 1, 0, 0, 1]


def test_a_failing_disk_raises_its_first_error_and_counts_only_safe_rows(
    job: Job, tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    made = job.writer(tmp_path / "out.h5")

    def run() -> None:
        with made:
            made.submit(0, job.payloads[0]).result()
            disk.fsync_error = disk.write_error = OSError(errno.EIO, os.strerror(errno.EIO))
            made.submit(1, job.payloads[1]).result()

    message = r"out\.h5 cannot be written: Input/output error\.$"
    with caplog.at_level(logging.INFO), pytest.raises(CaptureError, match=message):
        run()
    assert caplog.messages == [f"1 of 5 rows are safe in {tmp_path / 'out.h5'}. Run the same command again to resume."]
    assert flags(tmp_path / "out.h5") == [0, 1, 0, 0, 0]


def test_a_block_that_ends_well_says_nothing_and_leaves_no_thread_behind(
    job: Job, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = threading.active_count()
    with caplog.at_level(logging.INFO):
        job.write(tmp_path / "out.h5")
    assert caplog.messages == []
    assert threading.active_count() == before


def test_a_block_that_fails_leaves_no_thread_behind(job: Job, tmp_path: Path) -> None:
    before = threading.active_count()
    stop(job.writer(tmp_path / "out.h5"), job, [0])
    assert threading.active_count() == before
