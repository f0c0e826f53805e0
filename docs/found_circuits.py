"""Write docs/found-circuits.md from a run of `steerlens circuits`.

python docs/found_circuits.py RUN_DIR
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

import steerlens as sl

PAGE = """# Circuits as found

    make found-circuits

runs the command below and writes this page from its tables. Every number is of that run, every
claim names its test.

    {command}

On {model} ({date}; {n_pairs} pairs of {n_groups} groups; block {layer}). Components are named and
circuits chosen on {n_chosen} of the groups, and tested on the other {n_tested}; brackets are 95%
intervals over groups (of random components: where 95% of the sets lie).

## Who writes the direction

Shares of the projection (exact), all pairs: {writers}. Heads together {heads:.2f}, MLPs
{mlps:.2f}.

## Who reads it

Effects in logits, all pairs, by the estimate and by exact patching: {readers}. Estimate and exact
patching correlate, over the {n_exact} that were patched, with {correlation}; that says nothing of
the others.

## What carries the effect

What remains of it with these held at what they are unsteered. The named components are {named}; p
ranks what they take away among the random sets, of the same numbers of heads and MLPs.

{claims}

## Same circuit or another

Overlap of circuits of the unsteered and the steered model (attributions). *Across* and *ceiling*
compare circuits from two random halves of the groups, of the two models and of one; *nulls* is
where 95% of random and of shuffled vectors at the same KL lie; p ranks what an overlap lacks of 1
against the most that a null lacks in any row.

{overlaps}

{verdict}

## What circuits keep alone

Faithfulness, run exactly on the half that they were not chosen on. *Own* is the steered model's
own circuit in the steered model, *shortfall* how much more that keeps there than the unsteered
circuit, on the same pairs; *nulls* the unsteered circuit's faithfulness under nulls, and p its
rank (node circuits, at the largest size).

{faithfulness}

