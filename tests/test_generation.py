"""Texts of prompts x coefficients x samples, written together, against each one alone."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from conftest import ATTN_OUT, bridge, build_llama, needs_bridge
from scipy.stats import chi2
from zoo import bridged

import steerlens as sl
from steerlens.engine.backend import for_hooks
from steerlens.engine.continuations import continue_prompts, until_end
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_prompt
from steerlens.errors import HookError, InputError
from steerlens.steering import (
    Calibration,
    decoding,
    generate_texts,
    generation,
)

HOOK = "blocks.1.hook_resid_post"
UNIT = torch.nn.functional.normalize(torch.arange(-9.0, 23.0), dim=0)
DIRECTION = {HOOK: UNIT}
TEXTS = ("the river was", "you are kind and the sun is warm today", "rain")
COEFFICIENTS = (0, 6.0, -9.0)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts each call of the plain loop had."""
    calls: list[int] = []

    def counted(model: Any, prompts: Any, **options: Any) -> Any:
        calls.append(len(prompts))
        return continue_prompts(model, prompts, **options)

    monkeypatch.setattr(generation, "continue_prompts", counted)
    return calls


def alone(
    model: Any,
    prompts: Sequence[TokenizedPrompt],
    vector: Any,
    positions: Any = "all",
    *,
    n: int = 6,
    coefficients: Any = COEFFICIENTS,
) -> list[tuple[int, ...]]:
    """Each prompt by itself, in `steer`, by the model's own `generate`."""
    texts = []
    for prompt in prompts:
        for coefficient in coefficients:
            with sl.steer(model, vector, coefficient, positions=positions):
                (ids,) = continue_prompts(model, [prompt], max_new_tokens=n)
            texts.append(until_end(ids, model))
    return texts


@needs_bridge
@pytest.mark.parametrize(
    ("kind", "is_together"),
    [
        ("GPT-2", True),
        ("Llama", True),
        ("BLOOM", True),
        ("OPT", True),
        ("Mistral", True),
        ("Gemma 3", True),
        ("LFM2", False),
        ("Qwen3.5", False),
    ],
)
def test_texts_written_together_are_those_of_each_alone(
    kind: str, is_together: bool, apart: list[int]
) -> None:
    model = bridged(kind)
    prompts = [tokenize_prompt(model, text) for text in TEXTS]
    for positions in ("all", "last+generated"):
        expected = alone(model, prompts, DIRECTION, positions)
        texts = generate_texts(
            *(model, prompts, DIRECTION, COEFFICIENTS), max_new_tokens=6, positions=positions
        )
        assert [text.ids for text in texts] == expected
        assert len(set(expected)) > 3
    assert [(text.prompt, text.coefficient, text.sample, text.seed) for text in texts] == [
        (place, coefficient, 0, None) for place in range(3) for coefficient in COEFFICIENTS
    ]
    assert bool(apart) != is_together


@pytest.mark.parametrize(
    "positions", ["all", "prompt", "generated", "last", "last+generated[1:3]", "generated[2:]"]
)
def test_each_row_is_steered_where_it_is_asked(llama: Any, positions: str) -> None:
    prompts = [tokenize_prompt(llama, text) for text in TEXTS]
    texts = generate_texts(
        *(llama, prompts, DIRECTION, COEFFICIENTS), max_new_tokens=6, positions=positions
    )
    assert [text.ids for text in texts] == alone(llama, prompts, DIRECTION, positions)
    assert texts[1].ids != texts[0].ids


def steering_vector(operator: Any = None, **given: Any) -> sl.SteeringVector:
    vector = sl.SteeringVector.from_vectors({HOOK: UNIT, "blocks.3.hook_resid_post": UNIT.flip(0)})
    return replace(vector, operator=operator or sl.Add(), **given)


NORMS = Calibration(
    *(torch.tensor([2.0, 3.0]), torch.tensor([-6.0, -8.0]), torch.tensor([5.0, 9.0])), "-", "-"
)


