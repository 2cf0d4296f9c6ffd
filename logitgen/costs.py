"""Views of a run for the terminal: the estimate before it, the summary after it."""

import math

import numpy as np
from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.text import Text

from logitgen.console import definitions, format_bytes, format_seconds, grid
from logitgen.estimate import Estimate
from logitgen.facts import facts
from logitgen.file.reader import LogitsFile
from logitgen.leader.progress import Speed


def estimate_view(known: Estimate, free_bytes: int) -> RenderableType:
    """Draw the cost of a run.

    Args:
        known: The estimate.
        free_bytes: Free space on the output's disk.
    """
    host, device = (max(values) for values in zip(*((p.host_bytes, p.device_bytes) for p in known.pilots), strict=True))
    lines = {
        "rows": f"{known.num_rows:,}, {known.num_cut:,} of the split were too long",
        "tokens": f"{known.num_tokens:,}, {known.num_positions:,} positions captured, "
        f"{known.num_dropped_tokens:,} tokens dropped",
        "batches": f"{known.num_batches:,}, {known.padding_share:.1%} padding",
        **_saved(known.saved_share),
        "file": f"{known.size_bytes:,} bytes, {known.size_bytes / known.num_tokens:,.1f} per token; "
        f"{format_bytes(free_bytes)} free",
        "memory per rank": (format_bytes(host) if host else "unknown on this system")
        + (f" and {format_bytes(device)} on the GPU" if device else "")
        + f", and {format_bytes(known.buffer_bytes)} of buffers on the leader",
        "speed": f"{known.tokens_per_second:,.0f} tokens/s per rank, {len(known.pilots)} measured at once",
        **_masses(known),
    }
    sizes = grid("kept", "file", "per token", *(["mass", "9 of 10"] if known.masses else []))
    for name, size_bytes in known.other_sizes.items():
        masses = map(_share, known.masses.get(name, ()))
        sizes.add_row(name, format_bytes(size_bytes), f"{size_bytes / known.num_tokens:,.1f} B", *masses)
    times = grid("ranks", "time")
    for num_ranks, seconds in known.seconds.items():
        times.add_row(str(num_ranks), format_seconds(seconds))
    return Group(definitions(lines), Text(), Columns([sizes, times], padding=(0, 6)))


def _masses(known: Estimate) -> dict[str, str]:
    """Name the probability mass that is kept, and say where it was measured."""
    if not known.masses:
        return {}
    mean, tenth = map(_share, known.masses.get(known.kept, (0, 0)))
    own = f"{known.kept} keep {mean}, and at least {tenth} at 9 of 10 positions; " if known.kept in known.masses else ""
    return {"mass kept": f"{own}measured at {known.num_measured:,} positions of the pilot"}


def _share(value: float) -> str:
    """Write a share in percent, rounded down: no part of a whole reads as the whole."""
    return f"{math.floor(value * 1e4 + 1e-6) / 1e4:.2%}"


def summary(file: LogitsFile, num_duplicates: int, speed: Speed) -> RenderableType:
    """Draw the end of a run.

    Args:
        file: The complete file.
        num_duplicates: Rows that were written more than once.
        speed: Its speed.
    """
    known = facts(file)
    present = int(np.count_nonzero(file.arrays["done"]))
    lines = {
        "rows": f"{len(file):,} expected, {present:,} present, {len(file) - present:,} missing, "
        f"{num_duplicates:,} duplicates",
        "tokens": f"{known['tokens']:,}, {known['positions']:,} positions captured",
        "speed": f"{speed.num_tokens / speed.seconds:,.0f} tokens/s over {format_seconds(speed.seconds)}, "
        f"{speed.padding_share:.1%} padding, {speed.waited_share:.1%} waiting",
        **_saved(speed.saved_share),
        "size": f"{format_bytes(known['size_bytes'])}, {known['bytes_per_token']:,.1f} bytes per token",
        "teacher perplexity": f"{known['perplexity']:,.3f}",
        "file": known["path"],
    }
    return definitions(lines)


def _saved(share: float) -> dict[str, str]:
    """Name the tokens that shared prefixes save, if any."""
    return {"shared prefixes": f"{share:.1%} of the tokens need not be read again"} if share else {}
