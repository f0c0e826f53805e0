"""A vector baked into a Hugging Face checkpoint: the addition as a bias, for plain transformers."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from steerlens.errors import InputError
from steerlens.files import write_json, write_whole_folder
from steerlens.models.hooked_model import (
    HookedModel,
    checkpoint_name,
    context_length,
    hugging_face_model,
)
from steerlens.models.hooks import hook_layer
from steerlens.models.identity import provenance
from steerlens.models.loading import inference
from steerlens.stats import allowed_gap
from steerlens.steering import Coefficient, SteeringVector, steer, steps
from steerlens.steering.export.gguf_file import block_rows
from steerlens.validation import checked

RECORD = "steerlens.json"
TOLERANCE = 1e-4
"""Largest difference of a logit between the baked and the hooked model, float32, relative to the
largest logit."""


@dataclass(frozen=True)
class Carrier:
    """Where an architecture has a bias that is added to a block's output, and how to switch it on.

    `bias` is a parameter's name with {} for the block.
    """

    bias: str
    switches: Mapping[str, bool]


CARRIERS = {
    "llama": Carrier("model.layers.{}.mlp.down_proj.bias", {"mlp_bias": True}),
    "gpt2": Carrier("transformer.h.{}.mlp.c_proj.bias", {}),
    "gpt_neox": Carrier("gpt_neox.layers.{}.mlp.dense_4h_to_h.bias", {}),
    "gptj": Carrier("transformer.h.{}.mlp.fc_out.bias", {}),
    "opt": Carrier("model.decoder.layers.{}.fc2.bias", {}),
    "phi": Carrier("model.layers.{}.mlp.fc2.bias", {}),
}
"""Hugging Face model type -> its carrier: the bias of the MLP's last matrix, which is added to the
residual stream as it is."""


@checked
def bake(
    model: HookedModel, vector: SteeringVector, coefficient: Coefficient, out_dir: str | Path
) -> Path:
    """Write a Hugging Face checkpoint that is steered by itself, at every token.

    `coefficient * scale * direction` goes into a bias of each block's MLP (see `CARRIERS`), so
    `AutoModelForCausalLM.from_pretrained(out_dir)` and anything that reads such checkpoints gives
    the hooked model's logits. That is checked before anything is written: on a few tokens, the
    largest difference may be 1e-4 of the largest logit (float32; in other dtypes 8 times their
    epsilon). The tokenizer and `steerlens.json`, which says what was added, go with it.

    Args:
        model: a `TransformerBridge` without weight processing, of an architecture in `CARRIERS`.
        vector: added everywhere, at block outputs.
        coefficient: as in `Coefficient`, not 0.
        out_dir: a new or empty folder.

    Returns:
        `out_dir`.

    Raises:
        InputError: one of these is another, the coefficient has no meaning for the vector, or the
            check fails.

    Examples:
        >>> path = sl.export.bake(model, vector, 4, folder / "steered")
        >>> (path / "config.json").is_file()
        True
    """
    out_dir = Path(out_dir)
    check_is_new(out_dir)
    block_rows(vector, "a bias")
    vector.check_model(model)
    carrier = _carrier(model)
    acts = steps(vector, coefficient)
    if not acts:
        raise InputError("coefficient 0 adds nothing to bake; give another one")
    plain = _plain_model(model, carrier)
    weights, added = dict(plain.named_parameters()), {}
    for act in acts:
        bias = carrier.bias.format(hook_layer(act.hook_name))
        if bias not in weights:
            raise InputError(f"this model has no {bias}, so a bias cannot carry the vector")
        with torch.no_grad():
            weights[bias] += (act.amount * act.direction.double()).float().to(weights[bias])
        added[act.hook_name] = {"bias": bias, "residual_units": act.amount}
    _check_logits(model, vector, coefficient, plain)
    record = {
        "what": "a bias was added to block outputs (blocks.N.hook_resid_post, N from 0)",
        "added": added,
        "coefficient": str(coefficient),
        "vector": vector.describe(),
        "model": provenance(model).to_dict(),
    }

    def fill(folder: Path) -> None:
        plain.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        write_json(record, folder / RECORD)

    try:
        write_whole_folder(out_dir, fill)
    except (OSError, ValueError) as error:  # transformers checks the generation settings
        raise InputError(f"cannot write {str(out_dir)!r}: {error}") from error
    return out_dir


def check_is_new(folder: Path) -> None:
    """Raise `InputError` when `folder` is there and not an empty folder, a link, or no name."""
    try:
        if folder.is_symlink() or folder.resolve() == Path.cwd():
            raise InputError(f"{str(folder)!r} is a link or this folder; give a new folder's name")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{str(folder)!r} exists and is not empty; choose another folder")
    except OSError as error:
        raise InputError(f"cannot use {str(folder)!r}: {error.strerror}") from error


def _carrier(model: HookedModel) -> Carrier:
    wrapped = hugging_face_model(model)
    if wrapped is None or provenance(model).weight_processing != "none":
        raise InputError(
            "expected a TransformerBridge without weight processing: only its weights are those of "
            "a Hugging Face checkpoint; load the model with load_model"
        )
    kind = str(wrapped.config.model_type)
    if getattr(wrapped.config, "do_layer_norm_before", True) is False:
        raise InputError("this model norms what a block adds, so a bias there is not the addition")
    if model.tokenizer is None:
        raise InputError("the model has no tokenizer to go with the checkpoint; set one first")
    if kind not in CARRIERS:
        raise InputError(
            f"{kind!r} checkpoints have no bias on what a block adds to the residual stream; "
            f"those of {', '.join(CARRIERS)} have; save the vector with save or to_gguf instead"
        )
    return CARRIERS[kind]


def _plain_model(model: HookedModel, carrier: Carrier) -> Any:
    """A Hugging Face model of its own with the same weights, its new biases zero."""
    import transformers

    wrapped = hugging_face_model(model)
    config = copy.deepcopy(wrapped.config)
    for name, value in carrier.switches.items():
        setattr(config, name, value)
    # What the Bridge asks for, to hook attention; a checkpoint should not be bound to it.
    config.output_attentions = False
    config._attn_implementation = None
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=model.cfg.dtype).eval()
    weights = {checkpoint_name(name): weight for name, weight in wrapped.state_dict().items()}
    with torch.no_grad():
        for name, weight in plain.state_dict().items():
            if name in weights:
                weight.copy_(weights[name])
            elif name.endswith(".bias"):
                weight.zero_()
            else:
                raise InputError(f"the model has no weight {name!r} to put into a checkpoint")
    if plain.can_generate() and getattr(wrapped, "generation_config", None) is not None:
        plain.generation_config = copy.deepcopy(wrapped.generation_config)
    return plain


def _check_logits(
    model: HookedModel, vector: SteeringVector, coefficient: Coefficient, plain: Any
) -> None:
    tokens = _probe(model)
    with inference(model):
        with steer(model, vector, coefficient):
            hooked = model(tokens).float().cpu()
        baked = plain.to(tokens.device)(tokens).logits.float().cpu()
    largest = float((hooked - baked).abs().max() / hooked.abs().max())
    tolerance = allowed_gap(model.cfg.dtype, least=TOLERANCE)
    if not largest <= tolerance:
        raise InputError(
            f"the baked checkpoint's logits differ from the hooked model's by {largest:.2g} of the "
            f"largest (expected at most {tolerance:.2g}): this model cannot carry the vector in a "
            "bias, or its weights were changed after loading"
        )


def _probe(model: HookedModel) -> Int[Tensor, "prompt token"]:
    """A few token ids spread over the vocabulary, the same ones every time."""
    n = min(16, context_length(model) or 16)
    ids = torch.linspace(0, int(model.cfg.d_vocab) - 1, 2 * n).long().reshape(2, n)
    return ids.to(model.cfg.device)
