"""`steerlens pairs`: what pairs look like to a model, before a run."""

import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import steerlens as sl
from steerlens.cli.command import PairsCommand
from steerlens.cli.printing import print_table, print_texts, say
from steerlens.cli.sweep_command import Sweep
from steerlens.errors import InputError

N_SHOWN = 3
"""Pairs that are shown of the shortest, and of the longest."""
Sides = tuple[Any, Any]
"""A pair as `TokenizedPrompt`s."""


@dataclass(frozen=True, kw_only=True)
class Pairs(PairsCommand):
    """What pairs look like: lengths, repeats, template, leakage."""

    pairs: str
    test_pairs: str | None = None
    model: str | None = None

    @property
    def next(self) -> str:
        return self.onward(Sweep, out="runs/sweep")

    def run(self) -> None:
        fit_on, measure_on = self.read_pairs()
        model = None if self.model is None else self.load(self.model)
        parts = [fit_on] if measure_on is fit_on else [fit_on, measure_on]
        for pairs in parts:
            pairs.warn_of_groups()
            _print_part(pairs, model)
        for pairs in parts[1:]:
            n_prompts = len(fit_on.shared_texts & pairs.shared_texts)
            n_pairs = pairs.count_among(fit_on.prompt_hashes)
            say(
                f"Leakage: {n_pairs} of {len(pairs)} test pairs are among {fit_on.name}; the parts "
                f"share {n_prompts} texts of prompts"
            )


def _print_part(pairs: Any, model: Any) -> None:
    say(f"{pairs.name}: {pairs.card}" if pairs.card else pairs.name)
    tokens, refused = _tokenized(model, pairs)
    _print_lengths(pairs, tokens)
    facts = _facts(pairs, tokens)
    if model is not None:
        facts |= _template_facts(model, pairs, tokens, refused)
    print_table("Pairs", ["what", "pairs"], list(facts.items()), left=("what", "pairs"))
    unit, lengths = "tokens", {name: sum(map(len, both)) for name, both in tokens.items()}
    if model is None:
        unit = "characters"
        lengths = {p.id: len(_text(p.positive)) + len(_text(p.negative)) for p in pairs}
    by_length = sorted((p for p in pairs if p.id in lengths), key=lambda p: lengths[p.id])
    sides = ("positive", "negative")
    shown = [("Shortest", pair) for pair in by_length[:N_SHOWN]]
    shown += [("Longest", pair) for pair in by_length[N_SHOWN:][-N_SHOWN:]]
    for name, pair in shown:
        title = f"{name}: pair {pair.id!r}, {lengths[pair.id]} {unit}"
        print_texts(title, sides, [_shown(pair, side, model, tokens) for side in sides])


def _tokenized(model: Any, pairs: Any) -> tuple[dict[str, Sides], Counter[str]]:
    """Both sides of each pair as ids, by the pair's id; what refuses the others, and how many."""
    found = {pair.id: _tokens_of(model, pair) for pair in pairs if model is not None}
    refused = Counter(told for told in found.values() if isinstance(told, str))
    return {name: both for name, both in found.items() if not isinstance(both, str)}, refused


def _tokens_of(model: Any, pair: Any) -> Sides | str:
    """Both sides of a pair, or why they are refused."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the template does stands in the table
            positive = sl.engine.tokenize_prompt(model, pair.positive, pair.continuation)
            return positive, sl.engine.tokenize_prompt(model, pair.negative)
    except InputError as error:
        return str(error)


def _print_lengths(pairs: Any, tokens: dict[str, Sides]) -> None:
    """Smallest, median and largest of each side's characters, and of its tokens."""
    columns: dict[str, Sequence[int]] = {}
    for number, side in enumerate(("positive", "negative")):
        columns[f"{side}, characters"] = [len(_text(getattr(pair, side))) for pair in pairs]
        columns[f"{side}, tokens"] = [len(both[number].prompt) for both in tokens.values()]
    columns["continuation, characters"] = [len(p.continuation) for p in pairs if p.continuation]
    columns["continuation, tokens"] = [
        len(both[0].continuation) for both in tokens.values() if both[0].continuation
    ]
    rows = [(name, *_spread(values)) for name, values in columns.items() if values]
    print_table("Lengths", ["of", "least", "median", "most"], rows, left=("of",))


