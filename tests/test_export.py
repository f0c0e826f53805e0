"""Vectors in other tools: an export is right when the target's logits are ours."""

import base64
import copy
import hashlib
import json
import math
import stat
import struct
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import steering_vectors
import torch
import transformers
from conftest import bridge, build_gpt2, build_llama, build_tokenizer
from safetensors.torch import load_file
from zoo import ZOO
from zoo import hugging_face as of_zoo

import steerlens as sl
from steerlens.errors import InputError
from steerlens.steering import Calibration
from steerlens.steering.export import CARRIERS

TOKENS = torch.tensor([[1, 7, 9, 11, 6], [1, 8, 5, 20, 30]])
ROWS = {
    f"blocks.{block}.hook_resid_post": torch.linspace(-1, 2, 32).roll(block) for block in (1, 2)
}
ROW = torch.linspace(-1, 2, 32)


@pytest.fixture
def vector(llama: Any, directions: sl.Directions) -> sl.SteeringVector:
    known = Calibration(
        torch.tensor([50.0, 60.0]),
        torch.tensor([-4.0, -5.0]),
        torch.tensor([8.0, math.inf]),
        "kl=0.1",
        "neutral",
    )
    made = sl.SteeringVector.from_directions(llama, directions, layers=[1, 2], dataset="many")
    return replace(made, calibration=known)


@pytest.fixture
def repeng(monkeypatch: pytest.MonkeyPatch) -> Any:
    """repeng 0.4.0 names one type that numpy 2 has dropped, in an annotation."""
    monkeypatch.setattr(np, "float_", np.float64, raising=False)
    import repeng

    return repeng


def write_gguf(
    path: Path,
    architecture: str,
    rows: dict[str, Any],
    order: gguf.GGUFEndian = gguf.GGUFEndian.LITTLE,
    **strings: str,
) -> None:
    """A GGUF file by the package itself, with what a control vector of ours does not hold."""
    writer = gguf.GGUFWriter(str(path), architecture, endianess=order)
    writer.add_array("words", ["a", "bc"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_bool("yes", True)
    for key, value in strings.items():
        writer.add_string(key if "." in key else f"{architecture}.{key}", value)
    for name, row in rows.items():
        writer.add_tensor(name, row)
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out = model(TOKENS)
    return getattr(out, "logits", out)


def steered(model: Any, vector: sl.SteeringVector, coefficient: Any) -> torch.Tensor:
    with sl.steer(model, vector, coefficient):
        return logits(model)


# llama.cpp's control vectors


def test_a_control_vector_by_its_format(vector: sl.SteeringVector, tmp_path: Path) -> None:
    sl.export.to_gguf(2.5 * vector, tmp_path / "v.gguf")
    reader = gguf.GGUFReader(str(tmp_path / "v.gguf"))
    assert reader.fields["general.architecture"].contents() == "controlvector"
    assert reader.fields["controlvector.model_hint"].contents() == "llama"
    assert reader.fields["controlvector.layer_count"].contents() == 2
    assert [tensor.name for tensor in reader.tensors] == ["direction.1", "direction.2"]
    for tensor, row in zip(reader.tensors, vector.rows, strict=True):
        assert tensor.data.dtype == np.float32
        np.testing.assert_allclose(tensor.data, 2.5 * row.numpy(), rtol=1e-6)


def test_gguf_and_back(vector: sl.SteeringVector, tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    sl.export.to_gguf(vector, path)
    assert sl.export.from_gguf(path) == vector
    backwards = vector.at(2, 1)
    sl.export.to_gguf(backwards, path)
    assert sl.export.from_gguf(path) == backwards
    sl.export.to_gguf(2.5 * vector, path)
    again = sl.export.from_gguf(path)
    torch.testing.assert_close(again.rows, 2.5 * vector.rows)
    assert again.origin == vector.origin
    assert again.calibration.budget == "kl=0.1"
    first = path.read_bytes()
    sl.export.to_gguf(2.5 * vector, path)
    assert path.read_bytes() == first


def test_control_vectors_of_other_tools(tmp_path: Path, llama: Any) -> None:
    path = tmp_path / "theirs.gguf"
    rows = {
        "direction.3": np.full(32, 0.5, np.float16),
        "direction.1": np.full(32, 2.0, np.float32),
    }
    write_gguf(path, "controlvector", rows, model_hint="llama")
    vector = sl.export.from_gguf(path)
    assert vector.hook_names == ("blocks.1.hook_resid_post", "blocks.3.hook_resid_post")
    torch.testing.assert_close(vector.rows, torch.tensor([[2.0] * 32, [0.5] * 32]))
    assert vector.origin.architecture == "llama"
    assert vector.origin.weights == "unknown"
    vector.check_model(llama)


def test_block_0_has_no_slot(vector: sl.SteeringVector, tmp_path: Path) -> None:
    whole = sl.SteeringVector.from_vectors({"blocks.0.hook_resid_post": torch.ones(4)})
    with pytest.raises(InputError, match="no slot for the output of block 0"):
        sl.export.to_gguf(whole, tmp_path / "v.gguf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operator": sl.Rotate()}, "cannot carry rotate"),
        (
            {"condition": sl.Condition("blocks.1.hook_resid_post", torch.ones(1) / 1, 0.0)},
            "cannot carry a conditional vector",
        ),
        ({"hook_names": ("blocks.1.hook_mlp_out",)}, "not at blocks.1.hook_mlp_out"),
    ],
)
def test_what_formats_that_only_add_cannot_carry(
    tmp_path: Path, change: dict[str, Any], message: str, repeng: Any, llama: Any
) -> None:
    good = sl.SteeringVector.from_vectors({"blocks.1.hook_resid_post": torch.ones(1)})
    bad = replace(good, **change)
    for export in (
        lambda v: sl.export.to_gguf(v, tmp_path / "v.gguf"),
        sl.export.to_repeng,
        lambda v: sl.export.bake(llama, v, 1.0, tmp_path / "baked"),
    ):
        with pytest.raises(InputError, match=message):
            export(bad)
    sl.export.to_gguf(good, tmp_path / "v.gguf")
    sl.export.to_repeng(good)


