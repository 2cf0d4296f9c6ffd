"""All that is open about a GPU, within ten minutes: speed, where the time goes, memory, numbers, equal bytes.

    python -m benchmarks.gpu

No network and no weights: teachers of real shapes are made on the device with random weights, rows with the lengths of
chats. Each part prints its table when it is done; a part that fails or for which no time is left says so. On a CPU the
same parts run with tiny shapes, which shows that they work and nothing else.

- `speed`: whole captures against forward passes alone over as many rows without padding, in turns.
- `stages`: the steps from a chunk's hidden states to its payload, and a batch's steps on the host.
- `memory`: peaks above the model, `--batch_tokens auto` with little memory left, a batch that has to be halved.
- `numbers`: captured values against direct forward passes, with TF32 off and on.
- `attention`: one long row and many short rows, by implementation.
- `files`: equal bytes from two runs and after a kill, through `generate.py`; two ranks on one GPU are refused.
- `ranks`: 1 to N GPUs, and one teacher on all of them.
"""

import argparse
import gc
import hashlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config
from transformers.utils import is_flash_attn_2_available

from benchmarks import head as head_benchmark
from benchmarks.harness import ROOT, launch, machine, markdown, median_and_spread, show
from benchmarks.synthetic import Job, make_rows, ragged_lengths
from logitgen import estimate
from logitgen.errors import first_line
from logitgen.file.layout import Array, Layout
from logitgen.leader.writer import Writer
from logitgen.ranks.deliver import Outbox
from logitgen.split.plan import Plan
from logitgen.split.rows import Batch, Rows
from logitgen.teacher import capture, keep
from logitgen.teacher import model as teacher_module
from logitgen.teacher.capture import capture_batch, seal
from logitgen.teacher.model import Teacher

Cells = dict[str, str]
Work = Callable[[], object]
Part = Callable[["Bench"], tuple[list[Cells], Any]]

CAPTURES: dict[str, dict[str, Any]] = {
    "topk 64": {"capture": "topk", "top_k": 64},
    "topk 64, packed": {"capture": "topk", "top_k": 64, "encoding": "packed"},
    "topk 128, packed": {"capture": "topk", "top_k": 128, "encoding": "packed"},
    "sample 12, packed": {"capture": "sample", "top_k": 12, "encoding": "packed"},
    "hidden": {"capture": "hidden", "top_k": 0},
}
_WHOLE = 2**62
_SPLIT_ROWS = 50_000
_LONGEST_SECONDS = 300
"""After which a run of `generate.py` has failed."""
_LOGIT_SPREAD = 4.0
"""Random weights give nearly equal logits; the last norm is scaled up for top k and sampling to find real work."""


class Scale(NamedTuple):
    """Sizes of everything: those of a GPU, and tiny ones."""

    teachers: dict[str, PreTrainedConfig]
    batch_tokens: int
    shortest: int
    mean: int
    longest: int
    rounds: int
    run_seconds: float
    chunks: tuple[int, ...]
    vocab_sizes: tuple[int, ...]
    free_bytes: int
    file_rows: int


def _config(
    kind: type[PreTrainedConfig], vocab_size: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int
) -> PreTrainedConfig:
    return kind(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2**17,
        tie_word_embeddings=kind is Qwen2Config,
    )


ON_GPU = Scale(
    teachers={
        "Qwen2.5-0.5B": _config(Qwen2Config, 151_936, 896, 4864, 24, 14, 2),
        "Qwen2.5-1.5B": _config(Qwen2Config, 151_936, 1536, 8960, 28, 12, 2),
        "Llama-3.1-8B": _config(LlamaConfig, 128_256, 4096, 14_336, 32, 32, 8),
    },
    batch_tokens=8192,
    shortest=100,
    mean=700,
    longest=4096,
    rounds=2,
    run_seconds=1.0,
    chunks=(2**26, 2**27, 2**28, 2**29),
    vocab_sizes=(151_936, 262_144),
    free_bytes=6 * 2**30,
    file_rows=4000,
)
TINY = Scale(
    teachers={
        "tiny Qwen2": _config(Qwen2Config, 1000, 32, 64, 2, 4, 2),
        "tiny Llama": _config(LlamaConfig, 700, 32, 64, 1, 4, 4),
    },
    batch_tokens=256,
    shortest=4,
    mean=20,
    longest=64,
    rounds=2,
    run_seconds=0.02,
    chunks=(2**13, 2**14),
    vocab_sizes=(1000,),
    free_bytes=2**30,
    file_rows=300,
)


