"""Which tokens are steered: by name, with and without a KV cache, with padding on either side."""

import inspect
import threading
import warnings
from itertools import chain
from typing import Any

import pytest
import torch
from conftest import IS_TL3, needs_bridge

import steerlens as sl
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.errors import InputError
from steerlens.steering import Positions, generate_tokens
from steerlens.steering.cache_positions import Pass, check_positions

HOOK = "blocks.1.hook_resid_post"
DIRECTION = torch.nn.functional.normalize(torch.arange(1.0, 33.0), dim=0)
PROMPTS = [[1, 7, 9, 11, 6], [1, 8, 5]]
GREEDY: dict[str, Any] = {
    "max_new_tokens": 5,
    "do_sample": False,
    "return_type": "tokens",
    "verbose": False,
    "stop_at_eos": False,
}
MASK = torch.tensor([[False, True, False, True, False]])


def moved(
    model: Any, positions: Positions, run: Any, coefficient: float = 4.0
) -> list[list[list[bool]]]:
    """For every pass of `run`, which tokens the block at HOOK put out moved by the coefficient."""
    inputs: list[torch.Tensor] = []
    outputs: list[torch.Tensor] = []

    def keep(into: list[torch.Tensor]) -> Any:
        return lambda activation, hook: into.append(activation.clone())

    with (
        torch.no_grad(),
        model.hooks(fwd_hooks=[(HOOK, keep(inputs))]),
        sl.steer(model, {HOOK: DIRECTION}, coefficient, positions=positions),
        model.hooks(fwd_hooks=[(HOOK, keep(outputs))]),
    ):
        run()
    found = []
    for before, after in zip(inputs, outputs, strict=True):
        step = (after - before) @ DIRECTION
        assert bool(((step.abs() < 1e-4) | ((step - coefficient).abs() < 1e-4)).all())
        found.append((step > coefficient / 2).tolist())
    return found


def refused(
    model: Any, message: str, run: Any, positions: Any = "last", hook: str = HOOK, **given: Any
) -> None:
    """`run` under steering raises an `InputError` with that message."""
    direction = given.get("direction", DIRECTION)
    with (
        pytest.raises(InputError, match=message),
        torch.no_grad(),
        sl.steer(model, {hook: direction}, 1.0, positions=positions),
    ):
        run()


@pytest.mark.parametrize(
    ("positions", "in_prompt", "later"),
    [
        ("all", [True] * 5, True),
        ("prompt", [True] * 5, False),
        ("generated", [False] * 5, True),
        ("last", [False] * 4 + [True], False),
        ("last+generated", [False] * 4 + [True], True),
        ("own", [False] * 5, True),
        (MASK, MASK[0].tolist(), False),
    ],
)
def test_the_same_tokens_with_and_without_a_kv_cache(
    tiny: Any, positions: Any, in_prompt: list[bool], later: bool
) -> None:
    tokens = torch.tensor(PROMPTS[:1])
    cached = moved(tiny, positions, lambda: tiny.generate(tokens, **GREEDY))
    assert cached == [[in_prompt]] + [[[later]]] * 4
    whole = moved(tiny, positions, lambda: tiny.generate(tokens, use_past_kv_cache=False, **GREEDY))
    assert whole == [[in_prompt + [later] * n] for n in range(5)]
    if IS_TL3:  # has no way but its own
        return
    by_hugging_face = moved(
        tiny,
        positions,
        lambda: tiny.hf_generate(
            tokens, max_new_tokens=5, do_sample=False, return_type="tokens", stop_at_eos=False
        ),
    )
    assert by_hugging_face == cached


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_a_batch_continues_each_prompt_as_it_does_alone(tiny: Any, positions: Any) -> None:
    prompts = [TokenizedPrompt(tuple(ids), (), "prompt") for ids in PROMPTS]
    options: dict[str, Any] = {"max_new_tokens": 6, "positions": positions}
    alone = [
        generate_tokens(tiny, [prompt], {HOOK: DIRECTION}, 60.0, **options)[0] for prompt in prompts
    ]
    together = generate_tokens(tiny, prompts, {HOOK: DIRECTION}, 60.0, **options)
    assert together == alone
    assert together != generate_tokens(tiny, prompts, {HOOK: DIRECTION}, 0, max_new_tokens=6)


