"""A stage on its ranks: Ray Train for several, a Ray task for one (launch -> cluster.rank)."""

import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from alignrec import artifacts
from alignrec.artifacts import Manifest
from alignrec.distributed.process_group import TIMEOUT_SECONDS
from alignrec.errors import StageFailure, UserError
from alignrec.stage import Context, Stage
from cluster import engine
from cluster.config import ClusterConfig
from cluster.log_follower import LogFollower
from cluster.rank import RankCrash, RankJob, describe, run_rank

Failures = Mapping[int, Exception]
_UNKNOWN_RANK = -1


def run_stage(
    stage: Stage,
    config: Any,  # noqa: ANN401 - the stage's own
    context: Context,
    *,
    num_ranks: int,
    cluster: ClusterConfig,
    run: str,
    show: Callable[[str], None],
) -> None:
    """Run a stage on the connected cluster, again after a rank died, until it is done.

    Stages continue from their checkpoints, so a restart costs the work since the last one.

    Args:
        stage: which stage.
        config: its configuration.
        context: its folders, which all hosts see under the same paths.
        num_ranks: processes that run it together.
        cluster: what a rank gets and how often it is started again.
        run: name of the run, a tag of its metrics.
        show: prints a line for the person who watches.

    Raises:
        UserError: a rank raised it, or the ranks do not fit the cluster.
        StageFailure: a rank raised it, failed otherwise, or died too often.
    """
    part = engine.share(
        engine.hosts(), num_ranks, cluster, stage=stage.name, uses_gpu=stage.uses_gpu(config)
    )
    variables = engine.rank_variables(part, os.environ, run=run)
    job = RankJob(stage, config, context, Path.cwd())
    start = _run_task if num_ranks == 1 else _run_train
    before = artifacts.finished(context.output)
    with LogFollower(job.log(0), prefix=f"[{stage.name}]", show=show):
        for restart in range(cluster.max_restarts + 1):
            failures = start(job, num_ranks, part, variables)
            if not failures:
                return
            _free_leftovers()
            error = verdict(job, failures)
            if isinstance(error, RankDeath) and _has_published(context, before):
                show(f"[{stage.name}] {error} Its result was complete.")
                return
            if not isinstance(error, RankDeath) or restart == cluster.max_restarts:
                raise error
            show(f"[{stage.name}] {error} Restart {restart + 1} of {cluster.max_restarts}.")


def _has_published(context: Context, before: Manifest | None) -> bool:
    """Say whether the ranks wrote their result, all of it, before one died."""
    artifacts.recover(context.output)
    made = artifacts.finished(context.output)
    return made is not None and made != before and made.fingerprint == context.fingerprint


class RankDeath(StageFailure):
    """A rank's process ended without an exception: killed, out of memory, host gone."""


def verdict(job: RankJob, failures: Failures) -> UserError | StageFailure:
    """Return the failure that explains the others.

    A user's mistake goes before a death (a restart would not help), a death before what the other
    ranks said of it, and what the stage itself raised before unexpected exceptions.
    """
    found = [_reading(job, rank, error) for rank, error in sorted(failures.items())]
    for kind in (UserError, RankDeath, StageFailure):
        for error in found:
            if isinstance(error, kind) and not isinstance(error, RankCrash):
                return error
    return found[0]


def _reading(job: RankJob, rank: int, error: Exception) -> UserError | StageFailure:
    from ray.exceptions import RayError, RayTaskError

    if isinstance(error, (UserError, StageFailure)):
        return error
    inner = getattr(error, "health_check_failure", error)  # as Train wraps a rank that is gone
    if isinstance(inner, RayError) and not isinstance(inner, RayTaskError):
        who = f"rank {rank}" if rank != _UNKNOWN_RANK else "a rank"
        return RankDeath(
            f"{who} of {job.stage.name} died ({_cause(inner)}); its output is in {job.log(rank)}."
        )
    return RankCrash(f"{job.stage.name}: Ray failed with {describe(inner)}.")


def _run_task(
    job: RankJob,
    num_ranks: int,  # noqa: ARG001 - one
    part: engine.Share,
    variables: Mapping[str, str],
) -> Failures:
    """Run a single rank as a plain task: a Train run costs some ten seconds of processes more."""
    import ray

    task = ray.remote(
        num_cpus=part.cpus,
        num_gpus=part.gpus,
        max_retries=0,
        max_calls=1,
        runtime_env={"env_vars": dict(variables)},
    )(run_rank)
    try:
        ray.get(task.remote(job))
    except ray.exceptions.RayTaskError as error:
        return {0: error.cause if isinstance(error.cause, Exception) else error}
    except ray.exceptions.RayError as error:
        return {0: error}
    return {}


def _run_train(
    job: RankJob, num_ranks: int, part: engine.Share, variables: Mapping[str, str]
) -> Failures:
    """Run the ranks as a Ray Train worker group with a process group over them.

    Train's own retries stay off: they would also repeat a user's mistake.
    """
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        run_rank,
        train_loop_config=job,  # type: ignore[arg-type, unused-ignore]
        scaling_config=train.ScalingConfig(
            num_workers=num_ranks,
            use_gpu=part.gpus > 0,
            resources_per_worker={"CPU": part.cpus} | ({"GPU": part.gpus} if part.gpus else {}),
        ),
        run_config=train.RunConfig(
            name=job.stage.name,
            storage_path=str(job.context.log_dir.absolute() / "ray_train"),
            failure_config=train.FailureConfig(max_failures=0),
            logging_config=train.LoggingConfig(log_level="ERROR"),
            worker_runtime_env={"env_vars": dict(variables)},
        ),
        torch_config=TorchConfig(
            backend=job.stage.backend if part.gpus else "gloo",
            timeout_s=int(getattr(job.config, "timeout_seconds", TIMEOUT_SECONDS)),
        ),
    )
    return _fit(trainer)


def _fit(trainer: Any) -> Failures:  # noqa: ANN401 - a TorchTrainer
    """Call ``fit`` beside the main thread, which keeps its own handling of Ctrl-C."""
    from ray.train import ControllerError, WorkerGroupError

    outcome: list[Failures | BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
            outcome.append({})
        except WorkerGroupError as error:
            outcome.append(error.worker_failures)
        except ControllerError as error:
            outcome.append({_UNKNOWN_RANK: error.controller_failure})
        except BaseException as error:  # raised again in the main thread
            outcome.append(error)

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    (result,) = outcome
    if isinstance(result, BaseException):
        raise result
    return result


def _free_leftovers() -> None:
    """Give back what a failed attempt reserved.

    When a rank dies while Train starts the group, Train ends without removing its placement group,
    and the next attempt would wait for those CPUs for ever. An id ends with that of its job.
    """
    import ray
    from ray.util.placement_group import (
        PlacementGroup,
        placement_group_table,
        remove_placement_group,
    )

    job = ray.get_runtime_context().get_job_id()
    for name, entry in placement_group_table().items():
        if name.endswith(job) and entry["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(name)))


def _cause(error: Exception) -> str:
    from ray.exceptions import OutOfMemoryError

    if isinstance(error, OutOfMemoryError):
        return "killed by Ray because its host ran out of memory"
    return "killed, or crashed without an exception"
