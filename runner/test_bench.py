# SPDX-License-Identifier: GPL-2.0
"""
The bench itself: it must not say yes where it should say no, and must leave nothing behind.
No kernel and no emulator is needed: a project of its own in a temporary folder, a few files
in place of a kernel, and a shell script in place of QEMU.
"""
import fcntl
import glob
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import tempfile
import textwrap
import time
import unittest

TOP = pathlib.Path(__file__).resolve().parent.parent
TREE = TOP / "build/linux"

LANES = """
[lane.stub]
kernel = "patched"
machine = "qemu"
text = "a machine that a script plays"
column = "patched"
[[test]]
command = "kvm/first_test"
lanes = ["stub"]
seconds = 1
skips = "Not for this cause"
[[test]]
command = "kvm/second_test"
lanes = ["stub"]
seconds = 1
"""

# What the report of two tests looks like.
HEAD = "KTAP version 1\n1..2\n"
CASES = "# begin first_test\n  TAP version 13\n  # Subtest: first_test\n  1..2\n  ok 1 a\n  ok 2 b # SKIP Not for this cause\n"
FIRST = CASES + "ok 1 first_test # 0.1 s\n"
SECOND = "# begin second_test\nok 2 second_test # 0.2 s\n"
DONE = "# done\n"


class Project(unittest.TestCase):
    """A copy of the scripts, with a cache of its own."""

    def setUp(self):
        self.dir = pathlib.Path(tempfile.mkdtemp(prefix="bench test "))
        self.addCleanup(shutil.rmtree, self.dir, ignore_errors=True)
        self.top = self.dir / "project"
        for name in ("runner", "source", "guest"):
            shutil.copytree(TOP / name, self.top / name)
        shutil.copy(TOP / "lib.sh", self.top)
        (self.top / "lanes.toml").write_text(LANES)
        (self.top / "build").mkdir()
        self.env = {"PATH": os.environ["PATH"], "HOME": str(self.dir), "XDG_CACHE_HOME": str(self.dir / "cache")}
        self.work = self.dir / "cache/stuck-pages/7.3.4"

    def sh(self, command, **env):
        return subprocess.run(["bash", "-c", command], cwd=self.top, env={**self.env, **env}, check=False,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)

    def ok(self, command, **env):
        done = self.sh(command, **env)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done.stdout + done.stderr


