"""From rows to tokens: text, prompt and completion, conversations, ready ids, and what is refused."""

import copy
import hashlib
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from conftest import CHAT_TEMPLATE, CHAT_TEMPLATE_WITH_GENERATION, make_tokenizer, write_jsonl
from files import DAMAGES
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import normalizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from logitgen.config import Config
from logitgen.errors import CaptureError, UsageError
from logitgen.split.cache import cached
from logitgen.split.encoded import remarks
from logitgen.split.load import load_split
from logitgen.split.tokens import load_tokenizer, tokenize
from logitgen.tokenizer import tokenizer_fingerprint

Rows = list[dict[str, Any]]
Tokenizer = PreTrainedTokenizerFast
STRANGE_TEXTS = [
    "",
    " ",
    "\n\t\r\n",
    "nul \x00 inside",
    "emoji 👩🏽‍🚀🇪🇺",
    "שלום עולם مرحبا بالعالم",
    "e\u0301 and ü\u0308\u0323",
    "模型 こんにちは 안녕",
    "\ufeff\u200b\u2028\u00a0\ufffd",
    "\U0010ffff",
]
texts = st.text(max_size=30)
SAID = {"role": "user", "content": "a"}
turns = st.tuples(st.sampled_from(["user", "assistant", "system"]), texts)


def run(rows: Rows | datasets.Dataset, tokenizer: Any, **options: Any) -> datasets.Dataset:
    split = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)
    return tokenize(split, tokenizer, Config(teacher="m", dataset="d", output="o.h5", **options))


def chat(*spoken: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in spoken]}


def with_template(tokenizer: Tokenizer, template: str | None) -> Tokenizer:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def with_special_tokens_around(tokenizer: Tokenizer) -> Tokenizer:
    """Have every text start with <|user|> (1) and end with <|end|> (0), as other tokenizers do with BOS and EOS."""
    changed = copy.deepcopy(tokenizer)
    special = [("<|user|>", 1), ("<|end|>", 0)]
    assert [token for _, token in special] == tokenizer.convert_tokens_to_ids([name for name, _ in special])
    changed.backend_tokenizer.post_processor = TemplateProcessing(single="<|user|> $A <|end|>", special_tokens=special)
    return changed


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def chat_by_hand(tokenizer: Tokenizer, spoken: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
    """Put the tokens of a conversation together part by part, as both templates of conftest write it."""
    ids, mask = [], []
    for role, content in spoken:
        part = [*ids_of(tokenizer, content), tokenizer.convert_tokens_to_ids("<|end|>")]
        ids += [tokenizer.convert_tokens_to_ids(f"<|{role}|>"), *part]
        mask += [0] + [int(role == "assistant")] * len(part)
    return ids, mask


@pytest.fixture(params=[CHAT_TEMPLATE, CHAT_TEMPLATE_WITH_GENERATION], ids=["plain", "generation_block"])
def chat_tokenizer(request: pytest.FixtureRequest, tokenizer: Tokenizer) -> Tokenizer:
    return with_template(tokenizer, request.param)


# Plain text.


def test_text_becomes_what_the_tokenizer_makes_of_it(tokenizer: Tokenizer) -> None:
    rows = [{"text": text, "other": 1} for text in STRANGE_TEXTS]
    found = run(rows, tokenizer)
    assert found.column_names == ["input_ids", "source_row", "notes"]
    assert found["input_ids"][:] == [ids_of(tokenizer, text) for text in STRANGE_TEXTS]


@settings(max_examples=30, deadline=None)
@given(st.lists(texts, min_size=1, max_size=8))
@example(STRANGE_TEXTS)
def test_any_unicode_text_comes_back_from_its_tokens(tokenizer: Tokenizer, written: list[str]) -> None:
    found = run([{"text": text} for text in written], tokenizer)
    decoded = [tokenizer.decode(ids, clean_up_tokenization_spaces=False) for ids in found["input_ids"]]
    assert decoded == written


def test_tokens_are_stored_as_32_bit_numbers(tokenizer: Tokenizer) -> None:
    found = run([{"prompt": "a", "completion": "b"}], tokenizer, completion_only=True)
    assert found.features["input_ids"].feature.dtype == "int32"
    assert found.features["completion_mask"].feature.dtype == "uint8"


def test_another_column_of_text_can_be_named(tokenizer: Tokenizer) -> None:
    row = {"body": "this one", "text": "not this", "input_ids": [1], "prompt": "nor", "completion": "this"}
    assert run([row], tokenizer, text_column="body")["input_ids"][:] == [ids_of(tokenizer, "this one")]


def test_the_special_tokens_are_those_the_tokenizer_adds_by_itself(tokenizer: Tokenizer) -> None:
    found = run([{"text": "a b"}], with_special_tokens_around(tokenizer))["input_ids"]
    assert found[:] == [[1, *ids_of(tokenizer, "a b"), 0]]


def test_rows_are_recognised_in_the_order_the_help_names(chat_tokenizer: Tokenizer) -> None:
    row = {"input_ids": [7, 8], **chat(("user", "a")), "prompt": "p", "completion": "c", "text": "t"}
    expected = {
        "input_ids": [7, 8],
        "messages": chat_by_hand(chat_tokenizer, [("user", "a")])[0],
        "completion": ids_of(chat_tokenizer, "pc"),
        "text": ids_of(chat_tokenizer, "t"),
    }
    for column, ids in expected.items():
        assert run([row], chat_tokenizer)["input_ids"][:] == [ids]
        del row[column]


def test_no_row_is_lost_over_several_batches(tokenizer: Tokenizer) -> None:
    written = [f"row {index}" for index in range(2500)]
    found = run([{"text": text} for text in written], tokenizer)["input_ids"][:]
    assert found == tokenizer(written)["input_ids"]


# Prompt and completion.


def test_prompt_and_completion_are_one_text(tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "Who? ", "completion": "Nobody."}, {"prompt": "", "completion": ""}]
    found = run(rows, tokenizer)
    assert found.column_names == ["input_ids", "source_row", "notes"]
    assert found["input_ids"][:] == [ids_of(tokenizer, "Who? Nobody."), []]


