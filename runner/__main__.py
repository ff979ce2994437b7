# SPDX-License-Identifier: GPL-2.0
"""
The commands behind make: see the Makefile, or make without a target.
"""
import argparse
import asyncio
import contextlib
import dataclasses
import glob
import hashlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import cost
import lanes as lanes_
import machines
import verdict as verdict_
from lanes import Lane, Run, load, objects, programs
from steps import BUILD, CACHE, LOGS, TOP, TREE, WORK, Failure, main, say, short, step

KERNELS = {"base": "v7.3.4 with the software TDX module", "patched": "the series, KVM as modules",
           "debug": "the series with KASAN, lockdep and page poisoning, KVM built in",
           "guest": "a small Linux for TDs"}


def script(name):
    return os.path.join(TOP, name)


async def prepare():
    """The source, and build/linux. What cannot work is said before anything takes long."""
    for name in machines.MACHINES:
        machines.emulator(name.upper(), name)
    for name in machines.LIMITS:
        machines.limit(name)
    await step("fetch", "the source of the base", [script("source/fetch")])
    await step("tree", "the work tree build/linux, from patches/", [script("source/tree")])
    notice()


def notice():
    """What people must know of the tree, wherever results are."""
    for path in (os.path.join(LOGS, "tree.log"),):
        with open(path) as f:
            for line in f:
                if "leaving it as it is" in line:
                    say(f"  note: {line.strip()}")
    other = os.path.join(WORK, "linux/.git/other")
    if os.path.exists(other):
        with open(other) as f:
            say(f"  note: NOT THE PINNED SOURCE: {f.read().strip()}")


def own_emulators():
    return os.environ.get("QEMU") and os.environ.get("BOCHS")


async def emulators():
    if not own_emulators():
        await step("emulators", "QEMU and Bochs, unpacked beside", [script("emulators/get")])


async def build(lanes, *kernels):
    for kernel in kernels:
        await step(f"build-{kernel}", f"building {KERNELS[kernel]}",
                   [script("kernel/build"), kernel, *programs(lanes, kernel)])


# -- make check

