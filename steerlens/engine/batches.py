"""Tokenized prompts in length-sorted, padded batches: which tokens are labels, which steered."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from steerlens.engine.positions import Position, parse_position
from steerlens.engine.tokenization import SteeredPositions, TokenizedPairs, TokenizedPrompt
from steerlens.engine.transfer import to_device
from steerlens.errors import InputError
from steerlens.models.hooked_model import HookedModel, side_of_switches

PaddingSide = Literal["left", "right"]


Places: TypeAlias = (
    Int[Tensor, " prompt"] | Float[Tensor, "prompt token"] | Bool[Tensor, "prompt token"]
)
"""Where rows are read: one column each, the weights of a mean over tokens, or the tokens of which
the largest number of each coordinate is taken."""

Mask: TypeAlias = Bool[Tensor, "row token"] | Int[Tensor, "row token"]
"""Which tokens are real; or of `Branches` what they are of: 0 padding, 1 prompt, from 2 on a text
after it."""

MAX_PADDING = 0.1
"""The largest share of a batch that may be padding."""


TOKENS_PER_PASS = {"cpu": 1024, "cuda": 16384}
"""Tokens in one pass where the caller gives no batch size, by device type: more of them run no
faster and only take memory."""


PASSES_PER_BLOCK = 8
"""How many passes the pairs of a block take at one coefficient, at least: with fewer, batches would
hold more padding; with more, more states would be held at once."""


@dataclass(frozen=True)
class Batch:
    """Prompts padded to one length. `rows` are their places in the list they came from.

    The first `n_before` tokens of each prompt, 0 unless given, come before the batch (see
    `make_split_batches`).
    """

    rows: tuple[int, ...]
    prompts: tuple[TokenizedPrompt, ...]
    tokens: Int[Tensor, "prompt token"]
    attention_mask: Mask
    n_before: tuple[int, ...] = ()

    @property
    def forward_kwargs(self) -> dict[str, Any]:
        """The attention mask for the model's forward pass; none where nothing is padded."""
        return mask_kwargs(self.attention_mask)

    def places(self, position: Position) -> Places:
        """Where each row is read: its column, or what its tokens count (see `Places`).

        Raises `InputError` where a prompt has no such token.
        """
        reduction = parse_position(position).reduction
        columns = [
            [start + index for index in prompt.places(position)]
            for start, prompt in zip(self._starts, self.prompts, strict=True)
        ]
        if reduction == "last":
            return torch.tensor([column for (column,) in columns])
        mask = torch.zeros(self.attention_mask.shape, dtype=torch.bool)
        for row, of_row in enumerate(columns):
            mask[row, of_row] = True
        return mask if reduction == "max" else mask / mask.sum(dim=1, keepdim=True)

    def halves(self) -> tuple["Batch", ...]:
        """The first and the second half of its prompts; itself when there is one prompt."""
        middle = len(self.rows) // 2
        parts = (slice(0, middle), slice(middle, None)) if middle else (slice(None),)
        return tuple(self._part(part) for part in parts)

    def row(self, index: int) -> "Batch":
        """One of its prompts alone, as padded as it is."""
        return self._part(slice(index, index + 1))

    def ends(self) -> "Batch":
        """Its first and its last prompt, as padded as they are; itself when there is one."""
        return self._part(slice(None, None, max(1, len(self.rows) - 1)))

    def _part(self, part: slice) -> "Batch":
        return Batch(
            self.rows[part],
            self.prompts[part],
            self.tokens[part],
            self.attention_mask[part],
            self.n_before[part],
        )

    def label_mask(self) -> Bool[Tensor, "prompt token"]:
        """True at the label tokens (see `TokenizedPrompt`)."""
        return self._mask("labels")[1]

    def labels_on_cpu(self) -> Bool[Tensor, "prompt token"]:
        """`label_mask` on the CPU, wherever the batch is."""
        return self._mask("labels")[0]

    def labels_by_row(
        self, prompts: Int[Tensor, " prompt"] | slice = slice(None)
    ) -> Bool[Tensor, "row token"]:
        """`label_mask` of some prompts (all), apart for each of their rows."""
        return self.label_mask()[prompts]

    def predicted_mask(self) -> Bool[Tensor, "prompt token"]:
        """True at the tokens that others come before: all real ones but each prompt's first."""
        return self._mask("predicted")[1]

    def steered_mask(self, positions: SteeredPositions) -> Bool[Tensor, "prompt token"]:
        """True at the real tokens that an intervention touches."""
        return self._mask(positions)[1]

    @cached_property
    def is_whole(self) -> Bool[Tensor, " prompt"]:
        """Which rows hold no padding, on the CPU."""
        return self.attention_mask.all(dim=1).cpu()

    def _mask(self, name: str) -> tuple[Tensor, Tensor]:
        """A mask on the CPU and on the batch's device, made once: not to be written to."""
        if name not in self._masks:
            # Kept, so it must not be an inference tensor, which gradients cannot be taken through.
            with torch.inference_mode(mode=False):
                mask = torch.zeros(self.attention_mask.shape, dtype=torch.bool)
                for row, (start, prompt) in enumerate(zip(self._starts, self.prompts, strict=True)):
                    columns = [start + index for index in self._indices(name, prompt)]
                    mask[row, [column for column in columns if column >= 0]] = True
                self._masks[name] = mask, to_device(mask, self.attention_mask.device)
        return self._masks[name]

    @staticmethod
    def _indices(name: str, prompt: TokenizedPrompt) -> Sequence[int]:
        """Of a prompt's tokens those that a mask of that name marks."""
        if name == "labels":
            return prompt.label_tokens
        return range(1, len(prompt)) if name == "predicted" else prompt.steered(name)

    @cached_property
    def _masks(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def _starts(self) -> list[int]:
        """The column of each prompt's first token; below 0 when it is not in the batch."""
        starts = self.attention_mask.bool().int().argmax(dim=1).tolist()
        n_before = self.n_before or (0,) * len(starts)
        return [start - before for start, before in zip(starts, n_before, strict=True)]


def mask_kwargs(attention_mask: Bool[Tensor, "row token"]) -> dict[str, Any]:
    """The keyword of the model's forward pass for a mask; none where nothing is masked."""
    return {} if bool(attention_mask.all()) else {"attention_mask": attention_mask.long()}


def before_labels(labels: Bool[Tensor, "row token"], device: torch.device) -> Int[Tensor, " label"]:
    """Places, in the rows end to end, of the tokens before the labels, on `device`.

    `labels` is on the CPU: a mask on a GPU would have to be counted first, and waited for.
    """
    row, column = labels[:, 1:].nonzero(as_tuple=True)
    return to_device(row * labels.shape[1] + column, device)


def in_pair_order(
    batches: Sequence[Batch], values: Sequence[Shaped[Tensor, "..."]], *, dim: int = 1
) -> Shaped[Tensor, "..."]:
    """Values of the rows of one batch after another, joined along `dim` in the pairs' order."""
    rows = torch.tensor([row for batch in batches for row in batch.rows])
    places = torch.empty_like(rows)
    places[rows.argsort()] = torch.arange(len(rows))
    shape = list(values[0].shape)
    shape[dim] = len(rows)
    joined = values[0].new_empty(shape)
    of_batch = torch.split(places, [len(batch.rows) for batch in batches])
    for at, some in zip(of_batch, values, strict=True):
        joined.index_copy_(dim, at, some)
    return joined


def in_row_order(batches: Sequence[Batch]) -> list[TokenizedPrompt]:
    """The prompts of all batches, as they were before they were sorted by length."""
    prompts = {row: p for b in batches for row, p in zip(b.rows, b.prompts, strict=True)}
    return [prompts[row] for row in sorted(prompts)]


def make_batches(
    model: HookedModel, prompts: Sequence[TokenizedPrompt], batch_size: int | None
) -> tuple[Batch, ...]:
    """Length-sorted batches, padded on the side the model's tokenizer pads.

    A batch holds at most `batch_size` prompts (`rows_per_pass` without one) and at most a tenth of
    padding. Raises `InputError` when `batch_size` is below 1.
    """
    lengths = [(len(prompt),) for prompt in prompts]
    groups = length_groups(lengths, model, batch_size)
    return tuple(_batch(model, prompts, rows) for rows in groups)


def block_rows(
    model: HookedModel, pairs: TokenizedPairs, batch_size: int | None
) -> tuple[tuple[int, ...], ...]:
    """The rows of pairs in blocks of like length, of `PASSES_PER_BLOCK` to twice as many passes.

    One block where there are fewer; there may be no negative side.
    """
    sides = [side for side in (pairs.positive, pairs.negative) if side]
    lengths = [sum(map(len, prompts)) for prompts in zip(*sides, strict=True)]
    widths = [-(-length // len(sides)) for length in lengths]
    passes = [len(sides) / max(batch_size or 0, rows_per_pass(model, w)) for w in widths]
    n_blocks = max(1, int(sum(passes) / PASSES_PER_BLOCK))
    blocks: list[list[int]] = [[]]
    before = 0.0
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        if before >= sum(passes) * len(blocks) / n_blocks:
            blocks.append([])
        blocks[-1].append(row)
        before += passes[row]
    return tuple(tuple(sorted(rows)) for rows in blocks)


def make_split_batches(
    model: HookedModel, prompts: Sequence[TokenizedPrompt], batch_size: int | None
) -> tuple[tuple[Batch, Batch], ...]:
    """Batches in two parts: all prompt tokens but the last; and that one with the continuation.

    The first part is padded on the left and the second on the right, so that the parts joined are
    whole prompts; neither holds more than a tenth of padding. Every prompt must have two tokens.
    """
    n_before = [len(prompt.prompt) - 1 for prompt in prompts]
    lengths = [(len(p) - n, n) for p, n in zip(prompts, n_before, strict=True)]
    batches = []
    whole = [(len(p),) for p in prompts]
    for rows in length_groups(lengths, model, batch_size, whole):
        of, cuts = tuple(prompts[row] for row in rows), tuple(n_before[row] for row in rows)
        ids = [prompt.ids for prompt in of]
        heads = [tokens[:n] for tokens, n in zip(ids, cuts, strict=True)]
        tails = [tokens[n:] for tokens, n in zip(ids, cuts, strict=True)]
        batches.append(
            (
                Batch(rows, of, *padded(heads, "left", device=_device(model))),
                Batch(rows, of, *padded(tails, "right", device=_device(model)), cuts),
            )
        )
    return tuple(batches)


def make_pair_batches(
    model: HookedModel, pairs: TokenizedPairs, batch_size: int | None
) -> tuple[tuple[Batch, Batch], ...]:
    """Batches of positive prompts, each with the batch of the same pairs' negative ones.

    As `make_batches`, with at most a tenth of padding on either side of the pairs.
    """
    sides = (pairs.positive, pairs.negative)
    lengths = [(len(pos), len(neg)) for pos, neg in zip(*sides, strict=True)]
    batches = []
    for rows in length_groups(lengths, model, batch_size):
        positive, negative = (_batch(model, side, rows) for side in sides)
        batches.append((positive, negative))
    return tuple(batches)


def join(model: HookedModel, batches: Sequence[Batch]) -> Batch:
    """The prompts of all batches, one batch after another, padded to one length."""
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    return _batch(model, prompts, tuple(range(len(prompts))))


def _batch(model: HookedModel, prompts: Sequence[TokenizedPrompt], rows: tuple[int, ...]) -> Batch:
    """Some of the prompts, padded on the side the model's tokenizer pads."""
    side: PaddingSide = getattr(model.tokenizer, "padding_side", "right")
    of = tuple(prompts[row] for row in rows)
    ids = [prompt.ids for prompt in of]
    return Batch(rows, of, *padded(ids, side, device=_device(model)))


def length_groups(
    lengths: Sequence[tuple[int, ...]],
    model: HookedModel,
    batch_size: int | None,
    whole: Sequence[tuple[int, ...]] | None = None,
) -> list[tuple[int, ...]]:
    """Rows by length, no part padded by over a tenth, `whole` on one side of switches."""
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    groups: list[list[int]] = []
    sides = [tuple(side_of_switches(model, length) for length in of) for of in whole or lengths]
    for row in sorted(range(len(lengths)), key=lambda row: (sides[row], lengths[row])):
        grown = [*groups[-1], row] if groups else [row]
        parts = list(zip(*(lengths[i] for i in grown), strict=True))
        widths = [max(part) for part in parts]
        is_padded = any(
            len(grown) * width - sum(part) > MAX_PADDING * len(grown) * width
            for part, width in zip(parts, widths, strict=True)
        )
        is_full = len(grown) > (batch_size or rows_per_pass(model, max(widths)))
        if not groups or is_padded or is_full or sides[row] != sides[groups[-1][0]]:
            groups.append([row])
        else:
            groups[-1] = grown
    return [tuple(group) for group in groups]


def _device(model: HookedModel) -> torch.device | None:
    return torch.device(model.cfg.device) if model.cfg.device else None


def rows_per_pass(model: HookedModel, width: int) -> int:
    """How many rows of `width` tokens keep the model's device busy (see `TOKENS_PER_PASS`)."""
    device = _device(model)
    kind = "cpu" if device is None else device.type
    return max(1, TOKENS_PER_PASS.get(kind, TOKENS_PER_PASS["cpu"]) // width)


def padded(
    ids: Sequence[tuple[int, ...]],
    side: PaddingSide,
    *,
    pad_id: int = 0,
    device: torch.device | None,
) -> tuple[Int[Tensor, "prompt token"], Bool[Tensor, "prompt token"]]:
    """Ids padded to one length, and the mask that is True at the real ones.

    What padding is written as matters only to a model that takes no mask: 0 is in any vocabulary.
    """
    rows = [torch.tensor(row) for row in ids]
    tokens = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side=side)
    real = [torch.ones(len(row), dtype=torch.bool) for row in ids]
    mask = pad_sequence(real, batch_first=True, padding_side=side)
    return tokens.to(device), mask.to(device)
