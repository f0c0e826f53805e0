"""The intervention itself: what it adds, where, and that it goes away."""

from typing import Any

import pytest
import torch

import steerlens as sl
from steerlens.engine.tokenization import tokenize_prompt
from steerlens.errors import InputError
from steerlens.steering import generate, generate_tokens, steering_hooks

HOOK = "blocks.1.hook_resid_post"


def test_coefficient_0_is_no_hook_at_all() -> None:
    directions = {HOOK: torch.tensor([1.0, 0.0])}
    assert steering_hooks(directions, 0) == []
    assert steering_hooks(directions, -0.0) == []
    assert len(steering_hooks(directions, 1e-9)) == 1


@pytest.mark.parametrize("coefficient", [float("nan"), float("inf"), -float("inf")])
def test_coefficient_must_be_finite(coefficient: float) -> None:
    with pytest.raises(InputError, match="finite"):
        steering_hooks({HOOK: torch.tensor([1.0])}, coefficient)


def test_steer_adds_inside_the_block_only(llama: Any) -> None:
    direction = torch.nn.functional.normalize(torch.randn(32), dim=0)
    tokens = torch.tensor([[1, 7, 9]])
    with torch.no_grad():
        _, before = llama.run_with_cache(tokens)
        with sl.steer(llama, {HOOK: direction}, 3.0):
            _, inside = llama.run_with_cache(tokens)
        _, after = llama.run_with_cache(tokens)
    expected = before[HOOK] + 3 * direction
    torch.testing.assert_close(inside[HOOK], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(after[HOOK], before[HOOK])


def test_generation_with_the_kv_cache_equals_generation_without(llama: Any) -> None:
    direction = torch.nn.functional.normalize(torch.randn(32), dim=0)
    tokens = torch.tensor([[1, 7, 9, 11]])
    options: dict[str, Any] = {
        "max_new_tokens": 8,
        "do_sample": False,
        "return_type": "tokens",
        "verbose": False,
        "stop_at_eos": False,
    }
    with torch.no_grad(), sl.steer(llama, {HOOK: direction}, 6.0):
        cached = llama.generate(tokens, use_past_kv_cache=True, **options)
        uncached = llama.generate(tokens, use_past_kv_cache=False, **options)
    assert torch.equal(cached, uncached)
    with torch.no_grad():
        assert not torch.equal(cached, llama.generate(tokens, **options))


def test_what_cannot_be_generated(llama: Any) -> None:
    prompt = tokenize_prompt(llama, "the river was")
    direction = {HOOK: torch.nn.functional.normalize(torch.randn(32), dim=0)}
    for prompts, n, message in (
        ([], 5, "1 or more new tokens, got 0"),
        ([prompt], 0, "got 1 and 0"),
        ([prompt], 61, "do not fit the model's context of 64"),
    ):
        with pytest.raises(InputError, match=message):
            generate_tokens(llama, prompts, direction, 1.0, max_new_tokens=n)


def test_generate_gives_the_new_text_only(llama: Any) -> None:
    prompt = tokenize_prompt(llama, "the river was")
    direction = torch.nn.functional.normalize(torch.randn(32), dim=0)
    plain = generate(llama, prompt, {HOOK: direction}, 0.0, max_new_tokens=6)
    steered = generate(llama, prompt, {HOOK: direction}, 30.0, max_new_tokens=6)
    assert "the river was" not in plain
    assert plain != steered
    assert plain == generate(llama, prompt, {HOOK: direction}, 0.0, max_new_tokens=6)
