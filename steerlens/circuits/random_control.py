"""A random vector at equal damage: what two circuits have in common when nothing is shared."""

from dataclasses import replace

import numpy as np
import torch

from steerlens.circuits.answers import row_slices
from steerlens.circuits.components import Prompts, make_prompts
from steerlens.circuits.interventions import Intervention
from steerlens.data.pairs import ContrastivePairs
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.errors import InputError, whole
from steerlens.models.loading import HookedModel, inference
from steerlens.progress import Progress, silent
from steerlens.steering import Add, SteeringVector, steps


def random_intervention(
    model: HookedModel,
    pairs: ContrastivePairs,
    intervention: Intervention,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Intervention:
    """A random direction at the same hook, at the coefficient with the same KL divergence.

    Of next-token predictions from the unsteered model, mean over the tokens of the positive
    prompts, to about 2% (1% of the coefficient). To `progress` the search is one step. Raises
    `InputError` when the intervention is not an added vector at one hook, its divergence is 0 or
    not finite, or no coefficient up to 16 times its own reaches it; `InputError` on a negative
    seed.

    Examples:
        >>> from steerlens.circuits import Intervention, random_intervention
        >>> floor = random_intervention(model, pairs, Intervention(vector, 4))
        >>> floor.vector.hook_names
        ('blocks.2.hook_resid_post',)
    """
    from scipy.optimize import brentq

    acts = (
        [] if intervention.vector is None else steps(intervention.vector, intervention.coefficient)
    )
    if len(acts) != 1 or not isinstance(acts[0].operator, Add):
        raise InputError(f"expected a vector that is added at one hook, got {len(acts)} steps")
    generator = torch.Generator().manual_seed(whole("seed", seed, 0))
    row = torch.randn(len(acts[0].direction), generator=generator)
    vector = SteeringVector.from_vectors({acts[0].hook_name: row})
    vector = replace(vector, scale=torch.ones(1))
    prompts = make_prompts(model, list(tokenize_pairs(model, pairs).positive))
    tell = progress or silent
    tell("random vector at equal KL", 0, 1)
    wanted = mean_kl(model, prompts, intervention)
    if not 0 < wanted < float("inf"):
        raise InputError(f"the vector's KL divergence is {wanted:.3g}; expected one above 0")
    size = abs(acts[0].amount)

    def gap(log_size: float) -> float:
        found = mean_kl(model, prompts, Intervention(vector, float(np.exp(log_size))))
        return float(np.log(found) - np.log(wanted))

    low, high = np.log(size / 16), np.log(16 * size)
    if not (gap(low) <= 0 <= gap(high)):
        raise InputError(
            f"no coefficient from {size / 16:.3g} to {16 * size:.3g} of a random direction has the "
            f"KL divergence {wanted:.3g} of the vector"
        )
    at = float(np.exp(brentq(gap, low, high, xtol=0.01)))
    tell("random vector at equal KL", 1, 1)
    return Intervention(vector, at)


def mean_kl(model: HookedModel, prompts: Prompts, intervention: Intervention) -> float:
    """Mean KL(unsteered || steered) of next-token predictions over real tokens, nats per token."""
    total, count = 0.0, 0
    for rows in row_slices(len(prompts)):
        some = prompts.part(rows)
        real = some.real.bool()
        with inference(model):
            plain = model(some.tokens)[real].float().log_softmax(dim=-1)
            with intervention.on(model):
                pushed = model(some.tokens)[real].float().log_softmax(dim=-1)
        total += float((plain.exp() * (plain - pushed)).sum())
        count += int(real.sum())
    return total / count
