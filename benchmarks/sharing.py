"""Ranks that each hold a teacher, and the same number that hold one together: memory, speed, and what changes.

python -m benchmarks.sharing --teacher FOLDER --dataset ROWS.jsonl

`--ranks` must divide the teacher's key-value heads. `--profile` is a launch profile in accelerate_configs/.
"""

from functools import partial
from statistics import median

import numpy as np

from benchmarks.harness import Spread, in_turns, launch, measure, parse, scratch, write_report
from logitgen import LogitsFile

ENV = {"MALLOC_TRIM_THRESHOLD_": "131072"}
"""Has the C library give free memory back, which may else keep the room of layers that were gathered; not on GPUs."""

WHOLE = "a whole teacher each"


def main() -> None:
    """Measure whole commands in turns, and compare their files."""
    options = parse(__doc__, teacher=str, dataset=str, profile="cpu", ranks=3, rows=150, rounds=2)
    with scratch(options) as folder:
        run = [*launch(options.ranks, options.profile), "generate.py", "--batch_tokens=512", f"--limit={options.rows}"]
        run += [f"--teacher={options.teacher}", f"--dataset={options.dataset}", f"--log_dir={folder / 'logs'}"]
        together = {"tensor parallel": "tp_size", "fully sharded": "fsdp_size"}
        sizes = {WHOLE: []} | {name: [f"--{size}={options.ranks}"] for name, size in together.items()}
        outputs = {name: f"--output={folder / name}.h5" for name in sizes}
        runs = {name: partial(measure, [*run, *sizes[name], outputs[name], "--overwrite"], **ENV) for name in sizes}
        found = in_turns(runs, options.rounds)
        files = {name: LogitsFile(folder / f"{name}.h5").arrays["target_logprob"] for name in sizes}
        far = {name: float(np.abs(values - files[WHOLE]).max()) for name, values in files.items()}
    seconds = {name: [run.wall_seconds for run in runs] for name, runs in found.items()}
    ranks = {name: [rank for run in runs for rank in run.ranks] for name, runs in found.items()}
    table = [
        {
            f"{options.ranks} ranks": name,
            "peak MB per rank": median(rank.peak_bytes for rank in ranks[name]) / 1e6,
            "without mapped files": median(rank.peak_private_bytes for rank in ranks[name]) / 1e6,
            "speed of whole commands": Spread.of(seconds[WHOLE], seconds[name]),
            "largest difference, nats": far[name],
        }
        for name in found
    ]
    forms = {"speed of whole commands": ".2f", "largest difference, nats": ".2g"}
    write_report(options.output, "sharing", table, forms, {"seconds": seconds, "ranks": ranks, "table": table})


if __name__ == "__main__":
    main()
