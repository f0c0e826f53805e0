"""`steerlens sweep`: run it, go on with it after an interrupt, repeat it from its record."""

from collections.abc import Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import pandas as pd
import typer

from steerlens.cli import options as opt
from steerlens.cli.command import QuietCommand, Run, RunCommand, Task, prepare, recorded_options
from steerlens.cli.executors import executor_of
from steerlens.cli.printing import note, print_cells, print_layers, progress_of
from steerlens.cli.run_warnings import keep_warning, warn, warned
from steerlens.directions.differences import collect_differences
from steerlens.directions.directions import Directions
from steerlens.directions.methods import null_directions
from steerlens.engine.tokenization import tokenize_pairs
from steerlens.errors import FileError
from steerlens.loss import Budget
from steerlens.measure.sweeps import SweepResult
from steerlens.measure.tokens import generation_table, token_damage
from steerlens.models.loading import check_at_hand
from steerlens.models.packaged import DEFAULT_MODEL
from steerlens.runs.record import RECORD, differences, versions
from steerlens.runs.unfinished import (
    Parts,
    Started,
    clear_finished,
    open_parts,
    read_finished,
    read_started,
)

if TYPE_CHECKING:
    _Context = typer.Context
else:
    # What typer passes is the base class, whose module differs between its versions.
    _Context = typer.Context.__base__

INTERRUPTED = 130
GIVEN = "COMMANDLINE"
"""What typer calls the source of an option that was given."""
NEW_TOKENS = 40
"""What the model writes after a prompt that is shown."""


@dataclass(frozen=True, kw_only=True)
class WorkersCommand(QuietCommand):
    """Who runs the cells."""

    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes on this machine that share the cells; each loads the "
            "model, and has its part of the processor's cores.",
        ),
    ] = None
    dask: Annotated[str | None, "Address of a Dask scheduler whose workers share the cells."] = None


