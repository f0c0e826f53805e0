"""Pairs and items from what people have: files, frames, datasets, and the published forms."""

import csv
import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from commands import Main, assert_error, record
from conftest import bridge, build_llama, build_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import steerlens as sl
from steerlens.cli.options import pairs_of
from steerlens.data import FORMS, ContrastivePairs, Message, PreferenceItems
from steerlens.errors import InputError

WORDS = ["soup", "film", "walk", "book", "song", "river"]
ROWS = [
    {"positive": f"I adored the {word} because", "negative": f"I loathed the {word} because"}
    for word in WORDS
]
WANTED = ContrastivePairs.load(ROWS).fingerprint


def chat(*said: str) -> tuple[Message, ...]:
    """What user and assistant say in turn."""
    return tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(said))


def as_json(value: Any) -> str:
    return json.dumps(value)


def as_jsonl(rows: list[Any]) -> str:
    return "\n".join(map(json.dumps, rows))


# Files

FILES: dict[str, str | bytes] = {
    "pairs.jsonl": as_jsonl(ROWS),
    "jsonl.json": as_jsonl(ROWS),
    "array.json": as_json(ROWS),
    "array.jsonl": as_json(ROWS),
    "pretty.json": json.dumps(ROWS, indent=2),
    "pretty.jsonl": json.dumps(ROWS, indent=2),
    "wrapped.json": json.dumps({"version": 1, "data": ROWS}, indent=2),
    "wrapped_in_a_line.json": as_json({"examples": ROWS}),
    "wrapped_of_two.json": as_json({"version": 1, "pairs": [list(r.values()) for r in ROWS]}),
    "by_split.json": as_json({"train": ROWS, "test": ROWS[:2]}),
    "lists_by_split.json": as_json({"train": pd.DataFrame(ROWS).to_dict("list"), "test": {}}),
    "columns_and_more.json": as_json(pd.DataFrame(ROWS).assign(note="x").to_dict("list")),
    "columns_of_answers.json": as_json(
        pd.DataFrame(ROWS).set_axis(["chosen", "rejected"], axis=1).to_dict("list")
    ),
    "by_id.json": as_json({f"q{i}": row for i, row in enumerate(ROWS)}),
    "columns.json": pd.DataFrame(ROWS).to_json(),
    "lists.json": as_json(pd.DataFrame(ROWS).to_dict("list")),
    "of_two.json": as_json([list(row.values()) for row in ROWS]),
    "pairs.csv": pd.DataFrame(ROWS).to_csv(index=False),
    "crlf.csv": pd.DataFrame(ROWS).to_csv(index=False, lineterminator="\r\n"),
    "cr.csv": pd.DataFrame(ROWS).to_csv(index=False, lineterminator="\r"),
    "bom.csv": b"\xef\xbb\xbf" + pd.DataFrame(ROWS).to_csv(index=False).encode(),
    "bom.json": b"\xef\xbb\xbf" + as_json(ROWS).encode(),
    "semicolon.csv": pd.DataFrame(ROWS).to_csv(index=False, sep=";"),
    "with_index.csv": pd.DataFrame(ROWS).to_csv(),
    "capitals.csv": pd.DataFrame(ROWS).rename(columns=str.title).to_csv(index=False),
    "pairs.tsv": pd.DataFrame(ROWS).to_csv(index=False, sep="\t"),
    "pairs.csv.gz": gzip.compress(pd.DataFrame(ROWS).to_csv(index=False).encode()),
    "pairs.jsonl.gz": gzip.compress(as_jsonl(ROWS).encode()),
    "pos_neg.csv": pd.DataFrame(ROWS).set_axis(["pos", "neg"], axis=1).to_csv(index=False),
    "prompt_pos.csv": (
        pd.DataFrame(ROWS).set_axis(["prompt_pos", "prompt_neg"], axis=1).to_csv(index=False)
    ),
    "pairs.parquet": pd.DataFrame(ROWS).to_parquet(),
    "no_suffix": pd.DataFrame(ROWS).to_parquet(),
    "chosen.csv": pd.DataFrame(ROWS).set_axis(["chosen", "rejected"], axis=1).to_csv(index=False),
}


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("name", FILES)
def test_the_same_pairs_come_from_every_file(name: str, tmp_path: Path) -> None:
    path = put(tmp_path, name, FILES[name])
    assert ContrastivePairs.load(path).fingerprint == WANTED
    assert ContrastivePairs.load(str(path)).name == str(path)
    fit_on, measure_on = pairs_of(str(path))
    assert fit_on is measure_on
    assert fit_on.fingerprint == WANTED
    assert fit_on.card is not None
    assert (fit_on.card.n_rows, fit_on.card.n_repeated) == (6, 0)


class Polars:
    """What a frame of polars has."""

    def to_dicts(self) -> list[dict[str, Any]]:
        return ROWS


