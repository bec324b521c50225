"""The documents speak of what exists: links, files, tests, settings, flags, metrics, words and packages that they name.

A document is checked by its conventions: `code` in backticks is a name of ours, ```python is run, ```py must parse.
"""

import ast
import doctest
import re
import subprocess
import sys
import tomllib
from argparse import ArgumentParser, _SubParsersAction
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scripts import engine_table

from isthmus.cli.main import build_parser
from isthmus.config import OTHER_VARIABLES, PREFIX, specs
from isthmus.contracts import errors
from isthmus.contracts.events import EngineStats
from isthmus.contracts.journal import LineageFact
from isthmus.contracts.telemetry import Count, RequestRecord
from isthmus.observability.metrics import PrometheusMetrics

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "isthmus"
CODE = ("src", "tests", "benchmarks", "scripts", "training")
ADR_HEADINGS = ["Context", "Decision", "Consequences", "What would change our mind"]
ADR_MAX_LINES = 60

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SNAKE = re.compile(r"[a-z][a-z0-9]*(?:_[a-z0-9]+)+")
CODE_FILE = re.compile(r"[\w./-]+\.(?:py|md|svg|sh|jinja)")
METRIC = re.compile(r"((?:vllm:|isthmus_)\w+)(?:\{[\w,]*\})?")


def documents() -> list[Path]:
    """Every document of the repository."""
    found = set(ROOT.glob("*.md"))
    for folder in ("docs", "benchmarks", "training", "examples", "deploy"):
        found |= set((ROOT / folder).rglob("*.md"))
    return sorted(found)


