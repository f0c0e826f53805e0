"""The shared work of all contenders, and the worker loop that runs it.

A worker is run by the Python of its own environment, so nothing but torch and numpy is imported.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Positions = Literal["all", "continuation"]
Side = Literal["left", "right"]
Command = dict[str, Any]
Cell = tuple[int, float]

READOUT_DEPTH = 3  # an effect is read at the third block from the end, or at the hook if later


@dataclass(frozen=True)
class Work:
    """What every contender is given; token ids, so that tokenisers cannot differ."""

    model_folder: str
    directions_file: str
    n_layers: int
    pad_id: int
    batch_size: int
    continuation: str
    continuation_ids: list[int]
    positive: list[list[int]]
    negative: list[list[int]]
    extract_texts: list[list[str]]
    extract_positive: list[list[int]]
    extract_negative: list[list[int]]
    layers: list[int]
    coefficients: list[float]
    sampled_cells: list[Cell]

    @classmethod
    def read(cls, path: Path) -> "Work":
        """The work in a JSON file, as `write` left it."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        """Into a JSON file."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def directions(self) -> Tensor:
        """Unit directions `[layer, d_model]`."""
        return torch.from_numpy(np.load(self.directions_file)).float()

    def readout(self, layer: int) -> int:
        """The block whose output shows the effect of a push at `layer`."""
        return max(layer, self.n_layers - READOUT_DEPTH)


@dataclass(frozen=True)
class Padded:
    """Prompts of one length; `last` is the column of each row's last prompt token."""

    tokens: Tensor
    mask: Tensor
    last: Tensor
    n_labels: int

    @property
    def rows(self) -> Tensor:
        """Row numbers, to index with beside `last`."""
        return torch.arange(len(self.tokens))

    @property
    def predictors(self) -> Tensor:
        """Columns `[row, label]` whose logits predict the continuation: one before each label."""
        return self.last[:, None] + torch.arange(self.n_labels)

    def pick_labels(self, logits: Tensor) -> Tensor:
        """Each row's own `predictors` out of the logits at all positions."""
        return logits[self.rows[:, None], self.predictors]

    @property
    def labels(self) -> Tensor:
        """The continuation's ids `[row, label]`."""
        return self.tokens.gather(1, self.predictors + 1)

    @property
    def position_ids(self) -> Tensor:
        """Positions counted from each row's first real token; 1 at padding on the left."""
        return (self.mask.cumsum(1) - 1).masked_fill(self.mask == 0, 1)

    def continuation_mask(self) -> Tensor:
        """1 at the continuation's tokens, 0 elsewhere: `[row, token]`, float."""
        columns = torch.arange(self.tokens.shape[1])[None]
        last = self.last[:, None]
        return ((columns > last) & (columns <= last + self.n_labels)).float()


def pad(
    prompts: Sequence[list[int]],
    *,
    continuation: Sequence[int] = (),
    side: Side = "right",
    pad_id: int,
    size: int,
) -> list[Padded]:
    """Batches of `size` prompts, each followed by the continuation."""
    batches = []
    for start in range(0, len(prompts), size):
        rows = [[*prompt, *continuation] for prompt in prompts[start : start + size]]
        width = max(len(row) for row in rows)
        tokens = torch.full((len(rows), width), pad_id)
        mask = torch.zeros((len(rows), width), dtype=torch.long)
        ends = []
        for i, row in enumerate(rows):
            first = width - len(row) if side == "left" else 0
            tokens[i, first : first + len(row)] = torch.tensor(row)
            mask[i, first : first + len(row)] = 1
            ends.append(first + len(row) - len(continuation) - 1)
        batches.append(Padded(tokens, mask, torch.tensor(ends), len(continuation)))
    return batches


