"""Shuffled batches out of a file, against the rate at which a student of 100 million parameters trains from them.

    python -m benchmarks.reading

The file is made up: ragged rows, k=64, values that a loss accepts. Batches come from a `DataLoader` with `collate`, as
they do in training, in this process and from worker processes. The file has been written just before, so it is read
from the page cache. The student (a Llama of random weights) does forward, loss, backward and an AdamW step.
"""

import json
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice, repeat
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.data import DataLoader

from benchmarks.harness import Spread, in_turns, parse, scratch, write_report
from benchmarks.head import device_here
from benchmarks.synthetic import Job, make_job, small_llama
from logitgen import LogitsDataset, collate, distil
from logitgen.file.layout import FORMAT_NAME, FORMAT_VERSION, JSON_ATTRIBUTES, SETTINGS_READ

VOCAB_SIZE, TOP_K, ROW_TOKENS = 32_000, 64, 256
STUDENT = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
"""With tied embeddings of the vocabulary above: 109.5 million parameters."""

Batch = dict[str, torch.Tensor]


def write_file(path: Path, job: Job) -> None:
    """Make up a complete file: distinct ids, log-probs that fall evenly and leave a tail."""
    sizes = {"top_k": job.layout.top_k, "vocab_size": job.layout.vocab_size, "tokenizer_size": job.layout.vocab_size}
    kind = {"format": FORMAT_NAME, "version": FORMAT_VERSION, "capture": "topk", "encoding": "plain"}
    texts = dict.fromkeys(JSON_ATTRIBUTES, "{}") | {"settings": json.dumps(dict.fromkeys(SETTINGS_READ))}
    places = job.create_file(path, teacher_dtype="float32", **kind, **sizes, **texts).places
    first = np.random.default_rng(0).integers(VOCAB_SIZE, size=(job.layout.num_positions, 1))
    values = {
        "kept_ids": (first + 7 * np.arange(TOP_K)) % VOCAB_SIZE,
        "kept_logprobs": -2.5 - 0.1 * np.arange(TOP_K),
        "target_logprob": -1.0,
        "logsumexp": 10.0,
        "done": 1,
    }
    for name, value in values.items():
        shape, dtype = job.layout.datasets[name]
        np.memmap(path, dtype, "r+", places[name], shape)[:] = value


def shuffled(dataset: LogitsDataset, batch_rows: int, num_workers: int) -> Iterator[Batch]:
    """Yield shuffled batches without end."""
    workers = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    return chain.from_iterable(repeat(DataLoader(dataset, batch_rows, shuffle=True, collate_fn=collate, **workers)))


def reading_rate(dataset: LogitsDataset, batch_rows: int, seconds: float, num_workers: int) -> float:
    """Read for some seconds, the start of the workers left out; return captured positions per second."""
    source = shuffled(dataset, batch_rows, num_workers)
    for _ in range(2 + 2 * num_workers):
        next(source)
    start, num_positions = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        num_positions += int(next(source)["captured"].sum())
    return num_positions / (time.perf_counter() - start)


def training_rate(dataset: LogitsDataset, batch_rows: int, steps: int) -> float:
    """Train a student on batches that are there already; return captured positions per second, median of the steps."""
    device = device_here()
    torch.manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    student = small_llama(VOCAB_SIZE, tie_word_embeddings=True, **STUDENT).to(device, dtype).train()
    student, optimizer = distil(student, dataset), torch.optim.AdamW(student.parameters(), lr=1e-4)
    rates = []
    for batch in islice(shuffled(dataset, batch_rows, 0), steps + 1):
        on_device = {name: values.to(device) for name, values in batch.items()}
        start = time.perf_counter()
        student(**on_device).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(int(batch["captured"].sum()) / (time.perf_counter() - start))
    return median(rates[1:])  # the first step makes the optimizer's state


def main() -> None:
    """Measure both rates in turns."""
    sizes = {"megabytes": 200, "batch_rows": 4, "seconds": 5.0, "steps": 3}
    options = parse(__doc__, workers=[0, 1, 2], rounds=2, **sizes)
    job = make_job(options.megabytes * 10**6, TOP_K, VOCAB_SIZE, 4 * ROW_TOKENS, ROW_TOKENS)
    with scratch(options) as folder:
        write_file(folder / "made_up.h5", job)
        dataset = LogitsDataset(folder / "made_up.h5")
        ways = {"training": partial(training_rate, dataset, options.batch_rows, options.steps)}
        for workers in options.workers:
            ways[str(workers)] = partial(reading_rate, dataset, options.batch_rows, options.seconds, workers)
        rates = in_turns(ways, options.rounds)
    training = rates.pop("training")
    table = [
        {
            "workers": workers,
            "positions/s read": median(found),
            "MB/s of the file": median(found) * job.layout.bytes_per_position / 1e6,
            "positions/s trained": median(training),
            "ratio": Spread.of(found, training),
        }
        for workers, found in rates.items()
    ]
    data = {"positions": job.layout.num_positions, "training": training, "reading": rates}
    write_report(options.output, "reading", table, data=data)


if __name__ == "__main__":
    main()
