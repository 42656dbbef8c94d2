"""Lists a repository of a model hub at one commit and chooses the files that training reads.

The hub's own library says what there is; the bytes come through :mod:`taskoffer_trainer.fetch`, which can stop and
go on, and which checks each file against what git or LFS know of it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import httpx2

from taskoffer.api.contract import ExitCode, FileFormat, HubFiles, ItemKind, NetworkSettings, RepoType
from taskoffer_trainer.addresses import TOO_MANY_REDIRECTS, make_client
from taskoffer_trainer.cache import CachedFile, key_of
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.fetch import Fetched, Fetching, Remote, Speaker, missing
from taskoffer_trainer.interrupt import Interrupt
from taskoffer_trainer.listing import Context, Listing, Wanted, check_path, secret
from taskoffer_trainer.model_files import choose_model_files, pickles_alone
from taskoffer_trainer.row_files import formats_of

__all__ = ["ask_hub", "choose_split", "connect", "fixed_key", "list_hub"]

_T = TypeVar("_T")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OTHER_SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")
_MAX_CARD = 1 << 20


def connect(network: NetworkSettings, token: str | None, stack: ExitStack) -> Any:
    """Return the hub's client (``HF_ENDPOINT`` names the hub), with time limits and with this token or none."""
    import huggingface_hub

    stack.callback(huggingface_hub.close_session)
    huggingface_hub.set_client_factory(lambda: make_client(network, guarded=False))
    return huggingface_hub.HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token or False, library_name="taskoffer")


def ask_hub(
    what: str, kind: ItemKind | None, network: NetworkSettings, interrupt: Interrupt, ask: Callable[[], _T]
) -> _T:
    """Ask the hub, again where that may help, and turn its errors into ours.

    Args:
        what: what is asked for, for messages.
        kind: whose fault it is when it is missing; None for a repository that is written to.
        network: tries and waits.
        interrupt: ends the wait.
        ask: the question.

    Raises:
        TrainerError: ``NO_ACCESS``, the code of a missing item, or ``RESTART`` when the hub does not answer.
    """
    from huggingface_hub import errors

    why = "it was never asked"
    for number in range(1, network.tries + 1):
        interrupt.check()
        try:
            return ask()
        except httpx2.TooManyRedirects as error:
            raise _gone(kind, f"{what}: {TOO_MANY_REDIRECTS}") from error
        except (errors.HfHubHTTPError, httpx2.TransportError) as error:
            why = _passing_fault(what, kind, error)
        except RuntimeError as error:
            # What fails in an upload comes wrapped in one.
            if isinstance(error.__cause__, TrainerError):
                raise error.__cause__ from None
            if not isinstance(error.__cause__, (errors.HfHubHTTPError, httpx2.TransportError)):
                raise
            why = _passing_fault(what, kind, error.__cause__)
        except ValueError as error:
            if not isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
                # A name that no repository can have, or what the hub does not take: it comes as no status.
                raise _gone(kind, f"{what}: {error}") from error
            # A page of a proxy, or of a hub that is being restarted.
            why = "its answer is no JSON"
        if number < network.tries:
            print(f"hub: {what}: {why}; trying again", flush=True)
            interrupt.wait(min(network.retry_wait_seconds * 2**number, 30.0))
    raise TrainerError(ExitCode.RESTART, "HubUnavailable", f"{what}: {why} ({network.tries} tries)")


def _passing_fault(what: str, kind: ItemKind | None, error: Exception) -> str:
    """Describe an error that may be gone the next time, and raise ours for one that stays."""
    from huggingface_hub import errors

    if not isinstance(error, errors.HfHubHTTPError):
        return str(error) or type(error).__name__
    status, said = error.response.status_code, error.server_message or ""
    if isinstance(error, errors.GatedRepoError):
        raise _no_access(what, "is gated, and the token's owner has not been let in") from error
    if isinstance(error, errors.RevisionNotFoundError):
        raise _gone(kind, f"{what}: there is no such revision") from error
    if status in (401, 403):
        raise _no_access(what, f"answered {status}: missing, or the token may not use it. {said}") from error
    if status == 404:
        raise _gone(kind, f"{what} was not found. {said}".rstrip()) from error
    if status not in (408, 429) and status < 500:
        raise _gone(kind, f"{what}: the hub answered {status}. {said}".rstrip()) from error
    return f"the hub answered {status}"


def _no_access(what: str, why: str) -> TrainerError:
    return TrainerError(
        ExitCode.NO_ACCESS, "AccessDenied", f"{what} {why.strip()}; check credentials.hubTokenFile and its rights"
    )


