"""Peer: nnsight's traces; an environment of its own."""

from typing import Any

import torch
from nnsight import TransformersModel
from torch import Tensor
from work import Padded, PlainLoop, Push, serve


class NNsight(PlainLoop):
    """A trace a batch; it stops where nothing more is wanted."""

    def load(self, folder: str) -> None:
        self.model: Any = TransformersModel(
            folder, task="text-generation", dispatch=True, dtype=torch.float32
        )

    def run(self, batch: Padded, push: Push, *, wants_logits: bool) -> tuple[Tensor, Tensor | None]:
        model, layers = self.model, self.model.model.layers
        step, rows, last = push.step, batch.rows, batch.last
        inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask, "use_cache": False}
        with model.trace(inputs):
            layers[push.layer].output = layers[push.layer].output + step
            state = layers[push.readout].output[rows, last].save()
            logits = model.output.logits.save()
        return state, batch.pick_labels(logits) if wants_logits else None

    def all_layers(self, batch: Padded) -> Tensor:
        rows, last = batch.rows, batch.last
        inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask, "use_cache": False}
        with self.model.trace(inputs) as tracer:
            states = [layer.output[rows, last] for layer in self.model.model.layers]
            stacked: Any = torch.stack(states)
            stacked = stacked.save()
            tracer.stop()
        found: Tensor = stacked
        return found


if __name__ == "__main__":
    serve(NNsight)
