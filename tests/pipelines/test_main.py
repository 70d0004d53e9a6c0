"""The command line: help for every verb, and every user mistake as one line on stderr with exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.__main__ import CONFIGS, VERBS, build_parser, main, module_of, settings_help

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a manifest where the demo's would be: curate counts it even for --dry-run."""
    world = tmp_path / "runs" / "demo" / "world"
    world.mkdir(parents=True)
    (world / "manifest.csv").write_text("uri\nclips/a.mp4\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def mistake(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command that must fail with exit code 2 and nothing but one line on stderr; returns the line."""
    assert main(list(argv)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_top_level_help_names_every_verb(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert [verb for verb in VERBS if f"  {verb} " not in out] == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_all_its_settings(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([verb, "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--dry-run" in out
    assert [line for line in settings_help(module_of(verb).CONFIG) if line not in out] == []
    assert "run_dir" in out
    assert "\naai " not in out  # commands stand indented, under what they do


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_default_config_and_a_plan(
    verb: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(folder.rglob("*"))
    assert main([verb, "--dry-run"]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert "nothing was started" in out
    assert sorted(folder.rglob("*")) == before
    assert [part for part in ("inputs:", "outputs:", "resources:") if part not in out] == []


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    line = mistake(capsys, "curatee")
    assert "verb=curatee" in line
    assert "did you mean 'curate'?" in line
    assert "one of: world, foundation," in mistake(capsys, "zzz")


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--set", "cluster.num_wrokers=3"], "did you mean 'num_workers'"),
        (["--set", "cluster.num_workers=0"], "greater than or equal to 1"),
        (["--set", "cluster.num_workers=many"], "valid integer"),
        (["--set", "cluster.num_workers"], "KEY=VALUE"),
        (["--set", "run_dir=${nowhere.to.be.found}"], "Interpolation"),
        (["--set", "cluster=3"], "cluster=3"),
        (["--config", "absent/file.yaml"], "no such file"),
        (["--config", str(ROOT)], "no such file"),
        (["--config", str(ROOT / "LICENSE")], "config="),
    ],
)
def test_mistakes_are_one_line(argv: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in mistake(capsys, "curate", "--dry-run", *argv)


@pytest.mark.parametrize("argv", [["curate", "--no-such-flag"], ["curate", "--set"], ["curate", "stray"]])
def test_malformed_arguments_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_address_flag_reaches_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curate", "--dry-run", "--address", "head.example:6379"]) == 0
    assert "head.example:6379" in capsys.readouterr().out


def test_as_a_process_without_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines", "curate", "--config", "absent.yaml"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert done.stderr == (
        "aai curate: error: config=absent.yaml: no such file; give a YAML file, e.g. one of configs/demo/\n"
    )


def test_demo_configs_belong_to_verbs() -> None:
    strays = [path.name for path in (CONFIGS / "demo").glob("*.yaml") if path.stem not in VERBS]
    assert strays == []


def test_only_verbs_on_ray_take_an_address(capsys: pytest.CaptureFixture[str]) -> None:
    offered = set()
    for verb in VERBS:
        parser, flags = build_parser(verb)
        assert ("--address" in parser.format_help()) == ("address" in flags)
        offered |= {verb} if "address" in flags else set()
    on_ray = {"curate", "featurize", "align", "adapt", "tune", "evaluate", "generate", "serve", "demo", "doctor", "run"}
    assert offered == on_ray
    with pytest.raises(SystemExit):
        main(["promote", "--address", "auto", "--dry-run"])
    assert "unrecognized arguments: --address auto" in capsys.readouterr().err
    assert main(["edit", "--set", "cluster.address=auto", "--dry-run"]) == 2
    assert "cluster" in capsys.readouterr().err


def test_a_package_that_is_not_installed_is_named_with_the_remedy() -> None:
    """As after `pip install aai` without its extras."""
    code = "import sys; sys.modules['psutil'] = None; from pipelines.__main__ import main; sys.exit(main(['demo']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    message = "aai demo: error: package=psutil: is not installed; pip install 'aai[ray,serve]' brings"
    assert done.stderr.splitlines()[-1].startswith(message)
    assert "Traceback" not in done.stderr
