#!/usr/bin/env bash
# SPDX-License-Identifier: GPL-2.0
# What make run, check, check-debug and tree do, one after the other.
. "$(dirname "$0")/lib.sh"

lock_cache
step packages "Debian packages" "$TOP"/source/packages
step fetch "the source of the base" "$TOP"/source/fetch
step tree "the work tree build/linux, from patches/" "$TOP"/source/tree
grep -h 'work of its own' "$LOGS"/tree.log >&2 || true
case $1 in
tree) ;;
check) exec "$TOP"/checks/run normal ${DEBUG:+debug} ;;
check-debug) exec "$TOP"/checks/run debug ;;
run)
	step build-series "building the patched kernel and its tests" "$TOP"/kernel/build series
	step run "booting it, and a guest in it" \
		"$TOP"/lanes/run series kvm/x86/guest_memfd_poison_demo
	echo
	sed -n 's/^# //p' "$BUILD"/lane-a/series/report | sed '/^begin\|^Random seed\|^done/d'
	grep -q '^ok' "$BUILD"/lane-a/series/result || exit 1
	[ ! -s "$BUILD"/lane-a/series/splats ] || die "the kernel complained, see build/lane-a/series/splats"
	echo
	step bochs "getting Bochs, for TDs" "$TOP"/lanes/bochs-root
	step build-control "building v7.3.4 with the software TDX module" "$TOP"/kernel/build control
	step verdict "TDs whose SEAMCALLs fail, on both kernels" "$TOP"/lanes/verdict
	echo
	cat "$BUILD"/lane-b/verdict
	[ ! -s "$BUILD"/lane-b/tdx/splats ] || die "the kernel complained, see build/lane-b/tdx/splats" ;;
esac
