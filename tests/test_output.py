"""The output: a name that one process claims, under which a file comes into being, is resumed and is completed."""

import errno
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import h5py
import numpy as np
import pytest
from files import ARRAYS, ATTRIBUTES, plain_attributes, stored_attributes, write_file

from logitgen import CaptureError, UsageError
from logitgen.file.header import Places
from logitgen.file.layout import STATUS_BYTES, Layout
from logitgen.leader.output import Output

DiskUsage = namedtuple("DiskUsage", ["total", "used", "free"])
LAYOUT = Layout(capture="topk", num_rows=3, num_tokens=9, num_positions=4, vocab_size=10, top_k=2, tokenizer_size=10)
ABOUT = plain_attributes()
UNFINISHED = ARRAYS | {"done": np.array([0, 1, 0], "u1")}

WriteKnown = Callable[[BinaryIO, Places], None]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "out.h5"


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    return tmp_path / "out.h5.partial"


def write_done(done: list[int]) -> WriteKnown:
    """Write the done flags, as a plain file has them."""

    def write(file: BinaryIO, places: Places) -> None:
        file.seek(places["done"])
        file.write(bytes(done))

    return write


def claimed(path: Path, overwrite: bool = False) -> Output:
    output = Output(path, overwrite)
    output.claim()
    return output


