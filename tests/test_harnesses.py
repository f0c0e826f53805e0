"""Vectors in lm-evaluation-harness, EasySteer and PEFT, by their rules.

The tools themselves are in `make test-elsewhere`.
"""

import base64
import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import bridge, build_gpt2, build_llama
from exported import ROW, ROWS, logits, steered
from safetensors.torch import load_file
from zoo import ZOO
from zoo import hugging_face as of_zoo

import steerlens as sl
from steerlens.errors import InputError
from steerlens.steering import Calibration


def by_the_harness(model: Any, path: Path) -> torch.Tensor:
    """Its logits as `lm_eval.models.hf_steered` (0.4.13) adds and clamps."""
    handles = []
    modules = dict(model.base_model.named_modules())
    for name, entry in torch.load(path, weights_only=True).items():
        assert set(entry) == {
            *("steering_vector", "steering_coefficient", "action", "bias", "head_index")
        }

        def act(_module: Any, _inputs: Any, output: Any, entry: Any = entry) -> Any:
            acts = output[0] if isinstance(output, tuple) else output
            row, amount = entry["steering_vector"], entry["steering_coefficient"]
            if entry["action"] == "add":
                acts = acts + row * amount
            else:
                unit = row / row.norm()
                acts = acts + unit * (amount - (acts * unit).sum(-1, keepdim=True))
            return (acts, *output[1:]) if isinstance(output, tuple) else acts

        handles.append(modules[name].register_forward_hook(act))
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize("operator", [sl.Add(), sl.Clamp(3.0)], ids=str)
@pytest.mark.parametrize("build", [build_llama, build_gpt2])
def test_the_harness_adds_and_clamps_as_here(build: Any, operator: Any, tmp_path: Path) -> None:
    model = bridge(build())
    origin = sl.steering.Origin.of_model(model)
    vector = replace(sl.SteeringVector.from_vectors(ROWS, origin=origin), operator=operator)
    coefficient = 4 if isinstance(operator, sl.Add) else 1
    sl.export.to_lm_eval(vector, tmp_path / "v.pt", coefficient)
    theirs = by_the_harness(build(), tmp_path / "v.pt")
    assert (theirs - steered(model, vector, coefficient)).abs().max() < 1e-4
    assert (theirs - logits(model)).abs().max() > 0.1


def by_easysteer(model: Any, path: Path) -> torch.Tensor:
    """Its logits by the rules of EasySteer's vLLM (`vllm.steer_vectors`, commit 6267ca0)."""
    (spec,) = json.loads(path.read_text())["vectors"]
    payload, layers = spec["data"], model.base_model.layers
    assert spec["apply"] == {"prompt": "all", "generation": "all"}
    assert (payload["version"], payload["kind"], payload["extra"]) == (1, "direction", {})
    digest, handles = hashlib.sha256(b"direction:1"), []
    for name in sorted(payload["tensors"]):
        tensor = payload["tensors"][name]
        content = base64.b64decode(tensor["data"])
        digest.update(f"{name}{tuple(tensor['shape'])}".encode() + content)
        row = spec["scale"] * torch.tensor(np.frombuffer(content, np.float32))
        assert list(row.shape) == tensor["shape"]

        def act(_module: Any, _inputs: Any, output: Any, row: torch.Tensor = row) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            along = (hidden @ row / (row @ row + 1e-8))[..., None] * row
            hidden = hidden + row if spec["algorithm"] == "direct" else hidden - along
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        number = int(name.removeprefix("layer."))
        assert number in spec["layers"]
        handles.append(layers[number].register_forward_hook(act))
    assert payload["sha256"] == digest.hexdigest()
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize(
    ("operator", "coefficient"), [(sl.Add(), 4), (sl.Add(), "50%"), (sl.Ablate(), 1)], ids=str
)
def test_easysteer_adds_and_erases_as_here(
    operator: Any, coefficient: Any, llama: Any, tmp_path: Path
) -> None:
    rows = {f"blocks.{block}.hook_resid_post": ROW.roll(block) for block in (2, 0)}
    known = Calibration(*torch.tensor([[50.0, 60], [-4, -5], [8, 16]]), "kl=0.1", "neutral")
    vector = replace(sl.SteeringVector.from_vectors(rows), operator=operator, calibration=known)
    sl.export.to_easysteer(vector, tmp_path / "v.json", coefficient)
    theirs = by_easysteer(build_llama(), tmp_path / "v.json")
    assert (theirs - steered(llama, vector, coefficient)).abs().max() < 1e-4
    assert (theirs - logits(llama)).abs().max() > 0.1
    refused = (({"operator": sl.Rotate()}, 30), ({"operator": sl.Ablate()}, 0.5), ({}, 0))
    for change, strength in refused:
        with pytest.raises(InputError, match=r"carry rotate|ablates whole|coefficient 0"):
            sl.export.to_easysteer(replace(vector, **change), tmp_path / "w.json", strength)
    assert not (tmp_path / "w.json").exists()


