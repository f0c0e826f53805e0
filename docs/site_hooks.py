"""What mkdocs builds besides docs/: a page a room, notebooks, README, changelog and contributing.

A room of the package gets a page when it has public names: a row in design.md's table of rooms is
all that a new one needs.
"""

import ast
import base64
import html
import importlib
import inspect
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))  # this checkout's package


def rooms() -> dict[str, str]:
    """Room -> purpose, in import order, from design.md's table."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    table = text.split("| room | purpose |")[1].split("\n\n")[0]
    return dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE))


@cache
def _tree(module: str) -> ast.Module:
    file = importlib.import_module(module).__file__
    assert file is not None
    return ast.parse(Path(file).read_text(encoding="utf-8"))


def _defined(module: str) -> list[str]:
    """Public names that a module itself defines, in its order."""
    names: list[str] = []
    for node in _tree(module).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.append(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return [name for name in dict.fromkeys(names) if not name.startswith("_")]


def _imported(module: str) -> dict[str, str]:
    """Name -> the module that it is imported from by name, be it for type checkers alone."""
    return {
        alias.name: node.module
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def home(module: str, name: str) -> str:
    """The dotted name of `name` in the module that defines it."""
    start = module
    while name not in _defined(module):
        if name not in _imported(module):
            raise ValueError(f"{start} has no {name}; see __all__")
        module = _imported(module)[name]
    return f"{module}.{name}"


def _is_module(name: str) -> bool:
    return inspect.ismodule(getattr(importlib.import_module("steerlens"), name))


def at_the_top() -> dict[str, str]:
    """Each of `steerlens.__all__` -> the dotted name where it is defined."""
    exported = list(importlib.import_module("steerlens").__all__)
    return {name: home("steerlens", name) for name in exported if not _is_module(name)}


def members(room: str) -> list[str]:
    """The dotted names that a room's page documents; what is at the top of the package first."""
    package = f"steerlens.{room}"
    top = [where for where in at_the_top().values() if where.startswith(f"{package}.")]
    exported = exported_by(package)
    return list(dict.fromkeys(top + [home(of, name) for of, name in exported]))


def exported_by(package: str) -> list[tuple[str, str]]:
    """Module and name of all that a room lists in `__all__`, also in a folder that it exports."""
    module = importlib.import_module(package)
    found: list[tuple[str, str]] = []
    for name in getattr(module, "__all__", ()):
        if inspect.ismodule(getattr(module, name)):
            found += exported_by(f"{package}.{name}")
        else:
            found.append((package, name))
    return found


@cache
def pages() -> dict[str, list[str]]:
    """Room -> its members, of the rooms that have any."""
    return {room: found for room in rooms() if (found := members(room))}


def page_of(room: str) -> str:
    """The reference page of a room, in Markdown."""
    package, found = f"steerlens.{room}", pages()[room]
    short = {where: name for name, where in at_the_top().items()}
    top = [f"`sl.{short[where]}`" for where in found if where in short]
    exported = set(getattr(importlib.import_module(package), "__all__", ()))
    in_room = [
        f"`{where.rpartition('.')[2]}`"
        for where in found
        if where not in short and where.rpartition(".")[2] in exported
    ]
    lines = [f"# {room}", "", f"{rooms()[room][0].upper()}{rooms()[room][1:]}.", ""]
    if top:
        lines += [f"After `import steerlens as sl`: {', '.join(top)}.", ""]
    if in_room:
        lines += [f"From `{package}`: {', '.join(in_room)}.", ""]
    lines += [f"::: {where}\n" for where in found]
    return "\n".join(lines)


def index_of_rooms() -> str:
    """A table of the rooms and what each is for."""
    rows = [
        f"| [{room}]({room}.md) | {rooms()[room]} | {', '.join(_names(room))} |" for room in pages()
    ]
    return "\n".join(["| room | purpose | names |", "| --- | --- | --- |", *rows, ""])


def _names(room: str) -> list[str]:
    short = {where: name for name, where in at_the_top().items()}
    found = [where for where in pages()[room] if where in short] or pages()[room][:6]
    return [f"[`{where.rpartition('.')[2]}`]({room}.md#{where})" for where in found]


def notebooks() -> list[Path]:
    """The tutorials, in the order in which their index lists them."""
    index = (ROOT / "tutorials" / "README.md").read_text(encoding="utf-8")
    return [ROOT / "tutorials" / name for name in re.findall(r"^\| \[(\S+)\]", index, re.MULTILINE)]