def test_files_that_are_no_control_vectors(vector: sl.SteeringVector, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"ends in \.gguf"):
        sl.export.to_gguf(vector, tmp_path / "v.safetensors")
    with pytest.raises(InputError, match="cannot write"):
        sl.export.to_gguf(vector, tmp_path / "missing" / "v.gguf")
    with pytest.raises(InputError, match="no GGUF file"):
        sl.export.from_gguf(tmp_path / "v.gguf")
    path = tmp_path / "v.gguf"
    sl.export.to_gguf(vector, path)
    whole = path.read_bytes()
    for length in [*range(0, len(whole) - 40, 101), len(whole) - 40]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError):
            sl.export.from_gguf(path)
    torch.save({}, path)
    with pytest.raises(InputError, match="pickle"):
        sl.export.from_gguf(path)
    for arch, name, data, message in (
        ("llama", "direction.1", np.ones(4, np.float32), "architecture 'llama'"),
        ("controlvector", "direction.x", np.ones(4, np.float32), "'direction.x'; expected"),
        ("controlvector", "direction.1", np.ones((2, 2), np.float32), r"shape \(2, 2\)"),
        ("controlvector", "direction.1", np.ones(4, np.int32), "I32"),
        ("controlvector", "direction.1", np.zeros(4, np.float32), "no direction"),
        ("controlvector", "direction.1", np.full(4, np.nan, np.float32), "no direction"),
    ):
        write_gguf(path, arch, {name: data})
        with pytest.raises(InputError, match=message):
            sl.export.from_gguf(path)


