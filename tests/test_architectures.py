"""What works on which architecture, and models that TransformerLens does not reproduce."""

import warnings
from typing import Any

import models_table
import pytest
import torch
from conftest import bridge, build_gpt2, build_llama, needs_bridge
from zoo import ZOO, bridged, hugging_face

import steerlens as sl
from steerlens.circuits import make_prompts
from steerlens.engine import batches
from steerlens.errors import InputError, ModelError
from steerlens.models import verification as fidelity
from steerlens.models.loading import inference
from steerlens.steering import generate_tokens

TOKENS = torch.tensor([[1, 5, 6, 7, 8, 9]])


@pytest.mark.parametrize("kind", ZOO)
def test_the_table_says_what_was_found(kind: str) -> None:
    """Raises where a number is wrong; `make models-table` writes the table anew."""
    assert models_table.row(kind) == models_table.committed()[kind]


def test_the_table_has_every_architecture() -> None:
    committed = models_table.committed()
    assert list(committed) == list(ZOO)
    assert {"yes", "refused"} == {cell for row in committed.values() for cell in row[2:8]}


# Models that are not reproduced


def broken() -> Any:
    """A Llama in TransformerLens whose rotary frequencies are not those of its config."""
    model = bridge(build_llama())
    for name, buffer in model.original_model.named_buffers():
        if "inv_freq" in name:
            buffer.mul_(1.5)
    return model


def test_a_model_that_is_not_reproduced_is_refused_at_first_use(pairs: sl.ContrastivePairs) -> None:
    model = broken()
    with pytest.raises(ModelError, match=r"does not reproduce this model: its logits differ .* by"):
        sl.collect_differences(model, pairs)
    with pytest.raises(ModelError, match="does not reproduce"):
        sl.check_model(broken())
    sl.collect_differences(bridge(build_llama()), pairs)


def test_a_model_that_ran_before_is_checked_too() -> None:
    model = broken()
    model(TOKENS)
    with pytest.raises(ModelError, match="does not reproduce"):
        sl.check_model(model)


@pytest.mark.parametrize("kind", ["Falcon RW", "Falcon 40B"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_falcon_is_seen_in_every_dtype(kind: str, dtype: torch.dtype) -> None:
    with pytest.raises(ModelError, match="does not reproduce"):
        sl.check_model(bridged(kind, dtype))
    sl.check_model(bridged("Falcon 7B", dtype))


def test_falcon_with_alibi_differs_from_hugging_face() -> None:
    """The fault itself: the Bridge is Hugging Face's eager attention, which is not its default."""
    with torch.no_grad():
        found = bridged("Falcon RW")(TOKENS)
        default = hugging_face("Falcon RW")(TOKENS).logits
        eager = hugging_face("Falcon RW", attn_implementation="eager")(TOKENS).logits
    torch.testing.assert_close(found, eager, rtol=1e-4, atol=1e-4)
    assert (found - default).abs().max() > 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["GPT-2", "Llama", "Gemma 2", "OPT", "Mixtral", "Qwen2-MoE"])
def test_rounding_is_not_taken_for_a_fault(kind: str, dtype: torch.dtype) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(group|were fitted on)")
        sl.check_model(bridged(kind, dtype))


def test_only_padding_may_be_at_fault() -> None:
    model = bridge(build_llama())
    forward = model.forward

    def without_mask(*args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    model.tokenizer.padding_side = "left"
    model.forward = without_mask
    with pytest.raises(ModelError, match="does not reproduce this model where a batch is padded"):
        sl.check_model(model)
    model.forward = forward
    sl.check_model(model)


def test_the_gap_by_hand() -> None:
    """Centred logits (1, -1) and (2, -2): root mean square sqrt(2.5); off by 0.5 at one of four."""
    expected = torch.tensor([[11.0, 9.0], [2.0, -2.0]])
    found = expected + torch.tensor([[0.5, 0.0], [0.0, 0.0]])
    assert fidelity.logits_gap(found, expected) == pytest.approx(0.25 / 2.5**0.5)
    assert not fidelity.logits_gap(found * torch.nan, expected) <= 1.0


def test_the_check_is_made_once_and_shares_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    real = fidelity._plain_model

    def building(wrapped: Any) -> Any:
        built.append(real(wrapped))
        return built[-1]

    monkeypatch.setattr(fidelity, "_plain_model", building)
    model = bridge(build_gpt2())
    seed = torch.get_rng_state()
    for _ in range(3):
        with inference(model):
            pass
    assert torch.equal(torch.get_rng_state(), seed)
    (plain,) = built
    ours = {weight.data_ptr() for weight in model.original_model.parameters()}
    assert {weight.data_ptr() for weight in plain.parameters()} <= ours


def test_hooks_of_others_postpone_the_check() -> None:
    model = broken()
    model.add_hook("blocks.0.hook_resid_post", lambda activation, hook: activation * 2)
    sl.check_model(model)
    model.reset_hooks()
    with pytest.raises(ModelError, match="does not reproduce"):
        sl.check_model(model)


def test_what_is_not_the_checkpoints_model_is_not_compared() -> None:
    changed = build_llama()
    changed.model.layers[1].mlp.register_forward_hook(lambda part, args, out: out * 2)
    sl.check_model(bridge(changed))
    processed = bridge(build_llama())
    processed.enable_compatibility_mode(disable_warnings=True)
    sl.check_model(processed)


def test_a_model_that_cannot_be_built_again_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(wrapped: Any) -> None:
        raise TypeError("needs a vocabulary")

    monkeypatch.setattr(fidelity, "_plain_model", fail)
    model = broken()
    with pytest.warns(RuntimeWarning, match=r"not checked against .*TypeError: needs a vocabulary"):
        sl.check_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*(group|were fitted on)")
        sl.check_model(model)  # said once


# A length at which the model changes its arithmetic

LONGROPE: dict[str, Any] = {
    "max_position_embeddings": 64,
    "original_max_position_embeddings": 10,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0, 5.0, 7.0, 9.0],
        "original_max_position_embeddings": 10,
    },
}


