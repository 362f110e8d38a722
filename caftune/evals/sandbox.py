"""A sandbox for programs that a model wrote: Linux namespaces, resource limits and a filter of system calls.

Guaranteed, or refused with a CaftuneError before the program starts (a self-test checks it at first use):

- Files: a read-only view of Python's standard library and the machine's shared libraries, and an empty folder /tmp in memory,
  limited in size and number of files, without execution. No /etc, /home, /proc or /sys, no shell, no packages (NumPy).
- Processes: it sees only its own. All die when the program ends, its time is up, or the caller is killed, also those that
  left its session or group. `run_python` returns when they are gone.
- Network: no sockets (connected pairs within a process can be opened), no interface.
- Privileges: a user namespace without capabilities and without a way to a new one; another user than root. No tracing, kernel
  keys, or memory outside any process. The environment is PYTHONHASHSEED=0.
- Limits (see `Limits`): CPU time, memory, processes with threads, files, wall time, the output that is kept. No core dumps.

Not guaranteed: a defence against faults of the kernel or the processor; a limit of all processes together, which is `processes`
times `memory_bytes` (and `cpu_s`). It can read the machine's name and clock, and the folders of shared libraries (/usr/lib).

Needs Linux 5.14 (processes counted per user namespace; read-only trees of mounts), libseccomp 2.4, and either root with all
capabilities or the right to make user namespaces.
Source: the manual pages namespaces(7), user_namespaces(7), pid_namespaces(7), pivot_root(2), seccomp_rule_add(3), getrlimit(2).
"""

import functools
import marshal
import os
import selectors
import signal
import subprocess
import sys
import sysconfig
from dataclasses import asdict, dataclass
from pathlib import Path

from caftune.errors import CaftuneError

_LAUNCHER = Path(__file__).with_name("launcher.py")


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
                raise CaftuneError(f"{name} must be a number > 0, got {value}.")


@dataclass(frozen=True)
class Outcome:
    """How a program ended: `returncode` as in `subprocess` (-9: killed by signal 9), None where its wall time was up."""

    returncode: int | None
    stdout: bytes
    stderr: bytes


def run_python(program: str, *, limits: Limits, stdin: bytes = b"") -> Outcome:
    """Run a program as /program.py in a new sandbox (see above), from the folder /tmp. Thread-safe.

    Raises:
        CaftuneError: this machine cannot isolate it as promised; it was not started.
    """
    check_sandbox()
    return _run(program, limits, stdin)


@functools.cache
def check_sandbox() -> None:
    """Check once that this machine keeps the guarantees above; a CaftuneError names the one that fails, and the remedy."""
    if sys.platform != "linux":
        raise _refusal(f"this is {sys.platform}")
    outcome = _run(_SELF_TEST, Limits(), b"")
    if outcome != Outcome(0, b"held", b""):
        raise _refusal((outcome.stdout or outcome.stderr[-300:]).decode(errors="replace") or str(outcome))


def _refusal(reason: str) -> CaftuneError:
    return CaftuneError(
        f"The machine must be able to isolate generated code, got: {reason}. Use Linux 5.14 or newer with the package "
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
            time.sleep(1)
held = {
    "a separate process table": os.getpid() == 2,
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
    command = [python, "-I", "-S", "-B", str(_LAUNCHER), str(len(text)), str(control)]
    try:
        lines, stdout, stderr = _call_launcher(command, source, reports, control, limits.output_bytes)
    finally:
        os.close(source)
        os.close(reports)
    reported = dict(line.split(" ", 1) for line in lines.decode().splitlines())
    if "error" in reported or "timed_out" not in reported:
        raise _refusal(reported.get("error") or f"the launcher ended early: {stderr[-300:].decode(errors='replace')}")
    # Without a returncode, the sandbox's first process was killed from outside: the machine had no memory left.
    returncode = int(reported.get("returncode", -signal.SIGKILL))
    return Outcome(None if reported["timed_out"] == "1" else returncode, stdout, stderr)


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
    """Read streams to their ends, keeping the first bytes of each."""
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
    # The bases without a virtual environment.
    bases = {"base": sys.base_prefix, "installed_base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    library = [str(Path(sysconfig.get_path(name, vars=bases)).resolve().parent) for name in ("stdlib", "platstdlib")]
    shared = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    found = sorted(path for path in {python, *library, *shared} if Path(path).exists())
    folders = [f"{path}/" for path in found if not Path(path).is_symlink()]
    return [path for path in found if not path.startswith(tuple(folders))]
