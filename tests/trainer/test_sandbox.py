"""Source text that means harm, or only does harm, in the sandbox: its call fails with a reason, nothing else does."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
import struct
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from taskoffer_trainer import confinement, seccomp
from taskoffer_trainer.confinement import LANDLOCK, LAYERS, NETWORK_NAMESPACE, SECCOMP
from taskoffer_trainer.sandbox import Sandbox, SandboxError, SandboxLimits

pytestmark = pytest.mark.skipif(
    platform.machine() not in seccomp.ARCHITECTURES,
    reason=f"THE SANDBOX HAS NO LIST OF SYSTEM CALLS FOR {platform.machine()}",
)

LIMITS = SandboxLimits(call_seconds=2.0, memory_bytes=200 << 20, cpu_seconds=30)
MODEL = "the weights of the model"

ATTACKS: dict[str, tuple[str, str]] = {
    # what is done when the completion says so: the reason that is reported
    "an endless loop": ("while True: pass", r"longer than the 2 s that there are for a call"),
    "an endless loop that ends for nobody": (
        """
        for number in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}:
            signal.signal(number, signal.SIG_IGN)
        while True:
            try:
                while True: pass
            except BaseException:
                pass
        """,
        r"longer than the 2 s",
    ),
    "a regular expression that takes for ever": ("re.match(r'(a+)+$', 'a' * 64 + 'b')", r"longer than the 2 s"),
    "a large block of memory": ("bytearray(10 ** 10)", r"^MemoryError: it needs more memory than the sandbox has$"),
    "memory piece by piece": ("x = []\nwhile True: x.append(bytearray(10 ** 6))", r"^MemoryError"),
    "a fork bomb": ("while True: os.fork()", r"PermissionError in line \d+: .*not permitted"),
    "a thread": ("threading.Thread(target=print).start()", r"RuntimeError.*can't start new thread"),
    "another program": ("subprocess.run(['/bin/true'])", r"PermissionError"),
    "becoming another program": ("os.execv('/bin/true', ['true'])", r"PermissionError"),
    "a connection": ("socket.create_connection(('127.0.0.1', PORT), 1)", r"PermissionError"),
    "a Unix socket": ("socket.socket(socket.AF_UNIX)", r"PermissionError"),
    "a datagram": ("socket.socket(socket.AF_INET, socket.SOCK_DGRAM)", r"PermissionError"),
    "a name to resolve": ("socket.getaddrinfo('example.org', 80)", r"gaierror|PermissionError|OSError"),
    "an io_uring, which could open a socket": ("raw(425, 8, bytes(120))", r"OSError.*not permitted"),
    "a call by the numbers of 32-bit programs": ("raw(0x40000000 + 41, 2, 1, 0)", r"OSError.*not permitted"),
    "writing into the model": ("open(MODEL, 'r+')", r"PermissionError"),
    "replacing the model": ("open(MODEL, 'w')", r"PermissionError"),
    "removing the model": ("os.remove(MODEL)", r"PermissionError"),
    "moving the model": ("os.rename(MODEL, MODEL + '2')", r"PermissionError"),
    "a file in the folder for temporary files": ("open('/tmp/reward-was-here', 'w')", r"PermissionError"),
    "a nameless file": ("os.open('/tmp', os.O_TMPFILE | os.O_RDWR)", r"PermissionError"),
    "a file in memory": ("os.memfd_create('x')", r"PermissionError"),
    "killing who asks": ("os.kill(os.getppid(), 9)", r"PermissionError"),
    "a signal through a file": ("fcntl.fcntl(1, fcntl.F_SETOWN, os.getppid())", r"PermissionError"),
    "a new limit on who asks": ("resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (1, 1))", r"PermissionError"),
    "tracing who asks": ("raw(101 if X86 else 117, 16, os.getppid(), 0, 0)", r"OSError.*not permitted"),
    "the environment": ("raise ValueError(sorted(set(os.environ) - {'LC_CTYPE'}))", r"ValueError in line \d+: \[\]"),
    "an exit": ("sys.exit(0)", r"SystemExit in line \d+: 0"),
    "an exit that nobody can catch": ("os._exit(0)", r"its process ended with exit code 0"),
    "a crash": ("ctypes.string_at(0)", r"its process crashed with SIGSEGV"),
    "an abort": ("os.abort()", r"its process crashed with SIG"),
    "an interrupt": ("raise KeyboardInterrupt", r"KeyboardInterrupt"),
    "all files closed": ("os.closerange(0, 64)", r"its process ended with exit code 1|closed the way"),
    "an answer of its own": (
        """
        for fd in range(3, 32):
            with contextlib.suppress(OSError):
                os.write(fd, b'{"rewards": [9], "id": 1}' + bytes([10]))
        """,
        r"something that is no answer",
    ),
    "a flood where answers go": (
        """
        for fd in range(3, 32):
            with contextlib.suppress(OSError):
                while True: os.write(fd, b'x' * 65536)
        """,
        r"wrote more than \d+ bytes",
    ),
    "deep recursion": ("def f(): f()\nf()", r"RecursionError in line \d+"),
    "bottomless recursion": (
        "sys.setrecursionlimit(10 ** 9)\ndef f(x): return sorted([x], key=f)\nf(0)",
        r"crashed with SIGSEGV|MemoryError|killed",
    ),
    "an error that cannot be read": (
        "class Bad(Exception):\n    def __str__(self): raise SystemExit\nraise Bad",
        r"Bad in line \d+: its message cannot be read",
    ),
    "an error with a long text": ("raise ValueError('x' * 10 ** 6)", r"^.{290,300}$"),
    "an error that no stream can write": (
        r"raise ValueError('cut \ud83d' + chr(10) + 'reward: all is well' + chr(27) + '[2J')",
        r"^ValueError in line \d+: cut reward: all is well \[2J$",
    ),
    "a wrong number of rewards": ("return [1.0, 2.0]", r"returned 2 rewards for 1 completions: return one for each"),
    "no list": ("return {0: 1.0}", r"returned dict: return a list"),
    "nothing": ("return None", r"returned NoneType"),
    "text for a reward": ("return ['1']", r"reward 0 is str: return numbers, or None"),
    "no number": ("return [float('nan')]", r"reward 0 is not a number within"),
    "an infinite reward": ("return [-float('inf')]", r"reward 0 is not a number within"),
    "a reward of astronomic size": ("return [10 ** 5000]", r"reward 0 is not a number within"),
    "a package that is not there": (
        "import textstat",
        r"No module named 'textstat' in line \d+: only Python's standard library is in the sandbox",
    ),
}

SOURCE = """
import contextlib, ctypes, fcntl, os, re, resource, signal, socket, subprocess, sys, threading
X86 = os.uname().machine == "x86_64"
def raw(*arguments):
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syscall(*arguments) < 0:
        raise OSError(os.strerror(ctypes.get_errno()))