def test_headers_that_claim_too_much(tmp_path: Path) -> None:
    """Of 49 bytes, an array of 2^60 numbers: the reader would loop over it for ever."""
    begin = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"a"
    path = tmp_path / "v.gguf"
    for rest in (
        struct.pack("<IIQ", 9, 0, 2**60),
        struct.pack("<IIQ", 9, 9, 2**60),
        struct.pack("<IQ", 8, 2**60),
        struct.pack("<I", 99),
        struct.pack("<I", 4),
    ):
        path.write_bytes(begin + rest)
        with pytest.raises(InputError, match="not a whole GGUF file"):
            sl.export.from_gguf(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 2**60, 2**60))
    with pytest.raises(InputError, match="claims"):
        sl.export.from_gguf(path)


def test_a_record_that_does_not_fit_its_tensors(vector: sl.SteeringVector, tmp_path: Path) -> None:
    path = tmp_path / "v.gguf"
    sl.export.to_gguf(vector, path)
    content = path.read_bytes()
    assert content.count(b'"scale": [1.0, 1.0]') == content.count(b"steerlens.sha256") == 1
    content = content.replace(b"steerlens.sha256", b"steerlens.sha000")  # as before there was one
    path.write_bytes(content)
    assert sl.export.from_gguf(path) == vector
    for wrong in (b'"scale": [1.0, 2.0]', b'"scale": {1.0, 1.0]'):
        path.write_bytes(content.replace(b'"scale": [1.0, 1.0]', wrong))
        with pytest.raises(InputError, match="does not fit its tensors"):
            sl.export.from_gguf(path)


@pytest.mark.parametrize("has_checksum", [True, False])
def test_a_flipped_bit_is_refused_or_means_nothing(
    vector: sl.SteeringVector, tmp_path: Path, has_checksum: bool
) -> None:
    path = tmp_path / "v.gguf"
    sl.export.to_gguf(vector, path)
    content = path.read_bytes()
    if not has_checksum:
        content = content.replace(b"steerlens.sha256", b"steerlens.sha000")
    outcomes = Counter[str]()
    for place in np.random.default_rng(0).choice(8 * len(content), 1000, replace=False).tolist():
        flipped = bytearray(content)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            outcomes["same" if sl.export.from_gguf(path) == vector else "other"] += 1
        except InputError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 100
    assert outcomes["same"] > 10
    assert (outcomes["other"] == 0) is has_checksum


@pytest.mark.parametrize("order", [gguf.GGUFEndian.LITTLE, gguf.GGUFEndian.BIG])
@pytest.mark.parametrize("factor", [1, 2])
def test_a_file_that_another_tool_wrote_again(
    vector: sl.SteeringVector, tmp_path: Path, order: gguf.GGUFEndian, factor: int
) -> None:
    """With fields of its own, and in another order of bytes; but not with other numbers."""
    path, again = tmp_path / "v.gguf", tmp_path / "again.gguf"
    sl.export.to_gguf(vector, path)
    reader = gguf.GGUFReader(str(path))
    texts = {
        name.removeprefix("controlvector."): field.contents()
        for name, field in reader.fields.items()
        if field.types == [gguf.GGUFValueType.STRING] and name != "general.architecture"
    }
    rows = {tensor.name: factor * np.array(tensor.data) for tensor in reader.tensors}
    write_gguf(again, "controlvector", rows, order, **texts, note="theirs")
    if factor == 1:
        assert sl.export.from_gguf(again) == vector
    else:
        with pytest.raises(InputError, match="changed after it was written"):
            sl.export.from_gguf(again)


# repeng


def test_repeng_reads_our_files_and_we_read_its(
    vector: sl.SteeringVector, tmp_path: Path, repeng: Any
) -> None:
    sl.export.to_gguf(vector, tmp_path / "ours.gguf")
    theirs = repeng.ControlVector.import_gguf(tmp_path / "ours.gguf")
    assert theirs == sl.export.to_repeng(vector)
    theirs.export_gguf(tmp_path / "theirs.gguf")
    again = sl.export.from_gguf(tmp_path / "theirs.gguf")
    torch.testing.assert_close(again.rows, vector.rows)
    assert again.hook_names == vector.hook_names
    torch.testing.assert_close(sl.export.from_repeng(theirs).rows, vector.rows)
    assert sl.export.from_repeng(theirs).origin.architecture == "llama"


