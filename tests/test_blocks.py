"""Many pairs: a block of them after another, of which the states are held alone."""

import errno
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from live import LiveBytes

import steerlens as sl
from steerlens.engine import batches, plan
from steerlens.engine.on_disk import OnDisk
from steerlens.errors import FileError
from steerlens.runs import unfinished
from steerlens.runs.unfinished import open_parts

N_MANY = 5
"""How many times as many pairs."""
LAYERS = [1, 2]


class Memory(dict[str, Any]):
    """A checkpoint that keeps parts in a dictionary, and is stopped before one of them."""

    stop_at = math.inf

    def load(self, name: str, of: str) -> Any:
        """What is kept under the name."""
        return self.get(name)

    def keep(self, name: str, of: str, kept: Any) -> None:
        """Keep it."""
        if len(self) >= self.stop_at:
            raise KeyboardInterrupt
        self[name] = kept


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few pairs are a block, as some hundreds are where a pass holds more."""
    monkeypatch.setitem(batches.TOKENS_PER_PASS, "cpu", 64)


def texts(many: sl.ContrastivePairs, n: int, *, is_late: bool = False) -> sl.ContrastivePairs:
    """The pairs `n` times, each with another first word; with continuations where asked for."""
    written = [
        (f"{i} {pair.positive}", f"{i} {pair.negative}", " good day")
        for pair in many
        for i in range(n)
    ]
    positive, negative, continuation = (list(column) for column in zip(*written, strict=True))
    return sl.ContrastivePairs.from_lists(positive, negative, continuation if is_late else None)


def study_of(model: Any, pairs: sl.ContrastivePairs, directions: Any, **options: Any) -> sl.Study:
    return sl.Study(model, pairs, directions, layers=LAYERS, n_bootstrap=20, **options)


def measured(what: str, study: sl.Study) -> Any:
    """What is measured: a sweep, or the boundaries with the projections there."""
    if what.startswith("boundary"):
        return study.boundary(with_projection=True)
    return study.sweep(coefficients=[0, 1, 2])


OPTIONS: dict[str, dict[str, Any]] = {
    "sweep": {},
    "sweep that is kept": {},
    "sweep of continuations": {"steered_positions": "continuation"},
    "boundary": {"budget": "nats=0.1"},
}


@pytest.mark.parametrize("what", ["sweep that is kept", "sweep of continuations", "boundary"])
def test_the_states_of_one_block_of_pairs_are_held(
    what: str,
    llama: Any,
    many: sl.ContrastivePairs,
    directions: sl.Directions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of all others the results alone; the control is the same with all pairs in one block."""

    def peak(n: int) -> int:
        pairs = texts(many, n, is_late="continuations" in what)
        options = dict(OPTIONS[what])
        if what == "sweep that is kept":
            options["checkpoint"] = Memory()
        with LiveBytes() as live:
            study = study_of(llama, pairs, directions, **options)
            measured(what, study)
        assert (len(study.workload.blocks) > 2) == (n > 1 and math.inf > batches.PASSES_PER_BLOCK)
        return live.peak

    few = peak(1)
    # Of each pair and hook: four numbers of three cells; of a search one of some ten, thrice.
    results = (30 if "boundary" in what else 12) * 8 * 20 * N_MANY * len(LAYERS)
    in_blocks = peak(N_MANY)
    monkeypatch.setattr(batches, "PASSES_PER_BLOCK", math.inf)
    in_one = peak(N_MANY)
    assert in_blocks <= few + results
    assert in_one > 2 * in_blocks


