"""Which module may import which: floors are read from the picture in docs/design.md, imports from the source."""

from __future__ import annotations

import ast
import graphlib
import itertools
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("policies", "traces", "recycler", "tuning")
# They say what to do and what was seen, and need neither of these.
LIGHT_PACKAGES = ("policies", "traces")
HEAVY = {"torch", "transformers"}
# What lies loose in them is a command; everything else has a folder.
PACKAGES_OF_FOLDERS = ("recycler", "tuning")

# In the picture: what the packages themselves stand on, and all loose modules of a package that no floor names.
ALL = "packages"
OTHER_MODULES = "*"
# Place of a package's own `__init__`, over its floors: it may import all of them, and nothing inside may import it.
ROOF = ""

Floors = Mapping[str, Sequence[Sequence[str]]]


@dataclass(frozen=True)
class Import:
    """A name that is imported.

    Attributes:
        importer: Dotted name of the module that imports.
        imported: Dotted name of a module, or of something in a module.
        for_types: Whether type checkers alone import it.
    """

    importer: str
    imported: str
    for_types: bool

    def __str__(self) -> str:
        return f"{self.importer} imports {self.imported}"


@dataclass(frozen=True)
class Tree:
    """Packages as they lie on disk.

    Attributes:
        modules: File of every module, by its dotted name.
        imports: All that they import, from elsewhere too.
    """

    modules: Mapping[str, Path]
    imports: Sequence[Import]

    @classmethod
    def read(cls, root: Path, packages: Iterable[str]) -> Tree:
        files = [file for package in packages for file in sorted((root / package).rglob("*.py"))]
        modules = {dotted(file.relative_to(root)): file for file in files}
        return cls(modules, [one for name, file in modules.items() for one in imports_of(name, file)])

    def between_modules(self) -> Iterator[Import]:
        """Imports of the tree's own modules; `from package import module` is one of the module."""
        for one in self.imports:
            imported = one.imported
            while imported and imported not in self.modules:
                imported = imported.rpartition(".")[0]
            if imported:
                yield Import(one.importer, imported, one.for_types)

    def rooms(self, package: str) -> list[str]:
        """Names of what lies directly in a package."""
        inside = "" if package == ALL else package
        return [name.rpartition(".")[2] for name in self.modules if name.rpartition(".")[0] == inside]

    def is_loose(self, name: str) -> bool:
        """Whether a module is a file of its package's folder, and no folder itself."""
        return self.modules[name].name != "__init__.py"

    def is_command(self, name: str) -> bool:
        """Whether a module has a function `main`."""
        body = ast.parse(self.modules[name].read_text(encoding="utf-8")).body
        return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in body)


def dotted(path: Path) -> str:
    """Name of the module in a file; the path starts where imports do."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(name: str, file: Path) -> Iterator[Import]:
    """All that a module imports, inside functions too, by absolute names."""
    package = name.split(".") if file.name == "__init__.py" else name.split(".")[:-1]
    for node, for_types in import_statements(ast.parse(file.read_text(encoding="utf-8"))):
        parts = []
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            parts = [*above, *([node.module] if node.module else [])]
        for alias in node.names:
            yield Import(name, ".".join([*parts, alias.name]), for_types)


def import_statements(node: ast.AST, for_types: bool = False) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Import statements below a node, and whether they are for type checkers alone."""
    for field, value in ast.iter_fields(node):
        guarded = (
            isinstance(node, ast.If)
            and field == "body"
            and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        )
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.Import | ast.ImportFrom):
                yield child, for_types or guarded
            elif isinstance(child, ast.AST):
                yield from import_statements(child, for_types or guarded)


def circle(tree: Tree) -> list[str]:
    """Modules of which each imports the next, the last one the same as the first; empty if there are none."""
    graph: dict[str, set[str]] = {}
    for one in tree.between_modules():
        if not one.for_types:
            graph.setdefault(one.importer, set()).add(one.imported)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        # Each of these is imported by the next.
        return list(reversed(error.args[1]))
    return []


