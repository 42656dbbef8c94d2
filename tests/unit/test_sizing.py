"""What a model's name says: size, family, size class."""

import pytest

from core_builders import policy_spec
from taskoffer.api.v1alpha1.model_and_data import Model
from taskoffer.decision.sizing import billions, family_of, parameters_in_name, parameters_of, size_class_of

SIZES = [
    ("Qwen/Qwen2.5-0.5B-Instruct", 500_000_000),
    ("qwen2.5-0.5b", 500_000_000),
    ("Qwen/Qwen2.5-1.5B", 1_500_000_000),
    ("HuggingFaceTB/SmolLM2-135M", 135_000_000),
    ("mistralai/Mixtral-8x7B-v0.1", 56_000_000_000),
    ("mistralai/Mixtral-8x22B-Instruct-v0.1", 176_000_000_000),
    ("meta-llama/Llama-3.1-8B", 8_000_000_000),
    ("meta-llama/Llama-3.1-70B-Instruct", 70_000_000_000),
    ("deepseek-ai/DeepSeek-R1-Distill-Llama-70B", 70_000_000_000),
    ("Qwen/Qwen3-30B-A3B", 30_000_000_000),
    ("someone/Llama-3-8B-distill-1.5B", 1_500_000_000),
    ("google/gemma-2-9b-it", 9_000_000_000),
    ("codellama/CodeLlama-7b-hf", 7_000_000_000),
    ("lab/llama-0.9m", 900_000),
    ("HuggingFaceTB/SmolLM-135M-Instruct", 135_000_000),
    ("meta-llama/Llama-3.1-70B-Instruct-FP8", 70_000_000_000),
    ("unsloth/llama-3-8b-bnb-4bit", 8_000_000_000),
    ("TheBloke/Llama-2-13B-chat-GPTQ", 13_000_000_000),
    ("Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4", 7_000_000_000),
    ("someone/Llama-3.1-8B-Instruct-Q4_K_M", 8_000_000_000),
    ("someone/Llama-3-8B-exl2-4.65bpw", 8_000_000_000),
    ("someone/Mixtral-8X7b-Instruct-v0.1-AWQ", 56_000_000_000),
    ("ibm-granite/granite-3.1-3b-a800m-instruct", 3_000_000_000),
    ("Qwen/Qwen3-235B-A22B", 235_000_000_000),
    ("lmsys/vicuna-13b-v1.5-16k", 13_000_000_000),
    ("01-ai/Yi-34B-200K", 34_000_000_000),
    ("Qwen/Qwen2.5-7B-Instruct-1M", 7_000_000_000),
    ("internlm/internlm2_5-7b-chat-1m", 7_000_000_000),
    ("someone/llama-300M-draft-68m", 68_000_000),
    ("Qwen/Qwen1.5-MoE-A2.7B", None),
    ("70B-club/phi-4", None),
    ("microsoft/phi-4", None),
    ("meta-llama/Llama-3.1", None),
    ("microsoft/Phi-3-mini-4k-instruct", None),
    ("someone/model-v2b3", None),
    ("someone/zero-0B", None),
    ("", None),
]


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_the_size_is_read_from_the_last_part_of_a_models_name(name: str, size: int | None) -> None:
    assert parameters_in_name(name) == size


@pytest.mark.parametrize(
    ("name", "given", "unknown", "size"),
    [
        ("x/Llama-8B", 7, 9, 7),
        ("x/Llama-8B", None, 9, 8_000_000_000),
        ("x/phi-4", None, 9, 9),
        ("x/phi-4", None, None, None),
    ],
)
def test_a_given_size_counts_before_the_name_and_the_name_before_the_policys_guess(
    name: str, given: int | None, unknown: int | None, size: int | None
) -> None:
    assert parameters_of(Model(name=name, parameters=given), unknown) == size


@pytest.mark.parametrize(
    ("name", "architecture", "given", "size"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl", None, 2_567_463_684),
        ("black-forest-labs/FLUX.1-dev", "flux", None, 11_901_408_320),
        ("someone/flux-8b", "flux", None, 8_000_000_000),
        ("someone/tiny", "sdxl", 7, 7),
    ],
)
def test_the_architecture_says_the_size_that_neither_offer_nor_name_do(
    name: str, architecture: str, given: int | None, size: int
) -> None:
    assert parameters_of(Model(name=name, parameters=given, architecture=architecture), 9) == size


FAMILIES = [
    ("meta-llama/Llama-3.1-8B", "Llama"),
    ("codellama/CodeLlama-7b-hf", "CodeLlama"),
    ("someone/Code-Llama-13B", "CodeLlama"),
    ("deepseek-ai/deepseek-distill-llama-8b", "DeepSeek"),
    ("deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "DeepSeek"),
    ("mistralai/Mixtral-8x7B-v0.1", "Mistral"),
    ("Qwen/Qwen2.5-0.5B", "Qwen"),
    ("google/gemma-2-9b", "Gemma"),
    ("microsoft/phi-4", "Phi"),
    ("someone/Phi3-mini", "Phi"),
    ("deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "DeepSeek"),
    ("Phind/Phind-CodeLlama-34B-v2", "CodeLlama"),
    ("TheBloke/CodeLlama-70B-Instruct-GPTQ", "CodeLlama"),
    ("mistralai/Codestral-22B-v0.1", "Mistral"),
    ("nvidia/Mistral-NeMo-Llama-8B", "Mistral"),
    ("microsoft/phi-2", "Phi"),
    ("microsoft/Phi-3.5-MoE-instruct", "Phi"),
    ("cognitive/dolphin-7b", None),
    ("tiiuae/falcon-7b", None),
]


@pytest.mark.parametrize(("name", "family"), FAMILIES)
def test_the_family_with_the_longest_matching_pattern_wins(name: str, family: str | None) -> None:
    found = family_of(name, policy_spec(preset="strategy-8xh100").families)
    assert (found.name if found else None) == family


def test_of_equally_long_patterns_the_first_family_counts() -> None:
    families = policy_spec(
        families=[
            {"name": "First", "patterns": ["abcd"], "successRate": "1"},
            {"name": "Second", "patterns": ["efgh"], "successRate": "1"},
        ]
    ).families
    found = family_of("efgh-abcd", families)
    assert found is not None
    assert found.name == "First"


BORDERS = [
    (1, "Small"),
    (6_999_999_999, "Small"),
    (7_000_000_000, "Medium"),
    (12_999_999_999, "Medium"),
    (13_000_000_000, "Large"),
    (69_999_999_999, "Large"),
    (70_000_000_000, "XLarge"),
    (10**15, "XLarge"),
]


@pytest.mark.parametrize(("parameters", "name"), BORDERS)
def test_the_lower_border_of_a_size_class_is_inclusive(parameters: int, name: str) -> None:
    found = size_class_of(parameters, policy_spec(preset="strategy-8xh100").size_classes)
    assert found is not None
    assert found.name == name


def test_a_size_in_a_gap_between_classes_has_no_class() -> None:
    small, medium, *_ = policy_spec(preset="strategy-8xh100").size_classes
    assert size_class_of(8_000_000_000, [small]) is None
    assert size_class_of(1, [medium]) is None


@pytest.mark.parametrize(
    ("parameters", "text"),
    [(8_030_000_000, "8.03B"), (135_000_000, "135M"), (1_000_000_000, "1B"), (500_000, "500k"), (70, "0.07k")],
)
def test_sizes_are_written_for_people(parameters: int, text: str) -> None:
    assert billions(parameters) == text
