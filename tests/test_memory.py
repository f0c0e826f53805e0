"""Memory: smaller passes where it is out, and an estimate before anything is run."""

import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from commands import Main
from conftest import IS_TL3
from live import LiveBytes

import steerlens as sl
from steerlens.engine import cells, memory
from steerlens.engine.batches import make_batches, make_pair_batches
from steerlens.engine.engine import Engine
from steerlens.engine.memory import (
    check_memory,
    free_bytes,
    in_slices,
    is_out_of_memory,
    pass_bytes,
)
from steerlens.engine.plain_loop import run_baseline
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.engine.workload import Workload
from steerlens.errors import MemoryLimitError
from steerlens.models.hooks import resid_post

TOO_MUCH = 2**60
CFG = SimpleNamespace(d_model=4, n_heads=2, n_layers=3, d_mlp=8, d_vocab=20)


def torch_fails() -> None:
    torch.empty(TOO_MUCH, dtype=torch.uint8)


def numpy_fails() -> None:
    np.empty(TOO_MUCH, dtype=np.uint8)


def python_fails() -> None:
    bytearray(TOO_MUCH)


# Which errors mean that memory is out


@pytest.mark.parametrize("fail", [torch_fails, numpy_fails, python_fails])
def test_a_real_failure_to_allocate_is_out_of_memory(fail: Callable[[], None]) -> None:
    with pytest.raises((RuntimeError, MemoryError)) as caught:
        fail()
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("error", "is_out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_which_errors_are_out_of_memory(error: BaseException, is_out: bool) -> None:
    assert is_out_of_memory(error) is is_out


# Halving


def test_slices_are_halved_where_memory_is_out() -> None:
    tried: list[tuple[int, int]] = []

    def run_slice(of: slice) -> list[int]:
        tried.append((of.start, of.stop))
        if of.stop - of.start > 3:
            raise MemoryError
        return list(range(of.start, of.stop))

    with pytest.warns(RuntimeWarning, match="going on with [24] prompts a pass") as said:
        found = in_slices(9, 8, run_slice)
    assert [row for rows in found for row in rows] == list(range(9))
    assert tried == [(0, 8), (0, 4), (0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]
    assert len(said) == 2


def test_one_row_and_other_errors_are_raised() -> None:
    def fail(of: slice) -> None:
        raise (MemoryError if of.stop > 0 else ValueError)

    with pytest.warns(RuntimeWarning, match="with 1 prompts"), pytest.raises(MemoryError):
        in_slices(2, 2, fail)

    def broken(of: slice) -> None:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        in_slices(2, 2, broken)


def with_little_memory(model: Any, fail: Callable[[], None], run_it: Callable[[], Any]) -> Any:
    """`run_it` on a model that runs out of memory on more than two prompts at once."""
    failed: list[int] = []

    def allocate(activation: torch.Tensor, hook: Any) -> None:
        # Label rows stand for prompts of one token.
        if activation.shape[1] > 1 and len(activation) > 2:
            failed.append(len(activation))
            fail()

    for layer in range(int(model.cfg.n_layers)):
        model.add_hook(resid_post(layer), allocate)
    try:
        with pytest.warns(RuntimeWarning, match="out of memory: going on with"):
            found = run_it()
    finally:
        model.reset_hooks()
    assert failed
    return found


def assert_close(found: Any, expected: Any) -> None:
    numbers = [table.select_dtypes("number").to_numpy() for table in (found, expected)]
    np.testing.assert_allclose(*numbers, rtol=1e-4, atol=1e-4)
    assert numbers[0].size > 0


def swept(model: Any, pairs: sl.ContrastivePairs, positions: Any) -> Any:
    directions = sl.fit_directions(sl.collect_differences(model, pairs, layers=[1, 3]))
    options: dict[str, Any] = {"coefficients": [-1, 0, 1], "n_bootstrap": 20}
    return sl.sweep(model, pairs, directions, steered_positions=positions, **options).table


def bounded(model: Any, pairs: sl.ContrastivePairs) -> Any:
    directions = sl.fit_directions(sl.collect_differences(model, pairs, layers=[1]))
    layers = sl.find_boundary(model, pairs, directions, n_bootstrap=20).layers
    return layers[["boundary_pos", "boundary_neg", "predicted_first_order_pos"]]


def differentiated(model: Any, pairs: sl.ContrastivePairs) -> Any:
    found = sl.loss_gradients(model, pairs, layers=[1], position=-1).coherence[0]
    assert found.abs().max() > 0
    return pd.DataFrame(found.numpy())


@pytest.mark.parametrize(
    ("measure", "fail"),
    [
        *((partial(swept, positions="all"), fail) for fail in (torch_fails, python_fails)),
        (partial(swept, positions="continuation"), numpy_fails),
        (bounded, torch_fails),
        (differentiated, numpy_fails),
        (differentiated, python_fails),
    ],
)
def test_work_goes_on_with_smaller_passes(
    measure: Callable[..., Any], fail: Callable[[], None], llama: Any, many: sl.ContrastivePairs
) -> None:
    pairs = sl.ContrastivePairs(
        tuple(replace(pair, continuation=" it was so warm") for pair in many[:6])
    )
    found = with_little_memory(llama, fail, lambda: measure(llama, pairs))
    assert_close(found, measure(llama, pairs))


def test_the_record_says_that_memory_was_out(
    sweep: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cells.run_from

    def too_large(model: Any, tokens: torch.Tensor, *args: Any, **options: Any) -> Any:
        if len(tokens) > 2:
            torch_fails()
        return real(model, tokens, *args, **options)

    monkeypatch.setattr(cells, "run_from", too_large)
    with pytest.warns(RuntimeWarning, match="out of memory"):
        assert sweep("--quiet", "--out", tmp_path / "run").code == 0
    said = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))["warnings"]
    assert "out of memory: going on with 2 prompts a pass" in said


# The estimate


def test_the_bytes_of_a_pass_by_hand() -> None:
    size: dict[str, Any] = {"rows": 2, "width": 3, "label_rows": 4}
    # Logits: 6 tokens and twice 4 labels, a vocabulary of 20, 4 bytes.
    assert pass_bytes(CFG, **size, dtype=torch.float32) == 20 * 4 * (6 + 2 * 4)
    # The labels' logits once more in float32.
    assert pass_bytes(CFG, **size, dtype=torch.bfloat16) == 20 * (2 * 6 + (2 + 4) * 4)
    long = size | {"width": 100, "label_rows": 0}
    # Scores of 2 heads, three times; states of 4, twice.
    assert pass_bytes(CFG, **long, dtype=torch.float32) == 4 * (
        3 * 2 * 2 * 100**2 + 2 * 2 * 100 * 4
    )
    # Both sides, 3 blocks: scores, two states, two hidden layers of 8; logits of 4 labels, thrice.
    backward = pass_bytes(CFG, **size, dtype=torch.float32, with_gradients=True)
    kept = 2 * 2 * 3**2 + 2 * 6 * 4 + 2 * 6 * 8
    assert backward == 2 * 3 * 4 * kept + 3 * 4 * 4 * 20


@pytest.mark.skipif(IS_TL3, reason="the bound is that of the model class that version 4 has")
@pytest.mark.parametrize("n_rows", [2, 3, 8])
def test_the_estimate_is_a_lower_bound_and_not_far_off(tiny: Any, n_rows: int) -> None:
    text = " ".join(["the river was a walk and it is good"] * 5)
    pairs = sl.ContrastivePairs.from_lists(
        [f"you are cheerful {i} {text}" for i in range(n_rows)],
        [f"you are gloomy {i} {text}" for i in range(n_rows)],
    )
    tokenized = tokenize_pairs(tiny, pairs)
    (batch,) = make_batches(tiny, tokenized.positive, n_rows)
    ((both, _),) = make_pair_batches(tiny, tokenized, n_rows)

    def forward() -> None:
        run_baseline(Engine(tiny), Workload((batch,), (), -1, "all"), [resid_post(1)])

    def backward() -> None:
        sl.loss_gradients(tiny, pairs, batch_size=n_rows)

    for run_it, with_gradients in ((forward, False), (backward, True)):
        run_it()  # what is made once is not of the pass
        with LiveBytes() as live:
            run_it()
        estimate = pass_bytes(
            tiny.cfg,
            rows=n_rows,
            width=both.tokens.shape[1],
            label_rows=int(both.label_mask().sum()),
            dtype=torch.float32,
            with_gradients=with_gradients,
        )
        assert live.peak / 3 <= estimate <= live.peak


def test_what_is_free() -> None:
    free = free_bytes(torch.device("cpu"))
    assert free is not None
    assert free > 2**20
    assert free_bytes(torch.device("meta")) is None


def written(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


NEW, OLD = "sys/fs/cgroup", "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({}, []),
        ({"proc/self/cgroup": "0::/job\n"}, []),
        (
            {
                "proc/self/cgroup": "0::/job\n",
                f"{NEW}/job/memory.max": "1000\n",
                f"{NEW}/job/memory.current": "700\n",
                f"{NEW}/job/memory.stat": "anon 600\ninactive_file 100\n",
            },
            [400],
        ),
        # In a container: the path is the host's, and the files are at the top.
        (
            {
                "proc/self/cgroup": "0::/docker/abc\n",
                f"{NEW}/memory.max": "1000\n",
                f"{NEW}/memory.current": "1200\n",
                f"{NEW}/memory.stat": "anon 600\n",
            },
            [0],
        ),
        (
            {
                "proc/self/cgroup": "0::/\n",
                f"{NEW}/memory.max": "max\n",
                f"{NEW}/memory.current": "700\n",
                f"{NEW}/memory.stat": "anon 600\n",
            },
            [],
        ),
        (
            {
                "proc/self/cgroup": "9:cpu:/a\n8:memory:/job\n",
                f"{OLD}/job/memory.limit_in_bytes": "900\n",
                f"{OLD}/job/memory.usage_in_bytes": "500\n",
                f"{OLD}/job/memory.stat": "inactive_file 1\ntotal_inactive_file 50\n",
            },
            [450],
        ),
    ],
)
def test_what_a_control_group_leaves(
    files: dict[str, str], left: list[int], tmp_path: Path
) -> None:
    assert list(memory._control_groups(written(tmp_path, files))) == left


