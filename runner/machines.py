# SPDX-License-Identifier: GPL-2.0
"""
The emulated machines: QEMU is an AMD machine, Bochs an Intel machine. Boot a kernel, follow
its report, and when the machine dies or hangs keep what can be known of it.
"""
import asyncio
import contextlib
import glob
import os
import re
import shlex
import shutil
import subprocess
import tempfile
import time

from steps import CACHE, Failure, Process, short

# Of wall time, generous, as this machine may be busy.
LIMITS = {"BOOT_SECONDS": 300, "STALL_SECONDS": 480}

ROOT = os.path.join(CACHE, "emulators")


def limit(name):
    own = os.environ.get(name) or str(LIMITS[name])
    if not own.isdecimal() or int(own) == 0:
        raise Failure(f"{name}={own} is no number of seconds")
    return int(own)


def emulator(name, program):
    """How to call an emulator: the user's, or Debian's by its own loader and libraries."""
    own = os.environ.get(name)
    if own:
        path = shutil.which(own)
        if not path:
            raise Failure(f"{name}={own} is not a program")
        return [os.path.abspath(path)]
    return [f"{ROOT}/lib64/ld-linux-x86-64.so.2", "--library-path", f"{ROOT}/usr/lib/x86_64-linux-gnu",
            f"{ROOT}/usr/bin/{program}"]


def version(machine):
    """Of Debian's package, or what the user's emulator says, which for Bochs is nothing."""
    own = os.environ.get(machine.upper())
    if not own:
        with open(os.path.join(ROOT, "versions")) as f:
            return dict(line.split() for line in f)[machine]
    text = subprocess.run([own, "--version"], check=False, stdin=subprocess.DEVNULL, capture_output=True, text=True).stdout
    found = re.search(r"version (\S+)", text)
    return found[1] if found else own


def identity(machine):
    """What makes another emulator of it: of the user's own the file, too."""
    own = os.environ.get(machine.upper())
    if not own:
        return version(machine)
    stat = os.stat(shutil.which(own) or own)
    return f"{version(machine)} {stat.st_size} {stat.st_mtime_ns}"