def test_the_last_token_with_padding_on_either_side(tiny: Any) -> None:
    # The first prompt ends at column 4, the second at column 2, or at 4 with padding before it.
    right = torch.tensor([PROMPTS[0], [*PROMPTS[1], 3, 3]])
    left = torch.tensor([PROMPTS[0], [3, 3, *PROMPTS[1]]])
    ends = [[False] * 4 + [True], [False] * 2 + [True] + [False] * 2]
    assert moved(tiny, "last", lambda: tiny(right, attention_mask=(right != 3).long())) == [ends]
    assert moved(tiny, "last", lambda: tiny(left, attention_mask=(left != 3).long())) == [
        [ends[0], ends[0]]
    ]
    # Without a mask, by the tokenizer's own padding token, where a batch was padded.
    assert tiny.tokenizer.padding_side == "right"
    assert moved(tiny, "last", lambda: tiny(right)) == [ends]


def with_cache(model: Any, tokens: torch.Tensor, cache: Any = None) -> Any:
    """The KV cache after a pass, in the library's own kind: `cache` with these tokens added."""
    if IS_TL3:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = cache or TransformerLensKeyValueCache.init_cache(model.cfg, "cpu", len(tokens))
        model(tokens, past_kv_cache=cache)
    elif cache is None:
        _, cache = model(tokens, return_type="logits_and_cache", use_cache=True)
    else:
        model(tokens, past_key_values=cache)
    return cache


@pytest.mark.parametrize(
    ("window", "steered"),
    [
        ("0:2", [True, True, False, False]),
        ("1:3", [False, True, True, False]),
        ("3:", [False, False, False, True]),
    ],
)
def test_a_window_of_generation_steps(tiny: Any, window: str, steered: list[bool]) -> None:
    """Step 0 is the first token that is generated, with a KV cache and without."""
    tokens, positions = torch.tensor(PROMPTS[:1]), f"generated[{window}]"
    found = moved(tiny, positions, lambda: tiny.generate(tokens, **GREEDY))
    assert found == [[[False] * 5], *([[step]] for step in steered)]
    whole = moved(tiny, positions, lambda: tiny.generate(tokens, use_past_kv_cache=False, **GREEDY))
    assert whole[-1] == [[False] * 5 + steered]


THINK, ANSWER = 21, 22
TURNS = [1, THINK, 9, ANSWER, 7, THINK, 8, 9]  # an earlier turn's thinking, and one that is open
WRITTEN = [10, 11, ANSWER, 12, 13, THINK, 14, ANSWER, 15]
INSIDE = [False] * 6 + [True] * 4 + [False] * 4 + [True] + [False] * 2
AFTER = [False] * 11 + [True] * 2 + [False] * 3 + [True]


@pytest.mark.parametrize(("positions", "steered"), [("think", INSIDE), ("answer", AFTER)])
def test_phases_of_thinking_while_decoding(llama: Any, positions: str, steered: list[bool]) -> None:
    """Token by token on a KV cache, in chunks, and as one text whose prompt is known."""
    names = llama.tokenizer.convert_ids_to_tokens([THINK, ANSWER])
    sl.data.set_rendering(llama.tokenizer, thinking=tuple(names))

    def loop(*chunks: list[int]) -> Any:
        def run() -> None:
            cache = with_cache(llama, torch.tensor([TURNS]))
            for chunk in chunks:
                with_cache(llama, torch.tensor([chunk]), cache)

        return run

    try:
        assert sum(steered) == (5 if positions == "think" else 3)
        for chunks in ([[token] for token in WRITTEN], [WRITTEN[:4], WRITTEN[4:]]):
            found = moved(llama, positions, loop(*chunks))
            assert list(chain.from_iterable(of[0] for of in found)) == steered
        both = moved(llama, f"{positions}+generated[0:1]", loop(WRITTEN))
        assert both[1][0] == [True, *steered[9:]]
        if not IS_TL3:  # which takes no embeddings
            message = "found by their ids"
            refused(llama, message, lambda: llama(torch.randn(1, 3, 32)), positions=positions)
    finally:
        sl.data.set_rendering(llama.tokenizer)
    refused(llama, "no <think> and </think>", lambda: None, positions=positions)


