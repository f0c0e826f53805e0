"""Steering vectors on the real model: what they do to its answers, and what exports give."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import steerlens as sl
from steerlens.data.prompts import Message
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_prompt
from steerlens.steering import generate, generate_tokens

pytestmark = pytest.mark.real

HOOK = "blocks.10.hook_resid_post"
QUESTIONS = ("How was your day?", "Tell me about the weather in the mountains today.")


@pytest.fixture(scope="module")
def vector(real_model: Any) -> sl.SteeringVector:
    train = sl.ContrastivePairs.load("sentiment")
    directions = sl.fit_directions(sl.collect_differences(real_model, train, layers=[10]))
    return sl.SteeringVector.from_directions(real_model, directions, dataset="sentiment")


def asked(model: Any) -> list[TokenizedPrompt]:
    return [tokenize_prompt(model, (Message("user", text),)) for text in QUESTIONS]


def test_answers_turn_from_delight_to_grief(real_model: Any, vector: sl.SteeringVector) -> None:
    prompt = asked(real_model)[0]
    down, plain, up = (
        generate(real_model, prompt, vector, c, max_new_tokens=40) for c in (-30, 0, 30)
    )
    bright = ("pleasure", "glad", "happy", "excited", "delight", "wonderful", "great")
    dark = ("shadow", "lost", "dark", "grim", "weary", "death", "pain", "despair")
    assert any(word in up for word in bright)
    assert any(word in down for word in dark)
    assert not any(word in plain for word in dark)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_greedy_tokens_with_and_without_a_kv_cache(
    real_model: Any, vector: sl.SteeringVector, positions: Any
) -> None:
    tokens = torch.tensor([asked(real_model)[0].prompt])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "verbose": False}
    with torch.no_grad(), sl.steer(real_model, vector, 20, positions=positions):
        cached = real_model.generate(tokens, return_type="tokens", **options)
        whole = real_model.generate(
            tokens, return_type="tokens", use_past_kv_cache=False, **options
        )
    assert torch.equal(cached, whole)


def test_a_padded_batch_is_continued_as_each_prompt_alone(
    real_model: Any, vector: sl.SteeringVector
) -> None:
    prompts = asked(real_model)
    assert len({len(prompt) for prompt in prompts}) == 2
    together = generate_tokens(
        real_model, prompts, vector, 20, max_new_tokens=8, positions="generated"
    )
    for prompt, found in zip(prompts, together, strict=True):
        assert [found] == generate_tokens(
            real_model, [prompt], vector, 20, max_new_tokens=8, positions="generated"
        )


def test_a_baked_checkpoint_in_plain_transformers(
    real_model: Any, vector: sl.SteeringVector, tmp_path: Path
) -> None:
    sl.export.bake(real_model, vector, -30, tmp_path / "baked")
    baked = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()
    prompt = asked(real_model)[0]
    tokens = torch.tensor([prompt.prompt])
    with torch.no_grad(), sl.steer(real_model, vector, -30):
        ours = real_model(tokens)
    with torch.no_grad():
        theirs = baked(tokens).logits
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))
        written = baked.generate(tokens, max_new_tokens=8, do_sample=False)
    (steered,) = generate_tokens(real_model, [prompt], vector, -30, max_new_tokens=8)
    assert tuple(written[0, tokens.shape[1] :].tolist()) == steered


def test_a_condition_fitted_on_data_holds_on_other_data(real_model: Any) -> None:
    train, test = (sl.ContrastivePairs.load("formality", split=s) for s in ("train", "test"))
    condition = sl.steering.fit_condition(real_model, train, layers=[5, 10, 15])
    assert sl.steering.condition_accuracy(real_model, test, condition) > 0.8
