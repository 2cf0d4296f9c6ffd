"""The head of a file: what lies where, and that no damage to it goes unnoticed. Hostile heads are made with h5py."""

import hashlib
import os
import random
import re
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from files import (
    ARRAYS,
    ATTRIBUTES,
    FULL,
    ROWS,
    SCALARS,
    TOP_2,
    changing,
    plain_attributes,
    seal,
    with_checksums,
    write_file,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st

from logitgen import FormatError
from logitgen.file import header
from logitgen.file.header import create, file_bytes
from logitgen.file.layout import JSON_ATTRIBUTES, LATER_ATTRIBUTES, Layout

SETTINGS: dict[str, Any] = ATTRIBUTES["settings"]
SMALL = Layout(capture="topk", num_rows=3, num_tokens=9, num_positions=4, vocab_size=10, top_k=2)
SMALLEST = Layout(capture="topk", num_rows=1, num_tokens=1, num_positions=1, vocab_size=1, top_k=1)
WIDE = Layout(capture="topk", num_rows=1, num_tokens=1_000, num_positions=999, vocab_size=200_000, top_k=64)
ALL = Layout(capture="full", num_rows=50, num_tokens=77, num_positions=5, vocab_size=1_000, top_k=0)
TEXT = re.compile(
    rb"logitgen file, format version 1\nHDF5 from byte 512 on\nhead_bytes (\d+)\nhead_sha256 ([0-9a-f]{64})\n\0+"
)


def text_of(path: Path) -> tuple[int, str]:
    """What the file's first 512 bytes say: the size of the head and its SHA-256."""
    found = TEXT.fullmatch(path.read_bytes()[:512])
    assert found
    return int(found[1]), found[2].decode()


def attributes_for(layout: Layout, **changes: Any) -> dict[str, Any]:
    sizes = {name: getattr(layout, name) for name in ("capture", "encoding", "top_k", "vocab_size", "tokenizer_size")}
    return plain_attributes(**sizes, **changes)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file made by h5py alone."""
    return write_file(tmp_path / "out.h5")


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A file made by the module."""
    create(tmp_path / "made.h5", SMALL, attributes_for(SMALL))
    return tmp_path / "made.h5"


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    capture = draw(st.sampled_from(["topk", "sample", "full"]))
    vocab_size = draw(st.sampled_from([2, 7, 300, 65_536, 65_537]))
    top_k = 0 if capture == "full" else draw(st.integers(1, min(vocab_size, 70)))
    return Layout(
        capture=capture,
        tokenizer_size=draw(st.integers(top_k if capture == "sample" else 0, 2 * vocab_size)),
        num_rows=draw(st.integers(1, 2_000)),
        num_tokens=draw(st.integers(1, 20_000)),
        num_positions=draw(st.integers(1, 50)),
        vocab_size=vocab_size,
        top_k=top_k,
        encoding="plain" if capture == "full" else draw(st.sampled_from(["plain", "packed", "packed16"])),
    )


def as_text(value: Any) -> Any:
    """What h5py hands out, as it was meant."""
    return value.decode() if isinstance(value, bytes) else value


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)


# Where things lie.


@settings(max_examples=80, deadline=None)
@given(layouts(), st.integers(0, 7_000), texts)
@example(SMALLEST, 0, "")
@example(SMALL, 6_000, "grün")
@example(WIDE, 60_000, "some/teacher")
@example(ALL, 30_000, "some/teacher")
def test_the_size_is_known_to_the_byte_and_nothing_lies_between_the_datasets(
    layout: Layout, settings_bytes: int, teacher: str
) -> None:
    attributes = attributes_for(layout, settings=SETTINGS | {"dataset": "x" * settings_bytes}, teacher=teacher)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.h5"
        places = create(path, layout, attributes)
        size_bytes = path.stat().st_size
        assert file_bytes(layout, attributes) == size_bytes
        assert list(places) == list(layout.datasets)
        end, digest = text_of(path)
        assert hashlib.sha256(path.read_bytes()[512:end]).hexdigest() == digest
        for name, (shape, dtype) in layout.datasets.items():
            assert places[name] == end
            end += np.empty(shape, dtype).nbytes
        assert end == size_bytes
        with h5py.File(path, "r") as file:
            assert {name: as_text(value) for name, value in file.attrs.items()} == attributes
            assert {name: (file[name].shape, file[name].dtype) for name in file} == dict(layout.datasets)
            assert {name: file[name].id.get_offset() for name in file} == dict(places)