def test_the_completion_mask_marks_the_completions_tokens(tokenizer: Tokenizer) -> None:
    pairs = [("Q:", "\nA 模型"), ("all prompt", ""), ("", "all completion"), ("", ""), ("<|user|>hi<|end|>", "<|end|>")]
    found = run([{"prompt": prompt, "completion": rest} for prompt, rest in pairs], tokenizer, completion_only=True)
    for index, (prompt, completion) in enumerate(pairs):
        first, second = ids_of(tokenizer, prompt), ids_of(tokenizer, completion)
        assert found["input_ids"][index] == first + second
        assert found["completion_mask"][index] == [0] * len(first) + [1] * len(second)


def test_special_tokens_around_a_pair_belong_to_the_side_they_stand_on(tokenizer: Tokenizer) -> None:
    rows = [{"prompt": "Q:", "completion": "\nA"}, {"prompt": "", "completion": "\nA"}]
    found = run(rows, with_special_tokens_around(tokenizer), completion_only=True)
    for index, prompt in enumerate(("Q:", "")):
        first, second = [1, *ids_of(tokenizer, prompt)], [*ids_of(tokenizer, "\nA"), 0]
        assert found["input_ids"][index] == first + second
        assert found["completion_mask"][index] == [0] * len(first) + [1] * len(second)


def test_a_token_that_spans_prompt_and_completion_belongs_to_the_completion(tokenizer: Tokenizer) -> None:
    joined = next(token for token in tokenizer.get_vocab() if re.fullmatch("[a-z]{4,}", token))
    found = run([{"prompt": joined[:2], "completion": joined[2:]}], tokenizer, completion_only=True)
    assert found["input_ids"][:] == [[tokenizer.convert_tokens_to_ids(joined)]]
    assert found["completion_mask"][:] == [[1]]


def test_a_token_wholly_in_the_prompt_does_not_belong_to_the_completion(tokenizer: Tokenizer) -> None:
    prompt, completion = "ass", "ert"
    tokens = tokenizer.convert_ids_to_tokens(ids_of(tokenizer, prompt + completion))
    assert tokens[:2] == ["a", "s"]  # while the prompt alone ends in another token than these two
    assert tokenizer.convert_ids_to_tokens(ids_of(tokenizer, prompt))[:2] != tokens[:2]
    mask = run([{"prompt": prompt, "completion": completion}], tokenizer, completion_only=True)["completion_mask"][0]
    ends = [len("".join(tokens[: index + 1])) for index in range(len(tokens))]
    assert mask == [int(end > len(prompt)) for end in ends]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=6))
def test_every_token_with_a_byte_of_the_completion_is_marked(
    tokenizer: Tokenizer, pairs: list[tuple[str, str]]
) -> None:
    found = run([{"prompt": prompt, "completion": rest} for prompt, rest in pairs], tokenizer, completion_only=True)
    for (prompt, _), ids, mask in zip(pairs, found["input_ids"], found["completion_mask"], strict=True):
        end = 0
        for token, marked in zip(tokenizer.convert_ids_to_tokens(ids), mask, strict=True):
            end += len(token)  # a byte-level token is written with one letter per byte
            assert marked or end <= len(prompt.encode())
        assert mask == sorted(mask)


# Conversations.


def test_a_conversation_becomes_what_the_template_makes_of_it(chat_tokenizer: Tokenizer) -> None:
    spoken = [("system", "Be brief."), ("user", "Hi 👋"), ("assistant", "Yes?"), ("user", ""), ("assistant", "Bye.")]
    found = run([chat(*spoken)], chat_tokenizer)
    assert found.column_names == ["input_ids", "source_row", "notes"]
    assert found["input_ids"][:] == [chat_by_hand(chat_tokenizer, spoken)[0]]


