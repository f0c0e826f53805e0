"""What a steered model writes: scores of sampled text against the coefficient, with intervals."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from steerlens.data.pairs import ContrastivePairs
from steerlens.data.prompts import Message, Prompt
from steerlens.directions.directions import Directions
from steerlens.engine.checkpoint import Checkpoint
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_prompt
from steerlens.errors import InputError
from steerlens.measure.interventions import joined_hooks
from steerlens.measure.scorers import Scorer, scorer_name, scorers_of
from steerlens.measure.study import Study
from steerlens.measure.writing import TEXT_COLUMNS, Cell, Subject, Writer
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import Layers, resolve_hooks
from steerlens.models.identity import check_fitted_on, provenance
from steerlens.progress import Progress, by_default, part_of
from steerlens.stats import N_BOOTSTRAP, interval, rank_p
from steerlens.steering import Add, Coefficient, SteeringVector, parse_coefficient, steps
from steerlens.steering.cache_positions import Positions
from steerlens.tables import Row, to_frame
from steerlens.validation import Count, Draws, Whole, checked

COHERENCE = ("logprob", "distinct_2", "repeated_4", "ended")
"""Scorers that need nothing but the model."""
CONCEPT = "concept"
PERSONAS = ("positive prompt", "negative prompt")


@dataclass(frozen=True, eq=False)
class BehaviourResult:
    """What was written, and its scores.

    `table` has a row a hook, coefficient and scorer (columns `behaviour`): means over prompts of
    the means over their texts, shifts against the texts of the same prompt at 0, intervals over the
    groups of prompts. `generations` has a row a text, after which prompt (its number from 1, and as
    the model saw it), by what, and each scorer's number in a column of its name. A sample has the
    same random numbers at every coefficient.
    """

    table: pd.DataFrame
    generations: pd.DataFrame

    def __repr__(self) -> str:
        n_scorers = self.table.scorer.nunique()
        return f"BehaviourResult({len(self.generations)} texts, {n_scorers} scorers)"

    def records(self) -> Iterator[dict[str, Any]]:
        """Every text as a line of `generations.jsonl` has it."""
        for row in self.generations.to_dict("records"):
            line = {str(name): value for name, value in row.items()}
            scores = {name: line.pop(name) for name in self.table.attrs["scorers"]}
            number, prompt = line.pop("prompt"), line.pop("prompt_text")
            yield {"prompt": prompt, "prompt_number": number, **line, "scores": scores}


@checked
def behaviour(
    model: HookedModel | Study,
    vector: SteeringVector | Directions | Mapping[str, Tensor] | None,
    prompts: Sequence[Prompt],
    *,
    coefficients: Sequence[Coefficient],
    scorers: Sequence[Any] | None = None,
    pairs: ContrastivePairs | None = None,
    layers: Layers | None = None,
    samples: Count = 4,
    max_new_tokens: Count = 40,
    positions: Positions = "all",
    groups: Sequence[str] | None = None,
    n_null: Whole = 0,
    personas: tuple[str, str] | None = None,
    n_bootstrap: Draws = N_BOOTSTRAP,
    seed: Whole | None = 0,
    batch_size: Count | None = None,
    progress: Progress | None = None,
    checkpoint: Checkpoint | None = None,
) -> BehaviourResult:
    """Measure what the steered model writes: every scorer's mean at every coefficient.

    Args:
        model: Or a `Study`, whose directions, pairs and batch size are then the defaults.
        vector: A `SteeringVector`, all its hooks at once; `Directions`, each hook by itself; plain
            directions by hook name; None for those of the study.
        prompts: What the model goes on after, texts or chats.
        coefficients: As in `Coefficient`; 0 is always among them.
        scorers: Each a `Scorer`, or the name of one that needs model and pairs alone (see
            `scorers_of`). Default: logprob, distinct_2, repeated_4 and ended; `concept` with pairs.
        pairs: What the scorers of the concept ask with; the vector may be fitted on others.
        layers: Hooks that are measured each by itself (see `resolve_hooks`). Default: as `vector`.
        samples: Texts a prompt and coefficient.
        max_new_tokens: Where a text ends, unless it comes to its end.
        positions: Tokens that are steered (see `Positions`). Default: all.
        groups: The group of each prompt. Default: each is its own.
        n_null: Random directions that are added as far at the same hooks: their lowest and highest
            means are the null band, and p a rank among their shifts. Default: none.
        personas: A text for each end of the concept that stands in front of the prompts (of a chat
            as a system message), unsteered; scored as if after the plain prompts. Default: none.
        seed: Of samples, nulls and resamples; None is greedy, with one sample.
        batch_size: Texts written at once; `n_bootstrap`, it and `progress` are as of `Study`.
        checkpoint: Given what each hook wrote, and the scores of those that have a list `decided`.

    Raises:
        InputError: No prompts, groups that are not as many, nulls of what does not add, greedy with
            several samples, no vector without a study; and as `generate_texts` and `scorers_of`.
        HookError: `layers` names no hook of the model.

    Examples:
        >>> result = sl.behaviour(
        ...     model, vector, ["the river was", "it is"], coefficients=[4], samples=2,
        ...     max_new_tokens=5, scorers=["distinct_2"],
        ... )
        >>> result
        BehaviourResult(8 texts, 1 scorers)
        >>> result.table.coefficient.tolist()
        [0.0, 4.0]
    """
    if isinstance(model, Study):
        vector = model.directions if vector is None else vector
        pairs = model.pairs if pairs is None else pairs
        batch_size, model = batch_size or model.settings.batch_size, model.model
    if vector is None:
        raise InputError("expected a vector or directions: only a Study has some")
    if seed is None and samples > 1:
        raise InputError(f"greedy texts of a prompt are all the same: ask for 1, not {samples}")
    grouped = _groups(prompts, groups)
    subjects = _subjects(model, vector, layers, coefficients)
    tell_all = by_default(progress)
    nulls = [_nulls(subject, n_null, seed or 0) for subject in subjects]
    default = (*COHERENCE, CONCEPT) if pairs is not None else COHERENCE
    writer = Writer(
        model=model,
        prompts=_tokenized(model, prompts),
        scorers=_by_name(default if scorers is None else scorers, model, pairs, batch_size),
        samples=samples,
        seed=seed,
        max_new_tokens=max_new_tokens,
        positions=positions,
        batch_size=batch_size,
        checkpoint=checkpoint,
    )
    unsteered = writer.cells(Subject("unsteered"), part_of(tell_all, "unsteered"))[0]
    compare = _Comparison(unsteered, grouped, n_bootstrap, seed or 0)
    told = [_tokenized(model, [_with_persona(p, of) for p in prompts]) for of in personas or ()]
    all_subjects = zip(subjects, nulls, strict=True)
    table, texts = _written(writer, compare, told, all_subjects, tell_all)
    settings = {
        "positions": positions if isinstance(positions, str) else "a mask",
        **{"samples": samples, "max_new_tokens": max_new_tokens, "seed": seed},
        **{"n_bootstrap": n_bootstrap, "n_null": n_null, "personas": personas},
    }
    attrs = {
        "model": provenance(model).to_dict(),
        **{"scorers": list(writer.scorers), "settings": settings},
        "pairs": None if pairs is None else pairs.name,
    }
    return BehaviourResult(to_frame(table, "behaviour", attrs), pd.DataFrame(texts))


def _written(
    writer: Writer,
    compare: "_Comparison",
    told: Sequence[tuple[TokenizedPrompt, ...]],
    subjects: Iterable[tuple[Subject, Sequence[Subject]]],
    tell_all: Progress,
) -> tuple[list[Row], list[Row]]:
    """Rows and texts: of the prompts that are told a persona, then of every subject and its nulls.

    As lines of the two tables; the unsteered texts come first.
    """
    table, texts = list[Row](), list[Row](compare.unsteered.lines())
    for kind, asked in zip(PERSONAS, told, strict=False):
        (cell,) = writer.cells(Subject(kind), part_of(tell_all, kind), asked=asked)
        table += compare.rows(cell)
        texts += cell.lines()
    for subject, nulls in subjects:
        tell = part_of(tell_all, subject.hook_name)
        written = [writer.cells(of, tell) if of.strengths else [] for of in (subject, *nulls)]
        table += compare.rows(replace(compare.unsteered, subject=subject))
        for cell, *null_cells in zip(*written, strict=True):
            table += compare.rows(cell, null_cells)
        texts += [line for cells in written for cell in cells for line in cell.lines()]
    return table, texts


@dataclass(frozen=True, eq=False)
class _Comparison:
    """Cells against the unsteered one, with intervals over groups of prompts."""

    unsteered: Cell
    groups: tuple[str, ...]
    n_bootstrap: int
    seed: int

    def rows(self, cell: Cell, nulls: Sequence[Cell] = ()) -> list[Row]:
        """A row a scorer (columns `behaviour`)."""
        return [
            {**cell.place, "scorer": name, **self._row(name, cell, nulls)} for name in cell.scores
        ]

    def _row(self, name: str, cell: Cell, nulls: Sequence[Cell]) -> Row:
        scores = cell.scores[name]
        means, shifts = _by_prompt(scores), self._shifts(name, cell)
        before = _by_prompt(self.unsteered.scores[name])[:, None]
        above = np.where(np.isnan(scores - before), np.nan, np.sign(scores - before) / 2 + 0.5)
        low, high = self._interval(means)
        shift_low, shift_high = self._interval(shifts)
        null_means = [_mean(_by_prompt(null.scores[name])) for null in nulls]
        shift = _mean(shifts)
        return {
            "mean": _mean(means),
            "ci_low": low,
            "ci_high": high,
            "shift": shift,
            "shift_ci_low": shift_low,
            "shift_ci_high": shift_high,
            "share_above": _mean(above),
            "null_low": min(null_means, default=np.nan),
            "null_high": max(null_means, default=np.nan),
            "p": rank_p(shift, [_mean(self._shifts(name, null)) for null in nulls]),
            "n_prompts": int(np.isfinite(means).sum()),
            "n_groups": len({g for g, m in zip(self.groups, means, strict=True) if np.isfinite(m)}),
            "n_texts": int(np.isfinite(scores).sum()),
        }

    def _shifts(self, name: str, cell: Cell) -> Float[np.ndarray, " prompt"]:
        before = _by_prompt(self.unsteered.scores[name])
        shifts: NDArray[np.float64] = _by_prompt(cell.scores[name]) - before
        return shifts

    def _interval(self, values: Float[np.ndarray, " prompt"]) -> tuple[float, float]:
        known = np.isfinite(values)
        groups = [group for group, is_known in zip(self.groups, known, strict=True) if is_known]
        return interval(values[known], groups=groups, seed=self.seed, n_bootstrap=self.n_bootstrap)


def _by_prompt(scores: Float[np.ndarray, "prompt sample"]) -> Float[np.ndarray, " prompt"]:
    """The mean over a prompt's texts that have a score; NaN where none has."""
    known = np.isfinite(scores)
    with np.errstate(invalid="ignore"):
        means: NDArray[np.float64] = np.where(known, scores, 0).sum(axis=1) / known.sum(axis=1)
    return means


