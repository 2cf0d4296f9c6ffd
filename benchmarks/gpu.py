"""All that is open about a GPU, within ten minutes: speed, where the time goes, memory, numbers, equal bytes.

    python -m benchmarks.gpu

No network and no weights: teachers of real shapes are made on the device with random weights, rows with the lengths of
chats. Each part prints its table and leaves its report when it is done; a part that fails says so. On a CPU the same
parts run with tiny shapes, which shows that they work and nothing else. `--parts` names some of them.
"""

import logging
import time
from collections.abc import Iterator
from unittest import mock

import numpy as np
import torch

from benchmarks.gpu_bench import ON_GPU, TINY, Bench
from benchmarks.gpu_prefixes import passes, prefixes
from benchmarks.gpu_speed import attention, ranks, speed, stages
from benchmarks.gpu_student import student
from benchmarks.harness import Row, measure, parse, scratch, write_report
from benchmarks.head import chunk_logits, memory_chunks
from benchmarks.synthetic import make_rows
from logitgen.errors import first_line
from logitgen.estimate import PROBE_TOKENS, _free_bytes, _taken_bytes, fitting_batch_tokens
from logitgen.file.layout import Array
from logitgen.split.job import Job
from logitgen.split.rows import Batch
from logitgen.teacher import capture
from logitgen.teacher.capture import capture_batch
from logitgen.teacher.model import Teacher


