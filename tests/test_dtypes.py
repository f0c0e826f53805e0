"""Half-precision and quantized weights: numbers against float32, within stated bounds."""

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from conftest import bridge, build_gpt2, build_llama, build_tokenizer

import steerlens as sl
from steerlens.directions.gradients import loss_gradients
from steerlens.errors import ModelError
from steerlens.models import loading as models

HALF = [torch.bfloat16, torch.float16]
LARGEST = 65504.0
"""The largest number in float16."""

# The last tokens differ, so that the difference is far larger than the rounding of large numbers.
LARGE = sl.ContrastivePairs.from_lists(
    ["the river was warm and I felt cheerful", "how was the day ? it went kind"],
    ["the river was warm and I felt gloomy", "how was the day ? it went rude"],
)


def in_both(build: Any, dtype: torch.dtype, **options: Any) -> tuple[Any, Any]:
    """The same half-precision weights, run in `dtype` and in float32."""
    half, wide = build(**options).to(dtype), build(**options)
    # Not `half.float()`: its rotary frequencies are rounded too.
    wide.load_state_dict(half.state_dict())
    return bridge(half, dtype=dtype), bridge(wide)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.isfinite().all()
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def assert_near(table: Any, expected: Any, columns: list[str], bound: float) -> None:
    for column in columns:
        ours, theirs = (torch.tensor(made[column].to_numpy()) for made in (table, expected))
        assert relative(ours, theirs) < bound, column


@pytest.mark.filterwarnings("ignore:the directions were fitted on other weights")
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("build", [build_llama, build_gpt2])
def test_numbers_are_those_of_float32_within_rounding(
    build: Any, dtype: torch.dtype, pairs: sl.ContrastivePairs
) -> None:
    """Within 16 times the rounding of the dtype (bfloat16: 0.0078), relative to each number."""
    model, wide = in_both(build, dtype)
    bound = 16 * torch.finfo(dtype).eps
    directions = sl.fit_directions(sl.collect_differences(wide, pairs, layers=[0, 2]))
    found, expected = (
        sl.sweep(one, pairs, directions, coefficients=[0, 3], n_bootstrap=2)
        for one in (model, wide)
    )
    columns = ["separation", "resid_norm", "logprob_nats"]
    assert_near(found.layers, expected.layers, columns, bound)
    assert_near(found.table, expected.table, ["projection", "logprob_nats", "separation"], bound)
    # Control: the bound tells this push from another one.
    other = sl.sweep(wide, pairs, directions, coefficients=[0, 24], n_bootstrap=2).table
    with pytest.raises(AssertionError, match="separation"):
        assert_near(found.table, other, ["separation"], 2 * bound)


@pytest.mark.parametrize("dtype", HALF)
def test_gradients_are_those_of_float32_within_rounding(
    dtype: torch.dtype, pairs: sl.ContrastivePairs
) -> None:
    """Within 32 times the rounding: it is the whole backward pass that runs in the dtype."""
    model, wide = in_both(build_gpt2, dtype)
    found, expected = (loss_gradients(one, pairs, layers=[0, 1]) for one in (model, wide))
    bound = 32 * torch.finfo(dtype).eps
    assert found.coherence.dtype == torch.float32
    for name in ("coherence", "separation_positive", "separation_negative", "logprob"):
        assert relative(getattr(found, name), getattr(expected, name)) < bound, name


# Norms that float16 cannot hold


def build_large() -> Any:
    """A Llama whose activations fit float16 while their norms, and their squares, do not."""
    model = build_llama(n_layers=3)
    with torch.no_grad():
        embed = model.model.embed_tokens.weight
        embed.copy_(embed.sign() * (15000 + 5000 * torch.rand_like(embed)))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 300
            layer.mlp.down_proj.weight *= 300
    return model


