"""`steerlens circuits`: who writes the direction, who reads it, and whether the circuit changes."""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import typer

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

    layer: Annotated[str | None, f"Block whose output is steered. {opt.NEEDED}"] = None
    coefficient: Annotated[
        str | None, f"Residual units (8), norms (0.1norm) or 80% of the boundary. {opt.NEEDED}"
    ] = None
    model: opt.Model = DEFAULT_MODEL
    test_pairs: opt.TestPairs = None
    max_pairs: Annotated[int, "Measure on the first N pairs only."] = 16
    method: opt.Method = "mean_diff"
    position: opt.Position = None
    top: Annotated[int, typer.Option(min=0, help="Components to patch exactly.")] = 20
    ig_steps: Annotated[
        int, typer.Option(min=1, help="Steps of integrated gradients; 1: none.")
    ] = 1
    null: Annotated[
        int, typer.Option(min=2, help="Null vectors of each kind, random and shuffled.")
    ] = 20
    compare: Annotated[bool, "Compare the circuits too, steered and unsteered: takes longest."] = (
        True
    )

    NEEDED: ClassVar[tuple[str, ...]] = ("layer", "coefficient")
    EXAMPLES = (
        "circuits --layer 12 --coefficient 20 --out runs/circuits",
        "circuits --layer 9 --coefficient 80% --no-compare --out runs/who",
    )

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
        interval = ["ci_low", "ci_high"]
        _print_components(writers.table, readers.table, readers.claims)
        if self.compare:
            columns = ["level", "selection", "share"]
            overlap = ["iou", "iou_across", "iou_ceiling", "iou_null_low", "iou_null_high"]
            print_rows(
                comparison.table,
                "Same circuit or another: chosen on one half of the groups",
                [*columns, *overlap, "iou_p_family"],
            )
            print_rows(
                comparison.faithfulness,
                "What circuits keep on the other half",
                [*columns, "circuit_of", "run_in", "faithfulness", *interval, "p_value"],
            )
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
    columns, interval = ["component", "layer", "head"], ["ci_low", "ci_high"]
    by_size = writers.sort_values("contribution", key=abs, ascending=False).head(10)
    print_rows(by_size, "Who writes the direction", [*columns, "contribution", "share", *interval])
    effects = ["effect", "direct", "mediated", "exact"]
    print_rows(readers.head(10), "Who reads it", [*columns, *effects])
    print_rows(
        claims, "What carries it", ["test", "n_components", "remaining", *interval, "p_value"]
    )
    correlations = ", ".join(
        f"{kind} {'undefined' if r is None else f'{r:.3f}'}"
        for kind, r in readers.attrs["correlation"].items()
    )
    note(f"estimate against exact patching, correlation: {correlations}")
