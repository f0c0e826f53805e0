"""Coverage of intervals and type I errors of tests, by simulation: docs/simulations.md.

`make simulate` runs it (minutes). Groups stand for personas: values of one group share a part of
their variance. Nothing here knows of models.
"""

import argparse
import platform
from collections.abc import Callable, Sequence
from datetime import date

import numpy as np
from numpy.typing import NDArray

from steerlens.directions.contrast_methods import coin_flips
from steerlens.measure.equal_damage import CompareSettings
from steerlens.measure.nulls import N_REFITS
from steerlens.measure.search import Curve, Line, crossing_interval, search
from steerlens.measure.verdicts import Inference
from steerlens.stats import flip_p, intervals, max_rank_p, rank_p, ratio_interval

Array = NDArray[np.float64]
GROUPS = (8, 16, 32)
SHARES = (0.0, 0.3, 0.5, 0.7)
PER_GROUP = 4
NULL_GROUPS = (4, 8, 16, 120)
LEVEL = 0.05
N_NULLS = 199
WIDTH = 8
"""Dimensions of simulated vectors."""


def normal(
    generator: np.random.Generator,
    n_rows: int,
    n_groups: int,
    share: float,
    sizes: Sequence[int] | int = PER_GROUP,
) -> Array:
    """Standard normal values; `share` of their variance lies between groups of these sizes."""
    between = generator.standard_normal((n_rows, n_groups)).repeat(sizes, axis=1)
    within = generator.standard_normal(between.shape)
    return share**0.5 * between + (1 - share) ** 0.5 * within


def coverage(truth: float, lows: Array, highs: Array) -> float:
    """The share of intervals that hold the truth; one that is undefined does not."""
    return float(((lows <= truth) & (truth <= highs)).mean())


def of_mean(generator: np.random.Generator, n: int, n_groups: int, share: float) -> float:
    values = normal(generator, n, n_groups, share)
    return coverage(0.0, *intervals(values, groups=numbers(n_groups), seed=1))


def of_uneven(generator: np.random.Generator, n: int, n_groups: int, share: float) -> float:
    """A mean, half of whose values are of one group."""
    sizes = [PER_GROUP * (n_groups - 1)] + [PER_GROUP] * (n_groups - 1)
    values = normal(generator, n, n_groups, share, sizes)
    return coverage(0.0, *intervals(values, groups=np.arange(n_groups).repeat(sizes), seed=1))


def of_divergence(generator: np.random.Generator, n: int, n_groups: int, share: float) -> float:
    """Squares of normal values about 1: as skewed as a divergence over prompts."""
    values = np.square(1 + normal(generator, n, n_groups, share))
    return coverage(2.0, *intervals(values, groups=numbers(n_groups), seed=1))


def of_ratio(generator: np.random.Generator, n: int, n_groups: int, share: float) -> float:
    """An explained variance: the square along a direction over that of the whole difference."""
    along = np.square(2 + normal(generator, n, n_groups, share))
    rest = np.square(normal(generator, n, n_groups, share)) * 3
    ends = [
        ratio_interval(one, one + other, groups=numbers(n_groups), seed=1)
        for one, other in zip(along, rest, strict=True)
    ]
    return coverage(5 / 8, *np.array(ends).T)


def of_boundary(generator: np.random.Generator, n: int, n_groups: int, share: float) -> float:
    """The search's own: prompts lose `slope c + bend c^2`, and 0.1 nats are allowed on average."""
    slope, bend, allowance = 0.004, 0.0004, 0.1
    truth = (np.sqrt(slope**2 + 4 * bend * allowance) - slope) / (2 * bend)
    ends = []
    for _ in range(n):
        slopes, bends = normal(generator, 2, n_groups, share)
        slopes, bends = slope * (1 + slopes), bend * np.square(1 + bends) / 2

        def losses(c: float, s: Array = slopes, b: Array = bends) -> Array:
            return s * c + b * c**2

        start = Line(Curve(float(slopes.mean())), allowance, 100.0, 10.0)
        (line,) = search([start], lambda points, f=losses: [float(f(c).mean()) for _, c in points])
        at = np.array([c for c, _ in line.curve.known])
        found = crossing_interval(
            line,
            slopes,
            np.stack([losses(c) for c in at], axis=1),
            np.full(len(slopes), allowance),
            groups=numbers(n_groups),
            seed=1,
            n_bootstrap=2000,
        )
        ends.append([end.c for end in found])
    return coverage(float(truth), *np.array(ends).T)


def of_refitted(generator: np.random.Generator, n: int, n_groups: int, share: float) -> float:
    """An effect with the extraction in it: as many groups of pairs as of items."""
    settings = CompareSettings((), "", "", 0, 0, None, 0.0, 2000, 1, None)
    inference = Inference(settings, tuple(numbers(n_groups)), tuple(range(n_groups)), margin=0.0)
    ends = []
    for _ in range(n):
        by_item, refits = refitted(generator, 1, n_groups, share)
        ends.append(inference.interval(by_item[0], refits[0]))
    return coverage(float(WIDTH), *np.array(ends).T)


def refitted(
    generator: np.random.Generator, n_methods: int, n_groups: int, share: float
) -> tuple[Array, Array]:
    """Effects of vectors `method item`, and mean ones of vectors refitted, `method refit`.

    A vector is the mean over groups of pairs of ones and noise, an effect its product with the
    item's gradient, ones and noise: what every method does in the long run is `WIDTH`.
    """
    by_group = 1 + 2 * generator.standard_normal((n_methods, n_groups, WIDTH))
    drawn = generator.integers(0, n_groups, (N_REFITS, n_groups))
    gradients = 1 + normal(generator, WIDTH, n_groups, share)
    refits = by_group[:, drawn].mean(axis=2) @ gradients.mean(axis=1)
    return by_group.mean(axis=1) @ gradients, refits


