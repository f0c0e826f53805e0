"""`steerlens recommend`: which layer and coefficient, or not to steer."""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import steerlens as sl
from steerlens.cli import options as opt
from steerlens.cli.command import PairsCommand, quoted
from steerlens.cli.long_command import FolderCommand
from steerlens.cli.options import DEFAULT_MODEL
from steerlens.cli.printing import note, print_rows, print_texts, progress_of, say
from steerlens.cli.report_command import REPORT
from steerlens.files import write_out

COLUMNS = ["layer", "resid_norm", "predicted_boundary", "predicted_effect", "agreement"]
COLUMNS += ["weighted_effect", "is_chosen"]
NO_ITEMS = "none"


@dataclass(frozen=True, kw_only=True)
class Recommend(FolderCommand, PairsCommand):
    """Which layer and coefficient to steer with, or why not to."""

    model: opt.Model = DEFAULT_MODEL
    items: Annotated[
        str | None,
        "Items (prompt, positive, negative) of which half the groups choose and half confirm; or "
        "none: what the model writes decides. Default: those of a shipped dataset, else none.",
    ] = None
    layers: opt.Layers = "all"
    budget: Annotated[str, "Damage that is allowed on the model's own text, e.g. kl=0.1"] = "kl=0.1"

    EXAMPLES = (
        "recommend --pairs sentiment --out runs/recommend",
        "recommend --pairs mine.csv --layers 8:20 --out runs/mine",
    )

    @property
    def next(self) -> str:
        """What the vector makes the model write; without one the report."""
        vector = Path(str(self.written)) / "vector.safetensors"
        if not vector.exists():
            return super().next
        return f"steerlens behave --vector {quoted(vector)} --out {quoted(self.written)}-behave"

    def measure(self) -> None:
        """What the command does."""
        from steerlens.cli.task import request_of

        assert self.out is not None
        budget = sl.measure.boundary.check_search(budget=self.budget)
        pairs, _ = self.read_pairs()
        items = self._read_items()
        model = self.load(self.model)
        data = {
            "pairs": opt.pairs_record(pairs),
            "items": items
            and {"name": items.name, "n_items": len(items), "fingerprint": items.fingerprint},
            "hook_names": sl.resolve_hooks(model, self.layers),
        }
        with self.opened(request_of("recommend", self, model, data, budget=str(budget))) as run:
            self.note_read(pairs)
            with progress_of(quiet=self.quiet) as progress:
                found = sl.recommend(
                    model,
                    pairs,
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
                answers={"recommendation": found.to_dict()},
            )
        page = sl.report([sl.read_run(self.out)]).encode()
        write_out(self.out / REPORT, lambda path: path.write_bytes(page))
        if not self.quiet:
            self._print(found)
            run.note(f"{len(found.candidates)} layers")

    def _read_items(self) -> Any:
        source = self.items
        if source is None and self.pairs in sl.data.dataset_names():
            source = self.pairs
        return None if source in (None, NO_ITEMS) else sl.PreferenceItems.load(source)

    def _print(self, found: Any) -> None:
        if len(found.candidates):
            print_rows(found.candidates, "What the choice of a layer saw", COLUMNS)
        for prompt, texts in found.texts.groupby("prompt", sort=False):
            names = [f"c = {c:.4g}" for c in texts.coefficient]
            print_texts(str(prompt), names, texts.text.tolist())
        say("")
        for line in str(found).splitlines():
            say(line)
        say("")
        say("Next:")
        for command in self._next(found):
            say(f"  {shlex.join(command)}")
        note(f"report: {Path(str(self.out)) / REPORT}")

    def _next(self, found: Any) -> list[list[str]]:
        """What can be run now."""
        out, given = Path(str(self.out)), ["--model", self.model, "--pairs", self.pairs]
        given += ["--group", self.group] if self.group != "group" else []
        commands = []
        coefficients = [f"{sign.coefficient:.4g}" for sign in found.signs.values() if sign]
        if found.vector is not None:
            vector, prompt = str(out / "vector.safetensors"), ["--prompt", "How was your day?"]
            strengths = ",".join(["0", *coefficients])
            commands.append(
                ["generate", "--vector", vector, f"--coefficients={strengths}", *prompt]
            )
        layers = [str(layer) for layer in found.candidates.layer[found.candidates.is_chosen]]
        if layers:
            more = ["--layers", layers[0], "--out", f"{out}-boundary"]
            commands.append(["boundary", *given, *more])
        else:
            commands.append(["reliability", *given])
        commands.append(["report", str(out)])
        return [["steerlens", *command] for command in commands]
