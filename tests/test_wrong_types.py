"""What an argument of another type raises: an error of steerlens, which says what was expected.

The tests check types while they run, so the calls are made in a process without that.
"""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from beartype import beartype
from jaxtyping import Float, TypeCheckError
from torch import Tensor

import steerlens as sl
from steerlens.loss.labels import mean_by_prompt

HERE = Path(__file__).parent

CALLS = {
    "figures": {
        "plots.tradeoff(None)": "InputError: expected the table of a sweep, a DataFrame",
        "plots.heat_maps({})": "InputError: .* such as result.table, got dict",
        "plots.tradeoff(result)": "no error",
        "plots.tradeoff(table, result)": "no error",
        "plots.tradeoff(table, 3)": "InputError: expected the per-layer table, a DataFrame",
        "plots.layer_profile(run)": "InputError: .* got Run",
        "plots.boundary(None)": "InputError: .* got NoneType",
        "plots.comparison([])": "InputError: .* got list",
        "plots.differences('points')": "InputError: .* got str",
        "plots.components(table, None)": "InputError: ",
        "plots.circuit_graph(None)": "InputError: expected the table of edges",
        "plots.loss_geometry(table)": "InputError: expected the LossGeometry .* got DataFrame",
        "plots.token_page(None)": "InputError: expected the table of token_damage",
        "plots.tradeoff(table)": "no error",
    },
    "pages": {
        "plots.projection_page(['a'], ['layer 0'], {})": "InputError: expected one or more",
        "plots.projection_page(['a'], ['layer 0'], [[1.0]])": "InputError: expected one or more",
        "plots.projection_page(['a'], ['layer 0'], {'x': [[1.0, 2.0]]})": "InputError: .*shape",
        "plots.projection_page(['a'], ['layer 0'], {'x': [['b']]})": "InputError: .*in numbers",
        "plots.projection_page(['a'], ['layer 0'], {'x': [[1.0]]})": "no error",
        "plots.attention_page(['a'], ['L0H0'], {})": "InputError: expected one or more patterns",
        "plots.attention_page(['a'], ['L0H0'], {'x': [[1.0]]})": "InputError: .*shape",
        "plots.attention_page(['a'], ['L0H0'], {'x': [[[1.0]]]})": "no error",
    },
    "reports": {
        "sl.report(run)": "FileError: expected a list of runs, as .*, got Run",
        "sl.report('runs/demo')": "FileError: expected a list of runs, as .*, got str",
        "sl.report(['runs/demo'])": "FileError: expected a list of runs",
        "sl.report(pathlib.Path('runs/demo'))": "FileError: expected a list of runs",
        "sl.report(None)": "FileError: expected a list of runs, as .*, got NoneType",
        "sl.read_run(None)": "FileError: expected the folder of a run, got None",
    },
    "numbers": {
        **{
            f"sl.loss.coherence_penalty(logp, logp, margin={value})": (
                f"InputError: coherence_penalty: margin: expected a finite number, got {value}"
            )
            for value in ("'x'", "'1'", "None", "{}", "nan", "True", "1j")
        },
        "sl.loss.coherence_penalty(logp, logp, weight=-1)": (
            "InputError: coherence_penalty: weight: expected a finite number of 0 or more, got -1"
        ),
        "sl.loss.coherence_penalty(logp, logp[:1])": "InputError: .*baseline: expected Float",
        "sl.loss.coherence_penalty(logp[:0], logp[:0])": "InputError: .*logp: expected numbers",
        "sl.loss.coherence_penalty(logp.long(), logp)": "InputError: .*got torch.int64 of",
        "sl.loss.coherence_penalty(logp.numpy(), logp)": "InputError: .*: logp: .*torch.from_numpy",
        "sl.loss.coherence_penalty(logp, logp)": "no error",
        "sl.directions.Schedule(patience=1.5)": "InputError: Schedule: patience: expected a whole",
        "sl.directions.Schedule(patience=0)": "InputError: .*patience: .*1 or more, got 0",
        "sl.directions.Schedule(patience=True)": "InputError: Schedule: patience: expected a whole",
        "sl.directions.Schedule(patience=1)": "no error",
        **{
            f"sl.steering.parse_coefficient({value})": f"InputError: .*: coefficient: .*got {value}"
            for value in ("None", "1j", "nan", "{}", "True")
        },
        "sl.steering.parse_coefficient('x')": "InputError: cannot read the coefficient",
        "sl.steering.parse_coefficient('80%')": "no error",
        "sl.Condition('blocks.0.hook_resid_post', torch.eye(3)[0].numpy(), 0.0)": (
            "InputError: Condition: direction: .*torch.from_numpy"
        ),
        "sl.Condition('blocks.0.hook_resid_post', torch.eye(3)[0], 0.0)": "no error",
        "sl.sweep(None, None, None, coefficients='x')": "InputError: sweep: model: expected",
        "sl.collect_differences(torch.nn.Linear(2, 2), None)": (
            "InputError: .*: expected a model of TransformerLens, as load_model gives, got Linear"
        ),
    },
    "models": {
        "sl.load_model(None)": "ModelError: expected a model's name or path, got None",
        "sl.load_model(5)": "ModelError: expected a model's name or path, got 5",
        "sl.load_model(pathlib.Path('/none/at/all'))": "ModelError: no model at '/none/at/all'",
        "sl.load_model('/none/at/all', device_map=5)": "ModelError: expected a device_map",
        "sl.load_model('/none/at/all', device_map=['cpu'])": "ModelError: expected a device_map",
        "sl.load_model('/none/at/all', device_map={})": "ModelError: expected a device_map",
        "sl.load_model('/none/at/all', device_map={'': 'cpu'})": "ModelError: no model at",
        **{
            f"sl.check_model({value})": "ModelError: expected a model of TransformerLens"
            for value in ("None", "'gpt2'", "{}", "torch.nn.Linear(2, 2)")
        },
    },
}

