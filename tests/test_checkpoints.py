"""Checkpoints that are not what they say: named, and refused before they cost anything."""

import json
import re
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import transformers
from conftest import build_gpt2, build_llama, build_tokenizer, needs_bridge
from safetensors.torch import load_file, save_file
from surprises import watched
from test_models import logits

import steerlens as sl
from steerlens.errors import MemoryLimitError, ModelError

SMALL: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
UP = "model.layers.1.mlp.up_proj.weight"
Weights = dict[str, torch.Tensor]


def save(model: Any, folder: Path, **options: Any) -> Path:
    model.save_pretrained(folder, **options)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of `build_llama(n_layers=2)`."""
    return save(build_llama(n_layers=2), tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "model")


def rewrite(folder: Path, change: Callable[[Weights], Any], form: str = "safetensors") -> Path:
    """The folder with its weights changed, in one of the forms that are in use."""
    weights = load_file(folder / "model.safetensors")
    change(weights)
    (folder / "model.safetensors").unlink()
    if form == "safetensors":
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    elif form == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        names = sorted(weights)
        places = {
            name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(names)
        }
        for file in set(places.values()):
            part = {name: weights[name] for name in names if places[name] == file}
            save_file(part, folder / file, {"format": "pt"})
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def set_config(folder: Path, **settings: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


def refusal(folder: Path | str, kind: type[Exception] = ModelError) -> str:
    with pytest.raises(kind) as error:
        sl.load_model(folder, progress=False)
    assert "\n" not in str(error.value)
    return str(error.value)


# Weights


@pytest.mark.parametrize("form", ["safetensors", "sharded", "bin"])
def test_missing_renamed_and_misshapen_weights_are_named(form: str, copy: Path) -> None:
    """Hugging Face fills them at random; the positive control is the same folder, put right."""
    kept = shutil.copytree(copy, copy.parent / "kept")

    def renamed(weights: Weights) -> None:
        weights["model.layers.1.mlp.higher.weight"] = weights.pop(UP)
        weights["lm_head.weight"] = weights["lm_head.weight"][:100].clone()
        del weights["model.norm.weight"]

    message = refusal(rewrite(copy, renamed, form))
    for words in (
        str(copy),
        f"missing from it: {UP}, model.norm.weight;",
        "of another shape: lm_head.weight ((100, 32) instead of (160, 32));",
        "left over: model.layers.1.mlp.higher.weight;",
    ):
        assert words in message
    found = logits(sl.load_model(rewrite(kept, lambda weights: None, form), progress=False))
    torch.testing.assert_close(found, logits(build_llama(n_layers=2)), rtol=1e-4, atol=1e-4)


def test_the_weights_of_other_heads_and_depths_are_named(copy: Path, tmp_path: Path) -> None:
    config = build_llama(n_layers=2).config
    other = save(transformers.LlamaForSequenceClassification(config), tmp_path / "other")
    message = refusal(other)
    assert "(its config says LlamaForSequenceClassification)" in message
    assert "missing from it: lm_head.weight; left over: score.weight" in message
    tied = transformers.GPT2ForSequenceClassification(build_gpt2().config)
    assert "left over: score.weight" in refusal(save(tied, tmp_path / "tied"))
    bare = save(transformers.LlamaModel(config), tmp_path / "bare")
    assert "missing from it: lm_head.weight;" in refusal(bare)
    message = refusal(set_config(copy, num_hidden_layers=1))
    assert "left over: model.layers.1.input_layernorm.weight" in message
    assert "and 3 more" in message


def test_a_config_of_two_minds_is_refused(copy: Path) -> None:
    message = refusal(set_config(copy, architectures=["BertModel"]))
    assert "architectures BertModel" in message
    assert "'llama'" in message
    sl.load_model(set_config(copy, architectures=["LlamaForCausalLM"]), progress=False)


@pytest.mark.parametrize("kind", ["tied", "bare", "inv_freq", "masks"])
def test_a_whole_checkpoint_may_lack_tied_weights_and_have_old_buffers(
    kind: str, copy: Path, tmp_path: Path
) -> None:
    if kind == "inv_freq":
        name = "model.layers.0.self_attn.rotary_emb.inv_freq"
        folder = rewrite(copy, lambda weights: weights.update({name: torch.ones(4)}))
        expected = build_llama(n_layers=2)
    else:
        expected = build_gpt2()
        assert expected.lm_head.weight is expected.transformer.wte.weight
        folder = save(expected.transformer if kind == "bare" else expected, tmp_path / "other")
        if kind == "masks":
            masks = {
                "h.0.attn.bias": torch.ones(1, 1, 64, 64),
                "h.0.attn.masked_bias": torch.ones(1),
            }
            masks = {f"transformer.{name}": mask for name, mask in masks.items()}
            rewrite(folder, lambda weights: weights.update(masks))
    found = logits(sl.load_model(folder, progress=False))
    torch.testing.assert_close(found, logits(expected), rtol=1e-4, atol=1e-4)


@needs_bridge
def test_a_hub_id_is_checked_as_a_folder_is(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a hub's cache on the disk, through the code that would fetch it."""
    hub, commit = tmp_path / "hub", "0" * 40
    snapshot = hub / "models--owner--name" / "snapshots" / commit
    shutil.copytree(copy, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(commit)
    for name, value in (("HF_HUB_OFFLINE", True), ("HF_HUB_CACHE", str(hub))):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    sl.load_model("owner/name", progress=False)
    rewrite(snapshot, lambda weights: weights.pop(UP))
    assert f"'owner/name' is no whole checkpoint of LlamaForCausalLM: missing from it: {UP}" in (
        refusal("owner/name")
    )


# Kinds


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("BertForMaskedLM", "BertForMaskedLM, an encoder,"),
        ("BertModel", "BertModel, an encoder,"),
        ("RobertaForMaskedLM", "RobertaForMaskedLM, an encoder,"),
        ("T5ForConditionalGeneration", "T5ForConditionalGeneration, an encoder-decoder;"),
        ("BartForConditionalGeneration", "BartForConditionalGeneration, an encoder-decoder;"),
    ],
)
def test_what_is_no_causal_language_model_is_refused_by_its_config(
    kind: str, words: str, tmp_path: Path
) -> None:
    """Before a weight is read: there are none that could be."""
    cls = getattr(transformers, kind)
    config = cls.config_class(architectures=[kind])
    config.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"none")
    assert f"the checkpoint is of {words}" in refusal(tmp_path)


