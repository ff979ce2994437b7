# SPDX-License-Identifier: GPL-2.0
"""
Lanes: which tests run where (lanes.toml), running them, and what came of it. What passed
is kept in the cache by content: kernel, programs, emulator, parameters; failures never are.
"""
import asyncio
import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field

import machines
from steps import BUILD, TOP, TREE, WORK, Failure, running, say, short

SPLAT = re.compile(r"BUG:|WARNING:|Oops|KASAN:|INFO: |UBSAN:|DEBUG_LOCKS|rcu:.*stall|Kernel panic|Bad page|"
                   r"general protection|mce: \[Hardware Error\]|pagealloc: memory corruption")
RESULT = re.compile(r"(not )?ok \d+ (\S+)(?: # ?(.*))?$")


@dataclass
class Test:
    command: str
    lanes: list
    seconds: int
    also: list = field(default_factory=list)
    skips: str = None
    splats: str = None

    @property
    def program(self):
        return self.command.split()[0]

    @property
    def name(self):
        return os.path.basename(self.program)


@dataclass
class Lane:
    name: str
    kernel: str
    machine: str
    text: str
    parameters: list = field(default_factory=list)
    cpus: int = None
    kunit: bool = False
    control: bool = False
    icount: bool = False
    launches: str = None        # a Linux in a TD, see td/: by the "stub", or by "ovmf"
    column: str = None
    row: str = None
    tests: list = field(default_factory=list)

    def __post_init__(self):
        self.parameters = [f"kunit.enable={int(self.kunit)}", *self.parameters]

    @property
    def folder(self):
        return os.path.join(BUILD, self.machine, self.name)


def load(every=None):
    """The lanes, with the tests in them; every: with those that take ALL=1, too."""
    with open(os.path.join(TOP, "lanes.toml"), "rb") as f:
        data = tomllib.load(f)
    lanes = {name: Lane(name, **lane) for name, lane in data["lane"].items()}
    if every is None:
        every = os.environ.get("ALL", "0") not in ("", "0")
    for entry in data["test"]:
        test = Test(**entry)
        for name in test.lanes + test.also:
            if name not in lanes:
                raise Failure(f"lanes.toml: {test.command} names the lane {name}, which there is not")
            if name in test.lanes or every:
                # Results go by the name.
                if test.name in (other.name for other in lanes[name].tests):
                    raise Failure(f"lanes.toml: {test.name} is in the lane {name} twice")
                lanes[name].tests.append(test)
    return lanes


def programs(lanes, kernel):
    """What kernel/build has to build with that kernel, with ALL=1 or without."""
    with open(os.path.join(TOP, "lanes.toml"), "rb") as f:
        data = tomllib.load(f)
    return sorted({t["command"].split()[0] for t in data["test"] if not t["command"].startswith("./")
                   for lane in t["lanes"] + t.get("also", []) if lanes[lane].kernel == kernel})


def objects(kernel):
    return os.path.join(WORK, "base" if kernel in ("base", "guest") else "linux", "obj-" + kernel)


@dataclass
class Result:
    name: str
    state: str                  # ok, FAIL, "not run"
    text: str = ""
    cases: list = field(default_factory=list)    # name, state, reason

    @property
    def skipped(self):
        return sum(state == "skip" for _, state, _ in self.cases)


