"""The damage map and generations on the real model."""

from typing import Any

import pytest

import steerlens as sl
from steerlens.plots.pages import token_page, token_table_html

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def held_out() -> sl.ContrastivePairs:
    return sl.ContrastivePairs.load("sentiment", split="test")[:3]


@pytest.fixture(scope="module")
def directions(real_model: Any) -> sl.Directions:
    train = sl.ContrastivePairs.load("sentiment")[:32]
    return sl.fit_directions(sl.collect_differences(real_model, train, layers=[15]))


def test_damage_agrees_with_the_sweep(
    real_model: Any, held_out: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    options: dict[str, Any] = {"coefficients": [-20, 20]}
    cells = sl.sweep(real_model, held_out, directions, layers=15, **options).table
    found = sl.token_damage(real_model, held_out, directions, layer=15, **options)
    of = found[found.is_label & (found.side == "positive")]
    damage = of.groupby(["coefficient", "prompt"]).damage_nats.mean().groupby("coefficient").mean()
    assert damage.to_list() == pytest.approx(cells.degradation_nats.to_list(), abs=1e-5)
    read = found[found.is_read].set_index(["coefficient", "prompt", "side"]).steered_projection
    sides = read.unstack()
    gap = (sides.positive - sides.negative).groupby("coefficient").mean()
    assert gap.to_list() == pytest.approx(cells.projection.to_list(), rel=1e-4)


def test_parts_of_characters_are_told_apart(real_model: Any, directions: sl.Directions) -> None:
    """Most characters of this text are several tokens."""
    text = "\U0001f916 \u65e5\u672c \u2014 caf\u00e9"
    found = sl.token_damage(real_model, [text], directions, layer=15, coefficients=[20])
    parts = found[found.token.str.contains("\ufffd")]
    assert len(parts) > 3
    by_id = parts.drop_duplicates("token_id")
    assert by_id.token.nunique() < len(by_id) == by_id.raw_token.nunique()
    for page in (token_page(found).html, token_table_html(found)):
        assert "\ufffd" not in page
        assert "\u2014" in page


def test_a_chat_goes_on_in_the_assistants_words(
    real_model: Any, held_out: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    """The opening of the answer belongs to the prompt; the text goes on from there."""
    prompt = held_out[0].positive
    found = sl.measure.generation_table(
        real_model, [prompt], directions, layer=15, coefficients=[0, 20], max_new_tokens=8
    )
    opening = prompt[-1].content
    for text in found.text:
        assert "<|im_start|>" not in text
        assert "assistant" not in text
        assert not text.startswith(opening)
        assert text.startswith(" "), "it continues the opening's sentence"
    assert found.text.nunique() == 2
