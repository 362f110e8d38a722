"""Hostile programs: each is stopped within its limits, harms nothing outside, and leaves nothing behind.

Every one of them prints DONE when its attack has succeeded. What they attack is real: files, sockets and processes of this
test, which would give way to a program that ran without the sandbox.
"""

import contextlib
import ctypes
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hostile import ENDLESS, GREEDY, INTRUDERS, SECRET

from caftune.errors import CaftuneError
from caftune.evals import sandbox
from caftune.evals.sandbox import Limits, Outcome, run_python

TIGHT = Limits(
    cpu_s=1, wall_s=30.0, memory_bytes=128 << 20, file_bytes=4 << 20, folder_bytes=8 << 20, output_bytes=10_000
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """What the programs attack, and after the tests: that nothing came of it."""
    folder = tmp_path_factory.mktemp("caller")
    (folder / "file").write_text(SECRET)
    tcp, unix, abstract = socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX), f"caller-{os.getpid()}"
    named = socket.socket(socket.AF_UNIX)
    named.bind("\0" + abstract)
    unix.bind(str(folder / "socket"))
    os.environ["CAFTUNE_TEST_SECRET"] = SECRET
    with tcp, unix, named:
        for server in (tcp, unix, named):
            server.listen()
            server.setblocking(False)
        found = {
            "folder": str(folder),
            "file": str(folder / "file"),
            "unix": str(folder / "socket"),
            "abstract": abstract,
        }
        found |= {"caller": os.getpid(), "home": str(Path.home()), "repository": str(Path(__file__).parents[2])}
        at_home = [
            str(path) for path in Path.home().iterdir() if not Path(sys.base_prefix).resolve().is_relative_to(path)
        ]
        yield found | {"at_home": at_home, "port": tcp.getsockname()[1], "secret": SECRET}
        for server in (tcp, unix, named):
            with pytest.raises(BlockingIOError):
                server.accept()
    del os.environ["CAFTUNE_TEST_SECRET"]
    assert run_python("print(sum(range(10)))", limits=Limits()) == Outcome(0, b"45\n", b"")
    assert sorted(path.name for path in folder.iterdir()) == ["file", "socket"]
    assert (folder / "file").read_text() == SECRET
    assert not Path.home().joinpath("of-the-sandbox").exists()


