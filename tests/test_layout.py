"""The rooms of the package: what may import what, and where mlx-lm's private names are used.

Imports count wherever they stand: in functions and under ``TYPE_CHECKING`` too. A module
that is loaded by its name, as plugins are, is not imported.
"""

import ast
import re
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

import mlx_lm
import pytest
from processes import run_program

import mlx_lm_ext

PACKAGE = Path(mlx_lm_ext.__file__).parent
PYPROJECT = PACKAGE.parent / "pyproject.toml"

# From the highest to the lowest. A module may import those of its own line and of the lines
# below it.
ROOMS = [
    ("bench", "examples", "plugins", "testing"),
    ("batch_server", "arguments"),
    ("engine",),
    ("policies",),
    ("batch",),
    ("server",),
    ("sampling",),
    ("cache",),
    ("request",),
    ("interfaces", "hookspecs", "routes"),
    ("distributed",),
    (
        "errors",
        "device",
        "blas",
        "cuda",
        "demo_model",
        "descriptors",
        "folders",
        "log",
        "patterns",
    ),
]
# mlx-lm could take these as they are.
WITHOUT_PLUGINS = ("batch", "sampling", "cache")

# Private attributes of the classes of mlx-lm that are used here.
PRIVATE = {
    name
    for file in ("generate.py", "server.py")
    for name in re.findall(
        r"self\.(_[a-z]\w*)", (Path(mlx_lm.__file__).parent / file).read_text()
    )
}


# Reading


def modules(package: Path) -> Dict[str, Path]:
    """The files of a package by the names of their modules."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(p for p in parts if p != "__init__")] = path
    return found


def names_imported(package: Path, path: Path) -> Iterator[Tuple[int, str]]:
    """The line and the full name of everything that a file imports."""
    folder = path.relative_to(package.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = list(folder[: len(folder) + 1 - node.level] if node.level else ())
            base += [node.module] if node.module else []
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])


def module_of(name: str, known: Dict[str, Path]) -> Optional[str]:
    """The module of the package that a full name is, or is in."""
    while name not in known:
        name, dot, _ = name.rpartition(".")
        if not dot:
            return None
    return name


def room_of(module: str) -> str:
    """The room of a module; "" for the package itself."""
    return (module.split(".") + [""])[1]


def level_of(module: str) -> int:
    """How far down the list a module's room is; the package itself is the lowest."""
    levels = (i for i, line in enumerate(ROOMS) if room_of(module) in line)
    return next(levels, len(ROOMS))


def imports(package: Path) -> Iterator[Tuple[str, str, str]]:
    """The importing module, where the import stands, and the full name, for each import."""
    for module, path in modules(package).items():
        for line, name in names_imported(package, path):
            yield module, f"{path.relative_to(package).as_posix()}:{line}", name


def edges(package: Path) -> Iterator[Tuple[str, str, str]]:
    """The importing module, where the import stands, and the imported module, for each
    import of one module of the package by another."""
    known = modules(package)
    for module, where, name in imports(package):
        target = module_of(name, known)
        if target not in (None, module):
            yield module, where, target


# Rules. Each gives what breaks it.


def imports_that_go_up(package: Path) -> List[str]:
    return [
        f"{where} imports {target}"
        for module, where, target in edges(package)
        if level_of(target) < level_of(module)
    ]


def cycles(package: Path) -> List[str]:
    graph: Dict[str, List[str]] = {}
    for module, _, target in edges(package):
        graph.setdefault(module, []).append(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as e:
        return [" -> ".join(e.args[1])]
    return []


def plugins_in_rooms_without_any(package: Path) -> List[str]:
    refused = ("policies", "hookspecs", "hookimpl")
    refused = ("pluggy", *(f"{package.name}.{name}" for name in refused))
    return [
        f"{where} imports {name}"
        for module, where, name in imports(package)
        if room_of(module) in WITHOUT_PLUGINS
        and any(f"{name}.".startswith(f"{start}.") for start in refused)
    ]


def imports_of_plugins(package: Path) -> List[str]:
    return [
        f"{where} imports {target}"
        for module, where, target in edges(package)
        if room_of(target) == "plugins" != room_of(module)
    ]


def private_names(package: Path) -> List[str]:
    """Those of mlx-lm, outside the files that may use them."""
    found = [
        f"{where} imports {name}"
        for _, where, name in imports(package)
        if re.match(r"mlx_lm\.(.*\.)?_", name)
    ]
    for path in modules(package).values():
        file = path.relative_to(package).as_posix()
        found += [
            f"{file}:{node.lineno} uses {node.attr}"
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Attribute) and node.attr in PRIVATE
        ]
    doors = re.compile(r"(.*/)?upstream\.py:|batch/generator\.py:")
    return [line for line in found if not doors.match(line)]


def folders_that_are_no_rooms(package: Path) -> List[str]:
    """Modules and folders that are not in the list, and rooms without a docstring."""
    known = modules(package)
    found = []
    for room in {room_of(module) for module in known} - {""}:
        if not any(room in line for line in ROOMS):
            found.append(f"{room} is not in the list of rooms")
        elif (package / room).is_dir():
            start = package / room / "__init__.py"
            if not start.is_file() or not ast.get_docstring(
                ast.parse(start.read_text())
            ):
                found.append(f"{room}/__init__.py has no docstring")
    return found


RULES = {
    rule.__name__: rule
    for rule in (
        imports_that_go_up,
        cycles,
        plugins_in_rooms_without_any,
        imports_of_plugins,
        private_names,
        folders_that_are_no_rooms,
    )
}


@pytest.mark.parametrize("rule", RULES)
def test_package_has_no(rule):
    broken = RULES[rule](PACKAGE)
    assert not broken, "\n".join(broken)