@pytest.mark.parametrize(
    "spoken",
    [
        [("user", "Hi"), ("assistant", "Hello there")],
        [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "So"), ("assistant", "Bye.")],
        [("user", "No answer yet")],
        [("user", "Say nothing"), ("assistant", "")],
        [("user", "Twice"), ("assistant", "one"), ("assistant", "two")],
        [("user", "\x00 é"), ("assistant", "👩🏽‍🚀 مرحبا e\u0301"), ("user", "模"), ("assistant", " \n ")],
        [("user", "Hello"), ("assistant", "Hello"), ("user", "Hello"), ("assistant", "Hello")],
        [("assistant", "Welcome."), ("user", "Hi"), ("assistant", "Yes?")],
        [("system", "Be brief.")],
    ],
)
def test_the_mask_covers_the_assistants_words_and_its_end_token(
    chat_tokenizer: Tokenizer, spoken: list[tuple[str, str]]
) -> None:
    found = run([chat(*spoken)], chat_tokenizer, completion_only=True)
    ids, mask = chat_by_hand(chat_tokenizer, spoken)
    assert found["input_ids"][:] == [ids]
    assert found["completion_mask"][:] == [mask]


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, CHAT_TEMPLATE_WITH_GENERATION], ids=["plain", "generation_block"])
def test_the_mask_is_right_for_any_conversation_that_a_user_or_system_starts(
    tokenizer: Tokenizer, template: str
) -> None:
    chat_tokenizer = with_template(tokenizer, template)

    @settings(max_examples=40, deadline=None)
    @given(st.sampled_from(["user", "system"]), texts, st.lists(turns, max_size=5))
    def check(first_role: str, first: str, later: list[tuple[str, str]]) -> None:
        spoken = [(first_role, first), *later]
        found = run([chat(*spoken)], chat_tokenizer, completion_only=True)
        assert (found["input_ids"][0], found["completion_mask"][0]) == chat_by_hand(tokenizer, spoken)

    check()


def test_the_mask_is_right_where_the_tokenizer_composes_characters(chat_tokenizer: Tokenizer) -> None:
    composing = copy.deepcopy(chat_tokenizer)
    composing.backend_tokenizer.normalizer = normalizers.NFC()
    spoken = [
        ("user", "cafe\u0301 u\u0308\u0323"),
        ("assistant", "e\u0301"),
        ("user", "e\u0301"),
        ("assistant", "ü e\u0301 x"),
    ]
    assert ids_of(composing, "e\u0301") == ids_of(chat_tokenizer, "é")
    found = run([chat(*spoken)], composing, completion_only=True)
    assert (found["input_ids"][0], found["completion_mask"][0]) == chat_by_hand(composing, spoken)


def test_a_conversation_gets_no_special_tokens_but_the_templates(chat_tokenizer: Tokenizer) -> None:
    around = with_special_tokens_around(chat_tokenizer)
    spoken = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    ids, mask = chat_by_hand(chat_tokenizer, spoken)
    assert run([chat(*spoken)], around)["input_ids"][:] == [ids]
    found = run([chat(*spoken)], around, completion_only=True)
    assert (found["input_ids"][0], found["completion_mask"][0]) == (ids, mask)


def test_an_end_mark_of_ordinary_letters_belongs_to_the_assistant_too(tokenizer: Tokenizer) -> None:
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    spoken = [("user", "xy"), ("assistant", "zw"), ("user", "x"), ("assistant", "")]
    found = run([chat(*spoken)], with_template(tokenizer, template), completion_only=True)
    text, marks = "u:xy;a:zw;u:x;a:;", "00000001110000001"
    tokens = tokenizer.convert_ids_to_tokens(found["input_ids"][0])
    ends = [len("".join(tokens[: index + 1])) for index in range(len(tokens))]
    assert "".join(tokens) == text
    spans = zip([0, *ends[:-1]], ends, strict=True)
    assert found["completion_mask"][0] == [int("1" in marks[start:end]) for start, end in spans]


def test_an_empty_conversation_is_an_empty_row(chat_tokenizer: Tokenizer) -> None:
    rows = [chat(("user", "a"), ("assistant", "b")), chat()]
    assert run(rows, chat_tokenizer)["input_ids"][1] == []
    found = run(rows, chat_tokenizer, completion_only=True)
    assert (found["input_ids"][1], found["completion_mask"][1]) == ([], [])
    assert found["completion_mask"][0] == [0, 0, 0, 0, 1, 1]


def test_a_plain_and_a_marked_template_give_the_same_rows(tokenizer: Tokenizer) -> None:
    rows = [chat(("user", "a b"), ("assistant", text), ("user", text), ("assistant", "c")) for text in STRANGE_TEXTS]
    plain, marked = (
        run(rows, with_template(tokenizer, template), completion_only=True)[:]
        for template in (CHAT_TEMPLATE, CHAT_TEMPLATE_WITH_GENERATION)
    )
    assert plain == marked
    assert any(any(mask) for mask in plain["completion_mask"])


FORGETFUL_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>"
    "{% if loop.last %}{{ message['content'] }}{% else %}{{ message['content'].split('#')[-1] }}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""Drops what stands before a # from every turn but the last, as templates do with thoughts."""


def test_a_turn_that_is_rendered_differently_later_has_a_row_of_its_own(tokenizer: Tokenizer) -> None:
    forgetful = with_template(tokenizer, FORGETFUL_TEMPLATE)
    rows = [
        chat(("user", "a"), ("assistant", "b")),
        chat(("user", "a"), ("assistant", "think#b"), ("user", "c"), ("assistant", "d")),
    ]
    found = run(rows, forgetful, completion_only=True)
    whole = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    first, last = chat_by_hand(tokenizer, [("user", "a"), ("assistant", "think#b")]), chat_by_hand(tokenizer, whole)
    last_mask = [*[0] * (len(last[1]) - len(ids_of(tokenizer, "d")) - 1), *[1] * (len(ids_of(tokenizer, "d")) + 1)]
    assert found["input_ids"][1:] == [first[0], last[0]]
    assert found["completion_mask"][1:] == [first[1], last_mask]
    assert found["source_row"][:] == [0, 1, 1]
    assert run(rows, forgetful)["input_ids"][1] == last[0]


