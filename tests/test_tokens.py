"""Tokens: BOS once, continuations after prompts, batches whose positions hit the right token."""

from itertools import chain
from typing import Any

import pytest
import torch
from conftest import bridge, build_llama, build_tokenizer, padding
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlens import ContrastivePairs
from steerlens.data.prompts import Message, render
from steerlens.engine import batches
from steerlens.engine.batches import Batch, make_batches, make_split_batches
from steerlens.engine.tokenization import (
    TokenizedPairs,
    TokenizedPrompt,
    check_steered_positions,
    tokenize_pairs,
    tokenize_prompt,
)
from steerlens.errors import InputError, ModelError

BOS, EOS = 1, 2
N_CTX = 64
SIDES = ("left", "right")

pytestmark = pytest.mark.usefixtures("much_padding")
CHAT = (Message("user", "how are you"), Message("assistant", "it was"))


def numbered(*lengths: tuple[int, int]) -> list[TokenizedPrompt]:
    """Prompts of (prompt, continuation) lengths in which every token id occurs once."""
    return [
        TokenizedPrompt(
            tuple(range(1000 * (row + 1), 1000 * (row + 1) + n_prompt)),
            tuple(range(1000 * (row + 1) + 500, 1000 * (row + 1) + 500 + n_after)),
            where=f"prompt {row}",
        )
        for row, (n_prompt, n_after) in enumerate(lengths)
    ]


# BOS


def give_tokenizer(monkeypatch: pytest.MonkeyPatch, model: Any, tokenizer: Any) -> None:
    """Another tokenizer for the test; TransformerLens changes the vocabulary's size with it."""
    for name in ("d_vocab", "d_vocab_out"):
        monkeypatch.setattr(model.cfg, name, getattr(model.cfg, name))
    monkeypatch.setattr(model, "tokenizer", tokenizer)


@pytest.mark.parametrize("text", ["the river was", "you are kind . how\n", "rain"])
def test_plain_text_has_the_ids_of_transformer_lens(tiny: Any, text: str) -> None:
    ids = tokenize_prompt(tiny, text).prompt
    assert ids == tuple(tiny.to_tokens(text)[0].tolist())
    assert ids.count(BOS) == 1
    assert ids[0] == BOS


