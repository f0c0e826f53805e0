"""A call of every public function that takes a model, and what the calls are given."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from conftest import bridge, build_llama

import steerlens as sl
from steerlens import circuits, steering
from steerlens.models import verification as fidelity

HOOK = "blocks.1.hook_resid_post"
SMALL = {"n_bootstrap": 20, "batch_size": 4}
NEUTRAL = ["the river was warm and", "you said the night is", "the soup and the bread", "I felt so"]


def made(folder: Path) -> SimpleNamespace:
    """A model of its own, for some tests break it, and what the calls are given."""
    import scipy.stats  # noqa: F401 (what packages do when they are first imported is theirs)
    import sklearn.covariance
    import sklearn.linear_model  # noqa: F401

    model = bridge(build_llama(n_layers=3))
    openings = ["the river was", "I said", "the soup is so", "you felt the sun", "what a night it"]
    pairs = sl.ContrastivePairs.from_lists(
        [f"you are cheerful {text}" for text in openings],
        [f"you are very gloomy {text}" for text in openings],
    )
    nouns = ("river", "walk", "day", "night")
    items = sl.PreferenceItems(
        tuple(sl.PreferenceItem(f"the {n} was", " warm and good", " so cold", n) for n in nouns)
    )
    differences = sl.collect_differences(model, pairs)
    directions = sl.fit_directions(differences)
    vector = sl.SteeringVector.from_directions(model, directions, layers=[1])
    vector.save(folder / "vector.safetensors")
    prompts = circuits.make_prompts(
        model,
        [
            sl.engine.tokenize_prompt(model, text)
            for text in ("the river was so", "I said", "you felt", "it was a night")
        ],
    )
    # What is found out once a model is not part of a call's forward passes.
    sl.sweep(model, pairs, directions, coefficients=[1], **SMALL)
    texts = [sl.engine.tokenize_prompt(model, text) for text in NEUTRAL[:2]]
    steering.generate_texts(model, texts, vector, [1.0], max_new_tokens=2)
    return SimpleNamespace(
        model=model,
        pairs=pairs,
        items=items,
        differences=differences,
        directions=directions,
        vector=vector,
        folder=folder,
        prompt=sl.engine.tokenize_prompt(model, "the river was so"),
        prompts=prompts,
        answers=circuits.Answers(torch.tensor([[4]]), torch.tensor([[5]])),
        steered=circuits.Intervention(vector, 2.0),
        condition=sl.Condition(HOOK, directions[HOOK], 0.0),
    )


def new_folder(g: SimpleNamespace) -> Path:
    return g.folder / f"baked{len(list(g.folder.iterdir()))}"


def check_again(model: Any) -> None:
    fidelity._checked.discard(model)
    try:
        sl.check_model(model)
    finally:  # or the next call would do it
        fidelity._checked.add(model)


def under(context: Any, model: Any) -> None:
    with context:
        model(torch.tensor([[1, 4, 5]]))


# Name -> a call of it. Every public function and method with a parameter `model` has one.
CALLS: dict[str, Callable[[SimpleNamespace], Any]] = {
    "behaviour": lambda g: sl.behaviour(
        *(g.model, g.vector, NEUTRAL[:2]),
        coefficients=[2.0],
        samples=2,
        max_new_tokens=3,
        pairs=g.pairs,
        n_bootstrap=20,
    ),
    "bake": lambda g: sl.export.bake(g.model, g.vector, 2.0, new_folder(g)),
    "check_model": lambda g: check_again(g.model),
    "collect_activations": lambda g: sl.engine.collect_activations(g.model, [g.prompt], [HOOK]),
    "collect_differences": lambda g: sl.collect_differences(g.model, g.pairs, batch_size=2),
    "compare": lambda g: sl.compare(
        *(g.model, g.pairs, g.items),
        methods=["mean_diff", "gradient_mean"],
        layers=[1],
        neutral=NEUTRAL,
        n_null=2,
        **SMALL,
    ),
    "condition_accuracy": lambda g: sl.steering.condition_accuracy(g.model, g.pairs, g.condition),
    "find_boundary": lambda g: sl.find_boundary(
        g.model, g.pairs, g.directions, layers=[1], **SMALL
    ),
    "fit": lambda g: sl.fit(g.model, g.pairs, method="fisher_pullback", layers=[1]),
    "fit_condition": lambda g: sl.steering.fit_condition(g.model, g.pairs, layers=[1]),
    "generate": lambda g: sl.generate(g.model, g.prompt, g.vector, 2.0, max_new_tokens=3),
    "generation_table": lambda g: sl.measure.generation_table(
        g.model, ["the river", "I said so"], g.vector, coefficients=[0, 2.0], max_new_tokens=3
    ),
    "recommend": lambda g: sl.recommend(
        g.model,
        sl.ContrastivePairs.load(
            [
                (f"{p.positive} {w}", f"{p.negative} {w}")
                for p in g.pairs
                for w in ("a", "so", "it", "I")
            ]
        ),
        prompts=NEUTRAL[:4],
        layers=[1],
    ),
    "loss_geometry": lambda g: sl.loss_geometry(
        g.model, g.pairs, g.directions, layers=[1], n_angles=4, **SMALL
    ),
    "loss_gradients": lambda g: sl.loss_gradients(g.model, g.pairs, layers=[1], n_scores=2),
    "resolve_hooks": lambda g: sl.resolve_hooks(g.model, "all"),
    "steer": lambda g: under(sl.steer(g.model, g.vector, 2.0), g.model),
    "sweep": lambda g: sl.sweep(
        g.model, g.pairs, g.directions, coefficients=[-1, 0, 1], layers=[0, 1], **SMALL
    ),
    "token_damage": lambda g: sl.token_damage(g.model, NEUTRAL, g.vector, coefficients=[0, 2.0]),
    "tokenize_items": lambda g: sl.engine.tokenize_items(g.model, g.items),
    "tokenize_pairs": lambda g: sl.engine.tokenize_pairs(g.model, g.pairs),
    "tokenize_prompt": lambda g: sl.engine.tokenize_prompt(
        g.model, (sl.Message("user", "the day"),)
    ),
    "train_directions": lambda g: sl.directions.train_directions(
        g.model, g.pairs, layers=[1], max_epochs=2, examples_per_step=2
    ),
    "SteeringVector.from_tensor": lambda g: sl.SteeringVector.from_tensor(
        torch.ones(g.model.cfg.d_model), layer=1, model=g.model
    ),
    "SteeringVector.from_directions": lambda g: sl.SteeringVector.from_directions(
        g.model, g.directions, layers=[1]
    ),
    "SteeringVector.load": lambda g: sl.SteeringVector.load(
        g.folder / "vector.safetensors", model=g.model
    ),
    "SteeringVector.check_model": lambda g: g.vector.check_model(g.model),
    "Intervention.on": lambda g: under(g.steered.on(g.model), g.model),
    "Answers.check": lambda g: g.answers.check(g.model, 2),
    "Answers.words": lambda g: g.answers.words(g.model),
    "Origin.of": lambda g: steering.Origin.of(g.model, g.directions),
    "Origin.of_model": lambda g: steering.Origin.of_model(g.model),
    "attention_patterns": lambda g: circuits.attention_patterns(
        g.model, g.prompts, g.steered, [circuits.Component(2, head=0)]
    ),
    "compare_circuits": lambda g: circuits.compare_circuits(
        *(g.model, g.pairs, g.answers, {"steered": g.steered}), shares=(0.2, 0.5), n_splits=2
    ),
    "check_steered": lambda g: circuits.check_steered(g.model, HOOK, 2.0),
    "contrast_answers": lambda g: circuits.contrast_answers(g.model, g.pairs, n_tokens=2),
    "edge_readers": lambda g: circuits.edge_readers(g.model),
    "edge_table": lambda g: circuits.edge_table(g.model, {}),
    "find_readers": lambda g: circuits.find_readers(
        *(g.model, g.prompts, g.answers, g.vector, 2.0),
        top=3,
        n_claimed=2,
        n_draws=2,
        n_bootstrap=20,
    ),
    "find_writers": lambda g: circuits.find_writers(
        g.model, g.pairs, g.directions, layer=1, n_positions=2, n_bootstrap=20
    ),
    "item_answers": lambda g: circuits.item_answers(g.model, g.items),
    "make_contrast": lambda g: circuits.make_contrast(g.model, g.pairs, g.answers),
    "make_prompts": lambda g: circuits.make_prompts(g.model, [g.prompt]),
    "null_interventions": lambda g: circuits.null_interventions(
        g.model, g.pairs, g.steered, g.differences, n=2
    ),
    "token_projections": lambda g: circuits.token_projections(
        g.model, g.prompts, g.directions, g.steered
    ),
    "decoded": lambda g: steering.decoded(g.model, [4, 5, 6]),
    "generate_texts": lambda g: steering.generate_texts(
        g.model, [g.prompt], g.vector, [0, 2.0], max_new_tokens=3, samples=2, seed=0
    ),
    "readings": lambda g: sl.measure.readings(g.model, g.vector, NEUTRAL),
    "to_peft": lambda g: sl.export.to_peft(g.model, g.vector, 2.0, new_folder(g)),
    "vocabulary": lambda g: sl.vocabulary(g.model, g.vector, n_tokens=2, n_random=2),
    "generate_tokens": lambda g: steering.generate_tokens(
        g.model, [g.prompt], g.vector, 2.0, max_new_tokens=3
    ),
}
# Public, with a model, and not in the table; why.
EXCEPTIONS: dict[str, str] = {
    "Engine.on": "names another model, runs none",
    "SteeringVector.from_hub": "asks a network, then `SteeringVector.load`",
}
# They run no forward pass, so they fail on what they are given.
BAD: dict[str, Callable[[SimpleNamespace], Any]] = {
    "resolve_hooks": lambda g: sl.resolve_hooks(g.model, "no such hook"),
    "tokenize_prompt": lambda g: sl.engine.tokenize_prompt(g.model, ""),
    "tokenize_items": lambda g: sl.engine.tokenize_items(
        g.model, sl.PreferenceItems((sl.PreferenceItem("the " * 99, "good", "bad", "a"),) * 1)
    ),
    "tokenize_pairs": lambda g: sl.engine.tokenize_pairs(
        g.model, sl.ContrastivePairs.from_lists(["a"] * 2, [("the " * 99)] * 2)
    ),
    "SteeringVector.load": lambda g: sl.SteeringVector.load(g.folder / "none", model=g.model),
    "SteeringVector.check_model": lambda g: sl.SteeringVector.from_vectors(
        {HOOK: torch.ones(7)}
    ).check_model(g.model),
    "item_answers": lambda g: circuits.item_answers(
        g.model,
        sl.PreferenceItems(
            tuple(sl.PreferenceItem("the", " good day", " good night", i) for i in "ab")
        ),
    ),
    "Answers.check": lambda g: circuits.Answers(torch.tensor([[9999]]), torch.tensor([[5]])).check(
        g.model, 2
    ),
    "bake": lambda g: sl.export.bake(g.model, g.vector, 0, g.folder / "never"),
    "SteeringVector.from_tensor": lambda g: sl.SteeringVector.from_tensor(
        torch.ones(7), layer=1, model=g.model
    ),
    "check_steered": lambda g: circuits.check_steered(g.model, HOOK, 0),
    "make_contrast": lambda g: circuits.make_contrast(
        g.model, g.pairs, circuits.Answers(torch.tensor([[9999]]), torch.tensor([[5]]))
    ),
    "make_prompts": lambda g: circuits.make_prompts(g.model, []),
}
# Nothing that they are given can fail in them.
CANNOT_FAIL = (
    "decoded",
    "edge_readers",
    "edge_table",
    "SteeringVector.from_directions",
    "Answers.words",
    "Origin.of",
    "Origin.of_model",
)
