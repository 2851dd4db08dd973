"""The server of schedules, killed at any effect: what it submits and records stays the same."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from schedule_world import Killed, World

from launch.jobs import NoAnswerError
from launch.schedule.serving import Server
from launch.schedule.store import Entry


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., World]:
    return lambda **options: World(tmp_path / "schedules", **options)


def story(world: World) -> None:
    """Two days' worth of everything: success, overlap, failure, retry, silence, a request."""
    world.at(1)
    world.at(2)
    world.cluster.end()
    world.at(2, 10)
    world.folder.ask(world.schedule, world.now)
    world.at(2, 11)
    world.cluster.end("failed", 1)
    world.at(2, 12)
    world.at(2, 14)
    world.cluster.end()
    world.at(2, 15)
    world.cluster.trouble = NoAnswerError("nobody answers")
    world.at(3)
    world.cluster.trouble = None
    world.at(3, 1)
    world.cluster.end()
    world.at(6, 10)
    world.cluster.end()
    world.at(6, 20)
    world.at(7)
    world.cluster.end("failed", 1)
    world.at(7, 1)
    world.cluster.trouble = NoAnswerError("nobody answers")
    world.at(7, 2)
    world.cluster.trouble = None
    world.at(7, 3)
    world.cluster.end()
    world.at(7, 4)


EFFECTS = ("write_state", "record", "forget_asked")


def test_a_kill_at_any_effect_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of them; no power is cut

    def lived(kill_at: int | None) -> tuple[World, int]:
        """Live through the story; the server dies before or after one effect and starts again."""
        world = World(tmp_path / str(kill_at), on_overlap="queue", retries=2)
        world.cluster.strict = True
        count = 0

        def mortal(effect: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                nonlocal count
                moments = []
                for _ in ("before", "after"):
                    moments.append(count)
                    count += 1
                if moments[0] == kill_at:
                    raise Killed
                result = effect(*arguments)
                if moments[1] == kill_at:
                    raise Killed
                return result

            return run

        for name in EFFECTS:
            setattr(world.folder, name, mortal(getattr(world.folder, name)))
        world.cluster.submit = mortal(world.cluster.submit)  # type: ignore[method-assign]
        look = Server.look

        def surviving_look() -> None:
            try:
                look(world.server)
            except Killed:
                world.restart()
                world.server.look = surviving_look  # type: ignore[method-assign]
                look(world.server)

        world.server.look = surviving_look  # type: ignore[method-assign]
        story(world)
        return world, count

    undisturbed, effects = lived(None)
    assert effects > 40
    expected = undisturbed.folder.history("hourly")
    assert {entry.outcome for entry in expected} >= {"succeeded", "failed", "skipped"}
    assert {entry.attempt for entry in expected} == {1, 2}
    for kill_at in range(effects):
        world, _ = lived(kill_at)
        assert set(world.cluster.submissions.values()) == {1}, kill_at
        assert world.cluster.submissions == undisturbed.cluster.submissions, kill_at
        assert _essence(world.folder.history("hourly")) == _essence(expected), kill_at
        assert world.state.active == undisturbed.state.active
        assert world.state.queued == undisturbed.state.queued


def _essence(entries: list[Entry]) -> list[tuple[str, str, int]]:
    return [(entry.job, entry.outcome, entry.attempt) for entry in entries]
