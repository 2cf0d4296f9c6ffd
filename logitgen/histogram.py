"""The spread of a file's distributions, drawn for the terminal and as a picture."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.bar import Bar
from rich.columns import Columns
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from logitgen.console import definitions
from logitgen.errors import UsageError, first_line

_WIDTH = 14
"""Characters of the longest bar: one histogram fits into 60 columns, three side by side into 120."""
_UNITS = {"mass": "", "entropy": ", nats", "perplexity": ""}


def spread_view(known: dict[str, Any], num_positions: int) -> RenderableType:
    """Draw the result of `spread`.

    Args:
        known: The result.
        num_positions: Positions of the file.
    """
    sampled = f" of {num_positions:,}, a sample in {known['stretches']} stretches at equal distances"
    lines = {"measured": f"{known['positions']:,} positions" + (sampled if known["stretches"] > 1 else ", all")}
    lines |= {_title(name): _summary(name, known[name]) for name in _UNITS if name in known}
    return Group(definitions(lines), Text(), Columns(map(_drawn, *_measures(known)), padding=(1, 3)))


def _measures(known: dict[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    names = [name for name in _UNITS if name in known]
    return names, [known[name] for name in names]


def _title(name: str) -> str:
    return "mass kept" if name == "mass" else name


def _summary(name: str, measure: dict[str, Any]) -> str:
    """Say the mean of a measure, and what it is."""
    if name == "mass":
        return f"mean {measure['mean']:.2%}, at least {measure['tenth']:.2%} at 9 of 10 positions"
    if name == "entropy":
        bound = ", a lower bound: all tokens of the tail count as one" if measure["lower_bound"] else ""
        return f"mean {measure['mean']:.3f} nats{bound}"
    return f"{measure['mean']:,.3f}, from 1 / p of each actual next token"


def _drawn(name: str, measure: dict[str, Any]) -> RenderableType:
    table = Table(box=None, pad_edge=False, show_header=False, title=_title(name) + _UNITS[name], title_justify="left")
    table.title_style = "bold"
    for justify in ("right", "left", "right"):
        table.add_column(justify=justify, no_wrap=True)
    for label, share, length in _shares(name, measure):
        table.add_row(label, _Bar(length), f"{share:.1%}")
    return table


def _shares(name: str, measure: dict[str, Any]) -> Iterator[tuple[str, float, float]]:
    """Yield the label of each bin, its share of the positions, and its share of the largest bin."""
    counts = [each["positions"] for each in measure["bins"]]
    for each, count in zip(measure["bins"], counts, strict=True):
        yield _label(name, each["from"], each["to"]), count / sum(counts), count / max(counts)


def _label(name: str, start: float, end: float | None) -> str:
    low, high = (f"{100 * bound:g}" if name == "mass" else f"{bound:,}" for bound in (start, end or 0))
    return f"{low}+" if end is None else f"{low}-{high}" + ("%" if name == "mass" else "")


@dataclass(frozen=True)
class _Bar:
    """A bar of block characters, or of # where the terminal or the pipe has none."""

    length: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield Text("#" * round(_WIDTH * self.length)) if options.ascii_only else Bar(1, 0, self.length, width=_WIDTH)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(_WIDTH, _WIDTH)


def plot(known: dict[str, Any], title: str, path: Path) -> None:
    """Draw the result of `spread` as a picture, in the format of the path's suffix.

    Args:
        known: The result.
        title: Title of the picture.
        path: Where to write it.

    Raises:
        UsageError: matplotlib is missing, or the picture cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("--plot needs matplotlib. Install it with `pip install matplotlib`.") from error
    names, measures = _measures(known)
    figure = Figure(figsize=(4 * len(names), 3.2), dpi=150, layout="constrained")
    sample = "a sample of " if known["stretches"] > 1 else ""
    figure.suptitle(f"{title}\n{sample}{known['positions']:,} positions", fontsize=10)
    for panel, name, measure in zip(figure.subplots(1, len(names), squeeze=False)[0], names, measures, strict=True):
        labels, shares, _ = zip(*_shares(name, measure), strict=True)
        panel.bar_label(panel.barh(labels, [100 * share for share in shares]), fmt="%.1f%%", padding=2, fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.2)
        panel.spines[["top", "right"]].set_visible(False)
        bound = ", lower bound" if measure.get("lower_bound") else ""
        panel.set(title=_title(name) + _UNITS[name] + bound, xlabel="positions, %")
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise UsageError(f"--plot {path} cannot be written: {first_line(error)}") from error
