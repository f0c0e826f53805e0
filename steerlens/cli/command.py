"""What all commands share: options as parameters, what is loaded, what comes next."""

import atexit
import gc
import inspect
import shlex
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_args, get_type_hints

import steerlens as sl
from steerlens.cli import options as opt
from steerlens.cli.options import template_args_of
from steerlens.cli.printing import note, quiet
from steerlens.errors import InputError
from steerlens.files import check_out_file, check_out_folder, locked, write_out

HOW = frozenset({"context", "out", "resume", "source", "workers", "dask", "quiet", "debug"})
"""Options that say how a command is run; the others decide what comes out."""


USUALLY = gc.get_threshold()
"""When Python looks for objects that only hold each other."""


@contextmanager
def rarely_collected() -> Iterator[None]:
    """A block in which Python seldom looks for objects that only hold each other.

    Importing makes a million objects that stay: to look through them takes an eighth of its time,
    and as Python ends, when they are not looked through either, more than a second.
    """
    gc.set_threshold(100_000, *USUALLY[1:])
    atexit.unregister(gc.freeze)
    atexit.register(gc.freeze)
    try:
        yield
    finally:
        gc.set_threshold(*USUALLY)


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command: its fields are the options (`options.csv`), its docstring is the help on it."""

    debug: bool = False

    WRITES_FOLDER: ClassVar[bool] = False

    @property
    def next(self) -> str:
        """What to run after it, to be copied."""
        return f"steerlens report {quoted(self.written)}"

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
    def run(self) -> "Command | None":
        """Check, load, measure, write, print; the command that ran, where it is another one."""

    def recorded_options(self) -> dict[str, Any]:
        """The options that decide what comes out, by the names of their fields."""
        return {n: getattr(self, n) for n in option_names(type(self)) if n not in HOW}

    def onward(self, to: "type[Command]", **options: Any) -> str:
        """Another command, with `options` and those of this one that it has too, except budgets."""
        shared = {
            option.name: getattr(self, option.name)
            for option in fields(self)
            if option.name not in HOW | {"budget"} and getattr(self, option.name) != option.default
        } | options
        words = ["steerlens", to.__name__.lower()]
        for name in option_names(to):
            value = shared.get(name)
            option = f"--{name.replace('_', '-')}"
            if value is None:
                continue
            if opt.kind_of(to.__name__.lower(), name) == "argument":
                words.insert(2, quoted(str(value)))
            elif isinstance(value, bool):
                words.append(option if value else f"--no-{option[2:]}")
            else:
                joint = "=" if str(value).startswith("-") else " "
                words.append(f"{option}{joint}{quoted(str(value))}")
        return " ".join(words)


@dataclass(frozen=True, kw_only=True)
class QuietCommand(Command):
    """A command that tells what it does."""

    quiet: bool = False


@dataclass(frozen=True, kw_only=True)
class LoadCommand(QuietCommand):
    """A command that loads a model."""

    device: str | None = None
    dtype: str = "float32"
    revision: str | None = None

    def rendering(self) -> dict[str, Any]:
        """What the model's tokenizer is told: nothing."""
        return {}

    def load(self, name: str) -> Any:
        """The model of that name."""
        model = sl.load_model(name, **self.loading(), progress=not self.quiet)
        # From here on what is left behind may hold tensors.
        gc.set_threshold(*USUALLY)
        return model

    def loading(self) -> dict[str, Any]:
        """What `load_model` is given. Raises `InputError` on no option."""
        where = {"device": opt.device_of(self.device), "revision": self.revision}
        return {**where, "dtype": opt.dtype_of(self.dtype), **self.rendering()}


@dataclass(frozen=True, kw_only=True)
class ModelCommand(LoadCommand):
    """A command that runs a model on prompts."""

    batch_size: int | None = None
    seed: int = 0
    template_args: str | None = None
    straddle: str = "error"

    def rendering(self) -> dict[str, Any]:
        """What the tokenizer is told (see `set_rendering`). Raises `InputError` on no option."""
        kinds = get_args(sl.data.prompts.Straddle)
        if self.straddle not in kinds:
            raise InputError(f"--straddle is {' or '.join(kinds)}, not {self.straddle!r}")
        arguments = template_args_of(self.template_args)
        return {"template_args": arguments, "straddle": self.straddle}


@dataclass(frozen=True, kw_only=True)
class PairsCommand(LoadCommand):
    """A command that reads pairs."""

    pairs: str = "sentiment"
    group: str = "group"
    columns: str | None = None
    form: str | None = None
    max_train_pairs: int | None = None

    def read_pairs(self) -> tuple[Any, Any]:
        """The pairs to fit on and those to measure on."""
        parts = (getattr(self, "test_pairs", None), getattr(self, "max_pairs", None))
        how: dict[str, Any] = {"columns": self.columns, "form": self.form}
        return opt.pairs_of(self.pairs, *parts, self.max_train_pairs, group=self.group, **how)

    def prepare(self, layers: str) -> Any:
        """As `task.prepare`, which is imported with all that it needs."""
        from steerlens.cli.task import prepare

        return prepare(self, layers)

    def note_read(self, *parts: Any) -> None:
        """Note what the pairs were read from: once nothing is left that could refuse them."""
        for name, card in {pairs.name: pairs.card for pairs in parts if pairs.card}.items():
            note(f"{name}: {card}")


@dataclass(frozen=True, kw_only=True)
class TableCommand(QuietCommand):
    """A command that writes one table, if it is asked to."""

    out: Path | None = None

    def write(self, table: Any) -> None:
        """Write the table as the CSV file that was asked for, if one was."""
        if self.out is not None:
            write_out(self.out, partial(sl.tables.write_csv, table))
            note(f"written to {self.out}")


def for_typer(command: type[Command]) -> Callable[..., None]:
    """What typer makes a command of: a function whose parameters are the fields of `command`."""
    hints, called = get_type_hints(command), command.__name__.lower()
    defaults = {option.name: option.default for option in fields(command)}

    def run(**values: Any) -> None:
        asked = command(**values)
        with ExitStack() as held:
            if asked.written is not None:
                held.enter_context(locked(asked.written, is_folder=command.WRITES_FOLDER))
            asked.check_written()
            held.enter_context(quiet(getattr(asked, "quiet", False)))
            note(f"next: {(asked.run() or asked).next}")

    run.__doc__ = command.__doc__
    run.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if defaults[name] is MISSING else defaults[name],
                annotation=Annotated[hints[name], opt.declaration_of(called, name)],
            )
            for name in option_names(command)
        ]
    )
    return run


def quoted(path: Path | str | None) -> str:
    """As a shell takes it."""
    return shlex.quote(str(path))


def option_names(command: type[Command]) -> list[str]:
    """The fields of a command: its own first, then those of its bases."""
    options = {option.name for option in fields(command)}
    declared = dict.fromkeys(n for cls in command.__mro__ for n in inspect.get_annotations(cls))
    return [name for name in declared if name in options]
