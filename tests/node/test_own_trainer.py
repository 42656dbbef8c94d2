"""Trainers that offers bring along, in real pods: a repository and an image, to a verified adapter or to a reason."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import pytest
from dulwich.objects import Blob, Commit, Tree
from dulwich.repo import Repo
from dulwich.server import DictBackend
from dulwich.web import make_wsgi_chain

from taskoffer_lab.api_client import MERGE_PATCH
from taskoffer_lab.images import Registry
from taskoffer_lab.registry_name import REGISTRY
from training_place import (
    MODEL,
    POLICY,
    SECONDS,
    TRAINED_SECONDS,
    Object,
    Place,
    condition,
    ended,
    place,
    prepared,
    trainer_image,
)

__all__ = ["place", "prepared", "trainer_image"]

FOREIGN = Path(__file__).resolve().parent.parent / "foreign"
ROWS = {"fileFormat": "jsonl", "source": {"persistentVolumeClaim": {"claimName": "data", "path": "rows/train.jsonl"}}}
SUBMIT_SECONDS = 120
"""What is kept for looking at a result: on a busy machine the libraries alone take half a minute to import."""


@dataclass(frozen=True)
class Source:
    """A repository that a server on this machine hands out."""

    url: str
    commit: str

    def offered(self, entrypoint: str, **spec: Any) -> Object:
        repository: Object = {"url": self.url, "commit": self.commit, "entrypoint": entrypoint}
        return {"trainer": {"repository": repository}, "dataset": ROWS, **spec}


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so.
        """What was asked is of no interest."""


@pytest.fixture(scope="module")
def source(prepared: Place, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Source]:
    """The foreign trainers as a git repository, served to the cluster's nodes."""
    folder = tmp_path_factory.mktemp("git") / "trainer"
    folder.mkdir()
    repo = Repo.init_bare(str(folder))
    tree = Tree()
    for path in sorted(FOREIGN.glob("*.py")):
        blob = Blob.from_string(path.read_bytes())
        repo.object_store.add_object(blob)
        tree.add(path.name.encode(), 0o100644, blob.id)
    commit = Commit()
    commit.tree, commit.message = tree.id, b"Train."
    commit.author = commit.committer = b"Ann <ann@example.com>"
    commit.author_time = commit.commit_time = 1_700_000_000
    commit.author_timezone = commit.commit_timezone = 0
    repo.object_store.add_object(tree)
    repo.object_store.add_object(commit)
    repo.refs[b"refs/heads/main"] = commit.id
    address = prepared.cluster.host_address
    app = make_wsgi_chain(DictBackend({"/team/trainer": repo}))
    with make_server(address, 0, app, _Server, _Quiet) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        host = f"http://{address}:{server.server_port}"
        allow(prepared, host)
        yield Source(f"{host}/team/trainer", commit.id.decode())
        server.shutdown()
        thread.join(timeout=10)
    repo.close()


def allow(place: Place, host: str) -> None:
    trainers = {"repositories": [f"{host}/team"], "images": [f"{REGISTRY}/*"]}
    spec = {"trainers": trainers, "steps": {"submitSeconds": SUBMIT_SECONDS, "backoffLimit": 0}}
    path = f"/apis/taskoffer.dev/v1alpha1/capacitypolicies/{POLICY}"
    place.api.request("PATCH", path, {"spec": spec}, MERGE_PATCH)


@pytest.fixture(scope="module")
def brought_image(source: Source, trainer_image: str) -> str:
    """An image of somebody else's: ours with one layer more and another entrypoint."""
    del source  # It has made the policy allow it.
    repository, _, tag = trainer_image.removeprefix(f"{REGISTRY}/").partition(":")
    with Registry.start("127.0.0.1") as registry:
        url = f"{registry.endpoint}/v2/{repository}"
        manifest, kind = fetched(f"{url}/manifests/{tag}")
        made = json.loads(manifest)
        config = json.loads(fetched(f"{url}/blobs/{made['config']['digest']}")[0])
        layer = layer_of({"foreign/train.py": (FOREIGN / "train.py").read_bytes()})
        config["rootfs"]["diff_ids"].append(digest_of(layer))
        config.setdefault("history", []).append({"created_by": "a test"})
        config["config"]["Entrypoint"] = ["python", "/foreign/train.py"]
        parts = {"layer": gzip.compress(layer, mtime=0), "config": json.dumps(config).encode()}
        described = {name: {"digest": digest_of(part), "size": len(part)} for name, part in parts.items()}
        made["config"] |= described["config"]
        made["layers"].append(
            {"mediaType": made["layers"][0]["mediaType"].split("+")[0] + "+gzip", **described["layer"]}
        )
        for name, part in parts.items():
            location = sent("POST", f"{url}/blobs/uploads/", b"")
            joint = "&" if "?" in location else "?"
            sent("PUT", f"{location}{joint}digest={described[name]['digest']}", part)
        sent("PUT", f"{url}/manifests/brought-{tag}", json.dumps(made).encode(), kind)
    return f"{REGISTRY}/{repository}:brought-{tag}"


