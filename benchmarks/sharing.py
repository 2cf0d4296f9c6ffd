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
        size = f"size={options.ranks}"
        shared = {WHOLE: [], "tensor parallel": [f"--tp_{size}"], "fully sharded": [f"--fsdp_{size}"]}
        outputs = {way: folder / f"{way}.h5" for way in shared}
        commands = {way: [*run, *words, "--overwrite", f"--output={outputs[way]}"] for way, words in shared.items()}
        found = in_turns({way: partial(measure, command, **ENV) for way, command in commands.items()}, options.rounds)
        values = {way: LogitsFile(output).arrays["target_logprob"] for way, output in outputs.items()}
        far = {way: float(np.abs(ours - values[WHOLE]).max()) for way, ours in values.items()}
    seconds = {way: [run.wall_seconds for run in runs] for way, runs in found.items()}
    peaks = {way: [peak for run in runs for peak in run.largest(options.ranks)] for way, runs in found.items()}
    table = [
        {
            f"{options.ranks} ranks": way,
            "peak MB per rank": median(resident for resident, _ in peaks[way]) / 1e6,
            "without mapped files": median(private for _, private in peaks[way]) / 1e6,
            "speed of whole commands": Spread.of(seconds[WHOLE], seconds[way]),
            "largest difference, nats": far[way],
        }
        for way in found
    ]
    write_report(
        options.output, "sharing", table, {"speed of whole commands": ".2f", "largest difference, nats": ".2g"}
    )


if __name__ == "__main__":
    main()
