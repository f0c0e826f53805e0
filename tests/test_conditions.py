"""Conditional steering: where it acts, and how its threshold is fitted."""

from dataclasses import replace
from typing import Any

import pytest
import torch

import steerlens as sl
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_pairs
from steerlens.errors import HookError, InputError
from steerlens.steering import conditions, generate_tokens
from steerlens.steering.conditions import (
    _balanced_accuracy,
    _best_threshold,
    _cross_validated,
    _fit,
    prompt_means,
)

EARLY, HOOK = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post"
DIRECTION = torch.nn.functional.normalize(torch.arange(1.0, 33.0), dim=0)
OTHER = torch.nn.functional.normalize(torch.linspace(-1, 1, 32), dim=0)
PROMPTS = [[1, 7, 9, 11, 6], [1, 8, 5, 20, 30]]


def vector(condition: sl.Condition, hook: str = HOOK) -> sl.SteeringVector:
    return replace(sl.SteeringVector.from_vectors({hook: DIRECTION}), condition=condition)


def states(model: Any, hook: str, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.run_with_cache(tokens, **options)[1][hook]


def means(model: Any, hook: str) -> list[float]:
    return (states(model, hook, torch.tensor(PROMPTS)) @ OTHER).mean(dim=1).tolist()


@pytest.mark.parametrize("hook", [EARLY, HOOK])
@pytest.mark.parametrize("above", [True, False])
def test_a_prompt_is_steered_or_not(llama: Any, hook: str, above: bool) -> None:
    first, second = means(llama, hook)
    condition = sl.Condition(hook, OTHER, (first + second) / 2, above=above)
    tokens = torch.tensor(PROMPTS)
    plain = states(llama, HOOK, tokens)
    with sl.steer(llama, vector(condition), 3.0):
        steered = states(llama, HOOK, tokens)
    is_steered = [(first > second) == above, (first < second) == above]
    assert sorted(is_steered) == [False, True]
    for row, expected in enumerate(is_steered):
        torch.testing.assert_close(steered[row], plain[row] + expected * 3 * DIRECTION)


def test_each_token_for_itself(llama: Any) -> None:
    tokens = torch.tensor(PROMPTS)
    projection = states(llama, HOOK, tokens) @ OTHER
    condition = sl.Condition(HOOK, OTHER, float(projection.median()), scope="token")
    passes = projection >= condition.threshold
    assert 0 < int(passes.sum()) < passes.numel()
    plain = states(llama, HOOK, tokens)
    expected = plain + passes[..., None] * 3 * DIRECTION
    with sl.steer(llama, vector(condition), 3.0):
        torch.testing.assert_close(states(llama, HOOK, tokens), expected)
    with llama.hooks(fwd_hooks=vector(condition).fwd_hooks(3.0)):
        torch.testing.assert_close(states(llama, HOOK, tokens), expected)


def test_a_condition_and_positions_together(llama: Any) -> None:
    first, second = means(llama, EARLY)
    condition = sl.Condition(EARLY, OTHER, (first + second) / 2)
    tokens = torch.tensor(PROMPTS)
    plain = states(llama, HOOK, tokens)
    with sl.steer(llama, vector(condition), 3.0, positions="last"):
        step = (states(llama, HOOK, tokens) - plain) @ DIRECTION
    expected = torch.zeros(2, 5)
    expected[0 if first > second else 1, -1] = 3.0
    torch.testing.assert_close(step, expected, atol=1e-4, rtol=0)


def test_the_decision_holds_while_generating(llama: Any) -> None:
    first, second = means(llama, EARLY)
    condition = sl.Condition(EARLY, OTHER, (first + second) / 2)
    prompts = [TokenizedPrompt(tuple(ids), (), "prompt") for ids in PROMPTS]
    steered, plain, always = (
        generate_tokens(llama, prompts, of, c, max_new_tokens=6)
        for of, c in ((vector(condition), 25.0), ({HOOK: DIRECTION}, 0), ({HOOK: DIRECTION}, 25.0))
    )
    chosen = 0 if first > second else 1
    assert steered[chosen] == always[chosen] != plain[chosen]
    assert steered[1 - chosen] == plain[1 - chosen] != always[1 - chosen]
    tokens = torch.tensor(PROMPTS)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "verbose": False}
    with torch.no_grad(), sl.steer(llama, vector(condition), 25.0):
        cached = llama.generate(tokens, stop_at_eos=False, **options)
        whole = llama.generate(tokens, stop_at_eos=False, use_past_kv_cache=False, **options)
    assert torch.equal(cached, whole)