@pytest.fixture(autouse=True)
def adopted():
    """This process adopts whoever is left behind, and after each test has no child that it had not before."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    before, mounts = children(), Path("/proc/self/mounts").read_text()
    yield
    ctypes.CDLL(None).prctl(36, 0, 0, 0, 0)
    assert children() == before
    assert Path("/proc/self/mounts").read_text() == mounts


def children(of=None):
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[1]) == (of or os.getpid()):
                found.add(int(stat.parent.name))
    return found


def reaped(before):
    for process in children() - before:
        os.waitpid(process, os.WNOHANG)
    return children() == before


def aimed(attack, targets):
    for key, value in targets.items():
        attack = attack.replace("{" + key + "!r}", repr(value)).replace("{" + key + "}", str(value))
    return attack


def attacked(attack, limits):
    """The outcome of a hostile program, which must not have succeeded, and the seconds that it took."""
    started = time.monotonic()
    outcome = run_python(f"import os, sys, time\n{attack}\nprint('DONE')", limits=limits)
    assert b"DONE" not in outcome.stdout, outcome
    assert max(len(outcome.stdout), len(outcome.stderr)) <= limits.output_bytes
    return outcome, time.monotonic() - started


@pytest.mark.parametrize("name", ENDLESS)
def test_an_endless_program_is_stopped_and_the_next_one_runs(name):
    limits = replace(TIGHT, wall_s=0.8)
    outcome, took = attacked(ENDLESS[name], limits)
    assert outcome.returncode in (None, -signal.SIGKILL), "of itself it would not have ended"
    assert took < limits.wall_s + 10, "the machine may be busy, but not that busy"
    assert run_python("print(sum(range(10)))", limits=Limits()) == Outcome(0, b"45\n", b"")


@pytest.mark.parametrize("name", GREEDY)
def test_a_greedy_program_ends_by_its_greed_and_the_next_one_runs(name):
    outcome, _ = attacked(GREEDY[name], TIGHT)
    assert outcome.returncode is not None, "its time was up first, and nothing is known of what it wants"
    assert run_python("print(sum(range(10)))", limits=Limits()) == Outcome(0, b"45\n", b"")


@pytest.mark.parametrize("name", INTRUDERS)
def test_an_intruder_is_refused(name, targets):
    # that the next program runs is seen once, when the targets are looked at
    limits = replace(TIGHT, wall_s=1.0) if "killed" in name else TIGHT  # after its attack it waits for the end
    outcome, _ = attacked(aimed(INTRUDERS[name], targets), limits)
    assert limits is not TIGHT or outcome.returncode is not None, "its time was up first"


@pytest.mark.parametrize(
    "name", ["reading /etc/passwd", "a TCP connection", "the inherited environment", "a unix socket"]
)
def test_without_the_sandbox_the_attack_would_succeed(name, targets):
    # those that can be tried without harm: the targets are there
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(targets["folder"] + "/other")
        unix.listen()
        others = {"port": server.getsockname()[1], "unix": targets["folder"] + "/other"}
        program = f"import os, sys, time\n{aimed(INTRUDERS[name], targets | others)}\nprint('DONE')"
        found = subprocess.run([sys.executable, "-c", program], capture_output=True)
    Path(targets["folder"], "other").unlink()
    assert found.stdout == b"DONE\n", found.stderr


def test_the_outcome_says_how_a_program_ended():
    ended = {
        "print('out'); import sys; sys.stderr.write('err')": Outcome(0, b"out\n", b"err"),
        "raise SystemExit(3)": Outcome(3, b"", b""),
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)": Outcome(-signal.SIGTERM, b"", b""),
        "import os; os.abort()": Outcome(-signal.SIGABRT, b"", b""),
    }
    assert {program: run_python(program, limits=Limits()) for program in ended} == ended


def test_cpu_time_ends_with_a_kill_and_wall_time_with_none():
    assert run_python("while True: pass", limits=Limits(cpu_s=1, wall_s=60.0)).returncode == -signal.SIGKILL
    assert run_python("import time; time.sleep(60)", limits=Limits(wall_s=0.5)).returncode is None


def test_output_is_kept_up_to_its_limit_and_the_rest_does_not_stop_the_program():
    limits = Limits(output_bytes=1000)
    outcome = run_python("import sys; print('y' * 10**6); sys.stderr.write('z' * 10**6); sys.exit(7)", limits=limits)
    assert outcome == Outcome(7, b"y" * 1000, b"z" * 1000)


def test_a_program_reads_its_input():
    text = os.urandom(1 << 20)
    copied = run_python(
        "import sys; sys.stdout.buffer.write(sys.stdin.buffer.read())", limits=Limits(output_bytes=2 << 20), stdin=text
    )
    assert copied == Outcome(0, text, b"")


def test_a_program_has_a_folder_to_write_in_that_is_empty_and_its_own():
    program = "import os, tempfile; print(os.getcwd(), os.listdir()); tempfile.mkdtemp(); open('kept', 'w').write('x')"
    assert [run_python(program, limits=Limits()).stdout for _ in range(2)] == [b"/tmp []\n"] * 2


def test_programs_have_the_standard_library_and_nothing_installed():
    program = "import asyncio, ctypes, hashlib, json, sqlite3, ssl, zlib\nasyncio.run(asyncio.sleep(0))\nimport numpy"
    outcome = run_python(program, limits=Limits())
    assert outcome.stderr.endswith(b"ModuleNotFoundError: No module named 'numpy'\n")


def test_a_program_has_no_right_and_gets_none():
    program = """import ctypes
