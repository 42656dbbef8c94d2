"""Making sure that a registry has the images of the checkout as it is now."""

import tempfile
import threading
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from taskoffer_lab.images.base import ensure_base
from taskoffer_lab.images.build import build_image, push_image
from taskoffer_lab.images.registry import has_tag, mark_used, prune_registry
from taskoffer_lab.images.runner import Report, Reporter
from taskoffer_lab.images.sources import OPERATOR, TRAINER, BuildContext, snapshot
from taskoffer_lab.images.store import BuildStore, images_folder
from taskoffer_lab.locking import locked
from taskoffer_lab.progress import say
from taskoffer_lab.registry_name import REGISTRY


@dataclass(frozen=True)
class Images:
    """The names under which pods ask for the images of one state of the checkout."""

    trainer: str
    operator: str


def ensure_images(endpoint: str, *, progress: Report = say, cancelled: threading.Event | None = None) -> Images:
    """Make sure that the registry has both images of the checkout's present content.

    What it has already is not built again, and of what is built only the layers that changed. The first build
    takes minutes and says so; parallel callers wait for each other. Blocks: run it in a thread beside other work.

    Args:
        endpoint: `http://HOST:PORT` of a running registry, see `Registry`.
        progress: Receives a line now and then when something takes longer than 2 seconds.
        cancelled: Ends the work soon after it is set; finished layers are kept.

    Raises:
        LabError: The registry does not answer, the machine cannot build images, or a build failed.
    """
    reporter = Reporter(progress, cancelled or threading.Event())
    with tempfile.TemporaryDirectory(prefix="taskoffer-images-") as folder:
        contexts = [snapshot(source, Path(folder) / source.name) for source in (TRAINER, OPERATOR)]
        missing = _missing(endpoint, contexts)
        if missing:
            _build_and_push(endpoint, contexts, reporter)
    for context in contexts:
        mark_used(context.source.name, context.key)
    trainer, operator = (f"{REGISTRY}/{context.source.name}:{context.key}" for context in contexts)
    return Images(trainer, operator)


def _missing(endpoint: str, contexts: list[BuildContext]) -> list[BuildContext]:
    return [context for context in contexts if not has_tag(endpoint, context.source.name, context.key)]


def _build_and_push(endpoint: str, contexts: list[BuildContext], reporter: Reporter) -> None:
    def waiting() -> None:
        reporter.report("another process builds images; waiting for it")

    port = urllib.parse.urlsplit(endpoint).port
    with locked(images_folder() / "lock", on_wait=waiting):
        missing = _missing(endpoint, contexts)  # Whoever held the lock may have pushed them.
        if not missing:
            return
        with BuildStore(reporter, endpoint).opened() as store:
            ensure_base(store)
            for context in missing:
                build_image(store, context)
                push_image(store, context, f"{REGISTRY}:{port}/{context.source.name}:{context.key}")
                mark_used(context.source.name, context.key)
            store.prune()
            prune_registry(reporter)
