"""`recommend`: a planted direction is found, labels that mean nothing are refused, and why."""

import json
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Main, content, record, table
from conftest import bridge, build_tokenizer
from planted import PROMPTS, WORDS, item_records, pair_records, planted_weights

import steerlens as sl
from steerlens.measure import label_flips, outcomes, recommendation
from steerlens.measure.choosing import Parts
from steerlens.measure.sign_results import IN_JSON, SignResult, verdict_of


@pytest.fixture(scope="module", autouse=True)
def _short_texts() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recommendation, "OWN_TOKENS", 6)
        patch.setattr(outcomes, "OWN_TOKENS", 6)
        patch.setattr(recommendation, "NEW_TOKENS", 3)
        yield


@pytest.fixture(scope="module")
def planted() -> Any:
    return bridge(planted_weights())


@pytest.fixture(scope="module")
def found(planted: Any) -> sl.measure.Recommendation:
    return sl.recommend(planted, pair_records(), items=item_records(), prompts=PROMPTS)


def raised(model: Any, hook_name: str, direction: torch.Tensor, coefficient: float) -> float:
    """How much a push raises the logit of "good" over that of "bad", over some prompts."""
    good, bad = build_tokenizer()("good bad", add_special_tokens=False)["input_ids"]
    with torch.no_grad(), sl.steer(model, {hook_name: direction}, coefficient):
        steered = [model(f"the {word} was")[0, -1] for word in WORDS]
    with torch.no_grad():
        unsteered = [model(f"the {word} was")[0, -1] for word in WORDS]
    changes = (after - before for after, before in zip(steered, unsteered, strict=True))
    return float(torch.stack([change[good] - change[bad] for change in changes]).mean())


def test_a_planted_direction_is_found(planted: Any, found: sl.measure.Recommendation) -> None:
    assert (found.steer, found.reasons) == (True, ())
    assert found.vector is not None
    [hook_name] = found.vector.hook_names
    fitted = sl.fit(planted, Parts.of(sl.ContrastivePairs.load(pair_records()), None, 0).fit)
    assert torch.equal(found.vector[hook_name], fitted[hook_name])
    # The layer is right by bare steering, at the damage that is predicted.
    by_layer = [
        raised(planted, row.hook_name, fitted[row.hook_name], row.predicted_boundary)
        for row in found.candidates.itertuples()
    ]
    weighted = np.array(by_layer) * found.candidates.agreement
    assert found.candidates.hook_name[weighted.idxmax()] == hook_name
    assert min(by_layer) < -0.1  # elsewhere it is turned round
    for sign, direction in (("positive", 1), ("negative", -1)):
        one = found.signs[sign]
        assert one is not None
        assert one.hook_name == hook_name
        assert direction * one.coefficient > 0
        assert direction * one.effect > one.needed_effect > 0
        assert 0 < one.share_of_boundary <= 0.8
        assert one.p_value <= 0.05
        assert one.kl_nats > 0  # degradation may be below 0
    best = found.candidates.weighted_effect.idxmax()
    assert found.candidates.is_chosen.tolist() == [i == best for i in found.candidates.index]
    # Unsteered, half, whole and too much, of both signs.
    assert found.texts.groupby("prompt").size().tolist() == [7, 7]
    assert "coefficient +" in str(found)
    assert "steer" in found._repr_html_()


def test_json_is_as_specified(found: sl.measure.Recommendation) -> None:
    said = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert {*said} == {"steer", "signs", "reasons"}
    assert {*said["signs"]} == {"positive", "negative"}
    assert {*said["signs"]["positive"]} == {*IN_JSON}
    assert {"layer", "coefficient", "share_of_boundary", "share_of_norm", "effect"} <= {*IN_JSON}
    assert {"ci_low", "ci_high", "p", "cost_nats"} <= {*IN_JSON}


@pytest.mark.parametrize("seed", [0])
def test_shuffled_labels_are_not_steered(planted: Any, seed: int) -> None:
    flips = label_flips.coin_flips(range(16), seed).tolist()
    pairs = pair_records(turned=lambda group: flips[group] < 0)
    refused = sl.recommend(planted, pairs, items=item_records(), prompts=PROMPTS, seed=seed)
    assert not refused.steer
    assert refused.vector is None
    assert refused.to_dict()["signs"] == {"positive": None, "negative": None}
    assert refused.table.verdict.ne("steer").all()
    assert str(refused).startswith("do not steer")


