"""Two continuations after one prompt: a cell runs it once for both, and finds what each has."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from bare import mean_logprob
from conftest import bridge, build_llama, needs_bridge
from zoo import bridged

from steerlens.directions.training_step import (
    Push,
    Side,
    item_sides,
    make_side,
    objective_of,
    push_sides,
)
from steerlens.engine import exactness, resume
from steerlens.engine.batches import Batch, make_batches
from steerlens.engine.branches import (
    branch_kwargs,
    join_branches,
    make_branches,
    with_one_prompt,
)
from steerlens.engine.engine import Engine
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.engine.workload import Job, Workload
from steerlens.measure.effects import preference_gaps
from steerlens.models.hooks import resid_post
from steerlens.models.tolerance import relative_gap
from steerlens.steering import steer

HOOK = resid_post(1)
PROMPTS = ((5, 6, 7, 8), (9, 10, 11, 12, 13, 14, 15), (16, 17, 18, 19, 20))
ENDS = (((21, 22, 23), (24,), (25, 26)), ((27,), (28, 29, 30, 31), (32, 33)))
"""The positive continuations, and the negative ones."""


def sides() -> tuple[list[TokenizedPrompt], list[TokenizedPrompt]]:
    positive, negative = (
        [TokenizedPrompt(p, end, str(p)) for p, end in zip(PROMPTS, of, strict=True)] for of in ENDS
    )
    return positive, negative


def vector(model: Any) -> torch.Tensor:
    return torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(1))


def measured(
    model: Any, batch_size: int | None = None, coefficients: tuple[float, ...] = (1.0, -0.5)
) -> tuple[np.ndarray, int]:
    """The gaps at the coefficients, and the block-evaluations that they took."""
    engine = Engine(model, batch_size)
    job = Job(HOOK, vector(model), coefficients, resid_post(engine.n_layers - 1))
    _, (gaps,) = preference_gaps(engine, sides(), [job])
    return gaps, engine.cost.blocks


def by_hand(model: Any, coefficient: float) -> list[float]:
    """The gaps of whole prompts, each alone."""

    def logprob(prompt: TokenizedPrompt) -> float:
        with steer(model, {HOOK: vector(model)}, coefficient):
            return mean_logprob(model, prompt.ids, prompt.label_tokens)

    return [logprob(up) - logprob(down) for up, down in zip(*sides(), strict=True)]


def kinds_of_rows(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each pass, from now on, had two continuations in a row."""
    seen: list[bool] = []
    run = resume._pass_kwargs

    def counted(mask: torch.Tensor, *given: Any) -> dict[str, Any]:
        seen.append(mask.dtype != torch.bool)
        return run(mask, *given)

    monkeypatch.setattr(resume, "_pass_kwargs", counted)
    return seen


SHARING = ["GPT-2", "GPT-NeoX", "OPT", "Llama", "Qwen3", "Phi", "OLMo 2", "Mixtral", "Gemma 3"]


@needs_bridge
@pytest.mark.parametrize("batch_size", [None, 1, 2])
@pytest.mark.parametrize("kind", SHARING)
def test_a_prompt_run_once_gives_what_whole_passes_give(
    kind: str, batch_size: int | None, monkeypatch: pytest.MonkeyPatch, much_padding: None
) -> None:
    # In a window that holds the texts, as Gemma's does.
    model = bridged(kind, **({"sliding_window": 16} if kind == "Gemma 3" else {}))
    branched = kinds_of_rows(monkeypatch)
    gaps, _ = measured(model, batch_size)
    for found, coefficient in zip(gaps, (1.0, -0.5), strict=True):
        assert found.tolist() == pytest.approx(by_hand(model, coefficient), abs=2e-5)
    assert branched[-1]