def read_floors(document: str) -> Floors:
    """Floors of packages, highest first, from the picture in a document's section "Rooms"."""
    section = document.partition("\n## Rooms\n")[2].partition("\n## ")[0]
    (picture,) = re.findall(r"^```text\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
    floors: dict[str, list[list[str]]] = {}
    for line in picture.splitlines():
        names = line.split()
        if line[:1].strip():
            package, *names = names
            floors[package] = []
        if names:
            floors[package].append(names)
    return floors


def room_of(name: str, package: str, drawn: Iterable[str]) -> str | None:
    """The drawn room of a package that a module lies in; None if it is not of the package."""
    if package == ALL:
        return name.partition(".")[0]
    if name == package:
        return ROOF
    if not name.startswith(package + "."):
        return None
    room = name.removeprefix(package + ".").partition(".")[0]
    return room if room in drawn else OTHER_MODULES


def against_floors(tree: Tree, floors: Floors) -> list[str]:
    """Imports that do not go down, in words. A command may bring together packages that stand side by side."""
    found: dict[str, None] = {}
    for package, rows in floors.items():
        heights = {room: len(rows) - place for place, row in enumerate(rows) for room in row}
        for one in tree.between_modules():
            upper, lower = (room_of(name, package, heights) for name in (one.importer, one.imported))
            if upper is None or lower is None or upper == lower:
                continue
            # What is not drawn, `unlike_picture` tells.
            top = len(rows) + 1 if upper == ROOF else heights.get(upper, 1)
            bottom = len(rows) + 1 if lower == ROOF else heights.get(lower, 0)
            if top < bottom or (top == bottom and not (package == ALL and tree.is_command(one.importer))):
                found[f"{one}, which is on no lower floor of {package}"] = None
    return list(found)


def unlike_picture(tree: Tree, floors: Floors) -> list[str]:
    """Rooms that are not drawn, and drawn names that are no rooms, in words."""
    found = []
    for package, rows in floors.items():
        drawn, rooms = [room for row in rows for room in row], tree.rooms(package)
        for room in rooms:
            name = room if package == ALL else f"{package}.{room}"
            if room not in drawn and not (OTHER_MODULES in drawn and tree.is_loose(name)):
                found.append(f"{name} has no floor")
        found += [f"{package} has no {room}" for room in drawn if room not in (*rooms, OTHER_MODULES)]
        found += [f"{room} has two floors in {package}" for room in set(drawn) if drawn.count(room) > 1]
    return found


def loose_modules(tree: Tree, package: str) -> list[str]:
    """Modules that have no folder within their package and are no commands."""
    names = [f"{package}.{room}" for room in tree.rooms(package)]
    return [name for name in names if tree.is_loose(name) and not tree.is_command(name)]


TREE = Tree.read(ROOT, PACKAGES)
FLOORS = read_floors((ROOT / "docs" / "design.md").read_text(encoding="utf-8"))


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(TREE) == []


def test_every_import_goes_to_a_lower_floor() -> None:
    assert against_floors(TREE, FLOORS) == []


def test_the_picture_shows_every_room_and_nothing_else() -> None:
    assert {ALL, *PACKAGES} <= set(FLOORS)
    assert unlike_picture(TREE, FLOORS) == []


@pytest.mark.parametrize("package", PACKAGES_OF_FOLDERS)
def test_what_lies_loose_is_a_command(package: str) -> None:
    assert loose_modules(TREE, package) == []


def test_light_packages_import_nothing_heavy() -> None:
    heavy = [one for one in TREE.imports if one.imported.partition(".")[0] in HEAVY]
    assert heavy
    assert [str(one) for one in heavy if one.importer.partition(".")[0] in LIGHT_PACKAGES] == []


@pytest.mark.parametrize("package", LIGHT_PACKAGES)
def test_importing_a_light_package_loads_nothing_heavy(package: str) -> None:
    script = f"import sys, {package}; print(sorted({HEAVY!r} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["policies", "traces", "recycler"])
def test_a_decoder_needs_no_package_that_only_tuning_and_files_need(package: str) -> None:
    # What a machine with a GPU and its own torch may lack.
    missing = ("alembic", "gguf", "jinja2", "jsonschema", "optuna", "platformdirs", "scipy", "sklearn")
    script = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); import {package}"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# The checker itself, on trees that are made up.