def _mean(values: Float[np.ndarray, "..."]) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else float("nan")


def _by_name(
    asked: Sequence[Any],
    model: HookedModel,
    pairs: ContrastivePairs | None,
    batch_size: int | None,
) -> dict[str, Scorer]:
    """The scorers by what tables call them. Raises `InputError` where two are called the same."""
    found: list[Scorer] = []
    for one in asked:
        if isinstance(one, str):
            found += scorers_of([one], model, pairs, batch_size=batch_size)
        else:
            found.append(one)
    named = {scorer_name(scorer): scorer for scorer in found}
    if taken := sorted({*named} & {*TEXT_COLUMNS}):
        raise InputError(f"{taken[0]!r} is a column of every text: give the scorer another name")
    if not found or len(named) < len(found):
        names = ", ".join(map(scorer_name, found))
        raise InputError(f"expected scorers, each with a name of its own, got {names or 'none'}")
    return named


def _groups(prompts: Sequence[Prompt], groups: Sequence[str] | None) -> tuple[str, ...]:
    """The group of each prompt, its own by default. Raises `InputError` unless each has one."""
    named = tuple(map(str, range(len(prompts))) if groups is None else groups)
    if not prompts or len(named) != len(prompts):
        raise InputError(
            f"expected a group for each prompt: {len(prompts)} of these, {len(named)} groups"
        )
    return named


