"""The plain names of columns, by what they are for."""

from collections.abc import Iterable, Mapping

_NOUNS = ("prompt", "text", "sentence", "statement", "example", "response", "answer", "completion")
_PROMPTS = ("prompt", "question", "instruction", "input", "query", "conversations")


def _sided(*sides: str) -> tuple[str, ...]:
    orders = ("{0}_{1}", "{1}_{0}")
    return *sides, *(order.format(s, noun) for s in sides for noun in _NOUNS for order in orders)


ROLES: dict[str, tuple[str, ...]] = {
    "positive": (*_sided("positive", "pos", "good"), "sent_more", "target_true"),
    "negative": (*_sided("negative", "neg", "bad"), "sent_less", "target_false", "target_new"),
    "prompt": ("prompt",),
    "subject": ("subject",),
    "input": ("input",),
    "system": ("system", "system_prompt"),
    "continuation": ("continuation",),
    "position": ("position",),
    "group": ("group",),
    "id": ("id",),
    "chosen": (*_sided("chosen"), "preferred_output"),
    "rejected": (*_sided("rejected"), "non_preferred_output"),
    "question": ("question", "prompt"),
    "context": ("context", "passage", "article", "premise"),
    "matching": (
        *("answer_matching_behavior", "answer_matching_behaviour", "matching", "best_answer"),
        *("correct_answers", "correct_answer"),
    ),
    "not_matching": (
        *("answer_not_matching_behavior", "answer_not_matching_behaviour", "not_matching"),
        *("best_incorrect_answer", "incorrect_answers", "incorrect_answer", "incorrect_answer_1"),
        *("wrong_answer", "distractor1"),
    ),
    "text": (
        *("statement", "text", "sentence", "claim", *_PROMPTS, "messages", "content", "goal"),
        *("review", "behavior"),
    ),
    "label": ("label", "labels", "sentiment"),
    "choices": (
        *("mc1_targets", "choices", "mc2_targets", "options", "endings", "references"),
        *("sentences", "sentence", "statements", "answers", "responses", "completions"),
        *("generations", "candidates", "outputs", "summaries"),
    ),
    "completion": ("completion", "response", "answer", "output"),
    "suffixes": ("suffixes", "suffix_list"),
    "positive_personas": ("positive_personas",),
    "negative_personas": ("negative_personas",),
    "template": ("template",),
    "instructions": ("instruction", "instructions"),
    "questions": ("questions",),
}
"""What a column is for -> the plain names of such a column, the plainest first."""
_OF_FORM: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "preferences": {"prompt": _PROMPTS},
    "choices": {
        "label": (
            *("label", "labels", "answer_idx", "answer_index", "answerkey", "answer", "gold_index"),
            *("gold", "correct", "cop", "winner", "choice", "correct_answer", "preference"),
            *("preferred", "correct_option", "ranks", "ratings", "rewards", "scores", "score"),
        ),
        "question": (
            *("question", "prompt", "query", "instruction", "goal", "ctx", "stem"),
            *("question_stem", "problem", "history", "post"),
        ),
    },
}
"""Of a form, the names of a role in place of those of `ROLES`."""
ALIKE = frozenset({("questions", "matching"), ("questions", "not_matching")}) | {
    ("choices", role) for role in ("choices", "label")
}
"""Of a form, roles for which the plainest column is taken where several would do."""


def column_of(
    role: str, keys: Iterable[str], columns: Mapping[str, str], form: str = ""
) -> str | None:
    """The column for a role: as named, or the first of its plain names that is there."""
    return columns.get(role) or next(iter(candidates(role, keys, form).values()), None)


def candidates(role: str, keys: Iterable[str], form: str = "") -> dict[str, str]:
    """Of the plain names of a role, those that are there, with their columns."""
    plainly = {str(key).strip().lower().replace(" ", "_").replace("-", "_"): key for key in keys}
    plainly |= {key: key for key in keys}
    names = _OF_FORM.get(form, {}).get(role, ROLES[role])
    return {name: plainly[name] for name in names if name in plainly}