def attack():
{attack}
def reward(completions, **_):
    if completions == ["attack"]:
        return attack()
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_text(MODEL)
    return path


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def source_of(attack: str, model: Path, port: int) -> str:
    body = textwrap.dedent(attack).replace("MODEL", repr(str(model))).replace("PORT", str(port))
    return SOURCE.format(attack=textwrap.indent(body, "    "))


@pytest.mark.parametrize(("attack", "reason"), ATTACKS.values(), ids=ATTACKS.keys())
def test_an_attack_is_one_failed_call_and_the_next_call_is_answered(
    attack: str, reason: str, model: Path, port: int
) -> None:
    with Sandbox(source_of(attack, model, port), LIMITS) as sandbox:
        with pytest.raises(SandboxError) as failure:
            sandbox.call(["attack"], {})
        assert re.search(reason, str(failure.value)), failure.value
        assert str(failure.value).isprintable()
        assert sandbox.call(["four", "to"], {}) == [4.0, 2.0]
    assert model.read_text() == MODEL


def test_a_reward_reads_neither_the_model_nor_other_processes_where_there_is_landlock(model: Path, port: int) -> None:
    with Sandbox(source_of("return [1.0]", model, port), LIMITS) as sandbox:
        confined = sandbox.start()
    if LANDLOCK not in confined.in_force:
        pytest.skip(f"NO LANDLOCK HERE: {confined.describe()}")
    for path in (str(model), f"/proc/{os.getpid()}/environ", f"/proc/{os.getpid()}/mem", "/etc/passwd"):
        source = source_of(f"open({path!r}, 'rb').read(1)", model, port)
        with Sandbox(source, LIMITS) as sandbox, pytest.raises(SandboxError, match="PermissionError"):
            sandbox.call(["attack"], {})


