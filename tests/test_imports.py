"""The package's shape: import order, a light import, docstrings, shapes in signatures."""

import ast
import importlib
import importlib.util
import inspect
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from operator import attrgetter
from pathlib import Path
from typing import TypeAlias

import jaxtyping
import pytest

import steerlens
from steerlens import _renamed

PACKAGE = Path(steerlens.__file__).parent
# A module or folder imports only from those to its left.
ORDER = (
    "errors validation stats progress tables loss files data models engine directions steering "
    "plots measure circuits runs cli"
).split()
EXEMPT = ("__init__", "__main__", "_renamed")
# What makes an import slow, or is needed by one command or one kind of model only.
HEAVY = (
    "transformer_lens transformers accelerate circuitsvis altair vl_convert contourpy datasets "
    "scipy sklearn safetensors gguf platformdirs filelock psutil typer rich IPython"
).split()
# What comes with the first name that needs it.
LATE = ("torch", "pandas", "numpy", "jaxtyping")

Function: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def sources() -> dict[str, str]:
    """Dotted name in the package (`sweep`, or `sweep.cells` in a folder) -> source."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
    }


MODULES = [name for name in sources() if name not in EXEMPT]


def room(module: str) -> str:
    return module.split(".")[0]


def test_one_module_alone_lays_text_out_for_a_terminal() -> None:
    """What it prints is made visible there, whoever asks for it."""
    assert [name for name, source in sources().items() if "from rich" in source] == ["cli.printing"]


# Import order


def imports(module: str, source: str) -> Iterator[str]:
    """Rooms of the package that the source imports, anywhere in it; "" is the package itself."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                here = ["steerlens", *module.split(".")]
                base = ".".join([*here[: len(here) - node.level], *filter(None, [base])])
            names = [base]
            if base == "steerlens":
                names = [f"{base}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "steerlens":
                # `from steerlens import sweep` may mean a function that `__init__` brought up.
                yield room(rest) if room(rest) in ORDER else ""


def out_of_order(module: str, source: str) -> list[str]:
    above = ORDER[: ORDER.index(room(module))]
    found = dict.fromkeys(imports(module, source))
    # The command line comes last, and may take what it needs from the whole package.
    above += [""] if room(module) == "cli" else []
    return [name for name in found if name not in above and name != room(module)]


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_from_modules_above_them(module: str) -> None:
    assert out_of_order(module, sources()[module]) == []


def test_every_module_has_a_place_in_the_order() -> None:
    assert sorted({room(module) for module in MODULES}) == sorted(ORDER)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from steerlens.data.pairs import ContrastivePairs", []),
        ("from steerlens import data, errors", []),
        ("import steerlens.data", []),
        ("from ..errors import HookError", []),
        ("from .loading import load_model", []),
        ("import torch\nfrom pathlib import Path", []),
        ("from steerlens.measure.sweeps import sweep", ["measure"]),
        ("from steerlens import cli, data", ["cli"]),
        ("import os, steerlens.plots as p", ["plots"]),
        ("from ..engine import batches", ["engine"]),
        ("from .. import engine", ["engine"]),
        ("def late():\n    from steerlens.runs.record import write_run", ["runs"]),
        ("if TYPE_CHECKING:\n    from steerlens.engine.batches import Batch", ["engine"]),
        # The package itself is below every module.
        ("import steerlens", [""]),
        ("from steerlens import load_model", [""]),
    ],
)
def test_the_order_check_sees_every_way_to_import(source: str, found: list[str]) -> None:
    assert out_of_order("models.hooks", source) == found


def importing(source: str, known: Iterable[str]) -> set[str]:
    """Those of some modules that the source imports, anywhere in it."""
    froms = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom))
    names = {
        name
        for node in froms
        for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))
    }
    return {module for module in known if f"steerlens.{module}" in names}


def test_no_modules_import_each_other() -> None:
    """Not even inside a function, where Python allows it."""
    graph = {module: importing(sources()[module], MODULES) for module in MODULES}
    assert "cli.task" in graph["cli.command"]
    assert [*TopologicalSorter(graph).static_order()]
    late = importing("def f():\n    from steerlens.cli.command import Command", MODULES)
    with pytest.raises(CycleError, match="in a cycle"):
        TopologicalSorter({**graph, "cli.task": late}).prepare()


# Names and annotations


def test_no_module_has_a_name_that_says_nothing() -> None:
    parts = {part for module in sources() for part in module.split(".")}
    assert "hooks" in parts
    assert not parts & {"utils", "types", "helpers", "common", "misc"}


