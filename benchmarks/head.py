"""The output head: what it costs to keep or draw k of its logits, on top of computing them, and how much memory.

    python -m benchmarks.head

Alternating in one process: the matrix product alone, with one pass over its result, with what a capture of the top k or
of a packed sample with room for k certain tokens does, and with torch's own top-k and log-sum-exp. *without product* is
the time of keeping alone: the sample's, relative to the top k's, on logits that are there. Memory is that of a whole
captured batch above the model.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.benchmark import timer

from benchmarks.harness import Spread, in_turns, parse, write_report
from benchmarks.synthetic import job_of, make_rows, small_llama
from logitgen.estimate import _taken_bytes
from logitgen.file.drawn import DrawnPacking
from logitgen.teacher.capture import capture_batch
from logitgen.teacher.keep import _largest, _logsumexp_in_passes, sample, top_k
from logitgen.teacher.model import CHUNK_LOGITS, GPU_CHUNK_LOGITS, Teacher
from logitgen.teacher.noise import position_keys

HEADS = {"SmolLM2-135M": (49_152, 576), "Qwen3-0.6B": (151_936, 1024), "Gemma 3 270M": (262_144, 640)}
"""Vocabulary and hidden size of some heads."""

BASE = "product, one pass"
ALONE = {"as captured": "top k alone", "as drawn": "sample alone"}
"""Ways that are also timed on logits that are there."""

Work = Callable[[], object]


def device_here() -> torch.device:
    """The accelerator of this machine, or the CPU."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def seconds_of(work: Work) -> float:
    """Time some work to its end, on a GPU too."""
    start = timer()
    work()
    return timer() - start


def chunk_logits(device: torch.device) -> int:
    """Logits of a chunk."""
    return CHUNK_LOGITS if device.type == "cpu" else GPU_CHUNK_LOGITS


def contenders(vocab_size: int, hidden_size: int, k: int, device: torch.device) -> dict[str, Work]:
    """Set up what is compared, on one chunk."""
    num_positions = chunk_logits(device) // vocab_size
    torch.manual_seed(0)
    head = nn.Linear(hidden_size, vocab_size, bias=False, device=device)
    hidden_CD = torch.randn(num_positions, hidden_size, device=device)
    target_C = torch.randint(vocab_size, (num_positions,), device=device)
    key_C = position_keys(0, torch.zeros_like(target_C), torch.arange(num_positions, device=device))
    compiled = torch.compile(_logsumexp_in_passes)
    room = DrawnPacking(vocab_size=vocab_size, num_ids=vocab_size, k=k, value_bits=8).room

    def unfused(logits_CV: Tensor) -> None:
        logits_CV.topk(k)
        logits_CV.logsumexp(-1)

    def with_compiled(logits_CV: Tensor) -> None:
        kept_CK, _ = _largest(logits_CV, k)
        compiled(logits_CV, kept_CK[:, 0])

    found: dict[str, Callable[[Tensor], object]] = {
        "product alone": lambda logits_CV: None,
        BASE: lambda logits_CV: logits_CV.amax(-1),
        "as captured": lambda logits_CV: top_k(logits_CV, target_C, k),
        "as drawn": lambda logits_CV: sample(logits_CV, target_C, room, key_C, vocab_size),
        "torch.topk, logsumexp": unfused,
    }
    with suppress(Exception):  # no compiler on this machine; torch says so in many ways
        with_compiled(head(hidden_CD))
        found["log-sum-exp compiled"] = with_compiled
    logits_CV = head(hidden_CD)
    alone = {name: lambda keep=found[title]: keep(logits_CV) for title, name in ALONE.items()}
    return {name: lambda keep=keep: keep(head(hidden_CD)) for name, keep in found.items()} | alone


def memory_chunks(vocab_size: int, k: int, device: torch.device) -> tuple[float, float]:
    """Memory above the model while a batch is captured, in chunks of float32 logits: in chunks, and all at once."""
    teacher = Teacher(small_llama(vocab_size, hidden_size=64).to(device).eval(), vocab_size)
    num_tokens = 4 * (chunk_logits(device) // vocab_size)
    rows = make_rows(np.array([num_tokens + 1]), vocab_size)
    job = job_of(rows, num_tokens, capture="topk", top_k=k, vocab_size=vocab_size)
    taken = []
    for decoder in (teacher._decoder, None):
        teacher._decoder = decoder
        capture = partial(capture_batch, teacher, rows.batch(job.plan.rows(0)), job.layout)
        taken.append(_taken_bytes(device, capture) / (4 * chunk_logits(device)))
    return taken[0], taken[1]


def main() -> None:
    """Measure all heads, with one thread, as a rank of several on a small machine has."""
    options = parse(__doc__, top_k=64, rounds=7, threads=1)
    torch.set_num_threads(options.threads)
    device = device_here()
    table = []
    for name, (vocab_size, hidden_size) in HEADS.items():
        chunked, whole = memory_chunks(vocab_size, options.top_k, device)  # before anything else has filled the heap
        with torch.inference_mode():
            works = contenders(vocab_size, hidden_size, options.top_k, device)
            found = in_turns({title: partial(seconds_of, work) for title, work in works.items()}, options.rounds)
        top, drawn = (found.pop(name) for name in ALONE.values())
        ratios = {title: Spread.of(seconds, found[BASE]) for title, seconds in found.items() if title != BASE}
        ratios["without product"] = Spread.of(drawn, top)
        head = {"head": f"{name}, {vocab_size:,} x {hidden_size:,}"}
        table.append(head | ratios | {"memory, chunks": chunked, "unchunked": whole})
    forms = dict.fromkeys(table[0], ".2f") | {"memory, chunks": ".1f", "unchunked": ".1f"}
    write_report(options.output, "head", table, forms)


if __name__ == "__main__":
    main()
