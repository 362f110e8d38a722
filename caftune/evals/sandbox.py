"""Programs that a model wrote, run where they can do no harm: Linux namespaces, resource limits and a filter of system calls.

What is guaranteed, or refused with a TaskError before the program starts (a self-test holds the machine to it at first use):

- Files: a read-only view of Python's standard library and the machine's shared libraries, and one empty folder, /tmp, that is
  kept in memory, limited in size and number of files, executes nothing, and is gone with the program. No other file of the
  machine exists for it: no /etc, /home, /proc or /sys, no repository, no shell, no installed packages (NumPy).
- Processes: it sees its own alone. All of them die when the program ends or its time is up, also those that left its session
  or group, and also when the caller is killed. `run_python` returns when they are gone.
- Network: no sockets can be opened (connected pairs within a process can), and there is no interface to reach anything by.
- Privileges: a user namespace without any capability and without a way to a new one; where the caller is root, another user
  than root. Tracing, kernel keys and memory outside any process are refused. The environment is PYTHONHASHSEED=0.
- Limits (see `Limits`): CPU time, memory, processes with threads, files, wall time, the output that is kept. No core dumps.

What is not: a defence against faults of the kernel or the processor. Nor a limit of its memory together, which is at most
`processes` times `memory_bytes`, and the folder; or of its CPU time: `processes` times `cpu_s`. It can read the machine's
name and clock, and what lies in the folders of shared libraries (/usr/lib and the like).

Needs Linux 5.14 (processes counted for each user namespace; read-only trees of mounts), libseccomp 2.4, and either root with
all capabilities or the right to make user namespaces.
Source: the manual pages namespaces(7), user_namespaces(7), pid_namespaces(7), pivot_root(2), seccomp_rule_add(3), getrlimit(2).
"""

# ruff: noqa: E402, PTH102, PTH103, PTH112, PTH114, PTH115, PTH120, PTH123, PTH211
# First the launcher, which this file is when it is run by itself. It starts for every program anew, and importing typing, json,
# pathlib and the like would take it as long as all else it does: so it has the few modules here, and ends before the others.

from __future__ import annotations

import ctypes
import errno
import marshal
import os
import select
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_NEW_NAMESPACES = 0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x8000000  # users, mounts, processes, network, IPC
_READ_ONLY, _NO_SUID, _NO_DEVICES, _NO_EXEC, _BIND, _RECURSIVE, _PRIVATE = 1, 2, 4, 8, 4096, 16384, 1 << 18
_DEATH_SIGNAL, _DUMPABLE, _HAS_CAPABILITY, _DROP_CAPABILITY, _NO_NEW_PRIVILEGES = 1, 4, 23, 24, 38  # of prctl
_RESOURCES = {"CPU": "cpu_s", "AS": "memory_bytes", "FSIZE": "file_bytes", "NOFILE": "open_files"}
_SIGKILL, _NOBODY = 9, 65534  # the latter is who the program is to the rest of the machine where the caller is root

# What an unprivileged process may call by default and a solution has no use for: ways to others, and memory no limit counts.
_FORBIDDEN = (
    "socket ptrace process_vm_readv process_vm_writev shmget shmat msgget semget memfd_create mq_open add_key request_key "
    "keyctl unshare setns mount umount2 bpf perf_event_open userfaultfd io_uring_setup"
)


def _c(name: str, *arguments: Any) -> int:
    """Call the C library; where that fails, OSError names the call."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name)
    result: int = function(*(ctypes.c_long(value) if isinstance(value, int) else value for value in arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")
    return result


def _launch(length: int, control: int) -> None:
    """Make the namespaces, start the sandbox's first process in them, and kill it when its time is up."""
    os.set_inheritable(control, False)
    order = marshal.loads(os.read(0, length))
    _c("prctl", _DEATH_SIGNAL, _SIGKILL)
    if os.getppid() != order["caller"]:
        return
    is_root = os.getuid() == 0
    seccomp = ctypes.CDLL("libseccomp.so.2")
    _enter_namespaces(control, is_root)
    alive = os.pipe()
    first = _fork(control, lambda: _be_first(order, control, alive, is_root, seccomp))
    if not (ended := select.select([os.pidfd_open(first)], [], [], order["wall_s"])[0]):
        os.kill(first, _SIGKILL)
    os.waitpid(first, 0)  # returns when every process of the namespace is gone
    _report(control, "timed_out", int(not ended))


