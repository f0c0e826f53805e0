"""Vectors as files that other tools load beside a checkpoint: lm-eval-harness, vLLM, PEFT."""

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerlens.errors import InputError
from steerlens.files import write_json
from steerlens.models.hooked_model import HookedModel, hugging_face_model
from steerlens.models.hooks import hook_layer
from steerlens.models.identity import provenance
from steerlens.models.weight_processing import UNKNOWN
from steerlens.steering import Ablate, Add, Clamp, Coefficient, SteeringVector, steps
from steerlens.steering.apply import Step
from steerlens.steering.export.gguf_file import block_rows
from steerlens.steering.export.huggingface import CARRIERS, LLAMA, Carried, plain_model
from steerlens.steering.vector_file import write_named
from steerlens.validation import checked

_BLOCKS = {
    "opt": "decoder.layers",
    "llama4_text": "model.layers",
    **dict.fromkeys(("gpt2", "gptj", "bloom", "falcon"), "h"),
}
"""Hugging Face model type -> where its base model has its blocks, if not `layers`."""


@checked
def to_lm_eval(vector: SteeringVector, path: str | Path, coefficient: Coefficient) -> None:
    """Write what lm-evaluation-harness's model type `steered` takes as `steer_path`.

    `layers.N` (as the architecture names its blocks) is the output of block N, as here, at every
    token. `Add` becomes its action add, with `scale * direction` times the coefficient;
    `Clamp(value)` with coefficient 1 its clamp. The harness reads the file by `torch.load`, so it
    is a pickle, of tensors and plain values alone.

    Args:
        vector: acts at block outputs, by `Add` or `Clamp`, without a condition.
        path: ends in .pt.
        coefficient: as in `Coefficient`, not 0; the harness takes it from the file.

    Raises:
        InputError: the vector is another one or of an unknown architecture, the coefficient has no
            meaning for it, or the file cannot be written.

    Examples:
        >>> sl.export.to_lm_eval(vector, folder / "cheerful.pt", 4)
    """
    operator = vector.operator
    acts = _block_acts(vector, coefficient, "lm-evaluation-harness", Clamp)
    architecture = vector.origin.architecture
    if architecture == UNKNOWN:
        raise InputError(
            "the vector does not say of which architecture it is, so what its blocks are called is "
            "not known; make it with model= (from_tensor), or from directions"
        )
    blocks = _BLOCKS.get(architecture, "layers")
    hooks: dict[str, Any] = {}
    for act in acts:
        amount = operator.value if isinstance(operator, Clamp) else act.amount
        hooks[f"{blocks}.{hook_layer(act.hook_name)}"] = {
            "steering_vector": act.direction.float().cpu().clone(),
            "steering_coefficient": float(amount),
            "action": "clamp" if isinstance(operator, Clamp) else "add",
            "bias": None,
            "head_index": None,
        }
    write_named(path, ".pt", lambda part: torch.save(hooks, part))


@checked
def to_easysteer(vector: SteeringVector, path: str | Path, coefficient: Coefficient) -> None:
    """Write a steering spec of EasySteer's vLLM, with the vector inside it.

    The file is what `vllm serve --steering-config` takes and, read as JSON, what a request has as
    `steering`. A layer there is a block here, from 0. `Add` becomes the algorithm direct, with
    `scale * direction` times the coefficient as its vector, so that scale 1 there is the
    coefficient; `Ablate` with coefficient 1 becomes erase. All tokens are steered.

    Args:
        vector: acts at block outputs, by `Add` or `Ablate`, without a condition.
        path: ends in .json.
        coefficient: as in `Coefficient`, not 0.

    Raises:
        InputError: the vector is another one, the coefficient has no meaning for it, or the file
            cannot be written.

    Examples:
        >>> sl.export.to_easysteer(vector, folder / "cheerful.json", 4)
    """
    acts = _block_acts(vector, coefficient, "EasySteer", Ablate)
    erases = isinstance(vector.operator, Ablate)
    rows = {
        f"layer.{hook_layer(act.hook_name)}": (
            act.direction.double() * (1 if erases else act.amount)
        )
        .float()
        .cpu()
        .numpy()
        for act in acts
    }
    digest = hashlib.sha256(b"direction:1")
    for name, row in sorted(rows.items()):
        digest.update(name.encode() + str(row.shape).encode() + row.tobytes())
    payload = {
        "version": 1,
        "kind": "direction",
        "tensors": {
            name: {"shape": list(row.shape), "data": base64.b64encode(row.tobytes()).decode()}
            for name, row in rows.items()
        },
        "extra": {},
        "sha256": digest.hexdigest(),
    }
    spec = {
        "data": payload,
        "algorithm": "erase" if erases else "direct",
        "scale": 1.0,
        "layers": [hook_layer(act.hook_name) for act in acts],
        "apply": {"prompt": "all", "generation": "all"},
        "name": f"steerlens {vector.fingerprint[:12]} at {coefficient}",
    }
    write_named(path, ".json", lambda part: write_json({"vectors": [spec]}, part))