def _subjects(
    model: HookedModel,
    vector: SteeringVector | Directions | Mapping[str, Tensor],
    layers: Layers | None,
    coefficients: Sequence[Coefficient],
) -> list[Subject]:
    """What is measured: each hook of some layers or directions, or a vector as a whole."""
    if not coefficients:
        raise InputError("expected one or more coefficients, got none")
    strengths = tuple(c for c in dict.fromkeys(coefficients) if parse_coefficient(c).number)
    if isinstance(vector, (SteeringVector, Directions)):
        check_fitted_on(model, vector)
    names = tuple(vector) if layers is None else resolve_hooks(model, layers)
    if isinstance(vector, Directions) and layers is None:
        names = vector.hook_names
    missing = [name for name in names if name not in vector]
    if missing:
        raise InputError(f"there is no direction at {', '.join(missing)}")
    parts: dict[str, SteeringVector | Mapping[str, Tensor]]
    if isinstance(vector, SteeringVector):
        parts = {joined_hooks(vector): vector}
        if layers is not None:
            parts = {name: vector.at(name) for name in names}
    elif isinstance(vector, Directions) or layers is not None:
        parts = {name: {name: vector[name]} for name in names}
    else:
        parts = {" + ".join(names): vector}
    for part in parts.values():
        for strength in strengths:
            steps(part, strength)
    return [Subject("steered", name, part, strengths) for name, part in parts.items()]


