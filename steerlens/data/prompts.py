"""Prompts: text or chat messages, checked, and rendered with a tokenizer's chat template."""

import importlib.util
import json
import re
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import chain
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, runtime_checkable

from steerlens.errors import InputError, in_one_line
from steerlens.validation import checked

TEMPLATE_BYTES = 1 << 30
"""The most memory that a chat template may take."""

TEMPLATE_STEPS = 1_000_000
"""The most lines of a compiled chat template that are run for one prompt."""

_one_at_a_time = threading.Lock()


@checked
class Message(NamedTuple):
    """One turn of a chat.

    Examples:
        >>> sl.Message("user", "How was your day?").role
        'user'
    """

    role: str
    content: str


Prompt: TypeAlias = str | tuple[Message, ...]
"""Text, or the messages of a chat, which the model's tokenizer renders."""


def texts_of(prompt: Prompt) -> set[str]:
    """What others may share of a prompt: the text; of a chat, what system and user say.

    An assistant's opening is left out, as it goes with the question. Spaces count as one.
    """
    if isinstance(prompt, str):
        prompt = (Message("user", prompt),)
    texts = {" ".join(said.content.split()) for said in prompt if said.role != "assistant"}
    return texts - {""}


def distinctive(of_prompts: Iterable[set[str]]) -> set[str]:
    """The texts of some prompts without those that all have: such an instruction tells nothing."""
    sets = list(of_prompts)
    counts = Counter(chain.from_iterable(sets))
    return {text for text, n in counts.items() if n < len(sets)}


@runtime_checkable
class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rendering needs."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


Straddle = Literal["error", "back"]
"""What is done where a token stands on both sides of the end of a prompt: it is an error, or the
first token of the continuation."""


@dataclass(frozen=True)
class Rendering:
    """What `set_rendering` says of a tokenizer."""

    template_args: Mapping[str, Any] = field(default_factory=dict)
    straddle: Straddle = "error"
    thinking: tuple[str, str] = ("<think>", "</think>")

    def __str__(self) -> str:
        """In JSON what is not the default, for a record."""
        told = {k: v for k, v in asdict(self).items() if v != getattr(Rendering(), k)}
        return json.dumps(told, sort_keys=True)


_renderings: "weakref.WeakKeyDictionary[Any, Rendering]" = weakref.WeakKeyDictionary()


def rendering_of(tokenizer: Any) -> Rendering:
    """How prompts are rendered and cut with a tokenizer."""
    is_known = isinstance(tokenizer, Hashable) and tokenizer in _renderings
    return _renderings[tokenizer] if is_known else Rendering()


@checked
def set_rendering(
    tokenizer: ChatTokenizer,
    *,
    template_args: Mapping[str, Any] | None = None,
    straddle: Straddle = "error",
    thinking: tuple[str, str] = Rendering.thinking,
) -> None:
    """How prompts are rendered and cut with this tokenizer from now on.

    `load_model` hands over its `template_args` and `straddle`. It is a part of the model's
    `provenance`. What was tokenised before stays as it is.

    Args:
        tokenizer: A model's own (`model.tokenizer`).
        template_args: What the chat template is given besides the messages, such as
            `{"enable_thinking": False}`, a date or tools; values as in JSON. Default: nothing.
        straddle: See `Straddle`.
        thinking: The markers between which a thinking model thinks.

    Raises:
        InputError: The template reads no argument of that name or cannot be read, or the value is
            none of JSON.

    Examples:
        >>> sl.data.set_rendering(model.tokenizer, straddle="back")
        >>> sl.data.set_rendering(model.tokenizer)  # the defaults
    """
    arguments = dict(template_args or {})
    known = _arguments_of(getattr(tokenizer, "chat_template", None)) if arguments else frozenset()
    for name, value in arguments.items():
        if name not in known:
            raise InputError(
                f"the chat template reads no argument {name!r}; see model.tokenizer.chat_template "
                "for those that it has"
            )
        try:
            json.dumps(value)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"the template argument {name} has to be a value of JSON, so that it can be "
                f"recorded, got {type(value).__name__}"
            ) from error
    _renderings[tokenizer] = Rendering(arguments, straddle, thinking)


_OURS = frozenset(("messages", "add_generation_prompt", "continue_final_message"))
"""What `render` decides itself."""
_GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")
"""Tags of transformers alone, which change no text."""


