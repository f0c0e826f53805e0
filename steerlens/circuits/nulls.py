"""Vectors that cannot know the labels, at equal damage: what they do to a circuit is no finding."""

import math

from steerlens.circuits.interventions import Intervention
from steerlens.data.pairs import ContrastivePairs
from steerlens.directions import Differences, null_directions
from steerlens.engine import Checkpoint, Engine, tokenize_pairs
from steerlens.engine.plain_loop import run_baseline
from steerlens.engine.plan import make_plan
from steerlens.engine.workload import Job, Workload
from steerlens.errors import InputError
from steerlens.measure.boundary import check_search
from steerlens.measure.boundary_search import find_boundaries
from steerlens.measure.coherence import Push, measured_text
from steerlens.models import HookedModel, readout_hook
from steerlens.progress import Progress, by_default, under
from steerlens.steering import Add, SteeringVector
from steerlens.validation import Draws, Whole, checked

FARTHEST = 16.0
"""How far a null's coefficient is looked for, in that of the vector."""


@checked
def null_interventions(
    model: HookedModel,
    pairs: ContrastivePairs,
    intervention: Intervention,
    differences: Differences,
    *,
    n: Draws = 20,
    seed: Whole = 0,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> dict[str, list[Intervention]]:
    """Random vectors, and mean differences of flipped labels, each at the KL of an intervention.

    The directions of `null_directions`, each added at the same hook, at the coefficient at which
    the mean KL divergence at the labels of the positive prompts is that of the intervention (found
    as a coherence boundary).

    Args:
        model: The model, unsteered.
        pairs: Their positive prompts are run.
        intervention: A vector that is added at one hook.
        differences: Those that the vector was fitted on, at that hook.
        n: How many of each kind; 19 of them can show p = 0.05.
        seed: Of the directions.
        progress: Told of the search.
        checkpoint: As of `find_readers`.

    Returns:
        Kind (`random`, `shuffled`) -> interventions.

    Raises:
        InputError: The intervention is another one, its divergence is 0 or not finite, no
            coefficient up to 16 times its own reaches it; and as `null_directions`.

    Examples:
        >>> from steerlens.circuits import Intervention, null_interventions
        >>> nulls = null_interventions(model, pairs, Intervention(vector, 4), differences, n=2)
        >>> {kind: len(drawn) for kind, drawn in nulls.items()}
        {'random': 2, 'shuffled': 2}
    """
    steps = intervention.steps
    is_added = all(isinstance(step.operator, Add) for step in steps)
    if len(steps) != 1 or not is_added or getattr(intervention.vector, "condition", None):
        raise InputError(
            f"expected a vector that is added at one hook, without a condition, got {len(steps)} "
            "steps"
        )
    hook_name, size = steps[0].hook_name, abs(steps[0].amount)
    if hook_name not in differences.hook_names:
        raise InputError(f"there are no differences at {hook_name}; collect them there")
    drawn = [
        (kind, directions[hook_name])
        for kind, some in null_directions(differences, n=n, seed=seed).items()
        for directions in some
    ]
    engine = Engine(model, progress=under(by_default(progress), "nulls"), checkpoint=checkpoint)
    readout = readout_hook(hook_name, engine.n_layers)
    prompts = tokenize_pairs(model, pairs).positive
    workload = Workload(engine.batches(prompts), (), -1, "all", with_readouts=False)
    own = Push(hook_name, steps[0].direction, 1 if steps[0].amount > 0 else -1, readout)
    check = Job(hook_name, own.direction, (own.sign * size,), readout)
    plan = make_plan(engine, workload, run_baseline(engine, workload, (readout,)), [check])
    text = measured_text(plan, prompts, check_search(budget="kl=1"))
    wanted = float(text.measure([(own, size)])[0].values.mean())
    if not 0 < wanted < math.inf:
        raise InputError(f"the vector's KL divergence is {wanted:.3g}; expected one above 0")
    boundaries = find_boundaries(
        plan,
        prompts,
        [Push(hook_name, direction, 1, readout) for _, direction in drawn],
        [FARTHEST * size] * len(drawn),
        budget=check_search(budget=f"kl={wanted!r}"),
        n_bootstrap=0,  # its intervals are not looked at
        seed=seed,
    )
    nulls: dict[str, list[Intervention]] = {}
    for (kind, direction), boundary in zip(drawn, boundaries, strict=True):
        if not math.isfinite(boundary.at):
            raise InputError(
                f"no coefficient up to {FARTHEST * size:.3g} of a {kind} vector has the KL "
                f"divergence {wanted:.3g} of the vector; take a smaller coefficient"
            )
        vector = SteeringVector.from_vectors({hook_name: direction})
        nulls.setdefault(kind, []).append(Intervention(vector, boundary.at))
    return nulls
