"""What the pages of docs/ and README tell to type.

`pycon` blocks are doctests, `python` blocks are run on a stand-in for the default model, page by
page; only the call of `compare`, half an hour on a CPU, is checked by its signature. Options of
commands are parsed, nothing is run.
"""

import ast
import doctest
import inspect
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from _pytest.doctest import _get_checker, get_optionflags
from commands import check_command, known_commands
from conftest import bridge, build_llama, build_tokenizer

import steerlens as sl

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *DOCS.glob("*.md"), *DOCS.glob("how-to/*.md")]


def blocks(text: str, language: str) -> list[str]:
    """Fenced blocks, also those set in by a list."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", text, re.MULTILINE | re.DOTALL)
    return [inspect.cleandoc(f"\n{body}") for _, body in found]


def with_blocks(language: str) -> list[Any]:
    return [
        pytest.param(path, id=str(path.relative_to(ROOT)))
        for path in PAGES
        if blocks(path.read_text(encoding="utf-8"), language)
    ]


def test_blocks_are_found_where_they_are() -> None:
    text = "```python\na\n```\n1. b\n\n    ```python\n    c\n      d\n    ```\n```sh\ne\n```\n"
    assert blocks(text, "python") == ["a", "c\n  d"]


@pytest.mark.parametrize("path", with_blocks("pycon"))
def test_formulas_hold_as_written(path: Path, pytestconfig: pytest.Config) -> None:
    session = "\n".join(blocks(path.read_text(encoding="utf-8"), "pycon"))
    test = doctest.DocTestParser().get_doctest(session, {}, path.name, str(path), 0)
    told: list[str] = []
    runner = doctest.DocTestRunner(_get_checker(), optionflags=get_optionflags(pytestconfig))
    assert runner.run(test, out=told.append).failed == 0, "".join(told)
    assert len(test.examples) > 3


def strings(value: Any) -> Iterator[str]:
    """All text in plain values."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


def stand_in() -> Any:
    """A random-init model of the default model's depth that knows the shipped data's words."""
    lines = [
        json.loads(line)
        for path in ROOT.glob("data/sentiment/*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    texts = [*strings(lines), *sl.data.neutral_texts(), "The weather today is"]
    texts += ["I loved", "I hated", "What a joy:", "What a bore:"]
    words = dict.fromkeys(word for text in texts for word in text.split())
    tokenizer = build_tokenizer(words=list(words))
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 512}
    return bridge(build_llama(n_layers=30, **sizes), tokenizer)


@pytest.fixture(scope="module")
def default_model() -> Any:
    return stand_in()


@pytest.mark.parametrize("path", with_blocks("python"))
def test_python_on_a_page_runs(
    path: Path, default_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sl, "load_model", lambda name: default_model)
    # Fewer pairs and texts than ship, to be quick.
    load = sl.ContrastivePairs.load

    def load_few(source: Any, **of: Any) -> sl.ContrastivePairs:
        pairs = load(source, **of)
        return pairs if len(pairs) < 8 else pairs[:8]

    monkeypatch.setattr(sl.ContrastivePairs, "load", load_few)
    few = sl.data.neutral_texts()[:8]
    monkeypatch.setattr("steerlens.measure.texts.neutral_texts", lambda: few)
    namespace: dict[str, Any] = {}
    for block in blocks(path.read_text(encoding="utf-8"), "python"):
        calls = [node for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Call)]
        compared = [call for call in calls if ast.unparse(call.func) == "sl.compare"]
        for call in compared:
            named = {str(keyword.arg): keyword.value for keyword in call.keywords}
            inspect.signature(sl.compare).bind(*call.args, **named)
        if not compared:
            exec(compile(block, str(path), "exec"), namespace)


# Commands on the pages


def command_lines(text: str) -> list[list[str]]:
    lines = "\n".join(blocks(text, "sh")).replace("\\\n", " ").split("\n")
    words = [shlex.split(line, comments=True) for line in lines]
    return [some[1:] for some in words if some[:1] == ["steerlens"]]


@pytest.mark.parametrize("path", with_blocks("sh"))
def test_commands_on_a_page_are_commands(path: Path) -> None:
    for words in command_lines(path.read_text(encoding="utf-8")):
        check_command(words)


def test_every_command_has_an_example_and_a_wrong_one_is_seen() -> None:
    text = (DOCS / "how-to" / "command-line.md").read_text(encoding="utf-8")
    assert {check_command(words) for words in command_lines(text)} == set(known_commands())
    for words in (["sweep", "--out", "a", "--coefficent", "1"], ["bake", "v"], ["sweeep"]):
        with pytest.raises(Exception, match=r"No such option|Missing|sweeep"):
            check_command(words)