class Qemu:
    """An AMD machine. What asks for a reset stops it, so that it can be looked at."""
    wall_per_guest_second = 1

    def __init__(self, lane, folder, kernel, initramfs, interactive=False):
        self.folder = folder
        # The path of a socket may have 107 characters, and no comma.
        self.sockets = tempfile.mkdtemp(prefix="stuck-", dir="/tmp")
        self.monitor = os.path.join(self.sockets, "monitor")
        argv = emulator("QEMU", "qemu-system-x86_64")
        if len(argv) > 1:
            argv += ["-L", f"{ROOT}/usr/share/qemu", "-L", f"{ROOT}/usr/share/seabios"]
        # no_timer_check: on a busy host the emulated timer may seem not to work at all.
        # nowatchdog: v7.3.4 may wait for another CPU by a clock that stands, see the README.
        append = " ".join(["console=ttyS0,115200 panic=-1 no_timer_check tsc=nowatchdog", *lane.parameters])
        # With icount its clock counts instructions, and does not wait when there are none.
        accel = ["tcg", "-icount", "shift=0,sleep=off"] if lane.icount else ["tcg,thread=multi"]
        # Two for the tests, which guest/init keeps off the first.
        self.cpus = lane.cpus or 3
        argv += ["-accel", *accel, "-cpu", "EPYC,+svm,+npt,+nrip-save", "-smp", str(self.cpus),
                 "-m", "3G", "-nodefaults", "-no-user-config", "-display", "none",
                 "-kernel", kernel, "-initrd", initramfs]
        if interactive:
            argv += ["-no-reboot", "-serial", "mon:stdio", "-append", append + " shell"]
        else:
            argv += ["-action", "reboot=shutdown,shutdown=pause",
                     "-chardev", f"socket,id=monitor,path={self.monitor},server=on,wait=off",
                     "-mon", "chardev=monitor,mode=readline",
                     "-serial", "file:console", "-serial", "file:report",
                     "-append", append]
        self.argv = argv + shlex.split(os.environ.get("QEMU_ARGS") or "")
        self.env = {}

    async def ask(self, *commands, seconds=20):
        """What the monitor answers, or nothing."""
        text = ""
        with contextlib.suppress(OSError, asyncio.TimeoutError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_unix_connection(self.monitor)
            try:
                await asyncio.wait_for(reader.readuntil(b"(qemu) "), seconds)
                for command in commands:
                    writer.write(command.encode() + b"\n")
                    answer = await asyncio.wait_for(reader.readuntil(b"(qemu) "), seconds)
                    text += f"(qemu) {command}\n" + re.sub(r"\x1b\[\S|.*\x08|\r", "", answer.decode(errors="replace"))
            finally:
                writer.close()
        return text

    async def stopped(self):
        return "paused (shutdown)" in await self.ask("info status", seconds=5)

    async def autopsy(self):
        """Registers, interrupt controllers and memory of a machine that died or hangs."""
        with open(os.path.join(self.folder, "registers"), "w") as f:
            f.write(await self.ask("info registers -a", *(f"info lapic {n}" for n in range(self.cpus))))
        vmcore = os.path.join(self.folder, "vmcore")
        await self.ask(f'dump-guest-memory -z "{vmcore}"', seconds=120)
        # The processors say where they are, if they still can.
        await self.ask("nmi")
        await asyncio.sleep(3)

    async def quit(self):
        await self.ask("quit", seconds=2)

    def close(self):
        shutil.rmtree(self.sockets, ignore_errors=True)

    def ended_well(self, status):
        return status == 0


class Bochs:
    """An Intel machine with VMX and EPT. Boots from a CD; switching off is a panic to it."""
    # Its clock runs at a speed that is not that of instructions.
    wall_per_guest_second = 20

    def __init__(self, lane, folder, kernel, initramfs, interactive=False):
        if interactive:
            raise Failure("Bochs has no console for people: take a lane on qemu")
        self.folder = folder
        share = os.environ.get("BXSHARE") or "/usr/share/bochs"
        self.argv = emulator("BOCHS", "bochs-bin")
        self.env = {}
        if len(self.argv) > 1:
            share = f"{ROOT}/usr/share/bochs"
            plugins = glob.glob(f"{ROOT}/usr/lib/x86_64-linux-gnu/bochs/plugins")
            self.env = {"BXSHARE": share, "LTDL_LIBRARY_PATH": ":".join(plugins)}
        self.argv += ["-q", "-f", "bochsrc"]

        iso = os.path.join(folder, "iso")
        os.makedirs(iso)
        for path, name in (("/usr/lib/ISOLINUX/isolinux.bin", "isolinux.bin"),
                           ("/usr/lib/syslinux/modules/bios/ldlinux.c32", "ldlinux.c32"),
                           (kernel, "bzimage"), (initramfs, "initrd")):
            shutil.copy(path, os.path.join(iso, name))
        # tsc, hpet: what Bochs emulates of them does not satisfy the kernel.
        append = " ".join(["console=ttyS0,115200 panic=-1 tsc=unstable hpet=disable", *lane.parameters])
        with open(os.path.join(iso, "isolinux.cfg"), "w") as f:
            f.write(f"default linux\nlabel linux\nkernel bzimage\nappend initrd=initrd {append}\n")
        subprocess.run(["xorriso", "-as", "mkisofs", "-quiet", "-o", os.path.join(folder, "boot.iso"),
                        "-b", "isolinux.bin", "-c", "boot.cat", "-no-emul-boot", "-boot-load-size", "4",
                        "-boot-info-table", iso], check=True, capture_output=True)
        shutil.rmtree(iso)
        # A supervisor that clears CR0.WP may write to read-only pages, and OVMF does. 3.0 panics
        # there if the CPU has CET, as such a page must not become dirty then.
        cet = "exclude_features=cet, " if lane.launches == "ovmf" else ""
        with open(os.path.join(folder, "bochsrc"), "w") as f:
            f.write(f"""memory: guest=1536, host=1536
cpu: model=tigerlake, count={lane.cpus or 1}, {cet}ips=200000000, ignore_bad_msrs=1, reset_on_triple_fault=0
clock: sync=none
romimage: file={share}/BIOS-bochs-latest
vgaromimage: file={share}/VGABIOS-lgpl-latest
com1: enabled=1, mode=file, dev=console
com2: enabled=1, mode=file, dev=report
ata0-master: type=cdrom, path=boot.iso, status=inserted
boot: cdrom
config_interface: textconfig
display_library: rfb, options="timeout=0"
log: bochs.log
panic: action=fatal
error: action=report
info: action=ignore
debug: action=ignore
""")

    async def stopped(self):
        return False

    async def autopsy(self):
        pass

    async def quit(self):
        pass

    def close(self):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(self.folder, "boot.iso"))

    def ended_well(self, _):
        with open(os.path.join(self.folder, "bochs.log"), errors="replace") as f:
            return "soft power off" in f.read()


