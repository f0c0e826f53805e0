"""What a steered model writes: texts, their scores, statistics and figures."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Main, assert_error

import steerlens as sl
from steerlens.errors import InputError
from steerlens.measure.scorers import Written
from steerlens.runs.contents import text_name
from steerlens.stats import interval

PROMPTS = ["the river was", "it is", "you are so"]
SHORT: dict[str, Any] = {"samples": 2, "max_new_tokens": 4}
HOOK = "blocks.2.hook_resid_post"


def warm(texts: Sequence[Written]) -> list[float]:
    """A score of one's own: how often a text has an even token."""
    return [float(sum(i % 2 == 0 for i in text.ids)) for text in texts]


def text(texts: Sequence[Written]) -> list[float]:
    """Called as a column of every text is."""
    return [0.0] * len(texts)


@pytest.fixture(scope="module")
def vector(llama: Any, directions: sl.Directions) -> sl.SteeringVector:
    return sl.SteeringVector.from_directions(llama, directions, layers=[2])


@pytest.fixture(scope="module")
def result(llama: Any, vector: sl.SteeringVector) -> sl.measure.BehaviourResult:
    return sl.behaviour(
        llama,
        vector,
        PROMPTS,
        coefficients=[-8, 8],
        scorers=[warm, "length"],
        n_null=3,
        personas=("you are kind", "you are rude"),
        **SHORT,
    )


def texts_of(result: Any, **of: Any) -> Any:
    frame = result.generations
    for name, value in of.items():
        frame = frame[frame[name] == value]
    return frame


def test_every_number_of_a_row_is_that_of_its_texts(result: Any) -> None:
    def by_prompt(scorer: str, **of: Any) -> Any:
        return texts_of(result, **of).groupby("prompt")[scorer].mean().to_numpy()

    unsteered = by_prompt("warm", subject="unsteered")
    table = result.table[result.table.scorer == "warm"].set_index(["subject", "coefficient"])
    row = table.loc[("steered", 8.0)]
    means = by_prompt("warm", subject="steered", coefficient=8.0)
    assert row["mean"] == pytest.approx(means.mean())
    assert [row.ci_low, row.ci_high] == pytest.approx(interval(means))
    assert row["shift"] == pytest.approx((means - unsteered).mean())
    assert [row.shift_ci_low, row.shift_ci_high] == pytest.approx(interval(means - unsteered))
    scores = texts_of(result, subject="steered", coefficient=8.0)
    above = [
        0.5 + 0.5 * np.sign(score - unsteered[prompt - 1])
        for prompt, score in zip(scores.prompt, scores.warm, strict=True)
    ]
    assert row.share_above == pytest.approx(np.mean(above))
    nulls = [by_prompt("warm", subject=f"null {i}", coefficient=8.0) for i in (1, 2, 3)]
    assert row.null_low == pytest.approx(min(null.mean() for null in nulls))
    assert row.null_high == pytest.approx(max(null.mean() for null in nulls))
    shifts = [(null - unsteered).mean() for null in nulls]
    assert row.p == sl.stats.rank_p(row["shift"], shifts)
    assert (row.n_prompts, row.n_groups, row.n_texts) == (3, 3, 6)
    at_0 = table.loc[("steered", 0.0)]
    assert (at_0["mean"], at_0["shift"]) == (pytest.approx(unsteered.mean()), 0.0)
    assert math.isnan(at_0.p)
    assert math.isnan(at_0.null_low)
    assert set(table.index.get_level_values(0)) == {"steered", "positive prompt", "negative prompt"}


def test_the_texts_are_those_that_steer_and_generate_give(llama: Any, vector: Any) -> None:
    found = sl.behaviour(
        llama,
        vector,
        PROMPTS,
        coefficients=[6, "-6"],
        samples=1,
        max_new_tokens=5,
        seed=None,
        scorers=["length"],
    )
    for strength in (6, "-6"):
        for i, prompt in enumerate(PROMPTS):
            tokenized = sl.engine.tokenize_prompt(llama, prompt)
            expected = sl.generate(llama, tokenized, vector, strength, max_new_tokens=5)
            rows = texts_of(found, subject="steered", strength=str(strength), prompt=i + 1)
            assert rows.text.tolist() == [expected]
    unsteered = texts_of(found, subject="unsteered").text.tolist()
    assert unsteered != texts_of(found, strength="6").text.tolist()


