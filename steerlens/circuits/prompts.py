"""Prompts in one padded batch, run a few rows at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.errors import InputError
from steerlens.models.hooked_model import HookedModel, length_switches, side_of_switches
from steerlens.progress import Progress, by_default
from steerlens.validation import checked

ROWS = 16
"""Prompts in one pass: what every component writes is held for all of them at once."""
MIN_GROUPS = 4
Rows = slice | list[int]
"""Some of the prompts, by their place."""


def row_slices(n_prompts: int) -> list[slice]:
    """The rows of each pass over so many prompts."""
    return [slice(start, start + ROWS) for start in range(0, n_prompts, ROWS)]


def first_half(groups: Sequence[int], seed: int) -> Bool[Tensor, " row"]:
    """Whether each row is of a random half of the groups, the larger one where they are odd."""
    _, number = np.unique(groups, return_inverse=True)
    n_groups = int(number.max()) + 1
    rank = torch.randperm(n_groups, generator=torch.Generator().manual_seed(seed))
    return rank[torch.from_numpy(number)] < (n_groups + 1) // 2


def choosing_half(groups: Sequence[int], seed: int) -> Bool[Tensor, " row"]:
    """`first_half`, on which something is chosen; `InputError` where no half has an interval."""
    n_groups = len(set(groups))
    if n_groups < MIN_GROUPS:
        raise InputError(
            f"what carries an effect is chosen on one half of the groups and tested on the other, "
            f"which takes {MIN_GROUPS} groups or more; got {n_groups}"
        )
    return first_half(groups, seed)


def half_record(groups: Sequence[int], is_in: Bool[Tensor, " row"]) -> dict[str, Any]:
    """What a table's attrs say of a half: its rows, counted from 0, and its groups."""
    rows: list[int] = is_in.nonzero().flatten().tolist()
    return {"rows": rows, "n_groups": len({groups[row] for row in rows})}


def counting(progress: Progress | None, stage: str, total: int) -> Callable[[int], None]:
    """Tell `progress` of a stage that begins; what is returned is told of every further step."""
    done, tell = 0, by_default(progress)

    def count(n_steps: int) -> None:
        nonlocal done
        done += n_steps
        tell(stage, done, total)

    count(0)
    return count


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts padded on the right, which causal attention needs no mask for; `last` is each one's
    last real column, `groups` the number of each one's group, by which intervals go."""

    tokens: Int[Tensor, "prompt token"]
    last: Int[Tensor, " prompt"]
    groups: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.last)

    def part(self, rows: Rows) -> "Prompts":
        """Some of the prompts, as padded as they are."""
        groups = tuple(np.array(self.groups)[rows].tolist())
        return Prompts(self.tokens[rows], self.last[rows], groups)

    @property
    def real(self) -> Bool[Tensor, "prompt token"]:
        """True at real tokens, False at padding."""
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return columns <= self.last[:, None]

    def at_last(self, values: Shaped[Tensor, "prompt token *rest"]) -> Shaped[Tensor, "..."]:
        """The values at each prompt's last token."""
        rows = torch.arange(len(self), device=values.device)
        return values[rows, self.last.to(values.device)]


@checked
def make_prompts(
    model: HookedModel,
    prompts: Sequence[TokenizedPrompt],
    *,
    groups: Sequence[int] | None = None,
) -> Prompts:
    """The prompts' own tokens, without continuations, on the model's device.

    Args:
        model: Whose tokens they are.
        prompts: As `tokenize_prompt` makes them, one or more.
        groups: The number of each prompt's group, as of `ContrastivePairs.groups`. Default: each
            is one of its own.

    Raises:
        InputError: There are none, or not as many groups; or they are of both sides of a length
            at which the model changes its arithmetic.

    Examples:
        >>> from steerlens.circuits import make_prompts
        >>> prompts = make_prompts(model, sl.engine.tokenize_pairs(model, pairs).positive)
        >>> len(prompts)
        8
    """
    if not prompts:
        raise InputError("expected one or more prompts, got none")
    numbers = tuple(range(len(prompts)) if groups is None else groups)
    if len(numbers) != len(prompts):
        raise InputError(f"expected a group for each of {len(prompts)} prompts, got {len(numbers)}")
    if len({side_of_switches(model, len(prompt.prompt)) for prompt in prompts}) > 1:
        raise InputError(
            f"the prompts are of both sides of {length_switches(model)[0]} tokens, above which "
            "this model rotates all rows of a batch by other angles; give those of one side"
        )
    rows = [torch.tensor(prompt.prompt) for prompt in prompts]
    tokens = pad_sequence(rows, batch_first=True, padding_value=0)
    last = torch.tensor([len(row) - 1 for row in rows])
    return Prompts(tokens.to(model.cfg.device), last.to(model.cfg.device), numbers)
