"""The output head: what it costs to keep the top k of its logits, on top of computing them, and how much memory.

    python -m benchmarks.head

Alternating in one process: the matrix product alone, with one pass over its result, with what a capture does, and with
torch's own top-k and log-sum-exp. Memory is that of a whole captured batch above the model.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import ROOT, median_and_spread, write_report
from logitgen.estimate import _taken_bytes
from logitgen.file.layout import Layout
from logitgen.split.rows import Batch
from logitgen.teacher.capture import capture_batch
from logitgen.teacher.keep import _largest, _logsumexp_in_passes, top_k
from logitgen.teacher.model import CHUNK_LOGITS, GPU_CHUNK_LOGITS, Teacher

HEADS = {"SmolLM2-135M": (49_152, 576), "Qwen3-0.6B": (151_936, 1024), "Gemma 3 270M": (262_144, 640)}
"""Vocabulary and hidden size of some heads."""

Work = Callable[[], object]


def seconds_of(work: Work, device: torch.device) -> float:
    """Time some work to its end."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def contenders(vocab_size: int, hidden_size: int, k: int, device: torch.device) -> tuple[dict[str, Work], int]:
    """Set up what is compared, on one chunk; return it by name, and how many positions a chunk has."""
    num_positions = (CHUNK_LOGITS if device.type == "cpu" else GPU_CHUNK_LOGITS) // vocab_size
    torch.manual_seed(0)
    head = nn.Linear(hidden_size, vocab_size, bias=False, device=device)
    hidden_CD = torch.randn(num_positions, hidden_size, device=device)
    target_C = torch.randint(vocab_size, (num_positions,), device=device)
    compiled = torch.compile(_logsumexp_in_passes)

    def unfused(logits_CV: Tensor) -> None:
        logits_CV.topk(k)
        logits_CV.logsumexp(-1)

    def with_compiled() -> None:
        logits_CV = head(hidden_CD)
        kept_CK, _ = _largest(logits_CV, k)
        compiled(logits_CV, kept_CK[:, 0])

    found: dict[str, Work] = {
        "product alone": lambda: head(hidden_CD),
        "product, one pass": lambda: head(hidden_CD).amax(-1),
        "as captured": lambda: top_k(head(hidden_CD), target_C, k),
        "torch.topk, logsumexp": lambda: unfused(head(hidden_CD)),
        "log-sum-exp compiled": with_compiled,
    }
    try:
        with_compiled()
    except Exception:  # no compiler on this machine; torch says so in many ways
        del found["log-sum-exp compiled"]
    return found, num_positions


def batch_of(vocab_size: int, num_tokens: int) -> Batch:
    """Make a batch of one row, all of whose positions are captured."""
    tokens = (np.arange(num_tokens + 1) * 7919 % vocab_size).astype(np.int32)
    return Batch(
        rows=np.zeros(1, np.int64),
        source_rows=np.zeros(1, np.int64),
        tokens=[tokens],
        input_ids=tokens[None, :-1].astype(np.int64),
        num_positions=np.array([num_tokens]),
        row_of_position=np.zeros(num_tokens, np.int64),
        positions=np.arange(num_tokens),
        targets=tokens[1:].astype(np.int64),
        seed=0,
    )


def memory_chunks(vocab_size: int, k: int, device: torch.device) -> tuple[float, float]:
    """Memory above the model while a batch is captured, in chunks of float32 logits: in chunks, and all at once."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1
    )
    teacher = Teacher(LlamaForCausalLM(config).to(device).eval(), vocab_size)
    layout = Layout(capture="topk", num_rows=1, num_tokens=2, num_positions=1, vocab_size=vocab_size, top_k=k)
    chunk = CHUNK_LOGITS if device.type == "cpu" else GPU_CHUNK_LOGITS
    batch = batch_of(vocab_size, 4 * (chunk // vocab_size))
    taken = []
    for decoder in (teacher._decoder, None):
        teacher._decoder = decoder
        taken.append(_taken_bytes(device, lambda: capture_batch(teacher, batch, layout)) / (4 * chunk))
    return taken[0], taken[1]


def main() -> None:
    """Measure all heads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--top_k", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="As a rank of several on a small machine has.")
    parser.add_argument("--output", type=Path, default=ROOT / ".bench")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    table, data = [], {}
    for name, (vocab_size, hidden_size) in HEADS.items():
        chunked, whole = memory_chunks(vocab_size, options.top_k, device)  # before anything else has filled the heap
        with torch.inference_mode():
            found, num_positions = contenders(vocab_size, hidden_size, options.top_k, device)
            rounds = [{title: seconds_of(work, device) for title, work in found.items()} for _ in range(options.rounds)]
        row = {"head": f"{name}, {vocab_size:,} x {hidden_size:,}"}
        for title in found:
            ratio = median_and_spread([measured[title] / measured["product, one pass"] for measured in rounds])
            row[title] = f"{ratio.median:.2f} ({ratio.least:.2f}-{ratio.most:.2f})"
        microseconds = median_and_spread([measured["as captured"] for measured in rounds]).median / num_positions * 1e6
        row |= {
            "us a position": f"{microseconds:,.0f}",
            "memory, chunks": f"{chunked:.1f}",
            "unchunked": f"{whole:.1f}",
        }
        table.append(row)
        data[name] = {"rounds": rounds, "positions": num_positions, "memory_chunks": [chunked, whole]}
    write_report(options.output, "head", data, table)


if __name__ == "__main__":
    main()
