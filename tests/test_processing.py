"""Weight processing: what is on is told, and numbers of differently processed models never meet."""

import math
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import IS_TL3, bridge, build_gpt2, build_llama, build_tokenizer
from hooked import hooked_transformer

import steerlens as sl
from steerlens.circuits import find_writers
from steerlens.errors import InputError
from steerlens.models.weight_processing import check_one, check_same, weight_processing
from steerlens.steering import Origin

HOOK = "blocks.1.hook_resid_post"
BOTH = "folded norms, centred writing weights"
SAYS = "no weight processing, but .* has folded norms, centred writing weights"


def built(hf_model: Any, **processing: bool) -> Any:
    """The model with the kinds of processing that are named, and none else."""
    steps = ("fold_ln", "center_writing_weights", "center_unembed", "fold_value_biases")
    asked = {step: processing.get(step, False) for step in steps}
    if IS_TL3:
        return hooked_transformer(hf_model, build_tokenizer(), **asked)
    model = bridge(hf_model)
    if processing:
        model.enable_compatibility_mode(disable_warnings=True, **asked)
    return model


@pytest.fixture(scope="module")
def processed() -> Any:
    """The `gpt2` fixture's weights, with norms folded and writing weights centred."""
    return built(build_gpt2(), fold_ln=True, center_writing_weights=True)


@pytest.fixture(scope="module")
def fitted(gpt2: Any, pairs: sl.ContrastivePairs) -> sl.Directions:
    return sl.fit_directions(sl.collect_differences(gpt2, pairs))


# What is told


@pytest.mark.parametrize(
    ("build", "processing", "told"),
    [
        (build_gpt2, {}, "none"),
        (build_gpt2, {"fold_ln": True}, "folded norms"),
        (build_gpt2, {"center_writing_weights": True}, "centred writing weights"),
        (build_gpt2, {"fold_ln": True, "center_writing_weights": True}, BOTH),
        (build_llama, {}, "none"),
        (build_llama, {"fold_ln": True}, "folded norms"),
        # Models with RMS norms are never centred: their norms would see the mean.
        (build_llama, {"fold_ln": True, "center_writing_weights": True}, "folded norms"),
    ],
)
def test_what_was_done_is_told(
    build: Callable[[], Any], processing: dict[str, bool], told: str
) -> None:
    hf_model = build()
    with torch.no_grad():  # a norm whose weights are all 1 is as good as folded
        for name, weight in hf_model.named_parameters():
            if "norm" in name or "ln_" in name:
                weight.mul_(torch.linspace(0.5, 1.5, len(weight)))
    model = built(hf_model, **processing)
    assert weight_processing(model) == told
    assert sl.models.provenance(model).weight_processing == told


def test_centred_by_hand() -> None:
    """Rows of `W_O` with mean 0, and the same with one row that is off by a thousandth."""
    centred = torch.tensor([[[1.0, -1.0], [2.0, -2.0]]])
    off = centred + torch.tensor([[[0.0], [1e-3]]])
    for weights, told in ((centred, "centred writing weights"), (off, "none"), (0 * off, "none")):
        model = SimpleNamespace(
            cfg=SimpleNamespace(normalization_type="LN"),
            load_and_process_state_dict=None,
            blocks=[SimpleNamespace(attn=SimpleNamespace(W_O=weights))],
        )
        assert weight_processing(model) == told
    model.blocks.append(SimpleNamespace())
    assert weight_processing(model) == "unknown"


def test_processing_changes_residual_norms_and_not_the_predictions(
    gpt2: Any, processed: Any, pairs: sl.ContrastivePairs, fitted: sl.Directions
) -> None:
    here, there = (sl.collect_differences(model, pairs) for model in (gpt2, processed))
    # What is written has lost its mean over d_model, and so has the stream; nothing else changed.
    without_mean = here.positive - here.positive.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(there.positive, without_mean, rtol=1e-3, atol=1e-3)
    assert (there.positive - here.positive).abs().max() > 0.1
    ours = sl.fit_directions(there)
    as_is = sl.Study(gpt2, pairs, fitted).layers
    changed = sl.Study(processed, pairs, ours).layers
    assert (changed.resid_norm < as_is.resid_norm * 0.999).all()
    torch.testing.assert_close(
        torch.tensor(changed.logprob_nats), torch.tensor(as_is.logprob_nats), rtol=1e-4, atol=1e-4
    )
    assert changed.attrs["model"]["weight_processing"] == BOTH
    assert as_is.attrs["model"]["weight_processing"] == "none"


# What is refused

