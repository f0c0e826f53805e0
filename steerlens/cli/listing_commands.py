"""The commands that list what comes with steerlens: `methods`, `models` and `datasets`."""

from dataclasses import dataclass
from typing import Annotated

import typer

from steerlens.cli.command import Command
from steerlens.cli.printing import say
from steerlens.data.pairs import ContrastivePairs
from steerlens.data.shipped import SPLITS, dataset_card, dataset_names, neutral_texts
from steerlens.directions.methods import METHODS
from steerlens.models.packaged import PACKAGED_MODELS, cache_folder


@dataclass(frozen=True, kw_only=True)
class Datasets(Command):
    """Datasets shipped with steerlens; with a name, its card."""

    name: Annotated[str | None, typer.Argument(help="Show this dataset's card.")] = None

    def run(self) -> None:
        """What the command does."""
        if self.name is not None:
            for line in dataset_card(self.name).splitlines():
                say(line)
            return
        for dataset in dataset_names():
            sizes = [
                f"{len(ContrastivePairs.load(dataset, split=split))} {split}" for split in SPLITS
            ]
            say(f"{dataset}: {', '.join(sizes)} pairs")
        say(f"neutral: {len(neutral_texts())} lines of neutral text")


@dataclass(frozen=True, kw_only=True)
class Methods(Command):
    """What --method takes."""

    def run(self) -> None:
        """What the command does."""
        for name, method in METHODS.items():
            say(f"{name} ({method.source}): {method.summary}")


@dataclass(frozen=True, kw_only=True)
class Models(Command):
    """Models that steerlens fetches by itself, and what else --model takes."""

    def run(self) -> None:
        """What the command does."""
        for packaged in PACKAGED_MODELS.values():
            say(f"{packaged.name}: {packaged.description} ({packaged.requirement})")
        say("--model also takes a local Hugging Face folder, a .gguf file, or a hub id.")
        say(f"Fetched and converted models are kept in {cache_folder()}.")
