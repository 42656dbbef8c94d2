"""The documentation says nothing that is not there: links, names, commands and manifests are checked."""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from crd_schema import faults, schema_of
from taskoffer import presets
from taskoffer.api.contract import PrepareConfig, ProgressReport, RunConfig, SubmitConfig
from taskoffer.api.reasons import Reason
from taskoffer.api.v1alpha1.capacitypolicy import CapacityPolicy, CapacityPolicySpec
from taskoffer.api.v1alpha1.taskoffer import TaskOffer
from taskoffer.cli.main import _parser as taskoffer_parser
from taskoffer.decision.lint import lint
from taskoffer_lab.cli import _parser as lab_parser

ROOT = Path(__file__).resolve().parents[2]
GENERATED = ROOT / "docs" / "reference"
PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "examples/*.md", "benchmarks/*.md")
    for page in ROOT.glob(pattern)
    if GENERATED not in page.parents
)
SOURCES = ("operator", "trainer_image", "lab", "tests", "hack", "benchmarks")
PACKAGES = ("operator/taskoffer", "trainer_image/taskoffer_trainer", "lab/taskoffer_lab")

# Words of Kubernetes and of people, which no list of this repository can hold.
FOREIGN = frozenset({"ConfigMap", "LeaderElection", "NetworkPolicy", "PersistentVolumeClaim", "ServiceAccount"})
KUBERNETES_FIELDS = frozenset(
    {"backoffLimit", "messageExpression", "oldSelf", "restartPolicy", "podReplacementPolicy", "podFailurePolicy"}
)
MADE_BY_THE_READER = frozenset({"policy.yaml", "offer.yaml", "mine.yaml", "hosts.toml"})
COMMANDS = {"taskoffer": taskoffer_parser, "taskoffer-lab": lab_parser}
ARCHITECTURE_LINES = 150


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


pages = pytest.mark.parametrize("page", PAGES, ids=_name)


def _without_blocks(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)


def blocks(text: str, *languages: str) -> Iterator[str]:
    """Yield the fenced blocks of these languages."""
    for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S):
        if language in languages:
            yield body


def spans(text: str) -> list[str]:
    """Return the inline code of a page."""
    return re.findall(r"`([^`\n]+)`", _without_blocks(text))


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, made as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", _without_blocks(page.read_text(encoding="utf-8")), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def command_lines(text: str) -> Iterator[list[str]]:
    """Yield the calls of this project's programs: in console blocks after a prompt, and inline."""
    shown = [
        line.removeprefix("$ ").split("#")[0]
        for body in blocks(text, "console")
        for line in body.splitlines()
        if line.startswith("$ ")
    ]
    parts = [part for line in shown for part in re.split(r"[|>]", line)] + spans(text)
    for part in parts:
        found = re.match(r"\s*(?:\.venv/bin/|sudo )?((?:kubectl )?taskoffer(?:-lab)?)((?: .*)?)$", part)
        if found:
            yield [found[1].replace("kubectl ", ""), *shlex.split(found[2])]


@cache
def make_targets() -> frozenset[str]:
    """Return the targets that the Makefile declares as commands."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    declared = " ".join(re.findall(r"^\.PHONY: (.*)$", text, flags=re.M))
    return frozenset(declared.split())


@cache
def names_in_code() -> frozenset[str]:
    """Return every class, function, attribute, constant and argument of the sources."""
    found: set[str] = set()
    for folder in SOURCES:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                    found.add(node.name)
                elif isinstance(node, ast.Attribute):
                    found.add(node.attr)
                elif isinstance(node, ast.Name):
                    found.add(node.id)
                elif isinstance(node, ast.arg):
                    found.add(node.arg)
    return frozenset(found)


@cache
def words_of_the_api() -> frozenset[str]:
    """Return the kinds, field names and enumerated values of the CRDs, and of what pods read and report."""
    found: set[str] = set()

    def collect(node: Any) -> None:
        if isinstance(node, dict):
            found.update(node.get("properties", {}))
            found.update(value for value in node.get("enum", ()) if isinstance(value, str))
            if isinstance(node.get("kind"), str):
                found.add(node["kind"])
            for value in node.values():
                collect(value)
        elif isinstance(node, list):
            for value in node:
                collect(value)

    for path in (ROOT / "crds").glob("*.yaml"):
        collect(yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader))
    for read_in_pods in (RunConfig, PrepareConfig, SubmitConfig, ProgressReport):
        collect(read_in_pods.model_json_schema())
    for name in presets.names():
        spec = presets.load(name)["spec"]
        found.update(item["name"] for kind in ("sizeClasses", "families", "lanes") for item in spec.get(kind, ()))
    return frozenset(found)


@cache
def words_of_explanations() -> frozenset[str]:
    """Return the names that items of an explanation are given in the decisions' sources."""
    found: set[str] = set()
    for path in (ROOT / "operator" / "taskoffer" / "decision").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("_term", "ExplanationItem"):
                named = [*node.args[:1], *(keyword.value for keyword in node.keywords if keyword.arg == "name")]
                found.update(str(arg.value) for arg in named if isinstance(arg, ast.Constant))
    return frozenset(found)


