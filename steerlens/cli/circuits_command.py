"""`steerlens circuits`: who writes the direction, who reads it, and whether the circuit changes."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import steerlens as sl
from steerlens.cli import options as opt
from steerlens.cli.command import PairsCommand
from steerlens.cli.long_command import FolderCommand
from steerlens.cli.printing import note, print_rows
from steerlens.errors import InputError
from steerlens.models.packaged import DEFAULT_MODEL

TOP_HEADS = 6


@dataclass(frozen=True, kw_only=True)
class Circuits(FolderCommand, PairsCommand):
    """Which heads and MLPs write the direction, and which read it."""

    layer: str | None = None
    coefficient: str | None = None
    model: str = DEFAULT_MODEL
    test_pairs: str | None = None
    max_pairs: int = 16
    method: str = "mean_diff"
    position: str | None = None
    top: int = 20
    ig_steps: int = 1
    null: int = 20
    compare: bool = True

    def measure(self) -> None:
        circuits, plots = sl.circuits, sl.plots
        assert self.layer is not None
        assert self.coefficient is not None
        asked = opt.strength_of(self.coefficient)
        task = self.prepare(self.layer)
        model, measure_on = task.model, task.measure_on
        if len(task.hook_names) != 1:
            raise InputError(f"--layer {self.layer!r} names {len(task.hook_names)} hooks; give one")
        circuits.check_steered(model, task.hook_names[0], 1.0)
        sl.engine.positions.one_token(task.position, "writes")
        circuits.prompts.choosing_half(measure_on.groups, self.seed)
        if self.compare:
            circuits.edge_readers(model)
        coefficient = sl.measure.rows.checked_coefficients([asked])[0]
        with self.opened(task.request("circuits", coefficient=coefficient)) as run:
            with task.progress() as progress:
                shared: dict[str, Any] = {"seed": self.seed, "progress": progress}
                kept: dict[str, Any] = {**shared, "checkpoint": run.parts}
                directions = run.parts.directions(
                    partial(task.fit, progress, layers="all"), sl.resolve_hooks(model, "all")
                )
                vector = task.vector_at(progress, directions, self.layer, [asked])
                amount = sl.steering.steps(vector, asked)[0].amount
                pushed = circuits.Intervention(vector, amount)
                answers = circuits.contrast_answers(model, task.fit_on)
                prompts = circuits.make_prompts(
                    model,
                    list(sl.engine.tokenize_pairs(model, measure_on).positive),
                    groups=measure_on.groups,
                )
                writers = circuits.find_writers(
                    model, measure_on, directions, layer=self.layer, **shared
                )
                readers = circuits.find_readers(
                    *(model, prompts, answers, vector, amount),
                    top=self.top,
                    ig_steps=self.ig_steps,
                    **kept,
                )
                if self.compare:
                    differences = sl.collect_differences(
                        *(model, task.fit_on),
                        layers=task.hook_names,
                        position=task.position,
                        batch_size=self.batch_size,
                        progress=progress,
                    )
                    nulls = circuits.null_interventions(
                        model, measure_on, pushed, differences, n=self.null, **kept
                    )
                    comparison = circuits.compare_circuits(
                        *(model, measure_on, answers, {self.method: pushed}),
                        nulls={self.method: nulls},
                        **kept,
                    )
            tables = {"writers": writers.table, "positions": writers.positions}
            tables |= {"readers": readers.table, "claims": readers.claims}
            pages = {"components.html": plots.components(writers.table, readers.table).to_html()}
            pages |= _token_pages(task, prompts, directions, pushed, readers.table)
            if self.compare:
                tables |= {"circuits": comparison.table, "faithfulness": comparison.faithfulness}
                tables["edges"] = circuits.edge_table(model, comparison.scores)
                pages["graph.html"] = plots.circuit_graph(tables["edges"]).to_html()
            run.write(tables, directions, texts=pages)
        _print_components(writers.table, readers.table, readers.claims)
        if self.compare:
            print_rows(comparison.table, "circuits")
            print_rows(comparison.faithfulness, "faithfulness")
        note(f"{run.seconds:.0f} s; written to {self.out}")


def _token_pages(
    task: Any, prompts: Any, directions: Any, pushed: Any, readers: Any
) -> dict[str, str]:
    """The attention of the heads that read the most, and every token along the directions."""
    circuits, plots = sl.circuits, sl.plots
    places = readers[readers.component == "head"][["layer", "head"]].to_numpy().tolist()
    heads = [circuits.Component(*place) for place in places[:TOP_HEADS]]
    seen = circuits.attention_patterns(task.model, prompts, pushed, heads)
    along = circuits.token_projections(task.model, prompts, directions, pushed)
    patterns, projections = (
        {"Unsteered": values.unsteered.numpy(), "Steered": values.steered.numpy()}
        for values in (seen, along)
    )
    return {
        "attention.html": plots.attention_page(seen.tokens, seen.heads, patterns).html,
        "tokens.html": plots.projection_page(along.tokens, along.layers, projections).html,
    }


def _print_components(writers: Any, readers: Any, claims: Any) -> None:
    by_size = writers.sort_values("contribution", key=abs, ascending=False).head(10)
    print_rows(by_size, "writers")
    print_rows(readers.head(10), "readers")
    print_rows(claims, "claims")
    correlations = ", ".join(
        f"{kind} {'undefined' if r is None else f'{r:.3f}'}"
        for kind, r in readers.attrs["correlation"].items()
    )
    note(f"estimate against exact patching, correlation: {correlations}")
