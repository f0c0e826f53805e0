"""Hugging Face's model of a checkpoint that is whole, causal, and no larger than its files."""

import copy
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from steerlens.errors import MemoryLimitError, ModelError, told
from steerlens.files import read_whole

MAX_PARTS = 10_000
"""The most layers, experts or classes that a config may ask for: each takes memory by itself."""

BYTES_PER_FILE_BYTE = 32
"""How much larger than its files a model may be: weights of two bits, read as float64."""

_SMALL = 1 << 26  # bytes that are never too many: masks and positions are in no file
_SHOWN = 6  # names in an error
_PARTS = re.compile(r"(layers?|blocks?|experts?|labels|depth)$")
_OF_CONFIG = ("revision", "trust_remote_code", "token", "gguf_file", "local_files_only")
_MASKS = re.compile(
    r"(attn|attention)\.(bias|masked_bias|causal_mask)$|rotary_emb\.\w+$|(^|\.)version$"
)
"""What older versions of transformers saved beside the weights, and the present one computes."""
_TEXT_PART = {
    r"^(model\.)?language_model\.lm_head": "lm_head",
    r"^(model\.)?language_model\.(model\.)?": "model.",
}
"""Where a multimodal checkpoint has the weights of its text part, and where that alone has them."""
_OTHER_PARTS = re.compile(
    r"(model\.)?(vision|visual|audio|image|multi_modal|mm_|embed_vision|embed_audio)"
)
"""The weights of its other parts."""


def check_config_file(folder: Path) -> None:
    """Raise `ModelError` where a folder's config asks for more parts than any model has.

    Lists as long as that are made when the config is read, so it is looked at before.
    """
    path = folder / "config.json"
    try:
        numbers = [*_numbers(json.loads(read_whole(path, ModelError)))]
    except RecursionError as error:
        raise ModelError(f"{path}: nested too deep; no config is") from error
    except ValueError:
        return  # not JSON, which the load says better
    for name, value in numbers:
        if _PARTS.search(name) and abs(value) > MAX_PARTS:
            raise ModelError(
                f"{path}: {name} is {told(value)}, and no model has more than "
                f"{MAX_PARTS}; the file is damaged or not what it says"
            )


def load_checkpoint(name: str, **options: Any) -> Any:
    """Hugging Face's model, every weight of which comes from the checkpoint.

    Of a multimodal one the text part, where transformers has a causal language model for it that
    TransformerLens knows.

    Args:
        name: A folder or a hub id.
        options: As `from_pretrained` of the auto classes takes them.

    Raises:
        ModelError: It is no causal language model; its config asks for far more memory than its
            files have; weights are missing, of another shape or left over; a multimodal model's
            library is not installed.
        MemoryLimitError: Its weights do not fit into this machine.
    """
    config = options.get("config")
    if config is None:
        config = read_config(name, options)
    _check_kind(config)
    auto = _auto_class(config)
    if has_text_part(config):
        config = _text_part(config)
        options |= {"config": config, "key_mapping": _TEXT_PART}
    _check_size(auto, config, Path(name), options)
    model, found = auto.from_pretrained(
        name, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    _check_whole(name, type(model).__name__, config, found, is_part="key_mapping" in options)
    return model


def has_text_part(config: Any) -> bool:
    """Whether a config is of a multimodal model whose text part can be loaded by itself."""
    import transformers
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    text = config.get_text_config(decoder=True)
    models = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if text is config or type(text) not in models:
        return False
    return models[type(text)].__name__ in SUPPORTED_ARCHITECTURES


def read_config(name: str, options: Mapping[str, Any]) -> Any:
    """The config of a folder or hub id, by those of the options that it takes."""
    import transformers

    of_config = {key: options[key] for key in _OF_CONFIG if key in options}
    return transformers.AutoConfig.from_pretrained(name, **of_config)


def _text_part(config: Any) -> Any:
    """The config of the text part of a multimodal model."""
    import transformers

    text = copy.deepcopy(config.get_text_config(decoder=True))
    text.architectures = [transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(text)].__name__]
    text.tie_word_embeddings = config.tie_word_embeddings
    return text


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    """Every whole number of a JSON object with its name, nested ones too."""
    items: Iterable[tuple[str, Any]] = ()
    if isinstance(config, dict):
        items = ((str(key), value) for key, value in config.items())
    elif isinstance(config, list):
        items = (("", value) for value in config)
    for name, value in items:
        if isinstance(value, int) and not isinstance(value, bool):
            yield name, value
        else:
            yield from _numbers(value)


def _check_kind(config: Any) -> None:
    """Raise `ModelError` on what is no causal language model, or needs a library that is absent."""
    import transformers

    names = [str(name) for name in getattr(config, "architectures", None) or ()]
    what = f"the checkpoint is of {names[0] if names else f'model type {config.model_type!r}'}"
    expected = "expected a causal language model, such as LlamaForCausalLM"
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "is_encoder_decoder", False):
        raise ModelError(f"{what}, an encoder-decoder; {expected}")
    is_encoder = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    if is_encoder and not getattr(config, "is_decoder", False):
        raise ModelError(f"{what}, an encoder, whose tokens see those after them; {expected}")
    is_known = type(config).__module__.startswith("transformers.")
    for name in names:
        meant = (
            getattr(getattr(transformers, name, None), "config_class", None) if is_known else None
        )
        if meant not in (None, type(config), type(text)):
            raise ModelError(
                f"config.json says architectures {name}, which is no model of the type "
                f"{config.model_type!r} that it says too; correct the one that is wrong"
            )
    if text is not config and not has_text_part(config):
        _check_torchvision(what)


