"""Hostile programs, by what they attack. Each prints nothing itself: DONE is printed behind it, if it comes to that.

ENDLESS ones go on until their time is up. GREEDY ones want more than there is, and are refused it or killed for it. INTRUDERS
want what is not theirs, and are refused it.
CHEATS want to pass for a solution, in test_code_tasks.py, where a wrong answer stands before them.
Names in braces are filled in by test_sandbox.py: files, sockets and processes of the test itself.
"""

SECRET = "the-secret-of-the-caller"

ENDLESS = {
    "a fork bomb": """
while True:
    try: os.fork()
    except OSError: pass
""",
    "a thread bomb": "import threading\nwhile True: threading.Thread(target=time.sleep, args=[60]).start()",
    "an infinite loop": "while True: pass",
    "recursion without end": "sys.setrecursionlimit(10**9)\ndeep = lambda: [deep()]\ndeep()",
    "a sleep without end": "time.sleep(10**6)",
    "huge output": "while True: os.write(1, b'x' * 10**6)",
    "huge errors": "while True: os.write(2, b'x' * 10**6)",
}

GREEDY = {
    "a fork bomb that sleeps": "while os.fork() >= 0: pass",
    "a memory bomb": "held = bytearray(1 << 34)",
    "a memory bomb in small pieces": "held = []\nwhile True: held.append(bytearray(1 << 20))",
    "a memory bomb of many processes": """
for _ in range(100):
    if os.fork() == 0: held = [bytearray(1 << 20) for _ in range(10_000)]
""",
    "a loop that ignores every signal": """
import signal
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
while True: pass
""",
    "a zip bomb": """
import zlib
packer = zlib.compressobj(wbits=-15)
packed = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
zlib.decompress(packed * 1024 + packer.flush(), wbits=-15)
""",
    "recursion until the stack is gone": """
sys.setrecursionlimit(10**9)
one, two = [], []
for _ in range(10**5): one, two = [one], [two]
one == two
""",
    "a read of the address 0": "import ctypes\nctypes.string_at(0)",
    "higher limits": "import resource\nresource.setrlimit(resource.RLIMIT_NPROC, (1000, 1000))",
    "higher limits of CPU time": "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1000, 1000))",
    "a huge file": "file = open('/tmp/huge', 'wb')\nwhile True: file.write(bytes(1 << 20))",
    "many large files": "for n in range(100): open(f'/tmp/{n}', 'wb').write(bytes(1 << 20))",
    "many files": "for n in range(5000): open(f'/tmp/{n}', 'w').close()",
    "a huge sparse file": "os.truncate(os.open('/tmp/huge', os.O_CREAT | os.O_RDWR), 1 << 40)",
}

INTRUDERS = {
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

# `answer` is wrong in all of them.
CHEATS = {
    "an early exit": "os._exit(0)",
    "an early exit of another kind": "sys.exit(0)",
    "an exit in the function": "def answer(): os._exit(0)",
    "an exit in the function that looks like an exception": "def answer(): raise SystemExit(0)",
    "an exit by another program": "os.execv(sys.executable, [sys.executable, '-c', 'pass'])",
    "a child that goes on, a parent that leaves": "if os.fork(): os._exit(0)",
    "a parent that goes on after its child": "def answer():\n    if os.fork() == 0: os._exit(0)\n    return 1",
    "printed successes": "for word in ('passed', 'OK', '1', 'True', 'success'): print(word, flush=True)",
    "successes written to every descriptor": """
for number in range(64):
    try: os.write(number, b'passed')
    except OSError: pass
""",
    "everything read from every descriptor, and printed": """
found = []
for number in range(64):
    try: os.set_blocking(number, False); found.append(os.read(number, 1 << 20))
    except OSError: pass
for number in range(64):
    for text in found:
        try: os.write(number, text)
        except OSError: pass
os._exit(0)
""",
    "all constants in sight, printed": """
frame = sys._getframe()
while frame:
    print(frame.f_code.co_consts, frame.f_locals, frame.f_globals, flush=True)
    frame = frame.f_back
os._exit(0)
""",
    "all text in memory, printed": """
import gc
def answer():
    for held in gc.get_objects():
        for text in gc.get_referents(held):
            if isinstance(text, bytes) and len(text) == 32:
                os.write(1, text); os.write(4, text)
    os._exit(0)
""",
    "its own source": "print(open(sys.modules['__main__'].__file__).read(), flush=True)\nos._exit(0)",
    "a hook at exit": "import atexit\natexit.register(lambda: (print('passed'), os._exit(0)))",
    "a hook for exceptions": "sys.excepthook = lambda *error: os._exit(0)",
    "a hook for what cannot be raised": "sys.unraisablehook = lambda *error: os._exit(0)",
    "a thread that leaves in time": "import threading\nthreading.Thread(target=lambda: os._exit(0)).start()\nanswer = input",
    "a signal that leaves": """
import signal
signal.signal(signal.SIGALRM, lambda *_: os._exit(0))
signal.setitimer(signal.ITIMER_REAL, 0.1)
while True: pass
""",
    "no AssertionError": "import builtins\nbuiltins.AssertionError = type('Calm', (SystemExit,), {})",
    "builtins that do nothing": """
import builtins
builtins.exec = builtins.compile = builtins.open = lambda *_, **__: None
""",
    "an os that does nothing": "os.read = lambda *_: b'           0'\nos.write = os._exit = lambda *_: None",
    "optimised code": "sys.flags = type('Flags', (), {'optimize': 2})\n__debug__ == False",
    "tests replaced": "check = lambda candidate: None",
    "tests that cannot be found": "def check(candidate): pass\nimport sys; sys.modules['tests'] = None; sys.path.clear()",
    "tests swallowed by a string": "x = '''",
    "tests swallowed by a line that goes on": "x = \\",
    "closed descriptors": "os.closerange(0, 1000)",
    "a stack that is full": "sys.setrecursionlimit(60)\nanswer = lambda: answer()",
    "a module in the checker's place": "sys.modules['__main__'] = sys.modules['os'] = None",
    "time that ran out": "while True: pass",
    "memory that ran out": "held = [bytearray(1 << 20) for _ in range(10**6)]",
    "a death": "import signal\nos.kill(os.getpid(), signal.SIGKILL)",
    "a death of the whole group": "import signal\nos.killpg(0, signal.SIGKILL)",
}
