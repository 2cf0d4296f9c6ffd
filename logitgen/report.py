"""Views of files, rows and runs for the terminal: tables and lines, drawn from facts."""

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from logitgen.console import definitions, format_bytes, format_seconds, printable
from logitgen.file.reader import LogitsFile
from logitgen.leader.progress import bars
from logitgen.leader.status import Status

if TYPE_CHECKING:
    from logitgen.rerun import Rerun  # its imports take seconds

NUM_DRAWN = 3
"""Guesses that fit into a line of 80 columns."""


def overview(known: dict[str, Any]) -> RenderableType:
    """Draw `facts`."""
    settings, packages = known["settings"], known["packages"]
    source = " ".join(str(settings[name]) for name in ("dataset", "dataset_config", "split") if settings[name])
    lines = {
        "file": f"{known['path']}  {format_bytes(known['size_bytes'])}, format version {known['version']}",
        "teacher": f"{known['teacher']}  {known['teacher_dtype']}{_quantized(known['quantization'])}"
        + (f", {known['commit']}" if known["commit"] else "")
        + (f", adapter {settings['adapter']}" if settings.get("adapter") else ""),
        "dataset": source,
        "rows": f"{known['rows']:,}, all complete  {known['shortest_row']:,} to {known['longest_row']:,} tokens each",
        "tokens": f"{known['tokens']:,}  {known['positions']:,} positions captured",
        "kept": f"{known['kept']} of {known['vocab_size']:,}  {known['bytes_per_position']:,} bytes per position",
        "bytes per token": f"{known['bytes_per_token']:,.1f}, tokens and index included",
        "perplexity": f"{known['perplexity']:,.3f}  of the teacher, over the captured positions",
        "settings": ", ".join(
            f"{name} {value}" for name, value in settings.items() if value is not None and value is not False
        ),
        "fingerprints": ", ".join(
            f"{name} {known[f'{name}_fingerprint'][:12]}" for name in ("teacher", "tokenizer", "dataset")
        ),
        "packages": ", ".join(f"{name} {version}" for name, version in packages.items()),
    }
    return definitions(lines)


def preview_view(known: dict[str, Any]) -> RenderableType:
    """Draw `preview_facts`."""
    unused = f"  not used: {', '.join(known['columns_not_used'])}" if known["columns_not_used"] else ""
    emptied = f", {known['rows_emptied']:,} lost all their completions" if known["rows_emptied"] else ""
    lines = {
        "dataset": f"{known['dataset']} {known['split']}",
        "columns": ", ".join(known["columns_read"]) + unused,
        "rows": f"{known['rows_of_split']:,} of the split become {known['rows']:,}  {known['rows_cut']:,} were too long"
        + emptied,
        "tokens": f"{known['tokens']:,}  {known['positions']:,} positions captured, {known['tokens_dropped']:,} tokens "
        f"dropped, longest row {known['longest_row']:,}",
    }
    warnings = [Text(line, style="yellow") for line in known["warnings"]]
    legend = Text("Tokens end at │. A captured position predicts each token in ⟦ ⟧.", style="dim")
    shown = [part for row in known["shown"] for part in (Text(), *_tokens_view(row))]
    return Group(definitions(lines), *warnings, Text(), legend, *shown)


def _tokens_view(row: dict[str, Any]) -> tuple[Text, Text]:
    """Draw the tokens of a row, the captured stretches in brackets. A line ends where a token ends one."""
    tokens = row["tokens"]
    num_captured = sum(token["captured"] for token in tokens)
    title = f"row {row['row']} (row {row['source_row']} of the split), {len(tokens)} tokens, {num_captured} captured"
    text = Text()
    captured = [False, *(token["captured"] for token in tokens), False]
    for before, token, after in zip(captured, tokens, captured[2:], strict=False):
        marked = token["captured"]
        text.append("⟦" if marked and not before else "", "bold green")
        text.append(printable(token["text"]).replace("\n", "↵\n").removesuffix("\n"), "green" if marked else "")
        text.append("⟧" if marked and not after else "", "bold green")
        text.append("\n" if token["text"].endswith("\n") else "│", "dim")
    return Text(title, style="bold"), text


def _quantized(how: str) -> str:
    try:
        return f", quantised by {json.loads(how)['quant_method']}" if how else ""
    except (ValueError, TypeError, KeyError, RecursionError):  # of another version, or forged
        return ", quantised"


def verdict_view(file: LogitsFile, found: list[str], more: bool, compared: "Rerun | None") -> RenderableType:
    """Draw the findings of `verify`.

    Args:
        file: The file.
        found: Its faults.
        more: True if the search ended before all faults were found.
        compared: The comparison with its teacher, if that was run again.
    """
    present = int(np.count_nonzero(file.arrays["done"] == 1))
    lines = {
        "file": str(file.path),
        "rows": f"{len(file):,} expected, {present:,} present",
    }
    if compared:
        lines["teacher"] = (
            f"over {compared.num_positions:,} positions largest difference {compared.largest:.4f} nats beyond "
            f"rounding, mean {compared.mean:.5f} (at most {compared.max_mean}), top-1 agreement "
            f"{compared.top1_agreement:.2%} (at least {compared.min_agreement:.0%})"
        )
    if compared and file.layout.layer_numbers:
        numbers = ", ".join(map(str, file.layout.layer_numbers))
        lines["layers"] = f"hidden states of {numbers} differ by {compared.layers:.5f} (at most {compared.max_mean})"
    verified = "verified: every row is present once, with the right checksum and values"
    count = f"{'at least ' if more else ''}{len(found)} problem{'s' if len(found) > 1 else ''}"
    lines["verdict"] = f"NOT verified, {count}" if found else verified
    return Group(definitions(lines), *(Text(f"  {problem}", style="red") for problem in found))


