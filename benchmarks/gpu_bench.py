"""What the parts of `python -m benchmarks.gpu` share: sizes, teachers, rows, and the two works that are compared."""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, Qwen2Config

from benchmarks.harness import launch
from benchmarks.synthetic import Job, job_of, make_rows, ragged_lengths
from logitgen.file.header import Header
from logitgen.file.layout import Array
from logitgen.generate import compute
from logitgen.leader.writer import Writer
from logitgen.ranks.deliver import Outbox
from logitgen.split.plan import Plan
from logitgen.split.rows import Rows
from logitgen.teacher.model import Teacher, _rows_not_packed

CAPTURES: dict[str, dict[str, Any]] = {
    "topk 64": {"capture": "topk", "top_k": 64},
    "topk 64, packed": {"capture": "topk", "top_k": 64, "encoding": "packed"},
    "topk 128, packed": {"capture": "topk", "top_k": 128, "encoding": "packed"},
    "sample 12, packed": {"capture": "sample", "top_k": 12, "encoding": "packed"},
    "hidden": {"capture": "hidden", "top_k": 0},
}
LOGIT_SPREAD = 4.0
"""Random weights give nearly equal logits; the last norm is scaled up for top k and sampling to find real work."""

_SPLIT_ROWS = 50_000


def _config(kind: type[PreTrainedConfig], *sizes: int) -> PreTrainedConfig:
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    named = dict(zip((*names, "num_key_value_heads"), sizes, strict=True))
    return kind(**named, max_position_embeddings=2**17, tie_word_embeddings=kind is Qwen2Config)


ON_GPU = SimpleNamespace(
    teachers={
        "Qwen2.5-0.5B": _config(Qwen2Config, 151_936, 896, 4864, 24, 14, 2),
        "Qwen2.5-1.5B": _config(Qwen2Config, 151_936, 1536, 8960, 28, 12, 2),
        "Llama-3.1-8B": _config(LlamaConfig, 128_256, 4096, 14_336, 32, 32, 8),
    },
    file_teacher=_config(Qwen2Config, 32_000, 512, 2048, 8, 8, 2),
    file_rows=1000,
    batch_tokens=8192,
    row_tokens=(100, 700, 4096),  # the fewest, the mean, the most
    run_seconds=1.0,
    pass_tokens=(16, 64, 256, 1024, 8192),
    chats=240,
    student_positions=8192,
    student_head=(151_936, 1024),
    chunks=(2**26, 2**27, 2**28, 2**29),  # logits
    vocab_sizes=(151_936, 262_144),
    free_bytes=6 * 2**30,  # of a small GPU
)
TINY = SimpleNamespace(
    teachers={
        "tiny Qwen2": _config(Qwen2Config, 1000, 32, 64, 2, 4, 2),
        "tiny Llama": _config(LlamaConfig, 700, 32, 64, 1, 4, 4),
    },
    file_teacher=_config(Qwen2Config, 500, 32, 64, 2, 4, 2),
    file_rows=300,
    batch_tokens=256,
    row_tokens=(4, 20, 64),
    run_seconds=0.02,
    pass_tokens=(16, 64),
    chats=8,
    student_positions=20,
    student_head=(1000, 16),
    chunks=(2**13, 2**14),
    vocab_sizes=(1000,),
    free_bytes=2**30,
)


