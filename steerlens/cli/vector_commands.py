"""The commands that make, use and carry steering vectors."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import steerlens as sl
from steerlens.cli import options as opt
from steerlens.cli.boundary_commands import Layers
from steerlens.cli.command import Command, LoadCommand, ModelCommand, PairsCommand, quoted
from steerlens.cli.long_command import LongCommand
from steerlens.cli.printing import (
    note,
    print_rows,
    print_table,
    print_texts,
    progress_of,
    say,
    short,
)
from steerlens.errors import InputError
from steerlens.models.packaged import DEFAULT_MODEL

PROMPT = "How was your day?"
"""After which a vector is shown to write."""
OF_VECTOR: dict[str, Any] = dict.fromkeys(
    ("pairs", "group", "columns", "form", "max_train_pairs", "method", "position")
)
"""Options that a vector makes needless: it was fitted with them."""
UNFINISHED = ".unfinished"
"""What the name of a file ends in, as that of the folder of its parts."""


@dataclass(frozen=True, kw_only=True)
class Extract(LongCommand, PairsCommand):
    """Fit a steering vector and write it, its boundary with it."""

    out: Path | None = None
    layers: str | None = None
    model: str = DEFAULT_MODEL
    test_pairs: str | None = None
    max_pairs: int | None = None
    method: str = "mean_diff"
    position: str | None = None
    operator: str = "add"
    value: float | None = None
    boundary: bool = True
    on: str = "positive"
    budget: str = "relative=0.01"

    @property
    def next(self) -> str:
        return self.onward(Generate, vector=self.written, prompt=PROMPT, **OF_VECTOR)

    @property
    def written(self) -> Path | None:
        if self.resume is None:
            return self.out
        return self.resume.with_name(self.resume.name.removesuffix(UNFINISHED))

    @staticmethod
    def parts_folder(out: Path) -> Path:
        """A folder beside the file, gone when that is written."""
        return out.with_name(out.name + UNFINISHED)

    @staticmethod
    def clear_if_finished(out: Path) -> bool:
        """Remove what a kill left beside the file; False where that is not there."""
        folder = Extract.parts_folder(out)
        if out.is_file() and folder.is_dir():
            sl.runs.unfinished.clear_finished(folder)
            with suppress(OSError):  # where a user's file lies in it
                folder.rmdir()
        return out.is_file()

    def measure(self) -> None:
        assert self.out is not None
        operator = sl.steering.operator_of(self.operator, value=self.value)
        text, texts = opt.text_of(self.on)
        sl.measure.boundary.check_search(budget=self.budget)
        if self.out.suffix != ".safetensors":
            raise InputError(f"--out {str(self.out)!r}: expected a name that ends in .safetensors")
        task = self.prepare(str(self.layers))
        with self.opened(task.request("extract", texts=texts)) as run:
            with task.progress() as progress:
                study = task.study(progress, parts=run.parts, budget=self.budget)
                table = study.boundary(on=text).layers if self.boundary else study.layers
            vector = sl.SteeringVector.from_directions(
                *(task.model, study.fitted),
                layers=str(self.layers),
                operator=operator,
                layer_table=table,
                dataset=task.fit_on.name,
            )
            vector.save(self.out)
        self.clear_if_finished(self.out)
        _print_vector(vector)
        note(f"written to {self.out}")


@dataclass(frozen=True, kw_only=True)
class Generate(ModelCommand, PairsCommand):
    """What the model writes at several coefficients, side by side."""

    prompt: str
    vector: Path | None = None
    layer: str | None = None
    coefficients: str = "-8,0,8"
    positions: str = "all"
    model: str | None = None
    method: str = "mean_diff"
    position: str | None = None
    max_new_tokens: int = 40
    raw: bool = False

    @property
    def next(self) -> str:
        if self.vector is None:
            made = {"layers": self.layer, "out": "vector.safetensors"}
            return self.onward(Extract, pairs=self.pairs, **made)
        strengths = opt.strengths_of(self.coefficients)
        pushes = [s for s in strengths if sl.steering.parse_coefficient(s).number]
        return self.onward(Bake, coefficient=pushes[-1] if pushes else "8", out="steered-model")

    def run(self) -> None:
        strengths = opt.strengths_of(self.coefficients)
        sl.steering.cache_positions.check_positions(self.positions)
        if self.vector is not None:
            steered: Any
            steered, model = load_with_model(self.vector, self.model, self.load)
            if self.layer is not None:
                steered = steered.at(*sl.resolve_hooks(model, self.layer))
            prompt = self._tokenize(model)
        elif self.layer is None:
            raise InputError("give --vector FILE, or --layer to fit a direction there")
        else:
            model, prompt, steered = self._fit_at(self.layer, strengths)
        how: dict[str, Any] = {"positions": self.positions, "max_new_tokens": self.max_new_tokens}
        with progress_of() as progress:
            written = sl.steering.generate_texts(
                *(model, [prompt], steered, strengths), progress=progress, **how
            )
        texts = [sl.steering.decoded(model, text.ids) for text in written]
        print_texts(self.prompt, strengths, texts)

    def _tokenize(self, model: Any) -> Any:
        chat = self.prompt if self.raw else (sl.Message("user", self.prompt),)
        return sl.engine.tokenize_prompt(model, chat)

    def _fit_at(self, layer: str, strengths: list[str]) -> tuple[Any, Any, Any]:
        """The model, the prompt, and a vector fitted at each hook of `layer`."""
        task = self.prepare(layer)
        prompt = self._tokenize(task.model)
        with task.progress() as progress:
            directions = task.fit(progress, layers=layer)
            return task.model, prompt, task.vector_at(progress, directions, layer, strengths)


@dataclass(frozen=True, kw_only=True)
class Export(LoadCommand):
    """A vector for llama.cpp (and back), EasySteer, PEFT and more."""

    source: Path
    target: Path
    to: str | None = None
    coefficient: str | None = None
    model: str | None = None

    @property
    def next(self) -> str:
        is_vector = self.target.suffix in (".gguf", ".safetensors")
        return f"steerlens vectors show {quoted(self.target if is_vector else self.source)}"

    @property
    def written(self) -> Path:
        return self.target

    def check_written(self) -> None:
        if self.to == "peft":
            sl.export.huggingface.check_is_new(self.target)
        else:
            super().check_written()

    def run(self) -> None:
        vector, target = sl.export.gguf_file.read_vector(self.source), self.target
        if self.to is not None:
            self._export_to(vector, self.to)
        elif self.coefficient is not None or self.model is not None:
            raise InputError(
                "--coefficient is of --to easysteer, lm-eval and peft, --model of --to peft"
            )
        elif target.suffix == ".gguf":
            sl.export.to_gguf(vector, target)
        elif target.suffix == ".safetensors":
            vector.save(target)
        else:
            raise InputError(f"expected a target .gguf or .safetensors, got {target.name!r}")
        note(f"{vector!r} written to {target}")

    def _export_to(self, vector: Any, to: str) -> None:
        """Write it for a tool, where that takes one at the coefficient that was given."""
        if to not in ("easysteer", "lm-eval", "peft", "steering-vectors"):
            raise InputError(
                f"--to is easysteer, lm-eval, peft or steering-vectors, not {to!r}; repeng and "
                "llama.cpp read the .gguf that is written without it, and vLLM takes vectors as "
                "EasySteer's alone, or what `steerlens bake` writes"
            )
        if to != "peft" and self.model is not None:
            raise InputError(f"--model is of --to peft: {to} loads its own")
        if to == "steering-vectors":
            if self.coefficient is not None:
                raise InputError("--to steering-vectors takes its coefficient there, as multiplier")
            sl.export.save_steering_vectors(vector, self.target)
            return
        strength = opt.strength_of(self.coefficient)
        if to == "peft":
            vector, model = load_with_model(self.source, self.model, self.load)
            sl.export.to_peft(model, vector, strength, self.target)
        elif to == "lm-eval":
            sl.export.to_lm_eval(vector, self.target, strength)
        else:
            sl.export.to_easysteer(vector, self.target, strength)


@dataclass(frozen=True, kw_only=True)
class Bake(LoadCommand):
    """A Hugging Face checkpoint that is steered by itself."""

    vector: Path
    out: Path
    coefficient: str
    model: str | None = None

    @property
    def next(self) -> str:
        return self.onward(Layers, model=self.out, revision=None)

    def check_written(self) -> None:
        sl.export.huggingface.check_is_new(self.out)

    def run(self) -> None:
        strength = opt.strength_of(self.coefficient)
        vector, model = load_with_model(self.vector, self.model, self.load)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # noted when the model was loaded
            sl.export.bake(model, vector, strength, self.out)
        note(f"{vector!r} at {self.coefficient} written to {self.out}")


@dataclass(frozen=True, kw_only=True)
class Show(Command):
    """What a vector's file says: where it acts, how strongly, and where it comes from."""

    vector: Path

    @property
    def next(self) -> str:
        return self.onward(Generate, prompt=PROMPT)

    def run(self) -> None:
        _print_vector(sl.export.gguf_file.read_vector(self.vector))