@pytest.mark.parametrize(
    ("vector", "coefficients"),
    [
        (steering_vector(), (0, 5, -7.5)),
        (steering_vector(calibration=NORMS), ("80%", "-150 %", "2 norm")),
        (steering_vector(sl.Ablate()), (0, 1, 0.5)),
        (steering_vector(sl.Clamp(9)), (0, 1.0, 0.3)),
        (steering_vector(sl.Rotate()), (0, 70, -100)),
        ({f"blocks.2.{ATTN_OUT}": UNIT, HOOK: UNIT.flip(0)}, (0, 9.0, -9.0)),
        ({"blocks.1.attn.hook_z[1]": UNIT[:8] / UNIT[:8].norm()}, (0, 20.0, -20.0)),
    ],
    ids=["add", "units", "ablate", "clamp", "rotate", "inside a block", "a head"],
)
def test_all_that_a_vector_does(llama: Any, vector: Any, coefficients: Any) -> None:
    prompts = [tokenize_prompt(llama, text) for text in TEXTS]
    texts = generate_texts(llama, prompts, vector, coefficients, max_new_tokens=6)
    expected = alone(llama, prompts, vector, coefficients=coefficients)
    assert [text.ids for text in texts] == expected
    assert len(set(expected)) > 6


@needs_bridge
def test_blocks_up_to_the_steered_one_run_once_a_prompt(llama: Any) -> None:
    prompts = [tokenize_prompt(llama, text) for text in TEXTS]
    given = (llama, prompts, DIRECTION, COEFFICIENTS)
    generate_texts(*given, max_new_tokens=1)  # the first is looked at
    runner = for_hooks(llama, [HOOK], on_cpu=True)
    rows: dict[int, list[int]] = {1: [], 2: []}
    handles = [
        runner.blocks[i].self_attn.register_forward_hook(
            lambda module, args, out, i=i: rows[i].append(len(out[0]))
        )
        for i in rows
    ]
    try:
        generate_texts(*given, max_new_tokens=1)
    finally:
        for handle in handles:
            handle.remove()
    assert rows == {1: [len(prompts)], 2: [len(prompts) * len(COEFFICIENTS)]}


