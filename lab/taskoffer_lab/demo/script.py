"""What the demo shows: the models behind the examples, and the answer that each example must get."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from taskoffer_lab.errors import LabError
from taskoffer_lab.fixtures.tiny_model import Family
from taskoffer_lab.install import project_root

NAMESPACE = "demo"
"""Where the offers live."""

MODELS_CLAIM, DATA_CLAIM, OUTPUTS_CLAIM = "models", "data", "outputs"
"""The claims that the examples name."""

LOSS_MARGIN = 0.15
"""The share by which each adapter must lower the held-out loss. The smallest fall seen with the examples is 27 %."""

EXAM_ROWS = 64
"""Rows that the demo keeps to itself: no trainer sees them, and the adapters are examined on them."""

WAITING = "WaitingForCapacity"


@dataclass(frozen=True)
class DemoModel:
    """A base model that the examples name.

    Attributes:
        folder: Its folder on the claim, which is also the last part of its name in the offers.
        family: Architecture.
        hidden_size: Width; with two layers it decides the number of parameters.
    """

    folder: str
    family: Family
    hidden_size: int


MODELS = (
    DemoModel("llama-0.6m", "llama", 128),
    DemoModel("qwen2-0.6m", "qwen2", 128),
    DemoModel("llama-1.7m", "llama", 256),
    DemoModel("mistral-1.7m", "mistral", 256),
    DemoModel("llama-3.4m", "llama", 384),
    DemoModel("phi3-3.4m", "phi3", 384),
)


@dataclass(frozen=True)
class Expected:
    """How an example must end: trained on a number of GPUs, or refused with a reason.

    Attributes:
        gpus: GPUs that it is trained on; None for one that is refused.
        refusal: The reason of the refusal.
    """

    gpus: int | None = None
    refusal: str | None = None


EXPECTED = {
    "small-llama": Expected(gpus=1),
    "small-qwen": Expected(gpus=1),
    "medium-llama": Expected(gpus=2),
    "medium-mistral": Expected(gpus=2),
    "large-llama": Expected(gpus=4),
    "large-phi": Expected(gpus=4),
    "too-long": Expected(refusal="TimeLimitTooLong"),
    "unknown-family": Expected(refusal="ModelFamilyNotAccepted"),
}
"""Offer name → how it must end."""


@dataclass(frozen=True)
class Example:
    """One file of `examples/` and the offer in it."""

    path: Path
    manifest: dict[str, Any]

    @property
    def name(self) -> str:
        """The offer's name."""
        return str(self.manifest["metadata"]["name"])

    @property
    def expected(self) -> Expected:
        """How it must end."""
        return EXPECTED[self.name]


def load_examples(folder: Path | None = None) -> list[Example]:
    """Read the examples in the order of their file names.

    Raises:
        LabError: A file holds something else than one TaskOffer, or the demo does not know how it must end.
    """
    folder = folder or project_root() / "examples"
    found = []
    for path in sorted(folder.glob("*.yaml")):
        documents = [item for item in yaml.safe_load_all(path.read_text(encoding="utf-8")) if item is not None]
        if len(documents) != 1 or documents[0].get("kind") != "TaskOffer":
            raise LabError(f"{path} does not hold just one TaskOffer")
        example = Example(path, documents[0])
        if example.name not in EXPECTED:
            raise LabError(
                f"{path}: the demo does not know how offer {example.name!r} must end",
                f"name it in {Path(__file__).name}, or move the file elsewhere",
            )
        found.append(example)
    missing = EXPECTED.keys() - {example.name for example in found}
    if missing:
        raise LabError(f"{folder} lacks the offers {', '.join(sorted(missing))}", "restore the files of the checkout")
    return found
