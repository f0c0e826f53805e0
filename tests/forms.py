"""Rows of data as people have them, and what puts them into files."""

import json
from pathlib import Path
from typing import Any

from steerlens.data import Message

WORDS = ["soup", "film", "walk", "book", "song", "river"]
ROWS = [
    {"positive": f"I adored the {word} because", "negative": f"I loathed the {word} because"}
    for word in WORDS
]


def chat(*said: str) -> tuple[Message, ...]:
    """What user and assistant say in turn."""
    return tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said))


def rows(**columns: Any) -> list[dict[str, Any]]:
    """A row a word, which stands in place of WORD in all texts."""
    text = json.dumps(columns)
    return [json.loads(text.replace("WORD", word)) for word in WORDS]


def as_json(value: Any) -> str:
    return json.dumps(value)


def as_jsonl(rows: list[Any]) -> str:
    return "\n".join(map(json.dumps, rows))


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def letters(first: str, second: str) -> list[dict[str, str]]:
    return [
        {
            "question": f"Is {word} good?\n\nChoices:\n (A) {first}\n (B) {second}",
            "answer_matching_behavior": " (A)",
            "answer_not_matching_behavior": " (B)",
        }
        for word in WORDS
    ]


SAID = [{"from": "system", "value": "kind"}, {"from": "human", "value": "how"}]
TEXTS = [{"type": kind, "text": text} for kind, text in (("text", "ho"), ("input_text", "w"))]
PARTS = [{"role": "user", "content": TEXTS}]
PERSONAS = {
    "suffixes": ["I think", "Well"],
    "positive_personas": ["glad", "merry"],
    "negative_personas": ["sad", "sour"],
    "template": "Be {persona}.",
}
TRAITS = {
    "instruction": [{"pos": "Be glad.", "neg": "Be sad."}, {"pos": "Smile.", "neg": "Cry."}],
    "questions": ["how?", "why?", "who?"],
    "eval_prompt": "{question} {answer}",
}
TOPICS = [
    {"statement": f"{word} is {how}", "label": label, "topic": word, "split": "a"}
    for label, how in ((1, "cold"), (0, "hot"))
    for word in WORDS
]
