"""The commands that make, use and carry steering vectors."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

from steerlens.cli import options as opt
from steerlens.cli.command import Command, ModelCommand, PairsCommand, QuietCommand, prepare
from steerlens.cli.long_command import LongCommand
from steerlens.cli.printing import note, print_rows, print_table, print_texts, progress_of, say
from steerlens.data.prompts import Message, Prompt
from steerlens.data.reading import read_texts
from steerlens.engine.tokenization import TokenizedPrompt, tokenize_prompt
from steerlens.errors import InputError
from steerlens.measure.boundary import check_search
from steerlens.measure.cosines import cosine_table
from steerlens.models.hooked_model import HookedModel
from steerlens.models.hooks import resolve_hooks
from steerlens.models.loading import check_at_hand
from steerlens.models.packaged import DEFAULT_MODEL
from steerlens.models.weight_processing import UNKNOWN
from steerlens.progress import silent
from steerlens.runs.unfinished import clear_finished
from steerlens.steering import SteeringVector, operator_of, parse_coefficient
from steerlens.steering import generate as generate_text
from steerlens.steering.cache_positions import check_positions
from steerlens.steering.export import bake as bake_checkpoint
from steerlens.steering.export import to_gguf
from steerlens.steering.export.huggingface import check_is_new

VectorFile = Annotated[Path, typer.Argument(help="A .safetensors or .gguf vector.")]
OptionalModel = Annotated[
    str | None, "As elsewhere. Default: the vector's own if it is here, or the packaged one."
]
UNFINISHED = ".unfinished"
"""What the name of a file ends in, as that of the folder of its parts."""


@dataclass(frozen=True, kw_only=True)
class Extract(LongCommand, PairsCommand):
    """Fit a direction and write it as a steering vector, its boundary with it."""

    out: Annotated[Path | None, "File to write, .safetensors."] = None
    layers: Annotated[str | None, "As of `sweep`. Needed."] = None
    model: opt.Model = DEFAULT_MODEL
    test_pairs: opt.TestPairs = None
    max_pairs: opt.MaxPairs = None
    method: opt.Method = "mean_diff"
    position: opt.Position = None
    operator: Annotated[str, "add, ablate, clamp (with --value) or rotate."] = "add"
    value: Annotated[float | None, "What clamp sets the component to."] = None
    boundary: Annotated[
        bool, "Measure the coherence boundary too, so that coefficients like 80% work."
    ] = True
    on: Annotated[str, "Text of the boundary: positive, negative, neutral or a file."] = "positive"
    budget: Annotated[str, "Of the boundary, as in `steerlens boundary`."] = "relative=0.01"

    NEEDED: ClassVar[tuple[str, ...]] = ("layers",)

    @property
    def written(self) -> Path | None:
        """The file, of a run that is begun or gone on with."""
        if self.resume is None:
            return self.out
        return self.resume.with_name(self.resume.name.removesuffix(UNFINISHED))

    @staticmethod
    def parts_folder(out: Path) -> Path:
        """A folder beside the file, gone when that is written."""
        return out.with_name(out.name + UNFINISHED)

    @staticmethod
    def is_finished(out: Path) -> bool:
        """Whether the file is there; what a kill left beside it is removed."""
        folder = Extract.parts_folder(out)
        if out.is_file() and folder.is_dir():
            clear_finished(folder)
            with suppress(OSError):  # where a user's file lies in it
                folder.rmdir()
        return out.is_file()

    def measure(self) -> None:
        """Fit, measure the boundary, write the vector."""
        assert self.out is not None
        operator = operator_of(self.operator, value=self.value)
        text = opt.text_of(self.on)
        check_search(budget=self.budget, search_range=4.0)
        if self.out.suffix != ".safetensors":
            raise InputError(f"--out {str(self.out)!r}: expected a name that ends in .safetensors")
        task = prepare(self, str(self.layers))
        texts = list(read_texts(text)) if isinstance(text, Path) else None
        with self.opened(task.request("extract", texts=texts)) as run:
            with task.progress() as progress:
                study = task.study(progress, parts=run.parts, budget=self.budget)
                table = study.boundary(on=text).layers if self.boundary else study.layers
            vector = SteeringVector.from_directions(
                task.model,
                study.fitted,
                layers=str(self.layers),
                operator=operator,
                layer_table=table,
                dataset=task.fit_on.name,
            )
            vector.save(self.out)
        self.is_finished(self.out)
        if not self.quiet:
            _print_vector(vector)
            note(f"written to {self.out}")


@dataclass(frozen=True, kw_only=True)
class Generate(ModelCommand, PairsCommand):
    """Greedy continuations of one prompt at several coefficients, side by side."""

    prompt: Annotated[str, "What the user says."]
    vector: Annotated[Path | None, "A .safetensors or .gguf vector."] = None
    layer: Annotated[str | None, "Layer or hook name: of the vector, or to fit a direction at."] = (
        None
    )
    coefficients: Annotated[
        str,
        typer.Option(
            "--coefficients",
            "--coefficient",
            help="Residual units, 0.1norm (residual norms) or 80% (of the boundary), by commas.",
        ),
    ] = "-8,0,8"
    positions: Annotated[
        str,
        "Tokens to steer: all, prompt, generated, generated[0:10], last, think or answer; several "
        "joined by +.",
    ] = "all"
    model: OptionalModel = None
    method: opt.Method = "mean_diff"
    position: opt.Position = None
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 40
    raw: Annotated[bool, typer.Option("--raw", help="No chat template round the prompt.")] = False

    def run(self) -> None:
        """What the command does."""
        strengths = opt.strengths_of(self.coefficients)
        check_positions(self.positions)
        if self.vector is not None:
            steered: Any
            steered, model = _load_with_model(self.vector, self.model, self.load)
            if self.layer is not None:
                steered = steered.at(*resolve_hooks(model, self.layer))
            prompt = self._tokenize(model)
        elif self.layer is None:
            raise InputError("give --vector FILE, or --layer to fit a direction there")
        elif any(parse_coefficient(strength).unit != "residual" for strength in strengths):
            raise InputError(
                "norms and shares of the boundary are those of a --vector (see "
                "`steerlens extract`); give --coefficients in residual units"
            )
        else:
            model, prompt, steered = self._fit_at(self.layer)
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "positions": self.positions,
        }
        texts: list[str] = []
        with progress_of(quiet=self.quiet) as progress:
            tell = progress or silent
            tell("continuations", 0, len(strengths))
            for strength in strengths:
                texts.append(generate_text(model, prompt, steered, strength, **options))
                tell("continuations", len(texts), len(strengths))
        print_texts(self.prompt, strengths, texts)

    def _tokenize(self, model: HookedModel) -> TokenizedPrompt:
        chat: Prompt = self.prompt if self.raw else (Message("user", self.prompt),)
        return tokenize_prompt(model, chat)

    def _fit_at(self, layer: str) -> tuple[HookedModel, TokenizedPrompt, dict[str, Any]]:
        """The model, the prompt, and a direction fitted at each hook of `layer`."""
        task = prepare(self, layer)
        prompt = self._tokenize(task.model)
        with task.progress() as progress:
            directions = task.fit(progress, layers=layer)
        return task.model, prompt, {name: directions[name] for name in task.hook_names}


@dataclass(frozen=True, kw_only=True)
class Export(QuietCommand):
    """Between steerlens's safetensors and llama.cpp's control vectors (.gguf), both ways."""

    source: VectorFile
    target: Annotated[Path, typer.Argument(help="File to write: .gguf or .safetensors.")]

    @property
    def written(self) -> Path:
        """Its target."""
        return self.target

    def run(self) -> None:
        """What the command does."""
        vector, target = opt.read_vector(self.source), self.target
        if target.suffix == ".gguf":
            to_gguf(vector, target)
        elif target.suffix == ".safetensors":
            vector.save(target)
        else:
            raise InputError(f"expected a target .gguf or .safetensors, got {target.name!r}")
        note(f"{vector!r} written to {target}", quiet=self.quiet)


@dataclass(frozen=True, kw_only=True)
class Bake(QuietCommand):
    """Write a Hugging Face checkpoint that is steered by itself, for plain transformers."""

    vector: VectorFile
    out: Annotated[Path, "Folder for the checkpoint, new or empty."]
    coefficient: Annotated[str, "Residual units, 0.1norm, or 80% of the boundary."]
    model: OptionalModel = None

    def check_written(self) -> None:
        """See that the folder is new or empty."""
        check_is_new(self.out)

    def run(self) -> None:
        """What the command does."""
        strengths = opt.strengths_of(self.coefficient)
        if len(strengths) != 1:
            raise InputError(f"expected one --coefficient, got {self.coefficient!r}")
        vector, model = _load_with_model(self.vector, self.model, self.load)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # noted when the model was loaded
            bake_checkpoint(model, vector, strengths[0], self.out)
        note(f"{vector!r} at {self.coefficient} written to {self.out}", quiet=self.quiet)


@dataclass(frozen=True, kw_only=True)
class Show(Command):
    """What a vector's file says: where it acts, how strongly, and where it comes from."""

    vector: VectorFile

    def run(self) -> None:
        """What the command does."""
        _print_vector(opt.read_vector(self.vector))