@settings(max_examples=40, deadline=None)
@given(
    layouts(),
    st.dictionaries(texts.filter(lambda name: name not in SETTINGS), st.none() | st.booleans() | st.integers() | texts),
    texts,
)
def test_what_is_created_is_read_back(layout: Layout, about: dict[str, Any], teacher: str) -> None:
    about = SETTINGS | about
    attributes = attributes_for(layout, settings=about, teacher=teacher)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.h5"
        places = create(path, layout, attributes)
        found = header.read(path)
    assert found.layout == layout
    assert dict(found.places) == dict(places)
    objects = {name: ATTRIBUTES[name] for name in JSON_ATTRIBUTES} | {"settings": about}
    assert found.attributes == attributes | objects


def test_a_file_of_huge_size_is_estimated_without_making_it() -> None:
    layout = Layout(
        capture="full", num_rows=10**7, num_tokens=10**11, num_positions=10**11, vocab_size=200_000, top_k=0
    )
    start = time.monotonic()
    size_bytes = file_bytes(layout, attributes_for(layout))
    data_bytes = 10**7 * (1 + 4 + 8) + 2 * (10**7 + 1) * 8 + 10**11 * 4 + 10**11 * (4 + 4 + 4 + 400_000)
    assert 0 < size_bytes - data_bytes < 40_000
    assert time.monotonic() - start < 1


def test_equal_heads_are_equal_bytes(tmp_path: Path) -> None:
    for name in ("first", "second"):
        create(tmp_path / name, SMALL, attributes_for(SMALL))
    first, second = ((tmp_path / name).read_bytes() for name in ("first", "second"))
    end = int(TEXT.fullmatch(first[:512])[1])  # type: ignore[index]
    assert first[:end] == second[:end]


def test_a_file_is_plain_contiguous_hdf5_allocated_at_creation(made: Path) -> None:
    with h5py.File(made, "r") as file:
        for dataset in file.values():
            creation = dataset.id.get_create_plist()
            assert creation.get_layout() == h5py.h5d.CONTIGUOUS
            assert creation.get_alloc_time() == h5py.h5d.ALLOC_TIME_EARLY
            assert creation.get_fill_time() == h5py.h5d.FILL_TIME_NEVER
            assert creation.get_nfilters() == 0
            assert h5py.h5g.get_objinfo(file.id, dataset.name.encode()).mtime == 0  # the only time HDF5 would store
    assert made.read_bytes()[512:521] == b"\x89HDF\r\n\x1a\n\x00"  # superblock 0: the oldest, which every HDF5 reads


def test_a_file_begins_with_text_that_can_be_read_on_any_screen(made: Path) -> None:
    first = made.read_bytes()[:512].rstrip(b"\0").decode("ascii").splitlines()
    assert first[:2] == ["logitgen file, format version 1", "HDF5 from byte 512 on"]
    assert [line.split()[0] for line in first[2:]] == ["head_bytes", "head_sha256"]


@pytest.mark.parametrize("layout", [SMALL, ALL])
def test_a_file_that_h5py_alone_has_made_is_read(tmp_path: Path, layout: Layout) -> None:
    full = {"capture": "full", "top_k": 0}
    path = write_file(tmp_path / "out.h5", FULL, **full) if layout is ALL else write_file(tmp_path / "out.h5")
    found = header.read(path)
    arrays = FULL if layout is ALL else ARRAYS
    assert found.attributes == ATTRIBUTES | (full if layout is ALL else {})
    assert type(found.attributes["top_k"]) is int
    for name, values in arrays.items():
        assert path.read_bytes()[found.places[name] :].startswith(values.tobytes())


# Damage.


