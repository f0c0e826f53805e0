"""Run folders: nothing is lost, files are whole, the record says what was run."""

import hashlib
import json
import math
import platform
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from commands import content
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import steerlens as sl
from steerlens.errors import FileError
from steerlens.files import write_whole
from steerlens.runs import record as runs
from steerlens.runs.record import (
    RUN_FILES,
    check_run_folder,
    read_directions,
    write_directions,
    write_run,
)

REQUEST: dict[str, Any] = {
    "command": "sweep",
    "model": {"name": "tiny", "file_hash": "abc"},
    "hook_names": ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post"),
    "coefficients": [-1.0, 0.0, 1.0],
    "seed": 0,
}


@pytest.fixture(scope="module")
def result(llama: Any, pairs: sl.ContrastivePairs) -> sl.measure.SweepResult:
    """A sweep of layers 0 and 1 of 5, whose readout is layer 2."""
    directions = sl.fit_directions(
        sl.collect_differences(llama, pairs, layers="0,1"), method="random", seed=4
    )
    return sl.sweep(llama, pairs, directions, coefficients=[-1, 0, 1], n_bootstrap=50)


def write(folder: Path, result: sl.measure.SweepResult, seconds: float = 1.0) -> None:
    tables = {"sweep": result.table, "layers": result.layers}
    spent = result.layers.attrs["forward_equivalents"]
    write_run(
        folder, tables, result.directions, REQUEST, seconds=seconds, forward_equivalents=spent
    )


@pytest.fixture
def written(result: sl.measure.SweepResult, tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    check_run_folder(folder, REQUEST)
    write(folder, result, seconds=1.23456)
    return folder


def refused(folder: Path, request: dict[str, Any]) -> str:
    """The message with which the folder is refused; nothing in it may change."""
    before = content(folder)
    with pytest.raises(FileError) as error:
        check_run_folder(folder, request)
    assert content(folder) == before
    message = str(error.value)
    assert "\n" not in message
    assert str(folder) in message
    assert "--out" in message
    return message


# check_run_folder


@pytest.mark.parametrize("name", [".", "run", "a/b/run"])
def test_a_new_folder_is_made_and_foreign_files_are_accepted(name: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    check_run_folder(folder, REQUEST)
    assert content(folder) == {}
    (folder / "notes.txt").write_text("mine")
    check_run_folder(folder, REQUEST)
    assert content(folder) == {"notes.txt": b"mine"}


def test_the_same_request_is_accepted_again(written: Path) -> None:
    before = content(written)
    check_run_folder(written, dict(reversed(REQUEST.items())))
    assert content(written) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed (0, now 1)"),
        ({"coefficients": [-1.0, 1.0]}, "coefficients ([-1.0, 0.0, 1.0], now [-1.0, 1.0])"),
        ({"model": {"name": "tiny", "file_hash": "abd"}}, "model.file_hash ('abc', now 'abd')"),
        ({"seed": 1, "command": "other"}, "command ('sweep', now 'other'), seed (0, now 1)"),
        ({"method": "pca"}, "method (nothing, now 'pca')"),
        ({"seed": None}, "seed (0, now nothing)"),
    ],
)
def test_another_request_is_refused_by_name(
    change: dict[str, Any], named: str, written: Path
) -> None:
    check_run_folder(written, REQUEST)
    request = {key: value for key, value in (REQUEST | change).items() if value is not None}
    assert f"other {named};" in refused(written, request)


RESULTS = [*(name for name in RUN_FILES if name != "run.json"), "directions-pca.safetensors"]


@pytest.mark.parametrize("name", RESULTS)
def test_results_without_a_record_are_refused(name: str, tmp_path: Path) -> None:
    check_run_folder(tmp_path, REQUEST)
    (tmp_path / name).write_bytes(b"")
    message = refused(tmp_path, REQUEST)
    assert name in message
    assert "no run.json" in message


@pytest.mark.parametrize("name", ["sweep.csv", "run.json", "directions-pca.safetensors"])
def test_no_link_is_followed(name: str, written: Path, tmp_path: Path) -> None:
    """Nor replaced; a link among the folders above is the user's way to the disk."""
    (tmp_path / "above").symlink_to(tmp_path)
    check_run_folder(tmp_path / "above" / "run", REQUEST)
    with pytest.raises(FileError, match="it is a link; give --out the folder"):
        check_run_folder(tmp_path / "above", REQUEST)
    kept = tmp_path / "kept"
    kept.write_bytes((written / name).read_bytes() if (written / name).exists() else b"")
    (written / name).unlink(missing_ok=True)
    (written / name).symlink_to(kept)
    before = kept.read_bytes()
    assert f"{name}, which is a link" in refused(written, REQUEST)
    with pytest.raises(OSError, match="it is a link"):
        write_whole(written / name, lambda path: path.write_bytes(b"new"))
    assert kept.read_bytes() == before


@pytest.mark.parametrize(
    "record",
    [
        *(b"", b"{", b"[]", b"{}", b"\xff\xfe", b'{"request": 3}', b'{"request": [1]}'),
        json.dumps({"request": REQUEST, "versions": {}}).encode(),  # of another program
    ],
)
def test_a_damaged_record_is_refused(record: bytes, written: Path) -> None:
    check_run_folder(written, REQUEST)
    (written / "run.json").write_bytes(record)
    assert "run.json" in refused(written, REQUEST)


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_file_where_the_folder_should_be(inside: str, tmp_path: Path) -> None:
    (tmp_path / "free").mkdir()
    check_run_folder(tmp_path / "free" / inside, REQUEST)
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(FileError, match=r"cannot write to .*taken.*--out"):
        check_run_folder(tmp_path / "taken" / inside, REQUEST)
    assert (tmp_path / "taken").read_text() == "mine"


