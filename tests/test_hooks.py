"""Hooks: what names them, and that a block leaves none behind."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ATTN_OUT, needs_bridge
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steerlens import resolve_hooks
from steerlens.errors import HookError
from steerlens.models.hooks import hook_layer, hooked, readout_hook, resid_post

N_LAYERS = 5  # of the `llama` fixture
TOKENS = torch.tensor([[1, 4, 6, 9], [1, 7, 5, 8]])
FIRST, LAST = resid_post(0), resid_post(N_LAYERS - 1)


def blocks(*layers: int, name: str = "hook_resid_post") -> tuple[str, ...]:
    return tuple(f"blocks.{layer}.{name}" for layer in layers)


# Names


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ("all", blocks(0, 1, 2, 3, 4)),
        ("0,2", blocks(0, 2)),
        (" 0, 2 ,", blocks(0, 2)),
        ("-1", blocks(4)),
        ("-5", blocks(0)),
        ("1:5:2", blocks(1, 3)),
        ("-2:", blocks(3, 4)),
        (":-3", blocks(0, 1)),
        ("-4:-1:2", blocks(1, 3)),
        (":", blocks(0, 1, 2, 3, 4)),
        ("3:5,0", blocks(0, 3, 4)),
        (3, blocks(3)),
        (-1, blocks(4)),
        (slice(1, 5, 2), blocks(1, 3)),
        (slice(-2, None), blocks(3, 4)),
        ([0, 2], blocks(0, 2)),
        ([slice(1, 3)], blocks(1, 2)),
        (range(3), blocks(0, 1, 2)),
        (["1", -1, blocks(0)[0]], blocks(0, 1, 4)),
        ("blocks.2.hook_mlp_out", blocks(2, name="hook_mlp_out")),
        ("blocks.*.hook_mlp_out", blocks(0, 1, 2, 3, 4, name="hook_mlp_out")),
        ("blocks.[13].hook_resid_p*t", blocks(1, 3)),
        ("blocks.?.attn.hook_z", blocks(0, 1, 2, 3, 4, name="attn.hook_z")),
        ("hook_mlp_out", blocks(0, 1, 2, 3, 4, name="hook_mlp_out")),
        ("attn.hook_z", blocks(0, 1, 2, 3, 4, name="attn.hook_z")),
        ("blocks.2.attn.hook_z[3]", blocks(2, name="attn.hook_z[3]")),
        ("attn.hook_z[-4]", blocks(0, 1, 2, 3, 4, name="attn.hook_z[0]")),
        (
            ["blocks.[13].attn.hook_z[*]", "blocks.1.attn.hook_z[2]"],
            tuple(f"blocks.{layer}.attn.hook_z[{head}]" for layer in (1, 3) for head in range(4)),
        ),
        # The name after the block, so not `attn.hook_out`, `mlp.hook_out` and so on.
        pytest.param("hook_out", blocks(0, 1, 2, 3, 4, name="hook_out"), marks=needs_bridge),
    ],
)
def test_what_names_which_hooks(llama: Any, layers: Any, expected: tuple[str, ...]) -> None:
    assert resolve_hooks(llama, layers) == expected


def test_all_is_the_default_and_counts_the_models_own_layers(tiny: Any) -> None:
    assert resolve_hooks(tiny) == blocks(*range(tiny.cfg.n_layers))


@pytest.mark.parametrize(
    "layers", ["0,0,0", "0:1,0", [0, "0", -5, FIRST], "blocks.0.hook_resid_post,0"]
)
def test_a_hook_named_twice_comes_once(llama: Any, layers: Any) -> None:
    assert resolve_hooks(llama, layers) == (FIRST,)


def test_hooks_come_in_layer_order_whatever_the_order_asked(llama: Any) -> None:
    mixed = resolve_hooks(llama, ["3", "hook_mlp_out", 0, "blocks.1.attn.hook_z"])
    assert [hook_layer(name) for name in mixed] == [0, 0, 1, 1, 2, 3, 3, 4]
    assert mixed == resolve_hooks(llama, ["blocks.1.attn.hook_z", 0, "hook_mlp_out", "3"])


bounds = st.none() | st.integers(-N_LAYERS, N_LAYERS)
steps = st.none() | st.integers(-N_LAYERS, N_LAYERS).filter(bool)


@settings(max_examples=60, deadline=None)
@given(start=bounds, stop=bounds, step=steps)
def test_a_slice_and_its_text_mean_what_they_mean_in_python(
    llama: Any, start: int | None, stop: int | None, step: int | None
) -> None:
    asked = slice(start, stop, step)
    text = ":".join("" if part is None else str(part) for part in (start, stop, step))
    expected = blocks(*sorted(range(N_LAYERS)[asked]))
    for layers in (asked, text):
        with nullcontext() if expected else pytest.raises(HookError, match="names no hook"):
            assert resolve_hooks(llama, layers) == expected


@pytest.mark.parametrize(
    ("layers", "repaired", "reason"),
    [
        ("5", "4", "layer 5 does not exist: the model has 5 layers, 0 to 4"),
        ("-6", "-5", "layer -6 does not exist"),
        (5, 4, "layer 5 does not exist"),
        ([0, 7], [0, 3], "layer 7 does not exist"),
        ("0,99", "0,1", "layer 99 does not exist"),
        ("2:6", "2:5", "bound 6 is out of range: the model has 5 layers"),
        ("-6:", "-5:", "bound -6 is out of range"),
        (slice(0, 9), slice(0, 5), "bound 9 is out of range"),
        ("::0", "::1", "step that is not 0"),
        (slice(None, None, 0), slice(None), "step that is not 0"),
        ("3:1", "1:3", "names no hook"),
        ("", "0", "names no hook"),
        (" , ", "0,1", "names no hook"),
        ([], [0], "names no hook"),
        # A sign without a number.
        ("-:3", "-5:3", "-:3"),
        ("1:-", "1:-1", "1:-"),
        ("1:2:3:4", "1:2:3", "no hook of this model matches '1:2:3:4'"),
        ("ALL", "all", "no hook of this model matches 'ALL'"),
        ("hook_embed", "hook_resid_pre", "'hook_embed' is not inside a block"),
        ("blocks.9.hook_mlp_out", "blocks.4.hook_mlp_out", "matches 'blocks.9.hook_mlp_out'"),
        ("blocks.[78].*", "blocks.[34].hook_resid_post", "matches 'blocks.[78].*'"),
        ("attn.hook_z[4]", "attn.hook_z[3]", "no head '4' for 'attn.hook_z[4]'"),
        ("attn.hook_z[-5]", "attn.hook_z[-4]", "the heads hook_z[0] to hook_z[3] in a block"),
        ("attn.hook_z[x]", "attn.hook_z[*]", "hook_z[*] is all of them"),
        ("blocks.9.attn.hook_z[0]", "blocks.4.attn.hook_z[0]", "matches 'blocks.9.attn.hook_z'"),
        ("attn.hook_q[1]", "attn.hook_q", "a head is written attn.hook_z[3]"),
    ],
)
def test_what_names_no_hook_is_refused(llama: Any, layers: Any, repaired: Any, reason: str) -> None:
    with pytest.raises(HookError, match=re.escape(reason)):
        resolve_hooks(llama, layers)
    assert resolve_hooks(llama, repaired)


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [
        ("blocks.1.hook_resid_psot", "blocks.1.hook_resid_post"),
        (f"blocks.3.{ATTN_OUT}".replace("tt", "t"), f"blocks.3.{ATTN_OUT}"),
        ("hook_mlp_uot", "hook_mlp_out"),
    ],
)
def test_a_misspelt_name_is_told_the_nearest(llama: Any, misspelt: str, meant: str) -> None:
    with pytest.raises(HookError) as caught:
        resolve_hooks(llama, misspelt)
    message = str(caught.value)
    assert repr(misspelt) in message
    assert meant in message.split("the nearest are", 1)[1]
    assert resolve_hooks(llama, meant)


# Layers and readouts


@pytest.mark.parametrize(
    ("name", "layer"),
    [("blocks.0.hook_resid_post", 0), ("blocks.12.attn.hook_out", 12), (resid_post(103), 103)],
)
def test_the_layer_of_a_hook(name: str, layer: int) -> None:
    assert hook_layer(name) == layer


@pytest.mark.parametrize(
    "name",
    [
        "hook_embed",
        "ln_final.hook_out",
        "blocks.x.hook_out",
        "blocks.-1.hook_out",
        "encoder.blocks.1.hook_out",
        "",
    ],
)
@pytest.mark.parametrize("ask", [hook_layer, lambda name: readout_hook(name, 5)])
def test_a_hook_outside_the_blocks_has_no_layer(name: str, ask: Callable[[str], Any]) -> None:
    with pytest.raises(HookError, match=f"{name!r} is not inside a block"):
        ask(name)
    assert ask("blocks.1.hook_out") is not None


@pytest.mark.parametrize(
    ("layer", "n_layers", "readout"),
    [(0, 30, 27), (26, 30, 27), (27, 30, 27), (28, 30, 28), (29, 30, 29), (0, 3, 0), (0, 1, 0)],
)
@pytest.mark.parametrize("name", ["hook_resid_post", "attn.hook_out"])
def test_the_readout_is_three_layers_from_the_end_or_here(
    layer: int, n_layers: int, readout: int, name: str
) -> None:
    assert readout_hook(f"blocks.{layer}.{name}", n_layers) == f"blocks.{readout}.hook_resid_post"


def test_readouts_are_hooks_of_the_model(tiny: Any) -> None:
    n_layers = tiny.cfg.n_layers
    for name in resolve_hooks(tiny, ["all", "hook_mlp_out"]):
        readout = readout_hook(name, n_layers)
        assert readout in tiny.hook_dict
        assert hook_layer(name) <= hook_layer(readout) < n_layers


# State on the model


def hook_counts(model: Any) -> dict[str, int]:
    return {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}


def add_one(activation: Tensor, hook: Any) -> Tensor:
    return activation + 1


def keep(activation: Tensor, hook: Any) -> None:
    """Reads and changes nothing."""


@contextmanager
def left_as_found(model: Any) -> Iterator[Tensor]:
    """The logits; after the block the model gives the same bits and holds the same hooks."""
    before, counts = model(TOKENS), hook_counts(model)
    yield before
    assert hook_counts(model) == counts
    assert torch.equal(model(TOKENS), before)


def test_hooks_act_inside_the_block_only(tiny: Any) -> None:
    with left_as_found(tiny) as before:
        with hooked(tiny, [(FIRST, add_one)]):
            inside = tiny(TOKENS)
        assert not torch.equal(inside, before)


def test_hooks_are_gone_after_an_exception_in_the_block(tiny: Any) -> None:
    def run(before: Tensor) -> None:
        with hooked(tiny, [(FIRST, add_one)]):
            assert not torch.equal(tiny(TOKENS), before)
            raise ZeroDivisionError

    with left_as_found(tiny) as before:
        with pytest.raises(ZeroDivisionError):
            run(before)
        # A block that raised before the model ran tells of that, and not of a silent hook.
        with pytest.raises(ZeroDivisionError), hooked(tiny, [(FIRST, add_one)]):
            raise ZeroDivisionError


def test_hooks_are_gone_after_an_exception_in_a_hook(tiny: Any) -> None:
    def fail(activation: Tensor, hook: Any) -> None:
        raise ZeroDivisionError

    with left_as_found(tiny):
        with pytest.raises(ZeroDivisionError), hooked(tiny, [(FIRST, add_one), (FIRST, fail)]):
            tiny(TOKENS)
        with hooked(tiny, [(FIRST, add_one)]):
            tiny(TOKENS)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("name", [FIRST, resid_post(1)])
def test_the_users_own_hooks_survive(llama: Any, name: str, raises: bool) -> None:
    plain = llama(TOKENS)
    llama.add_hook(FIRST, add_one)
    try:
        with left_as_found(llama) as users:
            assert not torch.equal(users, plain)
            expected = pytest.raises(ZeroDivisionError) if raises else nullcontext()
            with expected, hooked(llama, [(name, add_one)]):
                assert not torch.equal(llama(TOKENS), users)
                if raises:
                    raise ZeroDivisionError
    finally:
        llama.reset_hooks()
    assert torch.equal(llama(TOKENS), plain)


def test_blocks_nest(llama: Any) -> None:
    hooks = [(FIRST, add_one)]
    with left_as_found(llama), hooked(llama, hooks), left_as_found(llama) as outer:
        with hooked(llama, hooks):
            inner = llama(TOKENS)
        assert not torch.equal(inner, outer)


def test_hooks_get_the_activation_and_their_hook_point(llama: Any) -> None:
    seen = []

    def note(activation: Tensor, hook: Any) -> None:
        seen.append((tuple(activation.shape), hook is llama.hook_dict[LAST]))

    with hooked(llama, [(LAST, note)]):
        llama(TOKENS)
    assert seen == [((*TOKENS.shape, llama.cfg.d_model), True)]


def test_a_block_that_does_not_run_the_model_is_an_error(tiny: Any) -> None:
    with left_as_found(tiny):
        with pytest.raises(HookError, match=re.escape(FIRST)), hooked(tiny, [(FIRST, keep)]):
            pass
        with hooked(tiny, [(FIRST, keep)]):
            tiny(TOKENS)
        with hooked(tiny, []):  # Nothing asked for, so nothing is missing.
            pass


def test_only_the_hooks_that_did_not_fire_are_named(llama: Any) -> None:
    with left_as_found(llama):
        with pytest.raises(HookError) as caught, hooked(llama, [(FIRST, keep), (LAST, keep)]):
            llama(TOKENS, stop_at_layer=1)
        assert LAST in str(caught.value)
        assert FIRST not in str(caught.value)
        with hooked(llama, [(FIRST, keep), (LAST, keep)]):
            llama(TOKENS)


def test_a_hook_that_needs_a_setting_says_which(llama: Any) -> None:
    name = "blocks.0.attn.hook_result"
    assert resolve_hooks(llama, name) == (name,)
    with left_as_found(llama):
        with (
            pytest.raises(HookError, match="use_attn_result"),
            hooked(llama, [(FIRST, keep), (name, keep)]),
        ):
            llama(TOKENS)
        with hooked(llama, [(FIRST, keep), (f"blocks.0.{ATTN_OUT}", keep)]):
            llama(TOKENS)


def test_numpy_numbers_are_layers_and_what_is_none_is_refused(llama: Any) -> None:
    assert resolve_hooks(llama, np.int64(2)) == ("blocks.2.hook_resid_post",)
    assert resolve_hooks(llama, [*np.arange(2)]) == tuple(map(resid_post, range(2)))
