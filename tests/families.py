"""Small models of every family that a teacher is tested with, and rows for them."""

from typing import Any

import numpy as np
import torch
import transformers
from conftest import enlarge_weights
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig

VOCAB = 97


IDS: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


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


def with_parts(text: dict[str, Any], **parts: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a model that also sees or hears; the token of an image is one that rows of text hold too."""
    tied = {"tie_word_embeddings": text.get("tie_word_embeddings", False)}
    return {"text_config": {**USUAL, **IDS, **text}, "image_token_id": 5, "image_token_index": 5} | tied | parts


SEEING: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}


CLIP: dict[str, Any] = SEEING | {"model_type": "clip_vision_model"}


SIGLIP: dict[str, Any] = SEEING | {"model_type": "siglip_vision_model"}


QWEN_SEEING: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "intermediate_size": 48,
    "out_hidden_size": 32,
}


MROPE: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [2, 1, 1]},
}


MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
}


MULTIMODAL: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 vl": (
        "Qwen2VL",
        with_parts(MROPE, vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4}),
    ),
    "qwen2.5 vl": ("Qwen2_5_VL", with_parts(MROPE, vision_config=QWEN_SEEING | {"fullatt_block_indexes": [1]})),
    "qwen2.5 vl with a tied head": (
        "Qwen2_5_VL",
        with_parts(MROPE | {"tie_word_embeddings": True}, vision_config=QWEN_SEEING | {"fullatt_block_indexes": [1]}),
    ),
    "qwen3 vl": (
        "Qwen3VL",
        with_parts(MROPE | {"head_dim": 8}, vision_config=QWEN_SEEING | {"deepstack_visual_indexes": [0]}),
    ),
    "qwen3 vl moe": (
        "Qwen3VLMoe",
        with_parts(
            MROPE | MOE | {"head_dim": 8, "num_experts": 4},
            vision_config=QWEN_SEEING | {"deepstack_visual_indexes": [0]},
        ),
    ),
    "glm4v": ("Glm4v", with_parts(MROPE | {"head_dim": 8}, vision_config=QWEN_SEEING)),
    "llava": ("Llava", with_parts({"model_type": "llama"}, vision_config=CLIP)),
    "llava next": ("LlavaNext", with_parts({"model_type": "mistral", "sliding_window": 6}, vision_config=CLIP)),
    "llava onevision": (
        "LlavaOnevision",
        with_parts({"model_type": "qwen2", "tie_word_embeddings": True}, vision_config=SIGLIP),
    ),
    "mistral3": (
        "Mistral3",
        with_parts(
            {"model_type": "mistral", "head_dim": 8, "sliding_window": None},
            vision_config=SEEING | {"model_type": "pixtral", "head_dim": 8},
        ),
    ),
    "gemma3 that sees": ("Gemma3", with_parts({"head_dim": 8, "sliding_window": 6}, vision_config=SIGLIP)),
    "gemma4 with embeddings per layer": (
        "Gemma4",
        with_parts(
            {
                "head_dim": 8,
                "global_head_dim": 8,
                "sliding_window": 6,
                "hidden_size_per_layer_input": 8,
                "vocab_size_per_layer_input": VOCAB,
                "final_logit_softcapping": 3.0,
            },
            vision_config=SEEING | {"head_dim": 8},
        ),
    ),
    "idefics3": ("Idefics3", with_parts({"model_type": "llama"}, vision_config=SEEING)),
    "smolvlm": ("SmolVLM", with_parts({"model_type": "llama"}, vision_config=SEEING)),
    "internvl": (
        "InternVL",
        with_parts({"model_type": "qwen2"}, vision_config=SEEING | {"image_size": [28, 28], "patch_size": [14, 14]}),
    ),
    "aya vision": (
        "AyaVision",
        with_parts({"model_type": "cohere2", "sliding_window": 6}, vision_config=SIGLIP),
    ),
    "kimi k2.5": ("Kimi_K25", with_parts(MOE | MLA | {"model_type": "deepseek_v3"}, vision_config=SEEING)),
    "qwen3.5 that sees": (
        "Qwen3_5",
        with_parts(
            {
                "head_dim": 8,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 4,
                "layer_types": ["linear_attention", "full_attention"],
            },
            vision_config=QWEN_SEEING,
        ),
    ),
    "qwen2 audio": (
        "Qwen2Audio",
        with_parts(
            {"model_type": "qwen2"},
            audio_config={
                "d_model": 32,
                "encoder_layers": 2,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "max_source_positions": 16,
            },
        ),
    ),
}
"""Models whose text side is captured."""


FAMILIES |= MULTIMODAL


READ_BY_ANOTHER_CLASS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4 that sees": (
        "Llama4",
        with_parts(
            {"head_dim": 8, "num_local_experts": 4, "intermediate_size_mlp": 48},
            vision_config=SEEING | {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
        ),
    ),
    "mllama": (
        "Mllama",
        with_parts(
            {"cross_attention_layers": [1]},
            vision_config=SEEING
            | {
                "num_global_layers": 1,
                "attention_heads": 4,
                "max_num_tiles": 1,
                "vision_output_dim": 64,
                "intermediate_layers_indices": [0],
                "supported_aspect_ratios": [[1, 1]],
            },
        ),
    ),
}
"""Models that see, whose text side has a class of its own in transformers: that one loads their checkpoints."""


ROWS = [
    [(7 * row + 3 * index) % VOCAB for index in range(length)]
    for row, length in enumerate((23, 4, 17, 1, 9, 13, 12, 2))
]
"""Ragged, so that rows are padded; longer than the sliding windows."""


def _tokens(first: int, count: int) -> list[int]:
    return [(first + 11 * index) % VOCAB for index in range(count)]


def _trees() -> list[list[int]]:
    rows = [_tokens(3, 36) + _tokens(40 + row, 5 + 2 * row) for row in range(6)]
    history = _tokens(7, 34)
    for turn in range(3):
        rows.append(history + _tokens(60 + turn, 6))
        history = history + _tokens(80 + turn, 7)
    return [*rows, rows[0], _tokens(1, 23), _tokens(2, 40)]


TREES = _trees()
"""A prefix of six rows, a conversation of three turns, two equal rows and rows that share nothing."""


def make(family: str) -> transformers.PreTrainedModel:
    name, sizes = (FAMILIES | READ_BY_ANOTHER_CLASS)[family]
    ids = {} if "text_config" in sizes else IDS
    config: PreTrainedConfig = getattr(transformers, f"{name}Config")(**sizes, **ids)
    torch.manual_seed(0)
    loader = AutoModelForMultimodalLM if "text_config" in sizes else AutoModelForCausalLM
    return enlarge_weights(loader.from_config(config))


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
