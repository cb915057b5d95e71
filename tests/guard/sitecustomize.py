"""No connection leaves the machine: loaded by every Python process of the tests (see conftest.py).

Loopback and Unix sockets pass; anything else raises, and is written to $PREFLOOP_GUARD so that a caller which
swallows the error is found all the same.
"""

import ipaddress
import os
import socket
from typing import Any


def _local(host: Any) -> bool:
    if isinstance(host, bytes):
        host = host.decode()
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        address = ipaddress.ip_address(str(host).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def _refuse(what: str, target: Any) -> None:
    if log := os.environ.get("PREFLOOP_GUARD"):
        with open(log, "a") as file:
            file.write(f"{what} {target!r}\n")
    raise ConnectionRefusedError(f"{what} {target!r}: the tests let no connection leave the machine")


def _guarded(what: str) -> Any:
    plain = getattr(socket.socket, what)

    def guarded(self: socket.socket, *arguments: Any) -> Any:
        target = arguments[-1]
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _local(target[0]):
            _refuse(what, target)
        return plain(self, *arguments)

    return guarded


def _resolve(host: Any, *arguments: Any, **named: Any) -> Any:
    if not _local(host):
        _refuse("getaddrinfo", host)
    return _getaddrinfo(host, *arguments, **named)


_getaddrinfo = socket.getaddrinfo
for _what in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, _what, _guarded(_what))
socket.getaddrinfo = _resolve
