"""Asks before a training whether its result may be written where it is to go: hours later the answer costs them all.

Nothing is left there. A hub tells whether a token may write to a repository that exists, and whose a token is; a store
lets an upload in pieces be begun and given up. Only a refusal counts: an answer that decides nothing, or none at all,
leaves it to the hand-over itself.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import httpx2

from taskoffer.api.contract import BucketFiles, ExitCode, HubTarget, PrepareConfig
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.interrupt import Interrupt
from taskoffer_trainer.listing import secret

__all__ = ["check_target"]

_LATER = "whether the result can be handed over shows later"
_WRITES = "repo.write"
"""The permission of a fine-grained token that lets it create and change repositories."""


def check_target(config: PrepareConfig, interrupt: Interrupt) -> None:
    """Ask, and say what was found out.

    Raises:
        TrainerError: ``NO_ACCESS`` when the token or the key may not write there, ``BAD_CONFIG`` when the target is not
            what was meant or cannot be.
    """
    target = config.target
    if target is None or target.folder is not None:
        return
    name = target.hub.repository if target.hub is not None else target.s3.url if target.s3 is not None else ""
    try:
        said = _ask_hub(config, target.hub, interrupt) if target.hub else _ask_store(config, target.s3, interrupt)
    except TrainerError as error:
        if error.code == ExitCode.RESTART:
            said = f"{_LATER}: {error.message}"
        else:
            code = ExitCode.NO_ACCESS if error.code == ExitCode.NO_ACCESS else ExitCode.BAD_CONFIG
            raise TrainerError(code, error.reason, f"the result could not be handed over: {error.message}") from error
    print(f"prepare: target: {name}: {said}", flush=True)


def _ask_hub(config: PrepareConfig, target: HubTarget, interrupt: Interrupt) -> str:
    # Imported when used: the hub's library is slow to import.
    from huggingface_hub import errors

    from taskoffer_trainer.fetch_hub import ask_hub, connect
    from taskoffer_trainer.submit_hub import check_meant

    name, network = target.repository, config.network
    token = _needed("hubTokenFile", secret("hubTokenFile", config.credentials.hub_token_file))
    with ExitStack() as stack:
        api = connect(network, token, stack)

        def there() -> Any:
            try:
                return api.repo_info(name)
            except errors.GatedRepoError:
                raise
            except errors.RepositoryNotFoundError:
                return None

        def may_write() -> bool | None:
            try:
                api.auth_check(name, write=True)
            except errors.HfHubHTTPError as error:
                status = error.response.status_code
                if status in (401, 403, 408, 429) or status >= 500:
                    raise
                return None  # A hub that does not know the question.
            return True

        info = ask_hub(name, None, network, interrupt, there)
        if info is not None:
            check_meant(target, info)
            if ask_hub(f"writing to {name}", None, network, interrupt, may_write):
                return "the token may write there"
        who = _who(api)
    if (why := _why_not(who, name)) is not None:
        remedy = "give credentials.hubTokenFile a token that may write there, or name another repository"
        raise TrainerError(ExitCode.NO_ACCESS, "AccessDenied", f"{name}: {why}; {remedy}")
    here = "it is there" if info is not None else "it is not there yet, and will be created"
    return f"{here}; nothing speaks against writing to it"


def _needed(name: str, given: Any) -> Any:
    if given is None:
        raise TrainerError(
            ExitCode.BAD_CONFIG, "SecretMissing", f"credentials.{name}: nothing can be written without it"
        )
    return given


def _who(api: Any) -> dict[str, Any]:
    """Ask the hub whose the token is, once: it answers this question seldom. Empty where it does not say."""
    from huggingface_hub import errors

    try:
        return _fields(api.whoami())
    except (errors.HfHubHTTPError, httpx2.HTTPError, ValueError):
        # A token that the hub does not know at all has been refused before.
        return {}


def _fields(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _entries(found: Any) -> list[dict[str, Any]]:
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _why_not(who: dict[str, Any], name: str) -> str | None:
    """Return why the owner of a token cannot create a repository with it, or None where nothing says so.

    The answer's fields are those of https://huggingface.co/docs/huggingface.js/hub/interfaces/AuthInfo. A fine-grained
    token has its permissions beside them, by the account or repository that they are for.
    """
    token = _fields(_fields(who.get("auth")).get("accessToken"))
    owner, namespace = str(who.get("name", "")), name.partition("/")[0]
    if token.get("role") == "read":
        return f"the token of {owner} is one for reading"
    scopes = _entries(_fields(token.get("fineGrained")).get("scoped"))
    permissions = [one for scope in scopes if isinstance(given := scope.get("permissions"), list) for one in given]
    if permissions and _WRITES not in permissions:
        return f"the token of {owner} is a fine-grained one without {_WRITES}"
    spaces = [owner, *(str(org.get("name", "")) for org in _entries(who.get("orgs")))]
    if who.get("type") == "user" and "/" in name and namespace.casefold() not in {one.casefold() for one in spaces}:
        return f"the token is that of {owner}, who is no member of {namespace}"
    return None


def _ask_store(config: PrepareConfig, target: BucketFiles | None, interrupt: Interrupt) -> str:
    from taskoffer_trainer.buckets import read_keys
    from taskoffer_trainer.submit_files import may_write_to

    assert target is not None  # noqa: S101 - a target has exactly one member.
    _needed("s3CredentialsFile", read_keys(config.credentials))
    if may_write_to(target, config, interrupt):
        return "the key may write there"
    return f"{_LATER}: the store does not say"
