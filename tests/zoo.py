"""One tiny random-init model of each architecture, from its Hugging Face config."""

import copy
from typing import Any

import torch
import transformers
from conftest import bridge

WINDOW = 6
"""Tokens of a sliding window: shorter than the prompts."""

IDS: dict[str, Any] = {"vocab_size": 160, "bos_token_id": 1, "eos_token_id": 2}
SMALL: dict[str, Any] = IDS | {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 3,
}
GROUPED = SMALL | {"num_key_value_heads": 2}
GPT: dict[str, Any] = IDS | {
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.3,
}
GEMMA = GROUPED | {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW}
FALCON: dict[str, Any] = {name: SMALL[name] for name in SMALL if name != "intermediate_size"}
BLOOM: dict[str, Any] = IDS | {
    "hidden_size": 32,
    "n_layer": 3,
    "n_head": 4,
    "initializer_range": 0.3,
}
OPT: dict[str, Any] = FALCON | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}
EXPERTS = GROUPED | {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
HEADS = GROUPED | {"head_dim": 8}
DENSE_FIRST: dict[str, Any] = {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
SLIDING = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}
SCALED = {
    "embedding_multiplier": 2.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.3,
    "logits_scaling": 2.0,
}
MAMBA: dict[str, Any] = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 8,
}