USES: dict[str, Callable[[Any, sl.ContrastivePairs, sl.Directions], Any]] = {
    "sweep": lambda m, p, d: sl.sweep(m, p, d, layers=[1], coefficients=[1], n_bootstrap=2),
    "layers": lambda m, p, d: sl.Study(m, p, d, layers=[1]).layers,
    "boundary": lambda m, p, d: sl.find_boundary(m, p, d, layers=[1], n_bootstrap=2),
    "prediction": lambda m, p, d: sl.Study(m, p, d, layers=[1]).predicted_boundary(),
    "shape": lambda m, p, d: sl.Study(m, p, d, n_bootstrap=2, layers=1).boundary_shape(
        1, n_angles=3
    ),
    "geometry": lambda m, p, d: sl.loss_geometry(m, p, d, layers=[1], n_angles=3, n_bootstrap=2),
    "damage": lambda m, p, d: sl.token_damage(m, p, d, coefficients=[1], layer=1),
    "vector": lambda m, p, d: sl.SteeringVector.from_directions(m, d),
    "writers": lambda m, p, d: find_writers(m, p, d, layer=1, n_bootstrap=2),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_directions_of_one_processing_are_refused_by_the_other(
    gpt2: Any, processed: Any, pairs: sl.ContrastivePairs, fitted: sl.Directions, use: str
) -> None:
    assert fitted.weight_processing == "none"
    with pytest.raises(InputError, match=SAYS):
        USES[use](processed, pairs, fitted)
    USES[use](gpt2, pairs, fitted)
    # And the other way round.
    there = sl.fit_directions(sl.collect_differences(processed, pairs))
    with pytest.raises(InputError, match=f"with {BOTH}, but this model has no weight"):
        USES[use](gpt2, pairs, there)


def test_vectors_of_one_processing_are_refused_by_the_other(
    gpt2: Any, processed: Any, fitted: sl.Directions, tmp_path: Any
) -> None:
    vector = sl.SteeringVector.from_directions(gpt2, fitted, layers=[1])
    vector.save(tmp_path / "v.safetensors")
    tokens = torch.tensor([[1, 5, 6]])
    for model, is_refused in ((gpt2, False), (processed, True)):
        for use in (
            lambda m: vector.check_model(m),
            lambda m: sl.SteeringVector.load(tmp_path / "v.safetensors", model=m),
            lambda m: sl.steer(m, vector, 1.0).__enter__(),
            lambda m: sl.steer(m, fitted, 1.0).__enter__(),
        ):
            if is_refused:
                with pytest.raises(InputError, match=SAYS):
                    use(model)
    with sl.steer(gpt2, vector, 1.0), torch.no_grad():
        gpt2(tokens)
    vector.check_model(gpt2)
    assert sl.SteeringVector.load(tmp_path / "v.safetensors", model=gpt2) == vector


def test_what_is_put_together_is_of_one_processing(
    gpt2: Any, processed: Any, pairs: sl.ContrastivePairs, fitted: sl.Directions
) -> None:
    mine = sl.SteeringVector.from_directions(gpt2, fitted)
    other = sl.fit_directions(sl.collect_differences(processed, pairs))
    theirs = sl.SteeringVector.from_directions(processed, other)
    with pytest.raises(InputError, match=SAYS):
        mine + theirs
    assert (mine + mine).origin.weight_processing == "none"
    with pytest.raises(InputError, match=f"a was fitted on a model with {SAYS}"):
        sl.measure.cosine_table({"a": mine, "b": theirs})
    assert len(sl.measure.cosine_table({"a": mine, "b": mine}))
    cells = sl.sweep(gpt2, pairs, fitted, layers=[1], coefficients=[0, 1], n_bootstrap=2)
    elsewhere = sl.Study(processed, pairs, other, layers=[1]).layers
    with pytest.raises(InputError, match=f"sweep is of a model with {SAYS}"):
        sl.plots.tradeoff(cells.table, elsewhere)
    sl.plots.tradeoff(cells.table, cells.layers)
    with pytest.raises(InputError, match="layer table is of a model with folded"):
        sl.SteeringVector.from_directions(gpt2, fitted, layers=[1], layer_table=elsewhere)
    known = sl.SteeringVector.from_directions(gpt2, fitted, layers=[1], layer_table=cells.layers)
    assert not math.isnan(float(known.calibration.resid_norm))


def test_what_is_not_known_is_not_refused(
    processed: Any, pairs: sl.ContrastivePairs, fitted: sl.Directions
) -> None:
    unknown = replace(fitted, weight_processing="unknown", weights_fingerprint="unknown")
    sl.sweep(processed, pairs, unknown, layers=[1], coefficients=[1], n_bootstrap=2)
    for one, other in (("none", "unknown"), ("unknown", BOTH), ("none", "none")):
        check_same("this", one, "that", other)
    with pytest.raises(InputError, match="this with no weight processing, but that has fold"):
        check_same("this", "none", "that", "folded norms")
    check_one({"a": {}, "b": Origin(weight_processing="none"), "c": Origin()})
    with pytest.raises(InputError, match=r"b was fitted .* that of c"):
        check_one(
            {"a": {}, "b": Origin(weight_processing="none"), "c": Origin(weight_processing=BOTH)}
        )


def test_fingerprints_of_a_hooked_transformer_are_not_compared_with_a_bridges() -> None:
    """The same weights under other names; the files decide where both are known."""
    here = Origin(model="a", weights="w1", file_hash="f1", dtype="float32")
    there = Origin(model="b", weights="HookedTransformer w2", file_hash="f1", dtype="float32")
    assert here.differences(there) == []
    assert here.differences(replace(there, file_hash="unknown")) == []
    for other in (
        replace(there, file_hash="f2"),
        replace(there, dtype="bfloat16"),
        replace(there, weights="w2"),
    ):
        assert here.differences(other) == ["weights (or their dtype) of 'a' and of 'b'"]