MACHINES = {"qemu": Qemu, "bochs": Bochs}


def last_words(folder):
    with open(os.path.join(folder, "console"), errors="replace") as f:
        lines = f.read().split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing")[:120]


async def boot(lane, folder, kernel, initramfs, tests, on_line):
    """
    Boot, and call on_line for each line of the report. Answers why the machine died before
    it had run all tests, or None.
    """
    for name in ("console", "report"):
        open(os.path.join(folder, name), "w").close()
    machine = MACHINES[lane.machine](lane, folder, kernel, initramfs)
    limits = {test.name: (5 * test.seconds + 60) * machine.wall_per_guest_second for test in tests}
    why, done, rest, size = None, False, "", None
    boot_seconds, stall_seconds = (limit(name) for name in LIMITS)
    deadline = time.monotonic() + boot_seconds
    waiting_for = "the first test"
    with open(os.path.join(folder, "emulator"), "w") as output, \
         open(os.path.join(folder, "report"), errors="replace") as report:
        def take(end=""):
            """What is new in the report, in whole lines."""
            nonlocal done, rest, waiting_for, deadline
            *lines, rest = (rest + report.read() + end).split("\n")
            for line in lines:
                line = line.rstrip("\r")
                on_line(line)
                done = done or line == "# done"
                if line.startswith("# begin "):
                    waiting_for = line.split()[2]
                    deadline = time.monotonic() + limits.get(waiting_for, boot_seconds)

        process = Process(machine.argv, output, machine.env, folder)
        try:
            waiter = asyncio.ensure_future(process.wait())
            asked = changed = time.monotonic()
            while True:
                over = waiter.done()
                take()
                now = time.monotonic()
                sizes = [os.path.getsize(os.path.join(folder, f)) for f in ("console", "report")]
                if sizes != size:
                    size, changed = sizes, now
                if over:
                    if not machine.ended_well(process.status) or not done:
                        why = f"the emulator ended with status {process.status}"
                    break
                if now - asked > 1:
                    asked = now
                    if await machine.stopped():
                        # It may have come to its end since.
                        take()
                        if not done:
                            why = "the machine was reset"
                            await machine.autopsy()
                        await machine.quit()
                        break
                if now > deadline or now - changed > stall_seconds:
                    why = f"the machine hung, in {waiting_for}" if now < deadline else \
                          f"{waiting_for} did not end in time"
                    await machine.autopsy()
                    break
                await asyncio.sleep(0.1)
            # What came at last.
            take("\n")
        finally:
            await process.end()
            machine.close()
    if why:
        why += f"; its last words: {last_words(folder)} (see {short(folder)})"
    return why
