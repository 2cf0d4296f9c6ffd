"""`python -m logitgen`: preview and watch a run; inspect, verify and export a file; evaluate a student."""

import argparse
import json
import shutil
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, cast

from rich.console import Group, RenderableType
from rich.text import Text

from logitgen.console import print_error, print_result, quiet_libraries, redrawn
from logitgen.errors import LogitgenError, UsageError
from logitgen.facts import Decoder, facts, row_facts, status_facts
from logitgen.file.reader import LogitsFile
from logitgen.file.verify import problems
from logitgen.histogram import plot, spread_view
from logitgen.leader.status import Watch
from logitgen.report import evaluation_view, overview, preview_view, row_view, status_line, status_view, verdict_view
from logitgen.spread import spread

MAX_PROBLEMS = 20
"""Number of problems after which `verify` stops."""

WATCH_SECONDS = 5.0
"""Time between two looks of `status --watch`. The writer commits no more often."""


_EXAMPLE = """example:
  %(prog)s inspect teacher.h5 --row 1 --positions 12

%(prog)s COMMAND --help shows the options of a command."""


class _Parser(argparse.ArgumentParser):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[0].upper()}{message[1:]}. See --help.")


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status."""
    try:
        options, others = _parser().parse_known_args(arguments)
        if others and options.run != _preview:
            raise UsageError(f"Unrecognized arguments: {' '.join(others)}. See --help.")
        options.others = others
        return cast(int, options.run(options))
    except LogitgenError as error:
        print_error(str(error))
        return error.exit_status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="logitgen" if Path(sys.argv[0]).stem == "logitgen" else "python -m logitgen",
        description="Preview and watch runs. Inspect, verify, export files. Evaluate students.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # the example keeps its lines
    )
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for add in (_add_preview, _add_status, _add_inspect, _add_verify, _add_export, _add_evaluate):
        add(commands)
    return parser


def _add_preview(commands: Any) -> None:
    about = (
        "Show the rows of a run before it starts: token by token as the teacher reads them, with what is captured, and "
        "what was dropped, split or left out. Takes the options of generate.py. Reads no weights of the teacher."
    )
    preview = commands.add_parser(
        "preview",
        help="Show the rows of a run before it starts.",
        description=about,
        usage="%(prog)s --teacher NAME --dataset NAME [options of generate.py] [--row N] [--json]",
    )
    preview.add_argument("--row", type=int, help="Row of the split to show (default: the first three rows).")
    preview.add_argument("--json", action="store_true", help="Print JSON for scripts.")
    preview.set_defaults(run=_preview)


def _add_status(commands: Any) -> None:
    about = "Show the progress of a run, from any machine that sees its output. The run does not notice."
    status = commands.add_parser("status", help="Show the progress of a run.", description=about)
    status.add_argument("file", type=Path, help="The run's --output or its .partial. Neither need exist yet.")
    status.add_argument("--watch", action="store_true", help="Repeat every few seconds until the file is complete.")
    status.add_argument("--json", action="store_true", help="Print JSON for scripts: with --watch, one line per look.")
    status.set_defaults(run=_status)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect", help="Show a file, or one of its rows.", description="Show a file, or one of its rows."
    )
    inspect.add_argument("file", type=Path, help="A complete file.")
    inspect.add_argument("--row", type=int, help="Show this row by position, with the teacher's likeliest tokens.")
    inspect.add_argument("--positions", type=int, help="With --row: number of positions to show (default: all).")
    inspect.add_argument(
        "--tokenizer", help="With --row: folder or hub id of the tokenizer (default: the file's teacher)."
    )
    inspect.add_argument("--plot", type=Path, help="Also draw the histograms into this file, such as spread.png.")
    inspect.add_argument("--json", action="store_true", help="Print JSON for scripts.")
    inspect.set_defaults(run=_inspect)


def _add_verify(commands: Any) -> None:
    about = (
        "Check every row of a file. With --teacher, also run the teacher again over some rows. Status 1 on a problem."
    )
    verify = commands.add_parser(
        "verify", help="Check the rows of a file, also against its teacher.", description=about
    )
    verify.add_argument("file", type=Path, help="A file, complete or the .partial of a run.")
    verify.add_argument(
        "--teacher", nargs="?", const="", help="Run this teacher again (without a name: the file's teacher)."
    )
    verify.add_argument("--rows", type=int, help="With --teacher: number of rows, drawn at random (default: 16).")
    verify.add_argument("--trust_remote_code", action="store_true", help="Run code that comes with the teacher.")
    verify.set_defaults(run=_verify)


def _add_export(commands: Any) -> None:
    about = "Write the rows as another trainer reads them: a Parquet file, a save_to_disk folder, an ArrayRecord file."
    export = commands.add_parser("export", help="Export a file for other trainers.", description=about)
    export.add_argument("file", type=Path, help="A complete file.")
    names = "A name that ends in .parquet, or a folder's name without a dot (maxtext: one that ends in .array_record)."
    export.add_argument("output", type=Path, help=names)
    formats = ["axolotl", "distillkit", "maxtext"]
    export.add_argument("--format", choices=formats, default="axolotl", help="The trainer (default: axolotl).")
    export.set_defaults(run=_export)


def _add_evaluate(commands: Any) -> None:
    about = "Run a student over the rows of a file: how far its distributions are from the teacher's."
    evaluate = commands.add_parser("evaluate", help="Compare a student with a file's teacher.", description=about)
    evaluate.add_argument("student", help="Folder or hub id of a causal language model, or of an adapter.")
    evaluate.add_argument("--file", type=Path, required=True, help="A complete file of the student's teacher.")
    evaluate.add_argument("--rows", type=int, help="Number of rows, drawn at random (default: all).")
    evaluate.add_argument("--other_tokenizer", action="store_true", help="Take a tokenizer that is not the teacher's.")
    evaluate.add_argument("--trust_remote_code", action="store_true", help="Run code that comes with the student.")
    evaluate.add_argument("--json", action="store_true", help="Print JSON for scripts.")
    evaluate.set_defaults(run=_evaluate)


def _print_json(known: dict[str, Any]) -> None:
    """Print facts for scripts. JSON has no number for infinity: null stands for it."""
    finite = json.loads(json.dumps(known), parse_constant=lambda name: None)
    sys.stdout.write(json.dumps(finite, indent=2) + "\n")


def _preview(options: argparse.Namespace) -> int:
    from logitgen.options import parse_config  # takes seconds, as does the next
    from logitgen.preview import preview_facts

    quiet_libraries()
    known = preview_facts(parse_config(["--output", "none", *options.others]), options.row)
    if options.json:
        _print_json(known)
    else:
        print_result(preview_view(known))
    return 0


def _status(options: argparse.Namespace) -> int:
    watch = Watch(options.file)
    if options.watch:
        try:
            _watch(watch, options.json)
        except KeyboardInterrupt:
            return 130
        return 0
    status = watch.look()
    if options.json:
        _print_json(status_facts(status))
    else:
        print_result(status_view(status))
    return 0


def _watch(watch: Watch, as_json: bool) -> None:
    """Show the status of a run until its file is complete."""
    with redrawn(plain=as_json) as draw:
        while True:
            status = watch.look()
            line = json.dumps(status_facts(status)) if as_json else status_line(status)
            draw(status_view(status, *shutil.get_terminal_size()), line)
            if status.state == "complete":
                return
            time.sleep(WATCH_SECONDS)


def _inspect(options: argparse.Namespace) -> int:
    drawn: RenderableType
    if options.row is None and (options.positions is not None or options.tokenizer is not None):
        raise UsageError("--positions and --tokenizer need --row. Add it.")
    if options.positions is not None and options.positions < 1:
        raise UsageError(f"--positions must be at least 1, got {options.positions}.")
    if options.plot is not None and options.row is not None:
        raise UsageError("--plot draws the whole file, --row shows one row. Leave one of the two out.")
    file = LogitsFile(options.file)
    if options.row is None:
        known = facts(file)
        known["spread"] = spread(file)
        drawn = Group(overview(known), Text(), spread_view(known["spread"], known["positions"]))
        if options.plot is not None:
            plot(known["spread"], f"{file.path.name}, {known['kept']}", options.plot)
    else:
        known = row_facts(file, options.row, _decoder(file, options.tokenizer))
        drawn = row_view(known, options.positions)
    if options.json:
        _print_json(known)
    else:
        print_result(drawn)
    return 0


def _decoder(file: LogitsFile, name: str | None) -> Decoder | None:
    """Load the tokenizer, or return None where the teacher has none or is elsewhere."""
    from transformers import AutoTokenizer  # takes seconds: only to show text

    settings = file.attributes["settings"]
    try:
        if name is not None:
            return cast(Decoder, AutoTokenizer.from_pretrained(name, trust_remote_code=False))
        teacher = {"revision": settings["revision"], "gguf_file": settings["teacher_gguf"], "trust_remote_code": False}
        return cast(Decoder, AutoTokenizer.from_pretrained(settings["teacher"], **teacher))
    except Exception as error:  # transformers says "no tokenizer" in many ways
        if name is not None:
            raise UsageError(f"--tokenizer {name} cannot be loaded. Give the teacher's folder or hub id.") from error
        return None


def _verify(options: argparse.Namespace) -> int:
    if options.teacher is None and (options.rows is not None or options.trust_remote_code):
        raise UsageError("--rows and --trust_remote_code need --teacher. Add it.")
    if options.rows is not None and options.rows < 1:
        raise UsageError(f"--rows must be at least 1, got {options.rows}.")
    file = LogitsFile(options.file, partial=True)
    search = problems(file)
    found = list(islice(search, MAX_PROBLEMS))
    more = next(search, None) is not None
    compared = None
    if options.teacher is not None and not found:
        from logitgen.rerun import load_teacher_of, rerun, sample_rows  # takes seconds

        quiet_libraries()
        teacher, found = load_teacher_of(file, options.teacher or None, options.trust_remote_code)
        compared = rerun(file, teacher, sample_rows(file, options.rows or 16))
        found += compared.problems
    print_result(verdict_view(file, found, more, compared))
    return 1 if found else 0


def _export(options: argparse.Namespace) -> int:
    from logitgen.student.export import export  # pyarrow takes a moment

    quiet_libraries()
    file = LogitsFile(options.file)
    num_rows = export(file, options.output, options.format)
    left_out = f" Nothing is captured of {len(file) - num_rows:,} rows." if num_rows < len(file) else ""
    print_result(Text(f"Exported {num_rows:,} rows to {options.output}.{left_out}"))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    if options.rows is not None and options.rows < 1:
        raise UsageError(f"--rows must be at least 1, got {options.rows}.")
    file = LogitsFile(options.file)
    from logitgen.evaluate import evaluate  # takes seconds

    quiet_libraries()
    tokenizer, code = options.other_tokenizer, options.trust_remote_code
    known = evaluate(options.student, file, options.rows, other_tokenizer=tokenizer, trust_remote_code=code)
    if options.json:
        _print_json(known)
    else:
        print_result(evaluation_view(known))
    return 0


if __name__ == "__main__":
    sys.exit(main())