TEXT = SMALL | {"num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
LINEAR = {f"linear_{side}_head_dim": 8 for side in ("key", "value")}
LINEAR |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
MULTIMODAL: dict[str, dict[str, Any]] = {
    "Gemma3": {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
    "Gemma4": {
        "text_config": TEXT
        | {"hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0, "global_head_dim": 8},
        "vision_config": VISION | {"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8},
    },
    "Mistral3": {
        "text_config": TEXT | {"model_type": "ministral3"},
        "vision_config": VISION | {"model_type": "pixtral"},
        "tie_word_embeddings": False,
    },
    "Qwen3_5": {
        "text_config": TEXT | LINEAR | {"layer_types": ["linear_attention", "full_attention"]},
        "vision_config": {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16}
        | {"out_hidden_size": 32, "num_position_embeddings": 16},
    },
}


def multimodal(kind: str, folder: Path) -> Any:
    """A multimodal model, saved in the folder."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**MULTIMODAL[kind])
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    save(model, folder)
    return model


@needs_bridge
@pytest.mark.parametrize("kind", MULTIMODAL)
def test_of_a_multimodal_model_the_text_part_is_loaded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TransformerLens would have pip install torchvision, which may bring another torch along."""
    monkeypatch.setitem(sys.modules, "torchvision", None)
    whole = multimodal(kind, tmp_path)
    with watched(tmp_path) as seen:
        model = sl.load_model(tmp_path, progress=False)
    assert seen == []
    torch.testing.assert_close(logits(model), logits(whole), rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "config.json").read_text())
    text = config["text_config"]
    types = text.get("layer_types", ["full_attention"])
    text |= {"num_hidden_layers": 1, "layer_types": types[:1]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "layers.1" in refusal(tmp_path)


@needs_bridge
def test_a_multimodal_model_without_a_text_part_needs_torchvision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = "Emu3ForConditionalGeneration"
    transformers.Emu3Config(architectures=[kind]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"none")
    for is_there, words in ((False, f"{kind}, a multimodal model"), (True, "cannot load")):
        there = ModuleType("torchvision") if is_there else None
        monkeypatch.setitem(sys.modules, "torchvision", there)
        with watched(tmp_path) as seen:
            message = refusal(tmp_path)
        assert seen == []
        assert words in message
        assert ("pip install torchvision" in message) is not is_there


# Sizes


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("hidden_size", 10**9, "cannot load|GB of weights"),
        ("hidden_size", 32_000, "GB of weights, and the checkpoint's files have"),
        ("intermediate_size", 10**8, "GB of weights"),
        ("vocab_size", 10**12, "GB of weights"),
        ("vocab_size", 10**8, "25.60 GB of weights"),
        ("num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, and no model has more than"),
        ("num_labels", 10**9, "num_labels is 1000000000"),
        ("text_config", {"num_local_experts": 10**9}, "num_local_experts is 1000000000"),
    ],
)
def test_a_config_that_asks_for_gigabytes_gets_none(
    setting: str, value: Any, words: str, copy: Path
) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refusal(set_config(copy, **{setting: value}))
    assert re.search(words, message)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KB


def test_a_model_larger_than_the_machine_is_refused(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sl.load_model(copy, progress=False)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=50_000))
    message = refusal(copy, MemoryLimitError)
    assert "bytes in float32, and this machine has 50,000 bytes" in message


# Tokenizers


def test_a_folder_without_a_tokenizer_is_told_of_in_a_whole_sentence(copy: Path) -> None:
    for path in copy.glob("*token*"):
        path.unlink()
    message = refusal(copy)
    assert "has no tokenizer, such as tokenizer.json" in message
    assert "convert a slow tokenizer to a fast one" in message  # the last words of transformers


def test_a_pad_token_beyond_the_vocabulary_is_named_with_it(copy: Path) -> None:
    message = refusal(set_config(copy, pad_token_id=160))
    assert "pad_token_id 160" in message
    assert "vocab_size 160" in message
    sl.load_model(set_config(copy, pad_token_id=None), progress=False)
