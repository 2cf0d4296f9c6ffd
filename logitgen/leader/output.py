"""The output: a name that one process claims, and the creation, resuming and completion of the file under it.

A new file is made under a third name. It is renamed to `.partial` once its head and all data known before the first
forward pass are on the disk, so the structure of a `.partial` is always whole. One more rename completes it.
"""

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from logitgen.console import format_bytes
from logitgen.errors import CaptureError, FormatError, UsageError, reason
from logitgen.file import header
from logitgen.file.header import Attributes, Header, Places
from logitgen.file.layout import LATER_ATTRIBUTES, PARTIAL_SUFFIX, Array, Layout
from logitgen.leader.lock import locked, reserve, sync_folder

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

_READABLE_NAMES = {
    "teacher_fingerprint": "the teacher's weights",
    "tokenizer_fingerprint": "the tokenizer",
    "chat_template_fingerprint": "the chat template or its options",
    "dataset_fingerprint": "the tokens of the rows",
}
"""Readable names for attributes whose values mean nothing to a person."""
_PREFIXES = {"settings": "--", "teacher_config": "the teacher's ", "computation": "the teacher's "}
"""Prefixes of the names in an attribute that holds several values."""


class Output:
    """The leader's claim on an output.

    Attributes:
        path: Name of the complete file.
        partial: Name of the file until it is complete.
        new: Name of the file during its creation.
        found: The head of the complete file, or of the partial file to resume, or None if there is neither.
    """

    def __init__(self, path: Path, overwrite: bool, dry_run: bool = False) -> None:
        """Name an output. Nothing is read yet.

        Args:
            path: Name of the complete file.
            overwrite: Replace a complete file once the new one is complete, and a partial file of another run.
            dry_run: Lock and remove nothing, and only warn of a file of another run.
        """
        self.path = path
        self.partial = path.parent / (path.name + PARTIAL_SUFFIX)
        self.new = path.parent / (path.name + PARTIAL_SUFFIX + ".new")
        self.found: Header | None = None
        self._place = self.partial
        self._overwrite = overwrite
        self._dry_run = dry_run
        self._lock: BinaryIO | None = None

    def claim(self) -> None:
        """Inspect existing files before anything expensive, and lock the file to resume.

        Raises:
            UsageError: The name cannot be written to, is taken by something else, or another process writes to it.
        """
        with _refused_if_impossible(self.path, "written"):
            self._check_names()
            if not self._dry_run:
                self._remove_unfinished()
            if self.path.exists() and not self._overwrite:
                self._place = self.path
            elif not self.partial.exists():
                tempfile.TemporaryFile(dir=self.path.parent).close()
                return
            elif not self._dry_run:
                self._lock = locked(self.partial, os.O_RDWR)
        try:
            self.found = header.read(self._place)
        except FormatError as error:
            self._refuse(f"{self._place} exists but is unusable: {error}")
        if self._place == self.path and not self.is_complete():
            self._refuse(f"{self.path} has the name of a complete file, but lacks rows.")

    def _check_names(self) -> None:
        if not self.path.parent.is_dir():
            raise UsageError(f"--output {self.path}: the folder {self.path.parent} does not exist. Create it.")
        for path in (self.path, self.partial, self.new):
            if path.is_symlink() or (path.exists() and not path.is_file()):
                raise UsageError(f"--output {self.path}: {path} is not a regular file. Choose another name.")
        for path in (self.path, self.partial, self.new):
            if path.exists() and not header.has_signature(path, unfinished=path == self.new):
                raise UsageError(
                    f"--output {self.path}: {path} exists and is not a logitgen file. "
                    "Choose another name, or remove it."
                )

    def _remove_unfinished(self) -> None:
        """Free the space of a file whose creation was killed."""
        if self.new.exists():
            lock = locked(self.new, os.O_RDWR)
            self.new.unlink()
            lock.close()

    def _refuse(self, why: str) -> None:
        if not (self._overwrite or self._dry_run):
            raise UsageError(f"{why} Choose another --output, or replace it with --overwrite.")
        hint = "This run replaces it." if self._overwrite else "Without --overwrite, the run stops here."
        logger.warning("%s %s", why, hint)
        self.found = None

    def found_settings(self, settings: Mapping[str, Any], names: Iterable[str]) -> dict[str, int]:
        """Return the numbers that the file to resume has for some settings, as far as there is such a file.

        Args:
            settings: This run's settings.
            names: Those that are still open.
        """
        there = self._to_resume(settings, names)["settings"]
        return {name: there[name] for name in names if isinstance(there.get(name), int) and there[name] > 0}

    def chat_template_date(self, settings: Mapping[str, Any], names: Iterable[str]) -> str:
        """Return the date that the chat template prints in the file to resume, or no text if there is none.

        For the arguments, see `found_settings`.
        """
        return str(self._to_resume(settings, names).get("chat_template_date") or "")

    def _to_resume(self, settings: Mapping[str, Any], names: Iterable[str]) -> Mapping[str, Any]:
        """Return the attributes of the file found, unless it is of another run and will be replaced."""
        there, unknown = self.found.attributes if self.found else {"settings": {}}, dict.fromkeys(names)
        of_another_run = there["settings"] | unknown != {**settings, **unknown}
        return {"settings": {}} if self._overwrite and of_another_run else there

    def check(self, attributes: Mapping[str, Any]) -> None:
        """Compare the existing file with the attributes this run would write, as far as they are known.

        Args:
            attributes: Some of the file's attributes.

        Raises:
            UsageError: They differ, and `overwrite` does not allow to start anew.
        """
        if self.found and (differences := list(_differences(self.found.attributes, attributes))):
            self._refuse(
                f"{self._place} belongs to another run. Its values and this run's differ: {'; '.join(differences)}."
            )

    def done(self) -> Array:
        """Read the `done` flags of the file found, bool[N]."""
        if self.found is None:
            raise ValueError("There is no file yet.")
        values = np.fromfile(self._place, "u1", self.found.layout.num_rows, offset=self.found.places["done"])
        return np.asarray(values == 1)

    def is_complete(self) -> bool:
        """Tell whether the file found has all its rows."""
        return self.found is not None and bool(self.done().all())

    @property
    def free_bytes(self) -> int:
        """Free space on the output's disk."""
        return shutil.disk_usage(self.path.parent).free

    def check_space(self, size_bytes: int) -> None:
        """Refuse a new file that does not fit on the disk. A resumed file has its space already.

        Raises:
            UsageError: The free space is less than the size of the file.
        """
        if self.found is None and size_bytes > self.free_bytes:
            raise UsageError(
                f"--output {self.path} needs {format_bytes(size_bytes)}, but {self.path.parent} has "
                f"{format_bytes(self.free_bytes)} free. Free some space, "
                "or keep less per position (--top_k) or fewer rows (--limit)."
            )

    def create(self, layout: Layout, attributes: Attributes, write_known: Callable[[BinaryIO, Places], None]) -> Header:
        """Create the file, unless there is one to resume.

        Args:
            layout: The file's sizes.
            attributes: The file's attributes.
            write_known: Writes the data known before the first forward pass, given the file and the datasets' places.

        Returns:
            The file's head.

        Raises:
            UsageError: Another process was faster, or the file cannot be created.
        """
        if self.found:
            self._check_own()
            return self.found
        new = self.new
        with _refused_if_impossible(self.path, "created"):
            lock = locked(new, os.O_RDWR | os.O_CREAT)
            try:
                self._check_still_free()
                places = header.create(new, layout, attributes)
                with open(new, "r+b", buffering=0) as file:
                    reserve(file.fileno())
                    write_known(file, places)
                    os.fsync(file.fileno())
                new.replace(self.partial)
            except BaseException:
                new.unlink(missing_ok=True)
                raise
            self._lock = lock
            sync_folder(self.path.parent)
        self.found = header.read(self.partial)
        return self.found

    def _check_still_free(self) -> None:
        """Check again, now that nobody else can create the file."""
        if (self.partial.exists() and self._lock is None) or (self.path.exists() and not self._overwrite):
            raise UsageError(f"Another run is writing {self.path}. Wait for it, or choose another --output.")

    def _check_own(self) -> None:
        """Check that the partial file's name still belongs to the file this run has open.

        Raises:
            CaptureError: It does not: the file was moved or removed, or another file took its place.
        """
        if self._lock is None or self._lock.closed:  # Windows, where an open file cannot be moved
            return
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(self._lock.fileno()), self.partial.stat()):
                return
        raise CaptureError(
            f"{self.partial} is no longer this run's file: something moved, removed or replaced it. "
            f"The run's rows are in {_present_path(self._lock)}."
        )

    def complete(self) -> None:
        """Give the file its final name, unless it has it already.

        Raises:
            CaptureError: The rename fails, or another file has taken its name or the final name.
        """
        if self._place == self.path:
            return
        self._check_own()
        if self.path.exists() and not (self._overwrite and header.has_signature(self.path)):
            raise CaptureError(
                f"{self.path} appeared during the run, and is not replaced. All rows are in {self.partial}. Rename it."
            )
        try:
            with self.partial.open("r+b") as file:  # a killed run may have left flags that are in memory only
                if self.found:
                    os.ftruncate(file.fileno(), self.found.size_bytes)  # cuts off the status line
                os.fsync(file.fileno())
            self.partial.replace(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            raise CaptureError(f"{self.partial} cannot be renamed to {self.path.name}: {reason(error)}.") from error
        self._place = self.path


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    named = set()
    for name in sorted(here, key=lambda name: name != "settings"):  # first: other attributes repeat some of them
        if name in LATER_ATTRIBUTES and not there[name]:
            continue  # an older file without this attribute
        if isinstance(there[name], dict):
            wanted = json.loads(here[name])
            for key in sorted(there[name].keys() | wanted):
                if there[name].get(key) != wanted.get(key):
                    named.add(key)
                    yield f"{_PREFIXES.get(name, '')}{key} {there[name].get(key)} and {wanted.get(key)}"
        elif there[name] != here[name] and name not in named:
            yield _READABLE_NAMES.get(name, f"{name} {there[name]} and {here[name]}")


def _present_path(file: BinaryIO) -> Path | str:
    """Find the present path of an open file, which only Linux tells."""
    try:
        return Path(f"/proc/self/fd/{file.fileno()}").readlink()
    except OSError:
        return "the moved file, if it still exists"


@contextmanager
def _refused_if_impossible(path: Path, done: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(f"--output {path} cannot be {done}: {reason(error)}. Choose another place.") from error
