"""The process that starts a program in the sandbox: this file, run as a script (see `caftune.evals.sandbox`).

    launcher                  makes the namespaces, waits for the end or the time, kills
      first process           sees no other processes than the program's, reaps orphans; when it ends, the kernel kills the rest
        the program

Its arguments: the length of its order, which is on stdin with the program's input after it, and the descriptor of its reports:
`returncode N`, `timed_out 0` or `timed_out 1`, or `error` with what this machine cannot do.

It starts for every program, and importing typing, json, pathlib and the like would double its time. So it imports little, and
nothing of caftune.
"""

# ruff: noqa: PTH102, PTH103, PTH112, PTH114, PTH115, PTH120, PTH123, PTH211

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
    """The first process: when it ends, the kernel kills the others. It starts the program and reaps the orphans."""
    _c("prctl", _DEATH_SIGNAL, _SIGKILL)
    os.close(alive[0])
    os.write(alive[1], b".")  # fails if the launcher has died already
    _write("/proc/self/oom_score_adj", b"1000")  # where memory runs out, this goes first
    _build_root(order, is_root)
    _c("prctl", _DUMPABLE, 0)  # nobody may trace it
    program = _fork(control, lambda: _become_program(order, is_root, seccomp))
    while (ended := os.wait())[0] != program:
        pass
    _report(control, "returncode", os.waitstatus_to_exitcode(ended[1]))


def _build_root(order: dict[str, Any], is_root: bool) -> None:
    """A root folder in memory with what the program may see, and its own folder; the machine's files are unmounted."""
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
