"""The command: which files it looks at, what it prints, how it ends. Faults: tests/e2e/test_doctor_faults.py."""

import json
import re
from pathlib import Path

import pytest

from aai.errors import UserError
from pipelines.__main__ import load_config, main
from pipelines.checkup.needs import Service, needs_of
from pipelines.doctor import DoctorConfig, check_configs, check_services, checks_of

ROOT = Path(__file__).resolve().parents[2]
NAMES = re.compile(r"\b(?:failure|warning)\(\s*\"([a-z0-9_.]+)\"")


def healthy(folder: Path, **settings: str) -> list[str]:
    """Arguments for a run of curate in a folder that has what it needs; its code is loaded in a second."""
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data" / "m.csv").write_text("uri\na.mp4\n")
    lines = {"run_dir": f"{folder}/run", "manifest": f"{folder}/data/m.csv", "out": "${run_dir}/curated"} | settings
    file = folder / "mine.yaml"
    file.write_text("".join(f"{name}: {value}\n" for name, value in lines.items()))
    return [f"curate={file}", "--set", "min_free_gb=0", "--timeout-s", "60"]


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine of one's own."""
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef" * 2)


def test_a_machine_that_is_fine_gets_no_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *healthy(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["failures"], found["warnings"]) == (0, 0), found
    assert {row["check"] for row in found["findings"]} >= {"config", "folder.write", "folder.read", "ray.token", "disk"}
    assert not (tmp_path / "run").exists()


def test_what_would_stop_a_run_is_told_with_its_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = healthy(tmp_path, manifest=f"{tmp_path}/absent.csv", rows_per_shrd="5", aws_secret="hidden-value-1")
    assert main(["doctor", *words]) == 2
    out, err = capsys.readouterr()
    assert re.search(r"FAILURE\s+config\s+curate .*rows_per_shrd=5: unknown key", out)
    assert re.search(r"-> did you mean 'rows_per_shard'", out)
    assert re.search(r"FAILURE\s+folder.read .*absent.csv\s+is not there", out)
    assert "config, folder.read" in err or "folder.read, config" in err


def test_secrets_in_a_config_are_not_shown(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("manifest: m.csv\nout: o\naws_secret_key: hidden-value-1\n")
    (row,) = check_configs({"curate": tmp_path / "a.yaml"}, "")
    assert (row.check, row.state) == ("config", "failure")
    assert "hidden-value-1" not in row.model_dump_json()


def test_a_file_says_of_which_command_it_is() -> None:
    config, _ = load_config("doctor", [])
    assert isinstance(config, DoctorConfig)
    assert list(config.files()) == ["world", "curate", "featurize", "align", "adapt", "evaluate", "promote", "serve"]
    given = ["configs/align/vggsound_vitl14_gpu8.yaml", "adapt=mine.yaml", "configs/demo/serve.yaml"]
    config, _ = load_config("doctor", given)
    assert isinstance(config, DoctorConfig)
    assert list(config.files()) == ["align", "adapt", "serve"]
    for wrong in ("mine.yaml", "walk=mine.yaml"):
        with pytest.raises(UserError, match="write it as VERB=FILE"):
            DoctorConfig(configs=(wrong,)).plan()


def test_everything_a_run_needs_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AAI_BUCKET", "s3://mine/x")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    config, _ = load_config("doctor", ["--config", "configs/doctor/vggsound_vitl14_gpu8.yaml", "--address", "auto"])
    assert isinstance(config, DoctorConfig)
    files = config.files()
    subjects = [check.subject for check in checks_of(config, files, needs_of(files))]
    assert subjects[0] == "cluster auto"
    assert "s3://mine/x/runs/vggsound_vitl14" in subjects
    assert "s3://mine/x/data/vggsound.csv" in subjects
    assert "MLflow http://localhost:5000" in subjects
    assert any(subject.startswith("foundation openai/") for subject in subjects)
    assert subjects[-1] == "configs"
    here = checks_of(DoctorConfig(), {}, needs_of({}))
    assert [check.subject for check in here] == ["this machine"]


def test_a_service_that_others_reach_needs_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AAI_API_KEY", raising=False)
    services = (Service(), Service(host="0.0.0.0"), Service(host="0.0.0.0", keys_file="keys.yaml"))
    rows = check_services(services)
    assert [row.state for row in rows] == ["ok", "failure", "ok"]
    assert "set AAI_API_KEY" in rows[1].remedy
    monkeypatch.setenv("AAI_API_KEY", "a-key-of-some-length")
    assert [row.state for row in check_services(services)] == ["ok"] * 3


def test_the_runbook_explains_every_finding() -> None:
    page = (ROOT / "docs" / "runbook.md").read_text(encoding="utf-8")
    sources = [*(ROOT / "pipelines" / "checkup").glob("*.py"), ROOT / "pipelines" / "doctor.py"]
    names = {name for file in sources for name in NAMES.findall(file.read_text(encoding="utf-8"))}
    assert len(names) > 15
    explained = set(re.findall(r"^\| `([a-z0-9_.]+)` \|", page, re.M))
    assert names - explained == set()