@cache
def notebook_pages(path: Path) -> dict[str, str | bytes]:
    """File name -> content of a notebook's page and its pictures.

    The page has text, code and what the code showed when the notebook was run, in its order; code
    and outputs have the numbers of its cells, pictures are counted.
    """
    parts: list[str] = []
    pictures: dict[str, str | bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"]).strip("\n")
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        number = cell["execution_count"]
        parts.append(f'```python title="In [{number}]"\n{source}\n```')
        for output in cell["outputs"]:
            encoded = output.get("data", {}).get("image/png")
            shown = shown_output(output)
            if encoded:
                n = len(pictures) + 1
                pictures[f"{path.stem}-{n}.png"] = base64.b64decode("".join(encoded))
                shown = (
                    f'<figure><img src="{path.stem}-{n}.png" alt="{shown}">'
                    f"<figcaption>Figure {n}: {shown}</figcaption></figure>"
                )
            parts.append(f'<div class="output" data-cell="Out [{number}]">{shown}</div>')
    title, _, rest = "\n\n".join(parts).partition("\n")
    note = f"*Run it yourself: `tutorials/{path.name}` in the repository.*"
    return {f"{path.stem}.md": f"{title}\n\n{note}\n{rest}\n", **pictures}


def shown_output(output: dict[str, Any]) -> str:
    """An output as HTML: a table or text; of a picture its title."""
    data = output.get("data", {"text/plain": output.get("text", "")})
    plain = "".join(data["text/plain"])
    if "image/png" in data:
        return html.escape(re.sub(r"^Figure\('(.*?)'.*", r"\1", plain))
    if "text/html" in data:
        # pandas's own style is for every table of the page.
        return re.sub(r"<style scoped>.*?</style>", "", "".join(data["text/html"]), flags=re.DOTALL)
    return f"<pre>{html.escape(plain)}</pre>"


def title_of(path: Path) -> str:
    """A notebook's heading."""
    return str(notebook_pages(path)[f"{path.stem}.md"]).partition("\n")[0].lstrip("# ")


def start_page() -> str:
    """README, its links as seen from docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    text = text.replace("](tutorials/README.md)", "](tutorials/index.md)")
    return text.replace("](CONTRIBUTING.md)", "](contributing.md)")


def options_of(command: str) -> str:
    """The options of a command of `steerlens`, from the command itself."""
    from typer.main import get_command

    cli: Any = get_command(importlib.import_module("steerlens.cli").app)
    for name in command.split():
        cli = cli.commands[name]
    rows = []
    for option in cli.params:
        names = [*option.opts, *option.secondary_opts]
        if option.param_type_name != "option":
            names = [option.name.upper()]
        told = (getattr(option, "help", None) or "").replace("|", "&#124;")
        is_flag = getattr(option, "is_flag", False) and not option.secondary_opts
        given = "" if option.default in (None, "") or is_flag else f"`{option.default}`"
        shown = ", ".join(f"`{name}`" for name in names)
        rows.append(f"| {shown} | {told} | {'required' if option.required else given} |")
    return "\n".join(["| option | | default |", "| --- | --- | --- |", *rows])


def on_config(config: Any) -> Any:
    """Put the rooms and the notebooks into the navigation."""
    for entry in config.nav:
        if isinstance(entry, dict) and "Reference" in entry:
            entry["Reference"] += [{room: f"reference/{room}.md"} for room in pages()]
        if isinstance(entry, dict) and "Tutorials" in entry:
            entry["Tutorials"] += [
                {title_of(path): f"tutorials/{path.stem}.md"} for path in notebooks()
            ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made here."""
    made: dict[str, str | bytes] = {f"reference/{room}.md": page_of(room) for room in pages()}
    for path in notebooks():
        made |= {f"tutorials/{name}": content for name, content in notebook_pages(path).items()}
    for name in ("CHANGELOG", "CONTRIBUTING"):
        made[f"{name.lower()}.md"] = (ROOT / f"{name}.md").read_text(encoding="utf-8")
    made["index.md"] = start_page()
    index = (ROOT / "tutorials" / "README.md").read_text(encoding="utf-8")
    made["tutorials/index.md"] = index.replace(".ipynb)", ".md)")
    for where, content in made.items():
        files.append(File.generated(config, where, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:  # noqa: ARG001
    """Fill in the list of rooms and the options of commands."""
    markdown = re.sub(r"<!-- options ([\w ]+) -->", lambda m: options_of(m[1]), markdown)
    return markdown.replace("<!-- rooms -->", index_of_rooms())


@cache
def linked() -> dict[str, tuple[str, str]]:
    """What is written in code type -> page and anchor of what it names, where that is one thing."""
    found: dict[str, tuple[str, str]] = {}
    seen: dict[str, int] = {}
    for room, wheres in pages().items():
        for where in wheres:
            name, target = where.rpartition(".")[2], (f"reference/{room}.html", where)
            seen[name] = seen.get(name, 0) + 1
            found[where.removeprefix("steerlens.")] = found[where] = target
            found[f"{room}.{name}"] = found[f"sl.{room}.{name}"] = found[name] = target
    single = {name for name, times in seen.items() if times > 1}
    # A plain word may be a command, a column or a room.
    plain = {name for name in found if re.fullmatch(r"[a-z]+", name)}
    for name, where in at_the_top().items():
        room = where.split(".")[1]
        found[f"sl.{name}"] = (f"reference/{room}.html", where)
    return {name: target for name, target in found.items() if name not in single | plain}


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:  # noqa: ARG001
    """Link what is named in code type to where it is told, outside of headings, code and links."""
    parts = re.split(r"(<(?:a|pre|h[1-6])\b.*?</(?:a|pre|h[1-6])>)", content, flags=re.DOTALL)

    def link(match: re.Match[str]) -> str:
        target = linked().get(match[1])
        if target is None:
            return match[0]
        url = get_relative_url(target[0], page.url)
        return f'<a href="{url}#{target[1]}">{match[0]}</a>'

    return "".join(
        part if i % 2 else re.sub(r"<code>([\w.]+)</code>", link, part)
        for i, part in enumerate(parts)
    )