def named(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def prose(text: str) -> str:
    """A document without its fenced blocks."""
    return FENCE.sub("", text)


def inline(text: str) -> list[str]:
    return INLINE.findall(prose(text))


def report(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


def over_documents(pattern: re.Pattern[str]) -> Iterator[tuple[Path, str]]:
    """Inline code that matches `pattern` as a whole, with its document."""
    for path in documents():
        for code in inline(path.read_text(encoding="utf-8")):
            if pattern.fullmatch(code):
                yield path.relative_to(ROOT), code


@cache
def words_of_code() -> frozenset[str]:
    """Every word in our code and settings."""
    texts = [ROOT / "pyproject.toml", ROOT / "Makefile"]
    for folder in CODE:
        texts += [path for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".toml", ".jinja", ".sh"}]
    return frozenset(word for path in texts for word in re.findall(r"\w+", path.read_text(encoding="utf-8")))


def slug(heading: str) -> str:
    """A heading's anchor, as forges make it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_relative_links_lead_somewhere() -> None:
    problems = []
    for path in documents():
        for target in LINK.findall(prose(path.read_text(encoding="utf-8"))):
            if re.match(r"[a-z]+:", target):
                continue
            file, _, anchor = target.partition("#")
            there = (path.parent / file).resolve() if file else path
            if not there.exists():
                problems.append(f"{path.relative_to(ROOT)}: {target} does not exist")
            elif anchor and anchor not in map(slug, HEADING.findall(there.read_text(encoding="utf-8"))):
                problems.append(f"{path.relative_to(ROOT)}: {target} has no such heading")
    report(problems)


def test_python_in_documents_runs() -> None:
    """Blocks marked python run as they stand; with prompts they are doctests."""
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.REPORT_ONLY_FIRST_FAILURE)
    ran = 0
    for path in documents():
        name = str(path.relative_to(ROOT))
        for language, code in FENCE.findall(path.read_text(encoding="utf-8")):
            if language == "py":
                ast.parse(code, name)
            elif language == "python" and ">>>" in code:
                runner.run(doctest.DocTestParser().get_doctest(code, {}, name, name, 0))
                ran += 1
            elif language == "python":
                command = [sys.executable, "-W", "error", "-c", code]
                result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, cwd=ROOT)
                assert result.returncode == 0, f"{name}:\n{result.stderr}"
                ran += 1
    assert runner.failures == 0
    assert ran > 0


def test_files_that_are_named_exist() -> None:
    """By their path from the root or the package, or by their name alone."""
    names = {path.name for folder in (*CODE, "docs") for path in (ROOT / folder).rglob("*")}
    names |= {path.name for path in ROOT.iterdir()}
    problems = []
    for path, code in over_documents(CODE_FILE):
        here = [ROOT / code, PACKAGE / code, PACKAGE / "execution" / "inference" / code, ROOT / path.parent / code]
        if not any(one.exists() for one in here) and not ("/" not in code and code in names):
            problems.append(f"{path}: {code} does not exist")
    report(problems)


def test_guarantees_name_tests_that_exist_and_benchmarks_that_are_made() -> None:
    text = named("docs/guarantees.md")
    files = [code for code in inline(text) if code.startswith(("tests/", "benchmarks/"))]
    assert [file for file in files if file.endswith(".py") and not (ROOT / file).is_file()] == []
    results = {file for file in files if file.endswith(".json") and "*" not in file}
    makers = {f"benchmarks/results/{path.stem}.json" for path in (ROOT / "benchmarks").glob("*.py")}
    assert results <= makers | {"benchmarks/results/chaos.json"}
    assert [line[:4] for line in text.splitlines() if re.match(r"## \d", line)] == [f"## {n}" for n in range(1, 9)]
    parts = re.split(r"^## \d.*$", text, flags=re.MULTILINE)[1:]
    assert all("`tests/" in part for part in parts)


def test_names_in_documents_are_names_in_the_code() -> None:
    known = words_of_code() | metrics()
    report([f"{path}: {code}" for path, code in over_documents(SNAKE) if code not in known])


def metrics() -> set[str]:
    """Every metric that a server exposes, with and without the ending of a counter."""
    rendered = PrometheusMetrics("m").render(EngineStats(), None)  # type: ignore[arg-type]
    names = set()
    for family in text_string_to_metric_families(rendered.decode()):
        names |= {family.name, family.name + "_total", *(sample.name for sample in family.samples)}
    return names


def test_metrics_in_documents_are_exposed() -> None:
    exposed = metrics()
    problems = []
    for path in documents():
        for code in inline(path.read_text(encoding="utf-8")):
            found = METRIC.fullmatch(code)
            if found and found.group(1) not in exposed:
                problems.append(f"{path.relative_to(ROOT)}: {code}")
    report(problems)


def test_operations_names_settings_fields_and_codes_only() -> None:
    """A name at three in the morning has to be one that can be set, read in a log line or seen in an answer."""
    known = set(specs()) | {count.value for count in Count} | metrics()
    known |= set(RequestRecord.__struct_fields__) | set(LineageFact.__struct_fields__)
    known |= {kind.code for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "code")}
    known |= {"host_not_allowed", "context_length_exceeded", "max_tokens", "chat_history", "proxy_buffering"}
    known |= {"model_name"}
    problems = [code for code in inline(named("docs/operations.md")) if SNAKE.fullmatch(code) and code not in known]
    report(problems)


def options(parser: ArgumentParser) -> set[str]:
    """Every flag of a parser and its commands."""
    flags: set[str] = set()
    for action in parser._actions:
        flags |= set(action.option_strings)
        if isinstance(action, _SubParsersAction):
            for command in action.choices.values():
                flags |= options(command)
    return flags


def test_flags_and_variables_in_documents_exist() -> None:
    flags = options(build_parser())
    problems = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        blocks = [block for _, block in FENCE.findall(text)]
        lines = [line for block in blocks for line in block.splitlines()] + inline(text)
        for line in lines:
            ours = line.startswith("--") and "training" not in path.parts
            if ours or re.search(r"(^|bin/|\$ )isthmus |make serve", line):
                problems += [f"{path}: {flag}" for flag in re.findall(r"(?<!\w)--[a-z-]+", line) if flag not in flags]
        for variable in re.findall(rf"\b{PREFIX}[A-Z_]+\b", text):
            setting = variable.removeprefix(PREFIX).lower()
            if variable not in OTHER_VARIABLES and setting not in specs() and variable not in words_of_code():
                problems.append(f"{path}: {variable}")
    report(problems)


def test_settings_files_in_documents_are_accepted() -> None:
    for path in documents():
        for language, block in FENCE.findall(path.read_text(encoding="utf-8")):
            if language == "toml":
                assert set(tomllib.loads(block)) <= set(specs()), path


def test_make_targets_in_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", named("Makefile"), re.MULTILINE))
    problems = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        commands = inline(text) + [line for _, block in FENCE.findall(text) for line in block.splitlines()]
        for command in commands:
            found = re.match(r"(?:\$ )?make ([a-z]+)", command)
            if found and found.group(1) not in targets:
                problems.append(f"{path.relative_to(ROOT)}: {command}")
    report(problems)


def test_the_glossary_names_things_of_the_code_in_order() -> None:
    rows = re.findall(r"^\| ([^|]+) \| [^|]+ \| `(\w+)` \|$", named("docs/glossary.md"), re.MULTILINE)
    assert len(rows) >= 50
    text = "\n".join(
        path.read_text(encoding="utf-8") for path in [*PACKAGE.rglob("*.py"), *ROOT.glob("benchmarks/*.py")]
    )
    modules = {path.stem for path in PACKAGE.rglob("*.py")}
    defined = set(re.findall(r"^(?:class|def|async def) (\w+)|^(\w+) ?=", text, re.MULTILINE))
    names = {name for pair in defined for name in pair if name} | modules
    report([f"{word}: {name} is not defined" for word, name in rows if name not in names])
    words = [word.lower() for word, _ in rows]
    assert words == sorted(words, key=lambda word: word.split(",")[0])


def test_every_dependency_has_its_row() -> None:
    project = tomllib.loads(named("pyproject.toml"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    rows = "\n".join(line.split("|")[1] for line in named("docs/dependencies.md").splitlines() if line.startswith("|"))
    missing = [name for line in wanted if (name := re.split(r"[<>=\[ ;]", line)[0]) not in re.findall(r"[\w-]+", rows)]
    assert missing == []


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "adr").glob("*.md")), ids=lambda path: path.stem)
def test_a_decision_is_one_page_in_four_parts(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert re.match(rf"# {path.name[:4]}\. ", text)
    assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ADR_HEADINGS
    assert len(text.splitlines()) <= ADR_MAX_LINES


def test_the_table_of_engines_is_that_of_the_measured_file() -> None:
    assert engine_table.table() in named("README.md")


def test_decisions_are_numbered_without_gaps() -> None:
    numbers = [int(path.name[:4]) for path in sorted((ROOT / "docs" / "adr").glob("*.md"))]
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_field_of_a_log_line_is_explained() -> None:
    """Every field of the log line is in the table of operations.md: a field that is added is explained."""
    table = named("docs/operations.md").split("## Logs")[1].split("## Explain")[0]
    fields = [field.name for field in msgspec.structs.fields(RequestRecord)]
    assert [field for field in fields if f"`{field}`" not in table] == []
