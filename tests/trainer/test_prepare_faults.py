"""Connections that break, bytes that change, servers that fail, and pods that are killed: nothing half is ever seen."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest

from file_server import WebFile, sha256
from hub_server import hub_server
from taskoffer.api.contract import ExitCode, PrepareConfig
from taskoffer_trainer.cache import Cache
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.interrupt import Interrupt
from taskoffer_trainer.prepare import main, prepare

from .step_runs import Place, contents, dataset, model, wait_for, web

ROWS = random.Random(1).randbytes(200_000)


def rows(place: Place, path: str = "/files/rows", **changes: Any) -> dict[str, Any]:
    place.hub.files.setdefault("rows", WebFile(ROWS, '"v1"'))
    return web(place.hub.url + path, **changes)


def test_a_connection_that_breaks_goes_on_where_it_was(place: Place) -> None:
    place.hub.faults.cut_after, place.hub.faults.cuts = 50_000, 3
    ended = place.prepare(rows(place))
    assert contents(place.item()) == {"data.jsonl": ROWS}
    assert ended.fetched[0].fetched_bytes == len(ROWS)
    ranges = [one.headers.get("range") for one in place.hub.requests("GET", "/files/rows")]
    assert len(ranges) == 4
    assert ranges[0] is None
    assert all(text is not None and int(text.removeprefix("bytes=").rstrip("-")) > 0 for text in ranges[1:])
    assert all("if-range" in one.headers for one in place.hub.requests("GET", "/files/rows")[1:])


def test_a_server_without_ranges_begins_again(place: Place) -> None:
    place.hub.files["rows"] = WebFile(ROWS, '"v1"', ranges=False)
    place.hub.faults.cut_after, place.hub.faults.cuts = 50_000, 1
    place.prepare(rows(place))
    assert contents(place.item()) == {"data.jsonl": ROWS}


def test_a_server_that_does_not_say_how_long_a_file_is_cannot_be_relied_upon_and_the_log_says_so(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = b"row\n" * 1000
    place.hub.files["rows"] = WebFile(rows, length=False)
    place.prepare(web(f"{place.hub.url}/files/rows"))
    assert "does not say how long it is; a sha256 would tell" in capsys.readouterr().out
    place.prepare(web(f"{place.hub.url}/files/rows", sha256=sha256(rows)), jobName="other")
    assert "does not say how long" not in capsys.readouterr().out
    place.hub.faults.cut_after, place.hub.faults.cuts = 0, 9
    cut = place.refusal(web(f"{place.hub.url}/files/rows?2", sha256=sha256(rows + b"more")), jobName="third")
    assert (cut.code, cut.reason) == (ExitCode.BAD_DATA, "ChecksumMismatch")


def test_a_file_that_changes_between_two_tries_is_not_mixed(place: Place) -> None:
    place.hub.faults.cut_after, place.hub.faults.cuts = 50_000, 1
    other = ROWS[::-1]
    item = rows(place)

    asked = place.hub.asked
    changer = threading.Thread(
        target=lambda: (
            wait_for(lambda: place.hub.faults.cuts == 0),
            place.hub.files.update(rows=WebFile(other, '"v2"')),
        )
    )
    changer.start()
    place.prepare(item, network={"retryWaitSeconds": 0.5})
    changer.join()
    assert contents(place.item()) == {"data.jsonl": other}
    assert len([one for one in asked if "/files/rows" in one.path]) == 2


@pytest.mark.parametrize("repository", [False, True], ids=["address", "hub"])
def test_bytes_that_were_lost_on_the_way_are_fetched_once_more(repository: bool, place: Place) -> None:
    place.hub.faults.corrupt = 1
    if repository:
        place.hub.add("acme/data", {"train.parquet": ROWS, "more.txt": b"x"}, kind="dataset")
        place.prepare(dataset())
        assert contents(place.item()) == {"train.parquet": ROWS}
    else:
        place.prepare(rows(place, sha256=sha256(ROWS)))
        assert contents(place.item()) == {"data.jsonl": ROWS}


def test_bytes_that_are_always_wrong_are_the_data_s_fault(place: Place) -> None:
    place.hub.add("acme/data", {"train.csv": b"a,b\n1,2\n"}, kind="dataset")
    place.hub.faults.corrupt = 99
    error = place.refusal(dataset())
    assert (error.code, error.reason) == (ExitCode.BAD_DATA, "ChecksumMismatch")
    assert "acme/data/train.csv is git object" in error.message
    assert not place.item().exists()


def test_a_server_that_is_busy_is_asked_again_and_then_the_step_asks_to_be_started_again(place: Place) -> None:
    place.hub.faults.statuses = [503, 429]
    place.prepare(rows(place))
    assert contents(place.item()) == {"data.jsonl": ROWS}
    place.hub.faults.statuses = [500] * 9
    error = place.refusal(rows(place, sha256=sha256(b"another")), jobName="other")
    assert (error.code, error.reason) == (ExitCode.RESTART, "NetworkFailed")
    assert "3 tries brought nothing new: the server answered 500" in error.message
    place.hub.faults.statuses = [502] * 9
    error = place.refusal(model(), jobName="third")
    assert (error.code, error.reason) == (ExitCode.RESTART, "HubUnavailable")


def test_a_server_that_hangs_is_given_up(place: Place) -> None:
    place.hub.faults.hang, place.hub.faults.hang_at = threading.Event(), 50_000
    error = place.refusal(rows(place), network={"timeoutSeconds": 0.3, "tries": 2})
    assert (error.code, error.reason) == (ExitCode.RESTART, "NetworkFailed")
    # What it did send is still there for the next attempt.
    place.hub.faults.hang.set()
    place.hub.faults.hang = None
    before = place.hub.sent("rows")
    place.prepare(rows(place))
    assert place.hub.sent("rows") - before < len(ROWS)
    assert contents(place.item()) == {"data.jsonl": ROWS}


def test_a_step_that_is_killed_twenty_times_ends_with_the_right_content(place: Place) -> None:
    # Twice ten times, side by side: it is the same for each who else there is.
    (place.root / "other").mkdir()
    with hub_server() as hub, ThreadPoolExecutor(2) as pool:
        other = Place(place.root / "other", hub)
        try:
            stages = list(pool.map(killed_ten_times, (place, other), (7, 8)))
        finally:
            other.stop()
    assert len({*stages[0], *stages[1]}) > 1


def killed_ten_times(place: Place, seed: int) -> list[int]:
    """Kill a step ten times, see each time that nothing half is there, and return after how many requests it died."""
    files = {
        "config.json": b"{}",
        "model.safetensors.index.json": b"{}",
        **{f"model-0000{n}-of-00004.safetensors": os.urandom(40_000 + n) for n in range(4)},
    }
    place.hub.add("acme/model", files)
    place.hub.faults.block, place.hub.faults.block_seconds = 4096, 0.004
    config = place.config(model(), rows(place, sha256=sha256(ROWS)))
    chance = random.Random(seed)
    stages: list[int] = []
    for _number in range(10):
        process = place.start("prepare", config)
        # Somewhere between its first request and its end, by what it has asked for so far.
        begun, more = len(place.hub.asked), chance.randrange(0, 14)
        wait_for(partial(asked_or_ended, place, begun + more, process))
        process.kill()
        process.wait()
        stages.append(len(place.hub.asked) - begun)
        for item, wanted in (("model", files), ("data", {"data.jsonl": ROWS})):
            # Never half an item: not there, or whole.
            if place.item(item).exists():
                assert contents(place.item(item)) == wanted
    process = place.start("prepare", config)
    assert process.wait(60) == 0, place.log()
    assert contents(place.item("model")) == files
    assert contents(place.item("data")) == {"data.jsonl": ROWS}
    for blob in (place.cache / "blobs").rglob("*"):
        assert blob.is_dir() or sha256(blob.read_bytes()) == blob.name
    assert not list((place.cache / "incoming").glob("*/*"))
    # Killed so often, it still took each byte about once.
    assert place.hub.sent("/cdn/") < 2 * sum(map(len, files.values()))
    return stages


def asked_or_ended(place: Place, requests: int, process: subprocess.Popen[str]) -> bool:
    return len(place.hub.asked) > requests or process.poll() is not None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_step_at_once_and_the_next_goes_on(number: int, place: Place) -> None:
    place.hub.faults.hang = threading.Event()
    item = rows(place)
    process = place.start("prepare", place.config(item, network={"timeoutSeconds": 600}))
    wait_for(lambda: place.hub.sent("rows") > 0)
    wait_for(lambda: any(part.stat().st_size for part in place.cache.glob("incoming/*/*.part")))
    process.send_signal(number)
    assert process.wait(20) == 143, place.log()
    assert (place.end()["exitCode"], place.end()["reason"]) == (143, "Stopped")
    place.hub.faults.hang.set()
    place.hub.faults.hang = None
    process = place.start("prepare", place.config(item))
    assert process.wait(60) == 0, place.log()
    assert "going on at byte" in place.log()
    assert contents(place.item()) == {"data.jsonl": ROWS}


def test_two_jobs_that_want_the_same_fetch_it_once(place: Place) -> None:
    files = {"config.json": b"{}", "model.safetensors": os.urandom(150_000)}
    place.hub.add("acme/model", files)
    place.hub.faults.block_seconds = 0.03
    item = rows(place)
    place.hub.files["rows"] = WebFile(ROWS, None)
    jobs = [f"job-{number}" for number in range(3)]
    processes = [place.start("prepare", place.config(model(), item, jobName=job), name=job) for job in jobs]
    for job, process in zip(jobs, processes, strict=True):
        assert process.wait(60) == 0, place.log(job)
        assert contents(place.item("model", job)) == files
        assert contents(place.item("data", job)) == {"data.jsonl": ROWS}
    assert place.hub.sent("/cdn/") == len(files["model.safetensors"])
    # Without an entity tag nobody can know that the file is the same, but for one that was fetched meanwhile.
    assert place.hub.sent("/files/rows") <= 2 * len(ROWS)
    fetched = [
        sum(item["fetchedBytes"] for item in place.end(job)["fetched"] if item["name"] == "model") for job in jobs
    ]
    assert sorted(fetched)[:2] == [0, 0]


def test_a_holder_of_a_lock_that_dies_gives_it_back(place: Place) -> None:
    place.hub.faults.hang = threading.Event()
    item = rows(place)
    holder = place.start("prepare", place.config(item, network={"timeoutSeconds": 600}), name="holder")
    wait_for(lambda: place.hub.sent("rows") > 0)
    waiter = place.start("prepare", place.config(item, jobName="waiter"), name="waiter")
    wait_for(lambda: "waiting for another pod that has data" in place.log("waiter"))
    place.hub.faults.hang.set()
    holder.kill()
    holder.wait()
    assert waiter.wait(60) == 0, place.log("waiter")
    assert contents(place.item(job="waiter")) == {"data.jsonl": ROWS}


def test_a_full_cache_asks_for_another_try_and_one_that_is_too_small_does_not(place: Place) -> None:
    for name, content in {"data": ROWS, "more": ROWS[::-1]}.items():
        place.hub.add(f"acme/{name}", {"train.parquet": content}, kind="dataset")
    cache = {"sizeLimit": 300_000, "minAgeSeconds": 0}
    place.prepare(dataset("acme/data"), cache=cache)
    error = place.refusal(dataset("acme/more"), jobName="other", cache=cache)
    assert (error.code, error.reason) == (ExitCode.RESTART, "CacheFull")
    assert contents(place.item()) == {"train.parquet": ROWS}
    tight = place.refusal(dataset("acme/more"), jobName="third", cache={"sizeLimit": 1000})
    assert (tight.code, tight.reason) == (ExitCode.BAD_CONFIG, "CacheTooSmall")
    # The first job is over: what it had may go.
    Cache.open(place.cache, Interrupt()).release("job")
    place.prepare(dataset("acme/more"), jobName="other", cache=cache)
    assert contents(place.item(job="other")) == {"train.parquet": ROWS[::-1]}
    assert not (place.cache / "blobs" / sha256(ROWS)[:2] / sha256(ROWS)).exists()


def test_a_disk_without_room_is_seen_before_anything_comes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.hub.add("acme/data", {"train.parquet": ROWS}, kind="dataset")

    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda _path: Usage)
    error = place.refusal(dataset())
    assert (error.code, error.reason) == (ExitCode.RESTART, "CacheFull")
    assert place.hub.sent("/cdn/") == 0


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"items": [web("https://b.example/k?X-Amz-Signature=topsecret", sha256="zz")]}, ["items.0.sha256"]),
    ({"items": [web("file:///etc/passwd?topsecret")]}, ["items.0.source.url.url"]),
    ({"items": [{**web("https://b.example/k"), "kind": "model"}]}, ["a model is a folder and an address is one file"]),
    ({"items": [{**model(), "sha256": "0" * 64}]}, ["pin source.hub.revision"]),
    ({"items": [{"name": "data", "kind": "data", "source": {}}]}, ["exactly one of hub, git, url, s3 and path"]),
    ({"items": [model(), model()]}, ["two have the same name"]),
    ({"items": []}, ["items"]),
    ({"items": [{**model(), "name": "../up"}]}, ["items.0.name"]),
    ({"jobName": "../up"}, ["jobName"]),
    ({"deadline": "2025-01-01T00:00:00Z"}, ["2025-01-01T00:00:00Z has passed"]),
    ({"credentials": {"hubTokenFile": "/nowhere/token"}}, ["credentials.hubTokenFile", "/nowhere/token"]),
    ({"cache": {"path": "/proc/cache"}}, ["cache.path: /proc/cache", "hard links"]),
]


@pytest.mark.parametrize(("change", "words"), WRONG, ids=[case[1][0] for case in WRONG])
def test_a_wrong_configuration_is_refused_by_its_field_and_never_quoted(
    change: dict[str, Any],
    words: list[str],
    place: Place,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TASKOFFER_TERMINATION_LOG", str(place.root / "step-end.json"))
    path = place.secret("config.json", json.dumps({**place.config(model()), **change}))
    keep = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with monkeypatch.context() as patch:
            for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY"):
                patch.setenv(name, os.environ.get(name, "1"))
            patch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")
            code = main(["--config", path, "--check"])
    finally:
        for number, handler in keep.items():
            signal.signal(number, handler)
    said = capfd.readouterr()
    assert code == ExitCode.BAD_CONFIG, said
    assert place.end()["exitCode"] == ExitCode.BAD_CONFIG
    for word in words:
        assert word in place.end()["message"]
    assert "topsecret" not in said.out + said.err + str(place.end())


def test_the_commands_say_what_they_do_and_check_without_fetching(place: Place) -> None:
    place.hub.add("acme/model", {"config.json": b"{}"})
    check = place.start("prepare", place.config(model(), rows(place)), "--check", name="check")
    assert check.wait(60) == 0, place.log("check")
    assert "ready to fetch model, data for job" in place.log("check")
    assert place.hub.asked == []
    about = place.start("submit", {}, "--help", name="help")
    assert about.wait(60) == 0
    assert "Exit codes" in place.log("help")


def test_no_secret_is_in_the_log(place: Place) -> None:
    place.hub.token = "hf_topsecret"
    place.hub.add("acme/model", {"config.json": b"{}", "model.safetensors": ROWS}, private=True)
    place.hub.faults.cut_after, place.hub.faults.cuts = 20_000, 2
    config = place.config(
        model(),
        rows(place, "/signed/rows?X-Amz-Signature=topsecret"),
        credentials={"hubTokenFile": place.secret("token", "hf_topsecret")},
    )
    process = place.start("prepare", config)
    assert process.wait(60) == ExitCode.NO_ACCESS, place.log()
    assert place.end()["reason"] == "UrlExpired"
    assert "topsecret" not in place.log() + str(place.end())
    assert all("topsecret" not in path.read_text() for path in place.cache.rglob("*.json"))


def test_the_deadline_ends_a_download_that_has_said_how_far_it_is(
    place: Place, capfd: pytest.CaptureFixture[str]
) -> None:
    # Sixty blocks take three seconds, whatever else the machine does.
    place.hub.faults.block, place.hub.faults.block_seconds = 1024, 0.05
    config, interrupt = PrepareConfig.model_validate(place.config(rows(place))), Interrupt()

    def pass_the_deadline() -> None:
        wait_for(lambda: place.hub.sent("rows") >= 60 * 1024)
        interrupt.deadline = datetime(2020, 1, 1, tzinfo=UTC)

    clock = threading.Thread(target=pass_the_deadline)
    clock.start()
    with pytest.raises(TrainerError) as caught:
        prepare(config, interrupt)
    clock.join()
    assert caught.value.reason == "DeadlinePassed"
    assert "prepare: data: 0.0 of 0.2 MB" in capfd.readouterr().out
