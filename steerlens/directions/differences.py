"""Differences of activations: positive minus negative, at every hook, pair by pair."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens.data.pairs import AnyPairs, ContrastivePairs, as_pairs
from steerlens.engine.capture import collect_activations
from steerlens.engine.labels import OWN_TOKENS, pairs_to_read, with_spans
from steerlens.engine.positions import Position, as_position, parse_position
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_prompt
from steerlens.errors import InputError
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import (
    Layers,
    check_one_width,
    is_head,
    readout_hook,
    resolve_hooks,
    width_name,
)
from steerlens.models.identity import weights_fingerprint
from steerlens.models.weight_processing import UNKNOWN, weight_processing
from steerlens.progress import Progress
from steerlens.tables import fragment, hook_label
from steerlens.validation import Count, checked


@checked
@dataclass(frozen=True, eq=False)
class Differences:
    """Activations of the positive and the negative prompts at some hooks and one position.

    `positive` and `negative` hold `hook_names` first, then `readout_names`: further hooks at which
    a sweep over `hook_names` reads its effect, carried along so that one pass is enough; not those
    of heads, whose rows are of d_head. In residual units; float32, or float64 where the model is.
    `fingerprint`, `groups` and `pair_hashes` are those of the pairs, `weight_processing` and
    `weights_fingerprint` those of the model; `unpaired` says that they are of two lists without
    pairs, and the negative side the mean of its list in every row.

    Examples:
        >>> differences
        Differences(5 hooks, 8 pairs, d_model 32)
        >>> differences.values.shape
        torch.Size([5, 8, 32])
        >>> differences["blocks.2.hook_resid_post"].shape
        torch.Size([8, 32])
    """

    hook_names: tuple[str, ...]
    readout_names: tuple[str, ...]
    positive: Float[Tensor, "all_hook pair d_model"]
    negative: Float[Tensor, "all_hook pair d_model"]
    position: Position
    fingerprint: str
    weight_processing: str = UNKNOWN
    weights_fingerprint: str = UNKNOWN
    groups: tuple[int, ...] | None = None
    pair_hashes: tuple[str, ...] = ()
    unpaired: bool = False

    def check_paired(self, what: str) -> None:
        """Raise `InputError` where they are of two lists without pairs, which `what` takes."""
        if self.unpaired:
            raise InputError(
                f"{what} fitted from pairs, and these differences are of two lists without any, "
                "each positive text against the mean of the negative ones; take mean_diff, or pairs"
            )

    @property
    def pair_groups(self) -> tuple[int, ...]:
        """The number of each pair's group; by default each is one of its own."""
        return tuple(range(self.positive.shape[1])) if self.groups is None else self.groups

    @property
    def all_hook_names(self) -> tuple[str, ...]:
        """`hook_names`, then `readout_names`."""
        return self.hook_names + self.readout_names

    @property
    def values(self) -> Float[Tensor, "hook pair d_model"]:
        """`positive - negative` at `hook_names`, without the readouts."""
        n_hooks = len(self.hook_names)
        return self.positive[:n_hooks] - self.negative[:n_hooks]

    def __getitem__(self, hook_name: str) -> Float[Tensor, "pair d_model"]:
        """`positive - negative` at one hook. Raises `KeyError` when it was not collected."""
        if hook_name not in self.all_hook_names:
            raise KeyError(hook_name)
        index = self.all_hook_names.index(hook_name)
        return self.positive[index] - self.negative[index]

    def part(self, hook_names: Sequence[str], pairs: Int[Tensor, " row"]) -> "Differences":
        """Some hooks, and the rows of some pairs, which may be there more than once."""
        hooks = [self.all_hook_names.index(name) for name in hook_names]
        return replace(
            self,
            hook_names=tuple(hook_names),
            readout_names=(),
            positive=self.positive[hooks][:, pairs],
            negative=self.negative[hooks][:, pairs],
            groups=None,
        )

    def __repr__(self) -> str:
        _, n_pairs, width = self.positive.shape
        name = width_name(self.hook_names)
        return f"Differences({len(self.hook_names)} hooks, {n_pairs} pairs, {name} {width})"

    def _repr_html_(self) -> str:
        n_hooks = len(self.hook_names)
        norms = torch.cat([self.positive, self.negative], dim=1)[:n_hooks].norm(dim=-1).mean(dim=1)
        table = pd.DataFrame(
            {
                "layer": [hook_label(name) for name in self.hook_names],
                "separation": self.values.norm(dim=-1).mean(dim=1).tolist(),
                "resid norm": norms.tolist(),
            }
        )
        about = [repr(self), f"position {self.position}", f"pairs {self.fingerprint[:12]}"]
        return fragment(about, table, note="means over pairs, residual units")