def test_such_a_template_is_good_as_long_as_it_changes_nothing(tokenizer: Tokenizer) -> None:
    spoken = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    found = run([chat(*spoken)], with_template(tokenizer, FORGETFUL_TEMPLATE), completion_only=True)
    assert (found["input_ids"][0], found["completion_mask"][0]) == chat_by_hand(tokenizer, spoken)


def test_a_turn_begins_where_it_parts_from_the_generation_prompt(tokenizer: Tokenizer) -> None:
    template = CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|>think:{% endif %}")
    spoken = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    found = run([chat(*spoken)], with_template(tokenizer, template), completion_only=True)
    assert (found["input_ids"][0], found["completion_mask"][0]) == chat_by_hand(tokenizer, spoken)


BLOCK_OF_CONTENT = CHAT_TEMPLATE_WITH_GENERATION.replace("<|end|>{% endgeneration %}", "{% endgeneration %}<|end|>")


def test_a_block_that_begins_or_ends_without_a_token_marks_the_others(tokenizer: Tokenizer) -> None:
    """A character that the tokenizer drops has no token, neither as the first of a block nor as its last."""
    changed = with_template(tokenizer, BLOCK_OF_CONTENT)
    changed.backend_tokenizer.normalizer = normalizers.Replace("#", "")
    spoken = [("user", "a"), ("assistant", "#b"), ("user", "c"), ("assistant", "d#"), ("user", "e"), ("assistant", "f")]
    found = run([chat(*spoken)], changed, completion_only=True)
    ids, mask = found["input_ids"][0], found["completion_mask"][0]
    kept = changed.decode([token for token, mark in zip(ids, mask, strict=True) if mark])
    assert kept == "bdf"


def test_a_block_that_ends_with_a_character_of_several_tokens_marks_all_of_them(tokenizer: Tokenizer) -> None:
    changed = with_template(tokenizer, BLOCK_OF_CONTENT)
    found = run([chat(("user", "a"), ("assistant", "b \N{GRINNING FACE}"))], changed, completion_only=True)
    ids, mask = found["input_ids"][0], found["completion_mask"][0]
    kept = changed.decode([token for token, mark in zip(ids, mask, strict=True) if mark])
    assert kept == "b \N{GRINNING FACE}"


@pytest.mark.parametrize("tag", ["{% generation %}", "{%- generation -%}", "{%generation%}", "{%-  generation  %}"])
def test_a_generation_block_is_found_however_it_is_spaced(tokenizer: Tokenizer, tag: str) -> None:
    template = CHAT_TEMPLATE_WITH_GENERATION.replace("{% generation %}", tag).replace("<|assistant|>{% endif %}", "")
    assert tag in template
    spoken = [("user", "a"), ("assistant", "b"), ("user", "c")]
    template = template.replace("{% if add_generation_prompt %}", "")
    found = run([chat(*spoken)], with_template(tokenizer, template), completion_only=True)
    assert (found["input_ids"][0], found["completion_mask"][0]) == chat_by_hand(tokenizer, spoken)


@pytest.mark.parametrize("completion_only", [False, True])
@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('Roles must alternate.') }}", r"Roles must alternate\."),
        ("{% for message in messages %", "unexpected 'end of template'"),
        ("{{ messages[0]['content'] + 1 }}", "can only concatenate str"),
    ],
)
def test_what_a_template_refuses_is_said_with_the_row(
    tokenizer: Tokenizer, template: str, reason: str, completion_only: bool
) -> None:
    with pytest.raises(UsageError, match=f"^Row 0: the chat template refuses the messages: {reason}"):
        run([chat(("user", "a"))], with_template(tokenizer, template), completion_only=completion_only)


def test_messages_need_a_chat_template(tokenizer: Tokenizer) -> None:
    message = r"^The rows are messages, but the tokenizer of m has no chat template\. .* --text_column\.$"
    with pytest.raises(UsageError, match=message):
        run([chat(("user", "a"))], tokenizer)


def test_a_slow_tokenizer_cannot_mark_the_assistants_tokens(chat_tokenizer: Tokenizer) -> None:
    class Slow(SimpleNamespace):
        __call__ = staticmethod(chat_tokenizer.__call__)

    slow = Slow(
        is_fast=False,
        split_special_tokens=False,
        chat_template=chat_tokenizer.chat_template,
        get_vocab=chat_tokenizer.get_vocab,
        special_tokens_map={},
        eos_token_id=0,
        apply_chat_template=chat_tokenizer.apply_chat_template,
        get_chat_template=chat_tokenizer.get_chat_template,
    )
    rows = [chat(("user", "a"), ("assistant", "b"))]
    assert run(rows, slow)["input_ids"][0] == chat_by_hand(chat_tokenizer, [("user", "a"), ("assistant", "b")])[0]
    with pytest.raises(UsageError, match=r"^--completion_only over messages needs a fast tokenizer"):
        run(rows, slow, completion_only=True)


# Ready tokens.