@contextmanager
def flipped(path: Path, byte: int, bit: int) -> Iterator[None]:
    """Have one bit of a file changed for a while."""
    with path.open("r+b", buffering=0) as file:
        (right,) = os.pread(file.fileno(), 1, byte)
        os.pwrite(file.fileno(), bytes([right ^ 1 << bit]), byte)
        yield
        os.pwrite(file.fileno(), bytes([right]), byte)


def is_accepted(path: Path) -> bool:
    try:
        header.read(path)
    except FormatError:
        return False
    return True


def test_every_flipped_bit_of_the_text_is_noticed(made: Path) -> None:
    assert is_accepted(made)
    accepted = []
    for byte in range(512):
        for bit in range(8):
            with flipped(made, byte, bit):
                accepted += [(byte, bit)] if is_accepted(made) else []
    assert accepted == []


def test_a_flipped_bit_in_any_byte_of_the_structures_is_noticed(made: Path) -> None:
    bits = random.Random(0)
    for byte in range(512, text_of(made)[0]):
        with flipped(made, byte, bits.randrange(8)):
            assert not is_accepted(made), byte
    assert is_accepted(made)


def test_structures_that_were_changed_are_named(made: Path) -> None:
    message = r"made\.h5 is damaged: its head does not match its checksum\. Copy it again\.$"
    with flipped(made, 1000, 3), pytest.raises(FormatError, match=message):
        header.read(made)


def test_a_flipped_bit_in_the_data_is_none_of_the_heads_business(made: Path) -> None:
    with flipped(made, text_of(made)[0], 0):
        assert header.read(made).layout == SMALL


def test_a_file_cut_off_anywhere_is_refused(made: Path) -> None:
    text_bytes = len(made.read_bytes()[:512].rstrip(b"\0"))
    for size in reversed(range(made.stat().st_size)):
        os.truncate(made, size)
        with pytest.raises(FormatError) as caught:
            header.read(made)
        message = "is not a logitgen file" if size < text_bytes else "is truncated. Copy it again."
        assert f"made.h5 {message}" in str(caught.value), size


@pytest.mark.parametrize("content", [b"", b"not HDF5 at all" * 100, b"\x89HDF\r\n\x1a\n" + bytes(2000), bytes(2000)])
def test_a_file_that_is_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out.h5").write_bytes(content)
    message = (
        r"out\.h5 is not a logitgen file: it has another signature\. "
        r"Give the original, not a copy that another HDF5 program made\.$"
    )
    with pytest.raises(FormatError, match=message):
        header.read(tmp_path / "out.h5")


def test_a_file_copied_by_another_hdf5_program_is_refused(path: Path, tmp_path: Path) -> None:
    with h5py.File(path, "r") as old, h5py.File(tmp_path / "copy.h5", "w") as new:
        new.attrs.update(old.attrs)
        for name in old:
            old.copy(name, new)
    with pytest.raises(FormatError, match=r"copy\.h5 is not a logitgen file.*that another HDF5 program made"):
        header.read(tmp_path / "copy.h5")


@pytest.mark.parametrize("version", [2, 10, 999_999_999])
def test_a_newer_version_is_refused(path: Path, version: int) -> None:
    seal(path, version=version)
    message = rf"out\.h5 has format version {version}, this logitgen reads versions up to 1\. Update logitgen\.$"
    with pytest.raises(FormatError, match=message):
        header.read(path)


@pytest.mark.parametrize("version", ["0", "-1", "1.5", "0001234567890", "x", ""])
def test_a_version_that_never_was_is_refused(path: Path, version: str) -> None:
    seal(path, version=version)
    with pytest.raises(FormatError, match=r"out\.h5 "):
        header.read(path)


def test_a_version_in_the_attributes_other_than_in_the_text_is_refused(tmp_path: Path) -> None:
    path = write_file(tmp_path / "out.h5", version=2)
    with pytest.raises(FormatError, match=r"out\.h5 is damaged: attributes format and version do not match its first"):
        header.read(path)


