"""Writers and readers: found in a model made by hand, and equal to brute force."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import bridge, build_llama
from hand_built import DIRECTION, WIDTH, build

import steerlens as sl
from steerlens.circuits import (
    Answers,
    Component,
    Intervention,
    Prompts,
    contrast_answers,
    find_readers,
    find_writers,
    item_answers,
    make_prompts,
)
from steerlens.circuits.answers import measure
from steerlens.circuits.components import components, head_hook, mlp_hook, writer_hooks
from steerlens.circuits.interventions import trace
from steerlens.circuits.readers import frozen_readout
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.errors import InputError
from steerlens.models.hooks import resid_post
from steerlens.tables import CLAIM_COLUMNS, READER_COLUMNS, WRITER_COLUMNS, WRITER_POSITION_COLUMNS

HAND = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def hand() -> Any:
    return build()


@pytest.fixture(scope="module")
def hand_pairs() -> sl.ContrastivePairs:
    openings = ["the day was", "I felt so", "it was a night and", "the river is", "you said it was"]
    return sl.ContrastivePairs.from_lists(
        [f"you are cheerful {text}" for text in openings],
        [f"you are gloomy {text}" for text in openings],
    )


def axis(sign: float = 1.0) -> torch.Tensor:
    return sign * torch.nn.functional.one_hot(torch.tensor(DIRECTION), WIDTH).float()


def vector() -> sl.SteeringVector:
    return sl.SteeringVector.from_vectors({HAND: axis()})


def asked(model: Any, pairs: sl.ContrastivePairs) -> Prompts:
    return make_prompts(model, list(tokenize_pairs(model, pairs).positive))


def answers(model: Any) -> Answers:
    ids = [model.tokenizer.convert_tokens_to_ids(word) for word in ("good", "bad")]
    return Answers(torch.tensor([ids[:1]]), torch.tensor([ids[1:]]))


def fitted(model: Any, pairs: sl.ContrastivePairs, layer: int = 0) -> sl.Directions:
    return sl.fit_directions(sl.collect_differences(model, pairs, layers=[layer]))


def label(row: Any) -> str:
    return str(Component(int(row["layer"]), int(row["head"])))


# Who writes


def test_the_writer_made_by_hand_is_found(hand: Any, hand_pairs: sl.ContrastivePairs) -> None:
    directions = fitted(hand, hand_pairs)
    assert float(directions[HAND] @ axis()) > 0.95
    found = find_writers(hand, hand_pairs, directions, layer=0)
    top = found.table.sort_values("share", ascending=False).iloc[0]
    assert label(top) == "L0H1"
    assert top.share > 0.95
    assert top.ci_low > 0
    # Positive control: without its output another answer comes out.
    broken = build(writes=False)
    along = find_writers(broken, hand_pairs, directions, layer=0).table
    assert along.contribution.abs().max() < 0.05 * top.contribution


@pytest.mark.parametrize("layer", [0, 2, 4])
def test_contributions_add_up_to_the_projection(
    llama: Any, many: sl.ContrastivePairs, directions: sl.Directions, layer: int
) -> None:
    found = find_writers(llama, many, directions, layer=layer)
    table = found.table
    assert list(table.columns) == [column.name for column in WRITER_COLUMNS]
    assert len(table) == 1 + (layer + 1) * 5
    differences = sl.collect_differences(llama, many, layers=[layer])
    name = resid_post(layer)
    expected = float((differences[name] @ directions[name]).mean())
    assert table.attrs["projection"] == pytest.approx(expected, rel=1e-4)
    assert table.contribution.sum() == pytest.approx(expected, rel=1e-3)
    assert table.share.sum() == pytest.approx(1, rel=1e-3)
    assert table.attrs["residual"] < 1e-3
    assert (table.ci_low <= table.contribution).all()
    assert (table.ci_high >= table.contribution).all()


def test_contributions_equal_transformer_lens(tiny: Any, pairs: sl.ContrastivePairs) -> None:
    """`decompose_resid` and `stack_head_results` of its cache, prompt by prompt."""
    some = pairs[:3]
    directions = fitted(tiny, some, layer=1)
    table = find_writers(tiny, some, directions, layer=1).table
    tokenized = tokenize_pairs(tiny, some)
    total = torch.zeros(1 + 2 * 5)
    for sign, side in ((1, tokenized.positive), (-1, tokenized.negative)):
        for prompt in side:
            with torch.no_grad():
                _, cache = tiny.run_with_cache(torch.tensor([prompt.prompt]))
            heads = cache.stack_head_results(layer=2, pos_slice=-1)[:, 0]
            parts, labels = cache.decompose_resid(layer=2, pos_slice=-1, return_labels=True)
            by_name = dict(zip(labels, parts[:, 0], strict=True))
            embed = by_name["embed"] + by_name.get("pos_embed", torch.zeros(32))
            rows = [embed]
            for layer in range(2):
                rows += [*heads[4 * layer : 4 * layer + 4], by_name[f"{layer}_mlp_out"]]
            total += sign * torch.stack(rows) @ directions[resid_post(1)]
    torch.testing.assert_close(
        torch.tensor(table.contribution.to_numpy()).float(), total / 3, rtol=1e-3, atol=1e-4
    )


def test_token_positions(llama: Any, many: sl.ContrastivePairs, directions: sl.Directions) -> None:
    found = find_writers(llama, many, directions, layer=2, n_positions=4)
    assert list(found.positions.columns) == [column.name for column in WRITER_POSITION_COLUMNS]
    by_token = found.positions.groupby("position").contribution.sum()
    assert list(by_token.index) == [-4, -3, -2, -1]
    name = resid_post(2)
    for position in (-4, -1):
        differences = sl.collect_differences(llama, many, layers=[2], position=position)
        expected = float((differences[name] @ directions[name]).mean())
        assert by_token[position] == pytest.approx(expected, rel=1e-3, abs=1e-4)
    last = found.positions.query("position == -1").contribution.to_numpy()
    assert last == pytest.approx(found.table.contribution.to_numpy())


def test_writers_refuse(llama: Any, many: sl.ContrastivePairs, directions: sl.Directions) -> None:
    with pytest.raises(InputError, match="one block output"):
        find_writers(llama, many, directions, layer=[1, 2])
    with pytest.raises(InputError, match="one block output"):
        find_writers(llama, many, directions, layer="blocks.1.hook_mlp_out")
    only = fitted(llama, many, layer=0)
    with pytest.raises(InputError, match=r"no direction at blocks\.1"):
        find_writers(llama, many, only, layer=1)


def test_blocks_that_are_not_a_sum_are_refused() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=160,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    model = bridge(transformers.Gemma2ForCausalLM(config).eval())
    pairs = sl.ContrastivePairs.from_lists(
        ["the day was good", "I felt good"], ["the day was bad", "I felt bad"]
    )
    with pytest.raises(InputError, match=r"add up to|apart"):
        find_writers(model, pairs, fitted(model, pairs, layer=1), layer=1)


# Who reads


def test_the_reader_made_by_hand_is_found(hand: Any, hand_pairs: sl.ContrastivePairs) -> None:
    found = find_readers(
        hand, asked(hand, hand_pairs), answers(hand), vector(), 1.5, n_claimed=1, n_draws=3
    )
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
    assert claims["random components"] == pytest.approx(1, abs=0.1)
    assert claims["attention patterns"] == pytest.approx(1, abs=0.1)
    # Positive control: without the reader, nothing carries the direction on.
    broken = build(reads=False)
    other = find_readers(broken, asked(broken, hand_pairs), answers(broken), vector(), 1.5)
    assert other.table.effect.abs().max() < 0.05 * top.effect
    change = other.table.attrs["metric_steered"] - other.table.attrs["metric_unsteered"]
    assert abs(change) < 0.05 * top.effect


@pytest.fixture(scope="module")
def read(tiny: Any, pairs: sl.ContrastivePairs) -> Any:
    """Prompts, answers, a vector at block 1's output (block 0's of GPT-2), and its readers."""
    layer = int(tiny.cfg.n_layers) - 3
    directions = fitted(tiny, pairs, layer=layer)
    steering = sl.SteeringVector.from_directions(tiny, directions)
    prompts = asked(tiny, pairs)
    given = contrast_answers(tiny, pairs, n_tokens=3)
    return prompts, given, steering, find_readers(tiny, prompts, given, steering, 2.0, top=40)


def test_columns_and_order_of_readers(tiny: Any, read: Any) -> None:
    found = read[3]
    assert list(found.table.columns) == [column.name for column in READER_COLUMNS]
    assert list(found.claims.columns) == [column.name for column in CLAIM_COLUMNS]
    assert len(found.table) == 2 * 5
    assert found.table.effect.abs().is_monotonic_decreasing
    assert (found.table.layer > int(tiny.cfg.n_layers) - 3).all()
    assert found.table.exact.notna().all()


def test_exact_patching_equals_brute_force(tiny: Any, read: Any) -> None:
    """One prompt at a time, by hooks of its own."""
    prompts, given, steering, found = read
    for row in found.table.head(4).itertuples():
        changes = []
        for i in range(len(prompts)):
            tokens = prompts.tokens[i : i + 1, : int(prompts.last[i]) + 1]
            name = head_hook(row.layer) if row.component == "head" else mlp_hook(row.layer)
            with torch.no_grad():
                with sl.steer(tiny, steering, 2.0):
                    _, cache = tiny.run_with_cache(tokens)
                value = cache[name]

                def put(a: Any, hook: Any, row: Any = row, value: Any = value) -> Any:
                    if row.component == "mlp":
                        return value
                    b = a.clone()
                    b[:, :, row.head] = value[:, :, row.head]
                    return b

                before = given.logit_difference(tiny(tokens)[:, -1])
                after = given.logit_difference(
                    tiny.run_with_hooks(tokens, fwd_hooks=[(name, put)])[:, -1]
                )
            changes.append(float(after - before))
        assert row.exact == pytest.approx(sum(changes) / len(changes), rel=1e-3, abs=1e-4)


def test_estimates_equal_transformer_lens_example_by_example(tiny: Any, read: Any) -> None:
    """`attribution_patch` runs clean and corrupt prompts in turn: every other one is steered."""
    from transformer_lens.tools.analysis import attribution_patch

    prompts, given, steering, found = read
    (name,) = steering.hook_names
    totals: dict[Component, float] = {}
    for i in range(len(prompts)):
        tokens = prompts.tokens[i : i + 1, : int(prompts.last[i]) + 1]
        turns = []

        def every_other(a: Any, hook: Any, turns: list[int] = turns) -> Any:
            turns.append(1)
            return a + 2.0 * steering[name] if len(turns) % 2 else a

        tiny.eval()
        with tiny.hooks(fwd_hooks=[(name, every_other)]):
            result = attribution_patch(
                tiny, tokens, tokens, lambda logits: given.logit_difference(logits[:, -1]).sum()
            )
        for node, score in result.node_scores.items():
            part = Component(
                -1 if node.layer is None else node.layer, -1 if node.head is None else node.head
            )
            totals[part] = totals.get(part, 0.0) + score / len(prompts)
    for row in found.table.itertuples():
        expected = totals[Component(row.layer, row.head)]
        assert row.effect == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_direct_effects_and_the_vector_make_the_change(tiny: Any, read: Any) -> None:
    """What is left is the final norm, which divides by another length: checked by hand."""
    prompts, given, steering, found = read
    attrs = found.table.attrs
    change = attrs["metric_steered"] - attrs["metric_unsteered"]
    assert found.table.direct.sum() + attrs["vector_direct"] + attrs["norm"] == pytest.approx(
        change
    )
    final = resid_post(int(tiny.cfg.n_layers) - 1)
    differences = []
    for i in range(len(prompts)):
        tokens = prompts.tokens[i : i + 1, : int(prompts.last[i]) + 1]
        with torch.no_grad():
            _, plain = tiny.run_with_cache(tokens)
            with sl.steer(tiny, steering, 2.0):
                _, pushed = tiny.run_with_cache(tokens)
            scale = plain["ln_final.hook_scale"][0, -1]
            x = pushed[final][0, -1]
            if tiny.cfg.normalization_type == "LN":
                x = x - x.mean()
            module = tiny.original_model
            norm = module.model.norm if hasattr(module, "model") else module.transformer.ln_f
            y = x / scale * norm.weight + (
                getattr(norm, "bias", None) or 0
                if not hasattr(norm, "bias") or norm.bias is None
                else norm.bias
            )
            logits = tiny.unembed(y[None, None])[0]
            before = given.logit_difference(plain["unembed.hook_out"][0, -1:])
            differences.append(float(given.logit_difference(logits) - before))
    frozen = sum(differences) / len(differences)
    assert found.table.direct.sum() + attrs["vector_direct"] == pytest.approx(
        frozen, rel=1e-3, abs=1e-4
    )


def test_the_frozen_readout_gives_the_metric(tiny: Any, read: Any) -> None:
    prompts, given, _, _ = read
    final = resid_post(int(tiny.cfg.n_layers) - 1)
    plain = trace(tiny, prompts, given, [final], with_gradients=True)
    readout = frozen_readout(tiny, prompts, given, plain, final)
    rows = torch.arange(len(prompts))
    x = plain.activations[final][rows, prompts.last]
    with torch.no_grad():
        constant = given.logit_difference(tiny.unembed(tiny.ln_final(0 * x[:, None]))[:, 0])
    torch.testing.assert_close(
        (x * readout).sum(dim=1) + constant, plain.metric, rtol=1e-3, atol=1e-4
    )


def test_integrated_gradients_are_means_along_the_coefficient(tiny: Any, read: Any) -> None:
    prompts, given, steering, _ = read
    layer = int(tiny.cfg.n_layers) - 1
    name = mlp_hook(layer)
    options: dict[str, Any] = {"top": 0, "n_draws": 0}
    found = find_readers(tiny, prompts, given, steering, 8.0, ig_steps=2, **options).table
    plain = trace(tiny, prompts, given, [name]).activations[name]
    pushed = trace(tiny, prompts, given, [name], intervention=Intervention(steering, 8.0))
    gradient = torch.zeros_like(plain)
    for coefficient in (2.0, 6.0):
        at = Intervention(steering, coefficient)
        run = trace(tiny, prompts, given, [name], intervention=at, with_gradients=True)
        gradient += run.gradients[name] / 2
    expected = ((pushed.activations[name] - plain) * gradient).sum() / len(prompts)
    effect = found.query(f"component == 'mlp' and layer == {layer}").effect.item()
    assert effect == pytest.approx(float(expected), rel=1e-4)
    once = find_readers(tiny, prompts, given, steering, 8.0, **options).table
    assert once.effect.tolist() != found.effect.tolist()


def test_correlation_is_that_of_the_table(tiny: Any, read: Any) -> None:
    table = read[3].table
    for kind in ("head", "mlp"):
        rows = table[table.component == kind]
        found = table.attrs["correlation"][kind]
        if len(rows) < 3:
            assert found is None
        else:
            assert found == pytest.approx(rows.effect.corr(rows.exact), abs=1e-6)


def test_padding_on_the_right_changes_nothing(tiny: Any, pairs: sl.ContrastivePairs) -> None:
    prompts = asked(tiny, pairs)
    given = contrast_answers(tiny, pairs, n_tokens=3)
    together = measure(tiny, prompts, given)
    for i in range(len(prompts)):
        tokens = prompts.tokens[i : i + 1, : int(prompts.last[i]) + 1]
        with torch.no_grad():
            alone = given.logit_difference(tiny(tokens)[:, -1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


def test_traces_leave_the_model_as_it_was(tiny: Any, read: Any) -> None:
    prompts, given, steering, _ = read
    trace(
        tiny,
        prompts,
        given,
        writer_hooks(tiny),
        intervention=Intervention(steering, 1.0),
        with_gradients=True,
    )
    assert all(p.grad is None for p in tiny.original_model.parameters())
    assert torch.is_grad_enabled()
    assert components(tiny)[0] == Component(-1)


def test_nothing_held_leaves_everything(read: Any) -> None:
    row = read[3].claims.set_index("test").loc["nothing"]
    assert (row.remaining, row.ci_low, row.ci_high) == pytest.approx((1, 1, 1))


def test_patterns_that_a_model_does_not_use_say_nothing(pairs: sl.ContrastivePairs) -> None:
    """On GPT-J what is put into the patterns is thrown away by the Bridge."""
    import transformers

    torch.manual_seed(0)
    config = transformers.GPTJConfig(
        n_embd=32, n_layer=3, n_head=4, rotary_dim=4, vocab_size=160, initializer_range=0.3
    )
    model = bridge(transformers.AutoModelForCausalLM.from_config(config).eval())
    steering = sl.SteeringVector.from_vectors({HAND: torch.linspace(-1, 1, 32)})
    found = find_readers(
        model,
        asked(model, pairs),
        contrast_answers(model, pairs, n_tokens=3),
        steering,
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


def test_frozen_parameters_are_no_hindrance(pairs: sl.ContrastivePairs) -> None:
    model = bridge(build_llama(n_layers=3))
    steering = sl.SteeringVector.from_vectors({HAND: torch.linspace(-1, 1, 32)})
    given = contrast_answers(model, pairs, n_tokens=3)
    options: dict[str, Any] = {"top": 0, "n_claimed": 0}
    before = find_readers(model, asked(model, pairs), given, steering, 2.0, **options).table
    model.original_model.requires_grad_(False)
    after = find_readers(model, asked(model, pairs), given, steering, 2.0, **options).table
    assert after.effect.tolist() == pytest.approx(before.effect.tolist())
    assert not any(p.requires_grad for p in model.original_model.parameters())
    with torch.inference_mode(), pytest.raises(InputError, match="inference_mode"):
        find_readers(model, asked(model, pairs), given, steering, 2.0, **options)


def test_soft_capped_logits_are_refused(pairs: sl.ContrastivePairs) -> None:
    model = bridge(build_llama(n_layers=3))
    steering = sl.SteeringVector.from_vectors({HAND: torch.linspace(-1, 1, 32)})
    given = contrast_answers(model, pairs, n_tokens=3)
    handle = model.original_model.lm_head.register_forward_hook(
        lambda module, args, out: 2 * torch.tanh(out / 2)
    )
    with pytest.raises(InputError, match="not linear behind"):
        find_readers(model, asked(model, pairs), given, steering, 2.0, top=0, n_claimed=0)
    handle.remove()
    find_readers(model, asked(model, pairs), given, steering, 2.0, top=0, n_claimed=0)


def test_conditions_on_prompts_are_refused() -> None:
    condition = sl.Condition(HAND, axis(), 0.0)
    with pytest.raises(InputError, match="without a condition on the prompt"):
        Intervention(replace(vector(), condition=condition), 1.0)


def test_negative_counts_are_refused(tiny: Any, read: Any) -> None:
    prompts, given, steering, _ = read
    for options in ({"top": -1}, {"n_claimed": -1}, {"n_draws": -1}, {"ig_steps": 0}):
        with pytest.raises(InputError, match="0 or more"):
            find_readers(tiny, prompts, given, steering, 1.0, **options)


def test_readers_refuse(tiny: Any, read: Any) -> None:
    prompts, given, steering, _ = read
    last = int(tiny.cfg.n_layers) - 1
    row = steering.rows[0]
    for bad, coefficient, message in (
        (steering, 0, "coefficient 0"),
        (sl.SteeringVector.from_vectors({resid_post(last): row}), 1.0, "the last one"),
        (
            sl.SteeringVector.from_vectors({resid_post(0): row, resid_post(1): row}),
            1.0,
            "one block output",
        ),
        (sl.SteeringVector.from_vectors({"blocks.0.hook_mlp_out": row}), 1.0, "one block output"),
    ):
        with pytest.raises(InputError, match=message):
            find_readers(tiny, prompts, given, bad, coefficient)


# Answers


@pytest.mark.parametrize(
    ("positive", "negative"),
    [
        (torch.tensor([1, 2]), torch.tensor([3, 4])),
        (torch.tensor([[1.0]]), torch.tensor([[2.0]])),
        (torch.tensor([[1], [2]]), torch.tensor([[2]])),
        (torch.zeros((1, 0), dtype=torch.long), torch.tensor([[2]])),
    ],
)
def test_what_is_no_answer(positive: torch.Tensor, negative: torch.Tensor) -> None:
    unchecked = object.__new__(Answers)
    object.__setattr__(unchecked, "positive", positive)
    object.__setattr__(unchecked, "negative", negative)
    with pytest.raises(InputError, match="token ids, a row a prompt"):
        unchecked.__post_init__()


def test_answers_by_hand() -> None:
    given = Answers(torch.tensor([[0, 1]]), torch.tensor([[2]]))
    logits = torch.tensor([[1.0, 3.0, 5.0, 9.0], [0.0, 4.0, 1.0, 9.0]])
    assert given.logit_difference(logits).tolist() == [-3.0, 1.0]
    own = Answers(torch.tensor([[0], [1]]), torch.tensor([[2], [2]]))
    assert own.logit_difference(logits).tolist() == [-4.0, 3.0]
    assert own.part(slice(1, 2)).logit_difference(logits[1:]).tolist() == [3.0]


def test_contrast_answers_are_what_the_sides_make_likelier(
    hand: Any, hand_pairs: sl.ContrastivePairs
) -> None:
    assert contrast_answers(hand, hand_pairs, n_tokens=1).words(hand) == {
        "positive": ["good"],
        "negative": ["bad"],
    }
    for n in (0, 81):
        with pytest.raises(InputError, match="half the vocabulary"):
            contrast_answers(hand, hand_pairs, n_tokens=n)


def test_answers_of_items(hand: Any) -> None:
    items = sl.PreferenceItems(
        (
            sl.PreferenceItem("the day was", "good day", "bad day", "a"),
            sl.PreferenceItem("it went", "warm", "cold", "b"),
        ),
        "items",
    )
    prompts, given = item_answers(hand, items)
    assert given.words(hand) == {"positive": ["good"], "negative": ["bad"]}
    assert prompts.last.tolist() == [3, 2]
    assert prompts.real.sum(dim=1).tolist() == [4, 3]
    same = sl.PreferenceItems(
        (
            sl.PreferenceItem("the day was", "good day", "good night", "a"),
            sl.PreferenceItem("it went", "warm", "cold", "b"),
        ),
        "items",
    )
    with pytest.raises(InputError, match="item 'a' begin with the same token"):
        item_answers(hand, same)


def test_repr(tiny: Any, read: Any) -> None:
    assert "10 components" in repr(read[3])
    assert str(Component(3, 1)) == "L3H1"
    assert math.isfinite(read[3].table.share.sum())


def test_models_without_heads_are_refused() -> None:
    model = bridge(build_llama(n_layers=2))
    del model.blocks[1].attn._modules["o"]
    with pytest.raises((InputError, AttributeError)):
        find_writers(
            model,
            sl.ContrastivePairs.from_lists(["a good day", "I felt good"], ["a bad day", "I felt"]),
            sl.Directions((HAND,), (), axis()[None].expand(1, 16), "x", -1, 0, ""),
            layer=0,
        )