MADE_FLOORS = read_floors(
    """
## Rooms

```text
packages  barn  house
          ground

house     attic
          left  right
          *
          cellar
```
"""
)


def made(root: Path, **sources: str) -> Tree:
    """A tree of modules by name, `__` for a dot; a name that ends so is a package's `__init__`."""
    for name, source in sources.items():
        path = root.joinpath(*name.split("__"))
        file = path / "__init__.py" if name.endswith("__") else path.with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source, encoding="utf-8")
        for folder in file.relative_to(root).parents[:-1]:
            (root / folder / "__init__.py").touch()
    return Tree.read(root, sorted({name.partition("__")[0] for name in sources}))


def test_floors_are_read_from_the_picture() -> None:
    assert MADE_FLOORS == {
        "packages": [["barn", "house"], ["ground"]],
        "house": [["attic"], ["left", "right"], ["*"], ["cellar"]],
    }


@pytest.mark.parametrize(
    ("source", "imported"),
    [
        ("import house.left.door", "house.left.door"),
        ("import house.left.door as way", "house.left.door"),
        ("from house.left.door import handle", "house.left.door"),
        ("from house.left import door", "house.left.door"),
        ("from house.left import door as way, window", "house.left.door"),
        ("from house.left import *", "house.left"),
        ("from house.left import window", "house.left"),
        ("from house import window", "house"),
        ("from . import stairs", "house.attic.stairs"),
        ("from .stairs import step", "house.attic.stairs"),
        ("from .. import left", "house.left"),
        ("from ..left import door", "house.left.door"),
        ("from ..left.door import handle", "house.left.door"),
        ("def f():\n    for _ in ():\n        import house.left.door", "house.left.door"),
        ("try:\n    import nothing\nexcept ImportError:\n    from ..left import door", "house.left.door"),
    ],
)
def test_an_import_is_found_however_it_is_written(tmp_path: Path, source: str, imported: str) -> None:
    tree = made(tmp_path, house__attic__room=source, house__attic__stairs="", house__left__door="")
    found = {one.imported for one in tree.between_modules()}
    assert found - {"house.left"} == {imported} - {"house.left"}
    assert imported in found


def test_a_relative_import_starts_from_the_package_whose_init_it_is_in(tmp_path: Path) -> None:
    tree = made(tmp_path, house__left__="from .door import handle\nfrom .. import right", house__left__door="")
    assert [str(one) for one in tree.between_modules()] == [
        "house.left imports house.left.door",
        "house.left imports house",
    ]


def test_modules_from_elsewhere_are_no_part_of_the_tree(tmp_path: Path) -> None:
    tree = made(tmp_path, house__left="import torch.nn as nn\nfrom housekeeping import left")
    assert [one.imported for one in tree.imports] == ["torch.nn", "housekeeping.left"]
    assert list(tree.between_modules()) == []


@pytest.mark.parametrize(
    "sources",
    [
        {"house__left__a": "from house.right.b import b", "house__right__b": "from house.left.a import a"},
        {"house__left__a": "from house.right import b", "house__right__b": "def f():\n    from ..left import a"},
        {"house__left__a": "from house import right", "house__right__": "import house.left.a"},
        {"house__left__a": "import house", "house__": "from house.left.a import a"},
        {"house__left__a": "import house.b", "house__b": "import barn", "barn__": "from house.left.a import a"},
        {"house__left__a": "from . import a"},
    ],
)
def test_a_circle_is_found(tmp_path: Path, sources: dict[str, str]) -> None:
    ring = circle(made(tmp_path, **sources))
    assert ring[0] == ring[-1]
    assert "house.left.a" in ring
    pairs = {(one.importer, one.imported) for one in made(tmp_path, **sources).between_modules()}
    assert set(itertools.pairwise(ring)) <= pairs


