"""Run in an environment with repeng and steering-vectors: what they make of our files.

    python older_client.py FOLDER

FOLDER has a checkpoint, `v.gguf`, `v.pt` and `tokens.pt`; `logits.pt` gets the logits of each tool.
"""

import sys
from pathlib import Path

import torch
from repeng import ControlModel, ControlVector
from steering_vectors import SteeringVector
from transformers import AutoModelForCausalLM


def main(folder: Path) -> None:
    tokens = torch.load(folder / "tokens.pt")
    fields = torch.load(folder / "v.pt")
    found = {}
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
        with SteeringVector(**fields).apply(base, multiplier=2):
            found["steering-vectors"] = base(tokens).logits
        vector = ControlVector.import_gguf(folder / "v.gguf")
        model = ControlModel(base, list(vector.directions))
        model.set_control(vector, 2.0)
        n_prompts, n_tokens = tokens.shape
        positions = torch.arange(n_tokens).expand(n_prompts, n_tokens)
        found["repeng"] = model(tokens, position_ids=positions).logits
    torch.save(found, folder / "logits.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
