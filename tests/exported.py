"""Tiny models of Hugging Face, vectors for them, and the logits that an export has to give."""

import copy
from functools import partial
from typing import Any

import torch
import transformers
from conftest import build_gpt2, build_llama

import steerlens as sl

TOKENS = torch.tensor([[1, 7, 9, 11, 6], [1, 8, 5, 20, 30]])
ROWS = {
    f"blocks.{block}.hook_resid_post": torch.linspace(-1, 2, 32).roll(block) for block in (1, 2)
}
ROW = torch.linspace(-1, 2, 32)
SMALL: dict[str, Any] = {"vocab_size": 160, "initializer_range": 0.3}
LAYERS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LAYERS["intermediate_size"] = 48
CONFIGS = {
    "gpt_neox": transformers.GPTNeoXConfig(**LAYERS, **SMALL),
    "gptj": transformers.GPTJConfig(n_embd=32, n_layer=3, n_head=4, rotary_dim=4, **SMALL),
    "opt": transformers.OPTConfig(
        **LAYERS,
        ffn_dim=48,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        vocab_size=160,
        init_std=0.3,
    ),
    "phi": transformers.PhiConfig(**LAYERS, **SMALL),
    **{
        kind: config(num_key_value_heads=2, **LAYERS, **SMALL)
        for kind, config in {
            "qwen2": transformers.Qwen2Config,
            "mistral": partial(transformers.MistralConfig, sliding_window=None),
            "phi3": partial(transformers.Phi3Config, pad_token_id=3),
            "qwen3": partial(transformers.Qwen3Config, head_dim=8),
            "gemma2": partial(transformers.Gemma2Config, head_dim=8),
        }.items()
    },
}


def hugging_face(kind: str) -> Any:
    if kind in ("llama", "gpt2"):
        return {"llama": build_llama, "gpt2": build_gpt2}[kind]()
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind])).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(TOKENS)
    return getattr(out, "logits", out)


def steered(model: Any, vector: sl.SteeringVector, coefficient: Any) -> torch.Tensor:
    with sl.steer(model, vector, coefficient):
        return logits(model)
