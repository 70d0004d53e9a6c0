"""What travels with a job: the config files that its command was given, and, where the nodes have none, the code."""

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from aai import storage
from aai.errors import UserError
from pipelines.__main__ import CONFIGS, config_file, load_config
from pipelines.checkup.needs import needs_of
from pipelines.settings import VerbConfig
from pipelines.submission.cluster_file import ClusterFile

PACKAGES = ("aai", "pipelines", "configs")


def pack(cluster: ClusterFile, verb: str, words: Sequence[str], into: Path) -> VerbConfig:
    """Fills the folder that a job starts from; the command's config, which is checked here before anything is sent.

    Raises UserError where the config is wrong, or names a place that the nodes cannot know.
    """
    config, args = load_config(verb, list(words))
    files = {verb: args.config, **{stage.verb: stage.config for stage in getattr(config, "stages", ())}}
    if cluster.folder is None:
        for name in files.values():
            _copy(name, into)
        out = getattr(config, "out", None)
        refuse_places_of_here(files, config.run_dir, *([out] if isinstance(out, str) else []))
    elif not Path(cluster.folder).is_dir():
        raise UserError("folder", cluster.folder, "is no folder of this machine", "give one that all nodes share")
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


def refuse_places_of_here(files: dict[str, str], run_dir: str, *more: str) -> None:
    """Raises UserError for a relative path: in the folder that ends with the job, it would be lost."""
    needs = needs_of({verb: config_file(name) for verb, name in files.items()}, run_dir)
    for place in (run_dir, *more, *needs.written, *needs.read):
        if "://" not in place and not Path(place).is_absolute():
            remedy = "give an s3:// prefix, a path that all nodes know, or `folder` in the cluster file"
            raise UserError("run_dir", place, "is relative to a folder that ends with the job", remedy)


def entrypoint(cluster: ClusterFile, verb: str, words: Sequence[str], on_ray: bool) -> str:
    """The shell line of a job."""
    command = ["aai"] if cluster.code == "image" else ["python", "-P", "-m", "pipelines"]
    line = shlex.join([*command, verb, *words, *(["--address", "auto"] if on_ray and not has_address(words) else [])])
    if cluster.folder is None:
        return line
    return f"cd {shlex.quote(storage.absolute(cluster.folder))} && {line}"


def has_address(words: Sequence[str]) -> bool:
    """Whether a command was told where to work."""
    return any(word == "--address" or word.startswith(("--address=", "cluster.address=")) for word in words)
