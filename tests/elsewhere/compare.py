"""Do other tools load our files, and give our logits and texts? Exits with 1 if not.

    python compare.py --client PYTHON --older PYTHON

The first is an interpreter with lm-evaluation-harness, PEFT, Inspect and steerlens, the second one
with what asks for an older transformers: repeng and steering-vectors. The models are tiny random
ones, saved to a disk; nothing is fetched. A task of two choices runs in the harness with and
without the vector; one of texts runs in Inspect at three coefficients.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import bridge, build_gpt2, build_llama, build_tokenizer
from zoo import hugging_face

import steerlens as sl

CLOSE = 1e-4
TOKENS = torch.tensor([[1, 7, 9, 11, 6], [1, 8, 5, 20, 30]])
TASK = """task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["good", "bad"]
doc_to_target: label
metric_list: [{{metric: acc}}]
"""
TEXTS = ("the soup is", "the day was so", "I felt", "you are very")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--client", required=True)
    parser.add_argument("--older", required=True)
    given = parser.parse_args()
    is_right = True
    for name, build in BUILDS.items():
        with tempfile.TemporaryDirectory() as folder:
            is_right &= compare(name, build, given.client, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        is_right &= compare_older(given.older, Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        is_right &= compare_inspect(given.client, Path(folder))
    sys.exit(0 if is_right else 1)


BUILDS: dict[str, Callable[[], Any]] = {
    "Llama": build_llama,
    "GPT-2": build_gpt2,
    **{kind: lambda kind=kind: hugging_face(kind) for kind in ("GPT-NeoX", "OPT", "Qwen3")},
}


def compare(name: str, build: Callable[[], Any], client: str, folder: Path) -> bool:
    """Print what the tools make of one model's vector; whether it is what it is here."""
    model, vector = saved(build, folder)
    sl.export.to_lm_eval(vector, folder / "v.pt", 2)
    sl.export.to_peft(model, vector, 2, folder / "adapter")
    torch.save(TOKENS, folder / "tokens.pt")
    write_task(folder / "task")
    run(client, "client.py", folder)
    theirs = torch.load(folder / "logits.pt")
    with torch.no_grad():
        plain = model(TOKENS)
        with sl.steer(model, vector, 2):
            steered = model(TOKENS)
    expected = {"lm_eval hf": plain, "lm_eval steered": steered, "peft": steered}
    off = {tool: float((theirs[tool] - ours).abs().max()) for tool, ours in expected.items()}
    moved = float((steered - plain).abs().max())
    scores = json.loads((folder / "scores.json").read_text())
    answers = [torch.tensor(scores[kind]["loglikelihoods"]) for kind in ("hf", "steered")]
    ours = [answered(model, vector, coefficient) for coefficient in (0, 2)]
    off["task"] = max(float((a - b).abs().max()) for a, b in zip(answers, ours, strict=True))
    print(f"{name}: the vector moves logits by {moved:.3g}; largest differences from ours:")
    for tool, gap in off.items():
        print(f"  {tool}: {gap:.2g}")
    print(f"  accuracy {scores['hf']['acc']} without, {scores['steered']['acc']} with")
    return max(off.values()) < CLOSE < moved


def saved(build: Callable[[], Any], folder: Path) -> tuple[Any, sl.SteeringVector]:
    """The model, and a vector on it; its checkpoint is in the folder's `model`."""
    tokenizer = build_tokenizer()
    build().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    model = bridge(build(), tokenizer)
    width = int(model.cfg.d_model)
    rows = {f"blocks.{n}.hook_resid_post": torch.linspace(-1, 2, width).roll(n) for n in (0, 1)}
    origin = sl.steering.Origin.of_model(model)
    return model, sl.SteeringVector.from_vectors(rows, origin=origin)


def run(client: str, script: str, folder: Path) -> None:
    """Run a client in its environment, without a network."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    path = Path(__file__).parent / script
    subprocess.run(
        [client, "-W", "ignore", str(path), str(folder)], check=True, env=os.environ | offline
    )


def compare_older(client: str, folder: Path) -> bool:
    """Print what repeng makes of the .gguf and steering-vectors of its .pt; whether it is right."""
    model, whole = saved(build_llama, folder)
    vector = whole.at(1)  # a .gguf has no place for block 0
    sl.export.to_gguf(vector, folder / "v.gguf")
    sl.export.save_steering_vectors(whole, folder / "v.pt")
    torch.save(TOKENS, folder / "tokens.pt")
    run(client, "older_client.py", folder)
    theirs, is_right = torch.load(folder / "logits.pt"), True
    for tool, ours in (("repeng", vector), ("steering-vectors", whole)):
        with torch.no_grad():
            plain = model(TOKENS)
            with sl.steer(model, ours, 2):
                steered = model(TOKENS)
        off, moved = (float((a - steered).abs().max()) for a in (theirs[tool], plain))
        print(f"{tool}: the vector moves logits by {moved:.3g}; off by {off:.2g}")
        is_right &= off < CLOSE < moved
    return is_right


def compare_inspect(client: str, folder: Path) -> bool:
    """Print what Inspect's task got at each coefficient; whether it is what is written here."""
    model, vector = saved(build_llama, folder)
    vector.save(folder / "v.safetensors")
    coefficients = (0, 2, -2)
    asked = {"texts": TEXTS, "coefficients": coefficients}
    (folder / "inspect.json").write_text(json.dumps(asked))
    run(client, "inspect_client.py", folder)
    found = json.loads((folder / "inspected.json").read_text())
    ours = {
        str(c): [sl.generate(model, text, vector, c, max_new_tokens=8) for text in TEXTS]
        for c in coefficients
    }
    scores = {c: sum("a" in text for text in texts) / len(texts) for c, texts in ours.items()}
    for c, texts in ours.items():
        print(f"Inspect at {c}: {found['scores'][c]} with an a; here {scores[c]}: {texts}")
    differ = len({tuple(texts) for texts in ours.values()}) == len(coefficients)
    refused, drawn = found.pop("refused"), found.pop("drawn")
    words = ("do top_p", "not 0.5 with seed 0", "not 1.0 with seed None", "without a vector")
    words += ("extra_body has coeficient",)
    print(f"  draws {drawn} and refuses:", *refused, sep="\n    ")
    texts = sl.steering.generate_texts(
        *(model, [sl.engine.tokenize_prompt(model, "the day")], {}, [0]),
        max_new_tokens=8,
        samples=2,
        seed=3,
    )
    is_told = all(word in said for word, said in zip(words, refused, strict=True))
    is_drawn = drawn == [sl.steering.decoded(model, text.ids) for text in texts]
    is_same = found == {"written": ours, "swept": ours, "scores": scores}
    return differ and is_told and is_drawn and is_same


def write_task(folder: Path) -> None:
    """A task of the harness: which of two words goes on."""
    folder.mkdir()
    lines = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(TEXTS)]
    (folder / "choices.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "choices.yaml").write_text(TASK.format(file=folder / "choices.jsonl"))


def answered(model: Any, vector: sl.SteeringVector, coefficient: float) -> torch.Tensor:
    """The logprob of each choice after each text, here."""
    rows = []
    for text in TEXTS:
        ids = torch.tensor([model.tokenizer(text, add_special_tokens=False).input_ids])
        with torch.no_grad(), sl.steer(model, vector, coefficient):
            logprobs = model(ids)[0, -1].log_softmax(-1)
        choices = model.tokenizer.convert_tokens_to_ids(["good", "bad"])
        rows.append([float(logprobs[choice]) for choice in choices])
    return torch.tensor(rows)


if __name__ == "__main__":
    main()
