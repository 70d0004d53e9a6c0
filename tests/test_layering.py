"""What may import what, and how large and how documented code may be, read off the syntax trees."""

import ast
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest

from pipelines.__main__ import VERBS

ROOT = Path(__file__).resolve().parent.parent
AAI = sorted((ROOT / "aai").rglob("*.py"))
PIPELINES = sorted((ROOT / "pipelines").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
SOURCES = AAI + PIPELINES
MLFLOW_ALLOWED = {"pipelines/registry/tracking.py", "pipelines/registry/versions.py", "pipelines/pyfunc_model.py"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 55
CLUSTER = {"engine", "settings"}
MAY_IMPORT = {
    "settings": set(),
    "pyfunc_model": {"settings"},
    "__main__": {"engine", "settings"},  # a verb's module is loaded by its name
    "engine": {"settings"},
    "manifests": set(),
    "pages": set(),
    "registry": {"settings"},
    "tables": CLUSTER,
    "evaluation": CLUSTER,
    "painting": CLUSTER | {"manifests", "registry"},
    "service": {"registry", "settings"},
    "training": CLUSTER | {"registry"},
    "tuning": {"engine", "pages", "training"},
    "checkup": CLUSTER | {"registry"},
    "chain": {"settings"},
    "submission": {"__main__", "chain", "checkup", "settings"},
    "tracing": {"curation", "registry", "settings"},
    "overview": {"curation", "engine"},
    "curation": CLUSTER | {"manifests", "pages", "registry"},
    "benches": CLUSTER | {"manifests", "registry", "training", "__main__", *VERBS} - {"bench", "plan", "demo", "tune"},
}
"""What each package (or single module) of pipelines/ may import of the others; a verb may import all packages."""
RUNS_OTHERS = {"bench", "demo", "doctor", "jobs", "plan", "run", "submit", "tune"}
"""Verbs that run other verbs, or look at their settings, and the only ones that may import benches/."""
SAME_STEM = {"align", "adapt"}
"""A verb, and the stage of the paper that it runs."""
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


def modules(tree: ast.AST, known: Mapping[str, Path]) -> set[str]:
    """The modules among `known` that a file imports, wherever the import stands: inside functions and for types too."""
    found = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else node.module for name in inner]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names = [ast.literal_eval(arg) for arg in node.args if _is_text(arg)]
        found |= known.keys() & set(names)
    return found


def in_circles(graph: Mapping[str, set[str]]) -> set[str]:
    """The nodes that are in a circle, or between two of them."""
    left = set(graph)
    while True:
        imports = {node: graph[node] & left for node in left}
        importers = set().union(*imports.values())
        kept = {node for node in left if imports[node] and node in importers}
        if kept == left:
            return left
        left = kept


def part_of(module: str) -> str:
    """pipelines.engine.shards -> engine, pipelines.curate -> curate."""
    return module.split(".")[1] if "." in module else module


def wrong_imports(graph: Mapping[str, set[str]]) -> set[tuple[str, str]]:
    """(part, part it must not import) of pipelines/, given each module's imports."""
    wrong = set()
    for module, imports in graph.items():
        here = part_of(module)
        allowed = MAY_IMPORT.get(here, MAY_IMPORT.keys() - {"__main__", "benches"})
        if here in RUNS_OTHERS:
            allowed = MAY_IMPORT.keys() | VERBS.keys()
        wrong |= {(here, there) for there in map(part_of, imports) if there not in {here, *allowed}}
    return wrong


def repeated(names: list[str]) -> set[str]:
    """Names that stand more than once."""
    return {name for name, count in Counter(names).items() if count > 1}


def classes(tree: ast.AST) -> list[str]:
    """Every class of a file."""
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


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


def import_graph() -> dict[str, set[str]]:
    """Every module of aai/ and pipelines/ and those of them that it imports."""
    known = {}
    for path in SOURCES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        known[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {module: modules(parse(path), known) for module, path in known.items()}


def test_no_file_imports_itself_by_way_of_others() -> None:
    found = {f"{module.replace('.', '/')}.py" for module in in_circles(import_graph())}
    assert found == set()


def test_packages_import_in_one_direction() -> None:
    """Verbs import packages, packages import no verb; only what runs other verbs imports verbs."""
    graph = {module: found for module, found in import_graph().items() if module.startswith("pipelines.")}
    graph = {module: {m for m in found if m.startswith("pipelines.")} for module, found in graph.items()}
    assert {part_of(module) for module in graph} == MAY_IMPORT.keys() | VERBS.keys()
    assert wrong_imports(graph) == set()


def test_the_folder_reads_like_the_help() -> None:
    stems = {path.stem for path in (ROOT / "pipelines").glob("*.py")}
    assert stems >= VERBS.keys()
    assert len(stems - VERBS.keys()) <= 5, sorted(stems - VERBS.keys())


def test_a_name_stands_for_one_thing() -> None:
    stems = [path.stem for path in SOURCES if path.stem != "__init__"]
    assert repeated(stems) == SAME_STEM
    assert repeated([name for path in SOURCES for name in classes(parse(path))]) == set()


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


def without_test(sources: Mapping[str, set[str]], tests: set[str]) -> set[str]:
    """Sources, by folder, that have no test file of their name in the same folder below tests/."""
    found = set()
    for folder, stems in sources.items():
        found |= {f"{folder}/{stem}.py" for stem in stems if f"tests/{folder}/test_{stem}.py" not in tests}
    return found


def test_every_module_has_the_test_file_of_its_name() -> None:
    sources: dict[str, set[str]] = {}
    for path in SOURCES:
        if not path.stem.startswith("__"):
            sources.setdefault(name(path.parent), set()).add(path.stem)
    assert without_test(sources, {name(path) for path in TESTS}) == set()


def test_a_planted_module_without_test_is_seen() -> None:
    sources = {"aai": {"losses", "new"}, "pipelines/registry": {"gates"}}
    tests = {"tests/aai/test_losses.py", "tests/pipelines/test_gates.py"}  # in the wrong folder
    assert without_test(sources, tests) == {"aai/new.py", "pipelines/registry/gates.py"}


def test_a_planted_circle_is_seen() -> None:
    """At the top, inside a function, for types only, and by name; what merely imports a circle is not in it."""
    known = {f"pipelines.{name}": ROOT for name in ("a", "b", "c")}
    for source in (
        "from pipelines import b",
        "import pipelines.b",
        "def f():\n    from pipelines.b import x",
        "if TYPE_CHECKING:\n    from pipelines.b import x",
        "importlib.import_module('pipelines.b')",
    ):
        assert modules(ast.parse(source), known) == {"pipelines.b"}, source
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a"}, "above": {"a"}, "below": set()}
    assert in_circles(graph) == {"a", "b", "c"}
    assert in_circles(graph | {"c": {"below"}}) == set()


def test_planted_imports_against_the_direction_are_seen() -> None:
    def found(module: str, other: str) -> set[tuple[str, str]]:
        return wrong_imports({f"pipelines.{module}": {f"pipelines.{other}"}})

    assert found("engine.shards", "manifests.table") == {("engine", "manifests")}
    assert found("registry.moves", "promote") == {("registry", "promote")}
    assert found("serve", "promote") == {("serve", "promote")}
    assert found("curate", "benches.rates") == {("curate", "benches")}
    assert found("benches.engines", "bench") == {("benches", "bench")}
    for fine in (("serve", "service.http"), ("plan", "world"), ("benches.rates", "curate"), ("engine.a", "engine.b")):
        assert found(*fine) == set(), fine


def test_planted_doubles_are_seen() -> None:
    assert repeated(["judge", "paint", "judge"]) == {"judge"}
    source = "class Gate: ...\ndef f():\n    class Gate: ..."
    assert repeated(classes(ast.parse(source))) == {"Gate"}
