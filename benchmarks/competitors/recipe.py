"""What all these ways to capture have in common: the split's tokens, the teacher, what is kept of a batch.

Shape letters: B rows of a batch, T tokens of its longest row, V vocabulary, K kept.
"""

import argparse
import functools
import os
import sys
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

BATCH_ROWS = 8


def parse_options(**more: type) -> argparse.Namespace:
    """Read the options every script has, and those that only this one has."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, kind in {"teacher": str, "dataset": str, "output": str, "top_k": int, **more}.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    return parser.parse_args()


def read_tokens(options: argparse.Namespace) -> datasets.Dataset:
    """Read the split and tokenise it: `row` and `input_ids`, one entry per row of the split."""
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    return datasets.load_dataset("json", data_files=options.dataset, split="train").map(
        lambda texts, rows: {"row": rows, "input_ids": tokenizer(texts).input_ids},
        input_columns="text",
        with_indices=True,
        batched=True,
    )


def own_device() -> torch.device:
    """The GPU of this process, or the CPU."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def load_teacher(options: argparse.Namespace, device: torch.device) -> PreTrainedModel:
    """Load the teacher onto a device."""
    return AutoModelForCausalLM.from_pretrained(options.teacher, dtype=torch.float32).to(device).eval()


def pad(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Pad rows on the right to one batch: `row` and `num_tokens` [B], `input_ids` and `attention_mask` [B, T]."""
    ids = [torch.tensor(row["input_ids"], dtype=torch.int64) for row in rows]
    num_tokens = torch.tensor([len(input_ids) for input_ids in ids])
    input_ids = pad_sequence(ids, batch_first=True)
    attention_mask = (torch.arange(input_ids.shape[1]) < num_tokens[:, None]).long()
    row_numbers = torch.tensor([row["row"] for row in rows])
    return {"row": row_numbers, "num_tokens": num_tokens, "input_ids": input_ids, "attention_mask": attention_mask}


@torch.inference_mode()
def keep_top_k(teacher: PreTrainedModel, batch: dict[str, Tensor], k: int) -> dict[str, Tensor]:
    """Run the teacher over a batch, and keep the top k of every position, [B, T - 1, ...], beside the batch itself."""
    batch = {name: values.to(teacher.device) for name, values in batch.items()}
    input_ids, mask = batch["input_ids"], batch.pop("attention_mask")
    logits_BTV = teacher(input_ids=input_ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
    logprobs_BTV = logits_BTV.log_softmax(-1)
    kept_BTK, ids_BTK = logprobs_BTV.topk(k)
    best_BT1 = ids_BTK[..., :1]
    return batch | {
        "kept_logprobs": kept_BTK.half(),
        "kept_ids": ids_BTK.int(),
        "logsumexp": (logits_BTV.gather(-1, best_BT1) - logprobs_BTV.gather(-1, best_BT1))[..., 0],
        "target_logprob": logprobs_BTV.gather(-1, input_ids[:, 1:, None])[..., 0],
    }


def unpad(block: dict[str, Tensor], vocab_size: int) -> dict[str, np.ndarray]:
    """Leave the padding behind: every field flat, row after row, ids in the smallest dtype that holds them."""
    num_tokens = block["num_tokens"][:, None]
    flat = {"row": block["row"].cpu().numpy(), "num_tokens": block["num_tokens"].cpu().numpy()}
    for name, values in block.items():
        if name not in flat:
            last = num_tokens if name == "input_ids" else num_tokens - 1
            flat[name] = values[torch.arange(values.shape[1], device=values.device) < last].cpu().numpy()
    return flat | {name: flat[name].astype(id_dtype(vocab_size)) for name in ("input_ids", "kept_ids")}


def id_dtype(vocab_size: int) -> str:
    """The smallest dtype that holds every token id."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def capture(options: argparse.Namespace, rank: int, world_size: int) -> Iterator[dict[str, np.ndarray]]:
    """Capture a part of the split, batch after batch."""
    tokens = read_tokens(options).shard(num_shards=world_size, index=rank)
    teacher = load_teacher(options, own_device())
    for start in range(0, len(tokens), BATCH_ROWS):
        rows = tokens.select(range(start, min(start + BATCH_ROWS, len(tokens))))
        yield unpad(keep_top_k(teacher, pad(list(rows)), options.top_k), teacher.config.vocab_size)


@functools.cache
def say_first_row() -> None:
    """Tell that the first rows have been written, once."""
    print("first row", file=sys.stderr, flush=True)