@dataclass(frozen=True, kw_only=True)
class CompareVectors(Command):
    """Cosines between the directions of some vectors, and across the layers of each."""

    vectors: Annotated[list[Path], typer.Argument(help="Two or more vectors, or one of layers.")]

    def run(self) -> None:
        """What the command does."""
        names = [path.name for path in self.vectors]
        if len(set(names)) < len(names):
            names = [str(path) for path in self.vectors]
        vectors = dict(zip(names, map(opt.read_vector, self.vectors), strict=True))
        if len(vectors) < len(names):
            raise InputError("the same file is given twice")
        columns = ["vector_a", "hook_a", "vector_b", "hook_b", "cosine", "random_sd"]
        print_rows(cosine_table(vectors), "Cosines", columns)


def _load_with_model(
    path: Path, model_name: str | None, load: Callable[[str], HookedModel]
) -> tuple[SteeringVector, HookedModel]:
    """A vector and the model to use it on, its own where that is at hand; where they differ is
    noted."""
    vector = opt.read_vector(path)
    if model_name is None:
        model_name = vector.origin.model
        if model_name == UNKNOWN:
            raise InputError("the vector does not say which model it was made on; give --model")
        check_at_hand(model_name, f"the vector {str(path)!r}")
    model = load(model_name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vector.check_model(model)
    for warning in caught:
        note(f"note: {warning.message}")
    return vector, model


def _print_vector(vector: SteeringVector) -> None:
    say(repr(vector))
    for name, value in vector.describe().items():
        say(f"  {name}: {value}")
    measured = vector.calibration
    columns = (vector.scale, measured.resid_norm, measured.boundary_neg, measured.boundary_pos)
    numbers = [column.tolist() for column in columns]
    rows = [
        [name, *(f"{number:.4g}" for number in row)]
        for name, *row in zip(vector.hook_names, *numbers, strict=True)
    ]
    print_table(None, ["hook", "scale", "resid norm", "boundary -", "boundary +"], rows)
