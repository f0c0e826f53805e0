"""What long functions tell of their progress: every stage from 0 to its total, one at a time."""

from collections.abc import Callable
from typing import Any

import pytest
from conftest import sampled

import steerlens as sl
from steerlens.circuits import (
    Intervention,
    compare_circuits,
    contrast_answers,
    find_readers,
    find_writers,
    make_prompts,
    null_interventions,
)
from steerlens.data.items import PreferenceItem, PreferenceItems
from steerlens.engine.tokenization import tokenize_pairs

Calls = list[tuple[str, int, int]]


def stages(calls: Calls) -> list[tuple[str, int]]:
    """Names and totals of the stages, each seen to rise from 0 to its total and to end there."""
    seen: list[tuple[str, int]] = []
    done = total = 0
    for stage, now, of_stage in calls:
        if done == total:  # the one before is over, or there was none
            seen.append((stage, of_stage))
            assert now == 0, stage
        else:
            assert (stage, of_stage) == seen[-1]
            assert now >= done, stage
        done, total = now, of_stage
    assert done == total, seen[-1:]
    return seen


def run(function: Callable[..., Any], *args: Any, **options: Any) -> list[tuple[str, int]]:
    """Run a function with a `Progress`, and see that what it tells are whole stages."""
    calls: Calls = []
    function(*args, **options, progress=lambda *call: calls.append(call))
    return stages(calls)


@pytest.mark.parametrize(
    "calls",
    [
        [("cells", 1, 2), ("cells", 2, 2)],
        [("cells", 0, 2), ("cells", 1, 2)],
        [("cells", 0, 2), ("slopes", 0, 2)],
        [("cells", 0, 2), ("cells", 1, 3), ("cells", 3, 3)],
        [("cells", 0, 3), ("cells", 2, 3), ("cells", 1, 3), ("cells", 3, 3)],
    ],
)
def test_the_check_of_stages_can_fail(calls: Calls) -> None:
    with pytest.raises(AssertionError):
        stages(calls)
    assert stages([("cells", 0, 2), ("cells", 1, 2), ("cells", 2, 2)]) == [("cells", 2)]


def test_collecting(llama: Any, pairs: sl.ContrastivePairs) -> None:
    assert run(sl.collect_differences, llama, pairs) == [("activations: prompts", 16)]
    some = tokenize_pairs(llama, pairs).positive
    found = run(
        sl.engine.collect_activations, llama, some, ["blocks.1.hook_resid_post"], batch_size=3
    )
    assert found == [("activations: prompts", 8)]
    assert run(sl.loss_gradients, llama, pairs, batch_size=3) == [("gradients: pairs", 8)]
    assert run(sl.fit, llama, pairs, method="gradient_mean") == [("gradients: pairs", 8)]
    fitted = sl.fit_directions(sl.collect_differences(llama, pairs, layers=[1]))
    assert run(lambda **options: sl.Study(llama, pairs, fitted, **options).layers) == [
        ("unsteered model: prompts", 16)
    ]


def test_a_batch_is_told_of_once_it_is_run(llama: Any, pairs: sl.ContrastivePairs) -> None:
    calls: Calls = []
    sl.collect_differences(llama, pairs, batch_size=1, progress=lambda *call: calls.append(call))
    assert sorted({done for _, done, _ in calls}) == list(range(17))


def test_training_counts_epochs_of_all_hooks(llama: Any, many: sl.ContrastivePairs) -> None:
    options: dict[str, Any] = {"layers": [1, 2], "max_epochs": 2, "step_size": 0.02}
    assert run(sl.directions.train_directions, llama, many, **options) == [
        *(("activations: prompts", 40), ("training: epochs", 4))
    ]