@dataclass(frozen=True, kw_only=True)
class CompareVectors(Command):
    """Cosines between the directions of some vectors, and across the layers of each."""

    vectors: list[Path]

    @property
    def next(self) -> str:
        return f"steerlens vectors show {quoted(self.vectors[0])}"

    def run(self) -> None:
        print_rows(sl.cosine_table(named_vectors(self.vectors)), "cosines")


def named_vectors(paths: Sequence[Path]) -> dict[str, Any]:
    """The vectors of some files, by the files' names. Raises `InputError` on a file twice."""
    names = [path.name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    if len(set(names)) < len(names):
        raise InputError("the same file is given twice")
    return dict(zip(names, map(sl.export.gguf_file.read_vector, paths), strict=True))


def load_with_model(
    path: Path, model_name: str | None, load: Callable[[str], Any]
) -> tuple[Any, Any]:
    """A vector and the model to use it on, its own where that is at hand; notes what differs."""
    vector = sl.export.gguf_file.read_vector(path)
    if model_name is None:
        model_name = vector.origin.model
        if model_name == sl.models.weight_processing.UNKNOWN:
            raise InputError("the vector does not say which model it was made on; give --model")
        sl.models.loading.check_at_hand(model_name, f"the vector {str(path)!r}")
    model = load(model_name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vector.check_model(model)
    for warning in caught:
        note(f"note: {warning.message}")
    return vector, model


def _print_vector(vector: Any) -> None:
    say(repr(vector))
    for name, value in vector.describe().items():
        say(f"  {name}: {value}")
    known = vector.calibration
    columns = (vector.scale, known.resid_norm, known.boundary_neg, known.boundary_pos)
    by_hook = zip(vector.hook_names, *(column.tolist() for column in columns), strict=True)
    rows = [[name, *map(short, row)] for name, *row in by_hook]
    print_table(None, ["hook", "scale", "resid norm", "boundary -", "boundary +"], rows)