def test_ready_ids_are_taken_as_they_are_without_a_tokenizer() -> None:
    found = run([{"input_ids": [5, 0, 131_072], "labels": [1, 2, 3]}, {"input_ids": []}], None)
    assert found.column_names == ["input_ids", "source_row", "notes"]
    assert found["input_ids"][:] == [[5, 0, 131_072], []]


def test_ready_ids_come_with_their_mask_only_if_it_counts() -> None:
    rows = [{"input_ids": [1, 2, 3], "completion_mask": [0, 0, 1]}, {"input_ids": [], "completion_mask": []}]
    assert run(rows, None).column_names == ["input_ids", "source_row", "notes"]
    assert run(rows, None, completion_only=True)["completion_mask"][:] == [[0, 0, 1], []]


def test_a_mask_of_truth_values_is_a_mask() -> None:
    rows = [{"input_ids": [1, 2], "completion_mask": [False, True]}]
    assert run(rows, None, completion_only=True)["completion_mask"][:] == [[0, 1]]


# What is refused.


def test_text_needs_a_tokenizer() -> None:
    message = r"^--teacher m has no tokenizer that can be loaded, .* or give a dataset with input_ids\.$"
    for row in ({"text": "a"}, chat(("user", "a")), {"prompt": "a", "completion": "b"}):
        with pytest.raises(UsageError, match=message):
            run([row], None)


def test_unknown_columns_are_listed_with_what_was_expected(tokenizer: Tokenizer) -> None:
    message = (
        r"^Rows need input_ids, messages, prompt and completion, or text; the split has columns question, answer\. "
        r"Name a column of text with --text_column, or one of messages with --messages_column\.$"
    )
    with pytest.raises(UsageError, match=message):
        run([{"question": "a", "answer": "b"}], tokenizer)


def test_a_text_column_that_is_not_there_is_told_what_there_is(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match=r"^--text_column body is not a column; the split has columns text, number\."):
        run([{"text": "a", "number": 1}], tokenizer, text_column="body")


def test_a_split_without_columns_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(UsageError, match="the split has no columns"):
        run(datasets.Dataset.from_dict({}), tokenizer)


def test_plain_text_has_no_completion(tokenizer: Tokenizer) -> None:
    message = r"^--completion_only needs rows that say .* \(prompt and completion, messages, or .*\); 'text' is plain"
    with pytest.raises(UsageError, match=message):
        run([{"text": "a"}], tokenizer, completion_only=True)


def test_ready_ids_without_a_mask_have_no_completion() -> None:
    message = (
        r"^--completion_only with ready input_ids needs a completion_mask .* the split has columns input_ids, n\.$"
    )
    with pytest.raises(UsageError, match=message):
        run([{"input_ids": [1], "n": 1}], None, completion_only=True)


@pytest.mark.parametrize(
    ("value", "got"),
    [(None, "nothing"), (["a", "b"], r"a list of 2 \('a', \.\.\.\)"), ({"a": 1}, r"dict \{'a': 1\}"), (3, "int 3")],
)
@pytest.mark.parametrize("column", ["text", "prompt", "completion"])
def test_a_value_that_is_no_string_is_named_with_row_and_column(
    tokenizer: Tokenizer, column: str, value: Any, got: str
) -> None:
    good = {"prompt": "a", "completion": "b"} if column != "text" else {"text": "a"}
    rows = [good | {column: value}] if value is not None else [good, good | {column: None}]
    row = len(rows) - 1
    with pytest.raises(UsageError, match=rf"^Row {row}: '{column}' must be a string, got {got}\.$"):
        run(rows, tokenizer)


def test_a_row_beyond_the_first_batch_is_named_by_its_number(tokenizer: Tokenizer) -> None:
    rows = [{"text": "a"}] * 1234 + [{"text": None}]
    with pytest.raises(UsageError, match=r"^Row 1234: 'text' must be a string, got nothing"):
        run(rows, tokenizer)


@pytest.mark.parametrize(
    ("messages", "got"),
    [
        (None, "Row 0: 'messages' must be a list of messages, got nothing"),
        ("Hi", "Row 0: 'messages' must be a list of messages, got str 'Hi'"),
        ({"role": "user", "content": "a"}, "Row 0: 'messages' must be a list of messages, got dict"),
        (["Hi"], "Row 0, message 0: it must be an object with role and content, got str 'Hi'"),
        ([SAID, {"role": "user", "content": None}], "Row 0, message 1: 'content' must be a string, got nothing"),
        ([SAID, {"role": "user"}], "Row 0, message 1: 'content' must be a string, got nothing"),
        ([{"role": "user", "content": 3}], "Row 0, message 0: 'content' must be a string, got int 3"),
        ([{"role": "user", "content": ["a"]}], "Row 0, message 0: a part of 'content' is str 'a'"),
        ([{"role": "user", "content": [{"type": "image"}]}], "Row 0, message 0: a part of 'content' is image, only"),
        ([{"from": "human"}], "Row 0, message 0: 'content' must be a string, got nothing"),
        ([{"value": "a"}], "Row 0, message 0: 'role' must be a string, got nothing"),
        ([{"role": 1, "content": "a"}], "Row 0, message 0: 'role' must be a string, got int 1"),
    ],
)
def test_messages_must_be_roles_and_contents(chat_tokenizer: Tokenizer, messages: Any, got: str) -> None:
    with pytest.raises(UsageError, match=rf"^{re.escape(got)}.*\.$"):
        run([{"messages": messages}], chat_tokenizer)


