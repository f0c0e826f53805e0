"""The frozen axis on which the loss's separation is measured, in place of the norm."""

from collections.abc import Callable, Sequence

from steerlens.directions.differences import Differences
from steerlens.directions.directions import Directions
from steerlens.directions.methods import axis_method, fit_directions
from steerlens.errors import HookError, InputError
from steerlens.models.hooked_model import HookedModel
from steerlens.models.identity import check_fitted_on


def frozen_axis(
    model: HookedModel,
    axis: Directions | str,
    hook_names: Sequence[str],
    *,
    unsteered: Callable[[], Differences],
    seed: int,
) -> Directions:
    """The directions themselves, or those that a method fits to the unsteered differences.

    `hook_names` are where the separation is measured.
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
