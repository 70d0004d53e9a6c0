"""The command line: `aai VERB --config FILE [--set a.b=c ...]`. One verb, one module, one config class."""

import argparse
import difflib
import importlib
import logging
import os
import sys
from pathlib import Path
from types import ModuleType, UnionType
from typing import Literal, Union, get_args, get_origin

import pydantic

from aai.errors import UserError
from aai.version import code_version
from pipelines.settings import RayVerbConfig, VerbConfig


def configs_folder() -> Path:
    """The shipped configs: in an installed package within it, in a checkout beside it."""
    here = Path(__file__).resolve().parent
    installed = here / "configs"
    return installed if installed.is_dir() else here.parent / "configs"


CONFIGS = configs_folder()
VERBS = {
    "world": "write a toy world of real .mp4 clips with planted defects",
    "foundation": "train the small CLIP, diffusion model and judge from captioned pictures",
    "curate": "decode, measure and filter clips -> accepted/ and rejected/ tables",
    "data": "look at one clip, compact a table, export it as WebDataset",
    "featurize": "frozen CLIP features and VAE latents -> FeatureTable",
    "align": "train the audio encoder against the frozen CLIP -> bundle",
    "adapt": "train the audio adapter through the frozen diffusion model -> bundle",
    "tune": "sweep over the settings of align or adapt -> the best as a config file",
    "evaluate": "retrieval and generation quality on held-out clips, with floors and ceilings",
    "sign": "sign a bundle with a key, so that promote and serve can tell whose it is",
    "promote": "gate, register and alias a bundle; --rollback moves the alias back",
    "models": "the registry: versions, aliases, figures, and how the aliases moved",
    "lineage": "which clips, trainings and versions belong together, both ways",
    "takedown": "which tables, trainings and versions have clips that must go",
    "generate": "sound -> pictures",
    "edit": "put a sound's object into a given picture",
    "stylize": "put a sound's ambience onto a given picture",
    "verify": "whether a picture proves which model painted it, and from which clips it learned",
    "export": "a sound's A* as a file with which diffusers alone paints",
    "serve": "serve the promoted bundle over HTTP",
    "bench": "measure decoding, stages, trainings or a CLIP beside alternatives and floor",
    "plan": "capacity plan: stage rates on a sample, CPUs a GPU needs, time and storage for N clips on M nodes",
    "doctor": "what would stop a run: versions, GPUs, ports, S3, MLflow, disks, clocks, models, configs",
    "run": "a chain of commands, from clips to a promoted model; what is unchanged is skipped",
    "submit": "any command as a job of a Ray cluster elsewhere: packs, follows, ends as the job does",
    "jobs": "the jobs of a Ray cluster: list them, follow one, stop one",
    "status": "where a run stands: what runs, what broke off and how far it came, what is finished, what comes next",
    "demo": "all of the above on the toy world, ending with a report",
}
"""Every command and what it does; the module of the same name in pipelines/ has `CONFIG`, `run` and maybe `add_flags`.

`CONFIG` is a VerbConfig class; `run(config) -> dict` does the work and returns the figures of the summary line;
`add_flags(parser) -> dict` adds short flags (such as --rollback) and maps each to the setting it stands for;
`arranged(argv) -> list` puts the arguments of a command that runs another one into the order that is parsed.
"""


def module_of(verb: str) -> ModuleType:
    """The module of a verb. Imported only now: `aai --help` needs neither Ray nor torch."""
    return importlib.import_module(f"pipelines.{verb}")


def run_verb(verb: str, config: VerbConfig) -> dict[str, object]:
    """Runs a verb, and tells OpenLineage of it where the environment names a collector; returns its figures."""
    module = module_of(verb)
    from pipelines.engine.events import told  # only now: `aai --help` loads no more than it needs

    with told(verb, config):
        result: dict[str, object] = module.run(config)
    return result


def settings_help(cls: type[pydantic.BaseModel], prefix: str = "", defaults: object = None) -> list[str]:
    """One line per setting: dotted name, default, what it may be, meaning.

    A section that may be absent, or is one of many (`gates[].metric`), has a line of its own before its settings.
    defaults: the section that a setting has by default, where it is not as its class makes it.
    """
    lines = []
    for name, field in cls.model_fields.items():
        required, default = field.is_required(), field.get_default(call_default_factory=True)
        if defaults is not None:
            required, default = False, getattr(defaults, name)
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
            lines += settings_help(kind, f"{prefix}{name}.", None if required else default)
            continue
        words = [f"  {prefix}{name}", "(required)" if required else f"[{default}]", *_choices(kind)]
        lines.append(f"{' '.join(words)}  {' '.join((field.description or '').split())}".rstrip())
        many = "" if get_origin(kind) in (UnionType, Union) else "[]"
        for section in _sections(kind):
            lines += settings_help(section, f"{prefix}{name}{many}.")
    return lines


