"""Processes that benchmark.py measures in turn: a line of JSON in, a line of JSON out.

A worker calls `serve`; benchmark.py starts it as a `Worker` and asks. Between two questions a
worker sleeps. This file needs Python alone, for a worker may run in another environment.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

try:
    import resource
except ImportError:  # Windows
    resource = None

STOP_TIMEOUT_S = 10
KILLED = 9  # the signal that Linux sends when memory is full


class WorkerError(Exception):
    """What a worker could not do, in one line."""


class Worker:
    """A process that answers commands."""

    def __init__(self, name: str, command: list[str]):
        self.name = name
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C is for benchmark.py
            )
        except OSError as error:
            raise WorkerError(f"{name}: {command[0]} cannot run: {error}") from error

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def ask(self, command: str, **arguments):
        """Return the answer.

        Raises:
            WorkerError: The worker tells why there is none, or it has ended.
        """
        try:
            self.process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            code = self.process.wait()
            why = "was killed: is the memory full?" if code == -KILLED else "ended"
            raise WorkerError(f"{self.name}: its process {why} (exit code {code}).")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.name}: {answer['error']}")
        return answer["result"]


def serve(commands: dict):
    """Answer the commands that come in at stdin by calling functions, until it is closed.

    What the functions print goes to stderr.
    """
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        arguments = json.loads(line)
        try:
            answer = {"result": commands[arguments.pop("command")](**arguments)}
        except (SystemExit, OSError, ValueError, RuntimeError, MemoryError, ImportError) as error:
            answer = {"error": " ".join(str(error).split()) or type(error).__name__}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def read_peak_memory() -> int | None:
    """Return the most memory that this process has had, in bytes, pages of mapped files included.

    Not by getrusage on Linux: that counts what the parent had when it started this process.
    """
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS
