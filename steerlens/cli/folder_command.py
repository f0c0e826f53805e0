"""What the commands that write a run folder share: what is finished is kept, and gone on with."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, get_type_hints

import typer

from steerlens.cli.command import Run, RunCommand, recorded_options
from steerlens.cli.printing import note
from steerlens.cli.run_warnings import warn, warned
from steerlens.errors import FileError, InputError
from steerlens.models.loading import check_at_hand
from steerlens.runs.record import RECORD, differences, versions
from steerlens.runs.unfinished import (
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


@dataclass(frozen=True, kw_only=True)
class FolderCommand(RunCommand):
    """A command that writes a run folder, keeps what it finishes, and goes on after a stop."""

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

    NEEDED: ClassVar[tuple[str, ...]] = ()
    """Options without a default; a record that is gone on with, or repeated, has them."""

    @property
    def written(self) -> Path | None:
        """The folder, of a run that is begun or gone on with."""
        return self.out if self.resume is None else self.resume

    def measure(self) -> None:
        """Check, load, measure and write into `out`, inside `opened`; print."""
        raise NotImplementedError

    def run(self) -> None:
        """What the command does."""
        if self.resume is not None and (self.out is not None or self.source is not None):
            raise FileError("--resume goes on in its own folder: leave out --out and --from")
        out = self.written
        if out is None:
            raise FileError(
                "expected --out with a folder to write to, or --resume with one to go on"
            )
        command = replace(self, out=out)
        try:
            if self.resume is not None:
                started = self._unfinished(out)
                if started is None:
                    return
                command = command._as_recorded(started.request, started.options, out)
            elif self.source is not None:
                recorded = read_finished(self.source)
                command = command._as_recorded(
                    recorded["request"], recorded["options"], self.source
                )
            missing = [name for name in self.NEEDED if getattr(command, name) is None]
            if missing:
                raise InputError(f"expected {', '.join(f'--{name}' for name in missing)}")
            command.measure()
        except KeyboardInterrupt:
            _note_interrupt(out)
            raise typer.Exit(INTERRUPTED) from None

    @contextmanager
    def opened(self, request: Mapping[str, Any]) -> Iterator[Run]:
        """The run of `request` in `out`, for this process alone (see `open_parts`)."""
        assert self.out is not None
        if self.source is not None:
            recorded = read_finished(self.source)
            for text in [
                *differences(recorded["request"], request),
                *(f"version of {text}" for text in differences(recorded["versions"], versions())),
            ]:
                warn(f"note: not as recorded: {text}", quiet=self.quiet)
        options, resumes = recorded_options(self), self.resume is not None
        with open_parts(self.out, request, options=options, resume=resumes, warned=warned) as parts:
            yield Run(self.out, request, parts, options)

    def _unfinished(self, folder: Path) -> Started | None:
        """What is to be gone on with; None when the run is finished."""
        started = read_started(folder)
        if started is not None:
            text = f"Going on in {folder}: {started.finished} are finished"
        elif (folder / RECORD).exists():
            clear_finished(folder)
            text = f"{folder} is finished: nothing to do"
        else:
            raise FileError(f"{str(folder)!r} holds no unfinished run; start one with --out")
        note(text, quiet=self.quiet)
        return started

    def _as_recorded(
        self, request: Mapping[str, Any], options: Mapping[str, Any], path: Path
    ) -> "FolderCommand":
        """This command with the options of a record, but for those given on the command line.

        Raises `FileError` unless the record's are those of this command, and `InputError` where
        only the record of another run says to fetch a model.
        """
        kinds, names = get_type_hints(type(self)), recorded_options(self)
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
        sources = {name: self.context.get_parameter_source(name) for name in names}
        asked = [name for name, source in sources.items() if source and source.name == GIVEN]
        if self.resume is None and "model" not in asked:
            check_at_hand(options["model"], f"the record {str(path)!r}")
        return replace(self, **{name: options[name] for name in names if name not in asked})


def _note_interrupt(out: Path) -> None:
    started = read_started(out)
    if started is not None:
        text = f"with {started.finished} finished; `{started.resume} {out}` goes on"
    elif (out / RECORD).exists():
        text = f"(the tables in {out} are whole)"
    else:
        text = "before anything was finished"
    note(f"steerlens: interrupted {text}", soft_wrap=True)