def _report(control: int, name: str, value: object) -> None:
    os.write(control, " ".join([name, *str(value).split()]).encode() + b"\n")


def _write(path: str, content: bytes) -> None:
    with open(path, "wb", buffering=0) as file:
        file.write(content)


def _fork(control: int, work: Callable[[], None]) -> int:
    """Start a process that does this work and nothing else; what it fails at is reported."""
    if process := os.fork():
        return process
    try:
        work()
        os._exit(0)
    except BaseException as error:
        _report(control, "error", error)
    finally:
        os._exit(1)


def _enter_namespaces(control: int, is_root: bool) -> None:
    """Leave the machine's users, mounts, processes, network and IPC. Root keeps being root inside, to be left later."""
    ready, entered = os.pipe()
    target, uid, gid = f"/proc/{os.getpid()}", os.getuid(), os.getgid()

    def write_maps() -> None:  # a process that stayed outside must do it, for root to map a second user
        os.close(entered)
        if not os.read(ready, 1):
            return
        if not is_root:
            _write(f"{target}/setgroups", b"deny")
        for name, own in (("uid", uid), ("gid", gid)):
            _write(f"{target}/{name}_map", f"0 {own} 1".encode() + (b"\n1 %d 1" % _NOBODY if is_root else b""))

    helper = _fork(control, write_maps)
    try:
        _c("unshare", _NEW_NAMESPACES)
        os.write(entered, b".")
    finally:
        os.close(entered)
        status = os.waitpid(helper, 0)[1]
    if status:
        raise OSError("its user namespaces take no users")


def _be_first(order: dict[str, Any], control: int, alive: tuple[int, int], is_root: bool, seccomp: ctypes.CDLL) -> None:
    """The first process: when it ends, the kernel kills the others. It starts the program and buries the orphans."""
    _c("prctl", _DEATH_SIGNAL, _SIGKILL)
    os.close(alive[0])
    os.write(alive[1], b".")  # fails where the launcher died before it could be told so
    _write("/proc/self/oom_score_adj", b"1000")  # where memory runs out, this goes first
    _build_root(order, is_root)
    _c("prctl", _DUMPABLE, 0)  # nobody may trace it
    program = _fork(control, lambda: _become_program(order, is_root, seccomp))
    while (ended := os.wait())[0] != program:
        pass
    _report(control, "returncode", os.waitstatus_to_exitcode(ended[1]))


def _build_root(order: dict[str, Any], is_root: bool) -> None:
    """A root folder in memory with what the program may see, and its own folder; the machine's files are let go."""
    _c("mount", b"none", b"/", None, _RECURSIVE | _PRIVATE, None)
    content = order["program"].encode("utf-8", "surrogatepass")
    # /proc is on every machine, holds nothing that is to be seen, and is not needed any more.
    _c("mount", b"tmpfs", b"/proc", b"tmpfs", _NO_SUID | _NO_DEVICES, b"size=%d,mode=0755" % (len(content) + (1 << 20)))
    os.umask(0o022)
    for path in [*order["visible"], "/dev/null", "/dev/urandom"]:
        _show(path, "/proc/root" + path)
    _write("/proc/root/program.py", content)
    os.mkdir("/proc/root/tmp")
    user = int(is_root)
    options = f"size={order['folder_bytes']},nr_inodes={order['folder_files'] + 1},mode=0700,uid={user},gid={user}"
    _c("mount", b"tmpfs", b"/proc/root/tmp", b"tmpfs", _NO_SUID | _NO_DEVICES | _NO_EXEC, options.encode())
    _make_read_only("/proc", recursive=False)
    os.chdir("/proc")
    _c("pivot_root", b".", b".")
    _c("umount2", b".", 2)  # lazily: MNT_DETACH
    os.chroot("/root")  # a process whose root is not that of its mounts can make no user namespace
    os.chdir("/tmp")


