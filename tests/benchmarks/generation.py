"""Texts of prompts x coefficients: written together, by a loop of another tool, and unsteered.

    python tests/benchmarks/generation.py [--rounds 3] [--prompts 16] [--tokens 40] [--threads 2]

8 coefficients at one layer of the default model, greedy. The loop is that of steering-vectors' (and
of repeng's) documentation: a coefficient and a prompt at a time, Hugging Face's `generate` under
the tool. Its cells all cost the same, so some are timed and scaled. "unsteered" is Hugging Face's
own `generate` of as many rows in one batch, padded on the left. Rounds are interleaved; medians,
and medians of the rounds' ratios. Some 5 minutes on two quiet cores. `on_gpu` is the part
"generation" of gpu.py: the same at a 7B shape, and the loop under one forward hook.
"""

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from gpu_shapes import timed
from report import header
from work import hooked

import steerlens as sl
from steerlens.data import open_questions
from steerlens.engine.backend import for_hooks
from steerlens.engine.batches import padded
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_prompt
from steerlens.models import verification
from steerlens.models.hooks import resid_post
from steerlens.steering import generate_texts

LAYER = 15
COEFFICIENTS = (-20.0, -15.0, -10.0, -5.0, 5.0, 10.0, 15.0, 20.0)
WAYS = ("all", "generated")


@dataclass(frozen=True)
class Writing:
    """What is written: after some prompts, steered along `unit` at a layer's output; greedy."""

    model: Any
    layer: int
    unit: torch.Tensor
    prompts: Sequence[TokenizedPrompt]
    tokens: int

    def together(self, positions: str, n_prompts: int | None = None) -> list[Any]:
        """All prompts and coefficients by steerlens, in one batch."""
        prompts = self.prompts[:n_prompts]
        return generate_texts(
            *(self.model, prompts, {resid_post(self.layer): self.unit}, COEFFICIENTS),
            max_new_tokens=self.tokens if n_prompts is None else 2,
            positions=positions,
            batch_size=len(prompts) * len(COEFFICIENTS),
        )

    def unsteered(self, plain: Any) -> torch.Tensor:
        """As many rows by Hugging Face's own `generate`."""
        rows = [prompt.prompt for prompt in self.prompts for _ in COEFFICIENTS]
        ids, mask = padded(rows, "left", device=self.model.cfg.device)
        written: torch.Tensor = plain.generate(ids, attention_mask=mask.long(), **self._greedy)
        return written

    def loop(
        self, plain: Any, n_cells: int, under: Callable[[float], AbstractContextManager[Any]]
    ) -> list[list[int]]:
        """Some prompts and coefficients one by one, under another tool."""
        written = []
        for i in range(n_cells):
            prompt = self.prompts[i % len(self.prompts)].prompt
            ids = torch.tensor([prompt], device=self.model.cfg.device)
            with under(COEFFICIENTS[-1 - 2 * i % len(COEFFICIENTS)]):
                out = plain.generate(ids, attention_mask=torch.ones_like(ids), **self._greedy)
            written.append(out[0, len(prompt) :].tolist())
        return written

    @property
    def n_rows(self) -> int:
        """Texts in all."""
        return len(self.prompts) * len(COEFFICIENTS)

    @property
    def _greedy(self) -> dict[str, Any]:
        pad = self.model.tokenizer.pad_token_id
        return {"max_new_tokens": self.tokens, "do_sample": False, "pad_token_id": pad}


Way = tuple[Callable[[], object], float]


def ways_of(
    writing: Writing, plain: Any, loop: str, n_cells: int, under: Callable[[float], Any]
) -> dict[str, Way]:
    """What is timed, and how often it is counted; both of steerlens's were run once, if briefly."""
    for positions in WAYS:  # the first of a model and kind of batch is looked at
        writing.together(positions, n_prompts=2)
    return {
        "steerlens, all tokens steered": (lambda: writing.together("all"), 1),
        "steerlens, the generated tokens": (lambda: writing.together("generated"), 1),
        "unsteered, one batch": (lambda: writing.unsteered(plain), 1),
        loop: (lambda: writing.loop(plain, n_cells, under), writing.n_rows / n_cells),
    }