PROGRAM = """
import json, pathlib, sys
import torch
import steerlens as sl
from run_folders import layers_table, sweep_table, write_sweep
from steerlens import plots

nan, logp = float("nan"), torch.tensor([-1.0, -2.0])
table = sweep_table(2)
result = sl.measure.SweepResult(table, layers_table(2), table, None, None)
run = sl.read_run(write_sweep(pathlib.Path(sys.argv[1])))
raised = {}
for call in json.load(sys.stdin):
    try:
        eval(call)
        raised[call] = "no error"
    except Exception as error:
        raised[call] = f"{type(error).__name__}: {error}"
print(json.dumps(raised))
"""


@pytest.fixture(scope="module")
def raised(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> dict[str, str]:
    """What each call raises."""
    calls = [call for of_area in CALLS.values() for call in of_area]
    folder = tmp_path_factory.mktemp("types") / "run"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{request.config.rootpath}:{HERE}"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("area", CALLS)
def test_another_type_is_refused_in_words(area: str, raised: dict[str, str]) -> None:
    for call, expected in CALLS[area].items():
        assert re.match(expected, raised[call], re.DOTALL), (call, raised[call])


# Sizes are compared between arguments; the tests' checks of `validation` itself part them.
@pytest.mark.parametrize("call", [call for call in CALLS["numbers"] if "logp[:1]" not in call])
def test_what_checks_types_in_the_tests_does_not_hide_it(call: str) -> None:
    """The same calls in this process: what was asked for comes first."""
    names = {"sl": sl, "torch": torch, "nan": math.nan, "logp": torch.tensor([-1.0, -2.0])}
    is_right = CALLS["numbers"][call] == "no error"
    with nullcontext() if is_right else pytest.raises(sl.SteerlensError, match=r"expected|cannot"):
        eval(call, names)
    with pytest.raises(TypeCheckError):
        mean_by_prompt("x", "y")  # it is on, inside the package


def test_shapes_are_checked_of_a_function_however_often_it_is_made() -> None:
    """As inside the package, where hooks are: see `jaxtyped_once` in the other conftest.py."""

    def made(is_right: bool) -> Callable[..., Any]:
        @jaxtyping.jaxtyped(typechecker=beartype)
        def turned(x: Float[Tensor, "a b"]) -> Float[Tensor, "b a"]:
            return x.T if is_right else x

        return turned

    assert [made(True)(torch.ones(2, 3)).shape for _ in range(2)] == [(3, 2)] * 2
    with pytest.raises(TypeCheckError):
        made(True)(torch.ones(3))
    with pytest.raises(TypeCheckError):
        made(False)(torch.ones(2, 3))
