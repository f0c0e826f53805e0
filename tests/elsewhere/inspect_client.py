"""Run in an environment with Inspect and steerlens: a task of ours at some coefficients.

    python inspect_client.py FOLDER

FOLDER has a checkpoint, `v.safetensors` and `inspect.json` with texts and coefficients;
`inspected.json` gets what was written at each, of a model that was told the coefficient and of one
that a solver sweeps, the sweep's scores, and what a model without a vector refuses and draws.
"""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from inspect_ai import Task, eval, task
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, get_model
from inspect_ai.scorer import Scorer, includes
from inspect_ai.solver import Solver, generate


@task
def goes_on(texts: list[str], coefficients: list[float]) -> Task:
    """Does the text go on with a letter a? At the model's own coefficient, or at several."""
    how: Solver = generate()
    score: Scorer = includes()
    if coefficients:  # not before: Inspect is to find the model by its entry point
        from steerlens.steering.export import inspect_provider

        how = inspect_provider.sweep_coefficients(coefficients)
        score = inspect_provider.at_each_coefficient(includes())
    dataset = [Sample(input=text, target="a") for text in texts]
    return Task(dataset=dataset, solver=how, scorer=score, config=GenerateConfig(max_tokens=8))


def run(folder: Path, model_args: dict[str, Any], told: dict[str, Any]) -> Any:
    (log,) = eval(
        goes_on(**told),
        model=f"steerlens/{folder / 'model'}",
        model_args={"raw": True, "device": "cpu", **model_args},
        log_dir=str(folder / "logs"),
        display="none",
    )
    if log.status != "success":
        raise SystemExit(f"Inspect: {log.error}")
    return log


async def asked_alone(folder: Path) -> tuple[list[str], list[str]]:
    """What a model without a vector refuses, and two texts that it draws."""
    model = get_model(f"steerlens/{folder / 'model'}", raw=True, device="cpu")

    async def refusal(**options: Any) -> str:
        try:
            await model.generate("the day", config=GenerateConfig(**options))
        except ValueError as error:  # an InputError is one
            return str(error)
        return ""

    refused = [
        await refusal(top_p=0.5),
        await refusal(temperature=0.5, seed=0),
        await refusal(temperature=1),
        await refusal(extra_body={"coefficient": 4}),
        await refusal(extra_body={"coeficient": 4}),
    ]
    drawn = GenerateConfig(temperature=1, seed=3, num_choices=2, max_tokens=8)
    output = await model.generate("the day", config=drawn)
    return refused, [choice.message.text for choice in output.choices]


def main(folder: Path) -> None:
    asked = json.loads((folder / "inspect.json").read_text())
    texts, coefficients = asked["texts"], asked["coefficients"]
    file = {"vector": str(folder / "v.safetensors")}
    written = {}
    for coefficient in coefficients:
        given = {**file, "coefficient": coefficient} if coefficient else {}
        log = run(folder, given, {"texts": texts, "coefficients": []})
        written[str(coefficient)] = [sample.output.completion for sample in log.samples]
    log = run(folder, file, {"texts": texts, "coefficients": coefficients})
    swept = {
        name: [
            sample.store["steerlens.sweep"][name]["choices"][0]["message"]["content"]
            for sample in log.samples
        ]
        for name in written
    }
    scores = {score.name: score.metrics["mean"].value for score in log.results.scores}
    refused, drawn = asyncio.run(asked_alone(folder))
    found = {"written": written, "swept": swept, "scores": scores}
    found |= {"refused": refused, "drawn": drawn}
    (folder / "inspected.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
