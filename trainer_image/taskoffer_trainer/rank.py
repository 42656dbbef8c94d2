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
from datetime import datetime
from pathlib import Path

from taskoffer.api.contract import ExitCode, RunConfig, TaskType, Termination
from taskoffer_trainer.chat_data import read_chat
from taskoffer_trainer.clock import STARTED, Clock
from taskoffer_trainer.dpo_data import read_dpo
from taskoffer_trainer.effective import effective
from taskoffer_trainer.failures import INTERNAL_ERROR, STOPPED, StopRequestedError, TrainerError
from taskoffer_trainer.figures import peaks
from taskoffer_trainer.grpo_data import read_grpo
from taskoffer_trainer.image_data import read_pair_split
from taskoffer_trainer.instruct_data import read_instruct
from taskoffer_trainer.out_of_memory import is_out_of_memory
from taskoffer_trainer.rewards import open_rewards
from taskoffer_trainer.stop import Stop
from taskoffer_trainer.termination import shorten

_PR_SET_PDEATHSIG = 1


def _ended(code: int, reason: str, message: str) -> Termination:
    return Termination(exit_code=code, reason=reason, message=shorten(message))


def _train(config: RunConfig, run_dir: Path, rank: int, stop: Stop) -> Termination:
    """Read the rows and run the method.

    The rows come first: what is wrong with them shows before the heavy libraries are loaded.
    """
    # How many rows are held out depends on what this attempt runs with; what it was asked for is handed on.
    lower = effective(config).config
    if config.task_type is TaskType.IMAGE:
        captioned = read_pair_split(lower)
        stop.check()
        # While it is imported, transformers warns that torchvision, which nobody here needs, is absent.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from taskoffer_trainer import image

        return image.train(config, captioned, run_dir, rank, stop)
    if config.task_type is TaskType.DPO:
        pairs = read_dpo(lower)
        stop.check()
        from taskoffer_trainer import dpo

        return dpo.train(config, pairs, run_dir, rank, stop)
    if config.task_type is TaskType.GRPO:
        prompts = read_grpo(lower)
        with open_rewards(config, prompts.held_out) as rewards:
            stop.check()
            from taskoffer_trainer import grpo

            return grpo.train(config, prompts, rewards, run_dir, rank, stop)
    rows = read_chat(lower) if lower.task_type is TaskType.CHAT else read_instruct(lower)
    stop.check()
    from taskoffer_trainer import sft

    return sft.train(config, rows, run_dir, rank, stop)


def run(config: RunConfig, run_dir: Path, rank: int, stop: Stop) -> Termination:
    """Run the method of the task and turn every way to end into a termination message."""
    try:
        return _train(config, run_dir, rank, stop)
    except TrainerError as error:
        return _ended(error.code, error.reason, error.message)
    except StopRequestedError:
        return _ended(ExitCode.STOPPED, STOPPED, "stopped between two pieces of work; nothing is lost")
    except Exception as error:  # noqa: BLE001 - whatever it is, the operator must read it.
        traceback.print_exc()
        if is_out_of_memory(error):
            hint = "a smaller train.perDeviceTrainBatchSize or train.maxLength needs less"
            message = f"rank {rank} ran out of memory; {hint}: {error}"
            return _ended(ExitCode.RESTART, "OutOfMemory", message).model_copy(update=peaks())
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
    # PEFT looks for the ranks of a mixture's experts among its modules, and then finds them among its parameters.
    warnings.filterwarnings(
        "ignore", message=".*_pattern keys did not match any targeted module", category=RuntimeWarning
    )
    stop = Stop(Clock.of(config, datetime.fromisoformat(os.environ[STARTED])))
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
