"""What a direction says: by TransformerLens's lenses, by hand, beside random directions."""

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import needs_bridge
from outline import Outline

import steerlens as sl
from steerlens.errors import InputError, ModelError
from steerlens.tables import COLUMNS

pytestmark = needs_bridge
TEXTS = ["the river was", "I said so", "you are very cold today", "a good day"]


def hook(layer: int) -> str:
    return f"blocks.{layer}.hook_resid_post"


@pytest.fixture(scope="module")
def tools() -> Any:
    from transformer_lens.tools import analysis

    return analysis


def spread(model: Any) -> torch.Tensor:
    return torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(1))


def planted(model: Any, token: int) -> torch.Tensor:
    """The direction that the unembedding reads a token by, behind the norm."""
    return (model.W_U[:, token] * model.ln_final.weight).detach()


def said(table: Any, side: str = "promoted", lens: str = "logit") -> list[int]:
    ids: list[int] = table[(table.side == side) & (table.lens == lens)].token_id.tolist()
    return ids


def of_lens(tools: Any, model: Any, row: torch.Tensor) -> list[int]:
    """The five top tokens of TransformerLens's own readout; some rows are of no token."""
    ids = tools.logit_readout(model, row, top_k=160).top_ids.tolist()
    return [token for token in ids if token < len(model.tokenizer)][:5]


# The vocabulary


def test_the_tokens_are_those_of_the_logit_lens(llama: Any, tools: Any) -> None:
    row = spread(llama)
    table = sl.measure.vocabulary(llama, {hook(1): 3 * row}, n_tokens=5, n_random=19)
    assert list(table.columns) == [column.name for column in COLUMNS["vocabulary"]]
    for side, sign in (("promoted", 1), ("suppressed", -1)):
        assert said(table, side) == of_lens(tools, llama, sign * row)
    up, down = (table[table.side == side].logit.to_numpy() for side in ("promoted", "suppressed"))
    assert (up[:-1] >= up[1:]).all()
    assert (down[:-1] <= down[1:]).all()
    assert up[0] > 0 > down[0]


def test_biases_cancel_and_numbers_are_those_by_hand(gpt2: Any) -> None:
    """GPT-2's norm centres, and has a bias here."""
    norm = gpt2.ln_final
    with torch.no_grad():
        before = norm.bias.clone()
        norm.bias += 5 * torch.randn_like(norm.bias)
    try:
        row = spread(gpt2)
        table = sl.measure.vocabulary(gpt2, {hook(0): row}, n_tokens=4, n_random=19)
    finally:
        norm.bias.data.copy_(before)
    centred = row - row.mean()
    logits = (centred / centred.square().mean().sqrt() * norm.weight) @ gpt2.W_U
    logits = (logits - logits.mean())[: len(gpt2.tokenizer)].detach()
    logits -= logits.mean()
    expected = logits.topk(4)
    assert said(table) == expected.indices.tolist()
    promoted = table[table.side == "promoted"].logit
    assert promoted.tolist() == pytest.approx(expected.values.tolist(), rel=1e-3)


def test_a_planted_token_stands_out_and_a_random_direction_does_not(llama: Any) -> None:
    vectors = {hook(1): planted(llama, 17), hook(2): spread(llama)}
    table = sl.measure.vocabulary(llama, vectors, n_tokens=1, n_random=99)
    first = table[table.side == "promoted"].set_index("layer")
    assert first.token_id[1] == 17
    assert first.p_value[1] == first.p_layers[1] == 0.01
    assert first.p_value[2] > 0.05
    assert first.logit[1] > 1.5 * first.random_logit[1]
    assert (table.p_layers >= table.p_value).all()
    again = sl.measure.vocabulary(llama, vectors, n_tokens=1, n_random=99)
    assert again.equals(table)


def test_a_jacobian_lens_takes_the_direction_along_first(
    llama: Any, tools: Any, tmp_path: Path
) -> None:
    width = llama.cfg.d_model
    turn = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(2)))[0]
    lens = tools.JacobianLens({1: turn, 2: torch.eye(width)}, n_prompts=1, d_model=width)
    row = planted(llama, 17)
    vectors = {hook(1): turn.T @ row, hook(2): row, hook(4): row}
    table = sl.measure.vocabulary(llama, vectors, jacobian=lens, n_tokens=1, n_random=19)
    assert said(table, lens="jacobian") == [17, 17, 17]  # the last block is not taken along
    assert said(table)[0] != 17
    lens.save(str(tmp_path / "lens.pt"), dtype=torch.float32)
    read = sl.measure.vocabulary(
        llama, vectors, jacobian=tmp_path / "lens.pt", n_tokens=1, n_random=19
    )
    assert read.equals(table)


