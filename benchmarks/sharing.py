"""Ranks that each hold a teacher, and the same number that hold one together: memory, speed, and what changes.

python -m benchmarks.sharing --teacher FOLDER --dataset ROWS.jsonl
"""

import argparse
import shutil
from pathlib import Path

import numpy as np

from benchmarks.harness import ROOT, launch, measure, median_and_spread, write_report
from logitgen import LogitsFile

ENV = {"MALLOC_TRIM_THRESHOLD_": "131072"}
"""Has the C library give free memory back, which may else keep the room of layers that were gathered; not on GPUs."""

LAYOUTS = {"a whole teacher each": "", "tensor parallel": "tp_size", "fully sharded": "fsdp_size"}


def largest_difference(file: LogitsFile, other: LogitsFile) -> float:
    """How far the teacher's log-prob of a token that came is from what the other file has, in nats, at most."""
    return float(np.abs(file.arrays["target_logprob"] - other.arrays["target_logprob"]).max())


def main() -> None:
    """Measure whole commands in turns, and compare their files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--profile", default="cpu", help="Launch profile in accelerate_configs/, without .yaml.")
    parser.add_argument("--ranks", type=int, default=3, help="Must divide the teacher's key-value heads.")
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / ".bench")
    options = parser.parse_args()
    folder = options.output.resolve() / "sharing_files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = [*launch(options.ranks, options.profile), "generate.py", "--batch_tokens=512", f"--limit={options.rows}"]
    run += [f"--teacher={options.teacher}", f"--dataset={options.dataset}", f"--log_dir={folder / 'logs'}"]
    seconds: dict[str, list[float]] = {}
    private_bytes: dict[str, list[int]] = {}
    resident_bytes: dict[str, list[int]] = {}
    for number in range(options.rounds):
        for name, size in LAYOUTS.items():
            sizes = [f"--{size}={options.ranks}"] if size else []
            measured = measure([*run, *sizes, f"--output={folder / f'{name} {number}.h5'}"], ENV)
            seconds.setdefault(name, []).append(measured.wall_seconds)
            ranks = [process for process in measured.processes.values() if process.is_rank]
            private_bytes.setdefault(name, []).extend(process.peak_private_bytes for process in ranks)
            resident_bytes.setdefault(name, []).extend(process.peak_bytes for process in ranks)
    table, data = [], []
    files = {name: [LogitsFile(folder / f"{name} {number}.h5") for number in range(options.rounds)] for name in LAYOUTS}
    (reference, *_) = files["a whole teacher each"]
    for name in LAYOUTS:
        speed = median_and_spread(
            [alone / own for alone, own in zip(seconds["a whole teacher each"], seconds[name], strict=True)]
        )
        resident, private = (median_and_spread(found[name]) for found in (resident_bytes, private_bytes))
        difference = max(largest_difference(file, reference) for file in files[name])
        same = len({file.path.read_bytes() for file in files[name]}) == 1
        data.append(
            {
                "layout": name,
                "seconds": seconds[name],
                "resident_bytes": resident_bytes[name],
                "private_bytes": private_bytes[name],
                "largest_difference": difference,
                "same_bytes_every_round": same,
                "bytes_as_the_first": files[name][0].path.read_bytes() == reference.path.read_bytes(),
            }
        )
        table.append(
            {
                f"{options.ranks} ranks": name,
                "peak MB per rank": f"{resident.median / 1e6:,.0f}",
                "without mapped files": f"{private.median / 1e6:,.0f}",
                "speed of whole commands": f"{speed.median:.2f} ({speed.least:.2f}-{speed.most:.2f})",
                "largest difference, nats": f"{difference:.1e}" if difference else "0",
                "same bytes every round": "yes" if same else "NO",
            }
        )
    write_report(options.output, "sharing", data, table)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
