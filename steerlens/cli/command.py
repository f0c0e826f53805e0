"""What all commands share: options as parameters, what is loaded, what is recorded and noted."""

import hashlib
import inspect
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_origin, get_type_hints

import pandas as pd
import typer

from steerlens.cli import options as opt
from steerlens.cli.options import DEBUG, pairs_record, read_vector, template_args_of
from steerlens.cli.printing import note, progress_of
from steerlens.cli.run_warnings import keep_warning, warned
from steerlens.data.pairs import ContrastivePairs
from steerlens.data.prompts import Straddle
from steerlens.directions.differences import Differences
from steerlens.directions.directions import Directions
from steerlens.directions.fitting import check_pairs, default_position, fit
from steerlens.directions.methods import method_of
from steerlens.engine.labels import OWN_TOKENS
from steerlens.engine.positions import Position, as_position
from steerlens.errors import FileError, InputError
from steerlens.files import check_out_file, check_out_folder, locked, write_out
from steerlens.measure.interventions import in_order, position_of
from steerlens.measure.study import Study
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import resolve_hooks
from steerlens.models.identity import provenance
from steerlens.models.loading import load_model
from steerlens.models.packaged import DEFAULT_MODEL
from steerlens.progress import Progress
from steerlens.runs.record import write_run
from steerlens.runs.unfinished import Parts
from steerlens.steering import SteeringVector
from steerlens.tables import write_csv

HOW = frozenset({"context", "out", "resume", "source", "workers", "dask", "quiet", "debug"})
"""Options that say how a command is run; the others decide what comes out."""
DATA = frozenset(
    {"model", "pairs", "test_pairs", "max_pairs", "layers", "layer", "items", "max_items"}
    | {"off_target"}
)
"""Options that name a model, data or hooks: a request has what they name."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its fields are the options, its docstring the help, `run` what it does.

    A field is `Annotated` with its help, or with what typer takes where it needs more than that.
    """

    debug: Annotated[bool, typer.Option(DEBUG, help="Show a traceback on an error.")] = False

    WRITES_FOLDER: ClassVar[bool] = False

    @property
    def written(self) -> Path | None:
        """The file or folder that it writes, which no other run may write meanwhile."""
        return getattr(self, "out", None)

    def check_written(self) -> None:
        """Raise `SteerlensError` where it may not write that, before any work."""
        if self.written is not None:
            check = check_out_folder if self.WRITES_FOLDER else check_out_file
            check(self.written)

    @abstractmethod
    def run(self) -> None:
        """Check, load, measure, write, print."""


@dataclass(frozen=True, kw_only=True)
class QuietCommand(Command):
    """A command that tells what it does."""

    quiet: Annotated[bool, typer.Option("--quiet", help="Errors only; no tables of a sweep.")] = (
        False
    )

    def rendering(self) -> dict[str, Any]:
        """What the model's tokenizer is told: nothing."""
        return {}

    def load(self, name: str) -> HookedModel:
        """The model of that name."""
        model: HookedModel = load_model(name, **self.rendering(), progress=not self.quiet)
        return model


@dataclass(frozen=True, kw_only=True)
class ModelCommand(QuietCommand):
    """A command that runs a model on prompts."""

    batch_size: Annotated[
        int | None, "Prompts a forward pass. Default: what the device can use."
    ] = None
    seed: Annotated[
        int,
        typer.Option(min=0, help="Seed of `random`, the bootstrap and the labels drawn."),
    ] = 0
    template_args: Annotated[
        str | None,
        "Arguments of the chat template: enable_thinking=false, several by commas, or in JSON.",
    ] = None
    straddle: Annotated[
        str, "A token on both sides of a prompt's end: error, or back (the continuation's first)."
    ] = "error"

    def rendering(self) -> dict[str, Any]:
        """What the tokenizer is told (see `set_rendering`). Raises `InputError` on no option."""
        if self.straddle not in get_args(Straddle):
            names = " or ".join(get_args(Straddle))
            raise InputError(f"--straddle is {names}, not {self.straddle!r}")
        arguments = template_args_of(self.template_args)
        return {"template_args": arguments, "straddle": self.straddle}


