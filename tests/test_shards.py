"""Parts of a split captured into files of their own, as docs/scaling.md says, and read as one."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES, launch, write_jsonl
from torch.utils.data import DataLoader

from logitgen import LogitsDataset, LogitsFile, collate

Capture = Callable[..., Path]
SLICES = {"train[:25%]": (0, 13), "train[13:27]": (13, 27), "train[27:40]": (27, 40), "train[75%:]": (40, 53)}
"""Of 53 rows; percentages are rounded to the nearest row."""


@pytest.fixture
def shards(capture: Capture, teacher: Path, ragged: Path, tmp_path: Path) -> Callable[..., tuple[Path, list[Path]]]:
    """Capture a whole split and its four parts, the third of them on two real ranks."""

    def run(batch_tokens: int) -> tuple[Path, list[Path]]:
        options = {"teacher": teacher, "dataset": ragged, "top_k": 8, "batch_tokens": batch_tokens}
        paths = []
        for number, split in enumerate(SLICES):
            places = {"output": tmp_path / f"part_{number}.h5", "log_dir": tmp_path / f"logs_{number}"}
            if number == 2:
                ended = launch(2, **options, **places, split=split)
                assert ended.returncode == 0, ended.stderr
                assert "Ranks: 2" in ended.stderr
            else:
                capture(**options, **places, split=split)
            paths.append(places["output"])
        return capture(**options, output=tmp_path / "whole.h5"), paths

    return run


def test_parts_of_a_split_read_as_one_are_the_whole_bit_by_bit(
    shards: Callable[..., tuple[Path, list[Path]]],
) -> None:
    """One row to a batch: so every row is computed in the same shape, whatever part it is in."""
    path, paths = shards(batch_tokens=1)
    whole, joined, file = LogitsDataset(path), LogitsDataset(paths), LogitsFile(path)
    assert len(joined) == len(whole) == 53
    for number in range(53):
        for name, values in whole[number].items():
            assert torch.equal(joined[number][name], values), (number, name)
    for part, (start, end) in zip(map(LogitsFile, paths), SLICES.values(), strict=True):
        assert len(part) == end - start
        assert part.arrays["source_row"].tolist() == list(range(end - start))  # rows of the slice, not of the split
        for name in ("input_ids", "positions", *file.layout.captured):
            of_row = "offsets" if name == "input_ids" else "position_offsets"
            span = slice(*file.arrays[of_row][[start, end]])
            assert part.arrays[name].tobytes() == file.arrays[name][span].tobytes(), name
    shuffled = torch.randperm(53, generator=torch.Generator().manual_seed(0)).tolist()
    loaders = [
        DataLoader(dataset, batch_size=8, sampler=shuffled, collate_fn=collate, num_workers=workers)
        for dataset, workers in ((whole, 0), (joined, 2))
    ]
    for left, right in zip(*loaders, strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.slow
def test_parts_of_a_split_in_larger_batches_are_the_whole_but_for_rounding(
    shards: Callable[..., tuple[Path, list[Path]]],
) -> None:
    """Other neighbours make other shapes: float32 rounds otherwise, and a float16 may end up one step away."""
    path, paths = shards(batch_tokens=100)
    whole, joined = LogitsDataset(path), LogitsDataset(paths)
    for number in range(53):
        here, there = joined[number], whole[number]
        for name in ("input_ids", "positions", "kept_ids"):
            assert torch.equal(here[name], there[name]), (number, name)
        for name in ("logsumexp", "target_logprob"):
            torch.testing.assert_close(here[name], there[name], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(here["kept_logprobs"], there["kept_logprobs"], rtol=2**-10, atol=1e-4)


def test_parts_that_are_drawn_with_one_seed_share_their_draws(capture: Capture, teacher: Path, tmp_path: Path) -> None:
    """Twice the same rows: row by row the same tokens are drawn, unless each part has a seed of its own."""
    rows = [{"text": SENTENCES[number][:80]} for number in range(6)]
    data = write_jsonl(tmp_path / "d.jsonl", rows * 2)
    options = {"teacher": teacher, "dataset": data, "capture": "sample", "top_k": 4, "batch_tokens": 1}
    first, same, own = (
        capture(**options, split=f"train[{span}]", seed=seed, output=tmp_path / f"{span}_{seed}.h5")
        for span, seed in ((":6", 0), ("6:", 0), ("6:", 1))
    )
    drawn = [LogitsFile(path).arrays["kept_ids"] for path in (first, same, own)]
    assert np.array_equal(drawn[0], drawn[1])
    assert np.mean(drawn[0] == drawn[2]) < 0.5
    assert len(LogitsDataset([first, own])) == 12
