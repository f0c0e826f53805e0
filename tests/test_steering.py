"""The intervention itself: what plain directions add, where, and what is generated under them."""

from typing import Any

import pytest
import torch

import steerlens as sl
from steerlens.engine.tokenization import tokenize_prompt
from steerlens.errors import InputError
from steerlens.steering import generate, generate_tokens, steps

HOOK = "blocks.1.hook_resid_post"
DIRECTION = {HOOK: torch.nn.functional.normalize(torch.arange(-9.0, 23.0), dim=0)}


def test_coefficient_0_is_no_step_at_all() -> None:
    assert steps(DIRECTION, 0) == steps(DIRECTION, -0.0) == ()
    assert len(steps(DIRECTION, 1e-9)) == 1
    for coefficient in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(InputError, match="finite"):
            steps(DIRECTION, coefficient)


def test_steer_adds_inside_the_block_only(llama: Any) -> None:
    tokens = torch.tensor([[1, 7, 9]])
    with torch.no_grad():
        _, before = llama.run_with_cache(tokens)
        with sl.steer(llama, DIRECTION, 3.0):
            _, inside = llama.run_with_cache(tokens)
        _, after = llama.run_with_cache(tokens)
    expected = before[HOOK] + 3 * DIRECTION[HOOK]
    torch.testing.assert_close(inside[HOOK], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(after[HOOK], before[HOOK])


def test_what_cannot_be_generated(llama: Any) -> None:
    prompt = tokenize_prompt(llama, "the river was")
    for prompts, n, message in (
        ([], 5, "1 or more new tokens, got 0"),
        ([prompt], 0, "got 1 and 0"),
        ([prompt], 61, "do not fit the model's context of 64"),
    ):
        with pytest.raises(InputError, match=message):
            generate_tokens(llama, prompts, DIRECTION, 1.0, max_new_tokens=n)


def test_generate_gives_the_new_text_only(llama: Any) -> None:
    prompt = tokenize_prompt(llama, "the river was")
    plain, steered, again = (
        generate(llama, prompt, DIRECTION, coefficient, max_new_tokens=6)
        for coefficient in (0.0, 30.0, 0.0)
    )
    assert "the river was" not in plain
    assert plain != steered
    assert plain == again