def _gone(kind: ItemKind | None, message: str) -> TrainerError:
    if kind is None:
        return TrainerError(ExitCode.VERIFY_FAILED, "SubmitRefused", message)
    return missing(kind, "NotFound", message)


def fixed_key(context: Context) -> str | None:
    """Return the key of a repository at a commit that the item names in full; None for a branch or tag."""
    hub = context.item.source.hub
    if hub is None or hub.revision is None or not _COMMIT.fullmatch(hub.revision):
        return None
    return _key(context, hub, hub.revision)


def _key(context: Context, hub: HubFiles, commit: str) -> str:
    chosen = (hub.config_name or "", hub.split or "", str(context.item.file_format or ""))
    patterns = ("|".join(hub.allow_patterns), "|".join(hub.ignore_patterns))
    return key_of("hub", hub.repo_type.value, hub.repository, commit, *chosen, *patterns)


def list_hub(context: Context) -> Listing:
    """List what training needs of a repository, at the commit that its revision stands for now."""
    from huggingface_hub import hf_hub_url

    item, hub = context.item, context.item.source.hub
    if hub is None:
        raise ValueError(f"item {item.name} is not on a hub")
    token = secret("hubTokenFile", context.credentials.hub_token_file)
    api = connect(context.network, token, context.stack)
    what = f"{hub.repo_type.value} {hub.repository}@{hub.revision or 'main'}"

    def entries() -> tuple[str, dict[str, Any]]:
        info = api.repo_info(hub.repository, revision=hub.revision, repo_type=hub.repo_type.value)
        tree = api.list_repo_tree(hub.repository, recursive=True, revision=info.sha, repo_type=hub.repo_type.value)
        return str(info.sha), {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}

    commit, files = ask_hub(what, item.kind, context.network, context.interrupt, entries)
    fetching = context.fetching(guarded=False)
    headers = {"Authorization": f"Bearer {token}"} if token else {}

    def wanted(path: str) -> Wanted:
        entry = files[path]
        url = hf_hub_url(hub.repository, path, repo_type=hub.repo_type.value, revision=commit, endpoint=api.endpoint)
        lfs = getattr(entry, "lfs", None)
        remote = Remote(
            label=f"{hub.repository}/{path}",
            url=url,
            kind=item.kind,
            headers=lambda: headers,
            size=entry.size,
            sha256=None if lfs is None else lfs.sha256,
            git_oid=entry.blob_id if lfs is None else None,
        )
        return Wanted(check_path(path, item.kind), _getter(fetching, remote), entry.size, remote.sha256)

    paths = _allowed(sorted(files), hub)
    file_format = None
    if hub.repo_type is RepoType.MODEL:
        chosen = paths if hub.allow_patterns else choose_model_files(paths)
        if pickles := pickles_alone(paths, chosen):
            raise missing(
                item.kind,
                "PicklesOnly",
                f"{what} has its weights as pickles alone ({', '.join(pickles[:3])}), which can run code and are not "
                "fetched; convert them to safetensors (save_pretrained writes them) or name a revision that has them",
            )
    else:
        card = _card(fetching, wanted, files)
        chosen, file_format = choose_split(paths, hub, item.file_format, card)
    if not chosen:
        raise missing(item.kind, "NothingToFetch", f"{what} holds none of the files that are wanted; see its patterns")
    key = _key(context, hub, commit)
    return Listing(key, tuple(wanted(path) for path in chosen), True, commit, file_format)


def _getter(fetching: Fetching, remote: Remote) -> Callable[..., Fetched]:
    def get(partial: Path, _known: CachedFile | None, limit: int | None, speaker: Speaker) -> Fetched:
        return fetching.fetch(replace(remote, known_etag=None), partial, limit, speaker)

    return get


def _allowed(paths: list[str], hub: HubFiles) -> list[str]:
    def matches(path: str, patterns: Iterable[str]) -> bool:
        return any(fnmatchcase(path, pattern + "*" if pattern.endswith("/") else pattern) for pattern in patterns)

    return [
        path
        for path in paths
        if (not hub.allow_patterns or matches(path, hub.allow_patterns)) and not matches(path, hub.ignore_patterns)
    ]


