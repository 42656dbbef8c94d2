"""Process 1 of the training pod: starts one process per GPU, passes signals on, and ends with one exit code.

It stays light (no torch), serves the progress endpoint, reaps every child, and is the only one that writes
the termination message. ``torchrun`` is not used, because it ends with exit code 1 after SIGTERM, which no
one can tell from a failure.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from taskoffer.api.contract import ExitCode, RunConfig, Termination
from taskoffer_trainer.checkpoints import (
    check_identity,
    complete_checkpoints,
    finished_run,
    kept_so_far,
    remove_checkpoints,
)
from taskoffer_trainer.clock import STARTED, Clock, process_started
from taskoffer_trainer.config import check_paths
from taskoffer_trainer.failures import INTERNAL_ERROR, KILLED, STOPPED, TrainerError
from taskoffer_trainer.fallback import note_end, note_kills
from taskoffer_trainer.figures import largest_peaks
from taskoffer_trainer.mirror import remove_provisional
from taskoffer_trainer.progress import ProgressServer, progress_port, read_report
from taskoffer_trainer.reporting import has_report, report_end
from taskoffer_trainer.run_log import kept_log

__all__ = ["ALLOCATOR", "RankEnd", "Ranks", "decide", "launch", "rank_environment"]

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(32 << 20), "MALLOC_TRIM_THRESHOLD_": str(512 << 20)}
"""glibc's settings for a rank. On a CPU a step frees and takes again what its tensors need; by default that goes back
to the kernel and is faulted in anew each time: 119 ms for a tiny model's step instead of 89 (benchmarks/trainer.py)."""

STRAGGLER_SECONDS = 10.0
"""How long the other ranks may go on after one has ended badly; as a rule they wait for it for ever."""

_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class RankEnd:
    """How one rank ended: its exit code (128 + signal when killed), when, and what it said itself."""

    rank: int
    code: int
    at: float
    by_us: bool = False
    said: Termination | None = None


def decide(ends: list[RankEnd]) -> RankEnd:
    """Choose the rank whose end explains the run.

    When a rank fails, the others fail after it in a collective operation, or are killed here. So a failure
    with a reason of its own comes before an internal error, which comes before a rank that was killed here;
    the earliest wins. Without a failure a stop wins over success, since the stopped rank has not finished its
    part.
    """
    failures = [end for end in ends if end.code not in (ExitCode.DONE, ExitCode.STOPPED) and not end.by_us]
    if failures:
        return min(failures, key=lambda end: (end.code == ExitCode.INTERNAL, end.at, end.rank))
    stopped = [end for end in ends if end.code == ExitCode.STOPPED]
    if stopped:
        return min(stopped, key=lambda end: (end.said is None, end.rank))
    killed = [end for end in ends if end.by_us]
    return min(killed or ends, key=lambda end: end.rank)


def rank_environment(config: RunConfig, rank: int, port: int, run_dir: Path, clock: Clock) -> dict[str, str]:
    """Return the environment of one rank: offline, caches in the run folder, one CPU thread by default."""
    env = dict(os.environ)
    # More than one OpenMP thread per rank on shared cores spins: 20 tiny steps took 47 s instead of 1.6 s.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        env.setdefault(name, "1")
    for name, value in ALLOCATOR.items():
        env.setdefault(name, value)
    env.update(
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        HF_DATASETS_OFFLINE="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        TOKENIZERS_PARALLELISM="false",
        PYTHONUNBUFFERED="1",
        TASKOFFER_RUN_DIR=str(run_dir),
    )
    env[STARTED] = clock.started.isoformat()
    # The root file system may be read-only and the user may have no home and no name.
    cache = run_dir / "cache"
    env.setdefault("HF_HOME", str(cache / "huggingface"))
    env.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache / "inductor"))
    env.setdefault("TRITON_CACHE_DIR", str(cache / "triton"))
    env.setdefault("XDG_CACHE_HOME", str(cache))
    env["TMPDIR"] = str(run_dir / "tmp")
    env.setdefault("USER", f"uid-{os.getuid()}")
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    if config.gpus > 1:
        env.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        env.update(WORLD_SIZE=str(config.gpus), LOCAL_WORLD_SIZE=str(config.gpus))
        # All ranks are in this pod. Gloo would otherwise look up the pod's host name, which needs a resolver.
        env.setdefault("GLOO_SOCKET_IFNAME", "lo")
    else:
        # With several GPUs in sight and one process, transformers would switch to nn.DataParallel.
        env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    return env


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Ranks:
    """The running training processes."""

    run_dir: Path
    processes: dict[int, subprocess.Popen[bytes]] = field(default_factory=dict)
    ends: list[RankEnd] = field(default_factory=list)
    killed: set[int] = field(default_factory=set)

    def start(self, config: RunConfig, clock: Clock) -> None:
        """Start one process per GPU, each in a session of its own, so that its whole tree can be ended."""
        port = _free_port() if config.gpus > 1 else 0
        for rank in range(config.gpus):
            self.processes[rank] = subprocess.Popen(
                [sys.executable, "-m", "taskoffer_trainer.rank"],
                env=rank_environment(config, rank, port, self.run_dir, clock),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def signal(self, number: int) -> None:
        """Send a signal to every running rank, not to the processes that load its data."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def kill(self) -> None:
        """End every running rank with all its processes at once."""
        for rank, process in self.processes.items():
            self.killed.add(rank)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def clear(self) -> None:
        """End whatever is still there, orphans of the ranks included, and wait until it is gone."""
        self.kill()
        deadline = time.monotonic() + STRAGGLER_SECONDS
        while self.reap() and time.monotonic() < deadline:
            time.sleep(0.01)

    def reap(self) -> bool:
        """Collect every child that has ended, orphans that were handed to this process too; tell if any is left."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return False
            if pid == 0:
                return True
            for rank, process in list(self.processes.items()):
                if process.pid == pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    del self.processes[rank]
                    self.ends.append(self._end(rank, process.returncode))
                    # What the rank started itself must not outlive it.
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL)

    def _end(self, rank: int, returncode: int) -> RankEnd:
        path = self.run_dir / f"end-{rank}.json"
        said, at = None, time.time()
        with contextlib.suppress(FileNotFoundError, ValidationError):
            at = path.stat().st_mtime
            said = Termination.model_validate_json(path.read_bytes())
        code = 128 - returncode if returncode < 0 else returncode
        return RankEnd(rank, code, at, rank in self.killed and returncode == -signal.SIGKILL, said)