def _arguments_of(template: Any) -> frozenset[str]:
    """The names that a chat template, or any of several by name, reads and does not set."""
    from jinja2 import Environment, TemplateError, meta

    templates = template.values() if isinstance(template, Mapping) else [template or ""]
    names: set[str] = set()
    try:
        for text in templates:
            environment = Environment(extensions=["jinja2.ext.loopcontrols", "jinja2.ext.do"])
            names |= meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", text)))
    except TemplateError as error:
        raise InputError(f"the chat template cannot be read: {in_one_line(error)}") from error
    return frozenset(names) - _OURS


@checked
def render(prompt: Prompt, tokenizer: ChatTokenizer) -> str:
    """The text of a prompt: as it is, or its messages through the tokenizer's chat template.

    A last assistant message is left open, to be continued; where it is empty or there is none, the
    template's assistant prefix is added.

    Args:
        prompt: Text, or a tuple of messages.
        tokenizer: A Hugging Face tokenizer; used for messages alone.

    Returns:
        Text that is ready to be tokenized.

    Raises:
        InputError: Messages meet a tokenizer without a chat template; the template rejects them,
            changes the text that is to be continued, or takes more than `TEMPLATE_STEPS` or (on
            Linux) `TEMPLATE_BYTES`.
    """
    if isinstance(prompt, str):
        return prompt
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            "the prompt is a list of chat messages but this model's tokenizer has no chat "
            "template; give plain text, or set tokenizer.chat_template"
        )
    last = prompt[-1].content if prompt[-1].role == "assistant" else ""
    is_empty = prompt[-1].role == "assistant" and not last
    try:
        with _limited():
            text = str(
                tokenizer.apply_chat_template(
                    [message._asdict() for message in (prompt[:-1] if is_empty else prompt)],
                    tokenize=False,
                    continue_final_message=bool(last),
                    add_generation_prompt=not last,
                    **rendering_of(tokenizer).template_args,
                )
            )
    except Exception as error:  # jinja2 and transformers raise many types here
        roles = [message.role for message in prompt]
        hint = ""
        if "system" in roles:
            hint = "; if it takes no system turn, write that text into the user's turn"
        raise InputError(
            f"the chat template rejects the messages with roles {roles}: {in_one_line(error)}{hint}"
        ) from error
    if not text.endswith(last):
        kept = last.strip()
        found = kept if text.endswith(kept) else text[-len(last) :]
        raise InputError(
            f"the chat template makes {_ends(found)} of the last turn's {_ends(last)}, so another "
            "prompt; write it as the template does, or give the rendered prompt as text"
        )
    return text


def template_changes(prompt: Prompt, text: str) -> list[str]:
    """What the template made of the turns in the rendered text, where that is not what they say."""
    if isinstance(prompt, str):
        return []
    changes, at = [], 0
    for role, content in prompt:
        kept = next((part for part in _trimmed(content) if part and text.find(part, at) >= 0), "")
        if kept != content:
            made = f"makes {_ends(kept)} of" if kept else "leaves out or rewrites"
            changes.append(f"{made} the {role} turn's {_ends(content)}")
        at = max(at, text.find(kept, at) + len(kept))
    return changes


class MessageSpan(NamedTuple):
    """Where in a rendered prompt the text of a message stands, and whose it is."""

    role: str
    start: int
    stop: int


@checked
def message_spans(prompt: Prompt, tokenizer: ChatTokenizer) -> tuple[MessageSpan, ...]:
    """Where each message stands in the text that `render` gives; none where a prompt is text.

    The template is rendered once more with marks in place of the messages: what stands between the
    marks is the template's own. A message that the template leaves out has no span.

    Raises:
        InputError: The template writes other text around the messages than around the marks, or
            changes a message by more than spaces at its ends; and as `render`.
    """
    if isinstance(prompt, str):
        return ()
    text = render(prompt, tokenizer)
    is_open = prompt[-1].role == "assistant" and not prompt[-1].content
    messages = prompt[:-1] if is_open else prompt
    marks = [f"\ue000{i}\ue001" for i in range(len(messages))]
    rest = render(
        tuple(Message(m.role, mark) for m, mark in zip(messages, marks, strict=True)), tokenizer
    )
    written = [(m, mark) for m, mark in zip(messages, marks, strict=True) if mark in rest]
    spans, at = [], 0
    before, *_ = rest.split(written[0][1]) if written else ("",)
    for number, (message, mark) in enumerate(written):
        rest = rest.partition(mark)[2]
        following = written[number + 1][1] if number + 1 < len(written) else ""
        after = rest.partition(following)[0] if following else rest
        start = at + len(before)
        kept = [
            content
            for content in _trimmed(message.content)
            if text.startswith(before, at) and text.startswith(content + after, start)
        ]
        if not kept:
            raise InputError(
                f"the chat template writes another text around the message "
                f"{_ends(message.content)} than around others, so the tokens of each role cannot "
                "be told apart; take the labels 'all' or 'own', or give continuations"
            )
        at, before = start + len(kept[0]), after
        spans.append(MessageSpan(message.role, start, at))
    return tuple(spans)


