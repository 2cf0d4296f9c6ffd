"""`python -m logitgen`: watch a run, look into a file, prove it right, export it to other trainers."""

import argparse
import json
import shutil
import sys
import time
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn, cast

from rich.text import Text

from logitgen.console import print_error, print_result, quiet_libraries, redrawn
from logitgen.errors import LogitgenError, UsageError
from logitgen.facts import Decoder, facts, row_facts, status_facts
from logitgen.file.reader import LogitsFile
from logitgen.file.verify import problems
from logitgen.leader.status import Watch
from logitgen.report import overview, row_view, status_line, status_view, verdict_view

MOST_PROBLEMS = 20
"""Problems after which `verify` gives up on a file."""

WATCH_SECONDS = 5.0
"""Time between two looks of `status --watch`: the writer commits no more often."""


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
        options = _parser().parse_args(arguments)
        return cast(int, options.run(options))
    except LogitgenError as error:
        print_error(str(error))
        return error.exit_status


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="logitgen" if Path(sys.argv[0]).stem == "logitgen" else "python -m logitgen",
        description="Watch runs, look into their files, prove them right, export them.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,  # the example keeps its lines
    )
    commands = parser.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    for add in (_add_status, _add_inspect, _add_verify, _add_export):
        add(commands)
    return parser


def _add_status(commands: Any) -> None:
    about = "Show how far a run is, from any machine that sees its output, without disturbing it."
    status = commands.add_parser("status", help="Show how far a run is, from anywhere.", description=about)
    status.add_argument("file", type=Path, help="The run's --output, there already or not, or its .partial.")
    status.add_argument("--watch", action="store_true", help="Look again every few seconds until the file is complete.")
    status.add_argument("--json", action="store_true", help="Print JSON for scripts; with --watch, a line at a time.")
    status.set_defaults(run=_status)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect", help="Show what is in a file, whole or row by row.", description="Show what is in a file."
    )
    inspect.add_argument("file", type=Path, help="A complete file.")
    inspect.add_argument("--row", type=int, help="Show this row position by position, with the teacher's best guesses.")
    inspect.add_argument("--positions", type=int, help="With --row: show only so many positions.")
    inspect.add_argument("--tokenizer", help="Folder or hub id of the tokenizer; the file's teacher if not given.")
    inspect.add_argument("--json", action="store_true", help="Print JSON for scripts.")
    inspect.set_defaults(run=_inspect)


def _add_verify(commands: Any) -> None:
    about = "Check every row of a file; with --teacher, run the teacher again over some of them. Status 1 if not right."
    verify = commands.add_parser(
        "verify", help="Prove a file right: its checksums, or against its teacher.", description=about
    )
    verify.add_argument("file", type=Path, help="A file, complete or the .partial of a run.")
    verify.add_argument(
        "--teacher", nargs="?", const="", help="Run this teacher again, or without a name the one the file names."
    )
    verify.add_argument("--rows", type=int, help="With --teacher: how many rows, drawn at random; 16 if not given.")
    verify.add_argument("--trust_remote_code", action="store_true", help="Run code that comes with the teacher.")
    verify.set_defaults(run=_verify)


def _add_export(commands: Any) -> None:
    about = "Write the rows in the columns of axolotl's distillation: a Parquet file, or a folder as datasets saves it."
    export = commands.add_parser("export", help="Hand a file over to other trainers.", description=about)
    export.add_argument("file", type=Path, help="A complete file.")
    export.add_argument("output", type=Path, help="Its name ends in .parquet, or has no ending for a folder.")
    export.set_defaults(run=_export)


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
        sys.stdout.write(json.dumps(status_facts(status), indent=2) + "\n")
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
    if options.row is None and (options.positions is not None or options.tokenizer is not None):
        raise UsageError("--positions and --tokenizer show a row: name one with --row.")
    if options.positions is not None and options.positions < 1:
        raise UsageError(f"--positions must be at least 1, got {options.positions}.")
    file = LogitsFile(options.file)
    if options.row is None:
        known = facts(file)
        drawn = overview(known)
    else:
        known = row_facts(file, options.row, _decoder(file, options.tokenizer))
        drawn = row_view(known, options.positions)
    if options.json:
        sys.stdout.write(json.dumps(known, indent=2) + "\n")
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
        raise UsageError("--rows and --trust_remote_code are for running the teacher again: add --teacher.")
    if options.rows is not None and options.rows < 1:
        raise UsageError(f"--rows must be at least 1, got {options.rows}.")
    file = LogitsFile(options.file, partial=True)
    search = problems(file)
    found = list(islice(search, MOST_PROBLEMS))
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
    export(file, options.output)
    print_result(Text(f"Exported {len(file):,} rows to {options.output}."))
    return 0


if __name__ == "__main__":
    sys.exit(main())
