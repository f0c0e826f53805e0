"""Vectors baked into a checkpoint: Hugging Face gives the hooked model's logits."""

import json
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import bridge, build_llama, build_tokenizer
from exported import ROW, ROWS, TOKENS, hugging_face, logits, steered
from zoo import bridged

import steerlens as sl
from steerlens.errors import InputError
from steerlens.steering.export import CARRIERS


def new_file(folder: Path) -> Path:
    (folder / "any").touch()
    return folder / "any"


def modes(folder: Path) -> set[int]:
    return {stat.S_IMODE(path.stat().st_mode) for path in folder.rglob("*")}


@pytest.mark.parametrize("kind", CARRIERS)
def test_a_baked_checkpoint_gives_the_hooked_logits(kind: str, tmp_path: Path) -> None:
    model = bridge(hugging_face(kind))
    vector = sl.SteeringVector.from_vectors(ROWS)
    plain = logits(model)
    sl.export.bake(model, vector, -1.5, tmp_path / "baked")
    baked = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()
    ours = steered(model, vector, -1.5)
    largest = float(ours.abs().max())
    torch.testing.assert_close(logits(baked), ours, rtol=0, atol=1e-4 * max(1, largest))
    assert float((logits(baked) - plain).abs().max()) > 0.01 * largest
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "baked")
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    record = json.loads((tmp_path / "baked" / "steerlens.json").read_text())
    added = record["added"]["blocks.2.hook_resid_post"]
    assert added["bias"] in dict(baked.named_parameters())
    assert added["residual_units"] == pytest.approx(-1.5 * float(vector.scale[1]))
    assert record["coefficient"] == "-1.5"
    assert modes(tmp_path / "baked") == {stat.S_IMODE(new_file(tmp_path).stat().st_mode)}
    # The model itself is as it was.
    assert torch.equal(logits(model), plain)


def everywhere(model: Any, *parts: str, direction: torch.Tensor = ROW) -> sl.SteeringVector:
    """A direction ablated at these hooks of all blocks."""
    hooks = sl.resolve_hooks(model, [f"blocks.*.hook_resid_{part}" for part in parts])
    vector = sl.SteeringVector.from_vectors(dict.fromkeys(hooks, direction))
    return replace(vector, operator=sl.Ablate())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "opt", "phi", "qwen3", "mistral"])
def test_an_ablation_is_baked_into_what_is_written(kind: str, tmp_path: Path) -> None:
    model = bridge(hugging_face(kind))
    side_by_side = kind in ("gpt_neox", "phi")
    vector = everywhere(model, "pre", *([] if side_by_side else ["mid"]), "post")
    plain, ours = logits(model), steered(model, vector, 1)
    sl.export.bake(model, vector, 1, tmp_path / "baked")
    baked = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()
    torch.testing.assert_close(logits(baked), ours, rtol=0, atol=1e-4 * float(ours.abs().max()))
    assert float((ours - plain).abs().max()) > 1e-3 * float(ours.abs().max())
    states = baked(TOKENS, output_hidden_states=True).hidden_states[:-1]
    states = torch.stack(states).detach()
    along = states @ (ROW / ROW.norm())
    assert float(along.abs().max()) < 1e-5 * float(states.abs().max())
    assert torch.equal(logits(model), plain)


def test_which_ablations_cannot_be_baked(tmp_path: Path, llama: Any) -> None:
    whole = everywhere(llama, "pre", "mid", "post")
    other = dict.fromkeys(whole.hook_names, ROW) | {whole.hook_names[0]: torch.arange(1.0, 33.0)}
    two = replace(sl.SteeringVector.from_vectors(other), operator=sl.Ablate())
    gemma = bridge(hugging_face("gemma2"))
    for model, vector, amount, message in (
        (llama, everywhere(llama, "post"), 1, "has to act at .*differs at blocks.0.hook_resid_mid"),
        (llama, whole, 0.5, "ablated whole: coefficient 1"),
        (llama, two, 1, "one direction"),
        (gemma, everywhere(gemma, "pre", "mid", "post"), 1, "differ from the hooked model's"),
    ):
        with pytest.raises(InputError, match=message):
            sl.export.bake(model, vector, amount, tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_what_cannot_be_baked(tmp_path: Path, llama: Any) -> None:
    vector = sl.SteeringVector.from_vectors(ROWS)
    qwen, gemma = (bridge(hugging_face(kind)) for kind in ("qwen3", "gemma2"))
    mistral = bridged("Mistral")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    processed = bridge(build_llama())
    processed.enable_compatibility_mode()
    narrow = sl.SteeringVector.from_vectors({"blocks.1.hook_resid_post": torch.ones(4)})
    for model, of_vector, coefficient, folder, message in (
        (qwen, vector, 1.0, "baked", "'qwen3' checkpoints have no bias .* norms queries and keys"),
        (gemma, vector, 1.0, "baked", "norms what its MLP adds"),
        (mistral, vector, 1.0, "baked", "attends to 6 tokens only"),
        (llama, vector, "0%", "baked", "coefficient 0"),
        (llama, vector, 1.0, "full", "not empty"),
        (processed, vector, 1.0, "baked", "without weight processing"),
        (llama, narrow, 1.0, "baked", "d_model 4"),
    ):
        with pytest.raises(InputError, match=message):
            sl.export.bake(model, of_vector, coefficient, tmp_path / folder)
    assert not (tmp_path / "baked").exists()


def test_a_model_that_is_not_what_its_weights_say_is_not_baked(tmp_path: Path) -> None:
    model = bridge(build_llama())
    handle = model.original_model.lm_head.register_forward_hook(lambda m, i, out: out * 1.01)
    vector = sl.SteeringVector.from_vectors(ROWS)
    with pytest.raises(InputError, match="differ from the hooked model's by"):
        sl.export.bake(model, vector, 1.0, tmp_path / "baked")
    handle.remove()
    sl.export.bake(model, vector, 1.0, tmp_path / "baked")