def _choices(kind: object) -> list[str]:
    """The words that a setting is limited to, as a|b|c; nothing where it is not."""
    words = get_args(kind) if get_origin(kind) is Literal else ()
    inner = [found for part in get_args(kind) for found in _choices(part)] if not words else []
    return ["|".join(map(str, words))] if words else inner


def _sections(kind: object) -> list[type[pydantic.BaseModel]]:
    """The config classes within a type such as `Section | None` or `list[Section]`."""
    found = []
    for part in get_args(kind):
        found += [part] if isinstance(part, type) and issubclass(part, pydantic.BaseModel) else _sections(part)
    return found


def build_parser(verb: str) -> tuple[argparse.ArgumentParser, dict[str, str]]:
    """The parser of one verb, and the settings its short flags stand for."""
    module = module_of(verb)
    default = CONFIGS / "demo" / f"{verb}.yaml"
    parser = argparse.ArgumentParser(
        prog=f"aai {verb}",
        description=f"{VERBS[verb]}.\n\n{module.__doc__}",
        epilog="settings (--set NAME=VALUE):\n" + "\n".join(settings_help(module.CONFIG)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", default=str(default), metavar="FILE", help=f"YAML settings [configs/demo/{verb}.yaml]"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="override one setting; repeatable"
    )
    on_ray = {}
    if issubclass(module.CONFIG, RayVerbConfig):
        parser.add_argument("--address", metavar="ADDR", help="Ray cluster: auto, HOST:PORT or ray://HOST:PORT")
        on_ray = {"address": "cluster.address"}
    parser.add_argument("--dry-run", action="store_true", help="check the settings, print the plan, start nothing")
    flags = module.add_flags(parser) if hasattr(module, "add_flags") else {}
    return parser, {**on_ray, **flags}


def config_file(name: str) -> Path:
    """The config file of this name: here, or, named outside the checkout, the shipped one."""
    file, shipped = Path(name), CONFIGS.parent / name
    return shipped if not file.exists() and shipped.is_relative_to(CONFIGS) and shipped.exists() else file


def load_config(verb: str, argv: list[str]) -> tuple[VerbConfig, argparse.Namespace]:
    """Parses a verb's arguments into its config."""
    parser, flags = build_parser(verb)
    module = module_of(verb)
    args = parser.parse_args(module.arranged(argv) if hasattr(module, "arranged") else argv)
    given = {setting: getattr(args, flag) for flag, setting in flags.items()}
    values = {setting: value for setting, value in given.items() if value is not None and value is not False}
    values = {setting: value for setting, value in values.items() if value != []}  # of a flag that takes many
    return module.CONFIG.load(config_file(args.config), args.set, values), args


def print_plan(verb: str, config: VerbConfig) -> None:
    """The --dry-run output."""
    plan = config.plan()
    print(f"aai {verb}: settings are valid; nothing was started")
    for title, rows in plan:
        if not rows and title in ("chosen", "training", "stages"):  # not every command has them
            continue
        print(f"{title}:")
        for name, value in rows.items():
            print(f"  {name:<14} {value}")


def usage() -> str:
    """The top-level help."""
    rows = "\n".join(f"  {verb:<11} {text}" for verb, text in VERBS.items())
    return (
        "usage: aai VERB [--config FILE] [--set NAME=VALUE ...] [--dry-run]\n\n"
        f"Sound into pictures at cluster scale.\n\n{rows}\n\n"
        "`aai VERB --help` lists every setting. Without --config a verb uses configs/demo/VERB.yaml.\n"
        f"The configs are in {CONFIGS}. `aai --version` names version and commit.\n"
        "Start with `aai demo`."
    )


def main(argv: list[str] | None = None) -> int:
    """Runs one verb. Exit code 0, or 2 with one line on a mistake the user can mend."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"aai {code_version()}")
        return 0
    verb, rest = argv[0], argv[1:]
    if verb not in VERBS:
        close = difflib.get_close_matches(verb, VERBS, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else f"one of: {', '.join(VERBS)}"
        print(f"aai: error: verb={verb}: no such command; {remedy}", file=sys.stderr)
        return 2
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # notices about libraries that are not needed here
    logging.basicConfig(level=os.environ.get("AAI_LOG", "INFO"), format="%(message)s", stream=sys.stderr)
    for library in ("botocore", "aiobotocore", "matplotlib"):  # they tell where they found keys and fonts
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        config, args = load_config(verb, rest)
        if args.dry_run:
            print_plan(verb, config)
        else:
            run_verb(verb, config)
    except UserError as error:
        print(f"aai {verb}: error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        package = (error.name or "aai").split(".")[0]
        if package in ("aai", "pipelines"):
            raise
        remedy = "pip install 'aai[ray,serve]' brings what most commands need (others: shots, lora, proof, openlineage)"
        print(f"aai {verb}: error: package={package}: is not installed; {remedy}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"aai {verb}: interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
