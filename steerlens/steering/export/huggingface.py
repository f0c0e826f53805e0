"""A vector baked into a Hugging Face checkpoint, so that plain transformers is steered by it."""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerlens.errors import HookError, InputError
from steerlens.files import write_json, write_whole_folder
from steerlens.models.hooked_model import HookedModel, checkpoint_name, hugging_face_model
from steerlens.models.hooks import hook_layer, resolve_hooks
from steerlens.models.identity import provenance
from steerlens.models.loading import inference
from steerlens.models.tolerance import allowed_gap
from steerlens.models.verification import probe
from steerlens.steering import Ablate, Coefficient, SteeringVector, steer, steps
from steerlens.steering.apply import Step
from steerlens.steering.export.gguf_file import block_rows
from steerlens.validation import checked

RECORD = "steerlens.json"
TOLERANCE = 1e-4
"""Largest difference of a logit between the baked and the hooked model, float32, relative to the
largest logit."""


@dataclass(frozen=True)
class Carrier:
    """Where an architecture has a bias that is added to a block's output, and how to switch it on.

    `bias` is a parameter's name with {} for the block. An architecture without one may be a Llama
    but for its name and biases: then the checkpoint is written as a Llama's.
    """

    bias: str
    switches: Mapping[str, bool]
    as_llama: bool = False


LLAMA = "model.layers.{}.mlp.down_proj.bias"
CARRIERS = {
    "llama": Carrier(LLAMA, {"mlp_bias": True}),
    "gpt2": Carrier("transformer.h.{}.mlp.c_proj.bias", {}),
    "gpt_neox": Carrier("gpt_neox.layers.{}.mlp.dense_4h_to_h.bias", {}),
    "gptj": Carrier("transformer.h.{}.mlp.fc_out.bias", {}),
    "opt": Carrier("model.decoder.layers.{}.fc2.bias", {}),
    "phi": Carrier("model.layers.{}.mlp.fc2.bias", {}),
    "qwen2": Carrier(LLAMA, {"mlp_bias": True, "attention_bias": True}, as_llama=True),
    "mistral": Carrier(LLAMA, {"mlp_bias": True}, as_llama=True),
    "phi3": Carrier(LLAMA, {"mlp_bias": True}, as_llama=True),
}
"""Hugging Face model type -> its carrier: the bias of the MLP's last matrix, which is added to the
residual stream as it is."""
NO_CARRIER = {
    "qwen3": "norms queries and keys, which no architecture with such a bias does",
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3"), "norms what its MLP adds"),
}
"""Hugging Face model type -> why it has none."""
_WRITERS = re.compile(
    r"(embed_tokens|embed_positions|embed_in|wte|wpe|o_proj|out_proj|c_proj|attention\.dense"
    r"|down_proj|dense_4h_to_h|fc_out|fc2|self_attn\.dense)$"
)
"""Modules that write to the residual stream."""


@checked
def bake(
    model: HookedModel, vector: SteeringVector, coefficient: Coefficient, out_dir: str | Path
) -> Path:
    """Write a Hugging Face checkpoint that is steered by itself, at every token.

    What is added, `coefficient * scale * direction`, goes into a bias of each block's MLP (see
    `CARRIERS`; qwen2, mistral and phi3 become Llama checkpoints, which have that bias). `Ablate`
    goes into every matrix that writes to the residual stream, `W <- W (1 - d d^T)` for rows that
    are written, embeddings too. So `AutoModelForCausalLM.from_pretrained(out_dir)` and anything
    that reads such checkpoints gives the hooked model's logits. That is checked before anything is
    written: on a few tokens, the largest difference may be 1e-4 of the largest logit (float32; in
    other dtypes 8 times their epsilon). The tokenizer and `steerlens.json`, which says what was
    changed, go with it.

    Args:
        model: a `TransformerBridge` without weight processing; for additions of an architecture
            in `CARRIERS`.
        vector: added at block outputs; or one direction ablated at the input of block 0, in the
            middle of every block (where it has one) and at every block's output.
        coefficient: as in `Coefficient`, not 0; of `Ablate` 1.
        out_dir: a new or empty folder.

    Returns:
        `out_dir`.

    Raises:
        InputError: an argument is another than said, an architecture cannot carry the addition, the
            coefficient has no meaning for the vector, or the check fails.

    Examples:
        >>> path = sl.export.bake(model, vector, 4, folder / "steered")
        >>> (path / "config.json").is_file()
        True
    """
    ablates = isinstance(vector.operator, Ablate) and vector.condition is None
    if not ablates:
        block_rows(vector, "a bias")
    carried = Carried(model, vector, coefficient, Path(out_dir))
    plain, changes = (_ablated if ablates else _added)(model, carried.acts())
    carried.check_logits(plain)

    def fill(folder: Path) -> None:
        plain.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)

    return carried.write(changes, fill)


