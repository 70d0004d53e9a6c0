"""Every command that the documentation gives is run: cheap ones for real, others up to their plan (`--dry-run`)."""

import re
import shlex
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aai import storage
from pipelines.__main__ import VERBS, main, module_of, settings_help
from pipelines.benches import decoding
from tests.clips import make_clip
from tests.tiny import write_clip_table

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("examples/*.md"))]
TEMPLATES = {
    "aai VERB --help": "VERB is any",
    "aai VERB --config FILE --set a.b=c": "VERB is any",
    "aai serve --address": "the flag alone is meant",
}
"""What looks like a command and is none, and why."""
WORDS = {"FILE": "runs/demo/world/manifest.csv", "FOLDER": "runs/demo/world", "DIR": "out", "ID": "433095ce",
         "OUT/best.yaml": "configs/demo/align.yaml"}  # fmt: skip
"""What stands for a user's own file."""
REAL: dict[tuple[str, ...], str] = {
    ("data",): "",
    ("bench", "decode"): "--clips 1 --set repeats=1 --set cluster.num_workers=1",
    ("bench", "vitl14"): "--set model.size=tiny --set model.images=2 --set model.batch_size=2 --set repeats=1",
}
"""Commands that are run to their end, and the settings that make them small. Others need Ray, a GPU, a bundle or a
registry: theirs is the plan here, and they run in tests/e2e/test_demo.py and in the tests of their own modules."""
FENCE = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`]+)`")
SETTING = re.compile(r"`([a-z_]+(?:\.[a-z\d_]+)+)(?:(?:=|: )[^`]*)?`")
OTHERS = re.compile(r"^foundation\.(caption_|judge_object|clip_object)|\.(py|json|yaml|safetensors)$")
"""Figures of evaluate.json, and files, that begin as a section of settings does."""


def commands(text: str) -> list[str]:
    """The aai commands of a page, each on one line: those of its blocks, without comments, then those in its lines."""
    found = []
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            try:
                words = shlex.split(line, comments=True)
            except ValueError:  # not a command line: a listing, Python
                continue
            names = [word.removeprefix(".venv/bin/") for word in words]
            if "aai" in names and all("=" in name for name in names[: names.index("aai")]):
                found.append(shlex.join(["aai", *words[names.index("aai") + 1 :]]))
    for span in INLINE.findall(FENCE.sub("", text)):
        at = re.search(r"(?:^|-- )(?:\.venv/bin/)?(aai\s.*)", span, re.DOTALL)
        if at:
            found.append(" ".join(at[1].split()))
    return found


def prepared(command: str) -> list[str]:
    """A command's arguments with a user's words filled in, made small, or with --dry-run."""
    words = [WORDS.get(word, word).replace("s3://bucket/", "bucket/") for word in shlex.split(command)[1:]]
    if "--help" in words:
        return words
    for start, small in REAL.items():
        # A verb that a sentence only names (`aai data show`) has nothing to work on.
        if tuple(words[: len(start)]) == start and (words[0] != "data" or len(words) > 2):
            return [*words, *shlex.split(small)]
    return [*words, "--dry-run"]