def test_a_file_garbled_behind_the_checksum_is_refused(path: Path) -> None:
    content = path.read_bytes()
    at = content.index(b"vocab_size\0") + 16  # the name is padded to 16 bytes; then comes the attribute's type
    path.write_bytes(content[:at] + bytes(8) + content[at + 8 :])
    seal(path, text_of(path)[0])
    with pytest.raises(FormatError, match=r"out\.h5 is damaged: "):
        header.read(path)


def test_a_file_shortened_and_made_valid_again_is_refused(path: Path) -> None:
    """HDF5 notes where the file ends."""
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 1)
    with pytest.raises(FormatError, match=r"out\.h5 is truncated\. Copy it again\.$"):
        header.read(path)


# What is no file at all.


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"/out\.h5 is not a file\.$"):
        header.read(tmp_path / "out.h5")


def test_a_folder_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"is not a file\.$"):
        header.read(tmp_path)


def test_a_capture_that_is_not_finished_is_hinted_at(tmp_path: Path) -> None:
    (tmp_path / "out.h5.partial").touch()
    with pytest.raises(
        FormatError, match=r"out\.h5 is not a file\. Its \.partial exists\. Finish that capture first\."
    ):
        header.read(tmp_path / "out.h5")


@pytest.mark.parametrize("name", ["/", "", "x" * 5000, "a\0b"])
def test_a_path_that_cannot_be_a_file_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match=r"is not a file\."):
        header.read(Path(name))


# Heads that are valid by their checksum, and wrong all the same.


@pytest.mark.parametrize("name", LATER_ATTRIBUTES)
def test_a_file_older_than_an_attribute_is_read_with_its_default(path: Path, name: str) -> None:
    with changing(path) as file:
        del file.attrs[name]
    assert not header.read(path).attributes[name]


@pytest.mark.parametrize("name", sorted(set(ATTRIBUTES) - set(LATER_ATTRIBUTES)))
def test_a_missing_attribute_is_named(path: Path, name: str) -> None:
    with changing(path) as file:
        del file.attrs[name]
    with pytest.raises(FormatError, match=rf"out\.h5 is damaged: attribute {name} is missing or not (str|int)\."):
        header.read(path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("version", "x", "attribute version is missing or not int"),
        ("vocab_size", 1.5, "attribute vocab_size is missing or not int"),
        ("vocab_size", "10", "attribute vocab_size is missing or not int"),
        ("vocab_size", np.array([10]), "attribute vocab_size is missing or not int"),
        ("vocab_size", np.zeros((2, 3, 4)), "attribute vocab_size is missing or not int"),
        ("top_k", h5py.Empty("i8"), "attribute top_k is missing or not int"),
        ("top_k", np.void(b"\x01" * 20), "attribute top_k is missing or not int"),
        ("top_k", np.array((1, 2), "i4,i4"), "attribute top_k is missing or not int"),
        ("teacher", 5, "attribute teacher is missing or not str"),
        ("teacher", ["a", "b"], "attribute teacher is missing or not str"),
        ("teacher", np.array("text of any length", h5py.string_dtype()), "attribute teacher is missing or not str"),
        ("teacher", np.bytes_(b"\xff\xfe"), "'utf-8' codec can't decode byte 0xff"),
        ("teacher", h5py.Empty("S4"), "attribute teacher is missing or not str"),
        ("settings", "5", "attribute settings is not a JSON object"),
        ("settings", "{", "attribute settings is not a JSON object"),
        ("settings", "[" * 5000, "attribute settings is not a JSON object"),
        ("packages", "[1]", "attribute packages is not a JSON object"),
        ("packages", "{", "attribute packages is not a JSON object"),
        ("packages", "[]", "attribute packages is not a JSON object"),
        ("settings", '[["dataset", 1]]', "(attribute settings is not a JSON object|its settings lack)"),
        ("format", "another", "attributes format and version do not match its first bytes"),
        ("version", 0, "attributes format and version do not match its first bytes"),
        ("capture", "everything", "attributes capture, vocab_size and top_k contradict one another"),
        ("capture", "full", "attributes capture, vocab_size and top_k contradict one another"),
        ("vocab_size", -1, "attributes capture, vocab_size and top_k contradict one another"),
        ("vocab_size", 1, "attributes capture, vocab_size and top_k contradict one another"),
        ("top_k", 0, "attributes capture, vocab_size and top_k contradict one another"),
        ("top_k", 11, "attributes capture, vocab_size and top_k contradict one another"),
        ("top_k", -(2**63), "attributes capture, vocab_size and top_k contradict one another"),
        ("encoding", "", "encoding must be one of plain, packed, packed16"),
        ("encoding", "packed", r"target_logprob is float32\[4\], expected float16\[4\]"),
        ("vocab_size", np.uint64(2**64 - 1), "attribute vocab_size is missing or not int"),
        ("vocab_size", 2**63 - 1, r"input_ids is uint16\[9\], expected uint32\[9\]"),
        ("vocab_size", np.True_, "attribute vocab_size is missing or not int"),
        ("settings", {}, "its settings lack teacher"),
        ("settings", SETTINGS | {"split": 5}, "its settings lack split"),
    ],
)
def test_an_attribute_that_cannot_be_is_named(tmp_path: Path, name: str, value: Any, message: str) -> None:
    path = write_file(tmp_path / "out.h5", **{name: value})
    with pytest.raises(FormatError, match=rf"out\.h5 is damaged: {message}"):
        header.read(path)


