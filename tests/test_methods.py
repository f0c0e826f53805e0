"""Methods by hand, and on planted directions under their own assumptions."""

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

import steerlens as sl
from steerlens.directions import contrast_methods as contrast
from steerlens.directions import gradient_methods as gradient
from steerlens.directions.contrast_methods import Activations, first_axis
from steerlens.directions.differences import Differences
from steerlens.directions.fitting import fit_methods
from steerlens.directions.gradient_methods import Gradients
from steerlens.directions.gradient_rows import LossGradients
from steerlens.directions.gradients import loss_gradients
from steerlens.directions.methods import METHODS, method_of
from steerlens.errors import InputError

HOOK = "blocks.0.hook_resid_post"
BY_DIFFERENCES = [name for name, m in METHODS.items() if m.source == "differences"]
BY_GRADIENTS = [name for name, m in METHODS.items() if m.source == "gradients"]
PAIRED = [*BY_GRADIENTS, "gradient_fisher+centred", "gradient_fisher+norm_weighted"]
POOLED = [f"{name}+pooled" for name in PAIRED if name != "fisher_pullback"]
CONTROLS = ("random", "shuffled")


def both_sides(positive: torch.Tensor, negative: torch.Tensor) -> Differences:
    return Differences((HOOK,), (), positive[None], negative[None], -1, "fingerprint")


def sides(values: Any) -> Activations:
    values = torch.as_tensor(values, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return Activations(values, torch.zeros_like(values), generator, torch.ones_like(values[:, 0]))


def gradients_of(
    positive: torch.Tensor, negative: torch.Tensor, scores: torch.Tensor | None = None
) -> LossGradients:
    """Gradients at one hook: separation rows, no coherence."""
    return LossGradients(
        hook_names=(HOOK,),
        readout_names=(),
        loss_hooks=(HOOK,),
        separation_positive=positive[None],
        separation_negative=negative[None],
        coherence=torch.zeros_like(positive)[None],
        weights=torch.ones(1, dtype=positive.dtype),
        logprob=torch.zeros(len(positive), dtype=positive.dtype),
        scores=(positive[:0] if scores is None else scores)[None],
        margin=0.99,
        position=-2,
        fingerprint="fingerprint",
        forward_equivalents=0.0,
    )


def unit(d_model: int, generator: torch.Generator) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(d_model, generator=generator), dim=0)


# Planted directions


@pytest.mark.parametrize("method", [name for name in BY_DIFFERENCES if name not in CONTROLS])
def test_a_planted_direction_is_recovered_from_activations(method: str) -> None:
    """pca_centred finds what the pairs differ in, so its plant varies in strength."""
    generator = torch.Generator().manual_seed(0)
    planted = unit(48, generator)
    strength = torch.full((200, 1), 6.0)
    if method == "pca_centred":
        strength = 6 * torch.randn((200, 1), generator=generator)
    noise, base = (torch.randn((200, 48), generator=generator) for _ in range(2))
    negative = base * 0.5
    found = sl.fit_directions(
        both_sides(negative + strength * planted + 0.5 * noise, negative), method=method
    )[HOOK]
    assert abs(float(found @ planted)) > 0.95
    # Control: nothing planted, nothing found.
    nothing = sl.fit_directions(both_sides(negative + 0.5 * noise, negative), method=method)[HOOK]
    assert abs(float(nothing @ planted)) < 0.6


@pytest.mark.parametrize("method", CONTROLS)
def test_controls_do_not_find_the_planted_direction(method: str) -> None:
    generator = torch.Generator().manual_seed(0)
    planted = unit(48, generator)
    negative, noise = (torch.randn((200, 48), generator=generator) for _ in range(2))
    differences = both_sides(negative + 2 * planted + noise, negative)
    cosines = [
        abs(float(sl.fit_directions(differences, method=method, seed=seed)[HOOK] @ planted))
        for seed in range(20)
    ]
    assert sum(cosines) / 20 < 0.5
    assert float(sl.fit_directions(differences)[HOOK] @ planted) > 0.95
    first, again, other = (
        sl.fit_directions(differences, method=method, seed=seed)[HOOK] for seed in (1, 1, 2)
    )
    torch.testing.assert_close(first, again)
    assert not torch.allclose(first, other)