@dataclass(frozen=True)
class Carried:
    """A vector at a coefficient, which a folder is to carry beside or in a model's weights."""

    model: HookedModel
    vector: SteeringVector
    coefficient: Coefficient
    folder: Path

    def acts(self) -> Sequence[Step]:
        """What is carried; `InputError` unless it can be, the folder is new and weights are plain.

        The weights have to be those of a checkpoint, with a tokenizer.
        """
        check_is_new(self.folder)
        self.vector.check_model(self.model)
        wrapped = hugging_face_model(self.model)
        if wrapped is None or provenance(self.model).weight_processing != "none":
            raise InputError(
                "expected a TransformerBridge without weight processing: only its weights are "
                "those of a Hugging Face checkpoint; load the model with load_model"
            )
        if self.model.tokenizer is None:
            raise InputError("the model has no tokenizer to go with the checkpoint; set one first")
        acts = steps(self.vector, self.coefficient)
        if not acts:
            raise InputError("coefficient 0 changes nothing; give another one")
        return acts

    def check_logits(self, plain: Any, what: str = "baked checkpoint") -> None:
        """Raise `InputError` unless `plain` gives the logits of the hooked model."""
        tokens, _ = probe(self.model)
        with inference(self.model):
            with steer(self.model, self.vector, self.coefficient):
                hooked = self.model(tokens).float().cpu()
            baked = plain.to(tokens.device)(tokens).logits.float().cpu()
        largest = float((hooked - baked).abs().max() / hooked.abs().max())
        tolerance = allowed_gap(self.model.cfg.dtype, least=TOLERANCE)
        if not largest <= tolerance:
            raise InputError(
                f"the {what}'s logits differ from the hooked model's by {largest:.2g} of the "
                f"largest (expected at most {tolerance:.2g}): this model cannot carry the vector "
                "in that way, or its weights were changed after loading"
            )

    def write(self, changes: Mapping[str, Any], fill: Callable[[Path], None]) -> Path:
        """Write the folder whole: what `fill` puts there, and the record of what was changed."""
        record = {
            **changes,
            "coefficient": str(self.coefficient),
            "vector": self.vector.describe(),
            "model": provenance(self.model).to_dict(),
        }

        def with_record(folder: Path) -> None:
            fill(folder)
            write_json(record, folder / RECORD)

        try:
            write_whole_folder(self.folder, with_record)
        except (OSError, ValueError) as error:  # transformers checks the generation settings
            raise InputError(f"cannot write {str(self.folder)!r}: {error}") from error
        return self.folder


def check_is_new(folder: Path) -> None:
    """Raise `InputError` when `folder` is there and not an empty folder, a link, or no name."""
    try:
        if folder.is_symlink() or folder.resolve() == Path.cwd():
            raise InputError(f"{str(folder)!r} is a link or this folder; give a new folder's name")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"{str(folder)!r} exists and is not empty; choose another folder")
    except OSError as error:
        raise InputError(f"cannot use {str(folder)!r}: {error.strerror}") from error


def _added(model: HookedModel, acts: Sequence[Step]) -> tuple[Any, dict[str, Any]]:
    """The model with what is added in its biases, and what the record says of it."""
    carrier = _carrier(hugging_face_model(model).config)
    plain = plain_model(model, carrier.switches, as_llama=carrier.as_llama)
    weights, added = dict(plain.named_parameters()), {}
    for act in acts:
        bias = carrier.bias.format(hook_layer(act.hook_name))
        if bias not in weights:
            raise InputError(f"this model has no {bias}, so a bias cannot carry the vector")
        with torch.no_grad():
            weights[bias] += (act.amount * act.direction.double()).float().to(weights[bias])
        added[act.hook_name] = {"bias": bias, "residual_units": act.amount}
    what = "a bias was added to block outputs (blocks.N.hook_resid_post, N from 0)"
    return plain, {"what": what, "added": added}


def _ablated(model: HookedModel, acts: Sequence[Step]) -> tuple[Any, dict[str, Any]]:
    """The model whose writers write nothing along the direction, and what the record says of it."""
    direction = acts[0].direction.double()
    cosines = torch.stack([act.direction.double() for act in acts]) @ direction
    if acts[0].amount != 1 or not bool((cosines.abs() > 1 - 1e-6).all()):
        raise InputError("weights can carry one direction, ablated whole: coefficient 1")
    _check_ablated_everywhere(model, [act.hook_name for act in acts])
    plain, written = plain_model(model, {"tie_word_embeddings": False}), []
    with torch.no_grad():
        for name, part in plain.named_modules():
            if not _WRITERS.search(name):
                continue
            written.append(name)
            # A matrix of Linear has a row for each value that it writes, the others a column.
            rows = [part.weight.T if isinstance(part, torch.nn.Linear) else part.weight]
            rows += [part.bias] if getattr(part, "bias", None) is not None else []
            for row in rows:
                unit = direction.to(row.device)
                along = row.double() @ unit
                row -= (along[..., None] * unit).to(row)
    what = "the direction was taken out of all that is written to the residual stream"
    return plain, {"what": what, "ablated": written}


