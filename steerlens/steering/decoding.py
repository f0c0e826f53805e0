"""Many texts at once: rows of prompts and coefficients that share one cache of keys and values.

The prompt is run once for all rows that have it in common: up to the first steered block once, from
there once a coefficient where its tokens are steered, else once. Then every row adds its token in
one pass, and rows that have ended leave.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from itertools import groupby
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from steerlens.engine.backend import BareModel, for_hooks
from steerlens.engine.batches import padded
from steerlens.engine.continuations import end_tokens
from steerlens.engine.memory import free_bytes
from steerlens.engine.positions import parse_steered
from steerlens.engine.resume import Prefix, Residual, blocks_skipped, run_from
from steerlens.models import verification
from steerlens.models.hooked_model import (
    HookedModel,
    is_on_one_side,
    key_value_cache,
    last_logits_only,
    weight_module,
)
from steerlens.models.hooks import HookFunction, hooked, resid_post
from steerlens.models.loading import inference
from steerlens.models.tolerance import allowed_gap
from steerlens.steering.apply import Step, step_hooks
from steerlens.steering.cache_positions import POSITION_NAMES, Pass, Positions, replaced

ROWS = {"cpu": 128, "cuda": 1024}
"""Rows that run together at most where the caller gives no batch size, by device type."""

LEAVING = 8
"""Rows that have ended leave when they are one in so many: the cache is then copied."""

_proved: "weakref.WeakKeyDictionary[Any, dict[Any, bool]]" = weakref.WeakKeyDictionary()
"""Of a model, the kinds of batch that were looked at (see `is_proved`)."""


@dataclass(frozen=True)
class Row:
    """A text to be written: places of its prompt and of its coefficient, and its own seed."""

    prompt: int
    push: int
    seed: int | None


@dataclass(frozen=True, eq=False)
class Job:
    """What all rows share: ids of the prompts, each coefficient's steps, and where they act."""

    prompts: Sequence[tuple[int, ...]]
    pushes: Sequence[tuple[Step, ...]]
    positions: Positions
    max_new_tokens: int

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the steered tokens; "mask" where they are given as one."""
        if isinstance(self.positions, Tensor):
            return ("mask",)
        return tuple(term.name for term in parse_steered(self.positions, POSITION_NAMES))

    @property
    def ends(self) -> tuple[int, int]:
        """Tokens of the shortest prompt, and of the longest text."""
        lengths = [len(prompt) for prompt in self.prompts]
        return min(lengths), max(lengths) + self.max_new_tokens

    @property
    def in_prompt(self) -> bool:
        """Whether tokens before the prompt's last one may be steered."""
        return any(name in ("all", "prompt", "mask") for name in self.names)

    def is_steered(self, step: int) -> bool:
        """Whether the generated token `step` is steered."""
        return bool(self.mask([0], 1, step + 1)[0, -1])

    def mask(
        self, places: Sequence[int], width: int, n_after: int = 0
    ) -> Bool[Tensor, "row token"]:
        """The steered ones of prompts padded on the left to `width`, and of tokens after them."""
        positions = self.positions
        if isinstance(positions, Tensor):
            positions = positions[list(places), positions.shape[1] - width :]
        real = torch.ones((len(places), width + n_after), dtype=torch.bool)
        return Pass(0, width, real).mask(positions)


def can_decode(model: HookedModel, job: Job) -> bool:
    """Whether rows of different prompts and coefficients may share one cache.

    Not where a cache keeps more than keys and values, thinking decides what is steered, hooks of
    others are on the model, or it rotates short and long texts differently.
    """
    return (
        key_value_cache(model) is not None
        and verification.is_untouched(model)
        and not {"think", "answer"} & set(job.names)
        and is_on_one_side(model, *job.ends)
        and all(_proved.get(model, {}).values())
    )


def batches_of(job: Job, rows: Sequence[Row], size: int) -> Iterator[list[int]]:
    """Places of the rows that run together: by length, none twice as long as another."""
    lengths = [len(job.prompts[row.prompt]) for row in rows]
    places = sorted(range(len(rows)), key=lambda i: (lengths[i], rows[i].prompt, rows[i].push))
    batch: list[int] = []
    for place in places:
        if batch and (len(batch) == size or lengths[place] > 2 * lengths[batch[0]] + 16):
            yield batch
            batch = []
        batch.append(place)
    yield batch


