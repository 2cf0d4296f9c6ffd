"""Parts of `python -m benchmarks.gpu` about rows that begin alike: the cost of a pass, and the gain of fewer tokens."""

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu_bench import Bench, capture
from benchmarks.harness import Row, Spread, in_turns
from benchmarks.head import seconds_of
from benchmarks.prefixes import SHAPES, WHOLE, rows_of
from benchmarks.synthetic import Job
from logitgen.split import job
from logitgen.split.prefixes import neighbours
from logitgen.split.rows import Rows
from logitgen.teacher.model import Teacher

_AT_ONCE = 8


def passes(bench: Bench) -> Iterator[Row]:
    """Time passes of few and many tokens, one after another without a wait, in milliseconds each."""
    for number, name in enumerate(bench.scale.teachers):
        with bench.teacher(number) as model, torch.no_grad():
            row: Row = {"teacher": name}
            for num_tokens in bench.scale.pass_tokens:
                input_ids_LT = torch.randint(model.shard.vocab_size, (1, num_tokens), device=model.device)

                def several(input_ids_LT: torch.Tensor = input_ids_LT) -> None:
                    for _ in range(_AT_ONCE):
                        model._body(input_ids_LT)

                seconds = [seconds_of(several) for _ in range(4)][1:]  # the first time warms up
                row[f"{num_tokens:,} tokens"] = 1e3 * Spread.of(seconds).median / _AT_ONCE
            yield row


def prefixes(bench: Bench) -> Iterator[Row]:
    """Capture rows of several shapes whole, and with their prefixes read once, in smaller and larger batches."""
    for number in sorted({1, len(bench.scale.teachers) - 1}):
        with bench.teacher(number) as model:
            if not model.share_prefixes():
                yield {"teacher, rows": "its prefixes cannot be shared"}
                continue
            for shape in SHAPES:
                rows = rows_of(shape, bench.scale.chats, model.shard.vocab_size)
                for batch_tokens in (bench.scale.batch_tokens, 4 * bench.scale.batch_tokens):
                    name = f"{list(bench.scale.teachers)[number]}, {shape}, --batch_tokens {batch_tokens:,}"
                    yield {"teacher, rows": name} | _compare(bench, model, rows, batch_tokens)


def _compare(bench: Bench, model: Teacher, rows: Rows, batch_tokens: int) -> Row:
    layout = bench.job(model, rows, "topk 64, packed").layout
    plans, works = {}, {}
    for way, found in {WHOLE: None, "shared": neighbours(rows)}.items():
        plans[way] = job.job_of(rows, layout, batch_tokens, None, found, bench.device.type).plan
        planned = Job(rows, plans[way], layout)
        path = bench.folder / f"{way}.h5"
        works[way] = partial(seconds_of, partial(capture, model, planned, path, planned.create_file(path)))
    seconds = {way: taken[1:] for way, taken in in_turns(works, 3).items()}  # the first round warms up
    faster, saved = Spread.of(seconds[WHOLE], seconds["shared"]), plans["shared"].saved_share
    return {
        "tokens": f"{plans[WHOLE].num_tokens:,}",
        "read, whole = 1": 1 - saved,
        "s, whole": Spread.of(seconds[WHOLE]).median,
        "speed, whole = 1": faster,
        "of the ratio of tokens": f"{faster.median * (1 - saved):.2f}",
    }
