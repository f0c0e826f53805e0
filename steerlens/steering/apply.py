"""A vector at work: its steps as hooks, and the context manager that puts them on a model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from steerlens.engine.positions import markers_of, parse_steered
from steerlens.engine.workload import LARGEST_PUSH
from steerlens.errors import InputError
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import HookFunction, at_head, hooked
from steerlens.models.weight_processing import check_processing
from steerlens.steering.cache_positions import (
    POSITION_NAMES,
    Positions,
    Watch,
    check_positions,
    warning_of_padding,
    watch,
)
from steerlens.steering.coefficients import Calibration, Coefficient, parse_coefficient, step_sizes
from steerlens.steering.conditions import Condition, Gate
from steerlens.steering.operators import Add, Operator
from steerlens.validation import checked


@runtime_checkable
class Steerable(Protocol):
    """What applying asks of a steering vector."""

    hook_names: tuple[str, ...]
    directions: Any
    scale: Any
    calibration: Calibration
    operator: Operator
    condition: Condition | None


@dataclass(frozen=True, eq=False)
class Step:
    """What is done at one hook: `operator(activation, direction, amount)`."""

    hook_name: str
    operator: Operator
    direction: Float[Tensor, " d_model"]
    amount: float

    def hook(self, chosen: Any = None) -> HookFunction:
        """A forward hook, out of place; `chosen(activation, hook)` is a mask of tokens."""

        def act(activation: Tensor, hook: Any) -> Tensor:
            if self.direction.shape != activation.shape[-1:]:
                raise InputError(
                    f"the direction at {self.hook_name} has {len(self.direction)} numbers, the "
                    f"activation there {activation.shape[-1]}"
                )
            # First, as it says best what is wrong with an activation that is no row a token.
            mask = None if chosen is None else chosen(activation, hook).to(activation.device)
            amount = self.amount if abs(self.amount) <= LARGEST_PUSH else torch.nan
            moved = self.operator(activation, self.direction, amount)
            return moved if mask is None else torch.where(mask[..., None], moved, activation)

        return act


@checked
def steps(vector: Steerable | Mapping[str, Tensor], coefficient: Coefficient) -> tuple[Step, ...]:
    """What a vector does at each of its hooks; nothing at coefficient 0.

    Args:
        vector: a `SteeringVector`, or plain directions by hook name, which are added as they are.
        coefficient: as in `Coefficient`; for plain directions a number, in residual units.

    Raises:
        InputError: the coefficient has no meaning for the vector or its operator (norms and shares
            of the boundary are for `Add`), or a plain direction is not one row of finite numbers.
    """
    parsed = parse_coefficient(coefficient)
    if parsed.number == 0:
        return ()
    if not isinstance(vector, Steerable):
        if parsed.unit != "residual":
            raise InputError(
                f"{coefficient!r} needs a SteeringVector, which knows its norms and boundary; "
                "plain directions take a coefficient in residual units"
            )
        return _additions(vector, parsed.number)
    operator = vector.operator
    if isinstance(operator, Add):
        sizes = step_sizes(coefficient, vector.hook_names, vector.scale, vector.calibration)
    elif parsed.unit != "residual":
        raise InputError(
            f"{coefficient!r} is a strength of add; {operator.name} takes a plain number"
        )
    else:
        sizes = (parsed.number,) * len(vector.hook_names)
    for size in sizes:
        operator.check(size)
        # A sweep may try such a cell, and says that it overflows; a vector in use may not.
        if abs(size) > LARGEST_PUSH:
            raise InputError(
                f"expected a step of at most {LARGEST_PUSH:.3g}, got {size:.3g}: the model's norms "
                "overflow beyond"
            )
    rows = zip(vector.hook_names, vector.directions, sizes, strict=True)
    return tuple(Step(name, operator, direction, size) for name, direction, size in rows if size)


def _additions(directions: Mapping[str, Tensor], amount: float) -> tuple[Step, ...]:
    for name, row in directions.items():
        if row.ndim != 1 or not bool(row.isfinite().all()):
            raise InputError(
                f"expected one row of finite numbers at {name}, got shape {tuple(row.shape)}"
            )
    return tuple(Step(name, Add(), row, amount) for name, row in directions.items())


def step_hooks(
    acts: Sequence[Step],
    condition: Condition | None = None,
    *,
    mask: Bool[Tensor, "prompt token"] | None = None,
) -> list[tuple[str, HookFunction]]:
    """Hooks of steps on every token, or those of `mask`.

    Raises `InputError` on a condition with scope "prompt": which tokens are the prompt's is not
    known here (see `steer`).
    """
    if acts and condition is not None and condition.scope == "prompt":
        raise InputError(
            "a condition on the prompt must know which tokens are the prompt's: use `with "
            "steer(model, vector, coefficient):`"
        )
    hooks = _gated(acts, condition, None, None if mask is None else _exactly(mask))
    return [at_head(*hook) for hook in hooks]


@checked
@contextmanager
def steer(
    model: HookedModel,
    vector: Steerable | Mapping[str, Tensor],
    coefficient: Coefficient,
    *,
    positions: Positions = "all",
) -> Iterator[None]:
    """Steer inside the block; the hooks are gone after it, also after an exception.

    Blocks may be nested and repeated: at one hook the outer vector acts first. A thread that runs
    the model while it is steered here gets a `HookError` itself. Prompts padded on the right that
    are given to `generate` inside the block are warned of.

    Args:
        model: any `HookedModel`.
        vector: a `SteeringVector`, or plain directions by hook name, to be added.
        coefficient: how strongly, as in `Coefficient`; 0 is the identity.
        positions: which tokens (see `Positions`), by default all, prompt and generated alike; the
            same ones with a KV cache and without, and with padding on either side.

    Raises:
        InputError: the coefficient has no meaning for the vector, the positions are unknown, the
            tokenizer cannot write the markers of thinking, or the vector was fitted on a model with
            other weight processing; inside the block: a mask does not have the prompts' shape, a KV
            cache comes from before it, thinking cannot be followed as a pass shows no token ids, or
            the condition is read too late.
        HookError: a hook did not fire, or another thread has hooks on the model.

    Examples:
        >>> plain = model("the river was")
        >>> with sl.steer(model, vector, 4):
        ...     steered = model("the river was")
        >>> torch.equal(steered, plain), torch.equal(model("the river was"), plain)
        (False, True)
    """
    check_positions(positions)
    check_processing(model, vector)
    acts = steps(vector, coefficient)
    condition = getattr(vector, "condition", None)
    is_everywhere = isinstance(positions, str) and positions == "all"
    with ExitStack() as stack:
        passes, chosen = None, None
        if acts and (not is_everywhere or (condition is not None and condition.scope == "prompt")):
            passes = stack.enter_context(watch(model))
            if not is_everywhere:
                chosen = _at_positions(model, passes, positions)
        if acts:
            stack.enter_context(warning_of_padding(model))
        stack.enter_context(hooked(model, _gated(acts, condition, passes, chosen)))
        yield


def _exactly(mask: Tensor) -> Any:
    def chosen(activation: Tensor, hook: Any) -> Tensor:
        if activation.ndim != 3 or activation.shape[:2] != mask.shape:
            raise InputError(
                f"the mask has shape {tuple(mask.shape)}, but this pass has "
                f"{tuple(activation.shape)[:-1]} (prompts, tokens) at {getattr(hook, 'name', '')}; "
                "while generating use `with steer(model, vector, coefficient, positions=mask):`"
            )
        return mask

    return chosen


def _at_positions(model: HookedModel, passes: Watch, positions: Positions) -> Any:
    names = parse_steered(positions, POSITION_NAMES) if isinstance(positions, str) else ()
    thinks = any(term.name in ("think", "answer") for term in names)
    markers = markers_of(model.tokenizer) if thinks else None
    return lambda activation, hook: passes.now(activation, hook).mask(positions, markers)


def _gated(
    acts: Sequence[Step], condition: Condition | None, passes: Watch | None, chosen: Any
) -> list[tuple[str, HookFunction]]:
    """The steps' hooks; with a condition, behind the one that reads it."""
    if not acts or condition is None:
        return [(act.hook_name, act.hook(chosen)) for act in acts]
    gate = Gate(condition, frozenset(act.hook_name for act in acts))

    def read(activation: Tensor, hook: Any) -> None:
        gate.read(activation, None if passes is None else passes.now(activation, hook))

    def behind_gate(name: str) -> Any:
        def both(activation: Tensor, hook: Any) -> Tensor:
            mask = gate.take(name).expand(activation.shape[:2])
            return mask if chosen is None else mask & chosen(activation, hook).to(mask.device)

        return both

    return [
        (condition.hook_name, read),
        *((act.hook_name, act.hook(behind_gate(act.hook_name))) for act in acts),
    ]
