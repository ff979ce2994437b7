# SPDX-License-Identifier: GPL-2.0
"""
Commands that end when we end. Each has a process group of its own, its output in a log,
and is told about in a line: what it was, the seconds it took, and those of CPU time.
"""
import asyncio
import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
import time

TOP = os.environ["TOP"]
BUILD = os.environ["BUILD"]
TREE = os.environ["TREE"]
LOGS = os.environ["LOGS"]
CACHE = os.environ["CACHE"]
WORK = os.environ["WORK"]

TICK = 60          # say what is still running that often
PATIENCE = 5       # between SIGTERM and SIGKILL

running = {}       # text of a step: when it began
locks = []         # descriptors that whoever uses the cache keeps open


class Failure(Exception):
    """Something is wrong, in words for people."""


def say(text=""):
    print(text, flush=True)


def short(path):
    return os.path.relpath(path, TOP) if path.startswith(TOP + "/") else path


class Process:
    """
    A command in a group of its own, that dies when we do, however that happens. Its children
    may go on if we are killed, and keep the lock of the cache until they end.
    """

    def __init__(self, argv, output, env=None, cwd=None):
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *argv], stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, start_new_session=True, pass_fds=locks,
            env={**os.environ, **(env or {})}, cwd=cwd)
        self.cpu = 0
        self.status = None
        self.waiter = asyncio.ensure_future(asyncio.to_thread(os.wait4, self.process.pid, 0))

    async def wait(self):
        _, status, usage = await asyncio.shield(self.waiter)
        self.cpu = usage.ru_utime + usage.ru_stime
        self.status = self.process.returncode = os.waitstatus_to_exitcode(status)
        return self.status

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    async def end(self):
        """Nothing of it is left when this returns, whatever it thinks of SIGTERM."""
        self.signal(signal.SIGTERM)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(asyncio.shield(self.waiter), PATIENCE)
        self.signal(signal.SIGKILL)
        await self.wait()


def reason(log):
    """The line of a log that says why."""
    with open(log, errors="replace") as f:
        lines = f.read().splitlines() or ["it said nothing"]
    for line in lines:
        if re.search(r"error: |Error |\*\*\* \S|No space left", line):
            return line.split("error: ", 1)[-1].strip()
    return lines[-1].strip()


async def step(name, text, argv, env=None):
    """Run a command; say how it went. Its failure is an exception with the reason."""
    os.makedirs(LOGS, exist_ok=True)
    log = os.path.join(LOGS, name + ".log")
    start = running[text] = time.monotonic()
    with open(log, "w") as output:
        process = Process(argv, output, env)
        try:
            status = await process.wait()
        finally:
            await process.end()
            del running[text]
    took = f"{text:60} {time.monotonic() - start:5.0f} s {process.cpu:6.0f} s of CPU"
    if status:
        say(took + "   FAILED")
        raise Failure(f"{reason(log)} (log: {short(log)})")
    say(took)


async def ticker():
    """Long work shows that it is alive."""
    while True:
        await asyncio.sleep(TICK)
        for text, start in running.items():
            say(f"  ... {text} ({time.monotonic() - start:.0f} s)")


@contextlib.contextmanager
def lock_cache():
    """One user of the cache at a time."""
    os.makedirs(CACHE, exist_ok=True)
    with open(os.path.join(CACHE, "lock"), "a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            say(f"waiting for another run to finish with {CACHE}: {f.read().strip() or 'unknown'}")
            fcntl.flock(f, fcntl.LOCK_EX)
        f.truncate(0)
        print(f"process {os.getpid()}, since {time.strftime('%H:%M:%S')}", file=f, flush=True)
        locks.append(f.fileno())
        yield
        locks.clear()
        f.truncate(0)


def main(coroutine):
    """Run to the end, or until a signal, and leave nothing behind."""
    async def supervised():
        task = asyncio.ensure_future(coroutine)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, task.cancel)
        side = asyncio.ensure_future(ticker())
        try:
            return await task
        finally:
            side.cancel()

    try:
        with lock_cache():
            return asyncio.run(supervised())
    except (asyncio.CancelledError, KeyboardInterrupt):
        coroutine.close()
        say("interrupted")
        return 130
    except Failure as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
