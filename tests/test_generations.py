"""What a steered model writes, and how each text ends."""

from typing import Any

import pandas as pd
import pytest
import torch
from conftest import bridge, build_llama, build_tokenizer

import steerlens as sl
from steerlens.data.prompts import Message
from steerlens.engine.tokenization import tokenize_prompt
from steerlens.errors import InputError
from steerlens.models.hooks import resid_post
from steerlens.steering import decoding, generate_texts, generate_tokens, generation
from steerlens.tables import COLUMNS

HOOK = resid_post(1)
PROMPTS = ["the river was", "how was the day today"]


def write(model: Any, prompts: Any, along: Any, **given: Any) -> pd.DataFrame:
    options = {"layer": 1, "coefficients": [-20, 0, 20], "max_new_tokens": 6, **given}
    return sl.measure.generation_table(model, prompts, along, **options)


def test_it_is_what_generate_gives(tiny: Any, pairs: sl.ContrastivePairs) -> None:
    fitted = sl.fit_directions(sl.collect_differences(tiny, pairs))
    found = write(tiny, PROMPTS, fitted, ids=["a", "b"])
    assert list(found.columns) == [column.name for column in COLUMNS["generations"]]
    assert found.prompt.to_list() == ["a"] * 3 + ["b"] * 3
    assert (found.hook_name == HOOK).all()
    assert found.coefficient.to_list() == [-20, 0, 20] * 2
    for i, row in found.iterrows():
        prompt = tokenize_prompt(tiny, PROMPTS[int(str(i)) // 3])
        steered = {HOOK: fitted[HOOK]}
        text = sl.generate(tiny, prompt, steered, row.coefficient, max_new_tokens=6)
        assert (row.text, row.n_tokens, row.end) == (text, 6, "length")
    assert found.text.nunique() > 3
    assert found.equals(write(tiny, PROMPTS, fitted, ids=["a", "b"]))


def test_a_vector_writes_too(llama: Any, directions: sl.Directions) -> None:
    vector = 2 * sl.SteeringVector.from_directions(llama, directions, layers=[1])
    found = write(llama, PROMPTS, vector, layer=None, coefficients=[10])
    assert found.coefficient.to_list() == [20, 20]
    plain = write(llama, PROMPTS, directions, coefficients=[20])
    assert found.text.to_list() == plain.text.to_list()


def test_text_is_a_prompt(llama: Any, pairs: sl.ContrastivePairs) -> None:
    directions = sl.fit(llama, [("a good day", "a bad day"), ("it is warm", "it is cold")])
    calls: list[tuple[str, int, int]] = []
    text = sl.generate(
        *(llama, "the river was", directions.at(2), 8),
        max_new_tokens=6,
        progress=lambda *call: calls.append(call),
    )
    prompt = tokenize_prompt(llama, "the river was")
    assert text == sl.generate(llama, prompt, directions.at(2), 8, max_new_tokens=6)
    assert text != sl.generate(llama, "the river was", directions.at(2), 0, max_new_tokens=6)
    assert calls == [("tokens", done, 6) for done in range(7)]


def test_a_chat_goes_on_after_its_header(llama: Any, directions: sl.Directions) -> None:
    """The opening of the assistant, where there is one, is the prompt's and not written again."""
    asked = (Message("user", "how are you"),)
    opened = (*asked, Message("assistant", "it was"))
    found = write(llama, [asked, opened], directions, coefficients=[0])
    headers = ["[assistant]", "was"]
    for prompt, header, text in zip([asked, opened], headers, found.text, strict=True):
        ids = tokenize_prompt(llama, prompt).prompt
        last = llama.tokenizer.convert_tokens_to_ids(header)
        assert ids[-1] == last
        direct = {HOOK: directions[HOOK]}
        ((*written,),) = generate_tokens(
            llama, [tokenize_prompt(llama, prompt)], direct, 0, max_new_tokens=6
        )
        assert text == llama.tokenizer.decode(written, skip_special_tokens=True)
    assert found.text.nunique() == 2


def test_a_continuation_of_the_prompts_own_is_left_out(
    llama: Any, directions: sl.Directions
) -> None:
    plain, continued = (tokenize_prompt(llama, PROMPTS[0], c) for c in (None, " so cold"))
    found = write(llama, [plain, continued], directions)
    assert found.text[:3].to_list() == found.text[3:].to_list()


@pytest.mark.parametrize(
    ("n_prompt", "n_tokens", "end"), [(57, 6, "length"), (60, 4, "context"), (64, 0, "context")]
)
def test_the_context_may_be_full(
    n_prompt: int, n_tokens: int, end: str, llama: Any, directions: sl.Directions
) -> None:
    prompt = " ".join(["river"] * (n_prompt - 1))
    found = write(llama, [prompt], directions)
    assert found.n_tokens.to_list() == [n_tokens] * 3
    assert found.end.to_list() == [end] * 3
    assert (found.text == "").all() == (n_tokens == 0)


@pytest.mark.parametrize("layer", [1, 4])
def test_what_overflows_has_no_text(layer: int, llama: Any, directions: sl.Directions) -> None:
    """At the last block nothing follows but the norm."""
    found = write(llama, PROMPTS[:1], directions, layer=layer, coefficients=[1e39, 20, -1e39])
    assert found.end.to_list() == ["overflow", "length", "overflow"]
    assert found.text.to_list() == ["", found.text[1], ""]
    assert found.n_tokens.to_list() == [0, 6, 0]


def test_what_overflows_is_seen_where_texts_are_written_one_by_one(
    llama: Any, directions: sl.Directions
) -> None:
    """Then the logits are not seen, and are asked for: with a hook of others on the model."""
    prompt, strengths = tokenize_prompt(llama, PROMPTS[0]), [1e39, 20]
    vector = {HOOK: directions[HOOK]}

    def seen() -> list[bool | None]:
        texts = generate_texts(llama, [prompt], vector, strengths, max_new_tokens=6)
        return [text.overflowed for text in texts]

    assert seen() == [True, False]
    with llama.hooks(fwd_hooks=[(HOOK, lambda activation, hook: None)]):
        assert seen() == [None, None]
        found = write(llama, [prompt], directions, coefficients=strengths)
    assert found.end.to_list() == ["overflow", "length"]


@pytest.mark.parametrize("overflows_in", [2, 3])
def test_what_overflows_after_its_end_has_its_text(
    overflows_in: int, llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 24 texts the first ends by its second token, and stays in the batch until more have."""
    steps = iter(range(1, 100))
    end = llama.tokenizer.eos_token_id
    seen = decoding._next_logits

    def next_logits(*given: Any) -> Any:
        logits, step = seen(*given).clone(), next(steps)
        logits[:, end] = -torch.inf
        if step == 2:
            logits[0, end] = 1e4
        if step == overflows_in:
            logits[0, 0] = torch.nan
        return logits

    monkeypatch.setattr(decoding, "_next_logits", next_logits)
    monkeypatch.setattr(generation, "is_proved", lambda *given: True)
    prompts = [tokenize_prompt(llama, PROMPTS[0])] * 24
    texts = generate_texts(llama, prompts, {HOOK: torch.randn(32)}, [0.5], max_new_tokens=5)
    assert [text.overflowed for text in texts[1:]] == [False] * 23
    assert texts[0].overflowed == (overflows_in == 2)
    assert texts[0].ended == (overflows_in == 3)


def test_a_text_may_end_by_itself(llama: Any, directions: sl.Directions) -> None:
    """The same model with a tokenizer to which a word that it writes is the end of text."""
    prompt = tokenize_prompt(llama, PROMPTS[0])
    (ids,) = generate_tokens(llama, [prompt], {HOOK: directions[HOOK]}, 0, max_new_tokens=6)
    end = next(i for i in range(1, 6) if ids[i] not in ids[:i])
    word = llama.tokenizer.convert_ids_to_tokens(ids[end])
    ending = bridge(build_llama(), build_tokenizer(eos_token=word))
    found = write(ending, [prompt], directions, coefficients=[0])
    assert (found.end.item(), found.n_tokens.item()) == ("stop", end)
    assert found.text.item() == llama.tokenizer.decode(ids[:end])


def test_what_is_refused(llama: Any, directions: sl.Directions) -> None:
    assert len(write(llama, PROMPTS, directions)) == 6
    with pytest.raises(InputError, match="got 2 and 0"):
        write(llama, PROMPTS, directions, max_new_tokens=0)
    with pytest.raises(InputError, match="expected one hook, got 5"):
        write(llama, PROMPTS, directions, layer=None)
    with pytest.raises(InputError, match="list of prompts"):
        write(llama, [], directions)
    with pytest.raises(InputError, match="finite"):
        write(llama, PROMPTS, directions, coefficients=[float("inf")])


def test_vectors_at_several_hooks_write_together_what_each_writes_alone(tiny: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    steered = [
        ({resid_post(layer): 5 * torch.randn(32, generator=generator)}, coefficient)
        for layer, coefficient in ((0, 4.0), (2, 3.0), (1, 0.0), (1, 5.0))
    ]
    prompts = [tokenize_prompt(tiny, prompt) for prompt in PROMPTS]
    texts = generation.texts_of_each(tiny, prompts, steered, max_new_tokens=6)
    assert [(text.prompt, text.coefficient) for text in texts] == [
        (prompt, coefficient) for prompt in range(2) for _, coefficient in steered
    ]
    alone = [generate_tokens(tiny, prompts, *of, max_new_tokens=6) for of in steered]
    assert [text.ids for text in texts] == [of[i] for i in range(2) for of in alone]
    assert len({text.ids for text in texts}) > 4
