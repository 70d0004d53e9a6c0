"""What may import what, and how large and how documented code may be, read off the syntax trees."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
AAI = sorted((ROOT / "aai").rglob("*.py"))
PIPELINES = sorted((ROOT / "pipelines").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SOURCES = AAI + PIPELINES
MLFLOW_ALLOWED = {"pipelines/registry/tracking.py", "pipelines/pyfunc_model.py"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name(path: Path) -> str:
    """A path as it stands in the repository."""
    return path.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> set[str]:
    """Top-level packages a file imports: at its top, inside functions, or by a literal import_module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.add(node.module.split(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found |= {arg.value.split(".")[0] for arg in node.args if _is_text(arg)}
    return found


def media_read(tree: ast.AST) -> list[int]:
    """Lines where PyAV opens a file for reading, or its `open` is imported under its bare name."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("av", "av.container", "av.container.core"):
            lines += [node.lineno for alias in node.names if alias.name == "open"]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("av.open", "av.container.open"):
            mode = [ast.unparse(arg) for arg in node.args[1:2]]
            mode += [ast.unparse(word.value) for word in node.keywords if word.arg == "mode"]
            lines += [node.lineno] if mode != ["'w'"] else []
    return lines


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def functions(tree: ast.AST) -> list[Function]:
    """Every function and method of a file."""
    return [node for node in ast.walk(tree) if isinstance(node, Function)]


def undocumented(tree: ast.Module) -> list[str]:
    """Public functions and classes, at module level or in public classes, that have no docstring.

    A method that overrides one of a framework's (forward, encode, ...) is documented by its class.
    """
    bad = [] if ast.get_docstring(tree) else ["module"]
    for node in tree.body:
        if not isinstance(node, Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            bad.append(node.name)
        if isinstance(node, ast.ClassDef) and not node.bases:
            methods = [item for item in node.body if isinstance(item, Function)]
            public = [item for item in methods if not item.name.startswith("_")]
            bad += [f"{node.name}.{item.name}" for item in public if not ast.get_docstring(item)]
    return bad


def parse(path: Path) -> ast.Module:
    """The syntax tree of a file."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@pytest.mark.parametrize("path", AAI, ids=name)
def test_aai_knows_neither_ray_nor_mlflow_nor_pipelines(path: Path) -> None:
    assert not imported(parse(path)) & {"ray", "mlflow", "pipelines", "tests"}


@pytest.mark.parametrize("path", PIPELINES, ids=name)
def test_only_tracking_imports_mlflow(path: Path) -> None:
    packages = imported(parse(path))
    assert "tests" not in packages
    assert name(path) in MLFLOW_ALLOWED or "mlflow" not in packages


def test_media_is_read_through_one_door() -> None:
    """Its limits and white lists hold for every file that a user brings."""
    readers = {name(path): lines for path in SOURCES if (lines := media_read(parse(path)))}
    assert list(readers) == ["aai/media/container.py"]
    assert len(readers["aai/media/container.py"]) == 1


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_no_pickle(path: Path) -> None:
    tree = parse(path)
    assert not imported(tree) & {"pickle", "cloudpickle", "dill", "joblib", "shelve"}
    for call in [node for node in ast.walk(tree) if isinstance(node, ast.Call)]:
        if ast.unparse(call.func) == "torch.load":
            given = {word.arg: ast.unparse(word.value) for word in call.keywords}
            assert given.get("weights_only") == "True", f"line {call.lineno}"


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=name)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= MAX_FILE_LINES, f"{lines} lines"
    spans = {f"{f.name}:{f.lineno}": (f.end_lineno or 0) - f.lineno + 1 for f in functions(parse(path))}
    assert {what: span for what, span in spans.items() if span > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_public_things_have_docstrings(path: Path) -> None:
    if not path.read_text(encoding="utf-8").strip():
        return
    assert undocumented(parse(path)) == []


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_libraries_do_not_print_and_leave_no_notes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not [mark for mark in ("TODO", "FIXME", "XXX") if mark in text]
    if path in AAI:
        calls = [node for node in ast.walk(parse(path)) if isinstance(node, ast.Call)]
        assert [call.lineno for call in calls if ast.unparse(call.func) == "print"] == []


def test_tests_mirror_the_sources() -> None:
    """tests/aai/toy/test_writer.py (or test_world.py) tests aai/toy/writer.py: no test file is left over."""
    for folder in ("aai", "pipelines"):
        known = set()
        for path in (ROOT / folder).rglob("*"):
            if path.is_dir() or path.suffix == ".py":
                known |= {"_".join(path.relative_to(ROOT / folder).with_suffix("").parts).strip("_"), path.stem}
        tests = [path.relative_to(ROOT / "tests" / folder) for path in (ROOT / "tests" / folder).rglob("test_*.py")]
        names = {"_".join((*inner.parent.parts, inner.stem.removeprefix("test_"))): inner for inner in tests}
        assert [str(inner) for stem, inner in names.items() if stem not in known] == []


def test_the_checks_themselves_can_fail() -> None:
    """A lazy import, a dynamic import, a missing docstring: each is seen."""
    tree = ast.parse("def f():\n    import ray.data\n    importlib.import_module('mlflow.x')\n")
    assert imported(tree) == {"ray", "mlflow"}
    assert undocumented(tree) == ["module", "f"]
    assert imported(ast.parse("from . import ray\nfrom ray.train import X")) == {"ray"}
    for source in ("av.open(file)", "av.open(file, 'r')", "av.open(file, mode=m)", "from av import open"):
        assert media_read(ast.parse(source)) == [1], source
    assert media_read(ast.parse("av.open(file, 'w', format='flac')")) == []