class Run:
    """One boot of a lane."""

    def __init__(self, lane, tests=None, folder=None):
        self.lane = lane
        self.tests = lane.tests if tests is None else tests
        self.folder = folder or lane.folder
        self.results = []
        self.splats = []
        self.died = None
        self.cached = False

    # -- running

    def prepare(self):
        remove(self.folder)
        os.makedirs(self.folder)
        obj = objects(self.lane.kernel)
        self.kernel = os.path.join(obj, "arch/x86/boot/bzImage")
        if not os.path.exists(self.kernel):
            raise Failure(f"{self.kernel} is not there: make check builds it")
        self.initramfs = os.path.join(self.folder, "initramfs")
        listing = os.path.join(self.folder, "tests")
        with open(listing, "w") as f:
            f.writelines(f"{t.name} {5 * t.seconds} {t.command}\n" for t in self.tests)
        # The headers of the series, for all kernels: who uses what is new asks for it first.
        roots = [os.path.join(obj, "root")]
        try:
            if self.lane.launches:
                roots.append(os.path.join(self.folder, "root"))
                ovmf = (os.environ.get("OVMF") or "1") if self.lane.launches == "ovmf" else "0"
                subprocess.run([os.path.join(TOP, "td/pack"), roots[1]], check=True, stdout=subprocess.DEVNULL,
                               env=dict(os.environ, OVMF=ovmf))
            subprocess.run([os.path.join(TOP, "guest/initramfs"), self.initramfs, listing,
                            os.path.join(objects("patched"), "usr/include"), *roots], check=True)
        except subprocess.CalledProcessError as e:
            raise Failure(f"{short(e.cmd[0])} failed, see above") from e
        if self.lane.launches:
            shutil.rmtree(roots[1])

    def key(self):
        """What the result depends on."""
        digest = hashlib.sha256()
        here = os.path.dirname(__file__)
        for path in (self.kernel, self.initramfs, os.path.join(here, "machines.py"), os.path.join(here, "lanes.py")):
            with open(path, "rb") as f:
                digest.update(hashlib.file_digest(f, "sha256").digest())
        digest.update(repr((self.lane, machines.identity(self.lane.machine), os.environ.get("QEMU_ARGS"),
                            os.environ.get("BXSHARE"))).encode())
        return digest.hexdigest()[:20]

    async def run(self, quiet=False, keep=True):
        self.prepare()
        kept = os.path.join(WORK, "passed", f"{self.lane.name}-{self.key()}")
        start = running[self.lane.text] = time.monotonic()
        try:
            if os.path.isdir(kept) and os.environ.get("FORCE", "0") in ("", "0"):
                os.utime(kept)
                shutil.copytree(kept, self.folder, dirs_exist_ok=True)
                self.cached = True
            else:
                def line(text):
                    match = RESULT.match(text)
                    if match and not quiet:
                        say(f"  {self.lane.name}: {text}")
                self.died = await machines.boot(self.lane, self.folder, self.kernel, self.initramfs, self.tests, line)
            self.read()
        finally:
            del running[self.lane.text]
            if os.path.exists(self.initramfs):
                os.remove(self.initramfs)
        if not quiet:
            how = "as before" if self.cached else f"{time.monotonic() - start:5.0f} s"
            say(f"{self.lane.text:60} {how}" + ("" if self.passed else "   FAILED"))
        if keep and self.passed and not self.cached:
            # Half of it must not look like all of it.
            for path in (kept, kept + ".part"):
                shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(self.folder, kept + ".part")
            os.rename(kept + ".part", kept)
            others = sorted(glob.glob(os.path.join(glob.escape(WORK), "passed", self.lane.name + "-" + 20 * "?")),
                            key=os.path.getmtime)
            for old in others[:-4]:
                shutil.rmtree(old)
        return self.passed

    # -- reading

    def read(self):
        with open(os.path.join(self.folder, "console"), errors="replace") as f:
            console = f.read().replace("\r", "").split("\n")
        with open(os.path.join(self.folder, "report"), errors="replace") as f:
            report = f.read().replace("\r", "").split("\n")
        if self.lane.kunit:
            self.read_kunit(console)
        else:
            self.read_report(report)
        self.read_splats(console)

    def read_report(self, report):
        ended = {}
        for line in report:
            match = RESULT.match(line)
            if match:
                ended[match[2]] = (bool(match[1]), match[3] or "")
        begun = {line.split()[2] for line in report if line.startswith("# begin ")}
        cases = {test.name: test for test in parse(report)}
        for test in self.tests:
            if test.name not in ended:
                state = "FAIL" if test.name in begun else "not run"
                self.results.append(Result(test.name, state, "the machine died" if state == "FAIL" else ""))
                continue
            failed, text = ended[test.name]
            result = Result(test.name, "FAIL" if failed else "ok", text)
            self.results.append(result)
            parsed = cases.get(test.name)
            for case in parsed.subtests if parsed else []:
                result.cases.append((case.name, status(case), skip_reason(report, test.name, case.name)))
            if text.startswith("SKIP"):
                result.cases.append((test.name, "skip", "all of it"))
            for name, state, why in result.cases:
                if state == "skip" and not (test.skips and re.search(test.skips, why)):
                    result.state = "FAIL"
                    result.text = f"skipped {name}: {why}" if name != test.name else "skipped, see the report"
                elif state == "FAIL" and result.state == "ok":
                    result.state, result.text = "FAIL", f"{name} failed, though the program ended well"
            if parsed and parsed.counts.errors and result.state == "ok":
                result.state, result.text = "FAIL", "its report is not whole"

    def read_kunit(self, console):
        whole = parse(console)
        for suite in whole:
            for test in suite.subtests:
                cases = test.subtests or [test]
                result = Result(f"{suite.name}.{test.name}", "ok", f"{len(cases)} cases")
                result.cases = [(case.name, status(case), "") for case in cases]
                bad = [name for name, state, _ in result.cases if state != "ok"]
                if bad or status(test) != "ok":
                    result.state, result.text = "FAIL", bad[0] if bad else "failed, but no case of it"
                self.results.append(result)
            # Its init or exit may fail.
            if not suite.subtests or (status(suite) != "ok" and all(status(t) == "ok" for t in suite.subtests)):
                self.results.append(Result(suite.name, "FAIL", "the suite failed, but no test in it"))
        plan = next((int(m[1]) for m in (re.search(r"(?:^|\] )1\.\.(\d+)$", line) for line in console) if m), 0)
        if not self.results or len(whole) != plan:
            self.results.append(Result("KUnit", "FAIL", f"{len(whole)} suites of {plan} ran"))

    def read_splats(self, console):
        splats = {test.name: test.splats for test in self.tests}
        test = "boot"
        around = []
        for i, line in enumerate(console):
            match = re.search(r"lane: (begin|end) (\S+)", line)
            if match:
                test = match[2]
            announced = splats.get(test)
            if SPLAT.search(line) and not (announced and re.search(announced, line)):
                self.splats.append(f"{test}: {line.strip()}")
                around += console[i:i + 60] if len(self.splats) <= 2 else []
        path = os.path.join(self.folder, "splats")
        with open(path, "w") as f:
            f.writelines(line + "\n" for line in self.splats)
        # Only this kernel knows of lines, and to find them takes ten seconds for each splat.
        if self.splats and self.lane.kernel == "debug":
            self.decode(around)

    def decode(self, lines):
        """Functions and offsets become files and lines."""
        obj = objects(self.lane.kernel)
        tool = os.path.join(TREE, "scripts/decode_stacktrace.sh")
        if os.path.exists(tool) and os.path.exists(os.path.join(obj, "vmlinux")):
            with open(os.path.join(self.folder, "splats.decoded"), "w") as out:
                subprocess.run([tool, os.path.join(obj, "vmlinux"), "auto", os.path.join(obj, "root")], check=False,
                               input="\n".join(lines), stdout=out, stderr=subprocess.DEVNULL, text=True)

    @property
    def passed(self):
        """A control only has to get to its end: whether it fails as it should, the verdict says."""
        if not self.results:
            return False
        if self.lane.control:
            return not self.died and all(r.state != "not run" for r in self.results)
        return not self.died and not self.splats and all(r.state == "ok" for r in self.results)

    def failures(self):
        """Each in a line."""
        where = self.lane.name
        for result in self.results:
            if result.state != "ok" and not self.lane.control:
                yield f"{where}: {result.name}: {result.text or result.state}"
        if self.died:
            yield f"{where}: {self.died}"
        if self.splats and not self.lane.control:
            yield f"{where}: {self.splats[0]} ({len(self.splats)} lines in {short(self.folder)}/splats)"