SOURCES: dict[str, Callable[[], Any]] = {
    "dicts": lambda: ROWS,
    "tuples": lambda: [tuple(row.values()) for row in ROWS],
    "pandas": lambda: pd.DataFrame(ROWS),
    "pandas of another index": lambda: pd.DataFrame(ROWS, index=list("abcdef")),
    "polars": Polars,
    "dataset": lambda: datasets.Dataset.from_list(ROWS),
    "streamed": lambda: datasets.Dataset.from_list(ROWS).to_iterable_dataset(),
    "splits": lambda: datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(ROWS),
            "test": datasets.Dataset.from_list(ROWS[:2]),
        }
    ),
    "one split": lambda: datasets.DatasetDict({"all": datasets.Dataset.from_list(ROWS)}),
    "arrow": lambda: datasets.Dataset.from_list(ROWS).data.table,
    "lists": lambda: pd.DataFrame(ROWS).to_dict("list"),
    "iterator": lambda: iter(ROWS),
    "pairs": lambda: list(ContrastivePairs.load(ROWS)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_same_pairs_come_from_everything_in_memory(name: str) -> None:
    made = ContrastivePairs.load(SOURCES[name](), name="mine")
    assert (made.fingerprint, made.name) == (WANTED, "mine")


def test_lists_of_tuples_hold_chats_and_continuations() -> None:
    said = [[Message("user", f"be {how} {word}")] for word in WORDS for how in ("glad", "sad")]
    rows = [(*sides, f" {i}") for i, sides in enumerate(zip(said[::2], said[1::2], strict=True))]
    made = ContrastivePairs.load(rows)
    assert made[1].positive == chat("be glad film")
    assert [pair.continuation for pair in made[:2]] == [" 0", " 1"]


@pytest.mark.parametrize("how", ["files", "saved", "splits"])
def test_a_folder_is_read_by_the_code_of_datasets(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    train = datasets.Dataset.from_list(ROWS)
    if how == "files":
        folder.mkdir()
        put(folder, "train.csv", FILES["pairs.csv"])
        put(folder, "test.csv", pd.DataFrame(ROWS[:2]).to_csv(index=False))
    elif how == "saved":
        train.save_to_disk(str(folder))
    else:
        parts = {"train_prefs": train, "test_prefs": train.select(range(2))}
        datasets.DatasetDict(parts).save_to_disk(str(folder))
    made, measured = pairs_of(str(folder), str(folder))
    assert made.fingerprint == WANTED
    assert len(measured) == (6 if how == "saved" else 2)
    if how == "splits":
        with pytest.raises(InputError, match="splits train_prefs, test_prefs, not 'valid'"):
            ContrastivePairs.load(folder, split="valid")


def test_what_is_no_dataset_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="cannot be read: datasets says"):
        ContrastivePairs.load(tmp_path)
    asked: list[str] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda name: asked.append(name) or datasets_of())

    def datasets_of() -> Any:
        return SOURCES["splits"]()

    assert ContrastivePairs.load("some-one/some.thing").fingerprint == WANTED
    assert len(ContrastivePairs.load("some-one/some.thing:test")) == 2
    assert asked == ["some-one/some.thing"] * 2
    for name in ("nowhere", "data/nowhere.csv", "../some/where", "a/b/c", "/a/b"):
        with pytest.raises(InputError, match="neither a file nor a shipped dataset"):
            ContrastivePairs.load(name)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"pip install 'steerlens\[datasets\]'"):
        ContrastivePairs.load("some-one/some.thing")
    assert len(asked) == 2


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
CHAT = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user"]), "content": TEXT}),
    min_size=1,
    max_size=2,
)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(
        st.tuples(TEXT, TEXT, TEXT | st.none(), st.none() | st.integers(0, 3)),
        min_size=2,
        max_size=4,
    ),
    said=CHAT,
)
def test_pairs_read_equal_from_every_format(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str, str | None, int | None]],
    said: list[dict[str, str]],
) -> None:
    """Any text, also of line ends, quotes, "NA" or "1.0"; groups go through a column of floats."""
    folder = tmp_path_factory.mktemp("any")
    records: list[dict[str, Any]] = [
        {
            **{"positive": [*said, {"role": "user", "content": pos}], "negative": f"-{neg}"},
            **{"continuation": after, "group": group},
        }
        for pos, neg, after, group in rows
    ]
    wanted = ContrastivePairs.load(records)
    assert [pair.continuation for pair in wanted] == [after for _, _, after, _ in rows]
    assert [pair.group for pair in wanted] == [None if g is None else str(g) for *_, g in rows]
    quoted: Any = {"index": False, "quoting": csv.QUOTE_ALL}  # a lone \r is a line's end else
    frame = pd.DataFrame(records)
    with_json = frame.assign(positive=frame.positive.map(json.dumps))
    found = {
        "jsonl": put(folder, "a.jsonl", as_jsonl(records)),
        "json": put(folder, "a.json", json.dumps(records, indent=1, ensure_ascii=False)),
        "csv": put(folder, "a.csv", with_json.to_csv(**quoted)),
        "python's": put(folder, "b.csv", frame.to_csv(**quoted)),
        "frame": frame,
    }
    texts = frame.assign(positive=[f"+{row[0]}" for row in rows])
    for name, source in found.items():
        assert ContrastivePairs.load(source).pairs == wanted.pairs, name
    put(folder, "t.parquet", texts.to_parquet())
    put(folder, "t.tsv", texts.to_csv(sep="\t", **quoted))
    of_texts = ContrastivePairs.load(folder / "t.parquet").pairs
    assert [pair.positive for pair in of_texts] == [f"+{row[0]}" for row in rows]
    assert ContrastivePairs.load(folder / "t.tsv").pairs == of_texts


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", b"positive,negative\ncaf\xe9,b\n", "a.csv:2: not UTF-8 text .*save it as UTF-8"),
        ("a.csv", b"positive,negative\na,b\n\nc,d,e\n", "a.csv: not a table .*line 4"),
        ("a.csv", b"positive,negative\na,b,c\nc,d,e\n", "a.csv: not a table"),
        (
            "a.csv",
            b'positive,negative\n"a\nb",c\nd,d\n',
            "a.csv:4: positive and negative are equal",
        ),
        ("a.csv", b"positive,negative\na,b\nc,\nd,e\n", "a.csv:3: negative: expected text"),
        ("a.csv", b"", "at least 2 pairs, got 0"),
        ("a.parquet", b"PAR1 and so on", "a.parquet: not a Parquet file"),
        ("a.json", b'[{"positive": "a",\n "negative": }]', "a.json: neither JSON .*line 2"),
        ("a.json", b"{}", "missing key 'positive'"),
        ("a.json", b"3", "expected an object"),
        ("a.jsonl.gz", b"\x1f\x8b and so on", "not a whole gzip file"),
        ("a.txt", b"one\ntwo\n", "texts of one side: give both as POSITIVE_FILE,NEGATIVE_FILE"),
    ],
)
def test_a_file_that_cannot_be_read_says_where(
    name: str, content: bytes, told: str, tmp_path: Path
) -> None:
    """`FILES` are the control."""
    with pytest.raises(InputError, match=f"(?s){told}"):
        ContrastivePairs.load(put(tmp_path, name, content))


