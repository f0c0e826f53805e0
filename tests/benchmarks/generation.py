"""Texts of prompts x coefficients: written together, by a loop of another tool, and unsteered.

    python tests/benchmarks/generation.py [--rounds 3] [--prompts 16] [--tokens 40] [--threads 2]

8 coefficients at one layer of the default model, greedy. The loop is that of steering-vectors' (and
of repeng's) documentation: a coefficient and a prompt at a time, Hugging Face's `generate` under
the tool. Its cells all cost the same, so four are timed and scaled. "unsteered" is Hugging Face's
own `generate` of as many rows in one batch, padded on the left. Rounds are interleaved; medians.
Some 5 minutes on two quiet cores.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from report import header

import steerlens as sl
from steerlens.data import open_questions
from steerlens.engine.batches import padded
from steerlens.engine.tokenization import tokenize_prompt
from steerlens.models import verification
from steerlens.models.hooks import resid_post
from steerlens.steering import generate_texts

LAYER = 15
COEFFICIENTS = (-20.0, -15.0, -10.0, -5.0, 5.0, 10.0, 15.0, 20.0)
TIMED = 4


def main() -> None:
    """Time all, print medians and how often steerlens's they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in {"rounds": 3, "prompts": 16, "tokens": 40, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = sl.load_model()
    plain: Any = verification.own_model(model)
    plain.generation_config.pad_token_id = model.tokenizer.pad_token_id
    pairs = sl.ContrastivePairs.load("sentiment")[:8]
    hook, unit = resid_post(LAYER), sl.fit(model, pairs, layers=[LAYER])[LAYER]
    questions = open_questions("choice")[: args.prompts]
    prompts = [tokenize_prompt(model, (sl.Message("user", text),)) for text in questions]
    ids = [torch.tensor([prompt.prompt]) for prompt in prompts]
    rows, mask = padded(
        [prompt.prompt for prompt in prompts for _ in COEFFICIENTS], "left", device=None
    )
    greedy: dict[str, Any] = {"max_new_tokens": args.tokens, "do_sample": False}
    cells = [(i % len(ids), COEFFICIENTS[-1 - 2 * i]) for i in range(TIMED)]

    def ours(positions: str) -> None:
        generate_texts(
            *(model, prompts, {hook: unit}, COEFFICIENTS),
            max_new_tokens=args.tokens,
            positions=positions,
            batch_size=len(rows),
        )

    def steering_vectors() -> None:
        from steering_vectors import SteeringVector

        vector = SteeringVector({LAYER: unit}, "decoder_block")
        for place, coefficient in cells:
            with vector.apply(plain, multiplier=coefficient):
                plain.generate(ids[place], attention_mask=torch.ones_like(ids[place]), **greedy)

    scale = len(rows) / TIMED
    contenders: dict[str, tuple[Callable[[], None], float]] = {
        "steerlens, all tokens steered": (lambda: ours("all"), 1),
        "steerlens, the generated tokens": (lambda: ours("generated"), 1),
        "unsteered, one batch": (
            lambda: plain.generate(rows, attention_mask=mask.long(), **greedy),
            1,
        ),
        "steering-vectors, a loop": (steering_vectors, scale),
    }
    for positions in ("all", "generated"):  # the first of a model and kind of batch, looked at
        generate_texts(
            *(model, prompts[:2], {hook: unit}, COEFFICIENTS[3:5]),
            max_new_tokens=2,
            positions=positions,
        )
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    with torch.no_grad():
        for _ in range(args.rounds):
            for name, (run, times) in contenders.items():
                start = time.perf_counter()
                run()
                seconds[name].append(times * (time.perf_counter() - start))
                print(f"{name}: {seconds[name][-1]:.1f} s", file=sys.stderr, flush=True)
    where = header(args.threads, {}, quick=False)
    print(
        f"{where['date']}, {where['cpu']}, {args.threads} threads: {len(prompts)} prompts of "
        f"{min(map(len, prompts))} to {max(map(len, prompts))} tokens x {len(COEFFICIENTS)} "
        f"coefficients x {args.tokens} tokens, {args.rounds} rounds\n"
    )
    print("| contender | median s | min s | max s | x steerlens |")
    print("| --- | ---: | ---: | ---: | ---: |")
    one = statistics.median(next(iter(seconds.values())))
    for name, taken in seconds.items():
        middle = statistics.median(taken)
        print(
            f"| {name} | {middle:.1f} | {min(taken):.1f} | {max(taken):.1f} | {middle / one:.2f} |"
        )


if __name__ == "__main__":
    main()
