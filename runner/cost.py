# SPDX-License-Identifier: GPL-2.0
"""What the series costs when nothing is wrong: instructions, counted by guest/cost.c."""
import csv
import os
import re
import shutil
import subprocess

from steps import BUILD, TREE, Failure, short

# What a healthy guest pays for, and may cost that much more than on v7.3.4.
GATED = ("pre-fault,absent", "pre-fault,present", "guest-fault,absent", "guest-fault,present", "punch")
LIMIT = 1.01

TEXT = {
    "pre-fault,absent": "KVM_PRE_FAULT_MEMORY, new pages",
    "pre-fault,present": "KVM_PRE_FAULT_MEMORY, old pages",
    "guest-fault,absent": "fault of a vCPU, new page",
    "guest-fault,present": "fault of a vCPU, old page",
    "punch": "punch hole",
    "close": "last close",
    "host-fault,absent": "fault of the host, new page",
    "host-fault,present": "fault of the host, old page",
    "to-shared": "convert to shared, host touches all",
    "to-private": "convert to private, guest touches all",
}


# 2 MiB as a folio, or as 512.
FOLIOS = {
    "absent": "guest touches all, new pages",
    "present": "guest touches all, old pages",
    "to-shared": "convert all to shared",
    "to-private": "convert all to private",
    "to-shared,first": "convert 4K of it: the first",
    "to-shared,next": "convert 4K of it: the next",
    "punch-4K": "hole of 4K",
    "close": "last close",
    "close,poisoned": " ... with one poisoned page",
    "poisoned,0": "guest touches every other page",
    "poisoned,1": " ... 1 of those between is poisoned",
    "poisoned,16": " ... 16 are",
    "poisoned,256": " ... all 256 are",
    "zap,0-stuck": "memslot deletion",
    "zap,512-stuck": " ... all pages get stuck",
    "close,stuck": "last close, all pages are stuck",
    "close,again": " ... and firmware keeps them again",
}


# More than before, at the most.
PEAKS = {
    "peak,to-shared": "16 MiB become shared (in place)",
    "peak,to-private": "16 MiB become private (in place)",
}


def read(run):
    """Instructions, by operation and size."""
    with open(os.path.join(run.folder, "report"), errors="replace") as f:
        found = re.findall(r"^\s*# cost (\S+) (\d+) (-?\d+)\r?$", f.read(), re.M)
    if not found:
        raise Failure(f"nothing was counted, see {short(run.folder)}/report")
    return {(name, int(size)): int(n) for name, size, n in found}


def size_text(size):
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


def compare(values):
    """Lines of a table, of instructions for each page, from what was read of each lane."""
    base, series, in_place = (values[name] for name in ("cost-base", "cost", "cost-inplace"))
    yield f"{'instructions for each 4K page':38} {'size':>7} {'v7.3.4':>8} {'series':>8} {'':>7} {'in place':>8} {'':>7}"
    for name, text in TEXT.items():
        for size in sorted({size for other, size in base if other == name}):
            pages = size // 4096
            old, new, other = (v[name, size] / pages for v in (base, series, in_place))
            yield (f"{text:38} {size_text(size):>7} {old:8.0f} {new:8.0f} x {new / old:5.3f} {other:8.0f} x {other / old:5.3f}")


def folios(values):
    """Lines of a table, of instructions for 2 MiB. Those that convert are counted in place."""
    yield f"{'instructions for 2 MiB, as':38} {'512 x 4K':>10} {'one folio':>10}"
    for name, text in FOLIOS.items():
        small, large = (values["cost-inplace"][f"{size}:{name}", 2 << 20] for size in ("4K", "2M"))
        yield f"{text:38} {small:10} {large:10} x {large / small:5.3f}"


def gate(values):
    """What costs too much, each in a line."""
    base, series = values["cost-base"], values["cost"]
    for (name, size), old in base.items():
        # In one page it is the system call that counts.
        if name in GATED and size > 4096 and series[name, size] > LIMIT * old:
            yield f"{TEXT[name]}, {size_text(size)}: {series[name, size]} instructions, {old} on v7.3.4"


def sizes(values, obj):
    """Lines of a table, of memory; obj: a kernel's objects."""
    yield f"{'bytes':38} {'v7.3.4':>10} {'series':>10}"
    old, new = (values[name]["inode", 0] for name in ("cost-base", "cost"))
    yield f"{'inode of a guest_memfd':38} {old:10} {new:10} {new - old:+7}"
    for name, text in PEAKS.items():
        old, new = (values[lane][name, 16 << 20] for lane in ("cost-base", "cost-inplace"))
        yield f"{text:38} {old:10} {new:10} {new - old:+7}"
    with open(os.path.join(BUILD, "bloat"), "w") as bloat:
        for name in ("virt/kvm/guest_memfd.o", "arch/x86/kvm/vmx/tdx.o", "mm/memory-failure.o", "mm/huge_memory.o",
                     "mm/memory.o", "mm/page_alloc.o"):
            files = [os.path.join(obj(kernel), name) for kernel in ("base", "patched")]
            old, new = (int(subprocess.run(["size", f], check=True, capture_output=True,
                                           text=True).stdout.split("\n")[1].split()[3]) for f in files)
            yield f"{name:38} {old:10} {new:10} {new - old:+7}"
            subprocess.run([os.path.join(TREE, "scripts/bloat-o-meter"), *files], check=True, stdout=bloat)


def report(runs):
    """What was counted, tables of it, and what is wrong, of runs of all lanes that count. Writes build/cost.csv."""
    values = {run.lane.name: read(run) for run in runs}
    counted = {name for name, _ in values["cost-base"]}
    if not counted.issuperset(GATED):
        raise Failure(f"nothing was counted of: {' '.join(sorted(set(GATED) - counted))}")
    for name, size in values["cost-base"]:
        for lane, v in values.items():
            if (name, size) not in v:
                raise Failure(f"{lane} did not count {name} of {size_text(size)}")
    with open(os.path.join(BUILD, "cost.csv"), "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["operation", "bytes", *values])
        for name, size in values["cost-inplace"]:
            out.writerow([name, size, *(v.get((name, size)) for v in values.values())])
    return values, [*compare(values), "", *folios(values)], list(gate(values))


PLOT = """
set terminal svg size 840,420 font 'sans-serif,13' background 'white'
set output 'cost.svg'
set datafile separator comma
set style data histogram
set style histogram clustered gap 1
set style fill solid border -1
set boxwidth 0.9
set xtics rotate by -30 nomirror
set yrange [0:1.3]
set grid ytics
set ylabel 'instructions, v7.3.4 = 1'
set key top left horizontal
plot 1 notitle linecolor 'black', \\
     '< grep ,2097152,[0-9] cost.csv' using ($4/$3):xtic(1) title 'series' linecolor '#4477aa', \\
     '' using ($5/$3) title 'in place' linecolor '#ee9955'
"""


def draw():
    """A picture of build/cost.csv, where there is gnuplot. Answers what to say of it."""
    if not shutil.which("gnuplot"):
        return " (with gnuplot: a picture, too)"
    subprocess.run(["gnuplot"], input=PLOT, cwd=BUILD, check=True, text=True)
    return " and .svg"
