"""`steerlens recommend`: which layer and coefficient, or not to steer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import steerlens as sl
from steerlens.cli import options as opt
from steerlens.cli.behave_command import Behave
from steerlens.cli.boundary_commands import Boundary
from steerlens.cli.command import PairsCommand, quoted
from steerlens.cli.comparison_commands import Reliability
from steerlens.cli.listing_commands import REPORT, write_report
from steerlens.cli.long_command import FolderCommand
from steerlens.cli.printing import note, print_rows, print_texts, progress_of, say
from steerlens.cli.vector_commands import OF_VECTOR, PROMPT, Generate
from steerlens.files import json_text
from steerlens.models.packaged import DEFAULT_MODEL

NO_ITEMS = "none"


@dataclass(frozen=True, kw_only=True)
class Recommend(FolderCommand, PairsCommand):
    """Which layer and coefficient to steer with, or why not to."""

    model: str = DEFAULT_MODEL
    items: str | None = None
    layers: str = "all"
    budget: str = "kl=0.1"

    @property
    def next(self) -> str:
        vector = Path(str(self.written)) / "vector.safetensors"
        if not vector.exists():
            return super().next
        return self.onward(Behave, vector=vector, layers=None, out=f"{self.written}-behave")

    def measure(self) -> None:
        from steerlens.cli.task import request_of

        assert self.out is not None
        budget = sl.measure.boundary.check_search(budget=self.budget)
        pairs, _ = self.read_pairs()
        items = self._read_items()
        model = self.load(self.model)
        data = {
            "pairs": opt.pairs_record(pairs),
            "items": items and opt.items_record(items),
            "hook_names": sl.resolve_hooks(model, self.layers),
        }
        with self.opened(request_of("recommend", self, model, data, budget=str(budget))) as run:
            self.note_read(pairs)
            with progress_of() as progress:
                found = sl.recommend(
                    *(model, pairs),
                    items=items,
                    layers=self.layers,
                    budget=self.budget,
                    seed=self.seed,
                    batch_size=self.batch_size,
                    progress=progress,
                    checkpoint=run.parts,
                )
            run.write(
                {
                    "recommendation": found.table,
                    "candidates": found.candidates,
                    "generations": found.texts,
                },
                found.vector or {},
                forward_equivalents=found.table.attrs.get("forward_equivalents", 0.0),
                texts={"recommendation.json": json_text(found.to_dict())},
            )
        write_report([self.out], self.out / REPORT)
        self._print(found)
        run.note(f"{len(found.candidates)} layers")

    def _read_items(self) -> Any:
        source = self.items
        if source is None and self.pairs in sl.data.dataset_names():
            source = self.pairs
        return None if source in (None, NO_ITEMS) else sl.PreferenceItems.load(source)

    def _print(self, found: Any) -> None:
        if len(found.candidates):
            print_rows(found.candidates, "candidates")
        for prompt, texts in found.texts.groupby("prompt", sort=False):
            names = [f"c = {c:.4g}" for c in texts.coefficient]
            print_texts(str(prompt), names, texts.text.tolist())
        say("")
        for line in str(found).splitlines():
            say(line)
        say("")
        say("Next:")
        for command in self._next(found):
            say(f"  {command}")
        note(f"report: {Path(str(self.out)) / REPORT}")

    def _next(self, found: Any) -> list[str]:
        """What can be run now."""
        data, commands = {"model": self.model, "pairs": self.pairs}, []
        if found.vector is not None:
            pushes = [f"{sign.coefficient:.4g}" for sign in found.signs.values() if sign]
            shown = {"vector": Path(str(self.out)) / "vector.safetensors", "prompt": PROMPT}
            strengths = ",".join(["0", *pushes])
            commands.append(self.onward(Generate, **OF_VECTOR, **shown, coefficients=strengths))
        layers = [str(layer) for layer in found.candidates.layer[found.candidates.is_chosen]]
        if layers:
            at = {"layers": layers[0], "out": f"{self.out}-boundary"}
            commands.append(self.onward(Boundary, **data, **at))
        else:
            commands.append(self.onward(Reliability, **data))
        return [*commands, f"steerlens report {quoted(self.out)}"]