def _check_torchvision(what: str) -> None:
    """Raise `ModelError` without torchvision, which TransformerLens would install by itself."""
    try:
        import torchvision  # type: ignore[import-not-found, unused-ignore]  # noqa: F401
    except Exception as error:  # one that does not fit to torch raises RuntimeError
        raise ModelError(
            f"{what}, a multimodal model, and TransformerLens needs torchvision to load one: "
            "pip install torchvision, in the version that goes with the torch that is installed"
        ) from error


def _auto_class(config: Any) -> Any:
    """The class of transformers that finds the model's own."""
    import transformers

    if config.get_text_config(decoder=True) is not config and not has_text_part(config):
        for auto, mapping in (
            (transformers.AutoModelForImageTextToText, "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"),
            (transformers.AutoModelForSeq2SeqLM, "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
        ):
            if type(config) in getattr(transformers, mapping):
                return auto
    own = getattr(config, "auto_map", None) or {}
    is_plain = "AutoModel" in own and "AutoModelForCausalLM" not in own
    return transformers.AutoModel if is_plain else transformers.AutoModelForCausalLM


def _check_size(auto: Any, config: Any, path: Path, options: dict[str, Any]) -> None:
    """Raise where the model is far larger than its files, or than the memory that there is."""
    dtype = options.get("torch_dtype") or options.get("dtype") or torch.float32
    trusted = {key: options[key] for key in ("trust_remote_code",) if options.get(key)}
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            empty = auto.from_config(config, **trusted)
    except AssertionError as error:
        _check_padding(config.get_text_config(decoder=True), error)
        raise
    n_values = sum(part.numel() for part in (*empty.parameters(), *empty.buffers()))
    n_bytes = n_values * dtype.itemsize
    files = [*path.glob("*.safetensors"), *path.glob("*.bin"), *path.glob("*.gguf")]
    in_files = sum(file.stat().st_size for file in files)
    if files and n_bytes > max(BYTES_PER_FILE_BYTE * in_files, _SMALL):
        raise ModelError(
            f"config.json asks for {_told_bytes(n_bytes)} of weights, and the checkpoint's files "
            f"have {_told_bytes(in_files)}; the config is damaged or not of this checkpoint"
        )
    is_quantized = "quantization_config" in options or hasattr(config, "quantization_config")
    memory = _memory()
    if not is_quantized and n_bytes > memory:
        raise MemoryLimitError(
            f"the model takes {_told_bytes(n_bytes)} in {str(dtype).removeprefix('torch.')}, and "
            f"this machine has {_told_bytes(memory)}; load a smaller one, or in "
            "dtype=torch.bfloat16"
        )


def _check_padding(text: Any, error: AssertionError) -> None:
    """Raise `ModelError` where PyTorch refuses a pad token that the vocabulary does not have."""
    pad, n_rows = getattr(text, "pad_token_id", None), getattr(text, "vocab_size", None)
    if pad is not None and n_rows is not None and not -n_rows <= pad < n_rows:
        raise ModelError(
            f"config.json has pad_token_id {pad}, and vocab_size {n_rows}, so there is no such "
            "token; set pad_token_id to null, or resize the model's embeddings and save it again"
        ) from error


def _memory() -> int:
    """Bytes of the machine's memory, that of its GPUs included."""
    import psutil

    gpus = range(torch.cuda.device_count())
    total = sum(torch.cuda.get_device_properties(gpu).total_memory for gpu in gpus)
    return int(psutil.virtual_memory().total) + total


def _told_bytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e7 else f"{n_bytes:,} bytes"


def _check_whole(
    name: str, kind: str, config: Any, found: dict[str, Any], *, is_part: bool
) -> None:
    """Raise `ModelError` where weights were made up, cut or left over, by what the load found."""
    missing = sorted(found["missing_keys"])
    unread = sorted(
        key
        for key in found["unexpected_keys"]
        if not _MASKS.search(key) and not (is_part and _OTHER_PARTS.match(key))
    )
    shapes = [
        f"{key} ({tuple(there)} instead of {tuple(here)})"
        for key, there, here in sorted(found["mismatched_keys"])
    ]
    parts = [
        f"{words}: {_first(keys)}"
        for words, keys in (
            ("missing from it", missing),
            ("of another shape", shapes),
            ("left over", unread),
        )
        if keys
    ]
    if parts:
        says = ", ".join(map(str, getattr(config, "architectures", None) or ()))
        of = f" (its config says {says})" if says not in ("", kind) else ""
        raise ModelError(
            f"{name!r} is no whole checkpoint of {kind}{of}: {'; '.join(parts)}; give the one that "
            "its config is of; if what is left over is not needed, load it with transformers and "
            "save it again"
        )


def _first(keys: list[str]) -> str:
    more = f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else ""
    return ", ".join(keys[:_SHOWN]) + more