libc, held = ctypes.CDLL(None), (ctypes.c_uint32 * 6)(*[9] * 6)
libc.capget((ctypes.c_uint32 * 2)(0x20080522, 0), held)
print(list(held), sum(libc.prctl(23, n, 0, 0, 0) == 1 for n in range(64)), libc.prctl(39, 0, 0, 0, 0))"""
    assert (
        run_python(program, limits=Limits()).stdout == b"[0, 0, 0, 0, 0, 0] 0 1\n"
    )  # held, to be had, no new privileges


def test_sets_have_one_order():
    assert len({run_python("print({'a', 'b', 'c', 'd', 'e', 'f'})", limits=Limits()).stdout for _ in range(5)}) == 1


def test_processes_and_threads_up_to_the_limit_may_run():
    program = "import os, time\nfor _ in range({}):\n    if not os.fork(): time.sleep(9)\nprint('all')"
    limits = Limits(processes=5)
    assert run_python(program.format(4), limits=limits).stdout == b"all\n"
    assert b"BlockingIOError" in run_python(program.format(5), limits=limits).stderr


def test_many_threads_may_run_programs_at_once():
    def run(number):
        program = (
            f"import os, time\nif not os.fork(): os._exit(0)\nopen('x', 'x').write('{number}')\nprint(open('x').read())"
        )
        return int(run_python(program, limits=replace(Limits(), processes=2)).stdout)

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(run, range(24))) == list(range(24))


@pytest.mark.parametrize(
    "program", ["print('\ud800')", "\0", "def", "print('é" + chr(0x1F600) + "')\nraise SystemExit(5)"]
)
def test_a_program_may_be_any_text(program):
    assert run_python(program, limits=Limits()).returncode in (0, 1, 5)


def test_all_processes_die_with_a_caller_that_is_killed():
    call = "from caftune.evals.sandbox import *; run_python('import time; time.sleep(60)', limits=Limits(wall_s=90.0))"
    caller = subprocess.Popen([sys.executable, "-c", call], cwd=Path(__file__).parents[2])
    within(60, lambda: len(tree(caller.pid)) >= 4)  # caller, launcher, first process, program
    time.sleep(0.5)  # past the self-test, into the program
    within(60, lambda: len(tree(caller.pid)) >= 4)
    left = tree(caller.pid) - {caller.pid}
    caller.kill()
    caller.wait()

    def are_gone():
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        return not any(Path(f"/proc/{process}").exists() for process in left)

    within(30, are_gone)


def tree(process):
    return {process}.union(*(tree(child) for child in children(process)))


def within(seconds, holds):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def altered(folder, old, new):
    """The sandbox and its launcher, with one line of the two changed, as a module of its own."""
    source = Path(sandbox.__file__).parent
    texts = {name: (source / name).read_text() for name in ("sandbox.py", "launcher.py")}
    assert sum(text.count(old) for text in texts.values()) == 1, old
    for name, text in texts.items():
        (folder / name).write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("altered", folder / "sandbox.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["altered"] = module
    spec.loader.exec_module(module)
    return module


PROMISES = {
    "no sockets": ("    _filter_system_calls(seccomp)\n", ""),
    "a limit of its processes": ('order["processes"] + 2', "10_000 + 2"),
    "no files but Python's": ('"/etc/ld.so.cache"', '"/etc/ld.so.cache", "/etc/passwd"'),
    "a separate process table": (" | 0x20000000", ""),
    "libseccomp-absent.so": ("libseccomp.so.2", "libseccomp-absent.so"),
    "cannot forbid sockets": ('"socket ptrace', '"sockets ptrace'),
    "take no users": ('_map", f"0 {own} 1"', '_map", f"0 {own} x"'),
}


@pytest.mark.parametrize("promise", PROMISES)
def test_a_machine_that_does_not_keep_a_promise_is_refused(promise, tmp_path):
    module, before = altered(tmp_path, *PROMISES[promise]), children()
    with pytest.raises(CaftuneError, match=r"must be able to isolate generated code, got: .*") as refused:
        module.run_python("print('ran')", limits=Limits())
    within(20, lambda: reaped(before))  # the altered sandbox can let some live, for a moment
    assert promise in str(refused.value)
    assert "Use Linux 5.14 or newer" in str(refused.value)


def test_other_systems_are_refused(monkeypatch):
    sandbox.check_sandbox.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(CaftuneError, match="this is darwin"):
        run_python("print('ran')", limits=Limits())


@pytest.mark.parametrize("name", ["cpu_s", "wall_s", "memory_bytes", "processes", "output_bytes"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=rf"{name} must be a number > 0, got 0"):
        Limits(**{name: 0})
