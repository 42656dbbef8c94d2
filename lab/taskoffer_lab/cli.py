"""The command line of the lab: `taskoffer-lab`."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from taskoffer_lab.errors import LabError
from taskoffer_lab.spec import MOST_NODES, ClusterSpec, random_name

_DESCRIPTION = """\
Real Kubernetes clusters with simulated GPUs on this machine, without Docker.

  taskoffer-lab doctor           what this machine can do, and what is missing with its remedy
  taskoffer-lab up --nodes 1     a cluster with one node of 8 GPUs, until `down`
  taskoffer-lab demo             from TaskOffers to trained adapters, with everything that takes
"""
_EPILOG = """\
environment:
  TASKOFFER_CACHE       tools, images and node storage (default ~/.cache/taskoffer)
  TASKOFFER_STATE       running clusters (default /var/tmp/taskoffer-lab-UID)
  KUBEBUILDER_ASSETS    a folder with etcd, kube-apiserver and kubectl to use instead of building them
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status (0 done, 1 failed, 130 interrupted)."""
    arguments = _parser().parse_args(argv)
    run: Callable[[argparse.Namespace], int] = arguments.run
    try:
        return run(arguments)
    except LabError as error:
        print(f"taskoffer-lab: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("taskoffer-lab: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="taskoffer-lab", description=_DESCRIPTION, epilog=_EPILOG, formatter_class=raw
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, summary: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=summary)
        added.set_defaults(run=run)
        return added

    command("doctor", "Say what this machine can do, and what is missing with its remedy.", _doctor)
    _add_up(command("up", "Start a cluster that lives on until `down`, and print its KUBECONFIG.", _up))
    down = command("down", "End clusters and all that belongs to them.", _down)
    down.add_argument("names", nargs="*", metavar="NAME", help="clusters to end; the only one if left out")
    down.add_argument("--all", action="store_true", help="end every cluster of this user")
    down.add_argument("--keep-logs", action="store_true", help="keep the logs and say where")
    command("status", "List running clusters, and the caches with their sizes.", _status)
    tools = command("tools", "Build (or find) the programs of clusters now instead of when needed.", _tools)
    tools.add_argument("groups", nargs="*", metavar="GROUP", help="controlplane, node; both if left out")
    prune = command("prune", "Bring the caches below their bound of 25 GB.", _prune)
    prune.add_argument("--everything", action="store_true", help="remove all that no running cluster uses")
    _add_demo(command("demo", "Train adapters from TaskOffers on a cluster made for it.", _demo))
    return parser


def _add_up(parser: argparse.ArgumentParser) -> None:
    from taskoffer_lab.providers import PROVIDERS

    parser.add_argument("--name", default=None, help="the cluster's name (default: a random one)")
    parser.add_argument(
        "--nodes", type=int, default=0, help=f"real nodes, 0 to {MOST_NODES}; they need root (default: 0)"
    )
    parser.add_argument("--gpus", type=int, default=8, help="simulated GPUs of each node (default: 8)")
    parser.add_argument("--registry", metavar="URL", help="http://HOST:PORT of an image registry for the nodes")
    parser.add_argument("--serve-registry", action="store_true", help="serve the lab's own images to the nodes")
    parser.add_argument("--provider", choices=PROVIDERS, default="local", help="default: local")
    parser.add_argument("--kubeconfig", type=Path, help="for --provider kubeconfig")


def _add_demo(parser: argparse.ArgumentParser) -> None:
    from taskoffer_lab.providers import PROVIDERS

    parser.add_argument(
        "--all-types", action="store_true", help="one offer of each type of task instead of the examples"
    )
    parser.add_argument("--keep", action="store_true", help="leave the cluster running and print KUBECONFIG")
    parser.add_argument("--nodes", type=int, default=1, help="real nodes with 8 GPUs each (default: 1)")
    parser.add_argument("--export-svg", type=Path, metavar="PATH", help="write a picture of the run to a file")
    parser.add_argument("--provider", choices=PROVIDERS, default="local", help="default: local")
    parser.add_argument("--kubeconfig", type=Path, help="for --provider kubeconfig")


def _doctor(_arguments: argparse.Namespace) -> int:
    from taskoffer_lab.doctor import examine, report

    return 0 if report(examine(), Console()) else 1


def _up(arguments: argparse.Namespace) -> int:
    from taskoffer_lab.providers import provider

    spec = ClusterSpec(
        name=arguments.name or random_name(),
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus,
        registry_endpoint=arguments.registry,
        serve_registry=arguments.serve_registry,
        detached=True,
    )
    cluster = provider(arguments.provider, arguments.kubeconfig).up(spec)
    print(f"export KUBECONFIG={cluster.kubeconfig} PATH={cluster.bin_dir}:$PATH")
    if arguments.provider == "local":
        print(f"# end it with: taskoffer-lab down {cluster.name}", file=sys.stderr)
    return 0


def _down(arguments: argparse.Namespace) -> int:
    from taskoffer_lab.local_provider import attach
    from taskoffer_lab.state import records
    from taskoffer_lab.teardown import sweep

    swept = sweep()
    running = [record.name for record in records()]
    names = running if arguments.all else [name for name in arguments.names if name not in swept]
    if not arguments.all and not arguments.names:
        if len(running) > 1:
            raise LabError(f"several clusters run: {', '.join(running)}", "name one, or --all")
        names = running
    if not names and not swept:
        print("no cluster runs")
    for name in names:
        started = time.monotonic()
        kept = attach(name).down(keep_logs=arguments.keep_logs)
        print(f"{name}: down in {time.monotonic() - started:.1f} s" + (f"; logs: {kept}" if kept else ""))
    return 0


def _status(_arguments: argparse.Namespace) -> int:
    from taskoffer_lab.prune import CACHE_BOUND_BYTES, cache_use
    from taskoffer_lab.state import records
    from taskoffer_lab.teardown import sweep

    console = Console()
    sweep()
    found = records()
    if found:
        table = Table("name", "nodes", "age", "ends with", title="Clusters", title_justify="left")
        table.add_column("KUBECONFIG", overflow="fold")
        for record in found:
            age = f"{(time.time() - record.created) / 60:.0f} min"
            until = "taskoffer-lab down" if record.spec.detached else f"process {record.owner.pid}"
            path = str(record.layout.admin_kubeconfig)
            state = path if record.ready else "(starting)"
            table.add_row(record.name, str(record.spec.nodes), age, until, state)
        console.print(table)
    else:
        console.print("no cluster runs")
    uses = cache_use()
    table = Table("part", "size", "path", title="Caches", title_justify="left")
    for use in uses:
        table.add_row(use.name, f"{use.size / 1e6:,.0f} MB", str(use.path))
    console.print(table)
    total = sum(use.size for use in uses)
    console.print(f"{total / 1e9:.1f} of {CACHE_BOUND_BYTES / 1e9:.0f} GB used")
    if total > CACHE_BOUND_BYTES:
        console.print("[red]above the bound[/]: taskoffer-lab prune")
    return 0


def _tools(arguments: argparse.Namespace) -> int:
    from taskoffer_lab.toolchain import ensure_tools

    tools = ensure_tools(arguments.groups or ["controlplane", "node"])
    for name, path in tools.paths.items():
        print(f"{name:26} {path}")
    return 0


def _prune(arguments: argparse.Namespace) -> int:
    from taskoffer_lab.prune import clear, prune
    from taskoffer_lab.state import records
    from taskoffer_lab.teardown import sweep

    sweep()
    if arguments.everything and records():
        raise LabError("clusters are running and use the caches", "taskoffer-lab down --all")
    removed = clear() if arguments.everything else prune()
    for path in removed:
        print(f"removed {path}")
    if not removed:
        print("nothing to remove")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    # The demo is imported late: it needs the image builder and more, which the other commands do not.
    from importlib import import_module

    status: int = import_module("taskoffer_lab.demo").main(arguments)
    return status


if __name__ == "__main__":
    sys.exit(main())