def write_package(folder: Path, files: Dict[str, str]) -> Path:
    """A package whose rooms have docstrings, and these files."""
    package = folder / "house"
    for name, code in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        start = path.parent / "__init__.py"
        if not start.exists():
            start.write_text('"""A room."""\n')
        path.write_text(code)
    return package


TARGETS = {"batch/rows.py": "", "cache/tree.py": "", "policies/guard.py": ""}


@pytest.mark.parametrize(
    "rule, file, code, broken",
    [
        (
            "imports_that_go_up",
            "cache/new.py",
            "from ..batch.rows import Row",
            "cache/new.py:1 imports house.batch.rows",
        ),
        (
            "imports_that_go_up",
            "cache/new.py",
            "def f():\n    from ..batch import rows",
            "cache/new.py:2 imports house.batch.rows",
        ),
        (
            "imports_that_go_up",
            "errors.py",
            "if TYPE_CHECKING:\n    import house.cache.tree as tree",
            "errors.py:2 imports house.cache.tree",
        ),
        (
            "cycles",
            "cache/tree.py",
            "from .tree_nodes import Node",
            "house.cache.tree -> house.cache.tree_nodes -> house.cache.tree",
        ),
        (
            "plugins_in_rooms_without_any",
            "sampling/new.py",
            "import pluggy",
            "sampling/new.py:1 imports pluggy",
        ),
        (
            "plugins_in_rooms_without_any",
            "batch/new.py",
            "from ..policies.guard import Guard",
            "batch/new.py:1 imports house.policies.guard.Guard",
        ),
        (
            "plugins_in_rooms_without_any",
            "cache/new.py",
            "from .. import hookimpl",
            "cache/new.py:1 imports house.hookimpl",
        ),
        (
            "imports_of_plugins",
            "bench/new.py",
            "from house.plugins import defaults",
            "bench/new.py:1 imports house.plugins.defaults",
        ),
        (
            "private_names",
            "engine/new.py",
            "from mlx_lm.server import _secret",
            "engine/new.py:1 imports mlx_lm.server._secret",
        ),
        (
            "private_names",
            "engine/new.py",
            "generator._prompt_batch",
            "engine/new.py:1 uses _prompt_batch",
        ),
        (
            "folders_that_are_no_rooms",
            "attic/__init__.py",
            '"""Odds and ends."""',
            "attic is not in the list of rooms",
        ),
        (
            "folders_that_are_no_rooms",
            "server/__init__.py",
            "# Nothing.",
            "server/__init__.py has no docstring",
        ),
    ],
)
def test_rule_refuses(rule, file, code, broken, tmp_path):
    others = TARGETS | {
        "plugins/defaults.py": "",
        "cache/tree_nodes.py": "from . import tree",
    }
    assert RULES[rule](write_package(tmp_path / "good", others)) == []
    package = write_package(tmp_path / "bad", others | {file: code})
    assert RULES[rule](package) == [broken]


def test_what_goes_down_and_stays_in_a_room_is_allowed(tmp_path):
    package = write_package(
        tmp_path,
        TARGETS
        | {
            "batch/new.py": "from ..cache import tree\nfrom .rows import Row",
            "policies/new.py": "import pluggy\nfrom .. import hookimpl",
            "engine/upstream.py": "from mlx_lm.server import _secret",
            "batch/generator.py": "self._prompt_batch",
        },
    )
    assert [rule(package) for rule in RULES.values()] == [[]] * len(RULES)


def test_every_package_that_is_imported_is_declared():
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    extras = project["optional-dependencies"]
    lines = list(project["dependencies"])
    for extra in ("bench", "metrics", "structured", "vision"):
        lines += extras[extra]
    # On Linux, MLX comes with an extra of mlx-lm that chooses its backend.
    declared = {"mlx", *(re.match(r"[\w-]+", l)[0].replace("_", "-") for l in lines)}
    distributions = packages_distributions()
    for _, where, name in imports(PACKAGE):
        root = name.partition(".")[0]
        # The sample plugin is a project of its own, and its tests import it.
        own = (PACKAGE.name, "mlx_lm_sample_plugin")
        if root in sys.stdlib_module_names or root in own:
            continue
        names = {d.lower().replace("_", "-") for d in distributions[root]}
        assert names & declared, f"{where} imports {root}"


def test_package_imports_no_mlx():
    code = "import sys, mlx_lm_ext; print('mlx.core' in sys.modules)"
    result = run_program([sys.executable, "-c", code])
    assert result.stdout == "False\n"


def test_files_say_what_they_are():
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text()
        if text:
            assert ast.get_docstring(ast.parse(text)), path.name


# What the guide names of mlx-lm's repository that no wheel has.
UPSTREAMS_OWN = {
    "setup.py",
    "test_generate.py",
    "test_prompt_cache.py",
    "test_sample_utils.py",
    "test_server.py",
    "unittest",
}


def test_what_the_guide_for_contributors_names_is_there():
    root, upstream = PACKAGE.parent, Path(mlx_lm.__file__).parent
    guide = (root / "CONTRIBUTING.md").read_text().partition("## Rooms")[2]
    files = [*PACKAGE.rglob("*.py"), *upstream.glob("*.py"), *root.glob("tests/*.py")]
    words = {word for path in files for word in re.findall(r"\w+", path.read_text())}

    def is_there(name: str) -> bool:
        if "/" in name or re.search(r"\.(py|md|json|toml)$", name):
            # Also a file of the room that the sentence is about.
            places = (root, PACKAGE, upstream, *PACKAGE.iterdir())
            return any((place / name).exists() for place in places)
        return words.issuperset(name.split("."))

    names = set(re.findall(r"`([\w./]+)`", guide))
    assert [n for n in names - UPSTREAMS_OWN if not is_there(n)] == []