class Lanes(Project):
    """What a lane answers, for what its machine does."""

    def setUp(self):
        super().setUp()
        obj = self.work / "linux/obj-patched"
        (obj / "arch/x86/boot").mkdir(parents=True)
        (obj / "arch/x86/boot/bzImage").write_text("kernel")
        (obj / "root/kselftest").mkdir(parents=True)
        (self.top / "build/linux").symlink_to(TREE)

    def stub(self, script):
        """The same emulator each time, whatever it plays."""
        stub = self.dir / "stub"
        if not stub.exists():
            stub.write_text(f"#!/bin/bash\n[ \"$1\" != --version ] || exit\n. '{self.dir}/script'\n")
            stub.chmod(0o755)
        (self.dir / "script").write_text(script)
        return stub

    def boot(self, script, **env):
        """Run the lane on a machine that this script plays; its answer, and all that it said."""
        stub = self.stub(script)
        driver = textwrap.dedent("""
            import asyncio, json, sys
            sys.path.insert(0, "runner")
            import lanes, steps
            async def go():
                run = lanes.Run(lanes.load()["stub"])
                await run.run()
                print("ANSWER", json.dumps([run.passed, run.cached, [r.state for r in run.results], list(run.failures())]))
            sys.exit(steps.main(go()))
        """)
        (self.top / "driver.py").write_text(driver)
        done = self.sh(". ./lib.sh; exec python3 -B driver.py", QEMU=str(stub), **env)
        answer = [line for line in done.stdout.split("\n") if line.startswith("ANSWER ")]
        self.assertTrue(answer, done.stdout + done.stderr)
        passed, cached, states, failures = json.loads(answer[0][7:])
        self.cached, self.states, self.failures = cached, states, " / ".join(failures)
        return passed

    @staticmethod
    def says(report, console="booted\n", then=""):
        quote = lambda s: "'" + s.replace("'", "'\\''") + "'"
        return f"printf %s {quote(console)} > console\nprintf %s {quote(report)} > report\n{then}\n"

    def test_all_pass(self):
        self.assertTrue(self.boot(self.says(HEAD + FIRST + SECOND + DONE)), self.failures)
        self.assertEqual(self.states, ["ok", "ok"])

    def test_a_failure(self):
        self.assertFalse(self.boot(self.says(HEAD + FIRST + SECOND.replace("ok 2", "not ok 2") + DONE)))

    def test_a_control_may_fail_but_must_end(self):
        lanes = self.top / "lanes.toml"
        lanes.write_text(LANES.replace('column = "patched"', "control = true"))
        self.assertTrue(self.boot(self.says(HEAD + FIRST + SECOND.replace("ok 2", "not ok 2") + DONE)), self.failures)
        self.assertFalse(self.boot(self.says(HEAD + FIRST), FORCE="1"))

    def test_a_case_fails_and_the_program_does_not_notice(self):
        self.assertFalse(self.boot(self.says(HEAD + FIRST.replace("ok 1 a", "not ok 1 a") + SECOND + DONE)))

    def test_a_case_is_missing(self):
        self.assertFalse(self.boot(self.says(HEAD + FIRST.replace("  ok 1 a\n", "") + SECOND + DONE)))

    def test_skipped_for_another_reason(self):
        self.assertFalse(self.boot(self.says(HEAD + FIRST.replace("Not for this cause", "No /dev/kvm") + SECOND + DONE)))
        self.assertIn("No /dev/kvm", self.failures)

    def test_a_case_of_that_name_in_another_test(self):
        lanes = self.top / "lanes.toml"
        lanes.write_text(LANES + 'skips = "Not for this cause"\n')
        second = SECOND.replace("test\nok", "test\n  TAP version 13\n  # Subtest: second_test\n  1..1\n"
                                "  ok 1 b # SKIP No /dev/kvm\nok")
        self.assertFalse(self.boot(self.says(HEAD + FIRST + second + DONE)))
        self.assertIn("No /dev/kvm", self.failures)

    def test_a_whole_program_skips(self):
        report = HEAD + FIRST + "# begin second_test\nok 2 second_test # SKIP\n" + DONE
        self.assertFalse(self.boot(self.says(report)))

    def test_a_splat_nobody_announced(self):
        for splat in ("WARNING: mm/x.c:1 at f", "mce: [Hardware Error]: CPU 0", "pagealloc: memory corruption",
                      "UBSAN: shift-out-of-bounds"):
            self.assertFalse(self.boot(self.says(HEAD + FIRST + SECOND + DONE, f"[ 1.0] {splat}\n")), splat)

    def test_the_machine_dies(self):
        console = "[ 1.0] lane: begin second_test\n[ 2.0] Kernel panic - not syncing: oops\n"
        self.assertFalse(self.boot(self.says(HEAD + FIRST + "# begin second_test\n", console)))
        self.assertEqual(self.states, ["ok", "FAIL"])
        self.assertIn("second_test: [ 2.0] Kernel panic", self.failures)

    def test_it_dies_and_the_rest_never_runs(self):
        self.assertFalse(self.boot(self.says(HEAD + CASES)))
        self.assertEqual(self.states, ["FAIL", "not run"])

    def test_it_hangs_and_ignores_sigterm(self):
        hang = "trap '' TERM\necho $$ > ../../../pid\nwhile :; do sleep 0.1; done"
        self.assertFalse(self.boot(self.says(HEAD + FIRST + "# begin second_test\n", then=hang), STALL_SECONDS="2"))
        self.assertIn("hung, in second_test", self.failures)
        self.assertFalse(alive(self.top / "pid"))

    def test_passes_are_kept_failures_are_not(self):
        good = self.says(HEAD + FIRST + SECOND + DONE)
        self.assertFalse(self.boot(self.says(HEAD + FIRST + DONE)))
        self.assertTrue(self.boot(good))
        self.assertFalse(self.cached, "the failure was kept")
        self.assertTrue(self.boot("exit 1"))
        self.assertTrue(self.cached)
        self.assertFalse(self.boot("exit 1", FORCE="1"))
        lanes = self.top / "lanes.toml"
        stub = self.dir / "stub"
        for what, change in (
                ("kernel", lambda: (self.work / "linux/obj-patched/arch/x86/boot/bzImage").write_text("another")),
                ("modules", lambda: (self.work / "linux/obj-patched/root/module").write_text("another")),
                ("parameters", lambda: lanes.write_text(LANES.replace("column", 'parameters = ["quiet"]\ncolumn'))),
                ("emulator's version", lambda: stub.write_text(stub.read_text().replace("|| exit", "|| { echo version 2; exit; }"))),
                ("emulator", lambda: os.utime(stub))):
            change()
            self.assertTrue(self.boot(good))
            self.assertFalse(self.cached, f"another {what}, and the old result")
            self.assertTrue(self.boot("exit 1"))
            self.assertTrue(self.cached)

    def test_it_has_to_say_that_it_is_done(self):
        self.assertFalse(self.boot(self.says(HEAD + FIRST + SECOND)))
        self.assertFalse(self.boot(self.says(HEAD + FIRST + SECOND + DONE, then="exit 1")))

    def test_a_failure_is_not_tried_again(self):
        again = "echo >> ../../../count; [ $(wc -l < ../../../count) = 2 ] || exit\n"
        self.assertFalse(self.boot(again + self.says(HEAD + FIRST + SECOND + DONE)))
        self.assertEqual((self.top / "count").read_text(), "\n")

    def test_a_reset_leaves_a_corpse(self):
        monitor = textwrap.dedent("""
            import re, socket, sys
            with socket.socket(socket.AF_UNIX) as s:
                s.bind(re.search("path=([^,]*)", " ".join(sys.argv))[1])
                s.listen()
                while True:
                    with s.accept()[0] as c, c.makefile() as f:
                        c.sendall(b"(qemu) ")
                        for line in f:
                            if line == "quit\\n":
                                sys.exit()
                            c.sendall(b"VM status: paused (shutdown)\\n(qemu) ")
        """)
        (self.dir / "monitor.py").write_text(monitor)
        before = set(glob.glob("/tmp/stuck-*"))
        play = f"exec python3 -B '{self.dir}/monitor.py' \"$@\""
        self.assertFalse(self.boot(self.says(HEAD + FIRST, then=play)))
        self.assertIn("the machine was reset", self.failures)
        self.assertIn("info lapic 0", (self.top / "build/qemu/stub/registers").read_text())
        self.assertEqual(set(glob.glob("/tmp/stuck-*")) - before, set())
        # Which the next run does not take away.
        (self.top / "build/qemu/stub/vmcore").write_text("memory")
        # One that ended is no corpse.
        self.assertTrue(self.boot(self.says(HEAD + FIRST + SECOND + DONE, then=play)), self.failures)
        self.assertEqual(len(list((self.top / "build/died").glob("*-stub/vmcore"))), 1)

    def test_one_program_twice(self):
        lanes = self.top / "lanes.toml"
        lanes.write_text(LANES.replace("kvm/second_test", "kvm/first_test -x"))
        with self.assertRaises(AssertionError) as said:
            self.boot("exit 1")
        self.assertIn("first_test is in the lane stub twice", str(said.exception))

    def kunit(self, console):
        """The states that are read from a console."""
        (self.top / "console").write_text(console)
        driver = textwrap.dedent("""
            import sys
            sys.path.insert(0, "runner")
            import lanes
            run = lanes.Run(lanes.load()["stub"])
            with open("console") as f:
                run.read_kunit(f.read().split("\\n"))
            print(*(r.state for r in run.results))
        """)
        (self.top / "driver.py").write_text(driver)
        return self.ok(". ./lib.sh; exec python3 -B driver.py").split()

    def test_kunit(self):
        head = "[ 1.0] KTAP version 1\n[ 1.0] 1..2\n"
        suite = "[ 1.0]     KTAP version 1\n[ 1.0]     # Subtest: {0}\n[ 1.0]     1..1\n[ 1.0]     ok 1 a\n[ 1.0] ok {1} {0}\n"
        one, two = suite.format("one", 1), suite.format("two", 2)
        self.assertEqual(self.kunit(head + one + two), ["ok", "ok"])
        for console in ("", head + one, head + one + "[ 1.0] not ok 2 two\n", head + one + two.replace("ok 1 a", "not ok 1 a"),
                        head + one + two.replace("] ok 2", "] not ok 2"),
                        head + one + two.replace("ok 1 a", "ok 1 a # SKIP needs two CPUs")):
            self.assertIn("FAIL", self.kunit(console), console)

    def test_names_that_there_are_not(self):
        for arguments, said in (("--test none_test", "no test none_test"), ("--test first_test --on none", "no lane none"),
                                ("", "say which test")):
            self.assertIn(said, self.sh(f". ./lib.sh; cd runner; exec python3 -B . test {arguments}").stderr)
        lanes = self.top / "lanes.toml"
        lanes.write_text(LANES + LANES.replace("lane.stub", "lane.td").replace('lanes = ["stub"]', 'lanes = ["td"]')
                         .replace("kvm/first_test", "td/td_test").replace('column = "patched"', 'launches = "stub"'))
        self.assertIn("in the lanes: td", self.sh(". ./lib.sh; cd runner; exec python3 -B . test --test td_test --on stub").stderr)
        lanes.write_text(LANES.replace('column = "patched"', "kunit = true"))
        self.assertIn("is for KUnit", self.sh(". ./lib.sh; cd runner; exec python3 -B . test --test first_test").stderr)

    def test_an_emulator_that_is_not_there(self):
        self.assertIn("BOCHS=/none is not a program", self.sh(". ./lib.sh; cd runner; exec python3 -B . tree", BOCHS="/none").stderr)
        self.assertIn("error: BOOT_SECONDS=1m is no number of seconds",
                      self.sh(". ./lib.sh; cd runner; exec python3 -B . tree", BOOT_SECONDS="1m").stderr)

    def test_one_at_a_time(self):
        self.ok(". ./lib.sh; true")
        lock = self.dir / "cache/stuck-pages/lock"
        with open(lock, "w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            print("process 4711, since noon", file=f, flush=True)
            with subprocess.Popen(["bash", "-c", ". ./lib.sh; cd runner; exec python3 -B . tree"], cwd=self.top, env=self.env,
                                  text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as p:
                self.assertIn("process 4711", p.stdout.readline())
                p.send_signal(signal.SIGINT)
                self.assertEqual(p.communicate(timeout=20)[0], "interrupted\n")

    def test_nothing_is_left_after_a_signal(self):
        self.boot(self.says(HEAD + FIRST + SECOND + DONE))
        stub = self.stub("trap '' TERM HUP INT\necho $$ > ../../../pid\nwhile :; do sleep 0.1; done\n")
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL):
            (self.top / "pid").unlink(missing_ok=True)
            with subprocess.Popen(["bash", "-c", ". ./lib.sh; exec python3 -B driver.py"], cwd=self.top, text=True,
                                  env={**self.env, "QEMU": str(stub), "FORCE": "1"}, start_new_session=True,
                                  stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as p:
                wait_for(lambda: (self.top / "pid").exists() and (self.top / "pid").read_text())
                p.send_signal(number)
                # The pipe ends: nobody holds it any more.
                p.communicate(timeout=20)
            wait_for(lambda: not alive(self.top / "pid"))
            # A child of a machine may take a moment.
            self.ok(f"flock -w 5 '{self.dir}/cache/stuck-pages/lock' true")

    def test_what_goes_on_keeps_the_lock(self):
        (self.top / "driver.py").write_text(textwrap.dedent("""
            import sys
            sys.path.insert(0, "runner")
            import steps
            sys.exit(steps.main(steps.step("x", "x", ["bash", "-c", "sleep 100 & echo $! > pid; wait"])))
        """))
        with subprocess.Popen(["bash", "-c", ". ./lib.sh; exec python3 -B driver.py"], cwd=self.top, env=self.env,
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as p:
            wait_for(lambda: (self.top / "pid").exists() and (self.top / "pid").read_text())
            p.kill()
        lock = f"'{self.dir}/cache/stuck-pages/lock'"
        self.assertNotEqual(self.sh(f"flock -w 1 {lock} true").returncode, 0)
        os.kill(int((self.top / "pid").read_text()), signal.SIGKILL)
        self.ok(f"flock -w 5 {lock} true")

    def test_a_step_that_ends_leaves_no_child(self):
        (self.top / "driver.py").write_text(textwrap.dedent("""
            import asyncio, sys
            sys.path.insert(0, "runner")
            import steps
            sys.exit(steps.main(steps.step("x", "x", ["bash", "-c", "sleep 100 & echo $! > pid"])))
        """))
        start = time.monotonic()
        self.ok(". ./lib.sh; exec python3 -B driver.py | cat")
        self.assertLess(time.monotonic() - start, 20)
        self.assertFalse(alive(self.top / "pid"))


class Source(Project):
    """build/linux and patches/, from one to the other, and the user's own settings."""

    def setUp(self):
        super().setUp()
        self.kernel = self.dir / "a kernel"
        self.make_kernel(self.kernel)
        self.lay(self.kernel)

    def make_kernel(self, path):
        (path / "virt/kvm").mkdir(parents=True)
        (path / "virt/kvm/guest_memfd.c").write_text("".join(f"{n}\n" for n in range(1, 10)))
        (path / ".gitignore").write_text("")
        (path / "Makefile").write_text("kernelversion:\n\t@echo 7.3.4\nmrproper:\n")

    def lay(self, kernel):
        """Two patches in two parts, made as people make them."""
        self.ok("mkdir -p patches; touch patches/series; source/fetch && source/tree", KERNEL=str(kernel))
        git = "cd build/linux; git config user.name me; git config user.email me@localhost; "
        self.ok(git + "git commit -q --allow-empty -m 'Cover\n\nWords.\n\nPart: one'; echo four >> virt/kvm/guest_memfd.c; "
                "git commit -qam 'KVM: Four'; git commit -q --allow-empty -m 'Cover 2\n\nPart: two'; "
                "echo five >> virt/kvm/guest_memfd.c; git commit -qam 'KVM: Five'")
        self.ok("source/export", KERNEL=str(kernel))

    def patches(self):
        return {str(p.relative_to(self.top)): p.read_text() for p in (self.top / "patches").rglob("*") if p.is_file()}

    def tree(self, **env):
        return self.sh("source/fetch && source/tree", KERNEL=str(self.kernel), **env)

    def test_round_trip(self):
        before = self.patches()
        self.assertEqual(len(before), 6)
        shutil.rmtree(self.top / "build")
        self.assertEqual(self.tree().returncode, 0)
        self.ok("source/export", KERNEL=str(self.kernel))
        self.assertEqual(self.patches(), before)

    def test_an_interrupted_tree_loses_nothing(self):
        before = self.patches()
        shutil.rmtree(self.top / "build")
        # git am dies half-way.
        git = self.dir / "bin/git"
        git.parent.mkdir()
        git.write_text("#!/bin/bash\nif [ \"$1\" = am ]; then " + shutil.which("git") +
                       " am -q --empty=keep \"${@:4:2}\"; kill -9 $PPID; fi\nexec " + shutil.which("git") + " \"$@\"\n")
        git.chmod(0o755)
        lib = (self.top / "lib.sh").read_text()
        (self.top / "lib.sh").write_text(lib.replace("export PATH=", f"export PATH='{git.parent}':"))
        self.assertNotEqual(self.tree().returncode, 0)
        (self.top / "lib.sh").write_text(lib)
        self.assertNotEqual(self.sh("source/export", KERNEL=str(self.kernel)).returncode, 0)
        self.assertEqual(self.patches(), before)
        self.assertEqual(self.tree().returncode, 0)
        self.ok("source/export", KERNEL=str(self.kernel))
        self.assertEqual(self.patches(), before)

    def test_export_refuses_what_loses_patches(self):
        before = self.patches()
        self.ok("cd build/linux; git reset -q --hard HEAD^")
        self.assertNotEqual(self.sh("source/export", KERNEL=str(self.kernel)).returncode, 0)
        self.assertEqual(self.patches(), before)
        self.ok("source/export", KERNEL=str(self.kernel), DROP="1")
        self.assertEqual(len(self.patches()), 5)

    def test_export_refuses_fewer_parts(self):
        before = self.patches()
        self.ok("cd build/linux; git rebase -q --no-keep-empty --onto HEAD~2 HEAD~1; echo six >> virt/kvm/guest_memfd.c; "
                "git commit -qam Six")
        self.assertIn("1 cover letters", self.sh("source/export", KERNEL=str(self.kernel)).stderr)
        self.assertEqual(self.patches(), before)

    def test_export_refuses_to_take_back_what_was_pulled(self):
        self.ok("cd build/linux; echo six >> virt/kvm/guest_memfd.c; git commit -qam Six")
        (self.top / "patches/one/pulled").write_text("x")
        before = self.patches()
        self.assertIn("git pull", self.sh("source/export", KERNEL=str(self.kernel)).stderr)
        self.assertEqual(self.patches(), before)
        self.ok("source/export", KERNEL=str(self.kernel), DROP="1")
        self.assertNotIn("patches/one/pulled", self.patches())

    def test_a_repair_of_patches_stays(self):
        part = self.top / "build/linux.part"
        patch = next((self.top / "patches/two").glob("0001-*"))
        patch.write_text(patch.read_text().replace("\n four", "\n 4"))
        self.assertIn("does not apply", self.tree().stderr)
        # Nobody has repaired anything yet.
        self.assertIn("does not apply", self.tree().stderr)
        self.ok("cd build/linux.part; echo five >> virt/kvm/guest_memfd.c; git add -A")
        self.assertIn("a repair in it", self.tree().stderr)
        # As it says.
        self.ok("cd build/linux.part; git config user.name me; git config user.email me@localhost; "
                "git am --continue --empty=keep")
        self.assertIn("a repair in it", self.tree().stderr)
        shutil.rmtree(self.top / "build/linux")
        part.rename(self.top / "build/linux")
        self.ok("source/export", KERNEL=str(self.kernel))
        self.assertIn("\n four", next((self.top / "patches/two").glob("0001-*")).read_text())

    def test_what_make_tree_has_not_laid_out_stays(self):
        linux = self.top / "build/linux"
        shutil.rmtree(linux)
        linux.mkdir()
        (linux / ".git").write_text("gitdir: elsewhere")
        self.assertIn("move it away", self.tree().stderr)
        self.assertIn("not laid it out", self.sh("source/export", KERNEL=str(self.kernel)).stderr)
        self.assertTrue((linux / ".git").exists())

    def test_what_was_written_and_taken_back_stays(self):
        shutil.copytree(self.top / "patches", self.top / "before")
        self.ok("cd build/linux; echo six >> virt/kvm/guest_memfd.c; git commit -qam Six")
        self.ok("source/export", KERNEL=str(self.kernel))
        shutil.rmtree(self.top / "patches")
        (self.top / "before").rename(self.top / "patches")
        previous = re.search(r"refs/previous/\S+", self.tree().stderr)[0]
        self.assertNotIn("six", (self.top / "build/linux/virt/kvm/guest_memfd.c").read_text())
        self.assertIn("six", self.ok(f"cd build/linux; git show {previous}:virt/kvm/guest_memfd.c"))
        # When it happens again, too.
        next((self.top / "patches/two").glob("0001-*")).unlink()
        self.ok("sed -i /two.0001/d patches/series")
        self.assertEqual(self.tree().returncode, 0)
        self.assertIn("six", self.ok(f"cd build/linux; git show {previous}:virt/kvm/guest_memfd.c"))

    def test_clean_takes_no_work_away(self):
        linux, old = self.top / "build/linux", self.top / "build/linux.old"
        # A tree that was moved away, as make tree advises, is as good as any.
        for change in ("git commit -q --allow-empty -m x", "echo six >> virt/kvm/guest_memfd.c",
                       "git checkout -q -b mine; git commit -q --allow-empty -m x; git checkout -q series",
                       "git checkout -q --detach; git commit -q --allow-empty -m x; git tag mine; git checkout -q series",
                       "rm -rf .git; echo gitdir: elsewhere > .git", "cp .git/laid-out .git/stopped; cd ..; mv linux.old linux.part"):
            self.ok(f"cp -r build/linux build/linux.old; cd build/linux.old; git config user.name me; git config user.email me@x; {change}")
            self.assertIn("error: build/linux.", self.sh("source/clean").stderr, change)
            self.assertTrue(linux.exists())
            shutil.rmtree(old, ignore_errors=True)
        shutil.rmtree(self.top / "build/linux.part")
        lock = self.dir / "cache/stuck-pages/lock"
        with open(lock, "w") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            print("process 4711, since noon", file=f, flush=True)
            self.assertIn("process 4711", self.sh("source/clean cache").stderr)
        self.ok("source/clean cache")
        self.assertFalse((self.top / "build").exists() or lock.parent.exists())
        self.ok("source/clean cache")
        self.assertFalse((self.top / "build").exists())

    def test_the_users_quilt_and_another_kernel(self):
        shutil.copytree(TOP / "checks", self.top / "checks")
        (self.dir / ".quiltrc").write_text("QUILT_PATCHES=debian/patches\n")
        self.ok("checks/round-trip", KERNEL=str(self.kernel))
        # Another release, where what the series touches is elsewhere.
        source = self.kernel / "virt/kvm/guest_memfd.c"
        source.write_text("zero\n" + source.read_text())
        self.assertEqual(self.tree().returncode, 0)
        self.ok("checks/round-trip", KERNEL=str(self.kernel))
        self.ok("cd build/linux; git config user.name me; git config user.email me@x; echo six >> virt/kvm/guest_memfd.c; "
                "git commit -qa --amend --no-edit")
        self.assertIn("not what build/linux has", self.sh("checks/round-trip", KERNEL=str(self.kernel)).stderr)

    def test_export_refuses_in_the_middle_of_a_rebase(self):
        self.sh("cd build/linux; git rebase -q -x false HEAD~1")
        self.assertIn("in the middle", self.sh("source/export", KERNEL=str(self.kernel)).stderr)

    def test_work_of_ones_own_stays(self):
        self.ok("cd build/linux; echo six >> virt/kvm/guest_memfd.c; git commit -qam Six")
        (self.top / "patches/series").write_text("# changed\n" + (self.top / "patches/series").read_text())
        self.assertIn("leaving it as it is", self.tree().stderr)
        self.assertIn("six", (self.top / "build/linux/virt/kvm/guest_memfd.c").read_text())

    def test_branches_of_ones_own_stay(self):
        changed = "# changed\n" + (self.top / "patches/series").read_text()
        self.ok("cd build/linux; git checkout -qb mine; git commit -q --allow-empty -m x; git checkout -q series")
        (self.top / "patches/series").write_text(changed)
        self.assertIn("branches, tags or stashes", self.tree().stderr)
        self.ok("cd build/linux; git branch -D mine; echo six >> virt/kvm/guest_memfd.c; git stash")
        self.assertIn("branches, tags or stashes", self.tree().stderr)
        self.ok("cd build/linux; git stash drop")
        self.sh("cd build/linux; git rebase -q -x false HEAD~1")
        self.assertIn("in the middle", self.tree().stderr)
        self.ok("cd build/linux; git rebase --abort")
        self.assertNotIn("leaving it", self.tree().stderr)

    def test_another_kernel_is_another_kernel(self):
        other = self.dir / "other"
        self.make_kernel(other)
        text = (other / "virt/kvm/guest_memfd.c").read_text()
        (other / "virt/kvm/guest_memfd.c").write_text("zero\n" + text)
        self.kernel = other
        self.assertEqual(self.tree().returncode, 0)
        self.assertIn("zero", (self.top / "build/linux/virt/kvm/guest_memfd.c").read_text())
        # As it is now, not as it was.
        (other / "virt/kvm/guest_memfd.c").write_text("minus\nzero\n" + text)
        self.assertEqual(self.tree().returncode, 0)
        self.assertIn("minus", (self.top / "build/linux/virt/kvm/guest_memfd.c").read_text())

    def test_old_states_of_a_kernel_go(self):
        other = self.dir / "other"
        self.make_kernel(other)
        cache = self.dir / "cache/stuck-pages"
        (first,) = cache.glob("own-*")
        states = []
        for number in range(4):
            (other / "Makefile").write_text((other / "Makefile").read_text() + "\n")
            self.ok("source/fetch", KERNEL=str(other))
            states += {*cache.glob("own-*")} - {first, *states}
            self.assertEqual({*cache.glob("own-*")}, {first, *states[-2:]})

    def test_a_git_tree_is_taken_with_what_is_not_committed(self):
        self.ok(f"cd '{self.kernel}'; git init -q .; git add -A; git -c user.name=x -c user.email=x commit -qm x; "
                "sed -i 1s/^/dirty\\\\n/ virt/kvm/guest_memfd.c")
        self.assertEqual(self.tree().returncode, 0)
        self.assertIn("dirty", (self.top / "build/linux/virt/kvm/guest_memfd.c").read_text())

    def test_a_kernel_that_is_not_there(self):
        self.assertIn("there is no such tree", self.sh("source/fetch", KERNEL="kernel8").stderr)

    def test_the_users_settings_change_nothing(self):
        before = self.patches()
        (self.dir / ".gitconfig").write_text("[format]\ncoverLetter = auto\nfrom = A <a@b>\n[commit]\ngpgsign = true\n"
                                             "[diff]\nnoprefix = true\n[core]\nabbrev = 7\nhooksPath = /nonexistent\n")
        shutil.rmtree(self.top / "build")
        done = self.tree(GIT_DIR="/nonexistent", ARCH="arm64", GIT_AUTHOR_DATE="2001-01-01T00:00:00Z")
        self.assertEqual(done.returncode, 0, done.stderr)
        self.ok("source/export", KERNEL=str(self.kernel))
        self.assertEqual(self.patches(), before)
        names = ("ARCH CROSS_COMPILE LLVM CC LD HOSTCC LOCALVERSION EXTRA_CFLAGS CPATH SPHINXOPTS MAKEFLAGS MFLAGS MAKELEVEL "
                 "MAKEOVERRIDES DEBUG V W C O M KBUILD_VERBOSE KCFLAGS CCACHE_DISABLE QUILT_PATCHES GIT_DIR").split()
        said = "\n" + self.ok(". ./lib.sh; env", **{name: "x" for name in names})
        for name in names:
            self.assertNotIn(f"\n{name}=x", said)

    def test_without_home(self):
        env = dict(self.env)
        del env["HOME"]
        subprocess.run(["bash", "-c", ". ./lib.sh"], cwd=self.top, env=env, check=True)


class Verdict(Project):
    """v7.3.4 has to fail, the series must not."""

    def linux(self, old, new):
        """What the verdict finds wrong, if so many pages of a Linux TD come into wrong hands."""
        for folder, wrong in (("old", old), ("new", new)):
            (self.top / folder).mkdir(exist_ok=True)
            (self.top / folder / "report").write_text("# begin linux_td_test\r\n" + "".join(
                f"# {name}-hits 1\r\n# {name}-marked 1\r\n# {name}-wrong {wrong}\r\n"
                for name in ("busy", "BLOCK", "TRACK", "REMOVE", "WBINVD")) + "ok 1 linux_td_test\r\n")
        driver = textwrap.dedent("""
            import sys, types
            sys.path.insert(0, "runner")
            import verdict
            print(verdict.linux([types.SimpleNamespace(folder=name) for name in ("old", "new")])[1])
        """)
        (self.top / "driver.py").write_text(driver)
        return self.sh(". ./lib.sh; exec python3 -B driver.py").stdout.strip()

    def test_linux(self):
        self.assertEqual(self.linux(2, 0), "None")
        self.assertIn("does not test anything", self.linux(0, 0))
        self.assertIn("wrong hands", self.linux(2, 1))

    def problem(self, **changes):
        """What the verdict finds wrong, in reports of which some numbers differ."""
        driver = textwrap.dedent("""
            import sys, types
            sys.path.insert(0, "runner")
            import verdict
            lines, problem = verdict.verdict([types.SimpleNamespace(lane=types.SimpleNamespace(name=name), folder=name)
                                              for name in ("td-base", "td", "td-inplace")])
            print(problem, *lines, sep="\\n")
        """)
        numbers = {"injected": 4, "stuck": 4, "marked": 4, "freed": 0, "handed-out": 0, "handed-out-dirty": 0, "written": 0,
                   "given-twice": 0, "lost-tdr": 1}
        base = {"marked": 0, "freed": 4, "handed-out": 3, "violations": 2}
        table = "  # table\n  # head\n  # head\n  # table end\n"
        for lane in "td-base", "td", "td-inplace":
            text = ""
            for test in "tdx_stuck_hugepages_test", "tdx_fail_each_test", "tdx_stuck_pages_test":
                if test == "tdx_stuck_hugepages_test" and lane != "td-inplace":
                    continue
                text += f"# begin {test}\r\n" + table * (3 if test == "tdx_stuck_hugepages_test" else 1)
                values = {"lives": 5, "violations": 0} if test == "tdx_fail_each_test" else dict(numbers)
                values |= {k: v for k, v in base.items() if k in values and lane == "td-base"}
                values |= {k: v for k, v in changes.get(f"{lane}:{test}", {}).items() if k in values}
                text += "".join(f"  # {name} {n}\r\n" for name, n in values.items()) + f"ok 1 {test}\r\n"
            (self.top / lane).mkdir(exist_ok=True)
            (self.top / lane / "report").write_text(text)
        (self.top / "driver.py").write_text(driver)
        return self.sh(". ./lib.sh; exec python3 -B driver.py").stdout.split("\n")

    def test_as_it_should_be(self):
        said = self.problem()
        self.assertEqual(said[0], "None")
        self.assertIn("Pages of 2M, which v7.3.4 does not have:", said)

    def test_v734_does_not_fail(self):
        self.assertIn("does not test anything", self.problem(**{"td-base:tdx_stuck_pages_test": {"handed-out": 0}})[0])
        self.assertIn("does not test anything", self.problem(**{"td-base:tdx_fail_each_test": {"violations": 0}})[0])

    def test_the_series_fails(self):
        self.assertIn("(lane td)", self.problem(**{"td:tdx_fail_each_test": {"violations": 1}})[0])
        for what in "freed", "handed-out", "handed-out-dirty", "written", "given-twice":
            self.assertIn("(lane td-inplace, 2M)", self.problem(**{"td-inplace:tdx_stuck_hugepages_test": {what: 1}})[0], what)
        self.assertIn("not each page", self.problem(**{"td-inplace:tdx_stuck_hugepages_test": {"marked": 3}})[0])


class Cost(Project):
    """The limit for what healthy paths cost."""

    def too_much(self, series, name="punch", size=2 << 20):
        """What is said of a path that takes 1000 instructions on v7.3.4."""
        driver = textwrap.dedent("""
            import os, sys, types
            sys.path.insert(0, "runner")
            import cost
            print(*cost.report([types.SimpleNamespace(lane=types.SimpleNamespace(name=name), folder=name)
                                for name in ("cost-base", "cost", "cost-inplace")])[2], sep="\\n")
        """)
        for lane, n in ("cost-base", 1000), ("cost", series), ("cost-inplace", 5000):
            (self.top / lane).mkdir(exist_ok=True)
            lines = [f"# cost {other} {other_size} 1000\r\n" for other in (
                "pre-fault,absent", "pre-fault,present", "guest-fault,absent", "guest-fault,present", "close", "punch")
                     for other_size in (4096, 2 << 20) if (other, other_size) != (name, size)]
            folios = [f"# cost {p}:{other} {2 << 20} 5\n" for p in ("4K", "2M") for other in (
                "absent", "present", "to-shared", "to-private", "to-shared,first", "to-shared,next", "punch-4K", "close", "close,poisoned",
                "poisoned,0", "poisoned,1", "poisoned,16", "poisoned,256", "zap,0-stuck", "zap,512-stuck", "close,stuck", "close,again")]
            (self.top / lane / "report").write_text("".join([*lines, f"# cost {name} {size} {n}\r\n", *folios]))
        (self.top / "driver.py").write_text(driver)
        return self.sh(". ./lib.sh; exec python3 -B driver.py")

    def test_as_before(self):
        result = self.too_much(1010)
        self.assertEqual((result.returncode, result.stdout.strip()), (0, ""), result)

    def test_two_percent_more(self):
        for name in "punch", "pre-fault,absent":
            said = self.too_much(1020, name).stdout
            self.assertIn("1020 instructions, 1000 on v7.3.4", said)
            self.assertIn("2 MiB", said)

    def test_no_limit_for_a_system_call(self):
        result = self.too_much(1020, size=4096)
        self.assertEqual((result.returncode, result.stdout.strip()), (0, ""), result)

    def test_something_was_not_counted(self):
        self.too_much(1000)
        (self.top / "cost/report").write_text("# begin cost\n")
        done = self.sh(". ./lib.sh; exec python3 -B driver.py")
        self.assertNotEqual(done.returncode, 0)
        self.assertIn("nothing was counted", done.stderr)


def alive(pidfile):
    pid = pidfile.read_text().strip()
    try:
        state = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise AssertionError("waited in vain")
        time.sleep(0.05)


if __name__ == "__main__":
    unittest.main()
