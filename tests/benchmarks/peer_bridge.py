"""Peer: TransformerLens's `TransformerBridge.run_with_hooks`, one pass a cell."""

from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from work import Padded, PlainLoop, Push, serve


def resid_post(layer: int) -> str:
    """TransformerLens's name of a block's output."""
    return f"blocks.{layer}.hook_resid_post"


class Bridge(PlainLoop):
    """`stop_at_layer` ends a pass that needs no logits."""

    def load(self, folder: str) -> None:
        self.model: Any = TransformerBridge.boot_transformers(
            folder, device="cpu", dtype=torch.float32
        )

    def run(self, batch: Padded, push: Push, *, wants_logits: bool) -> tuple[Tensor, Tensor | None]:
        kept: list[Tensor] = []
        output = self.model.run_with_hooks(
            batch.tokens,
            attention_mask=batch.mask,
            fwd_hooks=[
                (resid_post(push.layer), lambda act, hook: act + push.step),
                (
                    resid_post(push.readout),
                    lambda act, hook: kept.append(act[batch.rows, batch.last]),
                ),
            ],
            return_type="logits",
        )
        return kept[0], batch.pick_labels(output) if wants_logits else None

    def all_layers(self, batch: Padded) -> Tensor:
        names = [resid_post(i) for i in range(self.work.n_layers)]
        _, cache = self.model.run_with_cache(
            batch.tokens, attention_mask=batch.mask, names_filter=names, logits_to_keep=1
        )
        return torch.stack([cache[name][batch.rows, batch.last] for name in names])


if __name__ == "__main__":
    serve(Bridge)
