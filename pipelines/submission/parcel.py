"""What travels with a job: the config files that its command was given, and, where the nodes have none, the code."""

import hashlib
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from aai import storage
from aai.errors import UserError
from pipelines.__main__ import CONFIGS, config_file, load_config
from pipelines.chain.stages import places_of
from pipelines.checkup.needs import INPUTS, needs_of
from pipelines.settings import VerbConfig
from pipelines.submission.cluster_file import PASSWORD, ClusterFile

SECRET_VALUE = re.compile(r"(?i)(^|[._])(password|secret|token|api_?key)$")
"""Settings whose value is a secret itself, unlike those that name its file."""
FILES = ("label_names", "exclude", "table")
"""Settings that name files which do not travel."""
PACKAGES = ("aai", "pipelines", "configs")


def pack(cluster: ClusterFile, verb: str, words: Sequence[str], into: Path) -> VerbConfig:
    """Fills the folder that a job starts from; the command's config, which is checked here before anything is sent.

    Raises UserError where the config is wrong, or names a place that the nodes cannot know.
    """
    refuse_secrets(words)
    config, args = load_config(verb, list(words))
    chosen, swept = getattr(config, "chosen", tuple), getattr(config, "stage_config", None)  # of run, and of tune
    files, parts = {verb: str(args.config)}, [config]
    for stage in chosen():
        files[stage.verb] = stage.config
        parts.append(load_config(stage.verb, stage.words(config.run_dir))[0])
    if swept is not None:
        parts.append(swept())
        files |= {"base": config.base} if config.base else {}  # type: ignore[attr-defined]
    if cluster.folder is None:
        for name in files.values():
            _copy(name, into)
        refuse_places_of_here(files, config.run_dir, *(place for part in parts for place in places_in(part)))
    elif not Path(cluster.folder).is_dir():
        raise UserError("folder", cluster.folder, "is no folder of this machine", "give one that all nodes share")
    else:
        for name in files.values():
            refuse_another_file(name, Path(cluster.folder))
    if cluster.code == "package":
        root = CONFIGS.parent
        for name in PACKAGES:
            ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(root / name, into / name, ignore=ignored, dirs_exist_ok=True)
    return config


def _copy(name: str, into: Path) -> None:
    """A config file under the name that it was given by; a shipped one that is not here is on the nodes, too."""
    file = config_file(name)
    if file.is_relative_to(CONFIGS) and (Path(name).is_absolute() or not Path(name).exists()):
        return
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError("config", name, "is not below this folder, so it cannot travel with the job",
                        "give it by a name such as mine/curate.yaml, or set `folder` in the cluster file")  # fmt: skip
    target = into / name
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, target)


def refuse_secrets(words: Sequence[str]) -> None:
    """Raises UserError for what everybody who sees the dashboard would read in the job's command."""
    for word in words:
        name, is_setting, value = word.removeprefix("--set=").partition("=")
        if PASSWORD.search(word) or (is_setting and value and SECRET_VALUE.search(name)):
            rule, remedy = "holds a secret, which the dashboard would show", "set it in the nodes' environment"
            raise UserError(name if is_setting else "command", "(not shown)", rule, remedy)


def refuse_another_file(name: str, folder: Path) -> None:
    """Raises UserError where a config that was checked here is not the one that the job will read in its folder."""
    here, there = config_file(name), folder / name
    if here.is_relative_to(CONFIGS) and not there.exists():
        return
    if not there.exists() or not there.samefile(here):
        rule = f"is not the file of that name in {folder}, where the job starts"
        raise UserError("config", name, rule, "submit from that folder, or give the file's absolute path")


def places_in(config: VerbConfig) -> list[str]:
    """What a command reads and writes with its settings as they are here: an sqlite store, keys and tables, too."""
    found = [getattr(config, name, None) for name in ("out", *INPUTS, *FILES)] + list(places_of(config).values())
    tracking, signing = getattr(config, "tracking", None), getattr(config, "signing", None)
    if tracking is not None and tracking.uri.startswith("sqlite:///"):
        found.append(tracking.uri.removeprefix("sqlite:///"))
    if signing is not None:
        found.append(signing.private_key)
    return [uri for uri in found if isinstance(uri, str) and uri and not uri.startswith("models:")]


def refuse_places_of_here(files: dict[str, str], run_dir: str, *more: str) -> None:
    """Raises UserError for a relative path: in the folder that ends with the job, it would be lost."""
    needs = needs_of({verb: config_file(name) for verb, name in files.items()}, run_dir)
    for place in (run_dir, *more, *needs.written, *needs.read):
        if "://" not in place and not Path(place).is_absolute():
            remedy = "give an s3:// prefix, a path that all nodes know, or `folder` in the cluster file"
            raise UserError("run_dir", place, "is relative to a folder that ends with the job", remedy)


def digest_of(folder: Path, line: str) -> str:
    """What tells whether two jobs are the same: their shell line, and all that travels."""
    sha = hashlib.sha256(line.encode())
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        sha.update(f"\n{file.relative_to(folder)}\n".encode())
        sha.update(file.read_bytes())
    return sha.hexdigest()[:24]


def entrypoint(cluster: ClusterFile, verb: str, words: Sequence[str], on_ray: bool) -> str:
    """The shell line of a job."""
    command = ["aai"] if cluster.code == "image" else ["python", "-P", "-m", "pipelines"]
    line = shlex.join([*command, verb, *words, *(["--address", "auto"] if on_ray and not has_address(words) else [])])
    if cluster.folder is None:
        return line
    return f"cd {shlex.quote(storage.absolute(cluster.folder))} && {line}"


def has_address(words: Sequence[str]) -> bool:
    """Whether a command was told where to work."""
    starts = ("--address=", "cluster.address=", "--set=cluster.address=", "address=", "--set=address=")
    return any(word == "--address" or word.startswith(starts) for word in words)
