"""Peer: steering-vectors, `SteeringVector.apply` and `record_activations`."""

from typing import Any

from peer_hf import HuggingFaceHooks
from steering_vectors import SteeringVector, record_activations, train_steering_vector
from torch import Tensor
from transformers import AutoTokenizer
from work import Command, Padded, Push, serve


class WithoutSpecialTokens:
    """The texts come from the chat template, which has begun them already."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def __call__(self, texts: Any, **options: Any) -> Any:
        return self._tokenizer(texts, add_special_tokens=False, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


class SteeringVectors(HuggingFaceHooks):
    """The steering and the reading are the tool's; the model is a Hugging Face one."""

    def load(self, folder: str) -> None:
        super().load(folder)
        self.tokenizer = WithoutSpecialTokens(AutoTokenizer.from_pretrained(folder))

    def run(self, batch: Padded, push: Push, *, wants_logits: bool) -> tuple[Tensor, Tensor | None]:
        vector = SteeringVector({push.layer: push.direction}, "decoder_block")
        # `min_token_index` is 0 by default, which `token_indices` does not go together with.
        where = {} if push.mask is None else {"min_token_index": None, "token_indices": push.mask}
        with (
            vector.apply(self.model, multiplier=push.coefficient, **where),
            record_activations(self.model, layer_nums=[push.readout]) as recorded,
        ):
            logits = self.logits(batch, wants_logits=wants_logits)
        state = recorded[push.readout][0][batch.rows, batch.last]
        return state, logits

    def extract(self, command: Command) -> dict[str, Any]:
        self.samples = [tuple(pair) for pair in self.work.extract_texts[: command["n_pairs"]]]
        return super().extract(command)

    def differences(self, n_pairs: int) -> dict[int, Tensor]:
        vector = train_steering_vector(
            self.model, self.tokenizer, self.samples, batch_size=self.work.batch_size
        )
        # The mean difference is all that this gives, so it is a single row here.
        return {i: mean[None] for i, mean in vector.layer_activations.items()}


if __name__ == "__main__":
    serve(SteeringVectors)
