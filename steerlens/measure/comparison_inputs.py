"""What a comparison is given: sets of items, the texts its budget is spent on, and their check."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from steerlens.data.items import PreferenceItem, PreferenceItems
from steerlens.data.pairs import ContrastivePairs
from steerlens.data.prompts import Message
from steerlens.data.sequence import one_of_each_in_turn
from steerlens.directions.methods import method_of
from steerlens.engine.labels import with_labels
from steerlens.engine.tokenization import (
    TokenizedPrompt,
    fingerprint,
    tokenize_items,
    tokenize_pairs,
)
from steerlens.errors import InputError
from steerlens.measure.equal_damage import CompareSettings
from steerlens.measure.texts import text_prompts
from steerlens.models.hooked_model import HookedModel

N_OWN = 32
"""Most prompts after which the model writes."""
Prompts = tuple[TokenizedPrompt, ...]


@dataclass(frozen=True)
class ItemSets:
    """Held-out items, and those given beside them; with the persona in the prompt, if it can be."""

    held_out: PreferenceItems
    train: PreferenceItems | None
    off_target: Mapping[str, PreferenceItems]
    persona: PreferenceItems | None
    shared: Mapping[str, int] = field(default_factory=dict)

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
            **self.shared,
            "off_target": {name: items.fingerprint for name, items in self.off_target.items()},
        }


@dataclass(frozen=True)
class Texts:
    """What the budget is spent on, and "own" and "neutral" text, in halves.

    The first half is there to spend the budget on, damage is measured on the second.
    """

    calibration: Prompts
    halves: Mapping[str, tuple[Prompts, Prompts]]

    @property
    def damaged(self) -> dict[str, Prompts]:
        """Where damage is measured."""
        return {name: second for name, (_, second) in self.halves.items()}

    def record(self) -> dict[str, str]:
        """What a table says of them."""
        return {name: fingerprint(first + second) for name, (first, second) in self.halves.items()}


def split_texts(
    model: HookedModel,
    pairs: ContrastivePairs,
    sets: ItemSets,
    settings: CompareSettings,
    neutral: Sequence[str] | None,
) -> Texts:
    """What the model itself writes, and neutral texts, in halves."""
    tokenized = tokenize_pairs(model, pairs)
    if isinstance(neutral, str) or neutral == []:
        raise InputError(f"neutral is a list of at least 4 texts, got {neutral!r}")
    texts = text_prompts(model, "neutral" if neutral is None else tuple(neutral), tokenized)
    if len(texts) < 4:
        raise InputError(f"expected at least 4 neutral texts, got {len(texts)}")
    own = with_labels(
        model, _own_prompts(model, pairs, sets), "own", own_tokens=settings.own_tokens
    )
    of_both = {"own": own, "neutral": texts}
    halves = {name: (of[: len(of) // 2], of[len(of) // 2 :]) for name, of in of_both.items()}
    if settings.on == "positive":
        return Texts(with_labels(model, tokenized.positive), halves)
    return Texts(halves[settings.on][0], halves)


def _own_prompts(model: HookedModel, pairs: ContrastivePairs, sets: ItemSets) -> Prompts:
    """Different prompts, up to `N_OWN`, one of each group in turn, none of a held-out item.

    They come group after group, so that halves share one at most.
    """
    if sets.train is None:
        groups, prompts = pairs.groups, tokenize_pairs(model, pairs).positive
    else:
        groups, prompts = sets.train.groups, tokenize_items(model, sets.train)[0]
    held_out = {prompt.prompt for prompt in tokenize_items(model, sets.held_out)[0]}
    different = {p.prompt: (g, p) for g, p in zip(groups, prompts, strict=True)}
    places = [place for ids, place in different.items() if ids not in held_out]
    if len(places) < 2:
        raise InputError(
            f"the model writes after at least 2 different prompts, got {len(places)} of "
            f"{'the pairs' if sets.train is None else 'the training items'} that no held-out item "
            "has; give more"
        )
    chosen = one_of_each_in_turn([group for group, _ in places], N_OWN)
    in_turn = sorted((places[row] for row in chosen), key=lambda place: place[0])
    return tuple(prompt for _, prompt in in_turn)


def check_compared(model: HookedModel, settings: CompareSettings, sets: ItemSets) -> None:
    """Raise `InputError` of what cannot be compared, before anything is run."""
    if not settings.methods:
        raise InputError("expected at least one method, got none")
    for name in settings.methods:
        method_of(name)
    if settings.on not in ("own", "neutral", "positive"):
        raise InputError(f"on is own, neutral or positive, not {settings.on!r}")
    shared = {item.prompt for item in sets.held_out} & {item.prompt for item in sets.train or ()}
    if shared:
        raise InputError(
            f"{len(shared)} prompts are both in the training and in the held-out items, so the "
            "layer would be chosen on the test data; take them out of one"
        )
    for some in sets.all():
        tokenize_items(model, some)


def with_shared(sets: ItemSets, pairs: ContrastivePairs) -> ItemSets:
    """With how many items share a prompt or persona with what is fitted or chosen on; warns of any.

    By what system and user say, and by whole texts (`shared_texts`), never by the names of groups:
    two files may both have a group "1".
    """
    items, train = sets.held_out, sets.train
    fitted = "the pairs that are fitted on"
    compared: list[tuple[str, PreferenceItems, ContrastivePairs | PreferenceItems, str, str]]
    compared = [("n_items_fitted_on", items, pairs, fitted, "effects are")]
    if train is not None:
        chosen = "the items that choose the layer"
        compared += [
            ("n_items_chosen_on", items, train, chosen, "effects are"),
            ("n_choosing_items_fitted_on", train, pairs, fitted, "the choice of a layer is"),
        ]
    found = {}
    for name, some, others, what, outcome in compared:
        n = found[name] = some.count_sharing(others.shared_texts)
        if n:
            warnings.warn(
                f"{some.name}: {n} of {len(some)} items share a prompt or persona with {what}, so "
                f"{outcome} in sample; take them out of one",
                UserWarning,
                stacklevel=4,
            )
    return replace(sets, shared=found)


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