def test_lda_beats_the_mean_difference_where_the_noise_is_anisotropic() -> None:
    """Noise 8 times as strong along five other axes; where it is alike along all, both do well."""
    generator = torch.Generator().manual_seed(1)
    planted = unit(40, generator)
    loud = torch.linalg.qr(torch.randn((40, 5), generator=generator))[0]
    planted = torch.nn.functional.normalize(planted - loud @ (loud.T @ planted), dim=0)

    def cosine(method: str, loudness: float) -> float:
        noises = []
        for _ in range(2):
            noise = torch.randn((600, 40), generator=torch.Generator().manual_seed(len(noises)))
            noises.append(noise + (loudness - 1) * (noise @ loud) @ loud.T)
        found = sl.fit_directions(both_sides(noises[0] + planted, noises[1]), method=method)
        return float(found[HOOK] @ planted)

    assert cosine("lda", 8.0) > 0.85 > 0.75 > cosine("mean_diff", 8.0)
    assert cosine("lda", 1.0) == pytest.approx(cosine("mean_diff", 1.0), abs=0.05)


@pytest.mark.parametrize("method", PAIRED)
def test_a_planted_descent_direction_is_recovered_from_gradients(method: str) -> None:
    generator = torch.Generator().manual_seed(2)
    planted = unit(48, generator)
    noise = torch.randn((2, 200, 48), generator=generator)
    rows = gradients_of(-planted + 0.3 * noise[0], planted + 0.3 * noise[1], torch.randn((300, 48)))
    found = sl.fit_directions(rows, method=method)[HOOK]
    assert float(found @ planted) > 0.9


@pytest.mark.parametrize("method", POOLED)
def test_pooled_rows_find_what_both_sides_share_and_not_the_separation(method: str) -> None:
    """The separation's rows are opposite and nearly cancel in the mean; a shared row does not."""
    generator = torch.Generator().manual_seed(3)
    separating, shared = unit(48, generator), unit(48, generator)
    shared = torch.nn.functional.normalize(shared - (shared @ separating) * separating, dim=0)
    noise = 0.05 * torch.randn((2, 200, 48), generator=generator)
    rows = gradients_of(-0.2 * separating - shared + noise[0], 0.2 * separating - shared + noise[1])
    found = sl.fit_directions(rows, method=method)[HOOK]
    paired = sl.fit_directions(rows, method=method.removesuffix("+pooled"))[HOOK]
    assert abs(float(found @ separating)) < 0.3
    assert abs(float(paired @ separating)) > 0.9


# By hand


def test_differences_by_hand() -> None:
    given_sides = sides([[3.0, 0.0], [1.0, 4.0]])
    torch.testing.assert_close(contrast.mean_diff(given_sides), torch.tensor([2.0, 2.0]).double())
    # Pooled: rows (3, 0), (1, 4), (0, 0), (0, 0), less (1, 1).
    centred = torch.tensor([[2.0, -1], [0, 3], [-1, -1], [-1, -1]]).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    found = contrast.pca_pooled(given_sides)
    assert abs(float(found @ vectors[:, 1]) / float(found.norm())) == pytest.approx(1)


def test_shuffled_flips_every_group_by_a_coin_of_its_own_the_same_at_every_hook() -> None:
    """Of 3 groups each of 8 outcomes, the labels as they are among them, comes an eighth of times.

    The standard deviation of such a count is 6.6.
    """
    hooks = (HOOK, "blocks.1.hook_resid_post")
    positive = torch.eye(6).expand(2, 6, 6)
    given = Differences(
        hooks, (), positive, 0 * positive, -1, "fingerprint", groups=(0, 1, 1, 2, 0, 0)
    )
    outcomes: Counter[tuple[int, ...]] = Counter()
    for seed in range(400):
        found = sl.fit_directions(given, method="shuffled", seed=seed)
        signs = found[HOOK] * 6**0.5
        torch.testing.assert_close(signs.abs(), torch.ones(6))
        torch.testing.assert_close(found[hooks[1]], found[HOOK])
        assert signs[0] == signs[4] == signs[5]
        assert signs[1] == signs[2]
        outcomes[tuple(signs[[0, 1, 3]].sign().int().tolist())] += 1
    assert len(outcomes) == 8
    assert all(25 <= n <= 75 for n in outcomes.values())
    # Control: without groups the coins of pairs 0 and 4 differ half of the time.
    alone = [
        sl.fit_directions(replace(given, groups=None), method="shuffled", seed=seed)[HOOK]
        for seed in range(40)
    ]
    assert 8 < sum(bool(found[0] == found[4]) for found in alone) < 32


