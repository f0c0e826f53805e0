"""The log-probability of label tokens, and the divergence of what predicts them."""

import math

import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens.validation import checked


@checked
def label_logprob(
    logits: Float[Tensor, "prompt token vocab"],
    tokens: Int[Tensor, "prompt token"],
    label_mask: Bool[Tensor, "prompt token"],
) -> Float[Tensor, " prompt"]:
    """Mean log-probability of each prompt's label tokens.

    Args:
        logits: Of the model at every token.
        tokens: The prompts' token ids.
        label_mask: True at the tokens that count as labels; the label at token t is predicted by
            the logits at t - 1, so one at the first token cannot be and must not be marked.

    Returns:
        Nats per token, NaN for a prompt without labels. The log-softmax is taken in float32 at
        least.

    Examples:
        >>> logits = torch.tensor([[[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]]]).log()
        >>> tokens = torch.tensor([[0, 1, 0]])
        >>> is_label = torch.tensor([[False, True, True]])
        >>> sl.loss.label_logprob(logits, tokens, is_label)  # (log 0.75 + log 0.5) / 2
        tensor([-0.490])
    """
    return mean_by_prompt(label_logprobs(logits, tokens, label_mask), label_mask[:, 1:])


@checked
def label_logprobs(
    logits: Float[Tensor, "prompt token vocab"],
    tokens: Int[Tensor, "prompt token"],
    label_mask: Bool[Tensor, "prompt token"],
) -> Float[Tensor, " label"]:
    """Log-probability of each label token, in nats, prompt after prompt (see `label_logprob`)."""
    labels = tokens.to(logits.device)[:, 1:][label_mask[:, 1:].to(logits.device)]
    return -torch.nn.functional.cross_entropy(
        predictions(logits, label_mask), labels, reduction="none"
    )


@checked
def label_kl(
    logits: Float[Tensor, "prompt token vocab"],
    unsteered: Float[Tensor, "prompt token vocab"],
    label_mask: Bool[Tensor, "prompt token"],
) -> Float[Tensor, " label"]:
    """KL(unsteered || steered), in nats, of the distributions that predict each label token.

    `logits` are the steered model's. Labels as in `label_logprob`, prompt after prompt; log-softmax
    and sum in float32 at least.
    """
    steered = predictions(logits, label_mask).log_softmax(-1)
    reference = predictions(unsteered.to(logits.device), label_mask).log_softmax(-1)
    return divergence(steered, reference)


def predictions(
    logits: Float[Tensor, "prompt token vocab"], label_mask: Bool[Tensor, "prompt token"]
) -> Float[Tensor, "label vocab"]:
    """The logits that predict each label token, prompt after prompt, in float32 at least."""
    predictions = logits[:, :-1][label_mask[:, 1:].to(logits.device)]
    return predictions.to(torch.promote_types(predictions.dtype, torch.float32))


def divergence(
    steered: Float[Tensor, "label vocab"], unsteered: Float[Tensor, "label vocab"]
) -> Float[Tensor, " label"]:
    """`sum_v q(v) (log q(v) - log p(v))`, nats, from log-probabilities of unsteered q, steered p.

    A token that q rules out adds nothing; one that p alone rules out makes it inf.
    """
    terms = torch.nn.functional.kl_div(steered, unsteered, reduction="none", log_target=True)
    return terms.masked_fill(unsteered == -math.inf, 0.0).sum(-1)


def mean_by_prompt(
    values: Float[Tensor, " label"], is_label: Bool[Tensor, "prompt token"]
) -> Float[Tensor, " prompt"]:
    """Each prompt's mean of `values`, one for each True of `is_label`, row by row; NaN of none."""
    is_label = is_label.to(values.device)
    spread = values.new_zeros(is_label.shape).masked_scatter(is_label, values)
    total = reduce(spread, "prompt token -> prompt", "sum")
    return total / reduce(is_label, "prompt token -> prompt", "sum")
