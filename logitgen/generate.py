r"""Capture a teacher's logits over a dataset into one HDF5 file.

    accelerate launch --config_file accelerate_configs/cpu.yaml generate.py \
        --teacher M --dataset D --split S --output out.h5

Every rank runs this module from top to bottom. The leader (rank 0) also writes. The same command resumes a stopped
run.
"""

import logging
import sys
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.utils import set_seed

from logitgen.config import Config
from logitgen.console import only_shows, print_result, silence_stdout, start_logging
from logitgen.costs import estimate_view, summary
from logitgen.estimate import PROBE_TOKENS, estimate, fitting_batch_tokens, run_pilot
from logitgen.file.header import Attributes, Header, file_bytes
from logitgen.file.layout import Layout
from logitgen.file.reader import LogitsFile
from logitgen.fit import fitted
from logitgen.leader.output import Output
from logitgen.leader.places import write_known
from logitgen.leader.progress import Progress, Speed
from logitgen.leader.writer import Writer
from logitgen.options import parse_config
from logitgen.provenance import (
    attributes,
    facts_of_launch,
    facts_of_teacher,
    settings_attributes,
    teacher_attributes,
)
from logitgen.ranks.agree import UNLIMITED, Ranks
from logitgen.ranks.deliver import Outbox
from logitgen.ranks.environment import check_launch
from logitgen.ranks.launch import launched
from logitgen.split.encoded import remarks
from logitgen.split.job import Job, job_of
from logitgen.split.load import load_split
from logitgen.split.prefixes import Neighbours, neighbours
from logitgen.split.rows import Rows
from logitgen.split.shapes import template_of
from logitgen.split.tokens import load_tokenizer, tokenize
from logitgen.teacher.adapter import with_base
from logitgen.teacher.capture import capture_batch, seal
from logitgen.teacher.describe import TeacherInfo, describe_teacher
from logitgen.teacher.model import Teacher, load_model
from logitgen.tokenizer import tokenizer_fingerprint

logger = logging.getLogger("logitgen.generate")


def main() -> None:
    """Run the main job as one rank of a launch."""
    with launched() as ranks:
        capture(ranks, sys.argv[1:])


def capture(ranks: Ranks, arguments: list[str]) -> None:
    """Run the main job: options, rows, teacher, capture.

    Each step refuses bad input before the next step costs more.
    """
    config, output = read_options(ranks, arguments)
    with ranks.together():
        info = describe_teacher(config)
    ranks.same(facts_of_teacher(info))
    set_seed(config.seed)
    config, split = read_rows(ranks, config, info)
    if is_complete(ranks, config, output, split):
        return
    config, job, teacher, about = load_teacher(ranks, config, output, info, split)
    if config.dry_run:
        show_costs(ranks, config, output, job, teacher, about)
    else:
        fill_file(ranks, config, output, job, teacher, about)


def read_options(ranks: Ranks, arguments: list[str]) -> tuple[Config, Output]:
    """Read the options, and claim the output before anything expensive."""
    check_launch(ranks.num_ranks)
    if not ranks.is_leader:
        silence_stdout()
    with ranks.together():
        config = with_base(parse_config(arguments))
    ranks.patience_seconds = config.rank_timeout
    ranks.form_replicas(config.tp_size, config.fsdp_size, config.device_map)
    ranks.same(facts_of_launch(config))
    output = Output(Path(config.output), config.overwrite, config.dry_run)
    with ranks.together():
        start_logging(Path(config.log_dir), ranks.rank, ranks.num_ranks)
        if ranks.is_leader:
            output.claim()
    if names := config.open_settings:
        with ranks.together():
            found = output.found_settings(config.settings, names) if ranks.is_leader else {}
        config = config.with_found(ranks.from_leader(found))
    with ranks.together():
        if ranks.is_leader:
            output.check(settings_attributes(config))
            day = output.chat_template_date(config.settings, names) or date.today().isoformat()
    day = ranks.from_leader(day if ranks.is_leader else "")
    return replace(config, chat_template_date=config.chat_template_date or day), output


