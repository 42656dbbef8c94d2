"""One training process: notes signals first, then runs the method, and says in a file how it ended."""

from __future__ import annotations

import ctypes
import faulthandler
import json
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

from taskoffer.api.contract import ExitCode, RunConfig, Termination
from taskoffer_trainer.data import read_split
from taskoffer_trainer.failures import INTERNAL_ERROR, STOPPED, StopRequestedError, TrainerError
from taskoffer_trainer.figures import peaks
from taskoffer_trainer.stop import Stop
from taskoffer_trainer.termination import shorten

_PR_SET_PDEATHSIG = 1


def _ended(code: int, reason: str, message: str) -> Termination:
    return Termination(exit_code=code, reason=reason, message=shorten(message))


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    return isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError))


def run(config: RunConfig, run_dir: Path, rank: int, stop: Stop) -> Termination:
    """Run the method of the task and turn every way to end into a termination message."""
    try:
        # The rows come first: what is wrong with them shows before the heavy libraries are loaded.
        split = read_split(config)
        stop.check()
        from taskoffer_trainer.sft import train

        stop.check()
        return train(config, split, run_dir, rank, stop)
    except TrainerError as error:
        return _ended(error.code, error.reason, error.message)
    except StopRequestedError:
        return _ended(ExitCode.STOPPED, STOPPED, "stopped between two pieces of work; nothing is lost")
    except Exception as error:  # noqa: BLE001 - whatever it is, the operator must read it.
        traceback.print_exc()
        if _is_out_of_memory(error):
            hint = "a smaller train.perDeviceTrainBatchSize or train.maxLength needs less"
            message = f"rank {rank} ran out of memory; {hint}: {error}"
            return _ended(ExitCode.OUT_OF_MEMORY, "OutOfMemory", message).model_copy(update=peaks())
        return _ended(ExitCode.INTERNAL, INTERNAL_ERROR, f"rank {rank}: {type(error).__name__}: {error}")


def main() -> int:
    """Run this rank and return its exit code."""
    # A rank must not outlive the launcher, whatever happens to that.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    run_dir = Path(os.environ["TASKOFFER_RUN_DIR"])
    rank = int(os.environ.get("RANK", "0"))
    config = RunConfig.model_validate_json((run_dir / "run.json").read_bytes())
    if rank > 0:
        # All ranks would say the same; errors still go to stderr.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends.
    # transformers warns about a name that trl uses inside; nobody here can do anything about it.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated", category=FutureWarning)
    stop = Stop(config.deadline)
    stop.listen()
    # Where does it hang? ``kill -USR1`` writes the stack of every thread to the log.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    termination = run(config, run_dir, rank, stop)
    (run_dir / f"end-{rank}.json").write_text(json.dumps(termination.to_wire()), encoding="utf-8")
    sys.stdout.flush()
    sys.stderr.flush()
    return termination.exit_code


if __name__ == "__main__":
    code = main()
    # A normal exit would run library destructors, which can hang or abort when another rank is gone already.
    os._exit(code)
