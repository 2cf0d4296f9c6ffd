"""Measure the figures of docs/benchmarks.md, all of them or those named.

    python -m benchmarks [NAME ...] --teacher FOLDER --dataset ROWS.jsonl

One after another, each with its table on the terminal and its report in `.bench`. `python -m benchmarks.NAME --help`
has the options of each.
"""

import argparse
import subprocess
import sys

from benchmarks.harness import ROOT

ON_ROWS = ("comparison", "overlap", "startup", "sharing", "fidelity", "padding", "prefixes")
NEEDED = {"--teacher": (*ON_ROWS, "chats"), "--dataset": ON_ROWS}
EVERYDAY = (*ON_ROWS, "chats", "leader", "head", "student", "growth", "reading", "scaling")
ALL = (*EVERYDAY, "gpu")


def main() -> int:
    """Run the benchmarks that are named, or all but that for GPUs; return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ALL))
    for option, names in NEEDED.items():
        parser.add_argument(option, default="", help=f"for {', '.join(names)}")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(ALL)):
        parser.error(f"there is no benchmark {unknown[0]}; choose of {', '.join(ALL)}")
    num_failed = 0
    for name in options.names or EVERYDAY:
        print(f"{name}:", flush=True)
        given = {"--teacher": options.teacher, "--dataset": options.dataset}
        words = [f"{option}={value}" for option, value in given.items() if value and name in NEEDED[option]]
        command = [sys.executable, "-m", f"benchmarks.{name}", *words]
        num_failed += subprocess.run(command, cwd=ROOT, check=False).returncode != 0
    return num_failed


if __name__ == "__main__":
    sys.exit(main())