def created(path: Path, overwrite: bool = False, done: tuple[int, ...] = (0, 1, 0)) -> Output:
    output = claimed(path, overwrite)
    output.check(ABOUT)
    output.create(LAYOUT, ABOUT, write_done(list(done)))
    return output


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def locked_elsewhere(path: Path, *, create: bool = False) -> Iterator[None]:
    """Have another process hold the lock of a file."""
    code = (
        "import fcntl, sys; file = open(sys.argv[1], sys.argv[2]); fcntl.flock(file, fcntl.LOCK_EX); "
        "print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path), "a" if create else "r+b"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        yield
        process.communicate()


# The token budget of what is there.


SETTINGS = ATTRIBUTES["settings"] | {"batch_tokens": sys.maxsize}


def settings_with(**changes: Any) -> dict[str, Any]:
    return {"settings": ATTRIBUTES["settings"] | changes}


@pytest.mark.parametrize("name", ["out.h5", "out.h5.partial"])
def test_the_token_budget_of_what_is_there_is_known(path: Path, tmp_path: Path, name: str) -> None:
    write_file(tmp_path / name, **settings_with(batch_tokens=1024))
    assert claimed(path).found_settings(SETTINGS, ["batch_tokens"]) == {"batch_tokens": 1024}


@pytest.mark.parametrize(
    "changes", [{}, *({"batch_tokens": value} for value in (None, "1024", "auto", 0, -5, 2.5, []))]
)
def test_a_file_without_a_token_budget_that_makes_sense_has_none(path: Path, changes: dict[str, Any]) -> None:
    write_file(path, **settings_with(**changes))
    assert claimed(path).found_settings(SETTINGS, ["batch_tokens"]) == {}


def test_where_no_file_is_found_there_is_no_token_budget(path: Path) -> None:
    assert claimed(path).found_settings(SETTINGS, ["batch_tokens"]) == {}
    write_file(path, **settings_with(batch_tokens=1024))
    again = claimed(path, overwrite=True)  # the complete file is made anew, and so is its budget
    assert again.found_settings(SETTINGS, ["batch_tokens"]) == {}


def test_what_is_overwritten_hands_its_token_budget_on_only_to_the_same_run(path: Path, tmp_path: Path) -> None:
    write_file(tmp_path / "out.h5.partial", **settings_with(batch_tokens=1024))
    other = SETTINGS | {"split": "another"}
    assert claimed(path, overwrite=True).found_settings(SETTINGS, ["batch_tokens"]) == {"batch_tokens": 1024}
    assert claimed(path, overwrite=True).found_settings(other, ["batch_tokens"]) == {}
    assert claimed(path).found_settings(other, ["batch_tokens"]) == {
        "batch_tokens": 1024
    }  # it is refused, and the budget is not what differs


def test_several_open_settings_are_known_at_once(path: Path, tmp_path: Path) -> None:
    write_file(tmp_path / "out.h5.partial", **settings_with(batch_tokens=1024, top_k=7))
    wanted = SETTINGS | {"top_k": 1}
    both = {"batch_tokens": 1024, "top_k": 7}
    assert claimed(path, overwrite=True).found_settings(wanted, ["batch_tokens", "top_k"]) == both
    assert claimed(path, overwrite=True).found_settings(wanted, ["batch_tokens"]) == {}  # of another k


# A new output.


def test_a_new_output_is_claimed_without_a_trace(path: Path, tmp_path: Path) -> None:
    output = claimed(path)
    output.check(ABOUT)
    assert output.found is None
    assert not output.is_complete()
    assert output.partial == tmp_path / "out.h5.partial"
    assert names(tmp_path) == []


def test_naming_an_output_touches_nothing(tmp_path: Path) -> None:
    assert Output(tmp_path / "missing" / "out.v1.h5", False).partial == tmp_path / "missing" / "out.v1.h5.partial"
    assert names(tmp_path) == []


def test_a_file_is_created_with_all_that_is_known(path: Path, partial: Path, tmp_path: Path) -> None:
    output = created(path)
    assert names(tmp_path) == ["out.h5.partial"]
    with h5py.File(partial, "r", locking=False) as file:
        assert dict(file.attrs) == stored_attributes()
        assert file["done"][()].tolist() == [0, 1, 0]
        assert file["kept_ids"].shape == (4, 2)
    assert output.found
    assert output.found.layout == LAYOUT
    assert output.done().tolist() == [False, True, False]
    assert output.done().dtype == bool
    assert not output.is_complete()


def test_the_file_gets_its_first_name_once_its_head_is_on_the_disk(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def write(file: BinaryIO, places: Places) -> None:
        assert names(tmp_path) == ["out.h5.partial.new"]
        events.append("known")

    def record_fsync(descriptor: int) -> None:
        fsync(descriptor)
        events.append(f"fsync {'folder' if os.path.isdir(f'/proc/self/fd/{descriptor}') else 'file'}")  # noqa: PTH112

    def record_replace(old: Path, new: Path) -> Path:
        events.append(f"{old.name} -> {new.name}")
        return replace(old, new)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    output = claimed(path)
    output.create(LAYOUT, ABOUT, write)
    output.complete()
    assert events == [
        *("known", "fsync file", "out.h5.partial.new -> out.h5.partial", "fsync folder"),
        *("fsync file", "out.h5.partial -> out.h5", "fsync folder"),
    ]


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")
def test_all_the_space_is_taken_before_the_first_batch(path: Path, partial: Path) -> None:
    layout = Layout(capture="topk", num_rows=3, num_tokens=1000, num_positions=1000, vocab_size=70_000, top_k=64)
    output = claimed(path)
    output.create(layout, plain_attributes(vocab_size=70_000, top_k=64), write_done([0, 0, 0]))
    found = partial.stat()
    assert found.st_size > 1000 * 64 * 6
    assert found.st_blocks * 512 >= found.st_size


def test_a_completed_file_has_its_own_name_and_nothing_else_is_left(path: Path, partial: Path, tmp_path: Path) -> None:
    output = created(path, done=(1, 1, 1))
    content = partial.read_bytes()[:-STATUS_BYTES]
    assert output.is_complete()
    output.complete()
    assert names(tmp_path) == ["out.h5"]
    assert path.read_bytes() == content
    output.complete()  # once is enough
    assert path.read_bytes() == content
    assert output.done().all()


def test_a_rename_that_fails_is_reported_and_loses_nothing(
    path: Path, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = created(path)
    content = partial.read_bytes()[:-STATUS_BYTES]

    def refuse(path: Path, target: Path) -> Path:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", refuse)
        with pytest.raises(CaptureError, match=r"out\.h5\.partial cannot be renamed to out\.h5: Permission denied\.$"):
            output.complete()
    assert partial.read_bytes() == content
    del output
    claimed(path).complete()  # as after a kill between cutting off the line about the run and the rename
    assert path.read_bytes() == content


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("instead", ["nothing", "a foreign file", "another run's"])
def test_only_the_file_that_was_created_is_cut_and_renamed(
    path: Path, partial: Path, tmp_path: Path, instead: str, resumed: bool
) -> None:
    output = created(path, done=(1, 1, 1))
    if resumed:
        del output
        output = claimed(path)
    moved = partial.rename(tmp_path / "moved.h5")
    if instead == "a foreign file":
        partial.write_bytes(b"precious" * 10_000)
    elif instead == "another run's":
        created(path)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    with pytest.raises(CaptureError, match=rf"no longer this run's file.* rows are in {re.escape(str(moved))}\."):
        output.complete()
    if resumed:
        with pytest.raises(CaptureError, match="no longer this run's file"):
            output.create(LAYOUT, ABOUT, write_done([0, 0, 0]))
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_has_come_to_be_meanwhile_is_not_replaced(path: Path, partial: Path, overwrite: bool) -> None:
    output = created(path, overwrite, done=(1, 1, 1))
    path.write_bytes(b"precious")
    with pytest.raises(CaptureError, match=rf"appeared during the run.* All rows are in {re.escape(str(partial))}"):
        output.complete()
    assert path.read_bytes() == b"precious"
    assert partial.exists()


def test_the_done_flags_of_no_file_are_not_asked_for(path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no file yet\."):
        claimed(path).done()


# What cannot be an output.


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_is_no_output(tmp_path: Path, overwrite: bool) -> None:
    with pytest.raises(UsageError, match=r"--output .* is not a regular file\. Choose another name\.$"):
        claimed(tmp_path, overwrite)


def test_a_folder_in_the_partial_files_place_is_refused(path: Path, partial: Path) -> None:
    partial.mkdir()
    with pytest.raises(UsageError, match=r"--output .*out\.h5: .*out\.h5\.partial is not a regular file\. Choose"):
        claimed(path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_missing_folder_is_refused(tmp_path: Path, overwrite: bool) -> None:
    with pytest.raises(UsageError, match=r"--output .*: the folder .*/missing does not exist\. Create it\.$"):
        claimed(tmp_path / "missing" / "out.h5", overwrite)


def test_a_file_in_the_folders_place_is_refused(path: Path) -> None:
    path.touch()
    with pytest.raises(UsageError, match=r"the folder .*/out\.h5 does not exist\. Create it\.$"):
        claimed(path / "inner.h5")


@pytest.mark.parametrize("place", ["/proc/out.h5", "/dev/null", "x" * 300, "x" * 250, "x" * 246])
def test_a_place_that_cannot_be_written_to_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"--output .* (cannot be written: .*\. Choose another|is not a regular file)"):
        claimed(Path(place), overwrite=True)


@pytest.mark.parametrize("place", [".", "..", "/", "a/.."])
def test_a_name_that_only_folders_have_is_refused(place: str) -> None:
    with pytest.raises(UsageError, match=r"--output "):
        claimed(Path(place))


def test_a_folder_that_is_read_only_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, whom no folder refuses."""

    def refuse(**options: Any) -> Any:
        assert options == {"dir": path.parent}
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    message = r"--output .*out\.h5 cannot be written: Permission denied\. Choose another place\.$"
    with pytest.raises(UsageError, match=message) as caught:
        claimed(path)
    assert isinstance(caught.value.__cause__, PermissionError)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write to any folder")
def test_a_folder_without_the_right_to_write_is_refused(path: Path) -> None:
    path.parent.chmod(0o500)
    try:
        with pytest.raises(UsageError, match="cannot be written: Permission denied"):
            claimed(path)
    finally:
        path.parent.chmod(0o700)


@pytest.mark.parametrize("name", ["out.h5", "out.h5.partial", "out.h5.partial.new"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_is_never_followed(path: Path, tmp_path: Path, name: str, overwrite: bool, dangling: bool) -> None:
    elsewhere = tmp_path / "elsewhere.h5"
    if not dangling:
        elsewhere.write_text("precious")
    (tmp_path / name).symlink_to(elsewhere)
    with pytest.raises(UsageError, match=rf"{name} is not a regular file\. Choose another name\."):
        created(path, overwrite)
    assert (tmp_path / name).is_symlink()
    assert not elsewhere.exists() if dangling else elsewhere.read_text() == "precious"


@pytest.mark.parametrize("name", ["out.h5", "out.h5.partial"])
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", [b"", b"precious notes", b"\x89HDF\r\n\x1a\n" + bytes(3000), b"logitgen fil"])
def test_a_file_that_is_not_ours_is_never_touched(
    path: Path, tmp_path: Path, name: str, overwrite: bool, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    message = (
        rf"--output .*out\.h5: .*/{name} exists and is not a logitgen file\. "
        r"Choose another name, or remove it\.$"
    )
    with pytest.raises(UsageError, match=message):
        claimed(path, overwrite)
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == content


def cut_off(path: Path) -> bytes:
    """Leave of a file only a part, which says that it was one of logitgen; return it."""
    write_file(path)
    os.truncate(path, 1_000)
    return path.read_bytes()


@pytest.mark.parametrize("name", ["out.h5", "out.h5.partial"])
def test_a_damaged_file_is_refused_and_kept(path: Path, tmp_path: Path, name: str) -> None:
    content = cut_off(tmp_path / name)
    message = (
        rf"{name} exists but is unusable: .*{name} is truncated\. Copy it again\. "
        r"Choose another --output, or replace it with --overwrite\.$"
    )
    with pytest.raises(UsageError, match=message):
        claimed(path)
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == content


def test_a_damaged_file_is_replaced_on_request(
    path: Path, partial: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    contents = cut_off(path), cut_off(partial)
    with caplog.at_level(logging.WARNING):
        output = claimed(path, overwrite=True)
    (message,) = caplog.messages
    assert "out.h5.partial exists but is unusable: " in message
    assert message.endswith(" This run replaces it.")
    assert (path.read_bytes(), partial.read_bytes()) == contents
    output.create(LAYOUT, ABOUT, write_done([1, 1, 1]))
    assert path.read_bytes() == contents[0]
    output.complete()
    assert names(tmp_path) == ["out.h5"]
    with h5py.File(path, "r", locking=False) as file:
        assert file["done"][()].tolist() == [1, 1, 1]


# What is there already.


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_partial_file_of_the_same_run_is_resumed(path: Path, partial: Path, tmp_path: Path, overwrite: bool) -> None:
    write_file(partial, UNFINISHED)
    content = partial.read_bytes()
    output = claimed(path, overwrite)
    output.check({"capture": "topk", "settings": ABOUT["settings"]})
    output.check(ABOUT)
    assert output.done().tolist() == [False, True, False]
    assert output.create(LAYOUT, ABOUT, write_done([9, 9, 9])) is output.found
    assert partial.read_bytes() == content
    output.complete()
    assert path.read_bytes() == content
    assert names(tmp_path) == ["out.h5"]


def test_a_finished_file_of_the_same_run_is_recognised(path: Path, tmp_path: Path) -> None:
    write_file(path)
    content = path.read_bytes()
    output = claimed(path)
    output.check(ABOUT)
    assert output.is_complete()
    output.complete()
    assert path.read_bytes() == content
    assert names(tmp_path) == ["out.h5"]


def test_a_finished_file_is_made_anew_on_request(path: Path) -> None:
    write_file(path)
    content = path.read_bytes()
    output = created(path, overwrite=True)
    assert not output.is_complete()
    assert path.read_bytes() == content
    output.complete()
    assert path.read_bytes() != content


def test_a_file_that_only_lacks_its_name_is_complete(path: Path, partial: Path, tmp_path: Path) -> None:
    write_file(partial)
    output = claimed(path)
    output.check(ABOUT)
    assert output.is_complete()
    output.complete()
    assert names(tmp_path) == ["out.h5"]


def test_a_finished_file_comes_before_a_partial_one(path: Path, partial: Path) -> None:
    """As a run with --overwrite that was stopped leaves them."""
    write_file(path)
    content = write_file(partial, UNFINISHED, teacher="another").read_bytes()
    output = claimed(path)
    output.check(ABOUT)
    assert output.is_complete()
    assert partial.read_bytes() == content


def test_a_complete_files_name_with_missing_rows_is_refused(path: Path, tmp_path: Path) -> None:
    content = write_file(path, UNFINISHED).read_bytes()
    message = (
        r"out\.h5 has the name of a complete file, but lacks rows\. "
        r"Choose another --output, or replace it with --overwrite\.$"
    )
    with pytest.raises(UsageError, match=message):
        claimed(path)
    assert names(tmp_path) == ["out.h5"]
    created(path, overwrite=True)
    assert path.read_bytes() == content


def test_overwrite_resumes_the_partial_file_beside_a_finished_one(path: Path, partial: Path) -> None:
    content = write_file(path, teacher="another").read_bytes()
    write_file(partial, UNFINISHED)
    output = claimed(path, overwrite=True)
    output.check(ABOUT)
    assert output.done().tolist() == [False, True, False]
    assert path.read_bytes() == content


def test_a_damaged_done_flag_counts_as_not_done(path: Path, partial: Path) -> None:
    write_file(partial, ARRAYS | {"done": np.array([1, 255, 2], "u1")})
    assert claimed(path).done().tolist() == [True, False, False]


SETTINGS: dict[str, Any] = ATTRIBUTES["settings"]
DIFFERENCES = {
    "a setting": ({"settings": SETTINGS | {"split": "test"}}, "--split train and test"),
    "a setting that was none": ({"settings": SETTINGS | {"dataset_config": "en"}}, "--dataset_config None and en"),
    "an option of a newer version": ({"settings": SETTINGS | {"shiny": 3}}, "--shiny None and 3"),
    "an option that is gone": (
        {"settings": {name: value for name, value in SETTINGS.items() if name != "seed"}},
        "--seed 0 and None",
    ),
    "a package": ({"packages": {"torch": "2.14.0"}}, "torch 2.13.0 and 2.14.0"),
    "a number": ({"vocab_size": 11}, "vocab_size 10 and 11"),
    "the teacher's configuration": (
        {"teacher_config": {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 1e6}},
        "the teacher's rms_norm_eps 1e-06 and 1e-05; the teacher's rope_theta None and 1000000.0",
    ),
    "the teacher's attention": ({"computation": {"attention": "eager"}}, "the teacher's attention sdpa and eager"),
    "the teacher's weights": ({"teacher_fingerprint": "f" * 64}, "the teacher's weights"),
    "the tokenizer": ({"tokenizer_fingerprint": "f" * 64}, "the tokenizer"),
    "the rows": ({"dataset_fingerprint": "f" * 64}, "the tokens of the rows"),
    "several things": (
        {"teacher_dtype": "float16", "settings": SETTINGS | {"seed": 1, "split": "test"}},
        "--seed 0 and 1; --split train and test; teacher_dtype bfloat16 and float16",
    ),
}


@pytest.mark.parametrize("name", ["out.h5", "out.h5.partial"])
@pytest.mark.parametrize("kind", DIFFERENCES)
def test_another_runs_file_is_refused_with_every_difference(path: Path, tmp_path: Path, name: str, kind: str) -> None:
    changes, differences = DIFFERENCES[kind]
    write_file(tmp_path / name, ARRAYS if name == "out.h5" else UNFINISHED)
    content = (tmp_path / name).read_bytes()
    output = claimed(path)
    with pytest.raises(UsageError) as caught:
        output.check(plain_attributes(**changes))
    assert str(caught.value) == (
        f"{tmp_path / name} belongs to another run. Its values and this run's differ: {differences}. "
        "Choose another --output, or replace it with --overwrite."
    )
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == content


def test_only_what_is_known_is_compared(path: Path, partial: Path) -> None:
    write_file(partial, UNFINISHED)
    output = claimed(path)
    output.check({})
    output.check({"settings": json.dumps(SETTINGS, sort_keys=True)})
    output.check({"teacher": "some/teacher"})
    with pytest.raises(UsageError, match=r"differ: teacher some/teacher and another\. Choose"):
        output.check({"teacher": "another"})


def test_with_overwrite_a_partial_file_of_another_run_is_replaced(
    path: Path, partial: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_file(partial, UNFINISHED, teacher="another")
    content = partial.read_bytes()
    output = claimed(path, overwrite=True)
    with caplog.at_level(logging.WARNING):
        output.check(ABOUT)
    (message,) = caplog.messages
    assert message.endswith("another and some/teacher. This run replaces it.")
    assert output.found is None
    assert not output.is_complete()
    assert partial.read_bytes() == content  # until the new one is there
    output.check({"teacher": "yet another"})  # nothing to compare with
    output.create(LAYOUT, ABOUT, write_done([0, 0, 1]))
    assert names(tmp_path) == ["out.h5.partial"]
    assert output.done().tolist() == [False, False, True]


# Several runs at once.


def test_a_partial_file_that_another_process_writes_is_refused(path: Path, partial: Path, tmp_path: Path) -> None:
    write_file(partial, UNFINISHED)
    content = partial.read_bytes()
    message = r"Another run is writing .*out\.h5\.partial\. Wait for it, or choose another --output\.$"
    with locked_elsewhere(partial):
        for overwrite in (False, True):
            with pytest.raises(UsageError, match=message):
                claimed(path, overwrite)
    assert partial.read_bytes() == content
    assert names(tmp_path) == ["out.h5.partial"]
    assert claimed(path).found  # now that it has ended


def test_a_file_is_locked_from_its_creation_to_the_end_of_the_run(path: Path, partial: Path) -> None:
    output = created(path)
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1], 'rb'), fcntl.LOCK_SH | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", code]
    assert b"BlockingIOError" in subprocess.run([*command, partial], capture_output=True, check=False).stderr
    output.complete()
    assert b"BlockingIOError" in subprocess.run([*command, path], capture_output=True, check=False).stderr
    del output
    assert subprocess.run([*command, path], capture_output=True, check=False).returncode == 0


def test_a_second_output_of_the_same_process_is_refused_too(path: Path) -> None:
    first = created(path)
    with pytest.raises(UsageError, match=r"Another run is writing .*out\.h5\.partial\."):
        claimed(path)
    assert first.done().tolist() == [False, True, False]


def test_what_a_killed_run_left_while_it_created_the_file_is_no_obstacle(path: Path, tmp_path: Path) -> None:
    (tmp_path / "out.h5.partial.new").write_bytes(bytes(90_000))
    output = claimed(path)
    assert names(tmp_path) == []  # before the free space is looked at
    output = created(path)
    assert names(tmp_path) == ["out.h5.partial"]
    assert output.done().tolist() == [False, True, False]
    size_bytes = output.partial.stat().st_size
    other = created(tmp_path / "other.h5")
    assert size_bytes == other.partial.stat().st_size


def test_what_a_killed_run_left_stays_there_in_a_dry_run(path: Path, tmp_path: Path) -> None:
    (tmp_path / "out.h5.partial.new").write_bytes(bytes(90_000))
    Output(path, overwrite=False, dry_run=True).claim()
    assert names(tmp_path) == ["out.h5.partial.new"]


def test_a_run_that_creates_the_file_is_seen_before_anything_expensive(path: Path, tmp_path: Path) -> None:
    new = tmp_path / "out.h5.partial.new"
    with (
        locked_elsewhere(new, create=True),
        pytest.raises(UsageError, match=r"Another run is writing .*partial\.new\. Wait for it"),
    ):
        claimed(path)
    assert names(tmp_path) == ["out.h5.partial.new"]
    assert new.read_bytes() == b""


def test_a_run_that_creates_the_file_at_the_same_time_is_not_disturbed(path: Path, tmp_path: Path) -> None:
    new = tmp_path / "out.h5.partial.new"
    output = claimed(path)
    with (
        locked_elsewhere(new, create=True),
        pytest.raises(UsageError, match=r"Another run is writing .*partial\.new\. Wait for it"),
    ):
        output.create(LAYOUT, ABOUT, write_done([0, 0, 0]))
    assert names(tmp_path) == ["out.h5.partial.new"]
    assert new.read_bytes() == b""


@pytest.mark.parametrize("name", ["out.h5", "out.h5.partial"])
def test_a_run_that_was_faster_is_not_disturbed(path: Path, tmp_path: Path, name: str) -> None:
    output = claimed(path)
    write_file(tmp_path / name, UNFINISHED)
    content = (tmp_path / name).read_bytes()
    message = r"Another run is writing .*out\.h5\. Wait for it, or choose another --output\.$"
    with pytest.raises(UsageError, match=message):
        output.create(LAYOUT, ABOUT, write_done([0, 0, 0]))
    assert names(tmp_path) == [name]
    assert (tmp_path / name).read_bytes() == content


def test_with_overwrite_a_run_that_was_faster_is_not_disturbed_either(path: Path, partial: Path) -> None:
    output = claimed(path, overwrite=True)
    first = created(path)
    with pytest.raises(UsageError, match=r"Another run is writing .*out\.h5\."):
        output.create(LAYOUT, ABOUT, write_done([0, 0, 0]))
    assert first.done().tolist() == [False, True, False]
    assert partial.exists()


@pytest.mark.parametrize("another", [False, True])
def test_a_file_that_gets_its_name_between_opening_and_locking_is_left_alone(
    path: Path, partial: Path, monkeypatch: pytest.MonkeyPatch, another: bool
) -> None:
    """The run that wrote it has ended just then, and one more may have begun under the name."""

    def complete_first(file: Any, how: int) -> None:
        partial.rename(path)
        if another:
            write_file(partial, UNFINISHED)

    monkeypatch.setattr("fcntl.flock", complete_first)
    write_file(partial, UNFINISHED)
    with pytest.raises(UsageError, match=r"^Another run is writing .*out\.h5\.partial\. Wait for it"):
        claimed(path)


def test_where_nothing_can_be_locked_a_run_says_so_and_goes_on(
    path: Path, partial: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: Any, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    write_file(partial, UNFINISHED)
    with caplog.at_level(logging.WARNING):
        assert claimed(path).found
    assert caplog.messages == [f"{partial} cannot be locked here. Start only one run at a time with this --output."]


def test_another_trouble_with_the_lock_is_an_error(path: Path, partial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: Any, how: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("fcntl.flock", refuse)
    write_file(partial, UNFINISHED)
    with pytest.raises(UsageError, match=r"--output .*out\.h5 cannot be written: Input/output error\. Choose another"):
        claimed(path)


# Space.


def test_space_that_cannot_be_reserved_is_a_usage_error_and_leaves_nothing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full_disk(descriptor: int, start: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full_disk, raising=False)
    with pytest.raises(UsageError, match=r"--output .*out\.h5 cannot be created: No space left on device\.") as caught:
        created(path)
    assert isinstance(caught.value.__cause__, OSError)
    assert names(tmp_path) == []


def test_a_file_too_large_for_the_file_system_is_a_usage_error(path: Path, tmp_path: Path) -> None:
    layout = replace(LAYOUT, num_positions=2**58)
    with pytest.raises(UsageError, match=r"--output .*out\.h5 cannot be created: File too large\. Choose another"):
        claimed(path).create(layout, ABOUT, write_done([0, 0, 0]))
    assert names(tmp_path) == []


def test_a_failure_while_a_file_is_created_keeps_the_one_it_was_to_replace(path: Path, tmp_path: Path) -> None:
    def fail(file: BinaryIO, places: Places) -> None:
        raise KeyboardInterrupt

    content = cut_off(tmp_path / "out.h5.partial")
    output = claimed(path, overwrite=True)
    with pytest.raises(KeyboardInterrupt):
        output.create(LAYOUT, ABOUT, fail)
    assert names(tmp_path) == ["out.h5.partial"]
    assert (tmp_path / "out.h5.partial").read_bytes() == content


def test_a_file_that_does_not_fit_on_the_disk_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def disk_usage(folder: Path) -> DiskUsage:
        asked.append(folder)
        return DiskUsage(0, 0, 269_900_000)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    output = claimed(path)
    message = rf"--output .*out\.h5 needs 270\.1 MB, but {path.parent} has 269\.9 MB free\. Free .*--top_k.*--limit"
    with pytest.raises(UsageError, match=message):
        output.check_space(270_100_000)
    assert set(asked) == {path.parent}
    assert output.free_bytes == 269_900_000
    output.check_space(269_900_000)
    with pytest.raises(UsageError, match="needs"):
        output.check_space(269_900_001)


def test_a_file_that_is_resumed_has_its_space_already(
    path: Path, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: DiskUsage(0, 0, 5))
    write_file(partial, UNFINISHED)
    output = claimed(path)
    output.check(ABOUT)
    output.check_space(10**12)