@pytest.mark.parametrize("method", CONTROLS)
def test_controls_do_not_know_the_labels(method: str) -> None:
    """Their mean projections on the differences are of either sign; a method's are not."""
    generator = torch.Generator().manual_seed(6)
    negative, noise = torch.randn((2, 30, 16), generator=generator)
    given = both_sides(negative + 0.5 + noise, negative)
    signs = [
        float((given[HOOK] @ sl.fit_directions(given, method=method, seed=seed)[HOOK]).mean()) > 0
        for seed in range(40)
    ]
    assert 8 < sum(signs) < 32
    assert float((given[HOOK] @ sl.fit_directions(given)[HOOK]).mean()) > 0


def test_lda_by_hand() -> None:
    """Against the shrunk covariance written out, which a solve in pair space must equal."""
    from sklearn.covariance import ledoit_wolf

    generator = torch.Generator().manual_seed(4)
    for n_pairs, d_model in ((6, 20), (30, 4)):
        positive, negative = torch.randn((2, n_pairs, d_model), generator=generator).double()
        positive[:, 0] *= 6  # so that not all is shrunk away
        found = contrast.lda(replace(sides(positive), negative=negative))
        within = torch.cat([positive - positive.mean(0), negative - negative.mean(0)])
        covariance, shrinkage = ledoit_wolf(within.numpy(), assume_centered=True)
        assert 0 < shrinkage < 1
        expected = torch.linalg.solve(
            torch.from_numpy(covariance), positive.mean(0) - negative.mean(0)
        )
        cosine = torch.nn.functional.cosine_similarity(found, expected, dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-9)


def rows_by_hand() -> Gradients:
    """Paired rows (2, 0) and (0, 1): their mean is (1, 1/2)."""
    positive = torch.tensor([[-1.0, 0], [0, -0.5]]).double()
    return Gradients.of(positive, -positive, torch.tensor([[3.0, 0], [0, 1.0]]).double())


def test_gradient_methods_by_hand() -> None:
    given_rows = rows_by_hand()
    mean = torch.tensor([1.0, 0.5]).double()
    torch.testing.assert_close(gradient.gradient_mean(given_rows), mean)
    pooled = Gradients.of(
        *(torch.eye(2).double(), -torch.eye(2).double()), torch.zeros(0, 2).double(), form="pooled"
    )
    assert not gradient.gradient_mean(pooled).any()
    torch.testing.assert_close(
        gradient.gradient_svd(given_rows).abs(), torch.tensor([2 / 2**0.5, 0.0]).double()
    )
    # Empirical F = diag(4, 1) / 2, trace 2.5, ridge 2.5 / 2.
    expected = 1.25 * mean / torch.tensor([2 + 1.25, 0.5 + 1.25]).double()
    torch.testing.assert_close(gradient.gradient_fisher(given_rows), expected)
    # Weights 2/3 and 1/3: F = diag(8, 1) / 3, trace 3.
    expected = 1.5 * mean / torch.tensor([8 / 3 + 1.5, 1 / 3 + 1.5]).double()
    found = gradient.gradient_fisher(given_rows, kind="norm_weighted")
    torch.testing.assert_close(found, expected)
    # Centred rows are (1, -1/2) and (-1, 1/2): F is their outer product, trace 5/4.
    outer = torch.tensor([[1.0, -0.5], [-0.5, 0.25]]).double()
    expected = 0.625 * torch.linalg.solve(outer + 0.625 * torch.eye(2).double(), mean)
    found = gradient.gradient_fisher(given_rows, kind="centred")
    torch.testing.assert_close(found, expected)
    # Scores (3, 0) and (0, 1): F = diag(9, 1) / 2, trace 5, ridge 5 / 2.
    expected = 2.5 * mean / torch.tensor([4.5 + 2.5, 0.5 + 2.5]).double()
    torch.testing.assert_close(gradient.fisher_pullback(given_rows), expected)


def test_pooled_forms_descend_when_both_sides_are_pushed_alike() -> None:
    """Separation (3, 0), coherence (0, 1) against it: pooled and paired signs disagree."""
    coherence = torch.tensor([[-4.0, -1.0]] * 3)
    given_rows = gradients_of(
        torch.tensor([[-3.0, 0.0]] * 3) - coherence, torch.tensor([[3.0, 0.0]] * 3)
    )
    pooled = sl.fit_directions(given_rows, method="gradient_mean+pooled")[HOOK]
    expected = torch.nn.functional.normalize(torch.tensor([-2.0, -0.5]), dim=0)
    torch.testing.assert_close(pooled, expected)