def choose_split(
    paths: list[str], hub: HubFiles, file_format: FileFormat | None, card: dict[str, Any]
) -> tuple[list[str], FileFormat]:
    """Choose the files of one split, all of one format.

    What the card says (``configs`` with ``data_files``) counts first, then the split's name as a word of the path;
    a data set that names no split at all is one split, ``train``.

    Raises:
        TrainerError: ``BAD_DATA`` with what there is.
    """
    split = hub.split or "train"
    by_card = _patterns_of_card(card, hub, split)
    if by_card is not None:
        of_split = [path for path in paths if any(_glob(path, pattern) for pattern in by_card)]
    else:
        inside = [path for path in paths if hub.config_name is None or hub.config_name in PurePosixPath(path).parts]
        of_split = [path for path in inside if _names_split(path, split)]
        if not of_split and split == "train" and not any(_names_split(p, s) for p in inside for s in _OTHER_SPLITS):
            of_split = inside
    found = formats_of(of_split)
    there = ", ".join(f"{len(files)} {one.value}" for one, files in found.items()) or "none"
    # A data set's folder is what hf names, in whatever format a repository has it.
    wanted = next(iter(found), None) if file_format in (None, FileFormat.HF) else file_format
    if wanted is None or wanted not in found:
        as_what = "" if file_format in (None, FileFormat.HF) else f" as {file_format.value}"
        raise missing(
            ItemKind.DATA,
            "SplitMissing",
            f"{hub.repository} has no files of split {split!r}{as_what} (files of it: {there}; of all splits: "
            f"{', '.join(p for files in formats_of(paths).values() for p in files[:3]) or 'none'}); set split, "
            "configName or fileFormat",
        )
    return _one_saved(found[wanted], hub, split) if wanted is FileFormat.HF else found[wanted], wanted


def _one_saved(paths: list[str], hub: HubFiles, split: str) -> list[str]:
    """Keep the one saved data set that is called like the split, or the only one that names it."""
    folders = sorted({PurePosixPath(path).parent for path in paths})
    chosen = [folder for folder in folders if folder.name == split] or folders
    if len(chosen) > 1:
        raise missing(
            ItemKind.DATA,
            "SplitAmbiguous",
            f"{hub.repository} has {len(chosen)} saved data sets of split {split!r} "
            f"({', '.join(map(str, chosen[:8]))}); set split or configName to the folder of one",
        )
    return [path for path in paths if PurePosixPath(path).parent == chosen[0]]


def _names_split(path: str, split: str) -> bool:
    return re.search(rf"(^|[/._-]){re.escape(split)}([/._-]|$)", path) is not None


def _glob(path: str, pattern: str) -> bool:
    """Match a pattern of a card, where ``*`` stays in a folder and ``**`` does not."""
    parts = re.split(r"(\*\*/?|\*|\?)", pattern.removeprefix("./"))
    words = {"**/": "(.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.fullmatch("".join(words.get(part, re.escape(part)) for part in parts), path) is not None


def _patterns_of_card(card: dict[str, Any], hub: HubFiles, split: str) -> list[str] | None:
    """Return the file patterns that a card gives for a split; None when it names no files.

    Raises:
        TrainerError: ``BAD_DATA`` when it names several subsets, none of them as the one to take, as ``datasets`` does.
    """
    listed = card.get("configs")
    configs = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
    configs = [one for one in configs if "data_files" in one]
    named = [one for one in configs if one.get("config_name") == hub.config_name] if hub.config_name else []
    named = named or [one for one in configs if one.get("default") or one.get("config_name") == "default"]
    if not configs or (hub.config_name and (named or configs)[0].get("config_name") != hub.config_name):
        return None
    if not named and len(configs) > 1:
        names = ", ".join(str(one.get("config_name")) for one in configs[:8])
        raise missing(
            ItemKind.DATA,
            "SplitAmbiguous",
            f"{hub.repository} has {len(configs)} subsets and none is the default ({names}); name one in configName",
        )
    files = (named or configs)[0]["data_files"]
    if isinstance(files, str) or (isinstance(files, list) and all(isinstance(one, str) for one in files)):
        return ([files] if isinstance(files, str) else files) if split == "train" else []
    found: list[Any] = []
    for one in files if isinstance(files, list) else []:
        if isinstance(one, dict) and one.get("split") == split:
            path = one.get("path")
            found += path if isinstance(path, list) else [path]
    return [one for one in found if isinstance(one, str)]


def _card(fetching: Fetching, wanted: Callable[[str], Wanted], files: dict[str, Any]) -> dict[str, Any]:
    """Read the front matter of a data set's card; empty where it has none that can be read."""
    if "README.md" not in files or files["README.md"].size > _MAX_CARD:
        return {}
    import tempfile

    import yaml

    with tempfile.TemporaryDirectory(prefix="taskoffer-") as folder:
        place = Path(folder) / "card.part"
        wanted("README.md").get(place, None, _MAX_CARD, Speaker("card"))
        text = place.read_text(encoding="utf-8", errors="replace")
    found = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    try:
        value = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        print(f"hub: the card's front matter cannot be read and is passed over: {error}", flush=True)
        return {}
    return value if isinstance(value, dict) else {}
