"""The registry of methods, and fitting a direction at every hook by one of them."""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from steerlens.directions import contrast_methods, gradient_methods
from steerlens.directions.differences import Differences
from steerlens.directions.directions import Directions
from steerlens.directions.evidence import Activations, Gradients
from steerlens.directions.gradients import LossGradients
from steerlens.errors import InputError, whole

Source = Literal["differences", "gradients", "training"]


@dataclass(frozen=True)
class Method:
    """A method: what it is fitted from, and its function of that at one hook.

    A function's result is normalised and signed by `fit_directions`. Methods by `training` run the
    model, so they have none: see `fit`.
    """

    name: str
    source: Source
    function: Callable[[Any], Float[Tensor, " d_model"]] | None
    summary: str
    needs_scores: bool = False
    is_control: bool = False
    is_pooled: bool = False


def _of(name: str, source: Source, function: Callable[..., Tensor], **options: str) -> Method:
    summary = (function.__doc__ or "").splitlines()[0]
    if options:
        summary = f"{function.__name__}: {', '.join(options.values())}"
    return Method(
        name,
        source,
        partial(function, **options) if options else function,
        summary,
        needs_scores=function is gradient_methods.fisher_pullback,
        is_control=function in (contrast_methods.random, contrast_methods.shuffled),
        is_pooled=options.get("form") == "pooled",
    )


