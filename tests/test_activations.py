"""Activations and differences, against bare Hugging Face runs."""

from typing import Any

import pytest
import torch
from conftest import build_gpt2, build_llama

import steerlens as sl
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.errors import InputError, ModelError


def hf_block_outputs(hf_model: Any, ids: tuple[int, ...]) -> torch.Tensor:
    """`[layer, token, d_model]`: outputs of the blocks themselves, before any final norm."""
    blocks = hf_model.model.layers if hasattr(hf_model, "model") else hf_model.transformer.h
    outputs: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        outputs.append((output[0] if isinstance(output, tuple) else output).detach()[0])

    handles = [block.register_forward_hook(keep) for block in blocks]
    with torch.no_grad():
        hf_model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return torch.stack([o if o.ndim == 2 else o[0] for o in outputs])


@pytest.mark.parametrize(("name", "build"), [("llama", build_llama), ("gpt2", build_gpt2)])
@pytest.mark.parametrize("position", [-1, -2, 2])
def test_differences_equal_bare_hugging_face(
    request: pytest.FixtureRequest, pairs: sl.ContrastivePairs, name: str, build: Any, position: int
) -> None:
    model, hf_model = request.getfixturevalue(name), build()
    found = sl.collect_differences(model, pairs, layers="all", position=position)
    tokenized = tokenize_pairs(model, pairs)
    for i, (pos, neg) in enumerate(zip(tokenized.positive, tokenized.negative, strict=True)):
        expected = (
            hf_block_outputs(hf_model, pos.prompt)[:, position]
            - hf_block_outputs(hf_model, neg.prompt)[:, position]
        )
        torch.testing.assert_close(found.values[:, i], expected, rtol=1e-4, atol=1e-4)


def test_constant_on_both_sides_cancels_in_the_difference(
    llama: Any, pairs: sl.ContrastivePairs
) -> None:
    hook_name = "blocks.2.hook_resid_post"
    constant = torch.randn(32) * 5
    plain = sl.collect_differences(llama, pairs, layers=[2])
    with llama.hooks(fwd_hooks=[(hook_name, lambda activation, hook: activation + constant)]):
        shifted = sl.collect_differences(llama, pairs, layers=[2])
    torch.testing.assert_close(shifted[hook_name], plain[hook_name], rtol=1e-4, atol=1e-4)
    # The vector was really added: both sides moved by it.
    moved = shifted.positive[0] - plain.positive[0]
    torch.testing.assert_close(moved, constant.expand_as(moved), rtol=1e-4, atol=1e-4)


def test_the_readout_is_carried_along_but_not_among_the_values(
    llama: Any, pairs: sl.ContrastivePairs
) -> None:
    found = sl.collect_differences(llama, pairs, layers=[0, 1])
    assert found.readout_names == ("blocks.2.hook_resid_post",)
    assert found.values.shape == (2, 8, 32)
    everything = sl.collect_differences(llama, pairs, layers="all")
    assert everything.readout_names == ()
    torch.testing.assert_close(
        found["blocks.2.hook_resid_post"], everything["blocks.2.hook_resid_post"]
    )
    with pytest.raises(KeyError):
        found["blocks.4.hook_resid_post"]


def test_no_unembedding_when_logits_are_not_needed(llama: Any, pairs: sl.ContrastivePairs) -> None:
    calls: list[str] = []
    names = ("unembed.hook_out", "blocks.4.hook_resid_post")
    fwd_hooks = [(name, lambda x, hook, name=name: calls.append(name)) for name in names]
    with llama.hooks(fwd_hooks=fwd_hooks):
        sl.collect_differences(llama, pairs, layers="all")
        assert names[1] in calls
        assert names[0] not in calls
        llama(torch.tensor([[1, 5]]))
        assert names[0] in calls


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_activations_name_the_hook(
    llama: Any, pairs: sl.ContrastivePairs, bad: float
) -> None:
    sl.collect_differences(llama, pairs)
    broken = ("blocks.3.hook_resid_post", lambda activation, hook: activation * bad)
    with llama.hooks(fwd_hooks=[broken]):
        with pytest.raises(ModelError, match=r"NaN or inf .* blocks\.3\.hook_resid_post"):
            sl.collect_differences(llama, pairs, layers="1,3")
        # A hook before the bad one is still fine.
        sl.collect_differences(llama, pairs, layers="1")


def test_hook_that_is_not_on_the_residual_stream_is_refused(
    llama: Any, pairs: sl.ContrastivePairs
) -> None:
    prompts = tokenize_pairs(llama, pairs).positive
    found = sl.engine.collect_activations(llama, prompts, ["blocks.0.hook_mlp_out"])
    assert found.shape == (1, 8, 32)
    with pytest.raises(InputError, match=r"hook_pattern holds a tensor of shape"):
        sl.engine.collect_activations(llama, prompts, ["blocks.0.attn.hook_pattern"])


def test_memory_keeps_one_position_only(llama: Any, pairs: sl.ContrastivePairs) -> None:
    found = sl.collect_differences(llama, pairs)
    for side in (found.positive, found.negative):
        assert side.is_contiguous()
        assert side.untyped_storage().nbytes() == 5 * 8 * 32 * 4
