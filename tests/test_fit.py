"""The largest k whose file has a given size, against the sizes of files with that k and the next."""

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import interrupted, launch, write_jsonl

from logitgen import LogitsFile, UsageError, generate

Capture = Callable[..., Path]


@pytest.fixture
def options(teacher: Path, tmp_path: Path) -> dict[str, Any]:
    rows = [{"input_ids": [(7 * row + index) % 384 for index in range(40)]} for row in range(60)]
    return {"teacher": teacher, "dataset": write_jsonl(tmp_path / "rows.jsonl", rows), "batch_tokens": 500}


def typed(capture: Capture, options: dict[str, Any], k: int, encoding: str) -> bytes:
    """The file of a k that was typed."""
    output = options["dataset"].parent / f"{k} {encoding}.h5"
    return capture(output=output, top_k=k, encoding=encoding, **options).read_bytes()


@pytest.mark.parametrize(
    ("encoding", "max_bytes"),
    [("packed", "200kB"), ("packed", "150001"), ("packed", "0.3MiB"), ("plain", "200kB"), ("packed16", "200kB")],
)
def test_the_file_has_the_largest_k_that_fits(
    capture: Capture, options: dict[str, Any], tmp_path: Path, encoding: str, max_bytes: str
) -> None:
    size_bytes = {"200kB": 200_000, "150001": 150_001, "0.3MiB": 314_572}[max_bytes]
    said = {} if encoding == "packed" else {"encoding": encoding}
    path = capture(max_bytes=max_bytes, **said, **options)
    k = LogitsFile(path).layout.top_k
    assert path.stat().st_size <= size_bytes < len(typed(capture, options, k + 1, encoding))
    assert path.read_bytes() == typed(capture, options, k, encoding)
    log = (tmp_path / "logs" / "rank_0.log").read_text()
    assert (
        f"--max_bytes {size_bytes:,}: --top_k {k} --encoding {encoding}, at most {path.stat().st_size:,} bytes" in log
    )


def test_the_smallest_size_that_is_named_is_the_smallest(capture: Capture, options: dict[str, Any]) -> None:
    smallest = len(typed(capture, options, 1, "packed"))
    message = rf"^--max_bytes must be at least {smallest:,} \([0-9.]+ kB\) to keep one token per position, got "
    with pytest.raises(UsageError, match=rf"{message}{smallest - 1:,}\. Raise it, or take fewer rows \(--limit\)\.$"):
        capture(max_bytes=smallest - 1, **options)
    assert LogitsFile(capture(max_bytes=smallest, **options)).layout.top_k == 1


def test_nothing_larger_than_the_vocabulary_is_kept(capture: Capture, options: dict[str, Any]) -> None:
    file = LogitsFile(capture(max_bytes="1TB", limit=2, **options))
    assert file.layout.top_k == 384
    assert sorted(file.row(0)["kept_ids"][0].tolist()) == list(range(384))


@pytest.mark.parametrize("batch_tokens", [500, "auto"])
def test_the_same_command_resumes_a_run_with_the_k_of_its_file(
    capture: Capture,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch_tokens: int | str,
) -> None:
    monkeypatch.setattr(generate, "fitting_batch_tokens", lambda *arguments: 256)
    command = options | {"batch_tokens": batch_tokens, "max_bytes": "200kB"}
    interrupted(capture, monkeypatch, **command)
    partial = tmp_path / "out.h5.partial"
    k = LogitsFile(partial, partial=True).layout.top_k
    done = int(LogitsFile(partial, partial=True).arrays["done"].sum())
    assert 0 < done < 60
    computed: list[Any] = []
    compute = generate.capture_batch
    monkeypatch.setattr(generate, "capture_batch", lambda *given: computed.extend(given[1].rows) or compute(*given))
    path = capture(**command)
    assert len(computed) == 60 - done
    known = {"batch_tokens": 256 if batch_tokens == "auto" else 500}
    assert path.read_bytes() == typed(capture, options | known, k, "packed")
    computed.clear()
    assert capture(**command) == path  # complete: there is nothing left to do
    assert computed == []
    settings = json.loads(json.dumps(LogitsFile(path).attributes["settings"]))
    assert (settings["top_k"], settings["encoding"], "max_bytes" in settings) == (k, "packed", False)


def test_another_size_is_refused_where_it_means_another_k(
    capture: Capture, options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(capture, monkeypatch, **options, max_bytes="200kB")
    k = LogitsFile(tmp_path / "out.h5.partial", partial=True).layout.top_k
    with pytest.raises(UsageError, match=rf"and this run's differ: --top_k {k} and \d+\. Choose another --output"):
        capture(max_bytes="300kB", **options)
    gc.collect()
    path = capture(max_bytes="300kB", overwrite=True, **options)
    assert 200_000 < path.stat().st_size <= 300_000


def test_a_dry_run_tells_the_size_of_that_k(
    capture: Capture, options: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert not capture(max_bytes="200kB", dry_run=True, **options).exists()
    shown = " ".join(capsys.readouterr().out.split())
    size_bytes = capture(max_bytes="200kB", **options).stat().st_size
    assert f"file {size_bytes:,} bytes, " in shown


def test_two_ranks_take_the_same_k(capture: Capture, options: dict[str, Any], tmp_path: Path) -> None:
    one = capture(max_bytes="200kB", **options).read_bytes()
    path = tmp_path / "two.h5"
    ended = launch(2, output=path, log_dir=tmp_path / "two logs", max_bytes="200kB", **options)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("The largest file within --max_bytes 200,000: --top_k ") == 1
    assert path.read_bytes() == one
