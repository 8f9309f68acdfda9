"""The rules of imports, sizes of modules and folders, and what the command line must not load.

Imports are read off the source, so that those inside functions count too. They keep objectives
ignorant of layouts, and the three rooms on the ground floor ignorant of each other.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"pretrain", "parallel", "data_pipeline", "cluster", "configs"}
ALLOWED = {
    "data_pipeline": {"data_pipeline"},
    "parallel": {"parallel"},
    "cluster": {"cluster"},
    "pretrain": {"pretrain", "parallel", "data_pipeline", "cluster"},
    "configs": set(),
}
ROOMS = ("pretrain", "parallel", "data_pipeline", "cluster")
MAX_MODULES = 24
"""Modules in a folder, beside its `__init__.py`."""
MAX_LINES = 300
HEAVY = ("torch", "deepspeed", "megatron", "mlflow", "numpy", "pandas", "matplotlib", "hydra",
         "omegaconf", "transformers", "sentencepiece", "webdataset")  # fmt: skip


def imported_modules(file: Path) -> Iterator[str]:
    """Dotted names of all modules that a file imports, wherever it does so."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            yield ".".join(filter(None, [base, node.module]))


def is_allowed(module: str, allowed: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in allowed)


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_import_rule(package: str) -> None:
    breaches = [
        f"{file.relative_to(ROOT)} imports {module}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for module in imported_modules(file)
        if module.split(".")[0] in OURS and not is_allowed(module, ALLOWED[package])
    ]
    assert not breaches, "\n".join(breaches)


def test_objectives_do_not_know_the_topology() -> None:
    breaches = [
        f"{file.relative_to(ROOT)} imports {module}"
        for folder in ("objectives", "noise")
        for file in (ROOT / "pretrain" / folder).glob("*.py")
        for module in imported_modules(file)
        if module.split(".")[0] == "parallel"
    ]
    assert not breaches, "\n".join(breaches)


def test_ranks_and_groups_come_from_the_topology() -> None:
    """megatron-core's global state is read where groups are made and ended, and nowhere else."""
    readers = {
        str(file.relative_to(ROOT))
        for package in ALLOWED
        for file in (ROOT / package).rglob("*.py")
        if "parallel_state" in file.read_text()
    }
    assert readers == {"parallel/layout/topology.py", "parallel/runtime.py"}


