"""No call changes what is not its own: global state, the model, the tokenizer."""

import inspect
import logging
import os
import random
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
import pytest
import torch
from model_calls import BAD, CALLS, CANNOT_FAIL, EXCEPTIONS, HOOK, made
from surprises import Broken, Interrupted, changes, counting, snapshot, unusual, watched
from transformers.utils import logging as hf_logging

import steerlens as sl
from steerlens import circuits, plots, steering


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    return made(tmp_path_factory.mktemp("outputs"))


def takes_model(thing: Any) -> bool:
    try:
        return "model" in inspect.signature(thing).parameters
    except ValueError:  # a method of a built-in class
        return False


def public() -> set[str]:
    """Public functions and methods of public classes that have a parameter `model`."""
    found = set()
    for room in (sl, circuits, steering, plots, sl.measure, sl.engine, sl.directions, sl.export):
        for name in room.__all__:
            thing = getattr(room, name)
            if inspect.isclass(thing):
                found |= {
                    f"{name}.{method}"
                    for method, function in inspect.getmembers(thing, callable)
                    if not method.startswith("_")
                    and inspect.isroutine(function)
                    and not isinstance(function, type)
                    and takes_model(function)
                }
            elif inspect.isroutine(thing) and takes_model(thing):
                found.add(name)
    return found


def test_every_public_function_with_a_model_is_in_the_table() -> None:
    assert public() == set(CALLS) | set(EXCEPTIONS)
    assert not set(CALLS) & set(EXCEPTIONS)
    assert set(BAD) <= set(CALLS)
    # The search sees functions and methods, and leaves those without a model alone.
    assert {"sweep", "SteeringVector.load", "find_readers"} <= public()
    assert not public() & {"load_model", "fit_directions", "SteeringVector.save"}


