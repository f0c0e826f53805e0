"""Peer: Hugging Face transformers with PyTorch forward hooks, as one would write it by hand."""

import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from work import Command, Padded, PlainLoop, Push, hooked, serve, time_forward


class HuggingFaceHooks(PlainLoop):
    """Two hooks and a call of the model a pass."""

    def load(self, folder: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(self, batch: Padded, push: Push, *, wants_logits: bool) -> tuple[Tensor, Tensor | None]:
        kept: list[Tensor] = []
        layers = self.model.model.layers
        with (
            hooked(layers, {push.layer: lambda out: out + push.step}),
            hooked(layers, {push.readout: lambda out: kept.append(out[batch.rows, batch.last])}),
        ):
            logits = self.logits(batch, wants_logits=wants_logits)
        return kept[0], logits

    def logits(self, batch: Padded, *, wants_logits: bool) -> Tensor | None:
        """The whole model, as its documentation has it called: logits at every position."""
        logits = self.model(
            input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False
        ).logits
        return batch.pick_labels(logits) if wants_logits else None

    def base(self, batch: Padded, **options: Any) -> Any:
        """The model without its unembedding."""
        return self.model.model(
            input_ids=batch.tokens, attention_mask=batch.mask, use_cache=False, **options
        )

    def all_layers(self, batch: Padded) -> Tensor:
        """`[layer, row, d_model]`; a hook, as the last hidden state is after the final norm."""
        last: list[Tensor] = []
        with hooked(self.model.model.layers, {-1: last.append}):
            states = self.base(batch, output_hidden_states=True).hidden_states
        return torch.stack([s[batch.rows, batch.last] for s in (*states[1:-1], last[0])])

    @torch.no_grad()
    def forward(self, command: Command) -> dict[str, Any]:
        """As `time_forward`."""
        return time_forward(self.work, command, self.batches, self.base)

    @torch.no_grad()
    def unembed(self, command: Command) -> dict[str, Any]:
        """Seconds of the final norm and the label logits of the positive prompts, alone."""
        prompts = self.work.positive[: command.get("n_pairs")]
        batches = self.batches(prompts, self.work.continuation_ids)
        # These have been through the norm already, which costs the same once more.
        finals = [
            self.base(batch).last_hidden_state[batch.rows[:, None], batch.predictors]
            for batch in batches
        ]
        started = time.perf_counter()
        for final in finals:
            self.model.lm_head(self.model.model.norm(final))
        return {"seconds": time.perf_counter() - started}


if __name__ == "__main__":
    serve(HuggingFaceHooks)