def _show(path: str, target: str) -> None:
    """Make a file or folder of the machine appear, read-only."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        return os.symlink(os.readlink(path), target)
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        _write(target, b"")
    _c("mount", path.encode(), target.encode(), None, _BIND | _RECURSIVE, None)
    return _make_read_only(target, recursive=True, devices=path.startswith("/dev/"))


def _make_read_only(where: str, *, recursive: bool, devices: bool = False) -> None:
    flags = _READ_ONLY | _NO_SUID | (0 if devices else _NO_DEVICES)
    attributes = (ctypes.c_uint64 * 4)(flags)  # struct mount_attr: to set, to clear, propagation, user namespace
    _c("syscall", 442, -1, where.encode(), 0x8000 if recursive else 0, attributes, 32)  # mount_setattr


def _become_program(order: dict[str, Any], is_root: bool, seccomp: ctypes.CDLL) -> None:
    """Take the limits, give up every right, and turn into the program."""
    import resource

    values = {
        **{limit: order[name] for limit, name in _RESOURCES.items()},
        "NPROC": order["processes"] + 2 * (not is_root),  # launcher and first process are then of its user
        "CORE": 1,  # 0 would still start the program that a machine may have for core dumps
        "MEMLOCK": 0,
    }
    for limit, value in values.items():
        kind = getattr(resource, f"RLIMIT_{limit}")
        most = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value, value) if most == resource.RLIM_INFINITY else (min(value, most),) * 2)
    _give_up_rights(is_root)
    _filter_system_calls(seccomp)
    command = [order["python"], "-P", "-s", "-S", "-B", "-X", "utf8", "/program.py"]  # -I would drop PYTHONHASHSEED
    os.execve(command[0], command, {"PYTHONHASHSEED": "0"})


def _give_up_rights(is_root: bool) -> None:
    capability = 0
    while ctypes.CDLL(None).prctl(_HAS_CAPABILITY, capability, 0, 0, 0) >= 0:
        _c("prctl", _DROP_CAPABILITY, capability, 0, 0, 0)
        capability += 1
    if is_root:
        os.setgroups([])
        os.setresgid(1, 1, 1)
        os.setresuid(1, 1, 1)
    version_3 = (ctypes.c_uint32 * 2)(0x20080522, 0)
    _c("capset", version_3, (ctypes.c_uint32 * 6)())
    _c("prctl", _NO_NEW_PRIVILEGES, 1, 0, 0, 0)


def _filter_system_calls(seccomp: ctypes.CDLL) -> None:
    seccomp.seccomp_init.restype = ctypes.c_void_p
    allow, refuse = 0x7FFF0000, 0x50000 | errno.EPERM
    rules = ctypes.c_void_p(seccomp.seccomp_init(allow))
    for name in _FORBIDDEN.split():
        number = seccomp.seccomp_syscall_resolve_name(name.encode())
        if number == -1 or seccomp.seccomp_rule_add_array(rules, refuse, number, 0, None):
            raise OSError(f"libseccomp cannot forbid {name}")
    if seccomp.seccomp_load(rules):
        raise OSError("seccomp_load failed")


if __name__ == "__main__":
    try:
        _launch(int(sys.argv[1]), int(sys.argv[2]))
    except OSError as failed:
        _report(int(sys.argv[2]), "error", failed)
    os._exit(0)

# From here on: the caller's side.

import functools
import selectors
import subprocess
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """What a program may use. Sizes are bytes, times seconds."""

    cpu_s: int = 10  # CPU time of each process
    wall_s: float = 20.0  # after which all are killed
    memory_bytes: int = 512 << 20  # address space of each process; Python alone takes about 20 MB
    processes: int = 8  # and threads, alive at one time
    open_files: int = 64  # of each process
    file_bytes: int = 16 << 20  # the largest file
    folder_bytes: int = 32 << 20  # all files in its folder
    folder_files: int = 1000
    output_bytes: int = 64 << 10  # kept of its standard output, and of its standard error; what follows is dropped

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ValueError(f"{name} must be a number > 0, got {value}.")


@dataclass(frozen=True)
class Outcome:
    """How a program ended: `returncode` as in `subprocess` (-9: killed by signal 9), None where its wall time was up."""

    returncode: int | None
    stdout: bytes
    stderr: bytes


def run_python(program: str, *, limits: Limits, stdin: bytes = b"") -> Outcome:
    """Run a program as /program.py in a sandbox of its own (see above), from the folder /tmp. Safe to call from many threads.

    Raises:
        TaskError: this machine cannot isolate it as promised; it was not started.
    """
    check_sandbox()
    return _run(program, limits, stdin)


@functools.cache
def check_sandbox() -> None:
    """Try once whether this machine keeps the promises above; TaskError says which it does not, and what to do."""
    if sys.platform != "linux":
        raise _refusal(f"this is {sys.platform}")
    outcome = _run(_SELF_TEST, Limits(), b"")
    if outcome != Outcome(0, b"held", b""):
        raise _refusal((outcome.stdout or outcome.stderr[-300:]).decode(errors="replace") or str(outcome))


def _refusal(reason: str) -> Exception:
    from caftune.evals.task import TaskError

    return TaskError(
        f"The machine must be able to isolate generated code, and is not: {reason}. Use Linux 5.14 or newer with the package "
        "libseccomp2, as root (in a container: docker run --privileged) or as a user who may create user namespaces."
    )


_SELF_TEST = """
import os, socket, time
def refused(act):
    try:
        act()
    except OSError:
        return True
    return False