def test_the_prompt_may_be_padded(llama: Any) -> None:
    first = (states(llama, EARLY, torch.tensor([PROMPTS[0]])) @ OTHER).mean()
    short = (states(llama, EARLY, torch.tensor([PROMPTS[1][:3]])) @ OTHER).mean()
    condition = sl.Condition(EARLY, OTHER, float(first + short) / 2)
    for tokens in ([PROMPTS[0], [*PROMPTS[1][:3], 3, 3]], [PROMPTS[0], [3, 3, *PROMPTS[1][:3]]]):
        ids = torch.tensor(tokens)
        mask = (ids != 3).long()
        plain = states(llama, HOOK, ids, attention_mask=mask)
        with sl.steer(llama, vector(condition), 3.0):
            steered = states(llama, HOOK, ids, attention_mask=mask)
        step = ((steered - plain) @ DIRECTION)[mask.bool()].reshape(-1)
        expected = torch.tensor([3.0 * (first > short)] * 5 + [3.0 * (short > first)] * 3)
        torch.testing.assert_close(step, expected, atol=1e-4, rtol=0)


def test_a_condition_must_be_read_first(llama: Any) -> None:
    late = vector(sl.Condition("blocks.2.hook_resid_post", OTHER, 0.0))
    with (
        pytest.raises(InputError, match=r"read after blocks\.1\.hook_resid_post is steered"),
        sl.steer(llama, late, 1.0),
    ):
        states(llama, HOOK, torch.tensor(PROMPTS))
    with pytest.raises(InputError, match="use `with steer"):
        late.fwd_hooks(1.0)
    assert late.fwd_hooks(0) == []
    missing = vector(sl.Condition("blocks.9.hook_resid_post", OTHER, 0.0))
    with pytest.raises(HookError), sl.steer(llama, missing, 1.0):
        pass


def test_each_cache_keeps_its_prompts_decision(llama: Any) -> None:
    first, second = means(llama, EARLY)
    of = vector(sl.Condition(EARLY, OTHER, (first + second) / 2, above=first > second))
    passes, fails = (torch.tensor([ids]) for ids in PROMPTS)
    options: dict[str, Any] = {"return_type": "logits_and_cache", "use_cache": True}
    more = torch.tensor([[12]])
    with torch.no_grad(), sl.steer(llama, of, 25.0):
        _, cache = llama(passes, **options)
        alone = llama(more, past_key_values=cache)
        _, one = llama(passes, **options)
        _, other = llama(fails, **options)
        assert torch.equal(llama(more, past_key_values=one), alone)
        unsteered = llama(more, past_key_values=other)
    with torch.no_grad():
        _, cache = llama(fails, **options)
        torch.testing.assert_close(unsteered, llama(more, past_key_values=cache))
        with pytest.raises(InputError, match="not run inside the block"), sl.steer(llama, of, 1.0):
            llama(more, past_key_values=cache)


def test_a_prompt_in_chunks_has_no_decision(llama: Any) -> None:
    of = vector(sl.Condition(EARLY, OTHER, 0.0))
    tokens = torch.tensor([[*PROMPTS[0], 9]])
    with pytest.raises(InputError, match="come in chunks"), sl.steer(llama, of, 1.0):
        llama.hf_generate(tokens, max_new_tokens=2, do_sample=False, prefill_chunk_size=3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"direction": torch.ones(32)}, "norm 5.65685; expected 1"),
        ({"threshold": float("nan")}, "threshold: expected a finite number"),
    ],
)
def test_what_is_no_condition(fields: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"hook_name": HOOK, "direction": OTHER, "threshold": 0.0}
    assert "prompt >= 0" in repr(sl.Condition(**good))
    with pytest.raises(InputError, match=message):
        sl.Condition(**good | fields)


