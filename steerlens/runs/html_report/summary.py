"""What the tables of a run say, in a few plain sentences; no more than the numbers do."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pandas as pd

from steerlens.plots.sweeps import furthest_cell
from steerlens.runs.html_report.numbers import change, short, signed, span
from steerlens.runs.reading import Run
from steerlens.tables import hook_label


def summarise(run: Run) -> list[str]:
    """Sentences about a run, from its record and tables alone."""
    return [*_held_out(run), *_SUMMARIES[run.command](run)]


def _held_out(run: Run) -> Iterator[str]:
    fitted, measured = run.request.get("fitted_on"), run.request.get("measured_on")
    if not isinstance(fitted, Mapping) or not isinstance(measured, Mapping):
        return
    n_fitted_on = run.request.get("n_pairs_fitted_on")
    if "n_pairs" not in measured or not isinstance(n_fitted_on, int):
        return
    measured_on = f"Measured on {measured['n_pairs']} pairs of {measured['name']}"
    if n_fitted_on == 0:
        yield (
            f"{measured_on}; the directions are fitted on others, {fitted['n_pairs']} pairs "
            f"of {fitted['name']}."
        )
    else:
        yield (
            f"{measured_on}; the directions are fitted on {n_fitted_on} of these too: projections "
            "are in sample, so they are likely larger than on new pairs."
        )


def _sweep(run: Run) -> Iterator[str]:
    cells = _rows(run.tables["sweep"])
    if not cells:
        return
    baseline = short(cells[0].baseline_logprob_nats)
    yield f"Unsteered, the labels' mean logprob is {baseline} nats per token."
    within = [cell for cell in cells if cell.coherent == "yes"]
    n_undecided = sum(cell.coherent == "undecided" for cell in cells)
    yield (
        f"Of {len(cells)} cells {len(within)} are within the budget ({run.request['budget']}); of "
        f"{n_undecided} the interval of the degradation reaches across it, so they are undecided."
    )
    undefined = sum(math.isnan(cell.logprob_nats) for cell in cells)
    if undefined:
        yield f"{undefined} cells are undefined: the model overflowed there."
    row = furthest_cell(run.tables["sweep"])
    if row is None:
        return
    yield (
        f"Among those before the readout hook, the projection moves most at layer {row.layer} with "
        f"coefficient {short(row.coefficient)}: by {change(row.projection_shift)} residual units, "
        f"at a degradation of {change(row.degradation_nats)} nats per token "
        f"(95% interval {span(row.degradation_ci_low, row.degradation_ci_high)})."
    )
    yield (
        "That is the largest of many cells on these pairs, so it is likely smaller on others; "
        "no layer was chosen on one set and tested on another here."
    )


def _boundary(run: Run) -> Iterator[str]:
    layers = _rows(run.tables["layers"])
    if not layers:
        return
    yield (
        f"Unsteered, the labels' mean logprob is {short(layers[0].logprob_nats)} nats per token. "
        f"The budget is {run.request['budget']} on {run.request['on']} text."
    )
    for sign, name in (("pos", "c > 0"), ("neg", "c < 0")):
        at = {row: float(getattr(row, f"boundary_{sign}")) for row in layers}
        parts = [f"found at {sum(map(math.isfinite, at.values()))} of {len(layers)} hooks"]
        if beyond := sum(map(math.isinf, at.values())):
            parts.append(f"beyond the searched range at {beyond}")
        if failed := sum(map(math.isnan, at.values())):
            parts.append(f"not found by the search at {failed}")
        yield f"The boundary for {name} is {', '.join(parts)}."
        shares = {row: abs(c) / row.resid_norm for row, c in at.items() if math.isfinite(c)}
        if len(shares) > 1:
            low, high = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
            yield (
                "In units of the layer's mean residual norm it is smallest at layer "
                f"{low.layer} ({short(shares[low])}) and largest at layer {high.layer} "
                f"({short(shares[high])})."
            )
    trusted = sum(row.prediction_trusted for row in layers)
    yield f"The prediction from gradients at 0 held at {trusted} of {len(layers)} hooks."
    if "shape" in run.tables:
        for layer, shape in run.tables["shape"].groupby("layer"):
            ratio, if_round = shape[["radius_ratio", "radius_ratio_if_round"]].iloc[0]
            yield (
                f"In the plane of layer {layer}, the largest boundary is {short(ratio)} times the "
                f"smallest; of a circle measured with the same noise it would be {short(if_round)}."
            )


def _place(hook_name: str) -> str:
    """A layer by its number, another hook by its name."""
    label = hook_label(hook_name)
    return f"layer {label}" if label.isdigit() else label


def _compare(run: Run) -> Iterator[str]:
    summary = _rows(run.tables["summary"])
    methods = [row for row in summary if row.layer >= 0]
    chosen, measured = run.request.get("chosen_on"), run.request["measured_on"]
    yield (
        f"Every method may do the same damage ({run.request['budget']} on {run.request['on']} "
        f"text); effects are on {measured['n_items']} items of {measured['name']}."
    )
    if isinstance(chosen, Mapping):
        yield (
            f"Each method's layer was chosen on {chosen['n_items']} other items ({chosen['name']})."
        )
    if not methods:
        yield "No method has an effect to compare."
        return
    best = methods[0]
    rows = _rows(run.tables["comparison"])
    row = next(r for r in rows if (r.method, r.hook_name) == (best.method, best.hook_name))
    band = ""
    if math.isfinite(row.null_low) and math.isfinite(row.null_high):
        ends = f"{change(row.null_low)} and {change(row.null_high)}"
        band = f"; 95% of random and of shuffled vectors lie between {ends}"
    yield (
        f"The largest effect is that of {best.method} at {_place(best.hook_name)}: "
        f"{change(best.effect)} nats per token (95% interval "
        f"{span(best.effect_ci_low, best.effect_ci_high)}{band}). Its verdict: "
        f"{best.verdict}. Its rank is {best.rank} of {len(summary)}, with a 95% "
        f"interval of {best.rank_low} to {best.rank_high}."
    )
    n_effects = sum(row.verdict == "effect" for row in methods)
    yield f'The verdict is "effect" for {n_effects} of {len(methods)} methods.'
    against = _rows(run.tables["methods"]) if "methods" in run.tables else []
    if against:
        better = [row.method for row in against if row.verdict == "better"]
        yield (
            f"On the same items {', '.join(better) or 'no method'} is better than "
            f"{against[0].reference}, by signs flipped over {len(against)} comparisons."
        )


def _circuits(run: Run) -> Iterator[str]:
    writers, readers, claims = (run.tables[name] for name in ("writers", "readers", "claims"))
    before, behind = (readers.attrs.get(f"metric_{how}") for how in ("unsteered", "steered"))
    if isinstance(before, (int, float)) and isinstance(behind, (int, float)):
        asked = run.request["coefficient"]
        coefficient = signed(asked) if isinstance(asked, str) else short(asked)
        yield (
            f"At coefficient {coefficient} the vector moves the "
            f"answer logit difference from {short(before)} to {short(behind)}."
        )
    if len(writers):
        writer = max(_rows(writers), key=lambda row: abs(row.contribution))
        yield (
            f"The largest writer of the direction is {_component(writer)}, with "
            f"{short(writer.share)} of the projection."
        )
    if len(readers):
        reader = max(_rows(readers), key=lambda row: abs(row.effect))
        exact = change(reader.exact) if math.isfinite(reader.exact) else "not measured"
        yield (
            f"The largest reader is {_component(reader)}: {change(reader.effect)} logits by the "
            f"estimate, {exact} by exact patching."
        )
    remaining = [
        f"{row.test} {short(row.remaining)} ({short(row.ci_low)} to {short(row.ci_high)})"
        for row in _rows(claims)
        if math.isfinite(row.remaining) and row.test != "nothing"
    ]
    if remaining:
        yield (
            "Of the vector's effect there remains, with these held at what they are unsteered "
            f"(95% intervals): {'; '.join(remaining)}."
        )


def _component(row: Any) -> str:
    if row.component == "embed":
        return "the embedding"
    return f"mlp{row.layer}" if row.component == "mlp" else f"L{row.layer}H{row.head}"


def _geometry(run: Run) -> Iterator[str]:
    groups: Any = run.tables["shape"].groupby("hook_name", sort=False)["boundary"]
    for name, boundaries in groups:
        finite = [at for at in boundaries if math.isfinite(at)]
        parts = [
            f"at layer {hook_label(name)} the boundary is found at {len(finite)} of "
            f"{len(boundaries)} angles"
        ]
        if finite:
            parts.append(f"from {short(min(finite))} to {short(max(finite))} residual units away")
        if beyond := sum(map(math.isinf, boundaries)):
            parts.append(f"beyond the searched range at {beyond}")
        yield f"In the plane of the direction, {', '.join(parts)}."


def _recommend(run: Run) -> Iterator[str]:
    rows = _rows(run.tables["recommendation"])
    n_pairs = run.tables["candidates"].attrs.get("n_pairs")
    if not rows or not isinstance(n_pairs, list):
        return
    fitted, chosen, confirmed = n_pairs
    yield (
        f"Fitted on {fitted} pairs; the layer and the coefficients are chosen on {chosen} others "
        f"and confirmed on {confirmed} more, and so are items: no group is in two parts."
    )
    row = rows[0]
    yield (
        f"Among {len(run.tables['candidates'])} layers, layer {row.layer} has the largest weighted "
        f"effect. Its boundary ({run.request['budget']} on the model's own text) is at "
        f"{' and '.join(change(of_sign.boundary) for of_sign in rows)} residual units."
    )
    yield (
        f"p ranks the labels among {row.n_null} flips of whole groups, each at its own best layer "
        f"({row.null_by})."
    )


def _rows(table: pd.DataFrame) -> list[Any]:
    return list(table.itertuples())


def _behave(run: Run) -> Iterator[str]:
    rows = _rows(run.tables["behaviour"])
    steered = [row for row in rows if row.subject == "steered" and row.coefficient != 0]
    if not steered:
        return
    n_prompts, n_texts = max(row.n_prompts for row in rows), run.request["samples"]
    yield (
        f"Written after {n_prompts} prompt{'s' * (n_prompts != 1)}, {n_texts} "
        f"text{'s' * (n_texts != 1)} each at every coefficient; shifts are against the unsteered "
        "texts of the same prompts."
    )
    names = list(dict.fromkeys(row.scorer for row in rows))
    asked = "concept" if "concept" in names else names[0]
    for hook_name in dict.fromkeys(row.hook_name for row in steered):
        here = [row for row in steered if (row.hook_name, row.scorer) == (hook_name, asked)]
        for row in (here[0], here[-1])[: len(here)]:
            at = (row.hook_name, row.strength)
            told = asked == "logprob"  # that is the cost itself
            costs = (
                []
                if told
                else [r for r in steered if (r.hook_name, r.strength, r.scorer) == (*at, "logprob")]
            )
            cost = f", their logprob by {change(costs[0].shift)} nats per token" if costs else ""
            yield (
                f"At layer {hook_label(hook_name)} with coefficient {signed(row.strength)} the "
                f"{asked} of the texts moves by {change(row.shift)} (95% interval "
                f"{change(row.shift_ci_low)} to {change(row.shift_ci_high)}){cost}."
            )


_SUMMARIES: Mapping[str, Callable[[Run], Iterator[str]]] = {
    "sweep": _sweep,
    "boundary": _boundary,
    "compare": _compare,
    "circuits": _circuits,
    "geometry": _geometry,
    "behave": _behave,
    "recommend": _recommend,
}
