"""The step after a training: ``python -m taskoffer_trainer.submit`` hands the verified adapter over."""

from __future__ import annotations

import sys
from pathlib import Path

from taskoffer.api.contract import SUBMIT_CONFIG_PATH, ExitCode, Published, SubmitConfig, Termination
from taskoffer_trainer.buckets import read_keys
from taskoffer_trainer.cache import Cache
from taskoffer_trainer.checkpoints import ADAPTER_FOLDER
from taskoffer_trainer.failures import COMPLETED, TrainerError
from taskoffer_trainer.interrupt import Interrupt
from taskoffer_trainer.listing import secret
from taskoffer_trainer.mirror import provisional_folders
from taskoffer_trainer.step_command import run_step
from taskoffer_trainer.submit_verify import Part, check_mirrored, check_result, failed, is_verified

__all__ = ["main", "submit"]

_ABOUT = """\
Checks the adapter that a training has left, hands it over to a hub, a folder or a bucket as a SubmitConfig file says,
looks at what has arrived there, and gives up what the job holds in the cache. What a trainer that is not ours has left
is loaded onto the base model and used once before, as is the best adapter so far of a training that has ended early;
without a target it then stays where it is. Started again after it
was stopped, it hands over what is still lacking; when all is there, it says so."""

_MORE = """\
Exit codes: 0 all has arrived; 143 stopped by a signal and 138 please start again (the network): the same command goes
on; 64 bad configuration; 66 the base model cannot be loaded; 74 the result is empty, not what the training has
verified, not what it should be, or not what has arrived; 77 access was refused; 70 fault in the step.

Environment: HF_ENDPOINT (address of the hub), TASKOFFER_TERMINATION_LOG (termination message,
/dev/termination-log), and the usual HTTPS_PROXY, NO_PROXY and SSL_CERT_FILE. Secrets come as files only."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    return run_step("submit", _ABOUT, _MORE, SubmitConfig, SUBMIT_CONFIG_PATH, check, submit, arguments)


def check(config: SubmitConfig, interrupt: Interrupt) -> str:
    """Look at the result and the secrets without handing anything over.

    Raises:
        TrainerError: with what is wrong.
    """
    _check_secrets(config)
    parts = _checked(_located(config), interrupt)
    return f"{len(parts)} files of {sum(part.size for part in parts)} bytes are ready to be handed over"


def submit(config: SubmitConfig, interrupt: Interrupt) -> Termination:
    """Check the result, hand it over, look at what has arrived.

    Raises:
        TrainerError: with what is wrong.
    """
    _check_secrets(config)
    early, config = config.provisional, _located(config)
    parts = _checked(config, interrupt)
    published = _hand_over(config, parts, interrupt)
    if config.cache is not None:
        Cache.open(Path(config.cache.path), interrupt).release(config.job_name)
    message = f"{published.files} files of {published.bytes} bytes are at {published.to}"
    if early and not config.provisional:
        message += ": the verified adapter, which the training had put in place before it ended"
    return Termination(
        exit_code=ExitCode.DONE,
        reason=COMPLETED,
        message=message,
        adapter_dir=config.adapter_dir,
        adapter_sha256=next(part.sha256 for part in parts if part.name.endswith(".safetensors")),
        published=published,
    )


def _checked(config: SubmitConfig, interrupt: Interrupt) -> list[Part]:
    if not config.unverified:
        return check_result(config, interrupt)
    from taskoffer_trainer.submit_foreign import check_foreign

    return check_foreign(config, interrupt, check_mirrored(config, interrupt) if config.provisional else None)


def _located(config: SubmitConfig) -> SubmitConfig:
    """Return the configuration with the folder of the adapter itself, where one of several is to be handed over.

    A training whose node died when it had just put its verified adapter in place has left that instead, or both.

    Raises:
        TrainerError: ``VERIFY_FAILED`` when there is none.
    """
    if not config.provisional:
        return config
    verified = Path(config.adapter_dir).parent / ADAPTER_FOLDER
    if is_verified(verified, config):
        return config.model_copy(update={"adapter_dir": str(verified), "unverified": False, "provisional": False})
    found = provisional_folders(Path(config.adapter_dir))
    if not found:
        raise failed(
            "ResultEmpty",
            f"adapterDir: {config.adapter_dir} holds no adapter: the training has left none, or none that its own "
            "verification did not refuse",
        )
    return config.model_copy(update={"adapter_dir": str(found[-1])})


def _hand_over(config: SubmitConfig, parts: list[Part], interrupt: Interrupt) -> Published:
    target = config.target
    if target is None:
        from taskoffer_trainer.submit_foreign import add_missing

        add_missing(config, parts)
        return Published(to=config.adapter_dir, files=len(parts), bytes=sum(part.size for part in parts))
    # Imported when used: the hub's library is slow to import and the other two do without.
    if target.hub is not None:
        from taskoffer_trainer.submit_hub import to_hub

        return to_hub(config, target.hub, parts, interrupt)
    from taskoffer_trainer.submit_files import to_bucket, to_folder

    if target.s3 is not None:
        return to_bucket(config, target.s3, parts, interrupt)
    assert target.folder is not None  # noqa: S101 - a target has exactly one member.
    return to_folder(Path(target.folder), parts, interrupt)


def _check_secrets(config: SubmitConfig) -> None:
    token = secret("hubTokenFile", config.credentials.hub_token_file)
    keys = read_keys(config.credentials)
    target = config.target
    for name, needed, given in (
        ("hubTokenFile", target is not None and target.hub is not None, token),
        ("s3CredentialsFile", target is not None and target.s3 is not None, keys),
    ):
        if needed and given is None:
            raise TrainerError(
                ExitCode.BAD_CONFIG, "SecretMissing", f"credentials.{name}: nothing can be written without it"
            )


if __name__ == "__main__":
    sys.exit(main())
