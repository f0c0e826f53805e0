"""Prompts that a model is asked to write after: open questions that ship, files of one's own."""

from pathlib import Path
from typing import Any, Literal, NamedTuple

from steerlens.data.prompts import Prompt, checked_prompt
from steerlens.data.reading import read_rows, read_texts
from steerlens.data.shipped import shipped_folder
from steerlens.errors import InputError, told
from steerlens.validation import checked


class OpenPrompt(NamedTuple):
    """A prompt to write after, and the group of those that are alike."""

    prompt: Prompt
    group: str | None = None


@checked
def open_questions(half: Literal["choice", "confirmation"]) -> tuple[str, ...]:
    """The shipped open questions: neutral to mood, register and honesty, three sentences or more.

    Args:
        half: The one that something is chosen on, or the one on which it is confirmed. No subject
            is in both.

    Examples:
        >>> len(sl.data.open_questions("choice"))
        30
    """
    return read_texts(shipped_folder() / "questions" / f"{half}.txt")


@checked
def read_prompts(path: str | Path) -> tuple[OpenPrompt, ...]:
    """The prompts of a file: a text a line (.txt), or JSONL and the other files of rows.

    A row has `messages` (a list of `{"role", "content"}`) or `prompt` (text, or such a list), and
    may have a `group`.

    Raises:
        InputError: The file cannot be read, holds no prompt, or a row is none (named).

    Examples:
        >>> path = folder / "prompts.txt"
        >>> _ = path.write_text("How is bread made?\\nWhat is a map for?\\n")
        >>> sl.data.read_prompts(path)[0]
        OpenPrompt(prompt='How is bread made?', group=None)
    """
    path = Path(path)
    rows = read_rows(path, split="test", name=str(path)).rows
    if not rows:
        raise InputError(f"{str(path)!r} holds no prompt; give one a line")
    return tuple(_open_prompt(row.record, row.where) for row in rows)


def _open_prompt(record: Any, where: str) -> OpenPrompt:
    if not isinstance(record, dict):
        return OpenPrompt(checked_prompt(record, where=where))
    group = record.get("group")
    given = [record[key] for key in ("messages", "prompt") if record.get(key) is not None]
    if len(given) != 1:
        raise InputError(
            f"{where}: expected messages or a prompt, and perhaps a group, got the keys "
            f"{told(', '.join(map(str, record)))}"
        )
    if not isinstance(group, str | int | None) or isinstance(group, bool):
        raise InputError(f"{where}: a group is text or a whole number, got {told(group)}")
    return OpenPrompt(checked_prompt(given[0], where=where), None if group is None else str(group))