@needs_bridge
@pytest.mark.usefixtures("much_padding")
def test_no_batch_mixes_lengths_at_which_the_model_differs(
    continued: sl.ContrastivePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Phi-3's longrope goes by the longest row: equal numbers at every batch size."""
    model = bridged("Phi-3", **LONGROPE)
    prompts = sl.engine.tokenize_pairs(model, continued)
    lengths = {len(prompt) > 10 for prompt in prompts.positive}
    assert lengths == {True, False}

    def numbers(batch_size: int | None) -> list[torch.Tensor]:
        shared: dict[str, Any] = {"layers": [1], "batch_size": batch_size}
        found = sl.collect_differences(model, continued, **shared)
        gradients = sl.loss_gradients(model, continued, **shared)
        directions = sl.fit_directions(found)
        swept = [
            sl.sweep(
                *(model, continued, directions),
                coefficients=[0, 3],
                steered_positions=positions,
                n_bootstrap=2,
                **shared,
            ).points
            for positions in ("all", "last")
        ]
        columns = [torch.tensor(table.select_dtypes("number").to_numpy()) for table in swept]
        return [found.positive, found.negative, gradients.coherence, *columns]

    alone = numbers(1)
    for batch_size in (4, None):
        for ours, theirs in zip(numbers(batch_size), alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4, equal_nan=True)
    texts = [prompts.positive[row] for row in range(4)]
    push = {"blocks.1.hook_resid_post": torch.eye(32)[0]}
    written = generate_tokens(model, texts, push, 2.0, max_new_tokens=8)
    assert written == [
        generate_tokens(model, [text], push, 2.0, max_new_tokens=8)[0] for text in texts
    ]
    with pytest.raises(InputError, match="of both sides of 10 tokens"):
        make_prompts(model, prompts.positive)
    # A batch that mixes them gives other numbers.
    monkeypatch.setattr(batches, "side_of_switches", lambda model, n: 0)
    mixed = sl.collect_differences(model, continued, layers=[1], batch_size=16).positive
    assert float((mixed - alone[0]).abs().max()) > 0.01
