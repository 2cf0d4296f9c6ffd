"""The writer, its files read back by h5py alone and its order of work recorded below it."""

import errno
import io
import os
import shutil
import tempfile
import zlib
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logitgen import CaptureError, UsageError, writer
from logitgen.config import Config
from logitgen.plan import Plan
from logitgen.rows import Rows
from logitgen.schema import Layout
from logitgen.writer import Writer, check_output, check_space, partial_path

DiskUsage = namedtuple("DiskUsage", ["total", "used", "free"])
FEATURES = datasets.Features(
    input_ids=datasets.List(datasets.Value("int32")), completion_mask=datasets.List(datasets.Value("uint8"))
)
ATTRIBUTES: dict[str, str | int] = {"format": "logitgen", "version": 1, "settings": '{"text": "grün"}', "top_k": 2}


@dataclass
class Job:
    """What a writer is given, and what must be in the file afterwards."""

    rows: Rows
    plan: Plan
    layout: Layout
    expected: dict[str, np.ndarray]
    payloads: list[np.ndarray]

    def writer(self, output: Path, **options: Any) -> Writer:
        return Writer(output, self.layout, self.rows, self.plan, ATTRIBUTES, **options)

    def write(self, output: Path, order: Sequence[int] | None = None) -> Path:
        made = self.writer(output)
        futures = [made.submit(batch, self.payloads[batch]) for batch in order or range(self.plan.num_batches)]
        made.finish()
        assert all(future.result() is None for future in futures)
        return output


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
    for row in np.flatnonzero(np.array(counts) == 0):  # what no payload carries, the writer works out itself
        expected["crc32"][row] = zlib.crc32(np.int64(row).tobytes() + np.array(ids[row], id_dtype).tobytes())
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


def test_the_file_is_plain_contiguous_hdf5_allocated_at_creation(job: Job, tmp_path: Path) -> None:
    path = job.write(tmp_path / "out.h5")
    with h5py.File(path, "r") as file:
        for dataset in file.values():
            creation = dataset.id.get_create_plist()
            assert creation.get_layout() == h5py.h5d.CONTIGUOUS
            assert creation.get_alloc_time() == h5py.h5d.ALLOC_TIME_EARLY
            assert creation.get_fill_time() == h5py.h5d.FILL_TIME_NEVER
            assert creation.get_nfilters() == 0
            assert h5py.h5g.get_objinfo(file.id, dataset.name.encode()).mtime == 0  # the only time HDF5 would store
    assert path.read_bytes()[:9] == b"\x89HDF\r\n\x1a\n\x00"  # superblock 0: the oldest, which every HDF5 reads


def test_the_attributes_are_in_the_file(job: Job, tmp_path: Path) -> None:
    with h5py.File(job.write(tmp_path / "out.h5"), "r") as file:
        assert dict(file.attrs) == ATTRIBUTES


