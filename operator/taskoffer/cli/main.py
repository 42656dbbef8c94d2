"""``taskoffer``, also installed as ``kubectl-taskoffer``: run the operator, check and compare policies, ask."""

from __future__ import annotations

import argparse
import errno
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from taskoffer import __version__
from taskoffer.cli import questions, simulate
from taskoffer.cli.exit_codes import Exit
from taskoffer.cli.subcommand import GPUS, NODES, add_command, whole

_RUN = """\
Run one replica of the operator: it hears of offers, and decides and starts them while it holds the lease. Start two, so
that one takes over when the other one ends."""
_PRESET = """\
Print a ready CapacityPolicy as YAML, to be applied as it is or to begin a policy of one's own with."""
_LINT = """\
Check a CapacityPolicy file before it is applied: whether it is valid, and which of its rules cannot do what they were
written for. Findings are printed one a line, as Error, Warning or Info. No cluster is looked at; with --nodes and
--gpus limits and lanes are compared with what there is to be, as the operator does once the policy is applied."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code, one of :class:`~taskoffer.cli.exit_codes.Exit`."""
    parser = _parser()
    args = parser.parse_args(argv)
    command: Any = args.command
    try:
        code = int(command(args))
        if sys.stdout is not None:
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("taskoffer: interrupted", file=sys.stderr)
        return Exit.FAILED
    except BrokenPipeError:
        # Whoever reads has seen enough. Python would complain once more when it closes the stream at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.FAILED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="taskoffer", description="Admits, runs and watches GPU fine-tuning tasks.")
    parser.add_argument("--version", action="version", version=f"taskoffer {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_run(commands)
    preset = add_command(commands, "preset", "print a ready CapacityPolicy", _PRESET, _preset)
    preset.add_argument("name", nargs="?", metavar="NAME", help="name of the preset; without it the names are listed")
    preset.add_argument("--image", metavar="IMAGE", help="trainer image to put in (default: the preset's own)")

    lint = add_command(commands, "lint", "check a CapacityPolicy file before it is applied", _LINT, _lint)
    lint.add_argument("file", type=Path, metavar="FILE", help="YAML file of one CapacityPolicy")
    lint.add_argument(
        "--nodes", type=whole, metavar="N", help=f"nodes that it is to select (default with --gpus: {NODES})"
    )
    lint.add_argument("--gpus", type=whole, metavar="N", help=f"GPUs of each node (default with --nodes: {GPUS})")

    simulate.add_commands(commands)
    questions.add_commands(commands)
    return parser


def _add_run(commands: Any) -> None:
    run = add_command(commands, "run", "run one replica of the operator", _RUN, _run)
    run.add_argument(
        "--kubeconfig",
        type=Path,
        metavar="FILE",
        help="kubeconfig to use (default: $KUBECONFIG, else the pod's ServiceAccount)",
    )
    run.add_argument(
        "--listen",
        default="0.0.0.0",
        metavar="ADDRESS",
        help="address to listen on for probes, metrics and questions (default: %(default)s, all of this machine)",
    )
    run.add_argument("--port", type=_port, default=8080, metavar="PORT", help="port there (default: %(default)s)")
    run.add_argument(
        "--lease-namespace",
        default="taskoffer-system",
        metavar="NAMESPACE",
        help="namespace of the lease that decides who leads (default: %(default)s)",
    )
    run.add_argument(
        "--lease-name", default="taskoffer", metavar="NAME", help="name of that lease (default: %(default)s)"
    )
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
    run.add_argument(
        "--log-format",
        choices=("text", "json"),
        default="text",
        help="log lines for people, or one JSON object a line (default: %(default)s)",
    )
    run.add_argument("--verbose", "-v", action="store_true", help="log debug messages as well")


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= 65_535:
        raise argparse.ArgumentTypeError(f"{number} is not a port: choose 1 to 65535, or 0 for any that is free")
    return number


def _window(text: str) -> int:
    seconds = int(text)
    if seconds < 10:
        # The server's word comes some two seconds before the end of a watch, and not at all in very short ones.
        raise argparse.ArgumentTypeError(f"{seconds} is too short: choose at least 10 seconds")
    return seconds


def _run(args: argparse.Namespace) -> int:
    from kubernetes.aio.config import ConfigException

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
    try:
        return run_replica(Options(kubeconfig=kubeconfig, listen=args.listen, port=args.port, settings=settings))
    except ConfigException as error:
        where = kubeconfig or "neither a kubeconfig nor a pod's ServiceAccount"
        print(f"taskoffer: {where}: {error}; give --kubeconfig or set KUBECONFIG", file=sys.stderr)
        return Exit.FAILED
    except OSError as error:
        if error.errno not in _UNUSABLE_ADDRESS:
            raise
        print(
            f"taskoffer: {args.listen}:{args.port} cannot be listened on: {os.strerror(error.errno)}; "
            "choose another --port or --listen",
            file=sys.stderr,
        )
        return Exit.FAILED


_UNUSABLE_ADDRESS = (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES)
_NESTING = 12_000
"""The API server stores what is nested up to 10,000 deep. At Python's own limit of 1,000 one such object would make
every list that it is in unreadable."""


def _preset(args: argparse.Namespace) -> int:
    import yaml

    from taskoffer import presets
    from taskoffer.cli.errors import CommandError
    from taskoffer.cli.policy_file import valid_spec

    if args.name is None:
        print("\n".join(presets.names()))
        return 0
    try:
        manifest = presets.load(args.name, image=args.image)
    except KeyError as error:
        print(f"taskoffer: {error.args[0]}", file=sys.stderr)
        return Exit.USAGE
    if args.image is not None:
        try:
            valid_spec(manifest, f"{args.name} with the image {args.image[:60]!r}")
        except CommandError as error:
            print(f"taskoffer: {error}", file=sys.stderr)
            return Exit.USAGE
    print(yaml.safe_dump(manifest, sort_keys=False, width=120), end="")
    return 0


def _lint(args: argparse.Namespace) -> int:
    from taskoffer.cli.errors import CommandError
    from taskoffer.cli.policy_file import read_policy
    from taskoffer.decision.ledger import NodeView
    from taskoffer.decision.lint import lint

    try:
        spec = read_policy(args.file)
    except CommandError as error:
        print(f"taskoffer: {error}", file=sys.stderr)
        return error.code
    given = args.nodes is not None or args.gpus is not None
    offered = (args.gpus or GPUS) * (spec.resources[0].units_per_gpu or 1)
    nodes = tuple(NodeView(f"node-{n}", offered, ready=True) for n in range(args.nodes or NODES)) if given else ()
    findings = lint(spec, nodes)
    for finding in findings:
        print(f"{finding.severity}: {finding.message}")
    print(f"{len(findings)} finding(s)")
    if not given:
        # On standard error, so that what is printed stays one finding a line.
        print("taskoffer: limits and lanes were not compared with GPUs: give --nodes and --gpus", file=sys.stderr)
    return Exit.FAILED if any(f.severity == "Error" for f in findings) else Exit.DONE


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