@pytest.mark.parametrize("what", OPTIONS)
def test_one_block_and_many_give_the_same_bytes(
    what: str, llama: Any, many: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    """Of the same batches; those of kept prefixes are made anew, so that roundings differ."""
    pairs = texts(many, 3, is_late="continuations" in what)
    found = []
    for in_one in (False, True):
        options = dict(OPTIONS[what])
        if what == "sweep that is kept":
            options["checkpoint"] = Memory()
        study = study_of(llama, pairs, directions, **options)
        assert len(study.workload.blocks) > 1
        if in_one:
            study.workload = replace(study.workload, blocks=())
        assert isinstance(study.baseline.positive, torch.Tensor if in_one else OnDisk)
        result = measured(what, study)
        names = ["table", "layers", "points", "curves"]
        found.append({name: getattr(result, name) for name in names if hasattr(result, name)})
    for name, many_blocks in found[0].items():
        if "continuations" in what:
            pd.testing.assert_frame_equal(many_blocks, found[1][name], rtol=2e-3, atol=1e-4)
        else:
            assert many_blocks.to_csv() == found[1][name].to_csv()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many cells were run, a job after another."""
    finished_cells, found = plan.finished_cells, list[int]()

    def counted(*args: Any, **options: Any) -> Any:
        for finished in finished_cells(*args, **options):
            found.append(len(finished.cells))
            yield finished

    monkeypatch.setattr(plan, "finished_cells", counted)
    return found


@pytest.mark.parametrize("what", ["sweep", "sweep of continuations", "boundary"])
def test_stopped_at_any_part_it_goes_on_to_the_same_bytes(
    what: str, llama: Any, many: sl.ContrastivePairs, directions: sl.Directions, ran: list[int]
) -> None:
    pairs = texts(many, 3, is_late="continuations" in what)

    def run(memory: Memory) -> tuple[str, Any]:
        ran.clear()
        study = study_of(llama, pairs, directions, checkpoint=memory, **OPTIONS[what])
        result = measured(what, study)
        return result.layers.to_csv() + getattr(result, "table", result.layers).to_csv(), (
            result.layers.attrs
        )

    everything = Memory()
    whole, attrs = run(everything)
    n_ran, n_parts = len(ran), len(everything)
    assert n_ran > 3 * len(LAYERS)  # blocks and hooks
    for stop_at in (n_parts // 2,) if what == "boundary" else (2, n_parts // 2, n_parts - 1):
        memory = Memory()
        memory.stop_at = stop_at
        with pytest.raises(KeyboardInterrupt):
            run(memory)
        kept = sum(1 for part in memory.values() if part.tensors.get("logprob") is not None)
        memory.stop_at = math.inf
        again, attrs_again = run(memory)
        assert (again, attrs_again) == (whole, attrs)
        assert memory.keys() == everything.keys()
        if "boundary" not in what:
            assert len(ran) == n_ran - kept


def test_a_folder_keeps_the_parts_of_blocks(
    llama: Any,
    many: sl.ContrastivePairs,
    directions: sl.Directions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pairs, request = texts(many, 3), {"command": "sweep", "hook_names": directions.hook_names}

    def run(folder: Path, *, resume: bool = False) -> str:
        with open_parts(folder, request, options={}, resume=resume) as parts:
            study = study_of(llama, pairs, directions, checkpoint=parts)
            return measured("sweep", study).table.to_csv()

    whole = run(tmp_path / "whole")
    write, written = unfinished.write_tensors, list[Path]()

    def fail(tensors: Any, attrs: Any, path: Path) -> None:
        written.append(path)
        if len(written) > 4:
            raise KeyboardInterrupt
        write(tensors, attrs, path)

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "write_tensors", fail)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run")
    started = unfinished.read_started(tmp_path / "run")
    assert started is not None
    assert started.finished == "0 of 5 hooks and 3 parts of others"
    assert run(tmp_path / "run", resume=True) == whole


def test_activations_on_disk_are_those_that_were_written() -> None:
    values = torch.arange(2 * 5 * 3, dtype=torch.float64).reshape(2, 5, 3)
    on_disk = OnDisk()
    for rows in ([0, 3, 4], [1, 2]):
        on_disk.add(rows, values[:, rows])
    assert on_disk.shape == (2, 5, 3)
    assert len(on_disk) == 2
    assert on_disk[1].equal(values[1])
    assert on_disk[:, [0, 3, 4]].equal(values[:, [0, 3, 4]])
    assert on_disk[:, [1, 2]].equal(values[:, [1, 2]])


def test_a_full_disk_says_what_to_do() -> None:
    class Full:
        def seek(self, place: int, whence: int) -> int:
            return 0

        def write(self, data: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    on_disk = OnDisk()
    on_disk._file = Full()  # type: ignore[assignment]
    with pytest.raises(FileError, match=r"5 pairs.*No space left.*TMPDIR"):
        on_disk.add(range(5), torch.zeros(2, 5, 3))
