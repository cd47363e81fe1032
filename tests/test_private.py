"""What other users of this machine must not reach: Ray's session folder and token, keys in a URI."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
import ray

from bomemeta.distributed import cluster, private
from bomemeta.errors import ClusterError


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_local_clusters_sockets_lie_in_a_folder_of_this_users_alone():
    with cluster.local(cluster.RayOptions(workers=1), print):
        session = Path(ray._private.worker._global_node.get_session_dir_path()).resolve()
        sockets = list((session / "sockets").iterdir())
        assert sockets
        own = session.parent.parent
        assert mode_of(own) == 0o700
        assert own.stat().st_uid == os.getuid()
        assert max(len(os.fsencode(path)) for path in sockets) <= private.LONGEST_SOCKET
    assert not own.exists()


def test_a_long_temporary_folder_is_passed_over(tmp_path, monkeypatch):
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with private.session_folder() as folder:
        assert len(os.fsencode(folder)) <= private.LONGEST_FOLDER + 2
        assert not folder.is_relative_to(long)
        assert mode_of(folder.parent) == 0o700
    assert not folder.parent.exists()


def test_no_short_folder_is_an_error_that_says_what_to_do(monkeypatch):
    monkeypatch.setattr(private, "LONGEST_FOLDER", 5)
    with pytest.raises(ClusterError, match="Set RAY_TMPDIR"), private.session_folder():
        pass


def test_rays_logs_stay_where_the_cluster_failed():
    with pytest.raises(ClusterError), private.session_folder() as folder:
        raise ClusterError("a worker crashed")
    assert folder.is_dir()
    shutil.rmtree(folder.parent)


@pytest.fixture
def token(tmp_path, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    path = tmp_path / "token"
    path.write_text("secret")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    return path


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602])
def test_a_token_that_others_can_read_is_closed_and_that_is_said(token, mode):
    token.chmod(mode)
    reported: list[str] = []
    private.make_token(reported.append)
    assert mode_of(token) == 0o600
    assert str(token) in reported[0]
    assert f"{mode:04o}" in reported[0]
    assert "secret" not in reported[0]
    private.make_token(reported.append)
    assert len(reported) == 1


def test_a_token_that_cannot_be_closed_is_refused(token, monkeypatch):
    token.chmod(0o644)

    def refused(self: Path, mode: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "chmod", refused)
    with pytest.raises(ClusterError, match="Wanted mode 0600"):
        private.make_token(print)


def test_a_new_token_is_its_owners_alone(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    private.make_token(print)
    path = tmp_path / ".ray" / "auth_token"
    assert mode_of(path) == 0o600
    assert len(path.read_text()) == 64