def modules(rooms: tuple[str, ...] = ROOMS) -> dict[str, Path]:
    """Every module of the rooms by its dotted name, packages by the name of their folder."""
    found = {}
    for room in rooms:
        for file in sorted((ROOT / room).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def import_graph() -> dict[str, set[str]]:
    """The modules of ours that each module imports, but for those only needed by type checkers.

    A name from a package is the module of that name where there is one. The package itself counts
    only where one of its own names is taken: every module runs its package's `__init__.py` first.
    """
    known = modules()
    graph: dict[str, set[str]] = {}
    for name, file in known.items():
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        graph[name] = set(runtime_imports(file, package, set(known))) - {name}
    return graph


def runtime_imports(file: Path, package: str, known: set[str]) -> Iterator[str]:
    """Names out of `known` that a file of `package` imports outside `if TYPE_CHECKING`."""
    tree = ast.parse(file.read_text())
    for_checkers = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in for_checkers:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(parents if node.level else []), *filter(None, [node.module])])
            for alias in node.names:
                target = f"{base}.{alias.name}"
                yield from (m for m in (target if target in known else base,) if m in known)


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, by Tarjan's algorithm without recursion."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    path: list[str] = []
    found = []
    for root in graph:
        work = [(root, iter(sorted(graph[root])))] if root not in index else []
        while work:
            module, targets = work[-1]
            if module not in index:
                index[module] = low[module] = len(index)
                path.append(module)
            for target in targets:
                if target not in index:
                    work.append((target, iter(sorted(graph[target]))))
                    break
                if target in path:
                    low[module] = min(low[module], index[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[module])
                if low[module] == index[module]:
                    component = path[path.index(module) :]
                    del path[path.index(module) :]
                    if len(component) > 1:
                        found.append(sorted(component))
    return found


def test_no_imports_run_in_a_circle() -> None:
    assert not circles(import_graph())


def test_no_folder_is_crowded() -> None:
    files = [file for file in modules().values() if file.name != "__init__.py"]
    counts = Counter(str(file.parent.relative_to(ROOT)) for file in files)
    assert not {folder: n for folder, n in counts.items() if n > MAX_MODULES}


def test_no_module_is_long() -> None:
    lengths = {
        str(file.relative_to(ROOT)): len(file.read_text().splitlines())
        for file in modules((*ROOMS, "benchmarks")).values()
    }
    assert not {name: n for name, n in lengths.items() if n > MAX_LINES}


class TestTheTestsCanFail:
    """The same checks on a house that breaks every rule."""

    @pytest.fixture(autouse=True)
    def house(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
        (tmp_path / "parallel" / "sub").mkdir(parents=True)
        return tmp_path

    def write(self, house: Path, name: str, text: str) -> Path:
        file = house / "parallel" / f"{name}.py"
        file.write_text(text)
        return file

    def test_imports_are_seen_wherever_they_stand(self, house: Path) -> None:
        text = "def f():\n    from pretrain import x\nfrom .. import y\nfrom . import z\n"
        bad = self.write(house, "sub/bad", text)
        assert set(imported_modules(bad)) == {"pretrain", "parallel", "parallel.sub"}
        with pytest.raises(AssertionError, match=r"bad\.py imports pretrain"):
            test_import_rule("parallel")

    def test_a_circle_is_found_through_functions_and_packages(self, house: Path) -> None:
        self.write(house, "a", "import parallel.b\n")
        self.write(house, "b", "def f():\n    from parallel.sub import g\n")
        self.write(house, "sub/__init__", "from ..c import g\n")
        self.write(house, "c", "from parallel import a\n")
        self.write(house, "alone", "from parallel.a import x\n")
        circle = ["parallel.a", "parallel.b", "parallel.c", "parallel.sub"]
        assert circles(import_graph()) == [circle]

    def test_imports_for_type_checkers_make_no_circle(self, house: Path) -> None:
        self.write(house, "a", "from parallel import b\n")
        text = "if TYPE_CHECKING:\n    from parallel.a import x\nelse:\n    x = 0\n"
        self.write(house, "b", f"from typing import TYPE_CHECKING\n{text}")
        assert circles(import_graph()) == []

    def test_a_crowded_folder_and_a_long_module_are_found(self, house: Path) -> None:
        for number in range(MAX_MODULES + 1):
            self.write(house, f"sub/m{number}", "")
        self.write(house, "long", "x = 0\n" * (MAX_LINES + 1))
        with pytest.raises(AssertionError, match="parallel/sub"):
            test_no_folder_is_crowded()
        with pytest.raises(AssertionError, match=r"parallel/long\.py"):
            test_no_module_is_long()


@pytest.mark.parametrize(
    "code",
    [
        "import pretrain.cli.main",
        "import pretrain.config.compose, pretrain.config.preflight",
        "import pretrain.training.start, cluster.launch",
        "import pretrain.tracking.console, pretrain.tracking.jsonl, pretrain.tracking.mlflow",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    """`epochal --help` answers before torch could be imported."""
    report = "import sys; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert not loaded & set(HEAVY)


def test_help_of_every_command_needs_nothing_heavy() -> None:
    code = (
        "import sys\nfrom typer.testing import CliRunner\nfrom pretrain.cli.main import app\n"
        "for command in [[], ['train'], ['evaluate'], ['sample'], ['demo'], ['doctor'],\n"
        "                ['data'], ['data', 'prepare'], ['data', 'verify'], ['data', 'inspect'],\n"
        "                ['plan']]:\n"
        "    done = CliRunner().invoke(app, [*command, '--help'])\n"
        "    assert done.exit_code == 0 and 'Usage' in done.output, (command, done.output)\n"
        "print(*sorted({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not set(done.stdout.split()) & set(HEAVY)


def test_every_package_is_listed_for_installation() -> None:
    """A folder with `__init__.py` that pyproject.toml does not list would miss in a wheel."""
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = {
        ".".join(file.parent.relative_to(ROOT).parts)
        for name in OURS
        for file in (ROOT / name).rglob("__init__.py")
    }
    assert set(listed) == found