def test_right_padded_prompts_of_generate_are_warned_of(tiny: Any) -> None:
    right = torch.tensor([PROMPTS[0], [*PROMPTS[1], 3, 3]])
    left = torch.tensor([PROMPTS[0], [3, 3, *PROMPTS[1]]])
    for positions in ("all", "last"):
        with torch.no_grad(), sl.steer(tiny, {HOOK: DIRECTION}, 1.0, positions=positions):
            with pytest.warns(UserWarning, match="given to generate are padded on the right"):
                tiny.generate(right, **GREEDY)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                tiny.generate(left, **GREEDY)
                tiny.generate(right[:1], **GREEDY)
                tiny(right)  # no text goes on behind it
    if not IS_TL3:
        mask = (right != 3).long()
        with (
            torch.no_grad(),
            sl.steer(tiny, {HOOK: DIRECTION}, 1.0),
            pytest.warns(UserWarning, match="padded on the right") as told,
        ):
            tiny.hf_generate(right, attention_mask=mask, max_new_tokens=2, do_sample=False)
        assert len([w for w in told if "padded on the right" in str(w.message)]) == 1


def test_a_manual_loop_on_a_kv_cache_is_generation(llama: Any) -> None:
    def loop() -> None:
        cache = with_cache(llama, torch.tensor(PROMPTS[:1]))
        with_cache(llama, torch.tensor([[12]]), cache)

    assert moved(llama, "generated", loop) == [[[False] * 5], [[True]]]
    assert moved(llama, "prompt", loop) == [[[True] * 5], [[False]]]


def test_a_cache_from_before_the_block_is_refused(llama: Any) -> None:
    with torch.no_grad():
        cache = with_cache(llama, torch.tensor(PROMPTS[:1]))

    def go_on() -> None:
        with_cache(llama, torch.tensor([[12]]), cache)

    refused(llama, "where the prompt ends", go_on, "prompt")
    # All positions need not know.
    with torch.no_grad(), sl.steer(llama, {HOOK: DIRECTION}, 1.0):
        go_on()


def test_every_prompt_begins_anew(llama: Any) -> None:
    def twice() -> None:
        llama.generate(torch.tensor(PROMPTS[:1]), **GREEDY | {"max_new_tokens": 2})
        llama.generate(torch.tensor(PROMPTS[1:]), **GREEDY | {"max_new_tokens": 2})
        llama(torch.tensor(PROMPTS[:1]))

    assert moved(llama, "last", twice) == [
        [[False] * 4 + [True]],
        [[False]],
        [[False] * 2 + [True]],
        [[False]],
        [[False] * 4 + [True]],
    ]


def test_streamed_generation(llama: Any) -> None:
    def stream() -> None:
        for _ in llama.generate_stream(
            torch.tensor(PROMPTS[:1]), max_new_tokens=3, do_sample=False, verbose=False
        ):
            pass

    found = moved(llama, "generated", stream)
    assert found[0] == [[False] * 5]
    assert all(later == [[True]] for later in found[1:])
    assert len(found) > 1


def test_a_mask_that_does_not_fit_is_refused(llama: Any) -> None:
    other, tokens = (torch.tensor([ids]) for ids in reversed(PROMPTS))
    message = r"\(1, 5\), but the prompts of this pass are \(1, 3\)"
    refused(llama, message, lambda: llama(other), MASK)
    assert not vars(llama).get("generate")
    message = r"expected an attention mask of shape \(1, 5\)"
    refused(llama, message, lambda: llama(tokens, attention_mask=torch.ones(1, 1, 5, 5)))


def test_the_model_is_as_before_after_the_block(tiny: Any) -> None:
    inner = tiny if IS_TL3 else tiny.original_model
    before = [dict(vars(part)) for part in (tiny, inner)]

    def failing() -> None:
        with sl.steer(tiny, {HOOK: DIRECTION}, 1.0, positions="last"):
            assert "generate" in vars(tiny)
            assert "forward" in vars(inner)
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        failing()
    assert [dict(vars(part)) for part in (tiny, inner)] == before


