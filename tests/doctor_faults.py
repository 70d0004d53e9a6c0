"""Faults of real surroundings for the doctor: each function makes of a healthy place one with one thing wrong."""

import os
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.conftest import BUCKET
from tests.surroundings import clock_library, free_port, front, ray_node, silent


@dataclass(frozen=True)
class Place:
    """Surroundings, and a run's configs in them."""

    folder: Path
    environment: dict[str, str]
    configs: dict[str, dict[str, Any]]
    tracker: str
    s3: str
    address: str | None = None
    words: tuple[str, ...] = ()
    before: str = ""
    """A shell command that runs before the doctor, in mounts of its own."""
    unset: tuple[str, ...] = ()
    stack: ExitStack = field(default_factory=ExitStack)
    """What ends with the fault."""

    def set(self, verb: str, **settings: Any) -> "Place":
        """With settings of a config changed."""
        return replace(self, configs={**self.configs, verb: {**self.configs[verb], **settings}})

    def env(self, **variables: str) -> "Place":
        """With environment variables changed."""
        return replace(self, environment={**self.environment, **variables})

    def of(self, server: AbstractContextManager[Any]) -> Any:
        """Starts something that runs as long as the fault."""
        return self.stack.enter_context(server)


def config_unknown_key(place: Place) -> Place:
    return place.set("curate", rows_per_shrd=5)


def config_bad_value(place: Place) -> Place:
    return place.set("curate", val_share=7)


def config_is_no_yaml(place: Place) -> Place:
    (place.folder / "broken.yaml").write_text("a: [1\n")
    return replace(place, words=(f"featurize={place.folder}/broken.yaml",))


def input_is_absent(place: Place) -> Place:
    return place.set("curate", manifest=f"s3://{BUCKET}/data/other.csv")


def ray_is_not_there(place: Place) -> Place:
    return replace(place, address=f"127.0.0.1:{free_port()}")


def ray_says_nothing(place: Place) -> Place:
    return replace(place, address=f"127.0.0.1:{place.of(silent())}")


def ray_is_something_else(place: Place) -> Place:
    return replace(place, address=place.tracker.removeprefix("http://"))


def ray_wants_another_token(place: Place) -> Place:
    return place.env(RAY_AUTH_TOKEN="f" * 32)


def ray_wants_a_token_and_there_is_none(place: Place) -> Place:
    return replace(place.env(RAY_AUTH_TOKEN_PATH="/nowhere"), unset=("RAY_AUTH_TOKEN",))


def ray_token_is_kept_back(place: Place) -> Place:
    return place.env(RAY_AUTH_MODE="disabled")


def ray_lets_everybody_in(place: Place) -> Place:
    options = ("--num-cpus", "2", "--include-dashboard", "true", "--dashboard-port", str(free_port()))
    open_to_all = place.environment | {"RAY_AUTH_MODE": "disabled"}
    return replace(place, address=place.of(ray_node(None, open_to_all, *options)))


def ray_token_can_be_read_by_others(place: Place) -> Place:
    Path("/tmp/aai-doctor-token").write_text(place.environment["RAY_AUTH_TOKEN"])
    Path("/tmp/aai-doctor-token").chmod(0o644)
    place.stack.callback(Path("/tmp/aai-doctor-token").unlink)
    return replace(place.env(RAY_AUTH_TOKEN_PATH="/tmp/aai-doctor-token"), unset=("RAY_AUTH_TOKEN",))


def local_ray_would_let_everybody_in(place: Place) -> Place:
    return replace(place.env(RAY_AUTH_MODE="disabled"), address=None)


def ray_has_no_room(place: Place) -> Place:
    return place.set("curate", cluster={"num_workers": 64})


def node(place: Place, *options: str, before: str = "", **changed: str) -> Place:
    """With one more node, which is not like the first."""
    place.of(ray_node(place.address, place.environment | changed, "--num-cpus", "1", *options, before=before))
    return place


