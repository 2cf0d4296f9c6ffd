"""`python -m logitgen`: look into a file."""

import argparse
import json
import sys
from pathlib import Path
from typing import NoReturn, cast

from logitgen.console import print_error, print_result
from logitgen.errors import LogitgenError, UsageError
from logitgen.reader import LogitsFile
from logitgen.report import Decoder, facts, overview, row_facts, row_view


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message[0].upper()}{message[1:]}. See --help.")


def main(arguments: list[str] | None = None) -> int:
    """Run a command and return its exit status."""
    parser = _Parser(prog="python -m logitgen", description="Look into a logitgen file.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="Show what is in a file.", description="Show what is in a file.")
    inspect.add_argument("file", type=Path)
    inspect.add_argument("--row", type=int, help="Show this row position by position, with the teacher's best guesses.")
    inspect.add_argument("--positions", type=int, help="With --row: show only so many positions.")
    inspect.add_argument("--tokenizer", help="Folder or hub id of the tokenizer; the file's teacher if not given.")
    inspect.add_argument("--json", action="store_true", help="Print JSON for scripts.")
    try:
        _inspect(parser.parse_args(arguments))
    except LogitgenError as error:
        print_error(str(error))
        return error.exit_status
    return 0


def _inspect(options: argparse.Namespace) -> None:
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


def _decoder(file: LogitsFile, name: str | None) -> Decoder | None:
    """Load the tokenizer, or return None where the teacher has none or is elsewhere."""
    from transformers import AutoTokenizer  # takes seconds: only where text is shown

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


if __name__ == "__main__":
    sys.exit(main())