@pytest.mark.parametrize(
    ("ids", "got"),
    [
        (None, "got nothing"),
        ("abc", "got str 'abc'"),
        ([1.0, 2.0], r"1\.0 is none"),
        ([True], "True is none"),
        ([1, None], "None is none"),
        ([[1], [2]], r"\[1\] is none"),
        ([3, -1], "-1 is none"),
    ],
)
def test_ready_ids_must_be_token_ids(ids: Any, got: str) -> None:
    with pytest.raises(UsageError, match=rf"^Row 0: 'input_ids' must be a list of token ids, {got}\.$"):
        run([{"input_ids": ids}], None)


@pytest.mark.parametrize("token", [2**31, -(2**31) - 1, 2**40])
def test_a_ready_id_beyond_32_bits_is_named_with_its_row(token: int) -> None:
    with pytest.raises(UsageError, match=rf"^Row 1: .*{token}"):
        run([{"input_ids": [3, 4]}, {"input_ids": [5, token]}], None)


@pytest.mark.parametrize(
    ("mask", "got"),
    [
        (None, "nothing"),
        ([1], r"a list of 1 \(1, \.\.\.\)"),
        ([0, 1, 1], r"a list of 3 \(0, \.\.\.\)"),
        ([1, 2], r"a list of 2 \(1, \.\.\.\)"),
        ([0, None], r"a list of 2 \(0, \.\.\.\)"),
        ([[0], [1]], r"a list of 2 \(\[0\], \.\.\.\)"),
        ("01", "str '01'"),
    ],
)
def test_a_completion_mask_must_fit_its_tokens(mask: Any, got: str) -> None:
    message = rf"^Row 0: 'completion_mask' must be 2 zeros and ones, one per token, got {got}\.$"
    with pytest.raises(UsageError, match=message):
        run([{"input_ids": [5, 6], "completion_mask": mask}], None, completion_only=True)


def test_a_file_that_is_not_unicode_is_refused_in_one_line(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "plain"}\n{"text": "caf\xe9"}\n')
    config = Config(teacher="m", dataset=str(tmp_path / "latin.jsonl"), output="o.h5")
    with pytest.raises(UsageError, match=r"(?i)utf-?8"):
        tokenize(load_split(config), tokenizer, config)


# Packing.


def test_packing_ends_every_text_with_the_end_token_once(tokenizer: Tokenizer) -> None:
    found = run([{"text": text} for text in ("a b", "ends<|end|>", "", "<|end|>")], tokenizer, packing=True)
    assert found["input_ids"][:] == [[*ids_of(tokenizer, "a b"), 0], [*ids_of(tokenizer, "ends"), 0], [0], [0]]
    assert tokenizer.eos_token_id == 0


def test_without_packing_no_end_token_is_added(tokenizer: Tokenizer) -> None:
    assert run([{"text": "a b"}], tokenizer)["input_ids"][:] == [ids_of(tokenizer, "a b")]


def with_eos(tokenizer: Tokenizer) -> Tokenizer:
    changed = copy.deepcopy(tokenizer)
    changed.eos_token = "<|end|>"
    return changed


@pytest.mark.parametrize("completion_only", [False, True])
def test_an_end_token_that_is_asked_for_belongs_to_the_completion(tokenizer: Tokenizer, completion_only: bool) -> None:
    rows = [{"prompt": "a ", "completion": "b"}, {"prompt": "c ", "completion": "d<|end|>"}]
    ending = with_eos(tokenizer)
    found = run(rows, ending, append_eos=True, completion_only=completion_only)
    assert found["input_ids"][:] == [ids_of(ending, text) for text in ("a b<|end|>", "c d<|end|>")]
    assert not remarks(found)
    if completion_only:
        assert [mask[-1] for mask in found["completion_mask"]] == [1, 1]


def test_texts_and_not_conversations_get_the_end_token_that_is_asked_for(chat_tokenizer: Tokenizer) -> None:
    ending = with_eos(chat_tokenizer)
    assert run([{"text": "a"}], ending, append_eos=True)["input_ids"][0] == ids_of(ending, "a<|end|>")
    spoken = [("user", "a"), ("assistant", "b")]
    found = run([chat(*spoken)], ending, append_eos=True)
    assert found["input_ids"][0] == chat_by_hand(chat_tokenizer, spoken)[0]


def test_an_end_token_that_the_tokenizer_lacks_is_refused(tokenizer: Tokenizer) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.eos_token = None
    with pytest.raises(UsageError, match=r"^--append_eos needs a tokenizer with an end-of-text token"):
        run([{"text": "a"}], bare, append_eos=True)


@pytest.mark.parametrize(("ends", "warned"), [(("b", "d"), True), (("b", "d<|end|>"), False)])
def test_completions_of_which_none_ends_are_warned_of(
    tokenizer: Tokenizer, ends: tuple[str, str], warned: bool
) -> None:
    found = run([{"prompt": "a ", "completion": end} for end in ends], with_eos(tokenizer))
    lines = [str(remark) for remark in remarks(found)]
    expected = (
        "2 rows (first: row 0): no completion ends with the end-of-text token, so a student would not learn to stop"
    )
    assert lines == ([f"{expected}. Add it with --append_eos."] if warned else [])


