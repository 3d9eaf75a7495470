"""The layout: which package may import which (the table in docs/design.md), and the measures of its files."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dflash_scale"
FILES = sorted(PACKAGE.rglob("*.py"))
MEASURED = [*FILES, *sorted((ROOT / "launch").rglob("*.py"))]
MOST_LINES, MOST_LINES_OF_A_FUNCTION, MOST_PARAMETERS = 400, 60, 7
# An operator takes its tensors one by one, as torch's own do.
MANY_PARAMETERS = {"anchor_attention"}
# Besides the standard library; vLLM has all of them.
INSIDE_VLLM = {"huggingface_hub", "msgpack", "torch", "xxhash", "zmq"}

LIBRARIES = {"argparse": {"commands", "launch"}, "zmq": {"transport"}}
# The ranks' launcher says in the environment where they meet.
READ_THE_ENVIRONMENT = {"launch", "commands", "distributed"}


def table() -> dict[str, set[str]]:
    """Package -> what it may import, from the page's table; "*": anything."""
    rows = re.findall(r"^\| ([\w, ./]+) \| ([^|]+) \|$", (ROOT / "docs" / "design.md").read_text(), re.M)[1:]
    names = [name for left, _ in rows for name in left.split(", ")]
    allowed: dict[str, set[str]] = {}
    for left, right in rows:
        for name in left.split(", "):
            if right == "anything":
                allowed[name] = {"*"}
            elif right.startswith("all of the above but "):
                allowed[name] = {*names[: names.index(name)]} - {right.removeprefix("all of the above but ")}
            else:
                allowed[name] = set() if right == "nothing of the project" else set(right.split(", "))
    return allowed


def module(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def places(path: Path) -> set[str]:
    """A file's folders, and its own name without the ending."""
    return set(path.relative_to(ROOT).with_suffix("").parts)


def imported(path: Path) -> Iterator[tuple[str, bool]]:
    """Every module that a file imports, by its dotted name, and whether it does so when it is imported itself."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {inner for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, node not in late) for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            if (ROOT / node.module.replace(".", "/")).is_dir():  # from package import module
                yield from ((f"{node.module}.{name.name}", node not in late) for name in node.names)
            else:
                yield node.module, node not in late


def ours(path: Path) -> Iterator[tuple[str, bool]]:
    """Of them, those of the project, without its name."""
    for name, early in imported(path):
        head, _, rest = name.partition(".")
        if head == "dflash_scale":
            yield rest, early


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], ids=module)
def test_a_package_imports_what_the_table_allows(path: Path) -> None:
    package = module(path).split(".")[0]
    allowed = table()[package]
    for name, _ in ours(path):
        if name in ("", "_ring", "__version__"):  # the native part, whose Python face is in transport
            continue
        assert name.split(".")[0] in allowed | {package} or name in allowed or "*" in allowed, (
            f"{module(path)} imports {name}, and {package} may import {sorted(allowed)} (docs/design.md)"
        )


def test_the_table_names_every_package() -> None:
    here = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} | {
        path.stem for path in PACKAGE.glob("*.py") if path.name != "__init__.py"
    }
    assert {name for name in table() if name != "launch/"} == here


def test_what_runs_inside_vllm_needs_no_more_than_vllm_has() -> None:
    """Whatever the connector and its launcher import, however far away."""
    todo = [PACKAGE / "server" / "connector.py", ROOT / "launch" / "serve_vllm.py"]
    seen = set(todo)
    while todo:
        path = todo.pop()
        allowed = INSIDE_VLLM | ({"vllm"} if path.name == "connector.py" else set())
        for name, early in imported(path):
            head, _, rest = name.partition(".")
            if head == "dflash_scale":
                below = PACKAGE / f"{rest.replace('.', '/')}.py"
                if early and below.is_file() and below not in seen:
                    seen.add(below)
                    todo.append(below)
            elif early:
                assert head in allowed or head in sys.stdlib_module_names, f"{path.name} imports {name}"
    inside = {module(path) for path in seen if PACKAGE in path.parents} - {"commands.edge"}  # the launcher's
    assert {name.split(".")[0] for name in inside} == {"server", "transport", "verifier"}


@pytest.mark.parametrize(("library", "rooms"), LIBRARIES.items())
def test_a_library_stays_in_its_rooms(library: str, rooms: set[str]) -> None:
    users = {path for path in MEASURED if any(name.split(".")[0] == library for name, _ in imported(path))}
    assert users and [str(path) for path in users if not rooms & places(path)] == []


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_environment_is_read_by_programs_alone(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = list(ast.walk(tree))
    written = {node.value for node in nodes if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store)}
    names = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")]
    if not READ_THE_ENVIRONMENT & places(path):
        assert [node.lineno for node in names if node not in written] == []


@pytest.mark.parametrize("path", MEASURED, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_functions_and_parameter_lists_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < MOST_LINES_OF_A_FUNCTION, f"{node.name} is too long"
            names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            assert count <= MOST_PARAMETERS or node.name in MANY_PARAMETERS, f"{node.name} takes {count} parameters"


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=module)
def test_a_package_says_what_it_is_and_does_nothing(path: Path) -> None:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    if path.parent != PACKAGE:  # the project's own holds its version
        assert len(body) == 1 and isinstance(body[0], ast.Expr) and path.read_text(encoding="utf-8").count("\n") == 1
