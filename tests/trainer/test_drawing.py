"""A completion depends on its prompt, its seed and the model, and on nothing that it is drawn together with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from .preloaded import Preloader

pytestmark = pytest.mark.trainer

SCRIPT = """
import sys
import torch
from collections import Counter
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessorList
from taskoffer_trainer.drawing import Completion, Drawer, KeptTokens, _Inversion, random_numbers, token_log_probs
from trl.trainer.utils import add_fused_lm_head

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model.train()
tokens = KeptTokens.of(model, tokenizer, 10, 1.3)
asked = [Completion(tokenizer(text)["input_ids"], seed)
         for seed, text in enumerate(["one", "a rather longer prompt than the others", "two words", "one"])]

def ids(completions):
    return [list(one.ids) for one in completions]

together = Drawer(tokens)(model, asked, 4)
assert ids(together) == ids(Drawer(tokens)(model, asked, 1)) == ids(Drawer(tokens)(model, asked, 3)), "batch"
assert ids(together)[2:] == ids(Drawer(tokens)(model, asked[2:], 4)), "neighbours"
assert ids(together)[0] != ids(together)[3], "seeds"
assert model.training
assert all(len(one.ids) <= 10 for one in together)
assert [one.prompt_ids for one in together] == [one.prompt_ids for one in asked]

# What the model's own file recommends does not change what it says.
before = model.generation_config
model.generation_config = type(before)(**{**before.to_dict(), "repetition_penalty": 50.0, "do_sample": True,
                                          "temperature": 0.01, "top_k": 1, "top_p": 0.01, "no_repeat_ngram_size": 1,
                                          "bad_words_ids": None, "min_new_tokens": 9, "suppress_tokens": [5]})
assert ids(Drawer(tokens)(model, asked, 4)) == ids(together), "recommended"
model.generation_config = before

# An end token ends a completion, and is kept.
cut = KeptTokens(tokens.pad, [together[0].ids[2], *tokens.ends], 10, 1.3)
assert ids(Drawer(cut)(model, asked[:1], 1))[0] == list(together[0].ids[: together[0].ids.index(cut.ends[0]) + 1])

# Memory for two rows at once: the same completions, and four are not tried again.
class Little(Drawer):
    sizes = []
    def _draw(self, model, asked):
        self.sizes.append(len(asked))
        if len(asked) > 2:
            raise torch.OutOfMemoryError("the test has no memory for so many")
        return super()._draw(model, asked)
little = Little(tokens)
assert ids(little(model, asked, 4)) == ids(together) == ids(little(model, asked, 4))
assert little.sizes == [4, 2, 2, 2, 2], little.sizes

# The draws follow the probabilities at the temperature: frequencies of 20,000 draws of one token of four.
logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]])
wanted = torch.softmax(logits[0] / 1.3, -1)
numbers = random_numbers(range(20000), 1)
choice = _Inversion(numbers, 3, 1.3)(torch.zeros(20000, 3, dtype=torch.long), logits.expand(20000, 4)).argmax(-1)
found = torch.bincount(choice, minlength=4) / 20000
# Five standard deviations of a frequency are below 0.018.
assert (found - wanted).abs().max() < 0.018 and found[2] == 0, (found, wanted)
# The largest number below 1 points to a token that can be drawn, also where the sum is rounded.
edge = _Inversion(torch.tensor([[1.0 - 2**-24]]), 3, 1.0)(torch.zeros(1, 3, dtype=torch.long), logits)
assert edge.argmax() == 3
assert random_numbers([], 4).shape == (0, 4)

# Log-probabilities are those of the plain model.
add_fused_lm_head(model, temperature=1.3)
model.eval()
with torch.no_grad():
    logs, mask = token_log_probs(model, together, tokens.pad)
    for row, one in enumerate(together):
        whole = torch.tensor([[*one.prompt_ids, *one.ids]])
        plain = torch.log_softmax(model(input_ids=whole).logits[0].float() / 1.3, -1)
        for place, token in enumerate(one.ids):
            assert abs(plain[len(one.prompt_ids) + place - 1, token] - logs[row, place]) < 1e-4
        assert mask[row].sum() == len(one.ids)
print("drawn")
"""


def test_draws_are_a_pure_function_of_seed_prompt_and_model(fixtures_dir: Path, libraries: Preloader) -> None:
    done = libraries.run(["-c", SCRIPT, str(fixtures_dir / "llama")], dict(os.environ))
    assert done.stdout.endswith("drawn\n"), done.stdout[-3000:]