def imported(tree: ast.Module) -> set[tuple[str | None, str]]:
    return {
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def hides_shapes(source: str) -> bool:
    """Postponed annotations are strings, which shape checks at run time cannot rely on."""
    names = imported(ast.parse(source))
    shapes = any(module == "jaxtyping" for module, _ in names)
    return shapes and ("__future__", "annotations") in names


@pytest.mark.parametrize("module", MODULES)
def test_shapes_are_not_postponed(module: str) -> None:
    assert not hides_shapes(sources()[module])


def test_the_check_for_postponed_shapes_can_fail() -> None:
    future, shapes = "from __future__ import annotations\n", "from jaxtyping import Float\n"
    assert hides_shapes(future + shapes)
    assert not hides_shapes(future)
    assert not hides_shapes(shapes)


# What `import steerlens` costs


def loaded_after(code: str) -> set[str]:
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True,
        text=True,
        check=True,
        cwd=PACKAGE.parent,
    )
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_import_leaves_heavy_packages_alone() -> None:
    assert not loaded_after("import steerlens") & {*HEAVY, *LATE}
    found = loaded_after("import steerlens as sl; sl.Study")
    assert not found & set(HEAVY)
    assert set(LATE) <= found
    # The same packages are there to be imported, and the check sees one that is.
    assert [name for name in HEAVY if importlib.util.find_spec(name) is None] == []
    assert {"typer", "rich"} <= loaded_after("import steerlens.cli")


# Docstrings


def definitions(source: str) -> Iterator[tuple[str, Function | ast.ClassDef]]:
    """Public functions, classes and their public methods, by dotted name; nothing nested."""

    def inside(body: Iterable[ast.stmt], prefix: str) -> Iterator[tuple[str, ast.AST]]:
        for node in body:
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"):
                yield prefix + node.name, node
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                yield from inside(node.body, f"{prefix}{node.name}.")

    yield from inside(ast.parse(source).body, "")


def is_stub(node: ast.AST) -> bool:
    """A body of `...` alone: a protocol's method or an overload, told about elsewhere."""
    if not isinstance(node, FUNCTIONS) or len(node.body) != 1:
        return False
    (only,) = node.body
    return isinstance(only, ast.Expr) and getattr(only.value, "value", None) is ...


def without_docstring(source: str) -> list[str]:
    return [
        name
        for name, node in definitions(source)
        if not ast.get_docstring(node) and not is_stub(node)
    ]


@pytest.mark.parametrize("module", sources())
def test_public_names_have_docstrings(module: str) -> None:
    """Of their own; a method of a command, that of the method it overrides at least."""
    source, untold = sources()[module], []
    if module != "__main__":
        assert ast.get_docstring(ast.parse(source))
        untold = without_docstring(source)
    if module.startswith("cli."):
        here = importlib.import_module(f"steerlens.{module}")
        untold = [name for name in untold if not inspect.getdoc(attrgetter(name)(here))]
    assert untold == []


def test_the_docstring_check_can_fail() -> None:
    source = '''
def told():
    """Something."""
    def nested(): pass
def untold(): pass
def _private(): pass
class Told:
    """Something."""
    def method(self): pass
    def stub(self): ...
    def __len__(self): pass
class Untold: pass
'''
    assert without_docstring(source) == ["untold", "Told.method", "Untold"]


@pytest.mark.parametrize("name", steerlens.__all__)
def test_exported_names_exist_and_are_told(name: str) -> None:
    thing = getattr(steerlens, name)
    if callable(thing):
        assert thing.__module__.startswith("steerlens.")
        assert (thing.__doc__ or "").strip()
        # A dataclass without a docstring gets its signature as one.
        assert not thing.__doc__.startswith(f"{name}(")


def test_all_is_sorted_without_repeats_and_complete() -> None:
    assert len(set(steerlens.__all__)) == len(steerlens.__all__)
    brought_up = {name for module, name in imported(ast.parse(sources()["__init__"]))}
    assert set(steerlens.__all__) == brought_up - {"Any", "TYPE_CHECKING", "_renamed"}
    assert dir(steerlens) == sorted(steerlens.__all__)


def exported(module: str) -> set[str]:
    """What a face exports but for modules as such."""
    face = importlib.import_module(f"steerlens.{module}".removesuffix("__init__").strip("."))
    names = getattr(face, "__all__", ())
    return {name for name in names if not inspect.ismodule(getattr(face, name))}


def test_no_module_has_the_name_of_what_its_folder_or_the_package_exports() -> None:
    """So that `steerlens.sweep`, say, is never two things."""
    modules = [name.removesuffix(".__init__") for name in sources() if name != "__init__"]
    for face in (name for name in sources() if name.endswith("__init__")):
        folder = face.removesuffix("__init__")
        beside = {name.removeprefix(folder).split(".")[0] for name in modules if folder in name}
        assert not exported(face) & beside, face
    assert {"sweep", "fit"} <= exported("__init__")
    assert not exported("__init__") & {name.split(".")[-1] for name in modules}


