"""Load a `HookedTransformer`, the model class of TransformerLens 3, without weight processing."""

import io
import json
import tempfile
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from steerlens.errors import ModelError
from steerlens.models.checkpoint import load_checkpoint

_N_CHECKED = 16
_OWN_FORMAT = ("NeelNanda", "ArthurConmy", "Baidicoot")
"""Owners of models on the hub that are not in Hugging Face's format: TransformerLens reads them."""
_PROCESSING = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")


def is_version_3() -> bool:
    """Whether the TransformerLens that is installed is of version 3."""
    return version("transformer-lens").startswith("3.")


def load_hooked_transformer(
    name: str,
    *,
    device: str | torch.device | None,
    dtype: torch.dtype,
    revision: str | None,
    trust_remote_code: bool,
) -> Any:
    """A `HookedTransformer` of a local Hugging Face folder, or of a name TransformerLens knows.

    Config and weights of a folder are translated by TransformerLens's own code for the
    architecture. What that code does not know of it leaves out, so the model has to predict what
    the Hugging Face model predicts. Raises `ModelError` when it does not; errors of both libraries
    come through.
    """
    if not Path(name).is_dir():
        from transformer_lens import HookedTransformer
        from transformer_lens import loading_from_pretrained as loading

        options: dict[str, Any] = {} if revision is None else {"revision": revision}
        options |= {"trust_remote_code": True} if trust_remote_code else {}
        official = loading.get_official_model_name(name)
        if not official.startswith(_OWN_FORMAT):
            options["hf_model"] = load_checkpoint(official, dtype=dtype, **options)
        with redirect_stdout(io.StringIO()):  # it says there that it is done
            return HookedTransformer.from_pretrained_no_processing(
                name, device=device, dtype=dtype, **options
            )
    import transformers

    local: dict[str, Any] = {"trust_remote_code": trust_remote_code, "local_files_only": True}
    original = load_checkpoint(name, dtype=dtype, **local)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **local)
    model = _translated(Path(name), original.eval(), tokenizer, device=device, dtype=dtype)
    check_predictions(model, original)
    return model


def _translated(
    folder: Path, original: Any, tokenizer: Any, *, device: Any, dtype: torch.dtype
) -> Any:
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as loading

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "n_positions" in config:  # GPT-2 was once saved with its context under both names
        config.setdefault("n_ctx", config["n_positions"])
    # The architecture is guessed from the name before the config is read: a path may hold any word.
    with tempfile.TemporaryDirectory() as plain:
        (Path(plain) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        cfg = loading.get_pretrained_model_config(
            plain, hf_cfg=original.config.to_dict(), device=device, dtype=dtype
        )
    cfg.model_name, cfg.tokenizer_name = folder.name, str(folder)
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    with torch.no_grad():
        state = loading.get_pretrained_state_dict(str(folder), cfg, original, dtype=dtype)
        model.load_and_process_state_dict(state, **dict.fromkeys(_PROCESSING, False))
    model.move_model_modules_to_device()
    return model.eval()


def check_predictions(model: Any, original: Any) -> None:
    """Raise `ModelError` when the model's logprobs of some tokens are not the original's.

    Both are run on 16 ids spread over the vocabulary. Logprobs may differ by 1e-3 nats, or 16 times
    the epsilon of a 16-bit dtype of their largest size.
    """
    ids = torch.linspace(0, original.config.vocab_size - 1, _N_CHECKED).long()[None]
    with torch.no_grad():
        logits = model(ids.to(model.cfg.device), return_type="logits")
        expected = original(ids.to(original.device)).logits
    ours, theirs = (rows[0].float().cpu().log_softmax(-1) for rows in (logits, expected))
    eps = torch.finfo(model.cfg.dtype).eps
    allowed = max(1e-3, 16 * eps * float(theirs.abs().max()))
    off = float((ours - theirs).abs().max())
    if not off <= allowed:
        raise ModelError(
            f"TransformerLens {version('transformer-lens')} does not translate this checkpoint "
            f"faithfully: logprobs differ from those of transformers by {off:.2g} nats (a setting "
            "of its config is not supported); use TransformerLens 4"
        )