def test_a_fitted_jacobian_lens(llama: Any, tools: Any) -> None:
    text = "the river was so cold and the sun is warm today"
    lens = tools.JacobianLens.fit(
        llama, [text], corpus="test", skip_first_positions=1, show_progress=False
    )
    row = spread(llama)
    table = sl.measure.vocabulary(llama, {hook(1): row}, jacobian=lens, n_tokens=5, n_random=19)
    assert said(table, lens="jacobian") == of_lens(tools, llama, lens.transport(row, 1))


def test_what_no_lens_can_read(llama: Any, gpt2: Any, tools: Any) -> None:
    row, width = spread(llama), llama.cfg.d_model
    lens = tools.JacobianLens({1: torch.eye(width)}, n_prompts=1, d_model=width)
    for name in (hook(0), "blocks.1.hook_mlp_out"):
        with pytest.raises(InputError, match="knows the outputs of blocks 1, 4, not"):
            sl.measure.vocabulary(llama, {name: row}, jacobian=lens)
    other = tools.JacobianLens({1: torch.eye(8)}, n_prompts=1, d_model=8)
    for bad in (other, "no-such-file/lens.pt", 3):
        with pytest.raises(InputError, match="expected a JacobianLens of this model"):
            sl.measure.vocabulary(llama, {hook(1): row}, jacobian=bad)
    for vector in ({hook(1): row[:8]}, {hook(1): 0 * row}, {hook(1): row / 0}):
        with pytest.raises(InputError, match=r"expected 32 numbers at blocks\.1"):
            sl.measure.vocabulary(llama, vector)
    with pytest.raises(InputError, match="at least one direction"):
        sl.measure.vocabulary(llama, {})


def test_an_older_transformer_lens_has_no_lens(
    llama: Any, tools: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(tools, "logit_readout")
    with pytest.raises(InputError, match=r"those of TransformerLens 4\.3; this is older"):
        sl.measure.vocabulary(llama, {hook(1): spread(llama)})


def test_a_model_that_the_lens_does_not_know(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama.cfg, "normalization_type", "other")
    with pytest.raises(ModelError, match="cannot read directions of this model"):
        sl.measure.vocabulary(llama, {hook(1): spread(llama)})


# Readings


@pytest.mark.parametrize("batch_size", [None, 1])
def test_readings_are_projections_in_order(llama: Any, batch_size: int | None) -> None:
    row = spread(llama)
    vectors = {hook(1): 2 * row, hook(3): row}
    table = sl.measure.readings(llama, vectors, TEXTS, n_prompts=1, batch_size=batch_size)
    assert list(table.columns) == [column.name for column in COLUMNS["readings"]]
    for name in vectors:
        projections = []
        for text in TEXTS:
            _, cache = llama.run_with_cache(text)
            projections.append((cache[name][0] @ (row / row.norm())).tolist())
        means = [sum(p[1:]) / (len(p) - 1) for p in projections]
        for side, extreme in (("highest", max(means)), ("lowest", min(means))):
            part = table[(table.hook_name == name) & (table.side == side)]
            number = means.index(extreme)
            assert set(part.prompt) == {str(number + 1)}
            assert part.mean_projection.iloc[0] == pytest.approx(extreme, abs=1e-4)
            assert part.projection.tolist() == pytest.approx(projections[number], abs=1e-4)
            assert part.token.tolist()[1:] == TEXTS[number].split()


def test_each_prompt_is_read_once_where_they_are_few(llama: Any) -> None:
    table = sl.measure.readings(llama, {hook(1): spread(llama)}, TEXTS[:3], ids=["a", "b", "c"])
    alone = sl.engine.TokenizedPrompt((4,), (), "alone")
    firsts = table.groupby(["side", "rank"]).prompt.first()
    assert sorted(firsts) == ["a", "b", "c"]
    with pytest.raises(InputError, match="expected a list of prompts"):
        sl.measure.readings(llama, {hook(1): spread(llama)}, [])
    with pytest.raises(InputError, match="prompt '2' has one token"):
        sl.measure.readings(llama, {hook(1): spread(llama)}, ["the river", alone])


def test_a_page_has_tokens_and_texts(llama: Any) -> None:
    vectors = {hook(1): planted(llama, 17)}
    words = sl.measure.vocabulary(llama, vectors, n_tokens=2, n_random=19)
    texts = sl.measure.readings(llama, vectors, TEXTS, n_prompts=1)
    assert Outline(sl.plots.reading_page(words).html).views == []
    page = sl.plots.reading_page(words, texts)
    views = Outline(page.html).views
    assert [len(view["props"]["values"]) for view in views] == [
        len(part) for _, part in texts.groupby("side", sort=False)
    ]
    assert views[0]["props"]["values"] == pytest.approx(
        texts[texts.side == "highest"].projection.tolist()
    )
    for row in words.to_dict("records"):
        assert f"{row['logit']:+.2f}" in page.html
    with pytest.raises(InputError, match="a table of vocabulary"):
        sl.plots.reading_page(texts)
    with pytest.raises(InputError, match="a table of readings"):
        sl.plots.reading_page(words, words)