@pytest.mark.parametrize("encoding", ["plain", "packed"])
def test_a_file_of_the_older_draws_is_refused(tmp_path: Path, encoding: str) -> None:
    """It has another dataset, and its weights would come out wrong."""
    kept = TOP_2 if encoding == "plain" else {"kept": np.zeros((4, 4), "u1")}
    arrays = with_checksums(ROWS | SCALARS | {"threshold": np.zeros(4, "<f4")} | kept)
    path = write_file(tmp_path / "out.h5", arrays, capture="sample", encoding=encoding)
    with pytest.raises(FormatError, match=r"^\S+out\.h5 was written by an older logitgen, in another form\. Capture"):
        header.read(path)


@pytest.mark.parametrize("tokenizer_size", [1, -1])
def test_more_draws_than_there_are_ids_are_refused(tmp_path: Path, tokenizer_size: int) -> None:
    path = write_file(tmp_path / "out.h5", capture="sample", tokenizer_size=tokenizer_size)
    with pytest.raises(FormatError, match="attributes capture, vocab_size and top_k contradict one another"):
        header.read(path)


def test_a_file_of_draws_with_a_value_each_is_refused(tmp_path: Path) -> None:
    """Its records are shorter: two ids below 10 in 1 byte, and 2 values. Now a mean comes with them."""
    packed = {"target_logprob": SCALARS["target_logprob"].astype("<f2"), "kept": np.zeros((4, 3), "u1")}
    path = write_file(tmp_path / "out.h5", with_checksums(ROWS | packed), capture="sample", encoding="packed")
    with pytest.raises(FormatError, match=r"^\S+out\.h5 was written by an older logitgen, in another form\. Capture"):
        header.read(path)
    packed["kept"] = np.zeros((4, 5), "u1")
    path = write_file(tmp_path / "new.h5", with_checksums(ROWS | packed), capture="sample", encoding="packed")
    assert header.read(path).layout.captured["kept"] == ((5,), np.dtype("u1"))


@pytest.mark.parametrize("capture", ["topk", "sample"])
@pytest.mark.parametrize("encoding", ["packed", "packed16"])
def test_an_older_packed_file_is_refused(tmp_path: Path, capture: str, encoding: str) -> None:
    """It has the two scalars that a plain file has."""
    arrays = with_checksums(ROWS | SCALARS | {"kept": np.zeros((4, 4), "u1")})
    path = write_file(tmp_path / "out.h5", arrays, capture=capture, encoding=encoding)
    with pytest.raises(FormatError, match=r"^\S+out\.h5 was written by an older logitgen, in another form\. Capture"):
        header.read(path)


@pytest.mark.parametrize("name", ["extra", "Ünknown", "[bold]", "x" * 3000, "a\nb"])
def test_an_attribute_the_format_does_not_have_is_named(tmp_path: Path, name: str) -> None:
    path = write_file(tmp_path / "out.h5", **{name: 1})
    with pytest.raises(FormatError, match=r"out\.h5 is damaged: the format has no attribute '") as caught:
        header.read(path)
    assert repr(name)[:80] in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ARRAYS)