@needs_bridge
def test_a_bridge_without_a_bare_model_is_steered_in_the_prompt(
    llama: Any, apart: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As it runs where it is spread over devices.
    ran: list[Any] = []
    monkeypatch.setattr(decoding, "for_hooks", lambda model, *_, **__: ran.append(model) or model)
    prompts = [tokenize_prompt(llama, text) for text in TEXTS]
    texts = generate_texts(llama, prompts, DIRECTION, COEFFICIENTS, max_new_tokens=6)
    assert ran == [llama]
    assert [text.ids for text in texts] == alone(llama, prompts, DIRECTION)
    assert not apart[: -len(texts)]  # of `generate_texts`; `alone` ran the others


@needs_bridge
def test_what_is_done_one_coefficient_at_a_time(llama: Any, apart: list[int]) -> None:
    prompts = [tokenize_prompt(llama, text) for text in TEXTS]
    condition = sl.Condition(HOOK, UNIT, 0.0)
    vector = steering_vector(condition=condition)
    texts = generate_texts(llama, prompts, vector, COEFFICIENTS, max_new_tokens=6, batch_size=2)
    assert [text.ids for text in texts] == alone(llama, prompts, vector)
    assert apart == [2, 1] * 3
    # Under hooks of others, here a vector that acts before.
    with sl.steer(llama, {HOOK: UNIT.flip(0)}, 8.0, positions="generated"):
        nested = generate_texts(llama, prompts, DIRECTION, COEFFICIENTS, max_new_tokens=6)
        assert [text.ids for text in nested] == alone(llama, prompts, DIRECTION)
    assert apart[6:] == [3] * 3
    assert nested != generate_texts(llama, prompts, DIRECTION, COEFFICIENTS, max_new_tokens=6)


def test_a_mask_steers_tokens_of_the_prompts(llama: Any) -> None:
    prompts = [tokenize_prompt(llama, text) for text in TEXTS]
    width = max(len(prompt.prompt) for prompt in prompts)
    mask = torch.arange(3 * width).reshape(3, width) % 2 == 0
    texts = generate_texts(
        *(llama, prompts, DIRECTION, COEFFICIENTS), max_new_tokens=6, positions=mask, batch_size=2
    )
    expected = [
        ids
        for place, prompt in enumerate(prompts)
        for ids in alone(
            llama, [prompt], DIRECTION, mask[place : place + 1, width - len(prompt.prompt) :]
        )
    ]
    assert [text.ids for text in texts] == expected
    with pytest.raises(InputError, match=rf"shape \(3, {width - 1}\), but the prompts are \(3, "):
        generate_texts(
            *(llama, prompts, DIRECTION, COEFFICIENTS), max_new_tokens=6, positions=mask[:, 1:]
        )


def test_a_drawn_row_is_the_same_in_every_batch(tiny: Any, apart: list[int]) -> None:
    prompts = [tokenize_prompt(tiny, text) for text in TEXTS]
    options: dict[str, Any] = {"max_new_tokens": 6, "samples": 3, "seed": 5}
    rows = generate_texts(tiny, prompts, DIRECTION, [0, 2.0], **options)
    assert rows == generate_texts(tiny, prompts, DIRECTION, [0, 2.0], batch_size=1, **options)
    (row,) = generate_texts(tiny, prompts[:1], DIRECTION, [2.0], **options | {"samples": 1})
    assert row == rows[3]
    assert len({text.seed for text in rows}) == 9
    with tiny.hooks(fwd_hooks=[(HOOK, lambda activation, hook: None)]):
        apart.clear()
        assert rows == generate_texts(tiny, prompts, DIRECTION, [0, 2.0], **options)
        assert apart
    other = generate_texts(tiny, prompts, DIRECTION, [0, 2.0], **options | {"seed": 6})
    assert len({text.ids for text in (*rows, *other)}) > 20
    # Without steering all coefficients share their random numbers.
    same = generate_texts(tiny, prompts, DIRECTION, [0, 1e-6], **options)
    assert [text.ids for text in same[::6]] == [text.ids for text in same[3::6]]


def test_tokens_are_drawn_as_often_as_they_are_likely(llama: Any) -> None:
    prompt, n = tokenize_prompt(llama, TEXTS[0]), 2000
    texts = generate_texts(
        *(llama, [prompt], DIRECTION, [12.0]), max_new_tokens=1, samples=n, seed=0, batch_size=n
    )
    with torch.no_grad(), sl.steer(llama, DIRECTION, 12.0):
        logits = llama(torch.tensor([prompt.prompt]), return_type="logits")[0, -1]
    expected = n * logits.softmax(dim=-1).double()
    end = llama.tokenizer.eos_token_id
    counts = torch.bincount(torch.tensor([(*text.ids, end)[0] for text in texts]), minlength=160)
    common = expected > 5
    found = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    statistic = float(((found - wanted) ** 2 / wanted).sum())
    assert len(found) > 20
    assert chi2.sf(statistic, len(found) - 1) > 0.01
    # The model's distribution without steering is another one.
    with torch.no_grad():
        unsteered = llama(torch.tensor([prompt.prompt]), return_type="logits")[0, -1]
    plain = n * unsteered.softmax(dim=-1)[common]
    assert chi2.sf(float(((counts[common] - plain) ** 2 / plain).sum()), len(plain)) < 1e-9


@needs_bridge
def test_rows_that_end_leave_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = bridge(build_llama(seed=3))
    prompts = [tokenize_prompt(model, text) for text in TEXTS]
    given = (model, prompts, DIRECTION, (0, 3.0, 6.0, -9.0))
    free = generate_texts(*given, max_new_tokens=10)
    often = Counter(token for text in free for token in set(text.ids[1:5])).most_common(1)[0][0]
    monkeypatch.setattr(model.cfg, "eos_token_id", [2, often], raising=False)
    done: list[int] = []
    texts = generate_texts(
        *given, max_new_tokens=10, progress=lambda stage, now, total: done.append(now)
    )
    for text, whole in zip(texts, free, strict=True):
        ids = (*whole.ids, often)
        end = ids.index(often)
        assert (text.ids, text.ended) == (ids[:end], whole.ended or end < len(whole.ids))
    assert 0 < sum(text.ended for text in texts) < len(texts)
    rows = [after - before for before, after in pairwise(done)]
    assert rows[0] == 12
    assert min(rows[:9]) == sum(not text.ended for text in texts)


@needs_bridge
def test_fewer_rows_run_together_where_memory_is_out(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [tokenize_prompt(llama, text) for text in TEXTS]
    given = (llama, prompts, DIRECTION, COEFFICIENTS)
    whole = generate_texts(*given, max_new_tokens=6)
    right = decoding._next_logits

    def small(model: Any, tokens: torch.Tensor, *rest: Any) -> torch.Tensor:
        if len(tokens) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(model, tokens, *rest)

    monkeypatch.setattr(decoding, "_next_logits", small)
    with pytest.warns(RuntimeWarning, match="going on with 4 prompts a pass"):
        assert generate_texts(*given, max_new_tokens=6) == whole


@needs_bridge
def test_texts_that_differ_from_each_alone_are_written_apart(
    monkeypatch: pytest.MonkeyPatch, apart: list[int]
) -> None:
    model = bridge(build_llama(seed=4))
    prompts = [tokenize_prompt(model, text) for text in TEXTS]
    right = decoding._next_logits

    def wrong(*args: Any) -> torch.Tensor:
        return right(*args).roll(1, dims=-1)

    monkeypatch.setattr(decoding, "_next_logits", wrong)
    with pytest.warns(RuntimeWarning, match="not those that the model writes one by one"):
        texts = generate_texts(model, prompts, DIRECTION, COEFFICIENTS, max_new_tokens=6)
    assert [text.ids for text in texts] == alone(model, prompts, DIRECTION)
    assert apart == [3] * 3


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"samples": 2}, InputError, "2 samples without a seed"),
        ({"samples": 0}, InputError, "samples: expected a whole number of 1 or more"),
        ({"prompts": []}, InputError, "1 or more new tokens, got 0 and 5"),
        ({"coefficients": []}, InputError, "expected coefficients"),
        ({"max_new_tokens": 0}, InputError, "1 or more new tokens, got 1 and 0"),
        ({"max_new_tokens": 61}, InputError, "do not fit the model's context of 64"),
        ({"positions": "some"}, InputError, "positions are all, prompt"),
        ({"coefficients": ["80%"]}, InputError, "needs a SteeringVector"),
        ({"vector": {HOOK: torch.ones(5)}}, InputError, "has 5 numbers, the activation there 32"),
        ({"vector": {"blocks.9.hook_resid_post": UNIT}}, HookError, "cannot hook this model"),
    ],
)
def test_what_cannot_be_written(
    llama: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    given: dict[str, Any] = {
        "prompts": [tokenize_prompt(llama, "the river was")],
        "vector": DIRECTION,
        "coefficients": [1.0],
        "max_new_tokens": 5,
    }
    assert len(generate_texts(llama, **given)) == 1
    with pytest.raises(error, match=message):
        generate_texts(llama, **given | options)


@pytest.mark.real
def test_texts_of_the_real_model(real_model: Any) -> None:
    prompts = [
        tokenize_prompt(real_model, text) for text in ("The weather", "My friend told me that")
    ]
    torch.manual_seed(0)
    vector = {"blocks.15.hook_resid_post": torch.nn.functional.normalize(torch.randn(576), dim=0)}
    for positions in ("all", "generated"):
        texts = generate_texts(
            real_model, prompts, vector, (0, 40.0, -40.0), max_new_tokens=6, positions=positions
        )
        expected = alone(real_model, prompts, vector, positions, n=6, coefficients=(0, 40.0, -40.0))
        assert [text.ids for text in texts] == expected
    assert len(set(expected)) == 6
