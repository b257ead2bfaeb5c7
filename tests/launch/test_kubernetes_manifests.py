"""What the launchers on Kubernetes write, held against whole manifests, and what they refuse to write."""

from __future__ import annotations

import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_jobs import ELASTIC, FULL, PLAIN, TOKEN, job, settings

from llmkit import launch
from llmkit.errors import RecipeError, UsageError
from llmkit.kube import names, pods
from llmkit.launch import polyaxon, pytorchjob, trainjob
from llmkit.launch_settings import LaunchSettings
from llmkit.recipe_errors import Conflict

GOLDEN = Path(__file__).parent.parent / "golden" / "kubernetes"
WITHOUT_GANG: dict[str, Any] = {"scheduling": None}
CASES = {
    "pytorchjob-plain": ("pytorchjob", job(), settings(PLAIN)),
    "pytorchjob-full": ("pytorchjob", job(3, 2), settings(FULL)),
    "pytorchjob-elastic": ("pytorchjob", job(2, 1), settings(ELASTIC)),
    "trainjob-plain": ("trainjob", job(), settings(PLAIN)),
    "trainjob-full": ("trainjob", job(3, 2), settings(FULL, **WITHOUT_GANG)),
    "polyaxon-plain": ("polyaxon", job(), settings(PLAIN)),
    "polyaxon-full": ("polyaxon", job(3, 2), settings(FULL, **WITHOUT_GANG)),
}


def test_every_manifest_has_a_case() -> None:
    assert {path.stem for path in GOLDEN.glob("*.yaml")} == set(CASES)


@pytest.mark.parametrize("case", CASES)
def test_manifests(case: str) -> None:
    launcher, what, given = CASES[case]
    text = launch.load(launcher).render(what, given)
    if os.environ.get("LLMKIT_WRITE_GOLDEN"):
        (GOLDEN / f"{case}.yaml").write_text(text, encoding="utf-8")
    assert text == (GOLDEN / f"{case}.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize("case", CASES)
def test_no_anchors_and_the_same_text_again(case: str) -> None:
    launcher, what, given = CASES[case]
    text = launch.load(launcher).render(what, given)
    assert text == launch.load(launcher).render(what, given)
    tokens = [type(token).__name__ for token in yaml.scan(text)]
    assert "AnchorToken" not in tokens
    assert "AliasToken" not in tokens


def test_no_secret_is_in_a_manifest_and_every_text_survives_it() -> None:
    config_map, made = yaml.safe_load_all(pytorchjob.render(job(3, 2), settings(FULL)))
    container = made["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    assert config_map["data"]["recipe.yaml"] == job().recipe
    assert {one["name"]: one.get("valueFrom") for one in container["env"]}["HF_TOKEN"] == {
        "secretKeyRef": {"name": "hub", "key": "token"}
    }
    # Kubernetes makes $$( into $( again.
    assert {one["name"]: one.get("value") for one in container["env"]}["MOTTO"] == 'it\'s "$$(HOME)" — $HOME\nyes'
    assert '/runs/it\'s a "run"/recipe.yaml' in container["command"]


@pytest.mark.parametrize("name", ["a", "Ünïcödé", "9 lives", "x" * 200, "--", "a.b_c", "日本"])
def test_names_are_dns_names_with_room_for_the_pods(name: str) -> None:
    made = names.job_name(name, TOKEN)
    assert made.endswith(f"-{TOKEN[:8]}")
    assert made[0].isalpha()
    assert made == made.lower()
    assert all(c.isascii() and (c.isalnum() or c == "-") for c in made)
    assert len(f"{made}-worker-999") <= 63
    assert made != names.job_name(name, TOKEN[::-1])


def test_one_process_needs_no_torchrun() -> None:
    assert pods.command(job(), settings(PLAIN).kubernetes)[-3:] == ["llmkit", "run", '/runs/it\'s a "run"/recipe.yaml']
    assert "torchrun" in pods.command(job(2), settings(PLAIN).kubernetes)


def test_a_run_in_an_object_store_has_its_recipe_there() -> None:
    what = replace(job(2), argv=("llmkit", "run", "s3://b/runs/a/recipe.yaml"), remote=True)
    (made,) = yaml.safe_load_all(pytorchjob.render(what, settings(PLAIN)))
    assert made["metadata"]["annotations"]["llmkit.io/output-dir"] == "s3://b/runs/a"
    command = pods.command(what, settings(PLAIN).kubernetes)
    assert command[3:5] == ["--output", "s3://b/runs/a"]
    assert "--recipe" not in command


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"image": None}, "needs the image"),
    ({"affinity": {"nodeAffinty": {}}}, "launch.kubernetes.affinity.nodeAffinty: is no key"),
    ({"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{"wait": 1}]}}},
     "preferredDuringSchedulingIgnoredDuringExecution.0.wait: is no key"),
    ({"elastic": {"min_nodes": 2, "max_nodes": 4}}, "is 1, outside of launch.kubernetes.elastic (2 to 4)"),
    ({"scheduling": {"min_available": 2}}, "is more than the 1 pods"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MISTAKES)
def test_what_the_webhook_would_refuse_is_refused_before(change: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        pytorchjob.check(settings(PLAIN, **change))
    assert message in str(caught.value)


def test_all_mistakes_come_at_once() -> None:
    with pytest.raises(RecipeError, match="3 mistakes"):
        trainjob.check(settings(PLAIN, image=None, scheduling={}, affinity={"x": 1}))


def conflicts(**kubernetes: Any) -> list[Conflict]:
    """What a block would be told: built without validation, as the finder of mistakes does it."""
    kind = LaunchSettings.model_fields["kubernetes"].annotation
    assert kind is not None
    return list(kind.model_construct(**kubernetes).conflicts())  # type: ignore[attr-defined]


SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"namespace": "Team A"}, "namespace"),
    ({"image": "an image"}, "image"),
    ({"memory": "64 GB"}, "memory"),
    ({"resources": {"cpu": "1"}}, "resources.cpu"),
    ({"env": {"RANK": "0"}}, "env"),
    ({"env": {"A-B": "0"}}, "env.A-B"),
    ({"labels": {"team": "two words"}}, "labels.team"),
    ({"labels": {"llmkit.io/token": "x"}}, "labels.llmkit.io/token"),
    ({"node_selector": {"/x": "y"}}, "node_selector./x"),
]


