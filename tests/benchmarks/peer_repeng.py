"""Peer: repeng's `ControlModel`; needs transformers 4 and numpy 1, so an environment of its own.

It has no control of which tokens are steered, so it takes no part in continuation-only steering.
"""

from typing import Any

import torch
from repeng import ControlModel, ControlVector
from repeng.extract import batched_get_hiddens
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from work import Padded, PlainLoop, Push, hooked, serve


class Repeng(PlainLoop):
    """Padded on the left, with position ids: so repeng tells padding from text."""

    side = "left"
    positions = ("all",)

    def load(self, folder: str) -> None:
        config = AutoConfig.from_pretrained(folder)
        # transformers 5, which wrote the folder, keeps the rotary base elsewhere than 4, which
        # would silently take its own default of 10000.
        config.rope_theta = config.rope_parameters["rope_theta"]
        self.model: Any = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=torch.float32
        ).eval()
        # The folder's tokenizer class is of transformers 5; the file itself is read by both.
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/tokenizer.json")
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self.work.pad_id)

        def without_special_tokens(texts: list[str], **options: Any) -> Any:
            return tokenizer(texts, add_special_tokens=False, **options)

        self.tokenizer = without_special_tokens

    def run(self, batch: Padded, push: Push, *, wants_logits: bool) -> tuple[Tensor, Tensor | None]:
        kept: list[Tensor] = []
        vector = ControlVector(self.model.config.model_type, {push.layer: push.direction.numpy()})
        control = ControlModel(self.model, [push.layer])
        control.set_control(vector, push.coefficient)
        # repeng reads hidden states from the model's own output, which are those before the
        # control; a hook on the controlled block shows them as the next block gets them.
        keep = {push.readout: lambda out: kept.append(out[batch.rows, batch.last])}
        try:
            with hooked(self.model.model.layers, keep):
                logits = control(
                    input_ids=batch.tokens,
                    attention_mask=batch.mask,
                    position_ids=batch.position_ids,
                    use_cache=False,
                ).logits
        finally:
            control.unwrap()
        return kept[0], batch.pick_labels(logits) if wants_logits else None

    def differences(self, n_pairs: int) -> dict[int, Tensor]:
        texts = [text for pair in self.work.extract_texts[:n_pairs] for text in pair]
        layers = list(range(self.work.n_layers))
        hiddens = batched_get_hiddens(
            self.model, self.tokenizer, texts, layers, self.work.batch_size
        )
        # repeng's last layer is after the final norm, which is another thing.
        return {i: torch.from_numpy(hiddens[i][::2] - hiddens[i][1::2]) for i in layers[:-1]}


if __name__ == "__main__":
    serve(Repeng)