class Checks:
    """Everything that is checked. What needs all processors, and what needs one, in two queues."""

    def __init__(self):
        self.lanes = load()
        self.wide = asyncio.Lock()
        self.narrow = asyncio.Lock()
        self.done = {}
        self.passed = 0
        self.failures = []
        self.runs = []
        self.cost = []

    async def check(self, name, text, argv, queue, after=(), inputs=None, behind=()):
        """
        One check, one count, after others passed and behind others whether they pass or not.
        Nothing is tried again whose inputs are those it passed with.
        """
        for other in behind:
            await self.done[other]
        if not await self.wait(after, name):
            return False
        async with queue:
            try:
                kept = inputs and os.path.join(WORK, "passed", f"{name}-{digest(inputs())}")
            except (OSError, subprocess.CalledProcessError) as e:
                self.failures.append(f"{name}: {e}")
                return False
            if kept and os.path.exists(kept) and os.environ.get("FORCE", "0") in ("", "0"):
                say(f"{text:60} as before")
                self.passed += 1
                return True
            try:
                await step(name, text, argv)
            except Failure as e:
                self.failures.append(f"{name}: {e}")
                return False
            self.passed += 1
            if kept:
                os.makedirs(os.path.dirname(kept), exist_ok=True)
                for old in glob.glob(f"{glob.escape(WORK)}/passed/{name}-" + 20 * "?"):
                    os.remove(old)
                open(kept, "w").close()
            return True

    async def lane(self, name, queue, after):
        lane = self.lanes[name]
        if not await self.wait(after, name):
            return False
        async with queue:
            run = Run(lane)
            self.runs.append(run)
            try:
                await run.run()
            except (Failure, OSError, subprocess.CalledProcessError) as e:
                self.failures.append(f"{name}: {e}")
                return False
            self.passed += sum(r.state == "ok" for r in run.results)
            self.failures += run.failures()
            return run.passed

    async def verdict(self, name, after, judge):
        """What reports say together; the lines go into a file of that name."""
        for task in after:
            await self.done[task]
        runs = {r.lane.name: r for r in self.runs if r.lane.name in after}
        if len(runs) == len(after):
            try:
                lines, problem = judge([runs[lane] for lane in after])
                with open(os.path.join(BUILD, name), "w") as f:
                    f.writelines(line + "\n" for line in lines)
                if problem:
                    raise Failure(problem)
                self.passed += 1
                return True
            except (Failure, OSError, KeyError) as e:
                self.failures.append(f"{name}: {e}")
        return False

    async def costs(self, after):
        """Healthy paths cost what they did."""
        if not await self.wait(after, "costs"):
            return False
        try:
            _, self.cost, too_much = cost.report([r for r in self.runs if r.lane.icount])
        except (Failure, OSError, KeyError) as e:
            too_much = [e]
        self.failures += [f"costs: {line}" for line in too_much]
        self.passed += not too_much
        return not too_much

    async def wait(self, after, name):
        for other in after:
            if not await self.done[other]:
                self.failures.append(f"{name}: not done, as {other} failed")
                return False
        return True

    def add(self, name, coroutine):
        self.done[name] = asyncio.ensure_future(coroutine)

    async def run(self, debug):
        for folder in glob.glob(os.path.join(BUILD, "qemu", "*")) + [os.path.join(BUILD, "bochs")]:
            lanes_.remove(folder)
        for f in [*glob.glob(os.path.join(BUILD, "report.*")), *glob.glob(os.path.join(BUILD, "verdict"))]:
            os.remove(f)
        self.plan(debug)
        try:
            await asyncio.gather(*self.done.values())
        finally:
            for task in self.done.values():
                task.cancel()
            await asyncio.gather(*self.done.values(), return_exceptions=True)

    def plan(self, debug):
        one, all_ = self.narrow, self.wide

        def check(name, text, queue, after=(), inputs=None, argv=None, behind=()):
            self.add(name, self.check(name, text, argv or [script(f"checks/{name}")], queue, after, inputs, behind))

        def kernel(name):
            check(f"build-{name}", f"building {KERNELS[name]}", all_,
                  argv=[script("kernel/build"), name, *programs(self.lanes, name)])

        shells = [f for pattern in ("lib.sh", "bench", ".ci/run", "*/*") for f in glob.glob(os.path.join(TOP, pattern))
                  if os.path.isfile(f) and is_shell(f)]
        check("bench", "the bench itself, with stubs", one, inputs=lambda: [
            script("lib.sh"), *sorted(f for d in ("runner", "source", "guest") for f in glob.glob(script(f"{d}/*"))),
            script("checks/round-trip")],
              argv=[sys.executable, "-B", "-m", "unittest", "discover", "-s", script("runner")])
        # SC1091, SC2164: lib.sh is found at run time, and sets -e.
        check("shellcheck", f"shellcheck of {len(shells)} scripts", one,
              argv=["shellcheck", "-x", "-e", "SC1091,SC2164", *shells])
        check("pyflakes", "pyflakes of the runner", one, argv=["pyflakes3", *glob.glob(script("runner/*.py"))])
        check("round-trip", "patches/ and build/linux are the same", one)
        check("checkpatch", "checkpatch --strict", one, inputs=lambda: [
            script("checks/checkpatch"), os.path.join(TREE, "scripts/checkpatch.pl"), *sorted(glob.glob(script("patches/*/*")))])
        self.add("emulators", self.check("emulators", "QEMU and Bochs, unpacked beside",
                                         ["true"] if own_emulators() else [script("emulators/get")], one))

        kernel("patched")
        for name in ("patched-kunit", "patched-shadow", "patched", "patched-inplace"):
            self.add(name, self.lane(name, all_, ["build-patched", "emulators"]))
        kernel("base")
        self.add("base", self.lane("base", all_, ["build-base", "emulators"]))
        for name in ("td", "td-inplace", "td-smp", "td-run", "td-run-smp", "intel"):
            self.add(name, self.lane(name, one, ["build-patched", "emulators"]))
        self.add("td-base", self.lane("td-base", one, ["build-base", "emulators"]))
        kernel("guest")
        if own_emulators():
            say("td-ovmf is left out: OVMF comes with Debian's emulators, and QEMU= and BOCHS= are others")
        for name in ("td-linux",) + (() if own_emulators() else ("td-ovmf",)):
            self.add(name, self.lane(name, one, ["build-patched", "build-guest", "emulators"]))
        self.add("verdict", self.verdict("verdict", ["td", "td-base", "td-smp", "td-inplace"], verdict_.verdict))
        for name, kernels in (("cost", []), ("cost-inplace", []), ("cost-base", ["build-base"])):
            self.add(name, self.lane(name, one, ["build-patched", *kernels, "emulators"]))
        self.add("costs", self.costs(["cost", "cost-inplace", "cost-base"]))
        tree = lambda name: lambda: [script(f"checks/{name}"), script("lib.sh"), *sorted(glob.glob(script("kernel/*"))), built()]
        check("sparse", "sparse on touched files, against the base", one, ["build-patched", "build-base"], tree("sparse"))
        check("docs", "documentation of touched files", one, ["build-patched", "build-base"], tree("docs"))
        if debug:
            kernel("debug")
            for name in ("debug-kunit", "debug", "debug-inplace"):
                self.add(name, self.lane(name, all_, ["build-debug", "emulators"]))
            for name in ("debug-td", "debug-td-run"):
                self.add(name, self.lane(name, one, ["build-debug", "emulators"]))
        # It takes longest, and what fails should show early.
        check("patches", "each patch builds, KVM=y and KVM=m, W=1", all_, behind=[
            name for name in self.done if name in self.lanes and self.lanes[name].machine == "qemu"
            and not self.lanes[name].icount])

    def report(self, start):
        order = list(self.lanes)
        self.runs.sort(key=lambda run: order.index(run.lane.name))
        lanes_.write_reports(self.runs)
        say()
        for line in lanes_.table(self.runs):
            say(line)
        with contextlib.suppress(FileNotFoundError), open(os.path.join(BUILD, "verdict")) as f:
            say("\n" + f.read().rstrip())
        say("\n" + "\n".join(self.cost))
        say(f"\nQEMU {machines.version('qemu')}, Bochs {machines.version('bochs')}; {time.monotonic() - start:.0f} s; "
            f"every case: {short(BUILD)}/report.ktap and .json")
        notice()
        for line in self.failures:
            say(f"failed: {line}")
        skipped = sum(r.skipped for run in self.runs for r in run.results)
        say(f"{self.passed} passed, {len(self.failures)} failed, {skipped} skipped")
        return 1 if self.failures else 0