@dataclass(frozen=True)
class Push:
    """`coefficient * direction` added to block `layer`'s output, and the block to read after.

    `mask` (`[row, token]`) says at which tokens; None is all of them. Padding on the right may be
    steered too: no real token looks at it.
    """

    layer: int
    coefficient: float
    direction: Tensor
    readout: int
    mask: Tensor | None = None

    @property
    def step(self) -> Tensor:
        """What is added to the block's output, ready to broadcast."""
        step = self.coefficient * self.direction
        return step if self.mask is None else self.mask[..., None] * step


class PlainLoop:
    """A contender that runs whole forward passes, cell by cell. A peer fills in the blanks."""

    side: Side = "right"
    positions: tuple[Positions, ...] = ("all", "continuation")

    def __init__(self, work: Work) -> None:
        self.work = work
        self.directions = work.directions()
        self.load(work.model_folder)

    def load(self, folder: str) -> None:
        """Load the model."""
        raise NotImplementedError

    def run(self, batch: Padded, push: Push, *, wants_logits: bool) -> tuple[Tensor, Tensor | None]:
        """States `[row, d_model]` at the readout's last prompt token, logits `[row, label, id]`."""
        raise NotImplementedError

    def all_layers(self, batch: Padded) -> Tensor:
        """Block outputs `[layer, row, d_model]` at the last prompt token."""
        raise NotImplementedError

    def differences(self, n_pairs: int) -> dict[int, Tensor]:
        """Layer -> differences `[pair, d_model]` at the last prompt token, the tool's own way."""
        sides = [
            torch.cat([self.all_layers(batch) for batch in self.batches(prompts[:n_pairs])], dim=1)
            for prompts in (self.work.extract_positive, self.work.extract_negative)
        ]
        return dict(enumerate(sides[0] - sides[1]))

    def batches(self, prompts: list[list[int]], continuation: Sequence[int] = ()) -> list[Padded]:
        """Prompts padded as this tool wants them."""
        return pad(
            prompts,
            continuation=continuation,
            side=self.side,
            pad_id=self.work.pad_id,
            size=self.work.batch_size,
        )

    @torch.no_grad()
    def cells(self, command: Command) -> dict[str, Any]:
        """Seconds and `[projection, logprob]` of every cell.

        `fixed_seconds` is the part that does not grow with the number of cells.
        """
        positions: Positions = command["positions"]
        if positions not in self.positions:
            return {"unsupported": f"no control of the steered tokens: {positions}"}
        started = time.perf_counter()
        positive = self.batches(self.work.positive, self.work.continuation_ids)
        negative = self.batches(self.work.negative)
        masks = [b.continuation_mask() if positions == "continuation" else None for b in positive]
        untouched: dict[int, Tensor] = {}
        if positions == "continuation":
            # Nothing before the continuation is steered, so the negative side, which has none, is
            # the same in every cell: nobody would run it more than once for each readout.
            for readout in {self.work.readout(layer) for layer, _ in command["cells"]}:
                still = self._push(readout, 0.0)
                untouched[readout] = self._read(negative, still, [None] * len(negative))[0]
        fixed = time.perf_counter() - started
        results = []
        for layer, coefficient in command["cells"]:
            push = self._push(layer, coefficient)
            states, logprob = self._read(positive, push, masks, wants_logits=True)
            if positions == "continuation":
                others = untouched[push.readout]
            else:
                opposite = self._push(layer, -coefficient)
                others = self._read(negative, opposite, [None] * len(negative))[0]
            unit = self.directions[push.readout]
            results.append([float(((states - others) @ unit).mean()), float(logprob.mean())])
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "fixed_seconds": fixed, "results": results}

    @torch.no_grad()
    def extract(self, command: Command) -> dict[str, Any]:
        """Seconds of taking differences, and their mean projections for comparison."""
        started = time.perf_counter()
        found = self.differences(command["n_pairs"])
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "projections": self.mean_projections(found)}

    def mean_projections(self, differences: dict[int, Tensor]) -> list[float | None]:
        """Layer by layer; None where the tool gives no block output."""
        return [
            float((differences[i] @ self.directions[i]).mean()) if i in differences else None
            for i in range(self.work.n_layers)
        ]

    def _push(self, layer: int, coefficient: float) -> Push:
        return Push(layer, coefficient, self.directions[layer], self.work.readout(layer))

    def _read(
        self,
        batches: Sequence[Padded],
        push: Push,
        masks: Sequence[Tensor | None],
        *,
        wants_logits: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """States `[row, d_model]` of all batches, and each row's mean label logprob."""
        states, logprobs = [], []
        for batch, mask in zip(batches, masks, strict=True):
            here = Push(push.layer, push.coefficient, push.direction, push.readout, mask)
            state, logits = self.run(batch, here, wants_logits=wants_logits)
            states.append(state)
            if logits is not None:
                logprobs.append(mean_logprob(logits, batch.labels))
        return torch.cat(states), torch.cat(logprobs) if logprobs else torch.empty(0)


@contextmanager
def hooked(layers: Any, hooks: Mapping[int, Callable[[Any], Any]]) -> Iterator[None]:
    """Forward hooks on blocks inside the block: each is given an output, and may give another."""
    handles = [
        layers[i].register_forward_hook(lambda module, args, out, hook=hook: hook(out))
        for i, hook in hooks.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def time_forward(
    work: Work,
    command: Command,
    batches: Callable[..., list[Padded]],
    base: Callable[[Padded], object],
) -> dict[str, Any]:
    """Seconds of one bare forward pass without logits, side by side: the floor's rate."""
    positive, negative, continuation = work.positive, work.negative, work.continuation_ids
    if command.get("extract"):
        positive, negative, continuation = work.extract_positive, work.extract_negative, []
    seconds = {}
    for side, prompts, after in (
        ("positive", positive, continuation),
        ("negative", negative, []),
    ):
        padded = batches(prompts[: command["n_pairs"]], after)
        started = time.perf_counter()
        for batch in padded:
            base(batch)
        seconds[side] = time.perf_counter() - started
    return {"seconds": sum(seconds.values()), **seconds}


def mean_logprob(logits: Tensor, labels: Tensor) -> Tensor:
    """Each row's mean log-probability of its labels, nats per token."""
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), reduction="none"
    )
    return -nats.reshape(labels.shape).mean(1)


