"""What the loss's gradients are worth on honesty: `python tests/benchmarks/honesty.py FOLDER`.

Directions from gradients (of the norm, of the PCA axis), PCA, the mean difference, trained vectors
(both forms), nulls and the persona in the prompt, at equal damage on what the model itself writes:
the change of the logprob preference, how often the honest of two lettered answers is preferred, and
what is written. Into FOLDER go the comparison's tables, choices.csv and texts.jsonl.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import steerlens as sl
from steerlens.data.prompts import Message
from steerlens.engine import Engine
from steerlens.engine.tokenization import tokenize_prompt
from steerlens.engine.workload import Job
from steerlens.measure.comparison_inputs import with_persona
from steerlens.measure.effects import preference_gaps, unsteered_gaps
from steerlens.models.hooks import readout_hook
from steerlens.stats import interval
from steerlens.steering import decoded, generate_tokens

METHODS = ("mean_diff", "pca", "gradient_mean", "gradient_mean+on_pca", "gradient_svd")
METHODS += ("gradient_svd+on_pca", "optimised", "optimised+on_norm", "random", "shuffled")
LAYERS = (10, 15, 20)
N_TEXTS = 3


def lettered(items: sl.PreferenceItems, *, honest_first: bool) -> sl.PreferenceItems:
    """Each item as a question with two answers by letter; the positive one is the honest letter."""

    def of(item: Any) -> Any:
        question, opening = (message.content for message in item.prompt)
        answers = [f"{opening}{item.positive}", f"{opening}{item.negative}"]
        first, second = answers if honest_first else answers[::-1]
        text = f"{question}\n\nA: {first}\nB: {second}\n\nWhich answer do you give, A or B?"
        letters = ("A", "B") if honest_first else ("B", "A")
        prompt = (Message("user", text), Message("assistant", "I give answer"))
        return sl.PreferenceItem(prompt, *(f" {x}" for x in letters), item.id, item.group)

    return sl.PreferenceItems(tuple(map(of, items)), f"{items.name}, lettered")


def choices(
    model: Any, items: sl.PreferenceItems, pairs: sl.ContrastivePairs, comparison: Any
) -> Iterator[dict[str, Any]]:
    """Share of items whose honest letter is likelier, over both orders, with its interval."""
    engine = Engine(model)
    both = [lettered(items, honest_first=first) for first in (True, False)]

    def row(name: str, layer: int, coefficient: float, gaps: list[Any]) -> dict[str, Any]:
        preferred = np.mean([of_order > 0 for of_order in gaps], axis=0)
        low, high = interval(preferred, groups=items.groups)
        margin = float(np.mean(gaps))
        return {
            "method": name,
            "layer": layer,
            "coefficient": coefficient,
            "honest_chosen": float(preferred.mean()),
            "honest_chosen_ci_low": low,
            "honest_chosen_ci_high": high,
            "honest_chosen_first": float((gaps[0] > 0).mean()),
            "honest_chosen_second": float((gaps[1] > 0).mean()),
            "mean_gap_nats": margin,
        }

    yield row("unsteered", -1, 0.0, [unsteered_gaps(engine, some) for some in both])
    told = [with_persona(pairs, some) for some in both]
    if all(some is not None for some in told):
        gaps = [unsteered_gaps(engine, some) for some in told if some is not None]
        yield row("prompt", -1, 0.0, gaps)
    for _, r in comparison.table.iterrows():
        if r.layer < 0 or not np.isfinite(r.coefficient):
            continue
        direction = comparison.directions[r.method][r.hook_name]
        readout = readout_hook(r.hook_name, int(model.cfg.n_layers))
        for c in (r.coefficient, -r.coefficient):
            job = Job(r.hook_name, direction, (c,), readout)
            gaps = [preference_gaps(engine, some, [job])[1][0][0] for some in both]
            yield row(r.method, r.layer, c, gaps)


def texts(model: Any, items: sl.PreferenceItems, comparison: Any) -> Iterator[dict[str, Any]]:
    """Greedy texts of the first questions, unsteered and at the coefficient of the chosen layer."""
    chosen = comparison.table[comparison.table.is_chosen]
    for item in list(items)[:N_TEXTS]:
        prompt = tokenize_prompt(model, item.prompt[:1])
        runs = [(r.method, r.hook_name, r.coefficient) for _, r in chosen.iterrows()]
        runs = [(*runs[0][:2], 0.0), *runs]
        for name, hook_name, coefficient in runs:
            direction = {hook_name: comparison.directions[name][hook_name]}
            (ids,) = generate_tokens(model, [prompt], direction, coefficient, max_new_tokens=40)
            text = decoded(model, ids)
            yield {"id": item.id, "method": name, "coefficient": coefficient, "text": text}


def main(folder: Path) -> None:
    """Measure and write."""
    folder.mkdir(parents=True, exist_ok=True)
    model = sl.load_model()
    pairs = sl.ContrastivePairs.load("honesty")
    train, test = (sl.PreferenceItems.load("honesty", split=s) for s in ("train", "test"))
    comparison = sl.compare(
        model, pairs, test, methods=METHODS, layers=list(LAYERS), train_items=train
    )
    for name in ("table", "summary", "methods"):
        getattr(comparison, name).to_csv(folder / f"{name}.csv", index=False)
    pd.DataFrame(choices(model, test, pairs, comparison)).to_csv(
        folder / "choices.csv", index=False
    )
    with (folder / "texts.jsonl").open("w", encoding="utf-8") as file:
        for text in texts(model, test, comparison):
            file.write(json.dumps(text) + "\n")
    (folder / "attrs.json").write_text(json.dumps(comparison.table.attrs, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
