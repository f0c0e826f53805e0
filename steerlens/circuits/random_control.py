"""A random vector at equal damage: what two circuits have in common when nothing is shared."""

import math
from dataclasses import replace

import torch

from steerlens.circuits.interventions import Intervention
from steerlens.circuits.prompts import Prompts, make_prompts
from steerlens.data.pairs import ContrastivePairs
from steerlens.engine.checkpoint import Checkpoint, once
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.errors import InputError
from steerlens.models.hooked_model import HookedModel
from steerlens.models.identity import provenance
from steerlens.models.loading import inference
from steerlens.progress import Progress, silent
from steerlens.steering import Add, SteeringVector
from steerlens.validation import Whole, checked


@checked
def random_intervention(
    model: HookedModel,
    pairs: ContrastivePairs,
    intervention: Intervention,
    *,
    seed: Whole = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> Intervention:
    """A random direction at the same hook, at the coefficient with the same KL divergence.

    Of next-token predictions from the unsteered model, mean over the tokens of the positive
    prompts, to about 2% (1% of the coefficient).

    Args:
        model: The model, unsteered.
        pairs: Their positive prompts are run.
        intervention: A vector that is added at one hook.
        seed: Of the direction.
        progress: Told of the search as one step.
        checkpoint: As of `find_readers`.

    Raises:
        InputError: The intervention is another one, its divergence is 0 or not finite, no
            coefficient up to 16 times its own reaches it, or the seed is negative.

    Examples:
        >>> from steerlens.circuits import Intervention, random_intervention
        >>> floor = random_intervention(model, pairs, Intervention(vector, 4))
        >>> floor.vector.hook_names
        ('blocks.2.hook_resid_post',)
    """
    from scipy.optimize import brentq

    steps = intervention.steps
    if len(steps) != 1 or not isinstance(steps[0].operator, Add):
        raise InputError(f"expected a vector that is added at one hook, got {len(steps)} steps")
    generator = torch.Generator().manual_seed(seed)
    row = torch.randn(len(steps[0].direction), generator=generator)
    vector = SteeringVector.from_vectors({steps[0].hook_name: row})
    vector = replace(vector, scale=torch.ones(1))
    prompts = make_prompts(model, tokenize_pairs(model, pairs).positive)
    tell = progress or silent
    tell("random vector at equal KL", 0, 1)

    def kl(pushed: Intervention) -> float:
        decided = ("kl", prompts.tokens, prompts.last, pushed.decided)
        divergence = once(
            checkpoint,
            (*decided, provenance(model).to_dict()),
            lambda: {"kl": torch.tensor(mean_kl(model, prompts, pushed), dtype=torch.float64)},
        )
        return float(divergence["kl"])

    wanted = kl(intervention)
    if not 0 < wanted < float("inf"):
        raise InputError(f"the vector's KL divergence is {wanted:.3g}; expected one above 0")
    size = abs(steps[0].amount)

    def gap(log_size: float) -> float:
        divergence = kl(Intervention(vector, math.exp(log_size)))
        return math.log(divergence) - math.log(wanted) if divergence > 0 else -math.inf

    low, high = math.log(size / 16), math.log(16 * size)
    if not (gap(low) <= 0 <= gap(high)):
        raise InputError(
            f"no coefficient from {size / 16:.3g} to {16 * size:.3g} of a random direction has the "
            f"KL divergence {wanted:.3g} of the vector"
        )
    coefficient = math.exp(brentq(gap, low, high, xtol=0.01))
    tell("random vector at equal KL", 1, 1)
    return Intervention(vector, coefficient)


@checked
def mean_kl(model: HookedModel, prompts: Prompts, intervention: Intervention) -> float:
    """Mean KL(unsteered || steered) of next-token predictions over real tokens, nats per token.

    Args:
        model: The model, unsteered.
        prompts: As `make_prompts` makes them.
        intervention: What it is steered by.

    Examples:
        >>> from steerlens.circuits import Intervention, make_prompts, mean_kl
        >>> prompts = make_prompts(model, sl.engine.tokenize_pairs(model, pairs).positive)
        >>> mean_kl(model, prompts, Intervention(vector, 4)) > 0
        True
    """
    total, count = 0.0, 0
    for rows in prompts.passes:
        batch = prompts.part(rows)
        with inference(model):
            plain = model(batch.tokens)[batch.real].float().log_softmax(dim=-1)
            with intervention.on(model):
                pushed = model(batch.tokens)[batch.real].float().log_softmax(dim=-1)
        total += float((plain.exp() * (plain - pushed)).sum())
        count += len(plain)
    return total / count