@dataclass
class Bench:
    """The device and the sizes of a run, and a folder for its files."""

    device: torch.device
    scale: SimpleNamespace
    folder: Path

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to speak of."""
        return self.device.type == "cuda"

    @contextmanager
    def teacher(self, number: int, dtype: torch.dtype = torch.bfloat16, **kept: bool) -> Iterator[Teacher]:
        """Make one of the teachers with random weights on the device, and free its memory afterwards."""
        config = list(self.scale.teachers.values())[number]
        torch.manual_seed(0)
        with self.device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            model.get_decoder().norm.weight.mul_(LOGIT_SPREAD)
        yield Teacher(model, config.vocab_size, **kept)
        del model
        gc.collect()
        torch.cuda.empty_cache()

    def rows(self, num_tokens: int, vocab_size: int) -> Rows:
        """Make up the rows of some batches, drawn evenly from those of a large split of chats.

        A few rows alone would make smaller batches, because neighbours in length are too different.
        """
        shortest, mean, longest = self.scale.row_tokens
        lengths = ragged_lengths(_SPLIT_ROWS, mean, longest, seed=1, shortest=shortest)
        plan = Plan(lengths - 1, self.scale.batch_tokens)
        batches = np.linspace(0, plan.num_batches - 1, max(2, num_tokens // self.scale.batch_tokens)).astype(int)
        return make_rows(lengths[np.concatenate([plan.rows(batch) for batch in batches])], vocab_size)

    def job(self, teacher: Teacher, rows: Rows, kind: str, batch_tokens: int = 0) -> Job:
        """Lay out the file of these rows, and plan their batches."""
        sizes = {"vocab_size": teacher.shard.vocab_size, "head": teacher.head_form if kind == "hidden" else None}
        return job_of(rows, batch_tokens or self.scale.batch_tokens, **CAPTURES[kind], **sizes)

    def generate(self, num_ranks: int, output: str, *words: str) -> list[str]:
        """Words of the command that runs `generate.py` with a small teacher over a split, both made once."""
        teacher, split, config = self.folder / "teacher", self.folder / "rows.jsonl", self.scale.file_teacher
        if not teacher.exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(teacher)
            rows = self.rows(self.scale.file_rows * self.scale.row_tokens[1], config.vocab_size)
            lines = [json.dumps({"input_ids": rows.input_ids(row).tolist()}) + "\n" for row in range(len(rows))]
            split.write_text("".join(lines), encoding="utf-8")
        command = [*launch(num_ranks, "multi_gpu" if self.on_gpu else "cpu"), "generate.py", f"--teacher={teacher}"]
        command += [f"--dataset={split}", f"--batch_tokens={self.scale.batch_tokens}"]
        return [*command, f"--output={self.folder / output}.h5", f"--log_dir={self.folder / output}", *words]


@torch.no_grad()
def forward_passes(model: nn.Module, batches: list[Tensor]) -> None:
    """Run forward passes alone, as a capture asks for them, and keep nothing."""
    with _rows_not_packed():
        for input_ids_BT in batches:
            model(input_ids=input_ids_BT, use_cache=False)


def unpadded(job: Job, device: torch.device) -> Iterator[Tensor]:
    """Yield the batches of a job without their padding.

    They hold the tokens of the rows: products of equal rows take less power, and a GPU computes them up to 15 % faster.
    """
    for number, num_tokens in enumerate(job.plan.sums(job.rows.forward_lengths)):
        input_ids_BT = job.batch(number).passes[0].input_ids
        yield torch.from_numpy(input_ids_BT[:, : max(1, round(num_tokens / len(input_ids_BT)))]).to(device)


def capture(teacher: Teacher, job: Job, path: Path, header: Header, *, synchronous: bool = False) -> None:
    """Capture from rows to a file, as a single rank does it, but for the last sync, which no long run would feel."""
    share, most_bytes = np.arange(job.plan.num_batches), int(job.payload_bytes.max())
    with Writer(path, header, job, np.zeros(len(job.rows), dtype=bool)) as writer:

        def submit(number: int, message: Tensor) -> Callable[[], object]:
            return writer.submit(number, message.numpy()[:-8]).result

        def put_and_wait(number: int, payload: Tensor, finish: Callable[[Array], None]) -> None:
            on_host = payload.cpu().numpy()
            finish(on_host)
            writer.submit(number, on_host).result()

        waiting = nullcontext(SimpleNamespace(put=put_and_wait))
        with waiting if synchronous else Outbox(most_bytes, submit, teacher.device) as outbox:
            compute(teacher, job, share, len(share), outbox)
