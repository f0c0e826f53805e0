"""A model made by hand: head 1 of block 0 writes a direction, the MLP of block 1 reads it.

Dimensions of the residual stream: 0 and 1 say "cheerful" and "gloomy", 2 is on at every token, 5 is
the direction, 6 the answer. Everything else is small noise.
"""

from collections.abc import Iterator
from typing import Any

import torch
from conftest import bridge, build_llama, build_tokenizer
from torch import Tensor
from zoo import bridged

import steerlens as sl
from steerlens.circuits import Answers, Prompts, make_prompts

WIDTH, DIRECTION, ANSWER = 16, 5, 6
HOOK = "blocks.0.hook_resid_post"
OPENINGS = ("the day was", "I felt so", "it was a night and", "the river is", "you said it was")
PAIRS = sl.ContrastivePairs.from_lists(
    [f"you are cheerful {text}" for text in OPENINGS],
    [f"you are gloomy {text}" for text in OPENINGS],
)
AXIS = torch.nn.functional.one_hot(torch.tensor(DIRECTION), WIDTH).float()
VECTOR = sl.SteeringVector.from_vectors({HOOK: AXIS})


def build(*, writes: bool = True, reads: bool = True, noise: float = 0.005) -> Any:
    """The model; without its writer or its reader for the positive controls."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 8, "num_attention_heads": 2}
    model = build_llama(n_layers=3, initializer_range=noise, **sizes)
    tokenizer = build_tokenizer()
    word = {
        name: tokenizer.convert_tokens_to_ids(name)
        for name in ("cheerful", "gloomy", "good", "bad")
    }
    with torch.no_grad():
        embed = model.model.embed_tokens.weight
        embed[:, 2] = 10.0
        embed[word["cheerful"], 0] = 4.0
        embed[word["gloomy"], 1] = 4.0
        if writes:
            # Head 1 has rows 8 to 15 of the values: one reads the concept, and the output adds it
            # to the direction. Its queries and keys are noise, so it attends to all tokens alike.
            attention = model.model.layers[0].self_attn
            attention.v_proj.weight[8, 0] = 1.0
            attention.v_proj.weight[8, 1] = -1.0
            attention.o_proj.weight[DIRECTION, 8] = 5.0
        if reads:
            mlp = model.model.layers[1].mlp
            mlp.gate_proj.weight[0, 2] = 0.5
            mlp.up_proj.weight[0, DIRECTION] = 1.0
            mlp.down_proj.weight[ANSWER, 0] = 0.5
        model.lm_head.weight[word["good"], ANSWER] = 1.0
        model.lm_head.weight[word["bad"], ANSWER] = -1.0
    return bridge(model, tokenizer)


def build_normed() -> Any:
    """Gemma 2, which norms what heads and MLPs write before it is added."""
    return bridged("Gemma 2", num_hidden_layers=2, attn_implementation="eager")


def good_or_bad(model: Any) -> Answers:
    good, bad = (model.tokenizer.convert_tokens_to_ids(word) for word in ("good", "bad"))
    return Answers(torch.tensor([[good]]), torch.tensor([[bad]]))


def positive_prompts(model: Any, pairs: sl.ContrastivePairs) -> Prompts:
    return make_prompts(model, sl.engine.tokenize_pairs(model, pairs).positive)


def fitted(model: Any, pairs: sl.ContrastivePairs, layer: int = 0) -> sl.Directions:
    return sl.fit_directions(sl.collect_differences(model, pairs, layers=[layer]))


def one_by_one(prompts: Prompts) -> Iterator[Tensor]:
    """Every prompt as a batch of one, without padding."""
    for tokens, last in zip(prompts.tokens, prompts.last.tolist(), strict=True):
        yield tokens[None, : last + 1]
