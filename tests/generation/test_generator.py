"""The loop: batches, stops, streaming, the end of the context, texts, and a cache that is used again."""

import numpy as np
import pytest

from abi_py.config import LoraConfig, TrainableModelConfig
from abi_py.errors import ConfigError, DataError, NonFiniteError
from abi_py.generation import GenerationConfig, Generator, generate, generate_stream
from abi_py.generation import decoder as decoder_module
from abi_py.generation import generator as generator_module
from abi_py.generation.decoder import Decoder
from abi_py.generation.text import ByteText, StopText
from abi_py.kernels.engine.jit import JIT
from abi_py.model import LoraModel, TrainableModel
from abi_py.runs.tiny_models import stored_as

SHAPE = {"hidden_dim": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_dim": 24}
OTHERS = [  # models
    {},
    {"family": "mistral", "sliding_window": 9},
    {"family": "gpt2", "num_kv_heads": 4},
    {"family": "mixtral", "num_experts": 4, "experts_per_token": 2},
]
compiled_only = pytest.mark.skipif(not JIT, reason="NumPy's sums depend on the shape")
DRAWN = {"temperature": 1.3, "top_k": 0, "top_p": 0.95}


def make(vocab_size=257, max_seq_len=48, seed=5, **changes):
    sizes = {"vocab_size": vocab_size, "max_seq_len": max_seq_len, "seed": seed}
    model = TrainableModel(TrainableModelConfig(**{**SHAPE, **sizes, **changes}))
    model.parameters.weights_flat[...] *= 8  # fresh weights are so small that all tokens are about equally likely
    return model


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def quantized():
    return stored_as(make(hidden_dim=64, intermediate_dim=64), "q8_0")


@pytest.fixture(params=[None, True, False], ids=["float32", "integer", "decoded"])
def each_way(request, model, quantized):
    """Return a model and whether it multiplies whole numbers: one of float32, and a quantised one in both ways."""
    return (model, True) if request.param is None else (quantized, request.param)


@pytest.mark.parametrize("settings", [{"temperature": 0}, DRAWN], ids=["greedy", "drawn"])
def test_a_batch_gives_what_each_prompt_gives_alone(each_way, rng, settings, monkeypatch):
    """More prompts than slots, of different lengths, ending at different times."""
    model, integer = each_way
    prompts = [rng.integers(0, 257, n) for n in (1, 30, 4, 9, 2, 17, 1, 3, 8, 12, 5)]
    monkeypatch.setattr(generator_module, "TOGETHER", 4)
    settings = {**settings, "stop_ids": tuple(range(40, 90)), "max_new_tokens": 20, "integer_products": integer}
    together = generate(model, prompts, **settings)
    assert len({len(ids) for ids in together}) > 3
    for prompt, ids in zip(prompts, together):
        assert generate(model, prompt, **settings).tolist() == ids.tolist()


def test_bits_of_logits_do_not_depend_on_the_batch_or_on_threads(each_way, rng, same_bits):
    model, integer = each_way
    prompts = [rng.integers(0, 257, n) for n in (3, 20, 1)]

    def logits(slots):
        decoder = Decoder(model, len(slots), integer=integer)
        read = [decoder.prefill(i, prompts[slot]).copy() for i, slot in enumerate(slots)]
        step = decoder.step(np.arange(len(slots), dtype=np.int32), np.full(len(slots), 7, np.int32)).copy()
        return np.array(read), step

    same_bits(lambda: logits([0, 1, 2]))
    read, step = logits([0, 1, 2])
    for slot in range(3):
        alone = logits([slot])
        assert alone[0].tobytes() == read[slot].tobytes()
        assert alone[1].tobytes() == step[slot].tobytes()


@compiled_only
def test_whole_numbers_are_near_and_a_generator_goes_from_one_way_to_the_other(quantized, rng):
    """What is rounded are the activations; keys and values of one way are not those of the other."""
    ids = rng.integers(0, 257, 20)
    exact = quantized.forward(ids)[0, -1]
    near, decoded = Decoder(quantized).prefill(0, ids), Decoder(quantized, integer=False).prefill(0, ids)
    largest = np.abs(exact).max()
    assert np.abs(decoded - exact).max() < 1e-5 * largest
    assert 1e-4 * largest < np.abs(near - exact).max() < 0.05 * largest
    both, asked = Generator(quantized), {"temperature": 0, "max_new_tokens": 6, "logprobs": 0}
    for integer in (True, False, True):
        (found,) = both.run([ids], **asked, integer_products=integer)
        (alone,) = Generator(quantized).run([ids], **asked, integer_products=integer)
        assert found.logprobs.tobytes() == alone.logprobs.tobytes()


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_the_cache_holds_key_value_heads_only(heads):
    config = TrainableModelConfig(vocab_size=9, max_seq_len=8, **{**SHAPE, "num_kv_heads": heads})
    decoder = Decoder(TrainableModel(config), 3)
    decoder.prefill(0, np.zeros(5, np.int32))
    assert decoder.cache.nbytes == 2 * SHAPE["num_layers"] * 3 * heads * 8 * 4 * 4  # D = 4


def test_the_cache_grows_seldom_and_keeps_what_it_holds(rng, monkeypatch):
    monkeypatch.setattr(decoder_module, "FIRST_CAPACITY", 16)
    model = make(vocab_size=31, max_seq_len=70)
    ids = rng.integers(0, 31, 70).astype(np.int32)
    decoder, capacities = Decoder(model), set()
    slot = np.zeros(1, np.int32)
    decoder.prefill(0, ids[:12])
    for t in range(12, 70):
        logits = decoder.step(slot, ids[t : t + 1])
        capacities.add(decoder.cache.capacity)
    assert sorted(capacities) == [16, 32, 64, 70]
    expected = model.forward(ids)[0, -1]
    assert np.abs(logits[0] - expected).max() < 1e-4 * np.abs(expected).max()
    with pytest.raises(DataError, match="max_seq_len"):
        decoder.step(slot, ids[:1])


@pytest.mark.parametrize("changes", [{"norm_eps": 4.0}, {"rope_theta": 3.0}, {"head_dim": 6, "tie_embeddings": False}])
def test_decoding_computes_what_training_does_with_every_shape(rng, changes):
    model, usual, ids = make(**changes), make(), rng.integers(0, 257, 9)
    expected, decoder = model.forward(ids)[0], Decoder(model)
    largest = np.abs(expected).max()
    assert np.abs(decoder.prefill(0, ids[:8]) - expected[7]).max() < 1e-4 * largest
    assert np.abs(decoder.step(np.zeros(1, np.int32), ids[8:])[0] - expected[8]).max() < 1e-4 * largest
    assert np.abs(usual.forward(ids)[0] - expected).max() > 1e-2 * largest


def test_a_long_prompt_in_chunks_equals_one_pass(rng, monkeypatch):
    model, ids = make(vocab_size=31, max_seq_len=80), rng.integers(0, 31, 77)
    whole = Decoder(model).prefill(0, ids)
    monkeypatch.setattr(decoder_module, "CHUNK", 20)
    assert np.abs(Decoder(model).prefill(0, ids) - whole).max() < 1e-5


def test_past_the_context_the_newer_half_is_kept(model):
    """Every token equals the one that the model gives for what it still sees."""
    longest = model.config.max_seq_len
    made = generate(model, [1, 2, 3], 100, temperature=0).tolist()
    text, seen = [1, 2, 3], [1, 2, 3]
    for token in made:
        assert token == model.forward(np.array([seen]))[0, -1].argmax()
        text.append(token)
        seen = [*seen, token] if len(seen) < longest else text[-(longest // 2) :]
    (result,) = Generator(model).run([[1, 2, 3]], max_new_tokens=100, temperature=0)
    assert result.dropped > 0


def test_a_prompt_longer_than_the_context_loses_its_beginning(model, rng):
    prompt = rng.integers(0, 257, 70)
    (result,) = Generator(model).run([prompt], max_new_tokens=1, temperature=0)
    assert result.dropped == 70 - 48
    assert result.ids.tolist() == generate(model, prompt[-48:], 1, temperature=0).tolist()


def test_seeds(model):
    settings = {"max_new_tokens": 30, **DRAWN}
    one = generate(model, [1], seed=1, **settings)
    assert np.array_equal(one, generate(model, [1], seed=1, **settings))
    assert not np.array_equal(one, generate(model, [1], seed=2, **settings))


def test_stop_ids_and_stop_strings(model):
    free = generate(model, "ab", 40, temperature=0, stop_ids=())
    ids = generate(model, list(b"ab"), 40, temperature=0, stop_ids=())
    stop = next(text for text in (free[i : i + 2] for i in range(5, 30)) if "\ufffd" not in text)
    (result,) = Generator(model).run(["ab"], max_new_tokens=40, temperature=0, stop_ids=(), stop_strings=(stop,))
    assert result.text == free[: free.index(stop)]
    assert (result.finish_reason, result.stop) == ("stop", stop)
    assert result.ids.tolist() == ids[: len(result.ids)].tolist()
    (result,) = Generator(model).run(["ab"], max_new_tokens=40, temperature=0, stop_ids=(int(ids[7]),))
    assert result.ids.tolist() == ids[: ids.tolist().index(ids[7])].tolist()
    assert (result.finish_reason, result.stop) == ("stop", ids[7])


def test_the_end_token_of_a_tokenizer_stops(model):
    ids = generate(model, list(b"ab"), 30, **DRAWN)
    end = int(ids[9])

    class Ending(ByteText):
        eos_id = end

    made = generate(model, list(b"ab"), 30, tokenizer=Ending(), **DRAWN)
    assert made.tolist() == ids[: ids.tolist().index(end)].tolist()
    assert generate(model, list(b"ab"), 30, tokenizer=Ending(), stop_ids=(), **DRAWN).tolist() == ids.tolist()


def test_streaming_gives_the_same_in_pieces(model):
    settings = {"max_new_tokens": 40, "stop": ["zz", 256], "logprobs": 0, **DRAWN}
    prompts, seen = ["one", "two and", "t"], []
    generator = Generator(model)
    results = generator.run(prompts, callback=seen.append, **{**settings, "stop": None, "stop_strings": "zz"})
    for number, result in enumerate(results):
        mine = [token for token in seen if token.prompt == number]
        assert "".join(token.text for token in mine) == result.text
        assert [token.id for token in mine if token.id is not None] == result.ids.tolist()
        assert [token.logprob for token in mine if token.id is not None] == result.logprobs.tolist()
        assert [token.finish_reason for token in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1].finish_reason == result.finish_reason
    texts = generate(model, prompts, **{**settings, "stop": "zz"})
    assert texts == [result.text for result in results]
    streamed = "".join(token.text for token in generate_stream(model, prompts[0], **{**settings, "stop": "zz"}))
    assert streamed == texts[0]


def test_a_stream_that_is_left_early_tells_what_was_there(model):
    generator = Generator(model)
    stream = generator.stream([[1, 2]], max_new_tokens=30, **DRAWN)
    first = [next(stream).id for _ in range(4)]
    (result,) = generator.results()
    assert result.ids.tolist() == first
    assert result.finish_reason == "interrupted"


def test_nothing_asked_nothing_made(model):
    (result,) = Generator(model).run(["a"], max_new_tokens=0)
    assert (result.ids.size, result.text, result.finish_reason) == (0, "", "length")


def test_a_growing_conversation_reads_only_what_is_new(model, rng):
    ids = rng.integers(0, 257, 12)
    generator = Generator(model)
    settings = GenerationConfig(max_new_tokens=6, temperature=0, stop_ids=())
    (first,) = generator.run([ids], settings)
    longer = np.concatenate((ids, first.ids, [5, 6, 7]))
    (second,) = generator.run([longer], settings)
    assert generator.prefill_tokens == 4  # the last of the six was made, never read; and three new ones
    assert second.ids.tolist() == generate(model, longer, settings).tolist()
    other = np.concatenate((ids[:5], [9, 9]))  # goes another way
    (third,) = generator.run([other], settings)
    assert generator.prefill_tokens == 2
    assert third.ids.tolist() == generate(model, other, settings).tolist()
    (again,) = generator.run([other], settings)
    assert again.ids.tolist() == third.ids.tolist()


@compiled_only
@pytest.mark.parametrize("changes", OTHERS)
def test_what_was_read_before_changes_no_bit(rng, changes, threads):
    """Of log-probabilities too: a beginning that is kept, copied, or was written and not read."""
    model = make(**changes)
    settings = {"max_new_tokens": 7, "temperature": 0, "stop_ids": (), "logprobs": 2}
    begin = rng.integers(0, 257, 19)
    prompts = [begin, np.append(begin, 5), begin[:7], begin, np.concatenate((begin[:12], rng.integers(0, 257, 9)))]
    generator = Generator(model)
    results = generator.run(prompts, **settings)
    assert generator.prefill_tokens == 19 + 1 + 1 + 1 + 9
    prompts.append(np.concatenate((begin, results[0].ids, rng.integers(0, 257, 4))))
    results += generator.run(prompts[-1:], **settings)
    assert generator.prefill_tokens == 1 + 4
    for prompt, result in zip(prompts, results, strict=True):
        (alone,) = Generator(model).run([prompt], **settings)
        assert alone.ids.tolist() == result.ids.tolist()
        assert alone.logprobs.tobytes() == result.logprobs.tobytes()
        assert alone.top_logprobs == result.top_logprobs


def test_what_was_read_with_other_weights_is_forgotten(rng):
    model = make()
    ids, settings = rng.integers(0, 257, 20), {"max_new_tokens": 3, "temperature": 0, "stop_ids": ()}
    generator = Generator(model)
    generator.run([ids], **settings)
    generator.run([ids], **settings)
    assert generator.prefill_tokens == 1
    model.weights["layers.1.w_down"][3, 4] += 1
    (result,) = generator.run([ids], **settings)
    assert generator.prefill_tokens == 20
    assert result.ids.tolist() == generate(model, ids, **settings).tolist()


def test_what_was_read_with_weights_of_a_suspended_stream_is_forgotten(rng):
    """They are others in the middle of a stream, and the old ones again when the next one begins."""
    model = make()
    ids, settings = rng.integers(0, 257, 20), {"max_new_tokens": 8, "temperature": 0, "stop_ids": (), "logprobs": 0}
    generator, w = Generator(model), model.weights["layers.1.w_down"]
    stream, before = generator.stream([ids], **settings), w.copy()
    for _ in range(2):
        next(stream)
    w += 1
    list(stream)
    w[...] = before
    longer = np.concatenate((ids, generator.results()[0].ids))
    (result,) = generator.run([longer], **settings)
    assert generator.prefill_tokens == 28
    (alone,) = Generator(model).run([longer], **settings)
    assert result.logprobs.tolist() == alone.logprobs.tolist()


def test_streams_that_begin_later_than_they_are_made_have_their_own_prompts(model):
    settings = {"max_new_tokens": 5, "temperature": 0, "stop_ids": ()}
    generator = Generator(model)
    first, second = generator.stream([[1, 2, 3]], **settings), generator.stream([[7, 5]], **settings)
    assert [token.id for token in first] == generate(model, [1, 2, 3], **settings).tolist()
    assert [token.id for token in second] == generate(model, [7, 5], **settings).tolist()


def test_adapters_that_were_trained_are_seen(rng):
    lora = LoraModel(make(), LoraConfig(rank=2))
    ids, settings = rng.integers(0, 257, 20), {"max_new_tokens": 3, "temperature": 0, "stop_ids": ()}
    generator = Generator(lora)
    (before,) = generator.run([ids], **settings, logprobs=0)
    for w in lora.weights.values():
        w += 0.5
    (after,) = generator.run([ids], **settings, logprobs=0)
    assert generator.prefill_tokens == 20
    assert before.logprobs[0] != after.logprobs[0]
    assert after.ids.tolist() == generate(lora, ids, **settings).tolist()


def test_texts_take_the_slot_that_was_used_longest_ago(rng):
    """As many stay as there are slots, and a common beginning is copied rather than lost."""
    model, settings = make(), {"max_new_tokens": 1, "temperature": 0, "stop_ids": ()}
    a, b, c = (np.append([7, 8, 9], rng.integers(10, 257, 12)) for _ in range(3))
    generator, read = Generator(model), []

    def run(*prompts):
        generator.run(list(prompts), **settings)
        read.append(generator.prefill_tokens)

    run(a, b)  # 15, and 12: the first three are copied
    run(a)
    run(b)
    run(c)  # over a, of which only the beginning is used
    run(b)
    run(a)
    assert read == [15 + 12, 1, 1, 12, 1, 12]


def test_rows_whose_angles_follow_the_length_are_read_again(rng):
    scaling = {"rope_type": "dynamic", "factor": 2.0}
    model, settings = make(rope_scaling=scaling), {"max_new_tokens": 2, "temperature": 0, "stop_ids": ()}
    ids = rng.integers(0, 257, 40)
    generator, read = Generator(model), []
    for length in (16, 20, 30, 31, 20, 20):
        (result,) = generator.run([ids[:length]], **settings, logprobs=0)
        read.append(generator.prefill_tokens)
        (alone,) = Generator(model).run([ids[:length]], **settings, logprobs=0)
        assert result.logprobs.tobytes() == alone.logprobs.tobytes() or not JIT
    assert read == [16, 4, 30, 31, 20, 1]


def test_a_stream_that_goes_on_keeps_its_cache(model):
    """Another one that begins meanwhile gets its own."""
    settings = {"max_new_tokens": 12, "temperature": 0, "stop_ids": ()}
    generator = Generator(model)
    first, second = generator.stream([[1, 2, 3]], **settings), None
    made = [next(first).id for _ in range(4)]
    second = [token.id for token in generator.stream([[1, 2, 9, 4]], **settings)]
    made += [token.id for token in first]
    assert made == generate(model, [1, 2, 3], **settings).tolist()
    assert second == generate(model, [1, 2, 9, 4], **settings).tolist()


def test_fewer_go_together_where_their_cache_would_be_large(model, monkeypatch):
    prompts, settings = [[i, 2] for i in range(5)], {"max_new_tokens": 6, "temperature": 0}
    expected = [ids.tolist() for ids in generate(model, prompts, **settings)]
    monkeypatch.setattr(generator_module, "BYTES_OF_CACHE", 2 * 8 * 2 * SHAPE["num_layers"] * 2 * 4 * 4)
    gen = Generator(model)
    assert [result.ids.tolist() for result in gen.run(prompts, **settings)] == expected
    assert gen._kept[0].decoder.cache.slots == 2


@pytest.fixture
def small_cache(monkeypatch):
    """Let caches take 64 positions of `make`'s models, and begin with 4; return the bytes of a position."""
    position = 2 * 4 * SHAPE["num_layers"] * SHAPE["num_kv_heads"] * SHAPE["hidden_dim"] // SHAPE["num_heads"]
    monkeypatch.setattr(generator_module, "BYTES_OF_CACHE", 64 * position)
    monkeypatch.setattr(decoder_module, "FIRST_CAPACITY", 4)
    return position


def test_the_bound_of_the_cache_holds_for_several_calls(small_cache, rng):
    """Slots of short texts go where a long one comes, and a long one where many short ones come."""
    model, generator = make(max_seq_len=100), Generator(make(max_seq_len=100))
    calls = (8, 4, 4), (1, 40, 8), (8, 4, 4), (2, 10, 20), (1, 61, 30), (9, 2, 5)
    for count, length, new in calls:
        prompts = [rng.integers(0, 257, length) for _ in range(count)]
        settings = {"max_new_tokens": new, "temperature": 0, "stop_ids": ()}
        results = generator.run(prompts, **settings)
        cache = generator._kept[0].decoder.cache
        assert cache.slots == count
        assert cache.nbytes == cache.slots * cache.capacity * small_cache
        assert cache.slots * cache.capacity <= max(64, length + new)
        for prompt, result in zip(prompts, results):
            assert result.ids.tolist() == generate(model, prompt, **settings).tolist()


def test_slots_that_are_in_the_way_of_a_longer_text_go(small_cache, rng):
    """Not those that the texts of the call begin like, and of the others those that were used longest ago."""
    model, settings = make(max_seq_len=100), {"max_new_tokens": 1, "temperature": 0, "stop_ids": ()}
    a, b, c, d = (rng.integers(0, 257, 9) for _ in range(4))
    generator, read = Generator(model), []

    def run(*prompts):
        results = generator.run([np.asarray(ids) for ids in prompts], **settings, logprobs=0)
        read.append((generator.prefill_tokens, generator._kept[0].decoder.cache.slots))
        for ids, result in zip(prompts, results):
            (alone,) = Generator(model).run([ids], **settings, logprobs=0)
            assert not JIT or alone.logprobs.tobytes() == result.logprobs.tobytes()

    run(a, b, c, d)
    run(np.append(a, range(8)), b[:5])  # of four two: a, and b, of which five stay
    run(np.append(a, range(8)), b)
    run(np.append(b, range(20)))
    run(np.append(b, range(20)))
    assert read == [(36, 4), (9, 2), (1 + 4, 2), (20, 1), (1, 1)]


def test_a_longer_cache_copies_what_each_slot_holds(monkeypatch):
    monkeypatch.setattr(decoder_module, "aligned_empty", lambda shape: np.full(shape, np.nan, np.float32))
    cache = decoder_module.Cache(make().stack.branches, 3, 40)
    cache.move([0, 1, 2], 3, 8)
    cache.lengths[...] = 2, 0, 8
    for pair in cache.kept.values():
        for array in pair:
            array[...] = np.arange(3)[:, None, None, None]
    cache.move([0, 1, 2], 3, 16)
    assert cache.lengths.tolist() == [2, 0, 8]
    for pair in cache.kept.values():
        for array in pair:
            assert np.isfinite(array).sum((1, 2, 3)).tolist() == [2 * 8, 0, 8 * 8]
    cache.move([1, 2], 4, 16)
    assert cache.lengths.tolist() == [0, 8, 0, 0]
    assert all((pair[0][1, :, :8] == 2).all() for pair in cache.kept.values())
    cache.move([1], 1, 6)
    assert cache.lengths.tolist() == [0]


def test_bans_and_ends_while_a_text_grows(model):
    settings = {"max_new_tokens": 12, "stop_ids": (), "seed": 3, "temperature": 40.0, "top_k": 0, "top_p": 1.0}
    free = generate(model, [97], **settings).tolist()
    assert len(set(free)) > 8  # so that every ban below meets something
    first, second, later = free[0], free[1], free[5]
    assert generate(model, [97], **settings, begin_suppress_tokens=(first,)).tolist()[0] != first
    assert generate(model, [97], **settings, begin_suppress_tokens=(second,)).tolist() == free
    assert later not in generate(model, [97], **settings, suppress_tokens=(later,)).tolist()
    assert generate(model, [97], **settings, bad_words_ids=[[first, second]]).tolist()[:2] != free[:2]
    assert generate(model, [97], **settings, bad_words_ids=[[second, first, 3]]).tolist()[:2] == free[:2]
    settings["stop_ids"] = (second,)
    assert generate(model, [97], **settings).tolist() == free[:1]
    assert len(generate(model, [97], **settings, min_new_tokens=5)) >= 5
    assert len(generate(model, [97], **settings, min_length=6)) >= 5
    (forced,) = Generator(model).run([[97]], **{**settings, "stop_ids": (7,)}, forced_eos_token_id=(7,))
    assert (len(forced.ids), forced.finish_reason, forced.stop) == (11, "stop", 7)
    for name in ("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"):
        with pytest.raises(ConfigError, match=rf"{name} holds 257, but the model's ids are 0 \.\.\. 256"):
            generate(model, [97], **{name: (3, 257)})


def test_every_token_banned_is_said(model):
    tiny = make(vocab_size=3)
    with pytest.raises(DataError, match="no_repeat_ngram_size"):
        generate(tiny, [0, 1, 2], 3, no_repeat_ngram_size=1)


@pytest.mark.parametrize("settings", [{"temperature": 0}, DRAWN], ids=["greedy", "drawn"])
def test_a_model_of_nan_is_an_error(settings):
    broken = make()
    broken.weights["final_norm"][3] = np.nan
    with pytest.raises(NonFiniteError):
        generate(broken, [1], 3, **settings)


def test_wrong_calls(model):
    with pytest.raises(DataError, match="prompt 1"):
        generate(model, [[1], []], 3)
    with pytest.raises(DataError, match=r"257 at place 1"):
        generate(model, [3, 257], 3)
    with pytest.raises(TypeError, match="integers"):
        generate(model, [0.5], 3)
    with pytest.raises(ConfigError, match="top_q"):
        generate(model, [1], 3, top_q=1)
    with pytest.raises(ConfigError, match="config"):
        generate(model, [1], "3")
    other = make(vocab_size=40)
    with pytest.raises(DataError, match="tokenizer"):
        generate(other, "text", 3)
    with pytest.raises(DataError, match="stop_strings"):
        generate(other, [1], 3, stop_strings="x")
    with pytest.raises(DataError, match="257 ids"):
        generate(other, "text", 3, tokenizer=ByteText())


def test_held_back_beginnings_of_stop_strings():
    text = StopText(ByteText(), ["END", "ENOUGH"])
    given = [text.add(byte) for byte in b"EEN"]
    assert given == [("", None), ("E", None), ("", None)]
    assert [text.add(byte)[0] for byte in b"OE"] == ["", "ENO"]
    assert [text.add(byte) for byte in b"ND"] == [("", None), ("", "END")]
    text = StopText(ByteText(), ["END"])
    assert [text.add(byte)[0] for byte in b"abEN"] == ["a", "b", "", ""]
    assert text.finish() == ("EN", None)


def test_characters_come_whole():
    text = StopText(ByteText(), [])
    pieces = [text.add(byte)[0] for byte in "ä€".encode()]
    assert pieces == ["", "ä", "", "", "€"]
    text.add(0xE2)
    assert text.finish() == ("\ufffd", None)