# write_whole


@pytest.mark.parametrize("earlier", [None, b"old"])
@pytest.mark.parametrize("raised", [RuntimeError("half way"), KeyboardInterrupt()])
def test_a_failed_write_changes_nothing(
    earlier: bytes | None, raised: BaseException, tmp_path: Path
) -> None:
    path = tmp_path / "table.csv"
    if earlier is not None:
        path.write_bytes(earlier)
    before = content(tmp_path)

    def fail(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        # The old file is whole while the new one is written.
        assert earlier is None or path.read_bytes() == earlier
        assert content(tmp_path) == before | {temporary.name: b"half"}
        raise raised

    with pytest.raises(type(raised)):
        write_whole(path, fail)
    assert content(tmp_path) == before
    write_whole(path, lambda temporary: temporary.write_bytes(b"new") and None)
    assert content(tmp_path) == {"table.csv": b"new"}


# write_run


def test_the_record(written: Path, result: sl.measure.SweepResult) -> None:
    record = json.loads((written / "run.json").read_text(encoding="utf-8"))
    assert record["request"] == json.loads(json.dumps(REQUEST))
    assert record["seconds"] == 1.235
    assert record["forward_equivalents"] == result.layers.attrs["forward_equivalents"] > 1
    assert record["versions"]["python"] == platform.python_version()
    for name in ("steerlens", "torch", "transformers", "transformer-lens", "pandas"):
        assert record["versions"][name] == version(name)
    assert record["tables"] == {
        "sweep": {"rows": 6, "attrs": result.table.attrs},
        "layers": {"rows": 2, "attrs": result.layers.attrs},
    }
    assert record["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in content(written).items()
        if name != "run.json"
    }
    assert (record["format"], record["warnings"]) == (2, [])
    assert datetime.now(timezone.utc) - datetime.fromisoformat(record["finished"]) < timedelta(
        minutes=10
    )


def no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def test_the_record_is_json_also_with_nan_and_inf(tmp_path: Path) -> None:
    """None stands for NaN, and the same request may be run again."""
    table = pd.DataFrame({"x": [1.0]})
    table.attrs.update(searched=math.inf, ratios=[math.nan, -math.inf, 2.0])
    request = REQUEST | {"search_range": math.inf}
    write_run(tmp_path, {"layers": table}, {}, request, seconds=1.0, warnings=["told"])
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    record = json.loads(text, parse_constant=no_constant)
    assert record["tables"]["layers"]["attrs"] == {"searched": "inf", "ratios": [None, "-inf", 2.0]}
    assert record["warnings"] == ["told"]
    check_run_folder(tmp_path, request)
    with pytest.raises(ValueError, match="not JSON"):
        json.loads("[NaN]", parse_constant=no_constant)


def test_directions_read_back_with_how_they_were_fitted(
    written: Path, result: sl.measure.SweepResult, pairs: sl.ContrastivePairs
) -> None:
    with safe_open(written / "directions.safetensors", framework="pt") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    assert sorted(found) == [f"blocks.{layer}.hook_resid_post" for layer in (0, 1, 2)]
    for name, vector in found.items():
        assert torch.equal(vector, result.directions[name])
        assert vector.norm().item() == pytest.approx(1)
    assert json.loads(metadata["steerlens"]) == {
        "method": "random",
        "position": -1,
        "seed": 4,
        "fitted_on": pairs.fingerprint,
        "weight_processing": "none",
        "weights_fingerprint": result.directions.weights_fingerprint,
        "pair_hashes": list(pairs.prompt_hashes),
        "readout_hooks": ["blocks.2.hook_resid_post"],
    }


def test_directions_are_read_back_and_so_are_those_without_hashes_of_pairs(
    result: sl.measure.SweepResult, tmp_path: Path
) -> None:
    for written in (result.directions, replace(result.directions, pair_hashes=())):
        write_directions(written, tmp_path / "new.safetensors")
        assert read_directions(tmp_path / "new.safetensors", written.hook_names) == written
    with safe_open(tmp_path / "new.safetensors", framework="pt") as file:
        metadata = json.loads(file.metadata()["steerlens"])
    del metadata["pair_hashes"]
    tensors = load_file(tmp_path / "new.safetensors")
    save_file(tensors, tmp_path / "old.safetensors", {"steerlens": json.dumps(metadata)})
    assert read_directions(tmp_path / "old.safetensors", written.hook_names) == written


def test_directions_are_written_as_the_same_bytes(
    result: sl.measure.SweepResult, tmp_path: Path
) -> None:
    written = []
    for i in range(10):
        write_directions(result.directions, tmp_path / f"{i}.safetensors")
        written.append((tmp_path / f"{i}.safetensors").read_bytes())
    assert len(set(written)) == 1


def test_the_record_is_written_last(
    result: sl.measure.SweepResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that broke off has no record, so it is not taken for a whole one."""

    def fail(*args: Any) -> None:
        raise RuntimeError("half way")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "write_directions", fail)
        with pytest.raises(RuntimeError, match="half way"):
            write(tmp_path, result)
    assert sorted(content(tmp_path)) == ["layers.csv", "sweep.csv", "sweep.parquet"]
    assert "sweep.csv" in refused(tmp_path, REQUEST)