def fork_often():
    for _ in range(100):
        if os.fork() == 0:
            time.sleep(3)
held = {
    "a process table of its own": os.getpid() == 2,
    "no files but Python's": not any(map(os.path.exists, ["/etc/passwd", "/proc/self", "/sys/kernel", "/home"])),
    "nothing to write outside its folder": refused(lambda: open("/escape", "w")),
    "no sockets": refused(socket.socket),
    "a limit of its processes": refused(fork_often),
}
print(*["not given: " + promise for promise in held if not held[promise]] or ["held"], sep=", ", end="")
"""


def _run(program: str, limits: Limits, stdin: bytes) -> Outcome:
    python = str(Path(sys.executable).resolve())
    order = {"program": program, "python": python, "visible": _visible(python), "caller": os.getpid(), **asdict(limits)}
    text = marshal.dumps(order)
    source, (reports, control) = _file_in_memory(text + stdin), os.pipe()
    command = [python, "-I", "-S", "-B", __file__, str(len(text)), str(control)]
    try:
        lines, stdout, stderr = _call_launcher(command, source, reports, control, limits.output_bytes)
    finally:
        os.close(source)
        os.close(reports)
    told = dict(line.split(" ", 1) for line in lines.decode().splitlines())
    if "error" in told or "timed_out" not in told:
        raise _refusal(told.get("error") or f"the launcher ended early: {stderr[-300:].decode(errors='replace')}")
    # Without a returncode, the sandbox's first process was killed from outside: the machine had no memory left.
    returncode = int(told.get("returncode", -_SIGKILL))
    return Outcome(None if told["timed_out"] == "1" else returncode, stdout, stderr)


def _file_in_memory(content: bytes) -> int:
    """A descriptor to read this content from; unlike a pipe it takes any length at once."""
    written = os.memfd_create("program")
    with os.fdopen(written, "wb") as file:
        file.write(content)
        file.flush()
        return os.open(f"/proc/self/fd/{written}", os.O_RDONLY)


def _call_launcher(command: list[str], source: int, reports: int, control: int, keep: int) -> list[bytes]:
    """What the launcher reports, and the program's output and errors up to `keep` bytes each; returns when all have died."""
    pipe = subprocess.PIPE
    try:
        launcher = subprocess.Popen(
            command, stdin=source, stdout=pipe, stderr=pipe, env={}, cwd="/", pass_fds=[control], start_new_session=True
        )
    finally:
        os.close(control)
    with launcher:
        output = [stream.fileno() for stream in (launcher.stdout, launcher.stderr) if stream]
        try:
            return _read({reports: 1 << 16, **dict.fromkeys(output, keep)})
        finally:
            launcher.kill()  # takes all others with it; it has ended by itself unless the caller was interrupted


def _read(streams: dict[int, int]) -> list[bytes]:
    """Read streams to their ends, keeping of each its first so many bytes."""
    kept = {stream: b"" for stream in streams}
    with selectors.DefaultSelector() as selector:
        for stream in streams:
            selector.register(stream, selectors.EVENT_READ)
        while selector.get_map():
            for key, _ in selector.select():
                chunk = os.read(key.fd, 1 << 16)
                kept[key.fd] += chunk[: streams[key.fd] - len(kept[key.fd])]
                if not chunk:
                    selector.unregister(key.fd)
    return list(kept.values())


def _visible(python: str) -> list[str]:
    """Files and folders that a program sees: the interpreter, its library, and the shared libraries of the machine."""
    bases = {
        "base": sys.base_prefix,
        "installed_base": sys.base_prefix,
        "platbase": sys.base_exec_prefix,
    }  # no environment
    library = [str(Path(sysconfig.get_path(name, vars=bases)).resolve().parent) for name in ("stdlib", "platstdlib")]
    shared = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    found = sorted(path for path in {python, *library, *shared} if Path(path).exists())
    folders = [f"{path}/" for path in found if not Path(path).is_symlink()]
    return [path for path in found if not path.startswith(tuple(folders))]
