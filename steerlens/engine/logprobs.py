"""How likely the unsteered model finds continuations: each prompt run once for all of its own."""

import math
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from jaxtyping import Float
from torch import Tensor

from steerlens.engine.backend import for_hooks
from steerlens.engine.batches import Batch, in_pair_order, make_split_batches
from steerlens.engine.capture import by_halves
from steerlens.engine.engine import Engine
from steerlens.engine.plain_loop import check_labels, run_baseline
from steerlens.engine.resume import distinct_rows, labels_logprob, run_from, run_prefix
from steerlens.engine.tokenization import TokenizedPrompt
from steerlens.engine.workload import Cost, Workload
from steerlens.loss.labels import mean_by_prompt
from steerlens.models.hooked_model import context_length, is_on_one_side, key_value_cache
from steerlens.models.hooks import resid_post
from steerlens.models.loading import inference
from steerlens.models.tolerance import allowed_gap
from steerlens.progress import silent

_proved: "weakref.WeakKeyDictionary[Any, dict[tuple[bool, bool], bool]]" = (
    weakref.WeakKeyDictionary()
)
"""Of a model, whether prompts run once gave what whole passes give: by what of them is padded."""


def continuation_logprobs(
    engine: Engine, prompts: Sequence[TokenizedPrompt]
) -> Float[Tensor, " prompt"]:
    """Mean log-probability of each prompt's continuation, nats per token.

    A prompt is run once for its continuations of about one length, and its keys and values taken
    by all of them; a continuation that comes twice is looked at once. By whole passes, which are
    slower, where a model keeps more than keys and values of what it has read, or a look at two rows
    shows that they give something else (with a warning).

    Args:
        engine: Unsteered.
        prompts: Each with a continuation.

    Raises:
        ModelError: The model rules a continuation out.
    """
    places = {(prompt.prompt, prompt.continuation): i for i, prompt in enumerate(prompts)}
    distinct = [prompts[i] for i in places.values()]
    values = _by_prefixes(engine, distinct) if _has_prefixes(engine, distinct) else None
    if values is None:
        values = _by_whole_passes(engine, distinct)
    row = {key: i for i, key in enumerate(places)}
    return values[[row[prompt.prompt, prompt.continuation] for prompt in prompts]]


def _by_whole_passes(
    engine: Engine, prompts: Sequence[TokenizedPrompt]
) -> Float[Tensor, " prompt"]:
    workload = Workload(engine.batches(prompts), (), position=-1, steered_positions="all")
    return run_baseline(engine, workload, (resid_post(0),)).logprob


def _has_prefixes(engine: Engine, prompts: Sequence[TokenizedPrompt]) -> bool:
    """Whether prompts may be run by themselves: a prompt of one token has nothing to share."""
    model = engine.model
    return (
        key_value_cache(model) is not None
        and all(len(prompt.prompt) > 1 for prompt in prompts)
        and all(_proved.get(model, {}).values())
        and all(is_on_one_side(model, len(p.prompt) - 1, len(p)) for p in prompts)
        # Padded between prompt and continuation, a batch is wider than its longest text.
        and max(len(p.prompt) for p in prompts) + max(len(p) - len(p.prompt) for p in prompts)
        <= (context_length(model) or math.inf)
    )


def _by_prefixes(
    engine: Engine, prompts: Sequence[TokenizedPrompt]
) -> Float[Tensor, " prompt"] | None:
    """As `continuation_logprobs`, each prompt run once; None where whole passes give another."""
    runner = engine.on(for_hooks(engine.model, (), on_cpu=True))
    last = resid_post(engine.n_layers - 1)

    def run(head: Batch, tail: Batch) -> Tensor:
        prefix = run_prefix(runner.model, head)
        # Nothing is asked of what follows the last token.
        tokens, mask = tail.tokens[:, :-1], tail.attention_mask[:, :-1]
        for part in (head.tokens[distinct_rows(head)[0]], tokens):
            engine.cost.add(part, engine.n_layers)
        final = run_from(runner.model, tokens, mask, prefix=prefix, last_hook=last)
        is_label = tail.label_mask()[:, 1:]
        labels = tail.tokens[:, 1:][is_label]
        by_label = labels_logprob(runner.model, final[is_label.to(final.device)], labels)
        return mean_by_prompt(by_label, is_label).cpu()

    with inference(runner.model):
        done = by_halves(
            make_split_batches(engine.model, prompts, engine.batch_size),
            run,
            progress=engine.progress,
        )
    tails = [tail for (_, tail), _ in done]
    for (head, tail), values in done:
        if not _is_proved(engine, head, tail, values):
            return None
    logprob = in_pair_order(tails, [values[None] for _, values in done])[0]
    check_labels(tails, logprob)
    return logprob


def _is_proved(engine: Engine, head: Batch, tail: Batch, values: Float[Tensor, " row"]) -> bool:
    """Whether whole passes give the same of two rows: looked at once a model and kind of padding.

    The rows are the first, with the shortest continuation, and the last, with the longest.
    """
    kind = (not bool(head.is_whole.all()), not bool(tail.is_whole.all()))
    known = _proved.setdefault(engine.model, {})
    if kind not in known:
        rows = sorted({0, len(tail.rows) - 1})
        # Not counted, so that a cost does not depend on what was run before.
        alone = replace(engine, batch_size=1, cost=Cost(), progress=silent)
        expected = _by_whole_passes(alone, [tail.prompts[row] for row in rows])
        gaps = (values[rows] - expected).abs()
        allowed = allowed_gap(engine.model.cfg.dtype, least=1e-3) * expected.abs().clamp(min=1)
        known[kind] = bool((gaps <= allowed).all())
        if not known[kind]:
            warnings.warn(
                "the model finds a text otherwise likely after the kept keys and values of its "
                f"prompt than after the prompt itself (by {float(gaps.max()):.2g} nats per token); "
                "prompts are run anew for every text, which is slower",
                RuntimeWarning,
                stacklevel=3,
            )
    return known[kind]
