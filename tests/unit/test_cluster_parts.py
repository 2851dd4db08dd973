"""What ranks reserve, which failure is told, lines of a growing log, manifests."""

import contextlib
import dataclasses
import errno
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignrec import align, artifacts, export, graph, pretrain
from alignrec.errors import StageFailure, UserError
from alignrec.stage import Context, Stage
from cluster import kubernetes, rank, worker_group
from cluster.config import ClusterConfig
from cluster.engine import Host, Share, rank_variables, share
from cluster.log_follower import LogFollower
from cluster.rank import RankCrash, RankJob, run_rank
from cluster.worker_group import RankDeath, verdict


@pytest.mark.parametrize(
    ("hosts", "ranks", "expected"),
    [
        ([Host(2, 0)], 1, Share(2, 0)),
        ([Host(2, 0)], 2, Share(1, 0)),
        ([Host(8, 0)], 3, Share(2, 0)),
        ([Host(3, 0), Host(3, 0)], 3, Share(1, 0)),
        ([Host(4, 0), Host(8, 0)], 3, Share(4, 0)),
        ([Host(8, 4)], 4, Share(2, 1)),
        ([Host(8, 4)], 8, Share(1, 0)),
    ],
)
def test_all_ranks_fit_at_once(hosts: list[Host], ranks: int, expected: Share) -> None:
    part = share(hosts, ranks, ClusterConfig(), stage="align")
    assert part == expected
    assert sum(int(host.cpus) // part.cpus for host in hosts) >= ranks


def test_no_gpu_is_reserved_where_it_would_lie_idle() -> None:
    hosts = [Host(16, 8)]
    assert share(hosts, 8, ClusterConfig(), stage="align", uses_gpu=False) == Share(2, 0)
    fixed = ClusterConfig(gpus_per_rank=1)
    assert share(hosts, 8, fixed, stage="align", uses_gpu=False) == Share(2, 0)


@pytest.mark.parametrize(
    ("stage", "settings", "ranks", "gpus", "backend"),
    [
        (pretrain.STAGE, {}, 8, 1, "nccl"),
        (graph.STAGE, {}, 8, 1, "gloo"),  # each searches on its own
        (graph.STAGE, {}, 9, 0, "gloo"),
        (align.STAGE, {"mode": "sampled"}, 8, 0, "gloo"),
        (align.ABLATION, {"mode": "sampled"}, 8, 0, "gloo"),
        (align.STAGE, {}, 1, 1, None),
        (export.STAGE, {}, 1, 0, None),
    ],
)
def test_what_a_stage_computes_on_and_talks_through(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: Stage,
    settings: dict[str, Any],
    ranks: int,
    gpus: int,
    backend: str | None,
) -> None:
    import ray.train.torch

    parts, trainers = list[Share](), list[dict[str, Any]]()
    config = stage.load_config(settings)

    def start(job: RankJob, num_ranks: int, part: Share, variables: dict[str, str]) -> Any:
        parts.append(part)
        return {} if num_ranks == 1 else run_train(job, num_ranks, part, variables)

    run_train = worker_group._run_train
    monkeypatch.setattr(worker_group.engine, "hosts", lambda: [Host(16, 8)])
    monkeypatch.setattr(worker_group, "_run_task", start)
    monkeypatch.setattr(worker_group, "_run_train", start)
    monkeypatch.setattr(worker_group, "_fit", lambda _: {})
    monkeypatch.setattr(
        ray.train.torch, "TorchTrainer", lambda *_, **options: trainers.append(options)
    )
    worker_group.run_stage(
        stage,
        config,
        job(tmp_path).context,
        num_ranks=ranks,
        cluster=ClusterConfig(),
        run="r",
        show=print,
    )
    assert [part.gpus for part in parts] == [gpus]
    assert [trainer["torch_config"].backend for trainer in trainers] == [backend][: len(trainers)]
    for trainer in trainers:
        assert trainer["torch_config"].timeout_s == config.timeout_seconds
        assert trainer["scaling_config"].use_gpu == bool(gpus)


@pytest.mark.parametrize(
    ("ranks", "config"),
    [
        (3, ClusterConfig()),
        (2, ClusterConfig(cpus_per_rank=2)),
        (1, ClusterConfig(gpus_per_rank=1)),
    ],
)
def test_ranks_that_would_wait_for_ever_are_refused(ranks: int, config: ClusterConfig) -> None:
    with pytest.raises(UserError, match=rf"align.num_ranks={ranks} .* would wait for ever"):
        share([Host(2, 0)], ranks, config, stage="align")


def test_a_full_disk_is_no_crash_of_a_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Stage, "load_run", lambda _: full)
    monkeypatch.setattr(rank, "_output_in", lambda _: contextlib.nullcontext())
    context = Context({}, tmp_path / "features", "f", tmp_path / "logs")
    stage = Stage("features", "features", config="", run="")
    with pytest.raises(
        StageFailure, match=r"features cannot be written .*so the stage stopped"
    ) as e:
        run_rank(RankJob(stage, None, context, tmp_path / "absent"))
    assert not isinstance(e.value, RankCrash)