# Fitting


@pytest.mark.parametrize(
    ("positive", "negative", "accuracy", "threshold"),
    [
        ([3.0, 4.0], [1.0, 2.0], 1.0, 2.5),
        # One positive below one negative: three of four right at either cut.
        ([3.0, 1.5], [1.0, 2.0], 0.75, 2.5),
        # All the same, or the wrong way round: best that nobody passes, which is chance.
        ([1.0, 1.0], [1.0, 1.0], 0.5, 1.0),
        ([1.0, 2.0], [3.0, 4.0], 0.5, 4.0),
    ],
)
def test_the_best_threshold_by_hand(
    positive: list[float], negative: list[float], accuracy: float, threshold: float
) -> None:
    up, down = torch.tensor(positive).double(), torch.tensor(negative).double()
    found = _best_threshold(up, down)
    assert found == pytest.approx(threshold)
    assert _balanced_accuracy(up >= found, down >= found) == pytest.approx(accuracy)


def test_means_are_over_the_prompt(llama: Any, pairs: sl.ContrastivePairs) -> None:
    positive, negative = prompt_means(llama, pairs, [EARLY, HOOK], batch_size=3)
    tokenized = tokenize_pairs(llama, pairs)
    for found, side in ((positive, tokenized.positive), (negative, tokenized.negative)):
        assert found.shape == (2, len(pairs), 32)
        for row, prompt in enumerate(side):
            for index, name in enumerate((EARLY, HOOK)):
                expected = states(llama, name, torch.tensor([prompt.prompt]))[0].mean(dim=0)
                torch.testing.assert_close(found[index, row], expected, rtol=1e-4, atol=1e-4)


def test_a_fitted_condition_tells_the_sides_apart(llama: Any, many: sl.ContrastivePairs) -> None:
    train, test = many[:12], many[12:]
    condition = sl.steering.fit_condition(llama, train, layers=[0, 1])
    assert condition.hook_name in (EARLY, HOOK)
    at_train = sl.steering.condition_accuracy(llama, train, condition)
    assert at_train > 0.8
    assert sl.steering.condition_accuracy(llama, test, condition) > 0.8
    turned = replace(condition, above=not condition.above)
    assert sl.steering.condition_accuracy(llama, train, turned) == pytest.approx(1 - at_train)
    # A direction of one's own is taken as it is; one that says nothing is worth nothing.
    given = sl.steering.fit_condition(llama, train, layers=1, directions={HOOK: 3 * OTHER})
    torch.testing.assert_close(given.direction, OTHER)
    assert sl.steering.condition_accuracy(llama, train, given) < at_train


def test_the_hook_is_chosen_on_pairs_that_were_left_out() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn((2, 50, 500), generator=generator)
    # Noise in 500 dimensions can be told apart in-sample, and not beyond.
    unit, threshold = _fit(noise[0], noise[1], None)
    assert ((noise[0] @ unit >= threshold) & (noise[1] @ unit < threshold)).all()
    assert _cross_validated(noise[0], noise[1], None) < 0.7
    apart = noise + torch.tensor([1.0, -1.0])[:, None, None]
    assert _cross_validated(apart[0], apart[1], None) == 1.0


def test_the_best_hook_is_taken(
    llama: Any, many: sl.ContrastivePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The middle one of three, by means put in the model's place."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn((2, 3, 20, 32), generator=generator)
    means[0, 1] += 2
    monkeypatch.setattr(conditions, "prompt_means", lambda *a, **k: (means[0], means[1]))
    assert sl.steering.fit_condition(llama, many, layers=[0, 1, 2]).hook_name == HOOK


def test_what_a_condition_cannot_be_fitted_on(llama: Any, many: sl.ContrastivePairs) -> None:
    with pytest.raises(InputError, match=r"no direction at blocks\.1"):
        sl.steering.fit_condition(llama, many, layers=[0, 1], directions={EARLY: OTHER})
    with pytest.raises(InputError, match="do not differ"):
        _fit(torch.ones(2, 3), torch.ones(2, 3), None)
