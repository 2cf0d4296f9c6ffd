"""Shuffled batches out of a file, against the rate at which a student of 100 million parameters trains from them.

    python -m benchmarks.reading

The file is made up: ragged rows, k=64, values that a loss accepts. Batches come from a `DataLoader` with `collate`, as
they do in training, in this process and from worker processes; the file has been written just before, so it is read
from the page cache. The student (a Llama of random weights) does forward, loss, backward and an AdamW step.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import chain, islice, repeat
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import ROOT, median_and_spread, write_report
from benchmarks.synthetic import Job, make_job
from logitgen import DistillationLoss, LogitsDataset, collate
from logitgen.file import header
from logitgen.file.layout import ATTRIBUTES, FORMAT_NAME, FORMAT_VERSION, JSON_ATTRIBUTES, SETTINGS_READ
from logitgen.leader.places import write_known

VOCAB_SIZE, TOP_K, ROW_TOKENS = 32_000, 64, 256
STUDENT = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
"""With tied embeddings of the vocabulary above: 109.5 million parameters."""

Batch = dict[str, torch.Tensor]


def write_file(path: Path, job: Job) -> None:
    """Make up a complete file: distinct ids, log-probs that fall evenly and leave a tail."""
    layout = job.layout
    attributes: header.Attributes = {name: kind() for name, kind in ATTRIBUTES.items()}
    attributes |= {"format": FORMAT_NAME, "version": FORMAT_VERSION, "capture": "topk", "encoding": "plain"}
    attributes |= {
        "teacher_dtype": "float32",
        "top_k": layout.top_k,
        "vocab_size": layout.vocab_size,
        "tokenizer_size": layout.vocab_size,
    }
    attributes |= dict.fromkeys(JSON_ATTRIBUTES, "{}") | {"settings": json.dumps(dict.fromkeys(SETTINGS_READ))}
    places = header.create(path, layout, attributes)
    with path.open("r+b", buffering=0) as file:
        write_known(file, places, layout, job.rows)
    first = np.random.default_rng(0).integers(layout.vocab_size, size=(layout.num_positions, 1))
    values = {
        "kept_ids": (first + 7 * np.arange(layout.top_k)) % layout.vocab_size,
        "kept_logprobs": -2.5 - 0.1 * np.arange(layout.top_k),
        "target_logprob": -1.0,
        "logsumexp": 10.0,
        "done": 1,
    }
    for name, value in values.items():
        shape, dtype = layout.datasets[name]
        np.memmap(path, dtype, "r+", places[name], shape)[:] = value


def shuffled(dataset: LogitsDataset, batch_rows: int, num_workers: int) -> Iterator[Batch]:
    """Yield shuffled batches without end."""
    loader = DataLoader(
        dataset,
        batch_rows,
        shuffle=True,
        collate_fn=collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )
    return chain.from_iterable(repeat(loader))


def reading_rate(dataset: LogitsDataset, batch_rows: int, num_workers: int, seconds: float) -> float:
    """Read for some seconds, the start of the workers left out; return captured positions per second."""
    source = shuffled(dataset, batch_rows, num_workers)
    for _ in range(2 + 2 * num_workers):
        next(source)
    start, num_positions = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        num_positions += int(next(source)["captured"].sum())
    return num_positions / (time.perf_counter() - start)


def training_rate(dataset: LogitsDataset, batch_rows: int, steps: int, device: torch.device) -> float:
    """Train a student on batches that are there already; return captured positions per second, median of the steps."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=VOCAB_SIZE, tie_word_embeddings=True, **STUDENT)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    student = LlamaForCausalLM(config).to(device, dtype).train()
    loss, optimizer = DistillationLoss(dataset), torch.optim.AdamW(student.parameters(), lr=1e-4)
    rates = []
    for batch in islice(shuffled(dataset, batch_rows, 0), steps + 1):
        on_device = {name: values.to(device) for name, values in batch.items()}
        start = time.perf_counter()
        logits = student(on_device["input_ids"], attention_mask=on_device["attention_mask"]).logits
        loss(logits, on_device).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(int(batch["captured"].sum()) / (time.perf_counter() - start))
    return median_and_spread(rates[1:]).median  # the first step makes the optimizer's state


def main() -> None:
    """Measure both rates in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--batch_rows", type=int, default=4)
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=ROOT / ".bench")
    options = parser.parse_args()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "made_up.h5"
        job = make_job(options.megabytes * 10**6, TOP_K, VOCAB_SIZE, 4 * ROW_TOKENS, ROW_TOKENS)
        write_file(path, job)
        dataset = LogitsDataset(path)
        rounds = []
        for _ in range(options.rounds):
            training = training_rate(dataset, options.batch_rows, options.steps, device)
            reading = {
                workers: reading_rate(dataset, options.batch_rows, workers, options.seconds)
                for workers in options.workers
            }
            rounds.append({"training": training, "reading": reading})
    table = []
    for workers in options.workers:
        ratio = median_and_spread([found["reading"][workers] / found["training"] for found in rounds])
        reading = median_and_spread([found["reading"][workers] for found in rounds]).median
        training = median_and_spread([found["training"] for found in rounds]).median
        table.append(
            {
                "workers": str(workers),
                "positions/s read": f"{reading:,.0f}",
                "MB/s of the file": f"{reading * job.layout.bytes_per_position / 1e6:,.0f}",
                "positions/s trained": f"{training:,.0f}",
                "ratio": f"{ratio.median:,.0f} ({ratio.least:,.0f}-{ratio.most:,.0f})",
            }
        )
    data = {"device": str(device), "rows": len(dataset), "positions": job.layout.num_positions, "rounds": rounds}
    write_report(options.output, "reading", data, table)


if __name__ == "__main__":
    main()