def test_directions_are_measured_hook_by_hook_and_a_vector_as_a_whole(
    llama: Any, directions: sl.Directions
) -> None:
    both = sl.SteeringVector.from_directions(llama, directions, layers=[1, 3])
    shared: dict[str, Any] = {"coefficients": [5], "scorers": ["length"], **SHORT}
    whole = sl.behaviour(llama, both, PROMPTS, **shared)
    assert set(whole.table.hook_name) == {"blocks.1.hook_resid_post + blocks.3.hook_resid_post"}
    each = sl.behaviour(llama, both, PROMPTS, layers=[1, 3], **shared)
    fitted = sl.behaviour(llama, directions, PROMPTS, layers=[1, 3], **shared)
    assert each.table.layer.drop_duplicates().tolist() == [1, 3]
    assert each.generations.text.tolist() == fitted.generations.text.tolist()
    assert each.generations.text.tolist() != whole.generations.text.tolist()
    study = sl.Study(llama, _pairs(), directions, layers=[1])
    of_study = sl.behaviour(study, None, PROMPTS, layers=[1], coefficients=[5], **SHORT)
    assert "concept" in set(of_study.table.scorer)
    texts = each.generations[each.generations.layer < 3].text.tolist()
    assert of_study.generations.text.tolist() == texts


def _pairs() -> sl.ContrastivePairs:
    words = ["warm", "cold", "so kind", "very good"]
    return sl.ContrastivePairs.from_lists(
        [f"you are cheerful {w}" for w in words], [f"you are gloomy {w}" for w in words]
    )


def test_shares_of_the_boundary_are_given_in_residual_units(llama: Any, vector: Any) -> None:
    measured = torch.tensor([20.0])
    known = replace(vector, calibration=replace(vector.calibration, boundary_pos=measured))
    shared: dict[str, Any] = {"scorers": ["length"], **SHORT}
    share = sl.behaviour(llama, known, PROMPTS, coefficients=["50%"], **shared)
    plain = sl.behaviour(llama, known, PROMPTS, coefficients=[10], **shared)
    assert share.table.coefficient.tolist() == plain.table.coefficient.tolist() == [0.0, 10.0]
    assert share.table.strength.tolist() == ["0", "50%"]
    assert share.generations.text.tolist() == plain.generations.text.tolist()
    with pytest.raises(InputError, match="boundary is not known"):
        sl.behaviour(llama, vector, PROMPTS, coefficients=["50%"], **shared)


def test_personas_texts_are_scored_as_if_after_the_plain_prompts(llama: Any, result: Any) -> None:
    asked = texts_of(result, subject="positive prompt")
    plain = texts_of(result, subject="unsteered")
    assert asked.text.tolist() != plain.text.tolist()
    assert asked.prompt_text.tolist() == plain.prompt_text.tolist()
    persona = sl.behaviour(
        llama,
        {HOOK: torch.ones(32)},
        [f"you are kind\n\n{prompt}" for prompt in PROMPTS],
        coefficients=[0],
        scorers=["length"],
        **SHORT,
    )
    assert asked.text.tolist() == persona.generations.text.tolist()


def test_groups_widen_what_repeats_narrow(llama: Any, vector: Any) -> None:
    shared: dict[str, Any] = {"coefficients": [8], "scorers": [warm], **SHORT}
    alone = sl.behaviour(llama, vector, PROMPTS * 2, **shared).table.iloc[-1]
    grouped = sl.behaviour(llama, vector, PROMPTS * 2, groups=list("abcabc"), **shared)
    row = grouped.table.iloc[-1]
    assert (row.n_groups, alone.n_groups) == (3, 6)
    assert row["mean"] == alone["mean"]
    assert row.ci_high - row.ci_low != alone.ci_high - alone.ci_low


