"""Prompts that begin alike: their activations are those of whole passes, for fewer tokens."""

from typing import Any
from weakref import WeakSet

import pytest
import torch

from steerlens.engine import beginnings, capture
from steerlens.engine.beginnings import KEPT, _width, common_beginnings, make_beginnings
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.models.hooks import resolve_hooks


def prompts_of(
    model: Any, *, n: int, beginnings: tuple[int, ...] = (18, 25)
) -> list[TokenizedPrompt]:
    """`n` prompts after each of some beginnings of so many tokens, and one that shares nothing."""
    generator = torch.Generator().manual_seed(0)

    def drawn(size: int) -> tuple[int, ...]:
        draw = torch.randint(3, int(model.cfg.d_vocab), (size,), generator=generator)
        return tuple(draw.tolist())

    shared = [drawn(size) for size in beginnings]
    texts = [(*shared[i % len(shared)], *drawn(2 + i % 6)) for i in range(n * len(shared))]
    return [TokenizedPrompt(text, (), f"text {i}") for i, text in enumerate((*texts, drawn(9)))]


def test_texts_are_told_apart_where_that_saves_more() -> None:
    # Five tokens of each pair, 2 * 5 in all, against 3 * 1 of all four.
    texts = [(1, 2, 2, 2, 2, 8), (1, 3, 3, 3, 3, 8), (1, 2, 2, 2, 2, 9), (1, 3, 3, 3, 3, 9)]
    assert common_beginnings(texts) == [5, 5, 5, 5]
    # One of all four, 3 * 1, against nothing: no two go on alike.
    assert common_beginnings([(1, 2), (1, 3), (1, 4), (1, 5)]) == [1, 1, 1, 1]
    assert common_beginnings([(7,), (8, 1)]) == [0, 0]
    assert common_beginnings([]) == []


def test_texts_that_go_on_from_one_another_do_not_run_too_deep() -> None:
    lengths = common_beginnings([(1,) * n for n in range(1, 1500)])
    assert len(lengths) == 1499
    assert all(length <= n for n, length in enumerate(lengths, 1))


@pytest.mark.parametrize("batch_size", [None, 7])
@pytest.mark.parametrize("position", [-1, -2])
def test_activations_are_those_of_whole_passes(
    tiny: Any, position: int, batch_size: int | None
) -> None:
    prompts, names = prompts_of(tiny, n=50), resolve_hooks(tiny, "all")
    groups = make_beginnings(tiny, prompts, position, batch_size)
    heads = [group.head.tokens.numel() for group in groups if group.head is not None]
    tails = [batch.tokens.numel() for group in groups for batch in group.tails]
    # 43 tokens of beginnings once, and 1100 of 50 prompts after each not.
    assert 43 <= sum(heads) < 60
    assert sum(tails) < sum(map(len, prompts)) / 2
    found = capture.collect_activations(
        tiny, prompts, names, position=position, batch_size=batch_size
    )
    reading = capture._Reading(tiny, names, position, batch_size)
    expected = reading.by_whole_passes(prompts, lambda *told: None)
    assert not torch.equal(found, expected)  # it was another way
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_what_is_read_is_not_in_a_beginning(llama: Any) -> None:
    prompts = prompts_of(llama, n=100)
    tail, *_ = make_beginnings(llama, prompts, -1, 1000)[0].tails
    assert min(tail.n_before) == 18
    # The third token from the beginning is read, so two are shared: too few.
    assert make_beginnings(llama, prompts, 2, 1000) == []
    # So are those of few prompts.
    assert make_beginnings(llama, prompts_of(llama, n=10), -1, 1000) == []


def test_prompts_run_whole_where_kept_keys_give_something_else(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, names = prompts_of(llama, n=50), resolve_hooks(llama, "all")
    expected = capture._Reading(llama, names, -1, None).by_whole_passes(prompts, lambda *told: None)
    right = capture.run_prefix

    def wrong(*args: Any, **options: Any) -> Any:
        prefix = right(*args, **options)
        for layer in prefix.cache.layers:
            layer.values = layer.values + 1
        return prefix

    monkeypatch.setattr(capture, "run_prefix", wrong)
    monkeypatch.setattr(capture, "_run_whole", WeakSet())
    with pytest.warns(RuntimeWarning, match="prompts are run whole"):
        found = capture.collect_activations(llama, prompts, names)
    assert torch.equal(found, expected)
    # It is not tried again: there would be a warning, which is an error here.
    assert torch.equal(capture.collect_activations(llama, prompts, names), expected)


def test_beginnings_are_run_up_to_the_last_hook_alone(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, names, kept = prompts_of(llama, n=50), resolve_hooks(llama, [0]), []
    right = capture.run_prefix

    def noting(*args: Any, **options: Any) -> Any:
        kept.append(right(*args, **options))
        return kept[-1]

    monkeypatch.setattr(capture, "run_prefix", noting)
    expected = capture._Reading(llama, names, -1, None).by_whole_passes(prompts, lambda *told: None)
    found = capture.collect_activations(llama, prompts, names)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    filled = [layer.keys is not None for prefix in kept for layer in prefix.cache.layers]
    assert filled == [True, *[False] * (len(llama.blocks) - 1)] * len(kept)
    assert kept


def test_batches_hold_few_copies_of_long_beginnings(llama: Any) -> None:
    """Each row keeps a copy: eight kept tokens count for one that is run."""
    prompts = prompts_of(llama, n=600, beginnings=(56,))
    (group, *_) = make_beginnings(llama, prompts, -1, None)
    longest = max(len(tail.rows) for tail in group.tails)
    assert 1 < longest <= 1024 / (1 + 56 // KEPT)


def test_no_batch_is_longer_than_the_context(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = prompts_of(llama, n=50)
    widest = max(map(_width, make_beginnings(llama, prompts, -1, None)))
    for room, is_split in ((widest, True), (widest - 1, False)):
        monkeypatch.setattr(beginnings, "context_length", lambda model, room=room: room)
        assert bool(make_beginnings(llama, prompts, -1, None)) == is_split


def test_out_of_memory_prompts_are_run_whole(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, names = prompts_of(llama, n=50), resolve_hooks(llama, "all")

    def failing(reason: str) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            raise RuntimeError(reason)

        return run

    expected = capture._Reading(llama, names, -1, None).by_whole_passes(prompts, lambda *told: None)
    monkeypatch.setattr(
        capture, "run_prefix", failing("DefaultCPUAllocator: can't allocate memory")
    )
    assert torch.equal(capture.collect_activations(llama, prompts, names), expected)
    monkeypatch.setattr(capture, "run_prefix", failing("another"))
    with pytest.raises(RuntimeError, match="another"):
        capture.collect_activations(llama, prompts, names)