def test_a_missing_dataset_is_named(path: Path, name: str) -> None:
    with changing(path) as file:
        del file[name]
    with pytest.raises(FormatError, match=rf"out\.h5 is damaged: dataset {name} is missing\."):
        header.read(path)


@pytest.mark.parametrize("name", ["done", "kept_ids"])
def test_a_group_in_a_datasets_place_is_named(path: Path, name: str) -> None:
    with changing(path) as file:
        del file[name]
        file.create_group(name)
    with pytest.raises(FormatError, match=rf"out\.h5 is damaged: dataset {name} is missing\."):
        header.read(path)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("positions", ARRAYS["positions"].astype("<i8"), r"positions is int64\[4\], expected int32\[4\]"),
        ("input_ids", ARRAYS["input_ids"].astype("<u4"), r"input_ids is uint32\[9\], expected uint16\[9\]"),
        ("logsumexp", ARRAYS["logsumexp"].astype(">f4"), r"logsumexp is >f4\[4\], expected float32\[4\]"),
        ("offsets", ARRAYS["offsets"][:-1], r"offsets is int64\[3\], expected int64\[4\]"),
        ("kept_ids", np.zeros((4, 3), "<u2"), r"kept_ids is uint16\[4, 3\], expected uint16\[4, 2\]"),
        ("kept_logprobs", np.zeros(8, "<f2"), r"kept_logprobs is float16\[8\], expected float16\[4, 2\]"),
        ("positions", ARRAYS["positions"][:-1], r"logsumexp is float32\[4\], expected float32\[3\]"),
        ("crc32", np.zeros(3, "u1,u1,u2"), r"crc32 is \[\('f0'.*expected uint32\[3\]"),
        ("crc32", np.array([b"abcd"] * 3), r"crc32 is \|S4\[3\], expected uint32\[3\]"),
        ("done", np.zeros(3, bool), r"done is bool\[3\], expected uint8\[3\]"),
        ("done", np.uint8(1), r"done is uint8\[\], expected one axis, not empty"),
        ("done", np.zeros((3, 1), "u1"), r"done is uint8\[3, 1\], expected one axis, not empty"),
        ("done", np.zeros(0, "u1"), r"done is uint8\[0\], expected one axis, not empty"),
        ("input_ids", np.zeros(0, "<u2"), r"input_ids is uint16\[0\], expected one axis, not empty"),
        ("positions", np.zeros(0, "<i4"), r"positions is int32\[0\], expected one axis, not empty"),
    ],
)
def test_a_dataset_of_another_dtype_or_shape_is_named(path: Path, name: str, values: Any, message: str) -> None:
    with changing(path) as file:
        del file[name]
        file[name] = values
    with pytest.raises(FormatError, match=rf"out\.h5 is damaged: {message}"):
        header.read(path)


@pytest.mark.parametrize("name", ["done", "crc32", "kept_ids"])
def test_a_dataset_without_any_space_is_refused(path: Path, name: str) -> None:
    with changing(path) as file:
        del file[name]
        file[name] = h5py.Empty(ARRAYS[name].dtype)
    with pytest.raises(FormatError, match=r"out\.h5 is damaged: "):
        header.read(path)


def chunked(file: h5py.File, name: str, **options: Any) -> None:
    values = file[name][()]
    del file[name]
    file.create_dataset(name, data=values, **options)


def compact(file: h5py.File, name: str) -> None:
    values = file[name][()]
    del file[name]
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_layout(h5py.h5d.COMPACT)
    space = h5py.h5s.create_simple(values.shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(values.dtype), space, creation).write(
        h5py.h5s.ALL, h5py.h5s.ALL, values
    )


def virtual(file: h5py.File, name: str) -> None:
    shape, dtype = file[name].shape, file[name].dtype
    del file[name]
    layout = h5py.VirtualLayout(shape, dtype)
    layout[...] = h5py.VirtualSource("secret.h5", name, shape=shape)
    file.create_virtual_dataset(name, layout)