@pytest.mark.parametrize(("name", "size"), [("hook_pattern", 4), ("hook_z", 8)])
def test_hooks_of_heads_are_refused(llama: Any, name: str, size: int) -> None:
    """Four tokens and four heads: a mask of tokens would choose heads."""
    tokens, hook = torch.tensor([PROMPTS[0][:4]]), f"blocks.1.attn.{name}"
    direction = torch.ones(size) / size**0.5
    refused(llama, "with a row a token", lambda: llama(tokens), hook=hook, direction=direction)


def test_what_is_no_position() -> None:
    unchecked = inspect.unwrap(check_positions)
    for right in ("all", "prompt", "generated", "last", MASK):
        unchecked(right)
    for right in ("last+generated", "generated[0:10]", "think+generated[5:]"):
        unchecked(right)
    wrong: list[Any] = [None, 3, b"all", [0, 1], torch.ones(1, 4), "first", "", "last+", "all[0:2]"]
    for positions in wrong:
        with pytest.raises(InputError, match="positions are all, prompt, generated, last"):
            unchecked(positions)


def test_a_stream_left_half_way_does_not_touch_what_runs_after(llama: Any) -> None:
    tokens, others = (torch.tensor([ids]) for ids in PROMPTS)
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "verbose": False}

    def run() -> None:
        stream = llama.generate_stream(tokens, max_tokens_per_yield=1, **options)
        next(stream)
        llama(others)
        next(stream)

    found = moved(llama, "last", run)
    assert found[0] == [[False] * 4 + [True]]
    assert [[False] * 2 + [True]] in found
    assert sum(True in row for rows in found for row in rows) == 2


@needs_bridge
def test_each_cache_keeps_its_prompts_end(llama: Any) -> None:
    def run() -> None:
        _, cache = llama(torch.tensor([[1, 8, 5]]), return_type="logits_and_cache", use_cache=True)
        llama(torch.tensor(PROMPTS[:1]), return_type="logits_and_cache", use_cache=True)
        llama(torch.tensor([[12]]), past_key_values=cache)

    assert moved(llama, "generated", run) == [[[False] * 3], [[False] * 5], [[True]]]


@needs_bridge
def test_a_prompt_in_chunks(llama: Any) -> None:
    tokens = torch.tensor([[*PROMPTS[0], 9]])
    options: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False, "stop_at_eos": False}

    def run() -> None:
        llama.hf_generate(tokens, prefill_chunk_size=3, **options)

    assert moved(llama, "generated", run)[:3] == [[[False] * 3], [[False] * 3], [[True]]]
    assert moved(llama, "last", run)[:3] == [[[False] * 3], [[False, False, True]], [[False]]]


@needs_bridge
def test_hugging_faces_own_generate_without_a_cache(llama: Any) -> None:
    tokens = torch.tensor(PROMPTS[1:])

    def run() -> None:
        llama.original_model.generate(
            tokens, max_new_tokens=2, min_new_tokens=2, do_sample=False, use_cache=False
        )

    assert moved(llama, "generated", run) == [[[False] * 3], [[False] * 3 + [True]]]


def test_blocks_that_end_in_another_order_leave_nothing(llama: Any) -> None:
    def block() -> Any:
        with sl.steer(llama, {HOOK: DIRECTION}, 1.0, positions="last"):
            yield

    before = dict(vars(llama))
    first, second = block(), block()
    next(first)
    next(second)
    first.close()
    second.close()
    assert dict(vars(llama)) == before
    llama.reset_hooks()
    found: list[Any] = []
    thread = threading.Thread(
        target=lambda: found.extend(moved(llama, "all", lambda: llama(MASK.long())))
    )
    thread.start()
    thread.join()
    assert found == [[[True] * 5]]


def test_a_pass_by_hand() -> None:
    real = torch.tensor([[False, True, True, True], [True, True, True, True]])
    now = Pass(n_before=0, n_prompt=3, real=real)
    assert now.mask("prompt").tolist() == [[True, True, True, False]] * 2
    assert now.mask("generated").tolist() == [[False, False, False, True]] * 2
    assert now.mask("last").tolist() == [[False, False, True, False]] * 2
    assert now.prompt_tokens().tolist() == [[False, True, True, False], [True, True, True, False]]
    later = Pass(n_before=3, n_prompt=3, real=real)
    assert later.mask("all").tolist() == [[True], [True]]
    assert later.mask("generated").tolist() == [[True], [True]]
    assert later.mask("last").tolist() == [[False], [False]]
