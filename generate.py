r"""Capture a teacher's logits over a dataset into one HDF5 file.

    accelerate launch --config_file accelerate_configs/cpu.yaml generate.py \
        --teacher M --dataset D --split S --output out.h5

Every rank runs this file from top to bottom; the leader (rank 0) also writes. The same command again goes on with what
a run that was stopped has left.
"""

import logging
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import set_seed

from logitgen.config import parse_config
from logitgen.console import only_shows, print_result, silence_stdout, start_logging
from logitgen.estimate import estimate, fitting_batch_tokens, run_pilot
from logitgen.file.header import file_bytes
from logitgen.file.layout import Layout
from logitgen.file.reader import LogitsFile
from logitgen.leader.output import Output
from logitgen.leader.places import write_known
from logitgen.leader.progress import Progress
from logitgen.leader.writer import Writer
from logitgen.provenance import attributes, facts_of_launch, facts_of_teacher, settings_attributes, teacher_attributes
from logitgen.ranks.agree import UNLIMITED, Ranks, launched
from logitgen.report import estimate_view, summary
from logitgen.split.load import load_split
from logitgen.split.plan import Plan
from logitgen.split.rows import Rows
from logitgen.split.tokens import load_tokenizer, tokenize
from logitgen.teacher.capture import capture_batch, seal
from logitgen.teacher.describe import describe_teacher
from logitgen.teacher.model import Teacher, load_model

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
    ranks.patience_seconds = config.rank_timeout
    ranks.form_replicas(config.tp_size, config.fsdp_size, config.device_map)
    ranks.same(facts_of_launch(config))
    ranks.together(lambda: start_logging(Path(config.log_dir), ranks.rank, ranks.num_ranks))
    output = Output(Path(config.output), config.overwrite, config.dry_run)
    ranks.on_leader(output.claim)
    if config.batch_tokens.is_auto and (found := ranks.from_leader(lambda: output.batch_tokens(config.settings))):
        config = config.with_batch_tokens(found)
    ranks.on_leader(lambda: output.check(settings_attributes(config)))
    info = ranks.together(lambda: describe_teacher(config))
    ranks.same(facts_of_teacher(info))
    set_seed(config.seed)

    # The split becomes tokens, and the tokens rows.
    logger.info(f"Reading {config.dataset}, split {config.split}.")
    tokenizer = ranks.together(lambda: load_tokenizer(config))
    tokens = ranks.together(
        lambda: tokenize(load_split(config), tokenizer, config), machine_by_machine=True, patience_seconds=UNLIMITED
    )
    rows = ranks.together(lambda: Rows(tokens, config, info.max_length, info.length_switch))
    ranks.together(lambda: rows.check_ids(info.vocab_size))
    if rows.num_dropped_tokens:
        logger.warning(f"{rows.num_dropped_tokens:,} tokens are in no row: cut off, or too few for a block.")

    # The layout fixes every byte's place in the file; a file that has them all is left as it is.
    layout = Layout(
        capture=config.capture,
        num_rows=len(rows),
        num_tokens=rows.num_tokens,
        num_positions=rows.num_captured,
        vocab_size=info.vocab_size,
        top_k=config.kept,
        encoding=config.encoding,
        tokenizer_size=0 if tokenizer is None else len(tokenizer),
    )
    ranks.together(layout.check)
    about = attributes(config, info, rows, layout, tokenizer)
    ranks.on_leader(lambda: output.check(about))
    if ranks.from_leader(output.is_complete):
        ranks.on_leader(lambda: None if config.dry_run else output.complete())
        logger.info(f"{output.path} is complete: all {len(rows):,} rows are there. Nothing is left to do.")
        return
    if not config.dry_run:
        ranks.on_leader(lambda: output.check_space(file_bytes(layout, about)))

    logger.info(f"Loading {config.teacher}.")
    model = ranks.together(lambda: load_model(config, info, ranks.device, ranks.num_replicas))
    teacher = ranks.in_step(lambda: Teacher(model, info.vocab_size, with_head=config.capture == "hidden"))
    layout = replace(layout, head=teacher.head_form)
    computation = {f"teacher's {name}": str(value) for name, value in teacher.computation.items()}
    ranks.same({"teacher's weights": teacher.fingerprint, "tokens": rows.fingerprint} | computation)
    if config.batch_tokens.is_auto:
        fitting = ranks.in_step(
            lambda: fitting_batch_tokens(teacher, rows, layout, info.length_switch, ranks.ranks_of_machine)
        )
        config = config.with_batch_tokens(min(ranks.gathered(fitting)))
        logger.info(f"As many tokens as fit into memory: --batch_tokens {config.batch_tokens:,}.")
    about |= settings_attributes(config) | teacher_attributes(teacher)
    ranks.on_leader(lambda: output.check(about))
    plan = Plan(rows.forward_lengths, config.batch_tokens, info.length_switch)
    if config.dry_run:
        with ranks.watched():
            pilots = ranks.gathered(run_pilot(teacher, rows, plan, layout, lambda number: min(ranks.gathered(number))))
        if ranks.is_leader:
            costs = estimate(rows, plan, layout, about, pilots, config.tp_size, config.fsdp_size)
            print_result(estimate_view(costs, output.free_bytes))
        return

    # Every rank computes its share of the missing batches; what they yield goes to the leader and into the file.
    known = partial(write_known, layout=layout, rows=rows, head=teacher.head)
    header = ranks.on_leader(lambda: output.create(layout, about, known), patience_seconds=UNLIMITED)
    done = ranks.from_leader(output.done)
    batches = plan.pending(done)
    shares = plan.shares(batches, ranks.num_replicas, config.fsdp_size)
    share, longest_of_replica = shares[ranks.stream], shares[ranks.replica * config.fsdp_size]
    payload_bytes = layout.payload_bytes(plan.num_rows, plan.sums(rows.num_positions))
    tokens_of_batch = plan.sums(rows.forward_lengths)
    logger.info(
        f"Capturing {np.count_nonzero(~done):,} of {len(rows):,} rows, {tokens_of_batch[batches].sum():,} tokens in "
        f"{len(batches):,} batches. Ranks: {ranks.num_ranks}, on {ranks.device.type}, {torch.get_num_threads()} CPU "
        "threads each."
    )
    progress = Progress(plan.num_rows, tokens_of_batch, payload_bytes, shares, config.tp_size)
    writer = Writer(output.partial, header, rows, plan, done, progress.written, progress.snapshot) if header else None
    with writer or nullcontext():
        with (
            progress if writer else nullcontext(),
            ranks.watched(),
            ranks.deliver(shares, payload_bytes, writer.submit if writer else None, progress.waited) as outbox,
        ):
            for number in share:
                batch = rows.batch(plan.rows(number))
                payload = capture_batch(teacher, batch, layout)
                outbox.put(number, payload, partial(seal, batch=batch, layout=layout, dtype=teacher.dtype))
            for _ in range(len(longest_of_replica) - len(share)):
                teacher.keep_step()
        ranks.on_leader(lambda: writer.finish() if writer else None)
    ranks.on_leader(output.complete)
    if writer:
        num_tokens, waited = int(tokens_of_batch[batches].sum()), progress.waited_share
        with only_shows(f"{output.path} is complete, but its summary"):
            file = LogitsFile(output.path)
            print_result(summary(file, writer.num_twice, num_tokens, plan.padding_share, progress.seconds, waited))


if __name__ == "__main__":
    main()
