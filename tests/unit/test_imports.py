"""Who may import whom, and what the command line may not wait for.

The rule keeps objectives ignorant of layouts and the data pipeline free of both; it is read off the
source, so that imports inside functions count too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"pretrain", "parallel", "data_pipeline", "cluster", "configs"}
ALLOWED = {
    "data_pipeline": {"data_pipeline"},
    "parallel": {"parallel"},
    "pretrain": {"pretrain", "parallel", "data_pipeline"},
    "cluster": {"cluster", "pretrain.config.run"},
    "configs": set(),
}
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


def test_the_test_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "parallel" / "sub").mkdir(parents=True)
    file = tmp_path / "parallel" / "sub" / "bad.py"
    file.write_text("def f():\n    from pretrain import x\nfrom .. import y\nfrom . import z\n")
    assert set(imported_modules(file)) == {"pretrain", "parallel", "parallel.sub"}


@pytest.mark.parametrize(
    "code",
    [
        "import pretrain.cli.main",
        "import pretrain.config.compose, pretrain.config.preflight",
        "import pretrain.launch, pretrain.supervise",
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