def is_shell(path):
    with open(path, errors="replace") as f:
        head = f.read(200)
    return bool(re.match(r"#!.*sh\b", head)) or "shell=" in head


def built():
    """What sparse and Sphinx look at, and which they are."""
    commands = [["git", "-C", os.path.join(WORK, name), "rev-parse", "HEAD^{tree}"] for name in ("linux", "base")]
    commands += [["git", "-C", TREE, "rev-parse", "base^{tree}"], ["sparse", "--version"], ["sphinx-build", "--version"]]
    return "".join(subprocess.run(command, check=True, capture_output=True, text=True).stdout for command in commands)


def digest(inputs):
    """Of files, by what is in them, and of other text."""
    d = hashlib.sha256()
    for item in inputs:
        if os.path.isfile(item):
            with open(item, "rb") as f:
                item = f"{os.path.relpath(item, TOP)} {hashlib.file_digest(f, 'sha256').hexdigest()}"
        d.update(item.encode() + b"\n")
    return d.hexdigest()[:20]


async def check(args):
    start = time.monotonic()
    await prepare()
    checks = Checks()
    await checks.run(args.debug)
    return checks.report(start)


# -- the other commands

async def afresh(*kernels):
    """The lanes, with these kernels. What runs on them does not come from the cache."""
    os.environ["FORCE"] = "1"
    await prepare()
    await emulators()
    lanes = load()
    await build(lanes, *kernels)
    return lanes