Areas under faithfulness, from no node or edge to all, are not MIB's CPR
([why](maths.md#same-circuit-or-another)).

{areas}

What the numbers are: [the maths](maths.md#circuits). How to ask:
[find circuits](how-to/circuits.md).
"""


def interval(row: Any, value: str, ends: str) -> str:
    """A value with its interval."""
    return f"{row[value]:.2f} ({row[f'{ends}_low']:.2f} to {row[f'{ends}_high']:.2f})"


def number(value: float) -> str:
    """To two digits behind the point; nothing where it is not known."""
    return "" if pd.isna(value) else f"{value:.2f}"


def within(row: Any, low: str, high: str) -> str:
    """A range; nothing where it is not known."""
    return "" if pd.isna(row[low]) else f"{row[low]:.2f} to {row[high]:.2f}"


def table(rows: list[Mapping[str, str]]) -> str:
    """A table of Markdown."""
    names = list(rows[0])
    lines = [names, ["---"] * len(names), *([row[name] for name in names] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def component(row: Any) -> str:
    """Its name, as in the other tables."""
    name = str(sl.circuits.Component(int(row.layer), int(row["head"])))
    return "the embedding" if name == "embed" else name


def largest(frame: pd.DataFrame, by: str) -> pd.DataFrame:
    """The five largest in size."""
    return frame.sort_values(by, key=abs, ascending=False).head(5)


def overlaps(circuits: pd.DataFrame) -> str:
    """Sizes from a tenth on."""
    return table(
        [
            {
                "circuits": f"{row.level}s, {row.selection}",
                "share": f"{row.share:g}",
                "overlap": interval(row, "iou", "iou_ci"),
                "across": number(row.iou_across),
                "ceiling": number(row.iou_ceiling),
                "nulls": within(row, "iou_null_low", "iou_null_high"),
                "p": number(row.iou_p_family),
            }
            for _, row in circuits[circuits.share >= 0.1].iterrows()
        ]
    )


def verdict(circuits: pd.DataFrame) -> str:
    """What the test of the overlaps shows, and nothing else."""
    n_shown, n_null = int((circuits.iou_p_family < 0.05).sum()), int(circuits.n_null.min())
    return (
        f"Of {len(circuits)} rows (all sizes) {n_shown} show a change of the circuit beyond that "
        f"of nulls at p < 0.05 over the family; the smallest p that {n_null} nulls of each kind "
        f"can give is {1 / (1 + n_null):.3f}."
    )


def faithfulness(curves: pd.DataFrame, steered: str) -> str:
    """Of the unsteered circuit in both models, and of the steered one in its own."""
    keys = ["level", "selection", "share"]
    rows = []
    for (level, selection, share), of in curves[curves.share >= 0.1].groupby(keys, sort=False):
        at = of.set_index(["circuit_of", "run_in"])
        own, there = at.loc[(steered, steered)], at.loc[("unsteered", steered)]
        rows.append(
            {
                "circuits": f"{level}s, {selection}",
                "share": f"{share:g}",
                "unsteered in unsteered": interval(
                    at.loc[("unsteered", "unsteered")], "faithfulness", "ci"
                ),
                "unsteered in steered": interval(there, "faithfulness", "ci"),
                "own in steered": interval(own, "faithfulness", "ci"),
                "shortfall": interval(there, "shortfall", "shortfall_ci"),
                "nulls": within(there, "null_low", "null_high"),
                "p": number(there.p_value),
            }
        )
    return table(rows)


def areas(curves: pd.DataFrame) -> str:
    """Of each model's circuits in the model itself."""
    own = curves[curves.circuit_of == curves.run_in]
    own = own.drop_duplicates(["level", "selection", "run_in"])
    return table(
        [
            {
                "circuits": f"{row.level}s, {row.selection}",
                "model": row.run_in,
                "area under faithfulness": interval(row, "area_under_faithfulness", "area_ci"),
                "area from 1": number(row.area_from_one),
            }
            for _, row in own.iterrows()
        ]
    )


def page(run: sl.runs.Run) -> str:
    """The page of a run of `steerlens circuits` with its comparison."""
    writers, readers, claims, circuits, curves = (
        run.tables[name] for name in ("writers", "readers", "claims", "circuits", "faithfulness")
    )
    attrs, exact = circuits.attrs, readers[readers.exact.notna()]
    shares = writers.groupby("component").share.sum()
    correlation = readers.attrs["correlation"].items()
    (layer,) = {writers.attrs["hook_name"].split(".")[1]}
    return PAGE.format(
        model=attrs["provenance"]["name"],
        date=run.record["finished"][:10],
        layer=layer,
        command=(
            f"steerlens circuits --layer {layer} --coefficient {run.request['coefficient']:g} "
            f"--max-pairs {attrs['n_pairs']} --null {run.request['null']}"
        ),
        n_pairs=attrs["n_pairs"],
        n_groups=attrs["n_groups"],
        n_chosen=attrs["chosen_on"]["n_groups"],
        n_tested=attrs["tested_on"]["n_groups"],
        writers=", ".join(
            f"{component(row)} {row.share:.2f}" for _, row in largest(writers, "share").iterrows()
        ),
        heads=shares["head"],
        mlps=shares["mlp"],
        readers=", ".join(
            f"{component(row)} {row.effect:+.2f}; {row.exact:+.2f}"
            for _, row in largest(exact, "effect").iterrows()
        ),
        n_exact=len(exact),
        correlation=", ".join(f"r = {r:.3f} ({kind}s)" for kind, r in correlation if r is not None),
        named=", ".join(claims.attrs["named"]),
        claims=table(
            [
                {
                    "held": row.test,
                    "remains": interval(row, "remaining", "ci"),
                    "p": number(row.p_value),
                }
                for _, row in claims[claims.test != "nothing"].iterrows()
            ]
        ),
        overlaps=overlaps(circuits),
        verdict=verdict(circuits),
        faithfulness=faithfulness(curves, circuits.b.iloc[0]),
        areas=areas(curves),
    )


if __name__ == "__main__":
    Path(__file__).with_name("found-circuits.md").write_text(
        page(sl.read_run(sys.argv[1])), encoding="utf-8"
    )
