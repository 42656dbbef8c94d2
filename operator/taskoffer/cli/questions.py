"""``taskoffer explain`` and ``taskoffer queue``: questions to a running operator."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from taskoffer.cli.exit_codes import Exit
from taskoffer.cli.subcommand import add_command

if TYPE_CHECKING:
    from taskoffer.api.base import WireModel
    from taskoffer.cli.ask import Target

_EXPLAIN = """\
Say why an offer stands as it does: the verdict with its numbers, its place in the queue with a predicted start, every
cause with its remedy, what would change the answer (each change was tried by deciding again), the terms of the score,
and what was predicted of memory and time. A running operator answers; nothing is written."""
_QUEUE = """\
Show the offers that wait, in the order of admission, with what each waits for and when it is predicted to start. A
running operator answers; nothing is written."""


def add_commands(commands: Any) -> None:
    """Add the two commands to the parser's."""
    explain = add_command(
        commands, "explain", "say why an offer stands as it does, and what would change it", _EXPLAIN, _explain
    )
    explain.add_argument("name", type=_name, metavar="NAME", help="name of the TaskOffer")
    explain.add_argument(
        "--namespace",
        "-n",
        type=_name,
        metavar="NAMESPACE",
        help="namespace of the offer (default: the one that the kubeconfig's context names; default where it names "
        "none, and with --server alone, which reads no kubeconfig)",
    )
    _add_where(explain)
    queue = add_command(commands, "queue", "show who waits, in order, with predicted starts", _QUEUE, _queue)
    queue.add_argument(
        "--namespace",
        "-n",
        type=_name,
        metavar="NAMESPACE",
        help="list only offers of this namespace (default: of all namespaces, whatever the kubeconfig's context names)",
    )
    queue.add_argument(
        "--policy",
        type=_name,
        metavar="POLICY",
        help="list only offers that this CapacityPolicy decides (default: any)",
    )
    queue.add_argument(
        "--limit",
        type=_limit,
        default=50,
        metavar="N",
        help="list so many offers, 1 to 1000, the first ones of those asked for (default: %(default)s)",
    )
    _add_where(queue)


def _add_where(command: argparse.ArgumentParser) -> None:
    """Give a command the options that say whom it asks, and how it shows the answer."""
    command.add_argument(
        "--output",
        "-o",
        choices=("table", "json"),
        default="table",
        help="table for people, or json as the answer comes over HTTP (default: %(default)s)",
    )
    command.add_argument(
        "--server",
        metavar="URL",
        help="ask a replica at the address of its port, as http://127.0.0.1:8080 (default: ask the Service taskoffer "
        "through the API server, with the kubeconfig's rights)",
    )
    command.add_argument(
        "--kubeconfig", type=Path, metavar="FILE", help="kubeconfig to use (default: $KUBECONFIG, else ~/.kube/config)"
    )
    command.add_argument(
        "--context", metavar="NAME", help="context of the kubeconfig to use (default: its current-context)"
    )
    command.add_argument(
        "--operator-namespace",
        type=_name,
        default="taskoffer-system",
        metavar="NAMESPACE",
        help="namespace of the operator's Service (default: %(default)s)",
    )


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


def _target(args: argparse.Namespace) -> Target:
    from taskoffer.cli.ask import Target

    return Target(args.server, args.kubeconfig, args.context, args.operator_namespace)


def _explain(args: argparse.Namespace) -> int:
    from urllib.parse import quote

    from taskoffer.api.inquiry import OfferAnswer
    from taskoffer.cli.ask import Namespace
    from taskoffer.cli.told import explanation

    target = _target(args)

    def ask() -> OfferAnswer:
        namespace = Namespace(args.namespace, "") if args.namespace is not None else target.namespace()
        path = f"/v1/offers/{quote(namespace.name, safe='')}/{args.name}"
        return target.ask(path, {}, OfferAnswer, if_missing=namespace.why)

    return _show(args, ask, explanation)


def _queue(args: argparse.Namespace) -> int:
    from taskoffer.api.inquiry import QueueAnswer
    from taskoffer.cli.told import waiting

    query = {"limit": str(args.limit), "policy": args.policy, "namespace": args.namespace}
    given = {key: value for key, value in query.items() if value is not None}
    return _show(args, lambda: _target(args).ask("/v1/queue", given, QueueAnswer), waiting)


def _show(args: argparse.Namespace, ask: Callable[[], Any], table: Callable[[Any], str]) -> int:
    """Print an answer, or say why there is none."""
    from taskoffer.cli.ask import AskError

    try:
        answer = ask()
    except AskError as error:
        print(f"taskoffer: {error}", file=sys.stderr)
        return Exit.FAILED
    print(table(answer) if args.output == "table" else _json(answer))
    return Exit.DONE


def _json(answer: WireModel) -> str:
    return json.dumps(answer.to_wire(), indent=2)