def _block_acts(
    vector: SteeringVector, coefficient: Coefficient, target: str, whole: type[Clamp | Ablate]
) -> Sequence[Step]:
    """What is done at block outputs, where the target can: by `Add`, or by `whole` at strength 1.

    Raises `InputError` where it cannot, and where nothing is done.
    """
    is_whole = isinstance(vector.operator, whole) and vector.condition is None
    block_rows(replace(vector, operator=Add()) if is_whole else vector, target)
    acts = steps(vector, coefficient)
    if not acts:
        raise InputError(f"coefficient 0 changes nothing; run {target} without a vector")
    for act in acts:
        if is_whole and act.amount != 1:
            name = vector.operator.name
            raise InputError(f"{target} {name}s whole: coefficient 1, not {act.amount:g}")
    return acts


@checked
def to_peft(
    model: HookedModel, vector: SteeringVector, coefficient: Coefficient, out_dir: str | Path
) -> Path:
    """Write a PEFT adapter that adds the vector: `PeftModel.from_pretrained(base, out_dir)`.

    It is a LoRA of rank 1 on the last matrix of each block's MLP, whose matrices are zero and whose
    bias (`lora_bias`) is what is added, so the base needs no bias of its own. Before anything is
    written the logits of the base with that addition are compared with the hooked model's, as
    `bake` does.

    Args:
        model: a `TransformerBridge` without weight processing, of the base checkpoint.
        vector: added everywhere, at block outputs.
        coefficient: as in `Coefficient`, not 0.
        out_dir: a new or empty folder.

    Returns:
        `out_dir`.

    Raises:
        InputError: an argument is another than said, the coefficient has no meaning for the vector,
            the model has no such matrix (experts), or it does something to what the MLP adds, such
            as norming it (Gemma 2 and 3, OLMo 2), so that the logits differ.

    Examples:
        >>> path = sl.export.to_peft(model, vector, 4, folder / "adapter")
        >>> sorted(file.name for file in path.iterdir())
        ['adapter_config.json', 'adapter_model.safetensors', 'steerlens.json']
    """
    from safetensors.torch import save_file

    block_rows(vector, "a PEFT adapter")
    carried = Carried(model, vector, coefficient, Path(out_dir))
    acts = carried.acts()
    kind = str(hugging_face_model(model).config.model_type)
    carrier = CARRIERS[kind].bias if kind in CARRIERS else LLAMA
    added = {
        carrier.format(hook_layer(act.hook_name)).removesuffix(".bias"): (
            act.amount * act.direction.double()
        ).float()
        for act in acts
    }
    base = plain_model(model, {})
    matrices = dict(base.named_modules())
    if missing := [name for name in added if not hasattr(matrices.get(name), "weight")]:
        raise InputError(
            f"this model has no matrix {missing[0]!r} for an adapter to add to; save the vector "
            "with save or to_lm_eval instead"
        )
    with _adding({matrices[name]: row for name, row in added.items()}):
        carried.check_logits(base, "adapter")
    tensors: dict[str, Tensor] = {}
    for name, row in added.items():
        # A matrix of Linear has a column for each value that it reads, GPT-2's a row.
        n_in = matrices[name].weight.shape[isinstance(matrices[name], torch.nn.Linear)]
        prefix = f"base_model.model.{name}"
        tensors[f"{prefix}.lora_A.weight"] = torch.zeros(1, n_in)
        tensors[f"{prefix}.lora_B.weight"] = torch.zeros(len(row), 1)
        tensors[f"{prefix}.lora_B.bias"] = row.cpu().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": provenance(model).name,
        "r": 1,
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "lora_bias": True,
        "bias": "none",
        "target_modules": list(added),
        "fan_in_fan_out": kind == "gpt2",
        "inference_mode": True,
    }
    changes = {
        "what": "a bias of a LoRA is added to block outputs (blocks.N.hook_resid_post, N from 0)",
        "added": {act.hook_name: {"residual_units": act.amount} for act in acts},
    }

    def fill(folder: Path) -> None:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(config, folder / "adapter_config.json")

    return carried.write(changes, fill)


@contextmanager
def _adding(added: Mapping[torch.nn.Module, Tensor]) -> Iterator[None]:
    """A row is added to the output of each module inside the block."""
    with ExitStack() as stack:
        for module, row in added.items():
            handle = module.register_forward_hook(lambda _m, _i, out, row=row: out + row.to(out))
            stack.callback(handle.remove)
        yield