@torch.no_grad()
def seconds_of(ways: dict[str, Way], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each way in each round, interleaved."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (run, times) in ways.items():
            seconds[name].append(times * timed(run, device))
            print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    return seconds


def times(of: Sequence[float], ours: Sequence[float]) -> float:
    """How many times as long as ours: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(of, ours, strict=True))


def on_gpu(session: Any) -> None:
    """8 prompts x 8 coefficients x 40 tokens at the 7B shape; 2 cells of the loop are run."""
    model = session.model("Llama 7B")
    bare: Any = for_hooks(model, [], on_cpu=True)
    plain, blocks = bare.original_model, bare.blocks
    draw, layer = random.Random(3), int(model.cfg.n_layers) // 2
    lengths = (5, 9) if session.quick else (17, 21, 25, 29, 33, 37, 41, 48)
    prompts = [
        TokenizedPrompt((1, *(draw.randrange(4, 204) for _ in range(n - 1))), (), f"{i}")
        for i, n in enumerate(lengths)
    ]
    unit = torch.randn(int(model.cfg.d_model), generator=torch.Generator().manual_seed(2))
    # Residuals of random weights are short: at this length the coefficients change the texts.
    unit = (unit / unit.norm() / 20).to(model.cfg.device)
    writing = Writing(model, layer, unit, prompts, 4 if session.quick else 40)

    def under(coefficient: float) -> AbstractContextManager[None]:
        def add(out: Any) -> Any:
            step = (coefficient * unit).to(torch.bfloat16)
            return out + step if isinstance(out, torch.Tensor) else (out[0] + step, *out[1:])

        return hooked(blocks, {layer: add})

    ways = ways_of(writing, plain, "a loop under a hook", 2, under)
    peaks = {}
    for name, (run, _) in ways.items():
        session.peak_gb()
        first = timed(run, session.device)
        peaks[name] = session.peak_gb()
        session.row("generation", f"{name}, first run", s=first, peak_gb=peaks[name])
    seconds = seconds_of(ways, 1 if session.quick else 3, session.device)
    loop, unsteered = seconds["a loop under a hook"], seconds["unsteered, one batch"]
    for name, taken in seconds.items():
        session.row(
            "generation",
            f"Llama 7B, {writing.n_rows} rows x {writing.tokens} tokens, {name}",
            s=statistics.median(taken),
            min_s=min(taken),
            max_s=max(taken),
            x_plain=times(loop, taken),
            x_unsteered=times(unsteered, taken),
            peak_gb=peaks[name],
        )
    texts = {(text.prompt, text.coefficient): text.ids for text in writing.together("all")}
    for i, ids in enumerate(writing.loop(plain, 2, under)):
        text = texts[i, COEFFICIENTS[-1 - 2 * i]]
        same = [a == b for a, b in zip(text, ids, strict=False)]
        n_same = same.index(False) if False in same else len(same)
        session.row("generation", f"cell {i}: the loop's first tokens", n_same=n_same, of=len(ids))


def main() -> None:
    """Time all on the CPU, print medians and how often steerlens's they are."""
    from steering_vectors import SteeringVector

    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"rounds": 3, "prompts": 16, "tokens": 40, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = sl.load_model()
    plain: Any = verification.own_model(model)
    pairs = sl.ContrastivePairs.load("sentiment")[:8]
    unit = sl.fit(model, pairs, layers=[LAYER])[LAYER]
    questions = open_questions("choice")[: args.prompts]
    prompts = [tokenize_prompt(model, (sl.Message("user", text),)) for text in questions]
    writing = Writing(model, LAYER, unit, prompts, args.tokens)
    vector = SteeringVector({LAYER: unit}, "decoder_block")
    ways = ways_of(
        *(writing, plain, "steering-vectors, a loop", 4),
        lambda coefficient: vector.apply(plain, multiplier=coefficient),
    )
    seconds = seconds_of(ways, args.rounds, "cpu")
    where = header(args.threads, {}, quick=False)
    print(
        f"{where['date']}, {where['cpu']}, {args.threads} threads: {len(prompts)} prompts of "
        f"{min(map(len, prompts))} to {max(map(len, prompts))} tokens x {len(COEFFICIENTS)} "
        f"coefficients x {args.tokens} tokens, {args.rounds} rounds\n"
    )
    print("| contender | median s | min s | max s | x all steered | x generated steered |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    ours = [*seconds.values()][: len(WAYS)]
    for name, taken in seconds.items():
        ratios = " | ".join(f"{times(taken, one):.2f}" for one in ours)
        print(
            f"| {name} | {statistics.median(taken):.1f} | {min(taken):.1f} | {max(taken):.1f} | "
            f"{ratios} |"
        )


if __name__ == "__main__":
    main()
