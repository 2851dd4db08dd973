"""The token file: private, kept, and only where Ray wants one."""

import os
import stat
import sys
import types
from pathlib import Path
from unittest import mock

import pytest

from alignrec.errors import UserError
from alignrec.ray_token import ensure_token
from cluster import environment
from data_prep import engine
from data_prep.config import DataPrepConfig


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / ".ray" / "auth_token"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    return path


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_it_is_private_and_kept(path: Path) -> None:
    ensure_token()
    token = path.read_text()
    assert len(token) == 64
    assert mode(path) == 0o600
    assert mode(path.parent) == 0o700
    path.chmod(0o644)  # as Ray makes it
    ensure_token()
    assert path.read_text() == token
    assert mode(path) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_a_chosen_one_is_made_but_never_changed(
    tmp_path: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = tmp_path / "chosen"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(chosen))
    ensure_token()
    assert mode(chosen) == 0o600
    assert not path.exists()
    chosen.chmod(0o640)  # shared with a group on purpose
    ensure_token()
    assert mode(chosen) == 0o640


def test_rights_that_cannot_be_changed_are_left(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ensure_token()
    path.chmod(0o644)
    changed = mock.Mock(side_effect=PermissionError("read-only file system"))
    monkeypatch.setattr(Path, "chmod", changed)
    ensure_token()
    assert changed.call_count == 1


def test_one_that_cannot_be_made_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "file" / "token"))
    with pytest.raises(UserError, match=r"cannot be made or read .*RAY_AUTH_TOKEN"):
        ensure_token()


@pytest.mark.parametrize(
    ("variable", "value"), [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "abc")]
)
def test_none_is_made_where_none_is_needed(
    variable: str, value: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    ensure_token()
    assert not path.exists()


def test_the_commands_make_it(path: Path) -> None:
    with mock.patch.dict(os.environ):
        environment.prepare(loopback=True)
    assert mode(path) == 0o600


def test_data_preparation_by_itself_makes_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    running = types.SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setitem(sys.modules, "ray", running)
    with mock.patch.dict(os.environ), engine.session(DataPrepConfig(source="synthetic")):
        assert mode(path) == 0o600