@contextlib.contextmanager
def _signals() -> Iterator[tuple[int, list[int]]]:
    """Collect SIGTERM and SIGINT in a list; the yielded descriptor becomes readable with every signal."""
    received: list[int] = []
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def note(number: int, _frame: object) -> None:
        if number != signal.SIGCHLD:
            received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)}
    old = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield reader, received
    finally:
        signal.set_wakeup_fd(old)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)


def _wait(ranks: Ranks, reader: int, received: list[int]) -> None:
    """Pass signals on and reap until no rank is left."""
    deadline: float | None = None
    passed = 0
    while ranks.processes:
        timeout = 1.0 if deadline is None else max(0.0, min(1.0, deadline - time.monotonic()))
        if select.select([reader], [], [], timeout)[0]:
            os.read(reader, 4096)
        for number in received[passed:]:
            passed += 1
            again = number == signal.SIGINT and signal.SIGINT in received[: passed - 1]
            print(f"trainer: got {signal.Signals(number).name}, {'killing' if again else 'stopping'} the ranks")
            if again:
                ranks.kill()
            else:
                ranks.signal(signal.SIGTERM)
        ranks.reap()
        if deadline is None and any(end.code != ExitCode.DONE for end in ranks.ends):
            deadline = time.monotonic() + STRAGGLER_SECONDS
            ranks.signal(signal.SIGTERM)
        if deadline is not None and time.monotonic() >= deadline and ranks.processes:
            print(f"trainer: ranks {sorted(ranks.processes)} did not follow, killing them")
            ranks.kill()
            deadline = time.monotonic() + STRAGGLER_SECONDS


def _termination(end: RankEnd) -> Termination:
    """Say how the run ended in the words of the rank that explains it, or in ours when it said nothing."""
    if end.said is not None and end.said.exit_code == end.code:
        return end.said
    if end.code == ExitCode.STOPPED:
        return Termination(exit_code=end.code, reason=STOPPED, message="stopped before the training had begun")
    if end.code > 128:
        name = signal.Signals(end.code - 128).name if end.code - 128 in set(signal.Signals) else str(end.code - 128)
        hint = "; as a rule the container ran out of memory" if end.code == ExitCode.KILLED else ""
        if end.by_us:
            hint = " by the launcher, because it did not stop"
        return Termination(exit_code=end.code, reason=KILLED, message=f"rank {end.rank} was killed by {name}{hint}")
    return Termination(
        exit_code=end.code,
        reason=INTERNAL_ERROR,
        message=f"rank {end.rank} ended with exit code {end.code} and gave no reason; see the log",
    )


def _check_deadline(config: RunConfig, clock: Clock) -> None:
    """Refuse to begin after the deadline; what was trained before it may still be exported."""
    left = clock.left()
    if left is not None and left <= 0 and not complete_checkpoints(config):
        raise TrainerError(
            ExitCode.BAD_CONFIG,
            "DeadlinePassed",
            f"deadline: {clock.deadline:%Y-%m-%dT%H:%M:%SZ} has passed and nothing was trained before it",
        )


