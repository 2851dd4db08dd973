"""A recipe as a RayJob of the KubeRay operator, a schedule as a CronJob (recipe -> manifest)."""

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

_MOUNT = "/data"
_SECRET = "ray-auth-token"  # noqa: S105 - the name of a secret
_RAY_VERSION = "2.60.0"


def render(
    sections: Mapping[str, Any],
    *,
    name: str,
    recipe: str,
    variables: Mapping[str, str],
    image: str,
    run_dir: str,
    hosts: int | None,
    cpus_per_host: int,
    gpus_per_host: int,
    memory: str,
    volume_claim: str,
) -> str:
    """Return the YAML of one RayJob that makes its own cluster and removes it afterwards.

    Args:
        sections: the recipe's sections.
        name: name of the job, lower-case letters, digits and dashes.
        recipe: the recipe as the job's command names it.
        variables: environment variables of the recipe.
        image: image with this checkout as its working directory.
        run_dir: where the run's artifacts go, below the mounted volume.
        hosts: worker pods; None for as many as the largest stage has ranks.
        cpus_per_host: CPUs of a pod.
        gpus_per_host: GPUs of a pod.
        memory: memory of a pod in Kubernetes' spelling.
        volume_claim: a volume claim that all pods can write.
    """
    pod = _pod(image, variables, cpus_per_host, gpus_per_host, memory, volume_claim)
    workers = hosts or most_ranks(sections)
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": f"python -m launch run {recipe} --run-dir {run_dir}",
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 3600,
            "rayClusterSpec": {
                "rayVersion": _RAY_VERSION,
                "headGroupSpec": {
                    "rayStartParams": {"dashboard-host": "0.0.0.0"},  # noqa: S104 - a pod's own
                    "template": {"spec": pod},
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": workers,
                        "minReplicas": workers,
                        "maxReplicas": workers,
                        "rayStartParams": {},
                        "template": {"spec": pod},
                    }
                ],
            },
        },
    }
    return yaml.dump(manifest, Dumper=_PlainDumper, sort_keys=False)


def render_cron(
    *,
    name: str,
    cron: str,
    timezone: str,
    command: Sequence[str],
    variables: Mapping[str, str],
    image: str,
    deadline_seconds: int | None,
    retries: int,
    keep_history: int,
) -> str:
    """Return the YAML of a CronJob whose pods submit a recipe to a cluster and follow its job.

    Args:
        name: name of the CronJob.
        cron: the five fields.
        timezone: time zone of ``cron``.
        command: what a pod runs; its exit code is the job's.
        variables: environment variables of the recipe.
        image: image with this checkout as its working directory.
        deadline_seconds: a run that is later is skipped; None for no limit.
        retries: further attempts after a failure that is not the user's mistake (exit code 2).
        keep_history: finished pods that stay, of each kind.
    """
    container = {
        "name": "submit",
        "image": image,
        "command": list(command),
        "env": _environment(variables),
    }
    mistake = {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [2]}}
    spec: dict[str, Any] = {
        "schedule": cron,
        "timeZone": timezone,
        "concurrencyPolicy": "Forbid",
        "successfulJobsHistoryLimit": keep_history,
        "failedJobsHistoryLimit": keep_history,
        "jobTemplate": {
            "spec": {
                "backoffLimit": retries,
                "podFailurePolicy": {"rules": [mistake]},
                "template": {"spec": {"restartPolicy": "Never", "containers": [container]}},
            }
        },
    }
    if deadline_seconds is not None:
        spec["startingDeadlineSeconds"] = deadline_seconds
    metadata = {"name": name}
    manifest = {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": metadata, "spec": spec}
    return yaml.dump(manifest, Dumper=_PlainDumper, sort_keys=False)


def most_ranks(sections: Mapping[str, Any]) -> int:
    """Return the largest ``num_ranks`` of a recipe's sections; 1 where none is set."""
    ranks = [int(s.get("num_ranks", 1)) for s in sections.values() if isinstance(s, Mapping)]
    return max([1, *ranks])


def _pod(
    image: str,
    variables: Mapping[str, str],
    cpus: int,
    gpus: int,
    memory: str,
    volume_claim: str,
) -> dict[str, Any]:
    limits: dict[str, Any] = {"cpu": cpus, "memory": memory}
    if gpus:
        limits["nvidia.com/gpu"] = gpus
    return {
        "containers": [
            {
                "name": "ray",
                "image": image,
                "env": _environment(variables),
                "resources": {"limits": limits, "requests": limits},
                "volumeMounts": [{"name": "data", "mountPath": _MOUNT}],
            }
        ],
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": volume_claim}}],
    }


def _environment(variables: Mapping[str, str]) -> list[dict[str, Any]]:
    token = {"secretKeyRef": {"name": _SECRET, "key": "auth_token"}}
    return [
        {"name": "RAY_AUTH_MODE", "value": "token"},
        {"name": "RAY_AUTH_TOKEN", "valueFrom": token},
        {"name": "RAY_USAGE_STATS_ENABLED", "value": "0"},
        *({"name": name, "value": value} for name, value in sorted(variables.items())),
    ]


class _PlainDumper(yaml.SafeDumper):
    """YAML without anchors: the pods repeat, as people write and tools expect them."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ANN401, ARG002
        return True