def test_a_second_beginning_of_text_token_is_warned_of_and_can_be_left_out(tokenizer: Tokenizer) -> None:
    doubling = with_special_tokens_around(tokenizer)
    doubling.bos_token = "<|user|>"
    rows = [{"text": "a"}, {"text": "<|user|>b"}]
    found = run(rows, doubling)
    assert found["input_ids"][1][:2] == [1, 1]
    (line,) = map(str, remarks(found))
    assert line.startswith(
        "1 row (row 1): the text begins with the beginning-of-text token, and the tokenizer adds another"
    )
    single = run(rows, doubling, add_special_tokens=False)
    assert single["input_ids"][:] == [tokenizer(row["text"])["input_ids"] for row in rows]
    assert not remarks(single)


def test_packing_without_an_end_token_adds_nothing(tokenizer: Tokenizer) -> None:
    endless = copy.deepcopy(tokenizer)
    endless.eos_token = None
    assert run([{"text": "a b"}, {"text": ""}], endless, packing=True)["input_ids"][:] == [ids_of(tokenizer, "a b"), []]


def test_packing_leaves_ready_ids_alone(tokenizer: Tokenizer) -> None:
    assert run([{"input_ids": [5, 6]}], tokenizer, packing=True)["input_ids"][:] == [[5, 6]]


def test_the_end_token_packing_adds_belongs_to_the_completion(tokenizer: Tokenizer) -> None:
    found = run([{"prompt": "Q:", "completion": "\nA"}], tokenizer, packing=True, completion_only=True)
    first, second = ids_of(tokenizer, "Q:"), [*ids_of(tokenizer, "\nA"), 0]
    assert found["input_ids"][:] == [first + second]
    assert found["completion_mask"][:] == [[0] * len(first) + [1] * len(second)]


def test_the_end_token_packing_adds_to_a_conversation_is_not_the_assistants(tokenizer: Tokenizer) -> None:
    endless = with_template(tokenizer, "{% for m in messages %}{{ m.role[0] }}{{ m.content }};{% endfor %}")
    rows = [chat(("user", "x"))]
    found = run(rows, endless, packing=True, completion_only=True)
    assert found["input_ids"][:] == [[*ids_of(tokenizer, "ux;"), 0]]
    assert found["completion_mask"][:] == [[0] * (len(ids_of(tokenizer, "ux;")) + 1)]


def test_packing_does_not_double_a_conversations_end_token(chat_tokenizer: Tokenizer) -> None:
    spoken = [("user", "a"), ("assistant", "b")]
    found = run([chat(*spoken)], chat_tokenizer, packing=True, completion_only=True)
    assert (found["input_ids"][0], found["completion_mask"][0]) == chat_by_hand(chat_tokenizer, spoken)


# The cache.


class Counting:
    """A tokenizer that counts how often it is asked."""

    def __init__(self, inner: Tokenizer) -> None:
        self._inner = inner
        self.num_calls = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.num_calls += 1
        return self._inner(*args, **options)


def loaded(path: Path) -> datasets.Dataset:
    return load_split(Config(teacher="m", dataset=str(path), output="o.h5"))


