"""Where the finished parts of long work are kept, so that it can go on where it stopped."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Shaped
from torch import Tensor

from steerlens.engine.workload import Baseline, Cost

Tensors = Mapping[str, Shaped[Tensor, "..."]]
UNSTEERED = "_unsteered-"
"""How the name of a part begins that says what the unsteered model gave."""


@dataclass(frozen=True)
class Kept:
    """A finished part: rows of a table or tensors, what JSON can say, the block-evaluations."""

    rows: tuple[Mapping[str, Any], ...] = ()
    tensors: Tensors = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    blocks: int = 0


@runtime_checkable
class Checkpoint(Protocol):
    """Where finished parts are kept: `steerlens.runs.unfinished.open_parts` makes one in a folder.

    What is loaded has to be what was kept, to the bit. A sweep keeps the rows of each hook under
    its name; everything else, so the hooks' cells on a block of many pairs, is kept under the
    sha256 of all that decides it.

    Examples:
        >>> class InMemory(dict):
        ...     def load(self, name, of): return self.get((name, of))
        ...     def keep(self, name, of, kept): self[name, of] = kept
        >>> memory = InMemory()
        >>> _ = sl.sweep(model, pairs, directions, coefficients=[0, 4], checkpoint=memory)
        >>> hooks = {name: kept for (name, _), kept in memory.items() if kept.rows}
        >>> len(hooks), len(hooks["blocks.1.hook_resid_post"].rows)  # hooks; cells of one
        (5, 2)
    """

    def load(self, name: str, of: str) -> Kept | None:
        """What was kept under a name; None when nothing was.

        `of` is the sha256 of all that decides it. Raises where another is kept under the name.
        """
        ...

    def keep(self, name: str, of: str, kept: Kept) -> None:
        """Keep a part; it must be safe when this returns."""
        ...


def once(
    checkpoint: Checkpoint | None,
    decided: Sequence[Any],
    compute: Callable[[], Tensors],
    cost: Cost | None = None,
) -> Tensors:
    """The tensors that were kept, else those of `compute`, which are kept (see `once_kept`)."""
    return once_kept(checkpoint, decided, lambda: Kept(tensors=compute()), cost).tensors


def once_kept(
    checkpoint: Checkpoint | None,
    decided: Sequence[Any],
    compute: Callable[[], Kept],
    cost: Cost | None = None,
) -> Kept:
    """What was kept, else what `compute` gives, which is kept.

    `decided` is all that decides it (see `digest`). `cost` grows by what it took, whenever that
    was.
    """
    if checkpoint is None:
        return compute()
    key, cost = digest(*decided), Cost() if cost is None else cost
    kept = checkpoint.load(key, key)
    if kept is not None:
        cost.blocks += kept.blocks
        return kept
    before = cost.blocks
    made = replace(compute(), blocks=cost.blocks - before)
    checkpoint.keep(key, key, made)
    return made


def check_unsteered(checkpoint: Checkpoint, decided: Sequence[Any], values: Sequence[Any]) -> None:
    """See that the unsteered model gives what it gave before the work was stopped, to the bit.

    `decided` says what was run, as of `once`. Raises as `Checkpoint.load` where it does not.
    """
    key, of = f"{UNSTEERED}{digest(*decided)}", digest(*values)
    if checkpoint.load(key, of) is None:
        checkpoint.keep(key, of, Kept())


def digest_of(baseline: Baseline) -> str:
    """The sha256 of what the unsteered model gave, to the bit, taken a hook at a time."""
    sides = (baseline.positive, baseline.negative)
    by_hook = [digest(side[i]) for side in sides for i in range(len(side))]
    return digest(baseline.hook_names, by_hook, baseline.logprob)


def digest(*decided: Any) -> str:
    """The sha256 of plain values and tensors, and lists of them, to the bit."""
    sha256 = hashlib.sha256()
    for value in decided:
        content: bytes | memoryview
        if isinstance(value, Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1)
            head: Any = [str(value.dtype), *value.shape]
            content = memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]
        elif isinstance(value, (list, tuple)):
            head, content = len(value), digest(*value).encode()
        else:
            head, content = "", json.dumps(value, sort_keys=True).encode()
        sha256.update(f"{json.dumps(head)}{len(content)} ".encode())
        sha256.update(content)  # no copy of it: activations of all pairs are large
    return sha256.hexdigest()
