"""What a capture of any size takes: computed from the format's own sizes, nothing is measured.

    python -m benchmarks.scaling --tokens 1e12 --rows 1e8 --gpus 8 64 512 --tokens_per_second 20000 --leader_mb 300 1280

`--leader_mb` are speeds of a leader that `python -m benchmarks.leader` has measured, in MB/s.
"""

import math
from collections.abc import Iterator

from benchmarks.harness import Row, parse, write_report
from logitgen.file import header
from logitgen.file.layout import ATTRIBUTES, STORED_DTYPES, Layout
from logitgen.file.states import HeadForm

HEAD = HeadForm(hidden_size=4096, dtype=STORED_DTYPES["bfloat16"], has_bias=False)
KINDS: dict[str, Row] = {
    "topk 64": {"capture": "topk", "top_k": 64},
    "topk 64, packed": {"capture": "topk", "top_k": 64, "encoding": "packed"},
    "topk 128, packed": {"capture": "topk", "top_k": 128, "encoding": "packed"},
    "sample 12, packed": {"capture": "sample", "top_k": 12, "encoding": "packed"},
    "hidden 4096, bfloat16": {"capture": "hidden", "top_k": 0, "head": HEAD},
    "full": {"capture": "full", "top_k": 0},
}


def lines(sizes: dict[str, int], gpus: list[int], tokens_per_second: float, leader_mb: list[float]) -> Iterator[Row]:
    """Compute what every kind takes on every number of GPUs that read so many tokens a second each.

    `sizes` has `num_rows`, `num_tokens` and `vocab_size`. Each row's last token has no captured position.
    """
    num_positions = sizes["num_tokens"] - sizes["num_rows"]
    for name, kept in KINDS.items():
        layout = Layout(num_positions=num_positions, **sizes, **kept)
        size_bytes = header.file_bytes(layout, {name: kind() for name, kind in ATTRIBUTES.items()})
        for num_gpus in gpus:
            seconds = sizes["num_tokens"] / (num_gpus * tokens_per_second)
            megabytes = num_positions * layout.bytes_per_position / seconds / 1e6
            yield {
                "kind": name,
                "B/position": layout.bytes_per_position,
                "file, TB": size_bytes / 1e12,
                "GPUs": num_gpus,
                "days": seconds / (24 * 60 * 60),
                "MB/s": megabytes,
                **{f"leaders of {mb:,.0f} MB/s": math.ceil(megabytes / mb) for mb in leader_mb},
            }


def main() -> None:
    """Print the table, and leave it in a report."""
    speeds = {"tokens_per_second": 20_000.0, "leader_mb": [300.0, 1280.0]}
    options = parse(__doc__, tokens=1e12, rows=1e8, gpus=[8, 64, 512], **speeds)
    sizes = {"num_rows": int(options.rows), "num_tokens": int(options.tokens), "vocab_size": 151_936}
    table = list(lines(sizes, options.gpus, **{name: getattr(options, name) for name in speeds}))
    write_report(options.output, "scaling", table, {"file, TB": ",.1f", "days": ",.1f"})


if __name__ == "__main__":
    main()
