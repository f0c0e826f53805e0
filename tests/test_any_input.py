"""Whatever a public function is given, it works or raises a SteerlensError.

Each parameter that takes data, a file or a name is given what nobody thought of, one at a time, the
others as in `base`. Files as such are in test_hostile.py.
"""

import inspect
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import hostile
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_calls import HOOK, NEUTRAL, made
from sound import check_rows

import steerlens as sl
from steerlens import circuits, steering

N_EXAMPLES = 4
# What they do when it is not refused takes a second; most is seen by their relatives.
HEAVY = (
    "behaviour",
    "boundary_shape",
    "compare",
    "compare_circuits",
    "find_boundary",
    "loss_geometry",
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.from_regex(r"[-:,*\[\]0-9.a-z=;% ]{1,12}", fullmatch=True),
    st.sampled_from(
        [
            "\ud800",
            "\0",
            "../..",
            "blocks.*",
            "blocks.99.hook_resid_post",
            HOOK,
            "9" * 5000,
            "x" * 9999,
        ]
        + [
            "0:9999999999",
            "kl=nan",
            "relative=-1",
            "nats=1e999",
            "kl=",
            "0.1;rollout",
            "80%",
            "inf",
        ]
    ),
)
# Where more is only slow.
# More digits than Python writes.
LONG = st.sampled_from([5000]).map(lambda n_digits: 10**n_digits)
FEW = st.integers(-3, 2) | st.just(-(10**30))
WHOLES = st.integers() | st.sampled_from([-1, 2**31, 2**63, 2**64, -(2**63), 10**30]) | LONG
NUMBERS = (
    st.floats()
    | st.integers()
    | st.sampled_from([float("nan"), float("inf"), 1e308, 5e-324, 10**400])
    | LONG
)
LAYERS = st.recursive(
    TEXTS | WHOLES | st.slices(4) | st.builds(slice, WHOLES, WHOLES, WHOLES),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=3,
)
PROMPTS = st.text(max_size=20) | st.sampled_from(["\ud800", "the " * 300, "</s>", "\0"])


def lists(of: st.SearchStrategy[Any]) -> st.SearchStrategy[list[Any]]:
    return st.lists(of, max_size=3)


def kinds() -> dict[str, st.SearchStrategy[Any]]:
    """What a parameter of that name is given."""
    text = "method objective hook_name loss_hook name budget on split where"
    few = (
        "n_bootstrap n_angles n_null max_epochs n_scores ig_steps n_draws n_splits max_new_tokens n"
    )
    whole = "seed position prompt batch_size top n_claimed n_positions n_tokens n_layers patience"
    number = "margin weight search_range step_size threshold exponent limit tolerance value share"
    head = st.builds(circuits.Component, st.integers(-2, 4), head=st.integers(-2, 5))
    return {
        **dict.fromkeys(text.split(), TEXTS),
        **dict.fromkeys(few.split(), FEW),
        **dict.fromkeys(whole.split(), WHOLES),
        **dict.fromkeys(number.split(), NUMBERS),
        "examples_per_step": FEW,
        "layers": LAYERS,
        "layer": LAYERS,
        "coefficient": NUMBERS | TEXTS,
        "coefficients": lists(NUMBERS),
        "methods": lists(TEXTS | st.just("mean_diff")),
        "hook_names": lists(TEXTS),
        "neutral": lists(PROMPTS),
        "prompts": lists(PROMPTS),
        "text prompt": PROMPTS,
        "continuation": PROMPTS,
        "ids": lists(TEXTS),
        "shares": lists(st.floats()).map(tuple),
        "null_shares": lists(st.floats()).map(tuple),
        "levels": lists(TEXTS | st.just("node")).map(tuple),
        "heads": lists(head),
        "path": TEXTS.map(Path) | TEXTS,
        "folder": TEXTS.map(Path) | TEXTS,
    }


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text with a slash may be a dataset of the Hub, which is asked for again and again."""

    def refuse(name: str) -> None:
        raise ConnectionError(f"no network for {name!r}")

    monkeypatch.setattr(datasets, "load_dataset", refuse)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What every parameter is given that is not at issue, by its name."""
    return made_base(tmp_path_factory.mktemp("outputs"))


def made_base(folder: Path) -> dict[str, Any]:
    """As `base`."""
    g = made(folder)
    found = vars(g) | {
        "along": g.vector,
        "evidence": g.differences,
        "intervention": g.steered,
        "interventions": {"steered": g.steered},
        "nulls": {"steered": {"random": [g.steered]}},
        "heads": [circuits.Component(2, head=0)],
        "layer": 1,
        "layers": [1],
        "coefficient": 2.0,
        "coefficients": [0, 1.0],
        "methods": ["mean_diff"],
        "hook_names": [HOOK],
        "hook_name": HOOK,
        "neutral": NEUTRAL,
        "ids": [4, 5],
        "name": "add",
        "directions": g.directions,
        "shares": (0.2,),
        "levels": ("node",),
        "n_layers": 3,
        "seed": 0,
        "batch_size": 4,
    }
    few = (
        "n_null n_claimed n_draws n_splits n_positions n_tokens max_new_tokens examples_per_step n"
    )
    return (
        found | dict.fromkeys(few.split(), 2) | {"n_bootstrap": 20, "n_angles": 4, "max_epochs": 1}
    )


