"""Run `generate.py` and write down what each rank did when: `python -m benchmarks.traced FOLDER [--slow_disk] OPTIONS`.

With `--slow_disk` every write takes as long as on a disk of `SLOW_BYTES_PER_SECOND`.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from logitgen import generate
from logitgen.leader import places, progress, writer
from logitgen.ranks import deliver

SLOW_BYTES_PER_SECOND = 1e5

events: list[tuple[str, float, float]] = []
"""What was done, from when to when, in seconds of the machine's clock."""


def traced(kind: str, work: Callable[..., Any]) -> Callable[..., Any]:
    """Write down when some work is done."""

    def run(*arguments: Any, **options: Any) -> Any:
        start = time.time()
        try:
            return work(*arguments, **options)
        finally:
            events.append((kind, start, time.time()))

    return run


def waits_traced(put: Callable[..., None]) -> Callable[..., None]:
    """Write down for how long, at its begin, handing over has waited for a free buffer."""

    def run(outbox: Any, *arguments: Any) -> None:
        start, before = time.time(), outbox.waited_seconds
        put(outbox, *arguments)
        events.append(("wait", start, start + outbox.waited_seconds - before))

    return run


def slowed(put: Callable[..., None]) -> Callable[..., None]:
    """Let a write take as long as a slow disk would."""

    def run(datasets: Any, name: str, data: Any, parts: Any) -> None:
        put(datasets, name, data, parts)
        if name == "kept_ids":
            time.sleep(data.nbytes / SLOW_BYTES_PER_SECOND)

    return run


def main(folder: Path, arguments: list[str]) -> None:
    """Run as `generate.py` does, and leave `rank_N.json` in the folder."""
    generate.capture_batch = traced("forward", generate.capture_batch)
    generate.seal = traced("checksum", generate.seal)
    deliver.Outbox.put = traced("hand over", waits_traced(deliver.Outbox.put))  # type: ignore[method-assign]
    writer.Writer._write_batch = traced("write", writer.Writer._write_batch)  # type: ignore[method-assign]
    os.fsync = traced("sync", os.fsync)
    if "--slow_disk" in arguments:
        arguments.remove("--slow_disk")
        places.Arrays.put_parts = slowed(places.Arrays.put_parts)  # type: ignore[method-assign]
    progress.PLAIN_SECONDS = 2.0
    sys.argv = ["generate.py", *arguments]
    generate.main()
    path = folder / f"rank_{os.environ.get('RANK', '0')}.json"
    path.write_text(json.dumps(events), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
