"""What is imported is asked for, listed with its licence and pinned, from its lowest version on."""

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
# What a package is imported as, where it is not its name.
IMPORTED_AS = {"scikit-learn": "sklearn", "vl-convert-python": "vl_convert"}
# Asked for by an error that says how to install it: it has to fit the torch that is there.
NOT_ASKED_FOR = {"torchvision"}
# Written in docs/dependencies.md -> what the package's own metadata says.
KINDS = {
    "Apache-2.0": "Apache",
    "BSD-3-Clause": "BSD",
    "ISC": "ISC",
    "MIT": "MIT",
    "MPL-2.0": "MPL",
    "Python Software Foundation": "Python Software Foundation",
}


def requirements(*, extras: bool, dev: bool = True) -> dict[str, Requirement]:
    """What pyproject.toml asks for, by name."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    head, _, rest = text.partition("\n[project.optional-dependencies]\n")
    lists = head.split("\ndependencies = [")[1].split("]\n")[0]
    if extras:
        lists += rest.split("\n[" if dev else "\ndev = [")[0]
    found = [Requirement(given) for given in re.findall(r'"([^"]+)"', lists)]
    return {one.name: one for one in found if one.name != "steerlens"}


def imported(source: str) -> set[str]:
    """The packages of others that a module imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(str(node.module))
    return {name.split(".")[0] for name in names} - {"steerlens", *sys.stdlib_module_names}


def listed() -> dict[str, str]:
    """Package -> licence, as docs/dependencies.md says."""
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| [^|]+ \|$", text, flags=re.MULTILINE)
    return {name: licence for name, licence in rows if name not in ("package", "---")}


def oldest() -> dict[str, str]:
    lines = (ROOT / "tests" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = (line.split("==", 1) for line in lines if not line.startswith("#"))
    return dict(pinned)


def stated(name: str) -> str:
    """All that the installed package says of its licence."""
    metadata = importlib.metadata.metadata(name)
    fields = ("License-Expression", "License", "Classifier")
    return "\n".join(str(value) for field in fields for value in metadata.get_all(field, []))


def test_what_is_imported_is_asked_for() -> None:
    given = requirements(extras=True, dev=False)
    assert "polars" not in given
    asked = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in given}
    found = {
        name: path.name
        for path in sorted((ROOT / "steerlens").rglob("*.py"))
        for name in imported(path.read_text(encoding="utf-8"))
    }
    assert set(found) - asked == NOT_ASKED_FOR, found
    nested = "import os, yaml.nodes\ndef late():\n    from anyio import to_thread\nfrom . import x"
    assert imported(nested) == {"yaml", "anyio"}


def test_every_dependency_is_pinned() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {Requirement(line).name: Requirement(line) for line in lines if line[0] != "#"}
    needed = requirements(extras=True)
    assert set(needed) <= set(pinned)
    for name, one in needed.items():
        (version,) = (part.version for part in pinned[name].specifier)
        assert one.specifier.contains(version), name


def test_every_dependency_is_listed() -> None:
    assert set(listed()) == set(requirements(extras=True))
    assert {"torch", "ruff"} <= set(listed())
    assert "ruff" not in requirements(extras=False)


# inspect-ai is installed by `make test-elsewhere` alone.
@pytest.mark.parametrize("name", sorted({*requirements(extras=True)} - {"inspect-ai"}))
def test_the_licence_is_what_the_package_says(name: str) -> None:
    licence = listed()[name]
    (kind,) = (said for written, said in KINDS.items() if licence.startswith(written))
    assert kind in stated(name)
    assert "GPL" not in licence


def test_oldest_versions_are_the_lower_bounds() -> None:
    bounds = {
        name: next(part.version for part in one.specifier if part.operator == ">=")
        for name, one in requirements(extras=False).items()
    }
    pinned = oldest()
    assert set(pinned) == set(bounds)
    for name, bound in bounds.items():
        if name != "torch":  # the only CPU build at hand is newer
            assert (pinned[name] + ".0.0").startswith(f"{bound}.0"), name
        assert Requirement(f"{name}>={bound}").specifier.contains(pinned[name])