@dataclass
class Bench:
    """What all parts share."""

    device: torch.device
    scale: Scale
    folder: Path

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to speak of."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Wait until the device has done all it was asked for."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, work: Work) -> float:
        """Time some work to its end on the device."""
        self.wait()
        start = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - start

    @contextmanager
    def teacher(self, config: PreTrainedConfig, dtype: torch.dtype = torch.bfloat16, **kept: bool) -> Iterator[Teacher]:
        """Make a teacher with random weights on the device, and free its memory afterwards."""
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            model.get_decoder().norm.weight.mul_(_LOGIT_SPREAD)
        yield Teacher(model, config.vocab_size, **kept)
        del model
        gc.collect()
        torch.cuda.empty_cache()

    @contextmanager
    def chunks_of(self, logits: int | None) -> Iterator[None]:
        """Let the head run over chunks of so many logits; None for as many as it does."""
        name = "GPU_CHUNK_LOGITS" if self.on_gpu else "CHUNK_LOGITS"
        with mock.patch.object(teacher_module, name, logits or getattr(teacher_module, name)):
            yield

    @contextmanager
    def little_memory(self) -> Iterator[None]:
        """Fill the GPU up to what a small one would have left."""
        excess = estimate._free_bytes(self.device) - self.scale.free_bytes if self.on_gpu else 0
        ballast = torch.empty(max(0, excess), dtype=torch.uint8, device=self.device)
        yield
        del ballast

    def equal_rows(self, vocab_size: int) -> Rows:
        """Make up rows that fill a batch of any size: 64 of half the longest length."""
        return make_rows(np.full(64, self.scale.longest // 2, np.int32), vocab_size)

    def rows(self, num_tokens: int, vocab_size: int) -> Rows:
        """Make up the rows of some batches, drawn evenly from those of a large split of chats.

        A few rows alone would make smaller batches, because neighbours in length are too different.
        """
        scale = self.scale
        lengths = ragged_lengths(_SPLIT_ROWS, scale.mean, scale.longest, seed=1, shortest=scale.shortest)
        plan = Plan(lengths - 1, scale.batch_tokens)
        batches = np.linspace(0, plan.num_batches - 1, max(2, num_tokens // scale.batch_tokens)).astype(int)
        return make_rows(lengths[np.concatenate([plan.rows(batch) for batch in batches])], vocab_size)

    def job(self, teacher: Teacher, rows: Rows, kind: dict[str, Any], batch_tokens: int = 0) -> Job:
        """Lay out the file of these rows, and plan their batches."""
        sizes = {"num_rows": len(rows), "num_tokens": rows.num_tokens, "num_positions": rows.num_captured}
        form = teacher.head_form if kind["capture"] == "hidden" else None
        layout = Layout(**sizes, **kind, vocab_size=teacher.shard.vocab_size, head=form)
        return Job(rows, Plan(rows.forward_lengths, batch_tokens or self.scale.batch_tokens), layout)

    @property
    def profile(self) -> str:
        """The launch profile."""
        return "multi_gpu" if self.on_gpu else "cpu"

    def write_inputs(self) -> list[str]:
        """Save a small teacher and a split; return the options that name them."""
        folder = self.folder / "teacher"
        vocab_size = 32_000 if self.on_gpu else 500
        config = (
            _config(Qwen2Config, vocab_size, 512, 2048, 8, 8, 2)
            if self.on_gpu
            else _config(Qwen2Config, vocab_size, 32, 64, 2, 4, 2)
        )
        if not folder.exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
            rows = self.rows(self.scale.file_rows * self.scale.mean, vocab_size)
            with (self.folder / "rows.jsonl").open("w", encoding="utf-8") as lines:
                lines.writelines(
                    json.dumps({"input_ids": rows.input_ids(row).tolist()}) + "\n" for row in range(len(rows))
                )
        return [
            f"--teacher={folder}",
            f"--dataset={self.folder / 'rows.jsonl'}",
            f"--batch_tokens={self.scale.batch_tokens}",
            f"--log_dir={self.folder / 'logs'}",
        ]

    def try_generate(self, num_ranks: int, *words: str) -> subprocess.CompletedProcess[str]:
        """Run `generate.py` through the launcher."""
        command = [*launch(num_ranks, self.profile), "generate.py", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=_LONGEST_SECONDS)

    def generate(self, num_ranks: int, *words: str) -> str:
        """Do the same; return what it printed.

        Raises:
            RuntimeError: It failed.
        """
        done = self.try_generate(num_ranks, *words)
        if done.returncode:
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
        return done.stdout


@dataclass
class Capture:
    """A capture from rows to a file, as a single rank does it."""

    teacher: Teacher
    job: Job
    path: Path
    synchronous: bool = False

    @cached_property
    def _header(self) -> Any:
        return self.job.create_file(self.path)

    def __call__(self) -> None:
        """Run it until all is written; the last sync is left out, which no long run would feel."""
        job, none = self.job, np.zeros(len(self.job.rows), dtype=bool)
        with (
            Writer(self.path, self._header, job, none) as writer,
            Outbox(
                int(job.payload_bytes.max()),
                lambda number, message: writer.submit(number, message.numpy()[:-8]).result,
                self.teacher.device,
            ) as outbox,
        ):
            for number in range(job.plan.num_batches):
                batch = job.rows.batch(job.plan.rows(number))
                payload = capture_batch(self.teacher, batch, job.layout)
                finish = partial(seal, batch=batch, layout=job.layout, dtype=self.teacher.dtype)
                if self.synchronous:
                    on_host = payload.cpu().numpy()
                    finish(on_host)
                    writer.submit(number, on_host).result()
                else:
                    outbox.put(number, payload, finish)


class ForwardPasses:
    """Forward passes alone: the batches of a job, without their padding, and nothing kept.

    With the tokens of the rows: products of equal rows take less power, and a GPU computes them up to 15 % faster.
    """

    def __init__(self, model: nn.Module, job: Job, device: torch.device) -> None:
        """Collect the batches."""
        self._model = model
        self._batches = []
        for number, num_tokens in enumerate(job.plan.sums(job.rows.forward_lengths)):
            input_ids_BT = job.rows.batch(job.plan.rows(number)).input_ids
            length = max(1, round(num_tokens / len(input_ids_BT)))
            self._batches.append(torch.from_numpy(input_ids_BT[:, :length]).to(device))
        self.num_tokens = sum(input_ids_BT.numel() for input_ids_BT in self._batches)

    @torch.no_grad()
    def __call__(self) -> None:
        """Run them."""
        with teacher_module._rows_not_packed():
            for input_ids_BT in self._batches:
                self._model(input_ids=input_ids_BT, use_cache=False)


def kernels(work: Work) -> list[tuple[int, int]]:
    """Run some work; return when each kernel and copy began and ended on the GPU, in nanoseconds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == torch.profiler.DeviceType.CUDA and event.duration_ns()
    ]


def idle_share(spans: list[tuple[int, int]]) -> float:
    """Share of the time from the first start to the last end in which nothing ran."""
    ordered = sorted(spans)
    first = end = ordered[0][0]
    idle = 0
    for start, stop in ordered:
        idle += max(0, start - end)
        end = max(end, stop)
    return idle / (end - first)


def speed(bench: Bench) -> tuple[list[Cells], Any]:
    """Compare whole captures with forward passes alone."""
    table, data = [], {}
    for name, config in bench.scale.teachers.items():
        with bench.teacher(config, with_head=True) as model:
            data[name] = _speed_of(bench, model)
        for way, found in data[name].items():
            share = median_and_spread(found["share"])
            table.append(
                {
                    "teacher, way": f"{name}, {way}",
                    "tokens/s": f"{median_and_spread(found['tokens_per_second']).median:,.0f}",
                    "forward passes = 1": f"{share.median:.3f} ({share.least:.3f}-{share.most:.3f})",
                    "GPU idle": f"{found['idle_share']:.1%}" if "idle_share" in found else "-",
                }
            )
    return table, data


def _speed_of(bench: Bench, model: Teacher) -> dict[str, Any]:
    vocab_size, kind = model.shard.vocab_size, CAPTURES["topk 64, packed"]
    probe = ForwardPasses(
        model._model, bench.job(model, bench.rows(2 * bench.scale.batch_tokens, vocab_size), kind), bench.device
    )
    probe()
    num_tokens = int(probe.num_tokens / bench.seconds(probe) * bench.scale.run_seconds)
    rows = bench.rows(max(8 * bench.scale.batch_tokens, num_tokens), vocab_size)
    jobs = {name: bench.job(model, rows, fields) for name, fields in CAPTURES.items()}
    forward = ForwardPasses(model._model, jobs["topk 64"], bench.device)
    works: dict[str, Work] = {"forward passes": forward}
    works |= {name: Capture(model, job, bench.folder / f"{name}.h5") for name, job in jobs.items()}
    copied = Capture(model, jobs["topk 64, packed"], bench.folder / "copied.h5", synchronous=True)
    works |= {"head in one piece": works["topk 64, packed"], "synchronous copy": copied}
    large = bench.job(model, rows, kind, 4 * bench.scale.batch_tokens)
    works[f"batches of {4 * bench.scale.batch_tokens:,}"] = Capture(model, large, bench.folder / "large.h5")
    rounds: list[dict[str, float]] = []
    for _ in range(bench.scale.rounds + 1):
        seconds_per_token = {}
        for way, work in works.items():
            with bench.chunks_of(_WHOLE if way == "head in one piece" else None):
                num_tokens = forward.num_tokens if work is forward else jobs["topk 64"].plan.num_tokens
                seconds_per_token[way] = bench.seconds(work) / num_tokens
        rounds.append(seconds_per_token)
    data = {
        way: {
            "tokens_per_second": [1 / seconds[way] for seconds in rounds[1:]],  # the first one warms up
            "share": [seconds["forward passes"] / seconds[way] for seconds in rounds[1:]],
        }
        for way in works
    }
    if bench.on_gpu:
        for way in ("forward passes", "topk 64, packed", "hidden"):
            data[way]["idle_share"] = idle_share(kernels(works[way]))
    for file in bench.folder.glob("*.h5"):
        file.unlink()
    return data


def stages(bench: Bench) -> tuple[list[Cells], Any]:
    """Time each step of a chunk, by chunk size, and each of a batch."""
    name, config = list(bench.scale.teachers.items())[1]
    vocab_size = config.vocab_size
    table, data = [], {}
    with bench.teacher(config) as model, torch.no_grad():
        head = model._model.get_output_embeddings()
        for chunk in bench.scale.chunks:
            num_positions = max(1, chunk // vocab_size)
            hidden_CD = torch.randn(num_positions, config.hidden_size, device=bench.device, dtype=torch.bfloat16)
            logits_CV = head(hidden_CD * _LOGIT_SPREAD)
            works = _steps(model, head, hidden_CD, logits_CV)
            for work in works.values():
                work()
            found = {step: median_and_spread([bench.seconds(work) for _ in range(5)]) for step, work in works.items()}
            data[f"chunk of {num_positions} positions"] = found
            table += [
                {"step": f"{num_positions} positions: {step}", "us": f"{1e6 * spread.median / num_positions:,.2f}"}
                for step, spread in found.items()
            ]
            del works, logits_CV
        job = bench.job(model, bench.rows(4 * bench.scale.batch_tokens, vocab_size), CAPTURES["topk 64, packed"])
        data["batch"] = _steps_of_batch(bench, model, job)
    table += [{"step": f"a batch, ms: {step}", "us": f"{1e3 * taken:,.2f}"} for step, taken in data["batch"].items()]
    return table, {name: data}


def _steps(model: Teacher, head: nn.Module, hidden_CD: Tensor, logits_CV: Tensor) -> dict[str, Work]:
    target_C = torch.zeros(len(hidden_CD), dtype=torch.int64, device=hidden_CD.device)
    layouts = {
        name: Layout(num_rows=1, num_tokens=1, num_positions=1, vocab_size=logits_CV.shape[1], **fields)
        for name, fields in CAPTURES.items()
    }
    in_passes = mock.patch.object(keep, "_gpu_scan", return_value=None)

    def passes() -> None:
        with in_passes:
            keep.top_k(logits_CV, target_C, 64)

    def kept(name: str) -> dict[str, Tensor]:
        return capture._kept(logits_CV, hidden_CD, target_C, target_C, model.shard, layouts[name])

    top = kept("topk 64, packed")
    packing = layouts["topk 64, packed"].packing
    assert packing
    return {
        "head's product": lambda: head(hidden_CD),
        "torch.topk": lambda: torch.topk(logits_CV, 64),
        "torch.logsumexp": lambda: torch.logsumexp(logits_CV.float(), -1),
        "top 64 and log-sum-exp, torch alone": passes,
        "top 64 and log-sum-exp": lambda: keep.top_k(logits_CV, target_C, 64),
        "log-sum-exp": lambda: keep._logsumexp(logits_CV),
        "packing 64": lambda: packing.pack(top["kept_ids"], top["kept_logprobs"]),
        "drawing 12": partial(kept, "sample 12, packed"),
    }


def _steps_of_batch(bench: Bench, model: Teacher, job: Job) -> dict[str, float]:
    rows = job.plan.rows(1)
    batch = job.rows.batch(rows)
    payload = capture_batch(model, batch, job.layout)
    on_host = torch.empty(len(payload), dtype=torch.uint8, pin_memory=bench.on_gpu)
    start = time.perf_counter()
    capture_batch(model, batch, job.layout)
    asked = time.perf_counter() - start
    on_host.copy_(payload)
    return {
        "rows.batch": bench.seconds(lambda: job.rows.batch(rows)),
        "asking the GPU": asked,
        "capture_batch": bench.seconds(lambda: capture_batch(model, batch, job.layout)),
        "copy to the host": bench.seconds(lambda: on_host.copy_(payload, non_blocking=True)),
        "seal": bench.seconds(lambda: seal(on_host.numpy(), batch, job.layout, model.dtype)),
    }


def memory(bench: Bench) -> tuple[list[Cells], Any]:
    """Measure peaks above the model, find the batch that fits into little memory, and have one halved."""
    data: dict[str, Any] = {}
    unit = 4 * (teacher_module.GPU_CHUNK_LOGITS if bench.on_gpu else teacher_module.CHUNK_LOGITS)
    for vocab_size in bench.scale.vocab_sizes:
        chunked, whole = head_benchmark.memory_chunks(vocab_size, 64, bench.device)
        data[f"V = {vocab_size:,}: above the model, in chunks"] = chunked * unit
        data[f"V = {vocab_size:,}: above the model, head whole"] = whole * unit
    _, config = list(bench.scale.teachers.items())[1]
    with bench.teacher(config) as model, bench.little_memory():
        rows = bench.equal_rows(config.vocab_size)
        job = bench.job(model, rows, CAPTURES["topk 64"])
        data["free"] = estimate._free_bytes(bench.device)
        found = estimate.fitting_batch_tokens(model, rows, job.layout, None, 1)
        batch = rows.batch(bench.job(model, rows, CAPTURES["topk 64"], found).plan.rows(0))
        taken = estimate._taken_bytes(bench.device, lambda: capture_batch(model, batch, job.layout))
        data[f"--batch_tokens auto = {found:,}: taken by {batch.input_ids.size:,} tokens"] = taken
        data |= _halved(bench, model, rows)
    table = [
        {"memory": name, "MB": f"{value / 1e6:,.0f}" if isinstance(value, int | float) else value}
        for name, value in data.items()
    ]
    return table, data


def _halved(bench: Bench, model: Teacher, rows: Rows) -> dict[str, Any]:
    """Capture all rows as one batch, for which a GPU with little memory left has not enough; then a few alone."""
    job = bench.job(model, rows, CAPTURES["topk 64"], rows.num_tokens)
    batch = rows.batch(job.plan.rows(0))
    with mock.patch.object(capture.logger, "warning") as warning:
        payload = capture_batch(model, batch, job.layout)
    alone = batch.halves()[0].halves()[0].halves()[0].halves()[0]
    expected = _captured(capture_batch(model, alone, job.layout), alone, job.layout)["logsumexp"]
    off = np.abs(_captured(payload, batch, job.layout)["logsumexp"][: len(expected)] - expected).max()
    return {f"a batch of {batch.input_ids.size:,} tokens": f"halved {warning.call_count} times, {off:.4f} nats off"}


def _captured(payload: Tensor, batch: Batch, layout: Layout) -> dict[str, Array]:
    on_host, slices = payload.cpu().numpy(), layout.payload_slices(len(batch.rows), len(batch.positions))
    return {
        name: on_host[slices[name]].view(dtype).reshape(-1, *entry) for name, (entry, dtype) in layout.captured.items()
    }


def numbers(bench: Bench) -> tuple[list[Cells], Any]:
    """Compare captured log-probs with those of direct forward passes, row by row, unpadded."""
    _, config = next(iter(bench.scale.teachers.items()))
    table, data = [], {}
    for dtype, tf32 in ((torch.bfloat16, False), (torch.float32, False), (torch.float32, True)):
        with bench.teacher(config, dtype) as model, torch.no_grad():
            rows = bench.rows(2 * bench.scale.batch_tokens, config.vocab_size)
            job = bench.job(model, rows, CAPTURES["topk 64"])
            default = torch.get_float32_matmul_precision()
            off = []
            for number in (0, job.plan.num_batches - 1):  # few long rows, many short ones
                batch = rows.batch(job.plan.rows(number))
                torch.set_float32_matmul_precision("high" if tf32 else default)
                found = _captured(capture_batch(model, batch, job.layout), batch, job.layout)
                torch.set_float32_matmul_precision(default)
                off += [
                    np.abs(found["target_logprob"][batch.row_of_position == index] - _direct(bench, model, rows, row))
                    for index, row in enumerate(batch.rows)
                ]
        name = f"{str(dtype).removeprefix('torch.')}{', TF32' if tf32 else ''}"
        data[name] = {"largest": float(np.concatenate(off).max()), "mean": float(np.concatenate(off).mean())}
        data[name] |= {"default_float32_matmul_precision": default}
        table.append(
            {
                "log-prob of the next token": name,
                "largest difference": f"{data[name]['largest']:.2e}",
                "mean": f"{data[name]['mean']:.2e}",
                "float32 products by default": default,
            }
        )
    return table, data


def _direct(bench: Bench, model: Teacher, rows: Rows, row: int) -> Array:
    """Log-probs of a row's own next tokens by a plain forward pass over the row alone, float32[T - 1]."""
    input_ids_T = torch.from_numpy(rows.input_ids(row).astype(np.int64)).to(bench.device)
    logprobs_TV = model._model(input_ids=input_ids_T[None]).logits[0, :-1].float().log_softmax(-1)
    return logprobs_TV.gather(-1, input_ids_T[1:, None])[:, 0].cpu().numpy()


def attention(bench: Bench) -> tuple[list[Cells], Any]:
    """Time forward passes over one long row, many short ones, and shapes never seen before, by implementation."""
    _, config = list(bench.scale.teachers.items())[1]
    longest = 2 * bench.scale.longest
    shapes = {f"1 x {longest:,}": [(1, longest)], f"{longest // 128} x 128": [(max(1, longest // 128), 128)]}
    new = [(8, longest // 8 - number) for number in range(1, 9)]
    table, data = [], {}
    with bench.teacher(config) as model, torch.no_grad():
        for name in ("sdpa", "sdpa with cuDNN", "eager", "flash_attention_2"):
            if name == "flash_attention_2" and not is_flash_attn_2_available():
                table.append({"tokens/s": name} | dict.fromkeys((*shapes, "new shapes"), "not installed"))
                continue
            model._model.set_attn_implementation(name.split()[0])
            torch.backends.cuda.enable_cudnn_sdp("cuDNN" in name)
            rates = {"new shapes": _rate(bench, model, new, config.vocab_size)}
            for shape, batches in shapes.items():
                _rate(bench, model, batches, config.vocab_size)
                rates[shape] = median_and_spread([_rate(bench, model, batches, config.vocab_size) for _ in range(3)])[0]
            data[name] = rates
            table.append({"tokens/s": name} | {shape: f"{rates[shape]:,.0f}" for shape in (*shapes, "new shapes")})
        torch.backends.cuda.enable_cudnn_sdp(False)
    return table, data


def _rate(bench: Bench, model: Teacher, shapes: list[tuple[int, int]], vocab_size: int) -> float:
    """Tokens a second of a teacher's body over batches of these shapes."""
    batches = [torch.randint(vocab_size, shape, device=bench.device) for shape in shapes]
    seconds = bench.seconds(lambda: [model._body(input_ids_BT) for input_ids_BT in batches])
    return sum(map(Tensor.numel, batches)) / seconds


def files(bench: Bench) -> tuple[list[Cells], Any]:
    """Run `generate.py` as a person would: twice, and once killed and resumed; and try two ranks on one GPU."""
    words = bench.write_inputs()
    outputs = [bench.folder / f"{name}.h5" for name in ("once", "again", "resumed")]
    log = bench.folder / "killed" / "rank_0.log"
    for output in outputs[:2]:
        bench.generate(1, *words, f"--output={output}")
    process = subprocess.Popen(
        [*launch(1, bench.profile), "generate.py", *words, f"--output={outputs[2]}", f"--log_dir={log.parent}"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and "First rows" not in (log.read_text() if log.exists() else ""):
        time.sleep(0.02)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    was_killed = not outputs[2].exists()
    bench.generate(1, *words, f"--output={outputs[2]}")
    digests = [hashlib.sha256(output.read_bytes()).hexdigest() for output in outputs]
    data: dict[str, Any] = {
        "two runs, the same bytes": digests[0] == digests[1],
        "killed after its first rows and resumed, the same bytes": digests[0] == digests[2] if was_killed else None,
    }
    if bench.on_gpu:
        done = bench.try_generate(torch.cuda.device_count() + 1, *words, f"--output={bench.folder / 'two.h5'}")
        refused = [line for line in done.stdout.splitlines() + done.stderr.splitlines() if "ranks on a machine" in line]
        data["one rank more than GPUs"] = refused[0].strip() if refused and done.returncode else "not refused"
    return [{"files": name, "": str(value)} for name, value in data.items()], data


def ranks(bench: Bench) -> tuple[list[Cells], Any]:
    """Run one to N ranks, and one teacher on all of them."""
    most = torch.cuda.device_count() if bench.on_gpu else 2
    if most < 2:
        return [{"ranks": "left out: one GPU"}], {}
    words, data = bench.write_inputs(), {}
    ways = {f"{number} ranks": (number, []) for number in sorted({1, 2, most})}
    ways |= {f"--{way} {most}": (most, [f"--{way}={most}"]) for way in ("tp_size", "fsdp_size")}
    for name, (number, more) in ways.items():
        done = bench.try_generate(number, *words, *more, f"--output={bench.folder / 'ranks.h5'}", "--overwrite")
        found = re.search(r"speed +([\d,]+) tokens/s.* ([\d.]+)% waiting", done.stdout)
        data[name] = {"tokens/s": found[1], "waiting, %": found[2]} if found else {"tokens/s": "failed"}
    return [{"ranks": name, "tokens/s": "-", "waiting, %": "-"} | found for name, found in data.items()], data


PARTS: dict[str, tuple[Part, float]] = {
    "speed": (speed, 150),
    "stages": (stages, 20),
    "memory": (memory, 30),
    "numbers": (numbers, 30),
    "attention": (attention, 15),
    "files": (files, 90),
    "ranks": (ranks, 120),
}
"""Each with the seconds it needs on a GPU, about."""


def main() -> None:
    """Run all parts, or those that are named, as far as the time goes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="Names with commas between them.")
    parser.add_argument("--seconds", type=float, default=600, help="No part is begun that would take longer.")
    parser.add_argument("--output", type=Path, default=ROOT / ".bench")
    options = parser.parse_args()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    scale = ON_GPU if device.type == "cuda" else TINY
    folder = options.output.resolve() / "gpu_files"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    bench, start = Bench(device, scale, folder), time.monotonic()
    data: dict[str, Any] = {}
    tables = f"{', '.join(machine()['gpus']) or 'CPU, tiny shapes'}\n"
    for name in options.parts.split(","):
        part, needed_seconds = PARTS[name]
        began = time.monotonic()
        left_seconds = options.seconds - (began - start)
        if bench.on_gpu and left_seconds < needed_seconds:
            print(f"{name}: left out, it takes {needed_seconds:.0f} s and {left_seconds:.0f} s are left.", flush=True)
            continue
        try:
            table, data[name] = part(bench)
        except Exception as error:  # the other parts are worth having
            logging.exception(name)
            print(f"{name}: failed. {first_line(error)}", flush=True)
            continue
        print(f"{name}, {time.monotonic() - began:.0f} s:", flush=True)
        show(table)
        tables += f"\n{name}:\n\n{markdown(table)}"
        (options.output / "gpu.md").write_text(tables, encoding="utf-8")
        report = {"machine": machine(), "data": data}
        (options.output / "gpu.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
