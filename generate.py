r"""Capture a teacher's logits over a dataset into one HDF5 file.

    accelerate launch --config_file accelerate_configs/cpu.yaml generate.py \
        --teacher M --dataset D --split S --output out.h5

Every rank runs this file from top to bottom; the leader (rank 0) also writes.
"""

import logging
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed

from logitgen.capture import capture_batch, seal
from logitgen.config import parse_config
from logitgen.console import Progress, print_result, silence_stdout, start_logging
from logitgen.data import load_split
from logitgen.plan import Plan
from logitgen.provenance import attributes, facts_of_launch
from logitgen.reader import LogitsFile
from logitgen.report import summary
from logitgen.rows import Rows
from logitgen.schema import Layout
from logitgen.teacher import describe_teacher, load_teacher
from logitgen.tokens import load_tokenizer, tokenize
from logitgen.transport import Ranks, launched
from logitgen.writer import Writer, check_output, check_space

logger = logging.getLogger("logitgen.generate")


def main() -> None:
    with launched() as ranks:
        capture(ranks, sys.argv[1:])


def capture(ranks: Ranks, arguments: list[str]) -> None:
    # Options, and all that can be refused before anything expensive.
    ranks.check_launch()
    if not ranks.is_leader:
        silence_stdout()
    config = ranks.together(lambda: parse_config(arguments))
    ranks.same(facts_of_launch(config))
    output = Path(config.output)
    ranks.together(lambda: start_logging(Path(config.log_dir), ranks.rank, ranks.num_ranks))
    ranks.on_leader(lambda: check_output(output, config.overwrite))
    info = ranks.together(lambda: describe_teacher(config))
    set_seed(config.seed)

    # The split becomes tokens, and the tokens rows.
    logger.info(f"Reading {config.dataset}, split {config.split}.")
    tokenizer = ranks.together(lambda: load_tokenizer(config))
    tokens = ranks.together(lambda: tokenize(load_split(config), tokenizer, config), machine_by_machine=True)
    rows = ranks.together(lambda: Rows(tokens, config, info.max_length, info.length_switch))
    ranks.together(lambda: rows.check_ids(info.vocab_size))
    if rows.num_dropped_tokens:
        logger.warning(f"{rows.num_dropped_tokens:,} tokens are in no row: cut off, or too few for a block.")

    # The plan and the layout fix every byte's place in the file.
    plan = Plan(rows.forward_lengths, config.batch_tokens, info.length_switch)
    layout = Layout(
        capture=config.capture,
        num_rows=len(rows),
        num_tokens=rows.num_tokens,
        num_positions=rows.num_captured,
        vocab_size=info.vocab_size,
        top_k=config.kept,
    )
    ranks.on_leader(lambda: check_space(output, layout))

    logger.info(f"Loading {config.teacher}.")
    teacher = ranks.together(lambda: load_teacher(config, info, ranks.device))
    ranks.same({"teacher's weights": teacher.fingerprint, "tokens": rows.fingerprint})
    logger.info(
        f"Capturing {len(rows):,} rows, {plan.num_tokens:,} tokens in {plan.num_batches:,} batches. "
        f"Ranks: {ranks.num_ranks}, on {ranks.device.type}, {torch.get_num_threads()} CPU threads each."
    )

    # Every rank computes its share of the batches; what they yield goes to the leader and into the file.
    payload_bytes = layout.payload_bytes(plan.num_rows, plan.sums(rows.num_positions))
    progress = Progress(plan.num_rows, plan.sums(rows.forward_lengths), payload_bytes, ranks.num_ranks)
    about = attributes(config, info, teacher, rows, layout, tokenizer)
    writer = ranks.on_leader(lambda: Writer(output, layout, rows, plan, about, progress.written))
    submit = writer.submit if writer else None
    with progress if writer else nullcontext(), ranks.deliver(plan, payload_bytes, submit) as outbox:
        for number in plan.share(ranks.rank, ranks.num_ranks):
            batch = rows.batch(plan.rows(number))
            outbox.put(number, capture_batch(teacher, batch, layout), partial(seal, batch=batch, layout=layout))
    ranks.on_leader(lambda: writer.finish() if writer else None)
    if writer:
        file, seconds = LogitsFile(output), progress.seconds
        print_result(summary(file, writer.num_twice, plan.num_tokens, plan.padding_share, seconds))


if __name__ == "__main__":
    main()
