"""A PostgreSQL server of the tests' own: in a folder of its own, on a Unix socket only."""

import itertools
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import psycopg
import pytest

PLACES = os.pathsep.join([os.environ.get("PATH", ""), *map(str, Path("/usr/lib/postgresql").glob("*/bin"))])
USER = "postgres"


class Postgres:
    """A server that can be killed as by a power cut, and started again."""

    def __init__(self, folder: Path, initdb: str):
        self.folder = folder
        self.data = folder / "data"
        self.postgres = Path(initdb).with_name("postgres")
        self._numbers = itertools.count()
        # The server refuses to be root.
        self._as = {"user": USER, "group": USER, "extra_groups": []} if os.getuid() == 0 else {}
        if self._as:
            shutil.chown(folder, USER, USER)
        made = subprocess.run(
            [initdb, "-D", self.data, "-U", USER, "--auth=trust", "--encoding=UTF8", "--no-sync"],
            cwd=folder,
            capture_output=True,
            text=True,
            **self._as,
        )
        assert made.returncode == 0, made.stderr
        self.start()

    def start(self) -> None:
        command = [self.postgres, "-D", self.data, "-k", self.folder, "-c", "listen_addresses="]
        self.log = (self.folder / "log").open("a")
        self.process = subprocess.Popen(command, cwd=self.folder, stderr=self.log, **self._as)
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg.connect(host=str(self.folder), user=USER, dbname="postgres").close()
                return
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, (self.folder / "log").read_text()
                time.sleep(0.05)

    def database(self) -> str:
        """URL of a new one: a schema in truth, which takes no time."""
        name = f"labels{next(self._numbers)}"
        with psycopg.connect(host=str(self.folder), user=USER, dbname="postgres", autocommit=True) as x:
            x.execute(f"CREATE SCHEMA {name}")
        return f"postgresql+psycopg://{USER}@/postgres?host={self.folder}&options=-csearch_path%3D{name}"

    def kill(self) -> None:
        """Every process of it at once, without a word."""
        server = psutil.Process(self.process.pid)
        server.suspend()  # so that it starts no more
        for process in [*server.children(recursive=True), server]:
            process.kill()
        self.process.wait()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(timeout=60)


@contextmanager
def server() -> Iterator[Postgres]:
    initdb = shutil.which("initdb", path=PLACES)
    if initdb is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("no PostgreSQL: `apt-get install postgresql`")
    with tempfile.TemporaryDirectory(prefix="prefloop-", ignore_cleanup_errors=True) as folder:
        postgres = Postgres(Path(folder), initdb)
        try:
            yield postgres
        finally:
            postgres.stop()
