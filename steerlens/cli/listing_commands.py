"""The commands that show what is there: `methods`, `models`, `datasets`, and runs by `report`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import steerlens as sl
from steerlens.cli.command import Command, QuietCommand, quoted
from steerlens.cli.printing import note, say
from steerlens.files import write_out
from steerlens.models.packaged import DEFAULT_MODEL

REPORT = "report.html"


@dataclass(frozen=True, kw_only=True)
class Datasets(Command):
    """Datasets shipped with steerlens; with a name, its card."""

    name: str | None = None

    @property
    def next(self) -> str:
        names = sl.data.dataset_names()
        return f"steerlens pairs {self.name if self.name in names else names[-1]}"

    def run(self) -> None:
        if self.name is not None:
            for line in sl.data.dataset_card(self.name).splitlines():
                say(line)
            return
        load, questions = sl.ContrastivePairs.load, sl.data.open_questions
        for dataset in sl.data.dataset_names():
            sizes = [f"{len(load(dataset, split=split))} {split}" for split in ("train", "test")]
            say(f"{dataset}: {', '.join(sizes)} pairs")
        say(f"neutral: {len(sl.data.neutral_texts())} lines of neutral text")
        halves = [f"{len(questions(half))} {half}" for half in ("choice", "confirmation")]
        say(f"questions: {', '.join(halves)} open questions")


@dataclass(frozen=True, kw_only=True)
class Methods(Command):
    """What --method takes."""

    next = "steerlens sweep --method pca --out runs/sweep"

    def run(self) -> None:
        for name, method in sl.METHODS.items():
            say(f"{name} ({method.source}): {method.summary}")


@dataclass(frozen=True, kw_only=True)
class Models(Command):
    """What --model takes, and the models that are fetched."""

    next = f"steerlens layers --model {DEFAULT_MODEL}"

    def run(self) -> None:
        for packaged in sl.models.packaged.PACKAGED_MODELS.values():
            say(f"{packaged.name}: {packaged.description} ({packaged.requirement})")
        say("--model also takes a local Hugging Face folder, a .gguf file, or a hub id.")
        say(f"Fetched and converted models are kept in {sl.models.packaged.cache_folder()}.")


@dataclass(frozen=True, kw_only=True)
class Report(QuietCommand):
    """One HTML file of one run or several; it needs no network."""

    runs: list[Path]
    out: Path | None = None

    @property
    def next(self) -> str:
        return f"python -m webbrowser {quoted(self.written)}"

    @property
    def written(self) -> Path:
        return self.runs[0] / REPORT if self.out is None else self.out

    def run(self) -> None:
        size = write_report(self.runs, self.written)
        note(f"written to {self.written} ({size / 1e6:.1f} MB)")


def write_report(folders: Sequence[Path], out: Path) -> int:
    """Write the page of some runs; its size in bytes."""
    page = sl.report([sl.read_run(folder) for folder in folders]).encode()
    write_out(out, lambda path: path.write_bytes(page))
    return len(page)