@pytest.mark.filterwarnings("ignore:the directions were fitted on other weights")
@pytest.mark.parametrize("dtype", HALF)
def test_norms_beyond_float16_are_right(dtype: torch.dtype) -> None:
    model, wide = in_both(build_large, dtype)
    bound = 16 * torch.finfo(dtype).eps
    differences, expected = (sl.collect_differences(one, LARGE) for one in (model, wide))
    assert differences.positive.abs().max() < LARGEST
    norms = differences.positive.norm(dim=-1)
    assert norms.max() > LARGEST
    # Control: in the dtype of the weights they overflow, or their squares do.
    if dtype == torch.float16:
        assert differences.positive.half().norm(dim=-1).max() == torch.inf
        assert differences.positive.half().square().max() == torch.inf
    assert relative(differences.values, expected.values) < bound
    directions = sl.fit_directions(expected)
    found, right = (
        sl.sweep(one, LARGE, directions, coefficients=[0, 4000], n_bootstrap=2)
        for one in (model, wide)
    )
    columns = ["separation", "projection", "logprob_nats"]
    assert_near(found.layers, right.layers, [*columns, "resid_norm", "loss"], bound)
    assert found.layers.resid_norm.max() > LARGEST
    assert_near(found.table, right.table, columns, bound)


@pytest.mark.parametrize("operator", [sl.Ablate(), sl.Clamp(100.0), sl.Rotate()])
@pytest.mark.parametrize("dtype", HALF)
def test_operators_project_beyond_float16(operator: Any, dtype: torch.dtype) -> None:
    """The component along the direction is 4 times 30000, which float16 cannot hold."""
    activation = torch.full((1, 1, 16), 30000.0, dtype=dtype)
    unit = torch.full((16,), 0.25)
    amount = 30.0 if isinstance(operator, sl.Rotate) else 0.5
    found = operator(activation, unit, amount)
    assert found.dtype == dtype
    expected = operator(activation.double(), unit.double(), amount)
    assert relative(found, expected) < 2 * torch.finfo(dtype).eps


def test_an_activation_beyond_float16_is_named() -> None:
    model, wide = in_both(build_large, torch.float16)
    for one in (model, wide):
        with torch.no_grad():
            one.original_model.model.layers[1].mlp.down_proj.weight.mul_(100)
    with pytest.raises(ModelError, match=r"NaN or inf .* at blocks\.1\.hook_resid_post"):
        sl.collect_differences(model, LARGE)
    sl.collect_differences(wide, LARGE)


# Quantized weights: there is no CUDA here, so the library's own loading is a stand-in


def with_cuda(monkeypatch: pytest.MonkeyPatch, *, is_installed: bool) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        models.importlib.util,
        "find_spec",
        lambda name: is_installed or None if name == "bitsandbytes" else find(name),
    )


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantized_loading_says_what_it_needs(bits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=f"'{bits}' needs a CUDA device"):
        sl.load_model("owner/name", quantization=bits)
    with_cuda(monkeypatch, is_installed=False)
    with pytest.raises(ModelError, match="needs bitsandbytes: pip install bitsandbytes"):
        sl.load_model("owner/name", quantization=bits)


def test_unknown_quantization_is_refused() -> None:
    with pytest.raises(ModelError, match="'8bit', '4bit' or None, not '2bit'"):
        models._check_quantization("2bit")
    models._check_quantization(None)


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_quantized_weights_show_in_the_provenance(
    bits: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """What is asked of transformers, and what becomes of its model."""
    folder = tmp_path / "model"
    build_llama(n_layers=2).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    asked: dict[str, Any] = {}

    def load(name: str, **options: Any) -> Any:
        asked.update(options, name=name)
        made = build_llama(n_layers=2, dtype=torch.bfloat16)
        made.config.quantization_config = {"quant_method": "bitsandbytes", f"load_in_{bits}": True}
        whole = {"missing_keys": set(), "unexpected_keys": set(), "mismatched_keys": set()}
        return made, whole

    with_cuda(monkeypatch, is_installed=True)
    monkeypatch.setattr(
        transformers, "BitsAndBytesConfig", lambda **options: SimpleNamespace(**options)
    )
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    model = sl.load_model(
        str(folder), device="cpu", dtype=torch.bfloat16, quantization=bits, progress=False
    )
    config = asked["quantization_config"]
    assert (config.load_in_8bit, config.load_in_4bit) == (bits == "8bit", bits == "4bit")
    assert (asked["name"], asked["device_map"]) == (str(folder), {"": "cpu"})
    assert sl.models.provenance(model).dtype == f"bfloat16 ({bits})"
    assert sl.models.provenance(bridge(build_llama())).dtype == "float32"
