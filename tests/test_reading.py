"""Where activations are read: tokens by index, slice or name, and what is made of several."""

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import WORDS, bridge, build_llama, build_tokenizer, padding

import steerlens as sl
from steerlens.engine.plain_loop import plain_cells
from steerlens.engine.plan import run_cells
from steerlens.engine.positions import as_position, one_token
from steerlens.engine.workload import Job
from steerlens.errors import InputError

HOOKS = ("blocks.1.hook_resid_post", "blocks.2.hook_resid_post")
THINKING = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}"
    "{% if not loop.last or m.role != 'assistant' %} \n {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% if enable_thinking is defined and "
    "not enable_thinking %}<think> \n </think> {% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def thinking() -> Any:
    """A model that thinks between `<think>` and `</think>`, if its template lets it."""
    tokenizer = build_tokenizer(words=["<think>", "</think>", *WORDS], chat_template=THINKING)
    return bridge(build_llama(), tokenizer)


def chat(mood: str, *said: str) -> list[dict[str, str]]:
    turns = [{"role": "system", "content": f"you are {mood}"}]
    for role, text in zip(["user", "assistant"], said, strict=False):
        turns.append({"role": role, "content": text})
    return turns


@pytest.fixture(scope="module")
def chats() -> sl.ContrastivePairs:
    """Chats of different lengths, each with a thought and an answer of the assistant's."""
    said = [
        ("how was the walk", "<think> so it was good </think> the walk was kind"),
        ("how went it", "<think> so </think> by the river"),
        ("how was the soup", "<think> the bread was warm and good </think> very good"),
        ("and the day", "<think> I felt cold today </think> bad and cold"),
    ]
    return sl.ContrastivePairs.from_lists(
        [chat("cheerful", *turns) for turns in said],
        [chat("very gloomy", *turns) for turns in said],
    )


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (-1, -1),
        ("last", -1),
        ("-2", -2),
        ([-2], -2),
        ("3:max", 3),
        ([-3, -1], "-3,-1:mean"),
        ("-3, -1:max", "-3,-1:max"),
        ("-4:", "-4::mean"),
        (":2:last", ":2:last"),
        ("1:-1", "1:-1:mean"),
        ("assistant", "assistant:mean"),
        ("own:last", "own:last"),
        ("pair", "pair"),
    ],
)
def test_a_position_is_kept_in_one_form(given: Any, kept: Any) -> None:
    assert as_position(given) == kept
    assert as_position(as_position(given)) == kept  # as a record has it


@pytest.mark.parametrize(
    "given", ["", ":", "first", "assistant:sum", "1:2:3", "-1,", [], "1.5", "pair:max"]
)
def test_what_is_no_position(given: Any) -> None:
    with pytest.raises(InputError, match="expected a position such as"):
        as_position(given)


def by_hand(model: Any, ids: Any, hook: str, places: list[int], how: str) -> torch.Tensor:
    """One prompt alone, without padding, all of it kept."""
    with torch.no_grad():
        _, cache = model.run_with_cache(torch.tensor([list(ids)]))
    read = cache[hook][0, places]
    return {"mean": read.mean(dim=0), "max": read.amax(dim=0), "last": read[-1]}[how]


