"""Chats as text: through the template, and what a template may not do."""

import os
import resource
import sys
import warnings
from pathlib import Path

import pytest
from conftest import bridge, build_gpt2, build_tokenizer

import steerlens as sl
from steerlens.data import (
    ContrastivePairs,
    Message,
    dataset_names,
    render,
)
from steerlens.errors import InputError
from steerlens.models import loading

# Closes every turn, as most chat models do: an open turn must not get this end mark.
CLOSING_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

USER = Message("user", "how")
OPEN = Message("assistant", "the river was")


@pytest.mark.parametrize("template", [None, CLOSING_TEMPLATE])
@pytest.mark.parametrize("text", ["the river", " <s> the ", "\n"])
def test_text_is_not_touched(text: str, template: str | None) -> None:
    assert render(text, build_tokenizer(chat_template=template)) == text


def test_messages_go_through_the_template() -> None:
    tokenizer = build_tokenizer(chat_template=CLOSING_TEMPLATE)
    user = "<|im_start|>user\nhow<|im_end|>\n"
    assert render((USER,), tokenizer) == user + "<|im_start|>assistant\n"
    assert render((USER, OPEN), tokenizer) == user + "<|im_start|>assistant\nthe river was"
    # Only the last turn stays open.
    closed = "<|im_start|>assistant\nthe river was<|im_end|>\n"
    assert render((OPEN, USER), tokenizer) == closed + user + "<|im_start|>assistant\n"


@pytest.mark.parametrize("name", dataset_names())
def test_shipped_prompts_end_with_their_opening(name: str) -> None:
    tokenizer = build_tokenizer(chat_template=CLOSING_TEMPLATE)
    for pair in ContrastivePairs.load(name):
        for prompt in (pair.positive, pair.negative):
            text = render(prompt, tokenizer)
            assert text.endswith("<|im_start|>assistant\n" + prompt[-1].content)
            assert prompt[0].content in text


def test_messages_need_a_chat_template() -> None:
    with pytest.raises(InputError, match="no chat template"):
        render((USER,), build_tokenizer(chat_template=None))
    assert render((USER,), build_tokenizer()) == "<s>[user] how \n[assistant] "


@pytest.mark.parametrize("text", ["I am ", " I am", "I am\n", "I  am"])
def test_a_template_that_changes_the_last_turn_says_how(text: str) -> None:
    """Llama 3.1's strips turns; the text that is continued must be the one that was written."""
    stripped = CLOSING_TEMPLATE.replace("{{ m.content }}", "{{ m.content | trim }}")
    if text == "I  am":
        stripped = CLOSING_TEMPLATE.replace(
            "{{ m.content }}", "{{ m.content | replace('  ', ' ') }}"
        )
    messages = (USER, Message("assistant", text))
    with pytest.raises(InputError) as error:
        render(messages, build_tokenizer(chat_template=stripped))
    assert text == "I  am" or f"makes {text.strip()!r} of the last turn's {text!r}" in str(
        error.value
    )
    assert render(messages, build_tokenizer(chat_template=CLOSING_TEMPLATE)).endswith(text)
    plain = (USER, Message("assistant", "I am"))
    assert render(plain, build_tokenizer(chat_template=stripped)).endswith("I am")


@pytest.mark.parametrize(
    ("inner", "turn", "difference"),
    [
        ("{{ m.content | trim }}", " how ", "makes 'how' of the user turn's ' how '"),
        ("{{ m.content if m.role != 'system' }}", "how", "leaves out .* system turn's 'kind'"),
        ("{{ m.content | upper }}", "how", "leaves out or rewrites the system turn's 'kind'"),
    ],
)
def test_what_a_template_changes_is_told(inner: str, turn: str, difference: str) -> None:
    """Once for all prompts, with the first difference; the prompts are used as they are."""
    template = CLOSING_TEMPLATE.replace("{{ m.content }}", inner)
    prompts = [
        sl.PreferenceItem((Message("system", "kind"), Message("user", text)), " it", " so", id)
        for text, id in ((turn, "a"), ("the river", "b"))
    ]
    items = sl.PreferenceItems(tuple(prompts))
    model = bridge(build_gpt2(), build_tokenizer(chat_template=template))
    n = 1 if "trim" in inner else 2
    with pytest.warns(UserWarning, match=f"changes {n} of 2 .* item 'a' it {difference}"):
        sl.engine.tokenize_items(model, items)
    faithful = bridge(build_gpt2(), build_tokenizer(chat_template=CLOSING_TEMPLATE))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sl.engine.tokenize_items(faithful, items)