def external(file: h5py.File, name: str) -> None:
    shape, dtype = file[name].shape, file[name].dtype
    size = int(np.prod(shape)) * dtype.itemsize
    del file[name]
    secret = Path(file.filename).with_name("secret").absolute()
    file.create_dataset(name, shape, dtype, external=[(str(secret), 0, size)])


REWRITTEN: dict[str, Callable[[h5py.File, str], None]] = {
    "chunked": lambda file, name: chunked(file, name, chunks=True),
    "compressed": lambda file, name: chunked(file, name, compression="gzip"),
    "growing": lambda file, name: chunked(file, name, maxshape=(None,) * file[name].ndim),
    "compact": compact,
    "virtual": virtual,
    "external storage": external,
}


@pytest.mark.parametrize("name", ["done", "kept_ids"])
@pytest.mark.parametrize("kind", REWRITTEN)
def test_a_dataset_that_does_not_lie_in_the_file_as_it_is_is_refused(path: Path, name: str, kind: str) -> None:
    path.with_name("secret").write_bytes(b"\x01" * 1000)
    with changing(path) as file:
        REWRITTEN[kind](file, name)
    message = rf"out\.h5 was rewritten by another program: {name} is no longer contiguous\. Use the original\.$"
    with pytest.raises(FormatError, match=message):
        header.read(path)
    assert path.with_name("secret").read_bytes() == b"\x01" * 1000


@pytest.mark.parametrize("name", ["done", "kept_ids"])
def test_a_dataset_that_has_no_place_yet_is_refused(path: Path, name: str) -> None:
    with changing(path) as file:
        shape, dtype = file[name].shape, file[name].dtype
        del file[name]
        file.create_dataset(name, shape, dtype)  # HDF5 gives it a place when it is written to
    with pytest.raises(FormatError, match=rf"out\.h5 is damaged: {name} starts at the wrong byte\. Copy it again\.$"):
        header.read(path)


@pytest.mark.parametrize("name", ["done", "input_ids", "kept_ids"])
@pytest.mark.parametrize(
    "link",
    [
        h5py.SoftLink("/elsewhere"),
        h5py.SoftLink("/nowhere"),
        h5py.ExternalLink("other.h5", "/elsewhere"),
        h5py.ExternalLink("missing.h5", "/elsewhere"),
        h5py.ExternalLink("/dev/zero", "/"),
    ],
    ids=lambda link: f"{type(link).__name__} {link.path}",
)
def test_a_link_in_a_datasets_place_is_not_followed(path: Path, name: str, link: Any) -> None:
    with h5py.File(path.with_name("other.h5"), "w") as other:
        other["elsewhere"] = ARRAYS[name]
    with changing(path) as file:
        file["elsewhere"] = file[name]
        del file[name]
        file[name] = link
    with pytest.raises(FormatError, match=rf"out\.h5 is damaged: dataset {name} is missing\."):
        header.read(path)


