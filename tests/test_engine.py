"""The engine against the plain loop: the same numbers, for less."""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ATTN_OUT, FINAL_NORM, bridge, build_llama, needs_bridge, other_side, padding

import steerlens as sl
from steerlens.engine import cells
from steerlens.engine import resume as passes
from steerlens.engine.cells import Carried, fast_cells
from steerlens.engine.engine import Engine
from steerlens.engine.plain_loop import plain_cells, run_baseline
from steerlens.engine.plan import make_plan, run_cells
from steerlens.engine.prefixes import prepare
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.engine.workload import CellOutput, Job, Workload
from steerlens.models.hooks import readout_hook, resid_post

COEFFICIENTS = (-3.0, 0.5, 4.0)

pytestmark = pytest.mark.usefixtures("much_padding")


def make(model: Any, pairs: sl.ContrastivePairs, positions: Any = "all", size: int = 3) -> Workload:
    tokens = tokenize_pairs(model, pairs)
    return Engine(model, size).workload(tokens, position=-1, steered_positions=positions)


def make_jobs(model: Any, names: list[str]) -> list[Job]:
    torch.manual_seed(0)
    return [
        Job(
            name,
            torch.nn.functional.normalize(torch.randn(32), dim=0),
            COEFFICIENTS,
            readout_hook(name, model.cfg.n_layers),
        )
        for name in names
    ]


def by_plain_loop(model: Any, workload: Workload, job: Job) -> list[CellOutput]:
    return plain_cells(Engine(model), workload, job)


def planned(
    model: Any, workload: Workload, jobs: list[Job], *, rows: int | None = 16
) -> list[list[CellOutput]]:
    """The engine's cells, with its check."""
    return costed(Engine(model, rows), workload, jobs)[0]


def costed(
    engine: Engine, workload: Workload, jobs: list[Job]
) -> tuple[list[list[CellOutput]], int]:
    """The engine's cells, and the block-evaluations that they alone took."""
    readouts = tuple(dict.fromkeys(job.readout for job in jobs))
    plan = make_plan(engine, workload, run_baseline(engine, workload, readouts), jobs)
    before = engine.cost.blocks
    cells = list(run_cells(plan, jobs))
    return cells, engine.cost.blocks - before


def by_engine(model: Any, workload: Workload, job: Job, *, rows: int) -> list[CellOutput]:
    """The engine's cells without its check."""
    engine = Engine(model, rows)
    unsteered = run_baseline(engine, workload, (job.readout,))
    prepared = prepare(engine, workload, unsteered, reuse_prefix=True)
    return fast_cells(engine, prepared, job, Carried.at_start(prepared))[0]


