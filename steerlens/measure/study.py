"""A study: a model, pairs and directions, run unsteered and checked once, measured in many ways."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import pandas as pd

from steerlens.data.pairs import AnyPairs
from steerlens.directions.directions import Directions
from steerlens.errors import InputError
from steerlens.measure.boundary import BoundaryResult, run_boundary, run_joint, run_prediction
from steerlens.measure.plane import BoundaryShape, LossGeometry, check_plane, run_plane, run_shape
from steerlens.measure.preparation import Preparation
from steerlens.measure.segments import run_segments
from steerlens.measure.settings import COEFFICIENTS, SEARCH_RANGE
from steerlens.measure.sweeps import SweepResult, run_sweep
from steerlens.measure.texts import On
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import Layers, resolve_hooks
from steerlens.steering import Coefficient, SteeringVector
from steerlens.tables import to_frame
from steerlens.validation import Angles, Count, checked


@checked
class Study(Preparation):
    """A model, pairs and directions: tokenised, run unsteered and checked once, when first needed.

    What the measurements share (tokens, unsteered activations and logprobs, the check of every
    hook) is computed by the first that needs it. `forward_equivalents` in a table's attrs is what
    that measurement ran itself.

    Args:
        model: What is measured, as `load_model` gives it.
        pairs: Contrastive pairs, or what `ContrastivePairs.load` reads: tuples of two prompts, a
            frame, a file, the name of a shipped dataset (its test part).
        directions: Unit vectors by hook, frozen; also for the readout hooks, which `fit` adds to
            those of heads (`blocks.5.attn.hook_z[3]`). Or a `SteeringVector`, applied as `steer`
            applies it: all its hooks at once, so that tables have one row for them (their names
            joined by " + ", the layer of the first), and a coefficient is that of the vector.
            Without an opposite (`Ablate`, `Clamp`) both sides of a pair get the same coefficient,
            and there is no negative boundary.
        readout: Of a vector, where its effect is read: hook name -> direction, such as
            `Directions`, at the usual readout hook of its last hook, or at the one hook that is
            given. Default: its last hook, along the vector itself.
        layers: Where to measure (see `resolve_hooks`). Default: the hooks of the directions. Not of
            a vector, of which `vector.at(...)` is a part.
        labels: The tokens whose logprob is measured: "continuation", "assistant", "own",
            "own_sampled" or "all" (see `LabelKind`). Default: "own" where the directions are read
            in the model's own text, else the positive prompts' continuations where there are any,
            else what the assistant says in a chat, else every token but the first. A prompt counts
            with the mean over its labels, a text with that over its prompts.
        own_tokens: The most tokens that the unsteered model writes after each prompt where its own
            text is measured (32); written once, when first needed.
        budget: What counts as coherent (see `Budget`). Default: 1% of the baseline logprob.
        steered_positions: Tokens that are steered: "all" real ones (the default), "prompt",
            "last" (of the prompt), "continuation", "last+continuation", or a span by name (see
            `SteeredPositions`).
        margin: Share of the baseline logprob below which the penalty begins (0.99).
        weight: Of the penalty in the loss (10000).
        n_bootstrap: Resamples of every 95% interval (2000), over the groups of pairs or prompts.
        seed: Of the resamples and the labels drawn (0).
        batch_size: Prompts a forward pass. Default: what the device can use.
        executor: Its workers run the cells: a `ProcessPoolExecutor` with the "spawn" context, a
            Dask client's `get_executor()`. Each loads the model, so it must come from `load_model`.
            Tables are the same to the bit. Default: cells run here.
        progress: Told of the steps (see `show_progress`). Default: bars in a terminal or a
            notebook.
        checkpoint: Given what is finished, so that a measurement that was stopped goes on with it:
            of a sweep each hook, of the others each hook at each step; of many pairs on each block
            of them. Default: nothing is kept.

    Raises:
        InputError: A hook has no direction, the directions are another model's (width, weight
            processing), the pairs would have labels of two kinds, the labels are of another text
            after the prompts than the one that is read, or a setting has no meaning.
        HookError: `layers` names no hook of the model.

    Examples:
        >>> study = sl.Study(model, pairs, directions, layers=[1, 2], budget="kl=0.1")
        >>> result = study.boundary()
        >>> again = study.boundary(on="negative")  # the unsteered pairs are not run again
        >>> study.layers.layer.tolist()
        [1, 2]
        >>> study.boundary_shape(1, n_angles=4).table.angle.tolist()
        [0.0, 90.0, 180.0, 270.0]
    """

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({len(self.hook_names)} hooks, {len(self.pairs)} pairs, "
            f"{self.method})"
        )

    @cached_property
    def layers(self) -> pd.DataFrame:
        """The per-layer table of the unsteered model (columns `layers`); no cell is run."""
        before = self.spent
        rows = list(self.layer_rows.values())
        return to_frame(rows, "layers", self.record(self.settings, since=before))

    def sweep(
        self, coefficients: Sequence[Coefficient] = COEFFICIENTS, *, dense: Count | None = None
    ) -> SweepResult:
        """Measure projection against logprob degradation at every hook and coefficient.

        In a cell at hook L with coefficient c the positive prompts run with `+c * direction` and
        the negative ones with `-c * direction` on the steered tokens, so that the difference moves
        outward for c > 0. It is read at `readout_hook(L)` and the position the directions were
        fitted at, and projected on the readout hook's own frozen direction. The logprob is that of
        the positive prompts' labels. Steering that begins after the read position
        ("continuation") leaves the projection as it was and moves the logprob alone. A cell whose
        numbers overflow is a row of NaN, not coherent ("no"), with a warning.

        Args:
            coefficients: What multiplies the directions. Numbers are residual units; "0.1 norm"
                is so much of each hook's mean residual norm; "80%" of its coherence boundary, which
                is then measured first. Default: up to a tenth of the norm (`COEFFICIENTS`).
            dense: Also so many coefficients, evenly spaced from the lowest to the highest. Those of
                `coefficients` and some 8 evenly spaced ones a hook are run, more, up to 16, where
                these do not do; between them a cubic spline, pair by pair. Each but the two ends is
                left out in turn (`left_out_error`); beyond 1% of the curve's range a warning says
                so. Default: none.

        Returns:
            One row a cell, one a hook, one a pair and hook; 95% intervals over the pairs' groups. A
            cell is `coherent` ("yes") where the whole interval of its degradation is within the
            budget, "no" where none of it is, else "undecided".

        Raises:
            InputError: Coefficients that are not finite, a budget of a divergence, a readout
                without a direction, prompts that cannot be used; `dense` without two coefficients
                in one unit.
            ModelError: The unsteered model is not finite on the pairs.
            WorkerError: A worker failed, after what the others finished was kept.
        """
        return run_sweep(self, coefficients, dense)

    def boundary(
        self,
        *,
        on: On = "positive",
        search_range: float | int = SEARCH_RANGE,
        with_projection: bool = False,
    ) -> BoundaryResult:
        """The first coefficient of each sign beyond which the model exceeds the budget, by hook.

        The boundary is where the loss first exceeds the budget, outward from 0, in residual units,
        when `coefficient * direction` is added to the text. A later coefficient that was seen to be
        within the budget again is in `reentry_*`. One forward and two backward passes predict all
        boundaries; the search starts there and evaluates all hooks and both signs in batched runs,
        each again until its boundary and the ends of its interval lie near enough to what was
        measured, by how much the loss was seen to bend. A 95% interval reaches from where the loss
        beyond the allowance may be 0 to where it must be above, by its own interval over groups
        there (`crossing_interval`). Once a push has been evaluated four times no more are spent on
        its ends, and one beyond what was measured is that of a curve drawn on. Of a percentile over
        tokens it is that of resampled prompts.
        `projection_at_boundary` is the projection of the cell at `boundary_pos`, on a line through
        c = 0 and the coefficient measured nearest to the boundary.

        Args:
            on: The text (see `On`). Default: the positive prompts.
            search_range: How far to look, in mean norms of the pairs' activations at the hook;
                beyond that the boundary is inf (-inf for the negative sign).
            with_projection: Fill `projection_at_boundary`, for which the negative prompts are run
                too (a fifth of the cost); NaN without.

        Raises:
            InputError: A budget without room, a range that is none, a text of single tokens, a
                rollout budget where not all tokens are steered or the context is too short.
        """
        return run_boundary(self, on=on, search_range=search_range, with_projection=with_projection)

    def joint_boundary(
        self,
        *,
        n_angles: Angles = 16,
        on: On = "positive",
        search_range: float | int = SEARCH_RANGE,
    ) -> pd.DataFrame:
        """The boundary of a vector at two hooks, as a curve (columns `joint`), one row an angle.

        At angle a the first hook is pushed by `c * cos(a)` times its `scale * direction`, the
        second by `c * sin(a)` times its own, in the same passes, c > 0; the boundary is the c at
        which the budget is spent. At 0 and 180 degrees the first hook is pushed alone, at 90 and
        270 the second.

        Args:
            n_angles: How many angles of the full circle, 3 at least.
            on: The text (see `On`). Default: the positive prompts.
            search_range: How far to look: until one of the hooks is pushed by so many mean norms
                of the activations there.

        Raises:
            InputError: The study is not of a SteeringVector that adds at two hooks; as `boundary`.
        """
        return run_joint(self, n_angles=n_angles, on=on, search_range=search_range)

    def segments(self, boundary: BoundaryResult) -> pd.DataFrame:
        """What each part of the text loses at the boundaries (columns `segments`).

        The mean that a budget bounds can hide that one part pays for all. Of at most 16 positive
        prompts, one of each group in turn, every token but the first is measured, by what it is
        part of: the messages of each role, the template around them, and what follows, the
        continuations or, where one of these prompts has none, what the unsteered model writes after
        each. One row a hook, a finite boundary and a part; means over the prompts of the means over
        their tokens.

        Args:
            boundary: What `boundary` of this study gave.

        Raises:
            InputError: Boundaries of other directions or hooks than this study's; a chat template
                whose own text depends on the messages; no room in the context for what the model
                writes.
        """
        others = set(boundary.layers.hook_name) - set(self.interventions)
        if others or boundary.directions is not self.directions:
            raise InputError(
                f"expected boundaries of this study, got those of {boundary.directions!r} at "
                f"{', '.join(boundary.layers.hook_name)}; give what study.boundary() returned"
            )
        return run_segments(self, boundary.layers)

    def predicted_boundary(self, *, on: On = "positive") -> pd.DataFrame:
        """The per-layer table with the predicted boundaries alone, without a search.

        The predictions of `boundary`, from one forward and two backward passes: nothing is steered,
        and the measured columns stay NaN. Their curvature is that of the KL divergence: right for a
        KL budget, roughly for one of the logprob, whose slope they have.

        Args:
            on: The text (see `On`). Default: the positive prompts.

        Raises:
            InputError: As `boundary`; a vector that does not add, or has a condition.
        """
        return run_prediction(self, on=on)

    def boundary_shape(
        self,
        layer: Layers,
        *,
        n_angles: Angles = 16,
        on: On = "positive",
        search_range: float | int = SEARCH_RANGE,
    ) -> BoundaryShape:
        """The boundary at one hook, along directions spread evenly over a plane.

        The plane is spanned by the frozen direction and the first principal axis (uncentred) of the
        pairs' differences at that hook once their part along the direction is taken off. At angle a
        the text runs with `c * (cos(a) * direction + sin(a) * orthogonal)` added, c > 0, in
        residual units. Search and intervals as in `boundary`, whose `boundary_pos` is the row at 0
        degrees and `-boundary_neg` that at 180 (estimated again, from other evaluations).

        Args:
            layer: One hook of the study (see `resolve_hooks`).
            n_angles: How many angles, 3 at least.
            on: The text (see `On`). Default: the positive prompts.
            search_range: As of `boundary`.

        Raises:
            InputError: Not one hook of the study, fewer than 3 angles, differences that lie along
                the direction alone; and as `boundary`.
        """
        hook_names = self._some_hooks(layer)
        check_plane(hook_names, n_angles)
        return run_shape(self, hook_names[0], n_angles=n_angles, on=on, search_range=search_range)

    def plane(
        self,
        layers: Layers | None = None,
        *,
        n_angles: Angles = 16,
        search_range: float | int = SEARCH_RANGE,
    ) -> LossGeometry:
        """Measure the loss in the plane of each hook's direction and the main orthogonal one.

        A push p in the plane adds `+p` to every token of the positive prompts and `-p` to those of
        the negative ones, so that the difference of each pair moves by `2 p` at the hook (residual
        units). `shape` is `boundary_shape`. At shares of each angle's boundary (`SHARES`; where it
        is NaN or beyond the search, of the largest that was found or, where none was found, of the
        searched range) the loss is measured in its reference form, read at the hook itself:

            loss(p) = -(mean_i difference_i + 2 p) . direction
                      + weight * mean_i relu(margin * baseline_i - logp_i(p))^2

        The arrows of `points` are minus the gradients of the two terms of the noref loss at p = 0,
        as the difference moves, pair by pair and within the plane:
        `difference_i / ||difference_i||` for the separation, and
        `weight * relu((margin - 1) * logp_i) * dlogp_i/dp` for the penalty of the pair's labels
        (half of its derivative by p, as the difference moves by 2 p), every token pushed. Cost: a
        boundary search and `6 * n_angles` cells of the positive prompts a hook, two forward and two
        backward passes for all.

        Args:
            layers: Hooks of the study (see `resolve_hooks`). Default: all of them.
            n_angles: How many angles, 3 at least.
            search_range: As of `boundary`.

        Raises:
            InputError: As `boundary_shape`; not all tokens are steered.
        """
        hook_names = self.hook_names if layers is None else self._some_hooks(layers)
        return run_plane(self, hook_names, n_angles=n_angles, search_range=search_range)

    def _some_hooks(self, layers: Layers) -> tuple[str, ...]:
        hook_names = resolve_hooks(self.model, layers)
        others = [name for name in hook_names if name not in self.hook_names]
        if others:
            raise InputError(
                f"{', '.join(others)} is not among the hooks of this study; name it in layers="
            )
        return hook_names


@checked
def sweep(
    model: HookedModel,
    pairs: AnyPairs,
    directions: Directions | SteeringVector,
    *,
    coefficients: Sequence[Coefficient] = COEFFICIENTS,
    dense: Count | None = None,
    **settings: Any,
) -> SweepResult:
    """`Study(model, pairs, directions, **settings).sweep(coefficients, dense=dense)`.

    What each is, and what is raised, is told at `Study` and `Study.sweep`.

    Examples:
        >>> result = sl.sweep(model, pairs, directions, layers=[2], coefficients=[-4, 0, 4])
        >>> result
        SweepResult(1 hooks x 3 coefficients, mean_diff)
        >>> sl.sweep(model, pairs, directions.at(2)).table.asked.tolist()
        ['-0.1 norm', '-0.05 norm', '0', '0.05 norm', '0.1 norm']
        >>> projection = result.table.projection  # at the readout itself each side moves by c
        >>> (projection - projection[1]).tolist()
        [-8.00, 0.00, 8.00]
    """
    study = Study(model, pairs, directions, **settings)
    return study.sweep(coefficients, dense=dense)


@checked
def find_boundary(
    model: HookedModel,
    pairs: AnyPairs,
    directions: Directions | SteeringVector,
    *,
    on: On = "positive",
    search_range: float | int = SEARCH_RANGE,
    with_projection: bool = False,
    **settings: Any,
) -> BoundaryResult:
    """`Study(model, pairs, directions, **settings).boundary(...)`.

    What each is, and what is raised, is told at `Study` and `Study.boundary`.

    Examples:
        >>> found = sl.find_boundary(model, pairs, directions, layers=[1, 2], budget="kl=0.1")
        >>> found
        BoundaryResult(2 hooks, kl=0.1)
        >>> bool((found.layers.boundary_neg < 0).all() and (found.layers.boundary_pos > 0).all())
        True
    """
    study = Study(model, pairs, directions, **settings)
    return study.boundary(on=on, search_range=search_range, with_projection=with_projection)


@checked
def loss_geometry(
    model: HookedModel,
    pairs: AnyPairs,
    directions: Directions,
    *,
    layers: Layers,
    n_angles: Angles = 16,
    search_range: float | int = SEARCH_RANGE,
    **settings: Any,
) -> LossGeometry:
    """`Study(model, pairs, directions, layers=layers, **settings).plane(...)`.

    What each is, and what is raised, is told at `Study` and `Study.plane`.

    Examples:
        >>> geometry = sl.loss_geometry(
        ...     model, pairs, directions, layers=[1], n_angles=4, budget="kl=0.1", n_bootstrap=50
        ... )
        >>> geometry  # six shares of four boundaries, and none
        LossGeometry(1 hooks, 28 pushes)
        >>> pushes = geometry.contours
        >>> np.allclose(pushes.loss, pushes.coherence_penalty - pushes.along)
        True
    """
    study = Study(model, pairs, directions, layers=layers, **settings)
    return study.plane(n_angles=n_angles, search_range=search_range)