def test_repeng_gives_our_logits(llama: Any, vector: sl.SteeringVector, repeng: Any) -> None:
    hugging_face = build_llama()
    model = repeng.ControlModel(hugging_face, [1, 2])

    def there() -> torch.Tensor:
        # It wants the position of every token of every prompt.
        with torch.no_grad():
            return model(TOKENS, position_ids=torch.arange(5).expand(2, 5)).logits

    for coefficient in (3.0, -3.0):
        model.set_control(sl.export.to_repeng(vector), coefficient)
        ours = steered(llama, vector, coefficient)
        torch.testing.assert_close(there(), ours, rtol=1e-4, atol=1e-4)
    # One block off is another vector.
    shifted = {f"blocks.{b + 1}.hook_resid_post": vector.rows[b - 1] for b in (1, 2)}
    off = steered(llama, sl.SteeringVector.from_vectors(shifted), -3.0)
    assert float((there() - off).abs().max()) > 0.01


# Each tool takes its tokens from the model's own tokenizer, which puts BOS in front here.
PAIRS = [
    ("you are cheerful the river was", "you are very gloomy the river was"),
    ("the good day is", "the bad day is"),
    ("the river was good", "the river was bad"),
]


@pytest.mark.parametrize(("theirs", "ours"), [("pca_diff", "pca_centred"), ("pca_center", "pca")])
def test_a_direction_of_repeng_is_ours_by_another_name(
    theirs: str, ours: str, llama: Any, repeng: Any
) -> None:
    entries = [repeng.DatasetEntry(*pair) for pair in PAIRS]
    tokenizer = llama.tokenizer
    trained = repeng.ControlVector.train(
        build_llama(), tokenizer, entries, method=theirs, hidden_layers=[1, 2]
    )
    fitted = {name: sl.fit(llama, PAIRS, layers=[1, 2], method=name) for name in (ours, "lda")}
    for block in (1, 2):
        row = torch.tensor(trained.directions[block])
        # Up to the sign, which goes by most pairs there, by their mean here.
        assert abs(float(row @ fitted[ours][block])) == pytest.approx(1, abs=1e-4)
        assert abs(float(row @ fitted["lda"][block])) < 0.99


# steering-vectors


@pytest.mark.parametrize(
    ("aggregator", "method"),
    [("mean_aggregator", "mean_diff"), ("pca_aggregator", "pca")],
)
def test_a_vector_of_steering_vectors_is_ours_by_another_name(
    aggregator: str, method: str, llama: Any
) -> None:
    trained = steering_vectors.train_steering_vector(
        *(build_llama(), llama.tokenizer, PAIRS),
        layers=[1, 2],
        aggregator=getattr(steering_vectors, aggregator)(),
    )
    fitted = {name: sl.fit(llama, PAIRS, layers=[1, 2], method=name) for name in (method, "lda")}
    for block, row in trained.layer_activations.items():
        unit = torch.nn.functional.normalize(row, dim=0)
        assert float(unit @ fitted[method][block]) == pytest.approx(1, abs=1e-4)
        assert abs(float(unit @ fitted["lda"][block])) < 0.99