@cache
def reasons_of_the_trainer() -> frozenset[str]:
    """Return the reasons with which a training ends or changes a setting, as its errors and clamps name them."""
    sources = (ROOT / "trainer_image" / "taskoffer_trainer").glob("*.py")
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    constants = {
        ast.unparse(node.targets[0]): node.value
        for node in nodes
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant)
    }
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("bad_data", "failed", "TrainerError"):
            values = [constants.get(arg.id) if isinstance(arg, ast.Name) else arg for arg in node.args[:2]]
            found.update(str(value.value) for value in values if isinstance(value, ast.Constant))
        if isinstance(node, ast.keyword) and node.arg == "reason" and isinstance(node.value, ast.Constant):
            found.add(str(node.value.value))
    return frozenset(found)


@pages
def test_every_link_leads_somewhere(page: Path) -> None:
    text = _without_blocks(page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{target} does not exist"
        assert there.is_relative_to(ROOT), f"{target} leads out of the repository"
        if anchor and there not in GENERATED.iterdir():
            assert anchor in anchors(there), f"{there.name} has no heading #{anchor}"


@pages
def test_every_camel_case_word_in_code_type_is_a_reason_a_field_or_a_class(page: Path) -> None:
    reasons = {reason.value for reason in Reason}
    for span in spans(page.read_text(encoding="utf-8")):
        if re.fullmatch(r"(?:[A-Z][a-z]+){2,}", span):
            known = reasons | words_of_the_api() | names_in_code() | words_of_explanations() | FOREIGN
            known |= reasons_of_the_trainer()
            assert span in known, f"nothing is called {span}"


@pages
def test_every_field_in_code_type_is_one_of_the_api_or_of_kubernetes(page: Path) -> None:
    for span in spans(page.read_text(encoding="utf-8")):
        if re.fullmatch(r"([a-z]+[A-Z]\w*|spec|status)(\[\])?(\.[a-zA-Z]+(\[\])?)*(: .*)?", span):
            for part in re.split(r"[.]", span.partition(":")[0]):
                assert part.removesuffix("[]") in words_of_the_api() | KUBERNETES_FIELDS, (
                    f"{span}: no field is called {part}"
                )


@pages
def test_every_test_and_function_that_is_named_exists(page: Path) -> None:
    for span in spans(page.read_text(encoding="utf-8")):
        if re.fullmatch(r"(\w+\.)*_?\w+\(\)", span) or re.fullmatch(r"test_\w+", span):
            assert span.removesuffix("()").split(".")[-1] in names_in_code(), f"nothing is called {span}"
        elif re.fullmatch(r"[A-Z]\w+\.\w+", span) and not (ROOT / span).exists():
            assert set(span.split(".")) <= names_in_code() | words_of_the_api(), f"nothing is called {span}"


@pages
def test_every_path_that_is_named_exists(page: Path) -> None:
    roots = [ROOT, *(ROOT / package for package in PACKAGES)]
    for span in spans(page.read_text(encoding="utf-8")):
        if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)*(\.(py|yaml|md|toml|lock)|/)", span) or span in MADE_BY_THE_READER:
            continue
        if "/" in span:
            there = any((root / span).exists() for root in roots)
        else:
            there = (ROOT / span).exists() or any(any(root.rglob(span)) for root in (*roots[1:], ROOT / "tests"))
        assert there, f"there is no {span}"


