"""All that is open about a GPU, within ten minutes: speed, where the time goes, memory, numbers, equal bytes.

    python -m benchmarks.gpu

No network and no weights: teachers of real shapes are made on the device with random weights, rows with the lengths of
chats. Each part prints its table when it is done; a part that fails or for which no time is left says so. On a CPU the
same parts run with tiny shapes, which shows that they work and nothing else. `--parts` names some of them, with commas
between them. No part is begun that would take longer than `--seconds`.
"""

import logging
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu_bench import ON_GPU, TINY, Bench
from benchmarks.gpu_speed import attention, ranks, speed, stages
from benchmarks.gpu_values import files, memory, numbers
from benchmarks.harness import Row, machine, parse, scratch, table_of, write
from logitgen.errors import first_line

PARTS: dict[str, tuple[Callable[[Bench], Iterator[Row]], float, str]] = {
    "speed": (speed, 150, ".3f"),
    "stages": (stages, 20, ".2f"),
    "memory": (memory, 30, ",.0f"),
    "numbers": (numbers, 30, ".1e"),
    "attention": (attention, 15, ",.0f"),
    "files": (files, 90, ""),
    "ranks": (ranks, 120, ""),
}
"""Each with the seconds it needs on a GPU, about, and how to write its numbers."""

FORMS = {"tokens/s": ",.0f", "GPU idle": ".1%"}


def main() -> None:
    """Run all parts, or those that are named, as far as the time goes."""
    options = parse(__doc__, parts=",".join(PARTS), seconds=600.0)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    found: dict[str, list[Row]] = {}
    tables = f"{', '.join(machine()['gpus']) or 'CPU, tiny shapes'}\n"
    start = time.monotonic()
    with scratch(options) as folder:
        bench = Bench(device, ON_GPU if device.type == "cuda" else TINY, folder)
        for name in options.parts.split(","):
            part, needed_seconds, form = PARTS[name]
            began = time.monotonic()
            left_seconds = options.seconds - (began - start)
            if bench.on_gpu and left_seconds < needed_seconds:
                print(
                    f"{name}: left out, it takes {needed_seconds:.0f} s and {left_seconds:.0f} s are left.", flush=True
                )
                continue
            try:
                found[name] = list(part(bench))
            except Exception as error:  # the other parts are worth having
                logging.exception(name)
                print(f"{name}: failed. {first_line(error)}", flush=True)
                continue
            print(f"{name}, {time.monotonic() - began:.0f} s:", flush=True)
            tables += f"\n{name}:\n\n{table_of(found[name], dict.fromkeys(found[name][0], form) | FORMS)}"
            write(options.output, "gpu", tables, found)


if __name__ == "__main__":
    main()
