"""Text in, text out: prompts checked, answers streamed, a history that is not sent twice."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import save_talking
from inprocess import Swarm, running_swarm
from runs import save_run
from transformers import set_seed

from swarm import SwarmModelForCausalLM
from swarm.console.conversation import Conversation, load_tokenizer
from swarm.console.talk import talking_to
from swarm.errors import NoRoom, UsageError
from swarm.files.hub import DEFAULT_MODEL
from swarm.speculation.tuning import Counts

GREEDY: dict[str, Any] = {"max_new_tokens": 10, "do_sample": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("talking")


@pytest.fixture(scope="module")
def whole(folder: Path) -> Any:
    return save_talking(folder)


@pytest.fixture(scope="module")
def swarm(folder: Path, whole: Any) -> Iterator[Swarm]:
    with running_swarm() as swarm:
        for blocks in ("0:3", "3:6"):
            swarm.serve(folder, blocks, cache_tokens=2048)
        yield swarm


@pytest.fixture(scope="module")
def model(folder: Path, swarm: Swarm) -> Iterator[Any]:
    with SwarmModelForCausalLM.from_pretrained(folder, initial_peers=[swarm.address]) as model:
        yield model


@pytest.fixture
def conversation(folder: Path, model: Any) -> Iterator[Conversation]:
    conversation = Conversation(model, load_tokenizer(str(folder)))
    yield conversation
    conversation.forget()


def alone(whole: Any, prompt: list[int]) -> list[int]:
    ids = torch.tensor([prompt])
    tokens: list[int] = whole.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)[0].tolist()
    return tokens[len(prompt) :]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"model_name": "gpt2"}, "--run names the model; gpt2 is another"),
        ({"mix": True}, "--mix is not for a run"),
        ({"speculate": "draft:gpt2"}, "there are auto, lookup and off for a run"),
        ({"wire_dtype": "int7"}, "there are auto, float32, bfloat16, int8"),
        ({"priority": "high"}, "there are low, normal"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_for_the_model_of_a_run_is_refused(said: dict[str, Any], told: str, tmp_path: Path) -> None:
    usual = {"model_name": DEFAULT_MODEL, "initial_peers": [], "wait": 0.0, "standby": 0, "speculate": "auto"}
    with (
        pytest.raises(UsageError, match=told),
        talking_to(**{**usual, **said}, of_run=save_run(tmp_path)),
    ):
        raise AssertionError("it was opened")


def test_a_prompt_goes_through_the_template_unless_raw(conversation: Conversation) -> None:
    decode = conversation.tokenizer.decode
    assert decode(conversation.encode("hi")) == "u:hi\na:"
    assert decode(conversation.encode("hi", raw=True)) == "hi"
    turns = [{"role": "system", "content": "be nice"}, {"role": "user", "content": "hi"}]
    assert decode(conversation.encode(turns)) == "s:be nice\nu:hi\na:"


@pytest.mark.parametrize("prompt", ["", " \n\t"])
def test_an_empty_prompt_is_refused(conversation: Conversation, prompt: str) -> None:
    with pytest.raises(UsageError, match="empty"):
        conversation.encode(prompt)


def test_a_prompt_must_leave_room_for_an_answer(conversation: Conversation) -> None:
    assert len(conversation.encode("x" * 255, raw=True)) == 255
    with pytest.raises(UsageError, match="256 tokens; the model's context is 256"):
        conversation.encode("x" * 256, raw=True)


def test_an_answer_ends_where_the_context_does(conversation: Conversation) -> None:
    answer = conversation.answer(conversation.encode("x" * 250, raw=True), max_new_tokens=50, do_sample=False)
    assert answer.prompt_tokens + len(answer.tokens) <= 256


def test_the_answer_is_the_whole_models_and_is_streamed(conversation: Conversation, whole: Any) -> None:
    prompt, pieces = conversation.encode("Who are you?"), list[str]()
    answer = conversation.answer(prompt, pieces.append, **GREEDY)
    assert answer.tokens == alone(whole, prompt)
    assert "".join(pieces) == answer.text
    assert answer.history == prompt + answer.tokens
    assert 0 < answer.first_seconds <= answer.seconds
    assert answer.route.count("->") == 1


def test_turns_share_a_session_and_read_only_what_is_new(conversation: Conversation, whole: Any, swarm: Swarm) -> None:
    messages = [{"role": "user", "content": "Once upon a time there was a very long story."}]
    first = conversation.answer(conversation.encode(messages), **GREEDY)
    assert conversation._cache is not None
    session = conversation._cache.session
    before = [node.server.tokens for node in swarm.nodes if node.server]
    # What was said is given back as text: it has the same tokens, or the session is rolled back to where they differ.
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "Go on."}]
    prompt = conversation.encode(messages)
    second = conversation.answer(prompt, **GREEDY)
    assert second.tokens == alone(whole, prompt)
    assert conversation._cache.session is session is not None
    read = [node.server.tokens - count for node, count in zip(swarm.nodes, before, strict=True) if node.server]
    assert max(read) < len(prompt)


@pytest.fixture
def drafting(folder: Path, swarm: Swarm) -> Iterator[Conversation]:
    options: dict[str, Any] = {"initial_peers": [swarm.address], "speculate": "lookup"}
    with SwarmModelForCausalLM.from_pretrained(folder, **options) as model:
        yield Conversation(model, load_tokenizer(str(folder)))


def test_a_talk_with_drafts_is_the_same_talk(drafting: Conversation, conversation: Conversation) -> None:
    """Turn by turn, stopped in the middle of one, sampled with a seed; and what the drafts brought is told."""
    greedy, sampled = {"max_new_tokens": 40, "do_sample": False}, {"max_new_tokens": 30, "do_sample": True}

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    for options in (greedy, sampled, greedy):
        messages = [{"role": "user", "content": "abc abc abc"}]
        for turn in ("and abc?", "no"):
            answers = []
            for each in (conversation, drafting):
                set_seed(3)
                answers.append(each.answer(each.encode(messages), **options))
            plain, drafted = answers
            assert drafted.tokens == plain.tokens
            assert plain.counts == Counts()
            assert drafted.counts.drafted >= drafted.counts.accepted >= len(plain.tokens) - drafted.counts.trips - 1
            messages += [{"role": "assistant", "content": plain.text}, {"role": "user", "content": turn}]
        with pytest.raises(KeyboardInterrupt):
            drafting.answer(drafting.encode(messages), stop, **greedy)


def test_another_talk_begins_a_new_session(conversation: Conversation, whole: Any) -> None:
    for text in ("abc", "xyz"):  # not even the first token in common
        prompt = conversation.encode(text, raw=True)
        assert conversation.answer(prompt, **GREEDY).tokens == alone(whole, prompt)


def test_beams_are_told_at_the_end(conversation: Conversation) -> None:
    pieces: list[str] = []
    answer = conversation.answer(conversation.encode("hi"), pieces.append, num_beams=2, **GREEDY)
    assert pieces == [answer.text]


def test_an_answer_that_is_stopped_leaves_no_session(conversation: Conversation, whole: Any) -> None:
    """As by Ctrl-C, wherever it strikes; and the next answer is right."""

    def stop(_: str) -> None:
        raise KeyboardInterrupt

    prompt = conversation.encode("Who are you?")
    with pytest.raises(KeyboardInterrupt):
        conversation.answer(prompt, stop, max_new_tokens=100, do_sample=False)
    assert conversation._cache is None
    assert conversation.answer(prompt, **GREEDY).tokens == alone(whole, prompt)


def test_no_room_is_told_and_the_next_may_fit(conversation: Conversation, whole: Any, swarm: Swarm) -> None:
    prompt = conversation.encode("hi")
    with pytest.MonkeyPatch.context() as patched:
        for node in swarm.nodes:
            patched.setattr(node.leases, "capacity", len(prompt))
        with pytest.raises(NoRoom, match=f"of {len(prompt)} are free"):
            conversation.answer(prompt, **GREEDY)
    assert conversation.answer(prompt, **GREEDY).tokens == alone(whole, prompt)


def test_a_tokenizer_without_a_template_reads_the_text_as_it_is(conversation: Conversation) -> None:
    template, conversation.tokenizer.chat_template = conversation.tokenizer.chat_template, None
    assert conversation.tokenizer.decode(conversation.encode("hi")) == "hi"
    conversation.tokenizer.chat_template = template