# Names that moved


def test_former_names_work_and_say_where_they_are_now() -> None:
    with pytest.warns(DeprecationWarning, match=r"steerlens\.to_gguf is now steerlens\.steering"):
        assert steerlens.to_gguf is steerlens.export.to_gguf
    with pytest.warns(DeprecationWarning, match="is now InputError"):
        assert steerlens.errors.PairError is steerlens.errors.InputError
    with pytest.warns(DeprecationWarning, match=r"engine\.tokenization and .*engine\.batches"):
        from steerlens.tokens import Batch, tokenize_items
    assert (Batch.__module__, tokenize_items.__module__) == (
        "steerlens.engine.batches",
        "steerlens.engine.tokenization",
    )
    for missing in ("gone", "SweepError"):
        with pytest.raises(AttributeError, match=missing):
            getattr(steerlens, missing)
    with pytest.raises(ImportError):
        importlib.import_module("steerlens.never_was")


@pytest.mark.parametrize("name", _renamed.NAMES)
def test_every_former_name_is_found(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"steerlens.{name} is now"):
        assert getattr(steerlens, name).__name__ == name


@pytest.mark.parametrize("name", _renamed.MODULES)
def test_every_former_module_is_found(name: str) -> None:
    for place in _renamed.MODULES[name]:
        importlib.import_module(f"steerlens.{place}")


# Shapes in signatures

BARE = ("Tensor", "ndarray", "NDArray")
CONTAINERS = ("Mapping", "dict", "Dict")


def last_name(node: ast.AST) -> str:
    return getattr(node, "id", None) or getattr(node, "attr", "")


def holds_bare_tensor(annotation: ast.AST | None) -> bool:
    """A tensor without a shape; inside a mapping it may be, for its values differ in shape."""
    if annotation is None:
        return False
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        return holds_bare_tensor(ast.parse(annotation.value.strip(), mode="eval").body)
    if isinstance(annotation, ast.Subscript):
        name = last_name(annotation.value)
        if name in (*CONTAINERS, "Literal") or hasattr(jaxtyping, name):
            return False
        if name == "Annotated":
            return holds_bare_tensor(annotation.slice.elts[0])
    if last_name(annotation) in BARE:
        return True
    return any(holds_bare_tensor(child) for child in ast.iter_child_nodes(annotation))


def annotations(node: ast.AST) -> Iterator[tuple[str, ast.AST | None]]:
    """Of a function its parameters and return; of a class its fields."""
    if isinstance(node, FUNCTIONS):
        a = node.args
        for arg in filter(None, (*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg)):
            yield arg.arg, arg.annotation
        yield "return", node.returns
    elif isinstance(node, ast.ClassDef):
        for field in node.body:
            if isinstance(field, ast.AnnAssign):
                yield last_name(field.target), field.annotation


def without_shape(source: str) -> list[str]:
    return [
        f"{name}: {what}"
        for name, node in definitions(source)
        for what, annotation in annotations(node)
        if holds_bare_tensor(annotation)
    ]


@pytest.mark.parametrize("module", MODULES)
def test_public_tensors_have_shapes(module: str) -> None:
    assert without_shape(sources()[module]) == []


def test_the_shape_check_can_fail() -> None:
    source = """
def shaped(x: Float[Tensor, "pair d_model"], by_name: Mapping[str, Tensor]) -> Int[Tensor, ""]:
    def hook(activation: Tensor) -> Tensor: ...
def parameter(x: Tensor, *rest: torch.Tensor, mode: Literal["Tensor"]): ...
def optional(x: Float[Tensor, "pair"] | Tensor | None = None) -> tuple[Tensor, int]: ...
def text(x: "Sequence[Tensor]", y: 'Float[Tensor, "pair"]'): ...
def option(x: Annotated[str, Option(help="Not a type.")], y: Annotated[Tensor, "a"]): ...
def numbers(x: Float[np.ndarray, "pair"]) -> NDArray[np.float64]: ...
def _private(x: Tensor): ...
class Fields:
    good: Bool[Tensor, "pair"]
    bad: Tensor
    def method(self) -> Tensor: ...
"""
    assert without_shape(source) == [
        "parameter: x",
        "parameter: rest",
        "optional: x",
        "optional: return",
        "text: x",
        "option: y",
        "numbers: return",
        "Fields: bad",
        "Fields.method: return",
    ]
