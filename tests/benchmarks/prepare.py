"""What is made before anything is timed: the shared work and the peers' environments."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from work import Cell, Work

import steerlens as sl
from steerlens.data.prompts import render
from steerlens.models.packaged import DEFAULT_MODEL, PACKAGED_MODELS, cache_folder

HERE = Path(__file__).resolve().parent
CONTINUATION = " wonderful, and I enjoyed every minute of it."
COEFFICIENTS = [-20.0, -15.0, -10.0, -5.0, 5.0, 10.0, 15.0, 20.0]
SAMPLED_LAYERS = [3, 10, 19, 26]  # of peers, whose cells all cost the same
SAMPLED_COEFFICIENTS = [-10.0, 15.0]
FITTED_ON = 32
EXTRACTED = 256
TORCH = "torch==2.13.0"


def write_work(out: Path, *, n_pairs: int, n_cells: int | None, batch_size: int) -> Path:
    """The work as `OUT/work.json` and `OUT/directions.npy`; the first `n_cells` sampled cells."""
    model = sl.load_model(progress=False)
    n_layers = int(model.cfg.n_layers)
    train = sl.ContrastivePairs.load("sentiment")[:FITTED_ON]
    directions = sl.fit_directions(sl.collect_differences(model, train))
    np.save(out / "directions.npy", directions.vectors[:n_layers].numpy())
    test = sl.ContrastivePairs.load("sentiment", split="test")[:n_pairs]
    tokenized = sl.engine.tokenize_pairs(model, test)
    extraction = extraction_pairs()
    extract = sl.engine.tokenize_pairs(model, extraction)
    tokenizer = model.tokenizer
    cells: list[Cell] = [(layer, c) for layer in SAMPLED_LAYERS for c in SAMPLED_COEFFICIENTS]
    work = Work(
        model_folder=str(_model_folder()),
        directions_file=str(out / "directions.npy"),
        n_layers=n_layers,
        pad_id=int(tokenizer.pad_token_id or 0),
        batch_size=batch_size,
        continuation=CONTINUATION,
        continuation_ids=tokenizer(CONTINUATION, add_special_tokens=False)["input_ids"],
        positive=[list(prompt.prompt) for prompt in tokenized.positive],
        negative=[list(prompt.prompt) for prompt in tokenized.negative],
        extract_texts=[
            [render(pair.positive, tokenizer), render(pair.negative, tokenizer)]
            for pair in extraction
        ],
        extract_positive=[list(prompt.prompt) for prompt in extract.positive],
        extract_negative=[list(prompt.prompt) for prompt in extract.negative],
        layers=list(range(n_layers)),
        coefficients=COEFFICIENTS,
        sampled_cells=cells[:n_cells],
    )
    work.write(out / "work.json")
    return out / "work.json"


def extraction_pairs() -> sl.ContrastivePairs:
    """256 pairs: all of `sentiment`, and its first 36 again under other ids.

    No contender keeps anything from one prompt for the next, so a repeated one costs as much.
    """
    both = [
        *sl.ContrastivePairs.load("sentiment"),
        *sl.ContrastivePairs.load("sentiment", split="test"),
    ]
    again = [replace(pair, id=f"{pair.id}-again") for pair in both[: EXTRACTED - len(both)]]
    return sl.ContrastivePairs((*both, *again), "sentiment, all")


def environment(out: Path, name: str) -> str:
    """The Python of the peer's own environment under `out`, made where it is missing.

    torch goes first and alone: at this version it is the build for the CPU, which the rest then
    finds installed.
    """
    folder = out / f"venv-{name}"
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    requirements = HERE / f"requirements-{name}.txt"
    stamp = folder / "installed.txt"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != requirements.read_text("utf-8"):
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, TORCH], check=True)
        subprocess.run([*install, TORCH, "-r", str(requirements)], check=True)
        stamp.write_text(requirements.read_text(encoding="utf-8"), encoding="utf-8")
    return str(python)


def _model_folder() -> Path:
    wheel = PACKAGED_MODELS[DEFAULT_MODEL].wheel_sha256
    return cache_folder() / f"{DEFAULT_MODEL}-{wheel[:12]}"
