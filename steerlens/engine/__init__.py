"""Prompts to batches; the model run, in part and as a whole, at the cost of its arithmetic."""

from steerlens.engine.capture import collect_activations
from steerlens.engine.checkpoint import Checkpoint, Kept
from steerlens.engine.engine import Engine
from steerlens.engine.tokenization import (
    SteeredPositions,
    TokenizedPairs,
    TokenizedPrompt,
    tokenize_items,
    tokenize_pairs,
    tokenize_prompt,
)

__all__ = [
    "Checkpoint",
    "Engine",
    "Kept",
    "SteeredPositions",
    "TokenizedPairs",
    "TokenizedPrompt",
    "collect_activations",
    "tokenize_items",
    "tokenize_pairs",
    "tokenize_prompt",
]