def launch(config: RunConfig) -> Termination:
    """Run one attempt to its end and say how it ended.

    Raises:
        TrainerError: when the run cannot be started.
    """
    clock = Clock.of(config, process_started())
    done = finished_run(config)
    if done is not None:
        print(f"trainer: {config.checkpoint_dir} holds this run finished with its adapter; nothing to do")
        # The attempt that finished it may have been killed before it had tidied up and reported.
        remove_provisional(config)
        if not has_report(config):
            report_end(config, clock, done)
        remove_checkpoints(config)
        return done
    check_paths(config)
    heading = f"--- {config.job_name}, attempt {config.attempt}, started {clock.started:%Y-%m-%dT%H:%M:%SZ}"
    with kept_log(Path(config.output_dir), heading):
        check_identity(config)
        _check_deadline(config, clock)
        _take_over_kills(config)
        return _attempt(config, clock)


def _take_over_kills(config: RunConfig) -> None:
    """Ask for less where earlier attempts were killed for lack of memory before they could leave word of it."""
    try:
        profile = note_kills(config)
    except OSError as error:
        print(f"trainer: no fallback profile could be noted in {config.checkpoint_dir}: {error}", flush=True)
        return
    if profile is not None:
        killed = ", ".join(map(str, config.lacked_memory or ()))
        print(f"trainer: attempt {killed} was killed for lack of memory; going on with fallback profile {profile}")


def _attempt(config: RunConfig, clock: Clock) -> Termination:
    """Run the ranks, report what came of it, and say how they ended."""
    # Grandchildren whose parent died come to this process as they would to process 1, so that none stays a
    # zombie.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with _signals() as (reader, received), tempfile.TemporaryDirectory(prefix="taskoffer-") as folder:
        run_dir = Path(folder)
        (run_dir / "tmp").mkdir()
        (run_dir / "run.json").write_text(config.model_dump_json(by_alias=True, exclude_none=True), encoding="utf-8")
        server = ProgressServer(progress_port(), run_dir, config, clock)
        try:
            print(
                f"trainer: {config.job_name} attempt {config.attempt}, {config.gpus} process(es), "
                f"progress on http://0.0.0.0:{server.port}/progress",
                flush=True,
            )
            ranks = Ranks(run_dir)
            try:
                ranks.start(config, clock)
                _wait(ranks, reader, received)
            finally:
                ranks.clear()
            end = decide(ranks.ends)
            figures = largest_peaks(rank.said for rank in ranks.ends)
            termination = _termination(end).model_copy(update={"exit_code": _exit_code(end), **figures})
            if end.code != ExitCode.DONE and (done := finished_run(config)) is not None:
                print(f"trainer: {termination.message or termination.reason}, but its work was done before")
                remove_provisional(config)
                termination = done
            termination = _completed(config, clock, run_dir, termination)
            # A signal does not come through here any more: what there is to save has been saved.
            report_end(config, clock, termination)
            if termination.exit_code == ExitCode.DONE:
                # Not earlier, for the report's losses are read from the newest of them.
                remove_checkpoints(config)
            if not received:
                _fall_back(config, termination)
        finally:
            server.close()
        return termination


def _completed(config: RunConfig, clock: Clock, run_dir: Path, termination: Termination) -> Termination:
    """Say what a rank that failed had no time to: how far it came, its clamps, its checkpoints and its best adapter."""
    report = read_report(run_dir / "progress.json", config, clock)
    told: dict[str, object] = {"clamps": termination.clamps or report.clamps}
    if termination.exit_code != ExitCode.DONE:
        told["provisional"] = report.provisional
        if termination.total_steps is None:
            told |= {"step": report.step, "total_steps": report.total_steps}
            told["resumed_from_step"] = report.resumed_from_step
        with contextlib.suppress(OSError):
            told["checkpoint"], told["best_eval_loss"] = kept_so_far(config)
    if termination.samples is None:
        told["samples"] = next((int(one.value) for one in report.metrics if one.name == "samples_total"), None)
    return termination.model_copy(update=told)


def _fall_back(config: RunConfig, termination: Termination) -> None:
    """Let the next attempt ask for less where that may help; after a signal the failure may be of its making."""
    try:
        profile = note_end(config, termination)
    except OSError as error:
        # What has ended the attempt is what the operator must read, and not that its disk is full as well.
        print(f"trainer: no fallback profile could be noted in {config.checkpoint_dir}: {error}", flush=True)
        return
    if profile is not None:
        print(f"trainer: {termination.reason}; the next attempt goes on with fallback profile {profile}", flush=True)


def _exit_code(end: RankEnd) -> int:
    # A second Ctrl-C kills the ranks here; that is an interrupt and not a lack of memory.
    return 128 + signal.SIGINT if end.by_us else end.code
