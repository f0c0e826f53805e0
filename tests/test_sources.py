"""What people have as files, frames, datasets and lists: the same rows come from each."""

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
from commands import Main, assert_error
from forms import ROWS, WORDS, as_json, as_jsonl, chat, put
from hypothesis import given, settings
from hypothesis import strategies as st

from steerlens.cli.options import pairs_of
from steerlens.data import ContrastivePairs, Message
from steerlens.errors import InputError

WANTED = ContrastivePairs.load(ROWS).fingerprint

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
    "viewer.json": as_json(
        {"features": [{"name": "positive"}], "num_rows_total": 6}
        | {"rows": [{"row_idx": i, "row": row} for i, row in enumerate(ROWS)]}
    ),
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


def of_polars(*, is_lazy: bool = False) -> Any:
    """A frame of polars, where it is installed."""
    frame = pytest.importorskip("polars").DataFrame(ROWS)
    return frame.lazy() if is_lazy else frame


SOURCES: dict[str, Callable[[], Any]] = {
    "dicts": lambda: ROWS,
    "tuples": lambda: [tuple(row.values()) for row in ROWS],
    "pandas": lambda: pd.DataFrame(ROWS),
    "pandas of another index": lambda: pd.DataFrame(ROWS, index=list("abcdef")),
    "polars": of_polars,
    "lazy polars": lambda: of_polars(is_lazy=True),
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


def test_two_columns_of_polars_are_two_lists() -> None:
    frame = of_polars()
    made = ContrastivePairs.load((frame["positive"], frame["negative"].head(4)))
    assert made.unpaired is not None
    assert [len(side) for side in made.unpaired] == [6, 4]


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
    """Any text, also of line ends, U+2028, quotes, "NA" or "1.0"; groups go through floats."""
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
        "dataset": datasets.Dataset.from_list(records),
        "jsonl": put(folder, "a.jsonl", as_jsonl(records)),
        "not ascii": put(
            folder, "b.jsonl", "\n".join(json.dumps(r, ensure_ascii=False) for r in records)
        ),
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
        ("a.txt.dev", b"1 [The nurse] met her\n", "a.txt.dev:1: not .*in a file named .txt"),
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


def test_a_repeated_id_may_be_the_group() -> None:
    rows = [{**row, "id": i // 2} for i, row in enumerate(ROWS)]
    made = ContrastivePairs.load(rows, columns={"group": "id"})
    assert [(pair.id, pair.group) for pair in made[:3]] == [("1", "0"), ("2", "0"), ("3", "1")]


def test_former_names_work_with_a_warning(tmp_path: Path) -> None:
    path = put(tmp_path, "a.jsonl", as_jsonl(ROWS))
    for former, source in (("from_records", ROWS), ("from_dataset", ROWS), ("from_jsonl", path)):
        with pytest.warns(DeprecationWarning, match=f"{former} is now load"):
            assert getattr(ContrastivePairs, former)(source).fingerprint == WANTED
