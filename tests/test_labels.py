"""Labels: which tokens the logprob is measured on, at the edge of a study."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from bare import mean_logprob
from conftest import build_tokenizer

import steerlens as sl
from steerlens.data.prompts import message_spans, render
from steerlens.engine.continuations import until_end
from steerlens.engine.labels import segments, with_labels
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_pairs, tokenize_prompt
from steerlens.errors import InputError


@pytest.fixture(scope="module")
def chats() -> sl.ContrastivePairs:
    """Chats whose assistant begins to speak, one of them after a turn before."""

    def chat(mood: str, *turns: str) -> list[dict[str, str]]:
        roles = ["user", "assistant"] * 2
        said = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
        return [{"role": "system", "content": f"you are {mood}"}, *said]

    openings = [
        ("how was the walk", "the walk was"),
        ("how went it", "so"),
        ("how was the soup ?", "very good soup", "and the bread", "it was by"),
    ]
    return sl.ContrastivePairs.from_lists(
        [chat("cheerful", *turns) for turns in openings],
        [chat("very gloomy", *turns) for turns in openings],
    )


def texts(model: Any, prompts: Sequence[TokenizedPrompt]) -> list[str]:
    """The labels of each prompt."""
    return [model.tokenizer.decode([p.ids[i] for i in p.label_tokens]) for p in prompts]


def test_segments_of_a_chat(llama: Any, chats: sl.ContrastivePairs) -> None:
    """By hand: BOS and "[system]" are the template's, then come the persona's three words."""
    positive = tokenize_pairs(llama, chats).positive
    assert segments(llama, positive)[0] == (
        *("template",) * 2,
        *("system",) * 3,
        "template",
        *("user",) * 4,
        "template",
        *("assistant",) * 3,
    )
    [text] = segments(llama, [tokenize_prompt(llama, "the river was", " so cold")])
    assert text == ("text",) * 4 + ("continuation",) * 2


def test_labels_of_the_assistant(llama: Any, chats: sl.ContrastivePairs) -> None:
    positive = tokenize_pairs(llama, chats).positive
    by_default = with_labels(llama, positive)
    assert texts(llama, by_default) == ["the walk was", "so", "very good soup it was by"]
    assert by_default == with_labels(llama, positive, "assistant")
    everything = with_labels(llama, positive, "all")
    assert all(p.label_tokens == tuple(range(1, len(p))) for p in everything)


@pytest.mark.parametrize("labels", [None, "assistant", "all", "own", "own_sampled"])
def test_a_study_measures_its_labels(llama: Any, chats: sl.ContrastivePairs, labels: Any) -> None:
    """Baseline and cells are the labels' mean logprob, computed once more with nothing shared."""
    directions = sl.fit(llama, chats, layers=[1])
    study = sl.Study(llama, chats, directions, layers=[1], labels=labels, own_tokens=6, seed=3)
    result = study.sweep([0, 2])
    prompts = study.tokens.positive
    expected = [mean_logprob(llama, p.ids, p.label_tokens) for p in prompts]
    steered = []
    for prompt in prompts:
        with sl.steer(
            llama, {"blocks.1.hook_resid_post": directions["blocks.1.hook_resid_post"]}, 2
        ):
            steered.append(mean_logprob(llama, prompt.ids, prompt.label_tokens))
    assert result.table.logprob_nats.tolist() == pytest.approx(
        [np.mean(expected), np.mean(steered)], abs=1e-5
    )
    assert result.layers.logprob_nats.tolist() == pytest.approx([np.mean(expected)], abs=1e-5)
    settings = result.table.attrs["settings"]
    assert settings["labels"] == (labels or "assistant")
    assert settings["own_tokens"] == (6 if labels in ("own", "own_sampled") else None)


def test_own_text_is_what_the_model_writes(llama: Any, chats: sl.ContrastivePairs) -> None:
    """Greedy: each token is the likeliest after those before it; and as `generate` has it."""
    positive = tokenize_pairs(llama, chats).positive
    own = with_labels(llama, positive, "own", own_tokens=5)
    for prompt, before in zip(own, positive, strict=True):
        assert prompt.prompt == before.prompt
        assert 1 <= len(prompt.continuation) <= 5
        with torch.no_grad():
            likeliest = llama(torch.tensor([prompt.ids]))[0].argmax(-1).tolist()
        assert [likeliest[i - 1] for i in prompt.label_tokens] == list(prompt.continuation)
    sampled = [with_labels(llama, positive, "own_sampled", seed=seed) for seed in (0, 0, 1)]
    assert sampled[0] == sampled[1] != sampled[2]
    assert all(len(prompt.continuation) <= 32 for prompt in sampled[0])


