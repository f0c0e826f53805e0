"""A tiny model into which a direction is planted, and pairs and items of it in groups."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from conftest import build_llama, build_tokenizer

PROMPTS = [f"the {word} was" for word in "walk sun rain soup".split()]
SUBJECTS = "I you the it so very not by".split()
WORDS = "walk sun rain soup bread night day kind rude it you a".split()
Records = list[dict[str, Any]]


def pair_records(
    n_groups: int = 16, turned: Callable[[int], bool] = lambda group: False
) -> Records:
    """Two pairs a group, of those that are turned with the labels exchanged."""
    wordings = itertools.product(SUBJECTS, ("rain", "soup", "bread"))
    records = []
    for group, (who, what) in enumerate(itertools.islice(wordings, n_groups)):
        for end in ("was", "is"):
            sides = [f"{who} {what} {end} {mood}" for mood in ("cheerful", "gloomy")]
            sides = sides[::-1] if turned(group) else sides
            records.append({"positive": sides[0], "negative": sides[1], "group": str(group)})
    return records


def item_records(turned: Callable[[int], bool] = lambda item: False) -> Records:
    answers = ({"positive": " good", "negative": " bad"}, {"positive": " bad", "negative": " good"})
    return [{"prompt": f"the {w} was", **answers[turned(i)]} for i, w in enumerate(WORDS)]


def planted_weights() -> Any:
    """Cheerful and gloomy differ by a vector, along which "good" gets likelier than "bad".

    The first two blocks hardly write; the last two turn what was planted round, so that the layers
    before them are the wrong ones.
    """
    hf_model = build_llama(n_layers=4)
    direction = torch.nn.functional.normalize(torch.ones(32).cumsum(0), dim=0)
    words = build_tokenizer()("cheerful gloomy good bad", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        embedded = hf_model.get_input_embeddings().weight
        embedded[words[0]] = embedded[words[1]] + 3 * direction
        for block, share in zip(hf_model.model.layers, (0.01, 0.01, 0.3, 0.3), strict=True):
            block.self_attn.o_proj.weight.mul_(share)
            block.mlp.down_proj.weight.mul_(share)
        unembedded = hf_model.lm_head.weight
        unembedded[words[2]] = unembedded[words[3]] + 2 * direction
    return hf_model
