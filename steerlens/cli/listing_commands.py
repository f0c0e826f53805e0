"""The commands that list what comes with steerlens: `methods`, `models` and `datasets`."""

from dataclasses import dataclass
from typing import Annotated

import typer

import steerlens as sl
from steerlens.cli.command import Command
from steerlens.cli.printing import say
from steerlens.models.packaged import DEFAULT_MODEL

SPLITS = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class Datasets(Command):
    """Datasets shipped with steerlens; with a name, its card."""

    name: Annotated[str | None, typer.Argument(help="Show this dataset's card.")] = None

    EXAMPLES = ("datasets", "datasets sentiment")

    @property
    def next(self) -> str:
        """A look at the pairs themselves."""
        names = sl.data.dataset_names()
        return f"steerlens pairs {self.name if self.name in names else names[-1]}"

    def run(self) -> None:
        """What the command does."""
        if self.name is not None:
            for line in sl.data.dataset_card(self.name).splitlines():
                say(line)
            return
        for dataset in sl.data.dataset_names():
            sizes = [
                f"{len(sl.ContrastivePairs.load(dataset, split=split))} {split}" for split in SPLITS
            ]
            say(f"{dataset}: {', '.join(sizes)} pairs")
        say(f"neutral: {len(sl.data.neutral_texts())} lines of neutral text")
        halves = [
            f"{len(sl.data.open_questions(half))} {half}" for half in ("choice", "confirmation")
        ]
        say(f"questions: {', '.join(halves)} open questions")


@dataclass(frozen=True, kw_only=True)
class Methods(Command):
    """What --method takes."""

    EXAMPLES = ("methods", "methods --debug")

    @property
    def next(self) -> str:
        """One of them at work."""
        return "steerlens sweep --method pca --out runs/sweep"

    def run(self) -> None:
        """What the command does."""
        for name, method in sl.METHODS.items():
            say(f"{name} ({method.source}): {method.summary}")


@dataclass(frozen=True, kw_only=True)
class Models(Command):
    """What --model takes, and the models that are fetched."""

    EXAMPLES = ("models", "models --debug")

    @property
    def next(self) -> str:
        """The first of them at work."""
        return f"steerlens layers --model {DEFAULT_MODEL}"

    def run(self) -> None:
        """What the command does."""
        for packaged in sl.models.packaged.PACKAGED_MODELS.values():
            say(f"{packaged.name}: {packaged.description} ({packaged.requirement})")
        say("--model also takes a local Hugging Face folder, a .gguf file, or a hub id.")
        say(f"Fetched and converted models are kept in {sl.models.packaged.cache_folder()}.")
