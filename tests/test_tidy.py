"""The house rules, as tests: a rule that no test enforces rots.

Sizes of files and functions, one home each for the environment, clocks, torch and OpenTelemetry, docstrings on public
names, no pickle or exec, ports of at most seven methods, nothing unfinished, import layers.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "isthmus"
MAX_SOURCE_LINES = 500
MAX_TEST_LINES = 800
MAX_FUNCTION_LINES = 70
MAX_PORT_METHODS = 7

# Modules that only one place may import, and the attributes that only one place may read.
HOMES = {
    "torch": "execution/inference",
    "opentelemetry": "observability",
    "secrets": "contracts/clock.py",
    "random": "contracts/clock.py",
    "time": "contracts/clock.py",
}
FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "imp"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__"}
UNFINISHED = re.compile(r"NotImplementedError|\bTODO\b|\bFIXME\b|\bXXX\b|\bHACK\b|\bplaceholder\b|\bfor now\b")
MACHINE = re.compile(r"(^|[^A-Za-z0-9_.])/(work|farm|root|opt/pypi)(/|\b)")
FORBIDDEN_NAMES = re.compile(r"manager", re.IGNORECASE)


def sources() -> list[Path]:
    return sorted(SOURCE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(SOURCE).as_posix()


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node.lineno


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def test_files_are_short() -> None:
    limits = [(path, MAX_SOURCE_LINES) for path in sources()]
    for folder in ("tests", "benchmarks", "training", "scripts", "examples"):
        limits += [(path, MAX_TEST_LINES) for path in sorted((ROOT / folder).rglob("*.py"))]
    counts = [(path, len(path.read_text().splitlines()), limit) for path, limit in limits]
    report([f"{path}: {count} lines, limit {limit}" for path, count, limit in counts if count > limit])


def test_functions_are_short() -> None:
    problems = []
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > MAX_FUNCTION_LINES:
                    problems.append(f"{relative(path)}:{node.lineno} {node.name}: {lines} lines")
    report(problems)


def test_each_thing_has_one_home() -> None:
    problems = []
    for path in sources():
        for module, line in imports(path):
            top = module.split(".", maxsplit=1)[0]
            home = HOMES.get(top)
            # What measures reads the machine's clocks and draws its own load: nothing in bench/ serves.
            if home is not None and not relative(path).startswith((home, "bench/")):
                problems.append(f"{relative(path)}:{line} imports {module}; its home is {home}")
            if top in FORBIDDEN_MODULES:
                problems.append(f"{relative(path)}:{line} imports {module}")
    report(problems)


def test_only_config_reads_the_environment() -> None:
    problems = []
    for path in sources():
        if relative(path) == "config.py":
            continue
        for node in ast.walk(tree(path)):
            named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "os"
            if named and node.attr in {"environ", "environb", "getenv", "putenv"}:
                problems.append(f"{relative(path)}:{node.lineno} reads the environment")
    report(problems)


def test_nothing_executes_data() -> None:
    problems = []
    for path in sources():
        for node in ast.walk(tree(path)):
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
                problems.append(f"{relative(path)}:{node.lineno} calls {node.func.id}")
            if isinstance(node.func, ast.Attribute) and ast.unparse(node.func) in {
                "torch.load",
                "yaml.load",
                "os.system",
            }:
                problems.append(f"{relative(path)}:{node.lineno} calls {ast.unparse(node.func)}")
            if any(word.arg == "shell" and not _is_false(word.value) for word in node.keywords):
                problems.append(f"{relative(path)}:{node.lineno} uses a shell")
    report(problems)


def _is_false(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def test_public_names_say_what_they_promise() -> None:
    problems = []
    for path in sources():
        module = tree(path)
        if (path.name != "__init__.py" or len(module.body) > 0) and not ast.get_docstring(module):
            problems.append(f"{relative(path)} has no docstring")
        for node in _public(module):
            if not ast.get_docstring(node):
                problems.append(f"{relative(path)}:{node.lineno} {node.name} has no docstring")
    report(problems)


def _public(node: ast.AST) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from _public(child)


def test_ports_are_small() -> None:
    problems = []
    for path in sorted((SOURCE / "contracts").glob("*.py")):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef) and any(ast.unparse(base).startswith("Protocol") for base in node.bases):
                methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
                if len(methods) > MAX_PORT_METHODS:
                    problems.append(f"{relative(path)} {node.name}: {len(methods)} methods")
    report(problems)


def test_no_broad_excepts() -> None:
    """Except where the line gives its reason: foreign templates in their own process may raise anything."""
    problems = []
    for path in sources():
        lines = path.read_text().splitlines()
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                excused = "noqa: BLE001 - " in lines[node.lineno - 1]
                if not excused and (node.type is None or re.search(r"\b(Base)?Exception\b", caught)):
                    problems.append(f"{relative(path)}:{node.lineno} except {caught}")
    report(problems)


def test_nothing_is_unfinished_or_wrongly_named() -> None:
    problems = []
    for path in sources():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if UNFINISHED.search(line):
                problems.append(f"{relative(path)}:{number} is unfinished: {line.strip()[:80]}")
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef) and FORBIDDEN_NAMES.search(node.name):
                problems.append(f"{relative(path)}:{node.lineno} {node.name}: nothing is called a manager")
    report(problems)


def test_the_project_speaks_of_itself_alone() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    problems = []
    for name in listed:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".toml", ".txt", ".json", ".sh", ""} and path.is_file() and "tidy" not in name:
            text = path.read_text(errors="replace")
            problems += [f"{name}: {found.group().strip()}" for found in MACHINE.finditer(text)]
    report(problems)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


@pytest.mark.parametrize("module", ["isthmus.app", "isthmus.cli.main", "isthmus.gateway.server"])
def test_the_front_never_imports_torch(module: str) -> None:
    code = f"import {module}, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_imports_run_one_way() -> None:
    result = subprocess.run(
        [str(Path(sys.executable).parent / "lint-imports")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout
