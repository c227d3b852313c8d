"""The swarm's model is the whole model: same tokens, same logits, whatever way it is asked."""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import save_talking
from inprocess import Swarm, running_swarm, save_llama
from transformers import DynamicCache, TextIteratorStreamer, pipeline, set_seed

from swarm import SwarmCache, SwarmModelForCausalLM
from swarm.console.conversation import load_tokenizer
from swarm.errors import CannotJoin, ModelNotFound, NoRoom, NoRoute, UsageError

PROMPT = torch.tensor([[5, 17, 23, 42, 99, 7, 64]])
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    return save_llama(folder)


@pytest.fixture(scope="module")
def swarm(folder: Path, whole: Any) -> Iterator[Swarm]:
    with running_swarm() as swarm:
        for blocks in ("0:2", "1:4", "4:6"):  # the second overlaps the first: a part of its span is used
            swarm.serve(folder, blocks, cache_tokens=4096)
        yield swarm


@pytest.fixture(scope="module")
def model(swarm: Swarm, folder: Path) -> Iterator[Any]:
    with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[swarm.address], wait=10) as model:
        yield model


def both(whole: Any, model: Any, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What the whole model generates, and what the swarm's does, from the same seed."""
    options.setdefault("attention_mask", torch.ones_like(ids))
    results = []
    for each in (whole, model):
        set_seed(7)
        results.append(each.generate(ids, **options))
    return results[0], results[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"do_sample": True, "temperature": 1.3, "top_k": 20, "top_p": 0.9},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 3, "early_stopping": True, "length_penalty": 0.5},
        {"num_beams": 2, "do_sample": True},
        {"no_repeat_ngram_size": 2},
        {"repetition_penalty": 1.4},
        {"prompt_lookup_num_tokens": 3},
        {"num_return_sequences": 3, "do_sample": True},
    ],
    ids=lambda options: "-".join(options) or "greedy",
)
def test_generate_gives_the_whole_models_tokens(whole: Any, model: Any, options: dict[str, Any]) -> None:
    expected, found = both(whole, model, PROMPT, **{**GREEDY, **options})
    assert found.tolist() == expected.tolist()


def test_generate_with_an_assistant(whole: Any, model: Any, tmp_path: Path) -> None:
    """The assistant drafts wrong tokens often (it is another random model) and right ones (it shares weights)."""
    for assistant in (save_llama(tmp_path, seed=1, num_hidden_layers=1), whole):
        expected, found = both(whole, model, PROMPT, assistant_model=assistant, **GREEDY)
        assert found.tolist() == expected.tolist()


def test_drafts_of_a_small_model_and_whose_tokens_they_are(tmp_path: Path, swarm: Swarm, folder: Path) -> None:
    """Which model drafts is told from its tokenizer, before anything of the swarm is waited for."""
    with pytest.raises(ModelNotFound):
        swarm_model(folder, swarm, speculate=f"draft:{tmp_path / 'nothing'}")
    save_llama(tmp_path)
    with pytest.raises(UsageError, match="has no tokenizer"):
        swarm_model(folder, swarm, speculate=f"draft:{tmp_path}")
    with pytest.raises(UsageError, match="draft:NAME"):
        swarm_model(folder, swarm, speculate="sometimes")


def test_a_left_padded_batch_of_different_lengths(whole: Any, model: Any) -> None:
    ids = torch.tensor([[0, 0, 0, 5, 17, 23], [9, 8, 7, 6, 5, 4], [0, 3, 1, 4, 1, 5]])
    expected, found = both(whole, model, ids, attention_mask=(ids != 0).long(), **GREEDY)
    assert found.tolist() == expected.tolist()


def test_beams_over_a_left_padded_batch(whole: Any, model: Any) -> None:
    ids = torch.tensor([[0, 0, 5, 17], [9, 8, 7, 6]])
    options = {**GREEDY, "num_beams": 3}
    expected, found = both(whole, model, ids, attention_mask=(ids != 0).long(), **options)
    assert found.tolist() == expected.tolist()


def test_streamer_hears_every_token(model: Any) -> None:
    class Collector:
        def __init__(self) -> None:
            self.tokens: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.tokens += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    collector = Collector()
    output = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), streamer=collector, **GREEDY)
    assert collector.tokens == output[0].tolist()
    assert collector.ended


def test_repeated_calls_on_one_cache(whole: Any, model: Any) -> None:
    """Generate, add a turn, generate on: only what is new is sent."""
    texts = []
    for each, cache in ((whole, DynamicCache(config=whole.config)), (model, SwarmCache())):
        ids = PROMPT
        for turn in ([11, 12, 13], [14]):
            ids = each.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **GREEDY)
            ids = torch.cat([ids, torch.tensor([turn])], dim=1)
        texts.append(ids.tolist())
        if isinstance(cache, SwarmCache):
            assert cache.length == ids.shape[1] - 2  # neither the last token nor the turn after it was run
            cache.close()
    assert texts[0] == texts[1]


