"""What a comparison is given: sets of items, the texts its budget is spent on, and their check."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steerlens.data.items import PreferenceItem, PreferenceItems
from steerlens.data.pairs import ContrastivePairs
from steerlens.data.prompts import Message
from steerlens.directions.methods import method_of
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_items, tokenize_pairs
from steerlens.errors import InputError
from steerlens.measure.equal_damage import CompareSettings
from steerlens.measure.texts import text_prompts
from steerlens.models.hooked_model import HookedModel


@dataclass(frozen=True)
class ItemSets:
    """Held-out items, and those given beside them; with the persona in the prompt, if it can be."""

    held_out: PreferenceItems
    train: PreferenceItems | None
    off_target: Mapping[str, PreferenceItems]
    persona: PreferenceItems | None

    def all(self) -> list[PreferenceItems]:
        """Those that there are."""
        sets = [self.held_out, self.train, *self.off_target.values(), self.persona]
        return [items for items in sets if items is not None]

    def record(self) -> dict[str, Any]:
        """What a table says of them."""
        return {
            "measured_on": self.held_out.fingerprint,
            "items": self.held_out.name,
            "chosen_on": None if self.train is None else self.train.fingerprint,
            "off_target": {name: items.fingerprint for name, items in self.off_target.items()},
        }


@dataclass(frozen=True)
class Texts:
    """What the budget is spent on, and where damage is measured: other texts."""

    neutral: tuple[TokenizedPrompt, ...]
    calibration: tuple[TokenizedPrompt, ...]
    damaged: tuple[TokenizedPrompt, ...]


def split_texts(
    model: HookedModel,
    pairs: ContrastivePairs,
    settings: CompareSettings,
    neutral: Sequence[str] | None,
) -> Texts:
    """Neutral texts in halves, or the positive prompts beside the second half."""
    tokenized = tokenize_pairs(model, pairs)
    if isinstance(neutral, str) or neutral == []:
        raise InputError(f"neutral is a list of at least 4 texts, got {neutral!r}")
    texts = text_prompts(model, "neutral" if neutral is None else tuple(neutral), tokenized)
    if len(texts) < 4:
        raise InputError(f"expected at least 4 neutral texts, got {len(texts)}")
    half = len(texts) // 2
    calibration = tokenized.positive if settings.on == "positive" else texts[:half]
    return Texts(texts, calibration, texts[half:])


def check_compared(model: HookedModel, settings: CompareSettings, sets: ItemSets) -> None:
    """Raise `InputError` of what cannot be compared, before anything is run."""
    if not settings.methods:
        raise InputError("expected at least one method, got none")
    for name in settings.methods:
        method_of(name)
    if settings.on not in ("neutral", "positive"):
        raise InputError(f"on is neutral or positive, not {settings.on!r}")
    shared = {item.prompt for item in sets.held_out} & {item.prompt for item in sets.train or ()}
    if shared:
        raise InputError(
            f"{len(shared)} prompts are both in the training and in the held-out items, so the "
            "layer would be chosen on the test data; take them out of one"
        )
    for some in sets.all():
        tokenize_items(model, some)


def with_persona(pairs: ContrastivePairs, items: PreferenceItems) -> PreferenceItems | None:
    """The items with the positive personas in turn as system messages; None without any."""
    firsts = [pair.positive[0] for pair in pairs if not isinstance(pair.positive, str)]
    personas = list(dict.fromkeys(first.content for first in firsts if first.role == "system"))
    if not personas:
        return None
    told: list[PreferenceItem] = []
    for i, item in enumerate(items):
        if isinstance(item.prompt, str) or item.prompt[0].role == "system":
            return None
        persona = Message("system", personas[i % len(personas)])
        name = f"{item.id} (with the persona before it)"
        told.append(replace(item, prompt=(persona, *item.prompt), id=name))
    return PreferenceItems(tuple(told), f"{items.name}, told")