def found_by_words(model: Any, ids: Any, start: str, stop: str | None) -> list[int]:
    """The places between two words, or to the end."""
    words = [model.tokenizer.decode([token]) for token in ids]
    first = max(i for i, word in enumerate(words) if word == start) + 1
    return list(range(first, words.index(stop) if stop else len(words)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "position",
    ["assistant", "assistant:max", "assistant:last", "think", "answer", "-3:", "-3,-1:max", "1:3"],
)
@pytest.mark.usefixtures("much_padding")
def test_readings_are_those_of_each_prompt_alone(
    thinking: Any, chats: sl.ContrastivePairs, position: str, side: str
) -> None:
    name, _, how = position.rpartition(":") if "max" in position or "last" in position else (
        position, "", "mean"
    )  # fmt: skip
    with padding(thinking, side):
        found = sl.collect_differences(thinking, chats, layers=[1], position=position)
    tokenized = sl.engine.tokenize_pairs(thinking, chats)
    between = {
        "assistant": ("]", None),
        "think": ("<think>", "</think>"),
        "answer": ("</think>", None),
    }
    for prompts, values in (
        (tokenized.positive, found.positive),
        (tokenized.negative, found.negative),
    ):
        for row, prompt in enumerate(prompts):
            n = len(prompt)
            if name == "assistant":
                after = found_by_words(thinking, prompt.ids, "<think>", None)
                places = [after[0] - 1, *after]
            elif name in between:
                places = found_by_words(thinking, prompt.ids, *between[name])
            else:
                places = {"-3:": [n - 3, n - 2, n - 1], "-3,-1": [n - 3, n - 1], "1:3": [1, 2]}[
                    name
                ]
            expected = by_hand(thinking, prompt.ids, HOOKS[0], places, how)
            torch.testing.assert_close(values[0, row], expected, rtol=1e-4, atol=1e-4)
    assert found.position == as_position(position)


@pytest.mark.parametrize("position", ["continuation", "own", "own:max"])
def test_the_text_after_both_prompts(
    llama: Any, continued: sl.ContrastivePairs, position: str
) -> None:
    """The same continuation on both sides; or what the model writes after each."""
    pairs = continued[:4]
    found = sl.collect_differences(llama, pairs, layers=[1], position=position, own_tokens=4)
    prompts = sl.engine.tokenize_pairs(llama, pairs)
    for i, (pos, neg) in enumerate(zip(prompts.positive, prompts.negative, strict=True)):
        for prompt, values in ((pos, found.positive), (neg, found.negative)):
            after = list(pos.continuation)
            if position != "continuation":
                with torch.no_grad():
                    written = llama.generate(
                        torch.tensor([prompt.prompt]),
                        max_new_tokens=4,
                        do_sample=False,
                        return_type="tokens",
                        verbose=False,
                    )[0, len(prompt.prompt) :].tolist()
                after = written[: written.index(2) + 1] if 2 in written else written
            ids, n = [*prompt.prompt, *after], len(prompt.prompt)
            how = "max" if "max" in position else "mean"
            expected = by_hand(llama, ids, HOOKS[0], list(range(n, len(ids))), how)
            torch.testing.assert_close(values[0, i], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "steered",
    ["all", "last", "continuation", "last+continuation", "continuation[0:1]", "answer", "think"],
)
@pytest.mark.parametrize("position", ["answer", "continuation:max", "-3:"])
def test_cells_are_those_of_the_plain_loop(
    thinking: Any, chats: sl.ContrastivePairs, position: str, steered: str
) -> None:
    """The engine, resumed and with kept prefixes, against whole forward passes; to 1e-4."""
    continued = sl.ContrastivePairs.from_lists(
        [[m._asdict() for m in pair.positive] for pair in chats],
        [[m._asdict() for m in pair.negative] for pair in chats],
        [" and so it went", " by day", " so", " very cold today"],
    )
    directions = sl.fit(thinking, continued, layers=[1, 2], position=position)
    study = sl.Study(
        thinking, continued, directions, layers=[1], steered_positions=steered, batch_size=3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # the plan found every hook exact
        plan = study.plan
    job = Job(HOOKS[0], directions[HOOKS[0]], (0.0, 6.0), study.readouts[HOOKS[0]])
    (fast,) = run_cells(plan, [job])
    plain = plain_cells(study.engine, study.workload, job)
    for ours, theirs in zip(fast, plain, strict=True):
        for name in ("positive", "negative", "logprob"):
            torch.testing.assert_close(
                getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4
            )
    assert not torch.equal(plain[0].logprob, plain[1].logprob)
    moved = float((plain[1].positive - plain[0].positive).abs().max())
    reads_before = position == "-3:" and steered.startswith("continuation")
    assert (moved == 0) is reads_before


def test_a_reading_is_recorded_and_read_there_again(
    thinking: Any, chats: sl.ContrastivePairs, tmp_path: Any
) -> None:
    directions = sl.fit(thinking, chats, layers=[2], position="assistant")
    assert directions.position == "assistant:mean"
    vector = sl.SteeringVector.from_directions(thinking, directions)
    vector.save(tmp_path / "v.safetensors")
    loaded = sl.SteeringVector.load(tmp_path / "v.safetensors", model=thinking)
    of_vector = sl.Study(thinking, chats, loaded).sweep([0, 2])
    of_directions = sl.Study(thinking, chats, directions).sweep([0, 2])
    for swept in (of_vector, of_directions):
        assert swept.table.attrs["settings"]["position"] == "assistant:mean"
    differences = sl.collect_differences(thinking, chats, layers=[2], position="assistant")
    by_hand = (differences.values[0] @ directions[HOOKS[1]]).mean()
    assert of_directions.table.projection[0] == pytest.approx(float(by_hand), abs=1e-4)
    assert of_vector.table.projection[0] == pytest.approx(float(by_hand), abs=1e-4)
    elsewhere = sl.collect_differences(thinking, chats, layers=[2])
    assert not torch.allclose(elsewhere.values, differences.values)


def test_own_text_is_read_where_it_is_the_label(llama: Any, many: sl.ContrastivePairs) -> None:
    directions = sl.fit(llama, many, layers=[1], position="own")
    study = sl.Study(llama, many, directions, layers=[1])
    assert study.settings.labels == "own"
    assert all(prompt.continuation for prompt in study.tokens.negative)
    shifted = study.sweep([0, 4]).table.projection_shift
    assert shifted[0] == 0 != shifted[1]
    with pytest.raises(InputError, match=r"'own' is read .* take the labels 'own'"):
        sl.Study(llama, many, directions, layers=[1], labels="all")


def test_what_takes_one_token_says_so(llama: Any, many: sl.ContrastivePairs) -> None:
    assert one_token("last", "gradients") == -1
    for fit in (sl.loss_gradients, sl.directions.train_directions):
        with pytest.raises(InputError, match=r"at one token, such as -1 or 'last', not at '-4:'"):
            fit(llama, many, layers=[1], position="-4:")
    with pytest.raises(InputError, match="no tokens of the span 'assistant'"):
        sl.collect_differences(llama, many, position="assistant")
    with pytest.raises(InputError, match="the tokenizer has no <think> and </think>"):
        sl.collect_differences(llama, many, position="answer")
    with pytest.raises(InputError, match="no tokens of the span 'continuation'"):
        sl.collect_differences(llama, many, position="continuation")
    with pytest.raises(
        InputError, match="position '60::mean' holds no token of the positive prompt"
    ):
        sl.collect_differences(llama, many, position="60:")


def test_two_lists_without_pairs_are_read_at_a_span(
    thinking: Any, chats: sl.ContrastivePairs
) -> None:
    positive, negative = ([getattr(p, side) for p in chats] for side in ("positive", "negative"))
    read = sl.collect_differences(thinking, chats, layers=[1], position="assistant")
    fitted = sl.fit(thinking, (positive, negative[:-1]), layers=[1], position="assistant")
    by_hand = read.positive[0].mean(0) - read.negative[0, :-1].mean(0)
    cosine = torch.nn.functional.cosine_similarity(fitted[fitted.hook_names[0]], by_hand, dim=0)
    assert float(cosine) == pytest.approx(1, abs=1e-6)
    assert fitted.position == "assistant:mean"
    with pytest.raises(InputError, match="no tokens of the span 'continuation'"):
        sl.fit(thinking, (positive, negative[:-1]), layers=[1], position="continuation")


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.usefixtures("much_padding")
def test_each_pair_is_read_at_its_own_position(
    tiny: Any, pairs: sl.ContrastivePairs, side: str, tmp_path: Path
) -> None:
    positions = [-1, -2, 3, 0, -3, 5, -1, 2]
    records = [
        {"positive": p.positive, "negative": p.negative, "position": at}
        for p, at in zip(pairs, positions, strict=True)
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    loaded = sl.ContrastivePairs.load(path)
    table = pd.DataFrame(records)
    table.to_csv(tmp_path / "pairs.csv", index=False)
    assert sl.ContrastivePairs.load(tmp_path / "pairs.csv").pairs == loaded.pairs
    kept = [p for part in loaded.split(0.25) for p in part]
    assert {p.id: p.position for p in kept} == {str(i): p for i, p in enumerate(positions, 1)}
    # Index 0 is the beginning of every text, at which nothing differs.
    part = loaded[:3]
    tokenized = sl.engine.tokenize_pairs(tiny, part)
    differences = []
    for i, at in enumerate(positions[:3]):
        up, down = (
            by_hand(tiny, prompts[i].ids, HOOKS[1], [at], "last")
            for prompts in (tokenized.positive, tokenized.negative)
        )
        differences.append(up - down)
    expected = torch.stack(differences).mean(dim=0)
    with padding(tiny, side):
        found = sl.collect_differences(tiny, part, layers=HOOKS[1], position="pair")
        torch.testing.assert_close(found[HOOKS[1]].mean(dim=0), expected, rtol=1e-4, atol=1e-5)
        at_end = sl.collect_differences(tiny, part, layers=HOOKS[1])
        assert not torch.allclose(at_end[HOOKS[1]].mean(dim=0), expected)
        directions = sl.fit(tiny, part, layers=[2], position="pair")
        swept = sl.sweep(tiny, part, directions, coefficients=[0], n_bootstrap=2)
    assert (directions.position, found.position) == ("pair", "pair")
    assert swept.table.projection[0] == pytest.approx(float(expected.norm()), rel=1e-4)


def test_pairs_without_a_position_of_their_own_are_counted(
    llama: Any, pairs: sl.ContrastivePairs
) -> None:
    some = [replace(p, position=-1 if i < 5 else None) for i, p in enumerate(pairs)]
    with pytest.raises(InputError, match="3 of 8 pairs have none, the first '6'"):
        sl.fit(llama, sl.ContrastivePairs(tuple(some)), position="pair")
    all_ = sl.ContrastivePairs(tuple(replace(p, position=-1) for p in pairs))
    directions = sl.fit(llama, all_, layers=[2], position="pair")
    assert torch.equal(directions.vectors, sl.fit(llama, pairs, layers=[2]).vectors)
    with pytest.raises(InputError, match="8 of 8 pairs have none"):
        sl.sweep(llama, pairs, directions, coefficients=[1])
    lists = ([p.positive for p in pairs], [p.negative for p in pairs])
    with pytest.raises(InputError, match="8 of 8 pairs have none"):
        sl.fit(llama, lists, position="pair")
    far = sl.ContrastivePairs((*all_[:7].pairs, replace(all_[7], position=40)))
    with pytest.raises(InputError, match="position 40 is outside the positive prompt of pair '8'"):
        sl.fit(llama, far, position="pair")
    with pytest.raises(InputError, match="gradients are read at one token"):
        sl.loss_gradients(llama, all_, position="pair")
