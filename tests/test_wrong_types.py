"""What an argument of another type raises: an error of steerlens, which says what was expected.

The tests check types while they run, so the calls are made in a process without that.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

CALLS = {
    "figures": {
        "plots.tradeoff(None)": "InputError: expected the table of a sweep, a DataFrame",
        "plots.heat_maps({})": "InputError: .* such as result.table, got dict",
        "plots.tradeoff(result)": "InputError: .* got SweepResult",
        "plots.tradeoff(table, result)": "InputError: expected the per-layer table, a DataFrame",
        "plots.layer_profile(result)": "InputError: .* got SweepResult",
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
            f"check_plane(['blocks.1.hook_resid_post'], {value})": f"InputError: n_angles .*{value}"
            for value in ("'4'", "4.5", "None")
        },
        **{
            f"finite('margin', {value})": f"InputError: expected a finite margin, got {value}"
            for value in ("'x'", "'1'", "None", "{}")
        },
        "finite('margin', 1)": "no error",
        "check_search(budget='kl=0.1', search_range='x')": "InputError: .*search_range, got 'x'",
        "check_search(budget='kl=0.1', search_range=4)": "no error",
        "strengths_at(at, 5)": "InputError: expected a list of coefficients, got 5",
        "strengths_at(at, None)": "InputError: expected a list of coefficients, got None",
        "sl.measure.generation_table(None, ['a'], None, coefficients=[1], max_new_tokens='x')": (
            "InputError: max_new_tokens must be a whole number, got 'x'"
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
from steerlens.measure.boundary import check_search
from steerlens.measure.tokens import strengths_at
from steerlens.errors import finite
from steerlens.measure.plane import check_plane

table, at = sweep_table(2), None
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
