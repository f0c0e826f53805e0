"""What a circuit is a circuit of: the answer logit difference at the last token of each prompt."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steerlens.circuits.prompts import Prompts, Rows, make_prompts, row_slices
from steerlens.data import ContrastivePairs, PreferenceItems
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_items, tokenize_pairs
from steerlens.errors import InputError, told
from steerlens.models import HookedModel, inference
from steerlens.validation import Count, checked


@checked
@dataclass(frozen=True, eq=False)
class Answers:
    """Token ids of the answer on either side: the metric is the difference of their mean logits.

    Args:
        positive: One row for all prompts, or one a prompt; in a comparison of circuits, one a pair
            or one a prompt, those of the positive prompts first.
        negative: As many rows, of one or more tokens each.

    Raises:
        InputError: They are not tables of whole numbers with as many rows.

    Examples:
        >>> from steerlens.circuits import Answers
        >>> answers = Answers(torch.tensor([[0, 1]]), torch.tensor([[2]]))
        >>> answers.logit_difference(torch.tensor([[4.0, 2.0, 1.0]]))  # (4 + 2) / 2 - 1
        tensor([2.])
    """

    positive: Int[Tensor, "#prompt positive_token"]
    negative: Int[Tensor, "#prompt negative_token"]

    def __post_init__(self) -> None:
        for ids in (self.positive, self.negative):
            is_table = ids.ndim == 2 and 0 not in ids.shape and not ids.is_floating_point()
            if not is_table or len(ids) != len(self.positive):
                raise InputError(
                    f"expected token ids, a row a prompt on both sides, got "
                    f"{tuple(self.positive.shape)} and {tuple(self.negative.shape)}"
                )

    def check(self, model: HookedModel, n_prompts: int) -> None:
        """Raise `InputError` unless they fit so many prompts and the model's vocabulary."""
        if len(self.positive) not in (1, n_prompts):
            raise InputError(
                f"expected answers in one row, or in {n_prompts} (one a prompt), got "
                f"{len(self.positive)}"
            )
        d_vocab = int(model.cfg.d_vocab)
        for ids in (self.positive, self.negative):
            if int(ids.min()) < 0 or int(ids.max()) >= d_vocab:
                raise InputError(
                    f"expected token ids from 0 to {d_vocab - 1}, got {int(ids.min())} to "
                    f"{int(ids.max())}"
                )

    def part(self, rows: Rows) -> "Answers":
        """Those of some prompts; the same ones where there is one row for all."""
        if len(self.positive) == 1:
            return self
        return Answers(self.positive[rows], self.negative[rows])

    def logit_difference(self, logits: Float[Tensor, "prompt vocab"]) -> Float[Tensor, " prompt"]:
        """Mean logit of the positive tokens minus mean logit of the negative ones, in logits."""
        positive, negative = (
            ids.to(logits.device).expand(len(logits), -1) for ids in (self.positive, self.negative)
        )
        return logits.gather(1, positive).mean(dim=1) - logits.gather(1, negative).mean(dim=1)

    def words(self, model: HookedModel) -> dict[str, list[str]]:
        """The tokens as text, of the first row."""
        return {
            side: [str(model.tokenizer.decode([token])) for token in ids[0].tolist()]
            for side, ids in (("positive", self.positive), ("negative", self.negative))
        }


@checked
def contrast_answers(
    model: HookedModel, pairs: ContrastivePairs, *, n_tokens: Count = 10
) -> Answers:
    """The tokens that the positive prompts make likelier than the negative ones, and the reverse.

    For a behaviour that is not named by answer tokens of its own: those with the largest and the
    smallest mean difference over the pairs of the log-probability after the last prompt token.

    Args:
        model: The model, unsteered.
        pairs: Other ones than are measured.
        n_tokens: How many on either side.

    Raises:
        InputError: `n_tokens` is below 1 or above half the vocabulary; and as `tokenize_pairs`.

    Examples:
        >>> from steerlens.circuits import contrast_answers
        >>> contrast_answers(model, pairs, n_tokens=3).positive.shape
        torch.Size([1, 3])
    """
    tokenized = tokenize_pairs(model, pairs)
    difference = _mean_logprobs(model, tokenized.positive)
    difference -= _mean_logprobs(model, tokenized.negative)
    if not 1 <= n_tokens <= len(difference) // 2:
        raise InputError(
            f"n_tokens is from 1 to half the vocabulary ({len(difference) // 2}), "
            f"not {told(n_tokens)}"
        )
    return Answers(*(side.topk(n_tokens).indices[None] for side in (difference, -difference)))


def _mean_logprobs(
    model: HookedModel, prompts: Sequence[TokenizedPrompt]
) -> Float[Tensor, " vocab"]:
    """Mean log-probabilities after the last prompt token, over prompts, on the CPU."""
    logits = []
    for rows in row_slices(len(prompts)):
        batch = make_prompts(model, prompts[rows])
        with inference(model):
            logits.append(batch.at_last(model(batch.tokens)).float().cpu())
    return torch.cat(logits).log_softmax(dim=-1).mean(dim=0)


@checked
def item_answers(model: HookedModel, items: PreferenceItems) -> tuple[Prompts, Answers]:
    """Items as prompts, with the first token of each continuation as answers.

    Raises:
        InputError: The two continuations of an item begin with the same token; and as
            `tokenize_prompt`.

    Examples:
        >>> from steerlens.circuits import item_answers
        >>> prompts, answers = item_answers(model, items)
        >>> len(prompts), answers.words(model)
        (6, {'positive': ['warm'], 'negative': ['so']})
    """
    sides = tokenize_items(model, items)
    positive, negative = (
        torch.tensor([[prompt.continuation[0]] for prompt in side]) for side in sides
    )
    for item, is_same in zip(items, (positive == negative).flatten().tolist(), strict=True):
        if is_same:
            raise InputError(
                f"both continuations of item {item.id!r} begin with the same token, so it has no "
                "answer logit difference; leave it out or reword it"
            )
    return make_prompts(model, sides[0]), Answers(positive, negative)
