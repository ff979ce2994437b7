# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# What every script here shares: where things are, how to say what is done and
# how long it took, and how to fail.
set -euo pipefail
export LC_ALL=C
# The tools of Debian, that source/packages installs, come first.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin:$PATH

TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
VERSION=7.3.4
BUILD=$TOP/build
TREE=$BUILD/linux
LOGS=$BUILD/log
CACHE=${XDG_CACHE_HOME:-$HOME/.cache}/stuck-pages
JOBS=${JOBS:-$(nproc)}
# A tree of one's own has a place of its own in the cache.
WORK=$CACHE/$VERSION
[ -z "${KERNEL:-}" ] || WORK=$CACHE/own-$(realpath -- "$KERNEL" | cksum | cut -d' ' -f1)
mkdir -p "$LOGS"
export TOP VERSION BUILD TREE LOGS CACHE WORK JOBS

# What makes the same source the same object, wherever it is built.
export CCACHE_BASEDIR=$WORK CCACHE_DIR=$CACHE/ccache CCACHE_MAXSIZE=8G CCACHE_SLOPPINESS=time_macros
export KBUILD_BUILD_TIMESTAMP=2026-01-01 KBUILD_BUILD_USER=stuck KBUILD_BUILD_HOST=pages

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# step NAME TEXT COMMAND...: say TEXT, run COMMAND with its output in a log, say
# how long that took. When it fails say so in one line, and where the log is.
step() {
	local text=$2 start=$SECONDS log=$LOGS/$1.log ticker rc=0 why
	shift 2
	mkdir -p "$LOGS"
	printf '%-56s ' "$text" >&2
	(while sleep 60; do printf '.' >&2; done) 9>&- & ticker=$!
	"$@" > "$log" 2>&1 < /dev/null || rc=$?
	{ kill "$ticker" && wait "$ticker"; } 2> /dev/null || true
	printf '%4d s\n' $((SECONDS - start)) >&2
	[ "$rc" = 0 ] && return
	why=$(grep -E 'error: |error:|Error |\*\*\*|No space left' "$log" | head -n 1) ||
		why=$(tail -n 1 "$log")
	die "${why#error: } (log: ${log#"$PWD"/})"
}

# need_space DIR MEGABYTES: an early, clear word beats ENOSPC in a compiler.
need_space() {
	local free
	mkdir -p "$1"
	free=$(df --output=avail -m "$1" | tail -n 1)
	[ "$free" -ge "$2" ] || die "$1 has $free MB free, $2 MB are needed"
}

# The address that this machine has Debian from, if it has one.
debian_mirror() {
	local try
	for try in have_lists update; do
		[ $try = have_lists ] || apt-get -qq update > /dev/null || return 0
		# shellcheck disable=SC2016
		apt-get indextargets --format '$(REPO_URI) $(ORIGIN)' 'Created-By: Packages' |
			awk '!found && $2 == "Debian" && $1 !~ /security/ { print $1; found = 1 }
			     END { exit !found }' && return
	done
	return 0
}

# One user of the cache at a time; the rest wait.
lock_cache() {
	mkdir -p "$CACHE"
	exec 9> "$CACHE/lock"
	flock -n 9 || { say "waiting for another run to finish with $CACHE"; flock 9; }
}
