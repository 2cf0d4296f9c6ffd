"""Rows that begin alike: read once, against the same rows read whole and against scripts that know nothing of it.

    python -m benchmarks.prefixes --teacher FOLDER --dataset ROWS.jsonl

Whole commands in turns. *capturing* leaves their start-up out. The rows are prose: `--chats` chats behind a tool schema
of 1,000 tokens, prompts of 400 tokens with 8 completions of 100, conversations of six turns whose earlier thoughts
later turns leave out, and rows that share nothing.
"""

import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.check import check, read_flat
from benchmarks.comparison import OURS, Contender, contenders
from benchmarks.harness import Spread, in_turns, measure, parse, scratch, write_report
from logitgen.file.reader import LogitsFile

WHOLE, MERGE = "every row read whole", "bash + merge"
FORMS = {"tokens, read whole = 1": ".2f"} | dict.fromkeys(("speed, ours = 1", "capturing, read whole = 1"), ".2f")


def schema(take: Any, chats: int) -> Iterator[str]:
    """Write chats behind one tool schema."""
    tools = take(1000)
    yield from (tools + take(60) for _ in range(chats))


def completions(take: Any, chats: int) -> Iterator[str]:
    """Write 8 completions of every prompt."""
    for _ in range(max(1, chats // 8)):
        prompt = take(400)
        yield from (prompt + take(100) for _ in range(8))


def turns(take: Any, chats: int) -> Iterator[str]:
    """Write conversations of six turns, a row for each, with the thoughts of its last turn alone."""
    for _ in range(max(1, chats // 6)):
        said = take(60)
        for _ in range(6):
            said += take(40)
            answer = take(80)
            yield said + take(80) + answer
            said += answer


def alone(take: Any, chats: int) -> Iterator[str]:
    """Write rows that share nothing."""
    yield from (take(100 + 10 * (row % 20)) for row in range(chats))


SHAPES = {"tool schema": schema, "8 completions": completions, "six turns": turns, "nothing shared": alone}


def run(contender: Contender, folder: Path, ours: Path) -> dict[str, Any]:
    """Run the commands of a contender once, and compare what they left with ours."""
    seconds, before = 0.0, 0.0
    for path in folder.rglob("*.h5*"):
        path.unlink()
    folder.mkdir(exist_ok=True)
    env = {"HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env |= {"PYTHON": sys.executable, "TOKENIZERS_PARALLELISM": "false"}
    for words in contender.commands:
        measured = measure([word.replace("{folder}", str(folder)) for word in words], folder / "logs", **env)
        before = measured.seconds_of("Capturing ") or 0.0
        seconds += measured.wall_seconds
    if contender.read is read_flat:
        check(read_flat(sorted(folder.glob(contender.files))), LogitsFile(ours))
    saved = [float(line.split()[2].rstrip("%")) / 100 for _, line in measured.lines if "shared prefixes" in line]
    return {"seconds": seconds, "capturing": seconds - before, "read": 1 - sum(saved)}


def main() -> None:
    """Measure every shape of rows."""
    sizes = {"chats": 24, "rounds": 2, "ranks": 2, "top_k": 64, "batch_tokens": 2048}
    options = parse(__doc__, teacher=Path, dataset=Path, **sizes, shapes=[])
    tokenizer, table = AutoTokenizer.from_pretrained(options.teacher), []
    texts = "\n".join(json.loads(line)["text"] for line in options.dataset.read_text(encoding="utf-8").splitlines())
    prose = iter(tokenizer(texts).input_ids)
    options.only, options.no_ablation = [MERGE], True

    def take(count: int) -> str:
        return str(tokenizer.decode([next(prose) for _ in range(count)]))

    for shape in options.shapes or SHAPES:
        with scratch(options) as folder:
            split = folder / "split.jsonl"
            lines = [json.dumps({"text": text}) + "\n" for text in SHAPES[shape](take, options.chats)]
            split.write_text("".join(lines), encoding="utf-8")
            ways = {name: way for name, way in contenders(options, split).items() if name in (OURS, MERGE)}
            (command,) = ways[OURS].commands
            ways[WHOLE] = Contender(commands=[[*command, "--share_prefixes=false"]], read=None)
            ours = folder / OURS / "out.h5"
            calls = {name: partial(run, way, folder / name.replace(" ", "_"), ours) for name, way in ways.items()}
            rounds = in_turns(calls, options.rounds)
            num_tokens = LogitsFile(ours).layout.num_tokens
        columns = {name: {key: [one[key] for one in found] for key in found[0]} for name, found in rounds.items()}
        for name, found in columns.items():
            row = {"rows": shape, "way": name, "number of rows": len(lines), "tokens": num_tokens}
            row |= {"tokens, read whole = 1": found["read"][0] if name == OURS else 1.0}
            row |= {"seconds": Spread.of(found["seconds"])}
            row |= {"speed, ours = 1": Spread.of(columns[OURS]["seconds"], found["seconds"])}
            if name != MERGE:
                row["capturing, read whole = 1"] = Spread.of(columns[WHOLE]["capturing"], found["capturing"])
            table.append(row)
    write_report(options.output, "prefixes", table, FORMS)


if __name__ == "__main__":
    main()
