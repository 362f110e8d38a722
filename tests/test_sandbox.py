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

from caftune.evals import sandbox
from caftune.evals.sandbox import Limits, Outcome, run_python
from caftune.evals.task import TaskError

TIGHT = Limits(
    cpu_s=1, wall_s=3.0, memory_bytes=256 << 20, file_bytes=4 << 20, folder_bytes=8 << 20, output_bytes=10_000
)
SECRET = "the-secret-of-the-caller"

HOSTILE = {
    "a fork bomb": """
while True:
    try: os.fork()
    except OSError: pass
""",
    "a fork bomb that sleeps": "while os.fork() >= 0: pass",
    "a thread bomb": "import threading\nwhile True: threading.Thread(target=time.sleep, args=[60]).start()",
    "a memory bomb": "held = bytearray(1 << 34)",
    "a memory bomb in small pieces": "held = []\nwhile True: held.append(bytearray(1 << 20))",
    "a memory bomb of many processes": """
for _ in range(100):
    if os.fork() == 0: held = [bytearray(1 << 20) for _ in range(10_000)]
""",
    "an infinite loop": "while True: pass",
    "a sleep without end": "time.sleep(10**6)",
    "a loop that ignores every signal": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
    "a zip bomb": """
import zlib
packer = zlib.compressobj()
packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(1024)) + packer.flush()
zlib.decompress(packed)
""",
    "recursion without end": "sys.setrecursionlimit(10**9)\ndeep = lambda: [deep()]\ndeep()",
    "recursion until the stack is gone": """
sys.setrecursionlimit(10**9)
nest = []
for _ in range(10**6): nest = [nest]
repr(nest)
""",
    "a read of the address 0": "import ctypes\nctypes.string_at(0)",
    "higher limits": "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))",
    "higher limits of CPU time": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))",
    # output and files
    "huge output": "while True: os.write(1, b'x' * 10**6)",
    "huge errors": "while True: os.write(2, b'x' * 10**6)",
    "a huge file": "file = open('/tmp/huge', 'wb')\nwhile True: file.write(bytes(1 << 20))",
    "many large files": "for n in range(100): open(f'/tmp/{n}', 'wb').write(bytes(1 << 20))",
    "many files": "for n in range(5000): open(f'/tmp/{n}', 'w').close()",
    "a huge sparse file": "os.truncate(os.open('/tmp/huge', os.O_CREAT | os.O_RDWR), 1 << 40)",
    "files in memory": "os.memfd_create('x')",
    "shared memory": "import ctypes\nassert ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0",
    "reading /etc/passwd": "open('/etc/passwd').read()",
    "reading the caller's file": "open({file!r}).read()",
    "reading the repository": "open({repository!r} + '/pyproject.toml').read()",
    "files of the home folder": "assert any(os.path.exists(path) for path in {at_home!r})",
    "a link out of the folder": "os.symlink({file!r}, '/tmp/link')\nopen('/tmp/link').read()",
    "a way up out of the folder": "os.chdir('/')\nopen('../../../../../..' + {file!r}).read()",
    "writing into the home folder": "open({home!r} + '/of-the-sandbox', 'w')",
    "writing into the caller's folder": "open({folder!r} + '/of-the-sandbox', 'w')",
    "writing into the caller's file": "open({file!r}, 'a').write('of the sandbox')",
    "writing beside its folder": "open('/of-the-sandbox', 'w')",
    "writing into Python's library": "open(os.__file__, 'a')",
    "writing into its own program": "open(__file__, 'a')",
    "deleting its folder": "os.rmdir('/tmp')",
    "deleting everything": "import shutil\nshutil.rmtree('/')",
    "taking over files": "os.chown('/program.py', os.getuid(), os.getgid())",
    "opening its program to others": "os.chmod('/program.py', 0o777)",
    "device files": "import stat\nos.mknod('/tmp/disk', stat.S_IFBLK | 0o600, os.makedev(8, 0))",
    "a mount": "import ctypes\nassert ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0",
    "a mount that becomes writable": "import ctypes\nassert ctypes.CDLL(None).mount(None, b'/', None, 32, None) == 0",
    "a root of its own": "os.chroot('/tmp')",
    # processes and rights
    "a shell": "import subprocess\nsubprocess.run(['/bin/sh', '-c', 'true'], check=True)",
    "an executable of its own": """
import shutil
shutil.copy(sys.executable, '/tmp/own')
os.chmod('/tmp/own', 0o700)
os.execv('/tmp/own', ['own', '-c', 'print("DONE")'])
""",
    "the caller killed": "os.kill({caller}, 9)",
    "the first process killed": "os.kill(1, 9)\ntime.sleep(10**6)",
    "everybody killed": "os.kill(-1, 9)\ntime.sleep(10**6)",
    "the caller traced": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, {caller}, 0, 0) == 0",
    "the first process traced": "import ctypes\nassert ctypes.CDLL(None).ptrace(16, 1, 0, 0) == 0",
    "the first process's memory": """
import ctypes
pair = (ctypes.c_uint64 * 2)(id(pair := 0), 8)
assert ctypes.CDLL(None).process_vm_readv(1, pair, 1, pair, 1, 0) > 0
""",
    "the first process's environment": "open('/proc/1/environ').read()",
    "the caller's environment": "open('/proc/{caller}/environ').read()",
    "the inherited environment": "assert {secret!r} in os.environ.values()",
    "other processes": "assert any(name.isdigit() for name in os.listdir('/proc'))",
    "a new user namespace": "import ctypes\nassert ctypes.CDLL(None).unshare(0x10000000) == 0",
    "a new user namespace by clone": "import ctypes\nassert ctypes.CDLL(None).syscall(56, 0x10000011, 0, 0, 0, 0) >= 0",
    "capabilities": "import ctypes\nassert ctypes.CDLL(None).prctl(47, 2, 21, 0, 0) == 0",
    "root": "assert os.getuid() == 0\nos.setgid(65534)\nos.setuid(65534)",
    "kernel keys": "import ctypes\nassert ctypes.CDLL(None).syscall(250, 0, -3, 1) >= 0",
    # network
    "a TCP connection": "import socket\nsocket.create_connection(('127.0.0.1', {port}), timeout=1)",
    "a UDP datagram": "import socket\nsocket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', {port}))",
    "a server": "import socket\nsocket.create_server(('127.0.0.1', 0))",
    "a unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect({unix!r})",
    "an abstract unix socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0{abstract}')",
    "a socket to the hypervisor": "import socket\nsocket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)",
    "a raw socket": "import socket\nsocket.socket(socket.AF_PACKET, socket.SOCK_RAW)",
    "a name looked up": "import socket\nsocket.getaddrinfo('localhost', 80)\nsocket.gethostbyname('example.org')",
    # what would outlive it, or shut out its end
    "a child in a session of its own": """
if os.fork() == 0:
    os.setsid()
    time.sleep(2)
else: os._exit(0)
""",
    "a daemon": """
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0: time.sleep(2)
    else: os._exit(0)
else: os._exit(0)
""",
    "children that hold its output": """
for _ in range(3):
    if os.fork() == 0: time.sleep(2); break
else: os._exit(0)
""",
    "closed descriptors": "os.closerange(0, 1000)",
}


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
        found |= {"caller": os.getpid(), "home": str(Path.home()), "repository": str(Path(__file__).parents[1])}
        at_home = [
            str(path) for path in Path.home().iterdir() if not Path(sys.base_prefix).resolve().is_relative_to(path)
        ]
        yield found | {"at_home": at_home, "port": tcp.getsockname()[1], "secret": SECRET}
        for server in (tcp, unix, named):
            with pytest.raises(BlockingIOError):
                server.accept()
    del os.environ["CAFTUNE_TEST_SECRET"]
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