def test_ranks_use_their_cores_unless_told_otherwise() -> None:
    assert rank_variables(Share(3, 0), {}, run="demo") == {
        "OMP_NUM_THREADS": "3",
        "OMP_WAIT_POLICY": "PASSIVE",
        "ALIGNREC_RUN": "demo",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    told = rank_variables(Share(3, 1), {"OMP_NUM_THREADS": "1"}, run="demo")
    assert told == {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "ALIGNREC_RUN": "demo",
    }


def job(tmp_path: Path) -> RankJob:
    stage = Stage("align", "embeddings", "none:Config", "none:run")
    return RankJob(stage, None, Context({}, tmp_path / "align", "", tmp_path), tmp_path)


def test_the_verdict_names_the_cause(tmp_path: Path) -> None:
    from ray.exceptions import OutOfMemoryError, WorkerCrashedError

    mistake, failure = UserError("mistake"), StageFailure("peer died")
    echo, death = RankCrash("connection reset"), WorkerCrashedError()

    def of(*errors: Exception) -> Exception:
        return verdict(job(tmp_path), dict(enumerate(errors)))

    assert of(death, echo, mistake) is mistake
    assert isinstance(of(failure, death), RankDeath)
    assert "rank 1 of align died" in str(of(failure, death))
    assert of(echo, failure) is failure
    assert of(echo) is echo
    assert "ran out of memory" in str(of(OutOfMemoryError("x")))
    unexpected = of(ValueError("from Ray itself"))
    assert isinstance(unexpected, RankCrash)
    assert "from Ray itself" in str(unexpected)


def test_the_follower_shows_whole_lines_written_after_its_start(tmp_path: Path) -> None:
    log, lines = tmp_path / "rank_0.log", list[str]()
    log.write_text("[align] before\n")
    with LogFollower(log, prefix="[align]", show=lines.append), log.open("a") as file:
        file.write("[align] 1/2\nnoise of a library\n[ali")
        file.flush()
        file.write("gn] 2/2\n[align] torn")
    assert lines == ["[align] 1/2", "[align] 2/2"]


def test_the_follower_waits_for_the_file(tmp_path: Path) -> None:
    log, lines = tmp_path / "rank_0.log", list[str]()
    with LogFollower(log, prefix="[align]", show=lines.append):
        log.write_text("[align] first\n")
    assert lines == ["[align] first"]


def test_the_manifest_has_a_worker_for_every_rank() -> None:
    text = kubernetes.render(
        {"pretrain": {"num_ranks": 3}, "align": None, "graph": {}},
        name="my-run",
        recipe="production",
        variables={"ALIGNREC_LOG": "s3://bucket/log"},
        image="registry/alignrec:1",
        run_dir="/data/runs/production",
        hosts=None,
        cpus_per_host=4,
        gpus_per_host=1,
        memory="16Gi",
        volume_claim="data",
    )
    manifest: dict[str, Any] = yaml.safe_load(text)
    assert "&" not in text
    assert manifest["metadata"]["name"] == "my-run"
    spec = manifest["spec"]
    assert spec["entrypoint"] == "python -m launch run production --run-dir /data/runs/production"
    workers = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    assert workers["replicas"] == 3
    container = workers["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert {"name": "RAY_AUTH_MODE", "value": "token"} in container["env"]


@pytest.mark.parametrize("published", [True, False])
def test_a_rank_that_dies_after_its_result_is_complete_is_not_started_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, published: bool
) -> None:
    from ray.exceptions import WorkerCrashedError

    what = dataclasses.replace(
        job(tmp_path), context=Context({}, tmp_path / "align", "f", tmp_path)
    )
    context, starts, shown = what.context, list[int](), list[str]()

    def publish(text: str) -> None:
        draft = artifacts.open_draft(context.output, fingerprint="f")
        (draft.path / "data").write_text(text)
        # Killed before the draft is renamed.
        artifacts.complete(draft, kind="embeddings", fingerprint="f", config={}, inputs={})

    def start(*_: object) -> dict[int, Exception]:
        starts.append(1)
        if published:
            publish("result")
        return {0: WorkerCrashedError()}

    publish("asked for again")  # an equal fingerprint alone does not say that it is done
    artifacts.recover(context.output)
    for name in ("hosts", "share", "rank_variables"):
        monkeypatch.setattr(worker_group.engine, name, lambda *_, **__: None)
    monkeypatch.setattr(worker_group, "_free_leftovers", lambda: None)
    monkeypatch.setattr(worker_group, "_run_task", start)

    def run() -> None:
        cluster = ClusterConfig(max_restarts=1)
        worker_group.run_stage(
            what.stage, None, context, num_ranks=1, cluster=cluster, run="r", show=shown.append
        )

    if published:
        run()
        assert (context.output / "data").read_text() == "result"
        assert "Its result was complete" in shown[0]
    else:
        with pytest.raises(RankDeath):
            run()
    assert len(starts) == (1 if published else 2)
