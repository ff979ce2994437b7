# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash
# What every script here shares: where things are, what the environment may say,
# and how to fail.
set -euo pipefail
umask 022

# The settings of the user's shell, make and git are not those of this project:
# ARCH=arm64, format.coverLetter or commit.gpgsign would change what is built.
clean_environment() {
	local name author email
	author=$(git config user.name) || author=$(id -un)
	email=$(git config user.email) || email=$author@localhost
	# shellcheck disable=SC2046
	unset $(git rev-parse --local-env-vars) ARCH CROSS_COMPILE LLVM CC LD HOSTCC LOCALVERSION \
		EXTRA_CFLAGS CPATH C_INCLUDE_PATH LIBRARY_PATH SPHINXOPTS MAKEFLAGS MFLAGS MAKELEVEL MAKEOVERRIDES DEBUG V W C O M
	for name in $(compgen -e); do
		case $name in
		KBUILD_* | KCFLAGS | KCPPFLAGS | KAFLAGS | CFLAGS | LDFLAGS | KCONFIG_* | CCACHE_* | GIT_* | QUILT_*)
			unset "$name" ;;
		esac
	done
	export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_SYSTEM=/dev/null
	export GIT_AUTHOR_NAME=$author GIT_AUTHOR_EMAIL=$email
	export GIT_COMMITTER_NAME=$author GIT_COMMITTER_EMAIL=$email
	export LC_ALL=C
	# The tools of Debian, that source/packages installs, come first.
	export PATH=/usr/sbin:/usr/bin:/sbin:/bin:$PATH
}

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

# Not a folder somewhere in another repository.
is_git() { [ "$(git -C "$1" rev-parse --show-toplevel 2> /dev/null)" = "$(realpath -- "$1")" ]; }

# own_work TREE: what is in a work tree and in no other place; nothing if it is as it was laid out.
own_work() {
	local git=$1/.git
	[ -e "$1" ] || return 0
	if [ ! -d "$git" ]; then
		echo "no folder .git, and is not by make tree"
	elif [[ $1 = *.part ]]; then
		# Half a tree must not look like somebody's work, and a repair be no half of a tree.
		[ ! -f "$git"/stopped ] || [ "$(cat "$git"/stopped)" = "$(stopped "$1")" ] || echo "a repair in it"
	elif [ -d "$git"/rebase-apply ] || [ -d "$git"/rebase-merge ]; then
		echo "a git am or git rebase in the middle"
	elif [ -n "$(git -C "$1" status --porcelain)" ]; then
		echo "changes that are not committed"
	elif [ "$(sed -n 1p "$git"/laid-out 2> /dev/null)" != "$(git -C "$1" rev-parse HEAD)" ]; then
		echo "commits of its own"
	elif [ -n "$(git -C "$1" rev-list -n 1 --branches --tags --glob='refs/stas[h]' --not HEAD)" ]; then
		echo "branches, tags or stashes of its own"
	fi
}
stopped() { git -C "$1" rev-parse HEAD && git -C "$1" status --porcelain; }

# own_kernel: what KERNEL names, as it is now. A git tree is taken with what is not
# committed in it, but without what git does not know.
own_kernel() {
	local commit
	[ -e "$KERNEL" ] || die "KERNEL=$KERNEL: there is no such tree or tarball"
	[ -f "$KERNEL" ] || [ -f "$KERNEL"/virt/kvm/guest_memfd.c ] ||
		die "KERNEL=$KERNEL: no kernel with guest_memfd is in there"
	if [ -f "$KERNEL" ]; then
		stat -c '%n %s %Y' -- "$(realpath -- "$KERNEL")"
	elif is_git "$KERNEL"; then
		commit=$(git -C "$KERNEL" -c user.name=x -c user.email=x stash create)
		git -C "$KERNEL" rev-parse "${commit:-HEAD}^{tree}"
	else
		find "$(realpath -- "$KERNEL")" -type f -printf '%p %s %T@\n' | sort
	fi
}

if [ -z "${STUCK_PAGES:-}" ]; then
	TOP=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
	VERSION=7.3.4
	BUILD=$TOP/build
	TREE=$BUILD/linux
	LOGS=$BUILD/log
	CACHE=${XDG_CACHE_HOME:-${HOME:-/root}/.cache}/stuck-pages
	JOBS=${JOBS:-$(nproc)}
	! command -v git > /dev/null || clean_environment
	# Each source has a place of its own in the cache.
	WORK=$CACHE/$VERSION
	if [ -n "${KERNEL:-}" ]; then
		WORK=$CACHE/own-$(own_kernel | sha256sum | cut -c1-12)
		KERNEL=$(realpath -- "$KERNEL")
	fi
	mkdir -p "$LOGS"
	export STUCK_PAGES=$TOP TOP VERSION BUILD TREE LOGS CACHE WORK JOBS KERNEL

	# What makes the same source the same object, wherever it is built.
	export CCACHE_BASEDIR=$WORK CCACHE_DIR=$CACHE/ccache CCACHE_MAXSIZE=8G
	export CCACHE_SLOPPINESS=time_macros CCACHE_NOHASHDIR=1
	# For make: with CCACHE_DEPEND=1 ccache takes the dependencies from gcc, and need not preprocess
	# what it does not have: a quarter less to do. But .incbin is no dependency: so neither for
	# assembler nor for the two C files that have one.
	# shellcheck disable=SC2016
	export CACHED_GCC='$(if $(filter-out %/configs.c %/kheaders.c,$(filter %.c,$<)),CCACHE_DEPEND=1 )ccache gcc'
	export KBUILD_BUILD_TIMESTAMP=2026-01-01 KBUILD_BUILD_USER=stuck
	export KBUILD_BUILD_HOST=pages KBUILD_BUILD_VERSION=1
fi

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

# worktree DIR: check out the base there, unless something is checked out already.
worktree() {
	[ ! -d "$1" ] || return 0
	git -C "$WORK"/linux worktree prune
	git -C "$WORK"/linux worktree add -q --detach "$1" base
}