@pytest.mark.parametrize("name", ["done", "input_ids", "positions"])
@pytest.mark.parametrize("size", [2**20, 2**40, 2**59])
def test_an_absurd_number_of_rows_or_tokens_is_refused_without_allocating_it(path: Path, name: str, size: int) -> None:
    with changing(path) as file:
        dtype = file[name].dtype
        del file[name]
        file.create_dataset(name, (size,), dtype)
    start = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"out\.h5 (is damaged|was rewritten)"):
            header.read(path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert time.monotonic() - start < 2


def test_a_dataset_that_ends_behind_the_file_is_refused(tmp_path: Path) -> None:
    """The file's own word on where it ends, which HDF5 compares, is made to agree."""
    layout = Layout(capture="topk", num_rows=3, num_tokens=9, num_positions=4, vocab_size=10, top_k=2)
    path = tmp_path / "out.h5"
    places = create(path, layout, attributes_for(layout))
    head_bytes, end = text_of(path)[0], path.stat().st_size
    content = path.read_bytes()
    noted = end.to_bytes(8, "little")
    assert content[512:head_bytes].count(noted) == 1
    path.write_bytes(content.replace(noted, (end - 16).to_bytes(8, "little"), 1)[:-16])
    seal(path, head_bytes)
    assert places["kept_logprobs"] == end - 16
    with pytest.raises(
        FormatError, match=r"out\.h5 (is damaged: .*invalid dataset size|has \d+ bytes).* Copy it again\."
    ):
        header.read(path)


def test_a_dataset_that_begins_inside_the_head_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.h5"
    places = create(path, SMALL, attributes_for(SMALL))
    head_bytes, content = text_of(path)[0], path.read_bytes()
    noted = (places["crc32"] - 512).to_bytes(8, "little")
    assert content[512:head_bytes].count(noted) == 1
    path.write_bytes(content.replace(noted, (0).to_bytes(8, "little"), 1))
    seal(path, head_bytes)
    with pytest.raises(FormatError, match=r"out\.h5 is damaged: crc32 starts at the wrong byte\. Copy it again\.$"):
        header.read(path)


@pytest.mark.parametrize("head_bytes", [0, 1, 511, 512, 513, 2**20 + 1, 999_999_999])
def test_a_head_of_an_impossible_size_is_refused_without_reading_the_file(made: Path, head_bytes: int) -> None:
    with made.open("r+b") as file:
        file.truncate(2**26)  # a hole
    seal_as_is(made, head_bytes)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=r"made\.h5 is (damaged|truncated|not a logitgen file)"):
            header.read(made)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def seal_as_is(path: Path, head_bytes: int) -> None:
    """Name a size of the head, and leave the checksum as it is."""
    content = path.read_bytes()[:512]
    text = re.sub(rb"head_bytes \d+", b"head_bytes %d" % head_bytes, content).rstrip(b"\0").ljust(512, b"\0")
    with path.open("r+b") as file:
        file.write(text)


@pytest.mark.parametrize("extra", [1, 4096])
def test_bytes_that_belong_to_nothing_are_refused(made: Path, extra: int) -> None:
    size = made.stat().st_size
    with made.open("ab") as file:
        file.write(bytes(extra))
    message = rf"made\.h5 must have {size:,} bytes, got {size + extra:,}\. Copy it again\.$"
    with pytest.raises(FormatError, match=message):
        header.read(made)


def test_datasets_that_lie_over_one_another_are_refused(made: Path) -> None:
    """Two of one size, so that nothing but the place is wrong."""
    with h5py.File(made, "r") as file:
        first, second = (file[name].id.get_offset() for name in ("logsumexp", "target_logprob"))
    head_bytes, content = text_of(made)[0], made.read_bytes()
    noted = (second - 512).to_bytes(8, "little")
    assert content[512:head_bytes].count(noted) == 1
    made.write_bytes(content.replace(noted, (first - 512).to_bytes(8, "little"), 1))
    seal(made, head_bytes)
    with pytest.raises(FormatError, match=r"is damaged: target_logprob starts at the wrong byte\. Copy it again\.$"):
        header.read(made)


def test_a_gap_between_the_datasets_is_refused(tmp_path: Path) -> None:
    """As h5py makes one when something of another's lies between ours."""
    arrays = dict(ARRAYS)
    arrays = {"done": arrays.pop("done"), "foreign": np.zeros(5, "u1")} | arrays
    path = write_file(tmp_path / "out.h5", arrays)
    with pytest.raises(FormatError, match=r"out\.h5 is damaged: crc32 starts at the wrong byte\. Copy it again\.$"):
        header.read(path)


def test_structures_of_random_bytes_raise_nothing_but_a_format_error(tmp_path: Path) -> None:
    """Bytes that HDF5 does not loop over: within the attributes and the names."""
    path = write_file(tmp_path / "out.h5")
    content, head_bytes = path.read_bytes(), text_of(path)[0]
    names = [content.index(name.encode() + b"\0") for name in (*ATTRIBUTES, *ARRAYS)]
    for at in names:
        path.write_bytes(content[:at] + b"\xff" + content[at + 1 :])
        seal(path, head_bytes)
        with pytest.raises(FormatError, match=r"out\.h5 is damaged: "):
            header.read(path)