def rows_at_once(model: HookedModel, job: Job) -> int:
    """How many rows keep the model's device busy and leave half of its free memory free."""
    cfg: Any = model.cfg
    device = torch.device(cfg.device or "cpu")
    most, free = ROWS.get(device.type, ROWS["cpu"]), free_bytes(device)
    if free is None:
        return most
    width = max(len(prompt) for prompt in job.prompts)
    heads = getattr(cfg, "n_key_value_heads", None) or cfg.n_heads
    # Adding a token copies the cache of a block; scores and hidden values are those of the prompt.
    kept = 3 * cfg.n_layers * heads * cfg.d_head * (width + job.max_new_tokens)
    scores = 3 * cfg.n_heads * width**2 + 4 * width * (getattr(cfg, "d_mlp", None) or cfg.d_model)
    each: int = cfg.dtype.itemsize * (kept + scores) + 16 * cfg.d_vocab
    return max(1, min(most, free // (2 * int(each))))


def decode(
    model: HookedModel, job: Job, rows: Sequence[Row], told: Callable[[int], None]
) -> list[tuple[list[int], bool]]:
    """The ids of each row, up to and with the token that ends it; whether its logits overflowed.

    In one batch. `told` is called with the tokens that were added after every pass.
    """
    names = dict.fromkeys(step.hook_name for push in job.pushes for step in push)
    runner = for_hooks(model, tuple(names), on_cpu=True)
    order = sorted(range(len(rows)), key=lambda i: (rows[i].push, rows[i].prompt))
    batch = _Batch(job, [rows[i] for i in order])
    with inference(model), hooked(runner, batch.hooks(tuple(names))):
        written = batch.run(runner, end_tokens(model), told)
    return [text for _, text in sorted(zip(order, written, strict=True), key=lambda pair: pair[0])]


def is_proved(
    model: HookedModel, job: Job, rows: Sequence[Row], written: Sequence[list[int]]
) -> bool:
    """Whether two rows are what the model writes when it runs each alone, without a cache.

    Looked at once a model and kind of batch (padded or not, of one coefficient or several, where
    and how it is steered): the row of the shortest prompt, which has most padding, under the last
    coefficient, and the last row. Warns where it is not so; up to rounding, each token must be the
    most likely one (with a seed, after the row's noise).
    """
    steps = [step for row in rows for step in job.pushes[row.push]]
    kind = (
        len({len(job.prompts[row.prompt]) for row in rows}) > 1,
        len({row.push for row in rows}) > 1,
        job.names,
        frozenset((step.hook_name, step.operator.name) for step in steps),
    )
    known = _proved.setdefault(model, {})
    if kind not in known:
        key = lambda i: (-len(job.prompts[rows[i].prompt]), rows[i].push)  # noqa: E731
        places = {max(range(len(rows)), key=key), len(rows) - 1}
        allowed = allowed_gap(model.cfg.dtype, least=1e-3)
        gaps = [_gap(model, job, rows[place], written[place]) for place in places]
        known[kind] = all(gap <= allowed for gap in gaps)
        if not known[kind]:
            warnings.warn(
                "texts written together are not those that the model writes one by one (a logit "
                f"is off by {max(gaps):.2g} of their size); they are written one coefficient at a "
                "time instead, which is slower",
                RuntimeWarning,
                stacklevel=3,
            )
    return known[kind]


def _gap(model: HookedModel, job: Job, row: Row, ids: Sequence[int]) -> float:
    """How far each id is from the likeliest in one pass over the whole text; the largest.

    In units of the root mean square of the centred logits.
    """
    prompt = job.prompts[row.prompt]
    n = len(prompt)
    tokens = torch.tensor([[*prompt, *ids[:-1]]], device=model.cfg.device)
    mask = job.mask([row.prompt], n, len(ids) - 1)
    with inference(model), hooked(model, step_hooks(job.pushes[row.push], mask=mask)):
        logits = model(tokens, return_type="logits")[0, n - 1 :].float()
    if not bool(logits.isfinite().all()):
        return 0.0  # the coefficient is too large for the model, however it is run
    size = (logits - logits.mean(dim=-1, keepdim=True)).square().mean().sqrt()
    noise = Noise([row.seed])
    scores = torch.cat([noise.onto(part, [row.seed]) for part in logits.split(1)])
    chosen = scores.gather(1, torch.tensor(ids, device=scores.device)[:, None])[:, 0]
    return float(((scores.amax(dim=-1) - chosen) / size).nan_to_num(nan=torch.inf).max())


class Noise:
    """Each seed's own generator, on the CPU: a draw a token, whatever other rows there are.

    A token drawn from the model's distribution is the likeliest after Gumbel noise is added to all
    logits. Rows of one seed share it, so two coefficients differ by no more than they must.
    """

    def __init__(self, seeds: Sequence[int | None]) -> None:
        self._generators = {
            seed: torch.Generator().manual_seed(seed) for seed in seeds if seed is not None
        }

    def onto(
        self, logits: Float[Tensor, "row vocab"], seeds: Sequence[int | None]
    ) -> Float[Tensor, "row vocab"]:
        """The logits with the next noise of each row's seed added (in place, if in float32)."""
        kept = {seed: i for i, seed in enumerate(dict.fromkeys(seeds)) if seed is not None}
        if not kept:
            return logits
        keys = [
            torch.randint(2**63 - 1, (1,), generator=self._generators[seed], device="cpu")
            for seed in kept
        ]
        noise = _gumbel(torch.cat(keys).to(logits.device), logits.shape[1])
        places = [kept[seed] for seed in seeds if seed is not None]
        return logits.float().add_(noise[torch.tensor(places, device=logits.device)])


def _gumbel(keys: Int[Tensor, " row"], n: int) -> Float[Tensor, "row {n}"]:
    """Standard Gumbel noise that each key stands for: the same numbers on every device.

    The bits are those of SplitMix64 from the key on; drawn one by one on the CPU, the noise of a
    large vocabulary would take longer than the model does on a GPU.
    """
    noise = torch.empty((len(keys), n), device=keys.device)
    counts = torch.arange(n, device=keys.device) * (0x9E3779B97F4A7C15 - 2**64)
    # On a CPU a row at a time stays in its cache.
    size = 1 if keys.device.type == "cpu" else len(keys)
    for part, of_part in zip(torch.split(noise, size), torch.split(keys, size), strict=True):
        x = of_part[:, None] + counts
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 2**64 + 1)):
            x ^= (x >> shift).bitwise_and_(2 ** (64 - shift) - 1)
            x *= factor - 2**64
        # In float64: in float32 no token below 1e-7 would ever be drawn.
        uniform = (x >> 12).bitwise_and_(2**52 - 1).double().add_(0.5).mul_(2.0**-52)
        part.copy_(uniform.log_().neg_().log_().neg_())
    return noise