@pytest.mark.parametrize("on", ["positive", "negative"])
def test_a_boundary(
    llama: Any, many: sl.ContrastivePairs, directions: sl.Directions, on: Any
) -> None:
    def boundary(with_projection: bool, **options: Any) -> Any:
        study = sl.Study(llama, many, directions, layers=[1, 3], n_bootstrap=20, **options)
        return study.boundary(on=on, with_projection=with_projection)

    unsteered = [("unsteered model: prompts", 40), ("checks: hooks", 2)]
    unsteered += [("unsteered model: prompts", 20)] if on == "negative" else []
    searched = [("slopes: prompts", 20), ("boundary: pushes settled", 4), ("intervals: pushes", 4)]
    assert run(boundary, False) == [*unsteered, *searched]
    [*before, (projections, n_hooks)] = run(boundary, True)
    assert before == [*unsteered, *searched]
    assert projections == "projections there: hooks"
    assert n_hooks in (1, 2)  # those with a finite boundary


def test_rollouts_and_predictions(
    llama: Any, pairs: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    options: dict[str, Any] = {"layers": [3], "budget": "rollout_kl_p95=0.5", "n_bootstrap": 2}
    found = run(sl.find_boundary, llama, pairs[:3], directions, **options)
    assert ("boundary: pushes settled", 2) in found
    assert run(
        lambda **given: sl.Study(llama, pairs, directions, **given).predicted_boundary()
    ) == [*(("unsteered model: prompts", 16), ("slopes: prompts", 8))]


def test_a_shape(llama: Any, many: sl.ContrastivePairs, directions: sl.Directions) -> None:
    def shape(**options: Any) -> Any:
        study = sl.Study(llama, many, directions, layers=1, n_bootstrap=2, **options)
        return study.boundary_shape(1, n_angles=4)

    found = run(shape)
    assert found[:4] == [
        ("unsteered model: prompts", 40),
        ("checks: hooks", 1),
        ("slopes: prompts", 20),
        ("boundary: pushes settled", 4),
    ]
    assert found[-1] == ("intervals: pushes", 4)


def test_the_geometry_of_several_layers(
    llama: Any, many: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    options: dict[str, Any] = {"layers": [1, 3], "n_angles": 3, "n_bootstrap": 2}
    found = run(sl.loss_geometry, llama, many, directions, **options)
    assert found[:2] == [("unsteered model: prompts", 40), ("checks: hooks", 2)]
    assert found[2] == ("layer 1 of 2, slopes: prompts", 20)
    assert ("layer 2 of 2, boundary: pushes settled", 3) in found
    assert found[-2:] == [("loss in the plane: pushes", 2 * 3 * 6), ("slopes: prompts", 20)]


def test_what_is_shown_of_prompts(
    llama: Any, pairs: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    options: dict[str, Any] = {"layer": 1, "coefficients": [-2, 0, 2]}
    texts = ["the river was", "I said"]
    found = run(sl.measure.generation_table, llama, texts, directions, max_new_tokens=3, **options)
    assert found == [("continuations: tokens", 18)]
    assert run(sl.token_damage, llama, texts, directions, **options) == [("tokens: prompts", 2)]
    assert run(sl.token_damage, llama, pairs, directions, **options) == [("tokens: prompts", 16)]


def items(start: str, n: int) -> PreferenceItems:
    words = "walk sun rain soup bread night".split()[:n]
    made = [PreferenceItem(f"{start} {word}", " warm and good", " so cold", word) for word in words]
    return PreferenceItems(tuple(made), start)


def test_a_comparison_has_numbered_steps(llama: Any, many: sl.ContrastivePairs) -> None:
    found = run(
        sl.compare,
        llama,
        many,
        items("the river was", 5),
        methods=["mean_diff", "gradient_mean"],
        layers=[1],
        train_items=items("you said", 4),
        off_target={"other": items("I felt", 3)},
        neutral=[sampled(llama, "the river", 9, seed=100 + i) for i in range(8)],
        n_null=2,
        n_bootstrap=10,
    )
    # Two methods and four nulls at one hook; a method is measured at four doses, its damage
    # on two texts at both signs; the budget is spent on two of four own texts.
    assert found == [
        ("step 1 of 8, activations: prompts", 40),
        ("step 1 of 8, gradients: pairs", 20),
        ("step 2 of 8, unsteered model: prompts", 2),
        ("step 2 of 8, checks: hooks", 1),
        ("step 2 of 8, slopes: prompts", 2),
        ("step 2 of 8, boundary: pushes settled", 6),
        ("step 2 of 8, intervals: pushes", 6),
        ("step 3 of 8, slopes: prompts", 2),
        ("step 3 of 8, slopes: prompts", 10),
        ("step 4 of 8, effects: cells", 2 * 4 + 4),
        ("step 5 of 8, damage: cells", 2 * 2 * 2),
        ("step 6 of 8, effects on you said: cells", 2),
        ("step 7 of 8, effects on I felt: cells", 2),
        ("step 8 of 8, texts: tokens", 4 * 2 * 40),
    ]


def test_a_comparison_with_personas_has_one_step_more(
    llama: Any, many: sl.ContrastivePairs
) -> None:
    def chat(system: str, text: str) -> list[dict[str, str]]:
        return [{"role": "system", "content": system}, {"role": "user", "content": text}]

    pairs = sl.ContrastivePairs.from_lists(
        [chat("you are kind", str(pair.positive)) for pair in many],
        [chat("you are rude", str(pair.negative)) for pair in many],
    )
    asked = [
        PreferenceItem((sl.Message("user", f"the {word}"),), "good", "bad", word)
        for word in ("sun", "rain", "soup")
    ]
    found = run(
        *(sl.compare, llama, pairs, PreferenceItems(tuple(asked), "asked")),
        methods=["mean_diff"],
        layers=[1],
        neutral=[sampled(llama, "the river", 9, seed=100 + i) for i in range(8)],
        n_null=2,
        n_bootstrap=10,
    )
    assert found[0][0].startswith("step 1 of 7, ")
    # Both continuations of three items, with the persona and without.
    assert found[-1] == ("step 7 of 7, persona in the prompt: prompts", 12)


def test_circuits(llama: Any, pairs: sl.ContrastivePairs) -> None:
    directions = sl.fit_directions(sl.collect_differences(llama, pairs, layers=[1]))
    vector = sl.SteeringVector.from_directions(llama, directions)
    answers = contrast_answers(llama, pairs, n_tokens=3)
    assert run(find_writers, llama, pairs, directions, layer=1) == [("writers: prompts", 16)]
    prompts = make_prompts(llama, list(tokenize_pairs(llama, pairs).positive))
    found = run(find_readers, llama, prompts, answers, vector, 3.0, top=3, n_claimed=2, n_draws=2)
    assert found == [
        ("estimates: prompts", 8),
        ("exact patching: passes", 3),
        ("claims: runs", 3 + 2),
    ]
    alone = run(find_readers, llama, prompts, answers, vector, 3.0, top=0, n_claimed=0)
    assert alone == [("estimates: prompts", 8)]
    pushed = Intervention(vector, 3.0)
    differences = sl.collect_differences(llama, pairs, layers=[1])
    found = run(null_interventions, llama, pairs, pushed, differences, n=2)
    assert all(stage.startswith("nulls, ") for stage, _ in found)
    assert found[-1] == ("nulls, intervals: pushes", 4)
    found = run(
        *(compare_circuits, llama, pairs, answers, {"mean_diff": pushed}),
        nulls={"mean_diff": {"random": [pushed]}},
        shares=(0.1, 0.5),
        n_splits=2,
    )
    # Two levels and models: whole, empty, and of two models circuits of two kinds and sizes; and
    # whole, empty and a circuit of each kind under the null, of nodes alone.
    n_runs = 2 * 2 * (2 + 2 * 2 * 2) + 2 + 2
    assert found == [("circuits: models", 3), ("circuits on their own: runs", n_runs)]