def test_a_text_without_a_score_is_left_out(llama: Any, vector: Any) -> None:
    def odd(texts: Sequence[Written]) -> list[float]:
        return [math.nan if i % 2 else 1.0 for i in range(len(texts))]

    def never(texts: Sequence[Written]) -> list[float]:
        return [math.nan] * len(texts)

    found = sl.behaviour(
        llama, vector, PROMPTS, coefficients=[8], scorers=[odd, never], **SHORT
    ).table.set_index(["scorer", "coefficient"])
    assert found.loc[("odd", 8.0)][["mean", "n_texts"]].tolist() == [1.0, 3]
    row = found.loc[("never", 8.0)]
    assert row.n_texts == row.n_prompts == 0
    assert math.isnan(row["mean"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"coefficients": []}, "one or more coefficients"),
        ({"prompts": []}, "0 of these"),
        ({"groups": ["a"]}, "a group for each prompt"),
        ({"seed": None}, "ask for 1, not 2"),
        ({"vector": None}, "only a Study"),
        ({"scorers": ["nonsense"]}, "nonsense"),
        ({"scorers": ["concept"]}, "pairs"),
        ({"scorers": [lambda texts: [1.0]]}, "1 numbers for 6 texts"),
        ({"scorers": [lambda texts: ["high"] * len(texts)]}, "no number"),
        ({"layers": [1]}, "no direction at blocks.1"),
        ({"scorers": [text]}, "'text' is a column"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    llama: Any, vector: Any, changes: dict[str, Any], message: str
) -> None:
    given = {"vector": vector, "prompts": PROMPTS, "coefficients": [4], "scorers": [warm]} | SHORT
    assert len(sl.behaviour(llama, **given).generations) == 12
    with pytest.raises(InputError, match=message):
        sl.behaviour(llama, **(given | changes))


def test_nulls_are_of_what_adds(llama: Any, vector: Any) -> None:
    ablated = replace(vector, operator=sl.Ablate())
    shared: dict[str, Any] = {"coefficients": [1], "scorers": [warm], **SHORT}
    assert len(sl.behaviour(llama, ablated, PROMPTS, **shared).table) == 2
    with pytest.raises(InputError, match="does ablate"):
        sl.behaviour(llama, ablated, PROMPTS, n_null=1, **shared)


class Memory(dict[Any, Any]):
    def load(self, name: str, of: str) -> Any:
        return self.get((name, of))

    def keep(self, name: str, of: str, kept: Any) -> None:
        self[name, of] = kept


