"""The short form of `make chaos`; see tests/chaos.py for what a round is."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_whatever_is_killed_or_stopped_nothing_is_lost_or_wrong() -> None:
    command = [sys.executable, "tests/chaos.py", "--rounds", "12", "--launches", "1"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert ended.returncode == 0, ended.stderr
    columns = ["rounds", "struck", "unreadable", "wrong", "left", "unfinished", "other", "lost"]
    total = dict(zip(columns, map(int, ended.stdout.splitlines()[-1].split()[1:]), strict=True))
    assert total["rounds"] == 13
    assert total["struck"] > 5
    assert [total[name] for name in ("unreadable", "wrong", "left", "unfinished", "other")] == [0] * 5
