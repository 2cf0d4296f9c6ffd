"""Parts of `python -m benchmarks.gpu` that measure speed: whole captures, their steps, attention, several GPUs.

Shape letters: C positions of a chunk, V vocabulary, D hidden size, B rows of a batch, T tokens.
"""

import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from transformers.utils import is_flash_attn_2_available

from benchmarks.gpu_bench import CAPTURES, LOGIT_SPREAD, Bench, capture, forward_passes, unpadded
from benchmarks.harness import Row, Spread, in_turns, measure
from benchmarks.head import seconds_of
from logitgen.teacher import keep
from logitgen.teacher import model as teacher_module
from logitgen.teacher.capture import capture_batch, seal
from logitgen.teacher.model import Teacher
from logitgen.teacher.noise import position_keys

ALONE, PACKED = "forward passes alone", "topk 64, packed"
ROUNDS = 2

Work = Callable[[], object]


def idle_share(spans: list[tuple[int, int]]) -> float:
    """Share of the time from the first start to the last end in which nothing ran."""
    starts, ends = np.array(sorted(spans)).T
    ends = np.maximum.accumulate(ends)
    return float(np.maximum(0, starts[1:] - ends[:-1]).sum() / (ends[-1] - starts[0]))


def idle_share_of(work: Work) -> float:
    """Run some work; return the share of its time in which neither a kernel nor a copy ran on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds_of(work)
    events = [
        event
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == torch.profiler.DeviceType.CUDA and event.duration_ns()
    ]
    return idle_share([(event.start_ns(), event.start_ns() + event.duration_ns()) for event in events])


def speed(bench: Bench) -> Iterator[Row]:
    """Compare whole captures with forward passes alone."""
    for number, name in enumerate(bench.scale.teachers):
        with bench.teacher(number, with_head=True) as model:
            works, tokens = _ways(bench, model)
            seconds = in_turns({way: partial(seconds_of, work) for way, work in works.items()}, ROUNDS + 1)
            # The first round warms up.
            rates = {way: [tokens[way] / taken for taken in found[1:]] for way, found in seconds.items()}
            for way, found in rates.items():
                is_profiled = bench.on_gpu and way in (ALONE, PACKED, "hidden")
                yield {
                    "teacher, way": f"{name}, {way}",
                    "tokens/s": Spread.of(found).median,
                    "forward passes = 1": Spread.of(found, rates[ALONE]),
                    "GPU idle": idle_share_of(works[way]) if is_profiled else None,
                }
        for file in bench.folder.glob("*.h5"):
            file.unlink()


def _ways(bench: Bench, model: Teacher) -> tuple[dict[str, Work], dict[str, int]]:
    """List what is compared, over rows that take some time, and how many tokens each of them reads."""
    vocab_size, batch_tokens = model.shard.vocab_size, bench.scale.batch_tokens
    probed = list(unpadded(bench.job(model, bench.rows(2 * batch_tokens, vocab_size), PACKED), bench.device))
    forward_passes(model._model, probed)
    seconds = seconds_of(partial(forward_passes, model._model, probed))
    num_tokens = int(sum(map(Tensor.numel, probed)) / seconds * bench.scale.run_seconds)
    rows = bench.rows(max(8 * batch_tokens, num_tokens), vocab_size)
    jobs = {name: bench.job(model, rows, name) for name in CAPTURES}
    large = bench.job(model, rows, PACKED, 4 * batch_tokens)
    jobs |= dict.fromkeys(("head in one piece", "synchronous copy"), jobs[PACKED])
    jobs[f"batches of {4 * batch_tokens:,}"] = large
    batches = list(unpadded(jobs[PACKED], bench.device))
    works: dict[str, Work] = {ALONE: partial(forward_passes, model._model, batches)}
    for way, job in jobs.items():
        path = bench.folder / f"{way}.h5"
        works[way] = partial(capture, model, job, path, job.create_file(path), synchronous=way == "synchronous copy")
    in_one_piece = mock.patch.multiple(teacher_module, GPU_CHUNK_LOGITS=2**62, CHUNK_LOGITS=2**62)
    works["head in one piece"] = in_one_piece(works["head in one piece"])
    return works, dict.fromkeys(works, jobs[PACKED].plan.num_tokens) | {ALONE: sum(map(Tensor.numel, batches))}


def stages(bench: Bench) -> Iterator[Row]:
    """Time each step of a chunk, by chunk size, in microseconds a position; and each step of a batch."""
    with bench.teacher(1) as model, torch.no_grad():
        taken: dict[str, Row] = {}
        counts = [max(1, chunk // model.shard.vocab_size) for chunk in bench.scale.chunks]
        columns = {f"{num_positions:,} positions": num_positions for num_positions in counts}
        for column, num_positions in columns.items():
            for step, work in _steps(model, num_positions).items():
                seconds = [seconds_of(work) for _ in range(6)][1:]  # the first time warms up
                taken.setdefault(step, {"step": step})[column] = 1e6 * Spread.of(seconds).median / num_positions
        yield from taken.values()
        for step, seconds in _steps_of_batch(bench, model).items():
            yield {"step": f"a batch: {step}, ms", next(iter(columns)): 1e3 * seconds}


def _no_kernel(device: torch.device) -> None:
    """Stand for a kernel that is missing."""


def _steps(model: Teacher, num_positions: int) -> dict[str, Work]:
    head = model._model.get_output_embeddings()
    hidden_CD = torch.randn(num_positions, head.in_features, device=model.device, dtype=model.dtype)
    logits_CV = head(hidden_CD * LOGIT_SPREAD)
    target_C = torch.zeros(num_positions, dtype=torch.int64, device=model.device)
    key_C = position_keys(0, target_C, torch.arange(num_positions, device=model.device))
    top = partial(keep.top_k, logits_CV, target_C, 64)
    drawn = {
        f"{k} drawn": partial(keep.sample, logits_CV, target_C, [k] * (k + 1), key_C, logits_CV.shape[1])
        for k in (12, 64)
    }
    torch_alone = mock.patch.object(keep, "_gpu_kernel", _no_kernel)
    return {
        "the head's product": lambda: head(hidden_CD),
        "torch.topk": lambda: torch.topk(logits_CV, 64),
        "torch.logsumexp": lambda: torch.logsumexp(logits_CV.float(), -1),
        "top 64 and log-sum-exp, torch alone": torch_alone(top),
        "top 64 and log-sum-exp, as captured": top,
        "log-sum-exp, as captured": lambda: keep._logsumexp(logits_CV),
        "64 drawn, torch alone": torch_alone(drawn["64 drawn"]),
    } | drawn


def _steps_of_batch(bench: Bench, model: Teacher) -> dict[str, float]:
    job = bench.job(model, bench.rows(4 * bench.scale.batch_tokens, model.shard.vocab_size), PACKED)
    rows = job.plan.rows(1)
    batch = job.rows.batch(rows)
    whole = partial(capture_batch, model, batch, job.layout)
    payload = whole()
    on_host = torch.empty(len(payload), dtype=torch.uint8, pin_memory=bench.on_gpu)
    on_host.copy_(payload)
    start = time.perf_counter()
    whole()
    launched = time.perf_counter() - start
    return {
        "collect the rows": seconds_of(lambda: job.rows.batch(rows)),
        "launch everything": launched,
        "forward pass and capture": seconds_of(whole),
        "copy off the GPU": seconds_of(lambda: on_host.copy_(payload, non_blocking=True)),
        "checksum": seconds_of(lambda: seal(on_host.numpy(), batch, job.layout, model.dtype)),
    }


def attention(bench: Bench) -> Iterator[Row]:
    """Time forward passes over one long row, many short ones, and shapes never seen before, by implementation."""
    longest = 2 * bench.scale.row_tokens[2]
    shapes = {f"1 x {longest:,}": [(1, longest)], f"{longest // 128} x 128": [(max(1, longest // 128), 128)]}
    with bench.teacher(1) as model, torch.no_grad():
        for name in ("sdpa", "sdpa with cuDNN", "eager", "flash_attention_2"):
            if name == "flash_attention_2" and not is_flash_attn_2_available():
                yield {"tokens/s": f"{name}: not installed"}
                continue
            model._model.set_attn_implementation(name.split()[0])
            torch.backends.cuda.enable_cudnn_sdp("cuDNN" in name)
            rates = {"new shapes": _rate(model, [(8, longest // 8 - number) for number in range(1, 9)])}
            for shape, batches in shapes.items():
                rates[shape] = Spread.of([_rate(model, batches) for _ in range(4)][1:]).median  # the first warms up
            yield {"tokens/s": name} | rates
        torch.backends.cuda.enable_cudnn_sdp(False)


def _rate(model: Teacher, shapes: list[tuple[int, int]]) -> float:
    """Tokens a second of a teacher's body over batches of these shapes."""
    batches = [torch.randint(model.shard.vocab_size, shape, device=model.device) for shape in shapes]
    seconds = seconds_of(lambda: [model._body(input_ids_BT) for input_ids_BT in batches])
    return sum(map(Tensor.numel, batches)) / seconds


def ranks(bench: Bench) -> Iterator[Row]:
    """Run one to N ranks, and one teacher on all of them."""
    most = torch.cuda.device_count() if bench.on_gpu else 2
    if most < 2:
        yield {"ranks": "left out: one GPU"}
        return
    ways = [(f"{number} ranks", number, []) for number in sorted({1, 2, most})]
    ways += [(f"--{way} {most}", most, [f"--{way}={most}"]) for way in ("tp_size", "fsdp_size")]
    for name, number, words in ways:
        try:
            lines = measure(bench.generate(number, "ranks", "--overwrite", *words)).lines
        except RuntimeError:
            lines = []
        told = re.search(r"speed +([\d,]+) tokens/s.* ([\d.]+)% waiting", "\n".join(line for _, line in lines))
        yield {"ranks": name, "tokens/s": told[1] if told else "failed", "waiting, %": told[2] if told else None}