_ALL = (
    _of("mean_diff", "differences", contrast_methods.mean_diff),
    _of("pca", "differences", contrast_methods.pca),
    _of("pca_centred", "differences", contrast_methods.pca_centred),
    _of("pca_pooled", "differences", contrast_methods.pca_pooled),
    _of("lda", "differences", contrast_methods.lda),
    _of("probe", "differences", contrast_methods.probe),
    _of("gradient_mean", "gradients", gradient_methods.gradient_mean),
    _of("gradient_mean_pooled", "gradients", gradient_methods.gradient_mean, form="pooled"),
    _of("gradient_svd", "gradients", gradient_methods.gradient_svd),
    _of("gradient_svd_pooled", "gradients", gradient_methods.gradient_svd, form="pooled"),
    _of("gradient_fisher", "gradients", gradient_methods.gradient_fisher),
    *(
        _of(
            f"gradient_fisher{'_' + kind if kind != 'empirical' else ''}"
            f"{'_pooled' if form == 'pooled' else ''}",
            "gradients",
            gradient_methods.gradient_fisher,
            form=form,
            kind=kind,
        )
        for form in ("paired", "pooled")
        for kind in ("empirical", "centred", "norm_weighted")
        if (form, kind) != ("paired", "empirical")
    ),
    _of("fisher_pullback", "gradients", gradient_methods.fisher_pullback),
    Method(
        "optimised",
        "training",
        None,
        "A vector trained at c = +1 and -1 by the reference loss (`train_directions`).",
    ),
    Method(
        "optimised_promotion",
        "training",
        None,
        "Trained to promote the items' positive and suppress their negative continuations.",
    ),
    Method(
        "optimised_preference",
        "training",
        None,
        "Trained by the bidirectional preference loss on the items' continuations.",
    ),
    _of("random", "differences", contrast_methods.random),
    _of("shuffled", "differences", contrast_methods.shuffled),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""Method name -> method."""


def fit_directions(
    evidence: Differences | LossGradients, *, method: str = "mean_diff", seed: int = 0
) -> Directions:
    """A unit direction at every hook of `evidence`, the readouts included.

    `evidence` is what `collect_differences` gives, or `loss_gradients` for the methods fitted from
    gradients; `method` one of `METHODS`; `seed` matters to `random` and `shuffled` alone. The
    arithmetic is in float64, the result has the evidence's dtype. A direction fitted from
    differences is signed so that their mean projection is not negative, one from gradients so that
    the loss falls along it on average (when both sides are pushed apart; alike, for the pooled
    forms); the controls keep the sign they are drawn with. Raises
    `InputError` on an unknown method, one that is fitted from something else, and where nothing
    is left beyond rounding (differences that are zero, that cancel for `mean_diff`, that are all
    equal for `pca_centred`; a gradient that is zero), naming the hook, and `InputError` on a seed
    that is no whole number from 0 on.

    Examples:
        >>> sl.fit_directions(differences, method="pca")
        Directions(pca, 5 hooks, d_model 32, position -1)
    """
    chosen = method_of(method)
    given = "differences" if isinstance(evidence, Differences) else "gradients"
    if chosen.function is None or chosen.source != given:
        raise InputError(
            f"{method} is fitted from {chosen.source}, and this is {given}; "
            f"{_ADVICE[chosen.source]}, or use fit(model, pairs, method={method!r})"
        )
    vectors = []
    for index, hook_name in enumerate(evidence.all_hook_names):
        generator = torch.Generator().manual_seed(_hook_seed(seed, hook_name))
        try:
            if isinstance(evidence, Differences):
                vectors.append(_from_activations(chosen, evidence, index, generator))
            else:
                vectors.append(_from_gradients(chosen, evidence, index))
        except InputError as error:
            raise InputError(f"{method} at {hook_name}: {error}") from error
    like = evidence.positive
    return Directions(
        hook_names=evidence.hook_names,
        readout_names=evidence.readout_names,
        vectors=torch.stack(vectors).to(like.dtype),
        method=method,
        position=evidence.position,
        seed=seed,
        fingerprint=evidence.fingerprint,
        weight_processing=evidence.weight_processing,
    )


def null_directions(differences: Differences, *, n: int, seed: int) -> dict[str, list[Directions]]:
    """`n` random and `n` shuffled directions at every hook: what a claim is compared with.

    Kind -> directions; their seeds are 1000 times `seed + 1`, and counted up from there, so that
    they are not those of methods of the same name with a small seed. Raises `InputError` for fewer
    than two, `InputError` when the pairs are too few for so many shuffles.

    Examples:
        >>> nulls = sl.null_directions(differences, n=3, seed=0)
        >>> {kind: len(some) for kind, some in nulls.items()}
        {'random': 3, 'shuffled': 3}
    """
    n, seed = whole("n", n, 2), whole("seed", seed, 0)
    n_pairs = differences.positive.shape[1]
    if math.comb(n_pairs, n_pairs // 2) < n:
        raise InputError(
            f"half of {n_pairs} pairs can be exchanged in {math.comb(n_pairs, n_pairs // 2)} ways "
            f"only, and {n} shuffled vectors were asked for; fit on more pairs"
        )
    seeds = range(1000 * (seed + 1), 1000 * (seed + 1) + n)
    return {
        kind: [fit_directions(differences, method=kind, seed=s) for s in seeds]
        for kind in ("random", "shuffled")
    }


_ADVICE = {
    "differences": "give it collect_differences(model, pairs)",
    "gradients": "give it loss_gradients(model, pairs)",
    "training": "it has to run the model",
}


def method_of(name: str) -> Method:
    """The method of that name. Raises `InputError` that lists them when there is none."""
    if name not in METHODS:
        raise InputError(f"no method {name!r}; there are {', '.join(METHODS)}")
    return METHODS[name]


def _from_activations(
    method: Method,
    evidence: Differences,
    index: int,
    generator: torch.Generator,
) -> Float[Tensor, " d_model"]:
    sides = (evidence.positive[index], evidence.negative[index])
    given = Activations(sides[0].double(), sides[1].double(), generator)
    rounding = 8 * torch.finfo(sides[0].dtype).eps * float(sides[0].abs().max())
    if given.differences.abs().max() <= rounding:
        raise InputError(
            "the two prompts have the same activation at position "
            f"{evidence.position}, so there is no direction; choose a position after the "
            "prompts begin to differ"
        )
    if method.function is None:
        raise InputError(f"{method.name} is trained, not fitted")
    unit = _unit(method.function(given), rounding)
    return unit if method.is_control else _oriented(unit, given.differences)


def _from_gradients(
    method: Method, evidence: LossGradients, index: int
) -> Float[Tensor, " d_model"]:
    # The weighted sum of both terms in float64: one may be much longer than the other.
    positive = (
        evidence.separation_positive[index].double()
        + evidence.weights[index].double() * evidence.coherence[index].double()
    )
    given = Gradients(
        positive, evidence.separation_negative[index].double(), evidence.scores[index].double()
    )
    rounding = 8 * torch.finfo(evidence.coherence.dtype).eps * float(positive.abs().max())
    if not positive.any():
        raise InputError(
            "the gradient of the loss is zero; take a position with a label after it, a margin "
            "below 1 and a weight above 0"
        )
    if not (evidence.separation_positive[index].any() or given.negative.any()):
        raise InputError(
            f"the two prompts have the same activation at position {evidence.position}, so nothing "
            "separates them there; choose a position after the prompts begin to differ"
        )
    if method.function is None:
        raise InputError(f"{method.name} is trained, not fitted")
    rows = given.pooled if method.is_pooled else given.paired
    return _oriented(_unit(method.function(given), rounding), rows)


def _unit(vector: Float[Tensor, " d_model"], rounding: float) -> Float[Tensor, " d_model"]:
    if not vector.abs().max() > rounding:
        raise InputError(
            "nothing is left beyond rounding: the rows cancel, or are all equal and were centred; "
            "use pca, or pairs that agree more"
        )
    unit: Tensor = vector / vector.norm()
    return unit


def _oriented(
    unit: Float[Tensor, " d_model"], rows: Float[Tensor, "pair d_model"]
) -> Float[Tensor, " d_model"]:
    """`unit`, signed so that the mean projection of the rows is not negative."""
    oriented: Tensor = -unit if (rows @ unit).mean() < 0 else unit
    return oriented


def _hook_seed(seed: int, hook_name: str) -> int:
    seed = whole("seed", seed, 0)
    return int.from_bytes(hashlib.sha256(f"{seed}:{hook_name}".encode()).digest()[:7], "big")