@pytest.mark.parametrize(("given", "key"), SETTINGS)
def test_settings_that_kubernetes_would_refuse(given: dict[str, Any], key: str) -> None:
    assert [c.key for c in conflicts(**given)] == [key]


def test_a_volume_hides_nothing_of_ours() -> None:
    for path in ("/etc/llmkit", "/dev/shm/", "/"):
        with pytest.raises(ValueError, match="is taken"):
            settings(PLAIN, volumes=[{"claim": "c", "mount_path": path}])


def test_polyaxon_submits_itself() -> None:
    with pytest.raises(UsageError, match="polyaxon run -f"):
        polyaxon.submit(job(), settings(PLAIN))


def test_jobs_do_not_wait_for_jobs() -> None:
    with pytest.raises(UsageError, match="--after"):
        pytorchjob.waiting_for(settings(PLAIN), ["7"])


# Kustomize and profiles

K8S = Path(__file__).resolve().parent.parent.parent / "k8s"


@pytest.mark.parametrize("overlay", ["single-node", "gpu"])
def test_overlays_build(overlay: str, kubectl: str) -> None:
    done = subprocess.run(
        [kubectl, "kustomize", K8S / "overlays" / overlay], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    objects = list(yaml.safe_load_all(done.stdout))
    assert len(objects) >= 14
    assert {o["metadata"].get("namespace", "llmkit") for o in objects} == {"llmkit"}
    for one in objects:
        assert one["kind"] != "Secret", "secrets are made by hand"
        template = one.get("spec", {}).get("template")
        if template is None:
            continue
        assert template["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in template["spec"]["containers"]:
            assert ":" in container["image"], "images are pinned"


def test_profiles_are_valid_and_fit_their_launcher() -> None:
    from llmkit.profiles import read_profile

    found = sorted(K8S.glob("*.yaml"))
    assert len(found) >= 2
    for path in found:
        given = LaunchSettings.model_validate(read_profile(str(path)))
        launch.load(given.launcher).check(given)
