"""Runs the scripts of this folder with the Python of a reference environment."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TIMEOUT = 300  # seconds for one run; it takes about six


@dataclass(frozen=True)
class Megatron:
    """An environment with one release of the real megatron-core."""

    version: str
    python: Path

    def run(self, script: str, *args: object, env: dict[str, str] | None = None) -> str:
        """Run a script; its output, or an assertion with everything it said."""
        words = [str(self.python), str(HERE / script), *map(str, args)]
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=TIMEOUT, env={**os.environ, **(env or {})}, check=False
        )
        assert done.returncode == 0, f"{script} of megatron-core {self.version}\n{done.stdout}\n{done.stderr[-3000:]}"
        return done.stdout

    def resave(self, size: str, *args: object) -> None:
        """The same run as two processes with one parallel size (tp, pp or ep) of two."""
        self.run_ranks(2, "run_hybrid.py", *args, f"--{size}", 2)

    def run_ranks(self, count: int, script: str, *args: object) -> str:
        """Run a script as several processes; the output of the first, or an assertion with everything they said."""
        env = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        words = [str(self.python), str(HERE / script), *map(str, args)]
        ranks = [
            subprocess.Popen(
                words,
                env={**os.environ, **env, "RANK": str(r)},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for r in range(count)
        ]
        said = [rank.communicate(timeout=TIMEOUT)[0] for rank in ranks]
        assert not any(rank.returncode for rank in ranks), "\n".join(said)
        return said[0]


def install(version: str) -> Megatron:
    """Make the environment, or find it ready.

    Raises:
        FileNotFoundError: the package index cannot be reached.
    """
    home = Path(os.environ.get("MTP_CONVERT_REFERENCE_HOME", Path.home() / ".cache" / "mtp-convert" / "reference"))
    done = subprocess.run(
        ["bash", str(HERE / "setup_megatron.sh"), version],
        env={**os.environ, "PYTHON": sys.executable, "MTP_CONVERT_REFERENCE_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 75:
        raise FileNotFoundError(f"no package index for megatron-core {version}: {done.stderr[-500:]}")
    assert done.returncode == 0, done.stdout + done.stderr
    return Megatron(version, home / f"megatron-core-{version}" / "bin" / "python")


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