@contextmanager
def drawing(model: HookedModel, seeds: Sequence[int | None]) -> Iterator[None]:
    """Inside, a greedy `generate` of rows with these seeds writes what is drawn with them."""
    if all(seed is None for seed in seeds):
        yield
        return
    noise, inner = Noise(seeds), weight_module(model)
    forward = inner.forward

    @wraps(forward, updated=())  # Hugging Face's generate looks at its parameters
    def drawn(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        logits = out if isinstance(out, Tensor) else out.logits
        chosen = noise.onto(logits[:, -1], seeds).argmax(dim=-1)
        logits[:, -1] = torch.nn.functional.one_hot(chosen, logits.shape[-1]).to(logits)
        return out

    with replaced(inner, "forward", drawn):
        yield


@dataclass
class _Batch:
    """Rows that are being written; those of one coefficient stand together."""

    job: Job
    rows: Sequence[Row]
    is_steered: bool = False
    mask: Bool[Tensor, "row token"] | None = None
    parts: Mapping[int, slice] = field(default_factory=dict)

    def hooks(self, names: Sequence[str]) -> list[tuple[str, HookFunction]]:
        """Hooks that act on each coefficient's rows with its own steps."""
        by_hook: dict[str, list[tuple[int, Step]]] = {name: [] for name in names}
        for push, acts in enumerate(self.job.pushes):
            for step in acts:
                by_hook[step.hook_name].append((push, step))

        def hook(of_hook: Sequence[tuple[int, Step]]) -> HookFunction:
            def act(activation: Tensor, hook: Any) -> Tensor | None:
                if not self.is_steered:
                    return None
                moved = activation.clone()
                for push, step in of_hook:
                    if push in self.parts:
                        part = self.parts[push]
                        acting = step.hook(self._chosen(part))
                        moved[part] = acting(activation[part], hook=hook)
                return moved

            return act

        return [(name, hook(of_hook)) for name, of_hook in by_hook.items()]

    def _chosen(self, part: slice) -> Any:
        mask = self.mask
        return None if mask is None else lambda activation, hook: mask[part]  # noqa: ARG005

    def run(
        self, model: Any, ends: frozenset[int], told: Callable[[int], None]
    ) -> list[tuple[list[int], bool]]:
        """What each row writes, and whether its logits overflowed."""
        job, rows = self.job, list(self.rows)
        written: list[list[int]] = [[] for _ in rows]
        live, overflowed = list(range(len(rows))), set[int]()
        noise = Noise([row.seed for row in rows])
        logits, mask, cache = self._prompts(model)
        left = len(rows) * job.max_new_tokens
        for step in range(job.max_new_tokens):
            # The largest, and so NaN and inf: a model may rule single tokens out with -inf.
            finite = logits.amax(dim=-1).isfinite().tolist()
            overflowed |= {
                i
                for i, ok in zip(live, finite, strict=True)
                if not ok and not (written[i] and written[i][-1] in ends)
            }
            chosen = noise.onto(logits, [rows[i].seed for i in live]).argmax(dim=-1)
            for i, token in zip(live, chosen.tolist(), strict=True):
                if not (written[i] and written[i][-1] in ends):
                    written[i].append(token)
            told(len(live))
            left -= len(live)
            going = [at for at, i in enumerate(live) if written[i][-1] not in ends]
            if not going or step == job.max_new_tokens - 1:
                break
            if (len(live) - len(going)) * LEAVING >= len(live):
                mask, chosen, live = mask[going], chosen[going], [live[i] for i in going]
                _keep(cache.layers, going)
            mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
            self._steer([rows[i].push for i in live], None, is_steered=job.is_steered(step))
            logits = _next_logits(model, chosen[:, None].to(mask.device), mask, cache)
        told(left)
        return [(ids, i in overflowed) for i, ids in enumerate(written)]

    def _steer(self, pushes: Sequence[int], mask: Tensor | None, *, is_steered: bool) -> None:
        """The next pass has rows of these coefficients, steered at `mask` or everywhere."""
        self.is_steered = is_steered
        self.mask = None if mask is None or bool(mask.all()) else mask
        places = groupby(range(len(pushes)), key=lambda i: pushes[i])
        self.parts = {push: slice((at := list(some))[0], at[-1] + 1) for push, some in places}

    def _prompts(self, model: Any) -> tuple[Tensor, Tensor, Any]:
        """Logits after every row's prompt, its mask, and the cache of all rows."""
        job, rows, device = self.job, self.rows, torch.device(model.cfg.device or "cpu")
        prompts = list(dict.fromkeys(row.prompt for row in rows))
        tokens, mask = padded([job.prompts[place] for place in prompts], "left", device=device)
        width = tokens.shape[1]
        n_shared = width - 1 if "last" in job.names and not job.in_prompt else width
        keys = [(row.push if job.in_prompt else 0, row.prompt) for row in rows]
        distinct = list(dict.fromkeys(keys))
        at = [prompts.index(prompt) for _, prompt in distinct]
        lower, start = self._below(model, tokens, mask, at)
        tokens, mask, cache, logits = tokens[at], mask[at], key_value_cache(model), None
        if n_shared:
            with blocks_skipped(model, start):
                self._steer(
                    [push for push, _ in distinct],
                    job.mask([prompt for _, prompt in distinct], width),
                    is_steered=job.in_prompt,
                )
                logits = _next_logits(model, tokens[:, :n_shared], mask[:, :n_shared], cache)
            cache.layers[: len(lower)] = lower
        if keys != distinct:
            which = {key: place for place, key in enumerate(distinct)}
            at = [which[key] for key in keys]
            _keep(cache.layers, at)
            tokens, mask = tokens[at], mask[at]
            logits = None if logits is None else logits[at]
        if n_shared < width:
            self._steer([row.push for row in rows], None, is_steered=True)
            logits = _next_logits(model, tokens[:, n_shared:], mask, cache)
        assert logits is not None
        return logits, mask, cache

    def _below(
        self,
        model: Any,
        tokens: Int[Tensor, "prompt token"],
        mask: Bool[Tensor, "prompt token"],
        at: Sequence[int],
    ) -> tuple[Sequence[Any], Residual | None]:
        """What is the same for all coefficients, each prompt run once: for the prompts `at`.

        The cache of the blocks up to the first steered one, and its output; nothing where no prompt
        comes twice, something inside a block is steered, or a Bridge runs: its hook is in the block
        that stands aside, and would not steer.
        """
        outputs = [resid_post(i) for i in range(int(model.cfg.n_layers))]
        names = {step.hook_name for push in self.job.pushes for step in push}
        is_whole = len(at) == len(tokens) or not isinstance(model, BareModel)
        if is_whole or not names or not names <= {*outputs}:
            return (), None
        cache, first = key_value_cache(model), min(map(outputs.index, names))
        prefix = Prefix(cache, mask[:, :0])
        values = run_from(model, tokens, mask, prefix=prefix, last_hook=outputs[first])
        lower = cache.layers[: first + 1]
        _keep(lower, at)
        return lower, Residual(first + 1, values[at])


def _keep(layers: Sequence[Any], rows: Sequence[int]) -> None:
    """Leave these rows in the cache, in that order; its blocks may lie on several devices."""
    for layer in layers:
        if layer.get_seq_length() and layer.is_initialized:
            layer.batch_select_indices(torch.tensor(rows, device=layer.keys.device))


def _next_logits(
    model: Any, tokens: Int[Tensor, "row token"], mask: Bool[Tensor, "row column"], cache: Any
) -> Float[Tensor, "row vocab"]:
    """Logits after the last of `tokens`, which are added to the cache."""
    logits = model(
        tokens,
        return_type="logits",
        attention_mask=mask.long(),
        past_key_values=cache,
        **last_logits_only(model),
    )
    last: Tensor = logits[:, -1]
    return last