def parse(lines):
    """The tests in a report or on a console, by the parser of kunit.py."""
    folder = os.path.join(TREE, "tools/testing/kunit")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import kunit_parser     # pylint: disable=import-error
    from kunit_printer import Printer   # pylint: disable=import-error
    return kunit_parser.parse_run_tests(iter(lines), Printer(print=False)).subtests


def status(case):
    return {"SUCCESS": "ok", "SKIPPED": "skip"}.get(case.status.name, "FAIL")


def skip_reason(report, test, name):
    """Two tests may have cases of the same name."""
    current = None
    for line in report:
        if line.startswith("# begin "):
            current = line.split()[2]
        match = re.match(r"\s*ok \d+ (?:- )?" + re.escape(name) + r" # SKIP ?(.*)", line)
        if match and current == test:
            return match[1]
    return ""


def remove(folder):
    """What a run left there, other than evidence of what is rare."""
    if os.path.exists(os.path.join(folder, "vmcore")):
        kept = os.path.join(BUILD, "died", time.strftime("%m%d-%H%M%S-") + os.path.basename(folder))
        os.makedirs(os.path.dirname(kept), exist_ok=True)
        os.rename(folder, kept)
    shutil.rmtree(folder, ignore_errors=True)


# -- all lanes together

def write_reports(runs):
    """build/report.ktap, and .json of it by kunit.py: every case of every lane."""
    path = os.path.join(BUILD, "report")
    with open(path + ".ktap", "w") as f:
        f.write(f"KTAP version 1\n1..{len(runs)}\n")
        for i, run in enumerate(runs, 1):
            f.write(f"  KTAP version 1\n  # Subtest: {run.lane.name}\n  1..{len(run.results)}\n")
            for j, result in enumerate(run.results, 1):
                if result.cases:
                    f.write(f"    KTAP version 1\n    # Subtest: {result.name}\n    1..{len(result.cases)}\n")
                    for k, (name, state, why) in enumerate(result.cases, 1):
                        skip = f" # SKIP {why}" if state == "skip" else ""
                        f.write(f"    {'not ' if state == 'FAIL' else ''}ok {k} {name}{skip}\n")
                f.write(f"  {'' if result.state == 'ok' else 'not '}ok {j} {result.name} # {result.text}\n")
            f.write(f"{'' if run.passed else 'not '}ok {i} {run.lane.name}\n")
    subprocess.run([sys.executable, "-B", os.path.join(TREE, "tools/testing/kunit/kunit.py"), "parse",
                    f"--json={path}.json", path + ".ktap"], check=False, stdout=subprocess.DEVNULL)


