"""What the loss's gradient at every hook costs, against forward passes of the same prompts.

    python tests/benchmarks/gradients.py [--rounds 5] [--n-pairs 32] [--threads 2]

The forward passes are the model's own, with logits, in the same batches, both sides. Rounds are
interleaved. Peak memory is the process's own, so the batch sizes are run from small to large.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import torch
from report import header

import steerlens as sl
from steerlens.engine.batches import Batch, make_pair_batches
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.models.hooked_model import HookedModel
from steerlens.models.loading import inference


def main() -> None:
    """Time both, print medians and their ratio, then the peak memory by batch size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--n-pairs", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = sl.load_model()
    pairs = sl.ContrastivePairs.load("sentiment", split="test")[: args.n_pairs]
    batches = [
        batch
        for both in make_pair_batches(model, tokenize_pairs(model, pairs), None)
        for batch in both
    ]
    # Before the timed runs, whose batches are larger.
    for size in (2, 4, 8, 16):
        before = peak()
        sl.loss_gradients(model, pairs, batch_size=size)
        print(f"batches of {size}: peak {peak():.0f} MB, {peak() - before:+.0f}")
    forward(model, batches)
    forwards, gradients = [], []
    for _ in range(args.rounds):
        forwards.append(timed(lambda: forward(model, batches)))
        gradients.append(timed(lambda: sl.loss_gradients(model, pairs)))
    one, all_hooks = statistics.median(forwards), statistics.median(gradients)
    where = header(args.threads, {}, quick=False)
    print(f"{where['date']}, {where['cpu']}, {args.threads} threads, {args.n_pairs} pairs")
    print(f"forward passes {one:.2f} s ({min(forwards):.2f} to {max(forwards):.2f})")
    spread = f"{min(gradients):.2f} to {max(gradients):.2f}"
    print(f"gradients at all hooks {all_hooks:.2f} s ({spread}): {all_hooks / one:.2f} times")


def forward(model: HookedModel, batches: list[Batch]) -> None:
    """Plain forward passes with logits."""
    with inference(model):
        for batch in batches:
            model(batch.tokens, return_type="logits", **batch.forward_kwargs)


def timed(run: Callable[[], object]) -> float:
    """Seconds that `run()` takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def peak() -> float:
    """The process's largest resident memory so far, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
