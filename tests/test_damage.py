"""The damage map: by hand, against a sweep, and what each row says of its token."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import bridge, build_llama, other_side, padding

import steerlens as sl
from steerlens.data.prompts import Message
from steerlens.engine.tokenization import tokenize_pairs, tokenize_prompt
from steerlens.errors import InputError
from steerlens.models.hooks import readout_hook, resid_post
from steerlens.steering import Ablate
from steerlens.tables import COLUMNS

HOOK = resid_post(1)
NUMBERS = ["projection", "steered_projection", "logprob_nats", "steered_logprob_nats"]
NUMBERS += ["damage_nats", "kl_nats"]

pytestmark = pytest.mark.usefixtures("much_padding")


@pytest.fixture(scope="module")
def fitted(tiny: Any, pairs: sl.ContrastivePairs) -> sl.Directions:
    return sl.fit_directions(sl.collect_differences(tiny, pairs))


@pytest.fixture
def table(llama: Any, pairs: sl.ContrastivePairs, directions: sl.Directions) -> pd.DataFrame:
    return sl.token_damage(llama, pairs, directions, layer=1, coefficients=[0, 3, -3])


@pytest.fixture(scope="module")
def continued(pairs: sl.ContrastivePairs) -> sl.ContrastivePairs:
    sides = ([p.positive for p in pairs], [p.negative for p in pairs])
    return sl.ContrastivePairs.from_lists(*sides, [" and so it was", " not so"] * 4)


def direction_at(hook_name: str, vector: list[float]) -> sl.Directions:
    """One direction at one hook, its own readout."""
    return sl.Directions((hook_name,), (), torch.tensor([vector]), "hand", -1, 0, "none")


def test_by_hand() -> None:
    """A model without anything in its blocks: every residual is (2, 0, 0, 0), its RMS 1.

    With 2 e_1 added it is (2, 2, 0, 0), which the norm makes (2, 2, 0, 0) / sqrt(2). Only the word
    "good" reads e_1, so unsteered all 160 tokens are as likely; steered "good" has the logit ln 3.
    """
    sizes = {"hidden_size": 4, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = build_llama(n_layers=1, rms_norm_eps=1e-12, **sizes)
    built = bridge(model)
    good = built.tokenizer.convert_tokens_to_ids("good")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight[:, 0] = 2.0
        model.lm_head.weight[good, 1] = math.log(3) / math.sqrt(2)
    along = direction_at(resid_post(0), [0.0, 1.0, 0.0, 0.0])
    found = sl.token_damage(built, ["good day"], along, coefficients=[2])
    assert found.token.to_list() == ["<s>", "good", "day"]
    assert found.projection.to_list() == [0, 0, 0]
    assert found.steered_projection.to_list() == [2, 2, 2]
    expected = {
        "logprob_nats": [math.nan, -math.log(160), -math.log(160)],
        "steered_logprob_nats": [math.nan, math.log(3 / 162), -math.log(162)],
        "damage_nats": [math.nan, math.log(162 / 480), math.log(162 / 160)],
        "kl_nats": [math.nan, *[math.log(162 / 160) - math.log(3) / 160] * 2],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("positions", ["all", "prompt", "continuation", "last"])
def test_it_agrees_with_a_sweep(
    positions: Any, tiny: Any, continued: sl.ContrastivePairs, fitted: sl.Directions
) -> None:
    options: dict[str, Any] = {"coefficients": [-4, 4], "steered_positions": positions}
    with padding(tiny, other_side(tiny, positions)):
        found = sl.token_damage(tiny, continued, fitted, layer=0, batch_size=3, **options)
        cells = sl.sweep(tiny, continued, fitted, layers=0, n_bootstrap=2, **options).table
    assert cells.degradation_nats.abs().min() > 1e-3
    for coefficient, degradation, projection in zip(
        cells.coefficient, cells.degradation_nats, cells.projection, strict=True
    ):
        rows = found[found.coefficient == coefficient]
        labels = rows[rows.is_label & (rows.side == "positive")]
        damage = labels.groupby("prompt").damage_nats.mean().mean()
        assert damage == pytest.approx(degradation, abs=2e-6)
        read = rows[rows.is_read].set_index(["prompt", "side"]).steered_projection.unstack()
        assert (read.positive - read.negative).mean() == pytest.approx(projection, rel=1e-5)
    assert (found.readout_hook == readout_hook(resid_post(0), tiny.cfg.n_layers)).all()


def test_at_0_nothing_is_lost(table: pd.DataFrame) -> None:
    at_0, at_3 = (table[table.coefficient == c] for c in (0, 3))
    later = at_0.position > 0
    assert (at_0.damage_nats[later] == 0).all()
    assert (at_0.kl_nats[later] == 0).all()
    for name in ("logprob_nats", "projection"):
        assert at_0[name].equals(at_0[f"steered_{name}"].rename(name))
        assert not at_3[name].equals(at_3[f"steered_{name}"].rename(name))
    assert (at_3.damage_nats[at_3.position > 0] != 0).all()
    assert (at_3.kl_nats[at_3.position > 0] > 0).all()


def test_a_row_is_a_real_token(llama: Any, pairs: sl.ContrastivePairs, table: pd.DataFrame) -> None:
    tokenized = tokenize_pairs(llama, pairs)
    assert list(table.columns) == [column.name for column in COLUMNS["tokens"]]
    assert table.prompt.drop_duplicates().to_list() == [pair.id for pair in pairs]
    for i, pair in enumerate(pairs):
        for side, prompts in (("positive", tokenized.positive), ("negative", tokenized.negative)):
            rows = table[(table.prompt == pair.id) & (table.side == side)]
            assert rows.coefficient.drop_duplicates().to_list() == [0, 3, -3]
            for _, of in rows.groupby("coefficient"):
                assert of.token_id.to_list() == [*prompts[i].prompt]
                assert of.position.to_list() == [*range(len(of))]
                assert of.is_read.to_list() == [False] * (len(of) - 1) + [True]
                assert of.is_label.to_list() == [False] + [True] * (len(of) - 1)
                assert of.is_steered.all()
    first = table.position == 0
    assert (table.token_id[first] == llama.tokenizer.bos_token_id).all()
    assert table.damage_nats[first].isna().all()
    assert table.kl_nats[first].isna().all()
    assert table[~first][NUMBERS].notna().all(axis=None)


@pytest.mark.parametrize(
    ("positions", "steered"),
    [
        ("all", [True] * 6),
        ("prompt", [True] * 4 + [False] * 2),
        ("continuation", [False] * 4 + [True] * 2),
        ("last", [False, False, False, True, False, False]),
    ],
)
def test_where_it_is_added_read_and_counted(
    positions: Any, steered: list[bool], llama: Any, directions: sl.Directions
) -> None:
    prompt = tokenize_prompt(llama, "the river was", " so cold")
    options: dict[str, Any] = {"layer": 1, "coefficients": [5], "steered_positions": positions}
    found = sl.token_damage(llama, [prompt], directions, ids=["a"], **options)
    assert found.is_steered.to_list() == steered
    assert found.is_read.to_list() == [False, False, False, True, False, False]
    assert found.is_label.to_list() == [False] * 4 + [True] * 2
    assert (found.side == "positive").all()
    # Nothing before the first steered token changes, and its own prediction neither.
    first = steered.index(True)
    moved = (found.projection != found.steered_projection).to_list()
    assert moved == [False] * first + [True] * (6 - first)
    assert (found.damage_nats[1 : first + 1] == 0).all()
    assert (found.damage_nats[first + 1 :] != 0).all()


def test_padding_and_batches_change_nothing(
    tiny: Any, pairs: sl.ContrastivePairs, fitted: sl.Directions
) -> None:
    options: dict[str, Any] = {"layer": 0, "coefficients": [4]}
    alone = sl.token_damage(tiny, pairs, fitted, batch_size=1, **options)
    for side in ("left", "right"):
        with padding(tiny, side):
            together = sl.token_damage(tiny, pairs, fitted, batch_size=8, **options)
        pd.testing.assert_frame_equal(together, alone, rtol=1e-4, atol=1e-4)
    again = sl.token_damage(tiny, pairs, fitted, batch_size=1, **options)
    pd.testing.assert_frame_equal(again, alone, check_exact=True)


def test_a_chat_is_read_as_it_is_rendered(llama: Any, directions: sl.Directions) -> None:
    chat = (Message("user", "how are you"),)
    found = sl.token_damage(llama, ["I said", chat], directions, layer=1, coefficients=[1])
    assert found.prompt.drop_duplicates().to_list() == ["1", "2"]
    ids = found[found.prompt == "2"].token_id.to_list()
    assert ids == [*tokenize_prompt(llama, chat).prompt]
    assert ids.count(llama.tokenizer.bos_token_id) == 1


def test_parts_of_characters_are_told_apart(
    llama: Any, directions: sl.Directions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama.tokenizer, "decode", lambda ids, **named: "\ufffd")
    found = sl.token_damage(llama, ["the river"], directions, layer=1, coefficients=[1])
    assert found.token.to_list() == ["\ufffd"] * 3
    assert found.raw_token.to_list() == ["<s>", "the", "river"]


def test_a_vector_is_read_at_its_own_hook(llama: Any, directions: sl.Directions) -> None:
    vector = 2 * sl.SteeringVector.from_directions(llama, directions, layers=[1])
    found = sl.token_damage(llama, ["the river was"], vector, coefficients=[3, "1.5"])
    assert found.coefficient.drop_duplicates().to_list() == [6, 3]
    assert (found.readout_hook == HOOK).all()
    assert (found.hook_name == HOOK).all()
    shift = found.steered_projection - found.projection
    np.testing.assert_allclose(shift, found.coefficient, rtol=1e-4)
    assert found.is_read.to_list() == [False, False, False, True] * 2
    unknown = sl.SteeringVector.from_vectors({HOOK: directions[HOOK]})
    found = sl.token_damage(llama, ["the river was"], unknown, coefficients=[3])
    assert not found.is_read.any()


def test_ablation_has_no_other_side(
    llama: Any, pairs: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    vector = sl.SteeringVector.from_directions(llama, directions, layers=[1], operator=Ablate())
    found = sl.token_damage(llama, ["the river was"], vector, coefficients=[1])
    np.testing.assert_allclose(found.steered_projection, 0, atol=1e-4)
    assert found.projection.abs().min() > 1e-2
    with pytest.raises(InputError, match="ablate"):
        sl.token_damage(llama, pairs, vector, coefficients=[1])


def test_what_overflows_is_undefined(llama: Any, directions: sl.Directions) -> None:
    found = sl.token_damage(llama, ["the river"], directions, layer=1, coefficients=[1e39, 1])
    at_much, at_1 = found[found.coefficient > 1], found[found.coefficient == 1]
    undefined = ["steered_projection", "steered_logprob_nats", "damage_nats", "kl_nats"]
    assert at_much[undefined].isna().all(axis=None)
    assert at_much.logprob_nats.equals(at_1.logprob_nats.set_axis(at_much.index))
    assert at_1[undefined][1:].notna().all(axis=None)


def test_the_record_says_what_was_run(table: pd.DataFrame) -> None:
    assert table.attrs["settings"] == {"steered_positions": "all", "position": -1}
    assert set(table.attrs["text"]) == {"positive", "negative"}
    assert table.attrs["model"]["dtype"] == "float32"


def test_what_is_refused(
    llama: Any, gpt2: Any, pairs: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    def damage(prompts: Any = ("the river",), along: Any = directions, **given: Any) -> None:
        options = {"layer": 1, "coefficients": [1], **given}
        sl.token_damage(llama, prompts, along, **options)

    damage()
    for error, message, given in (
        (InputError, "expected one hook, got 5", {"layer": None}),
        (InputError, "expected one hook, got 2", {"layer": [1, 2]}),
        (InputError, "a list, got 'the river'", {"prompts": "the river"}),
        (InputError, "list of prompts", {"prompts": []}),
        (InputError, "different ids", {"prompts": ["I", "you"], "ids": ["a", "a"]}),
        (InputError, "different ids", {"ids": ["a", "b"]}),
        (InputError, "at least one coefficient", {"coefficients": []}),
        (InputError, "finite", {"coefficients": [math.nan]}),
        (InputError, "needs a SteeringVector", {"coefficients": ["80%"]}),
        (InputError, "have no continuation", {"steered_positions": "last"}),
    ):
        with pytest.raises(error, match=message):
            damage(**given)
    short = direction_at(HOOK, [1.0, 0.0])
    with pytest.raises(InputError, match=r"no direction .* at blocks\.2"):
        damage(along=short)
    with pytest.raises(InputError, match="d_model 2, this model 32"):
        damage(along=direction_at(resid_post(4), [1.0, 0.0]), layer=4)
    far = sl.fit_directions(sl.collect_differences(llama, pairs, layers=1, position=-4))
    with pytest.raises(InputError, match="position -4 is outside the prompt '1'"):
        damage(prompts=["the river"], along=far)
    vector = sl.SteeringVector.from_directions(llama, directions, layers=[1])
    condition = sl.Condition(resid_post(0), directions[HOOK].float(), 0.0, True, "token")
    with pytest.raises(InputError, match="condition"):
        damage(along=replace(vector, condition=condition), layer=None)
