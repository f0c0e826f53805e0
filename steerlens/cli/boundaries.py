"""The commands that measure how far a direction goes: `boundary` and `geometry`."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from steerlens.cli.options import (
    BatchOption,
    DebugOption,
    LayersOption,
    MaxPairsOption,
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
    text_of,
)
from steerlens.cli.printing import notes, output, print_boundary, print_rows, progress_of
from steerlens.cli.warned import warned
from steerlens.data.pairs import read_texts
from steerlens.directions.fitting import default_position, fit
from steerlens.directions.methods import method_of
from steerlens.measure.boundary import check_search
from steerlens.measure.plane import check_plane
from steerlens.measure.study import boundary_shape, find_boundary, loss_geometry
from steerlens.models.hooks import resolve_hooks
from steerlens.models.loading import load_model, provenance
from steerlens.models.packaged import DEFAULT_MODEL
from steerlens.runs.record import check_run_folder, write_run


def boundary(
    out: Annotated[Path, typer.Option("--out", help="Folder for the tables and the record.")],
    model: ModelOption = DEFAULT_MODEL,
    pairs: PairsOption = "sentiment",
    test_pairs: TestPairsOption = None,
    max_pairs: MaxPairsOption = None,
    layers: LayersOption = "all",
    method: MethodOption = "mean_diff",
    position: PositionOption = None,
    on: Annotated[
        str,
        typer.Option("--on", help="positive, negative, neutral (shipped text), or a text file."),
    ] = "positive",
    budget: Annotated[
        str,
        typer.Option(
            "--budget",
            help="relative=0.01, nats=0.05, kl=0.1, kl_p95=1 or rollout_kl_p95=1",
        ),
    ] = "relative=0.01",
    search_range: Annotated[
        float,
        typer.Option("--search-range", help="How far to look, in mean residual norms of a layer."),
    ] = 4.0,
    shape: Annotated[
        int | None,
        typer.Option("--shape", help="Of one layer: boundaries at so many angles in a plane."),
    ] = None,
    batch_size: BatchOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """The first coefficient of each sign beyond which the budget is exceeded, at every layer."""
    method_of(method)
    text = text_of(on)
    check_search(budget=budget, search_range=search_range)
    fit_on, measure_on, is_held_out = pairs_of(pairs, test_pairs, max_pairs)
    position = default_position(method, fit_on) if position is None else position
    loaded = load_model(model, progress=not quiet)
    hook_names = resolve_hooks(loaded, layers)
    if shape is not None:
        check_plane(hook_names, shape)
    request = {
        "command": "boundary",
        "model": provenance(loaded).to_dict(),
        "fitted_on": pairs_record(fit_on),
        "measured_on": pairs_record(measure_on),
        "held_out": is_held_out,
        "on": on,
        "texts": list(read_texts(text)) if isinstance(text, Path) else None,
        "hook_names": hook_names,
        "method": method,
        "position": position,
        "budget": budget,
        "search_range": search_range,
        "shape": shape,
        "batch_size": batch_size,
        "seed": seed,
    }
    check_run_folder(out, request)
    note_fit(method, fit_on, is_held_out=is_held_out, quiet=quiet)
    started = time.perf_counter()
    with progress_of(quiet=quiet) as progress:
        shared: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": progress}
        directions = fit(loaded, fit_on, method=method, layers=layers, position=position, **shared)
        shared |= {"on": text, "budget": budget, "search_range": search_range}
        result = find_boundary(loaded, measure_on, directions, layers=layers, **shared)
        tables = {"boundary": result.curves, "layers": result.layers}
        if shape is not None:
            plane = boundary_shape(
                loaded, measure_on, directions, layer=layers, n_angles=shape, **shared
            )
            tables["shape"] = plane.table
    seconds = time.perf_counter() - started
    spent = sum(t.attrs["forward_equivalents"] for n, t in tables.items() if n != "boundary")
    write_run(
        out,
        tables,
        directions,
        request,
        seconds=seconds,
        forward_equivalents=spent,
        warnings=warned(),
    )
    if not quiet:
        print_boundary(result.layers)
        if shape is not None:
            ratio = plane.table.attrs["radius_ratio"]
            output.print(f"in the plane: largest boundary over smallest {ratio:.2f}")
        notes.print(
            Text(
                f"{2 * len(result.layers)} boundaries in {seconds:.0f} s ({spent:.0f} "
                f"forward-equivalents); written to {out}"
            )
        )


def geometry(
    out: Annotated[Path, typer.Option("--out", help="Folder for the tables and the record.")],
    layers: Annotated[str, typer.Option("--layers", help="As of `sweep`; minutes for each.")],
    model: ModelOption = DEFAULT_MODEL,
    pairs: PairsOption = "sentiment",
    test_pairs: TestPairsOption = None,
    max_pairs: MaxPairsOption = None,
    method: MethodOption = "mean_diff",
    position: PositionOption = None,
    angles: Annotated[
        int, typer.Option("--angles", min=3, help="Angles of the plane to push along.")
    ] = 16,
    budget: Annotated[str, typer.Option("--budget", help="As of `boundary`.")] = "relative=0.01",
    batch_size: BatchOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """The loss, its gradients and the boundary in the plane of the direction, at some layers."""
    method_of(method)
    check_search(budget=budget, search_range=4.0)
    fit_on, measure_on, is_held_out = pairs_of(pairs, test_pairs, max_pairs)
    position = default_position(method, fit_on) if position is None else position
    loaded = load_model(model, progress=not quiet)
    hook_names = resolve_hooks(loaded, layers)
    request = {
        "command": "geometry",
        "model": provenance(loaded).to_dict(),
        "fitted_on": pairs_record(fit_on),
        "measured_on": pairs_record(measure_on),
        "held_out": is_held_out,
        "hook_names": hook_names,
        "method": method,
        "position": position,
        "angles": angles,
        "budget": budget,
        "batch_size": batch_size,
        "seed": seed,
    }
    check_run_folder(out, request)
    note_fit(method, fit_on, is_held_out=is_held_out, quiet=quiet)
    started = time.perf_counter()
    with progress_of(quiet=quiet) as progress:
        shared: dict[str, Any] = {"layers": layers, "batch_size": batch_size, "seed": seed}
        shared |= {"progress": progress}
        directions = fit(loaded, fit_on, method=method, position=position, **shared)
        found = loss_geometry(
            loaded, measure_on, directions, n_angles=angles, budget=budget, **shared
        )
    seconds = time.perf_counter() - started
    tables = {"geometry": found.points, "contours": found.contours, "shape": found.shape}
    spent = found.points.attrs["forward_equivalents"]
    write_run(
        out,
        tables,
        directions,
        request,
        seconds=seconds,
        forward_equivalents=spent,
        warnings=warned(),
    )
    if not quiet:
        columns = ["layer", "angle", "boundary", "boundary_ci_low", "boundary_ci_high"]
        print_rows(found.shape, "Boundary in the plane", columns)
        notes.print(
            Text(
                f"{len(found.contours)} pushes in {seconds:.0f} s ({spent:.0f} "
                f"forward-equivalents); written to {out}"
            )
        )
