"""Peer: Hugging Face transformers with PyTorch forward hooks, as one would write it by hand."""

import time
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from work import Command, Padded, PlainLoop, Push, serve


class HuggingFaceHooks(PlainLoop):
    """Two hooks and a call of the model a pass."""

    def load(self, folder: str) -> None:
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def run(self, batch: Padded, push: Push, *, wants_logits: bool) -> tuple[Tensor, Tensor | None]:
        kept: list[Tensor] = []
        layers = self.model.model.layers
        handles = [
            layers[push.layer].register_forward_hook(lambda module, args, out: out + push.step),
            layers[push.readout].register_forward_hook(
                lambda module, args, out: kept.append(out[batch.rows, batch.last])
            ),
        ]
        try:
            logits = self.logits(batch, wants_logits=wants_logits)
        finally:
            for handle in handles:
                handle.remove()
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

    def differences(self, n_pairs: int) -> dict[int, Tensor]:
        sides = [
            torch.cat([self._all_layers(batch) for batch in self.batches(prompts[:n_pairs])], dim=1)
            for prompts in (self.work.extract_positive, self.work.extract_negative)
        ]
        return dict(enumerate(sides[0] - sides[1]))

    def _all_layers(self, batch: Padded) -> Tensor:
        """`[layer, row, d_model]`; a hook, as the last hidden state is after the final norm."""
        last: list[Tensor] = []
        handle = self.model.model.layers[-1].register_forward_hook(
            lambda module, args, out: last.append(out)
        )
        try:
            states = self.base(batch, output_hidden_states=True).hidden_states
        finally:
            handle.remove()
        return torch.stack([s[batch.rows, batch.last] for s in (*states[1:-1], last[0])])

    @torch.no_grad()
    def forward(self, command: Command) -> dict[str, Any]:
        """Seconds of one bare forward pass without logits, side by side: the floor's rate."""
        n_pairs = command["n_pairs"]
        sides = {
            "positive": self.batches(self.work.positive[:n_pairs], self.work.continuation_ids),
            "negative": self.batches(self.work.negative[:n_pairs]),
        }
        if command.get("extract"):
            sides = {
                "positive": self.batches(self.work.extract_positive[:n_pairs]),
                "negative": self.batches(self.work.extract_negative[:n_pairs]),
            }
        seconds = {}
        for side, batches in sides.items():
            started = time.perf_counter()
            for batch in batches:
                self.base(batch)
            seconds[side] = time.perf_counter() - started
        return {"seconds": sum(seconds.values()), **seconds}

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
