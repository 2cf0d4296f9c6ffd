"""What a capture of any size takes: computed from the format's own sizes, nothing is measured.

    python -m benchmarks.scaling --tokens 1e12 --rows 1e8 --gpus 8 64 512 --tokens_per_second 20000 --leader_mb 300 1280

For every kind of capture and number of GPUs: the file, the days, the bytes that the leader must take each second, and
how many leaders that makes at a speed that `python -m benchmarks.leader` has measured.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import write_report
from logitgen.file import header
from logitgen.file.layout import ATTRIBUTES, STORED_DTYPES, HeadForm, Layout

KINDS: dict[str, dict[str, Any]] = {
    "topk 64": {"capture": "topk", "top_k": 64},
    "topk 64, packed": {"capture": "topk", "top_k": 64, "encoding": "packed"},
    "topk 128, packed": {"capture": "topk", "top_k": 128, "encoding": "packed"},
    "sample 12, packed": {"capture": "sample", "top_k": 12, "encoding": "packed"},
    "hidden 4096, bfloat16": {
        "capture": "hidden",
        "top_k": 0,
        "head": HeadForm(hidden_size=4096, dtype=STORED_DTYPES["bfloat16"], has_bias=False),
    },
    "full": {"capture": "full", "top_k": 0},
}
SECONDS_PER_DAY = 86_400


def main() -> None:
    """Print the table, and leave it in a report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tokens", type=float, default=1e12)
    parser.add_argument("--rows", type=float, default=1e8)
    parser.add_argument("--vocab_size", type=int, default=151_936)
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--tokens_per_second", type=float, default=20_000, help="Of one GPU.")
    parser.add_argument("--leader_mb", type=float, nargs="*", default=[], help="What a leader takes, in MB/s.")
    parser.add_argument("--out", type=Path, default=Path(".bench"))
    options = parser.parse_args()
    sizes = {"num_rows": int(options.rows), "num_tokens": int(options.tokens), "vocab_size": options.vocab_size}
    found = list(lines(sizes, options.gpus, options.tokens_per_second, options.leader_mb))
    write_report(options.out, "scaling", found, [cells(line) for line in found])


def lines(
    sizes: dict[str, int], gpus: list[int], tokens_per_second: float, leader_mb: list[float]
) -> Iterator[dict[str, Any]]:
    """Compute what every kind takes on every number of GPUs.

    Args:
        sizes: `num_rows`, `num_tokens` and `vocab_size`; each row's last token has no captured position.
        gpus: Numbers of GPUs.
        tokens_per_second: Tokens one of them reads in a second.
        leader_mb: Speeds of a leader, in MB/s.
    """
    num_positions = sizes["num_tokens"] - sizes["num_rows"]
    for name, kept in KINDS.items():
        layout = Layout(num_positions=num_positions, **sizes, **kept)
        size_bytes = header.file_bytes(layout, {name: kind() for name, kind in ATTRIBUTES.items()})
        for num_gpus in gpus:
            seconds = sizes["num_tokens"] / (num_gpus * tokens_per_second)
            bytes_per_second = num_positions * layout.bytes_per_position / seconds
            yield {
                "kind": name,
                "position_bytes": layout.bytes_per_position,
                "size_bytes": size_bytes,
                "gpus": num_gpus,
                "days": seconds / SECONDS_PER_DAY,
                "bytes_per_second": bytes_per_second,
                "leaders": {mb: math.ceil(bytes_per_second / (mb * 1e6)) for mb in leader_mb},
            }


def cells(line: dict[str, Any]) -> dict[str, str]:
    """Turn a line into a row of the table."""
    return {
        "kind": line["kind"],
        "B/position": f"{line['position_bytes']:,}",
        "file, TB": f"{line['size_bytes'] / 1e12:,.1f}",
        "GPUs": f"{line['gpus']:,}",
        "days": f"{line['days']:,.1f}",
        "MB/s": f"{line['bytes_per_second'] / 1e6:,.0f}",
        **{f"leaders of {mb:,.0f} MB/s": f"{number:,}" for mb, number in line["leaders"].items()},
    }


if __name__ == "__main__":
    main()