def own(name: str, base: dict[str, Any]) -> dict[str, Any]:
    """What one function calls by a name that means another thing elsewhere."""
    return {
        "token_damage": {"prompts": ["the river was warm", "I felt so"], "ids": None},
        "generation_table": {"prompts": ["the river was warm", "I felt so"], "ids": None},
        "collect_activations": {"prompts": [base["prompt"]]},
        "generate_texts": {"prompts": [base["prompt"]]},
        "behaviour": {"prompts": ["the river was warm", "I felt so"], "positions": "all"}
        | {"scorers": ["length"], "groups": None},
        "readings": {"prompts": ["the river was warm", "I felt so"], "ids": None},
        "generate_tokens": {"prompts": [base["prompt"]]},
        "make_prompts": {"prompts": [base["prompt"]]},
        "tokenize_prompt": {"prompt": "the day", "where": "here"},
        "attention_patterns": {"prompt": 0},
        "token_projections": {"prompt": 0},
        "fit_condition": {"directions": None},
    }.get(name, {})


# Not here: why.
ELSEWHERE = {
    "attribute": "a graph alone",
    "bake": "writes a checkpoint; test_baked.py",
    "check_model": "takes a model alone",
    "contrastive_steering_loss": "tensors; test_loss.py",
    "contrastive_steering_loss_noref": "tensors; test_loss.py",
    "coherence_hinge": "tensors; test_loss.py",
    "cosine_table": "vectors; test_cosines.py",
    "dataset_names": "takes nothing",
    "edge_readers": "takes a model alone",
    "edge_table": "scores; test_graphs.py",
    "from_repeng": "an object of repeng; test_export.py",
    "from_steering_vectors": "an object of steering-vectors; test_export.py",
    "gradient_terms": "gradients alone",
    "item_answers": "items alone",
    "label_logprob": "tensors; test_loss.py",
    "load_model": "test_models.py, test_packaged.py",
    "make_contrast": "pairs and answers; test_graphs.py",
    "make_graph": "a contrast and an intervention; test_graphs.py",
    "neutral_texts": "takes nothing",
    "ordering_penalty": "tensors; test_loss.py",
    "provenance": "takes a model alone",
    "push_checkpoint": "test_hub.py",
    "reliability": "needs more pairs; test_cosines.py",
    "recommend": "needs more pairs; test_recommend.py",
    "report": "runs alone",
    "run_edges": "a graph and tensors; test_graphs.py",
    "run_nodes": "a graph and tensors; test_graphs.py",
    "save_steering_vectors": "test_export.py",
    "show_progress": "takes nothing",
    "steps": "as steer",
    "to_easysteer": "test_harnesses.py",
    "to_gguf": "test_safe_files.py",
    "to_lm_eval": "test_harnesses.py",
    "to_peft": "writes an adapter; test_harnesses.py",
    "to_repeng": "a vector alone",
    "to_steering_vectors": "a vector alone",
    "total_variation_barrier": "tensors; test_loss.py",
    "tokenize_items": "items alone; test_data.py",
    "tokenize_pairs": "pairs alone; test_data.py",
    "decoded": "token ids",
    "Positions": "a type",
}


def functions() -> dict[str, Callable[..., Any]]:
    """Public functions by name."""
    return {
        name: getattr(room, name)
        for room in (sl, circuits, steering, sl.measure, sl.engine, sl.directions, sl.export)
        for name in room.__all__
        if inspect.isroutine(getattr(room, name))
    }


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of its parameters that are given anything."""
    return [name for name in signature(function) if name in kinds()]


def signature(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Its parameters; where it hands settings on to a study, also those of a study."""
    own_ones = dict(inspect.signature(function).parameters)
    if own_ones.pop("settings", None) is not None:
        return dict(inspect.signature(sl.Study).parameters) | own_ones
    return own_ones


def run(function: Callable[..., Any], arguments: dict[str, Any], model: Any) -> None:
    with warnings.catch_warnings():
        # Cells that are left undefined are told so.
        warnings.simplefilter("ignore", RuntimeWarning)
        done = function(**arguments)
        if isinstance(done, AbstractContextManager):
            with done:
                model(torch.tensor([[1, 4, 5]]))


CASES = [
    (name, parameter)
    for name, function in functions().items()
    if name not in ELSEWHERE
    for parameter in parameters(function)
]