def test_printing_is_harmless(model: Path, port: int) -> None:
    loud = "for _ in range(2000): print('x' * 5000); print('y' * 5000, file=sys.stderr)\nreturn [1.0]"
    with Sandbox(source_of(loud, model, port), LIMITS) as sandbox:
        assert sandbox.call(["attack"], {}) == [1.0]


def test_the_process_is_kept_from_call_to_call_and_ends_with_the_sandbox(model: Path, port: int) -> None:
    with Sandbox(source_of("return [float(os.getpid())]", model, port), LIMITS) as sandbox:
        first = sandbox.call(["attack"], {})
        assert sandbox.call(["attack"], {}) == first == [float(sandbox.pid or 0)]
        pid = sandbox.pid
    assert not Path(f"/proc/{pid}").exists()


def test_a_process_that_is_short_of_cpu_time_is_replaced_before_a_call(model: Path, port: int) -> None:
    limits = SandboxLimits(call_seconds=2.5, cpu_seconds=3)
    busy = "end = time.process_time() + 0.6\nwhile time.process_time() < end: pass\nreturn [float(os.getpid())]"
    with Sandbox("import time\n" + source_of(busy, model, port), limits) as sandbox:
        first = sandbox.call(["attack"], {})
        assert sandbox.call(["attack"], {}) != first


ORPHAN = """
from taskoffer_trainer.sandbox import Sandbox, SandboxLimits
sandbox = Sandbox("def reward(completions):\\n    while True: pass", SandboxLimits(call_seconds=600))
sandbox.start()
print(sandbox.pid, flush=True)
sandbox.call(["x"], {})
"""


def is_running(process: Path) -> bool:
    """Tell whether a process is more than a zombie, which it stays where nobody is there to reap it."""
    try:
        return not re.search(r"^State:\s+[ZX]", process.joinpath("status").read_text(), re.M)
    except OSError:
        return False