def memory(command: Command) -> dict[str, Any]:
    """Peak resident memory in MB since the last `reset`, and the memory at this moment."""
    now, peak = _resident_mb()
    if command.get("reset"):
        # Loading a model may take more than keeping it. On Linux the high-water mark can be reset.
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return {"peak_mb": peak, "now_mb": now, "was_reset": False}
        now, peak = _resident_mb()
    return {"peak_mb": peak, "now_mb": now, "was_reset": bool(command.get("reset"))}


def _resident_mb() -> tuple[float, float]:
    """Now and at the peak. `getrusage` would also count the parent that this process came from."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        return tuple(int(fields[key].split()[0]) / 1024 for key in ("VmRSS", "VmHWM"))  # type: ignore[return-value]
    except (OSError, KeyError):
        unit = 2**20 if sys.platform == "darwin" else 2**10
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
        return peak, peak


def _versions() -> dict[str, str]:
    """The versions in this environment of what could matter."""
    names = ("torch", "numpy", "transformers", "transformer-lens", "steering-vectors")
    found = {}
    for name in (*names, "repeng", "nnsight"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def serve(make: Callable[[Work], Any]) -> None:
    """Answer JSON commands on stdin, one a line, with JSON lines on stdout, until "quit".

    Usage of every worker: `python peer_X.py WORK.json THREADS`.
    """
    # Tools print to stdout as they like; the answers go to a copy of it that only we know.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    torch.set_num_threads(int(sys.argv[2]))
    contender = make(Work.read(Path(sys.argv[1])))
    print(json.dumps({"versions": _versions()}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["op"] == "quit":
            return
        answer = memory(command) if command["op"] == "memory" else None
        if answer is None:
            answer = getattr(contender, command["op"])(command)
        print(json.dumps(answer), file=answers, flush=True)
