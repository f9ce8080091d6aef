"""Process hygiene for a helper process such as libp2p's daemon: it lives as long as this process, and no longer.

Two things go wrong without it. A process that is killed outright (SIGKILL, out of memory) cannot stop its helper, which
then keeps the identity, the port and its memory: so a watchdog waits at a pipe that closes when this process ends, in
whatever way. And Ctrl-C in a terminal reaches every process in the foreground: the helper would be gone before the
worker has drained, so `OWN_SESSION` starts it out of the terminal's reach.

A process forked from this one without exec holds the pipe open too, so the watchdog then waits for both to end.
"""

import subprocess
import sys
from pathlib import Path

# Put before a command: the same process, in a session of its own. (`setsid` the program is missing on macOS.)
OWN_SESSION = (sys.executable, "-I", "-S", "-c", "import os, sys; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])")

# `read` fails when the pipe closes without a line, that is when the process that holds it is gone.
_SCRIPT = 'read -r _ || { kill -9 "$1"; rm -rf -- "$2"; }'


class Watchdog:
    """Kills process `pid` and removes `folder` as soon as this process ends without having called `disarm`.

    It is a shell of about 1 MB in a session of its own.
    """

    def __init__(self, pid: int, folder: Path) -> None:
        self._shell = subprocess.Popen(
            ["/bin/sh", "-c", _SCRIPT, "manyhands-watchdog", str(pid), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )

    def disarm(self) -> None:
        """End the watch, because the process is gone and its number may soon be another's. May be called twice."""
        if self._shell.returncode is None:
            self._shell.communicate(b"\n")