async def run(args):
    """The demonstrations."""
    lanes = await afresh("patched")
    demo = Run(lanes["demo"])
    await demo.run(quiet=True)
    say()
    with open(os.path.join(demo.folder, "report"), errors="replace") as f:
        for line in f.read().replace("\r", "").split("\n"):
            if line.startswith("# ") and not re.match(r"# (begin|done|Random seed)", line):
                say(line[2:])
    if not demo.passed:
        raise Failure(next(demo.failures()))
    say()
    await build(lanes, "base")
    runs = [Run(lanes[name]) for name in ("td-inplace", "td-base", "td")]
    await asyncio.gather(*(r.run() for r in runs))
    for r in runs:
        if not r.passed:
            raise Failure(next(r.failures()))
    lines, problem = verdict_.verdict(runs)
    say("\n" + "\n".join(lines))
    if problem:
        raise Failure(problem)
    return 0


async def bench(args):
    """What the series costs when nothing is wrong."""
    lanes = await afresh("patched", "base")
    start = time.monotonic()
    runs = [Run(lanes[name]) for name in ("cost-base", "cost", "cost-inplace")]
    await asyncio.gather(*(r.run(quiet=True) for r in runs))
    for r in runs:
        if not r.passed:
            raise Failure(next(r.failures()))
    values, lines, too_much = cost.report(runs)
    say("\n" + "\n".join([*lines, "", *cost.sizes(values, objects)]))
    drawn = cost.draw()
    say(f"\n{time.monotonic() - start:.0f} s; {short(BUILD)}/cost.csv{drawn}; function by function: "
        f"{short(BUILD)}/bloat")
    for line in too_much:
        say(f"too much: {line}")
    return 1 if too_much else 0


async def follow(path, pattern):
    """Show the lines with that in them of a file that grows."""
    position = 0
    while True:
        with contextlib.suppress(FileNotFoundError), open(path, "rb") as f:
            f.seek(position)
            text = f.read().rpartition(b"\n")[0]
            position += len(text)
            for line in text.decode(errors="replace").split("\n"):
                if re.search(pattern, line):
                    say("  " + line.rstrip())
        await asyncio.sleep(0.5)


def check_ovmf():
    ovmf = os.environ.get("OVMF") or "0"
    if ovmf not in ("0", "1") and not os.path.isfile(ovmf):
        raise Failure(f"OVMF={ovmf}: there is no such file; OVMF=1 is Debian's")
    return ovmf


async def td(args):
    """
    A Linux in TDs that run, or give memory back while SEAMCALLs fail; with OVMF= one TD,
    by that firmware.
    """
    if check_ovmf() == "0":
        lanes = await afresh("patched", "base", "guest")
        # With all TDs, not only those of make check.
        runs = [Run(lane, [dataclasses.replace(test, command=test.program) for test in lane.tests])
                for lane in (lanes["td-linux-base"], lanes["td-linux"])]
    else:
        lanes = await afresh("patched", "guest")
        runs = [Run(lanes["td-ovmf"])]
    new = runs[-1]
    shutil.rmtree(new.folder, ignore_errors=True)
    start = time.monotonic()
    side = asyncio.ensure_future(follow(os.path.join(new.folder, "console"), "tdstub: |td: |lane: |guest_memfd: "))
    try:
        await asyncio.gather(*(r.run(quiet=True, keep=False) for r in runs))
    finally:
        side.cancel()
    say()
    for result in new.results:
        for name, state, _ in result.cases:
            say(f"{state:5} {name}")
    failures = [line for r in runs for line in r.failures()]
    if check_ovmf() == "0" and all(r.passed for r in runs):
        lines, problem = verdict_.linux(runs)
        say("\n" + "\n".join(lines))
        failures += [problem] if problem else []
    say(f"\n{time.monotonic() - start:.0f} s; {short(new.folder)}/console and report")
    for line in failures:
        say(f"failed: {line}")
    return 1 if failures else 0


async def packages():
    """Debian packages of a host's kernel; TESTING=1: with the parts for tests."""
    config = os.environ.get("CONFIG")
    text = f"configured {'as ' + config if config else 'for virtual machines'}"
    if os.environ.get("TESTING", "0") not in ("", "0"):
        text += ", with all parts"
    await step("deb", f"Debian packages, {text}", [script("kernel/deb"), *([os.path.abspath(config)] if config else [])])
    return sorted(glob.glob(os.path.join(BUILD, "deb", "*.deb")))


async def deb(args):
    await prepare()
    for path in await packages():
        say(f"  {os.path.getsize(path) >> 20:5} MB  {short(path)}")
    return 0


async def boot_deb(args):
    """A Debian with the package: the selftests, and a page that is lost, as an operator sees it."""
    if os.geteuid():
        raise Failure("make boot-deb makes the root of a Debian, which takes root")
    config, testing = os.environ.get("CONFIG"), os.environ.get("TESTING", "0") not in ("", "0")
    if config and not testing and os.path.isfile(config):
        with open(config) as f:
            if "CONFIG_KVM_SW_PROTECTED_VM=y\n" not in f:
                raise Failure(f"CONFIG={config} has no KVM_SW_PROTECTED_VM, which the selftests take: TESTING=1 adds it")
    await prepare()
    await emulators()
    lanes = load()
    await build(lanes, "patched")
    image = next(path for path in await packages() if "/linux-image-" in path)
    tests = lanes["patched-inplace"].tests
    lane = Lane("deb", "patched", "qemu", "", ["root=/dev/vda", "rw", "kvm.gmem_in_place_conversion=1"])
    lanes_.remove(lane.folder)
    os.makedirs(lane.folder)
    with open(os.path.join(lane.folder, "tests"), "w") as f:
        f.writelines(f"{t.name} {5 * t.seconds} {t.command}\n" for t in tests)
    await step("debian", "a Debian with it", [script("guest/debian"), lane.folder, image])
    os.environ["QEMU_ARGS"] = "-drive file=disk,format=raw,if=virtio,cache=unsafe " + os.environ.get("QEMU_ARGS", "")
    kernel, initrd = (glob.glob(os.path.join(lane.folder, name + "-*"))[0] for name in ("vmlinuz", "initrd.img"))
    report = []

    def on_line(line):
        if line and not line.startswith("# begin"):
            say(f"  {line}")
        report.append(line)

    why = await machines.boot(lane, lane.folder, kernel, initrd, tests, on_line)
    if why:
        raise Failure(why)
    with open(os.path.join(lane.folder, "console"), errors="replace") as f:
        if "login:" not in f.read():
            raise Failure("nobody could log in (see build/qemu/deb/console)")
    return 0 if "ok" in report else 1


async def tree(args):
    await prepare()
    return 0


def choose(lanes, args):
    """The lane and the tests that were asked for."""
    names = sorted({t.name for lane in lanes.values() for t in lane.tests})
    words = shlex.split(args.test or "")
    if not words and not args.on:
        raise Failure("say which test: make test T=<name> [ON=<lane>] [RUNS=<n>]; make list has the names")
    if args.on and args.on not in lanes:
        raise Failure(f"there is no lane {args.on}, but: {' '.join(lanes)}")
    if not words:
        return lanes[args.on], lanes[args.on].tests
    name = os.path.basename(words[0])
    found = [t for lane in lanes.values() for t in lane.tests if t.name == name]
    if not found:
        raise Failure(f"there is no test {name}, but: {' '.join(names)}")
    lane = lanes[args.on or (found[0].lanes + found[0].also)[0]]
    if (not found[0].program.startswith("./") and found[0].program not in programs(lanes, lane.kernel)) or \
       (found[0].program.startswith("td/") and not lane.launches):
        raise Failure(f"{name} is not built with the kernel {lane.kernel}, but is in the lanes: "
                      + " ".join(other.name for other in lanes.values() if name in (t.name for t in other.tests)))
    if lane.kunit:
        raise Failure(f"{lane.name} is for KUnit, which runs as it boots: ON={lane.name} without a test")
    test = dataclasses.replace(next((t for t in lane.tests if t.name == name), found[0]))
    if len(words) > 1:
        test.command = shlex.join([test.program, *words[1:]])
    return lane, [test]


