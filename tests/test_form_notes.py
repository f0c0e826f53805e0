"""What became of rows, which labels are positive, and what errors say of forms that are unknown."""

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
import torch
from commands import Main, assert_error, record
from conftest import bridge, build_llama, build_tokenizer
from forms import PARTS, PERSONAS, ROWS, SAID, TRAITS, WORDS, as_jsonl, chat, letters, put

import steerlens as sl
from steerlens.cli.options import pairs_of
from steerlens.data import ContrastivePairs, PreferenceItems
from steerlens.errors import InputError


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
        ([TRAITS] * 2, None, "the form traits is one object of lists, got 2 rows"),
        (
            [{"question": "a", "choices": ["a", "b"], "label": [1]}] * 2,
            *(None, r"record 1: expected choices as a list and a label for each"),
        ),
        (
            [{"text": w, "label": ("harmful", "harmless")[i % 2]} for i, w in enumerate(WORDS)],
            *(None, "of two other labels name the positive one: --columns label=label=harmful"),
        ),
        (
            [{"opinion": w, "stars": ("one", "five")[i % 2]} for i, w in enumerate(WORDS)],
            *(None, "a column of labels 0 and 1: --columns text=opinion,label=stars"),
        ),
        (
            [{"safe reply": w, "unsafe reply": "a", "idx": w} for w in WORDS],
            *(None, "name the two sides: --columns positive=safe reply,negative=unsafe reply"),
        ),
        (
            [{"pro_stereotype": w, "anti_stereotype": "a", "type": 1} for w in WORDS],
            *(None, "--columns positive=pro_stereotype,negative=anti_stereotype"),
        ),
        (
            [{"clean": w, "corrupted": "a", "correct_idx": 3, "incorrect_idx": 4} for w in WORDS],
            *(None, "--columns positive=clean,negative=corrupted"),
        ),
        (
            [{"prompt": w, "response_0": "a", "response_1": "b", "safer_id": 1} for w in WORDS],
            *(None, "it looks like choices: name what tells the right one: --columns label="),
        ),
        (
            [{"sentence": f"{w} _", "option1": "a", "option2": "b", "answer": 1} for w in WORDS],
            *(None, "the form choices: name what is asked: --columns question=sentence"),
        ),
        (
            [{"prompt": w, "answers": [{"answer": "a", "rank": 1.0}]} for w in WORDS],
            *(None, "the form choices needs a label for each choice, or the name, number or text"),
        ),
        (
            [{"generation": w, "set": w < "s", "prompt_label": i % 2} for i, w in enumerate(WORDS)],
            *(None, "--columns text=generation,label=prompt_label"),
        ),
        (
            {"version": 1, "data": {kind: [{"id": 1}] * 2 for kind in ("within", "across")}},
            *(None, r"one object with data.within \(2\), data.across \(2\): keep the list"),
        ),
        ({"data": [ROWS[0], 3.0]}, None, "record 2: expected an object with the keys positive"),
        ({"data": [{"row_idx": 1, "text": w} for w in WORDS]}, None, "texts of one side"),
        ([ROWS[0], 3.0], None, "record 2: expected an object with the keys positive, negative"),
        ([{"posiative": "f"}, 1e9], None, "record 2: expected an object with the keys"),
        (
            datasets.Dataset.from_list(ROWS).remove_columns("negative"),
            *(None, r"pairs: .*name them: --columns negative=COLUMN"),
        ),
        ([{**row, "id": 1} for row in ROWS], None, "id '1' occurs twice.*--columns group=id"),
        ({**PERSONAS, "template": "Be glad."}, None, "expected {persona} in it"),
        ({**PERSONAS, "positive_personas": ["glad"]}, None, "got 1 and 2"),
        ({**TRAITS, "instruction": ["Be glad."]}, None, "the texts pos and neg"),
        (
            *({**TRAITS, "questions": "how?"}, "traits"),
            "questions: expected a list of texts",
        ),
        (3, None, r"expected a file, a frame, a dataset or a list of records, got 3 \(int\)"),
    ],
)
def test_errors_say_what_was_seen_and_which_flag_reads_it(
    content: Any, form: str | None, told: str
) -> None:
    """The forms of test_forms.py are the control."""
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
