"""Prompts: text or chat messages, checked, and rendered with a tokenizer's chat template."""

import importlib.util
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

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


@runtime_checkable
class ChatTokenizer(Protocol):
    """The part of a Hugging Face tokenizer that rendering needs."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


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


@contextmanager
def _limited() -> Iterator[None]:
    """Raise inside the block where a template runs too long, or takes too much memory at once.

    Templates come with checkpoints: jinja2's sandbox keeps them from everything but these two.
    """
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


def _ends(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:28]}...{text[-28:]}")


def checked_prompt(value: Any, *, where: str) -> Prompt:
    """Text, or a list of messages, as a prompt. Raises `InputError` on anything else."""
    if isinstance(value, str):
        return checked_text(value, where=where)
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
    if not isinstance(value, Mapping) or not {"role", "content"} <= value.keys():
        raise InputError(f"{where}: expected an object with the keys role and content")
    role, content = value["role"], value["content"]
    if not isinstance(role, str) or not isinstance(content, str):
        raise InputError(f"{where}: role and content must be text")
    return Message(unicode_text(role, where=where), unicode_text(content, where=where))


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
