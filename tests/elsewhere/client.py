"""Run in an environment with lm_eval and peft: what they make of our files.

    python client.py FOLDER

FOLDER has a checkpoint, `v.pt`, `adapter`, `tokens.pt` and the task `choices`; `logits.pt` gets the
logits of each tool, `scores.json` the task's results with and without the vector.
"""

import json
import sys
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager
from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(folder: Path) -> None:
    tokens = torch.load(folder / "tokens.pt")
    kinds: dict[str, dict[str, Any]] = {"hf": {}, "steered": {"steer_path": str(folder / "v.pt")}}
    found, scores = {}, {}
    for kind, options in kinds.items():
        model = get_model(kind)(
            pretrained=str(folder / "model"), device="cpu", dtype="float32", **options
        )
        found[f"lm_eval {kind}"] = model._model_call(tokens)
        done = lm_eval.simple_evaluate(
            model, tasks=["choices"], task_manager=TaskManager(include_path=str(folder / "task"))
        )
        scores[kind] = {
            "acc": done["results"]["choices"]["acc,none"],
            "loglikelihoods": [
                [float(answer[0]) for answer in sample["filtered_resps"]]
                for sample in done["samples"]["choices"]
            ],
        }
    base = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()
        found["peft"] = adapted(tokens).logits
    torch.save(found, folder / "logits.pt")
    (folder / "scores.json").write_text(json.dumps(scores))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