def test_a_run_that_cannot_fit_is_said_before_it_starts(
    llama: Any,
    many: sl.ContrastivePairs,
    directions: sl.Directions,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (batch, *_) = make_batches(llama, tokenize_pairs(llama, many[:4]).positive, 4)
    n, width = batch.tokens.shape

    def needed(rows: int, *, with_gradients: bool = False) -> int:
        return pass_bytes(
            llama.cfg,
            rows=rows,
            width=width,
            label_rows=int(batch.label_mask().sum()) * rows // n,
            dtype=torch.float32,
            with_gradients=with_gradients,
        )

    monkeypatch.setattr(memory, "free_bytes", lambda device: needed(n))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_memory(llama, [batch])
    monkeypatch.setattr(memory, "free_bytes", lambda device: needed(n) - 1)
    with pytest.warns(RuntimeWarning, match=rf"{n} prompts a pass.*batch size of {n // 2} or less"):
        check_memory(llama, [batch])
    monkeypatch.setattr(memory, "free_bytes", lambda device: None)
    check_memory(llama, [batch])
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1000)
    ran: list[int] = []
    llama.add_hook(resid_post(0), lambda activation, hook: ran.append(1))
    said = r"one prompt of \d+ tokens takes at least .* cpu has .*bfloat16"
    try:
        for run_it in (
            lambda: sl.sweep(llama, many, directions, coefficients=[0, 1]),
            lambda: sl.find_boundary(llama, many, directions),
            lambda: sl.loss_gradients(llama, many),
        ):
            with pytest.raises(MemoryLimitError, match=said):
                run_it()
    finally:
        llama.reset_hooks()
    assert ran == []


def test_a_model_on_several_devices_is_not_checked(llama: Any) -> None:
    def of(*devices: str) -> Any:
        weights = [torch.empty(1, device=device) for device in devices]
        return SimpleNamespace(parameters=lambda: iter(weights), original_model=None)

    assert memory._device(of("cpu", "cpu")) == torch.device("cpu")
    assert memory._device(of("cpu", "meta")) is None
    assert memory._device(llama) == torch.device("cpu")
