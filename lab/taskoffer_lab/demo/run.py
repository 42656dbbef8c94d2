"""The course of the demo: prepare side by side, bring up, apply the examples, follow, examine, take down."""

import argparse
import contextlib
import os
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.text import Text

from taskoffer_lab.cluster import Cluster
from taskoffer_lab.debian import IMAGE_TOOLS, SYSTEM_TOOLS, ensure_programs
from taskoffer_lab.demo import deployment
from taskoffer_lab.demo.checks import Adapter, adapters_of, check_answers, check_files
from taskoffer_lab.demo.crew import Crew
from taskoffer_lab.demo.examination import check_exam, check_figures, examine
from taskoffer_lab.demo.follow import Seen, follow
from taskoffer_lab.demo.interrupts import every_end_as_interrupt, undisturbed
from taskoffer_lab.demo.material import Material, material, new_outputs
from taskoffer_lab.demo.rows import Row
from taskoffer_lab.demo.screen import Screen, stdout_console
from taskoffer_lab.demo.script import ALL_TYPES, EXAMPLES, NAMESPACE, Example, Script, load_examples
from taskoffer_lab.demo.summary import summary
from taskoffer_lab.errors import LabError
from taskoffer_lab.images import Images, Registry
from taskoffer_lab.local_provider import LocalProvider
from taskoffer_lab.node_requirements import ensure_node_requirements
from taskoffer_lab.spec import ClusterSpec

