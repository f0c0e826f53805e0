"""What ships with steerlens: datasets of pairs and items, their cards, neutral texts."""

from pathlib import Path

from steerlens.errors import InputError
from steerlens.validation import checked

SPLITS = ("train", "test")


def shipped_folder() -> Path:
    """The folder of shipped datasets: inside the installed package, or `data/` of a checkout."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "shipped"
    return installed if installed.is_dir() else package.parent / "data"


def dataset_names() -> tuple[str, ...]:
    """Names of the shipped pair datasets, sorted.

    Examples:
        >>> sl.data.dataset_names()
        ('formality', 'honesty', 'sentiment')
    """
    return tuple(sorted(path.parent.name for path in shipped_folder().glob("*/train.jsonl")))


@checked
def dataset_card(name: str) -> str:
    """How a shipped dataset was made and what it is not good for (Markdown).

    Args:
        name: One of `dataset_names()`, "neutral" for the neutral texts, "questions" for the open
            questions.

    Raises:
        InputError: Nothing of that name is shipped.
    """
    path = shipped_folder() / name / "card.md"
    if name not in (*dataset_names(), "neutral", "questions") or not path.is_file():
        raise _not_shipped(name)
    return path.read_text(encoding="utf-8")


def neutral_texts() -> tuple[str, ...]:
    """The shipped lines of neutral text, for measuring the side effects of steering.

    Examples:
        >>> len(sl.data.neutral_texts())
        200
    """
    text = (shipped_folder() / "neutral" / "neutral.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line.strip())


def shipped_file(name: str, stem: str, split: str) -> Path:
    """The file `stem` of a dataset. Raises `InputError` on an unknown name or split."""
    if name not in dataset_names():
        raise _not_shipped(name)
    if split not in SPLITS:
        raise InputError(f"dataset {name!r} has the splits {', '.join(SPLITS)}, not {split!r}")
    return shipped_folder() / name / f"{stem}.jsonl"


def _not_shipped(name: str) -> InputError:
    return InputError(f"no dataset {name!r} is shipped; there are {', '.join(dataset_names())}")
