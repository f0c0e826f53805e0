"""`steerlens circuits`: who writes the direction, who reads it, and whether the circuit changes."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from steerlens import plots
from steerlens.circuits import (
    Component,
    Intervention,
    attention_patterns,
    compare_circuits,
    contrast_answers,
    find_readers,
    find_writers,
    make_prompts,
    random_intervention,
    token_projections,
)
from steerlens.circuits.edges import edge_table
from steerlens.circuits.graphs import readers as edge_readers
from steerlens.circuits.readers import check_steered
from steerlens.cli.options import (
    BatchOption,
    DebugOption,
    MethodOption,
    ModelOption,
    PairsOption,
    PositionOption,
    QuietOption,
    SeedOption,
    TestPairsOption,
    note_fit,
    pairs_of,
    pairs_record,
)
from steerlens.cli.printing import notes, print_rows, progress_of
from steerlens.cli.warned import warned
from steerlens.directions.fitting import default_position, fit
from steerlens.directions.methods import method_of
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.errors import InputError
from steerlens.models.hooks import resolve_hooks
from steerlens.models.loading import load_model, provenance
from steerlens.models.packaged import DEFAULT_MODEL
from steerlens.runs.record import check_run_folder, write_run
from steerlens.steering import SteeringVector

TOP_HEADS = 6


def circuits(
    out: Annotated[Path, typer.Option("--out", help="Folder for tables, pictures and the record.")],
    layer: Annotated[str, typer.Option("--layer", help="Block whose output is steered.")],
    coefficient: Annotated[float, typer.Option("--coefficient", help="Residual units.")],
    model: ModelOption = DEFAULT_MODEL,
    pairs: PairsOption = "sentiment",
    test_pairs: TestPairsOption = None,
    max_pairs: Annotated[
        int, typer.Option("--max-pairs", help="Measure on the first N pairs only.")
    ] = 16,
    method: MethodOption = "mean_diff",
    position: PositionOption = None,
    top: Annotated[int, typer.Option("--top", min=0, help="Components to patch exactly.")] = 20,
    ig_steps: Annotated[
        int, typer.Option("--ig-steps", min=1, help="Steps of integrated gradients; 1: none.")
    ] = 1,
    compare: Annotated[
        bool, typer.Option(help="Compare the circuits too, steered and unsteered: takes longest.")
    ] = True,
    batch_size: BatchOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001 (read by main)
) -> None:
    """Which heads and MLPs write the direction, which read it, and is it the same circuit."""
    method_of(method)
    fit_on, measure_on, is_held_out = pairs_of(pairs, test_pairs, max_pairs)
    position = default_position(method, fit_on) if position is None else position
    loaded = load_model(model, progress=not quiet)
    hook_names = resolve_hooks(loaded, layer)
    if len(hook_names) != 1:
        raise InputError(f"--layer {layer!r} names {len(hook_names)} hooks; give one")
    check_steered(loaded, hook_names[0], coefficient)
    if compare:
        edge_readers(loaded)
    request = {
        "command": "circuits",
        "model": provenance(loaded).to_dict(),
        "fitted_on": pairs_record(fit_on),
        "measured_on": pairs_record(measure_on),
        "held_out": is_held_out,
        "hook_names": hook_names,
        "coefficient": coefficient,
        "method": method,
        "position": position,
        "top": top,
        "ig_steps": ig_steps,
        "compare": compare,
        "batch_size": batch_size,
        "seed": seed,
    }
    check_run_folder(out, request)
    note_fit(method, fit_on, is_held_out=is_held_out, quiet=quiet)
    started = time.perf_counter()
    with progress_of(quiet=quiet) as progress:
        shared: dict[str, Any] = {"seed": seed, "progress": progress}
        directions = fit(
            loaded, fit_on, method=method, position=position, batch_size=batch_size, **shared
        )
        vector = SteeringVector.from_directions(
            loaded, directions, layers=layer, dataset=fit_on.name
        )
        pushed = Intervention(vector, coefficient)
        answers = contrast_answers(loaded, fit_on)
        prompts = make_prompts(loaded, list(tokenize_pairs(loaded, measure_on).positive))
        writers = find_writers(loaded, measure_on, directions, layer=layer, **shared)
        readers = find_readers(
            loaded, prompts, answers, vector, coefficient, top=top, ig_steps=ig_steps, **shared
        )
        if compare:
            floor = random_intervention(loaded, measure_on, pushed, **shared)
            found = compare_circuits(
                loaded, measure_on, answers, {method: pushed}, floor=floor, **shared
            )
    tables = {
        "writers": writers.table,
        "positions": writers.positions,
        "readers": readers.table,
        "claims": readers.claims,
    }
    of_heads = readers.table[readers.table.component == "head"]
    heads = [Component(*place) for place in of_heads[["layer", "head"]].to_numpy().tolist()]
    pages = {"components": plots.components(writers.table, readers.table).to_html()}
    seen = attention_patterns(loaded, prompts, pushed, heads[:TOP_HEADS])
    patterns = {"Unsteered": seen.unsteered.numpy(), "Steered": seen.steered.numpy()}
    pages["attention"] = plots.attention_page(seen.tokens, seen.heads, patterns).html
    along = token_projections(loaded, prompts, directions, pushed)
    projections = {"Unsteered": along.unsteered.numpy(), "Steered": along.steered.numpy()}
    pages["tokens"] = plots.projection_page(along.tokens, along.layers, projections).html
    if compare:
        tables |= {"circuits": found.table, "faithfulness": found.faithfulness}
        tables["edges"] = edge_table(loaded, found.scores)
        pages["graph"] = plots.circuit_graph(tables["edges"]).to_html()
    seconds = time.perf_counter() - started
    write_run(out, tables, directions, request, seconds=seconds, pages=pages, warnings=warned())
    if quiet:
        return
    by_size = writers.table.sort_values("contribution", key=abs, ascending=False)
    columns = ["component", "layer", "head"]
    intervals = ["ci_low", "ci_high"]
    print_rows(
        by_size.head(10),
        "Who writes the direction",
        [*columns, "contribution", "share", *intervals],
    )
    print_rows(
        readers.table.head(10),
        "Who reads it",
        [*columns, "effect", "direct", "mediated", "exact"],
    )
    print_rows(readers.claims, "What carries it", ["test", "n_components", "remaining", *intervals])
    correlation = readers.table.attrs["correlation"]
    said = ", ".join(
        f"{kind} {'undefined' if r is None else f'{r:.3f}'}" for kind, r in correlation.items()
    )
    notes.print(Text(f"estimate against exact patching, correlation: {said}"))
    if compare:
        print_rows(
            found.table,
            "Same circuit or another",
            ["level", "share", "iou", "iou_ceiling", "iou_floor", "a_in_a", "a_in_b", "b_in_b"],
        )
    notes.print(Text(f"{seconds:.0f} s; written to {out}"))
