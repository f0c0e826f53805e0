"""steerlens itself, behind the same protocol as its peers."""

import itertools
import time
from dataclasses import replace
from typing import Any

import torch
from prepare import FITTED_ON, extraction_pairs
from torch import Tensor
from work import Command, Padded, Work, pad, serve, time_forward

import steerlens as sl


class Steerlens:
    """`sweep` for cells, `collect_differences` for extraction, all else as by default."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.model = sl.load_model(work.model_folder, progress=False)
        self.pool = extraction_pairs()
        train = sl.ContrastivePairs.load("sentiment")[:FITTED_ON]
        self.directions = sl.fit_directions(sl.collect_differences(self.model, train))

    def cells(self, command: Command) -> dict[str, Any]:
        """As a peer's `cells`; the cells must be every layer at every coefficient."""
        layers = list(dict.fromkeys(layer for layer, _ in command["cells"]))
        coefficients = list(dict.fromkeys(c for _, c in command["cells"]))
        grid = [list(cell) for cell in itertools.product(layers, coefficients)]
        if sorted(grid) != sorted(map(list, command["cells"])):
            raise ValueError("a sweep's cells are every layer at every coefficient")
        answer = self._sweep(self._measured(), layers, coefficients, positions=command["positions"])
        found = answer.pop("cells")
        return {**answer, "results": [found[layer, c] for layer, c in command["cells"]]}

    def grow(self, command: Command) -> dict[str, Any]:
        """A sweep of another size: `n_pairs`, `layers`, `coefficients`, `prompt_tokens`."""
        pairs = self._with_continuation(self.pool[: command["n_pairs"]])
        if command.get("prompt_tokens"):
            pairs = self._long_pairs(command["n_pairs"], command["prompt_tokens"])
        answer = self._sweep(pairs, command["layers"], command["coefficients"], positions="all")
        del answer["cells"]
        return answer

    def extract(self, command: Command) -> dict[str, Any]:
        """As a peer's `extract`."""
        pairs = self.pool[: command["n_pairs"]]
        started = time.perf_counter()
        found = sl.collect_differences(self.model, pairs, batch_size=self.work.batch_size)
        seconds = time.perf_counter() - started
        means = [float((found[name] @ self.directions[name]).mean()) for name in found.hook_names]
        return {"seconds": seconds, "projections": means}

    @torch.no_grad()
    def forward(self, command: Command) -> dict[str, Any]:
        """The model inside the Bridge, in batches of prompts of like length as steerlens makes."""
        return time_forward(self.work, command, self._batches, self._base)

    @torch.no_grad()
    def unembed(self, command: Command) -> dict[str, Any]:
        """Seconds of the final norm and the label logits of the positive prompts, alone."""
        prompts = self.work.positive[: command.get("n_pairs")]
        whole = self.model.original_model
        batches = self._batches(prompts, self.work.continuation_ids)
        finals = [
            self._base(batch)[batch.rows[:, None], batch.predictors].flatten(0, 1)
            for batch in batches
        ]
        started = time.perf_counter()
        for final in finals:
            for rows in torch.split(final, 256):
                whole.lm_head(whole.model.norm(rows[:, None]))
        return {"seconds": time.perf_counter() - started}

    def _base(self, batch: Padded) -> Tensor:
        final: Tensor = self.model.original_model.model(
            input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False
        ).last_hidden_state
        return final

    def _batches(self, prompts: list[list[int]], continuation: Any = ()) -> list[Padded]:
        return pad(
            sorted(prompts, key=len),
            continuation=continuation,
            pad_id=self.work.pad_id,
            size=self.work.batch_size,
        )

    def _sweep(
        self, pairs: sl.ContrastivePairs, layers: Any, coefficients: Any, *, positions: Any
    ) -> dict[str, Any]:
        started = time.perf_counter()
        result = sl.sweep(
            self.model,
            pairs,
            self.directions,
            layers=layers,
            coefficients=coefficients,
            steered_positions=positions,
        )
        seconds = time.perf_counter() - started
        table = result.table
        numbers = table[["projection", "logprob_nats"]].to_numpy().tolist()
        keys = zip(table["layer"].astype(int), table["coefficient"].astype(float), strict=True)
        return {
            "seconds": seconds,
            "forward_equivalents": float(table.attrs["forward_equivalents"]),
            "cells": dict(zip(keys, numbers, strict=True)),
        }

    def _measured(self) -> sl.ContrastivePairs:
        test = sl.ContrastivePairs.load("sentiment", split="test")
        return self._with_continuation(test[: len(self.work.positive)])

    def _with_continuation(self, pairs: sl.ContrastivePairs) -> sl.ContrastivePairs:
        return sl.ContrastivePairs(
            tuple(replace(pair, continuation=self.work.continuation) for pair in pairs), pairs.name
        )

    def _long_pairs(self, n_pairs: int, n_tokens: int) -> sl.ContrastivePairs:
        """Pairs of texts of just about `n_tokens` tokens that begin with different words."""
        tokenizer = self.model.tokenizer
        ids = tokenizer(" ".join(sl.data.neutral_texts() * 20), add_special_tokens=False)[
            "input_ids"
        ]
        records = []
        for i in range(n_pairs):
            text = tokenizer.decode(ids[37 * i : 37 * i + n_tokens - 2])
            records.append({"positive": f"Happy: {text}", "negative": f"Sad: {text}"})
        return self._with_continuation(sl.ContrastivePairs.load(records))


if __name__ == "__main__":
    serve(Steerlens)