def _check_ablated_everywhere(model: HookedModel, hook_names: Sequence[str]) -> None:
    """Raise `InputError` unless the residual stream is ablated wherever it was written to."""
    first, middle, last = (f"blocks.*.hook_resid_{part}" for part in ("pre", "mid", "post"))
    needed = {*resolve_hooks(model, last), resolve_hooks(model, first)[0]}
    known = {*needed, *resolve_hooks(model, first)}
    with suppress(HookError):  # attention and MLP side by side: nothing is between them
        needed |= {*resolve_hooks(model, middle)}
        known |= needed
    if missing := sorted(needed - {*hook_names}) or sorted({*hook_names} - known):
        raise InputError(
            "ablated weights write nothing along the direction anywhere, so the vector has to act "
            f"at blocks.0.hook_resid_pre, {middle} (where there is one) and {last}; this one "
            f"differs at {', '.join(missing[:3])}"
        )


def _carrier(config: Any) -> Carrier:
    kind = str(config.model_type)
    if getattr(config, "do_layer_norm_before", True) is False:
        raise InputError("this model norms what a block adds, so a bias there is not the addition")
    if kind not in CARRIERS:
        raise InputError(
            f"{kind!r} checkpoints have no bias on what a block adds to the residual stream"
            f"{f': this model {NO_CARRIER[kind]}' if kind in NO_CARRIER else ''}; those of "
            f"{', '.join(CARRIERS)} have; save the vector with save or to_gguf instead"
        )
    if CARRIERS[kind].as_llama:
        _check_like_llama(config)
    return CARRIERS[kind]


def _check_like_llama(config: Any) -> None:
    """Raise `InputError` where a Llama would attend otherwise, which short texts do not show."""
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    rope = getattr(config, "rope_parameters", None) or {}
    if slides and window is not None and window < config.max_position_embeddings:
        raise InputError(
            f"this model attends to {window} tokens only, and a Llama, whose checkpoint would "
            "carry the bias, to all; save the vector with save or to_gguf instead"
        )
    if rope.get("rope_type") == "longrope" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            "this model's rotary positions are not a Llama's, whose checkpoint would carry the "
            "bias; save the vector with save or to_gguf instead"
        )


def _as_llama(config: Any) -> Any:
    """The config of the Llama that an architecture is but for its name."""
    import transformers

    own, llama = config.to_dict(), transformers.LlamaConfig()
    shared = {*llama.to_dict()} - {"model_type", "architectures", "transformers_version"}
    return transformers.LlamaConfig(**{name: own[name] for name in shared & {*own}})


def _split(weights: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """The weights with the matrices that Phi-3 has in one taken apart, as a Llama has them."""
    n_query, n_key = config.num_attention_heads, config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // n_query
    apart = {
        "qkv_proj": (("q_proj", n_query * width), ("k_proj", n_key * width))
        + (("v_proj", n_key * width),),
        "gate_up_proj": tuple((n, config.intermediate_size) for n in ("gate_proj", "up_proj")),
    }
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        whole = next((whole for whole in apart if f".{whole}." in name), None)
        if whole is None:
            found[name] = weight
            continue
        parts, sizes = zip(*apart[whole], strict=True)
        for part, rows in zip(parts, torch.split(weight, list(sizes)), strict=True):
            found[name.replace(f".{whole}.", f".{part}.")] = rows
    return found


def plain_model(model: HookedModel, switches: Mapping[str, bool], *, as_llama: bool = False) -> Any:
    """A Hugging Face model of its own with the same weights, its new biases zero."""
    import transformers

    wrapped = hugging_face_model(model)
    config = _as_llama(wrapped.config) if as_llama else copy.deepcopy(wrapped.config)
    for name, value in switches.items():
        setattr(config, name, value)
    # What the Bridge asks for, to hook attention; a checkpoint should not be bound to it.
    config.output_attentions = False
    config._attn_implementation = None
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=model.cfg.dtype).eval()
    weights = {checkpoint_name(name): weight for name, weight in wrapped.state_dict().items()}
    if as_llama:
        weights = _split(weights, wrapped.config)
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
