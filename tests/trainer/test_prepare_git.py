"""A foreign trainer comes at exactly its commit, only from its own repository, and only as plain files."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from dulwich.object_format import DEFAULT_OBJECT_FORMAT
from dulwich.pack import write_pack_objects

from git_server import Entry, GitRepository, GitServer, git_server
from taskoffer.api.contract import ExitCode, NetworkSettings
from taskoffer_trainer.interrupt import Interrupt

from .conftest import merge
from .step_runs import Place, contents, wait_for

FILES: dict[str, Entry] = {
    "train.py": b"print('training')\n",
    "recipes/small.yaml": b"r: 8\n",
    "recipes/deep/large.yaml": b"r: 64\n",
    "README.md": b"# A trainer\n",
    "run.sh": (0o100755, b"#!/bin/sh\n"),
}
PLAIN = {name: entry if isinstance(entry, bytes) else entry[1] for name, entry in FILES.items()}
LINK, SUBMODULE, FOLDER = 0o120000, 0o160000, 0o040000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[GitServer]:
    with git_server(tmp_path / "served") as serving:
        yield serving


@pytest.fixture(params=["dulwich", "git"])
def any_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[GitServer]:
    """Version 0 of the protocol, and version 2 as git itself speaks it."""
    if request.param == "git" and shutil.which("git") is None:
        pytest.skip("this machine has no git")
    with git_server(tmp_path / "served", native=request.param == "git") as serving:
        yield serving


def trainer(server: GitServer, commit: str, path: str = "/trainer", **changes: Any) -> dict[str, Any]:
    source = {"git": {"url": server.url + path, "commit": commit}}
    return merge({"name": "trainer", "kind": "trainer", "source": source}, changes)


def test_the_files_of_a_commit_come_as_they_are_and_without_its_history(place: Place, any_server: GitServer) -> None:
    repository = any_server.add()
    first = repository.commit({"big.bin": os.urandom(300_000)})
    commit = repository.commit(FILES, parent=first)
    ended = place.prepare(trainer(any_server, commit, source={"git": {"entrypoint": "train.py"}}))
    assert contents(place.item("trainer")) == PLAIN
    (item,) = ended.fetched
    assert (item.revision, item.files, item.bytes) == (commit, len(FILES), sum(map(len, PLAIN.values())))
    assert 0 < item.fetched_bytes < 10_000
    assert not list((place.cache / "incoming").glob("*"))


def test_a_commit_that_is_no_tip_comes_too(place: Place, any_server: GitServer) -> None:
    repository = any_server.add()
    commit = repository.commit(FILES)
    repository.commit({"later.bin": os.urandom(100_000)}, parent=commit)
    ended = place.prepare(trainer(any_server, commit))
    assert contents(place.item("trainer")) == PLAIN
    # Where the server can leave files out, what was added later does not come.
    assert (ended.fetched[0].fetched_bytes < 10_000) == any_server.native


def test_a_tag_with_a_message_stands_for_its_commit(place: Place, any_server: GitServer) -> None:
    from dulwich.objects import Commit, Tag

    repository = any_server.add()
    commit = repository.commit(FILES, ref=None)
    tag = Tag()
    tag.name, tag.message, tag.tagger = b"v1", b"One.", b"Ann <ann@example.com>"
    tag.tag_time, tag.tag_timezone = 1_700_000_000, 0
    tag.object = (Commit, commit.encode())
    repository.repo.object_store.add_object(tag)
    repository.repo.refs[b"refs/tags/v1"] = tag.id  # type: ignore[index]
    place.prepare(trainer(any_server, commit))
    assert contents(place.item("trainer")) == PLAIN


def test_a_commit_that_no_branch_or_tag_leads_to_is_not_of_this_repository(place: Place, any_server: GitServer) -> None:
    repository = any_server.add()
    repository.commit(FILES)
    # What a host keeps of forks and of requests to pull: it is there, and anybody may have written it.
    foreign = repository.commit({"train.py": b"steal()"}, ref="pull/7/head")
    error = place.refusal(trainer(any_server, foreign))
    assert (error.code, error.reason) == (ExitCode.BAD_DATA, "NotFound")
    assert f"no branch and no tag leads to commit {foreign}" in error.message
    assert not place.item("trainer").exists()


def test_a_second_job_takes_it_from_the_cache_without_asking(place: Place, server: GitServer) -> None:
    item = trainer(server, server.add().commit(FILES))
    place.prepare(item)
    asked = len(server.asked)
    ended = place.prepare(item, jobName="other")
    assert (len(server.asked), ended.fetched[0].fetched_bytes) == (asked, 0)
    assert ended.fetched[0].revision == item["source"]["git"]["commit"]
    assert contents(place.item("trainer", "other")) == PLAIN


def test_two_jobs_that_want_the_same_commit_fetch_it_once(place: Place, server: GitServer) -> None:
    item = trainer(server, server.add().commit({**FILES, "big.bin": os.urandom(100_000)}))
    jobs = ["job-0", "job-1"]
    processes = [place.start("prepare", place.config(item, jobName=job), name=job) for job in jobs]
    for job, process in zip(jobs, processes, strict=True):
        assert process.wait(60) == 0, place.log(job)
        assert contents(place.item("trainer", job)).keys() == {*PLAIN, "big.bin"}
    assert len([one for one in server.asked if one.startswith("POST")]) == 1


def test_a_link_within_the_commit_is_the_file_it_leads_to(place: Place, server: GitServer) -> None:
    links: dict[str, Entry] = {
        "main.py": (LINK, b"train.py"),
        "recipes/default.yaml": (LINK, b"deep/../best.yaml"),
        "recipes/best.yaml": (LINK, b"../recipes/small.yaml"),
    }
    place.prepare(trainer(server, server.add().commit({**FILES, **links})))
    found = contents(place.item("trainer"))
    assert found["main.py"] == PLAIN["train.py"]
    assert found["recipes/default.yaml"] == found["recipes/best.yaml"] == PLAIN["recipes/small.yaml"]
    assert not [path for path in place.item("trainer").rglob("*") if path.is_symlink()]


def in_circles(repository: GitRepository) -> str:
    """Folders that hold the one below ten times each: a few bytes, and ten thousand million files."""
    inner = repository.tree({b"f": b""})
    for _level in range(10):
        inner = repository.tree({b"%d" % number: (FOLDER, inner) for number in range(10)})
    return repository.commit({"bomb": (FOLDER, inner)})


def holding(**files: Entry) -> Callable[[GitRepository], str]:
    return lambda repository: repository.commit({**FILES, **{name.replace("__", "/"): e for name, e in files.items()}})


REFUSED: list[tuple[str, Callable[[GitRepository], str], dict[str, Any], str, list[str]]] = [
    ("a submodule", holding(lib=(SUBMODULE, b"1" * 40)), {}, "SubmoduleRefused", ["lib is a submodule", "commit its"]),
    ("a link out", holding(recipes__x=(LINK, b"../../etc/passwd")), {}, "LinkRefused", ["recipes/x", "leads out"]),
    ("a link to a root", holding(x=(LINK, b"/etc/passwd")), {}, "LinkRefused", ["leads out", "'/etc/passwd'"]),
    ("a link to nothing", holding(x=(LINK, b"gone.py")), {}, "LinkRefused", ["no file of the commit"]),
    ("a link to a folder", holding(x=(LINK, b"recipes")), {}, "LinkRefused", ["no file of the commit"]),
    ("links in a circle", holding(x=(LINK, b"y"), y=(LINK, b"x")), {}, "LinkRefused", ["no file of the commit"]),
    ("a file of git", holding(**{".Git": b"x"}), {}, "NameRefused", ["'.Git'"]),
    ("a name that is no text", lambda r: r.commit({"d": (FOLDER, r.tree({b"\xff.py": b"x"}))}), {}, "NameRefused",
     [r"b'\xff.py'"]),
    ("a folder that goes up", lambda r: r.commit({"d": (FOLDER, r.tree({b"..": (FOLDER, r.tree({b"x": b""}))}))}), {},
     "NameRefused", ["b'..'"]),
    ("a tree without end", in_circles, {}, "TooLarge", ["50000 files and folders"]),
    ("too many bytes on the way", holding(big=os.urandom(9000)), {"sizeLimit": 5000}, "TooLarge", ["allows, 5000"]),
    ("too many bytes unpacked", holding(big=b"0" * 900_000), {"sizeLimit": 5000}, "TooLarge", ["its files", "5000"]),
    ("no entrypoint", holding(), {"source": {"git": {"entrypoint": "src/main.py"}}}, "EntrypointMissing",
     ["no src/main.py", "train.py"]),
    ("an empty commit", lambda r: r.commit({}), {}, "Empty", ["no bytes"]),
    ("no commit of this name", lambda r: r.commit(FILES) and "1" * 40, {}, "NotFound", ["1" * 40]),
    ("no commit at all", lambda _r: "1" * 40, {}, "NotFound", ["1" * 40]),
]  # fmt: skip


@pytest.mark.parametrize(("what", "make", "item", "reason", "words"), REFUSED, ids=[case[0] for case in REFUSED])
def test_what_is_no_plain_folder_of_files_is_refused_with_its_name(
    what: str,
    make: Callable[[GitRepository], str],
    item: dict[str, Any],
    reason: str,
    words: list[str],
    place: Place,
    server: GitServer,
) -> None:
    error = place.refusal(trainer(server, make(server.add()), **item))
    assert (error.code, error.reason) == (ExitCode.BAD_DATA, reason), f"{what}: {error.message}"
    for word in words:
        assert word in error.message
    assert not place.item("trainer").exists()


@pytest.mark.parametrize("delta", [False, True], ids=["one file", "a delta"])
def test_a_pack_that_memory_cannot_take_is_refused_before_it_is_unpacked(
    delta: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dulwich.objects import Blob
    from dulwich.pack import write_pack_header, write_pack_object

    from taskoffer_trainer import git_pack

    small, large = Blob.from_string(b"0" * 1000), Blob.from_string(b"0" * 1_000_000)
    digest, path = hashlib.sha1(usedforsecurity=False), tmp_path / "pack"
    # In the format of deltas: from 1,000 bytes to 1,000,000, by a thousand copies of 1,000 bytes from the beginning.
    change = [b"\xe8\x07" + b"\xc0\x84\x3d" + b"\xb0\xe8\x03" * 1000]
    named = (7, (small.sha().digest(), change))
    objects = [(3, [small.as_raw_string()]), named] if delta else [(3, [large.as_raw_string()])]
    with path.open("wb") as file:

        def write(block: bytes) -> int:
            digest.update(block)
            return file.write(block)

        write_pack_header(write, len(objects))
        for kind, content in objects:
            write_pack_object(write, kind, content, DEFAULT_OBJECT_FORMAT)  # type: ignore[arg-type]
        file.write(digest.digest())
    assert path.stat().st_size < 5000
    assert git_pack.is_whole(path)
    with git_pack.open_pack(path, Interrupt()) as pack:
        assert large.id in pack
        assert len(pack) == len(objects)
    monkeypatch.setattr(git_pack, "MAX_UNPACKED", 500_000)
    monkeypatch.setattr(git_pack, "PackData", None)
    with pytest.raises(git_pack.PackError, match="unpacks to more than 500000 bytes") as caught:
        git_pack.open_pack(path, Interrupt())
    assert caught.value.reason == "TooLarge"


def test_a_pack_that_is_cut_short_is_broken(tmp_path: Path, server: GitServer) -> None:
    from taskoffer_trainer import git_pack

    repository = server.add()
    repository.commit(FILES)
    objects = [(repository.repo.object_store[oid], None) for oid in repository.repo.object_store]
    path = tmp_path / "pack"
    with path.open("wb") as file:
        write_pack_objects(file.write, objects, object_format=DEFAULT_OBJECT_FORMAT)
    whole = path.read_bytes()
    for end in range(12, len(whole) - 21, 7):
        path.write_bytes(whole[:end] + whole[-20:])
        assert not git_pack.is_whole(path)
        # What is left of a header may name any size.
        with pytest.raises(git_pack.PackError, match=r"cannot be read|unpacks to more"):
            git_pack.open_pack(path, Interrupt())


ADDRESSES: list[tuple[str, dict[str, Any], ExitCode, str, str]] = [
    ("/trainer", {"allowPrivateAddresses": False}, ExitCode.BAD_CONFIG, "AddressRefused", "127.0.0.1"),
    ("/trainer", {"allowHttp": False}, ExitCode.BAD_CONFIG, "AddressRefused", "https"),
    ("/trainer?x=1", {}, ExitCode.BAD_CONFIG, "AddressRefused", "no query"),
    ("/moved", {}, ExitCode.BAD_CONFIG, "AddressRefused", "ftp://example.com"),
    ("/page/trainer", {}, ExitCode.BAD_DATA, "NotFound", "is no git server, it answers text/html"),
    ("/nothing", {}, ExitCode.BAD_DATA, "NotFound", "answered 404"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "network", "code", "reason", "word"), ADDRESSES, ids=[f"{case[0]} {[*case[1]]}" for case in ADDRESSES]
)
def test_an_address_that_leads_elsewhere_is_refused(
    path: str, network: dict[str, Any], code: ExitCode, reason: str, word: str, place: Place, server: GitServer
) -> None:
    server.moved = {"/moved": "ftp://example.com/x"}
    commit = server.add().commit(FILES)
    error = place.refusal(trainer(server, commit, path), network=network)
    assert (error.code, error.reason) == (code, reason), error.message
    assert word in error.message


def test_a_redirect_within_what_is_allowed_is_followed(place: Place, server: GitServer) -> None:
    commit = server.add().commit(FILES)
    server.moved = {"/old": f"{server.url}/trainer"}
    place.prepare(trainer(server, commit, "/old"))
    assert contents(place.item("trainer")) == PLAIN


STATUSES = [
    (["503 Busy", "429 Slow down"], None, None),
    (["500 Fault"] * 3, ExitCode.RESTART, "NetworkFailed"),
    (["401 Who"], ExitCode.NO_ACCESS, "AccessDenied"),
    (["410 Gone"], ExitCode.BAD_DATA, "NotFound"),
]


@pytest.mark.parametrize(("statuses", "code", "reason"), STATUSES, ids=[str(case[0]) for case in STATUSES])
def test_a_server_that_is_busy_is_asked_again_and_one_that_refuses_is_not(
    statuses: list[str], code: ExitCode | None, reason: str | None, place: Place, server: GitServer
) -> None:
    item = trainer(server, server.add().commit(FILES))
    server.statuses = list(statuses)
    if code is None:
        place.prepare(item)
        assert contents(place.item("trainer")) == PLAIN
        return
    error = place.refusal(item)
    assert (error.code, error.reason) == (code, reason)
    assert server.statuses == []


@pytest.mark.parametrize("fault", [{"cut_after": 5000}, {"corrupt": 1}], ids=str)
def test_what_was_lost_on_the_way_comes_once_more(fault: dict[str, int], place: Place, server: GitServer) -> None:
    item = trainer(server, server.add().commit({**FILES, "big.bin": os.urandom(50_000)}))
    vars(server).update(fault)
    place.prepare(item)
    assert contents(place.item("trainer")).keys() == {*PLAIN, "big.bin"}
    assert len([one for one in server.asked if one.startswith("POST")]) == 2


def test_what_a_server_of_version_2_says_instead_of_a_pack_is_heard(tmp_path: Path) -> None:
    from dulwich.errors import GitProtocolError
    from dulwich.objects import ObjectID

    from taskoffer_trainer.addresses import make_client
    from taskoffer_trainer.git_http import GitHttp

    if shutil.which("git") is None:
        pytest.skip("this machine has no git")
    network = NetworkSettings(allow_http=True, allow_private_addresses=True)
    with git_server(tmp_path / "served", native=True) as server, make_client(network, guarded=True) as client:
        server.add().commit(FILES)
        asking = GitHttp(f"{server.url}/trainer", client, Interrupt())
        with pytest.raises(GitProtocolError, match="not our ref"):
            asking.take([ObjectID(b"1" * 40)], len)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_step_that_is_stopped_while_it_comes_is_finished_by_the_next(
    number: int, place: Place, server: GitServer
) -> None:
    item = trainer(server, server.add().commit({**FILES, "big.bin": os.urandom(200_000)}))
    server.hang = threading.Event()
    process = place.start("prepare", place.config(item, network={"timeoutSeconds": 600}))
    wait_for(lambda: server.sent > 0)
    process.send_signal(number)
    assert process.wait(20) == (143 if number == signal.SIGTERM else -9), place.log()
    assert not place.item("trainer").exists()
    server.hang.set()
    server.hang = None
    process = place.start("prepare", place.config(item))
    assert process.wait(60) == 0, place.log()
    assert contents(place.item("trainer")).keys() == {*PLAIN, "big.bin"}
