"""Resolve layers and glob patterns to hook names; put hooks on a model for a block."""

import difflib
import fnmatch
import operator
import re
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, SupportsIndex, TypeAlias

from steerlens.errors import HookError, told
from steerlens.models.hooked_model import HookedModel, hugging_face_model
from steerlens.validation import checked

Layers: TypeAlias = str | SupportsIndex | slice | Iterable[SupportsIndex | str | slice]
"""What names hooks: "all", "0,5,10", "10:20:2", a glob, an int, a slice, or a list of these."""

HookFunction: TypeAlias = Callable[..., Any]
"""`(activation, hook) -> activation | None`, as TransformerLens calls it."""

# Python refuses to read numbers of more than some thousand digits.
_NUMBER = r"-?\d{1,9}"
_SLICE = re.compile(rf"({_NUMBER})?:({_NUMBER})?(:({_NUMBER})?)?")
_HEAD = re.compile(r"(.*hook_z)\[(.*)\]")
_READOUT_DEPTH = 3

_TWO_THREADS = (
    "another thread has hooks on this model: their hooks would mix; wait for it to finish, or load "
    "a model for each thread"
)
_guard = threading.Lock()
_threads: "weakref.WeakKeyDictionary[Any, tuple[int, int]]" = weakref.WeakKeyDictionary()


def resid_post(layer: int) -> str:
    """The hook name of block `layer`'s output (before the final norm, at the last layer too)."""
    return f"blocks.{layer}.hook_resid_post"


def split_head(hook_name: str) -> tuple[str, int | None]:
    """The hook point in the model, and the head: None but of a name as `blocks.5.attn.hook_z[3]`.

    Examples:
        >>> from steerlens.models.hooks import split_head
        >>> split_head("blocks.5.attn.hook_z[3]"), split_head("blocks.5.hook_resid_post")
        (('blocks.5.attn.hook_z', 3), ('blocks.5.hook_resid_post', None))
    """
    match = _HEAD.fullmatch(hook_name)
    if match is None or not re.fullmatch(r"\d{1,9}", match[2]):
        return hook_name, None
    return match[1], int(match[2])


def is_head(hook_name: str) -> bool:
    """Whether a hook name is that of one head."""
    return split_head(hook_name)[1] is not None


def has_hook(model: HookedModel, hook_name: str) -> bool:
    """Whether the model has the hook point, and the head."""
    point, head = split_head(hook_name)
    return point in model.hook_dict and (head is None or head < int(model.cfg.n_heads))


def hook_width(model: HookedModel, hook_name: str) -> int:
    """The numbers that an activation has there: d_head at a head, d_model elsewhere."""
    return int(model.cfg.d_head if is_head(hook_name) else model.cfg.d_model)


def width_name(hook_names: Iterable[str]) -> str:
    """What the width at some hooks, all of them heads or none, is called."""
    return "d_head" if any(map(is_head, hook_names)) else "d_model"


def check_one_width(hook_names: Sequence[str]) -> None:
    """Raise `HookError` where some hooks are heads and others are not."""
    first = {is_head(name): name for name in reversed(hook_names)}
    if len(first) > 1:
        raise HookError(
            f"{first[True]} is a head, d_head wide, and {first[False]} is as wide as the residual "
            "stream: directions of two widths are not held together; take the heads by themselves"
        )


def at_head(
    hook_name: str, function: HookFunction, *, n_heads: int | None = None
) -> tuple[str, HookFunction]:
    """The hook point, and the function put to the head alone: `[prompt, token, d_head]`.

    What it returns takes the head's place in a new tensor. At other hooks it is as it was given.
    """
    point, head = split_head(hook_name)
    if head is None:
        return hook_name, function

    def on_head(activation: Any, hook: Any) -> Any:
        shape = tuple(activation.shape)
        if len(shape) != 4 or head >= shape[2] or shape[2] != (n_heads or shape[2]):
            raise HookError(
                f"{point} holds a tensor of shape {shape}; expected [prompt, token, head, d_head] "
                f"of {n_heads or 'at least ' + str(head + 1)} heads, so single heads of this model "
                "cannot be told apart there; take block outputs or attention outputs"
            )
        changed = function(activation[:, :, head], hook=hook)
        if changed is None:
            return None
        whole = activation.clone()
        whole[:, :, head] = changed
        return whole

    return point, on_head


def hook_layer(hook_name: str) -> int:
    """The block in a hook name, from 0. Raises `HookError` when the hook is not inside one."""
    match = re.match(r"blocks\.(\d+)\.", hook_name)
    if match is None:
        raise HookError(f"hook {hook_name!r} is not inside a block; expected blocks.N.something")
    return int(match.group(1))


