"""Rows that begin alike: read once, against the same rows read whole and against scripts that know nothing of it.

    python -m benchmarks.prefixes --teacher FOLDER --dataset ROWS.jsonl [--plans]

Whole commands in turns. *capturing* leaves their start-up out. The rows are prose: `--chats` chats behind a tool schema
of 1,000 tokens, prompts of 400 tokens with 8 completions of 100, conversations of six turns whose earlier thoughts
later turns leave out, and rows that share nothing.

With `--plans`, padding alone: the rows are random tokens of log-normal lengths around these. A plan with more than 2 %
of padding stands beside one with no more. That one counts a pass as ever fewer tokens, and so ends passes earlier, or
reads every row whole if that is cheaper. *cost* is what its passes cost, as the first counts them, relative to the
first. *seconds* are the same on one CPU thread, in `--rounds` turns.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import AutoTokenizer

from benchmarks.check import check, read_flat
from benchmarks.comparison import OURS, Contender, contenders
from benchmarks.harness import Row, Spread, in_turns, measure, parse, scratch, write_report
from logitgen.config import Config
from logitgen.file.layout import Array
from logitgen.file.reader import LogitsFile
from logitgen.split.plan import MOST_PADDING, Plan
from logitgen.split.prefixes import Neighbours, neighbours
from logitgen.split.rows import Rows
from logitgen.split.tree import CPU_COST, GPU_COST, PassCost, steps
from logitgen.teacher.model import Teacher, load_model

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


def short(take: Any, chats: int) -> Iterator[str]:
    """Write 8 completions of a few words for every prompt."""
    for _ in range(max(1, chats // 8)):
        prompt = take(400)
        yield from (prompt + take(20) for _ in range(8))


def mixed(take: Any, chats: int) -> Iterator[str]:
    """Write rows of all the shapes, as many of each."""
    for shape in SHAPES.values():
        yield from shape(take, chats)


SHAPES = {"tool schema": schema, "8 completions": completions, "six turns": turns, "nothing shared": alone}
PLANNED = SHAPES | {"8 short completions": short, "all of these": mixed}
PLAN_FORMS = dict.fromkeys(("padding, %", "at most 2 %: padding, %"), ".2f")
PLAN_FORMS |= dict.fromkeys(("saved, %",), ".1f") | dict.fromkeys(("cost", "seconds"), ".3f")
SPREAD = 0.7
"""Of log-normal lengths, as in `synthetic`."""

PAYLOAD_POSITIONS = 2**24 // 264
"""Captured positions of 16 MB with k=64."""


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


def rows_of(shape: str, chats: int, vocab_size: int, spread: float = 0.0) -> Rows:
    """Make up rows of random tokens, of the shape's own lengths or log-normal ones around them."""
    generator = np.random.default_rng(0)

    def take(count: int) -> list[int]:
        drawn = count * generator.lognormal(-(spread**2) / 2, spread)
        tokens: list[int] = generator.integers(vocab_size, size=max(2, round(drawn))).tolist()
        return tokens

    split = datasets.Dataset.from_dict({"input_ids": list(PLANNED[shape](take, chats))})
    return Rows(split, Config(teacher="none", dataset="none", output="none"), max_length=None)


def compare_plans(rows: Rows, batch_tokens: int, cost: PassCost, teacher: Teacher | None, rounds: int) -> Row:
    """Compare the plan of some rows with the cheapest that has at most 2 % of padding."""

    def plan_of(pass_cost: PassCost, found: Neighbours | None) -> Plan:
        return Plan(rows.forward_lengths, batch_tokens, None, found, PAYLOAD_POSITIONS, pass_cost)

    def sizes(plan: Plan) -> Array:
        numbers = range(plan.num_batches)
        lengths = (rows.forward_lengths[plan.rows(number)] for number in numbers)
        shared = (plan.shared(number) for number in numbers)
        planned = [steps(*each, batch_tokens, plan.pass_cost) for each in zip(lengths, shared, strict=True)]
        return np.array([len(step.rows) * step.length for of_batch in planned for step in of_batch])

    found, counted = neighbours(rows), cost
    plan = tight = plan_of(cost, found)
    row: Row = {"padding, %": 100 * plan.padding_share, "passes": len(sizes(plan)), "saved, %": 100 * plan.saved_share}
    while tight.padding_share > MOST_PADDING + 1e-9:
        counted = PassCost(counted.extra * 3 // 4, counted.least * 3 // 4)
        tight = plan_of(counted, found)
    if tight is not plan:
        tight = min(tight, plan_of(cost, None), key=lambda each: cost.of(sizes(each)).sum())
        row |= {"at most 2 %: padding, %": 100 * tight.padding_share, "its passes": len(sizes(tight))}
        row |= {"cost": cost.of(sizes(tight)).sum() / cost.of(sizes(plan)).sum()}
        if teacher and rounds:
            ways = {
                "planned": partial(seconds_of, teacher, rows, plan),
                "tight": partial(seconds_of, teacher, rows, tight),
            }
            seconds = in_turns(ways, rounds)
            row |= {"seconds": Spread.of(seconds["tight"], seconds["planned"])}
    return row


@torch.no_grad()
def seconds_of(teacher: Teacher, rows: Rows, plan: Plan) -> float:
    """Run the forward passes of a plan without the head; return the seconds of this thread."""
    seconds = 0.0
    for number in range(plan.num_batches):
        batch = rows.batch(plan.rows(number), plan.shared(number), plan.batch_tokens, plan.pass_cost)
        passes, slots = batch.passes, batch.slots[batch.distinct(of_each_row=False).index]
        start = time.thread_time()
        teacher._hidden(passes, slots)
        seconds += time.thread_time() - start
    return seconds


def plans(options: argparse.Namespace) -> None:
    """Compare the plans of every shape of rows, for a CPU and for a GPU."""
    torch.set_num_threads(1)
    config = Config(teacher=str(options.teacher), dataset="none", output="none", dtype="float32")
    vocab_size, teacher = 2**15, None
    if options.rounds:
        model = load_model(config, torch.device("cpu"))
        teacher = Teacher(model, model.config.vocab_size)
    table = [
        {"rows": shape, "device": device, "--batch_tokens": batch_tokens}
        | compare_plans(rows, batch_tokens, cost, teacher if device == "CPU" else None, options.rounds)
        for shape in options.shapes or PLANNED
        for rows in [rows_of(shape, options.chats, vocab_size, SPREAD)]
        for device, cost in {"CPU": CPU_COST, "GPU": GPU_COST}.items()
        for batch_tokens in (512, 2048, 8192, 32_768)
    ]
    write_report(options.output, "prefix plans", table, PLAN_FORMS)


def main() -> None:
    """Measure every shape of rows."""
    sizes = {"chats": 24, "rounds": 2, "ranks": 2, "top_k": 64, "batch_tokens": 2048}
    options = parse(__doc__, teacher=Path, dataset=Path, **sizes, shapes=[], plans=False)
    if options.plans:
        plans(options)
        return
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