def test_first_axis_is_as_long_as_the_rows_along_it() -> None:
    rows = torch.tensor([[3.0, 4.0], [-6.0, -8.0]])
    assert float(first_axis(rows).norm()) == pytest.approx(((25 + 100) / 2) ** 0.5)


@pytest.mark.parametrize("method", ["gradient_fisher", "gradient_fisher+centred"])
def test_a_fisher_direction_does_not_depend_on_the_scale_of_the_loss(method: str) -> None:
    generator = torch.Generator().manual_seed(5)
    positive, negative = torch.randn((2, 10, 16), generator=generator).double()
    one = sl.fit_directions(gradients_of(positive, negative), method=method)[HOOK]
    scaled = sl.fit_directions(gradients_of(1000 * positive, 1000 * negative), method=method)[HOOK]
    torch.testing.assert_close(one, scaled)


# What cannot be fitted


def test_a_method_is_fitted_from_its_own_evidence(llama: Any, pairs: sl.ContrastivePairs) -> None:
    differences = sl.collect_differences(llama, pairs, layers=[1])
    rows = loss_gradients(llama, pairs, layers=[1])
    with pytest.raises(InputError, match="fitted from gradients, and this is differences"):
        sl.fit_directions(differences, method="gradient_mean")
    with pytest.raises(InputError, match="fitted from differences, and this is gradients"):
        sl.fit_directions(rows, method="pca")
    with pytest.raises(InputError, match="hold no scores"):
        sl.fit_directions(rows, method="fisher_pullback")
    with pytest.raises(InputError, match="there are mean_diff, pca"):
        sl.fit_directions(rows, method="gradient")
    fitted = sl.fit_directions(rows, method="gradient_mean")
    assert (fitted.position, fitted.method) == (-2, "gradient_mean")
    assert fitted.hook_names == (f"blocks.1.{'hook_resid_post'}",)
    assert fitted.readout_names == ("blocks.2.hook_resid_post",)


@pytest.mark.parametrize("method", PAIRED + POOLED)
def test_gradients_that_are_nothing_are_refused(method: str) -> None:
    nothing = gradients_of(torch.zeros(3, 4), torch.zeros(3, 4), torch.randn(5, 4))
    with pytest.raises(InputError, match="gradient of the loss is zero"):
        sl.fit_directions(nothing, method=method)


def test_degenerate_evidence_is_refused() -> None:
    ones, zeros = torch.ones(3, 4), torch.zeros(3, 4)
    with pytest.raises(InputError, match="no within-class covariance"):
        sl.fit_directions(both_sides(ones, zeros), method="lda")
    alike = gradients_of(-ones, ones)
    with pytest.raises(InputError, match="second moments of the gradient rows are zero"):
        sl.fit_directions(alike, method="gradient_fisher+centred")
    with pytest.raises(InputError, match="nothing is left beyond rounding"):
        sl.fit_directions(alike, method="gradient_mean+pooled")
    with pytest.raises(InputError, match="do not depend on this hook"):
        sl.fit_directions(replace(alike, scores=torch.zeros(1, 2, 4)), method="fisher_pullback")
    sl.fit_directions(alike, method="gradient_mean")


@pytest.mark.parametrize("axis", [None, "pca"])
def test_descent_on_a_model_lowers_the_loss(
    llama: Any, pairs: sl.ContrastivePairs, axis: str | None
) -> None:
    """A small push along `gradient_mean`, opposite on the two sides, separates the pairs."""
    rows = loss_gradients(llama, pairs, layers=[1], axis=axis).with_weight(0)
    frozen = sl.fit(llama, pairs, method="pca", layers=[1], position=-2)
    fitted = sl.fit_directions(rows, method="gradient_mean")
    name, step = "blocks.1.hook_resid_post", 1e-2
    readout = rows.loss_hooks[0]

    def separation(coefficient: float) -> float:
        both = []
        for side, sign in (("positive", 1), ("negative", -1)):
            prompts = getattr(sl.engine.tokenize_pairs(llama, pairs), side)
            vector = {name: fitted[name]}
            with sl.steer(llama, vector, sign * coefficient):
                both.append(
                    sl.engine.collect_activations(llama, prompts, [readout], position=-2)[0]
                )
        difference = both[0] - both[1]
        along = difference.norm(dim=-1) if axis is None else difference @ frozen[readout]
        return float(along.mean())

    assert separation(step) > separation(0) > separation(-step)