def test_a_cache_that_holds_another_text_goes_back_to_where_they_part(whole: Any, model: Any) -> None:
    """As in a chat whose answers were decoded and encoded again; for beams and several rows, too."""
    cache = SwarmCache()
    for ids in ([5, 17, 23, 42, 99, 7, 64], [5, 17, 23, 8, 9, 10, 11, 12], [5, 17, 23, 8], [60, 61], [5, 17]):
        expected, found = both(whole, model, torch.tensor([ids]), past_key_values=None, **GREEDY)
        again = model.generate(torch.tensor([ids]), past_key_values=cache, **GREEDY)
        assert again.tolist() == found.tolist() == expected.tolist()
    rows = SwarmCache()
    for texts in ([[5, 17, 23, 42], [9, 8, 7, 6]], [[5, 17, 23, 40, 3], [9, 8, 7, 6, 2]]):
        ids = torch.tensor(texts)
        expected = whole.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        found = model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=rows, **GREEDY)
        assert found.tolist() == expected.tolist()
    for each in (cache, rows):
        each.close()


def test_a_session_cannot_be_copied(model: Any) -> None:
    with pytest.raises(UsageError, match="cannot be copied"):
        copy.deepcopy(model(PROMPT).past_key_values)


def test_a_pipeline_is_none_the_wiser(tmp_path: Path, swarm: Swarm) -> None:
    """Text and chats, alone and in batches."""
    whole = save_talking(tmp_path)
    node = swarm.serve(tmp_path, "0:6")
    tokenizer = load_tokenizer(str(tmp_path))
    tokenizer.padding_side = "left"
    told = []
    with swarm_model(tmp_path, swarm, wait=10) as model:
        for each in (whole, model):
            ask = pipeline("text-generation", model=each, tokenizer=tokenizer, batch_size=2)
            options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
            told.append([ask(["hi", "hello"], **options), ask([{"role": "user", "content": "hi"}], **options)])
    assert told[0] == told[1]
    swarm.stop(node)


def test_who_reads_a_stream_is_told_that_nothing_comes(tmp_path: Path, swarm: Swarm) -> None:
    save_talking(tmp_path, seed=9)
    streamer = TextIteratorStreamer(load_tokenizer(str(tmp_path)), skip_prompt=True)
    failures: list[BaseException] = []

    def ask(model: Any) -> None:
        try:
            model.generate(PROMPT, streamer=streamer, **GREEDY)
        except NoRoute as error:
            failures.append(error)

    with swarm_model(tmp_path, swarm) as model:
        asking = threading.Thread(target=ask, args=(model,))
        asking.start()
        assert "".join(streamer) == ""
        asking.join()
    assert len(failures) == 1


def test_addresses_and_dtypes_may_be_strings(whole: Any, swarm: Swarm, folder: Path) -> None:
    with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=f"{swarm.address}, ", dtype="float32") as model:
        assert torch.allclose(model(PROMPT).logits, whole(PROMPT).logits, atol=1e-5)
    for name in ("auto", "int8", "Tensor"):
        with pytest.raises(UsageError, match="dtype"):
            SwarmModelForCausalLM.from_pretrained(folder, initial_peers=swarm.address, dtype=name)


def test_logits_equal(whole: Any, model: Any) -> None:
    ids = torch.tensor([[5, 17, 23, 42], [1, 2, 3, 4]])
    with torch.no_grad():
        expected = whole(ids)
    found = model(ids)
    assert torch.allclose(found.logits, expected.logits, atol=1e-5)
    last = model(input_ids=ids, use_cache=False, logits_to_keep=1)
    assert torch.allclose(last.logits, expected.logits[:, -1:], atol=1e-5)
    onward = model(torch.tensor([[9], [8]]), past_key_values=found.past_key_values)
    with torch.no_grad():
        beyond = whole(torch.cat([ids, torch.tensor([[9], [8]])], dim=1))
    assert torch.allclose(onward.logits[:, -1], beyond.logits[:, -1], atol=1e-5)