def node_has_another_torch(place: Place) -> Place:
    planted = place.folder / "packages" / "torch-0.0.1.dist-info"
    planted.mkdir(parents=True, exist_ok=True)
    (planted / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 0.0.1\n")
    return node(place, PYTHONPATH=os.pathsep.join([str(planted.parent), os.environ["PYTHONPATH"]]))


def node_has_another_commit(place: Place) -> Place:
    other, root = place.folder / "checkout", Path(__file__).resolve().parents[1]
    if not other.exists():
        shutil.copytree(root / "aai", other / "aai", ignore=shutil.ignore_patterns("weights"))
        (other / "aai" / "COMMIT").write_text("0000000")
    return node(place, PYTHONPATH=str(other))


def node_says_it_has_a_gpu(place: Place) -> Place:
    return node(place, "--num-gpus", "1")


def node_has_another_clock(place: Place) -> Place:
    library = clock_library(place.folder)
    return node(place, LD_PRELOAD=str(library), CLOCK_OFF_S="-120")


def node_has_no_keys(place: Place) -> Place:
    return node(place, AWS_SECRET_ACCESS_KEY="")


def node_has_another_model(place: Place) -> Place:
    other = place.folder / "other-clip"
    shutil.copytree(place.folder / "clip", other, dirs_exist_ok=True)
    (other / "tokenizer_config.json").write_text("{}")
    return node(place, before=f"mount --bind {other} {place.folder / 'clip'}")


def node_does_not_see_the_folder(place: Place) -> Place:
    (place.folder / "shared" / "run").mkdir(parents=True, exist_ok=True)
    moved = place.set("curate", run_dir=f"{place.folder}/shared/run")
    return node(moved, before=f"mount -t tmpfs tmpfs {place.folder / 'shared'}")


def s3_is_away(place: Place) -> Place:
    return place.env(AWS_ENDPOINT_URL=f"http://127.0.0.1:{free_port()}")


def s3_says_nothing(place: Place) -> Place:
    return place.env(AWS_ENDPOINT_URL=f"http://127.0.0.1:{place.of(silent())}")


def s3_wants_another_key(place: Place) -> Place:
    return place.env(AWS_SECRET_ACCESS_KEY="another-secret-key")


def s3_has_no_such_bucket(place: Place) -> Place:
    return place.set("curate", run_dir="s3://no-such-bucket/run")


def s3_can_only_be_read(place: Place) -> Place:
    return place.env(AWS_ENDPOINT_URL=place.of(front(place.s3, refuse=("PUT", "DELETE"))))


def s3_ignores_conditions(place: Place) -> Place:
    return place.env(AWS_ENDPOINT_URL=place.s3)


def s3_has_another_clock(place: Place) -> Place:
    return place.env(AWS_ENDPOINT_URL=place.of(front(place.s3, off_s=-300)))


def tracked(place: Place, uri: str) -> Place:
    """With another tracking store."""
    tracking = {"uri": uri, "experiment": "looked-at"}
    return place.set("curate", tracking=tracking).set("promote", tracking=tracking)


def mlflow_is_away(place: Place) -> Place:
    return tracked(place, f"http://127.0.0.1:{free_port()}")


def mlflow_says_nothing(place: Place) -> Place:
    return tracked(place, f"http://127.0.0.1:{place.of(silent())}")


def mlflow_does_not_know_the_account(place: Place) -> Place:
    return place.env(MLFLOW_TRACKING_PASSWORD="wrong-password")


def mlflow_can_only_be_read(place: Place) -> Place:
    return tracked(place, place.of(front(place.tracker, refuse=("POST",))))


def mlflow_takes_no_files(place: Place) -> Place:
    return tracked(place, place.of(front(place.tracker, refuse=("PUT",))))


def mlflow_has_another_clock(place: Place) -> Place:
    return tracked(place, place.of(front(place.tracker, off_s=900)))


def mlflow_address_holds_a_password(place: Place) -> Place:
    return tracked(place, f"http://me:{place.environment['MLFLOW_TRACKING_PASSWORD']}@127.0.0.1:5000")


def mlflow_file_is_held(place: Place) -> Place:
    holder = sqlite3.connect(place.folder / "held.db", isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    place.stack.callback(holder.close)
    return tracked(place, f"sqlite:///{place.folder}/held.db")


def alone(place: Place, before: str) -> Place:
    """On this machine alone, with a local folder, in mounts of its own."""
    (place.folder / "local").mkdir(exist_ok=True)
    local = place.set("curate", run_dir=f"{place.folder}/local").set("promote", run_dir=f"{place.folder}/local")
    return replace(local, address=None, before=before)


def disk_is_full(place: Place) -> Place:
    folder = place.folder / "local"
    fill = f"head -c 2000000 /dev/zero > {folder}/full 2>/dev/null || true"
    return alone(place, f"mount -t tmpfs -o size=1m tmpfs {folder}; {fill}")


def disk_is_small(place: Place) -> Place:
    small = alone(place, f"mount -t tmpfs -o size=16m tmpfs {place.folder / 'local'}")
    return replace(small, words=("--set", "min_free_gb=0.1"))


def folder_can_only_be_read(place: Place) -> Place:
    return alone(place, f"mount -t tmpfs -o ro tmpfs {place.folder / 'local'}")


def shared_memory_is_small(place: Place) -> Place:
    return alone(place, "mount -t tmpfs -o size=64m tmpfs /dev/shm")


def spoiled(place: Place, file: str, spoil: Callable[[bytes], bytes]) -> Place:
    """With a file of the CLIP's spoiled."""
    target = next((place.folder / "clip").glob(file))
    whole, stat = target.read_bytes(), target.stat()
    target.write_bytes(spoil(whole))

    def restore() -> None:
        target.write_bytes(whole)
        os.utime(target, ns=(stat.st_atime_ns, stat.st_mtime_ns))

    place.stack.callback(restore)
    return place


def model_is_cut_off(place: Place) -> Place:
    return spoiled(place, "*.safetensors", lambda whole: whole[:-100])


def model_has_another_bit(place: Place) -> Place:
    return spoiled(place, "*.safetensors", lambda whole: whole[:-1] + bytes([whole[-1] ^ 1]))


def model_is_not_there(place: Place) -> Place:
    models = {"clip": f"{place.folder}/clip", "diffusion": f"{place.folder}/nowhere"}
    return place.set("curate", foundation=models)


def model_is_on_the_hub_without_a_network(place: Place) -> Place:
    hub = {"clip": "openai/clip-nowhere", "clip_revision": "0" * 40, "diffusion": f"{place.folder}/diffusion"}
    return place.set("curate", foundation=hub)


def service_has_no_key(place: Place) -> Place:
    serve = {"run_dir": f"s3://{BUCKET}/run", "host": "0.0.0.0", "tracking": place.configs["promote"]["tracking"]}
    serve["bundle"] = "models:/x@champion"
    return replace(place, configs={**place.configs, "serve": serve}, unset=("AAI_API_KEY",))


FAULTS: list[tuple[Callable[[Place], Place], str, str]] = [
    (config_unknown_key, "config", "did you mean 'rows_per_shard'"),
    (config_bad_value, "config", "--set val_share="),
    (config_is_no_yaml, "config", "mend the YAML file"),
    (input_is_absent, "s3.read", "mend the setting"),
    (ray_is_not_there, "ray.reachable", "start the cluster"),
    (ray_says_nothing, "ray.reachable", "firewall"),
    (ray_is_something_else, "ray.reachable", "mend --address"),
    (ray_wants_another_token, "ray.token", "RAY_AUTH_TOKEN"),
    (ray_wants_a_token_and_there_is_none, "ray.token", "RAY_AUTH_TOKEN_PATH"),
    (ray_token_is_kept_back, "ray.token", "set RAY_AUTH_MODE=token"),
    (ray_lets_everybody_in, "ray.open", "RAY_AUTH_MODE=token"),
    (ray_token_can_be_read_by_others, "ray.token_file", "chmod 600"),
    (local_ray_would_let_everybody_in, "ray.token", "unset RAY_AUTH_MODE"),
    (ray_has_no_room, "ray.room", "add nodes"),
    (node_has_another_torch, "node.version", "the same image"),
    (node_has_another_commit, "node.version", "the same image"),
    (node_says_it_has_a_gpu, "node.gpu", "--num-gpus"),
    (node_has_another_clock, "node.clock", "chrony"),
    (node_has_no_keys, "node.environment", "docs/clusters.md"),
    (node_has_another_model, "weights.node", "copy the folder"),
    (node_does_not_see_the_folder, "node.folder", "s3://"),
    (s3_is_away, "s3.reachable", "AWS_ENDPOINT_URL"),
    (s3_says_nothing, "s3.reachable", "AWS_ENDPOINT_URL"),
    (s3_wants_another_key, "s3.keys", "AWS_SECRET_ACCESS_KEY"),
    (s3_has_no_such_bucket, "s3.bucket", "make the bucket"),
    (s3_can_only_be_read, "s3.write", "s3:PutObject"),
    (s3_ignores_conditions, "s3.conditional", "conditional writes"),
    (s3_has_another_clock, "clock", "chrony"),
    (mlflow_is_away, "mlflow.reachable", "start it"),
    (mlflow_says_nothing, "mlflow.reachable", "start it"),
    (mlflow_does_not_know_the_account, "mlflow.account", "MLFLOW_TRACKING_PASSWORD"),
    (mlflow_can_only_be_read, "mlflow.write", "EDIT"),
    (mlflow_takes_no_files, "mlflow.artifacts", "serve artifacts"),
    (mlflow_has_another_clock, "clock", "chrony"),
    (mlflow_address_holds_a_password, "mlflow.reachable", "MLFLOW_TRACKING_USERNAME"),
    (mlflow_file_is_held, "mlflow.write", "end what holds it"),
    (disk_is_full, "disk", "free some space"),
    (disk_is_small, "disk", "free some space"),
    (folder_can_only_be_read, "folder.write", "right to write"),
    (shared_memory_is_small, "node.shm", "--shm-size"),
    (model_is_cut_off, "weights.file", "copy the folder anew"),
    (model_has_another_bit, "weights.hash", "restore the folder"),
    (model_is_not_there, "weights.folder", "foundation.diffusion"),
    (model_is_on_the_hub_without_a_network, "weights.hub", "put the folder on every node"),
    (service_has_no_key, "service.key", "AAI_API_KEY"),
]
"""What is planted, the name under which it is to be found, and a word of its remedy."""
