"""Whether a tracking store can be used is known before long work begins, and said in one line."""

import logging
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from aai.errors import UserError
from pipelines.registry import store, tracking, versions
from pipelines.registry.store import alive, check, database
from pipelines.settings import TrackingConfig
from tests.certificates import for_this_machine


def test_a_new_sqlite_file_has_its_folder_made(tmp_path: Path) -> None:
    file = tmp_path / "new" / "mlflow.db"
    assert database(TrackingConfig(uri=f"sqlite:///{file}?timeout=5")) == file
    assert file.parent.is_dir()


@pytest.mark.parametrize(
    ("uri", "rule"),
    [
        ("ftp://somewhere", "is not supported"),
        ("sqlite:///", "needs a file on this machine"),
        ("sqlite:///s3://bucket/mlflow.db", "needs a file on this machine"),
        ("http://user:secret@127.0.0.1:9", "holds a password"),
        ("http://127.0.0.1:9", "no tracking server answers .*Connection refused"),
        ("http://[", "cannot be asked"),
        ("databricks-uc://x", "is not supported"),
    ],
)
def test_a_store_that_cannot_be_used_is_named(uri: str, rule: str) -> None:
    with pytest.raises(UserError, match=rule) as error:
        check(TrackingConfig(uri=uri, wait_s=0))
    assert "secret" not in str(error.value)


def test_a_file_that_is_no_database_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mlflow.db"
    file.write_text("this is a text of more than a hundred characters, and no database at all; " * 4)
    with pytest.raises(UserError, match="cannot be opened"):
        check(TrackingConfig(uri=f"sqlite:///{file}"))


Answer = Callable[[BaseHTTPRequestHandler], int]


@contextmanager
def listening(answer: Answer, certificate: tuple[Path, Path] | None = None) -> Iterator[str]:
    """The address of an HTTP server that answers with these statuses, over TLS where it has a certificate."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self.send_response(answer(self))
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        do_POST = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate[1], certificate[0])
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def test_a_server_that_is_starting_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(store, "AGAIN_S", 0.1)
    asked: list[str] = []

    def answer(request: BaseHTTPRequestHandler) -> int:
        asked.append(request.path)
        return 503 if len(asked) < 4 else 200

    with listening(answer) as address:
        cfg = TrackingConfig(uri=address)
        with pytest.raises(UserError, match=r"no tracking server answers \(status 503\)"):
            alive(cfg)  # the service asks again by itself
        with caplog.at_level(logging.WARNING):
            check(cfg)
        assert asked == ["/health"] * 4
        assert [record.getMessage() for record in caplog.records] == [
            f"MLflow: {address} does not answer yet, waiting up to 30 s (status 503)"
        ]
        check(cfg)
        assert len(asked) == 4, "it has answered"
    with pytest.raises(UserError, match=r"no tracking server answers .*refused; waited for 0\.3 s"):
        check(TrackingConfig(uri="http://127.0.0.1:9", wait_s=0.3))


def test_a_private_authority_is_trusted_as_mlflow_trusts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    certificate = for_this_machine(tmp_path)
    for name in ("MLFLOW_TRACKING_SERVER_CERT_PATH", "REQUESTS_CA_BUNDLE", "MLFLOW_TRACKING_INSECURE_TLS"):
        monkeypatch.delenv(name, raising=False)
    with listening(lambda _: 200, certificate) as address:
        cfg = TrackingConfig(uri=address)
        with pytest.raises(UserError, match=r"is not trusted \(.+; name .* MLFLOW_TRACKING_SERVER_CERT_PATH"):
            check(cfg)
        for name, value in (
            ("MLFLOW_TRACKING_SERVER_CERT_PATH", str(certificate[1])),
            ("REQUESTS_CA_BUNDLE", str(certificate[1])),
            ("MLFLOW_TRACKING_INSECURE_TLS", "true"),
        ):
            with monkeypatch.context() as patch:
                patch.setenv(name, value)
                alive(cfg)
        monkeypatch.setenv("MLFLOW_TRACKING_SERVER_CERT_PATH", str(tmp_path / "absent.crt"))
        with pytest.raises(UserError, match=r"cannot be asked .*absent\.crt"):
            check(cfg)


def test_databricks_is_left_to_mlflows_own_client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Against a stand-in for a workspace: which addresses are asked, and with whose token."""
    asked: list[tuple[str, str]] = []

    def answer(request: BaseHTTPRequestHandler) -> int:
        asked.append((request.path.split("?")[0], request.headers.get("Authorization", "")))
        return 404

    monkeypatch.setenv("DATABRICKS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    cfg = TrackingConfig(uri="databricks", model_name="main.aai.aai")
    with listening(answer) as address:
        monkeypatch.setenv("DATABRICKS_HOST", address)
        monkeypatch.setenv("DATABRICKS_TOKEN", "of-a-test")
        with pytest.raises(UserError, match=r"tracking\.uri=databricks: MLflow refuses"), tracking.run(cfg, "x"):
            pytest.fail("it was opened")
        before = len(asked)
        with pytest.raises(UserError, match=r"tracking\.uri=databricks: MLflow refuses"):
            versions.aliases(cfg, cfg.model_name)
    assert {token for path, token in asked if "/mlflow/" in path} == {"Bearer of-a-test"}
    assert any("mlflow/experiments" in path for path, _ in asked[:before])
    assert any("unity-catalog" in path for path, _ in asked[before:]), "where models have aliases"
