"""The guard of conftest.py: without it the other tests could not promise that nothing calls home."""

import socket
import subprocess
import sys
from pathlib import Path

import pytest

OUTSIDE = ("192.0.2.1", 9)  # a block reserved for documentation: nobody answers there


@pytest.fixture
def refused(guard: Path):
    """What the guard wrote during the test; forgotten afterwards, since here it was meant."""
    before = guard.read_text()
    yield lambda: guard.read_text()[len(before) :]
    guard.write_text(before)


@pytest.fixture(autouse=True)
def no_connection_leaves_the_machine(refused):
    """Instead of conftest's check, which these tests would fail on purpose."""


@pytest.mark.parametrize("call", ["connect", "connect_ex"])
def test_refuses_to_connect(call, refused):
    with socket.socket() as outgoing, pytest.raises(ConnectionRefusedError, match="leave the machine"):
        getattr(outgoing, call)(OUTSIDE)
    assert "192.0.2.1" in refused()


def test_refuses_datagrams_and_names(refused):
    with socket.socket(type=socket.SOCK_DGRAM) as outgoing, pytest.raises(ConnectionRefusedError):
        outgoing.sendto(b"hello", OUTSIDE)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("example.org", 80), timeout=1)
    assert "example.org" in refused()


def test_other_processes_are_guarded_and_swallowed_errors_are_found(refused):
    code = f"import socket\ntry: socket.create_connection({OUTSIDE!r}, 1)\nexcept OSError: pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert "192.0.2.1" in refused()


def test_loopback_works(refused):
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        server.accept()[0].close()
    assert not refused()