def numbers(n_groups: int) -> list[int]:
    """The group of each value."""
    return np.arange(n_groups).repeat(PER_GROUP).tolist()


def differences(generator: np.random.Generator, n_groups: int, n_hooks: int) -> Array:
    """Differences whose labels mean nothing: each group's sign is a coin, its tail heavy."""
    tails = generator.standard_t(3, (n_groups, 1, 20)).repeat(PER_GROUP, axis=0)
    noise = generator.standard_normal((n_groups * PER_GROUP, n_hooks, 20))
    signs = generator.choice([-1.0, 1.0], n_groups).repeat(PER_GROUP)
    return signs[:, None, None] * (tails + 0.5 * noise)


def effects(signs: Array, given: Array, target: Array) -> Array:
    """What unit mean differences do, `draw hook`: their products with a target at each hook."""
    means = np.einsum("dp,phm->dhm", signs, given)
    return np.einsum("dhm,hm->dh", means / np.linalg.norm(means, axis=-1, keepdims=True), target)


def flipped(n_groups: int, first: int) -> Array:
    """The product's own flips."""
    return np.stack([coin_flips(numbers(n_groups), first + i).numpy() for i in range(N_NULLS)])


def balanced(generator: np.random.Generator, n_groups: int) -> Array:
    """Exactly half of the groups exchanged, for comparison."""
    half = np.ones(n_groups)
    half[: n_groups // 2] = -1
    rows = [generator.permutation(half).repeat(PER_GROUP) for _ in range(N_NULLS)]
    return np.stack(rows)


def errors(generator: np.random.Generator, n: int, n_groups: int) -> dict[str, float]:
    """How often each test rejects at 0.05 where there is nothing to find."""
    found: dict[str, list[bool]] = {}
    as_labelled = np.ones((1, n_groups * PER_GROUP))
    for i in range(n):
        given, target = differences(generator, n_groups, 5), generator.standard_normal((5, 20))
        seen = effects(as_labelled, given, target)[0]
        nulls = effects(flipped(n_groups, N_NULLS * i), given, target)
        half = effects(balanced(generator, n_groups), given, target)
        values = normal(generator, 3, n_groups, 0.5) ** 3
        by_item, refits = (v[1:] - v[0] for v in refitted(generator, 4, n_groups, 0.5))
        groups = numbers(n_groups)
        both = flip_p(by_item, groups=groups, refits=refits, n_fitted=n_groups, seed=i)
        p_values = {
            "rank p, one layer": rank_p(float(seen[0]), nulls[:, 0]),
            "maximum over 5 layers": float(max_rank_p(seen, nulls).min()),
            "methods, one": float(flip_p(values, groups=groups, seed=i)[0][0]),
            "methods, best of 3": float(flip_p(values, groups=groups, seed=i)[1].min()),
            "methods refitted, one": float(both[0][0]),
            "methods refitted, best of 3": float(both[1].min()),
            "for comparison: methods not refitted": float(
                flip_p(by_item, groups=groups, seed=i)[0][0]
            ),
            "for comparison: half exchanged": rank_p(float(seen[0]), half[:, 0]),
        }
        for name, p in p_values.items():
            found.setdefault(name, []).append(p <= LEVEL)
    return {name: float(np.mean(rejected)) for name, rejected in found.items()}


SIMULATED: dict[str, tuple[Callable[[np.random.Generator, int, int, float], float], int]] = {
    "mean": (of_mean, 1),
    "mean, half of the values of one group": (of_uneven, 1),
    "skewed divergence": (of_divergence, 1),
    "ratio": (of_ratio, 2),
    "boundary, by its search": (of_boundary, 4),
    "effect, the direction refitted": (of_refitted, 2),
}
"""What an interval is of, its simulation, and how many times fewer repeats it is given."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def spread(n: int) -> float:
    """The standard error of a share of 0.95."""
    return float((0.95 * 0.05 / n) ** 0.5)


def main() -> None:
    """Print the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1000)
    n = parser.parse_args().repeats
    generator = np.random.default_rng(0)
    rows = [
        [
            name,
            str(n_groups),
            *(f"{simulate(generator, n // fewer, n_groups, share):.3f}" for share in SHARES),
        ]
        for name, (simulate, fewer) in SIMULATED.items()
        for n_groups in GROUPS
    ]
    by_groups = {g: errors(generator, n // 2, g) for g in NULL_GROUPS}
    names = list(next(iter(by_groups.values())))
    rejected = [[name, *(f"{by_groups[g][name]:.3f}" for g in NULL_GROUPS)] for name in names]
    few = n // 4
    print(
        f"""# Simulations

`make simulate` made this page: {n} repeats ({n // 2} for ratios, refits and tests, {few} for
boundaries), Python {platform.python_version()} on {platform.machine()}, {date.today()}. The
standard error of a share of 0.95 is {spread(n):.4f} over {n} repeats, {spread(few):.4f} over {few}.

## Coverage of 95% intervals

Groups of {PER_GROUP} values; the columns are shares of the variance that lie between groups.

{table(["interval of a", "groups", *map(str, SHARES)], rows)}

## Rejections at 0.05 where there is nothing

Labels that mean nothing: groups of {PER_GROUP} differences with heavy tails, each group's sign a
coin, {N_NULLS} nulls. `methods` are paired differences with heavy tails; those refitted are equally
good vectors from as many groups of pairs, refitted {N_REFITS} times. Half exchanged is what
steerlens 0.1 did, and not refitted leaves the pairs out: both show that the simulation sees a test
that rejects too often.

{table(["test", *(f"{g} groups" for g in NULL_GROUPS)], rejected)}"""
    )


if __name__ == "__main__":
    main()
