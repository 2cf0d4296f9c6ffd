"""Measure the figures of docs/benchmarks.md, all of them or those named.

    python -m benchmarks [NAME ...] --teacher FOLDER --dataset ROWS.jsonl

One after another, each with its table on the terminal and its report (JSON, Markdown, PNG) in `.bench`.
"""

import argparse
import subprocess
import sys

from benchmarks.harness import ROOT

ON_A_TEACHER = ("comparison", "overlap", "startup", "sharing", "fidelity")
ON_ITS_OWN = ("leader", "head", "growth", "reading", "scaling")
ONLY_IF_NAMED = ("gpu",)


def main() -> int:
    """Run the benchmarks that are named, or all; return how many failed."""
    everyday = (*ON_A_TEACHER, *ON_ITS_OWN)
    names = (*everyday, *ONLY_IF_NAMED)
    needing = ", ".join(ON_A_TEACHER)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--teacher", help=f"Folder of a causal language model and its tokenizer: for {needing}.")
    parser.add_argument("--dataset", help="A .jsonl file with a column `text`: for the same.")
    options = parser.parse_args()
    if unknown := set(options.names) - set(names):
        parser.error(f"there is no benchmark {sorted(unknown)[0]}; choose of {', '.join(names)}")
    chosen = options.names or everyday
    if set(chosen) & set(ON_A_TEACHER) and not (options.teacher and options.dataset):
        parser.error(f"{needing} need --teacher and --dataset")
    num_failed = 0
    for name in chosen:
        print(f"{name}:", flush=True)
        teacher = ["--teacher", options.teacher, "--dataset", options.dataset] if name in ON_A_TEACHER else []
        num_failed += (
            subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *teacher], cwd=ROOT, check=False).returncode
            != 0
        )
    return num_failed


if __name__ == "__main__":
    sys.exit(main())
