"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ALLOWED = {
    "stages": {"stages", "reward", "annotate"},
    "reward": {"reward", "annotate"},
    "annotate": {"annotate"},
}
FILES = sorted(path for package in ALLOWED for path in Path(package).rglob("*.py"))
HEAVY = (
    "torch",
    "transformers",
    "trl",
    "datasets",
    "pandas",
    "gradio",
    "sqlalchemy",
    "alembic",
    "matplotlib",
    "sklearn",
)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path: Path):
    names = {name.split(".")[0] for name in imported(path)}
    assert names & ALLOWED.keys() <= ALLOWED[path.parts[0]]


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_functions_fit_a_screen_or_a_few(path: Path):
    text = path.read_text()
    assert text.count("\n") <= 300
    long = [
        f"{node.name}: {lines} lines"
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > 50
    ]
    assert not long


def test_annotate_needs_no_torch():
    modules = [module_name(path) for path in FILES if path.parts[0] == "annotate" and path.name != "env.py"]
    assert not loaded(modules) & {"torch", "transformers", "trl"}


def test_reading_settings_needs_nothing_heavy():
    stages = [module_name(path) for path in Path("stages").glob("*.py") if has_config(path)]
    assert len(stages) >= 10
    assert not loaded(["stages.config", "stages.pipeline", "stages.cli", *stages])


def test_telemetry_is_off_before_any_library_is_loaded():
    code = """
import os, stages.cli
expected = {"HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_ANALYTICS_ENABLED": "False", "DO_NOT_TRACK": "1"}
found = {name: os.environ.get(name) for name in expected}
assert found == expected, found
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def imported(path: Path) -> list[str]:
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write imports from the top"
            names.append(node.module or "")
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return names


def loaded(modules: list[str]) -> set[str]:
    """Which heavy libraries importing these modules brings in, in a fresh process."""
    code = f"import sys, importlib\nfor m in {modules!r}: importlib.import_module(m)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split()) & set(HEAVY)


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def has_config(path: Path) -> bool:
    return any(isinstance(n, ast.ClassDef) and n.name == "Config" for n in ast.parse(path.read_text()).body)