def test_rows_that_were_tokenised_before_come_from_the_cache(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a b"}, {"text": "c"}])
    first, second = Counting(tokenizer), Counting(copy.deepcopy(tokenizer))
    before = run(loaded(path), first)[:]
    assert run(loaded(path), second)[:] == before
    assert (first.num_calls, second.num_calls) == (1, 0)


def with_a_bos_token(tokenizer: Tokenizer) -> Tokenizer:
    changed = copy.deepcopy(tokenizer)
    changed.bos_token = "<|user|>"
    return changed


def with_another_token(tokenizer: Tokenizer) -> Tokenizer:
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["quack"])
    return changed


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"text_column": "prompt"}, copy.deepcopy),
        ({"packing": True}, copy.deepcopy),
        ({"completion_only": True}, copy.deepcopy),
        ({}, with_a_bos_token),
        ({}, with_another_token),
        ({}, lambda tokenizer: with_template(tokenizer, CHAT_TEMPLATE)),
    ],
    ids=["text_column", "packing", "completion_only", "special_token", "vocabulary", "chat_template"],
)
def test_other_settings_or_another_tokenizer_are_not_served_from_the_cache(
    tokenizer: Tokenizer, tmp_path: Path, options: dict[str, Any], change: Callable[[Tokenizer], Tokenizer]
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a b", "completion": " c"}])
    run(loaded(path), Counting(tokenizer))
    other = Counting(change(tokenizer))
    run(loaded(path), other, **options)
    assert other.num_calls > 0


def test_changed_rows_are_not_served_from_the_cache(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "before"}])
    run(loaded(path), tokenizer)
    write_jsonl(path, [{"text": "after it"}])
    assert run(loaded(path), tokenizer)["input_ids"][:] == [ids_of(tokenizer, "after it")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tokens_are_made_anew(
    tokenizer: Tokenizer, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": f"row {number} " * 5} for number in range(2500)])
    expected = run(loaded(path), tokenizer)["input_ids"][:]
    assert not caplog.records
    (kept,) = (tmp_path / "cache" / "logitgen").glob("*.arrow")
    content = DAMAGES[damage](kept)
    kept.unlink()
    kept.write_bytes(content)
    for _ in range(2):
        assert run(loaded(path), tokenizer)["input_ids"][:] == expected
        assert [record.getMessage() for record in caplog.records] == [
            f"The tokens in {kept} are made anew: the file is damaged."
        ]


def test_tokens_that_were_not_finished_are_made_anew(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a b"}])
    run(loaded(path), tokenizer)
    for seal in (tmp_path / "cache" / "logitgen").glob("*.json"):
        seal.write_text("{")
    assert run(loaded(path), tokenizer)["input_ids"][:] == [ids_of(tokenizer, "a b")]
    assert "they were not finished" in caplog.text


def test_rows_that_got_lost_on_their_way_through_the_cache_are_missed(tmp_path: Path) -> None:
    path = tmp_path / "cache" / "rows.arrow"
    with pytest.raises(
        CaptureError, match=re.escape(f"3 rows became 2. The datasets cache is damaged: remove {path.parent}.")
    ):
        cached(path, 3, lambda: datasets.Dataset.from_dict({"input_ids": [[1], [2]]}))


@pytest.mark.parametrize("kind", ["file", "folder", "save_to_disk"])
def test_other_content_of_equal_size_and_time_misses_the_cache(tokenizer: Tokenizer, tmp_path: Path, kind: str) -> None:
    source = tmp_path / "data"
    texts = ["before", "behind"]
    seen = []
    for text in texts:
        made = source if kind == "save_to_disk" else tmp_path / "made"
        if kind == "save_to_disk":
            shutil.rmtree(source, ignore_errors=True)
            rows = datasets.Dataset.from_dict({"text": [text]})
            rows._fingerprint = "always"
            rows.save_to_disk(source)
        else:
            made.mkdir(exist_ok=True)
            write_jsonl(made / "rows.jsonl", [{"text": text}])
            source.mkdir(exist_ok=True)
            (source / "rows.jsonl").unlink(missing_ok=True)
            shutil.copy(made / "rows.jsonl", source / "rows.jsonl")
        for found in source.rglob("*"):
            os.utime(found, (1e9, 1e9))
        os.utime(source, (1e9, 1e9))
        seen.append(run(loaded(source / "rows.jsonl" if kind == "file" else source), tokenizer)["input_ids"][:])
    assert seen == [[ids_of(tokenizer, text)] for text in texts]


def test_a_refused_row_leaves_nothing_in_the_cache(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}] * 1500 + [{"text": None}])
    for _ in range(2):
        with pytest.raises(UsageError, match="Row 1500: 'text' must be a string"):
            run(loaded(path), tokenizer)


# The tokenizer itself.


def test_the_teachers_tokenizer_is_loaded_from_its_folder(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    found = load_tokenizer(Config(teacher=str(tmp_path), dataset="d", output="o.h5"))
    assert found is not None
    assert found("Grüße 👋")["input_ids"] == ids_of(tokenizer, "Grüße 👋")
    assert tokenizer_fingerprint(found) == tokenizer_fingerprint(tokenizer)


def test_a_folder_without_a_tokenizer_has_none(tmp_path: Path) -> None:
    assert load_tokenizer(Config(teacher=str(tmp_path), dataset="d", output="o.h5")) is None


def test_equal_tokenizers_have_equal_fingerprints_and_others_do_not() -> None:
    base = make_tokenizer()
    splitting = make_tokenizer()
    splitting.split_special_tokens = True
    others = [
        splitting,
        with_a_bos_token(base),
        with_another_token(base),
        with_template(base, CHAT_TEMPLATE),
        with_template(base, CHAT_TEMPLATE_WITH_GENERATION),
    ]
    prints = [tokenizer_fingerprint(each) for each in (base, *others)]
    assert tokenizer_fingerprint(make_tokenizer()) == prints[0]
    assert len(set(prints)) == len(prints)
    assert all(re.fullmatch("[0-9a-f]{64}", each) for each in prints)
    assert tokenizer_fingerprint(None) == ""


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_fingerprint_does_not_depend_on_the_last_call_and_does_not_change_the_next(side: str) -> None:
    tokenizer, texts = make_tokenizer(), ["Hello", "a longer text than this"]
    expected = tokenizer_fingerprint(tokenizer)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, side
    of_padding = tokenizer_fingerprint(tokenizer)
    tokenizer(texts, padding=True, truncation=True, max_length=8, pad_to_multiple_of=8)
    backend = tokenizer.backend_tokenizer
    state = backend.padding, backend.truncation
    assert None not in state
    assert tokenizer_fingerprint(tokenizer) == of_padding
    assert (backend.padding, backend.truncation) == state
    tokenizer.pad_token = None
    assert tokenizer_fingerprint(tokenizer) == expected


def test_the_fingerprint_is_that_of_files_written_before() -> None:
    tokenizer = with_template(with_another_token(make_tokenizer()), CHAT_TEMPLATE)
    tokenizer.add_tokens(["it's", 'a "word"', "back\\slash"])
    special = {"eos_token": "<|end|>"}
    assert tokenizer.special_tokens_map == special
    parts = [sorted(tokenizer.get_vocab().items()), CHAT_TEMPLATE, tokenizer.backend_tokenizer.to_str()]
    parts.append(sorted(special.items()))
    assert tokenizer_fingerprint(tokenizer) == hashlib.sha256(repr(parts).encode()).hexdigest()