@needs_bridge
@pytest.mark.parametrize("kind", ["BLOOM", "Gemma 3", "LFM2"])
def test_where_a_mask_is_not_all_prompts_are_run_whole(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Distances by the columns, a window of 6 tokens, a state beside keys and values.
    model = bridged(kind)
    branched = kinds_of_rows(monkeypatch)
    gaps, _ = measured(model)
    assert gaps[0].tolist() == pytest.approx(by_hand(model, 1.0), abs=2e-5)
    assert not branched[-1]
    assert any(branched) == (kind == "BLOOM")  # where the look at two prompts shows it


@needs_bridge
def test_a_window_that_counts_columns_holds_both_texts_or_they_are_run_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of GPT-Neo: joined, the second prompt and its texts are 8 tokens and 7 and more."""
    longest = max(len(prompt) for side in sides() for prompt in side)
    for window, is_shared in ((2 * longest, True), (2 * longest - 1, False)):
        torch.manual_seed(0)
        config = transformers.GPTNeoConfig(
            vocab_size=160,
            hidden_size=32,
            num_layers=4,
            num_heads=4,
            max_position_embeddings=64,
            window_size=window,
            attention_types=[[["global", "local"], 2]],
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        )
        model = bridge(transformers.GPTNeoForCausalLM(config).eval())
        branched = kinds_of_rows(monkeypatch)
        gaps, _ = measured(model)
        assert gaps[0].tolist() == pytest.approx(by_hand(model, 1.0), abs=2e-5)
        assert branched[-1] == is_shared


@needs_bridge
def test_the_check_looks_at_two_rows_of_a_prompt_that_all_items_share() -> None:
    """So it costs as much for four such items as for forty."""
    model = bridge(build_llama(n_layers=4))

    def cost(n_items: int, n_coefficients: int) -> int:
        engine = Engine(model, None)
        ends = [TokenizedPrompt(PROMPTS[0], (20 + i, 21 + i), str(i)) for i in range(2 * n_items)]
        coefficients = (1.0, -0.5, 2.0)[:n_coefficients]
        job = Job(HOOK, vector(model), coefficients, resid_post(3))
        preference_gaps(engine, (ends[:n_items], ends[n_items:]), [job])
        return engine.cost.blocks

    # What is left when the cells, which grow with the items, are taken away.
    cells = {n: cost(n, 2) - cost(n, 1) for n in (4, 40)}
    fixed = {n: cost(n, 1) - cells[n] for n in (4, 40)}
    assert cells[40] == 10 * cells[4]
    # The unsteered run grows too, two texts of 6 tokens through four blocks, and what is carried to
    # the hook: both in a row of 9 through two.
    assert fixed[40] - fixed[4] == 36 * (2 * 6 * 4 + 9 * 2)


@needs_bridge
def test_a_cell_runs_each_prompt_once() -> None:
    model = bridge(build_llama(n_layers=4))
    (_, two), (_, three) = (measured(model, 1, (1.0, -0.5, 2.0)[:n]) for n in (2, 3))
    # Two of four blocks, 16 tokens of prompts, 6 and 7 of continuations, and each prompt's last
    # token once more; whole, 45 tokens.
    assert three - two == 2 * (16 + 6 + 7 + 3)


@needs_bridge
@pytest.mark.parametrize("change", ["labels", "alone", "short"])
def test_prompts_that_do_not_come_in_twos_are_run_whole(change: str) -> None:
    model = bridge(build_llama())
    first, *others = [prompt for side in sides() for prompt in side]
    changed = {
        "labels": [replace(first, labels=(2,)), *others],
        "alone": others,
        "short": [replace(first, prompt=(5,)), TokenizedPrompt((5,), (6,), ""), *others[:2]],
    }
    for prompts, n_pairs in (((first, *others), 3), (changed[change], 0)):
        batches = make_batches(model, prompts, None)
        workload = Workload(batches, (), -1, "all")
        assert len(with_one_prompt(model, workload, batches)) == n_pairs
        for other in (
            replace(workload, steered_positions="prompt"),
            replace(workload, with_kl=True),
        ):
            assert not with_one_prompt(model, other, batches)


def causal(mask: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """What the second continuation must not be given: a look at the first."""
    right, wrong = (branch_kwargs(of, dtype) for of in (mask, mask.clamp(max=1)))
    return right | {"attention_mask": wrong["attention_mask"]}


def in_order(mask: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """The places of tokens in their row, not in their text."""
    right, wrong = (branch_kwargs(of, dtype) for of in (mask, mask.clamp(max=1)))
    return right | {"position_ids": wrong["position_ids"]}


@needs_bridge
@pytest.mark.parametrize("kwargs", [causal, in_order])
def test_what_sees_or_stands_wrongly_is_found_out(
    kwargs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bridge(build_llama(seed=4))
    monkeypatch.setattr(resume, "branch_kwargs", kwargs)
    branched = kinds_of_rows(monkeypatch)
    gaps, _ = measured(model)
    assert gaps[0].tolist() == pytest.approx(by_hand(model, 1.0), abs=2e-5)
    assert any(branched)
    assert not branched[-1]
    # Without the look at two prompts the numbers would be others.
    monkeypatch.setattr(exactness, "_difference", lambda *given: None)
    wrong, _ = measured(model)
    assert branched[-1]
    assert np.abs(wrong[0] - by_hand(model, 1.0)).max() > 1e-3


def item_batches(model: Any) -> list[tuple[Batch, Batch]]:
    """Both sides of the texts in the batches of two steps."""
    positive, negative = sides()
    return [
        tuple(make_batches(model, of[rows], 3)[0] for of in (positive, negative))  # type: ignore[misc]
        for rows in (slice(0, 1), slice(1, None))
    ]


def pushed(model: Any, each: list[tuple[Side, ...]], objective: str) -> list[Push]:
    return [
        push_sides(
            *(model, of, vector(model).requires_grad_(), objective_of(objective, None)),
            hook_name=HOOK,
            readout=resid_post(int(model.cfg.n_layers) - 1),
            position=-1,
        )
        for of in each
    ]


@needs_bridge
@pytest.mark.parametrize("objective", ["promotion", "preference"])
@pytest.mark.parametrize("kind", ["GPT-2", "Llama", "OPT", "Qwen3", "Gemma 3", "BLOOM"])
def test_a_step_of_training_is_that_of_whole_prompts(
    kind: str, objective: str, much_padding: None
) -> None:
    model = bridged(kind)
    batches = item_batches(model)
    each = item_sides(model, batches, HOOK)
    alone = [tuple(make_side(model, of, HOOK, sign=1) for of in both) for both in batches]
    # A window of 6 tokens, and distances by the columns.
    assert [len(of) for of in each] == [2 if kind in ("Gemma 3", "BLOOM") else 1] * 2
    for found, expected in zip(
        pushed(model, each, objective), pushed(model, alone, objective), strict=True
    ):
        assert found.loss == pytest.approx(expected.loss, abs=1e-5)
        assert relative_gap(found.gradient, expected.gradient) < 1e-4
        for ours, theirs in (
            (found.positive, expected.positive),
            (found.negative, expected.negative),
        ):
            for name in ("readout", "logprob", "unsteered"):
                torch.testing.assert_close(
                    getattr(ours, name), getattr(theirs, name), atol=2e-5, rtol=1e-5
                )


@needs_bridge
@pytest.mark.parametrize("kwargs", [causal, in_order])
def test_training_is_not_on_what_sees_or_stands_wrongly(
    kwargs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = bridge(build_llama(seed=4))
    batches = item_batches(model)
    assert [len(of) for of in item_sides(model, batches, HOOK)] == [1, 1]
    monkeypatch.setattr(resume, "branch_kwargs", kwargs)
    assert [len(of) for of in item_sides(model, batches, HOOK)] == [2, 2]
    # A prompt of each continuation's own has nothing to share.
    monkeypatch.undo()
    up, down = sides()
    other = [replace(prompt, prompt=(1, *prompt.prompt[1:])) for prompt in down]
    for negative, n_sides in ((down, 1), (other, 2)):
        both = zip(*(make_batches(model, of, 3) for of in (up, negative)), strict=True)
        assert {len(of) for of in item_sides(model, list(both), HOOK)} == {n_sides}


SHARED = tuple(range(100, 109))
"""What prompts of one row begin with: a token more than are asked for."""


def of_one_beginning(
    shared: tuple[int, ...] = SHARED,
) -> tuple[list[TokenizedPrompt], list[TokenizedPrompt]]:
    """The texts above with a beginning, five prompts in all."""
    positive, negative = (
        [replace(p, prompt=(*shared, i, *p.prompt)) for i, p in enumerate([*of, *of[:2]])]
        for of in sides()
    )
    return positive, negative


@needs_bridge
@pytest.mark.parametrize("kind", SHARING)
def test_prompts_that_begin_alike_in_one_row_give_what_each_gives_alone(
    kind: str, monkeypatch: pytest.MonkeyPatch, much_padding: None
) -> None:
    model = bridged(kind, **({"sliding_window": 32} if kind == "Gemma 3" else {}))
    widths: list[int] = []
    run = resume._pass_kwargs

    def counted(mask: torch.Tensor, *given: Any) -> dict[str, Any]:
        widths.append(mask.shape[1])
        return run(mask, *given)

    monkeypatch.setattr(resume, "_pass_kwargs", counted)
    found = {}
    for batch_size in (None, 5):  # one that is given counts prompts, which then have their own rows
        job = Job(HOOK, vector(model), (1.0, -0.5), resid_post(int(model.cfg.n_layers) - 1))
        widths.clear()
        _, (found[batch_size],) = preference_gaps(
            Engine(model, batch_size), of_one_beginning(), [job]
        )
        found[batch_size, "width"] = widths[-1]
    np.testing.assert_allclose(found[None], found[5], atol=2e-5)
    assert np.ptp(found[5]) > 0.1
    longest = max(
        len(up) + len(down.continuation) + 1 for up, down in zip(*of_one_beginning(), strict=True)
    )
    assert found[5, "width"] == longest
    assert found[None, "width"] > longest


@needs_bridge
def test_too_little_in_common_is_no_beginning() -> None:
    model = bridge(build_llama())
    for n, n_rows in ((len(SHARED), 2), (6, 5)):
        up, down = of_one_beginning(SHARED[:n])
        batches = make_batches(model, [*up, *down], None)
        twins = with_one_prompt(model, Workload(batches, (), -1, "all"), batches)
        for may_share, expected in ((True, n_rows), (False, 5)):
            rows = make_branches(model, [*up, *down], twins, None, may_share=may_share)
            assert sum(len(batch.prompts) for batch in rows) == expected
            assert sorted(row for batch in rows for row in batch.rows) == list(range(10))


def test_a_row_of_two_prompts_by_hand(llama: Any) -> None:
    """Both begin with 1, 2; then 3 and 4, 5; their texts are 10, 11 and 12, 20 and 21."""
    prompts = [
        TokenizedPrompt(prompt, text, "")
        for prompt, text in (
            ((1, 2, 3), (10,)),
            ((1, 2, 3), (11, 12)),
            ((1, 2, 4, 5), (20,)),
            ((1, 2, 4, 5), (21,)),
        )
    ]
    row = join_branches(llama, prompts, [[(0, 1), (2, 3)]])
    assert row.rows == (0, 1, 2, 3)
    assert row.tokens.tolist() == [[1, 2, 3, 10, 3, 11, 12, 4, 5, 20, 5, 21]]
    assert row.attention_mask.tolist() == [[1, 1, 3, 3, 4, 4, 4, 5, 6, 6, 7, 7]]
    labels = [of.nonzero().flatten().tolist() for of in row.labels_by_row()]
    assert labels == [[3], [5, 6], [9], [11]]
    places = branch_kwargs(row.attention_mask, torch.float32)["position_ids"]
    assert places.tolist() == [[0, 1, 2, 3, 2, 3, 4, 2, 3, 4, 3, 4]]


@needs_bridge
@pytest.mark.parametrize("objective", ["promotion", "preference"])
def test_a_step_of_training_runs_a_beginning_once(objective: str) -> None:
    model = bridge(build_llama())
    up, down = ([of[i] for i in (0, 3, 1, 4)] for of in of_one_beginning())
    both = (make_batches(model, up, 4)[0], make_batches(model, down, 4)[0])
    (joined,) = item_sides(model, [both], HOOK)[0]
    assert len(joined.batch.prompts) == 2 * 2  # at +1 and -1
    alone = tuple(make_side(model, of, HOOK, sign=1) for of in both)
    [found], [expected] = (pushed(model, [of], objective) for of in ((joined,), alone))
    assert found.loss == pytest.approx(expected.loss, abs=1e-5)
    assert relative_gap(found.gradient, expected.gradient) < 1e-4
    torch.testing.assert_close(found.positive.logprob, expected.positive.logprob)
