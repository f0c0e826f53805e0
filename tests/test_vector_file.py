"""The file of a steering vector: what is in it, who reads it, what is refused."""

# ruff: noqa: F401, F811 (fixtures are imported, and named as parameters)

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import bridge, build_llama, build_tokenizer
from safetensors.torch import load, save
from test_vector import FILES, HOOKS, A, layers, logits, made, vector

import steerlens as sl
from steerlens.errors import InputError
from steerlens.models.identity import tokenizer_fingerprints, weights_fingerprint
from steerlens.steering import Origin
from steerlens.steering.vector_file import KEY

# Keeping


@pytest.fixture
def saved(vector: sl.SteeringVector, tmp_path: Path) -> Path:
    vector.save(tmp_path / "v.safetensors")
    return tmp_path / "v.safetensors"


def test_a_file_holds_everything(vector: sl.SteeringVector, tmp_path: Path) -> None:
    """Field by field: comparing bytes would not see a field that is written wrong."""
    unit = torch.nn.functional.normalize(torch.ones(32), dim=0)
    condition = sl.Condition(HOOKS[0], unit, 0.5)
    turned = replace(condition, above=False, scope="token")
    path = tmp_path / "v.safetensors"
    for saved in (
        vector,
        replace(3 * vector, operator=sl.Clamp(2.5), condition=turned),
        replace(vector, condition=condition),
        made(A),
    ):
        saved.save(path)
        again = sl.SteeringVector.load(path)
        assert again == saved
        assert torch.equal(again.directions, saved.directions)
        assert torch.equal(again.scale, saved.scale)
        for name in ("resid_norm", "boundary_neg", "boundary_pos"):
            mine, theirs = (getattr(v.calibration, name) for v in (saved, again))
            assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())
        assert again.calibration.budget == saved.calibration.budget
        assert again.calibration.text == saved.calibration.text
        assert again.operator == saved.operator
        assert again.condition == saved.condition != replace(condition, above=False)
        assert again.origin == saved.origin
        again.save(path)
        content = path.read_bytes()
        assert content == saved.to_bytes()
        assert b"output of block N" in content
        assert b"residual units" in content
    assert vector != 2 * vector


def test_headers_of_any_length_are_read(tmp_path: Path) -> None:
    """Some lengths, as the first bytes of the file, look like the start of a pickle."""
    looks_like = 0
    for extra in range(0, 300, 4):
        path = tmp_path / "v.safetensors"
        made([3.0, 4.0], origin=Origin(dataset="x" * extra)).save(path)
        looks_like += path.read_bytes()[:1] == b"\x80"
        assert sl.SteeringVector.load(path).origin.dataset == "x" * extra
    assert looks_like


def test_the_same_logits_in_a_new_process(
    saved: Path, vector: sl.SteeringVector, tmp_path: Path
) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, steerlens as sl
from conftest import bridge, build_llama
torch.set_num_threads(1)
model = bridge(build_llama())
vector = sl.SteeringVector.load({str(saved)!r}, model=model)
with torch.no_grad(), sl.steer(model, vector, "40%"):
    torch.save(model(torch.tensor([[1, 7, 9, 11]])), {str(tmp_path / "logits.pt")!r})
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)
    model = bridge(build_llama())
    with sl.steer(model, vector, "40%"):
        assert torch.equal(logits(model), torch.load(tmp_path / "logits.pt"))
    assert not torch.equal(logits(model), torch.load(tmp_path / "logits.pt"))


def test_another_model_is_told_apart(saved: Path, llama: Any, gpt2: Any, recwarn: Any) -> None:
    sl.SteeringVector.load(saved, model=llama)
    assert not [w for w in recwarn if "steering" in str(w.filename) or "vector" in str(w.message)]
    with pytest.warns(UserWarning, match="other weights"):
        sl.SteeringVector.load(saved, model=bridge(build_llama(seed=1)))
    templated = bridge(build_llama(), tokenizer=build_tokenizer(chat_template="{{ messages }}"))
    with pytest.warns(UserWarning, match="other chat template"):
        sl.SteeringVector.load(saved, model=templated)
    with pytest.warns(UserWarning, match="other tokenizer"):
        sl.SteeringVector.load(saved, model=bridge(build_llama(), build_tokenizer(pad_token="a")))
    with pytest.raises(InputError, match=r"no hook blocks\.2\.hook_resid_post .*2 layers"):
        sl.SteeringVector.load(saved, model=bridge(build_llama(n_layers=2)))
    narrow = made([1.0, 2.0])
    with pytest.raises(InputError, match="d_model 2, the model 32"):
        narrow.check_model(llama)


