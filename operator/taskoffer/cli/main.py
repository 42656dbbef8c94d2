"""``taskoffer``, also installed as ``kubectl-taskoffer``: run the operator, check and compare policies, ask."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from taskoffer import __version__
from taskoffer.cli import simulate

if TYPE_CHECKING:
    from taskoffer.api.base import WireModel
    from taskoffer.cli.ask import Target


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 wrong usage."""
    parser = _parser()
    args = parser.parse_args(argv)
    command: Any = args.command
    try:
        code = int(command(args))
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("taskoffer: interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # Whoever reads has seen enough. Python would complain once more when it closes the stream at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="taskoffer", description="Admits, runs and watches GPU fine-tuning tasks.")
    parser.add_argument("--version", action="version", version=f"taskoffer {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run one replica of the operator")
    run.add_argument("--kubeconfig", type=Path, help="kubeconfig; default: $KUBECONFIG, else the pod's ServiceAccount")
    run.add_argument("--listen", default="0.0.0.0", help="address of /healthz, /readyz and /metrics (default: all)")
    run.add_argument(
        "--port", type=int, default=8080, help="port of /healthz, /readyz and /metrics (default: %(default)s)"
    )
    run.add_argument(
        "--lease-namespace", default="taskoffer-system", help="namespace of the lease (default: %(default)s)"
    )
    run.add_argument("--lease-name", default="taskoffer", help="name of the lease (default: %(default)s)")
    run.add_argument(
        "--progress-interval",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="how often a running trainer's progress is written to its TrainingJob (default: %(default)s)",
    )
    run.add_argument(
        "--resync",
        type=float,
        default=300.0,
        metavar="SECONDS",
        help="how often the cache is compared with a full list (default: %(default)s)",
    )
    run.add_argument(
        "--watch-window",
        type=_window,
        default=20,
        metavar="SECONDS",
        help="how long one watch request lasts; a watch that is silent for over twice as long ends the process, "
        "so that another one takes its place (default: %(default)s, at least 10)",
    )
    run.add_argument("--log-format", choices=("text", "json"), default="text", help="default: %(default)s")
    run.add_argument("--verbose", "-v", action="store_true", help="log debug messages")
    run.set_defaults(command=_run)

    preset = commands.add_parser(
        "preset", help="print a ready CapacityPolicy", description="Print a ready CapacityPolicy."
    )
    preset.add_argument("name", nargs="?", help="name of the preset; without it the names are listed")
    preset.add_argument("--image", help="trainer image to put in")
    preset.set_defaults(command=_preset)

    lint = commands.add_parser("lint", help="check a CapacityPolicy file before it is applied")
    lint.add_argument("file", type=Path, help="YAML file of a CapacityPolicy")
    lint.set_defaults(command=_lint)

    simulate.add_commands(commands)
    explain = commands.add_parser("explain", help="say why an offer stands as it does, and what would change it")
    explain.add_argument("name", type=_name, help="name of the TaskOffer")
    explain.add_argument("--namespace", "-n", type=_name, help="its namespace (default: the kubeconfig context's)")
    _asking(explain, _explain)

    queue = commands.add_parser("queue", help="show who waits, in order, with predicted starts")
    queue.add_argument("--namespace", "-n", type=_name, help="only offers of this namespace (default: all)")
    queue.add_argument("--policy", type=_name, help="only what this CapacityPolicy decides")
    queue.add_argument("--limit", type=_limit, default=50, help="offers to list, 1 to 1000 (default: %(default)s)")
    _asking(queue, _queue)
    return parser


def _asking(command: argparse.ArgumentParser, run: Callable[[argparse.Namespace], int]) -> None:
    """Give a command the options of those that ask a running operator."""
    command.add_argument("--output", "-o", choices=("table", "json"), default="table", help="default: %(default)s")
    command.add_argument(
        "--server",
        metavar="URL",
        help="address of a replica's status port, as http://127.0.0.1:8080; default: the Service taskoffer, through "
        "the API server",
    )
    command.add_argument("--kubeconfig", type=Path, help="kubeconfig; default: $KUBECONFIG, else ~/.kube/config")
    command.add_argument("--context", help="context of the kubeconfig; default: the current one")
    command.add_argument(
        "--operator-namespace",
        type=_name,
        default="taskoffer-system",
        metavar="NAMESPACE",
        help="where the operator's Service is (default: %(default)s)",
    )
    command.set_defaults(command=run)


def _name(text: str) -> str:
    from taskoffer.api.v1alpha1.meta import name_problem

    problem = name_problem(text)
    if problem is not None:
        raise argparse.ArgumentTypeError(f"{text!r} {problem}")
    return text


def _limit(text: str) -> int:
    from taskoffer.api.inquiry import MOST_LISTED

    number = int(text)
    if not 1 <= number <= MOST_LISTED:
        raise argparse.ArgumentTypeError(f"{number} is not a number of offers to list: give 1 to {MOST_LISTED}")
    return number


def _window(text: str) -> int:
    seconds = int(text)
    if seconds < 10:
        # The server's word comes some two seconds before the end of a watch, and not at all in very short ones.
        raise argparse.ArgumentTypeError(f"{seconds} is too short: choose at least 10 seconds")
    return seconds


def _run(args: argparse.Namespace) -> int:
    from taskoffer.handlers.run import Options
    from taskoffer.handlers.run import main as run_replica
    from taskoffer.reconcile.session import Settings

    _log(args.log_format, verbose=args.verbose)
    kubeconfig = args.kubeconfig or (Path(os.environ["KUBECONFIG"]) if os.environ.get("KUBECONFIG") else None)
    settings = Settings(
        lease_namespace=args.lease_namespace,
        lease_name=args.lease_name,
        progress_interval=args.progress_interval,
        resync=args.resync,
        watch_window=args.watch_window,
    )
    sys.setrecursionlimit(_NESTING)
    return run_replica(Options(kubeconfig=kubeconfig, listen=args.listen, port=args.port, settings=settings))


_NESTING = 12_000
"""The API server stores what is nested up to 10,000 deep. At Python's own limit of 1,000 one such object would make
every list that it is in unreadable."""


def _preset(args: argparse.Namespace) -> int:
    import yaml

    from taskoffer import presets

    if args.name is None:
        print("\n".join(presets.names()))
        return 0
    try:
        manifest = presets.load(args.name, image=args.image)
    except KeyError as error:
        print(f"taskoffer: {error.args[0]}", file=sys.stderr)
        return 2
    print(yaml.safe_dump(manifest, sort_keys=False, width=120), end="")
    return 0


def _lint(args: argparse.Namespace) -> int:
    from taskoffer.cli.errors import CommandError
    from taskoffer.cli.policy_file import read_policy
    from taskoffer.decision.lint import lint

    try:
        spec = read_policy(args.file)
    except CommandError as error:
        print(f"taskoffer: {error}", file=sys.stderr)
        return error.code
    findings = lint(spec)
    for finding in findings:
        print(f"{finding.severity}: {finding.message}")
    print(f"{len(findings)} finding(s)")
    return 1 if any(f.severity == "Error" for f in findings) else 0


def _target(args: argparse.Namespace) -> Target:
    from taskoffer.cli.ask import Target

    return Target(args.server, args.kubeconfig, args.context, args.operator_namespace)


def _explain(args: argparse.Namespace) -> int:
    from taskoffer.api.inquiry import OfferAnswer
    from taskoffer.cli.ask import AskError
    from taskoffer.cli.told import explanation

    target = _target(args)
    namespace = args.namespace or target.namespace()
    try:
        answer = target.ask(f"/v1/offers/{quote(namespace, safe='')}/{args.name}", {}, OfferAnswer)
    except AskError as error:
        print(f"taskoffer: {error}", file=sys.stderr)
        return 1
    print(explanation(answer) if args.output == "table" else _json(answer))
    return 0


def _queue(args: argparse.Namespace) -> int:
    from taskoffer.api.inquiry import QueueAnswer
    from taskoffer.cli.ask import AskError
    from taskoffer.cli.told import waiting

    query = {"limit": str(args.limit), "policy": args.policy, "namespace": args.namespace}
    try:
        answer = _target(args).ask("/v1/queue", {key: value for key, value in query.items() if value}, QueueAnswer)
    except AskError as error:
        print(f"taskoffer: {error}", file=sys.stderr)
        return 1
    print(waiting(answer) if args.output == "table" else _json(answer))
    return 0


def _json(answer: WireModel) -> str:
    return json.dumps(answer.to_wire(), indent=2)


class _Json(logging.Formatter):
    """One JSON object per line: time, level, logger, message, and the fields given as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line = {
            "time": self.formatTime(record, "%Y-%m-%dT%H:%M:%S%z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _Text(logging.Formatter):
    """A line for people: time, level, message, and the fields given as ``extra`` as key=value."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields = " ".join(f"{key}={value}" for key, value in _extras(record).items())
        return f"{super().format(record)} {fields}".rstrip()


_PLAIN = set(vars(logging.LogRecord("", 0, "", 0, "", (), None))) | {"message", "asctime", "taskName"}


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {
        key: value for key, value in vars(record).items() if key not in _PLAIN and key not in ("settings", "k8s_ref")
    }


def _log(style: str, *, verbose: bool) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(_Json() if style == "json" else _Text("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.getLogger("taskoffer").setLevel(logging.DEBUG if verbose else logging.INFO)
    # kopf reports every handled event at INFO, which costs more than handling it.
    logging.getLogger("kopf").setLevel(logging.WARNING)