@dataclass(frozen=True, kw_only=True)
class PairsCommand(QuietCommand):
    """A command that reads pairs."""

    pairs: opt.Pairs = "sentiment"
    group: opt.Group = "group"
    columns: opt.Columns = None
    form: opt.Form = None

    @property
    def reading(self) -> dict[str, Any]:
        """How the pairs are read."""
        return {"group": self.group, "columns": self.columns, "form": self.form}

    def read_pairs(self) -> tuple[ContrastivePairs, ContrastivePairs]:
        """The pairs to fit on and those to measure on."""
        parts = (getattr(self, "test_pairs", None), getattr(self, "max_pairs", None))
        return opt.pairs_of(self.pairs, *parts, **self.reading)

    def note_read(self, *parts: ContrastivePairs) -> None:
        """Note what the pairs were read from: once nothing is left that could refuse them."""
        for name, card in {pairs.name: pairs.card for pairs in parts if pairs.card}.items():
            note(f"{name}: {card}", quiet=self.quiet)


@dataclass(frozen=True, kw_only=True)
class TableCommand(QuietCommand):
    """A command that writes one table, if it is asked to."""

    out: Annotated[Path | None, "CSV file to write."] = None

    def write(self, table: pd.DataFrame) -> None:
        """Write the table as the CSV file that was asked for, if one was."""
        if self.out is not None:
            write_out(self.out, partial(write_csv, table))
            note(f"written to {self.out}", quiet=self.quiet)


def for_typer(command: type[Command]) -> Callable[..., None]:
    """What typer makes a command of: a function whose parameters are the fields of `command`."""
    hints = get_type_hints(command, include_extras=True)
    defaults = {option.name: option.default for option in fields(command)}

    def run(**values: Any) -> None:
        asked = command(**values)
        with ExitStack() as held:
            if asked.written is not None:
                held.enter_context(locked(asked.written, is_folder=command.WRITES_FOLDER))
            asked.check_written()
            asked.run()

    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if defaults[name] is MISSING else defaults[name],
                annotation=_with_option(hints[name]),
            )
            for name in option_names(command)
        ]
    )
    return run


def option_names(command: type[Command]) -> list[str]:
    """The fields of a command: its own first, then those of its bases."""
    options = {option.name for option in fields(command)}
    declared = dict.fromkeys(n for cls in command.__mro__ for n in inspect.get_annotations(cls))
    return [name for name in declared if name in options]


def _with_option(hint: Any) -> Any:
    """An annotation for typer, where a help text alone was given."""
    if get_origin(hint) is Annotated and isinstance(hint.__metadata__[0], str):
        return Annotated[hint.__origin__, typer.Option(help=hint.__metadata__[0])]
    return hint


def recorded_options(command: Command) -> dict[str, Any]:
    """The options that decide what comes out, by the names of their fields."""
    return {n: getattr(command, n) for n in option_names(type(command)) if n not in HOW}


def request_of(
    name: str, command: Command, model: HookedModel, data: Mapping[str, Any], **resolved: Any
) -> dict[str, Any]:
    """What a run's record says was asked for.

    `data` is what options such as `--pairs` name, `resolved` has values that are not as given.
    """
    settings = {k: v for k, v in recorded_options(command).items() if k not in DATA}
    head = {"command": name, "model": provenance(model).to_dict(), **data}
    return head | settings | resolved


