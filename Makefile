# SPDX-License-Identifier: GPL-2.0
# make run     build and boot the patched kernel, show that stuck pages are contained
# make check   all tests; make check-debug those on the debug kernel, DEBUG=1 both
# make tree    lay out build/linux from patches/
# make series  write patches/ from the commits in build/linux
# make clean   remove build/, not the cache
#
# KERNEL=PATH      a kernel tree or tarball of your own instead of Debian's v7.3.4
# NO_INSTALL=1     do not install Debian packages
# JOBS=N           how many compilers at once
MAKEFLAGS += --no-print-directory
export KERNEL NO_INSTALL JOBS DEBUG

.PHONY: help run check check-debug tree series clean

help:
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile

run check check-debug tree:
	@./do $@

series:
	@source/series

clean:
	rm -rf build
