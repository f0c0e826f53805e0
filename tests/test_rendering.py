"""Chats as text: through the template, and what a template may not do."""

import os
import resource
import sys
from pathlib import Path

import pytest
from conftest import build_tokenizer

from steerlens.data import (
    ContrastivePairs,
    Message,
    dataset_names,
    render,
)
from steerlens.errors import InputError

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
    assert ContrastivePairs.from_jsonl(file).name.endswith("bad\\xff.jsonl")
    ContrastivePairs.from_jsonl(file).name.encode("utf-8")
