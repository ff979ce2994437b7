# SPDX-License-Identifier: GPL-2.0
# make run     build and boot the patched kernel, show that stuck pages are contained
# make check   the tests; DEBUG=1: on the debug kernel, too
# make td      Linux in TDs by QEMU, on an emulated machine without TDX; SEAMCALLs fail
#              OVMF=1: one TD by Debian's OVMF instead; OVMF=<file>: by that one
# make deb     Debian packages of a kernel for hosts; CONFIG=/boot/config-... for one like it,
#              TESTING=1 with fault injection and the TDX module in software
# make boot-deb  (as root) the same, and a Debian that boots it: the selftests, a page that is lost
# make bench   what the series costs when nothing is wrong, in instructions
# make list    kernels, lanes and tests
# make test T=<test> [ON=<lane>] [RUNS=<n>]
#              a test, or with ON alone a lane, as often as you like; T="<test> <arguments>"
# make shell [ON=<lane on QEMU>]
#              a shell on that kernel, or the patched one
# make tree    lay out build/linux from patches/
# make diff    what build/linux has that patches/ has not, as git range-diff
# make series  write patches/ from the commits in build/linux; DROP=1 if something is to go
# make clean   remove build/ (FORCE=1: and what make series has not written); make distclean: the cache, too
#
# KERNEL=PATH      a kernel tree or tarball of your own, without the series, instead of Debian's v7.3.4
# ALL=1            with check: tests in all combinations, not only the telling ones (with DEBUG=1: those
#                  on the debug kernel, too)
# FORCE=1          run tests again that passed before (not builds, single patches, checkpatch)
# NO_INSTALL=1     do not install Debian packages
# JOBS=N           how many compilers at once
# TD_ARGS="..."    with td: more arguments for the Linux in the TD
# QEMU=, BOCHS=    emulators of your own (BXSHARE= where that Bochs has its BIOS); QEMU_ARGS=
#                  more arguments for QEMU
# BOOT_SECONDS=, STALL_SECONDS=
#                  how long a machine may take to boot, how long it may be silent
SHELL := bash
export T ON RUNS CONFIG TESTING OVMF KERNEL ALL FORCE NO_INSTALL JOBS TD_ARGS QEMU BOCHS BXSHARE QEMU_ARGS BOOT_SECONDS STALL_SECONDS

.PHONY: help run check check-debug td deb boot-deb bench list test shell tree diff series clean distclean

help:
	@sed -n '2,/^SHELL/{s/^# \{0,1\}//p}' Makefile

check:
	@./bench check $(if $(filter-out 0,$(DEBUG)),--debug)

run check-debug td deb boot-deb bench list tree:
	@./bench $@

test:
	@./bench test --test "$$T" --on "$$ON" --runs "$${RUNS:-1}"

shell:
	@./bench shell --on "$$ON"

diff:
	@source/diff

series:
	@source/export

clean:
	@source/clean

distclean:
	@source/clean cache