@dataclass(frozen=True, kw_only=True)
class Sweep(RunCommand, WorkersCommand):
    """Measure projection against logprob degradation at every layer and coefficient."""

    context: _Context
    out: Annotated[Path | None, "Folder for the tables and the record."] = None
    resume: Annotated[
        Path | None, "Go on with the unfinished run in this folder, as it was begun."
    ] = None
    source: Annotated[
        Path | None,
        typer.Option(
            "--from", help=f"Repeat the run of this {RECORD}, and say what differs from it."
        ),
    ] = None
    model: opt.Model = DEFAULT_MODEL
    pairs: opt.Pairs = "sentiment"
    test_pairs: opt.TestPairs = None
    max_pairs: opt.MaxPairs = None
    layers: opt.Layers = "all"
    coefficients: Annotated[str, "Residual units, e.g. --coefficients=-8,0,8"] = "-8,-4,0,4,8"
    method: opt.Method = "mean_diff"
    position: opt.Position = None
    budget: Annotated[str, "What counts as coherent: relative=0.01 or nats=0.05"] = "relative=0.01"
    null: Annotated[int | None, "Null vectors of each kind, random and shuffled, e.g. 20."] = None
    examples: Annotated[
        int,
        typer.Option(
            min=0,
            help="Prompts shown at the middle one of the layers: what the model writes at every "
            "coefficient, and which tokens lose logprob. It illustrates, it chooses nothing.",
        ),
    ] = 2

    @property
    def written(self) -> Path | None:
        """The folder, of a run that is begun or gone on with."""
        return self.out if self.resume is None else self.resume

    def run(self) -> None:
        """What the command does."""
        if self.resume is not None and (self.out is not None or self.source is not None):
            raise FileError("--resume goes on in its own folder: leave out --out and --from")
        out = self.written
        if out is None:
            raise FileError(
                "expected --out with a folder to write to, or --resume with one to go on"
            )
        with executor_of(workers=self.workers, dask=self.dask) as executor:
            command, recorded = self, None
            if self.resume is not None:
                started = self._unfinished(out)
                if started is None:
                    return
                command = self._as_recorded(started.options, out)
            elif self.source is not None:
                recorded = read_finished(self.source)
                command = self._as_recorded(recorded["options"], self.source)
            try:
                command._run_into(out, recorded, executor)
            except KeyboardInterrupt:
                _note_interrupt(out)
                raise typer.Exit(INTERRUPTED) from None

    def _unfinished(self, folder: Path) -> Started | None:
        """What is to be gone on with; None when the run is finished."""
        started = read_started(folder)
        if started is not None:
            n_known, n_hooks = len(started.has_part), len(started.hook_names)
            text = f"Going on in {folder}: {n_known} of {n_hooks} hooks are finished"
        elif (folder / RECORD).exists():
            clear_finished(folder)
            text = f"{folder} is finished: nothing to do"
        else:
            raise FileError(f"{str(folder)!r} holds no unfinished run; start one with --out")
        note(text, quiet=self.quiet)
        return started

    def _as_recorded(self, record: Mapping[str, Any], path: Path) -> "Sweep":
        """This command with the options of a record, but for those given on the command line.

        Raises `FileError` unless the record's are those of a sweep, and `InputError` where only the
        record says to fetch a model.
        """
        kinds, names = get_type_hints(Sweep), recorded_options(self)
        wrong = sorted({*names} ^ {*record}) or [
            name
            for name in names
            if not isinstance(record[name], kinds[name]) or isinstance(record[name], bool)
        ]
        if wrong:
            raise FileError(
                f"the record in {str(path)!r} does not have the options of a sweep "
                f"({', '.join(wrong)}); it may be of another steerlens or another command"
            )
        sources = {name: self.context.get_parameter_source(name) for name in names}
        asked = [
            name for name, source in sources.items() if source and source.name == "COMMANDLINE"
        ]
        if self.resume is None and "model" not in asked:  # another's run, it may be
            check_at_hand(record["model"], f"the record {str(path)!r}")
        return replace(self, **{name: record[name] for name in names if name not in asked})

    def _run_into(
        self, out: Path, recorded: Mapping[str, Any] | None, executor: Executor | None
    ) -> None:
        coefficients = opt.numbers_of(self.coefficients)
        Budget.parse(self.budget)
        task = prepare(self, self.layers)
        request = task.request(
            "sweep",
            coefficients=coefficients,
            examples_at="the middle one of hook_names, whatever the numbers: an illustration",
        )
        if recorded is not None:
            for text in [
                *differences(recorded["request"], request),
                *(f"version of {text}" for text in differences(recorded["versions"], versions())),
            ]:
                warn(f"note: not as recorded: {text}", quiet=self.quiet)
        options = recorded_options(self)
        with open_parts(
            out, request, options=options, resume=self.resume is not None, warned=warned
        ) as parts:
            run = Run(out, request)
            directions, result = self._measure(task, coefficients, parts, executor)
            run.seconds = parts.seconds
            for text in parts.warned:
                keep_warning(text)
            tables = {"sweep": result.table, "layers": result.layers, "points": result.points}
            if self.examples:
                tables |= self._example_tables(task, directions, coefficients)
            spent = result.table.attrs["forward_equivalents"]
            try:
                run.write(tables, directions, forward_equivalents=spent, options=options)
            except FileError as error:
                raise FileError(
                    f"{error}; all cells are kept: make room, then `steerlens sweep --resume {out}`"
                ) from error
        if not self.quiet:
            print_layers(result.layers)
            print_cells(result)
            run.note(f"{len(result.table)} cells")

    def _measure(
        self, task: Task, coefficients: list[float], parts: Parts, executor: Executor | None
    ) -> tuple[Directions, SweepResult]:
        evidence = nulls = None
        with task.progress() as progress:
            if self.null is not None:
                evidence = collect_differences(
                    *(task.model, task.fit_on),
                    layers=self.layers,
                    position=task.position,
                    batch_size=self.batch_size,
                    progress=progress,
                )
                nulls = null_directions(evidence, n=self.null, seed=self.seed)
            directions = parts.directions(lambda: task.fit(progress, differences=evidence))
            study = task.study(progress, directions, budget=self.budget, executor=executor)
            result = study.sweep(coefficients, nulls=nulls, checkpoint=parts)
        return directions, result

    def _example_tables(
        self, task: Task, directions: Directions, coefficients: list[float]
    ) -> dict[str, pd.DataFrame]:
        """Of the first positive prompts, steered at the middle hook: what illustrates the run.

        `generations` at every coefficient, `tokens` at the smallest and the largest. Notes, kept in
        the record, say which texts are short because the context is full.
        """
        hook_name = task.hook_names[len(task.hook_names) // 2]
        ids = [pair.id for pair in task.measure_on][: self.examples]
        prompts = tokenize_pairs(task.model, task.measure_on).positive[: self.examples]
        note(f"Examples: {len(ids)} prompts at {hook_name}", quiet=self.quiet)
        with progress_of(quiet=self.quiet) as progress:
            steered = (task.model, prompts, directions)
            shared: dict[str, Any] = {"layer": hook_name, "ids": ids, "progress": progress}
            generations = generation_table(
                *steered, coefficients=coefficients, max_new_tokens=NEW_TOKENS, **shared
            )
            ends = [min(coefficients), max(coefficients)]
            tokens = token_damage(*steered, coefficients=ends, batch_size=self.batch_size, **shared)
        short = generations[generations.end == "context"]
        for prompt, n_tokens in short.groupby("prompt", sort=False).n_tokens.max().items():
            text = f"{n_tokens} of {NEW_TOKENS} new tokens fit the model's context"
            warn(f"note: {text} after prompt {prompt!r}", quiet=self.quiet)
        return {"generations": generations, "tokens": tokens}


def _note_interrupt(out: Path) -> None:
    started = read_started(out)
    if started is not None:
        text = (
            f"with {len(started.has_part)} of {len(started.hook_names)} hooks finished; "
            f"`steerlens sweep --resume {out}` goes on"
        )
    elif (out / RECORD).exists():
        text = f"(the tables in {out} are whole)"
    else:
        text = "before a hook was finished"
    note(f"steerlens: interrupted {text}", soft_wrap=True)