def run(command: str) -> int | str | None:
    """The exit code of a command, in this process."""
    try:
        return main(prepared(command))
    except SystemExit as end:
        return end.code


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working folder that has what the documentation speaks of: clips, their curated table, VGGSound's list."""
    folder = tmp_path_factory.mktemp("documents")
    world = folder / "runs/demo/world"
    storage.write_bytes(str(world / "clips/clip_000012.mp4"), make_clip())
    storage.write_bytes(str(world / "manifest.csv"), b"uri,caption\nclips/clip_000012.mp4,a bell\n")
    accepted = folder / "runs/demo/curated/accepted"
    write_clip_table(accepted, 1, 4)
    rows: list[dict[str, Any]] = storage.read_table(str(accepted)).to_pylist()
    rows[0] |= {"clip_id": "433095ce00", "uri": "clips/clip_000012.mp4"}
    table = storage.read_table(str(accepted))
    for target in (accepted, folder / "bucket/curated/accepted", folder / "out/accepted"):
        storage.write_table(f"{target}/shard-00000.parquet", table.from_pylist(rows, schema=table.schema))
    words = table.select(["clip_id"]).append_column("words", [[5] * len(table)])
    storage.write_table(str(folder / "words.parquet"), words)
    storage.write_bytes(str(folder / "data/vggsound.csv"), b"abcdefghijk,30,dog barking,train\n")
    storage.write_bytes(str(folder / "data/vggsound/abcdefghijk_000030.mp4"), b"")
    with pytest.MonkeyPatch.context() as patch:
        (folder / "infra").symlink_to(ROOT / "infra")
        patch.chdir(folder)
        patch.setenv("AAI_BUCKET", str(folder))
        patch.setenv("AAI_API_KEY", "a-key-for-this-test")
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.setattr(decoding, "write_clips", partial(decoding.write_clips, duration_s=0.5, height_px=144))
        yield folder


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_commands_run(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in commands(path.read_text(encoding="utf-8")):
        if command not in TEMPLATES:
            assert run(command) == 0, f"{command}\n{capsys.readouterr().err}"


def test_the_list_of_templates_has_no_leftovers() -> None:
    known = {command for path in DOCUMENTS for command in commands(path.read_text(encoding="utf-8"))}
    assert TEMPLATES.keys() - known == set()


@pytest.mark.parametrize(
    "page",
    [
        "```sh\naai currate --manifest FILE\n```",
        "```sh\n.venv/bin/aai curate --set \\\n   decode.num_frame=3  # one more\n```",
        "text `aai\nfeaturise` text",
        "`ray job submit -- aai align --config configs/align/absent.yaml`",
        "```\nAAI_API_KEY=x aai serve --hosts 0.0.0.0\n```",
        "`aai data shew 433095ce`",
    ],
)
def test_a_mistake_is_found(page: str) -> None:
    (command,) = commands(page)
    assert run(command) == 2


def test_what_counts_as_a_command() -> None:
    page = (
        "```sh\nexport A=b\nA=b aai demo --out x  # y\n  say aai demo\n```\nthe package `aai`, `aai/x.py`, `aai demo`\n"
    )
    assert commands(page) == ["aai demo --out x", "aai demo"]


def settings() -> set[str]:
    """Every setting of every verb, by dotted name."""
    return {line.split()[0] for verb in VERBS for line in settings_help(module_of(verb).CONFIG)}


def unknown_settings(text: str, known: set[str]) -> list[str]:
    """Dotted names in a page that begin with a section of settings and are none."""
    sections = {name.split(".")[0] for name in known if "." in name}
    named = [name for name in SETTING.findall(text) if name.split(".")[0] in sections and not OTHERS.search(name)]
    return [name for name in named if not any(f"{name}.".startswith(f"{setting}.") for setting in known)]


def test_named_settings_configs_and_targets_exist() -> None:
    known = settings()
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        assert unknown_settings(text, known) == [], path.name
        named = re.findall(r"configs/[a-z\d_]+/[a-z\d_]+\.yaml", text)
        assert [name for name in named if not (ROOT / name).is_file()] == [], path.name
        assert [name for name in re.findall(r"`make ([a-z]+)", text) if name not in targets] == [], path.name
    assert unknown_settings("`decode.polcy: exact` `decode.policy: exact` `docs.html`", known) == ["decode.polcy"]


def packages() -> list[str]:
    """Every package of aai/ and pipelines/, as a page names it: `aai/media/`."""
    inits = [*ROOT.glob("aai/*/__init__.py"), *ROOT.glob("pipelines/*/__init__.py")]
    return sorted(f"{init.parent.relative_to(ROOT)}/" for init in inits)


def test_architecture_names_every_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert len(packages()) > 10
    assert [package for package in packages() if f"`{package}`" not in text] == []
    modules = [path.name for path in (ROOT / "aai").glob("*.py") if path.name != "__init__.py"]
    assert [name for name in modules if f"`{name}`" not in text and f"`aai/{name}`" not in text] == []


NAMED = re.compile(r"`((?:[a-z_]+/)*[a-z_\d]+\.py)`")
PARTS = ("aai", "pipelines", "configs", "tests", "docs", "examples")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_exist(path: Path) -> None:
    """A file that a page names is there: by its path, or by the end of it."""
    text = path.read_text(encoding="utf-8")
    files: list[str] = []
    for part in PARTS:
        files += [f"/{file.relative_to(ROOT)}" for file in (ROOT / part).rglob("*.py")]
    missing = [name for name in NAMED.findall(text) if not any(file.endswith(f"/{name}") for file in files)]
    links = [name for name in re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", text) if not (path.parent / name).exists()]
    assert (missing, links) == ([], [])
