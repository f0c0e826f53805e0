"""Blocks on several devices: the CPU stands for both, and `meta` for one that is not the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from commands import N_LAYERS
from conftest import bridge
from torch._subclasses.fake_tensor import FakeTensorMode

import steerlens as sl
from steerlens.engine.backward import adding
from steerlens.engine.capture import reading_hook
from steerlens.engine.cells import _addition_by_row
from steerlens.errors import ModelError
from steerlens.steering.apply import step_hooks, steps

DIRECTION = torch.nn.functional.normalize(torch.arange(1.0, 33.0), dim=0)
PARTS = (
    *("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"),
    *(f"model.layers.{i}" for i in range(N_LAYERS)),
)


@pytest.mark.parametrize("device_map", [{"": "cpu"}, dict.fromkeys(PARTS, "cpu")])
def test_a_device_map_gives_the_same_numbers(
    model_folder: Path, device_map: dict[str, str], pairs: sl.ContrastivePairs
) -> None:
    tables = []
    for options in ({"device": "cpu"}, {"device_map": device_map}):
        model = sl.load_model(str(model_folder), progress=False, **options)
        directions = sl.fit_directions(sl.collect_differences(model, pairs))
        found = sl.sweep(model, pairs, directions, coefficients=[0, 2], n_bootstrap=2)
        tables.append(
            found.table.drop(columns=["hook_name", "readout_hook", "coherent", "asked"]).astype(
                float
            )
        )
    one, other = (torch.tensor(table.to_numpy()) for table in tables)
    torch.testing.assert_close(one, other, equal_nan=True)
    assert one.isfinite().any(dim=0).sum() > 10


@pytest.mark.parametrize("place", ["meta", "disk"])
def test_a_map_that_offloads_is_refused(model_folder: Path, place: str) -> None:
    device_map = dict.fromkeys(PARTS, "cpu") | {"model.layers.2": place}
    with pytest.raises(ModelError, match=r"model\.layers\.2 is offloaded.*put every layer on a"):
        sl.load_model(str(model_folder), device_map=device_map, progress=False)
    sl.load_model(str(model_folder), device_map=dict.fromkeys(PARTS, "cpu"), progress=False)


def test_a_device_and_a_map_exclude_each_other(model_folder: Path) -> None:
    with pytest.raises(ModelError, match="mutually exclusive"):
        sl.load_model(str(model_folder), device="cpu", device_map={"": "cpu"}, progress=False)


def test_a_device_map_of_no_modules_is_refused(model_folder: Path) -> None:
    with pytest.raises(ModelError, match="names 'foo', and the model has no such module"):
        sl.load_model(str(model_folder), device_map={"": "cpu", "foo": "cpu"}, progress=False)


def test_offloaded_layers_of_a_model_made_elsewhere_are_refused(
    model_folder: Path, tmp_path: Path, pairs: sl.ContrastivePairs
) -> None:
    """Their weights lie on the disk, and on `meta` while the block is not running."""
    device_map: dict[str, Any] = dict.fromkeys(PARTS, "cpu")
    for place in ("disk", "cpu"):
        hf_model = transformers.AutoModelForCausalLM.from_pretrained(
            model_folder,
            device_map=device_map | {"model.layers.1": place},
            offload_folder=str(tmp_path / place),
        )
        model = bridge(hf_model)
        if place == "disk":
            with pytest.raises(ModelError, match=r"model\.layers\.1\..* is offloaded"):
                sl.collect_differences(model, pairs)
        else:
            sl.collect_differences(model, pairs)


# What is added and read moves to the block's device. `meta` tensors mix with no others, as those of
# a GPU do not.


@pytest.fixture
def elsewhere() -> torch.Tensor:
    activation = torch.zeros(2, 3, 32, device="meta")
    with pytest.raises(RuntimeError, match=r"device"):
        _mixed(activation)
    return activation


def _mixed(activation: torch.Tensor) -> torch.Tensor:
    """Control: without moving, another device's tensor is an error."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return activation + DIRECTION


@pytest.mark.parametrize("operator", [sl.Add(), sl.Ablate(), sl.Clamp(2.0), sl.Rotate()])
@pytest.mark.parametrize("masked", [False, True])
def test_steps_act_on_the_blocks_device(
    elsewhere: torch.Tensor, operator: Any, masked: bool
) -> None:
    vector = sl.SteeringVector.from_vectors({"blocks.1.hook_resid_post": DIRECTION})
    act = steps(vector, 0.5)[0]
    acts = [type(act)(act.hook_name, operator, act.direction, act.amount)]
    mask = torch.ones(2, 3, dtype=torch.bool) if masked else None
    with FakeTensorMode(allow_non_fake_inputs=True):
        ((_, hook),) = step_hooks(acts, mask=mask)
        assert hook(elsewhere, None).device.type == "meta"


def test_cells_slopes_and_readings_act_on_the_blocks_device(elsewhere: torch.Tensor) -> None:
    mask = torch.ones(2, 3, dtype=torch.bool)
    found: dict[str, torch.Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        add = _addition_by_row(DIRECTION, torch.ones(2), mask)
        assert add(elsewhere).device.type == "meta"
        step = adding(DIRECTION.expand(2, 1, -1), mask)
        assert step(elsewhere, None).device.type == "meta"
        _, read = reading_hook(found, "here", torch.tensor([0, 2]))
        read(elsewhere, None)
        assert found["here"].shape == (2, 32)