def arguments_of(name: str, base: dict[str, Any]) -> dict[str, Any]:
    taken = signature(functions()[name])
    return {key: value for key, value in (base | own(name, base)).items() if key in taken}


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES} - {"from_gguf", "read_run"}))
def test_the_base_is_sound(base: dict[str, Any], name: str) -> None:
    """Else the errors below would not be about the parameter."""
    arguments = arguments_of(name, base)
    if name == "compare":
        arguments |= {"on": "neutral", "budget": "kl=0.1"}
    run(functions()[name], arguments, base["model"])


@pytest.mark.parametrize(("name", "parameter"), CASES)
def test_anything_works_or_is_refused(base: dict[str, Any], name: str, parameter: str) -> None:
    function, known = functions()[name], kinds()
    told: list[str] = []
    values = known[
        "text prompt" if (name, parameter) == ("tokenize_prompt", "prompt") else parameter
    ]
    annotation = str(signature(function)[parameter].annotation)
    if parameter == "coefficient" and "str" not in annotation:
        values = NUMBERS
    if parameter == "on" and "Literal" in annotation:
        values = st.lists(PROMPTS, max_size=2) | st.text(max_size=9).map(Path)
    if (parameter == "prompt" and "int" not in annotation and name != "tokenize_prompt") or (
        parameter == "prompts" and "str" not in annotation
    ):
        pytest.skip("tokens, which tokenize_prompt makes")

    @settings(
        max_examples=2 if name in HEAVY else N_EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(value=values)
    def check(value: Any) -> None:
        arguments = arguments_of(name, base) | {parameter: value}
        try:
            run(function, arguments, base["model"])
        except sl.SteerlensError as error:
            told.append(str(error))

    check()
    assert all(told)


def test_every_public_function_is_here_or_elsewhere() -> None:
    assert {name for name, _ in CASES} | set(ELSEWHERE) >= set(functions())
    assert ("sweep", "layers") in CASES


CONSTRUCTORS: dict[str, tuple[Callable[..., Any], st.SearchStrategy[Any]]] = {
    "ContrastivePairs.from_lists": (
        lambda v: sl.ContrastivePairs.from_lists(v, v[::-1]),
        st.lists(PROMPTS, max_size=3),
    ),
    "ContrastivePairs.load of records": (
        sl.ContrastivePairs.load,
        st.lists(
            st.dictionaries(
                st.sampled_from(["positive", "negative", "id", "continuation", "x"]),
                st.none() | st.integers() | PROMPTS | st.lists(st.dictionaries(PROMPTS, PROMPTS)),
            ),
            max_size=3,
        ),
    ),
    "ContrastivePairs.load": (sl.ContrastivePairs.load, TEXTS),
    "PreferenceItems.load": (sl.PreferenceItems.load, TEXTS),
    "ContrastivePairs.split": (
        lambda v: sl.ContrastivePairs.from_lists(list("abcd"), list("efgh")).split(*v),
        st.tuples(st.floats(), WHOLES),
    ),
    "SteeringVector.from_vectors": (
        lambda v: check_rows(sl.SteeringVector.from_vectors({v[0]: torch.tensor(v[1])})),
        st.tuples(TEXTS, st.lists(st.floats(), max_size=3)),
    ),
    "SteeringVector.interpolate": (
        lambda v: check_rows(hostile.vector().interpolate(-3 * hostile.vector(), v)),
        NUMBERS,
    ),
    "SteeringVector.__mul__": (lambda v: check_rows(hostile.vector() * v), NUMBERS),
    "SteeringVector.at": (lambda v: hostile.vector().at(v), TEXTS | WHOLES),
    "Clamp": (sl.Clamp, NUMBERS),
    "parse_coefficient": (steering.parse_coefficient, NUMBERS | TEXTS),
    "operator_of": (lambda v: steering.operator_of(v[0], value=v[1]), st.tuples(TEXTS, NUMBERS)),
    "readout_hook": (lambda v: sl.models.readout_hook(*v), st.tuples(TEXTS, WHOLES)),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_any_value_is_taken_or_refused(name: str) -> None:
    make, values = CONSTRUCTORS[name]
    told: list[str] = []

    @settings(
        max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(value=values)
    def check(value: Any) -> None:
        try:
            make(value)
        except sl.SteerlensError as error:
            told.append(str(error))

    check()
    assert all(told)


def test_what_an_annotation_excludes_is_refused_without_its_being_checked_by_the_tests() -> None:
    """The tests check types while they run, and users do not: in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("wrong_values.py"))],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    happened: dict[str, str] = json.loads(done.stdout)
    wrong = {call: end for call, end in happened.items() if not end.startswith("SteerlensError: ")}
    assert wrong == {}
    for call in ("sweep(model=None)", "sweep(directions=None)", "sweep(batch_size=1.5)"):
        assert call in happened


def test_another_error_would_be_seen(base: SimpleNamespace) -> None:
    with pytest.raises(TypeError):
        run(sl.models.readout_hook, {"hook_name": HOOK}, None)