def test_logits_of_a_right_padded_batch(whole: Any, model: Any) -> None:
    ids = torch.tensor([[5, 17, 23, 42], [1, 3, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    with torch.no_grad():
        expected = whole(ids, attention_mask=mask).logits
    found = model(ids, attention_mask=mask).logits
    assert torch.allclose(found[mask.bool()], expected[mask.bool()], atol=1e-5)


def test_rollback_by_cropping(whole: Any, model: Any) -> None:
    cache = SwarmCache()
    model(PROMPT, past_key_values=cache)
    cache.crop(-3)
    found = model(torch.tensor([[3, 3]]), past_key_values=cache).logits[:, -1]
    with torch.no_grad():
        expected = whole(torch.cat([PROMPT[:, :-3], torch.tensor([[3, 3]])], dim=1)).logits[:, -1]
    assert torch.allclose(found, expected, atol=1e-5)


def test_from_inside_a_running_loop(whole: Any, model: Any) -> None:
    async def notebook() -> list[list[int]]:
        result: list[list[int]] = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **GREEDY).tolist()
        return result

    assert asyncio.run(notebook()) == whole.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **GREEDY).tolist()


def test_from_several_threads(whole: Any, model: Any) -> None:
    prompts = [torch.tensor([[start, start + 1, start + 2]]) for start in range(3, 9)]
    expected = [whole.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY).tolist() for ids in prompts]
    found: dict[int, Any] = {}

    def work(index: int) -> None:
        ids = prompts[index]
        found[index] = model.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY).tolist()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[index] for index in range(len(prompts))] == expected


def test_a_session_grows_beyond_its_first_lease(whole: Any, model: Any) -> None:
    cache = SwarmCache(max_length=4)
    found = model(PROMPT, past_key_values=cache)
    for token in range(40):
        found = model(torch.tensor([[token]]), past_key_values=cache)
    ids = torch.cat([PROMPT, torch.arange(40).unsqueeze(0)], dim=1)
    with torch.no_grad():
        assert torch.allclose(found.logits[:, -1], whole(ids).logits[:, -1], atol=1e-5)


def test_leases_are_given_back(swarm: Swarm, model: Any) -> None:
    cache = SwarmCache(max_length=100)
    model(PROMPT, past_key_values=cache)
    assert any(node.leases.used for node in swarm.nodes)
    cache.close()
    for node in swarm.nodes:
        swarm.background.run(until(lambda node=node: node.leases.used == 0))


async def until(true: Any) -> None:
    """Wait for what no event tells of."""
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_no_room_is_said_at_once(model: Any) -> None:
    with pytest.raises(NoRoom, match="4096"):
        model(PROMPT, past_key_values=SwarmCache(max_length=250_000))


def test_who_waits_gets_the_room_that_another_gives_back(model: Any) -> None:
    held = SwarmCache(max_length=4000)
    model(PROMPT, past_key_values=held)
    waiting = SwarmCache(max_length=3000)
    thread = threading.Thread(target=lambda: model(PROMPT, past_key_values=waiting))
    thread.start()
    while waiting.session is None:
        thread.join(0.01)
    held.close()
    thread.join(20)
    assert waiting.length == PROMPT.shape[1]
    waiting.close()


def test_what_is_no_input_is_refused(model: Any) -> None:
    with pytest.raises(UsageError, match="empty"):
        model(torch.empty(1, 0, dtype=torch.long))
    with pytest.raises(UsageError, match="context"):
        model(torch.zeros(1, 257, dtype=torch.long))
    with pytest.raises(UsageError, match="past_key_values"):
        model(PROMPT, past_key_values=DynamicCache())


def test_no_route_names_the_blocks(tmp_path: Path, swarm: Swarm) -> None:
    save_llama(tmp_path, seed=3)
    with swarm_model(tmp_path, swarm) as model:
        with pytest.raises(NoRoute, match="blocks 0:6") as caught:
            model(PROMPT)
        assert caught.value.missing == ((0, 6),)


def swarm_model(folder: Path, swarm: Swarm, **options: Any) -> Any:
    return SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[swarm.address], **options)


def test_it_waits_for_blocks_that_are_missing(tmp_path: Path, swarm: Swarm) -> None:
    """Another model in the same swarm: nobody hosts it, then somebody does."""
    whole = save_llama(tmp_path, seed=4)
    told: list[Any] = []
    with swarm_model(tmp_path, swarm, wait=30, on_missing=told.append) as model:
        found: list[Any] = []
        asking = threading.Thread(target=lambda: found.append(model(PROMPT).logits))
        asking.start()
        node = swarm.serve(tmp_path, "0:6")
        asking.join()
        swarm.stop(node)
    assert [(span.start, span.end) for span in told[0]] == [(0, 6)]
    with torch.no_grad():
        assert torch.allclose(found[0], whole(PROMPT).logits, atol=1e-5)


def test_a_swarm_that_does_not_answer(folder: Path) -> None:
    peer = "12D3KooWBzPTxnLRtQrUsYkzxnBQBGkjjRnCNZB2UYbBbGnqjnF5"
    with pytest.raises((CannotJoin, UsageError), match=r"127\.0\.0\.1"):
        SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[f"/ip4/127.0.0.1/tcp/9/p2p/{peer}"])