@dataclass(frozen=True)
class Task:
    """What a command works on: the pairs, the loaded model and the hooks that its options name.

    A `vector` is measured in place of directions that are fitted.
    """

    command: Any
    model: HookedModel
    fit_on: ContrastivePairs
    measure_on: ContrastivePairs
    hook_names: tuple[str, ...]
    position: Position
    vector: SteeringVector | None = None

    def request(self, name: str, **resolved: Any) -> dict[str, Any]:
        """As `request_of`, with the pairs, the hooks and the position."""
        vector, hashes = self.vector, self.fit_on.prompt_hashes
        resolved = {"position": self.position, **resolved}
        data: dict[str, Any] = {}
        if vector is None:
            data["fitted_on"] = pairs_record(self.fit_on)
        else:
            hashes, path = vector.origin.pair_hashes, Path(self.command.vector)
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            resolved |= {
                "method": vector.origin.method,
                "vector": {"file": str(path), "sha256": sha256},
            }
        data |= {
            "measured_on": pairs_record(self.measure_on),
            "n_pairs_fitted_on": self.measure_on.count_among(hashes),
            "hook_names": self.hook_names,
        }
        return request_of(name, self.command, self.model, data, **resolved)

    @contextmanager
    def progress(self) -> Iterator[Progress | None]:
        """Note what is fitted or given, then show the progress of the block."""
        quiet = self.command.quiet
        pairs, method = self.fit_on, self.command.method
        self.command.note_read(pairs, self.measure_on)
        fitting = f"Fitting {method} on {len(pairs)} pairs of {pairs.name}"
        note(fitting if self.vector is None else f"Measuring {self.vector!r}", quiet=quiet)
        with progress_of(quiet=quiet) as progress:
            yield progress

    def fit(
        self,
        progress: Progress | None,
        *,
        layers: str | None = None,
        differences: Differences | None = None,
    ) -> Directions:
        """Directions at `layers` (those of the options), from `differences` if they are there."""
        return fit(
            self.model,
            self.fit_on,
            method=self.command.method,
            layers=self.command.layers if layers is None else layers,
            position=self.position,
            differences=differences,
            own_tokens=getattr(self.command, "own_tokens", OWN_TOKENS),
            **self.settings(progress),
        )

    def study(
        self,
        progress: Progress | None,
        *,
        parts: Parts | None = None,
        **settings: Any,
    ) -> Study:
        """What the directions (kept in `parts`, or fitted), or the vector, are measured on."""
        settings |= {"checkpoint": parts, **self.settings(progress)}
        if self.vector is not None:
            return Study(self.model, self.measure_on, self.vector, **settings)
        fit = partial(self.fit, progress)
        directions = fit() if parts is None else parts.directions(fit)
        return Study(
            self.model, self.measure_on, directions, layers=self.command.layers, **settings
        )

    def settings(self, progress: Progress | None) -> dict[str, Any]:
        """What every measurement is given besides its own."""
        seed, batch_size = self.command.seed, self.command.batch_size
        return {"seed": seed, "batch_size": batch_size, "progress": progress}


def prepare(command: Any, layers: str) -> Task:
    """Read the pairs, load the model, resolve the hooks.

    Raises `SteerlensError` of what cannot be done, where possible before the model is loaded.
    """
    method_of(command.method)
    vector = None
    if getattr(command, "vector", None) is not None:
        vector = _vector_of(command)
    fit_on, measure_on = command.read_pairs()
    position: Position
    if vector is not None:
        position = position_of(vector, None)
    else:
        check_pairs(fit_on, command.method)
        given = command.position
        position = default_position(command.method, fit_on) if given is None else as_position(given)
    model = command.load(command.model or DEFAULT_MODEL)
    hook_names = resolve_hooks(model, layers) if vector is None else (" + ".join(in_order(vector)),)
    return Task(command, model, fit_on, measure_on, hook_names, position, vector)


def _vector_of(command: Any) -> SteeringVector:
    given = [f"--{name}" for name in command.given("method", "layers", "position")]
    if given:
        raise InputError(
            f"a --vector is measured as a whole, at its own hooks: leave out {', '.join(given)}"
        )
    return read_vector(Path(command.vector))


@dataclass
class Run:
    """A run of a command into a folder, timed from its beginning to when it is written."""

    out: Path
    request: Mapping[str, Any]
    parts: Parts
    options: Mapping[str, Any]
    seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)
    spent: float | None = None

    def write(
        self,
        tables: Mapping[str, pd.DataFrame],
        directions: Directions | SteeringVector | Mapping[str, Directions],
        *,
        forward_equivalents: float | None = None,
        **more: Any,
    ) -> None:
        """As `write_run`, with time and warnings, those from before the run was stopped too."""
        self.seconds = time.perf_counter() - self.started + self.parts.seconds
        self.spent = forward_equivalents
        for text in self.parts.warned:
            keep_warning(text)
        try:
            write_run(
                self.out,
                tables,
                directions,
                self.request,
                seconds=self.seconds,
                forward_equivalents=forward_equivalents,
                warnings=warned(),
                options=self.options,
                **more,
            )
        except FileError as error:
            raise FileError(f"{error}; what was measured is kept: {self.parts.go_on}") from error

    def note(self, count: str) -> None:
        """Say how many of what were written, where, and what it took."""
        note(
            f"{count} in {self.seconds:.0f} s ({self.spent:.0f} forward-equivalents); "
            f"written to {self.out}"
        )