def test_a_busy_process_ends_with_the_one_that_asked(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", ORPHAN], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout as said:
        child = Path("/proc") / said.readline().strip()
    assert child.name.isdigit()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while is_running(child):
        assert time.monotonic() < deadline, "the process goes on alone"
        time.sleep(0.02)


def test_what_rewards_are_made_of_works(model: Path, port: int) -> None:
    source = """
        import ast, bisect, collections, copy, csv, dataclasses, datetime, decimal, difflib, enum, fractions, functools
        import hashlib, heapq, html, io, itertools, json, math, operator, random, re, statistics, string, textwrap
        import time, tokenize, typing, unicodedata, urllib.parse, xml.etree.ElementTree, zlib, zoneinfo, sqlite3
        def reward(completions, prompts, extra_data=None, **kwargs):
            random.seed(0); time.sleep(0.001); list(tokenize.generate_tokens(io.StringIO("a = 1").readline))
            sqlite3.connect(":memory:").execute("select 1").fetchall(); hashlib.sha256(b"").hexdigest()
            return [len(set(c.split())) + fractions.Fraction(1, 4) + (e == p) * 10 if p else None
                    for c, p, e in zip(completions, prompts, extra_data, strict=True)]
        """
    with Sandbox(textwrap.dedent(source), LIMITS) as sandbox:
        arguments = {"prompts": ["p", "", "q"], "extra_data": ["p", "", {"any": ["json"]}], "other": [1, 2, 3]}
        with pytest.raises(SandboxError, match=r"ValueError in line 8: zip"):
            sandbox.call(["a b"] * 2, {**arguments, "prompts": ["p"] * 2, "extra_data": [None]})
        assert sandbox.call(["a b", "", "c"], arguments) == [12.25, None, 1.25]


def test_a_function_gets_only_what_it_takes() -> None:
    with Sandbox("def reward(completions, prompts): return [float(p == 'p') for p in prompts]", LIMITS) as sandbox:
        assert sandbox.call(["c"], {"prompts": ["p"], "extra_data": ["e"]}) == [1.0]


def test_many_long_completions_go_through(model: Path, port: int) -> None:
    with Sandbox(source_of("pass", model, port), SandboxLimits()) as sandbox:
        assert sandbox.call(["ä" * 20000] * 100, {"prompts": ["p" * 1000] * 100}) == [20000.0] * 100


def test_a_source_that_fails_to_load_is_said_so() -> None:
    said = "No module named 'langcheck' in line 1: only Python's standard library"
    source = "import langcheck\ndef reward(completions): return []"
    with Sandbox(source, LIMITS) as sandbox, pytest.raises(SandboxError, match=said):
        sandbox.start()


def test_without_a_seccomp_filter_nothing_is_run() -> None:
    without = [one for one in LAYERS if one != SECCOMP]
    said = "only run under a seccomp filter"
    source = "def reward(completions): return []"
    with Sandbox(source, LIMITS, without) as sandbox, pytest.raises(SandboxError, match=said):
        sandbox.start()


def test_the_report_says_which_layer_keeps_the_network_away() -> None:
    source = "def reward(completions): return [1.0 for _ in completions]"
    with Sandbox(source, LIMITS, [one for one in LAYERS if one != NETWORK_NAMESPACE]) as sandbox:
        confined = sandbox.start()
        assert (confined.network, sandbox.call(["x"], {})) == (SECCOMP, [1.0])
        assert confined.to_wire()["network"] == SECCOMP
    with Sandbox(source, LIMITS) as sandbox:
        confined = sandbox.start()
        expected = SECCOMP if NETWORK_NAMESPACE in confined.refused else NETWORK_NAMESPACE
        assert confined.network == expected
        assert confined.describe().startswith(f"network kept away by {expected}")


ALONE = """
import socket, sys
sys.path.insert(0, sys.argv[1])
from taskoffer_trainer import confinement, seccomp
refused = confinement.confine(1 << 30, 60, (sys.argv[2],))[sys.argv[2]]
if refused:
    print("refused", refused)
else:
    try:
        socket.create_connection(("127.0.0.1", int(sys.argv[3])), 5)
        print("connected")
    except OSError as error:
        print("unconnected", error)
"""


def alone(layer: str, port: int) -> str:
    packages = str(Path(confinement.__file__).parent.parent)
    command = [sys.executable, "-ISB", "-c", ALONE, packages, layer, str(port)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60, env={}).stdout


@pytest.mark.parametrize("layer", [NETWORK_NAMESPACE, SECCOMP])
def test_each_of_the_two_layers_keeps_the_network_away_by_itself(layer: str, port: int) -> None:
    assert alone(confinement.LIMITS, port).startswith("connected")
    said = alone(layer, port)
    if said.startswith("refused"):
        pytest.skip(f"THIS KERNEL OR CONTAINER ALLOWS NO {layer}: {said}")
    assert said.startswith("unconnected")


def test_a_pod_without_user_namespaces_falls_back_to_seccomp(tmp_path: Path) -> None:
    # What RuntimeDefault does to a pod, done with the kernel's own limit: a namespace of users that may hold no other.
    code = "open('/proc/sys/user/max_user_namespaces', 'w').write('0'); import runpy, sys; sys.argv = sys.argv[1:]; "
    script = tmp_path / "start.py"
    script.write_text(
        "import json\nfrom taskoffer_trainer.sandbox import Sandbox, SandboxLimits\n"
        "with Sandbox('def reward(completions): return [1.0]', SandboxLimits()) as sandbox:\n"
        "    confined = sandbox.start()\n"
        "    print(json.dumps([confined.to_wire(), sandbox.call(['x'], {})]))\n"
    )
    command = ["unshare", "--user", "--map-root-user", sys.executable, "-c", code + "runpy.run_path(sys.argv[0])"]
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        pytest.skip(f"NO USER NAMESPACES HERE TO TAKE AWAY: {done.stderr[-300:]}")
    report, rewards = json.loads(done.stdout)
    assert (report["network"], rewards) == (SECCOMP, [1.0])
    assert NETWORK_NAMESPACE in report["refused"]


def run_filter(machine: str, number: int, arguments: tuple[int, ...] = (), architecture: int | None = None) -> str:
    """Run the program as the kernel would (classic BPF, Documentation/networking/filter.rst)."""
    actions = {0x7FFF0000: "allow", 0x80000000: "kill", 0x00050001: "EPERM"}
    padded = (*arguments, *(0,) * (6 - len(arguments)))
    arch = seccomp.ARCHITECTURES[machine] if architecture is None else architecture
    data = struct.pack("<IIQ6Q", number, arch, 0, *padded)
    program, place, value = seccomp.build_filter(machine), 0, 0
    while True:
        code, true, false, operand = program[place]
        if code == 0x06:
            return actions[operand]
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, operand)
            place += 1
        else:
            hit = value == operand if code == 0x15 else bool(value & operand)
            place += 1 + (true if hit else false)