# Columns


def test_keys_that_are_not_ours_are_named_and_left_out(tmp_path: Path, run: Main) -> None:
    further = {"idx": 0, "positive_id": 7, "continuatoin": "x", "meta": {"a": [1]}}
    for key, value in further.items():
        made = ContrastivePairs.load([{**row, key: value} for row in ROWS])
        assert made.fingerprint == WANTED
        assert made.card is not None
        assert made.card.not_used == (key,)
    path = put(tmp_path, "a.jsonl", as_jsonl([{**row, "idx": 0} for row in ROWS]))
    with pytest.warns(UserWarning, match="group"):
        shown = run("pairs", path)
    assert "6 rows of the form pairs, 6 used; columns not used: idx" in shown.out


@pytest.mark.parametrize("first", [0, 0.0, "0.0"])
def test_ids_that_went_through_floats_are_whole(first: Any, tmp_path: Path) -> None:
    frame = pd.DataFrame([{**row, "id": type(first)(i)} for i, row in enumerate(ROWS)])
    if first == "0.0":
        frame["id"] = [f"{i}.0" for i in range(6)]
        made = ContrastivePairs.load(put(tmp_path, "a.csv", frame.to_csv(index=False)))
    else:
        made = ContrastivePairs.load(frame)
    assert [pair.id for pair in made] == list("012345")
    with pytest.raises(InputError, match=r"record 1: id must be text or a whole number, got float"):
        ContrastivePairs.load([{**row, "id": 1.5} for row in ROWS])


def test_columns_are_mapped(tmp_path: Path, run: Main) -> None:
    frame = pd.DataFrame(ROWS).set_axis(["honest", "dishonest"], axis=1)
    frame["persona"] = list("aabbcc")
    path = put(tmp_path, "a.csv", frame.to_csv(index=False))
    columns = "positive=honest,negative=dishonest,group=persona"
    made, _ = pairs_of(str(path), columns=columns)
    assert made.prompt_hashes == ContrastivePairs.load(ROWS).prompt_hashes
    assert [pair.group for pair in made] == list("aabbcc")
    named = {"positive": "honest", "negative": "dishonest"}
    assert ContrastivePairs.load(path, columns=named, group="persona").pairs == made.pairs
    for given_, told in (
        (None, "columns honest, dishonest, persona are of no known form"),
        ("positive=honest,negative=lie", "no column 'lie'; there are honest, dishonest"),
        ("plus=honest", "nothing is called 'plus'; there are positive, negative"),
        ("honest", "expected --columns PART=COLUMN"),
    ):
        options = () if given_ is None else ("--columns", given_)
        assert_error(run("pairs", path, *options), told)
    two = frame[["honest", "dishonest"]]
    with pytest.raises(InputError, match="--columns positive=honest,negative=dishonest"):
        ContrastivePairs.load(two)
    wrong = frame.set_axis(["positve", "negatve", "persona"], axis=1)
    with pytest.raises(InputError, match="--columns positive=positve,negative=negatve"):
        ContrastivePairs.load(wrong)


