"""Hugging Face's `transformers` made the golden file: the same greedy ids, the same tokens left by every filter."""

import json

import numpy as np
import pytest

from abi_py.generation import GenerationConfig, Generator, generate
from abi_py.generation.decoder import Decoder
from abi_py.generation.sampler import candidates
from abi_py.generation.sequence import Sequence

PROMPTS = range(4)
PENALISED = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2}


def without_cache(model, prompt, count):
    """Greedy ids by the forward pass of training, the whole text anew for every token."""
    context = list(prompt)
    for _ in range(count):
        context.append(int(model.forward(np.array([context]))[0, -1].argmax()))
    return context[len(prompt) :]


@pytest.mark.parametrize("number", PROMPTS)
def test_greedy_ids_with_cache_without_and_hugging_faces(hf_model, generation, number):
    prompt, wanted = generation[f"prompt_{number}"], generation[f"greedy_{number}"]
    assert len(set(wanted.tolist())) > 8  # one token again and again would show nothing
    assert generate(hf_model, prompt, len(wanted), temperature=0).tolist() == wanted.tolist()
    assert without_cache(hf_model, prompt, len(wanted)) == wanted.tolist()


@pytest.mark.parametrize("number", PROMPTS)
def test_greedy_ids_with_penalties(hf_model, generation, number):
    prompt, wanted = generation[f"prompt_{number}"], generation[f"greedy_{number}_penalised"]
    assert wanted.tolist() != generation[f"greedy_{number}"].tolist()
    assert generate(hf_model, prompt, len(wanted), temperature=0, **PENALISED).tolist() == wanted.tolist()


def test_all_prompts_in_one_batch(hf_model, generation):
    prompts = [generation[f"prompt_{number}"] for number in PROMPTS]
    made = generate(hf_model, prompts, len(generation["greedy_0"]), temperature=0)
    for number, ids in zip(PROMPTS, made):
        assert ids.tolist() == generation[f"greedy_{number}"].tolist()


@pytest.mark.parametrize("number", PROMPTS)
def test_logits_of_prefill_and_steps(hf_model, generation, number):
    logits = generation[f"logits_{number}"]
    prompt = generation[f"prompt_{number}"]
    ids = np.concatenate((prompt, generation[f"greedy_{number}"]))
    decoder = Decoder(hf_model)
    assert np.abs(decoder.prefill(0, prompt) - logits[len(prompt) - 1]).max() < 1e-4
    for t in range(len(prompt), len(ids)):
        assert np.abs(decoder.step(np.zeros(1, np.int32), ids[t : t + 1])[0] - logits[t]).max() < 1e-4


def test_log_probabilities(hf_model, generation):
    prompt, count = generation["prompt_1"], len(generation["greedy_1"])
    (result,) = Generator(hf_model).run([prompt], temperature=0, max_new_tokens=count, logprobs=3)
    logits = generation["logits_1"].astype(np.float64)[len(prompt) - 1 : -1]
    expected = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert np.abs(result.logprobs - expected[np.arange(count), result.ids]).max() < 1e-4
    for t, top in enumerate(result.top_logprobs):
        assert [i for i, _ in top] == np.argsort(-expected[t])[:3].tolist()
        assert np.abs(np.array([value for _, value in top]) - expected[t, [i for i, _ in top]]).max() < 1e-4


def cases():
    from pathlib import Path

    with np.load(Path(__file__).parents[1] / "golden/generation.npz") as stored:
        return list(enumerate(json.loads(str(stored["cases"]))))


@pytest.mark.parametrize(("number", "case"), cases(), ids=str)
def test_processors(generation, number, case):
    """The ids that are left, and their probabilities, are those of the processors of `transformers`, in their order."""
    ids, z, kept = generation["ids"], generation["scores"].copy(), generation[f"kept_{number}"].astype(np.float64)
    config = GenerationConfig(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 1, **case})
    ends = frozenset(generation["ends"].tolist())
    sequence = Sequence(index=0, prompt=ids, config=config, limit=1, stop_ids=ends, codec=None)
    left, p = candidates(sequence.processed(z), **config.filters())
    assert z.tobytes() == generation["scores"].tobytes()
    wanted = np.exp(kept - kept.max())
    wanted /= wanted.sum()
    assert sorted(left.tolist()) == np.flatnonzero(np.isfinite(kept)).tolist()
    assert np.abs(p - wanted[left]).max() < 1e-6
