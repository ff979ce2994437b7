# SPDX-License-Identifier: GPL-2.0
"""What became of pages of TDs that got stuck, on v7.3.4 and with the series, for people."""
import os
import re

from steps import Failure, short

ROWS = (("SEAMCALLs that failed", "injected"),
        ("pages whose removal failed", "stuck"),
        ("pages marked as poisoned", "marked"),
        ("times such a page was freed", "freed"),
        ("times a page that a TD owns was allocated", "handed-out"),
        ("times a page with dirty private lines was allocated", "handed-out-dirty"),
        ("times the host wrote to a page that a TD owns", "written"),
        ("times a TD was to get a page that a TD owns", "given-twice"))


LIVES = (("TDs of which one SEAMCALL failed", "lives"),
         ("of these, with a page in wrong hands", "violations"))


def read(run, test, names=tuple(name for _, name in ROWS) + ("lost-tdr",)):
    """The numbers and the tables of a test in a report; nothing if it is not in there."""
    with open(os.path.join(run.folder, "report"), errors="replace") as f:
        report = f.read().replace("\r", "")
    found = re.search(rf"^# begin {test}\n(.*?)(?=^# begin |\Z)", report, re.M | re.S)
    if not found:
        return None
    values = {name: int(n) for name, n in re.findall(r"^\s*# (\S+) (\d+)$", found[1], re.M)}
    for name in names:
        if name not in values:
            raise Failure(f"{test} did not end, see {short(run.folder)}/report")
    tables = re.findall(r"^\s*# table\n(.*?)^\s*# table end", found[1], re.M | re.S)
    return values, [[re.sub(r"^\s*# ", "", line).rstrip() for line in table.splitlines()] for table in tables]


def condense(lines):
    """
    Of the table of the test, that has four rows for each way to take pages away: one row, if
    it makes no difference which page it is, and of three pages three stick.
    """
    head, rows = lines[:2], lines[2:]
    short_rows = []
    for first, middle, last, three in zip(*(rows[i::4] for i in range(4))):
        cells = [row[26:].split() for row in (first, middle, last, three)]
        if not cells[0] == cells[1] == cells[2] or \
           cells[3] != [str(3 * int(c)) if c.isdigit() else c for c in cells[0]]:
            return lines
        short_rows.append(first[:18] + 8 * " " + first[26:])
    return [line[:18] + (line[18:26].replace("fails", "     ")) + line[26:] for line in head] + short_rows + \
        ["", "So it is for the first page, one in the middle, the last, and for three at once, which all stick."]


def condense_huge(lines, column):
    """
    Of a table about huge pages: one row for each way, if it makes no difference which part or
    which page it is, and of three pages three stick.
    """
    rows = []
    for line in lines[2:]:
        cells = line[column:].split()
        if not line.startswith(" "):
            rows.append(line[:19] + (column - 19) * " " + line[column:])
            first = cells
        elif cells != first and cells != [str(3 * int(c)) if c.isdigit() else c for c in first[-len(cells):]]:
            return lines
    return [line[:19] + (column - 19) * " " + line[column:] for line in lines[:2]] + rows


LEAVES = ("MEM.RANGE.BLOCK", "MEM.TRACK", "MEM.PAGE.REMOVE", "PHYMEM.PAGE.WBINVD")


def linux(runs):
    """
    The same of a Linux in a TD that gives memory back: see td/launch. The runs are those on
    v7.3.4 and with the series.
    """
    rows = [("each SEAMCALL is busy once", "busy")] + [(f"{leaf} fails", leaf.split(".")[-1]) for leaf in LEAVES]
    names = [f"{name}-{what}" for _, name in rows for what in ("hits", "marked", "wrong")]
    values = []
    for run in runs:
        found = read(run, "linux_td_test", names)
        if not found:
            raise Failure(f"linux_td_test did not run, see {short(run.folder)}/report")
        values.append(found[0])
    lines = [f"{'':40}{'v7.3.4':24}series", f"{'a Linux TD gives memory back':40}" + 2 * "poisoned  wrong hands   ".ljust(24)]
    for text, name in rows:
        lines.append(f"{'  and ' + text:40}" + "".join(
            f"{v[name + '-marked']:8}  {v[name + '-wrong']:11}   " for v in values))
    problem = None
    for text, name in rows:
        if not all(v[name + "-hits"] for v in values):
            problem = f"no SEAMCALL failed where {text}: the test does not test anything"
    # Row by row they may shift: a page can come to light when the next TD has ended.
    if not any(values[0][f"{name}-wrong"] for _, name in rows):
        problem = "v7.3.4 let go of no page of a Linux TD: the test does not test anything"
    if any(values[1][f"{name}-wrong"] for _, name in rows):
        problem = "a page of the Linux TD came into wrong hands"
    return [line.rstrip() for line in lines], problem


def verdict(runs):
    """
    The text. It is an error if v7.3.4 does not hand out a page of a TD, as then nothing was
    tested, or if the patched kernel does.
    """
    values, tables, lives, huge = {}, {}, {}, None
    for run in runs:
        found = read(run, "tdx_stuck_pages_test")
        if not found:
            raise Failure(f"tdx_stuck_pages_test did not run, see {short(run.folder)}/report")
        values[run.lane.name], (tables[run.lane.name],) = found
        found = read(run, "tdx_stuck_hugepages_test")
        if found:
            values[run.lane.name + ", 2M"], huge = found
        found = read(run, "tdx_fail_each_test", ("lives", "violations"))
        if found:
            lives[run.lane.name] = found[0]
    old, new = values["td-base"], values["td"]
    lines = condense(tables["td"])
    for line in condense(tables.get("td-inplace", [])):
        if line.startswith("convert in place"):
            lines.insert(1 + max(i for i, other in enumerate(lines) if other.startswith("convert")), line)
    lines += ["", f"{'the same on':52} {'v7.3.4':>8} {'series':>8}"]
    lines += [f"{text:52} {old[name]:8} {new[name]:8}" for text, name in ROWS]
    # A TDR page cannot be reclaimed as long as its TD owns pages.
    lost = [(v["marked"] + v["lost-tdr"]) * 4096 // max(1, v["stuck"]) for v in (old, new)]
    lines.append(f"{'bytes lost for each page, with the TDR of its TD':52} {lost[0]:8} {lost[1]:8}")

    if "td-base" in lives and "td" in lives:
        lines += [f"{text:52} {lives['td-base'][name]:8} {lives['td'][name]:8}" for text, name in LIVES]

    if huge:
        calls, cuts, removals = huge
        lines += ["", "Pages of 2M, which v7.3.4 does not have:", "", *condense_huge(cuts, 29), "",
                  *condense_huge(removals, 26), "", *calls]

    problem = None
    if not old["handed-out"]:
        problem = "v7.3.4 handed out no page of a TD: the test does not test anything"
    if "td-base" in lives and not lives["td-base"]["violations"]:
        problem = "on v7.3.4 each SEAMCALL may fail: tdx_fail_each_test does not test anything"
    for name, v in lives.items():
        if name != "td-base" and v["violations"]:
            problem = f"a SEAMCALL that fails brings a page of a TD into wrong hands (lane {name})"
    for name, v in values.items():
        if name == "td-base":
            continue
        if any(v[what] for what in ("freed", "handed-out", "handed-out-dirty", "written", "given-twice")):
            problem = f"the patched kernel let go of a page of a TD (lane {name})"
        elif v["marked"] != v["stuck"]:
            problem = f"not each page that got stuck is marked, or others are (lane {name})"
    return lines, problem