# Names


def test_options_follow_a_name_in_any_order() -> None:
    generator = torch.Generator().manual_seed(7)
    rows = gradients_of(*torch.randn((2, 6, 4), generator=generator))
    fitted = sl.fit_directions(rows, method="gradient_fisher+pooled+centred")
    assert fitted.method == "gradient_fisher+centred+pooled"
    for other in ("gradient_fisher", "gradient_fisher+centred", "gradient_fisher+pooled"):
        assert not torch.allclose(sl.fit_directions(rows, method=other)[HOOK], fitted[HOOK])
    for name in ("pca+pooled", "gradient_fisher+centred+norm_weighted", "gradient_svd+", "probe+"):
        with pytest.raises(InputError, match=r"no method '.*write"):
            method_of(name)


OLD_NAMES = """gradient_mean_pooled gradient_svd_pooled gradient_fisher_pooled
gradient_fisher_centred gradient_fisher_centred_pooled gradient_fisher_norm_weighted
gradient_fisher_norm_weighted_pooled""".split()


@pytest.mark.parametrize("old", OLD_NAMES)
def test_an_old_name_is_the_new_one_with_a_warning(old: str) -> None:
    new = re.sub("_(pooled|centred|norm_weighted)", r"+\1", old)
    assert new.startswith("gradient_")
    assert "+" in new
    generator = torch.Generator().manual_seed(8)
    rows = gradients_of(*torch.randn((2, 6, 4), generator=generator))
    with pytest.warns(DeprecationWarning, match=re.escape(f"'{old}' is deprecated; use '{new}'")):
        fitted = sl.fit_directions(rows, method=old)
    assert fitted.method == new
    torch.testing.assert_close(fitted[HOOK], sl.fit_directions(rows, method=new)[HOOK])


def test_the_axis_of_the_loss_is_the_last_option() -> None:
    assert METHODS["optimised"].axis == "pca"
    assert method_of("gradient_fisher+pooled+centred+on_pca").name == (
        "gradient_fisher+centred+pooled+on_pca"
    )
    # A method's own axis is not told, so that it has one name.
    for name, axis in (("gradient_mean+on_norm", None), ("optimised+on_pca", "pca")):
        assert (method_of(name).name, method_of(name).axis) == (name.partition("+")[0], axis)
    assert method_of("optimised+on_norm").axis is None
    with pytest.warns(DeprecationWarning, match="gradient_mean.pooled"):
        assert method_of("gradient_mean_pooled+on_pca").axis == "pca"
    for name in ("pca+on_pca", "optimised_promotion+on_pca"):
        with pytest.raises(InputError, match=r"no method '.*on_pca'; write .* alone"):
            method_of(name)
    with pytest.raises(InputError, match="no method 'axis'"):
        method_of("gradient_mean+on_axis")
    with pytest.raises(InputError, match="give the Directions as axis="):
        method_of("gradient_mean+on_optimised")


def test_each_axis_has_gradients_of_its_own(llama: Any, pairs: sl.ContrastivePairs) -> None:
    names = ["gradient_mean", "gradient_mean+on_pca", "gradient_svd+on_pca"]
    options: dict[str, Any] = {"layers": [1], "seed": 0, "batch_size": None}
    differences = sl.collect_differences(llama, pairs, layers=[1])
    fitted, _ = fit_methods(llama, pairs, names, differences=differences, position=None, **options)
    for name in names:
        alone = sl.fit(llama, pairs, method=name, layers=[1])
        assert fitted[name].method == alone.method == name
        torch.testing.assert_close(fitted[name].vectors, alone.vectors)
    assert not torch.allclose(fitted[names[0]].vectors, fitted[names[1]].vectors, atol=1e-3)
    by_norm = loss_gradients(llama, pairs, layers=[1])
    with pytest.raises(InputError, match=r"is on pca, and these gradients are on the norm"):
        sl.fit_directions(by_norm, method="gradient_mean+on_pca")
    by_axis = loss_gradients(llama, pairs, layers=[1], axis="pca")
    with pytest.raises(InputError, match=r"is on the norm, and these gradients are on pca"):
        sl.fit_directions(by_axis, method="gradient_mean+on_norm")
    for rows, method in ((by_norm, "gradient_mean+on_norm"), (by_axis, "gradient_mean+on_pca")):
        assert sl.fit_directions(rows, method=method).method == method.removesuffix("+on_norm")
