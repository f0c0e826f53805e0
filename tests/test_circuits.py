"""Writers and readers: found in a model made by hand, and equal to brute force."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import bridge, build_llama
from hand_built import (
    AXIS,
    HOOK,
    PAIRS,
    VECTOR,
    build,
    build_normed,
    fitted,
    good_or_bad,
    one_by_one,
    positive_prompts,
)
from zoo import bridged

import steerlens as sl
from steerlens.circuits import (
    Component,
    Intervention,
    contrast_answers,
    find_readers,
    find_writers,
)
from steerlens.circuits.components import head_hook, mlp_hook
from steerlens.circuits.tasks import Task
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.errors import InputError
from steerlens.models.hooks import resid_post
from steerlens.tables import COLUMNS

EVERY_WAY = torch.linspace(-1, 1, 32)


@pytest.fixture(scope="module")
def hand() -> Any:
    return build()


def label(row: Any) -> str:
    return str(Component(int(row["layer"]), int(row["head"])))


# Who writes


def test_the_writer_made_by_hand_is_found(hand: Any) -> None:
    directions = fitted(hand, PAIRS)
    assert float(directions[HOOK] @ AXIS) > 0.95
    found = find_writers(hand, PAIRS, directions, layer=0)
    top = found.table.sort_values("share", ascending=False).iloc[0]
    assert label(top) == "L0H1"
    assert top.share > 0.95
    assert top.ci_low > 0
    # Positive control: without its output another answer comes out.
    with pytest.warns(UserWarning, match="fitted on other weights"):
        along = find_writers(build(writes=False), PAIRS, directions, layer=0).table
    assert along.contribution.abs().max() < 0.05 * top.contribution


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_contributions_add_up_to_the_projection(
    llama: Any, many: sl.ContrastivePairs, directions: sl.Directions, layer: int
) -> None:
    found = find_writers(llama, many, directions, layer=layer, n_positions=4)
    table = found.table
    assert list(table.columns) == [column.name for column in COLUMNS["writers"]]
    assert len(table) == 1 + (layer + 1) * 5

    def projection(position: int) -> float:
        name = resid_post(layer)
        differences = sl.collect_differences(llama, many, layers=[layer], position=position)
        return float((differences[name] @ directions[name]).mean())

    assert table.attrs["projection"] == pytest.approx(projection(-1), rel=1e-4)
    assert table.contribution.sum() == pytest.approx(projection(-1), rel=1e-3)
    assert table.share.sum() == pytest.approx(1, rel=1e-3)
    assert table.attrs["residual"] < 1e-3
    assert (table.ci_low <= table.contribution).all()
    assert (table.ci_high >= table.contribution).all()
    assert list(found.positions.columns) == [column.name for column in COLUMNS["positions"]]
    by_token = found.positions.groupby("position").contribution.sum()
    assert list(by_token.index) == [-4, -3, -2, -1]
    for position in (-4, -1):
        expected = projection(position)
        assert by_token[position] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    last = found.positions.query("position == -1").contribution.to_numpy()
    assert last == pytest.approx(table.contribution.to_numpy())


def test_contributions_equal_transformer_lens(tiny: Any, pairs: sl.ContrastivePairs) -> None:
    """`decompose_resid` and `stack_head_results` of its cache, prompt by prompt."""
    three = pairs[:3]
    directions = fitted(tiny, three, layer=1)
    table = find_writers(tiny, three, directions, layer=1).table
    tokenized = tokenize_pairs(tiny, three)
    total = torch.zeros(1 + 2 * 5)
    for sign, side in ((1, tokenized.positive), (-1, tokenized.negative)):
        for prompt in side:
            with torch.no_grad():
                _, cache = tiny.run_with_cache(torch.tensor([prompt.prompt]))
            heads = cache.stack_head_results(layer=2, pos_slice=-1)[:, 0]
            parts, labels = cache.decompose_resid(layer=2, pos_slice=-1, return_labels=True)
            by_name = dict(zip(labels, parts[:, 0], strict=True))
            rows = [by_name["embed"] + by_name.get("pos_embed", torch.zeros(32))]
            for layer in range(2):
                rows += [*heads[4 * layer : 4 * layer + 4], by_name[f"{layer}_mlp_out"]]
            total += sign * torch.stack(rows) @ directions[resid_post(1)]
    torch.testing.assert_close(
        torch.tensor(table.contribution.to_numpy()).float(), total / 3, rtol=1e-3, atol=1e-4
    )


def test_writers_refuse(llama: Any, many: sl.ContrastivePairs, directions: sl.Directions) -> None:
    for layer in ([1, 2], "blocks.1.hook_mlp_out"):
        with pytest.raises(InputError, match="one block output"):
            find_writers(llama, many, directions, layer=layer)
    with pytest.raises(InputError, match=r"no direction at blocks\.1"):
        find_writers(llama, many, fitted(llama, many), layer=1)
    normed, pairs = build_normed(), PAIRS[:2]
    with pytest.raises(InputError, match=r"add up to|apart"):
        find_writers(normed, pairs, fitted(normed, pairs, layer=1), layer=1)
    headless = bridge(build_llama(n_layers=2))
    del headless.blocks[1].attn._modules["o"]
    with pytest.raises((InputError, AttributeError)):
        find_writers(
            headless,
            pairs,
            sl.Directions((HOOK,), (), AXIS[None].expand(1, 16), "x", -1, 0, ""),
            layer=0,
        )


# Who reads


def test_the_reader_made_by_hand_is_found(hand: Any) -> None:
    prompts = positive_prompts(hand, PAIRS)
    found = find_readers(hand, prompts, good_or_bad(hand), VECTOR, 1.5, n_claimed=1, n_draws=19)
    # First by exact patching, then by the estimate.
    exact = found.table.loc[found.table.exact.abs().idxmax()]
    assert label(exact) == "mlp1"
    top = found.table.iloc[0]
    assert label(top) == "mlp1"
    assert top.share == pytest.approx(1, abs=0.2)
    assert top.exact == pytest.approx(top.effect, rel=0.3)
    assert top.direct == pytest.approx(top.exact, rel=0.1), "it writes to the answer itself"
    claims = found.claims.set_index("test").remaining
    assert claims["nothing"] == pytest.approx(1)
    assert abs(claims["named components"]) < 0.1
    assert claims["attention patterns"] == pytest.approx(1, abs=0.1)
    # Random sets hold one of the two MLPs behind the vector: all of the effect or none.
    assert found.claims.attrs["named"] == ["mlp1"]
    random = found.claims.set_index("test").loc["random components"]
    assert (random.ci_low, random.ci_high) == pytest.approx((0, 1), abs=0.1)
    n_as_far = round((1 - random.remaining) * 19)
    assert 0 < n_as_far < 19
    p_value = found.claims.set_index("test").p_value["named components"]
    assert p_value == pytest.approx((1 + n_as_far) / 20)
    # Positive control: without the reader, nothing carries the direction on.
    broken = build(reads=False)
    other = find_readers(
        broken, positive_prompts(broken, PAIRS), good_or_bad(broken), VECTOR, 1.5
    ).table
    assert other.effect.abs().max() < 0.05 * top.effect
    change = other.attrs["metric_steered"] - other.attrs["metric_unsteered"]
    assert abs(change) < 0.05 * top.effect


@pytest.fixture(scope="module")
def task(tiny: Any, pairs: sl.ContrastivePairs) -> Task:
    return Task(tiny, positive_prompts(tiny, pairs), contrast_answers(tiny, pairs, n_tokens=3))


@pytest.fixture(scope="module")
def steering(tiny: Any, pairs: sl.ContrastivePairs) -> sl.SteeringVector:
    """At block 2's output (block 0's of GPT-2)."""
    directions = fitted(tiny, pairs, layer=int(tiny.cfg.n_layers) - 3)
    return sl.SteeringVector.from_directions(tiny, directions)


@pytest.fixture(scope="module")
def readers(tiny: Any, task: Task, steering: sl.SteeringVector) -> Any:
    return find_readers(tiny, task.prompts, task.answers, steering, 2.0, top=40)


def final_hook(model: Any) -> str:
    return resid_post(int(model.cfg.n_layers) - 1)


def test_components_are_named_on_one_half_of_the_groups_and_held_on_the_other(
    tiny: Any, task: Task, steering: sl.SteeringVector
) -> None:
    """The named are the largest of the one half alone; what is left is of the other alone."""
    groups = (0, 0, 1, 1, 2, 2, 3, 3)
    prompts = replace(task.prompts, groups=groups)
    options: dict[str, Any] = {"top": 0, "n_draws": 0}
    claims = find_readers(tiny, prompts, task.answers, steering, 2.0, n_claimed=2, **options).claims
    chosen, tested = (claims.attrs[half]["rows"] for half in ("chosen_on", "tested_on"))
    assert sorted(chosen + tested) == list(range(8))
    assert not {groups[i] for i in chosen} & {groups[i] for i in tested}
    assert claims.n_groups.tolist() == [2] * len(claims)
    on_half = find_readers(
        tiny, prompts.part(chosen), task.answers, steering, 2.0, n_claimed=0, **options
    ).table
    assert claims.attrs["named"] == [label(row) for _, row in on_half.head(2).iterrows()]
    attrs = find_readers(
        tiny, prompts.part(tested), task.answers, steering, 2.0, n_claimed=0, **options
    ).table.attrs
    change = attrs["metric_steered"] - attrs["metric_unsteered"]
    assert claims.change[0] == pytest.approx(change, rel=1e-4)
    few = replace(prompts, groups=(0, 0, 0, 0, 1, 1, 2, 2))
    with pytest.raises(InputError, match="4 groups or more; got 3"):
        find_readers(tiny, few, task.answers, steering, 2.0, n_claimed=2, **options)


def test_columns_and_order_of_readers(tiny: Any, readers: Any) -> None:
    table = readers.table
    assert list(table.columns) == [column.name for column in COLUMNS["readers"]]
    assert list(readers.claims.columns) == [column.name for column in COLUMNS["claims"]]
    assert len(table) == 2 * 5
    assert "10 components" in repr(readers)
    assert table.effect.abs().is_monotonic_decreasing
    assert (table.layer > int(tiny.cfg.n_layers) - 3).all()
    assert table.exact.notna().all()
    assert math.isfinite(table.share.sum())
    nothing = readers.claims.set_index("test").loc["nothing"]
    assert (nothing.remaining, nothing.ci_low, nothing.ci_high) == pytest.approx((1, 1, 1))
    for kind, r in table.attrs["correlation"].items():
        rows = table[table.component == kind]
        if len(rows) < 3:
            assert r is None
        else:
            assert r == pytest.approx(rows.effect.corr(rows.exact), abs=1e-6)


def test_exact_patching_equals_brute_force(
    tiny: Any, task: Task, steering: sl.SteeringVector, readers: Any
) -> None:
    """One prompt at a time, by hooks of its own."""
    difference = task.answers.logit_difference
    for row in readers.table.head(4).itertuples():
        changes = []
        name = head_hook(row.layer) if row.component == "head" else mlp_hook(row.layer)
        for tokens in one_by_one(task.prompts):
            with torch.no_grad():
                with sl.steer(tiny, steering, 2.0):
                    value = tiny.run_with_cache(tokens)[1][name]

                def put(a: Any, hook: Any, row: Any = row, value: Any = value) -> Any:
                    if row.component == "mlp":
                        return value
                    b = a.clone()
                    b[:, :, row.head] = value[:, :, row.head]
                    return b

                before = difference(tiny(tokens)[:, -1])
                after = difference(tiny.run_with_hooks(tokens, fwd_hooks=[(name, put)])[:, -1])
            changes.append(float(after - before))
        assert row.exact == pytest.approx(sum(changes) / len(changes), rel=1e-3, abs=1e-4)


def test_estimates_equal_transformer_lens_example_by_example(
    tiny: Any, task: Task, steering: sl.SteeringVector, readers: Any
) -> None:
    """`attribution_patch` runs clean and corrupt prompts in turn: every other one is steered."""
    from transformer_lens.tools.analysis import attribution_patch

    (name,) = steering.hook_names
    totals: dict[Component, float] = {}
    for tokens in one_by_one(task.prompts):
        turns = []

        def every_other(a: Any, hook: Any, turns: list[int] = turns) -> Any:
            turns.append(1)
            return a + 2.0 * steering[name] if len(turns) % 2 else a

        tiny.eval()
        with tiny.hooks(fwd_hooks=[(name, every_other)]):
            result = attribution_patch(
                *(tiny, tokens, tokens),
                lambda logits: task.answers.logit_difference(logits[:, -1]).sum(),
            )
        for node, score in result.node_scores.items():
            part = Component(
                -1 if node.layer is None else node.layer, -1 if node.head is None else node.head
            )
            totals[part] = totals.get(part, 0.0) + score / len(task.prompts)
    for row in readers.table.itertuples():
        expected = totals[Component(row.layer, row.head)]
        assert row.effect == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_direct_effects_and_the_vector_make_the_change(
    tiny: Any, task: Task, steering: sl.SteeringVector, readers: Any
) -> None:
    """What is left is the final norm, which divides by another length: checked by hand."""
    attrs = readers.table.attrs
    explained = readers.table.direct.sum() + attrs["vector_direct"]
    change = attrs["metric_steered"] - attrs["metric_unsteered"]
    assert explained + attrs["norm"] == pytest.approx(change)
    module = tiny.original_model
    norm = module.model.norm if hasattr(module, "model") else module.transformer.ln_f
    differences = []
    for tokens in one_by_one(task.prompts):
        with torch.no_grad():
            _, plain = tiny.run_with_cache(tokens)
            with sl.steer(tiny, steering, 2.0):
                _, pushed = tiny.run_with_cache(tokens)
            x = pushed[final_hook(tiny)][0, -1]
            if tiny.cfg.normalization_type == "LN":
                x = x - x.mean()
            y = x / plain["ln_final.hook_scale"][0, -1] * norm.weight
            if getattr(norm, "bias", None) is not None:
                y = y + norm.bias
            before = task.answers.logit_difference(plain["unembed.hook_out"][0, -1:])
            after = task.answers.logit_difference(tiny.unembed(y[None, None])[0])
            differences.append(float(after - before))
    frozen = sum(differences) / len(differences)
    assert explained == pytest.approx(frozen, rel=1e-3, abs=1e-4)


def test_integrated_gradients_are_means_along_the_coefficient(
    tiny: Any, task: Task, steering: sl.SteeringVector
) -> None:
    layer = int(tiny.cfg.n_layers) - 1
    name = mlp_hook(layer)
    twice, once = (
        find_readers(
            *(tiny, task.prompts, task.answers, steering, 8.0), ig_steps=ig_steps, top=0, n_draws=0
        ).table
        for ig_steps in (2, 1)
    )
    plain, pushed = (
        task.trace([name], steered).activations[name]
        for steered in (Intervention(), Intervention(steering, 8.0))
    )
    gradient = sum(
        task.trace([name], Intervention(steering, c), with_gradients=True).gradients[name] / 2
        for c in (2.0, 6.0)
    )
    expected = ((pushed - plain) * gradient).sum() / len(task.prompts)
    effect = twice.query(f"component == 'mlp' and layer == {layer}").effect.item()
    assert effect == pytest.approx(float(expected), rel=1e-4)
    assert once.effect.tolist() != twice.effect.tolist()


def test_patterns_that_a_model_does_not_use_say_nothing(pairs: sl.ContrastivePairs) -> None:
    """On GPT-J what is put into the patterns is thrown away by the Bridge."""
    model = bridged("GPT-J")
    found = find_readers(
        model,
        positive_prompts(model, pairs),
        contrast_answers(model, pairs, n_tokens=3),
        sl.SteeringVector.from_vectors({HOOK: EVERY_WAY}),
        2.0,
        top=0,
        n_claimed=2,
        n_draws=1,
    )
    claims = found.claims.set_index("test")
    assert math.isnan(claims.remaining["attention patterns"])
    assert claims.n_draws["attention patterns"] == 0
    assert math.isfinite(claims.remaining["attention values"])
    assert math.isnan(claims.ci_low["random components"]), "one draw has no interval"


def test_frozen_parameters_and_what_stops_gradients(pairs: sl.ContrastivePairs) -> None:
    model = bridge(build_llama(n_layers=3))
    prompts, answers = positive_prompts(model, pairs), contrast_answers(model, pairs, n_tokens=3)
    vector = sl.SteeringVector.from_vectors({HOOK: EVERY_WAY})

    def effects() -> list[float]:
        found = find_readers(model, prompts, answers, vector, 2.0, top=0, n_claimed=0)
        effects: list[float] = found.table.effect.tolist()
        return effects

    before = effects()
    model.original_model.requires_grad_(False)
    assert effects() == pytest.approx(before)
    assert not any(p.requires_grad for p in model.original_model.parameters())
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        effects()
    handle = model.original_model.lm_head.register_forward_hook(
        lambda module, args, out: 2 * torch.tanh(out / 2)
    )
    with pytest.raises(InputError, match="not linear behind"):
        effects()
    handle.remove()
    effects()


def test_readers_refuse(tiny: Any, task: Task, steering: sl.SteeringVector) -> None:
    row = steering.rows[0]

    def find(vector: sl.SteeringVector, coefficient: float = 1.0, **options: int) -> None:
        find_readers(tiny, task.prompts, task.answers, vector, coefficient, **options)

    for hooks, message in (
        ([final_hook(tiny)], "the last one"),
        ([resid_post(0), resid_post(1)], "one block output"),
        (["blocks.0.hook_mlp_out"], "one block output"),
    ):
        with pytest.raises(InputError, match=message):
            find(sl.SteeringVector.from_vectors(dict.fromkeys(hooks, row)))
    with pytest.raises(InputError, match="coefficient 0"):
        find(steering, 0)
    for options in ({"top": -1}, {"n_claimed": -1}, {"n_draws": -1}, {"ig_steps": 0}):
        with pytest.raises(InputError, match=f"{next(iter(options))}: expected a whole number"):
            find(steering, **options)
    condition = sl.Condition(HOOK, AXIS, 0.0)
    with pytest.raises(InputError, match="without a condition on the prompt"):
        Intervention(replace(VECTOR, condition=condition), 1.0)
