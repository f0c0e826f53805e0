"""Fit frozen unit directions from differences."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.activations import Differences
from steerlens.errors import DirectionError

_UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Directions(Mapping[str, Tensor]):
    """Hook name -> unit direction, fitted on the unsteered model and then frozen.

    Iterating gives `hook_names`, the hooks that were asked for; the readouts carried along for a
    sweep (`readout_names`) are found by `directions[name]` too, but are not steered. `vectors`
    holds both, in that order. The sign is fixed so that positive prompts project higher on
    average. `fingerprint` is that of the pairs it was fitted on. Raises `DirectionError` when a
    vector does not have norm 1.
    """

    hook_names: tuple[str, ...]
    readout_names: tuple[str, ...]
    vectors: Float[Tensor, "all_hook d_model"]
    method: str
    position: int
    seed: int
    fingerprint: str

    def __post_init__(self) -> None:
        norms = self.vectors.norm(dim=-1)
        for name, norm in zip((*self.hook_names, *self.readout_names), norms.tolist(), strict=True):
            if not abs(norm - 1) < _UNIT_TOLERANCE:
                raise DirectionError(f"the direction at {name} has norm {norm:.6g}; expected 1")

    def __getitem__(self, hook_name: str) -> Float[Tensor, " d_model"]:
        if hook_name not in self._names:
            raise KeyError(hook_name)
        return self.vectors[self._names.index(hook_name)]

    def __contains__(self, hook_name: object) -> bool:
        return hook_name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self.hook_names)

    def __len__(self) -> int:
        return len(self.hook_names)

    def __repr__(self) -> str:
        return (
            f"Directions({self.method}, {len(self.hook_names)} hooks, "
            f"d_model {self.vectors.shape[-1]}, position {self.position})"
        )

    @property
    def _names(self) -> tuple[str, ...]:
        return self.hook_names + self.readout_names


def fit_directions(
    differences: Differences, *, method: str = "mean_diff", seed: int = 0
) -> Directions:
    """A unit direction at every hook of `differences`, the readouts included.

    `method` is one of `METHODS`; `seed` matters to `random` alone. The arithmetic is in float64,
    the result has the differences' dtype. Raises `DirectionError` on an unknown method and where
    nothing is left beyond the rounding of the activations (differences that are zero, that cancel
    for `mean_diff`, that are all equal for `pca_centred`), naming the hook.
    """
    if method not in METHODS:
        raise DirectionError(f"no method {method!r}; there are {', '.join(METHODS)}")
    vectors = []
    for index, hook_name in enumerate(differences.all_hook_names):
        at_hook = differences[hook_name].double()
        rounding = _rounding(differences.positive[index])
        if at_hook.abs().max() <= rounding:
            raise DirectionError(
                f"{method} at {hook_name}: the two prompts have the same activation at position "
                f"{differences.position}, so there is no direction; choose a position after the "
                "prompts begin to differ"
            )
        generator = torch.Generator().manual_seed(_hook_seed(seed, hook_name))
        try:
            vectors.append(_oriented(METHODS[method](at_hook, generator), at_hook, rounding))
        except DirectionError as error:
            raise DirectionError(f"{method} at {hook_name}: {error}") from error
    return Directions(
        hook_names=differences.hook_names,
        readout_names=differences.readout_names,
        vectors=torch.stack(vectors).to(differences.positive.dtype),
        method=method,
        position=differences.position,
        seed=seed,
        fingerprint=differences.fingerprint,
    )


def mean_diff(
    differences: Float[Tensor, "pair d_model"],
    generator: torch.Generator,  # noqa: ARG001 (one signature for all methods)
) -> Float[Tensor, " d_model"]:
    """The mean of the differences: `mean_i d_i`, to be normalised.

    Cost: one sum. Fails when the differences cancel or are all zero (a position at which both
    prompts have seen the same tokens).
    """
    return differences.mean(dim=0)


def pca(
    differences: Float[Tensor, "pair d_model"],
    generator: torch.Generator,  # noqa: ARG001
) -> Float[Tensor, " d_model"]:
    """The first right singular vector of the differences, uncentred: `argmax_u sum_i (d_i . u)^2`.

    Centring would subtract the mean difference, the very thing looked for (see `pca_centred`).
    Cost: one thin SVD. Fails when one pair's difference is much longer than the rest: it then
    decides alone.
    """
    _, singular_values, axes = torch.linalg.svd(differences, full_matrices=False)
    # At the length of the root mean square projection: next to nothing is then seen as nothing.
    scaled: Tensor = axes[0] * singular_values[0] / len(differences) ** 0.5
    return scaled


def pca_centred(
    differences: Float[Tensor, "pair d_model"],
    generator: torch.Generator,
) -> Float[Tensor, " d_model"]:
    """PCA of the differences after subtracting their mean: `pca` of `d_i - mean_j d_j`.

    This removes the mean difference, the thing most users look for, and keeps the direction in
    which the pairs differ from one another. It is here because other tools do it, and for
    comparison. Cost: one thin SVD. Fails when all differences are equal: nothing is left.
    """
    return pca(differences - differences.mean(dim=0), generator)


def random(
    differences: Float[Tensor, "pair d_model"], generator: torch.Generator
) -> Float[Tensor, " d_model"]:
    """A uniformly random direction, the control that any claim has to beat.

    Drawn from the seed and the hook name, so it does not depend on which other hooks are fitted.
    The sign is fixed on the differences as for every method, so on the data it was fitted on its
    mean projection is not below zero: about `0.8 / sqrt(d_model)` of the norm of the mean
    difference. Cost: none.
    """
    return torch.randn(differences.shape[-1], generator=generator, dtype=differences.dtype)


Method: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]

METHODS: dict[str, Method] = {
    "mean_diff": mean_diff,
    "pca": pca,
    "pca_centred": pca_centred,
    "random": random,
}
"""Method name -> function of the differences at one hook; its result is normalised and signed."""


def _oriented(
    vector: Float[Tensor, " d_model"], differences: Float[Tensor, "pair d_model"], rounding: float
) -> Float[Tensor, " d_model"]:
    """`vector` at norm 1, signed so that the mean projection of the differences is not negative."""
    if vector.abs().max() <= rounding:
        raise DirectionError(
            "nothing is left beyond rounding: the differences cancel, or are all equal and were "
            "centred; use pca, or pairs that agree more"
        )
    unit = vector / vector.norm()
    oriented: Tensor = -unit if (differences @ unit).mean() < 0 else unit
    return oriented


def _rounding(activations: Float[Tensor, "pair d_model"]) -> float:
    """How large a difference of such activations can be by rounding alone."""
    return 8 * torch.finfo(activations.dtype).eps * float(activations.abs().max())


def _hook_seed(seed: int, hook_name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}:{hook_name}".encode()).digest()[:7], "big")