# Published forms


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
TOPICS = [
    {"statement": f"{word} is {how}", "label": label, "topic": word, "split": "a"}
    for label, how in ((1, "cold"), (0, "hot"))
    for word in WORDS
]
CASES: dict[str, tuple[str, Any, Any, int, Any, int]] = {
    # what -> form, content, the first pair's sides and group, pairs, the first item, items
    "letters": (
        *("questions", letters("yes", "no")),
        (chat(f"{letters('yes', 'no')[0]['question']}", "(A)"), None, None),
        *(6, (chat(letters("yes", "no")[0]["question"]), "(A)", "(B)"), 12),
    ),
    "yes and no": (
        "questions",
        [
            {"question": f"Do you like {w}?", "statement": "x", "label_confidence": 0.9}
            | {"answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"}
            for w in WORDS
        ],
        (chat("Do you like soup?", "Yes"), chat("Do you like soup?", "No"), None),
        *(6, (chat("Do you like soup?"), "Yes", "No"), 6),
    ),
    "answers of texts": (
        "preferences",
        [{"prompt": f"Say {w}.", "chosen": "Yes!", "rejected": "No.", "score": 1} for w in WORDS],
        (chat("Say soup.", "Yes!"), chat("Say soup.", "No."), None),
        *(6, (chat("Say soup."), "Yes!", "No."), 6),
    ),
    "answers after a space": (
        "preferences",
        [{"prompt": f"The {w} is", "chosen": " good", "rejected": " bad"} for w in WORDS],
        ("The soup is good", "The soup is bad", None),
        *(6, ("The soup is", " good", " bad"), 6),
    ),
    "whole chats": (
        "preferences",
        [
            {
                "prompt": w,
                **{
                    side: [{"role": "user", "content": w}, {"role": "assistant", "content": side}]
                    for side in ("chosen", "rejected")
                },
            }
            for w in WORDS
        ],
        (chat("soup", "chosen"), chat("soup", "rejected"), None),
        *(6, (chat("soup"), "chosen", "rejected"), 6),
    ),
    "question and system": (
        "preferences",
        [{"system": "kind", "question": w, "chosen": "Yes", "rejected": "No"} for w in WORDS],
        ((Message("system", "kind"), *chat("soup", "Yes")), None, None),
        *(6, ((Message("system", "kind"), *chat("soup")), "Yes", "No"), 6),
    ),
    "dialogues as text": (
        "preferences",
        [
            {
                "chosen": f"\n\nHuman: {w}?\n\nAssistant: Yes",
                "rejected": f"\n\nHuman: {w}?\n\nAssistant: No",
            }
            for w in WORDS
        ],
        ("\n\nHuman: soup?\n\nAssistant: Yes", None, None),
        *(6, ("\n\nHuman: soup?\n\nAssistant:", " Yes", " No"), 6),
    ),
    "sharegpt": (
        "preferences",
        [
            {
                "conversations": SAID,
                "chosen": {"from": "gpt", "value": f"Yes, {w}"},
                "rejected": {"from": "gpt", "value": "No"},
            }
            for w in WORDS
        ],
        ((Message("system", "kind"), *chat("how", "Yes, soup")), None, None),
        *(6, ((Message("system", "kind"), *chat("how")), "Yes, soup", "No"), 6),
    ),
    "several wrong answers": (
        "questions",
        [
            {"question": f"{w}? (A) a (B) b", "answer_matching_behavior": " (A)"}
            | {"answer_not_matching_behavior": [" (B)", " (C)"]}
            for w in WORDS
        ],
        (chat("soup? (A) a (B) b", "(A)"), chat("soup? (A) a (B) b", "(B)"), None),
        *(6, (chat("soup? (A) a (B) b"), "(A)", "(B)"), 12),
    ),
    "truthful answers": (
        "questions",
        [
            {"question": f"{w}?", "best_answer": "Yes.", "correct_answers": ["Yes."]}
            | {"incorrect_answers": ["No.", "Never."]}
            for w in WORDS
        ],
        *(
            (chat("soup?", "Yes."), chat("soup?", "No."), None),
            6,
            (chat("soup?"), "Yes.", "No."),
            6,
        ),
    ),
    "truthful answers in a table": (
        "questions",
        [{"Question": w, "Best Answer": "Yes.", "Incorrect Answers": "No.; Never."} for w in WORDS],
        *((chat("soup", "Yes."), chat("soup", "No."), None), 6, (chat("soup"), "Yes.", "No."), 6),
    ),
    **{
        f"choices {how}": (
            "choices",
            [{"question": f"{w}?", **answers} for w in WORDS],
            (chat("soup?", "Yes."), chat("soup?", "No."), None),
            *(6, (chat("soup?"), "Yes.", "No."), 6),
        )
        for how, answers in {
            "and labels": {
                "mc1_targets": {"choices": ["No.", "Yes.", "Never."], "labels": [0, 1, 0]},
                "mc2_targets": {"choices": ["Sure.", "Yes.", "No."], "labels": [1, 1, 0]},
            },
            "with labels": {"mc1_targets": {"Yes.": 1, "No.": 0, "Never.": 0}},
            "by number": {"choices": ["No.", "Yes.", "Never."], "answer": 1},
            "by letter": {"options": ["No.", "Yes."], "answer": "B"},
            "by name": {
                "choices": {"text": ["No.", "Yes."], "label": ["1", "2"]},
                "answerKey": "2",
            },
        }.items()
    },
    **{
        f"labelled few{how}": (
            "choices",
            {"data": data, "labels": [[False, True], [True, False], [True, False]]},
            *(("a truth", "a lie", None), 3, None, 0),
        )
        for how, data in {
            "": [["a lie", "a truth"], ["b", "c"], ["d", "e"]],
            " in a row": ["a lie", "a truth", "b", "c", "d", "e"],
        }.items()
    },
    "instruction and input": (
        "preferences",
        [{"instruction": "Sum up:", "input": w, "chosen": "Yes", "rejected": "No"} for w in WORDS],
        *((chat("Sum up:\nsoup", "Yes"), None, None), 6, (chat("Sum up:\nsoup"), "Yes", "No"), 6),
    ),
    "input alone": (
        "preferences",
        [{"input": w, "chosen": "Yes", "rejected": "No"} for w in WORDS],
        *((chat("soup", "Yes"), None, None), 6, (chat("soup"), "Yes", "No"), 6),
    ),
    "preferred output": (
        "preferences",
        [
            {"input": {"messages": [{"role": "user", "content": w}], "tools": []}}
            | {
                f"{kind}_output": [{"role": "assistant", "content": kind}]
                for kind in ("preferred", "non_preferred")
            }
            for w in WORDS
        ],
        (chat("soup", "preferred"), chat("soup", "non_preferred"), None),
        *(6, (chat("soup"), "preferred", "non_preferred"), 6),
    ),
    "labels as columns": (
        "labelled",
        {key: [row[key] for row in TOPICS] for key in ("statement", "label", "topic")},
        *(("soup is cold", "soup is hot", "soup"), 6, None, 0),
    ),
    "items as columns": (
        "pairs",
        {"prompt": WORDS, "positive": [" good"] * 6, "negative": [" bad"] * 6},
        *(("soup good", "soup bad", None), 6, ("soup", " good", " bad"), 6),
    ),
    "labelled answers": (
        "labelled",
        [
            {"prompt": w, "completion": answer, "label": answer == "Yes"}
            for answer in ("No", "Yes")
            for w in WORDS
        ],
        *((chat("soup", "Yes"), chat("soup", "No"), "soup"), 6, (chat("soup"), "Yes", "No"), 6),
    ),
    "another label is no topic": (
        "labelled",
        [{**r, "topic": "x", "has_a": bool(i % 2)} for i, r in enumerate(TOPICS)],
        *(("soup is cold", "soup is hot", None), 6, None, 0),
    ),
    "acceptable": (
        "pairs",
        [{"sentence_good": w, "sentence_bad": f"{w}s", "UID": "agreement"} for w in WORDS],
        *(("soup", "soups", None), 6, None, 0),
    ),
    "parts of content": (
        "pairs",
        [{"positive": PARTS, "negative": [{"role": "user", "content": w}]} for w in WORDS],
        (chat("how"), chat("soup"), None),
        *(6, None, 0),
    ),
    "items": (
        "pairs",
        [{"prompt": f"The {w} is", "positive": " good", "negative": " bad"} for w in WORDS],
        ("The soup is good", "The soup is bad", None),
        *(6, ("The soup is", " good", " bad"), 6),
    ),
    "by topic": ("labelled", TOPICS, ("soup is cold", "soup is hot", "soup"), 6, None, 0),
    "words as labels": (
        "labelled",
        [{"text": r["statement"], "label": bool(r["label"]), "topic": r["topic"]} for r in TOPICS],
        *(("soup is cold", "soup is hot", "soup"), 6, None, 0),
    ),
    "by template": (
        "labelled",
        [
            {"statement": f"the {w} is in {where}", "label": int(where == "New York")}
            for where in ("New York", "Oslo")
            for w in (WORDS if where == "Oslo" else WORDS[::-1])
        ],
        *(("the river is in New York", "the river is in Oslo", None), 6, None, 0),
    ),
    "lists": (
        "lists",
        {"positive": WORDS, "negative": ["rain"] * 6},
        *(("soup", "rain", None), 6, None, 0),
    ),
    "personas": (
        "personas",
        {
            "suffixes": ["I think", "Well"],
            "positive_personas": ["glad", "merry"],
            "negative_personas": ["sad", "sour"],
            "template": "Be {persona}.",
        },
        *((chat("Be glad.", "I think"), chat("Be sad.", "I think"), "glad / sad"), 4, None, 0),
    ),
    "personas in a chat": (
        "personas",
        {
            "suffixes": ["I think", "Well"],
            "positive_personas": ["glad"],
            "negative_personas": ["sad"],
            "template": [
                {"role": "system", "content": "{persona}"},
                {"role": "assistant", "content": "{suffix}..."},
            ],
        },
        (
            (Message("system", "glad"), Message("assistant", "I think...")),
            *((Message("system", "sad"), Message("assistant", "I think...")), "glad / sad"),
        ),
        *(2, None, 0),
    ),
    "traits": (
        "traits",
        {
            "instruction": [
                {"pos": "Be glad.", "neg": "Be sad."},
                {"pos": "Smile.", "neg": "Cry."},
            ],
            "questions": ["how?", "why?", "who?"],
            "eval_prompt": "{question} {answer}",
        },
        (
            (Message("system", "Be glad."), Message("user", "how?")),
            *((Message("system", "Be sad."), Message("user", "how?")), "instruction 1"),
        ),
        *(6, None, 0),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_published_form_is_recognised(name: str, tmp_path: Path) -> None:
    form, content, (positive, negative, group), n_pairs, item, n_items = CASES[name]
    path = put(tmp_path, "a.json", json.dumps(content, indent=1))
    made, _ = pairs_of(str(path))
    assert made.card is not None
    assert (made.card.form, len(made), made.card.left_out) == (form, n_pairs, {})
    assert (made[0].positive, made[0].group) == (positive, group)
    assert negative is None or made[0].negative == negative
    assert ContrastivePairs.load(content).pairs == made.pairs
    assert ContrastivePairs.load(path, form=form).pairs == made.pairs
    if isinstance(content, list):
        lines = put(tmp_path, "a.jsonl", as_jsonl(content))
        assert ContrastivePairs.load(lines).pairs == made.pairs
        assert ContrastivePairs.load(pd.DataFrame(content)).pairs == made.pairs
    if item is None:
        with pytest.raises(InputError, match="prompt, positive, negative"):
            PreferenceItems.load(path)
    else:
        items = PreferenceItems.load(path)
        assert (items[0].prompt, items[0].positive, items[0].negative) == item
        assert len(items) == n_items


def test_every_form_has_a_case() -> None:
    assert {case[0] for case in CASES.values()} == set(FORMS)


def test_items_of_letters_have_both_orders() -> None:
    """Else a vector that prefers a letter would look like one that prefers an answer."""
    pairs = [
        {
            side: [
                {"role": "user", "content": f"{word}? (A) yes (B) no\nAnswer:"},
                {"role": "assistant", "content": letter},
            ]
            for side, letter in (("positive", "B"), ("negative", "A"))
        }
        for word in WORDS
    ]
    for source, second in (
        (letters("yes", "no (B-side)"), "Is soup good?\n\nChoices:\n (A) no (B-side)\n (B) yes"),
        (pairs, "soup? (A) no (B) yes\nAnswer:"),
    ):
        items = PreferenceItems.load(source)
        assert [item.id for item in items[:3]] == ["1", "1-exchanged", "2"]
        assert items[1].prompt == chat(second)
        assert (items[1].positive, items[1].negative) == (items[0].negative, items[0].positive)
        assert items.groups == tuple(i // 2 for i in range(12))


def test_rows_that_are_left_out_are_counted() -> None:
    rows = [
        *({"statement": f"{w} is cold", "label": 1, "topic": w} for w in [*WORDS, "tea", "tea"]),
        *({"statement": f"{w} is hot", "label": 0, "topic": w} for w in [*WORDS, "tea"]),
        *({"statement": s, "label": "unknown", "topic": "x"} for s in ("a", "b")),
        {"statement": None, "label": 1, "topic": "x"},
    ]
    with pytest.warns(UserWarning, match="2 left out: a label that is neither 0 nor 1"):
        made = ContrastivePairs.load(rows)
    assert made.card is not None
    assert made.card.left_out == {
        "no statement": 1,
        "a label that is neither 0 nor 1": 2,
        "no partner of the other label": 1,
    }
    assert (len(made), made.card.n_rows, made.card.how) == (7, 18, "paired by topic")
    answers = [{"prompt": w, "chosen": w, "rejected": "no"} for w in ("yes", "no", "or")]
    with pytest.warns(UserWarning, match="1 left out: both sides are equal"):
        assert len(ContrastivePairs.load(answers)) == 2
    doubled = ContrastivePairs.load(ROWS * 2).card
    assert doubled is not None
    assert doubled.n_repeated == 6


@pytest.mark.parametrize(
    ("content", "form", "told"),
    [
        (
            ROWS,
            "questions",
            "the form questions needs question, matching, not_matching; got",
        ),
        (ROWS, "nothing", "no form is called 'nothing'; there are traits, personas"),
        (
            ROWS,
            "traits",
            "--columns instructions=COLUMN,questions=COLUMN",
        ),
        ([{"statement": "a", "label": 1}] * 2, None, "got 2 of 1, 0 of 0 and 0 others"),
        ([{"text": "a"}] * 2, None, "a column of labels 0 and 1: --columns label=COLUMN"),
        ([{"conversations": SAID}] * 2, None, "texts of one side"),
        ([{"messages": PARTS}] * 2, None, "texts of one side"),
        (WORDS, None, "texts of one side.*an object of suffixes, positive_personas"),
        ([{"text": w, "truth": w < "s"} for w in WORDS], None, "--columns label=truth"),
        (
            [{"positive_text": w, "positive_answer": w, "negative": "a"} for w in WORDS],
            *(None, "positive_text and positive_answer may both be positive; .*positive=COLUMN"),
        ),
        (
            [{"question": w, "query": w, "chosen": "a", "rejected": "b"} for w in WORDS],
            *(None, "question and query may both be prompt; name one: --columns prompt=COLUMN"),
        ),
        (
            [{"question": w, "best_answer": "a", "incorrect_answers": "['b' 'c']"} for w in WORDS],
            *(None, "record 1: not_matching: expected an answer as text, or a list"),
        ),
        (
            [{**letters("a", "b")[0], "answer_not_matching_behavior": "[' (B)', ' (C)']"}] * 2,
            *(None, "record 1: not_matching: expected an answer as text, or a list"),
        ),
        ([CASES["traits"][1]] * 2, None, "the form traits is one object of lists, got 2 rows"),
        (
            [{"question": "a", "choices": ["a", "b"], "label": [1]}] * 2,
            *(None, r"record 1: expected choices as a list and a label for each"),
        ),
        (
            [{"text": w, "label": ("harmful", "harmless")[i % 2]} for i, w in enumerate(WORDS)],
            *(None, "of two other labels name the positive one: --columns label=label=harmful"),
        ),
        (
            [{"review": w, "stars": ("one", "five")[i % 2]} for i, w in enumerate(WORDS)],
            *(None, "a column of labels 0 and 1: --columns text=review,label=stars"),
        ),
        (
            [{"safe reply": w, "unsafe reply": "a", "idx": w} for w in WORDS],
            *(None, "name the two sides: --columns positive=safe reply,negative=unsafe reply"),
        ),
        ([{**row, "id": 1} for row in ROWS], None, "id '1' occurs twice.*--columns group=id"),
        ({**CASES["personas"][1], "template": "Be glad."}, None, "expected {persona} in it"),
        ({**CASES["personas"][1], "positive_personas": ["glad"]}, None, "got 1 and 2"),
        ({**CASES["traits"][1], "instruction": ["Be glad."]}, None, "the texts pos and neg"),
        (
            *({**CASES["traits"][1], "questions": "how?"}, "traits"),
            "questions: expected a list of texts",
        ),
        (3, None, r"expected a file, a frame, a dataset or a list of records, got 3 \(int\)"),
    ],
)
def test_errors_say_what_was_seen_and_which_flag_reads_it(
    content: Any, form: str | None, told: str
) -> None:
    """`CASES` are the control."""
    with pytest.raises(InputError, match=told):
        ContrastivePairs.load(content, form=form)


@pytest.mark.parametrize(
    ("labels", "named", "positive"),
    [
        (("True", "False"), "", "True"),
        ((1, -1), "", "1"),
        (("pos", "neg"), "", "pos"),
        (("Positive", "Negative"), "", "Positive"),
        (("incorrect", "correct"), "", "correct"),
        (("dishonest", "honest"), "", "honest"),
        (("toxic", "non-toxic"), "", "toxic"),
        (("safe", "unsafe"), "unsafe", "unsafe"),
        (("harmful", "harmless"), "harmless", "harmless"),
        ((2, 5), "2", "2"),
        (("yes", "no"), "no", "no"),
    ],
)
def test_which_of_two_labels_is_positive(labels: Any, named: str, positive: str) -> None:
    rows = [{"text": f"{w} {label}", "kind": label} for w in WORDS for label in labels]
    columns = {"label": f"kind={named}" if named else "kind"}
    made = ContrastivePairs.load(rows, columns=columns)
    assert len(made) == 6
    assert all(pair.positive.split()[1] == positive for pair in made)
    assert all(pair.negative.split()[1] != positive for pair in made)
    rows.append({"text": "a third", "kind": "other"})
    if named:
        with pytest.raises(InputError, match="of two labels"):
            ContrastivePairs.load(rows, columns=columns)


def test_speakers_have_their_usual_roles_under_either_key() -> None:
    rows = [
        {
            side: [{"role": "human", "content": w}, {"role": "gpt", "content": side}]
            for side in ("chosen", "rejected")
        }
        for w in WORDS
    ]
    assert ContrastivePairs.load(rows)[0].positive == chat("soup", "chosen")


def test_a_repeated_id_may_be_the_group() -> None:
    rows = [{**row, "id": i // 2} for i, row in enumerate(ROWS)]
    made = ContrastivePairs.load(rows, columns={"group": "id"})
    assert [(pair.id, pair.group) for pair in made[:3]] == [("1", "0"), ("2", "0"), ("3", "1")]


def test_huge_labels_and_many_columns_are_told_in_short() -> None:
    labelled = [{"text": w, "label": "no" + "o" * 100_000} for w in WORDS]
    wide = [{f"column {i}": w for i in range(5_000)} for w in WORDS]
    for rows, told in ((labelled, "6 others"), (wide, r"column 0, .*\(5000 in all\)")):
        with pytest.raises(InputError, match=told) as raised:
            ContrastivePairs.load(rows)
        assert len(str(raised.value)) < 1_000
    card = ContrastivePairs.load([{**wide[0], **row} for row in ROWS]).card
    assert "(5000 in all)" in str(card)
    assert len(str(card)) < 400


def test_answers_that_no_prompt_pairs_are_two_lists() -> None:
    """Their difference is that of whole chats, not of the prompts."""
    rows = [{"prompt": w, "completion": f"{w}!", "label": w < "g"} for w in WORDS]
    made = ContrastivePairs.load(rows)
    assert made.unpaired is not None
    assert made.unpaired[0] == (chat("film", "film!"), chat("book", "book!"))
    assert len(made.unpaired[1]) == 4


# Two lists without pairs


@pytest.fixture(scope="module")
def model() -> Any:
    return bridge(build_llama(n_layers=2), build_tokenizer())


POS = ["you are kind", "you are so good", "the sun is warm", "you are cheerful", "good bread"]
NEG = ["you are rude", "you are bad", "the rain is so cold today"]


@pytest.mark.parametrize("sides", [(POS, NEG), (NEG, POS)])
def test_a_mean_difference_needs_no_pairs(model: Any, sides: tuple[list[str], list[str]]) -> None:
    fitted = sl.fit(model, sides)
    texts = [[sl.engine.tokenize_prompt(model, text) for text in side] for side in sides]
    hook = fitted.hook_names[1]
    means = [sl.engine.collect_activations(model, t, [hook], position=-1)[0].mean(0) for t in texts]
    by_hand = torch.nn.functional.normalize(means[0] - means[1], dim=0)
    assert torch.allclose(fitted[hook], by_hand, atol=1e-6)
    in_order = sl.fit(model, ContrastivePairs.load(list(zip(*sides, strict=False))))
    assert not torch.allclose(in_order[hook], by_hand, atol=1e-3)
    whole = ContrastivePairs.load(sides)
    for pairs in (whole, whole[:2], ContrastivePairs.load((POS + NEG, NEG + POS)).split(0.5)[1]):
        with pytest.raises(InputError, match=r"pca is fitted from pairs.*two lists without any"):
            sl.fit(model, pairs, method="pca")
    for method in ("probe", "shuffled"):
        with pytest.raises(InputError, match=f"{method} is fitted from pairs.*of two lists"):
            sl.fit_directions(sl.collect_differences(model, whole), method=method)
    with pytest.raises(InputError, match="reliability is fitted from pairs"):
        sl.reliability(sl.collect_differences(model, ContrastivePairs.load((POS * 2, NEG * 3))))
    with pytest.warns(UserWarning, match="two lists without pairs, taken in order: separation"):
        study = sl.Study(model, whole, fitted, layers=[1], n_bootstrap=2)
    with pytest.raises(InputError, match="second axis is fitted from pairs"):
        study.boundary_shape(1)
    for run in (sl.loss_gradients, sl.directions.train_directions):
        with pytest.raises(InputError, match="two lists without any"):
            run(model, whole, layers=[1])
    items = PreferenceItems.load(
        [{"prompt": f"the {w} was", "positive": " warm", "negative": " cold"} for w in WORDS]
    )
    with pytest.raises(InputError, match="compared are fitted from pairs"):
        sl.compare(model, whole, items, layers=[1], methods=["mean_diff"])


def test_two_lists_come_from_files_and_columns(
    tmp_path: Path, run: Main, model_folder: Path
) -> None:
    pos = put(tmp_path, "pos.txt", "\n".join(POS))
    objects = [{"instruction": text, "category": "a"} for text in NEG]
    neg = put(tmp_path, "neg.json", json.dumps(objects))
    ragged = pd.DataFrame({"positive": POS, "negative": [*NEG, None, None]})
    columns = put(tmp_path, "both.csv", ragged.to_csv(index=False))
    assert ContrastivePairs.load((pos, neg)).pairs == ContrastivePairs.load(f"{pos},{neg}").pairs
    for how in ({"group": "topic"}, {"form": "pairs"}, {"columns": {"positive": "instruction"}}):
        with pytest.raises(InputError, match="two lists without pairs have texts alone"):
            ContrastivePairs.load((pos, neg), **how)
    one = put(tmp_path, "both.json", json.dumps({"harmful": POS, "harmless": NEG}))
    named = {"columns": "positive=harmful,negative=harmless"}
    labelled = [{"text": t, "label": i} for i, side in enumerate((NEG, POS)) for t in side]
    flat = put(tmp_path, "flat.jsonl", as_jsonl(labelled))
    for source, how in ((f"{pos},{neg}", {}), (columns, {}), (one, named), (flat, {})):
        made, _ = pairs_of(str(source), **how)
        assert made.card is not None
        assert "of 5 and 3: taken in order" in made.card.how
        assert (made.card.n_rows, made.card.left_out) == (8, {"no partner in the shorter list": 2})
        assert made.unpaired == (tuple(POS), tuple(NEG))
        assert [(pair.positive, pair.negative) for pair in made] == list(
            zip(POS, NEG, strict=False)
        )
    assert ContrastivePairs.load(list(zip(POS, NEG, strict=False))).fingerprint != made.fingerprint
    outcome = run("layers", "--model", model_folder, "--pairs", f"{pos},{neg}")
    assert "of5and3:takeninorder" in "".join(outcome.err.split())  # wherever lines are broken
    assert outcome.code == 0
    assert "separation" in outcome.out
    refused = run("layers", "--model", model_folder, "--pairs", columns, "--method", "pca")
    assert_error(refused, "fitted from pairs")


# Commands


def test_a_record_has_the_card(sweep: Main, tmp_path: Path) -> None:
    rows = [{"chosen": f"you are kind {w}", "rejected": f"you are rude {w}"} for w in WORDS]
    path = put(tmp_path, "a.csv", pd.DataFrame(rows).assign(score=1).to_csv(index=False))
    outcome = sweep("--pairs", path, "--layers", "1", "--out", tmp_path / "run")
    assert outcome.code == 0
    assert "6 rows of the form preferences, 6 used; columns not used: score" in outcome.words
    read = record(tmp_path / "run")["request"]["fitted_on"]["read"]
    assert (read["form"], read["n_used"], read["not_used"]) == ("preferences", 6, ["score"])


def test_compare_takes_items_of_any_form(run: Main, model_folder: Path, tmp_path: Path) -> None:
    """It needs answers; pairs of texts have none."""
    path = put(tmp_path, "a.jsonl", as_jsonl(ROWS))
    refused = run("compare", "--model", model_folder, "--pairs", path, "--out", tmp_path / "run")
    assert_error(refused, "prompt, positive, negative", "--items")


STRIPPING = (
    "{% for m in messages if m.role != 'system' %} {{ m.role }} {{ m.content | trim }}"
    "{% endfor %}{% if add_generation_prompt %} assistant {% endif %}"
)


def test_pairs_are_looked_at_before_a_run(run: Main, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    build_llama(n_layers=1).save_pretrained(folder)
    build_tokenizer(chat_template=STRIPPING).save_pretrained(folder)
    words = ["river", "soup", "bread", "night", "walk", "sun", "rain"]
    rows: list[Any] = [
        {"positive": f"you are kind {' '.join(words[:n])}", "negative": f"you are rude {words[n]}"}
        for n in range(1, 7)
    ]
    system = {"role": "system", "content": "be kind"}
    said = [{"role": "user", "content": side} for side in ("good", "bad")]
    rows += [{"positive": [system, said[0]], "negative": [system, said[1]]}, rows[0]]
    path = put(tmp_path, "a.jsonl", as_jsonl(rows))
    test = put(tmp_path, "b.jsonl", as_jsonl([rows[0], {"positive": "x y", "negative": "z"}]))
    with pytest.warns(UserWarning, match="1 of 8 pairs repeat both prompts"):
        shown = run("pairs", path, "--model", folder, "--test-pairs", test)
    assert shown.code == 0, shown.err
    for told in (
        *("8 rows of the form pairs, 8 used; 1 repeated", "positive, tokens", "labels"),
        *("Shortest: pair", "Longest: pair '6'", "|you|are|kind|river|soup|", "2 of 2"),
        "Leakage: 1 of 2 test pairs are among",
    ):
        assert told in shown.out
    stripped = [
        {**rows[6], "positive": [*rows[6]["positive"], {"role": "assistant", "content": "I "}]}
    ]
    path = put(tmp_path, "c.jsonl", as_jsonl(rows[:2] + stripped))
    with pytest.warns(UserWarning, match="independent groups"):
        shown = run("pairs", path, "--model", folder)
    assert "1 of them" in shown.out
    (folder / "chat_template.jinja").unlink()
    chats = put(tmp_path, "d.jsonl", as_jsonl(rows[6:7] + [{**rows[6], "id": "b"}]))
    with pytest.warns(UserWarning, match="repeat both prompts"):
        refused = run("pairs", chats, "--model", folder)
    assert (refused.code, "2 of them" in refused.out, "Shortest" in refused.out) == (0, True, False)
    with pytest.warns(UserWarning, match="independent groups"):
        plain = run("pairs", path)
    assert (plain.code, "tokens" in plain.out, "characters" in plain.out) == (0, False, True)


def test_former_names_work_with_a_warning(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", as_jsonl(ROWS))
    for former, source in (("from_records", ROWS), ("from_dataset", ROWS), ("from_jsonl", path)):
        with pytest.warns(DeprecationWarning, match=f"{former} is now load"):
            assert getattr(ContrastivePairs, former)(source).fingerprint == WANTED
