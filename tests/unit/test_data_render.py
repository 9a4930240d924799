"""Exact loss masks, token by token."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from test_data_tiny import CHATML, SMOLLM2, assistant, pieces, tiny, user

from finegraft.core.errors import DataError
from finegraft.data import spans
from finegraft.data.conversation import TEXT_ROLE
from finegraft.data.render import (
    render,
    render_batch,
    render_prompt,
    render_prompt_text,
    stop_token_ids,
)

PAIR = [user("hello"), assistant("world")]
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# No special token at all: answers end in nothing, and a newline could merge with the answer.
PLAIN = (
    "{% for m in messages %}{{ '### ' + m['role'] + '\n' + m['content'] }}"
    "{% if not loop.last %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n### assistant\n' }}{% endif %}"
)
# Keeps what stands in <think> only in the last turn, as reasoning models' templates do.
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('now')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Prompts with an opened thought and renders answers without it, as DeepSeek's distills do.
OPENS_THOUGHT = CHATML.replace(
    "<|im_start|>assistant\n{% endif %}", "<|im_start|>assistant\n### {% endif %}"
)


def split_mask(tokenizer: Any, rendered: Any) -> list[tuple[str, bool]]:
    """Tokens as text with their mask."""
    assert len(rendered.input_ids) == len(rendered.trained)
    words = pieces(tokenizer, rendered.input_ids)
    return list(zip(words, rendered.trained, strict=True))


def test_chatml_single_turn_token_by_token() -> None:
    tokenizer = tiny()
    assert split_mask(tokenizer, render(PAIR, tokenizer)) == [
        ("<|im_start|>", False),
        ("user", False),
        ("\n", False),
        ("hello", False),
        ("<|im_end|>", False),
        ("\n", False),
        ("<|im_start|>", False),
        ("assistant", False),
        ("\n", False),
        ("world", True),
        ("<|im_end|>", True),
        ("\n", False),
    ]


def test_smollm2_default_system_is_read_and_not_learnt() -> None:
    tokenizer = tiny(SMOLLM2)
    rendered = render(PAIR, tokenizer)
    words = split_mask(tokenizer, rendered)
    assert [w for w, _ in words[:3]] == ["<|im_start|>", "system", "\n"]
    assert [w for w, learnt in words if learnt] == ["world", "<|im_end|>"]
    assert words[-1] == ("\n", False)
    own = render([{"role": "system", "content": "hello"}, *PAIR], tokenizer)
    assert "SmolLM" not in tokenizer.decode(own.input_ids)
    assert sum(own.trained) == 2


def test_multi_turn_learns_every_answer_with_its_end() -> None:
    tokenizer = tiny(SMOLLM2)
    messages = [*PAIR, user("bye"), assistant("bye now")]
    words = split_mask(tokenizer, render(messages, tokenizer))
    learnt = [w for w, flag in words if flag]
    assert learnt == ["world", "<|im_end|>", "bye", " now", "<|im_end|>"]
    at = [i for i, (_, flag) in enumerate(words) if flag]
    assert words[at[1] + 1] == ("\n", False)
    assert at[0] + 1 == at[1] and at[2] + 2 == at[4]


@pytest.mark.parametrize("template", [CHATML, SMOLLM2, PHI3])
def test_ids_are_the_templates_and_begin_with_the_prompt(template: str) -> None:
    tokenizer = tiny(template)
    messages = [*PAIR, user("bye"), assistant("now")]
    rendered = render(messages, tokenizer)
    assert rendered.input_ids == tokenizer.apply_chat_template(messages)["input_ids"]
    prompt = render_prompt(messages[:-1], tokenizer)
    assert rendered.input_ids[: len(prompt)] == prompt
    assert rendered.trained[len(prompt)] and not rendered.trained[len(prompt) - 1]


def test_phi3_ends_turns_with_its_own_token() -> None:
    tokenizer = tiny(PHI3, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    end, eos = tokenizer.convert_tokens_to_ids(["<|end|>", "<|endoftext|>"])
    assert stop_token_ids(tokenizer) == sorted([end, eos])
    words = split_mask(tokenizer, render([*PAIR, user("bye"), assistant("now")], tokenizer))
    learnt = [w for w, flag in words if flag]
    assert learnt == ["world", "<|end|>", "now", "<|end|>", "\n", "<|endoftext|>"]


def test_weight_zero_is_read_and_not_learnt() -> None:
    tokenizer = tiny()
    messages = [user("hello"), assistant("world", weight=0), user("bye"), assistant("now")]
    words = split_mask(tokenizer, render(messages, tokenizer))
    assert [w for w, flag in words if flag] == ["now", "<|im_end|>"]
    assert "world" in [w for w, _ in words]


def test_weight_never_reaches_the_template() -> None:
    tokenizer = tiny(CHATML.replace("m['content']", "m['weight'] | default('') ~ m['content']"))
    text = tokenizer.decode(render([*PAIR, assistant("now", weight=1)], tokenizer).input_ids)
    assert "1" not in text and "now" in text


def test_completion_only_false_learns_every_token() -> None:
    rendered = render(PAIR, tiny(), completion_only=False)
    assert len(rendered.trained) == 12 and all(rendered.trained)


def test_without_an_answer_everything_or_nothing() -> None:
    tokenizer = tiny()
    assert all(render([user("hello")], tokenizer).trained)
    assert not any(render([user("hello")], tokenizer, completion_only=True).trained)


def test_missing_eos_is_appended_and_learnt() -> None:
    tokenizer = tiny(PLAIN)
    words = split_mask(tokenizer, render(PAIR, tokenizer))
    assert words[-2:] == [("world", True), ("<|im_end|>", True)]
    assert sum(flag for _, flag in words) == 2


def test_a_conversation_that_ends_with_a_question_gets_no_eos() -> None:
    tokenizer = tiny(PLAIN)
    rendered = render([*PAIR, user("bye")], tokenizer)
    assert tokenizer.eos_token_id not in rendered.input_ids


def test_merge_over_the_border_is_tokenised_apart() -> None:
    tokenizer = tiny(PLAIN)
    messages = [user("hello"), assistant("\n\nworld")]
    whole = tokenizer.apply_chat_template(messages)["input_ids"]
    prompt = render_prompt(messages[:1], tokenizer)
    assert whole[: len(prompt)] != prompt, "the fixture must merge newlines over the border"
    rendered = render(messages, tokenizer)
    assert rendered.input_ids[: len(prompt)] == prompt
    assert rendered.trained == [False] * len(prompt) + [True] * (
        len(rendered.input_ids) - len(prompt)
    )
    assert tokenizer.decode(rendered.input_ids[len(prompt) :]) == "\n\nworld<|im_end|>"


def test_merge_in_a_second_turn_keeps_both_masks() -> None:
    tokenizer = tiny(PLAIN)
    messages = [*PAIR, user("bye"), assistant("\n\nnow")]
    rendered = render(messages, tokenizer)
    learnt = [i for i, flag in zip(rendered.input_ids, rendered.trained, strict=True) if flag]
    assert tokenizer.decode(learnt) == "world\n\nnow<|im_end|>"


def test_unstable_template_learns_the_last_answer_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    spans.say_once.cache_clear()
    tokenizer = tiny(THINKING)
    messages = [user("hello"), assistant("bye now world"), user("bye"), assistant("hello now")]
    with caplog.at_level(logging.WARNING, "finegraft"):
        _, _, rendered = (render(messages, tokenizer) for _ in range(3))
    assert len(caplog.records) == 1
    assert "only the last answer" in caplog.text
    learnt = [w for w, flag in split_mask(tokenizer, rendered) if flag]
    assert learnt == ["hello", " now", "<|im_end|>"]
    prompt = render_prompt(messages[:-1], tokenizer)
    assert rendered.input_ids[: len(prompt)] == prompt


def test_prompt_that_opens_a_thought_precedes_the_answer() -> None:
    tokenizer = tiny(OPENS_THOUGHT)
    rendered = render(PAIR, tokenizer)
    prompt = render_prompt(PAIR[:1], tokenizer)
    assert rendered.input_ids[: len(prompt)] == prompt
    assert tokenizer.decode(rendered.input_ids[len(prompt) :]) == "world<|im_end|>\n"


def test_conversation_that_opens_with_an_answer() -> None:
    tokenizer = tiny()
    words = split_mask(tokenizer, render([assistant("hello"), *PAIR], tokenizer))
    assert [w for w, flag in words if flag] == ["hello", "<|im_end|>", "world", "<|im_end|>"]
    assert words[:3] == [("<|im_start|>", False), ("assistant", False), ("\n", False)]


def test_raw_text_is_learnt_whole_and_ends() -> None:
    tokenizer = tiny()
    rendered = render([{"role": TEXT_ROLE, "content": "hello world"}], tokenizer)
    assert split_mask(tokenizer, rendered) == [
        ("hello", True),
        (" world", True),
        ("<|im_end|>", True),
    ]
    ended = render([{"role": TEXT_ROLE, "content": "hello world<|im_end|>\n"}], tokenizer)
    assert ended.input_ids.count(tokenizer.eos_token_id) == 1


def test_raw_text_has_one_bos() -> None:
    tokenizer = tiny(adds_bos=True)
    bos = tokenizer.bos_token_id
    for content in ("hello", "<|endoftext|>hello"):
        rendered = render([{"role": TEXT_ROLE, "content": content}], tokenizer)
        assert rendered.input_ids.count(bos) == 1 and rendered.input_ids[0] == bos
        assert all(rendered.trained)


def test_template_with_bos_does_not_double_it() -> None:
    tokenizer = tiny("{{ bos_token }}" + CHATML, adds_bos=True)
    bos = tokenizer.bos_token_id
    assert render(PAIR, tokenizer).input_ids.count(bos) == 1
    assert render_prompt(PAIR[:1], tokenizer).count(bos) == 1


def test_no_template_joins_question_and_answer() -> None:
    tokenizer = tiny(None, adds_bos=True)
    messages = [user("hello"), assistant(" world")]
    rendered = render(messages, tokenizer)
    assert split_mask(tokenizer, rendered) == [
        ("<|endoftext|>", False),
        ("hello", False),
        (" world", True),
        ("<|im_end|>", True),
    ]
    assert render_prompt(messages[:1], tokenizer) == rendered.input_ids[:2]
    assert render_prompt_text(messages[:1], tokenizer) == "hello"


def test_no_template_and_several_turns() -> None:
    with pytest.raises(DataError, match=r"FG-DATA-008.*user, assistant, user(.|\n)*chat_template="):
        render([*PAIR, user("bye")], tiny(None))
    with pytest.raises(DataError, match="FG-DATA-008"):
        render_prompt([*PAIR, user("bye")], tiny(None))


def test_no_messages() -> None:
    with pytest.raises(DataError, match="FG-DATA-005"):
        render([], tiny())
    with pytest.raises(DataError, match="FG-DATA-005"):
        render_prompt([], tiny())


def test_refusing_template_says_why() -> None:
    tokenizer = tiny("{{ raise_exception('system turns are not for me') }}")
    with pytest.raises(DataError, match=r"FG-DATA-011.*system turns are not for me"):
        render(PAIR, tokenizer)
    with pytest.raises(DataError, match="row 12: the chat template"):
        render_batch([PAIR, PAIR], tokenizer, names=["row 12", "row 13"])


def test_template_that_hides_the_answer() -> None:
    tokenizer = tiny("{% if add_generation_prompt %}hello{% else %}bye{% endif %}")
    with pytest.raises(DataError, match=r"FG-DATA-011.*does not show an answer"):
        render(PAIR, tokenizer)
    images = tiny(CHATML.replace("m['content']", "m['content'][0]['text']"))
    with pytest.raises(DataError, match=r"FG-DATA-011.*does not show an answer"):
        render(PAIR, images)


def test_batch_equals_one_by_one() -> None:
    tokenizer = tiny(SMOLLM2)
    rows = [
        PAIR,
        [user("bye"), assistant("now"), *PAIR],
        [{"role": TEXT_ROLE, "content": "hello"}],
        [user("hello")],
    ]
    assert render_batch(rows, tokenizer) == [render(row, tokenizer) for row in rows]
    assert render_batch([], tokenizer) == []


def test_prompt_text_ends_with_the_generation_prompt() -> None:
    text = render_prompt_text(PAIR[:1], tiny())
    assert text == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_tools_reach_the_template() -> None:
    tokenizer = tiny("{% if tools %}{{ tools[0]['name'] }}{% endif %}" + CHATML)
    tools = [{"name": "bye"}]
    assert tokenizer.decode(render(PAIR, tokenizer, tools=tools).input_ids).startswith("bye")
    assert render_prompt_text(PAIR[:1], tokenizer, tools).startswith("bye")


def test_no_eos_token_is_said(caplog: pytest.LogCaptureFixture) -> None:
    spans.say_once.cache_clear()
    tokenizer = tiny(PLAIN, eos_token=None)
    with caplog.at_level(logging.WARNING, "finegraft"):
        rendered = render(PAIR, tokenizer)
    assert "no EOS token" in caplog.text
    assert pieces(tokenizer, rendered.input_ids)[-1] == "world"
