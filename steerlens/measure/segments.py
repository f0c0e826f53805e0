"""What a push to the boundary costs, part by part of the text: persona, question, own words."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from steerlens.data.sequence import one_of_each_in_turn
from steerlens.engine.labels import OWN, Segments, segments, with_labels
from steerlens.engine.plain_loop import run_baseline
from steerlens.engine.plan import run_cells
from steerlens.engine.tokenization import TokenizedPrompt, fingerprint
from steerlens.engine.workload import CellOutput, Job
from steerlens.measure.preparation import Preparation
from steerlens.models.hooks import hook_layer
from steerlens.stats import interval
from steerlens.tables import Row, to_frame

N_PROMPTS = 16
"""Positive prompts that are measured, one of each group in turn."""


def run_segments(study: Preparation, layers: pd.DataFrame) -> pd.DataFrame:
    """`Study.segments` at the boundaries of a per-layer table."""
    before, settings = study.spent, study.settings
    rows = one_of_each_in_turn(study.pairs.groups, N_PROMPTS)
    prompts = tuple(study.tokens.positive[row] for row in rows)
    after = "own" if settings.labels in OWN else "continuation"
    if not all(prompt.continuation for prompt in prompts):
        own_tokens = study.asked_labels.own_tokens
        prompts = with_labels(study.model, prompts, "own", own_tokens=own_tokens)
        after = "own"
    prompts = with_labels(study.model, prompts, "all")
    parts = [
        tuple(after if part == "continuation" else part for part in of)
        for of in segments(study.model, prompts)
    ]
    jobs = [
        study.interventions[name].job(reached)
        for name, *ends in layers[["hook_name", "boundary_pos", "boundary_neg"]].to_numpy().tolist()
        if (reached := tuple(end for end in ends if math.isfinite(end) and end != 0))
    ]
    cells = _run(study, prompts, jobs)
    groups = tuple(study.pairs.groups[row] for row in rows)
    table = [
        {
            "hook_name": job.hook_name,
            "layer": hook_layer(job.hook_name),
            "coefficient": cell.coefficient,
            "segment": segment,
            **_segment_row(study, cell, cells[-1][-1], prompts, parts, segment, groups),
        }
        for job, of_job in zip(jobs, cells, strict=True)
        for cell in of_job
        if cell.coefficient != 0
        for segment in dict.fromkeys(part for of in parts for part in of)
    ]
    attrs = {**study.record(settings, since=before), "text": fingerprint(prompts)}
    return to_frame(table, "segments", attrs)


def _run(
    study: Preparation, prompts: Sequence[TokenizedPrompt], jobs: Sequence[Job]
) -> list[list[CellOutput]]:
    """Every job's cells, with KL and logprob at every token; the last cell of all is unsteered."""
    if not jobs:
        return []
    engine = study.engine.stage("segments: hooks")
    workload = replace(
        study.workload,
        positive=engine.batches(prompts),
        negative=(),
        with_kl=True,
        with_readouts=False,
    )
    readouts = tuple(dict.fromkeys(job.readout for job in jobs))
    baseline = run_baseline(engine, workload, readouts)
    plan = study.plan.on(workload, baseline)
    last = replace(jobs[-1], coefficients=(*jobs[-1].coefficients, 0.0))
    return list(run_cells(plan, [*jobs[:-1], last]))


def _segment_row(
    study: Preparation,
    cell: CellOutput,
    unsteered: CellOutput,
    prompts: Sequence[TokenizedPrompt],
    parts: Sequence[Segments],
    segment: str,
    groups: Sequence[int],
) -> Row:
    """Means over the prompts that have such tokens, of the means over these tokens."""
    chosen = [
        [of[i] == segment for i in prompt.label_tokens]
        for prompt, of in zip(prompts, parts, strict=True)
    ]
    has = [row for row, of in enumerate(chosen) if any(of)]
    if not has:
        return {"n_prompts": 0, "n_tokens": 0}

    def means(values: Float[Tensor, "prompt token"] | None) -> Float[np.ndarray, " prompt"]:
        assert values is not None  # the workload asks for them
        by_prompt = values.double().numpy()
        labels = [by_prompt[row][~np.isnan(by_prompt[row])][chosen[row]] for row in has]
        return np.array([of.mean() if np.isfinite(of).all() else np.nan for of in labels])

    logprob, divergence = means(unsteered.logprobs), means(cell.kl)
    degradation = logprob - means(cell.logprobs)
    settings = study.settings
    low, high = interval(
        degradation,
        groups=[groups[row] for row in has],
        seed=settings.seed,
        n_bootstrap=settings.n_bootstrap,
    )
    return {
        "n_prompts": len(has),
        "n_tokens": sum(map(sum, chosen)),
        "logprob_nats": float(logprob.mean()),
        "degradation_nats": float(degradation.mean()),
        "degradation_ci_low": low,
        "degradation_ci_high": high,
        "kl_nats": float(divergence.mean()),
    }