def assert_same(found: list[CellOutput], expected: list[CellOutput]) -> None:
    assert [cell.coefficient for cell in found] == [cell.coefficient for cell in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for name in ("positive", "negative", "logprob"):
            torch.testing.assert_close(
                getattr(ours, name), getattr(theirs, name), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize("positions", ["all", "prompt", "continuation", "last"])
def test_equal_to_the_plain_loop_at_every_layer(
    tiny: Any, continued: sl.ContrastivePairs, positions: str
) -> None:
    with padding(tiny, other_side(tiny, positions)):
        workload = make(tiny, continued, positions)
    jobs = make_jobs(tiny, [resid_post(i) for i in range(tiny.cfg.n_layers)])
    found = planned(tiny, workload, jobs, rows=7)
    for job, of_job in zip(jobs, found, strict=True):
        assert_same(of_job, by_plain_loop(tiny, workload, job))
    # Control: neighbouring coefficients are told apart by the same comparison.
    with pytest.raises(AssertionError):
        assert_same(found[0], [replace(cell, coefficient=0.0) for cell in found[0]])
    swapped = [replace(found[0][1], coefficient=COEFFICIENTS[0]), *found[0][1:]]
    with pytest.raises(AssertionError):
        assert_same(swapped, found[0])


def test_hooks_inside_a_block_and_any_order_of_jobs(llama: Any, pairs: sl.ContrastivePairs) -> None:
    names = [
        "blocks.3.hook_mlp_out",
        "blocks.0.hook_resid_mid",
        "blocks.2.hook_resid_pre",
        "blocks.0.hook_resid_pre",
        f"blocks.1.{ATTN_OUT}",
        "blocks.1.hook_resid_post",
    ]
    workload = make(llama, pairs)
    jobs = make_jobs(llama, names)
    for job, of_job in zip(jobs, planned(llama, workload, jobs, rows=16), strict=True):
        assert_same(of_job, by_plain_loop(llama, workload, job))


def test_cost_is_that_of_the_blocks_that_run(llama: Any, pairs: sl.ContrastivePairs) -> None:
    """Five blocks, readout after block 2; hooks 1 and 4; three coefficients."""
    workload = make(llama, pairs, size=8)
    positive = workload.positive[0].tokens.numel()
    negative = workload.negative[0].tokens.numel()
    engine = Engine(llama, 8)
    _, blocks = costed(engine, workload, make_jobs(llama, [resid_post(1)]))
    carried = 2 * (positive + negative)
    assert blocks == carried + 3 * (positive * 3 + negative * 1)
    assert engine.forward_equivalents(workload) == engine.cost.blocks / (5 * positive)
    before = engine.cost.blocks - blocks
    assert engine.forward_equivalents(workload, since=before) == blocks / (5 * positive)
    _, blocks = costed(engine, workload, make_jobs(llama, [resid_post(4)]))
    assert blocks == 5 * (positive + negative)


@needs_bridge  # which alone takes Hugging Face's cache
@pytest.mark.parametrize("positions", ["continuation", "last"])
def test_only_tokens_from_the_last_prompt_token_on_are_run(
    llama: Any, continued: sl.ContrastivePairs, positions: str
) -> None:
    """Five blocks, readout after block 2; hook 1; three coefficients."""
    workload = make(llama, continued, positions, size=8)
    seen: list[int] = []
    job, engine = make_jobs(llama, [resid_post(1)])[0], Engine(llama, 8)
    width = (resid_post(2), lambda activation, hook: seen.append(activation.shape[1]))
    with llama.hooks(fwd_hooks=[width]):
        unsteered = run_baseline(Engine(llama, 8), workload, (job.readout,))
        ready = prepare(engine, workload, unsteered, reuse_prefix=True)
        seen.clear()
        fast_cells(engine, ready, job, Carried.at_start(ready))
    longest = max(len(p.continuation) for p in workload.positive[0].prompts)
    assert set(seen) == {1 + longest} | ({1} if positions == "last" else set())
    assert all(part.prefix is not None for part in ready.positive)
    heads = 5 * sum(part.prefix.attention_mask.numel() for part in ready.positive)
    tails = sum(part.batch.tokens.numel() for part in ready.positive) * (2 + 3 * 3)
    if positions == "last":
        heads += 5 * sum(part.prefix.attention_mask.numel() for part in ready.negative)
        tails += sum(part.batch.tokens.numel() for part in ready.negative) * (2 + 3 * 1)
    assert engine.cost.blocks == heads + tails


@needs_bridge
def test_a_prefix_that_cannot_be_reused_is_found_out(continued: sl.ContrastivePairs) -> None:
    """Block 3 adds the mean over all tokens of the pass: another one when only a few are run."""
    hf_model = build_llama()
    hf_model.model.layers[3].mlp.register_forward_hook(
        lambda m, a, out: out + out.cumsum(1).roll(1, 1)
    )
    model = bridge(hf_model)
    workload, jobs = make(model, continued, "last"), make_jobs(model, [resid_post(0)])
    with pytest.warns(RuntimeWarning, match="keys and values cannot be reused"):
        (found,) = planned(model, workload, jobs)
    assert_same(found, by_plain_loop(model, workload, jobs[0]))
    with pytest.raises(AssertionError):
        assert_same(by_engine(model, workload, jobs[0], rows=16), found)


@pytest.mark.parametrize("positions", ["all", "last"])
def test_divergences_equal_the_plain_loops(
    tiny: Any, continued: sl.ContrastivePairs, positions: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "LOGITS_PER_PASS", 7 * 160)
    workload = replace(make(tiny, continued, positions), negative=(), with_kl=True)
    jobs = make_jobs(tiny, [resid_post(0), resid_post(2)])
    for job, cells_of_job in zip(jobs, planned(tiny, workload, jobs, rows=5), strict=True):
        for ours, theirs in zip(cells_of_job, by_plain_loop(tiny, workload, job), strict=True):
            assert ours.kl is not None
            assert theirs.kl is not None
            assert ours.negative.shape == (0, 32)
            for a, b in zip(ours.kl, theirs.kl, strict=True):
                torch.testing.assert_close(a[a.isfinite()], b[b.isfinite()], rtol=1e-3, atol=1e-5)
        assert ours.kl is not None
        assert ours.kl.nan_to_num().max() > 1e-3


def test_only_label_positions_reach_the_unembedding(
    llama: Any, pairs: sl.ContrastivePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "LOGITS_PER_PASS", 20 * 160)
    rows: list[int] = []
    workload = make(llama, pairs, size=8)
    jobs = make_jobs(llama, [resid_post(1)])
    planned(llama, workload, jobs, rows=8)
    count = ("unembed.hook_out", lambda logits, hook: rows.append(logits.shape[:-1].numel()))
    with llama.hooks(fwd_hooks=[count]):
        by_engine(llama, workload, jobs[0], rows=8)
    labels = sum(len(prompt) - 1 for prompt in workload.positive[0].prompts)
    rows = rows[1:]  # without the baseline's, which are all positions
    assert sum(rows) == labels * len(COEFFICIENTS)
    assert max(rows) == 20


def test_users_hooks_still_fire(llama: Any, pairs: sl.ContrastivePairs) -> None:
    workload = make(llama, pairs)
    jobs = make_jobs(llama, [resid_post(0), resid_post(2)])
    plain_jobs = [by_plain_loop(llama, workload, job) for job in jobs]
    fired: list[int] = []

    def shift(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        fired.append(hook.layer())
        return activation * 1.3

    with llama.hooks(fwd_hooks=[(resid_post(layer), shift) for layer in (0, 3)]):
        found = planned(llama, workload, jobs, rows=16)
        expected = [by_plain_loop(llama, workload, job) for job in jobs]
    assert {0, 3} <= set(fired)
    for ours, theirs, without in zip(found, expected, plain_jobs, strict=True):
        assert_same(ours, theirs)
        assert not torch.allclose(ours[0].logprob, without[0].logprob, atol=1e-3)


def test_out_of_memory_halves_the_rows_and_goes_on(
    llama: Any, pairs: sl.ContrastivePairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload, jobs = make(llama, pairs, size=8), make_jobs(llama, [resid_post(1)])
    expected = by_plain_loop(llama, workload, jobs[0])
    real, sizes = cells.run_from, []

    def too_large(model: Any, tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(len(tokens))
        if len(tokens) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, tokens, *args, **kwargs)

    monkeypatch.setattr(cells, "run_from", too_large)
    with pytest.warns(RuntimeWarning, match="going on with [48] prompts"):
        (found,) = planned(llama, workload, jobs, rows=16)
    assert {16, 8, 4} <= set(sizes)
    assert_same(found, expected)
    monkeypatch.setattr(cells, "run_from", lambda *a, **k: too_large(a[0], torch.zeros(9, 1)))
    with pytest.raises(torch.OutOfMemoryError):
        by_engine(llama, workload, jobs[0], rows=1)


def test_a_model_that_cannot_be_resumed_is_found_out(pairs: sl.ContrastivePairs) -> None:
    """Block 3 looks at what block 0 computed: standing aside, block 0 gives it something else."""
    model = bridge(build_llama())
    seen: list[torch.Tensor] = []
    model.blocks[0].mlp.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    model.blocks[3].mlp.register_forward_hook(
        lambda m, a, out: out + (seen.pop() if seen else torch.zeros_like(out))
    )
    workload, jobs = make(model, pairs), make_jobs(model, [resid_post(0), resid_post(1)])
    with pytest.warns(RuntimeWarning, match="does not reproduce this model"):
        found = planned(model, workload, jobs, rows=16)
    seen.clear()
    for job, of_job in zip(jobs, found, strict=True):
        assert_same(of_job, by_plain_loop(model, workload, job))
    # Control: the same model without the shortcut across blocks gives no warning.
    honest = bridge(build_llama())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(honest, make(honest, pairs), jobs, rows=16)


def test_every_hook_is_checked_and_huge_coefficients_hide_nothing(
    pairs: sl.ContrastivePairs,
) -> None:
    """Block 4 adds what block 2 computed: resuming after block 0 is exact, after block 3 not."""
    model = bridge(build_llama())
    kept: dict[str, torch.Tensor] = {}
    model.blocks[2].mlp.register_forward_hook(lambda m, a, out: kept.update(out=out))
    model.blocks[4].mlp.register_forward_hook(
        lambda m, a, out: out + kept["out"] if kept["out"].shape == out.shape else out
    )
    workload = make(model, pairs)
    exact, wrong = (
        replace(job, coefficients=(*COEFFICIENTS, 1e20))
        for job in make_jobs(model, [resid_post(0), resid_post(3)])
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = planned(model, workload, [exact], rows=16)
    assert_same(found[:3], by_plain_loop(model, workload, exact)[:3])
    with pytest.warns(RuntimeWarning, match=r"resuming after blocks\.3"):
        _, found = planned(model, workload, [exact, wrong], rows=16)
    assert_same(found[:3], by_plain_loop(model, workload, wrong)[:3])


def test_hooks_are_checked_without_a_graph(pairs: sl.ContrastivePairs) -> None:
    model = bridge(build_llama())
    with_graph: list[bool] = []
    model.blocks[1].mlp.register_forward_hook(
        lambda m, a, out: with_graph.append(torch.is_grad_enabled())
    )
    model(torch.ones((1, 3), dtype=torch.long))
    assert with_graph == [True]  # as a pass of one's own has
    planned(model, make(model, pairs), make_jobs(model, [resid_post(0), resid_post(3)]), rows=16)
    assert len(with_graph) > 1
    assert not any(with_graph[1:])


def test_a_hook_between_others_that_cannot_be_resumed_after_is_found_out(
    pairs: sl.ContrastivePairs,
) -> None:
    """Block 2 adds what block 1 computed in the same pass: only after block 1 is it missing."""
    model = bridge(build_llama())
    kept: dict[str, torch.Tensor] = {}
    model.embed.register_forward_hook(lambda m, a, out: kept.clear())
    model.blocks[1].mlp.register_forward_hook(lambda m, a, out: kept.update(out=out))
    model.blocks[2].mlp.register_forward_hook(lambda m, a, out: out + kept.get("out", 0.0))
    workload = make(model, pairs)
    jobs = make_jobs(model, [resid_post(layer) for layer in (0, 1, 3)])
    with pytest.warns(RuntimeWarning, match=r"resuming after blocks\.1") as warned:
        found = planned(model, workload, jobs, rows=16)
    assert len(warned) == 1
    for job, of_job in zip(jobs, found, strict=True):
        assert_same(of_job, by_plain_loop(model, workload, job))
    # Control: the other hooks alone give no warning.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        planned(model, workload, make_jobs(model, [resid_post(i) for i in (0, 3, 4)]), rows=16)


def test_a_users_hook_on_the_end_of_the_model_is_found_out(
    llama: Any, pairs: sl.ContrastivePairs
) -> None:
    """It sees label rows instead of prompts, so what it does by position would be lost."""

    def late(activation: torch.Tensor, hook: Any) -> torch.Tensor:
        changed = activation.clone()
        changed[:, 10:] = 0
        return changed

    workload, jobs = make(llama, pairs), make_jobs(llama, [resid_post(1)])
    without = by_plain_loop(llama, workload, jobs[0])
    with llama.hooks(fwd_hooks=[(FINAL_NORM, late)]):
        with pytest.warns(RuntimeWarning, match="logprob differs"):
            (found,) = planned(llama, workload, jobs, rows=16)
        assert_same(found, by_plain_loop(llama, workload, jobs[0]))
    with pytest.raises(AssertionError):
        assert_same(found, without)


def test_gradients_flow_through_a_resumed_pass(double: Any) -> None:
    model = double
    torch.manual_seed(0)
    tokens, mask = torch.tensor([[1, 7, 9, 12]]), torch.ones(1, 4, dtype=torch.bool)
    residual = torch.randn(1, 4, 32, dtype=torch.float64)
    direction = torch.nn.functional.normalize(torch.randn(32, dtype=torch.float64), dim=0)

    def logprob(coefficient: torch.Tensor) -> torch.Tensor:
        kept: list[torch.Tensor] = []
        passes.run_from(
            model,
            tokens,
            mask,
            start=passes.Residual(1, residual + coefficient * direction),
            fwd_hooks=[(resid_post(2), lambda activation, hook: kept.append(activation))],
            last_hook=resid_post(2),
        )
        return passes.labels_logprob(model, kept[0][0, :-1], tokens[0, 1:]).mean()

    coefficient = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(logprob(coefficient), coefficient)
    step = 1e-4
    with torch.no_grad():
        difference = logprob(coefficient + step) - logprob(coefficient - step)
    assert float(found) == pytest.approx(difference.item() / (2 * step), rel=1e-6)
    assert abs(float(found)) > 1e-3