@pages
def test_every_make_target_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    code = [*spans(text), *(line.removeprefix("$ ") for body in blocks(text, "console") for line in body.splitlines())]
    for call in code:
        found = re.match(r"make ([a-z-]+)", call)
        if found:
            assert found[1] in make_targets(), f"{call}: the Makefile has no such target"


def test_make_help_explains_every_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    explained = set(re.findall(r"^([a-z-]+):.*## \S", text, flags=re.M))
    assert make_targets() == explained


@pages
def test_every_command_is_one_that_the_programs_take(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for program, *arguments in command_lines(page.read_text(encoding="utf-8")):
        parser = COMMANDS[program]()
        # A word in capitals stands for one that the reader puts there.
        arguments = [word.lower() if word.isupper() else word for word in arguments]
        if len(arguments) < 2:
            choices = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
            assert not arguments or arguments[0] in choices, f"{program} has no command {arguments[0]}"
            continue
        try:
            parser.parse_args(arguments)
        except SystemExit as end:
            if end.code:
                pytest.fail(f"{program} {shlex.join(arguments)}: {capsys.readouterr().err.strip()}")


@pages
def test_every_manifest_is_valid(page: Path) -> None:
    kinds = {"TaskOffer": TaskOffer, "CapacityPolicy": CapacityPolicy}
    for body in blocks(page.read_text(encoding="utf-8"), "yaml"):
        manifest = yaml.safe_load(body)
        if isinstance(manifest, dict) and manifest.get("kind") in kinds:
            assert list(faults(schema_of(manifest["kind"]), manifest)) == []
            metadata = {"uid": "1", "resourceVersion": "1", "creationTimestamp": "2026-01-01T00:00:00Z"}
            manifest["metadata"] = {**metadata, "namespace": "default", **manifest["metadata"]}
            kinds[manifest["kind"]].model_validate(manifest)


@pages
def test_every_python_example_parses_and_names_what_can_be_imported(page: Path) -> None:
    for body in blocks(page.read_text(encoding="utf-8"), "python"):
        tree = ast.parse(body)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                used = {node.func.attr, *(keyword.arg for keyword in node.keywords if keyword.arg)}
                assert used <= names_in_code(), f"{ast.unparse(node)}: not in the code"


@pages
def test_every_preset_that_is_named_exists(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"preset `([^`]+)`|`([^`]+)` preset|presets `([^`]+)`|taskoffer preset ([\w-]+)", text)
    for name in (part for found in named for part in found if part):
        assert name in presets.names(), f"there is no preset {name}"


PAGE_OF_FINDINGS = {"strategy-8xh100": "strategy-8xh100.md"}
"""Where the findings of a preset are shown, if not on the page about all of them."""


@pytest.mark.parametrize("name", presets.names())
def test_the_findings_of_a_preset_are_the_ones_that_its_page_shows(name: str) -> None:
    page = ROOT / "docs" / "explanation" / PAGE_OF_FINDINGS.get(name, "presets.md")
    shown = [body for body in blocks(page.read_text(encoding="utf-8"), "console") if "$ taskoffer lint " in body]
    body = next(body for body in shown if body.startswith(f"$ taskoffer preset {name} > policy.yaml\n"))
    findings = lint(CapacityPolicySpec.model_validate(presets.load(name)["spec"]))
    assert body.splitlines()[2:] == [
        *(f"{finding.severity}: {finding.message}" for finding in findings),
        f"{len(findings)} finding(s)",
    ]


@pages
def test_no_page_leaves_a_gap(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert not re.search(r"TODO|FIXME|TBD|XXX|<!--|\bTBA\b", text)


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, pending = set(), [ROOT / "README.md"]
    while pending:
        page = pending.pop()
        if page in reached:
            continue
        reached.add(page)
        links = re.findall(r"\]\(([^)\s#]+\.md)[^)]*\)", page.read_text(encoding="utf-8"))
        pending += [(page.parent / link).resolve() for link in links if not link.startswith("http")]
    beside_their_program = {page for page in PAGES if page.parent.name == "benchmarks"}
    assert {_name(page) for page in set(PAGES) - beside_their_program - reached} == set()


def test_the_architecture_stays_short() -> None:
    assert len((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines()) <= ARCHITECTURE_LINES
