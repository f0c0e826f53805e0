"""What a caller gives, held against the annotations of what is called, and refused in words.

`checked` decorates public functions and classes; inside the package values are trusted. A range is
part of an annotation: `seed: Whole`, `batch_size: Count | None`.
"""

import functools
import inspect
import math
import sys
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import (
    Annotated,
    Any,
    Literal,
    TypeAlias,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
import torch
from jaxtyping import jaxtyped

from steerlens.errors import InputError, told

Decorated = TypeVar("Decorated", bound=Callable[..., Any])
Whole: TypeAlias = Annotated[int, "a whole number of 0 or more", 0]
Count: TypeAlias = Annotated[int, "a whole number of 1 or more", 1]
Draws: TypeAlias = Annotated[int, "a whole number of 2 or more", 2]
"""Of resamples, splits or nulls, whose spread is looked at."""
Angles: TypeAlias = Annotated[int, "a whole number of 3 or more", 3]
NotNegative: TypeAlias = Annotated[float | int, "a finite number of 0 or more", 0]
Positive: TypeAlias = Annotated[float | int, "a finite number above 0", math.ulp(0.0)]

_LARGEST: dict[Any, float] = {int: 2**63 - 1, float: sys.float_info.max}
_UNIONS = (Union, types.UnionType)
_LISTS = (list, tuple, Sequence, Iterable, Mapping)
_WORDS = {
    **{"int": "a whole number", "float": "a finite number", "str": "text", "NoneType": "None"},
    **{"SupportsIndex": "a whole number", "Sequence": "a list", "Iterable": "a list"},
    **{"Mapping": "a mapping", "bool": "True or False"},
    "HookedModel": "a model of TransformerLens, as load_model gives",
    "ContrastivePairs": "ContrastivePairs, as their from_lists and load give",
    "PreferenceItems": "PreferenceItems, as their load gives",
    "Directions": "Directions, as fit gives",
    "Differences": "Differences, as collect_differences gives",
    "LossGradients": "LossGradients, as loss_gradients gives",
    "SteeringVector": "a SteeringVector, as its from_directions gives",
}


def checked(thing: Decorated) -> Decorated:
    """A public function, or a class's constructor and public methods, that checks its arguments.

    Raises `InputError` where an argument is not what its annotation says (a bool is no number, and
    numbers are finite; tensors agree in the dimensions that they share, and are not empty), or
    where PyTorch's default device holds no numbers. What numpy or PyTorch hold in the place of
    numbers and lists arrives as Python's.
    """
    if not inspect.isclass(thing):
        return _checked_function(thing)  # type: ignore[return-value]
    edge = ("__init__", "__new__", "__add__", "__sub__", "__mul__", "__rmul__")
    for name, member in list(vars(thing).items()):
        function = getattr(member, "__func__", member)
        if inspect.isfunction(function) and (name in edge or not name.startswith("_")):
            call = _checked_function(function)
            setattr(thing, name, call if member is function else type(member)(call))
    return thing


def _checked_function(function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)
    called, _, is_constructor = function.__qualname__.partition(".__")

    @functools.cache
    def hints() -> dict[str, Any]:
        known = get_type_hints(inspect.unwrap(function), include_extras=True)
        return {
            n: known[n] for n, p in signature.parameters.items() if n in known and str(p)[0] != "*"
        }

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        if torch.get_default_device().type == "meta":
            cure = 'leave torch.device("meta"), or torch.set_default_device("cpu")'
            raise InputError(f'{called}: the default device "meta" holds no numbers; {cure}')
        with jaxtyped("context"):  # dimensions of one name are the same in all arguments
            for name in [name for name in hints() if name in given.arguments]:
                value, hint = given.arguments[name], hints()[name]
                misfit = _misfit(name, value, hint)
                if misfit and _misfit(name, value := _plain(value), hint):
                    raise InputError(f"{called}: {_told(*misfit)}")
                if isinstance(value, torch.Tensor) and not (value.numel() or is_constructor):
                    raise InputError(f"{called}: {name}: expected numbers, got {told(value)}")
                given.arguments[name] = value
        return function(*given.args, **given.kwargs)

    return call


def _misfit(name: str, value: Any, hint: Any) -> tuple[str, Any, Any] | None:
    """Name, value and annotation of the first thing that does not fit; None where all does."""
    origin, args, here = get_origin(hint) or hint, get_args(hint), (name, value, hint)
    if origin in _UNIONS:
        of_each = [_misfit(name, value, arg) for arg in args]
        deeper = [misfit for misfit in of_each if misfit and misfit[0] != name]
        return None if None in of_each else (*deeper, here)[0]
    if origin is Annotated:
        return here if _misfit(name, value, args[0]) or value < args[2] else None
    if origin is Literal:
        return None if isinstance(value, str) and value in args else here
    if origin in (Any, object) or not isinstance(origin, type):
        return None  # a type variable is no type
    allowed = {float: (int, float), tuple: (list, tuple)}.get(origin, origin)
    is_instance = isinstance(value, allowed)
    if not is_instance:
        return here
    if isinstance(value, bool) or origin not in (*_LARGEST, *_LISTS):
        return here if isinstance(value, bool) and origin is not bool else None
    if origin in _LARGEST:
        return None if abs(value) <= _LARGEST[origin] else here  # NaN is not
    if isinstance(value, (str, bytes)) or isinstance(value, Mapping) != (origin is Mapping):
        return here
    if not isinstance(value, (Sequence, Mapping)) or not args:
        return None  # an iterator is read once, by whom it is for
    if args[0] is int and set(map(type, value)) == {int}:  # ids of tokens, of which there are many
        return None if max(map(abs, value)) <= _LARGEST[int] else here
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    for label, item in items:
        misfit = _misfit(name, item, args[origin is Mapping])
        if misfit is not None:  # named only here: naming each item takes longer than the check
            return (f"{name}[{told(label)}]{misfit[0].removeprefix(name)}", *misfit[1:])
    return None


def _plain(value: Any) -> Any:
    """Numbers and lists as Python's where numpy or PyTorch hold them."""
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    is_array = isinstance(value, (np.generic, np.ndarray, torch.Tensor))
    return value.tolist() if is_array and not getattr(value, "is_meta", False) else value


def _told(name: str, value: Any, hint: Any) -> str:
    cure = "; torch.from_numpy makes a tensor of it" if isinstance(value, np.ndarray) else ""
    return f"{name}: expected {_words(hint)}, got {told(value)} ({type(value).__name__}){cure}"


def _words(hint: Any) -> str:
    origin, args = get_origin(hint) or hint, get_args(hint)
    if origin in _UNIONS:
        return " or ".join(_words(arg) for arg in args if not (arg is int and float in args))
    if origin is Annotated or origin is Literal:
        return str(args[1]) if origin is Annotated else " or ".join(map(repr, args))
    name = getattr(origin, "__name__", str(hint))
    return _WORDS.get(name, name)
