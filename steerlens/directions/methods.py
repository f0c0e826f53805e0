"""The registry of methods, and fitting a direction at every hook by one of them.

A method is written as its name, with options after plus signs where it has any: `pca`,
`gradient_svd+pooled`, `gradient_fisher+centred+pooled`; so in `fit`, on the command line, in tables
and in records of runs. `METHODS` says which options a method has. The last one, where it is not the
method's own, is the axis on which its loss measures the separation: `gradient_mean+on_pca`,
`optimised+on_mean_diff`, `optimised+on_norm`.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from steerlens.directions import contrast_methods as contrast
from steerlens.directions import gradient_methods as gradient
from steerlens.directions.contrast_methods import Activations, coin_flips
from steerlens.directions.differences import Differences
from steerlens.directions.directions import Directions
from steerlens.directions.gradient_methods import Form, Gradients
from steerlens.directions.gradient_rows import LossGradients
from steerlens.directions.old_names import METHOD_NAMES, warn_of_old
from steerlens.errors import HookError, InputError
from steerlens.models.hooked_model import HookedModel
from steerlens.models.identity import check_fitted_on
from steerlens.validation import Draws, Whole, checked

Source = Literal["differences", "gradients", "training"]

Evidence = Differences | LossGradients
"""What a method that does not run the model is fitted from."""

NORM = "norm"
"""What a name says of a loss without an axis: `optimised+on_norm`."""


@dataclass(frozen=True)
class Method:
    """A method: what it is fitted from, and its function of that at one hook.

    A function's result is normalised and signed by `fit_directions`. A method by `training` runs
    the model, so it has an `objective` in place of a function. `kinds` are options of the function;
    `has_forms` says that `pooled` is one too (see `gradient_methods`), `has_axis` that the loss
    measures a separation: on `axis`, fitted by the method of that name, or by the norm (None).
    """

    name: str
    source: Source
    summary: str
    function: Callable[..., Float[Tensor, " d_model"]] | None = None
    objective: str = ""
    kinds: tuple[str, ...] = ()
    has_forms: bool = False
    has_axis: bool = False
    axis: str | None = None
    form: Form = "paired"
    needs_scores: bool = False
    is_control: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """What may follow the name: one of the kinds, `pooled`, and an axis (`on_pca`)."""
        axis = ["on_AXIS"] if self.has_axis else []
        return (*self.kinds, *(["pooled"] if self.has_forms else []), *axis)

    def on(self, axis: str | None) -> "Method":
        """The method with its loss on this axis; its name says so where it is not its own."""
        if axis == self.axis or not self.has_axis:
            return self
        return replace(self, name=f"{self.name}+on_{axis or NORM}", axis=axis)


def _of(source: Source, function: Callable[..., Tensor], **settings: Any) -> Method:
    summary = (function.__doc__ or "").splitlines()[0]
    method = Method(function.__name__, source, summary, function, **settings)
    options = f" Options: {', '.join(method.options)}." if method.options else ""
    return replace(method, summary=summary + options)


_ALL = (
    _of("differences", contrast.mean_diff),
    _of("differences", contrast.pca),
    _of("differences", contrast.pca_centred),
    _of("differences", contrast.pca_pooled),
    _of("differences", contrast.lda),
    _of("differences", contrast.probe),
    _of("gradients", gradient.gradient_mean, has_forms=True, has_axis=True),
    _of("gradients", gradient.gradient_svd, has_forms=True, has_axis=True),
    _of(
        *("gradients", gradient.gradient_fisher),
        kinds=("centred", "norm_weighted"),
        has_forms=True,
        has_axis=True,
    ),
    _of("gradients", gradient.fisher_pullback, needs_scores=True, has_axis=True),
    Method(
        *("optimised", "training"),
        "A vector trained at c = +1 and -1 by the reference loss on the frozen PCA axis "
        "(`train_directions`). Options: on_AXIS.",
        objective="reference",
        has_axis=True,
        axis="pca",
    ),
    Method(
        *("optimised_promotion", "training"),
        "Trained to promote the items' positive and suppress their negative continuations.",
        objective="promotion",
    ),
    Method(
        *("optimised_preference", "training"),
        "Trained by the bidirectional preference loss on the items' continuations.",
        objective="preference",
    ),
    _of("differences", contrast.random, is_control=True),
    _of("differences", contrast.shuffled, is_control=True),
)

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
"""Method name -> method; the options that may follow a name are `Method.options`."""


def method_of(name: str) -> Method:
    """The method of that name, and of the options that follow it after plus signs.

    Raises `InputError` that lists the methods, or the options, where there is none of that name.
    """
    name, on, axis = name.partition("+on_")
    if name in METHOD_NAMES:
        warn_of_old(f"the method {name!r}", repr(METHOD_NAMES[name]))
        name = METHOD_NAMES[name]
    base, *options = name.split("+")
    if base not in METHODS:
        raise InputError(f"no method {base!r}; there are {', '.join(METHODS)}")
    method = METHODS[base]
    kinds = tuple(option for option in options if option in method.kinds)
    pooled = ("pooled",) if method.has_forms and "pooled" in options else ()
    is_other = sorted(kinds + pooled) != sorted(options) or bool(on and not method.has_axis)
    if len(kinds) > 1 or is_other:
        allowed = " or ".join(f"{base}+{option}" for option in method.options) or f"{base} alone"
        raise InputError(f"no method {name + on + axis!r}; write {allowed}")
    function = method.function
    method = replace(
        method,
        name="+".join((base, *kinds, *pooled)),
        function=partial(function, kind=kinds[0]) if kinds and function else function,
        form="pooled" if pooled else "paired",
    )
    if not on:
        return method
    return method.on(None if axis == NORM else axis_method(axis).name)


def axis_method(name: str) -> Method:
    """The method of an axis that is given by name: one that is fitted from differences.

    Raises `InputError` for others.
    """
    chosen = method_of(name)
    if chosen.source != "differences":
        raise InputError(
            f"an axis by name is fitted from differences, and {name} is fitted from "
            f"{chosen.source}; fit it, and give the Directions as axis="
        )
    return chosen


@checked
def fit_directions(evidence: Evidence, *, method: str = "mean_diff", seed: Whole = 0) -> Directions:
    """A unit direction at every hook of `evidence`, the readouts included.

    The arithmetic is in float64, the result has the evidence's dtype. A direction fitted from
    differences is signed so that their mean projection is not negative, one from gradients so that
    the loss falls along it on average (when both sides are pushed apart; alike, for the pooled
    forms); the controls keep the sign they are drawn with.

    Args:
        evidence: What `collect_differences` gives, or `loss_gradients` for the methods fitted from
            gradients.
        method: One of `METHODS`, with its options after plus signs: `gradient_svd+pooled`. The
            axis is that of the gradients, and the result's method names it.
        seed: From 0 on; matters to `random` and `shuffled` alone.

    Raises:
        InputError: An unknown method or one that is fitted from something else or on another axis,
            a bad seed, or a hook at which nothing is left beyond rounding: differences that are
            zero, that cancel for `mean_diff`, that are all equal for `pca_centred`; a gradient that
            is zero.

    Examples:
        >>> sl.fit_directions(differences, method="pca")
        Directions(pca, 5 hooks, d_model 32, position -1)
    """
    chosen = method_of(method)
    source = "differences" if isinstance(evidence, Differences) else "gradients"
    function = chosen.function
    if function is None or chosen.source != source:
        raise InputError(
            f"{chosen.name} is fitted from {chosen.source}, and this is {source}; "
            f"{_ADVICE[chosen.source]}, or use fit(model, pairs, method={chosen.name!r})"
        )
    if isinstance(evidence, Differences) and chosen.name not in ("mean_diff", "random"):
        evidence.check_paired(f"{chosen.name} is")
    if isinstance(evidence, LossGradients):
        if "+on_" in method and chosen.axis != evidence.axis:
            raise InputError(
                f"{method} is on {chosen.axis or 'the norm'}, and these gradients are on "
                f"{evidence.axis or 'the norm'}; take loss_gradients(..., axis={chosen.axis!r})"
            )
        chosen = chosen.on(evidence.axis)
    vectors = []
    known: Activations | Gradients
    for index, hook_name in enumerate(evidence.all_hook_names):
        try:
            if isinstance(evidence, Differences):
                known, rows, rounding = _activations(evidence, index, hook_name, seed)
            else:
                known, rows, rounding = _gradients(evidence, index, chosen.form)
            unit = _unit(function(known), rounding)
        except InputError as error:
            raise InputError(f"{chosen.name} at {hook_name}: {error}") from error
        # A control must not know which side is which, as its sign would say.
        is_turned = not chosen.is_control and bool((rows @ unit).mean() < 0)
        vectors.append(-unit if is_turned else unit)
    return directions_of(evidence, vectors, method=chosen.name, seed=seed)


def directions_of(
    evidence: Evidence,
    vectors: Sequence[Float[Tensor, " d_model"]],
    *,
    method: str,
    seed: int,
) -> Directions:
    """Unit vectors at every hook of the evidence, readouts included, as `Directions` of it."""
    return Directions(
        hook_names=evidence.hook_names,
        readout_names=evidence.readout_names,
        vectors=torch.stack([*vectors]).to(evidence.positive.dtype),
        method=method,
        position=evidence.position,
        seed=seed,
        fingerprint=evidence.fingerprint,
        weight_processing=evidence.weight_processing,
        weights_fingerprint=evidence.weights_fingerprint,
        pair_hashes=evidence.pair_hashes,
    )


def frozen_axis(
    model: HookedModel,
    axis: Directions | str,
    hook_names: Sequence[str],
    *,
    unsteered: Callable[[], Differences],
    seed: int,
) -> Directions:
    """The axis on which a loss measures the separation at `hook_names`: directions, or fitted ones.

    Those of a name are what its method fits to the unsteered differences.
    """
    if isinstance(axis, str):
        return fit_directions(unsteered(), method=axis_method(axis).name, seed=seed)
    check_fitted_on(model, axis)
    missing = [name for name in dict.fromkeys(hook_names) if name not in axis]
    if missing:
        raise HookError(
            f"the axis has no direction at {', '.join(missing)}, where the separation is measured; "
            "fit it there too"
        )
    width = axis.vectors.shape[-1]
    if width != model.cfg.d_model:
        raise InputError(
            f"the axis has d_model {width} and the model {model.cfg.d_model}; fit it on this model"
        )
    return axis


@checked
def null_directions(
    differences: Differences, *, n: Draws, seed: Whole
) -> dict[str, list[Directions]]:
    """`n` random and `n` shuffled directions at every hook: what a claim is compared with.

    A shuffled one exchanges the labels of whole groups, the same at every hook. Their seeds are
    1000 times `seed + 1`, and counted up from there, so that they are not those of methods of the
    same name with a small seed.

    Args:
        differences: What they are drawn for.
        n: How many of each kind, 2 at least.
        seed: From 0 on.

    Returns:
        Kind (`random`, `shuffled`) -> directions.

    Raises:
        InputError: Fewer than two, or a shuffle in which the differences cancel.

    Examples:
        >>> nulls = sl.directions.null_directions(differences, n=3, seed=0)
        >>> {kind: len(drawn) for kind, drawn in nulls.items()}
        {'random': 3, 'shuffled': 3}
    """
    seeds = range(1000 * (seed + 1), 1000 * (seed + 1) + n)
    return {
        kind: [fit_directions(differences, method=kind, seed=s) for s in seeds]
        for kind in ("random", "shuffled")
    }


def null_vectors(
    differences: Differences, *, n: int, seed: int
) -> dict[str, Float[Tensor, "draw hook d_model"]]:
    """The vectors of `null_directions` at `hook_names`, thousands of them at once (float64, CPU).

    The first ones are those of fewer draws. A shuffle in which the differences cancel is 0.
    """
    values = differences.values.double().cpu()
    seeds = range(1000 * (seed + 1), 1000 * (seed + 1) + n)
    flips = torch.stack([coin_flips(differences.pair_groups, s) for s in seeds])
    d_model, wide = values.shape[-1], torch.float64
    drawn = [
        torch.stack(
            [torch.randn(d_model, generator=_generator(s, name), dtype=wide) for s in seeds]
        )
        for name in differences.hook_names
    ]
    vectors = {
        "random": torch.stack(drawn, dim=1),
        "shuffled": einsum(flips, values, "draw pair, hook pair d -> draw hook d"),
    }
    return {kind: torch.nn.functional.normalize(rows, dim=-1) for kind, rows in vectors.items()}


_ADVICE = {
    "differences": "give it collect_differences(model, pairs)",
    "gradients": "give it loss_gradients(model, pairs)",
    "training": "it has to run the model",
}


def _activations(
    differences: Differences, index: int, hook_name: str, seed: int
) -> tuple[Activations, Float[Tensor, "pair d_model"], float]:
    """What is known at one hook, the rows that fix the sign, and what counts as rounding."""
    positive, negative = differences.positive[index], differences.negative[index]
    sides = Activations(
        positive.double(),
        negative.double(),
        generator=_generator(seed, hook_name),
        flips=coin_flips(differences.pair_groups, seed).to(positive.device),
    )
    rounding = 8 * torch.finfo(positive.dtype).eps * float(positive.abs().max())
    if sides.differences.abs().max() <= rounding:
        raise InputError(
            "the two prompts have the same activation at position "
            f"{differences.position}, so there is no direction; choose a position after the "
            "prompts begin to differ"
        )
    return sides, sides.differences, rounding


def _gradients(
    gradients: LossGradients, index: int, form: Form
) -> tuple[Gradients, Float[Tensor, "row d_model"], float]:
    """As `_activations`, of the loss's gradients."""
    separation, coherence = gradients.separation_positive[index], gradients.coherence[index]
    negative = gradients.separation_negative[index].double()
    # The weighted sum of both terms in float64: one may be much longer than the other.
    positive = separation.double() + gradients.weights[index].double() * coherence.double()
    if not positive.any():
        raise InputError(
            "the gradient of the loss is zero; take a position with a label after it, a margin "
            "below 1 and a weight above 0"
        )
    if not (separation.any() or negative.any()):
        raise InputError(
            f"the two prompts have the same activation at position {gradients.position}, so "
            "nothing separates them there; choose a position after the prompts begin to differ"
        )
    rounding = 8 * torch.finfo(coherence.dtype).eps * float(positive.abs().max())
    known = Gradients.of(positive, negative, gradients.scores[index].double(), form=form)
    return known, known.rows, rounding


def _unit(vector: Float[Tensor, " d_model"], rounding: float) -> Float[Tensor, " d_model"]:
    if not vector.abs().max() > rounding:
        raise InputError(
            "nothing is left beyond rounding: the rows cancel, or are all equal and were centred; "
            "use pca, or pairs that agree more"
        )
    unit: Tensor = vector / vector.norm()
    return unit


def _generator(seed: int, hook_name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}:{hook_name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