@dataclass(frozen=True)
class Split:
    """The split as rows of tokens, the file's sizes, and the attributes known so far."""

    rows: Rows
    layout: Layout
    about: Attributes


def read_rows(ranks: Ranks, config: Config, info: TeacherInfo) -> tuple[Config, Split]:
    """Tokenise the split, cut it into rows, and lay out the file: the layout fixes every byte's place."""
    logger.info(f"Reading {config.dataset}, split {config.split}.")
    with ranks.together():
        tokenizer = load_tokenizer(config)
        of_tokenizer = tokenizer_fingerprint(tokenizer)
    with ranks.machine_by_machine(patience_seconds=UNLIMITED):
        split = load_split(config)
        tokens = tokenize(split, tokenizer, config, of_tokenizer)
        template = template_of(split, tokenizer, config)
    with ranks.together():
        rows = Rows(tokens, config, info.max_length, info.length_switch)
        rows.check_ids(info.vocab_size)
    if ranks.is_leader:
        warn_of_rows(tokens, rows)
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
    about = attributes(config, info, rows, layout, of_tokenizer, template)
    with ranks.together():
        layout.check()
        config, layout, about = fitted(config, layout, about)
    return config, Split(rows, layout, about)


def warn_of_rows(tokens: datasets.Dataset, rows: Rows) -> None:
    """Log what a user may not expect of the rows."""
    for remark in remarks(tokens):
        logger.warning(str(remark))
    if rows.num_dropped_tokens:
        logger.warning(f"{rows.num_dropped_tokens:,} tokens are in no row: cut off, or too few for a block.")
    if rows.num_emptied:
        logger.warning(f"{rows.num_emptied:,} rows lost all their completions to --max_length.")


def is_complete(ranks: Ranks, config: Config, output: Output, split: Split) -> bool:
    """Tell whether the file is complete with all its rows, and refuse a file that does not match this run."""
    complete = False
    with ranks.together():
        if ranks.is_leader:
            output.check(split.about)
            complete = output.is_complete()
            if not complete and not config.dry_run:
                output.check_space(file_bytes(split.layout, split.about))
    if not ranks.from_leader(complete):
        return False
    with ranks.together():
        if ranks.is_leader and not config.dry_run:
            output.complete()
    logger.info(f"{output.path} is complete: all {len(split.rows):,} rows are there. Nothing is left to do.")
    return True


def load_teacher(
    ranks: Ranks, config: Config, output: Output, info: TeacherInfo, split: Split
) -> tuple[Config, Job, Teacher, Attributes]:
    """Load the teacher, and plan the batches it computes."""
    logger.info(f"Loading {config.teacher}.")
    with ranks.together():
        model = load_model(config, ranks.device, ranks.num_replicas)
    with ranks.in_step():
        teacher = Teacher(model, info.vocab_size, config.capture == "hidden", config.layer_numbers)
    rows, layout = split.rows, replace(split.layout, head=teacher.head_form)
    computation = {f"teacher's {name}": str(value) for name, value in teacher.computation.items()}
    ranks.same({"teacher's weights": teacher.fingerprint, "tokens": rows.fingerprint} | computation)
    prefixes = shared_prefixes(ranks, config, rows, teacher, info.length_switch)
    if config.batch_tokens.is_auto:
        probe = job_of(rows, layout, PROBE_TOKENS, info.length_switch, prefixes, teacher.device.type)
        with ranks.in_step():
            fitting = fitting_batch_tokens(teacher, probe, ranks.ranks_of_machine)
        config = config.with_found({"batch_tokens": min(ranks.gathered(fitting))})
        logger.info(f"As many tokens as fit into memory: --batch_tokens {config.batch_tokens:,}.")
    about = split.about | settings_attributes(config) | teacher_attributes(teacher)
    with ranks.together():
        if ranks.is_leader:
            output.check(about)
    job = job_of(rows, layout, config.batch_tokens, info.length_switch, prefixes, teacher.device.type)
    return config, job, teacher, about