# Name -> (what is particular about it, the class of its config, its settings).
ZOO: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "GPT-2": ("learned positions", transformers.GPT2Config, GPT),
    "GPT-NeoX": ("Pythia; attention and MLP side by side", transformers.GPTNeoXConfig, SMALL),
    "GPT-J": ("attention and MLP side by side", transformers.GPTJConfig, GPT | {"rotary_dim": 4}),
    "OPT": ("ReLU, shifted positions", transformers.OPTConfig, OPT),
    "BLOOM": ("ALiBi", transformers.BloomConfig, BLOOM),
    "Llama": ("grouped-query attention", transformers.LlamaConfig, GROUPED),
    "Mistral": ("sliding window", transformers.MistralConfig, GROUPED | {"sliding_window": WINDOW}),
    "Qwen2": ("biases on queries, keys, values", transformers.Qwen2Config, GROUPED),
    "Qwen3": ("norms on queries and keys", transformers.Qwen3Config, GROUPED | {"head_dim": 8}),
    "Gemma 2": (
        "soft-capping, norms after each part, sliding windows",
        transformers.Gemma2Config,
        GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 4.0},
    ),
    "Gemma 3": (
        "two rotary bases, sliding windows",
        transformers.Gemma3TextConfig,
        GEMMA | SLIDING,
    ),
    "Gemma 4": (
        "embeddings of each block, sliding window",
        transformers.Gemma4TextConfig,
        HEADS
        | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}
        | {"sliding_window": WINDOW, "global_head_dim": 8, "num_kv_shared_layers": 0}
        | {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 160},
    ),
    "Phi": ("attention and MLP side by side", transformers.PhiConfig, SMALL),
    "Phi-3": ("queries, keys, values in one matrix", transformers.Phi3Config, GROUPED),
    "OLMo 2": ("norms after each part", transformers.Olmo2Config, GROUPED),
    "StableLM": ("rotary on a part of each head", transformers.StableLmConfig, GROUPED),
    "Falcon 7B": ("one key head, rotary", transformers.FalconConfig, FALCON | {"alibi": False}),
    "Falcon RW": (
        "ALiBi",
        transformers.FalconConfig,
        FALCON | {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "Falcon 40B": (
        "new decoder, grouped-query attention",
        transformers.FalconConfig,
        FALCON
        | {"num_kv_heads": 2, "new_decoder_architecture": True, "multi_query": False}
        | {"alibi": False},
    ),
    "Mixtral": (
        "mixture of 4 experts",
        transformers.MixtralConfig,
        GROUPED | {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "Qwen2-MoE": (
        "mixture of 4 experts and a shared one",
        transformers.Qwen2MoeConfig,
        EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 16},
    ),
    "Qwen3-MoE": (
        "mixture of 4 experts, norms on queries and keys",
        transformers.Qwen3MoeConfig,
        EXPERTS | {"num_experts": 4, "head_dim": 8},
    ),
    "Qwen3-Next": (
        "linear attention, mixture of 4 experts and a shared one",
        transformers.Qwen3NextConfig,
        EXPERTS | LINEAR | {"num_experts": 4, "head_dim": 8, "shared_expert_intermediate_size": 16},
    ),
    "Qwen3.5": ("linear attention", transformers.Qwen3_5TextConfig, HEADS | LINEAR),
    "gpt-oss": (
        "mixture of 4 experts, attention sinks, sliding windows",
        transformers.GptOssConfig,
        HEADS | SLIDING | {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "DeepSeek-V3": (
        "latent attention, 4 experts after a dense block",
        transformers.DeepseekV3Config,
        EXPERTS | DENSE_FIRST | LATENT | {"n_routed_experts": 4},
    ),
    "Llama 4": (
        "4 experts in some blocks, chunked attention",
        transformers.Llama4TextConfig,
        HEADS
        | {"num_local_experts": 4, "num_experts_per_tok": 1, "intermediate_size_mlp": 48}
        | {"interleave_moe_layer_step": 2, "attention_chunk_size": 8},
    ),
    "SmolLM3": (
        "no positions in some blocks",
        transformers.SmolLM3Config,
        GROUPED | {"no_rope_layers": [1, 0, 1], "initializer_range": 0.5},
    ),
    "OLMo 3": (
        "norms after each part, sliding windows",
        transformers.Olmo3Config,
        GROUPED | SLIDING,
    ),
    "OLMoE": (
        "mixture of 4 experts",
        transformers.OlmoeConfig,
        GROUPED | {"num_experts": 4, "num_experts_per_tok": 2},
    ),
    "GLM-4": ("norms before and after each part", transformers.Glm4Config, HEADS),
    "GLM-4-MoE": (
        "4 experts after a dense block",
        transformers.Glm4MoeConfig,
        EXPERTS | DENSE_FIRST | {"n_routed_experts": 4, "head_dim": 8},
    ),
    "Granite": (
        "scaled embeddings, attention, residuals and logits",
        transformers.GraniteConfig,
        GROUPED | SCALED,
    ),
    "Ministral 3": ("rotary positions scaled by YaRN", transformers.Ministral3Config, HEADS),
    "Arcee": ("squared ReLU", transformers.ArceeConfig, GROUPED),
    "Seed-OSS": ("biases on queries, keys, values", transformers.SeedOssConfig, HEADS),
    "Ernie 4.5": ("rotary over neighbouring values", transformers.Ernie4_5Config, HEADS),
    "Apertus": ("xIELU, norms on queries and keys", transformers.ApertusConfig, GROUPED),
    "LFM2": (
        "short convolutions in place of some attention",
        transformers.Lfm2Config,
        GROUPED | {"layer_types": ["conv", "full_attention", "conv"]},
    ),
    "Falcon-H1": (
        "attention and Mamba side by side",
        transformers.FalconH1Config,
        HEADS | MAMBA,
    ),
    "Nemotron": ("squared ReLU, layer norms", transformers.NemotronConfig, HEADS),
    "Starcoder2": (
        "layer norms, sliding window",
        transformers.Starcoder2Config,
        GROUPED | {"sliding_window": WINDOW},
    ),
    "Cohere": (
        "attention and MLP side by side, scaled logits",
        transformers.CohereConfig,
        GROUPED,
    ),
}


def hugging_face(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Hugging Face's own model, with the attention that it chooses; the same weights each time."""
    _, config, settings = ZOO[kind]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config(**copy.deepcopy(settings | changes))
    )
    model.config.architectures = [type(model).__name__]
    if dtype == torch.float64 and hasattr(model.config, "_experts_implementation"):
        model.config._experts_implementation = "eager"  # the default has no float64
    return model.eval().to(dtype)


def bridged(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """The same model in TransformerLens."""
    return bridge(hugging_face(kind, dtype, **changes), dtype=dtype)
