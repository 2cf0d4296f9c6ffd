"""Small models of every family that a teacher is tested with, and rows for them."""

from typing import Any

import numpy as np
import torch
import transformers
from conftest import enlarge_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

VOCAB = 97


USUAL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


GPT2_STYLE: dict[str, Any] = {"vocab_size": VOCAB, "n_layer": 2, "n_head": 4}


SHORT: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}


FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", USUAL),
    "llama with a tied head": ("Llama", USUAL | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2", GPT2_STYLE | {"n_embd": 32, "n_positions": 64}),
    "opt": ("OPT", SHORT | {"ffn_dim": 48, "max_position_embeddings": 64}),
    "opt with projections": ("OPT", SHORT | {"ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 16}),
    "gpt neox": ("GPTNeoX", SHORT | {"intermediate_size": 48, "max_position_embeddings": 64}),
    "mistral with a sliding window": ("Mistral", USUAL | {"sliding_window": 6}),
    "qwen2": ("Qwen2", USUAL),
    "qwen3": ("Qwen3", USUAL | {"head_dim": 8}),
    "gemma2 with both soft-caps": (
        "Gemma2",
        USUAL | {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    ),
    "gemma3 with a soft-cap": (
        "Gemma3Text",
        USUAL | {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 3.0},
    ),
    "cohere with a logit scale": ("Cohere", USUAL | {"logit_scale": 0.25}),
    "granite with a logits scaling": ("Granite", USUAL | {"logits_scaling": 4.0}),
    "phi": ("Phi", USUAL),
    "falcon": ("Falcon", SHORT),
    "falcon with alibi": ("Falcon", SHORT | {"alibi": True}),
    "bloom": ("Bloom", GPT2_STYLE | {"hidden_size": 32}),
    "mamba": ("Mamba", {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}),
    "phi3 with long rope": (
        "Phi3",
        USUAL
        | {
            "max_position_embeddings": 32,
            "original_max_position_embeddings": 12,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1000.0,
                "original_max_position_embeddings": 12,
                "short_factor": [1.0] * 4,
                "long_factor": [1.0, 3.0, 9.0, 20.0],
            },
        },
    ),
    "mixtral": ("Mixtral", USUAL | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2 moe": ("Qwen2Moe", USUAL | MOE | {"num_experts": 4, "shared_expert_intermediate_size": 16}),
}


ROWS = [
    [(7 * row + 3 * index) % VOCAB for index in range(length)]
    for row, length in enumerate((23, 4, 17, 1, 9, 13, 12, 2))
]
"""Ragged, so that rows are padded; longer than the sliding windows."""


def make(family: str) -> transformers.PreTrainedModel:
    name, sizes = FAMILIES[family]
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config: PreTrainedConfig = getattr(transformers, f"{name}Config")(**sizes, **ids)
    torch.manual_seed(0)
    return enlarge_weights(AutoModelForCausalLM.from_config(config))


class DoublingLlama(transformers.LlamaForCausalLM):
    """A model that looks at the tokens once more after its body: head and body apart give something else."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        output = super().forward(input_ids=input_ids, **options)
        output.logits = output.logits * (1 + (input_ids > 0)[..., None])
        return output


FLOAT16_STEP = 2**-11


def assert_row_is_right(row: dict[str, Any], logprobs_TV: torch.Tensor) -> None:
    positions = row["positions"].astype(np.int64)
    expected_PV = logprobs_TV[positions]
    targets = torch.from_numpy(row["input_ids"].astype(np.int64)[positions + 1])
    np.testing.assert_allclose(row["target_logprob"], expected_PV.gather(1, targets[:, None])[:, 0], atol=1e-3)
    k = row["kept_ids"].shape[1]
    expected_PK, expected_ids_PK = expected_PV.topk(k)
    np.testing.assert_allclose(row["kept_logprobs"], expected_PK, atol=1e-3, rtol=FLOAT16_STEP)
    kept = expected_PV.gather(1, torch.from_numpy(row["kept_ids"].astype(np.int64)))
    np.testing.assert_allclose(kept, expected_PK, atol=1e-4)
    gap = (expected_PK[:, :-1] - expected_PK[:, 1:]).min(1).values > 1e-4
    assert (row["kept_ids"].astype(np.int64) == expected_ids_PK.numpy())[gap.numpy()].all()


"""Largest relative error of rounding to float16."""