def test_an_import_for_type_checkers_makes_no_circle(tmp_path: Path) -> None:
    guard = "import typing\nfrom typing import TYPE_CHECKING\nif {}:\n    from house.a import a\nelse:\n    {}\n"
    for test in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        assert circle(made(tmp_path, house__a="import house.b", house__b=guard.format(test, "pass"))) == []
    otherwise = guard.format("TYPE_CHECKING", "from house.a import a")
    assert circle(made(tmp_path, house__a="import house.b", house__b=otherwise)) != []
    assert circle(made(tmp_path, house__a="import house.b", house__b=guard.format("True", "pass"))) != []


def test_imports_of_lower_floors_are_right(tmp_path: Path) -> None:
    tree = made(
        tmp_path,
        ground__="",
        house__="from house.attic import chest",
        house__attic__chest="import house.left.a, house.loose, house.cellar, ground",
        house__left__a="from . import b\nfrom house.cellar import wine",
        house__left__b="import house.loose",
        house__loose="import house.other",
        house__other="from . import cellar",
        house__cellar="",
        barn__="",
        barn__run="import house.left\ndef main(): ...",
    )
    assert circle(tree) == []
    assert against_floors(tree, MADE_FLOORS) == []


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        (
            {"house__cellar": "from house.left import a", "house__left__a": ""},
            "house.cellar imports house.left.a, which is on no lower floor of house",
        ),
        (
            {"house__cellar": "def f():\n    from .left import a", "house__left__a": ""},
            "house.cellar imports house.left.a, which is on no lower floor of house",
        ),
        (
            {"house__left__a": "from house.right.b import b", "house__right__b": ""},
            "house.left.a imports house.right.b, which is on no lower floor of house",
        ),
        (
            {"house__loose": "import house.attic", "house__attic": ""},
            "house.loose imports house.attic, which is on no lower floor of house",
        ),
        (
            {"house__cellar__a": "if TYPE_CHECKING:\n    from house.loose import b", "house__loose": ""},
            "house.cellar.a imports house.loose, which is on no lower floor of house",
        ),
        ({"house__left": "from house import name"}, "house.left imports house, which is on no lower floor of house"),
        ({"house__left": "", "ground__a": "import house.left\ndef main(): ..."}, "ground.a imports house.left, which "),
        (
            {"house__left": "import barn", "barn__": ""},
            "house.left imports barn, which is on no lower floor of packages",
        ),
    ],
)
def test_an_import_that_does_not_go_down_is_found(tmp_path: Path, sources: dict[str, str], sentence: str) -> None:
    (found,) = against_floors(made(tmp_path, **sources), MADE_FLOORS)
    assert found.startswith(sentence)


def test_a_loose_module_that_is_no_command_is_found(tmp_path: Path) -> None:
    tree = made(tmp_path, house__left__a="", house__run="def main() -> None: ...", house__helper="def mean(): ...")
    assert loose_modules(tree, "house") == ["house.helper"]


def test_a_room_that_is_not_drawn_is_found_and_so_is_one_that_is_gone(tmp_path: Path) -> None:
    rooms = {"house__attic": "", "house__left__a": "", "house__right__a": "", "house__cellar": "", "house__loose": ""}
    packages = {"barn__": "", "ground__": ""}
    assert unlike_picture(made(tmp_path / "same", **rooms, **packages), MADE_FLOORS) == []
    del rooms["house__attic"]
    other = made(tmp_path / "other", **rooms, **packages, house__new__a="", shed__="")
    assert unlike_picture(other, MADE_FLOORS) == ["shed has no floor", "house.new has no floor", "house has no attic"]
