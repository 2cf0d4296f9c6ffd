"""Measure the figures of docs/benchmarks.md, all of them or those named.

    python -m benchmarks [NAME ...] --teacher FOLDER --dataset ROWS.jsonl

One after another, each with its table on the terminal and its report (JSON, Markdown, PNG) in `.bench`.
`python -m benchmarks.NAME --help` has the options of each.
"""

import argparse
import subprocess
import sys

from benchmarks.harness import ROOT

ON_A_TEACHER = ("comparison", "overlap", "startup", "sharing", "fidelity", "chats", "padding")
EVERYDAY = (*ON_A_TEACHER, "leader", "head", "student", "growth", "reading", "scaling")
ALL = (*EVERYDAY, "gpu")


def main() -> int:
    """Run the benchmarks that are named, or all but that for GPUs; return how many failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ALL))
    for name in ("--teacher", "--dataset"):
        parser.add_argument(name, help=f"for {', '.join(ON_A_TEACHER)}")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(ALL)):
        parser.error(f"there is no benchmark {unknown[0]}; choose of {', '.join(ALL)}")
    chosen = options.names or EVERYDAY
    if set(chosen) & set(ON_A_TEACHER) and not (options.teacher and options.dataset):
        parser.error(f"{', '.join(ON_A_TEACHER)} need --teacher and --dataset")
    num_failed = 0
    for name in chosen:
        print(f"{name}:", flush=True)
        teacher = ["--teacher", options.teacher, "--dataset", options.dataset] if name in ON_A_TEACHER else []
        command = [sys.executable, "-m", f"benchmarks.{name}", *teacher]
        num_failed += subprocess.run(command, cwd=ROOT, check=False).returncode != 0
    return num_failed


if __name__ == "__main__":
    sys.exit(main())