@pytest.mark.parametrize("hook", ["hook_resid_post", "hook_mlp_out", "hook_attn_out"])
def test_steering_vectors_gives_our_logits(llama: Any, hook: str, tmp_path: Path) -> None:
    named = {name.replace("hook_resid_post", hook): row for name, row in ROWS.items()}
    vector = sl.SteeringVector.from_vectors(named)
    theirs = sl.export.to_steering_vectors(vector)
    assert isinstance(theirs, steering_vectors.SteeringVector)
    hugging_face = build_llama()
    layers = {
        "decoder_block": "model.layers.{num}",
        "self_attn": "model.layers.{num}.self_attn",
        "mlp": "model.layers.{num}.mlp",
    }
    with theirs.apply(hugging_face, layer_config=layers, multiplier=1.5):
        there = logits(hugging_face)
    torch.testing.assert_close(there, steered(llama, vector, 1.5), rtol=1e-4, atol=1e-4)
    sl.export.save_steering_vectors(vector, tmp_path / "v.pt")
    fields = torch.load(tmp_path / "v.pt", weights_only=True)
    again = sl.export.from_steering_vectors(steering_vectors.SteeringVector(**fields))
    assert again.hook_names == vector.hook_names
    torch.testing.assert_close(again.rows, vector.rows)


def test_what_steering_vectors_cannot_hold() -> None:
    mixed = {"blocks.1.hook_mlp_out": torch.ones(2), "blocks.1.hook_attn_out": torch.ones(2)}
    with pytest.raises(InputError, match="this one has hook_attn_out, hook_mlp_out"):
        sl.export.to_steering_vectors(sl.SteeringVector.from_vectors(mixed))
    good = sl.SteeringVector.from_vectors(ROWS)
    with pytest.raises(InputError, match="not an operator"):
        sl.export.to_steering_vectors(replace(good, operator=sl.Rotate()))
    other = steering_vectors.SteeringVector({1: torch.ones(2)}, "input_layernorm")
    with pytest.raises(InputError, match="'input_layernorm'"):
        sl.export.from_steering_vectors(other)
    zero = steering_vectors.SteeringVector({1: torch.zeros(2)}, "mlp")
    with pytest.raises(InputError, match="no direction"):
        sl.export.from_steering_vectors(zero)


# Baked into a checkpoint


SMALL: dict[str, Any] = {"vocab_size": 160, "initializer_range": 0.3}
LAYERS: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LAYERS["intermediate_size"] = 48
CONFIGS = {
    "gpt_neox": transformers.GPTNeoXConfig(**LAYERS, **SMALL),
    "gptj": transformers.GPTJConfig(n_embd=32, n_layer=3, n_head=4, rotary_dim=4, **SMALL),
    "opt": transformers.OPTConfig(
        **LAYERS,
        ffn_dim=48,
        max_position_embeddings=64,
        word_embed_proj_dim=32,
        vocab_size=160,
        init_std=0.3,
    ),
    "phi": transformers.PhiConfig(**LAYERS, **SMALL),
    **{
        kind: config(num_key_value_heads=2, **LAYERS, **SMALL)
        for kind, config in {
            "qwen2": transformers.Qwen2Config,
            "mistral": partial(transformers.MistralConfig, sliding_window=None),
            "phi3": partial(transformers.Phi3Config, pad_token_id=3),
            "qwen3": partial(transformers.Qwen3Config, head_dim=8),
            "gemma2": partial(transformers.Gemma2Config, head_dim=8),
        }.items()
    },
}


def hugging_face(kind: str) -> Any:
    if kind in ("llama", "gpt2"):
        return {"llama": build_llama, "gpt2": build_gpt2}[kind]()
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[kind])).eval()


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
    windows = transformers.MistralConfig(sliding_window=8, **LAYERS, **SMALL)
    mistral = bridge(transformers.AutoModelForCausalLM.from_config(windows).eval())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    processed = bridge(build_llama())
    processed.enable_compatibility_mode()
    narrow = sl.SteeringVector.from_vectors({"blocks.1.hook_resid_post": torch.ones(4)})
    for model, of_vector, coefficient, folder, message in (
        (qwen, vector, 1.0, "baked", "'qwen3' checkpoints have no bias .* norms queries and keys"),
        (gemma, vector, 1.0, "baked", "norms what its MLP adds"),
        (mistral, vector, 1.0, "baked", "attends to 8 tokens only"),
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


# lm-evaluation-harness and PEFT: the tools themselves are in `make test-elsewhere`


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
