"""What the cache removes, and what it never does."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from file_server import sha256
from taskoffer.api.contract import CacheSettings, ExitCode, FetchedItem
from taskoffer_trainer.cache import Cache, Held, key_of
from taskoffer_trainer.cache_collection import collect, make_room, usage
from taskoffer_trainer.failures import TrainerError
from taskoffer_trainer.interrupt import Interrupt

LATER = datetime(2099, 1, 1, tzinfo=UTC)
PAST = datetime(2020, 1, 1, tzinfo=UTC)
EMPTY = CacheSettings(size_limit=1, min_age_seconds=0)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache.open(tmp_path / "cache", Interrupt())


def give(cache: Cache, job: str, content: bytes, until: datetime = LATER, item: str = "data") -> Path:
    """Let a job have a content as prepare does, and return where."""
    with cache.job_lock(job):
        cache.hold(job, until)
        staging = cache.staging(job, item)
        if cache.take(sha256(content), len(content), staging / "file") is None:
            partial = cache.incoming("source") / "x.part"
            partial.write_bytes(content)
            cache.add(partial, sha256(content), staging / "file")
            cache.finish("source")
        report = FetchedItem(name=item, digest=sha256(content), files=1, bytes=len(content), fetched_bytes=0)
        cache.publish(job, item, Held(source="source", report=report))
    return cache.job(job) / item / "file"


def aged(cache: Cache, content: bytes, seconds: float) -> None:
    moment = time.time() - seconds
    os.utime(cache.blob(sha256(content)), (moment, moment))


class Collections(RuleBasedStateMachine):
    """Jobs come, end, expire and are killed half-way, in any order, and collections run between."""

    contents = st.integers(0, 4).map(lambda n: b"%d" % n * (100 + n))
    jobs = st.integers(0, 3).map(lambda n: f"job-{n}")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="cache-"))
        self.cache = Cache.open(self.root, Interrupt())
        self.held: dict[str, bytes] = {}
        self.half: dict[str, bytes] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(job=jobs, content=contents)
    def prepare(self, job: str, content: bytes) -> None:
        give(self.cache, job, content)
        self.held[job] = content

    @rule(job=jobs, content=contents)
    def prepare_and_be_killed_before_publishing(self, job: str, content: bytes) -> None:
        with self.cache.job_lock(job):
            self.cache.hold(job, LATER)
            staging = self.cache.staging(job, "other")
            if self.cache.take(sha256(content), len(content), staging / "file") is not None:
                self.half[job] = content
            else:
                self.half.pop(job, None)

    @rule(job=jobs)
    def submit(self, job: str) -> None:
        self.cache.release(job)
        self.held.pop(job, None)
        self.half.pop(job, None)

    @rule(job=jobs)
    def expire(self, job: str) -> None:
        if self.cache.job(job).exists():
            self.cache.hold(job, PAST)
            collect(self.cache, CacheSettings())
            assert not self.cache.job(job).exists()
        self.held.pop(job, None)
        self.half.pop(job, None)

    @rule(limit=st.integers(1, 600), needed=st.integers(0, 300))
    def collect(self, limit: int, needed: int) -> None:
        found = collect(self.cache, CacheSettings(size_limit=limit, min_age_seconds=0), needed)
        assert found.kept == usage(self.cache)
        unused = [blob for blob in self.cache.root.glob("blobs/*/*") if blob.stat().st_nlink == 1]
        # It stops when there is room, or when nothing is left that may go.
        assert found.kept + needed <= limit or not unused

    @rule(content=contents)
    def ask_again(self, content: bytes) -> None:
        blob = self.cache.blob(sha256(content))
        assert not blob.exists() or blob.read_bytes() == content

    @invariant()
    def what_a_job_holds_is_whole(self) -> None:
        for job, content in self.held.items():
            assert (self.cache.job(job) / "data" / "file").read_bytes() == content
            # And another job would find it too.
            assert self.cache.blob(sha256(content)).exists()
        for job, content in self.half.items():
            assert (self.cache.job(job) / ".other.tmp" / "file").read_bytes() == content


TestCollections = Collections.TestCase
TestCollections.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)


def test_the_longest_unused_goes_first_and_only_as_much_as_is_needed(cache: Cache) -> None:
    parts = [b"a" * 100, b"b" * 100, b"c" * 100]
    for number, content in enumerate(parts):
        give(cache, f"job-{number}", content)
        cache.release(f"job-{number}")
    for content, age in zip(parts, (50, 500, 5000), strict=True):
        aged(cache, content, age)
    assert collect(cache, CacheSettings(size_limit=250, min_age_seconds=10)).removed == 100
    assert [cache.blob(sha256(content)).exists() for content in parts] == [True, True, False]
    give(cache, "again", parts[1])
    cache.release("again")
    collect(cache, CacheSettings(size_limit=150, min_age_seconds=10))
    # What was just used again is the youngest now.
    assert [cache.blob(sha256(content)).exists() for content in parts] == [False, True, False]


def test_what_is_younger_than_the_minimum_age_stays_although_there_is_no_room(cache: Cache) -> None:
    give(cache, "job", b"x" * 100)
    cache.release("job")
    assert collect(cache, CacheSettings(size_limit=1, min_age_seconds=60)).removed == 0
    aged(cache, b"x" * 100, 61)
    assert collect(cache, CacheSettings(size_limit=1, min_age_seconds=60)).removed == 100


def test_a_job_keeps_its_files_after_the_names_of_the_blobs_are_gone(cache: Cache) -> None:
    place = give(cache, "job", b"x" * 100)
    cache.blob(sha256(b"x" * 100)).unlink()
    assert place.read_bytes() == b"x" * 100


def test_a_lease_ends_at_its_moment_and_not_before(cache: Cache) -> None:
    soon = datetime.now(UTC) + timedelta(seconds=1)
    place = give(cache, "job", b"x" * 100, until=soon)
    collect(cache, EMPTY)
    assert place.exists() or datetime.now(UTC) >= soon
    while datetime.now(UTC) < soon:
        time.sleep(0.02)
    collect(cache, EMPTY)
    assert not place.exists()
    assert usage(cache) == 0


def test_a_job_that_somebody_works_for_is_not_ended_by_its_lease(cache: Cache) -> None:
    place = give(cache, "job", b"x" * 100, until=PAST)
    with cache.job_lock("job"):
        collect(cache, EMPTY)
        assert place.exists()
    collect(cache, EMPTY)
    assert not place.exists()


def test_an_unfinished_download_is_left_alone_while_somebody_works_on_it_and_while_it_is_young(cache: Cache) -> None:
    key = key_of("source")
    with cache.lock(key, "it"):
        (cache.incoming(key) / "x.part").write_bytes(b"half")
        collect(cache, EMPTY)
        assert (cache.incoming(key) / "x.part").exists()
    collect(cache, CacheSettings(size_limit=1, min_age_seconds=60))
    assert (cache.root / "incoming" / key / "x.part").exists()
    collect(cache, EMPTY)
    assert not (cache.root / "incoming" / key).exists()


def test_room_that_was_promised_counts_before_it_is_filled(cache: Cache) -> None:
    limits = CacheSettings(size_limit=1000, min_age_seconds=3600)
    make_room(cache, limits, "one", 700)
    assert usage(cache) == 700
    with pytest.raises(TrainerError) as caught:
        make_room(cache, limits, "two", 400)
    assert (caught.value.code, caught.value.reason) == (ExitCode.RESTART, "CacheFull")
    cache.finish("one")
    make_room(cache, limits, "two", 400)


def test_a_content_that_was_cut_short_on_disk_is_fetched_anew(cache: Cache) -> None:
    content = b"x" * 100
    give(cache, "job", content)
    cache.release("job")
    blob = cache.blob(sha256(content))
    blob.chmod(0o644)
    blob.write_bytes(b"x" * 40)
    assert cache.take(sha256(content), 100, cache.root / "jobs" / "place") is None
    assert not blob.exists()


def test_files_of_the_cache_cannot_be_written_through_a_job_s_folder(cache: Cache) -> None:
    place = give(cache, "job", b"x" * 100)
    assert place.stat().st_mode & 0o777 == 0o444
    assert place.stat().st_ino == cache.blob(sha256(b"x" * 100)).stat().st_ino


def test_records_and_trash_go_when_nothing_needs_them(cache: Cache) -> None:
    (cache.root / "trash" / "old" / "deep").mkdir(parents=True)
    (cache.root / "items" / f"{'0' * 64}.json").write_text("{broken")
    for name in ("old", "held"):
        lock = cache.root / "locks" / f"{name}.lock"
        lock.touch()
        os.utime(lock, (0, 0))
    with cache.lock("held", "it"):
        collect(cache, EMPTY)
        assert {path.name for path in (cache.root / "locks").iterdir()} >= {"held.lock"}
    assert not (cache.root / "locks" / "old.lock").exists()
    assert not list((cache.root / "trash").iterdir())
    assert not list((cache.root / "items").iterdir())