def _nulls(subject: Subject, n_null: int, seed: int) -> list[Subject]:
    """Random directions at the subject's hooks, added as far as its own."""
    vector = subject.vector
    if n_null and isinstance(vector, SteeringVector) and not isinstance(vector.operator, Add):
        raise InputError(f"nulls are of a vector that adds, this one does {vector.operator.name}")
    generator = torch.Generator().manual_seed(seed)
    nulls = []
    for i in range(n_null):
        rows = {
            name: torch.nn.functional.normalize(torch.randn(len(row), generator=generator), dim=0)
            for name, row in vector.items()
        }
        random: SteeringVector | Mapping[str, Tensor]
        if isinstance(vector, SteeringVector):
            directions = torch.stack([rows[name] for name in vector.hook_names])
            random = replace(vector, directions=directions)
        else:
            norms = {name: float(row.norm()) for name, row in vector.items()}
            random = {name: norms[name] * row for name, row in rows.items()}
        nulls.append(replace(subject, kind=f"null {i + 1}", vector=random))
    return nulls


def _tokenized(model: HookedModel, prompts: Sequence[Prompt]) -> tuple[TokenizedPrompt, ...]:
    return tuple(
        tokenize_prompt(model, prompt, where=f"prompt {i}") for i, prompt in enumerate(prompts, 1)
    )


def _with_persona(prompt: Prompt, persona: str) -> Prompt:
    """The prompt with a persona in front of it; of a chat in its system message."""
    if isinstance(prompt, str):
        return f"{persona}\n\n{prompt}"
    if prompt[0].role == "system":
        return (Message("system", f"{persona}\n\n{prompt[0].content}"), *prompt[1:])
    return (Message("system", persona), *prompt)
