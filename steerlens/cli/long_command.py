"""What long commands share: what is finished is kept in a folder, and gone on with."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import typer

import steerlens as sl
from steerlens.cli.command import Command, ModelCommand
from steerlens.cli.options import kind_of
from steerlens.cli.printing import note, quiet, warn, warned
from steerlens.errors import FileError, InputError

if TYPE_CHECKING:
    _Context = typer.Context
else:
    # What typer passes is the base class, whose module differs between its versions.
    _Context = typer.Context.__base__

INTERRUPTED = 130
RECORD = "run.json"
GIVEN = "COMMANDLINE"
"""What typer calls the source of an option that was given."""


@dataclass(frozen=True, kw_only=True)
class LongCommand(ModelCommand):
    """A command that keeps what it finishes in a folder, and goes on after a stop."""

    context: _Context
    out: Path | None = None
    resume: Path | None = None

    def given(self, *names: str) -> list[str]:
        """Those of the options that stand on the command line."""
        sources = {name: self.context.get_parameter_source(name) for name in names}
        return [name for name, source in sources.items() if source and source.name == GIVEN]

    @property
    def written(self) -> Path | None:
        """What it writes, of a run that is begun or gone on with."""
        return self.out if self.resume is None else self.resume

    @property
    def repeated(self) -> Path | None:
        """The record of a finished run that is run again, if there is one."""
        return None

    @staticmethod
    def parts_folder(out: Path) -> Path:
        """Where what is finished is kept, by what is written."""
        return out

    @staticmethod
    def clear_if_finished(out: Path) -> bool:
        """Remove what a kill left beside what is written; False where that is not."""
        if not (out / RECORD).exists():
            return False
        sl.runs.unfinished.clear_finished(out)
        return True

    @abstractmethod
    def measure(self) -> None:
        """Check, load, measure and write `out`, inside `opened`; print."""

    def run(self) -> Command:
        if self.resume is not None and (self.out is not None or self.repeated is not None):
            raise FileError("--resume goes on where the run was begun: leave out --out and --from")
        out = self.written
        if out is None:
            raise FileError(
                "expected --out with what to write, or --resume with the folder of a run to go on "
                "with"
            )
        command = replace(self, out=out)
        try:
            if self.resume is not None:
                started = self._unfinished(out)
                if started is None:
                    return self
                command = command._as_recorded(started.request, started.options, out)
            elif self.repeated is not None:
                recorded = sl.runs.unfinished.read_finished(self.repeated)
                command = command._as_recorded(
                    recorded["request"], recorded["options"], self.repeated
                )
            called = type(self).__name__.lower()
            missing = [name for name, of in vars(command).items() if of is None]
            missing = [name for name in missing if kind_of(called, name) == "needed"]
            if missing:
                raise InputError(f"expected {', '.join(f'--{name}' for name in missing)}")
            command.measure()
            return command
        except KeyboardInterrupt:
            self._note_interrupt(out)
            raise typer.Exit(INTERRUPTED) from None

    @contextmanager
    def opened(self, request: Mapping[str, Any]) -> Iterator[Any]:
        """The run of `request` in `out`, for this process alone (see `open_parts`)."""
        from steerlens.cli.task import Run

        assert self.out is not None
        if self.repeated is not None:
            recorded = sl.runs.unfinished.read_finished(self.repeated)
            for text in sl.runs.unfinished.changes(recorded, request):
                warn(f"note: not as recorded: {text}")
        options, resumes = self.recorded_options(), self.resume is not None
        folder = self.parts_folder(self.out)
        how: dict[str, Any] = {"options": options, "resume": resumes, "warned": warned}
        with sl.runs.unfinished.open_parts(folder, request, **how) as parts:
            yield Run(self.out, request, parts, options)

    def _unfinished(self, out: Path) -> Any:
        """What is to be gone on with; None when the run is finished."""
        folder = self.parts_folder(out)
        started = sl.runs.unfinished.read_started(folder)
        if started is not None:
            text = f"Going on in {folder}: {started.finished} are finished"
        elif self.clear_if_finished(out):
            text = f"{out} is finished: nothing to do"
        else:
            raise FileError(f"{str(folder)!r} holds no unfinished run; start one with --out")
        note(text)
        return started

    def _as_recorded(
        self, request: Mapping[str, Any], options: Mapping[str, Any], path: Path
    ) -> "LongCommand":
        """This command with the options of a record, but for those given on the command line."""
        kinds, names = get_type_hints(type(self)), self.recorded_options()
        name = type(self).__name__.lower()
        wrong = sorted({*names} ^ {*options}) or [
            name
            for name in names
            if not isinstance(options[name], kinds[name])
            or (isinstance(options[name], bool) and kinds[name] is not bool)
        ]
        if wrong:
            of = request.get("command", "another command")
            raise FileError(
                f"the record in {str(path)!r}, of {of}, does not have the options of {name} "
                f"({', '.join(wrong)}); it may be of another steerlens or another command"
            )
        asked = self.given(*names)
        if self.resume is None and "model" not in asked:
            sl.models.loading.check_at_hand(options["model"], f"the record {str(path)!r}")
        return replace(self, **{name: options[name] for name in names if name not in asked})

    def _note_interrupt(self, out: Path) -> None:
        folder = self.parts_folder(out)
        started = sl.runs.unfinished.read_started(folder)
        if started is not None:
            text = f"with {started.finished} finished; `{started.resume} {folder}` goes on"
        elif (out / RECORD).exists():
            text = f"(the tables in {out} are whole)"
        else:
            text = "before anything was finished"
        with quiet(False):
            note(f"steerlens: interrupted {text}")


@dataclass(frozen=True, kw_only=True)
class FolderCommand(LongCommand):
    """A long command that writes a run folder, in which what is finished is kept."""

    out: Path | None = None
    source: Path | None = None

    WRITES_FOLDER = True

    @property
    def repeated(self) -> Path | None:
        """As `--from` says."""
        return self.source