def test_own_text_ends_with_its_end(llama: Any) -> None:
    """The end-of-text token is the model's own prediction too; what comes after it is not."""
    prompt = tokenize_prompt(llama, "the river was")
    [free] = with_labels(llama, [prompt], "own", own_tokens=6)
    end = free.continuation[2]
    first = free.continuation.index(end)
    before, llama.tokenizer.eos_token_id = llama.tokenizer.eos_token_id, end
    try:
        [ended] = with_labels(llama, [prompt], "own", own_tokens=6)
    finally:
        llama.tokenizer.eos_token_id = before
    assert ended.continuation == free.continuation[: first + 1]


def test_a_text_ends_at_any_token_that_the_model_ends_at(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint may name several, and the tokenizer another one, with which rows are filled."""
    ids = [50, 51, 107, llama.tokenizer.eos_token_id, llama.tokenizer.eos_token_id]
    for stops, n_kept in (([107, 2], 2), (107, 2), (None, 3)):
        monkeypatch.setattr(llama.cfg, "eos_token_id", stops, raising=False)
        assert until_end(ids, llama) == tuple(ids[:n_kept])
        assert until_end(ids, llama, with_end=True) == tuple(ids[: n_kept + 1])


def test_a_gradient_needs_a_label_behind_it(llama: Any, chats: sl.ContrastivePairs) -> None:
    """Of a chat whose last turn is the user's, the assistant's tokens lie before the last two."""
    answered = sl.ContrastivePairs.from_lists(
        *(
            [[*(m._asdict() for m in side), {"role": "user", "content": "so it is"}] for side in of]
            for of in zip(*((pair.positive, pair.negative) for pair in chats), strict=True)
        )
    )
    with pytest.raises(InputError, match="no label comes after position -2"):
        sl.loss_gradients(llama, answered, layers=[1])
    for labels, position in (("own", -1), ("all", -2)):
        gradients = sl.loss_gradients(llama, answered, layers=[1], labels=labels, position=position)
        assert (gradients.coherence.norm(dim=-1) > 0).all()


def test_the_boundary_of_own_text(llama: Any, many: sl.ContrastivePairs) -> None:
    """Labels are those of the text that a boundary is measured on, and the record says which."""
    directions = sl.fit(llama, many, layers=[1])
    shared: dict[str, Any] = {"layers": [1], "budget": "nats=0.05", "own_tokens": 5}
    study = sl.Study(llama, many, directions, labels="own", **shared)
    found = study.boundary()
    at = float(found.layers.boundary_pos.iloc[0])
    losses = []
    for prompt in study.tokens.positive:
        before = mean_logprob(llama, prompt.ids, prompt.label_tokens)
        with sl.steer(
            llama, {"blocks.1.hook_resid_post": directions["blocks.1.hook_resid_post"]}, at
        ):
            losses.append(before - mean_logprob(llama, prompt.ids, prompt.label_tokens))
    assert np.mean(losses) == pytest.approx(0.05, rel=0.05)
    assert found.layers.attrs["settings"]["labels"] == "own"
    of_text = study.boundary(on=["the river was so cold"])
    assert of_text.layers.attrs["settings"]["own_tokens"] == 5
    by_default = sl.find_boundary(llama, many, directions, layers=[1], budget="nats=0.05")
    assert by_default.layers.attrs["settings"]["labels"] == "all"
    assert float(by_default.layers.boundary_pos.iloc[0]) != at


def test_damage_part_by_part(llama: Any, chats: sl.ContrastivePairs) -> None:
    directions = sl.fit(llama, chats, layers=[1, 2])
    study = sl.Study(llama, chats, directions, layers=[1, 2], budget="nats=0.05", own_tokens=4)
    boundary = study.boundary()
    for others in ((directions, [1]), (sl.fit(llama, chats, method="pca", layers=[1, 2]), [1, 2])):
        with pytest.raises(InputError, match="expected boundaries of this study"):
            sl.Study(llama, chats, others[0], layers=others[1]).segments(boundary)
    table = study.segments(boundary)
    assert set(table.segment) == {"template", "system", "user", "assistant", "own"}
    reached = boundary.layers[["boundary_pos", "boundary_neg"]].to_numpy().flatten()
    assert sorted(set(table.coefficient)) == sorted(c for c in reached if np.isfinite(c))
    # The labels of the budget are the assistant's tokens, so what these lose is the budget.
    spent = table[table.segment == "assistant"].degradation_nats
    assert np.allclose(spent, 0.05, rtol=0.05)
    row = table[(table.layer == 1) & (table.segment == "system")].iloc[0]
    own = with_labels(llama, tokenize_pairs(llama, chats).positive, "own", own_tokens=4)
    losses = []
    for prompt, parts in zip(own, segments(llama, own), strict=True):
        labels = [i for i, part in enumerate(parts) if part == "system"]
        before = mean_logprob(llama, prompt.ids, labels)
        with sl.steer(
            llama,
            {"blocks.1.hook_resid_post": directions["blocks.1.hook_resid_post"]},
            row.coefficient,
        ):
            losses.append(before - mean_logprob(llama, prompt.ids, labels))
    assert row.degradation_nats == pytest.approx(np.mean(losses), abs=1e-5)
    assert row.n_tokens == 9
    assert row.n_prompts == 3
    assert row.kl_nats > 0


def test_a_template_that_trims_or_drops_a_message() -> None:
    chat = (sl.Message("system", "you are kind"), sl.Message("user", " how was it "))
    source = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }} \n {% endfor %}"
    [system, user] = message_spans(chat, build_tokenizer(chat_template=source))
    text = render(chat, build_tokenizer(chat_template=source))
    assert text[system.start : system.stop] == "you are kind"
    assert text[user.start : user.stop] == "how was it"
    for ends in ("strip", "lstrip", "rstrip"):
        cut = build_tokenizer(
            chat_template=source.replace("m.content | trim", f"m.content.{ends}()")
        )
        [_, user] = message_spans(chat, cut)
        assert render(chat, cut)[user.start : user.stop] == getattr(" how was it ", ends)()
    alone = source.replace("in messages", "in messages if m.role != 'system'")
    [user] = message_spans(chat, build_tokenizer(chat_template=alone))
    assert user.role == "user"
    wordy = source.replace("{{ m.content | trim }}", "{{ m.content | length }} {{ m.content }}")
    with pytest.raises(InputError, match="writes another text around"):
        message_spans(chat, build_tokenizer(chat_template=wordy))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (None, "2 of the kind 'all', 1 of the kind 'continuation'"),
        ("continuation", "2 of 3 prompts have no label of the kind 'continuation'"),
        ("assistant", "3 of 3 prompts have no label of the kind 'assistant'"),
        ("words", "labels"),
    ],
)
def test_labels_that_there_are_not(llama: Any, labels: Any, words: str) -> None:
    """A mean over labels of two kinds says nothing of either."""
    records = [
        {"positive": f"you are cheerful {x}", "negative": f"you are gloomy {x}", **more}
        for x, more in (("so", {}), ("by", {"continuation": " the river"}), ("it", {}))
    ]
    mixed = sl.ContrastivePairs.load(records)
    directions = sl.fit(llama, mixed, layers=[1])
    with pytest.raises(InputError, match=words):
        sl.sweep(llama, mixed, directions, layers=[1], labels=labels, coefficients=[0, 1])
    for possible in ("own", "all"):
        result = sl.sweep(llama, mixed, directions, layers=[1], labels=possible, coefficients=[1])
        assert np.isfinite(result.table.logprob_nats).all()


def test_steering_that_cannot_reach_the_labels(llama: Any, chats: sl.ContrastivePairs) -> None:
    turns = [(pair.positive, pair.negative) for pair in chats]
    continued = sl.ContrastivePairs.from_lists(
        *([[m._asdict() for m in side] for side in sides] for sides in zip(*turns, strict=True)),
        [" so cold", " by", " a good day"],
    )
    directions = sl.fit(llama, continued, layers=[1])
    shared: dict[str, Any] = {"layers": [1], "steered_positions": "last", "coefficients": [2]}
    with pytest.raises(InputError, match="after the first token there, and no prompt has one"):
        sl.sweep(llama, continued, directions, labels="assistant", **shared)
    for possible in (None, "own"):
        table = sl.sweep(llama, continued, directions, labels=possible, **shared).table
        assert table.degradation_nats.item() != 0