def test_fingerprints() -> None:
    model = bridge(build_llama())
    before = weights_fingerprint(model)
    assert before == weights_fingerprint(bridge(build_llama()))
    with torch.no_grad():
        next(iter(model.original_model.parameters())).add_(1e-3)
    assert weights_fingerprint(model) != before
    assert weights_fingerprint(bridge(build_llama(dtype=torch.bfloat16))) != before
    assert tokenizer_fingerprints(None) == ("unknown", "unknown")
    assert tokenizer_fingerprints(build_tokenizer(chat_template=None))[1] == "none"


def test_names_of_files(vector: sl.SteeringVector, tmp_path: Path) -> None:
    for call, name, message in (
        (vector.save, "v.pt", r"ends in \.safetensors"),
        (vector.save, "missing/v.safetensors", "No such file"),
        (sl.SteeringVector.load, "v.safetensors", "No such file"),
        (sl.SteeringVector.load, "v.pt", "is a pickle"),
    ):
        with pytest.raises(InputError, match=message):
            call(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[]", "not an object"),
        ("{", "not a whole safetensors file"),
        ({"format": "another"}, "no steering vector of steerlens"),
        ({"scale": [1.0, 5.0]}, "was changed"),
        ({"hooks": None}, "was changed"),
    ],
)
def test_metadata_that_do_not_fit(saved: Path, change: Any, message: str) -> None:
    """Beside those in tests/files/hostile."""
    content = saved.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][KEY])
    text = change if isinstance(change, str) else json.dumps(header | change)
    saved.write_bytes(save(load(content), {KEY: text}))
    with pytest.raises(InputError, match=f"cannot load .*{message}"):
        sl.SteeringVector.load(saved)


def test_records_that_do_not_fit(vector: sl.SteeringVector) -> None:
    """Beside those in tests/files/hostile."""
    tensors, record = vector.to_record()
    assert sl.SteeringVector.from_record(tensors, record) == vector
    changes: list[dict[str, Any]] = [
        {"scale": [True, True]},
        {"condition": {"hook": "x"}},
        {"boundary_pos": 3},
        {"resid_norm": []},
        {"origin": vector.origin.to_dict() | {"model": "\ud800"}},
        {"origin": vector.origin.to_dict() | {"pair_hashes": 7}},
        {"origin": vector.origin.to_dict() | {"pair_hashes": ["a", 7]}},
    ]
    for change in changes:
        with pytest.raises(InputError):
            sl.SteeringVector.from_record(tensors, record | change)


def test_a_file_of_version_1_stays_readable() -> None:
    vector = sl.SteeringVector.load(FILES / "vector_v1.safetensors")
    assert vector.hook_names == ("blocks.0.hook_resid_post", "blocks.2.hook_resid_post")
    torch.testing.assert_close(vector.rows, torch.tensor([[3.0, 4.0], [0.0, -2.0]]))
    assert vector.calibration.boundary_pos.tolist() == [8.0, math.inf]
    assert vector.calibration.boundary_neg[0].isnan()
    assert vector.origin.method == "mean_diff"
    assert vector.origin.pair_hashes == ()
    assert vector.condition is not None
    assert vector.condition.threshold == 0.5


def test_what_a_vector_says_of_itself(vector: sl.SteeringVector) -> None:
    told = vector.describe()
    assert told["method"] == "mean_diff"
    assert told["boundary"] == "kl=0.5, on positive text"
    assert "torch" in told["versions"]
    assert "pair_hashes" not in told
