"""Where attributes are read: mypy tells whose `x.name` is, the syntax trees in which function it stands."""

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from mypy import build
from mypy.modulefinder import BuildSource
from mypy.nodes import TypeInfo
from mypy.options import Options
from mypy.refinfo import get_undocumented_ref_info_json

ROOT = Path(__file__).resolve().parent.parent
Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = Function | ast.ClassDef
SETTINGS = "aai.config.Config"


@dataclass
class Unit:
    """A function, a method, a class, or a module's top level."""

    reads: set[tuple[str, str]] = field(default_factory=set)
    """(class of x, name) of every `x.name` in it."""
    names: set[str] = field(default_factory=set)
    """Full names that stand in it, those of other units among them."""


class Program:
    """The units of aai/ and pipelines/, and of further modules given as text."""

    def __init__(self, planted: Mapping[str, str]) -> None:
        """planted: {module: source}."""
        files = {name_of(path): path for path in source_files()}
        texts = {module: path.read_text(encoding="utf-8") for module, path in files.items()} | dict(planted)
        self.found = typed(files, planted)
        self.trees = {module: ast.parse(text) for module, text in texts.items()}
        symbols = [symbol.node for module in texts for symbol in self.found.files[module].names.values()]
        self.classes = {node.fullname: node for node in symbols if isinstance(node, TypeInfo)}
        self.units: dict[str, Unit] = defaultdict(Unit)
        for module in texts:
            self._add(module)

    def _add(self, module: str) -> None:
        """The units of one module. An inner function belongs to the one around it."""
        tree = self.trees[module]
        place = defaultdict(lambda: self.units[module])
        for name, node in definitions(module, tree):
            unit = self.units[name]
            place |= dict.fromkeys(range(node.lineno, (node.end_lineno or 0) + 1), unit)
            self._inherit(unit, name, node)
        references = get_undocumented_ref_info_json(self.found.files[module], self.found.types)
        for reference in references:
            self._refer(place[cast(int, reference["line"])], str(reference["target"]))
        for node in ast.walk(tree):
            unit = place[getattr(node, "lineno", 0)]
            if isinstance(node, ast.ImportFrom):  # where it stands in a function, mypy does not say what it brings
                unit.names |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Constant) and node.value in self.trees:  # a process is told to load it
                unit.names |= {name for name, _ in definitions(node.value, self.trees[node.value])}
        self._by_text(module, tree)

    def _inherit(self, unit: Unit, name: str, node: Definition) -> None:
        """Whoever names a class may call its methods and those it inherits; of settings only what is named itself."""
        info = self.classes.get(name)
        if info is None or not isinstance(node, ast.ClassDef):
            return
        unit.names |= {parent.fullname for parent in info.mro[1:]}
        if SETTINGS not in unit.names:
            unit.names |= {f"{name}.{item.name}" for item in node.body if isinstance(item, Function)}

    def _refer(self, unit: Unit, target: str) -> None:
        unit.names.add(target)
        owner, _, name = target.rpartition(".")
        if owner in self.classes:
            unit.reads.add((owner, name))
            unit.names |= {f"{parent.fullname}.{name}" for parent in self.classes[owner].mro if name in parent.names}

    def _by_text(self, module: str, tree: ast.Module) -> None:
        """`getattr(x, name)`, where x is an argument: any text of the module may be the name."""
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        known = self.found.files[module].names
        for name, node in definitions(module, tree):
            if isinstance(node, Function):
                kinds = {arg.arg: ast.unparse(arg.annotation) for arg in node.args.args if arg.annotation}
                calls = [call for call in ast.walk(node) if isinstance(call, ast.Call)]
                of = [ast.unparse(call.args[0]) for call in calls if ast.unparse(call.func) == "getattr"]
                for owner in [known[kinds[arg]].node for arg in of if kinds.get(arg) in known]:
                    if isinstance(owner, TypeInfo):
                        self.units[name].reads |= {(owner.fullname, str(text)) for text in texts}

    def reached(self, roots: Iterable[str]) -> set[str]:
        """All units that the roots lead to. Raises KeyError for a root that is none."""
        left, seen = list(roots), set()
        if unknown := set(left) - self.units.keys():
            raise KeyError(unknown)
        while left:
            name = left.pop()
            if name not in seen:
                seen.add(name)
                left += self.units[name].names & self.units.keys()
        return seen

    def reads(self, units: Iterable[str]) -> dict[str, set[str]]:
        """What the units read: {attribute: classes}."""
        found: dict[str, set[str]] = defaultdict(set)
        for unit in units:
            for owner, name in self.units[unit].reads:
                found[name].add(owner)
        return found

    def akin(self, cls: type, owners: Iterable[str]) -> bool:
        """Whether one of the classes is this one, one it inherits from, or an heir of it."""
        above = {f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__}
        ours = f"{cls.__module__}.{cls.__qualname__}"
        return any(owner in above or self.classes[owner].has_base(ours) for owner in owners)


def typed(files: Mapping[str, Path], texts: Mapping[str, str]) -> build.BuildResult:
    """mypy's types of modules. Libraries are not looked into, which would take minutes: what is theirs is Any."""
    options = Options()
    options.export_types = options.preserve_asts = options.check_untyped_defs = True
    options.follow_imports, options.follow_imports_for_stubs, options.ignore_missing_imports = "skip", True, True
    options.incremental, options.cache_dir = False, "/dev/null"
    sources = [BuildSource(str(path), module) for module, path in files.items()]
    sources += [BuildSource(None, module, text) for module, text in texts.items()]
    return build.build(sources, options)


def definitions(module: str, tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """Functions and classes at a module's top level, and the methods of its classes, each with its full name."""
    for node in tree.body:
        if isinstance(node, Definition):
            yield f"{module}.{node.name}", node
        for item in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(item, Function):
                yield f"{module}.{node.name}.{item.name}", item


def source_files() -> list[Path]:
    """Every file of aai/ and pipelines/."""
    return sorted(path for folder in ("aai", "pipelines") for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    """aai/toy/__init__.py -> aai.toy."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