@checked
def collect_differences(
    model: HookedModel,
    pairs: AnyPairs,
    *,
    layers: Layers = "all",
    position: Position | Sequence[int] = -1,
    own_tokens: Count = OWN_TOKENS,
    batch_size: Count | None = None,
    progress: Progress | None = None,
) -> Differences:
    """Activations of both sides of every pair and their differences.

    States at `hook_resid_post` are block outputs, at the last layer too (before the final norm). Of
    two lists without pairs each positive text is set against the mean of the negative ones: their
    mean is the difference of the two means, whatever the lengths.

    Args:
        layers: As in `resolve_hooks`.
        position: The token that is read, counted in each prompt, negative from its end; or several
            or a span by name, such as "assistant", the mean over the response; or "pair", where
            each pair has a position of its own (see `Position`).
        own_tokens: The most tokens that the model writes where its own text is read (32).
        batch_size: Prompts in a pass; by default what the device can use.
        progress: Told of the prompts. Default: a bar in a terminal or a notebook.

    Raises:
        InputError: A position that names nothing, is outside a prompt (named) or of which it has no
            token; no room in the context for own text; markers of thinking that the tokenizer
            cannot write.
        HookError: An unknown hook; heads beside other hooks.
        ModelError: NaN or inf at a hook (named).

    Examples:
        >>> sl.collect_differences(model, pairs, layers=[0, 2], position=-1)
        Differences(2 hooks, 8 pairs, d_model 32)
    """
    position = as_position(position)
    hook_names = resolve_hooks(model, layers)
    readout_names = missing_readouts(hook_names, int(model.cfg.n_layers))
    pairs = as_pairs(pairs)
    sides = _sides(model, pairs, position, own_tokens)
    # Both sides at once: a GPU is not left idle between them.
    both = collect_activations(
        model,
        (*sides[0], *sides[1]),
        hook_names + readout_names,
        position=position,
        batch_size=batch_size,
        progress=progress,
    )
    # Each a tensor of its own, which can be kept and written without the other.
    positive, negative = (
        side.clone(memory_format=torch.contiguous_format)
        for side in both.tensor_split([len(sides[0])], dim=1)
    )
    groups: tuple[int, ...] | None = pairs.groups
    if pairs.unpaired is not None:
        mean = negative.mean(dim=1, keepdim=True, dtype=torch.float64).to(negative.dtype)
        negative, groups = mean.expand_as(positive).contiguous(), None
    return Differences(
        *(hook_names, readout_names, positive, negative, position, pairs.fingerprint),
        weight_processing=weight_processing(model),
        weights_fingerprint=weights_fingerprint(model),
        groups=groups,
        pair_hashes=pairs.prompt_hashes,
        unpaired=pairs.unpaired is not None,
    )


def _sides(
    model: HookedModel, pairs: ContrastivePairs, position: Position, own_tokens: int
) -> list[Sequence[TokenizedPrompt]]:
    """The positive and the negative prompts, of lists without pairs all that they have."""
    if pairs.unpaired is None:
        tokenized = pairs_to_read(model, pairs, position, own_tokens=own_tokens)
        return [tokenized.positive, tokenized.negative]
    span = parse_position(position).span
    if span == "pair":
        pairs.check_positions()
    return [
        with_spans(
            model,
            [tokenize_prompt(model, t, where=f"{side} text {i}") for i, t in enumerate(texts, 1)],
            [span] if span else [],
        )
        for side, texts in zip(("positive", "negative"), pairs.unpaired, strict=True)
    ]


def missing_readouts(hook_names: Sequence[str], n_layers: int) -> tuple[str, ...]:
    """The readout hooks of `hook_names` that are not among them, in layer order; none of heads.

    Raises `HookError` where heads and other hooks, which have another width, are mixed.
    """
    check_one_width(hook_names)
    if any(map(is_head, hook_names)):
        return ()
    readouts = dict.fromkeys(readout_hook(name, n_layers) for name in hook_names)
    return tuple(name for name in readouts if name not in hook_names)