@contextmanager
def _limited() -> Iterator[None]:
    """Raise where a template runs too long or takes too much memory, which no sandbox keeps."""
    n_steps = 0

    def count(frame: Any, event: str, _: Any) -> Any:
        nonlocal n_steps
        if frame.f_code.co_filename != "<template>":
            return None
        n_steps += event == "line"
        if n_steps > TEMPLATE_STEPS:
            raise RuntimeError(f"it takes more than {TEMPLATE_STEPS:,} steps")
        return count

    before = sys.gettrace()
    with _one_at_a_time, _limited_memory():
        sys.settrace(count)
        try:
            yield
        except MemoryError as error:
            raise RuntimeError(f"it takes more than {TEMPLATE_BYTES:,} bytes") from error
        finally:
            sys.settrace(before)


@contextmanager
def _limited_memory() -> Iterator[None]:
    """At most `TEMPLATE_BYTES` more for the process inside the block, where there are limits."""
    if importlib.util.find_spec("resource") is None:
        yield
        return
    import resource

    import psutil

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = psutil.Process().memory_info().vms + TEMPLATE_BYTES
    if soft == resource.RLIM_INFINITY or limit < soft:
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _trimmed(text: str) -> tuple[str, ...]:
    """A text as it is, and without the spaces at either end, or both."""
    return text, text.strip(), text.lstrip(), text.rstrip()


def _ends(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}")


TEXT_PARTS = ("text", "input_text", "output_text")
"""The types of a message's parts that are text."""
USUAL_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant"}
"""Other names of who speaks, as ShareGPT's, and the usual ones."""


TEXT_KEYS = ("str", "text", "full_text", "post")
"""Where an object that is no message has its text."""


def checked_prompt(value: Any, *, where: str) -> Prompt:
    """Text, a message, or a list of these (or an object that has it) as a prompt.

    The object has it under `conversations` or `messages`. Raises `InputError` on anything else.
    """
    if isinstance(value, str):
        return checked_text(value, where=where)
    if isinstance(value, Mapping):
        chats = [value[key] for key in ("conversations", "messages") if key in value]
        texts = [value[key] for key in TEXT_KEYS if isinstance(value.get(key), str)]
        if texts and not chats and not {"role", "from"} & value.keys():
            return checked_text(texts[0], where=where)
        value = chats[0] if chats else [value]
    if isinstance(value, Sequence) and not isinstance(value, bytes) and value:
        return tuple(
            _message(message, where=f"{where}, message {i}") for i, message in enumerate(value, 1)
        )
    raise InputError(
        f'{where}: expected text or a list of {{"role", "content"}} messages, '
        f"got {type(value).__name__}{' (empty)' if value in ([], ()) else ''}"
    )


def _message(value: Any, *, where: str) -> Message:
    if isinstance(value, Message):
        return value
    if isinstance(value, Mapping) and {"from", "value"} <= value.keys():
        role, content = value["from"], value["value"]
    elif isinstance(value, Mapping) and {"role", "content"} <= value.keys():
        role, content = value["role"], _parts_as_text(value["content"])
    else:
        raise InputError(
            f"{where}: expected an object with the keys role and content (or from and value)"
        )
    role = USUAL_ROLES.get(role, role) if isinstance(role, str) else role
    if not isinstance(role, str) or not isinstance(content, str):
        raise InputError(
            f"{where}: role and content must be text (content may be a list of parts of text)"
        )
    return Message(unicode_text(role, where=where), unicode_text(content, where=where))


def _parts_as_text(content: Any) -> Any:
    """The text of parts of `TEXT_PARTS`; anything else as it is."""
    parts = content if isinstance(content, list) else []
    texts = [
        part.get("text") if isinstance(part, Mapping) and part.get("type") in TEXT_PARTS else None
        for part in parts
    ]
    return "".join(map(str, texts)) if texts and all(isinstance(t, str) for t in texts) else content


def checked_text(value: Any, *, where: str) -> str:
    """Text that is not empty and is UTF-8. Raises `InputError` on anything else."""
    if not isinstance(value, str) or not value:
        got = "empty text" if value == "" else type(value).__name__
        raise InputError(f"{where}: expected text that is not empty, got {got}")
    return unicode_text(value, where=where)


def unicode_text(value: str, *, where: str) -> str:
    """The text. Raises `InputError` on half a surrogate pair, which is no character."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: holds a lone surrogate, which no tokenizer can read") from error
    return value
