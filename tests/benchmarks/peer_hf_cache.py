"""Peer for continuation-only steering: Hugging Face hooks with the prompts' keys and values kept.

Nothing in the prompt is steered then, so a careful user runs it once and every cell on the
continuation alone. Prompts are padded on the left, so that all continuations begin at one column.
"""

import time
from typing import Any

import torch
from peer_hf_lean import LeanHooks
from torch import Tensor
from work import Command, Padded, hooked, mean_logprob, serve


class HuggingFaceCache(LeanHooks):
    """One prompt pass for all cells; a cell runs the continuation's tokens but the last."""

    side = "left"
    positions = ("continuation",)

    @torch.no_grad()
    def cells(self, command: Command) -> dict[str, Any]:
        if command["positions"] != "continuation":
            return {"unsupported": "a kept prompt helps only where the prompt is not steered"}
        started = time.perf_counter()
        readouts = sorted({self.work.readout(layer) for layer, _ in command["cells"]})
        positive = self.batches(self.work.positive)
        prompts = [self._prompt(batch, readouts) for batch in positive]
        others = [self._prompt(batch, readouts)[1] for batch in self.batches(self.work.negative)]
        fixed = time.perf_counter() - started
        differences = torch.cat([s for _, s, _ in prompts], dim=1) - torch.cat(others, dim=1)
        results = []
        for layer, coefficient in command["cells"]:
            step = coefficient * self.directions[layer]
            logprobs = [
                self._continuation(batch, cache, final, layer, step)
                for batch, (cache, _, final) in zip(positive, prompts, strict=True)
            ]
            readout = self.work.readout(layer)
            projection = differences[readouts.index(readout)] @ self.directions[readout]
            results.append([float(projection.mean()), float(torch.cat(logprobs).mean())])
        seconds = time.perf_counter() - started
        return {"seconds": seconds, "fixed_seconds": fixed, "results": results}

    def _prompt(self, batch: Padded, readouts: list[int]) -> tuple[Any, Tensor, Tensor]:
        """The cache, states `[readout, row, d_model]`, and the last token's final state."""
        kept: list[Tensor] = []
        keep = dict.fromkeys(readouts, lambda out: kept.append(out[:, -1]))
        with hooked(self.model.model.layers, keep):
            output = self.model.model(
                input_ids=batch.tokens,
                attention_mask=batch.mask,
                position_ids=batch.position_ids,
                use_cache=True,
            )
        return output.past_key_values, torch.stack(kept), output.last_hidden_state[:, -1:]

    def _continuation(
        self, batch: Padded, cache: Any, prompt_final: Tensor, layer: int, step: Tensor
    ) -> Tensor:
        """Each row's mean logprob. The last label predicts nothing, so it is not run."""
        labels = torch.tensor(self.work.continuation_ids).expand(len(batch.tokens), -1)
        tokens = labels[:, :-1]
        with hooked(self.model.model.layers, {layer: lambda out: out + step}):
            final = self.model.model(
                input_ids=tokens,
                attention_mask=torch.cat([batch.mask, torch.ones_like(tokens)], dim=1),
                position_ids=batch.mask.sum(1, keepdim=True) + torch.arange(tokens.shape[1]),
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        cache.crop(-tokens.shape[1])
        return mean_logprob(self.model.lm_head(torch.cat([prompt_final, final], dim=1)), labels)


if __name__ == "__main__":
    serve(HuggingFaceCache)