@checked
def readout_hook(hook_name: str, n_layers: int) -> str:
    """`blocks.{max(L, n_layers - 3)}.hook_resid_post` for a hook in block L.

    A block's output is its last hook, so the readout never comes before the intervention.

    Args:
        hook_name: The hook that is intervened on.
        n_layers: How many blocks the model has.

    Raises:
        HookError: The hook is not inside a block, or no model has so many layers.

    Examples:
        >>> sl.models.readout_hook("blocks.12.hook_resid_post", 30)
        'blocks.27.hook_resid_post'
        >>> sl.models.readout_hook("blocks.28.hook_mlp_out", 30)
        'blocks.28.hook_resid_post'
    """
    if n_layers >= 2**63:
        raise HookError(f"no model has {told(n_layers)} layers")
    return resid_post(max(hook_layer(hook_name), n_layers - _READOUT_DEPTH))


@checked
def resolve_hooks(model: HookedModel, layers: Layers = "all") -> tuple[str, ...]:
    """Hook names of this model, in layer order and without repeats.

    Args:
        model: The model that has the hooks.
        layers: "all", "0,5,10", "10:20:2" (Python's slice: the end is not included), a hook name, a
            glob over hook names such as `blocks.*.attn.hook_out`, the part of a name after the
            block (`hook_mlp_out`: that hook of every block), a head (`blocks.5.attn.hook_z[3]`; of
            any such name or glob, `[*]` is every head), several of these joined by commas, an int,
            a slice, or a list of any of these. Numbers mean `blocks.N.hook_resid_post`; negative
            ones count from the end.

    Raises:
        HookError: A layer, head or slice bound does not exist, a hook is outside the blocks, or a
            name or glob matches nothing (the nearest names are told).

    Examples:
        >>> sl.resolve_hooks(model, "1:5:2")
        ('blocks.1.hook_resid_post', 'blocks.3.hook_resid_post')
        >>> sl.resolve_hooks(model, [-1, "blocks.4.hook_mlp_out"])
        ('blocks.4.hook_mlp_out', 'blocks.4.hook_resid_post')
        >>> sl.resolve_hooks(model, "blocks.3.attn.hook_z[*]")[-1]
        'blocks.3.attn.hook_z[3]'
    """
    names: list[str] = []
    for part in _parts(layers):
        names.extend(_resolve_part(model, part))
    if not names:
        raise HookError(f"layers={layers!r} names no hook; give at least one layer or hook name")
    order = {name: i for i, name in enumerate(model.hook_dict)}

    def place(name: str) -> tuple[int, int, int]:
        point, head = split_head(name)
        return hook_layer(name), order[point], head or 0

    return tuple(sorted(dict.fromkeys(names), key=place))


def _parts(layers: Layers) -> list[str | int | slice]:
    if isinstance(layers, str):
        return [part.strip() for part in layers.split(",") if part.strip()]
    if isinstance(layers, slice):
        return [layers]
    if isinstance(layers, SupportsIndex):  # numpy's whole numbers too
        return [operator.index(layers)]
    if not isinstance(layers, Iterable):
        raise HookError(f"layers are numbers, slices, names or lists of these, not {told(layers)}")
    return [part for layer in layers for part in _parts(layer)]


def _resolve_part(model: HookedModel, part: str | int | slice) -> Sequence[str]:
    n_layers = int(model.cfg.n_layers)
    if isinstance(part, str) and re.fullmatch(_NUMBER, part):
        part = int(part)
    if isinstance(part, str) and part == "all":
        part = slice(None)
    if isinstance(part, str) and _SLICE.fullmatch(part):
        part = slice(*(int(number) if number else None for number in part.split(":")))
    if isinstance(part, slice):
        return _resolve_slice(part, n_layers)
    if isinstance(part, int):
        if not -n_layers <= part < n_layers:
            raise HookError(
                f"layer {told(part)} does not exist: the model has {n_layers} layers, "
                f"0 to {n_layers - 1}"
            )
        return [resid_post(part % n_layers)]
    return _resolve_name(model, part)


def _resolve_slice(part: slice, n_layers: int) -> list[str]:
    if part.step == 0:
        raise HookError("a layer slice needs a step that is not 0")
    for bound in (part.start, part.stop):
        if bound is not None and not -n_layers <= bound <= n_layers:
            raise HookError(
                f"layer slice bound {told(bound)} is out of range: the model has {n_layers} "
                f"layers, 0 to {n_layers - 1}"
            )
    return [resid_post(layer) for layer in range(n_layers)[part]]