def test_the_choice_never_sees_what_confirms(
    planted: Any, found: sl.measure.Recommendation
) -> None:
    pairs = sl.ContrastivePairs.load(pair_records())
    items = sl.PreferenceItems.load(item_records())
    parts = Parts.of(pairs, items, 0)
    assert parts.items is not None
    groups = [{entry.group for entry in part} for part in (parts.fit, parts.choose, parts.confirm)]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 16
    held_out = {int(str(pair.group)) for pair in parts.confirm}
    asked = {str(item.prompt) for item in parts.items[1]}
    turned = sl.recommend(
        planted,
        pair_records(turned=lambda group: group in held_out),
        items=item_records(turned=lambda i: f"the {WORDS[i]} was" in asked),
        prompts=PROMPTS,
    )
    assert turned.candidates.equals(found.candidates)
    assert turned.table.coefficient.tolist() == found.table.coefficient.tolist()
    # What confirms says the opposite.
    assert turned.table.effect.tolist() == pytest.approx((-found.table.effect).tolist())
    reasons = " ".join(turned.reasons)
    assert not turned.steer
    assert "the effect goes the other way" in reasons
    assert "no separation on held-out pairs" in reasons


GOOD = SignResult(
    sign="positive",
    hook_name="blocks.1.hook_resid_post",
    layer=1,
    coefficient=8.0,
    boundary=10.0,
    share_of_boundary=0.8,
    share_of_norm=0.1,
    effect=0.4,
    effect_ci_low=0.2,
    effect_ci_high=0.6,
    needed_effect=0.1,
    groups_needed=5.0,
    n_units=20,
    n_groups=10,
    p_value=0.01,
    null_by="exact",
    n_null=20,
    null_correlation=float("nan"),
    separation=3.0,
    separation_ci_low=1.0,
    separation_ci_high=5.0,
    degradation_nats=0.1,
    kl_nats=0.08,
)


@pytest.mark.parametrize(
    ("changes", "verdict", "said"),
    [
        ({}, "steer", ""),
        ({"separation_ci_low": -1.0}, "no separation on held-out pairs", "-1 to 5"),
        ({"p_value": 0.2}, "no more than a null", "p 0.2 among 20, exact"),
        (
            {"effect": 0.05, "effect_ci_low": 0.01, "effect_ci_high": 0.09},
            "the boundary is smaller than the effect needs",
            "some 16 residual units, and the boundary is at 10",
        ),
        (
            {"effect": 0.02, "effect_ci_low": -0.05, "effect_ci_high": 0.09},
            "the boundary is smaller than the effect needs",
            "0.1 is the least that matters",
        ),
        (
            {"effect_ci_low": -0.1, "effect_ci_high": 0.9, "groups_needed": 31.2},
            "too few groups of items",
            "22 more to confirm on",
        ),
        (
            {"effect": -0.4, "effect_ci_low": -0.6, "effect_ci_high": -0.2, "needed_effect": -1.0},
            "the effect goes the other way",
            "-0.4 nats",
        ),
    ],
)
def test_each_condition_that_fails_is_a_reason(
    changes: dict[str, float], verdict: str, said: str
) -> None:
    reasons = replace(GOOD, **changes).reasons("items", "kl=0.1")  # type: ignore[arg-type]
    assert verdict_of(reasons) == verdict
    assert said in " ".join(reasons)
    mirrored = {
        "effect": -changes.get("effect", 0.4),
        "effect_ci_low": -changes.get("effect_ci_high", 0.6),
        "effect_ci_high": -changes.get("effect_ci_low", 0.2),
        "coefficient": -8.0,
        "boundary": -10.0,
    }
    negative = replace(GOOD, sign="negative", **{**changes, **mirrored})  # type: ignore[arg-type]
    assert verdict_of(negative.reasons("items", "kl=0.1")) == verdict