def evaluation_view(known: dict[str, Any]) -> RenderableType:
    """Draw what `evaluate` returns."""

    def of(pattern: str, **values: float | None) -> str:
        """Name the values that are known."""
        return ", ".join(f"{name} {value:{pattern}}" for name, value in values.items() if value is not None)

    lines = {
        "student": known["student"],
        "teacher": f"{known['teacher']}, {known['capture']} in {known['path']}",
        "rows": f"{known['rows']:,} of {known['rows_of_file']:,}, {known['positions']:,} positions",
        "divergence": of(".4f", forward=known["forward_kl"], reverse=known["reverse_kl"]) + "  nats per position",
        "cross-entropy": of(".4f", student=known["cross_entropy"], teacher=known["teacher_cross_entropy"]),
        "perplexity": of(",.3f", student=known["perplexity"], teacher=known["teacher_perplexity"]),
        "top-1 agreement": of(".2%", **{"": known["agreement"]}).strip(),
        "mass of the tail": of(".4f", student=known["tail"], teacher=known["teacher_tail"]),
    }
    return definitions({name: line for name, line in lines.items() if line})


def status_line(status: Status) -> str:
    """Return the status of a run in one line."""
    known = status.snapshot
    line = ", ".join([f"{status.path}: {_state_words(status)}", *_numbers(status)])
    return printable(f"{line}, {_eta(status)}{known.slowest}" if known else line)


def status_view(status: Status, width: int = 80, height: int | None = None) -> RenderableType:
    """Draw the status of a run.

    Args:
        status: The status to draw.
        width: Columns of the terminal.
        height: Lines of the terminal, if not all ranks fit, or None if there is no limit.
    """
    lines = [f"{status.path}: {_state_words(status)}", ", ".join(_numbers(status))]
    texts = [Text(printable(line)) for line in lines if line]
    if status.snapshot is None:
        return Group(*texts)
    num_ranks = len(status.snapshot.stream_totals)
    most = num_ranks if height is None else max(1, height - 3 - sum(1 + len(text) // width for text in texts))
    return Group(*texts, bars(status.snapshot, _eta(status), most))


def _state_words(status: Status) -> str:
    words = {
        "not started": "not started: no file yet",
        "stalled": "stalled or killed (the same command resumes it)",
        "stopped": "stopped or starting (the same command resumes it)",
    }.get(status.state, status.state)
    ago = "" if status.idle_seconds is None else f", last write {format_seconds(status.idle_seconds)} ago"
    return words + ago


def _numbers(status: Status) -> list[str]:
    if status.num_done is None or status.num_rows is None:
        return []
    rows = f"{status.num_done:,}/{status.num_rows:,} rows"
    if status.snapshot is None:
        return [f"{rows} ({status.num_done / status.num_rows:.0%})"]
    known = status.snapshot
    return [rows, f"{known.speed} over {format_seconds(known.seconds)}", f"{known.recent_rate:,.0f} tok/s recent"]


def _eta(status: Status) -> str:
    return status.snapshot.eta if status.snapshot and status.state == "running" else "ETA -:--"


def row_view(known: dict[str, Any], most: int | None = None) -> RenderableType:
    """Draw `row_facts`.

    Args:
        known: The result of `row_facts`.
        most: Number of positions to show, or None for all.
    """
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading, justify in (("pos", "right"), ("token", "left"), ("next", "left"), ("p", "right")):
        table.add_column(heading, justify=justify, no_wrap=True, max_width=16)  # type: ignore[arg-type]
    table.add_column("the teacher expected", overflow="fold")
    for position in known["positions"][:most]:
        guesses = Text("  ").join(
            Text.assemble((repr(guess["token"]), "cyan"), f" {guess['probability']:.2f}")
            for guess in position["guesses"][:NUM_DRAWN]
        )
        table.add_row(
            str(position["position"]),
            Text(repr(position["token"])),
            Text(repr(position["next"])),
            f"{position['probability']:.2f}",
            guesses,
        )
    title = f"row {known['row']} (row {known['source_row']} of the split), {known['tokens']} tokens"
    hidden = len(known["positions"]) - len(known["positions"][:most])
    more = [Text(f"and {hidden} more positions", style="dim")] if hidden else []
    shown = known["text"] is not None and most is None
    text = [Text(printable(known["text"]), style="dim")] if shown else []
    return Group(Text(title, style="bold"), *text, table, *more)
