"""Vectors in other tools: an export is right when the target's logits are ours."""

import math
import struct
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import steering_vectors
import torch
from conftest import build_llama
from exported import ROWS, TOKENS, logits, steered

import steerlens as sl
from steerlens.errors import InputError
from steerlens.steering import Calibration


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
