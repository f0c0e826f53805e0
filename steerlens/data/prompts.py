"""Prompts: text or chat messages, checked, and rendered with a tokenizer's chat template."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from steerlens.errors import InputError


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


def render(prompt: Prompt, tokenizer: ChatTokenizer) -> str:
    """The text of a prompt: as it is, or its messages through the tokenizer's chat template.

    A last assistant message is left open, to be continued; otherwise the template's assistant
    prefix is added.

    Args:
        prompt: Text, or a tuple of messages.
        tokenizer: A Hugging Face tokenizer; used for messages alone.

    Returns:
        Text that is ready to be tokenized.

    Raises:
        InputError: Messages meet a tokenizer without a chat template, or the template rejects them.
    """
    if isinstance(prompt, str):
        return prompt
    if getattr(tokenizer, "chat_template", None) is None:
        raise InputError(
            "the prompt is a list of chat messages but this model's tokenizer has no chat "
            "template; give plain text, or set tokenizer.chat_template"
        )
    is_open = prompt[-1].role == "assistant"
    try:
        return str(
            tokenizer.apply_chat_template(
                [message._asdict() for message in prompt],
                tokenize=False,
                continue_final_message=is_open,
                add_generation_prompt=not is_open,
            )
        )
    except Exception as error:  # jinja2 and transformers raise many types here
        roles = [message.role for message in prompt]
        hint = ""
        if "system" in roles:
            hint = "; if it takes no system turn, write that text into the user's turn"
        raise InputError(
            f"the chat template rejects the messages with roles {roles}: {error}{hint}"
        ) from error


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
