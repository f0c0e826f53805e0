"""Two continuations of one prompt in one row, so that a cell runs the prompt once for both."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from steerlens.engine.batches import Batch, in_row_order, length_groups, padded
from steerlens.engine.positions import parse_position
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.engine.workload import Workload
from steerlens.models.hooked_model import HookedModel, is_on_one_side, key_value_cache


@dataclass(frozen=True)
class Branches(Batch):
    """Prompts, each with two continuations that do not see each other: two `rows` a prompt.

    Both begin with the prompt's last token, at which the first of their own is predicted. The mask
    is 0 at padding, 1 at what both follow, 2 and 3 at the one and the other.
    """

    def labels_by_row(self, prompts: Int[Tensor, " prompt"]) -> Bool[Tensor, "row token"]:
        """The labels of the first continuation of each of the prompts, and of the other."""
        labels, mask = self.label_mask()[prompts], self.attention_mask[prompts]
        return torch.stack([labels & (mask == branch) for branch in (2, 3)], dim=1).flatten(0, 1)


def branch_kwargs(mask: Int[Tensor, "row token"], dtype: torch.dtype) -> dict[str, Any]:
    """Attention and positions with which a token sees its own continuation and the prompt alone.

    Examples:
        >>> kwargs = branch_kwargs(torch.tensor([[1, 2, 2, 3]]), torch.float32)
        >>> (kwargs["attention_mask"][0, 0, 3] == 0).tolist(), kwargs["position_ids"].tolist()
        ([True, False, False, True], [[0, 1, 2, 1]])
    """
    sees = ((mask[:, :, None] == mask[:, None, :]) | (mask == 1)[:, None, :]).tril()
    hidden = torch.zeros(sees.shape, dtype=dtype, device=sees.device)
    hidden.masked_fill_(~sees, torch.finfo(dtype).min)
    return {"attention_mask": hidden[:, None], "position_ids": sees.sum(dim=-1) - 1}


def with_one_prompt(
    model: HookedModel, workload: Workload, batches: Sequence[Batch]
) -> list[tuple[int, int]]:
    """Places, in the rows' order, of every two whose prompt a cell may run once.

    None unless all prompts come in twos, each with a continuation, every token is steered, and the
    model takes positions and attention as they are given, within its windows. None of the bare
    model on a GPU, whose blocks are called without a mask.
    """
    prompts, cache = in_row_order(batches), key_value_cache(model)
    places = defaultdict[tuple[int, ...], list[int]](list)
    for place, prompt in enumerate(prompts):
        places[prompt.prompt].append(place)
    may = (
        cache is not None
        and workload.steered_positions == "all"
        and not workload.with_kl
        and parse_position(workload.position).span is None
        and all(len(of_prompt) % 2 == 0 for of_prompt in places.values())
        and all(p.continuation and not p.labels and len(p.prompt) > 1 for p in prompts)
        and is_on_one_side(model, *map(len, prompts))
    )
    windows = [getattr(layer, "sliding_window", math.inf) for layer in cache.layers] if may else []
    if not may or any(len(prompt) > min(windows, default=math.inf) for prompt in prompts):
        return []
    return [(of[i], of[i + 1]) for of in places.values() for i in range(0, len(of), 2)]


def make_branches(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    twins: Sequence[tuple[int, int]],
    batch_size: int | None,
) -> tuple[Branches, ...]:
    """Length-sorted batches of the prompts that every two of `prompts` share, padded on the right.

    As many rows and as little padding as of `make_batches`.
    """
    joined, masks = [], []
    for first, second in ((prompts[one], prompts[other]) for one, other in twins):
        shared, n = first.prompt, len(first)
        ids = (*first.continuation, shared[-1], *second.continuation)
        labels = (*range(len(shared), n), *range(n + 1, len(shared) + len(ids)))
        joined.append(TokenizedPrompt(shared, ids, first.where, labels=labels))
        sizes = torch.tensor([len(shared) - 1, n - len(shared) + 1, len(second.continuation) + 1])
        masks.append(torch.arange(1, 4).repeat_interleave(sizes))
    batches = []
    for chosen in length_groups([(len(prompt),) for prompt in joined], model, batch_size):
        device = torch.device(model.cfg.device) if model.cfg.device else None
        tokens, _ = padded([joined[i].ids for i in chosen], "right", device=device)
        mask = pad_sequence([masks[i] for i in chosen], batch_first=True).to(tokens.device)
        rows = tuple(row for i in chosen for row in twins[i])
        batches.append(Branches(rows, tuple(joined[i] for i in chosen), tokens, mask))
    return tuple(batches)