@pytest.mark.parametrize("kind", ZOO)
def test_the_harness_finds_the_blocks_of_every_architecture(kind: str, tmp_path: Path) -> None:
    model = of_zoo(kind)
    origin = sl.steering.Origin(architecture=model.config.model_type)
    vector = sl.SteeringVector.from_vectors(ROWS, origin=origin)
    sl.export.to_lm_eval(vector, tmp_path / "v.pt", 1)
    names = torch.load(tmp_path / "v.pt", weights_only=True)
    assert len(names) == 2
    assert set(names) <= {name for name, _ in model.base_model.named_modules()}


@pytest.mark.parametrize("build", [build_llama, build_gpt2])
def test_an_adapter_is_a_bias_beside_zero_matrices(build: Any, tmp_path: Path) -> None:
    model = bridge(build())
    vector = sl.SteeringVector.from_vectors(ROWS)
    sl.export.to_peft(model, vector, 4, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["lora_bias"], config["r"]) == ("LORA", True, 1)
    weights = {
        name: module.weight
        for name, module in build().named_modules()
        if name in config["target_modules"]
    }
    assert len(weights) == len(ROWS)
    for (name, weight), row in zip(weights.items(), vector.rows, strict=True):
        prefix = f"base_model.model.{name}.lora_"
        assert not tensors[f"{prefix}A.weight"].any()
        assert not tensors[f"{prefix}B.weight"].any()
        torch.testing.assert_close(tensors[f"{prefix}B.bias"], 4 * row)
        n_in = weight.shape[0] if build is build_gpt2 else weight.shape[1]
        assert tensors[f"{prefix}A.weight"].shape == (1, n_in)
        assert tensors[f"{prefix}B.weight"].shape == (32, 1)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("Gemma 2", "the adapter's logits differ"),
        ("OLMo 2", "the adapter's logits differ"),
        ("Mixtral", "no matrix 'model.layers.1.mlp.down_proj'"),
        ("Qwen3", None),  # no bias to bake into, but a matrix to add behind
    ],
)
def test_what_no_adapter_can_carry(kind: str, words: str | None, tmp_path: Path) -> None:
    model = bridge(of_zoo(kind))
    vector = sl.SteeringVector.from_vectors(ROWS)
    if words is None:
        sl.export.to_peft(model, vector, 4, tmp_path / "adapter")
        return
    with pytest.raises(InputError, match=words):
        sl.export.to_peft(model, vector, 4, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "coefficient", "words"),
    [
        ({"operator": sl.Ablate()}, 1, "it cannot carry ablate"),
        ({"operator": sl.Clamp(3.0)}, 0.5, "it cannot carry clamp|clamps whole"),
        ({}, 0, "coefficient 0"),
    ],
)
def test_what_harness_and_adapter_refuse(
    change: dict[str, Any], coefficient: float, words: str, llama: Any, tmp_path: Path
) -> None:
    origin = sl.steering.Origin.of_model(llama)
    vector = replace(sl.SteeringVector.from_vectors(ROWS, origin=origin), **change)
    with pytest.raises(InputError, match=words):
        sl.export.to_lm_eval(vector, tmp_path / "v.pt", coefficient)
    with pytest.raises(InputError, match=words):
        sl.export.to_peft(llama, vector, coefficient, tmp_path / "adapter")
    with pytest.raises(InputError, match="which architecture"):
        sl.export.to_lm_eval(sl.SteeringVector.from_vectors(ROWS), tmp_path / "v.pt", 4)
    other = sl.SteeringVector.from_vectors({"blocks.1.hook_mlp_out": ROW})
    with pytest.raises(InputError, match="block outputs"):
        sl.export.to_lm_eval(replace(other, operator=sl.Clamp(1.0)), tmp_path / "v.pt", 1)
    assert not list(tmp_path.iterdir())
