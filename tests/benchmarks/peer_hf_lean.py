"""Peer: Hugging Face forward hooks, by someone who knows that most logits are not needed."""

from peer_hf import HuggingFaceHooks
from torch import Tensor
from work import Padded, serve


class LeanHooks(HuggingFaceHooks):
    """The unembedding runs at the labels' positions only, and on no negative prompt."""

    def logits(self, batch: Padded, *, wants_logits: bool) -> Tensor | None:
        final = self.base(batch).last_hidden_state
        if not wants_logits:
            return None
        logits: Tensor = self.model.lm_head(batch.pick_labels(final))
        return logits


if __name__ == "__main__":
    serve(LeanHooks)