def shared_prefixes(
    ranks: Ranks, config: Config, rows: Rows, teacher: Teacher, length_switch: int | None
) -> Neighbours | None:
    """Find the rows whose prefixes are read once, if the options and the teacher allow for that."""
    if not config.share_prefixes:
        return None
    with ranks.together(patience_seconds=UNLIMITED):
        prefixes = neighbours(rows, length_switch)
    if not len(prefixes.rows):
        return None
    if config.fsdp_size > 1:
        logger.warning(
            "The tokens that several rows begin with are read again in every row: with --fsdp_size, all ranks must run "
            "the teacher equally often."
        )
        return None
    with ranks.in_step():
        can_share = teacher.share_prefixes()
    ranks.same({"teacher's way to read prefixes": str(can_share)})
    return prefixes if can_share else None


def show_costs(ranks: Ranks, config: Config, output: Output, job: Job, teacher: Teacher, about: Attributes) -> None:
    """Compute a few batches on every rank, and show the costs of a run."""
    with ranks.watched():
        pilot = run_pilot(teacher, job, lambda number: min(ranks.gathered(number)))
    pilots = ranks.gathered(pilot)
    if ranks.is_leader:
        costs = estimate(job, about, pilots, config.tp_size, config.fsdp_size)
        print_result(estimate_view(costs, output.free_bytes))


def fill_file(ranks: Ranks, config: Config, output: Output, job: Job, teacher: Teacher, about: Attributes) -> None:
    """Have every rank compute its share of the missing batches, and the leader write the captured values."""
    known = partial(write_known, layout=job.layout, rows=job.rows, head=teacher.head)
    header: Header | None = None
    with ranks.together(patience_seconds=UNLIMITED):
        if ranks.is_leader:
            header = output.create(job.layout, about, known)
    done = ranks.from_leader(output.done() if ranks.is_leader else np.empty(0, bool))
    batches = job.plan.pending(done)
    shares = job.plan.shares(batches, ranks.num_replicas, config.fsdp_size)
    num_tokens = int(job.forward_tokens[batches].sum())
    logger.info(
        f"Capturing {np.count_nonzero(~done):,} of {len(job.rows):,} rows, {num_tokens:,} tokens in {len(batches):,} "
        f"batches. Ranks: {ranks.num_ranks}, on {ranks.device.type}, CPU threads per rank: {torch.get_num_threads()}."
    )
    progress = Progress(job.plan.num_rows, job.forward_tokens, job.payload_bytes, shares, config.tp_size)
    writer = Writer(output.partial, header, job, done, progress.written, progress.snapshot) if header else None
    submit = writer.submit if writer else None
    with writer or nullcontext():
        with (
            progress if writer else nullcontext(),
            ranks.watched(),
            ranks.deliver(shares, job.payload_bytes, submit, progress.waited) as outbox,
        ):
            longest_of_replica = shares[ranks.replica * config.fsdp_size]
            compute(teacher, job, shares[ranks.stream], len(longest_of_replica), outbox)
        with ranks.together():
            if writer:
                writer.finish()
    with ranks.together():
        if ranks.is_leader:
            output.complete()
    if writer:
        with only_shows(f"{output.path} is complete, but its summary"):
            file = LogitsFile(output.path)
            speed = Speed(
                num_tokens, progress.seconds, job.plan.padding_share, job.plan.saved_share, progress.waited_share
            )
            print_result(summary(file, writer.num_duplicates, speed))


def compute(teacher: Teacher, job: Job, share: np.ndarray, num_steps: int, outbox: Outbox) -> None:
    """Run the teacher over a share of the batches. Ranks that share its weights all take the same number of steps."""
    for number in share:
        batch = job.batch(number)
        payload = capture_batch(teacher, batch, job.layout)
        outbox.put(number, payload, partial(seal, batch=batch, layout=job.layout, dtype=teacher.dtype))
    for _ in range(num_steps - len(share)):
        teacher.keep_step()


if __name__ == "__main__":
    main()