def layer_of(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(content), 0o644
            archive.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def fetched(url: str) -> tuple[bytes, str]:
    accept = "application/vnd.oci.image.manifest.v1+json, application/vnd.docker.distribution.manifest.v2+json, */*"
    request = urllib.request.Request(url, headers={"Accept": accept})  # noqa: S310 - the registry of this test.
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        return answer.read(), answer.headers["Content-Type"]


def sent(method: str, url: str, body: bytes, kind: str = "application/octet-stream") -> str:
    request = urllib.request.Request(url, body, {"Content-Type": kind}, method=method)  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        return str(answer.headers.get("Location", ""))


def steps_of(job: Object) -> dict[str, str]:
    return {step["name"]: step["state"] for step in job["status"]["steps"]}


def adapter_of(place: Place, name: str) -> Path:
    """Return the folder of an offer's result on its claim."""
    path = place.job(name)["status"]["result"]["adapterPath"]
    return place.outputs / Path(path).relative_to("/data/output")


def test_a_repository_is_fetched_run_verified_and_handed_over(place: Place, source: Source) -> None:
    output = {"persistentVolumeClaim": {"claimName": "outputs"}, "repository": "acme/brought-along"}
    place.offer("repository", "one", spec=source.offered("train.py", output=output))
    place.until("repository", "Finished", "Succeeded", TRAINED_SECONDS)
    job = place.job("repository")
    assert steps_of(job) == {"Prepare": "Succeeded", "Train": "Succeeded", "Submit": "Succeeded"}
    assert job["status"]["result"]["submittedTo"].endswith("acme/brought-along")
    there = place.hub.repositories["acme/brought-along"].head
    assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == MODEL
    assert len(there["adapter_model.safetensors"]) > 1_000
    told = place.get("repository")["status"]["explanation"]
    assert [item["name"] for item in told if item["type"] == "Estimate"] == ["OwnTrainer"]
    # A second job of the same commit finds it in the cache, whatever has become of the server.
    place.offer("again", "one", spec=source.offered("train.py"))
    place.until("again", "Finished", "Succeeded", TRAINED_SECONDS)
    assert "submittedTo" not in place.job("again")["status"]["result"]


def test_an_image_runs_as_it_is_and_its_result_is_verified_where_it_lies(place: Place, brought_image: str) -> None:
    place.offer("image", "one", spec={"trainer": {"image": brought_image}, "dataset": ROWS, "taskID": "market:7"})
    place.until("image", "Finished", "Succeeded", TRAINED_SECONDS)
    job = place.job("image")
    assert steps_of(job) == {"Train": "Succeeded", "Submit": "Succeeded"}
    assert (adapter_of(place, "image") / "adapter_model.safetensors").is_file()
    assert len(job["status"]["result"]["sha256"]) == 64


def test_one_that_never_ends_is_killed_by_the_clock_and_what_it_has_left_is_handed_over(
    place: Place, source: Source
) -> None:
    # The clock starts with the container, so that a machine that is slow to start pods takes nothing off.
    times = {"clockMode": "Training", "timeLimitSeconds": SUBMIT_SECONDS + 90}
    place.offer("endless", "one", spec=source.offered("endless.py", **times))
    place.until("endless", "Finished", "Succeeded", TRAINED_SECONDS + SUBMIT_SECONDS + 90)
    job = place.job("endless")
    (attempt,) = job["status"]["attempts"]
    assert (attempt["outcome"], attempt["message"]) == (
        "Succeeded",
        "stopped when its time was over; what it has left is verified",
    )
    assert (adapter_of(place, "endless") / "adapter_model.safetensors").is_file()


def test_one_that_leaves_nothing_has_failed_and_has_seen_nothing_of_others(place: Place, source: Source) -> None:
    place.offer("nothing", "one", spec=source.offered("nothing.py"))
    place.until("nothing", "Finished", "Failed", TRAINED_SECONDS)
    job = place.job("nothing")
    assert condition(job, "Failed")["reason"] == "SubmitFailed", condition(job, "Failed")
    assert steps_of(job) == {"Prepare": "Succeeded", "Train": "Succeeded", "Submit": "Failed"}
    (pod,) = place.pods(place.get("nothing")["metadata"]["uid"])
    assert ended(pod)["exitCode"] == 0


def test_a_commit_that_is_not_there_fails_the_task_without_a_gpu(place: Place, source: Source) -> None:
    absent = Source(source.url, "ab" * 20)
    place.offer("absent", "one", spec=absent.offered("train.py"))
    place.until("absent", "Finished", "Failed", SECONDS)
    job = place.job("absent")
    assert condition(job, "Failed")["reason"] == "PrepareFailed"
    assert "startedAt" not in job["status"]["attempts"][0]