TOOLS = "Kubernetes tools"
IMAGES = "container images"
MATERIAL = "tiny models and data"
CLUSTER = "cluster with simulated GPUs"
PULL = "trainer image on the node"
OPERATOR = "operator, two replicas"
TRAINING = "offers to adapters"
EXAM = "examination of the adapters"
DOWN = "taking everything down"


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        seen: What was observed of the offers.
        adapters: What was trained.
        exams: Offer → the exam's figures.
        problems: What was not as it is meant; empty for a success.
    """

    seen: Seen
    adapters: list[Adapter]
    exams: dict[str, dict[str, Any]]
    problems: list[str]


def main(arguments: argparse.Namespace) -> int:
    """Run the demo; returns 0 only when everything was as it is meant.

    Raises:
        LabError: Something is missing or broken; says what helps.
        KeyboardInterrupt: Ctrl-C or SIGTERM; everything has been taken down.
    """
    if arguments.provider != "local":
        raise LabError(
            f"the demo mounts folders of this machine into pods, which provider {arguments.provider} cannot",
            "leave --provider out; docs and examples/ say how to install taskoffer in another cluster",
        )
    if arguments.nodes < 1:
        raise LabError(f"--nodes {arguments.nodes}: trainings need a node", "--nodes 1")
    script = ALL_TYPES if arguments.all_types else EXAMPLES
    examples = load_examples(script=script)
    with every_end_as_interrupt(), Screen(console=stdout_console()) as screen:
        return _Demo(screen, script, examples, arguments).run()


class _Demo:
    def __init__(
        self, screen: Screen, script: Script, examples: Sequence[Example], arguments: argparse.Namespace
    ) -> None:
        self._screen = screen
        self._script = script
        self._examples = examples
        self._nodes: int = arguments.nodes
        self._keep: bool = arguments.keep
        self._svg: Path | None = arguments.export_svg
        self._material: Material = material()
        self._pictured = False
        self._running: set[str] = set()

    def run(self) -> int:
        screen = self._screen
        title = f"TaskOffer demo: {len(self._examples)} offers, {8 * self._nodes} simulated GPUs, real trainings"
        screen.print(Text(title, style="bold"))
        name = f"demo-{os.getpid()}"
        outputs = new_outputs(self._material, time.strftime("%Y%m%d-%H%M%S"))
        kept = False
        cluster: Cluster | None = None
        try:
            cluster = self._bring_up(name, outputs)
            outcome = self._train(cluster, outputs)
            kept = self._keep
        except BaseException as error:
            with undisturbed():
                if cluster is not None:
                    self._take_down(cluster, keep_logs=not isinstance(error, KeyboardInterrupt))
                if isinstance(error, KeyboardInterrupt):
                    shutil.rmtree(outputs, ignore_errors=True)
            raise
        if not kept:
            with undisturbed():
                self._take_down(cluster, keep_logs=bool(outcome.problems))
        return self._conclude(cluster, outcome, outputs, kept=kept)

    # Bringing up

    def _bring_up(self, name: str, outputs: Path) -> Cluster:
        """Return a cluster in which the operator runs and every node has the trainer image."""
        screen = self._screen
        with screen.phase("Debian packages"), screen.stderr_into("Debian packages"):
            ensure_programs(tool.program for tool in (*SYSTEM_TOOLS, *IMAGE_TOOLS))
            ensure_node_requirements()
        with contextlib.ExitStack() as stack:
            storage = stack.enter_context(Registry.start("127.0.0.1"))
            crew = stack.enter_context(Crew(screen.tell))
            for part, arguments in (
                (TOOLS, ("tools",)),
                (IMAGES, ("images", f"--endpoint={storage.endpoint}")),
                (MATERIAL, ("material",)),
            ):
                screen.begin(part)
                crew.start(part, *arguments)
                self._running.add(part)
            self._wait(crew, TOOLS)
            cluster: Cluster | None = None
            try:
                with screen.phase(CLUSTER), screen.stderr_into(CLUSTER):
                    spec = ClusterSpec(name=name, nodes=self._nodes, detached=self._keep)
                    cluster = LocalProvider().up(spec)
                images = self._wait(crew, IMAGES)
                self._wait(crew, MATERIAL)
                self._install(cluster, Images(trainer=images[0], operator=images[1]), outputs)
            except BaseException as error:
                with undisturbed():
                    crew.end()
                    if cluster is not None:
                        self._take_down(cluster, keep_logs=not isinstance(error, KeyboardInterrupt))
                raise
        return cluster

    def _wait(self, crew: Crew, part: str) -> list[str]:
        """Wait for a part; those that end meanwhile are shown as done too."""

        def note() -> None:
            for name in sorted(self._running - {part}):
                if not crew.running(name):
                    self._end(name)

        output = crew.wait(part, note)
        self._end(part)
        return output

    def _end(self, part: str) -> None:
        if part in self._running:
            self._running.remove(part)
            self._screen.end(part)

    def _install(self, cluster: Cluster, images: Images, outputs: Path) -> None:
        screen = self._screen
        with Registry.start(cluster.host_address) as registry:
            cluster.use_registry(registry.endpoint)
            screen.begin(PULL)
            deployment.prepare_namespace(cluster, self._material, outputs)
            deployment.start_pull(cluster, images.trainer)
            with screen.phase(OPERATOR):
                deployment.start_operator(cluster, images.operator)
                deployment.apply_policy(cluster, images, self._script)
                deployment.wait_for_operator(cluster)
            deployment.wait_for_pull(cluster)
            screen.end(PULL)

    # Training

    def _train(self, cluster: Cluster, outputs: Path) -> Outcome:
        screen = self._screen
        try:
            with screen.phase(TRAINING):
                folder = self._examples[0].path.parent
                cluster.kubectl("apply", "--namespace", NAMESPACE, "-f", str(folder))
                seen = follow(cluster.api, [example.name for example in self._examples], self._show)
        except LabError as error:
            log = deployment.operator_log(cluster, 20)
            raise LabError(f"{error.message}\nThe operator's log ends:\n{log}", error.remedy) from error
        jobs = cluster.api.request("GET", f"/apis/taskoffer.dev/v1alpha1/namespaces/{NAMESPACE}/trainingjobs")["items"]
        screen.snapshot("At the end", phases=False)
        adapters, problems = adapters_of([job for job in jobs if _complete(job)], outputs)
        problems += check_answers(self._examples, seen, 8 * self._nodes)
        for adapter in adapters:
            problems += check_files(adapter)
            problems += check_figures(adapter)
        exams: dict[str, dict[str, Any]] = {}
        if adapters and not problems:
            with screen.phase(EXAM):
                exams = examine(self._material, adapters)
            for adapter in adapters:
                problems += check_exam(adapter, exams[adapter.offer])
        return Outcome(seen, adapters, exams, problems)

    def _show(self, rows: Sequence[Row]) -> None:
        self._screen.show(rows)
        moving = [row for row in rows if row.state == "Running" and (row.progress or 0) >= 10]
        waiting = [row for row in rows if row.verdict == "Wait"]
        if not self._pictured and len(moving) >= 2 and waiting:
            self._pictured = True
            self._screen.snapshot(f"After {self._screen.elapsed:.0f} s")

    # The end

    def _take_down(self, cluster: Cluster, *, keep_logs: bool) -> None:
        with self._screen.phase(DOWN):
            kept = cluster.down(keep_logs=keep_logs)
        if kept is not None:
            self._screen.print(f"The cluster's logs are in {kept}")

    def _conclude(self, cluster: Cluster, outcome: Outcome, outputs: Path, *, kept: bool) -> int:
        screen = self._screen
        screen.finish()
        if outcome.exams:
            screen.print(summary(outcome.seen, outcome.adapters, outcome.exams, outputs))
        screen.print(Text("\nTime", style="bold"))
        screen.print(screen.phases_table())
        if outcome.seen.first_adapter is not None:
            first = screen.begun(TRAINING) + outcome.seen.first_adapter
            screen.print(Text(f"First adapter after {first:.0f} s, everything done after {screen.elapsed:.0f} s."))
        for problem in outcome.problems:
            screen.print(Text.assemble(("✗ ", "bold red"), problem))
        if not outcome.problems:
            done = f"{len(outcome.adapters)} adapters loaded and examined; each learned at least what it had to"
            screen.print(Text.assemble(("✓ ", "bold green"), done))
        if kept:
            print(f"export KUBECONFIG={cluster.kubeconfig} PATH={cluster.bin_dir}:$PATH")
            print(f"# look around: kubectl -n {NAMESPACE} get to,tj,pods; end it: taskoffer-lab down {cluster.name}")
        if self._svg is not None:
            screen.export_svg(self._svg, "taskoffer-lab demo")
        return 1 if outcome.problems else 0


def _complete(job: dict[str, Any]) -> bool:
    conditions = (job.get("status") or {}).get("conditions") or ()
    return any(item["type"] == "Complete" and item["status"] == "True" for item in conditions)
