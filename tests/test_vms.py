"""The clusters of infra/vms: right as they stand, each planted mistake found; Ray's own code makes AWS's nodes."""

import os
import re
import shlex
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.util import prepare_config
from ray.autoscaler.tags import TAG_RAY_NODE_KIND
from ray.scripts.scripts import cli

from tests.cluster_yaml import ROOT, against_compute_api, launched, mistakes
from tests.manifest_checks import check_entrypoint
from tests.test_infra import documented

VMS = sorted((ROOT / "infra" / "vms").glob("*.yaml"))
AWS, GCP = (path.read_text() for path in VMS)


@pytest.mark.parametrize("path", VMS, ids=lambda path: path.stem)
def test_a_cluster_has_no_mistakes(path: Path) -> None:
    assert mistakes(path.read_text()) == []


PLANTED: dict[str, tuple[str, str, str, str]] = {
    "unknown key": (AWS, "max_workers: 10\n", "max_worker: 10\n", "max_worker"),
    "unknown key of a node type": (AWS, "min_workers: 0\n    max_workers: 2", "min_worker: 0", "min_worker"),
    "wrong type": (AWS, "max_workers: 10\n", "max_workers: many\n", "many"),
    "no such node type": (AWS, "head_node_type: head", "head_node_type: heads", "head_node_type"),
    "min above max": (AWS, "min_workers: 0\n    max_workers: 2", "min_workers: 3\n    max_workers: 2", "is above max"),
    "above the cluster": (AWS, "max_workers: 8  #", "max_workers: 80  #", "above that of the cluster"),
    "min above the cluster": (AWS, "min_workers: 0\n    max_workers: 2", "min_workers: 30", "max_workers"),
    "not from zero": (GCP, "min_workers: 0\n    max_workers: 2", "min_workers: 1\n    max_workers: 2", "from zero"),
    "head takes work": (AWS, "{CPU: 0, GPU: 0}", "{CPU: 8, GPU: 0}", "head takes work"),
    "GPU that nobody offers": (AWS, "{CPU: 96, GPU: 8}", "{CPU: 96}", "get {}"),
    "too few CPUs beside a GPU": (GCP, "{CPU: 96, GPU: 8}", "{CPU: 4, GPU: 8}", "get {}"),
    "cannot grow": (GCP, "max_workers: 2", "max_workers: 0", "get {'gpu"),
    "open to all": (AWS, "  use_internal_ips: true", "  use_internal_ips: true\n  security_group: {IpPermissions: "
                    "[{FromPort: 8265, ToPort: 8265, IpProtocol: tcp, IpRanges: [{CidrIp: 0.0.0.0/0}]}]}", "CidrIp"),
    "open to all of IPv6": (AWS, "  use_internal_ips: true", "  use_internal_ips: true\n  security_group: "
                            "{IpPermissions: [{Ipv6Ranges: [{CidrIpv6: '::/0'}]}]}", "CidrIpv6"),
    "ssh by Ray's default": (AWS, "SecurityGroupIds: [sg", "Groups: [sg", "opens ssh to everybody"),
    "public addresses": (AWS, "  use_internal_ips: true\n", "", "use_internal_ips"),
    "public address": (GCP, "my-subnetwork\n", "my-subnetwork\n          accessConfigs: [{type: ONE_TO_ONE_NAT}]\n",
                       "public"),
    "Ray's default network": (GCP, "networkInterfaces:", "networkInterface:", "public address"),
    "token in the file": (AWS, "RAY_AUTH_MODE=token ~", f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN={'ab' * 32} ~", "secret"),
    "password in an address": (AWS, "https://git", "https://me:hunter2@git", "a secret"),
    "S3 key": (GCP, "set -a; .", "export AWS_SECRET_ACCESS_KEY=abcdef; set -a; .", "a secret"),
    "token is no file": (GCP, "  ~/.ray/auth_token: ~/.ray/auth_token\n", "", "no node gets the token"),
    "workers without token": (AWS, "RAY_AUTH_MODE=token ~/venv/bin/ray start --ad", "~/venv/bin/ray start --ad",
                              "worker_start_ray_commands: asks for no token"),
    "unknown flag": (GCP, "--object-manager-port", "--objectmanager-port", "objectmanager"),
    "open dashboard": (AWS, "--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "dashboard"),
    "no autoscaler": (AWS, " --autoscaling-config=~/ray_bootstrap_config.yaml", "", "nothing scales"),
    "shell": (AWS, "cloud-init status --wait >", "if cloud-init status --wait >", "SC10"),
    "unquoted variable": (AWS, '"$RAY_HEAD_IP:6379"', "$RAY_HEAD_IP:6379", "SC2086"),
    "key of Google's API": (GCP, "machineType: n2-standard-8", "machine_type: n2-standard-8",
                            "no such key: machine_type"),
    "value of Google's API": (GCP, "provisioningModel: SPOT", "provisioningModel: CHEAP", "CHEAP"),
}  # fmt: skip
"""What is changed in which file, to what, and a word of what is then found."""


@pytest.mark.parametrize(("text", "old", "new", "word"), PLANTED.values(), ids=PLANTED)
def test_a_planted_mistake_is_found(text: str, old: str, new: str, word: str) -> None:
    assert old in text
    found = mistakes(text.replace(old, new))
    assert any(word in line for line in found), found


def test_both_clouds_have_the_same_sizes_and_commands() -> None:
    aws, gcp = yaml.safe_load(AWS), yaml.safe_load(GCP)
    same = aws.keys() - {"provider", "auth", "available_node_types", "head_setup_commands"}
    assert {key: aws[key] for key in same} == {key: gcp[key] for key in same}
    for name, node in aws["available_node_types"].items():
        other = gcp["available_node_types"][name]
        assert node | {"node_config": 0} == other | {"node_config": 0}


def test_what_a_site_fills_in_is_written_once() -> None:
    for text in (AWS, GCP):
        assert text.count("git.example.com") == 1
        assert len(re.findall(r"\b0{40}\b", text)) == 1


@pytest.mark.parametrize("text", [AWS, GCP], ids=["aws", "gcp"])
def test_the_autoscaler_adds_the_nodes_that_the_configs_ask_for(text: str) -> None:
    """128 workers of curate, 8 of align; spot nodes once they are allowed."""
    config = prepare_config(yaml.safe_load(text))
    assert launched(config, [{"CPU": 1}] * 128) == {"cpu": 1}
    assert launched(config, [{"CPU": 6, "GPU": 1}] * 8) == {"gpu": 1}
    assert launched(config, [{"CPU": 6, "GPU": 1}] * 9) == {"gpu": 2}
    types = config["available_node_types"]
    types["gpu"]["max_workers"], types["gpu-spot"]["max_workers"] = 0, 8
    assert launched(config, [{"CPU": 6, "GPU": 1}] * 8) == {"gpu-spot": 1}
    assert launched(config, [{"CPU": 200}]) == {}


def test_the_check_of_googles_api_reads_values_too() -> None:
    assert against_compute_api({"disks": [{"boot": "yes"}]}) == ["node_config.disks[0].boot: is no boolean"]
    assert against_compute_api({"labels": {"team": "sound"}}) == []


def site(ec2: Any, folder: Path) -> dict[str, Any]:
    """The cluster of infra/vms/aws.yaml with the ids of a network that is made here: what a site fills in."""
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")
    subnet = vpc.create_subnet(CidrBlock="10.0.1.0/24", AvailabilityZone="us-west-2a")
    group = ec2.create_security_group(GroupName="aai", Description="its members alone", VpcId=vpc.id)
    image = ec2.register_image(Name="ubuntu").id
    ec2.create_key_pair(KeyName="aai")
    (folder / "aai.pem").touch()
    text = re.sub(r"subnet-0+\b", subnet.id, re.sub(r"sg-0+\b", group.id, re.sub(r"ami-0+[01]\b", image, AWS)))
    return dict(prepare_config(yaml.safe_load(text.replace("~/.ssh/aai.pem", f"{folder}/aai.pem"))))


@mock_aws
def test_ray_makes_the_nodes_on_aws_and_opens_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's own provider against moto's EC2, which checks each key of a node_config."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("HOME", str(tmp_path))
    ec2 = boto3.resource("ec2", region_name="us-west-2")
    boto3.client("iam").create_instance_profile(InstanceProfileName="aai")
    config = bootstrap_aws(site(ec2, tmp_path))
    provider = AWSNodeProvider(config["provider"], "aai")
    for name, node in config["available_node_types"].items():
        provider.create_node(node["node_config"], {TAG_RAY_NODE_KIND: "worker", "Name": name}, 1)
    instances = list(ec2.instances.all())
    kinds = sorted(instance.instance_type for instance in instances)
    assert kinds == ["c6i.32xlarge", "m7i.2xlarge", "p4d.24xlarge", "p4d.24xlarge"]
    assert sum(instance.instance_lifecycle == "spot" for instance in instances) == 1
    assert [instance.public_ip_address for instance in instances] == [None] * 4
    assert "0.0.0.0/0" not in str([group.ip_permissions for group in ec2.security_groups.all()])
    assert not (tmp_path / ".ssh").exists() or os.listdir(tmp_path / ".ssh") == []


PAGE = (ROOT / "docs" / "vms-slurm.md").read_text()


@pytest.mark.parametrize("line", documented(PAGE, "ray"))
def test_documented_commands_are_rays_and_ours(line: str) -> None:
    _, verb, *words = shlex.split(line, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    cli.commands[verb].make_context(verb, words, resilient_parsing=False)
    for command in [word.removeprefix("cd aai && ") for word in words if "aai " in word]:
        check_entrypoint(command)


def test_the_page_says_how_many_mistakes_were_planted() -> None:
    assert f"{len(PLANTED)} planted mistakes" in " ".join(PAGE.split())