def aimed(attack, targets):
    for key, value in targets.items():
        attack = attack.replace("{" + key + "!r}", repr(value)).replace("{" + key + "}", str(value))
    return attack


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_stopped_and_the_next_one_runs(name, targets):
    attack = aimed(HOSTILE[name], targets)
    started = time.monotonic()
    outcome = run_python(f"import os, sys, time\n{attack}\nprint('DONE')", limits=TIGHT)
    assert b"DONE" not in outcome.stdout, outcome
    assert max(len(outcome.stdout), len(outcome.stderr)) <= TIGHT.output_bytes
    assert time.monotonic() - started < TIGHT.wall_s + 10, "the machine may be busy, but not that busy"
    assert run_python("print(sum(range(10)))", limits=Limits()) == Outcome(0, b"45\n", b"")


@pytest.mark.parametrize(
    "name", ["reading /etc/passwd", "a TCP connection", "the inherited environment", "a unix socket"]
)
def test_without_the_sandbox_the_attack_would_succeed(name, targets):
    # those that can be tried without harm: the targets are there
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(targets["folder"] + "/other")
        unix.listen()
        others = {"port": server.getsockname()[1], "unix": targets["folder"] + "/other"}
        program = f"import os, sys, time\n{aimed(HOSTILE[name], targets | others)}\nprint('DONE')"
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
    caller = subprocess.Popen([sys.executable, "-c", call], cwd=Path(__file__).parents[1])
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
    """The module, with one of its lines changed, as a module of its own."""
    text = Path(sandbox.__file__).read_text()
    assert text.count(old) == 1, old
    path = folder / "altered.py"
    path.write_text(text.replace(old, new))
    spec = importlib.util.spec_from_file_location("altered", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["altered"] = module
    spec.loader.exec_module(module)
    return module


PROMISES = {
    "no sockets": ("    _filter_system_calls(seccomp)\n", ""),
    "a limit of its processes": ('order["processes"] + 2', "10_000 + 2"),
    "no files but Python's": ('"/etc/ld.so.cache"', '"/etc/ld.so.cache", "/etc/passwd"'),
    "a process table of its own": (" | 0x20000000", ""),
    "libseccomp-absent.so": ("libseccomp.so.2", "libseccomp-absent.so"),
    "cannot forbid sockets": ('"socket ptrace', '"sockets ptrace'),
    "take no users": ('_map", f"0 {own} 1"', '_map", f"0 {own} x"'),
}


@pytest.mark.parametrize("promise", PROMISES)
def test_a_machine_that_does_not_keep_a_promise_is_refused(promise, tmp_path):
    module = altered(tmp_path, *PROMISES[promise])
    with pytest.raises(TaskError, match=r"must be able to isolate generated code, and is not: .*") as refused:
        module.run_python("print('ran')", limits=Limits())
    with contextlib.suppress(ChildProcessError):  # those that the altered sandbox let live, for the moment that they do
        while True:
            os.wait()
    assert promise in str(refused.value)
    assert "Use Linux 5.14 or newer" in str(refused.value)


def test_other_systems_are_refused(monkeypatch):
    sandbox.check_sandbox.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(TaskError, match="this is darwin"):
        run_python("print('ran')", limits=Limits())


@pytest.mark.parametrize("name", ["cpu_s", "wall_s", "memory_bytes", "processes", "output_bytes"])
def test_limits_are_positive(name):
    with pytest.raises(ValueError, match=rf"{name} must be a number > 0, got 0"):
        Limits(**{name: 0})