def memory(bench: Bench) -> Iterator[Row]:
    """Measure peaks above the model, find the batch that fits into little memory, and have one halved."""
    for vocab_size in bench.scale.vocab_sizes:
        for way, chunks in zip(("in chunks", "head whole"), memory_chunks(vocab_size, 64, bench.device), strict=True):
            taken = chunks * 4 * chunk_logits(bench.device)
            yield {"memory": f"V = {vocab_size:,}: above the model, {way}", "MB": taken / 1e6}
    with bench.teacher(1) as model:
        excess = _free_bytes(bench.device) - bench.scale.free_bytes if bench.on_gpu else 0
        ballast = torch.empty(max(0, excess), dtype=torch.uint8, device=bench.device)  # as a small GPU would be
        # Rows that fill a batch of any size.
        rows = make_rows(np.full(64, bench.scale.row_tokens[2] // 2, np.int32), model.shard.vocab_size)
        job = bench.job(model, rows, "topk 64", PROBE_TOKENS)
        yield {"memory": "free", "MB": _free_bytes(bench.device) / 1e6}
        found = fitting_batch_tokens(model, job, 1)
        batch = rows.batch(bench.job(model, rows, "topk 64", found).plan.rows(0))
        taken = _taken_bytes(bench.device, lambda: capture_batch(model, batch, job.layout))
        name = f"--batch_tokens auto = {found:,}: taken by {batch.passes[0].input_ids.size:,} tokens"
        yield {"memory": name, "MB": taken / 1e6}
        # All rows as one batch, for which there is not enough memory, and a few of them alone.
        whole = rows.batch(bench.job(model, rows, "topk 64", rows.num_tokens).plan.rows(0))
        alone = whole.halves()[0].halves()[0].halves()[0].halves()[0]
        with mock.patch.object(capture.logger, "warning") as warning:
            values, expected = (captured(model, batch, job)["logsumexp"] for batch in (whole, alone))
        off = np.abs(values[: len(expected)] - expected).max()
        told = f"halved {warning.call_count} times, {off:.4f} nats off"
        yield {"memory": f"a batch of {whole.passes[0].input_ids.size:,} tokens", "MB": told}
        del ballast


def captured(model: Teacher, batch: Batch, job: Job) -> dict[str, Array]:
    """Capture a batch, and read its payload as the values of every dataset."""
    payload = capture_batch(model, batch, job.layout).cpu().numpy()
    slices = job.layout.payload_slices(len(batch.rows), len(batch.positions))
    fields = job.layout.captured
    return {name: payload[slices[name]].view(dtype).reshape(-1, *entry) for name, (entry, dtype) in fields.items()}


def numbers(bench: Bench) -> Iterator[Row]:
    """Compare captured log-probs with those of rows read alone, unpadded, and these with float32's; in nats."""
    default = torch.get_float32_matmul_precision()
    ways = {"bfloat16": (torch.bfloat16, default), "float32": (torch.float32, default)}
    for name, (dtype, precision) in (ways | {"float32 with TF32": (torch.float32, "high")}).items():
        with bench.teacher(0, dtype) as model, torch.no_grad():
            rows = bench.rows(2 * bench.scale.batch_tokens, model.shard.vocab_size)
            job = bench.job(model, rows, "topk 64")
            batches = {"few long rows": job.batch(0), "many short rows": job.batch(job.plan.num_batches - 1)}
            alone = {kind: _alone(bench, model, batch) for kind, batch in batches.items()}
            torch.set_float32_matmul_precision(precision)
            found = {kind: captured(model, batch, job)["target_logprob"] for kind, batch in batches.items()}
            torch.set_float32_matmul_precision(default)
            model._model.float()
            for kind, batch in batches.items():
                off = np.abs(found[kind] - alone[kind])
                rounded = np.abs(alone[kind] - _alone(bench, model, batch))
                row = {"precision": f"{name}, {kind}", "largest": float(off.max()), "mean": float(off.mean())}
                yield row | {"rows alone, largest": float(rounded.max()), "rows alone, mean": float(rounded.mean())}


def _alone(bench: Bench, model: Teacher, batch: Batch) -> Array:
    """Log-probs of the next tokens by a plain forward pass over each row of a batch, float32[P]."""
    found = []
    for ids in batch.tokens:
        input_ids_T = torch.from_numpy(ids.astype(np.int64)).to(bench.device)
        logprobs_TV = model._model(input_ids=input_ids_T[None]).logits[0, :-1].float().log_softmax(-1)
        found.append(logprobs_TV.gather(-1, input_ids_T[1:, None])[:, 0].cpu().numpy())
    return np.concatenate(found)


def files(bench: Bench) -> Iterator[Row]:
    """Run `generate.py` as a person would: twice, and once killed and resumed."""
    once, again, resumed = (bench.folder / f"{name}.h5" for name in ("once", "again", "resumed"))
    for output in (once, again):
        measure(bench.generate(1, output.stem))
    yield {"files": "two runs, the same bytes", "": str(once.read_bytes() == again.read_bytes())}
    command, log = bench.generate(1, "resumed"), bench.folder / "resumed" / "rank_0.log"
    first = measure(command, until=lambda: log.exists() and "First rows" in log.read_text())
    was_killed = first.killed and not resumed.exists()
    measure(command)
    same = once.read_bytes() == resumed.read_bytes() if was_killed else "ended before"
    yield {"files": "killed after its first rows and resumed, the same bytes", "": str(same)}


PARTS = {
    "speed": (speed, ".3f"),
    "stages": (stages, ".2f"),
    "passes": (passes, ".1f"),
    "prefixes": (prefixes, ".3f"),
    "student": (student, ".2f"),
    "memory": (memory, ",.0f"),
    "numbers": (numbers, ".1e"),
    "attention": (attention, ",.0f"),
    "files": (files, ""),
    "ranks": (ranks, ""),
}
"""Each with the form of its numbers."""

FORMS = {"tokens/s": ",.0f", "GPU idle": ".1%"}


def main() -> None:
    """Run all parts, or those that are named."""
    options = parse(__doc__, parts=[*PARTS])
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    print(torch.cuda.get_device_name() if device.type == "cuda" else "CPU, tiny shapes")
    with scratch(options) as folder:
        bench = Bench(device, ON_GPU if device.type == "cuda" else TINY, folder)
        for name in options.parts:
            part, form = PARTS[name]
            start = time.monotonic()
            try:
                table = list(part(bench))
            except Exception as error:  # the other parts are worth having
                logging.exception(name)
                print(f"{name}: failed. {first_line(error)}", flush=True)
                continue
            print(f"\n{name}, {time.monotonic() - start:.0f} s:\n")
            write_report(options.output, f"gpu_{name}", table, dict.fromkeys(table[0], form) | FORMS)


if __name__ == "__main__":
    main()