def changed(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Without the one that beartype moves: it draws which items of a sequence to check."""
    return [name for name in changes(before, after) if name != "python rng"]


LOOKING = ("behaviour", "compare", "generate_texts", "generation_table")


@pytest.mark.parametrize("name", CALLS)
def test_state_is_as_before(given: SimpleNamespace, tmp_path: Path, name: str) -> None:
    """After a call in a state that is not the usual one, and after calls that are broken off.

    They are half way through (as by Ctrl-C), in the last forward pass, or given bad input.
    """
    model, call = given.model, CALLS[name]
    if name in LOOKING:  # Once a model, at what may run in its place and how it writes.
        call(given)
    with unusual(model):
        before = snapshot(model)
        with counting(model) as calls, watched(given.folder, tmp_path) as seen:
            call(given)
        assert changed(before, snapshot(model)) == []
        assert seen == []
    before = snapshot(model)
    n_calls = calls[0]
    for stop_at, kind in {n_calls // 2 + 1: Interrupted, n_calls: Broken}.items():
        if n_calls:
            with counting(model, stop_at, kind), pytest.raises(kind):
                call(given)
            assert changed(before, snapshot(model)) == []
    if name in BAD:
        with pytest.raises(sl.SteerlensError):
            BAD[name](given)
        assert changed(before, snapshot(model)) == []
    assert n_calls or name in BAD or name in CANNOT_FAIL


# What the snapshot sees


def swapped(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Iterator[None]:
    was = read()
    write(value)
    yield
    write(was)


def attribute(of: Any, name: str, value: Any) -> Iterator[None]:
    return swapped(lambda: getattr(of, name), lambda v: setattr(of, name, v), value)


def entry(of: Any, key: Any, value: Any) -> Iterator[None]:
    had, was = key in of, of.get(key)
    of[key] = value
    yield
    of.pop(key)
    if had:
        of[key] = was


def drawn(get: Callable[[], Any], put: Callable[[Any], Any], draw: Any) -> Iterator[None]:
    was = get()
    draw()
    yield
    put(was)


def changed_weight(weight: torch.Tensor) -> Iterator[None]:
    was = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[0] += 1e-3
    yield
    with torch.no_grad():
        weight.copy_(was)


def hooked(model: Any) -> Iterator[None]:
    handle = model.blocks[1].register_forward_hook(lambda *args: None)
    yield
    handle.remove()


def hooked_point(model: Any) -> Iterator[None]:
    model.add_hook(HOOK, lambda activation, hook: None)
    yield
    model.reset_hooks()


def dark_charts() -> Iterator[None]:
    return swapped(lambda: alt.theme.active, alt.theme.enable, "dark")


def given_grad(weight: Any) -> Iterator[None]:
    weight.grad = torch.zeros_like(weight)
    yield
    weight.grad = None


def filtered() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="left behind")
        yield


NARROW = {"linewidth": 9}


def logs_more() -> Iterator[None]:
    return swapped(hf_logging.get_verbosity, hf_logging.set_verbosity, hf_logging.CRITICAL)


BREAKERS: list[tuple[str, Callable[[Any], Iterator[None]]]] = [
    (
        "default dtype",
        lambda m: swapped(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    ),
    ("default device", lambda m: swapped(lambda: None, torch.set_default_device, "meta")),
    ("threads", lambda m: swapped(torch.get_num_threads, torch.set_num_threads, 3)),
    (
        "matmul precision",
        lambda m: swapped(
            torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "high"
        ),
    ),
    ("deterministic", lambda m: swapped(lambda: False, torch.use_deterministic_algorithms, True)),
    ("grad mode", lambda m: swapped(torch.is_grad_enabled, torch.set_grad_enabled, False)),
    ("torch rng", lambda m: drawn(torch.get_rng_state, torch.set_rng_state, lambda: torch.rand(1))),
    ("numpy rng", lambda m: drawn(np.random.get_state, np.random.set_state, np.random.random)),
    ("python rng", lambda m: drawn(random.getstate, random.setstate, random.random)),
    ("numpy errors", lambda m: swapped(np.geterr, lambda v: np.seterr(**v), {"over": "raise"})),
    (
        "print options",
        lambda m: swapped(np.get_printoptions, lambda v: np.set_printoptions(**v), NARROW),
    ),
    ("pandas options", lambda m: attribute(pd.options.display, "max_rows", 3)),
    ("warnings", lambda m: filtered()),
    ("logging", lambda m: swapped(lambda: logging.root.level, logging.root.setLevel, 3)),
    ("transformers", lambda m: logs_more()),
    ("altair", lambda m: dark_charts()),
    ("environment", lambda m: entry(os.environ, "LEFT_BEHIND", "1")),
    ("cwd", lambda m: swapped(os.getcwd, os.chdir, "/")),
    ("sys.path", lambda m: attribute(sys, "path", [*sys.path, "/left"])),
    ("streams", lambda m: attribute(sys, "stdout", sys.__stderr__)),
    (
        "signals",
        lambda m: swapped(
            lambda: signal.getsignal(signal.SIGINT),
            lambda v: signal.signal(signal.SIGINT, v),
            signal.SIG_DFL,  # a process in the background ignores it already
        ),
    ),
    ("modes", lambda m: attribute(m.original_model.get_submodule("model"), "training", True)),
    ("requires_grad", lambda m: attribute(next(m.parameters()), "requires_grad", False)),
    ("grads", lambda m: given_grad(next(m.original_model.parameters()))),
    ("weights", lambda m: changed_weight(next(m.original_model.parameters()))),
    ("hooks", hooked),
    ("hooks", hooked_point),
    ("forwards", lambda m: entry(vars(m.blocks[1]), "forward", print)),
    ("config", lambda m: attribute(m.original_model.config, "use_cache", False)),
    ("tokenizer", lambda m: attribute(m.tokenizer, "padding_side", "left")),
    ("tokenizer", lambda m: attribute(m.tokenizer, "truncation_side", "left")),
    ("tokenizer", lambda m: attribute(m.tokenizer, "pad_token", "</s>")),
    ("vocabulary", lambda m: attribute(m.tokenizer, "chat_template", "left")),
]


@pytest.mark.parametrize(
    ("name", "breaker"), [pytest.param(*b, id=f"{b[0]} {i}") for i, b in enumerate(BREAKERS)]
)
def test_the_snapshot_sees_every_change(given: SimpleNamespace, name: str, breaker: Any) -> None:
    before = snapshot(given.model)
    for _ in breaker(given.model):
        after = snapshot(given.model)
    assert changes(before, after) == [name]
    assert changes(before, snapshot(given.model)) == []


def test_everything_in_the_snapshot_has_been_broken(given: SimpleNamespace) -> None:
    assert {name for name, _ in BREAKERS} == set(snapshot(given.model))


def test_an_unusual_state_is_one_and_is_undone(given: SimpleNamespace) -> None:
    before = snapshot(given.model)
    with unusual(given.model):
        inside = snapshot(given.model)
    assert {"modes", "requires_grad", "grad mode", "tokenizer"} <= set(changes(before, inside))
    assert changes(before, snapshot(given.model)) == []


def test_errors_inside_the_model_are_not_taken_for_others(given: SimpleNamespace) -> None:
    with counting(given.model, 1, Interrupted), pytest.raises(Interrupted, match="call 1"):
        CALLS["sweep"](given)
    with counting(given.model, 1, Broken), pytest.raises(Broken, match="call 1"):
        CALLS["sweep"](given)