def table(runs):
    """A row for each test, a column for each kernel."""
    columns = ["v7.3.4", "patched", "debug", "Bochs"]
    rows = {}
    for run in runs:
        for result in run.results if not run.lane.icount else ():
            name = result.name + (f" ({run.lane.row})" if run.lane.row else "")
            text = re.sub(r"^(\S+ s)$", r"\1", result.text) if result.state == "ok" else ""
            if result.skipped and result.state == "ok":
                text += f", {result.skipped} skipped"
            rows.setdefault(name, {})[run.lane.column] = f"{result.state} {text}".strip()
    width = max(map(len, rows), default=0)
    yield f"{'test':{width}}  " + "".join(f"{c:24}" for c in columns).rstrip()
    for name, cells in rows.items():
        yield (f"{name:{width}}  " + "".join(f"{cells.get(c, ''):24}" for c in columns)).rstrip()


async def interactive(lane):
    """A shell in the guest, on this terminal."""
    run = Run(lane, [], os.path.join(BUILD, lane.machine, "shell"))
    run.tests = lane.tests
    run.prepare()
    machine = machines.MACHINES[lane.machine](lane, run.folder, run.kernel, run.initramfs, interactive=True)
    say('"exit" leaves it; Ctrl-a x ends QEMU at once')
    # On this terminal, so not in a group of its own.
    with subprocess.Popen(["setpriv", "--pdeathsig", "KILL", "--", *machine.argv]) as process:
        try:
            await asyncio.to_thread(process.wait)
        finally:
            process.kill()
            machine.close()
