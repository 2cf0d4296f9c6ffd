"""What docs/scaling.md computes: against sums by hand, and against a real file."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from benchmarks import __main__ as benchmarks
from benchmarks.scaling import KINDS, lines

HEAD_BYTES = 100_000
"""More than the head of any file, with the attributes of a real run."""

DOC = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
TRILLION = {"num_rows": 10**8, "num_tokens": 10**12, "vocab_size": 151_936}


def test_sizes_days_and_leaders_are_those_worked_out_by_hand() -> None:
    found = {line["kind"]: line for line in lines(TRILLION, [64], 20_000, [225, 760])}
    assert list(found) == list(KINDS)
    num_positions = 10**12 - 10**8  # a row's last token has none
    # A row: done 1, crc32 4, source_row 8, two offsets 16. A token: its id 4. A position: its index 4, two floats 8.
    rest = 29 * 10**8 + 4 * 10**12 + 12 * num_positions
    kept = {
        "topk 64": 64 * (4 + 2),
        "hidden 4096, bfloat16": 4096 * 2,
        "full": 151_936 * 2,
    }
    for kind, size_bytes in kept.items():
        head_bytes = 151_936 * 4096 * 2 if kind.startswith("hidden") else 0
        assert found[kind]["B/position"] == size_bytes + 8
        expected = rest + head_bytes + size_bytes * num_positions
        assert expected < found[kind]["file, TB"] * 1e12 < expected + HEAD_BYTES
    topk = found["topk 64"]
    assert topk["days"] == pytest.approx(10**12 / (64 * 20_000) / (24 * 60 * 60))
    assert topk["MB/s"] * 1e6 == pytest.approx(64 * 20_000 * 392, rel=1e-3)  # 502 MB/s
    assert (topk["leaders of 225 MB/s"], topk["leaders of 760 MB/s"]) == (3, 1)


def test_the_table_of_the_page_is_what_its_command_prints(tmp_path: Path) -> None:
    command = re.search(r"```\n(python -m benchmarks\.scaling .*)\n```", DOC)
    assert command
    words = [sys.executable, *shlex.split(command[1])[1:], "--output", str(tmp_path)]
    printed = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    table = re.sub(" +", " ", re.sub("-{3,}", "---", printed))
    assert table.count("\n") == 2 + 3 * len(KINDS)
    assert f"```\n\n{table}\n" in DOC


def test_it_runs_with_all_others() -> None:
    assert "scaling" in benchmarks.EVERYDAY