def test_too_few_groups_say_how_many_more(llama: Any) -> None:
    few = sl.recommend(llama, pair_records(5), items=item_records()[:6])
    assert not few.steer
    assert few.reasons == (
        "too few groups of pairs: 5, and 16 are needed (8 to fit on, 4 to choose on, 4 to confirm "
        "on): give 11 more",
        "too few groups of items: 6, and 8 are needed (4 to choose on, 4 to confirm on): give 2 "
        "more",
    )
    assert (len(few.table), len(few.candidates), len(few.texts)) == (0, 0, 0)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"budget": "rollout_kl_p95=1"}, "cannot be predicted"),
        ({"prompts": ["the day"]}, "at least 4"),
        ({"pairs": (["a day", "a night"], ["so bad", "so good", "cold"])}, "without any"),
    ],
)
def test_what_cannot_be_asked_is_refused(llama: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(sl.SteerlensError, match=said):
        sl.recommend(llama, **{"pairs": pair_records(), **given})


def test_without_items_what_is_written_decides(
    planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label_flips, "N_EXACT", 2)
    found = sl.recommend(planted, pair_records(), prompts=PROMPTS, layers=[1, 2])
    assert found.unit == "prompts"
    assert found.table.null_by.tolist() == ["exact", "exact"]
    assert found.table.n_null.tolist() == [2, 2]
    assert found.table.effect.notna().all()
    # Two flips can show nothing, whatever the effect.
    assert not found.steer
    assert all("no more than a null" in verdict for verdict in found.table.verdict)


# The command


@pytest.fixture
def words(tmp_path_factory: pytest.TempPathFactory, few_texts: None) -> list[str | Path]:
    folder = tmp_path_factory.mktemp("planted")
    planted_weights().save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    for name, records in (("pairs", pair_records()), ("items", item_records())):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = ["--pairs", folder / "pairs.jsonl", "--items", folder / "items.jsonl"]
    return ["recommend", "--model", folder / "model", *data, "--layers", "2,3"]


def test_the_command_writes_and_says_what_next(
    run: Main, words: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    outcome = run(*words, "--device", "cpu", "--form", "pairs", "--out", whole)
    assert outcome.code == 0, outcome.err
    names = {"recommendation.csv", "candidates.csv", "generations.csv", "recommendation.json"}
    names |= {"vector.safetensors", "report.html", "run.json"}
    assert set(content(whole)) == names
    said = json.loads((whole / "recommendation.json").read_text())
    assert said["steer"] is True
    assert record(whole)["request"]["command"] == "recommend"
    vector = sl.SteeringVector.load(whole / "vector.safetensors")
    positive = said["signs"]["positive"]
    assert float(vector.calibration.boundary_pos) == pytest.approx(positive["boundary"])
    assert table(whole, "recommendation.csv").verdict.tolist() == ["steer", "steer"]
    lines = [line.split() for line in outcome.out.splitlines() if line.startswith("  steerlens")]
    assert [line[1] for line in lines] == ["generate", "boundary", "report"]
    assert all({"--device", "cpu"} <= {*line} for line in lines[:2])
    assert {"--form", "--pairs", str(words[4])} <= {*lines[1]}
    assert "--form" not in lines[0]
    behave = outcome.err.splitlines()[-1]
    assert behave.startswith("next: steerlens behave --vector")
    assert {"--form", "--pairs", "--device"} <= {*behave.split()}
    page = (whole / "report.html").read_text()
    assert "Positive coefficient: steer" in page
    # Stopped after all but the last step, and gone on with: the same bytes.
    with monkeypatch.context() as patch:
        patch.setattr(recommendation, "separation", _interrupt)
        again = (*words, "--device", "cpu", "--form", "pairs", "--out", stopped)
        assert run(*again).code == 130
    assert not (stopped / "run.json").exists()
    resumed = run("recommend", "--resume", stopped)
    assert resumed.code == 0
    assert resumed.err.splitlines()[-1] == behave.replace(str(whole), str(stopped))
    made, again = content(whole), content(stopped)
    assert made.keys() == again.keys()
    dated = {"run.json", "report.html"}
    assert all(made[name] == again[name] for name in made.keys() - dated)


def _interrupt(*given: Any) -> None:
    raise KeyboardInterrupt


def test_flips_of_all_layers_are_never_held_at_once(
    planted: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, made, alive = label_flips.LabelFlips.at, list[weakref.ref[Any]](), list[int]()

    def counted(flips: Any, name: str) -> Any:
        found = at(flips, name)
        made.append(weakref.ref(found[0]))
        alive.append(sum(of() is not None for of in made))
        return found

    monkeypatch.setattr(label_flips.LabelFlips, "at", counted)
    monkeypatch.setattr(recommendation, "choose_coefficients", stop_here)
    with pytest.raises(InterruptedError):
        sl.recommend(planted, pair_records(), items=item_records(), prompts=PROMPTS)
    assert len(made) >= 3 * planted.cfg.n_layers > 6
    assert max(alive) <= 2  # the one before it is let go after it is made


def stop_here(*_: Any, **__: Any) -> Any:
    raise InterruptedError