def _spread(values: Sequence[int]) -> tuple[str, str, str]:
    return str(min(values)), f"{median(values):g}", str(max(values))


def _facts(pairs: Any, tokens: dict[str, Sides]) -> dict[str, str]:
    """What holds of the pairs whatever the model: differences, repeats, groups, labels."""
    sides = [[_units(pair, side, tokens) for pair in pairs] for side in ("positive", "negative")]
    firsts, n_last = [], 0
    for positive, negative in zip(*sides, strict=True):
        same = [one == other for one, other in zip(positive, negative, strict=False)]
        firsts.append((same + [False]).index(False))
        n_last += positive[-1:] != negative[-1:]
    from steerlens.engine.labels import default_labels

    unit = "token" if tokens else "word"
    has_continuation = [bool(pair.continuation) for pair in pairs]
    try:
        kind = str(default_labels([pair.positive for pair in pairs], has_continuation))
    except InputError as error:
        kind = f"refused: {error}"
    n_repeats = len(pairs) - len(set(pairs.prompt_hashes))
    n_groups = len({pair.group for pair in pairs} - {None})
    return {
        "pairs": str(len(pairs)),
        f"{unit}s shared at the start: least, median, most": ", ".join(_spread(firsts)),
        f"last {unit} differs (nothing shared after the difference)": str(n_last),
        "repeat both prompts of others": str(n_repeats),
        "groups, named": f"{len(set(pairs.groups))}, {n_groups}",
        "labels": kind,
    }


def _template_facts(
    model: Any, pairs: Any, tokens: dict[str, Sides], refused: Counter[str]
) -> dict[str, str]:
    """What the chat template and the tokenizer make of the prompts."""
    from steerlens.engine.labels import with_labels

    kept = [pair for pair in pairs if pair.id in tokens]
    chats = [p for pair in kept for p in (pair.positive, pair.negative) if not isinstance(p, str)]
    n_ignored = sum(
        any(m.role == "system" and m.content.strip() not in text for m in chat)
        for chat in chats
        for text in [sl.data.render(chat, model.tokenizer)]
    )
    same = [id_ for id_, (pos, neg) in tokens.items() if pos.prompt == neg.prompt]
    facts = {
        "refused by template or tokenizer": str(refused.total()),
        **{f"  {n} of them": reason for reason, n in refused.most_common(N_SHOWN)},
        "chats whose system turn the template leaves out": f"{n_ignored} of {len(chats)}",
        "both sides have the same tokens": str(len(same)),
    }
    try:
        labelled = with_labels(model, [both[0] for both in tokens.values()])
        n_labels = ", ".join(_spread([len(prompt.label_tokens) for prompt in labelled]))
    except InputError as error:
        n_labels = f"refused: {error}"
    return facts | {"label tokens: least, median, most": n_labels}


def _units(pair: Any, side: str, tokens: dict[str, Sides]) -> Sequence[Any]:
    """The token ids of a side, or its words."""
    if pair.id in tokens:
        ids: Sequence[int] = tokens[pair.id][side == "negative"].prompt
        return ids
    return _text(getattr(pair, side)).split()


def _shown(pair: Any, side: str, model: Any, tokens: dict[str, Sides]) -> str:
    """A side as it is, or as the model sees it: its tokens between bars."""
    if model is None:
        return _text(getattr(pair, side))
    prompt = tokens[pair.id][side == "negative"]
    parts = [prompt.prompt, *([prompt.continuation] if prompt.continuation else [])]
    return " >> ".join(
        f"|{'|'.join(sl.engine.tokenization.token_texts(model, ids))}|" for ids in parts
    )


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message.role}: {message.content}" for message in prompt)