def test_the_output_appears_only_when_the_file_is_complete(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    made = job.writer(output)
    for batch, payload in enumerate(job.payloads):
        made.submit(batch, payload).result()
        assert [path.name for path in tmp_path.iterdir()] == ["out.h5.partial"]
    made.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5"]


def test_an_old_output_stays_until_the_new_one_is_complete(job: Job, tmp_path: Path) -> None:
    output = tmp_path / "out.h5"
    output.write_text("precious")
    (tmp_path / "out.h5.partial").write_bytes(b"left over" * 10_000)
    made = job.writer(output)
    for batch, payload in enumerate(job.payloads):
        made.submit(batch, payload)
        assert output.read_text() == "precious"
    made.finish()
    assert_file_holds(output, job.expected)
    assert output.read_bytes() == job.write(tmp_path / "other.h5").read_bytes()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
def test_all_the_space_is_taken_before_the_first_batch(job: Job, tmp_path: Path) -> None:
    made = job.writer(tmp_path / "out.h5")
    before = (tmp_path / "out.h5.partial").stat()
    assert before.st_blocks * 512 >= before.st_size
    for batch, payload in enumerate(job.payloads):
        made.submit(batch, payload)
    made.finish()
    assert (tmp_path / "out.h5").stat().st_size == before.st_size


def test_an_unfinished_file_opens_and_says_what_is_done(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer, "COMMIT_SECONDS", -1.0)
    made = job.writer(tmp_path / "out.h5")
    made.submit(1, job.payloads[1]).result()
    with h5py.File(tmp_path / "out.h5.partial", "r", locking=False) as file:
        done = file["done"][()].astype(bool)
        positions = np.repeat(done, np.diff(job.expected["position_offsets"]))
        assert np.flatnonzero(done).tolist() == [0, 1, 4]  # row 1 needs no forward pass
        assert file["crc32"][done].tolist() == job.expected["crc32"][done].tolist()
        for name in ("logsumexp", "kept_ids", "kept_logprobs"):
            np.testing.assert_array_equal(file[name][()][positions], job.expected[name][positions])
        for name in ("offsets", "position_offsets", "input_ids", "positions", "source_row"):
            np.testing.assert_array_equal(file[name][()], job.expected[name])


def test_a_second_writer_of_the_same_output_is_refused_and_harms_nothing(job: Job, tmp_path: Path) -> None:
    first = job.writer(tmp_path / "out.h5")
    first.submit(0, job.payloads[0]).result()
    with pytest.raises(UsageError, match=r"out\.h5\.partial is being written by another run\. Wait for it"):
        job.writer(tmp_path / "out.h5")
    for batch in (1, 2):
        first.submit(batch, job.payloads[batch])
    first.finish()
    with h5py.File(tmp_path / "out.h5", "r") as file:
        np.testing.assert_array_equal(file["logsumexp"][()], job.expected["logsumexp"])


def test_nothing_is_called_done_between_two_commits(job: Job, tmp_path: Path) -> None:
    made = job.writer(tmp_path / "out.h5")
    made.submit(0, job.payloads[0]).result()
    with h5py.File(tmp_path / "out.h5.partial", "r", locking=False) as file:
        assert not file["done"][()].any()
    assert made.num_written == 2  # row 2, and row 1, which needs no forward pass


def test_every_batch_is_reported_once_it_is_written(job: Job, tmp_path: Path) -> None:
    reported = []

    def report(batch: int) -> None:
        row = job.plan.rows(batch)[0]
        with h5py.File(tmp_path / "out.h5.partial", "r", locking=False) as file:
            at = job.expected["position_offsets"][row]
            reported.append((batch, file["logsumexp"][at] == job.expected["logsumexp"][at]))

    made = job.writer(tmp_path / "out.h5", on_written=report)
    for batch in (2, 0, 1):
        made.submit(batch, job.payloads[batch])
    made.finish()
    assert reported == [(2, True), (0, True), (1, True)]


def test_a_missing_batch_keeps_the_partial_file(job: Job, tmp_path: Path) -> None:
    made = job.writer(tmp_path / "out.h5")
    made.submit(0, job.payloads[0])
    made.submit(2, job.payloads[2])
    missing = len(job.plan.rows(1))
    with pytest.raises(
        CaptureError, match=rf"{missing} rows are missing and 0 written twice; .*out.h5.partial is kept"
    ):
        made.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5.partial"]
    assert made.num_written == 3


def test_a_batch_written_twice_keeps_the_partial_file(job: Job, tmp_path: Path) -> None:
    made = job.writer(tmp_path / "out.h5")
    for batch in (0, 1, 2, 1):
        made.submit(batch, job.payloads[batch])
    with pytest.raises(CaptureError, match=r"0 rows are missing and 2 written twice; .*out\.h5\.partial is kept"):
        made.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["out.h5.partial"]
    assert made.num_twice == 2


class Disk:
    """Stands between the writer and the disk: records the order of work, fails or stalls on demand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int, int]] = []
        self.write_error: OSError | None = None
        self.fsync_error: OSError | None = None
        self.most_bytes: int | None = None
        disk, fsync, replace = self, os.fsync, Path.replace

        class File(io.FileIO):
            def write(self, data: Any) -> int:
                if disk.write_error is not None:
                    raise disk.write_error
                place = self.tell()
                written = super().write(memoryview(data)[: disk.most_bytes])
                disk.events.append(("write", place, place + written))
                return written

        def record_open(path: Path, mode: str, buffering: int = -1) -> io.IOBase:
            if mode == "ab":  # the lock
                return path.open(mode)
            assert (mode, buffering) == ("r+b", 0)
            return File(path, "r+b")

        def record_fsync(descriptor: int) -> None:
            if disk.fsync_error is not None:
                raise disk.fsync_error
            fsync(descriptor)
            disk.events.append(("fsync", 0, 0))

        def record_replace(path: Path, target: Path) -> Path:
            disk.events.append(("rename", 0, 0))
            return replace(path, target)

        monkeypatch.setattr(writer, "open", record_open, raising=False)
        monkeypatch.setattr(os, "fsync", record_fsync)
        monkeypatch.setattr(Path, "replace", record_replace)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("commit_seconds", [-1.0, 1e9])
def test_data_is_on_the_disk_before_rows_are_called_done(
    job: Job, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, commit_seconds: float
) -> None:
    monkeypatch.setattr(writer, "COMMIT_SECONDS", commit_seconds)
    path = job.write(tmp_path / "out.h5")
    with h5py.File(path, "r") as file:
        done = file["done"].id.get_offset()
        crc32 = file["crc32"].id.get_offset()
        logsumexp = file["logsumexp"].id.get_offset()
    flags = {place - done: at for at, (kind, place, _) in enumerate(disk.events) if done <= place < done + 5}
    assert sorted(flags) == [0, 1, 2, 3, 4]
    for row, flagged in flags.items():
        start = logsumexp + 4 * job.expected["position_offsets"][row]
        places = {crc32 + 4 * row} | ({start} if row != 1 else set())
        data = [at for at, (kind, place, end) in enumerate(disk.events) if place in places and end > place]
        assert len(data) == len(places)
        assert ("fsync", 0, 0) in disk.events[max(data) : flagged]
    last = disk.events.index(("rename", 0, 0))
    assert disk.events[last - 1][0] == "fsync"  # flags too are on the disk before the file gets its name
    assert disk.events[last + 1][0] == "fsync"  # and then the folder
    assert len(disk.events) == last + 2


def test_writes_the_disk_takes_in_pieces_are_completed(job: Job, tmp_path: Path, disk: Disk) -> None:
    disk.most_bytes = 3
    assert_file_holds(job.write(tmp_path / "out.h5"), job.expected)


def test_a_disk_that_fills_up_surfaces_through_the_future_with_its_cause(job: Job, tmp_path: Path, disk: Disk) -> None:
    made = job.writer(tmp_path / "out.h5")
    disk.write_error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    future = made.submit(0, job.payloads[0])
    with pytest.raises(CaptureError, match=r"out\.h5\.partial cannot be written: No space left on device\.") as caught:
        future.result()
    assert caught.value.__cause__ is disk.write_error
    disk.write_error = None
    with pytest.raises(CaptureError, match="rows are missing"):
        made.finish()
    assert not (tmp_path / "out.h5").exists()


@pytest.mark.parametrize("while_committing", [True, False])
def test_a_failing_fsync_is_reported_with_its_cause(
    job: Job, tmp_path: Path, disk: Disk, monkeypatch: pytest.MonkeyPatch, while_committing: bool
) -> None:
    made = job.writer(tmp_path / "out.h5")
    for batch in (0, 1):
        made.submit(batch, job.payloads[batch]).result()
    if while_committing:
        monkeypatch.setattr(writer, "COMMIT_SECONDS", -1.0)
    disk.fsync_error = OSError(errno.EIO, os.strerror(errno.EIO))
    future = made.submit(2, job.payloads[2])
    with pytest.raises(CaptureError, match=r"out\.h5\.partial cannot be written: Input/output error\.") as caught:
        future.result() if while_committing else made.finish()
    assert caught.value.__cause__ is disk.fsync_error
    assert not (tmp_path / "out.h5").exists()


def test_a_rename_that_fails_is_reported_and_loses_nothing(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(CaptureError, match=r"out\.h5\.partial cannot be written: Permission denied\."):
        job.write(tmp_path / "out.h5")
    assert_file_holds(tmp_path / "out.h5.partial", job.expected)


def test_space_that_cannot_be_reserved_is_a_usage_error_and_leaves_nothing(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(descriptor: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full_disk, raising=False)
    with pytest.raises(UsageError, match=r"--output .*out\.h5 cannot be created: No space left on device\.") as caught:
        job.writer(tmp_path / "out.h5")
    assert isinstance(caught.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_partial_files_place_is_a_usage_error(job: Job, tmp_path: Path) -> None:
    (tmp_path / "out.h5.partial").mkdir()
    with pytest.raises(UsageError, match=r"--output .*out\.h5 cannot be created: .*[Ii]s a directory"):
        job.writer(tmp_path / "out.h5")


def test_the_partial_file_lies_beside_the_output() -> None:
    assert partial_path(Path("some/folder/out.v1.h5")) == Path("some/folder/out.v1.h5.partial")


def test_a_new_output_in_an_existing_folder_is_accepted(tmp_path: Path) -> None:
    check_output(tmp_path / "out.h5", overwrite=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_a_folder_is_refused(tmp_path: Path, overwrite: bool) -> None:
    with pytest.raises(UsageError, match=r"--output .* is not a plain file\. Give the name of one\."):
        check_output(tmp_path, overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_in_a_missing_folder_is_refused(tmp_path: Path, overwrite: bool) -> None:
    with pytest.raises(UsageError, match=r"--output .*: the folder .*/missing does not exist\. Create it\."):
        check_output(tmp_path / "missing" / "out.h5", overwrite)


@pytest.mark.parametrize("place", ["/proc/out.h5", "/dev/null", "x" * 300, "x" * 250])
def test_an_output_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"--output .* (cannot be written: .*\. Choose another|is not a plain file)"):
        check_output(Path(place), overwrite=True)


@pytest.mark.parametrize("name", ["out.h5", "out.h5.partial"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_link_is_never_replaced(tmp_path: Path, name: str, overwrite: bool) -> None:
    (tmp_path / name).symlink_to(tmp_path / "elsewhere.h5")
    with pytest.raises(UsageError, match=rf"{name} is not a plain file\. Give the name of one\."):
        check_output(tmp_path / "out.h5", overwrite)
    assert (tmp_path / name).is_symlink()


def test_an_output_that_exists_is_refused_unless_it_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.h5").touch()
    with pytest.raises(UsageError, match=r"--output .*out\.h5 exists\. Choose another name, or .* --overwrite\."):
        check_output(tmp_path / "out.h5", overwrite=False)
    check_output(tmp_path / "out.h5", overwrite=True)


def test_a_partial_file_left_over_is_refused_unless_it_may_be_replaced(tmp_path: Path) -> None:
    (tmp_path / "out.h5.partial").touch()
    message = r"out\.h5\.partial is left from a run that did not finish, .* remove it or .* --overwrite\."
    with pytest.raises(UsageError, match=message):
        check_output(tmp_path / "out.h5", overwrite=False)
    check_output(tmp_path / "out.h5", overwrite=True)


@pytest.fixture
def quarter_gigabyte() -> Layout:
    """One row of a million positions, 264 bytes each: 270,000,047 bytes with tokens, positions and the index."""
    return Layout(
        capture="topk", num_rows=1, num_tokens=1_000_001, num_positions=1_000_000, vocab_size=32_000, top_k=64
    )


def test_a_file_that_does_not_fit_on_the_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quarter_gigabyte: Layout
) -> None:
    asked = []

    def disk_usage(path: Path) -> DiskUsage:
        asked.append(path)
        return DiskUsage(0, 0, 269_900_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    message = (
        rf"--output .*out\.h5 needs 270\.1 MB, {tmp_path} has 269\.9 MB free\. Free some space, .*--top_k.*--limit"
    )
    with pytest.raises(UsageError, match=message):
        check_space(tmp_path / "out.h5", quarter_gigabyte)
    assert asked == [tmp_path]
    (tmp_path / "out.h5.partial").write_bytes(bytes(300_000))  # it will be replaced: its space counts as free
    check_space(tmp_path / "out.h5", quarter_gigabyte)


def test_a_file_that_fits_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quarter_gigabyte: Layout
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(0, 0, 271_000_000))
    check_space(tmp_path / "out.h5", quarter_gigabyte)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: DiskUsage(0, 0, 270_000_046))
    with pytest.raises(UsageError, match="needs"):
        check_space(tmp_path / "out.h5", quarter_gigabyte)