def _resolve_name(model: HookedModel, name: str) -> Sequence[str]:
    known = list(model.hook_dict)
    if name in model.hook_dict:
        return [name]
    heads = _HEAD.fullmatch(name)
    if heads is not None:
        points = _resolve_name(model, heads[1])
        return [f"{point}[{i}]" for point in points for i in _head_numbers(model, name, heads[2])]
    # The part after the block first: in a glob over whole names, * would cross into submodules.
    for prefix in (r"blocks\.\d+\.", ""):
        pattern = re.compile(prefix + fnmatch.translate(name))
        matches = [hook for hook in known if hook.startswith("blocks.") and pattern.match(hook)]
        if matches:
            return matches
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.3)
    raise HookError(
        f"no hook of this model matches {name!r}; the nearest are {', '.join(near) or 'none'}"
        f"{'; a head is written attn.hook_z[3]' if name.endswith(']') else ''}"
    )


def _head_numbers(model: HookedModel, name: str, given: str) -> Sequence[int]:
    n_heads = int(model.cfg.n_heads)
    if given == "*":
        return range(n_heads)
    if re.fullmatch(_NUMBER, given) and -n_heads <= int(given) < n_heads:
        return [int(given) % n_heads]
    raise HookError(
        f"there is no head {given!r} for {name!r}: the model has the heads hook_z[0] to "
        f"hook_z[{n_heads - 1}] in a block, and hook_z[*] is all of them"
    )


@contextmanager
def _one_thread(model: HookedModel) -> Iterator[None]:
    """This thread alone has hooks on the model inside the block; blocks of one thread may nest."""
    here = threading.get_ident()
    with _guard:
        thread, depth = _threads.get(model, (here, 0))
        if thread != here:
            raise HookError(_TWO_THREADS)
        _threads[model] = (here, depth + 1)
    try:
        yield
    finally:
        with _guard:
            _, depth = _threads.pop(model)
            if depth > 1:
                _threads[model] = (here, depth - 1)


def _check_settings(model: Any, fwd_hooks: Sequence[tuple[str, HookFunction]]) -> None:
    """A `HookedTransformer` checks settings where one hook is added, but not in `hooks`."""
    if hugging_face_model(model) is None and hasattr(model, "check_hooks_to_add"):
        for name, function in fwd_hooks:
            model.check_hooks_to_add(model.hook_dict[name], name, function)


def keeping(
    into: dict[str, Any],
    hook_names: Iterable[str],
    read: Callable[..., Any] = lambda values: values,
) -> list[tuple[str, HookFunction]]:
    """Hooks that keep, by hook name, what `read` gives of each activation: all of it by default."""

    def keep(name: str, activation: Any, hook: Any) -> None:  # noqa: ARG001 (as they are called)
        into[name] = read(activation)

    return [(name, partial(keep, name)) for name in hook_names]


@contextmanager
def hooked(model: HookedModel, fwd_hooks: Sequence[tuple[str, HookFunction]]) -> Iterator[None]:
    """Hooks on the model inside the block only; every one of them must have fired by its end.

    The hooks are removed after the block and after an exception inside it; hooks that were there
    before stay, and act first where they are at the same place.

    Args:
        model: The model, which one thread alone may hook and run at a time.
        fwd_hooks: Hook name and `(activation, hook=...) -> activation or None`; at the name of a
            head, of that head's activation alone.

    Raises:
        HookError: A name is unknown or needs a setting of the model first; another thread has hooks
            on the model or runs it inside the block; at the end, a hook did not fire (unless the
            block raised).
    """
    silent = {name for name, _ in fwd_hooks}
    here = threading.get_ident()

    def noting(name: str, function: HookFunction) -> HookFunction:
        def fire(activation: Any, hook: Any) -> Any:
            if threading.get_ident() != here:
                raise HookError(_TWO_THREADS)
            silent.discard(name)
            return function(activation, hook=hook)

        return fire

    n_heads = getattr(model.cfg, "n_heads", None)
    noted = [at_head(name, noting(name, call), n_heads=n_heads) for name, call in fwd_hooks]
    with ExitStack() as stack:
        if fwd_hooks:
            stack.enter_context(_one_thread(model))
        try:
            _check_settings(model, noted)
            stack.enter_context(model.hooks(fwd_hooks=noted))
        except (KeyError, ValueError, AssertionError) as error:
            raise HookError(f"cannot hook this model: {error.args[0]}") from error
        yield
    if silent:
        raise HookError(
            f"the hooks {', '.join(sorted(silent))} did not fire; choose hooks in a part of the "
            "model that this run passes through"
        )
