"""The commands that compare: `compare` and `reliability`."""

import time
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from steerlens.cli.options import (
    BatchOption,
    DebugOption,
    LayersOption,
    ModelOption,
    PairsOption,
    PositionOption,
    QuietOption,
    SeedOption,
    pairs_of,
    pairs_record,
)
from steerlens.cli.printing import notes, print_rows, print_summary, progress_of
from steerlens.cli.warned import warned
from steerlens.data.items import PreferenceItems
from steerlens.data.pairs import SPLITS, dataset_names
from steerlens.directions.differences import collect_differences
from steerlens.directions.methods import method_of
from steerlens.errors import InputError
from steerlens.files import write_whole
from steerlens.measure.boundary import check_search
from steerlens.measure.comparison import compare as run_compare
from steerlens.measure.split_half import reliability as measure_reliability
from steerlens.models.hooks import resolve_hooks
from steerlens.models.loading import load_model, provenance
from steerlens.models.packaged import DEFAULT_MODEL
from steerlens.runs.record import check_out_file, check_run_folder, write_run
from steerlens.tables import write_csv

TEST_SHARE = 0.7
"""Of a file of items, the part that is held out; the layer is chosen on the rest."""


def compare(
    out: Annotated[Path, typer.Option("--out", help="Folder for the tables and the record.")],
    model: ModelOption = DEFAULT_MODEL,
    pairs: PairsOption = "sentiment",
    items: Annotated[
        str | None,
        typer.Option(
            "--items",
            help="JSONL file of items (prompt, positive, negative), or a shipped dataset. Default: "
            "those of the shipped pairs.",
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            help="As of `sweep`. Default: at a quarter, half and three quarters of the depth.",
        ),
    ] = None,
    methods: Annotated[
        str, typer.Option("--methods", help="Joined by commas; `steerlens methods` lists them.")
    ] = "mean_diff,pca,pca_pooled,lda,probe,gradient_mean,fisher_pullback",
    budget: Annotated[
        str, typer.Option("--budget", help="Damage every method is given, e.g. kl=0.1")
    ] = "kl=0.1",
    on: Annotated[
        str, typer.Option("--on", help="Text the budget is spent on: neutral or positive.")
    ] = "neutral",
    null: Annotated[
        int, typer.Option("--null", help="Null vectors of each kind, random and shuffled.")
    ] = 20,
    max_items: Annotated[
        int | None, typer.Option("--max-items", help="Measure on the first N held-out items only.")
    ] = None,
    off_target: Annotated[
        str,
        typer.Option("--off-target", help="Other shipped datasets, joined by commas; all, none."),
    ] = "all",
    position: PositionOption = None,
    batch_size: BatchOption = None,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001 (read by main)
) -> None:
    """Methods against each other at equal damage, on held-out items, with a null band."""
    names = [name.strip() for name in methods.split(",") if name.strip()]
    for name in names:
        method_of(name)
    check_search(budget=budget, search_range=4.0)
    fit_on, _, _ = pairs_of(pairs, None, None)
    train_items, test_items = _items_of(items or pairs, seed)
    if max_items is not None:
        test_items = test_items[: max(max_items, 0)]
    others = _others(off_target, (items, pairs))
    loaded = load_model(model, progress=not quiet)
    layers = layers or _quarters(int(loaded.cfg.n_layers))
    request = {
        "command": "compare",
        "model": provenance(loaded).to_dict(),
        "fitted_on": pairs_record(fit_on),
        "chosen_on": _items_record(train_items),
        "measured_on": _items_record(test_items),
        "off_target": {name: _items_record(of) for name, of in others.items()},
        "hook_names": resolve_hooks(loaded, layers),
        "methods": names,
        "budget": budget,
        "on": on,
        "null": null,
        "position": position,
        "batch_size": batch_size,
        "seed": seed,
    }
    check_run_folder(out, request)
    started = time.perf_counter()
    with progress_of(quiet=quiet) as progress:
        found = run_compare(
            loaded,
            fit_on,
            test_items,
            methods=names,
            layers=layers,
            train_items=train_items,
            off_target=others,
            budget=budget,
            on=on,
            n_null=null,
            position=position,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
    seconds = time.perf_counter() - started
    tables = {"comparison": found.table, "summary": found.summary, "effects": found.effects}
    spent = found.table.attrs["forward_equivalents"]
    write_run(
        out,
        tables,
        found.directions,
        request,
        seconds=seconds,
        forward_equivalents=spent,
        warnings=warned(),
    )
    if not quiet:
        columns = ["method", "layer", "coefficient", "effect", "null_low", "null_high", "p_holm"]
        columns += ["anti_steerable", "kl_nats", "degradation_nats", "off_target", "verdict"]
        print_rows(found.table, "Every method and layer", columns)
        print_summary(found.summary)
        notes.print(
            Text(
                f"{len(found.table)} rows in {seconds:.0f} s ({spent:.0f} forward-equivalents); "
                f"written to {out}"
            )
        )


def reliability(
    model: ModelOption = DEFAULT_MODEL,
    pairs: PairsOption = "sentiment",
    layers: LayersOption = "all",
    position: PositionOption = None,
    batch_size: BatchOption = None,
    seed: SeedOption = 0,
    out: Annotated[Path | None, typer.Option("--out", help="CSV file to write.")] = None,
    quiet: QuietOption = False,
    debug: DebugOption = False,  # noqa: ARG001
) -> None:
    """How far the direction of each layer can be trusted before anything is steered."""
    fit_on, _, _ = pairs_of(pairs, None, None)
    if out is not None:
        check_out_file(out)
    loaded = load_model(model, progress=not quiet)
    with progress_of(quiet=quiet) as progress:
        differences = collect_differences(
            loaded,
            fit_on,
            layers=layers,
            position=-1 if position is None else position,
            batch_size=batch_size,
            progress=progress,
        )
    table = measure_reliability(differences, seed=seed)
    if out is not None:
        write_whole(out, lambda path: write_csv(table, path))
        if not quiet:
            notes.print(Text(f"written to {out}"))
    if not quiet:
        print_rows(
            table,
            f"Reliability of the mean difference, {table.n_pairs.iloc[0]} pairs",
            [name for name in table.columns if name not in ("hook_name", "n_pairs")],
        )


def _quarters(n_layers: int) -> str:
    return ",".join(str(n_layers * part // 4) for part in (1, 2, 3))


def _items_of(source: str, seed: int) -> tuple[PreferenceItems, PreferenceItems]:
    """Training and held-out items: a shipped dataset's parts, or those of a file."""
    if source in dataset_names():
        train, test = (PreferenceItems.load(source, split=split) for split in SPLITS)
        return train, test
    if not Path(source).exists():
        shipped = ", ".join(dataset_names())
        raise InputError(f"{source!r} is neither a file nor a shipped dataset ({shipped})")
    try:
        found = PreferenceItems.from_jsonl(source)
    except InputError as error:
        raise InputError(
            f"{error}; a comparison needs items, one object a line with prompt, positive and "
            "negative: give them with --items"
        ) from error
    return found.split(TEST_SHARE, seed)


def _others(names: str, measured: tuple[str | None, str]) -> dict[str, PreferenceItems]:
    if names == "none":
        return {}
    chosen = dataset_names() if names == "all" else [n.strip() for n in names.split(",")]
    return {
        name: PreferenceItems.load(name, split="test") for name in chosen if name not in measured
    }


def _items_record(items: PreferenceItems) -> dict[str, object]:
    return {"name": items.name, "n_items": len(items), "fingerprint": items.fingerprint}