THINKING_TEMPLATE = CLOSING_TEMPLATE.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is defined and not enable_thinking %}"
    "<think>\n\n</think>\n\n{% endif %}{% endif %}",
)


def test_template_arguments_are_passed_through_and_recorded(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = sl.load_model(str(model_folder), device="cpu", progress=False)
    folder_template = plain.tokenizer.chat_template
    tokenizer = build_tokenizer(chat_template=THINKING_TEMPLATE)
    header = render((USER,), tokenizer)
    sl.data.set_rendering(tokenizer, template_args={"enable_thinking": False})
    assert render((USER,), tokenizer) == header + "<think>\n\n</think>\n\n"
    assert render((USER, OPEN), tokenizer).endswith("assistant\nthe river was")
    sl.data.set_rendering(tokenizer, template_args={"enable_thinking": True})
    assert render((USER,), tokenizer) == header
    for arguments, message in (
        ({"enable_thinkin": False}, "reads no argument 'enable_thinkin'"),
        ({"add_generation_prompt": False}, "reads no argument 'add_generation_prompt'"),
        ({"enable_thinking": {1, 2}}, "value of JSON"),
    ):
        with pytest.raises(InputError, match=message):
            sl.data.set_rendering(tokenizer, template_args=arguments)
    prose = "{# the date #}use return_dict or date {%- if\nlang %}{{ lang }}{% endif %}"
    multiple = build_tokenizer(chat_template=prose)
    sl.data.set_rendering(multiple, template_args={"lang": "en"})
    for name in ("return_dict", "date"):
        with pytest.raises(InputError, match=f"reads no argument '{name}'"):
            sl.data.set_rendering(multiple, template_args={name: "x"})
    multiple.chat_template = "{% for"
    with pytest.raises(InputError, match="chat template cannot be read"):
        sl.data.set_rendering(multiple, template_args={"lang": "en"})
    assert sl.models.provenance(plain).to_dict().get("rendering") is None
    with monkeypatch.context() as patch:
        patch.setattr(loading, "_boot", lambda *_, **__: pytest.fail("the weights are loaded"))
        refused = {"enable_thinking": False}
        with pytest.raises(InputError, match="no argument 'enable_thinking'"):
            sl.load_model(str(model_folder), template_args=refused, progress=False)
        with pytest.raises(pytest.fail.Exception, match="the weights are loaded"):
            sl.load_model(str(model_folder), template_args={"bos_token": ""}, progress=False)
    assert "bos_token" in folder_template
    loaded = sl.load_model(
        str(model_folder), device="cpu", template_args={"bos_token": "</s>"}, progress=False
    )
    assert sl.engine.tokenize_prompt(loaded, (USER,)).ids[:2] == (1, 2)
    assert sl.models.provenance(loaded).rendering == '{"template_args": {"bos_token": "</s>"}}'


def test_an_empty_last_turn_is_the_templates_generation_prompt() -> None:
    tokenizer = build_tokenizer(chat_template=CLOSING_TEMPLATE)
    assert render((USER, Message("assistant", "")), tokenizer) == render((USER,), tokenizer)
    assert render((USER,), tokenizer).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    "bomb",
    [
        "{{ 'x' * 10**10 }}",
        "{% set n = 10**10 %}{{ ('x' * n) | length }}",
        "{% set ns = namespace(s='x') %}"
        "{% for i in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        "{{ 'x'.ljust(10**10) }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    ],
)
def test_a_template_that_asks_for_gigabytes_or_hours_gets_neither(bomb: str) -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS), sys.gettrace()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        InputError, match=r"it takes more than (1,073,741,824 bytes|1,000,000 steps)"
    ):
        render((USER,), build_tokenizer(chat_template=bomb + CLOSING_TEMPLATE))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**21  # KB
    assert (resource.getrlimit(resource.RLIMIT_AS), sys.gettrace()) == limits
    long = (USER, OPEN) * 500
    assert render(long, build_tokenizer(chat_template=CLOSING_TEMPLATE)).endswith(OPEN.content)


def test_a_template_that_rejects_a_role_is_a_pair_error() -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('no system turn here') }}{% endif %}{{ m.content }}{% endfor %}"
    )
    tokenizer = build_tokenizer(chat_template=template)
    with pytest.raises(InputError, match=r"\['system', 'user'\]: no system turn here"):
        render((Message("system", "kind"), USER), tokenizer)
    assert render((USER,), tokenizer) == "how"


def test_a_file_name_that_is_no_text_can_still_be_recorded(tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.jsonl"))
    file.write_text('{"positive": "a", "negative": "b"}\n' * 2)
    assert ContrastivePairs.load(file).name.endswith("bad\\xff.jsonl")
    ContrastivePairs.load(file).name.encode("utf-8")
