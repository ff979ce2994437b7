# SPDX-License-Identifier: GPL-2.0
# shellcheck shell=bash disable=SC2154
registers() {
	python3 - "$monitor" <<-'END'
		import socket, sys, time
		s = socket.socket(socket.AF_UNIX)
		s.connect(sys.argv[1])
		s.settimeout(2)
		for i in range(5):
		    s.sendall(b"info registers -a\n")
		    time.sleep(1)
		    try:
		        print(s.recv(1 << 20).decode(errors="replace"))
		    except TimeoutError:
		        pass
	END
}

# emulate COMMAND...: run an emulator that leaves the console in $dir/console and
# the report in $dir/report, and switch it off when it takes too long: the first
# test has to begin within BOOT_SECONDS, all must end within $seconds. A machine that says
# nothing for longer than any test may take hangs: what its processors do is left in
# $dir/registers, if $monitor is the socket of QEMU's monitor.
emulate() {
	local emulator start took size=0 changed=$SECONDS rc=0

	: > "$dir"/console
	: > "$dir"/report
	"$@" < /dev/null > "$dir"/emulator 2>&1 &
	emulator=$!
	# shellcheck disable=SC2064
	trap "kill $emulator 2> /dev/null || true" EXIT

	start=$SECONDS
	last() { tail -n 1 "$dir"/console | tr -d '\r' | cut -c1-120; }
	while kill -0 $emulator 2> /dev/null; do
		sleep 0.2
		took=$((SECONDS - start))
		if [ ! -s "$dir"/report ] && [ $took -ge "${BOOT_SECONDS:-120}" ]; then
			die "the kernel did not boot within $took s, its last words: $(last) (see $dir/console)"
		fi
		if [ "$size" != "$(stat -c %s "$dir"/console "$dir"/report | tr '\n' ' ')" ]; then
			size=$(stat -c %s "$dir"/console "$dir"/report | tr '\n' ' ')
			changed=$SECONDS
		elif [ $((SECONDS - changed)) -ge "${STALL_SECONDS:-480}" ]; then
			say "no word from the machine for $((SECONDS - changed)) s (see $dir/registers)"
			[ ! -S "${monitor:-}" ] || registers > "$dir"/registers
			kill $emulator
			wait $emulator || true
			return
		fi
		[ $took -lt "$seconds" ] ||
			die "the tests did not end within $took s, last on the console: $(last) (see $dir/console)"
	done
	wait $emulator || rc=$?
	[ $rc = 0 ] || [ "${EXPECT_PANIC:-}" ] ||
		die "the emulator failed with status $rc: $(tail -n 1 "$dir"/emulator) (see $dir/emulator)"
	[ -s "$dir"/report ] || die "the kernel died before the first test: $(last) (see $dir/console)"
}