CALLS: dict[str, tuple[str, tuple[int, int], tuple[int, ...], str]] = {
    "reading": ("read", (0, 63), (), "allow"),
    "opening to read": ("openat", (257, 56), (0xFFFFFF9C, 1, 0o2000000), "allow"),
    "opening to write": ("openat", (257, 56), (0xFFFFFF9C, 1, 0o1), "EPERM"),
    "opening to read and write": ("openat", (257, 56), (0xFFFFFF9C, 1, 0o2), "EPERM"),
    "creating": ("openat", (257, 56), (0xFFFFFF9C, 1, 0o100), "EPERM"),
    "opening by the newer call": ("openat2", (437, 437), (), "EPERM"),
    "a socket": ("socket", (41, 198), (2, 1, 0), "EPERM"),
    "a pair of sockets": ("socketpair", (53, 199), (1, 1, 0), "EPERM"),
    "an io_uring": ("io_uring_setup", (425, 425), (), "EPERM"),
    "a process": ("clone", (56, 220), (17,), "EPERM"),
    "a process by the newer call": ("clone3", (435, 435), (), "EPERM"),
    "another program": ("execve", (59, 221), (), "EPERM"),
    "a signal": ("kill", (62, 129), (1, 9), "EPERM"),
    "tracing": ("ptrace", (101, 117), (), "EPERM"),
    "another process's memory": ("process_vm_writev", (311, 271), (), "EPERM"),
    "duplicating a file": ("fcntl", (72, 25), (3, 1030, 5), "allow"),
    "a signal for a file": ("fcntl", (72, 25), (3, 10, 9), "EPERM"),
    "reading the own limits": ("prlimit64", (302, 261), (0, 3, 0, 1), "allow"),
    "setting the own limits": ("prlimit64", (302, 261), (0, 3, 1 << 32, 0), "EPERM"),
    "another process's limits": ("prlimit64", (302, 261), (7, 3, 0, 1), "EPERM"),
    "a mount": ("mount", (165, 40), (), "EPERM"),
    "a new namespace": ("unshare", (272, 97), (0x10000000,), "EPERM"),
}


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
@pytest.mark.parametrize(("name", "numbers", "arguments", "expected"), CALLS.values(), ids=CALLS.keys())
def test_the_filter_lets_through_what_computing_needs(
    machine: str, name: str, numbers: tuple[int, int], arguments: tuple[int, ...], expected: str
) -> None:
    number = numbers[list(seccomp.ARCHITECTURES).index(machine)]
    assert run_filter(machine, number, arguments) == expected, name
    # Numbers of another convention mean other calls.
    assert run_filter(machine, number, arguments, architecture=0x40000003) == "kill"


HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),
}


@pytest.mark.parametrize("machine", seccomp.ARCHITECTURES)
def test_the_numbers_are_those_of_the_kernel_headers(machine: str) -> None:
    if not HEADERS[machine].exists():
        pytest.skip(f"NO KERNEL HEADERS FOR {machine} HERE")
    column = list(seccomp.ARCHITECTURES).index(machine)
    defined = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", HEADERS[machine].read_text()))
    defined.setdefault("newfstatat", defined.get("fstatat", ""))
    ours = {**seccomp.ALLOWED, "fcntl": seccomp.FCNTL, "prlimit64": seccomp.PRLIMIT}
    ours |= {name: numbers[:2] for name, numbers in seccomp.OPEN.items()}
    ours |= {name: numbers for name, numbers, _, _ in CALLS.values()}
    for name, numbers in ours.items():
        if numbers[column] is not None:
            assert int(defined[name]) == numbers[column], name
        else:
            assert name not in defined
