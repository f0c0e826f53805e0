"""Tiny models of Hugging Face, vectors for them, and the logits that an export has to give."""

from typing import Any

import torch
import zoo

import steerlens as sl

TOKENS = torch.tensor([[1, 7, 9, 11, 6], [1, 8, 5, 20, 30]])
ROWS = {
    f"blocks.{block}.hook_resid_post": torch.linspace(-1, 2, 32).roll(block) for block in (1, 2)
}
ROW = torch.linspace(-1, 2, 32)
KINDS = {
    **{"llama": "Llama", "gpt2": "GPT-2", "gpt_neox": "GPT-NeoX", "gptj": "GPT-J", "opt": "OPT"},
    **{"phi": "Phi", "phi3": "Phi-3", "qwen2": "Qwen2", "qwen3": "Qwen3"},
    **{"mistral": "Mistral", "gemma2": "Gemma 2"},
}
"""What a checkpoint's config calls an architecture -> its name in the zoo."""


def hugging_face(kind: str) -> Any:
    changes = {"sliding_window": None} if kind == "mistral" else {}
    return zoo.hugging_face(KINDS[kind], **changes)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(TOKENS)
    return getattr(out, "logits", out)


def steered(model: Any, vector: sl.SteeringVector, coefficient: Any) -> torch.Tensor:
    with sl.steer(model, vector, coefficient):
        return logits(model)