def test_what_was_kept_is_not_written_again(
    llama: Any, vector: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, shared = Memory(), {"coefficients": [4], "scorers": ["length", warm], **SHORT}
    first = sl.behaviour(llama, vector, PROMPTS, checkpoint=memory, **shared)

    def refused(*_: Any, **__: Any) -> Any:
        raise AssertionError("written again")

    monkeypatch.setattr("steerlens.measure.writing.generate_texts", refused)
    again = sl.behaviour(llama, vector, PROMPTS, checkpoint=memory, **shared)
    assert again.table.equals(first.table)
    assert again.generations.equals(first.generations)
    with pytest.raises(AssertionError, match="written again"):
        sl.behaviour(llama, vector, PROMPTS, checkpoint=memory, **(shared | {"seed": 1}))
    scored = {"coefficients": [4], "scorers": ["concept"], **SHORT, "checkpoint": memory}
    by_pairs = [
        sl.behaviour(llama, vector, PROMPTS, pairs=pairs, **scored).table["mean"].tolist()
        for pairs in (_pairs(), _pairs()[:2])
    ]
    assert by_pairs[0] != by_pairs[1]


def test_a_share_is_of_the_boundary_that_the_vector_has_now(llama: Any, vector: Any) -> None:
    memory, shared = Memory(), {"coefficients": ["50%"], "scorers": ["length"], **SHORT}
    texts = []
    for boundary in (4.0, 40.0):
        known = replace(vector.calibration, boundary_pos=torch.tensor([boundary]))
        at = replace(vector, calibration=known)
        found = sl.behaviour(llama, at, PROMPTS, checkpoint=memory, **shared)
        texts.append(texts_of(found, subject="steered").text.tolist())
    assert texts[0] != texts[1]


def test_a_persona_goes_into_the_system_message_that_is_there(llama: Any) -> None:
    chat = (sl.Message("system", "be kind"), sl.Message("user", "how are you"))
    found = sl.behaviour(
        *(llama, {HOOK: torch.ones(32)}, [chat]),
        coefficients=[0],
        scorers=[lambda texts: [0.0] * len(texts)],
        personas=("you are good", "you are bad"),
        **SHORT,
    )
    whole = (sl.Message("system", "you are good\n\nbe kind"), chat[1])
    alone = sl.behaviour(
        *(llama, {HOOK: torch.ones(32)}, [whole]),
        coefficients=[0],
        scorers=["length"],
        **SHORT,
    )
    asked = texts_of(found, subject="positive prompt").text.tolist()
    assert asked == texts_of(alone, subject="unsteered").text.tolist()


def test_figures_hold_the_tables_numbers(result: Any) -> None:
    figure = sl.plots.behaviour(result.table, x="length", y="warm")
    curves = figure.spec["datasets"]["curves"]
    row = result.table.query("scorer == 'warm' and coefficient == 8").iloc[0]
    assert [c["y"] for c in curves if c["coefficient"] == 8] == [
        pytest.approx(row["mean"], rel=1e-4)
    ]
    assert len(figure.spec["datasets"]["personas"]) == 2
    doses = sl.plots.behaviour_by_coefficient(result.table)
    assert {cell["scorer"] for cell in doses.spec["datasets"]["cells"]} == {"warm", "length"}
    # Without nulls there is no band: a scale without a number would warn.
    alone = sl.plots.behaviour_by_coefficient(result.table.assign(null_low=math.nan))
    layers = [len(of.spec["concat"][0]["layer"]) for of in (doses, alone)]
    assert layers == [4, 3]
    with pytest.raises(InputError, match="no scorer logprob, concept"):
        sl.plots.behaviour(result.table)


def test_the_command_writes_tables_and_texts(
    run: Main, model_folder: Path, tmp_path: Path, vector: Any
) -> None:
    file, out = tmp_path / "v.safetensors", tmp_path / "out"
    vector.save(file)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    command = ["behave", "--vector", str(file), "--model", str(model_folder)]
    command += ["--prompts", str(prompts), "--samples", "2", "--max-new-tokens", "4"]
    command += ["--coefficients=-4,0,4", "--scorers", "length,distinct_2", "--nulls", "1"]
    told = run(*command, "--out", str(out))
    assert told.code == 0, told.err
    assert "length" in told.out
    assert "30 texts in" in told.err
    table = sl.read_run(out).tables["behaviour"]
    assert table.coefficient.tolist() == [0.0] * 2 + [-4.0] * 2 + [4.0] * 2
    lines = [json.loads(line) for line in (out / "generations.jsonl").read_text().splitlines()]
    assert len(lines) == 3 * 2 * 5
    keys = {"prompt", "layer", "coefficient", "sample", "seed", "text", "scores"}
    assert keys <= set(lines[0])
    assert set(lines[0]["scores"]) == {"length", "distinct_2"}
    # The tokens of the first prompts' texts, a null's left out; the report shades them in place.
    named = {
        text_name(line["prompt_number"], line["sample"], line["strength"])
        for line in lines
        if line["ids"] and line["prompt_number"] < 3 and not line["subject"].startswith("null")
    }
    assert set(sl.read_run(out).tables["tokens"].prompt) == named
    assert [*sl.read_run(out).texts] == lines
    page = tmp_path / "report.html"
    assert run("report", str(out), "--out", str(page)).code == 0
    assert "What is written" in page.read_text()
    assert '<i style="--by:' in page.read_text()
    greedy = run(*command, "--greedy", "--out", str(tmp_path / "greedy"))
    assert greedy.code == 0
    assert_error(run(*command, "--personas", "kind", "--out", str(tmp_path / "x")), "POSITIVE")
    # Before a model is loaded: there is none.
    gone = ("behave", "--vector", str(file), "--model", str(tmp_path / "gone"))
    assert_error(run(*gone, "--out", str(tmp_path / "x")), "boundary is not known")
    told = run(*gone, "--coefficients", "4", "--out", str(tmp_path / "x"))
    assert "no model at" in told.err


@pytest.mark.real
def test_cheerful_texts_are_written_by_a_cheerful_vector(real_model: Any) -> None:
    train, test = (sl.ContrastivePairs.load("sentiment", split=s) for s in ("train", "test"))
    directions = sl.fit(real_model, train[:32], layers=[12])
    questions = [(sl.Message("user", q),) for q in sl.data.open_questions("choice")[:6]]
    found = sl.behaviour(
        real_model,
        directions,
        questions,
        coefficients=[-14, 14],
        pairs=test,
        samples=1,
        max_new_tokens=16,
        scorers=["concept"],
    )
    rows = found.table[found.table.scorer == "concept"].set_index("coefficient")
    assert rows["mean"][-14] < rows["mean"][0] < rows["mean"][14]
