"""The examples under deploy/: valid against the schemas, and their commands are commands of ours."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tokentape.cli import main

DEPLOY = Path(__file__).parents[2] / "deploy"
VERSION = "1.33"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((DEPLOY / name).read_text()))


def accepts(words: list[str]) -> None:
    """The command line takes these options, and has what it must."""
    assert words[0] == "tokentape"
    command = main.commands[words[1]]  # type: ignore[attr-defined]
    with command.make_context(words[1], words[2:]) as context:
        assert context.params


def test_the_deployment_is_valid() -> None:
    found = documents("replicas.yaml")
    for one in found:
        kubernetes_validate.validate(one, VERSION, strict=True)
    [deployment] = [one for one in found if one["kind"] == "Deployment"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    accepts([re.sub(r"\$\((\w+)\)", r"postgresql://\1", word) for word in container["args"]])
    secret, [names] = found[0]["stringData"], [container["env"]]
    used = {e["valueFrom"]["secretKeyRef"]["key"] for e in names if "secretKeyRef" in e["valueFrom"]}
    assert used == set(secret)


def test_the_ray_job_is_valid() -> None:
    job, service = documents("kuberay.yaml")
    kubernetes_validate.validate(service, VERSION, strict=True)
    accepts(shlex.split(job["spec"]["entrypoint"].replace("$STORE", "postgresql://x")))
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for group in groups:
        template = {**group["template"], "metadata": {"labels": {"app": "x"}}}
        spec = {"selector": {"matchLabels": {"app": "x"}}, "template": template}
        pod = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "x"}, "spec": spec}
        kubernetes_validate.validate(pod, VERSION, strict=True)
    assert service["spec"]["selector"]["ray.io/originated-from-cr-name"] == job["metadata"]["name"]


def test_compose_is_valid() -> None:
    command = [
        "-m",
        "check_jsonschema",
        "--builtin-schema",
        "vendor.compose-spec",
        str(DEPLOY / "compose.yaml"),
    ]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    [text] = documents("compose.yaml")
    shell = text["services"]["gateway"]["command"][2].replace("$$", "$")
    words = shlex.split(re.sub(r"\$\(.*?\)|\$\w+", "x", shell.removeprefix("exec ")))
    accepts(words)


def test_a_wrong_manifest_is_seen() -> None:
    deployment = documents("replicas.yaml")[1]
    deployment["spec"]["template"]["spec"]["container"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(deployment, VERSION, strict=True)
    with pytest.raises(Exception, match="No such option"):
        accepts(["tokentape", "serve", "--stores=x"])