def test_bos_is_not_doubled_when_the_template_writes_it(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_bos = llama.tokenizer
    without_bos = build_tokenizer(
        chat_template=with_bos.chat_template.removeprefix("{{ bos_token }}")
    )
    assert render(CHAT, with_bos) == "<s>" + render(CHAT, without_bos)
    ids = tokenize_prompt(llama, CHAT).prompt
    assert ids.count(BOS) == 1
    assert ids[0] == BOS
    # A template that leaves BOS out gets it from us, to the same ids.
    give_tokenizer(monkeypatch, llama, without_bos)
    assert tokenize_prompt(llama, CHAT).prompt == ids


def test_the_model_decides_on_bos(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_bos = tokenize_prompt(llama, "the river").prompt
    monkeypatch.setattr(llama.cfg, "default_prepend_bos", False)
    without = tokenize_prompt(llama, "the river").prompt
    assert (BOS, *without) == with_bos
    assert without == tuple(llama.to_tokens("the river")[0].tolist())
    # The template's own BOS is part of the prompt's text, so it stays.
    assert tokenize_prompt(llama, CHAT).prompt.count(BOS) == 1


def test_a_tokenizer_without_bos_adds_none(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with_bos = tokenize_prompt(llama, "the river").prompt
    give_tokenizer(monkeypatch, llama, build_tokenizer())
    llama.tokenizer.bos_token = None  # Only now: a bridge that is given no BOS takes EOS for it.
    assert (BOS, *tokenize_prompt(llama, "the river").prompt) == with_bos


def test_the_bos_that_transformer_lens_chooses_is_used() -> None:
    """TransformerLens takes EOS as BOS where the tokenizer has none; so do we, with its ids."""
    model = bridge(build_llama(n_layers=1), build_tokenizer(bos_token=None))
    ids = tokenize_prompt(model, "the river").prompt
    assert ids == tuple(model.to_tokens("the river")[0].tolist())
    assert ids[0] == EOS


# Prompts, continuations, pairs


@pytest.mark.parametrize("prompt", ["the river was", CHAT], ids=["text", "chat"])
def test_the_continuation_follows_the_prompt(tiny: Any, prompt: Any) -> None:
    alone = tokenize_prompt(tiny, prompt)
    whole = tokenize_prompt(tiny, prompt, " warm and good")
    assert alone.continuation == ()
    assert whole.prompt == alone.prompt
    assert whole.continuation == tuple(tiny.to_tokens("warm and good")[0, 1:].tolist())
    assert len(whole) == len(alone) + 3


def test_pairs_keep_order_and_only_positive_prompts_have_continuations(llama: Any) -> None:
    pairs = ContrastivePairs.from_lists(
        ["you are kind", "cheerful"], ["you are rude", "gloomy"], [" so", " very good"]
    )
    tokenized = tokenize_pairs(llama, pairs)
    for side in ("positive", "negative"):
        for pair, prompt in zip(pairs, getattr(tokenized, side), strict=True):
            assert prompt.prompt == tokenize_prompt(llama, getattr(pair, side)).prompt
    assert [len(prompt.continuation) for prompt in tokenized.positive] == [1, 2]
    assert [len(prompt.continuation) for prompt in tokenized.negative] == [0, 0]


def test_prompts_of_the_same_ids_are_refused(llama: Any) -> None:
    """Two words that the tokenizer does not know differ as text only."""
    words = ["you are", "you are zzz"]
    with pytest.raises(InputError, match="pair '2' tokenise to the same ids"):
        tokenize_pairs(llama, ContrastivePairs.from_lists(words, ["I am", "you are qqq"]))
    # The continuation follows the positive prompt only, so it makes no difference between them.
    with pytest.raises(InputError, match="pair '2' tokenise to the same ids"):
        tokenize_pairs(
            llama, ContrastivePairs.from_lists(words, ["I am", "you are qqq"], [" so", " so"])
        )
    tokenized = tokenize_pairs(llama, ContrastivePairs.from_lists(words, ["I am", "you are kind"]))
    assert tokenized.positive[1].prompt != tokenized.negative[1].prompt


@pytest.mark.parametrize("side", ["positive", "negative"])
def test_a_prompt_longer_than_the_context_is_named(llama: Any, side: str) -> None:
    columns = {"positive": ["kind", "cheerful"], "negative": ["rude", "gloomy"]}
    assert len(tokenize_pairs(llama, ContrastivePairs.from_lists(**columns)).positive) == 2
    columns[side][1] = "very " * N_CTX
    with pytest.raises(InputError, match=f"{side} prompt of pair '2' has {N_CTX + 1} tokens"):
        tokenize_pairs(llama, ContrastivePairs.from_lists(**columns))


@pytest.mark.parametrize("text", ["", " "])
def test_a_prompt_without_tokens_is_refused(llama: Any, text: str) -> None:
    with pytest.raises(InputError, match="no tokens"):
        tokenize_prompt(llama, text)
    assert tokenize_prompt(llama, "so").prompt[1:]


def test_a_continuation_without_tokens_is_refused(llama: Any) -> None:
    with pytest.raises(InputError, match="no tokens"):
        tokenize_prompt(llama, "the river", " ")
    assert tokenize_prompt(llama, "the river", " was ").continuation


def test_a_model_without_a_tokenizer_is_refused(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tokenize_prompt(llama, "the river").prompt
    give_tokenizer(monkeypatch, llama, None)
    with pytest.raises(ModelError, match="no tokenizer"):
        tokenize_prompt(llama, "the river")


# Batches

lengths = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=1, max_size=9)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, batch_size=st.integers(1, 5), side=st.sampled_from(SIDES))
def test_batches_hold_every_prompt_once_and_shortest_first(
    gpt2: Any, lengths: list[tuple[int, int]], batch_size: int, side: str
) -> None:
    prompts = numbered(*lengths)
    with padding(gpt2, side):
        batches = make_batches(gpt2, prompts, batch_size)
    rows = [row for batch in batches for row in batch.rows]
    assert sorted(rows) == list(range(len(prompts)))
    in_order = [len(prompts[row]) for row in rows]
    assert in_order == sorted(in_order)
    assert all(len(batch.rows) == batch_size for batch in batches[:-1])
    for batch in batches:
        assert batch.prompts == tuple(prompts[row] for row in batch.rows)
        width = max(map(len, batch.prompts))
        assert batch.tokens.shape == batch.attention_mask.shape == (len(batch.rows), width)
        for prompt, ids, mask in zip(
            batch.prompts, batch.tokens, batch.attention_mask, strict=True
        ):
            assert tuple(ids[mask].tolist()) == prompt.prompt + prompt.continuation
            assert set(ids[~mask].tolist()) <= {0}  # in any vocabulary
            # The real tokens are one run that touches the side that is not padded.
            edge = mask.flip(0) if side == "left" else mask
            assert edge.tolist() == [True] * len(prompt) + [False] * (width - len(prompt))
        if batch.attention_mask.all():
            assert batch.forward_kwargs == {}
        else:
            sent = batch.forward_kwargs["attention_mask"]
            assert sent.dtype == torch.long
            assert torch.equal(sent.bool(), batch.attention_mask)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, batch_size=st.sampled_from([1, 4, None]))
def test_padding_is_a_tenth_at_most(
    gpt2: Any, lengths: list[tuple[int, int]], batch_size: int | None
) -> None:
    prompts = numbered(*((n + 1, after) for n, after in lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "MAX_PADDING", 0.1)
        whole = make_batches(gpt2, prompts, batch_size)
        parts = make_split_batches(gpt2, prompts, batch_size)
        apart = make_batches(gpt2, numbered((4, 0), (20, 0)), None)
        together = make_batches(gpt2, numbered((19, 0), (20, 0)), None)
    for batch in (*whole, *(part for pair in parts for part in pair)):
        assert (~batch.attention_mask).sum() <= 0.1 * batch.tokens.numel()
        assert len(batch.rows) <= (batch_size or 10)
    assert (len(apart), len(together)) == (2, 1)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths)
def test_split_batches_are_the_whole_prompts_in_two(
    gpt2: Any, lengths: list[tuple[int, int]]
) -> None:
    prompts = numbered(*((n + 1, after) for n, after in lengths))
    rows = []
    for head, tail in make_split_batches(gpt2, prompts, 4):
        assert head.rows == tail.rows
        rows += head.rows
        joined = torch.cat([head.tokens, tail.tokens], dim=1)
        mask = torch.cat([head.attention_mask, tail.attention_mask], dim=1)
        for prompt, ids, real in zip(head.prompts, joined, mask, strict=True):
            assert tuple(ids[real].tolist()) == prompt.prompt + prompt.continuation
        columns = tail.places(-1)
        assert columns.tolist() == [0] * len(tail.rows)
        for i, prompt in enumerate(tail.prompts):
            n_after = len(prompt.continuation)
            assert tail.steered_mask("continuation")[i].tolist()[: n_after + 1] == (
                [False] + [True] * n_after
            )
            assert tail.steered_mask("last")[i].nonzero().tolist() == [[0]]
            # In a part of the prompt the first token of the whole is another part's.
            assert tail.predicted_mask()[i].sum() == n_after + 1
            if n_after:
                assert tail.label_mask()[i].sum() == n_after
    assert sorted(rows) == list(range(len(prompts)))


@settings(max_examples=60, deadline=None)
@given(lengths=lengths, side=st.sampled_from(SIDES), data=st.data())
def test_a_position_hits_the_same_token_whatever_the_padding(
    gpt2: Any, lengths: list[tuple[int, int]], side: str, data: st.DataObject
) -> None:
    prompts = numbered(*lengths)
    with padding(gpt2, side):
        (batch,) = make_batches(gpt2, prompts, len(prompts))
    shortest = min(n_prompt for n_prompt, _ in lengths)
    position = data.draw(st.integers(-shortest, shortest - 1))
    columns = batch.places(position)
    hit = batch.tokens[torch.arange(len(columns)), columns]
    assert hit.tolist() == [prompt.prompt[position] for prompt in batch.prompts]
    for outside in (-shortest - 1, shortest):
        with pytest.raises(InputError, match=f"position {outside} is outside the prompt"):
            batch.places(outside)


@pytest.mark.parametrize(("position", "index"), [(0, 0), (2, 2), (-1, 2), (-3, 0)])
def test_index_counts_in_the_prompt_and_not_in_its_continuation(position: int, index: int) -> None:
    (prompt,) = numbered((3, 2))
    assert prompt.index(position) == index


@pytest.mark.parametrize("side", SIDES)
def test_a_position_outside_a_prompt_is_named(llama: Any, side: str) -> None:
    pairs = ContrastivePairs.load(
        [
            {"positive": "the river was kind", "negative": "the rain", "id": "long"},
            {"positive": "kind", "negative": "rude", "id": "short", "continuation": " and so on"},
        ]
    )
    with padding(llama, side):
        (batch,) = make_batches(llama, tokenize_pairs(llama, pairs).positive, 2)
    for position in (2, -3):
        with pytest.raises(
            InputError,
            match=f"position {position} is outside the positive prompt of pair 'short', which has "
            "2 tokens",
        ):
            batch.places(position)
    for position, words in ((1, ["the", "kind"]), (-2, ["was", "<s>"])):
        hit = batch.tokens[torch.arange(2), batch.places(position)].tolist()
        assert llama.tokenizer.convert_ids_to_tokens(hit) == words


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(gpt2: Any, batch_size: int) -> None:
    prompts = numbered((2, 0), (3, 0))
    with pytest.raises(InputError, match=f"batch_size must be at least 1, got {batch_size}"):
        make_batches(gpt2, prompts, batch_size)
    assert len(make_batches(gpt2, prompts, 1)) == 2


# Masks: two rows, "3 prompt tokens and 2 of a continuation" and "4 prompt tokens".
MASKS = {
    "all": {"left": "11111 01111", "right": "11111 11110"},
    "prompt": {"left": "11100 01111", "right": "11100 11110"},
    "continuation": {"left": "00011 00000", "right": "00011 00000"},
    "last": {"left": "00100 00001", "right": "00100 00010"},
    # Of a continuation, or of the prompt from its second token on.
    "label": {"left": "00011 00111", "right": "00011 01110"},
}


def mask_of(batch: Batch, kind: Any) -> torch.Tensor:
    return batch.label_mask() if kind == "label" else batch.steered_mask(kind)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("side", SIDES)
def test_masks_by_hand(gpt2: Any, kind: str, side: str) -> None:
    with padding(gpt2, side):
        (batch,) = make_batches(gpt2, numbered((3, 2), (4, 0)), 2)
    assert batch.rows == (1, 0)  # Shortest first.
    mask = mask_of(batch, kind).flip(0).int().tolist()
    assert " ".join("".join(map(str, row)) for row in mask) == MASKS[kind][side]


@settings(max_examples=40, deadline=None)
@given(lengths=lengths, side=st.sampled_from(SIDES))
def test_masks_pick_the_tokens_they_name(
    gpt2: Any, lengths: list[tuple[int, int]], side: str
) -> None:
    with padding(gpt2, side):
        (batch,) = make_batches(gpt2, numbered(*lengths), len(lengths))
    prompts = batch.prompts
    expected = {
        "all": [p.prompt + p.continuation for p in prompts],
        "prompt": [p.prompt for p in prompts],
        "continuation": [p.continuation for p in prompts],
        "last": [p.prompt[-1:] for p in prompts],
        "label": [p.continuation or p.prompt[1:] for p in prompts],
    }
    for kind, ids in expected.items():
        picked = batch.tokens[mask_of(batch, kind)]
        assert picked.tolist() == list(chain.from_iterable(ids)), kind


# Where steering can reach a label


def tokenized(*n_after: int) -> TokenizedPairs:
    return TokenizedPairs(
        tuple(numbered(*((3, n) for n in n_after))), tuple(numbered(*((3, 0) for _ in n_after)))
    )


@pytest.mark.parametrize("positions", ["all", "prompt"])
@pytest.mark.parametrize("n_after", [(0, 0), (2, 0), (2, 1)])
def test_steering_the_prompt_always_reaches_labels(
    positions: str, n_after: tuple[int, ...]
) -> None:
    check_steered_positions(positions, tokenized(*n_after))


@pytest.mark.parametrize("positions", ["continuation", "last"])
def test_steering_after_the_prompt_needs_every_continuation(positions: str) -> None:
    for n_after in ((0, 0), (2, 0)):
        with pytest.raises(InputError, match=f"steering at '{positions}' .* no continuation"):
            check_steered_positions(positions, tokenized(*n_after))
    check_steered_positions(positions, tokenized(2, 2))


def test_the_only_label_must_come_after_what_is_steered() -> None:
    """The logprob of the continuation's first token is that of the logits before it."""
    with pytest.raises(InputError, match="labels after the first token there, and no prompt has"):
        check_steered_positions("continuation", tokenized(1, 1))
    check_steered_positions("continuation", tokenized(2, 1))
    check_steered_positions("last", tokenized(1, 1))


def test_unknown_steered_positions_are_refused_with_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"all, prompt, last.* not 'first'"):
        check_steered_positions("first", tokenized(2, 1))
    check_steered_positions("all", tokenized(2, 1))


def test_masks_are_kept_and_can_be_differentiated_through(
    llama: Any, pairs: ContrastivePairs
) -> None:
    (batch, *_) = make_batches(llama, tokenize_pairs(llama, pairs).positive, 3)
    with torch.inference_mode():
        first = batch.steered_mask("all")
    assert batch.steered_mask("all") is first
    assert not first.is_inference()
    assert torch.equal(batch.labels_on_cpu(), batch.label_mask())
    assert batch.is_whole.tolist() == batch.attention_mask.all(dim=1).tolist()