async def test(args):
    """Some tests on a lane, as often as wanted."""
    if args.runs < 1:
        raise Failure(f"RUNS={args.runs}: at least one")
    lanes = load(every=bool(args.test) or None)
    lane, tests = choose(lanes, args)
    check_ovmf()
    await prepare()
    await emulators()
    await build(lanes, lane.kernel, *(["patched"] if lane.icount else []), *(["guest"] if lane.launches else []))
    os.environ["FORCE"] = "1"
    # What is there then is of this run.
    for old in glob.glob(os.path.join(BUILD, "test", lane.name)) + glob.glob(os.path.join(BUILD, "test", lane.name + "-[0-9]*")):
        lanes_.remove(old)
    bad = 0
    for i in range(args.runs):
        folder = os.path.join(BUILD, "test", lane.name) + (f"-{i + 1}" if args.runs > 1 else "")
        r = Run(lane, tests, folder)
        await r.run(keep=False)
        for line in r.failures():
            say(f"failed: {line}")
        # A control passes if its tests fail, but here it is they that are asked for.
        passed = r.passed and all(result.state == "ok" for result in r.results)
        bad += not passed
        if args.runs > 1:
            say(f"{i + 1} of {args.runs}: {'ok' if passed else 'FAILED'} (see {short(folder)})")
        elif args.test:
            with open(os.path.join(folder, "report"), errors="replace") as f:
                say(f.read().rstrip())
    say(f"{args.runs - bad} passed, {bad} failed")
    return 1 if bad else 0


async def shell(args):
    lanes = load()
    lane = lanes.get(args.on or "patched")
    if not lane or lane.machine != "qemu":
        raise Failure(f"there is no lane {args.on} with a console, but: "
                      + " ".join(other.name for other in lanes.values() if other.machine == "qemu"))
    await prepare()
    await emulators()
    # Programs of guest/ take the headers of the series.
    await build(lanes, lane.kernel, *(["patched"] if lane.icount else []))
    say(f"kernel with symbols: {objects(lane.kernel)}/vmlinux; QEMU_ARGS='-s -S' waits for gdb")
    await lanes_.interactive(lane)
    return 0


def list_():
    lanes = load(every=True)
    say("kernels (kernel/build)")
    for name, text in KERNELS.items():
        say(f"  {name:18} {text}")
    say("\nlanes, and the tests in them (lanes.toml; those with * only with ALL=1, debug with DEBUG=1)")
    for lane in lanes.values():
        say(f"  {lane.name:18} {lane.text}: {lane.kernel} on {lane.machine}, {' '.join(lane.parameters)}")
        every = {t.name: lane.name in t.also for other in lanes.values() for t in other.tests
                 if lane.name in t.lanes + t.also}
        for name, also in every.items():
            say(f"  {'':18}   {name}{' *' if also else ''}")
    return 0


def arguments():
    parser = argparse.ArgumentParser(prog="bench", description="what make calls")
    parser.add_argument("command", choices=["run", "check", "check-debug", "td", "deb", "boot-deb", "bench", "tree",
                                            "test", "shell", "list"])
    parser.add_argument("--debug", action="store_true", help="the debug kernel, too")
    parser.add_argument("--test", help="which test")
    parser.add_argument("--on", help="on which lane")
    parser.add_argument("--runs", type=int, default=1, help="how often")
    return parser.parse_args()


if __name__ == "__main__":
    given = arguments()
    if given.command == "list":
        # As all that only prints: no traceback if nobody reads it to the end.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        sys.exit(list_())
    given.debug |= given.command == "check-debug"
    if given.command not in ("td", "test"):
        os.environ.pop("OVMF", None)
    commands = {"run": run, "check": check, "check-debug": check, "td": td, "deb": deb, "boot-deb": boot_deb,
                "bench": bench, "tree": tree, "test": test, "shell": shell}
    os.makedirs(CACHE, exist_ok=True)
    sys.exit(main(commands[given.command](given)))
