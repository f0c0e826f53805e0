"""Spellings of version 0.1, which work for one version more, with a `DeprecationWarning`."""

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from steerlens.errors import HookError

P = ParamSpec("P")
R = TypeVar("R")

METHOD_NAMES = {
    "gradient_mean_pooled": "gradient_mean+pooled",
    "gradient_svd_pooled": "gradient_svd+pooled",
    "gradient_fisher_pooled": "gradient_fisher+pooled",
    "gradient_fisher_centred": "gradient_fisher+centred",
    "gradient_fisher_centred_pooled": "gradient_fisher+centred+pooled",
    "gradient_fisher_norm_weighted": "gradient_fisher+norm_weighted",
    "gradient_fisher_norm_weighted_pooled": "gradient_fisher+norm_weighted+pooled",
}
"""Old method name -> how it is written now."""


def warn_of_old(old: str, new: str) -> None:
    """Say how `old` is written now."""
    warnings.warn(f"{old} is deprecated; use {new}", DeprecationWarning, stacklevel=4)


def with_old_gradient_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """`loss_gradients` that still takes `per_layer` and `weight`."""

    @wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        if "per_layer" in keywords:
            warn_of_old("per_layer=True", 'loss_hook="own"')
            if keywords.pop("per_layer"):
                if keywords.get("loss_hook") is not None:
                    raise HookError("give a loss_hook or per_layer, not both")
                keywords["loss_hook"] = "own"
        if "weight" not in keywords:
            return function(*args, **keywords)
        warn_of_old("weight=", ".with_weight()")
        weight = keywords.pop("weight")
        gradients: Any = function(*args, **keywords)
        return gradients.with_weight(weight)

    return call


def with_grouped(
    name: str, group: Callable[..., Any], fields: frozenset[str]
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: keywords that are `fields` of `group` are still taken, and given as `name`."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: Any, **keywords: Any) -> R:
            old = {key: keywords.pop(key) for key in fields & keywords.keys()}
            if old:
                spelled = ", ".join(f"{key}={value!r}" for key, value in old.items())
                warn_of_old(spelled, f"{name}={group.__name__}({spelled})")
                keywords[name] = group(**old)
            return function(*args, **keywords)

        return call

    return decorate
