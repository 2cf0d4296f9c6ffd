"""Columns that change what the teacher reads or what is captured are honoured or refused, never ignored in silence."""

import copy
import json
import logging
from typing import Any

import datasets
import pytest
from conftest import CHAT_TEMPLATE, CHAT_TEMPLATE_WITH_GENERATION, make_tokenizer
from test_chats import rendered, warnings_of

from logitgen.config import Config
from logitgen.errors import UsageError
from logitgen.split.tokens import tokenize
from logitgen.values import JsonObject

Row = dict[str, Any]
WITH_TOOLS = (
    "{% for tool in tools or [] %}<|system|>{{ tool | tojson }}{% endfor %}"
    "{% if effort is defined %}effort {{ effort }}{% endif %}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}"
    "{% for call in message.tool_calls or [] %}"
    "{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}"
    "<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"city": {"type": "string"}}}}]
HELLO = {"role": "user", "content": "Hello"}
ANSWER = {"role": "assistant", "content": "Good day"}


def run(rows: list[Row] | datasets.Dataset, tokenizer: Any = None, **options: Any) -> datasets.Dataset:
    split = rows if isinstance(rows, datasets.Dataset) else datasets.Dataset.from_list(rows)
    return tokenize(split, tokenizer, Config(teacher="m", dataset="d", output="o.h5", **options))


@pytest.fixture(scope="module")
def with_tools() -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = WITH_TOOLS
    return tokenizer


# Ready ids.


@pytest.mark.parametrize(
    ("ids", "mask", "read"),
    [
        ([0, 0, 0, 5, 6, 7], [0, 0, 0, 1, 1, 1], [5, 6, 7]),
        ([5, 6, 7, 0], [1, 1, 1, 0], [5, 6, 7]),
        ([0, 5, 6, 0], [0, 1, 1, 0], [5, 6]),
        ([5, 6], [1, 1], [5, 6]),
        ([5, 6], [0, 0], []),
        ([5, 6], None, [5, 6]),
        ([], [], []),
    ],
)
def test_padding_that_the_attention_mask_hides_is_not_read(ids: list[int], mask: list[int], read: list[int]) -> None:
    rows = [{"input_ids": ids, "attention_mask": mask}, {"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]}]
    assert run(rows)["input_ids"][:] == [read, [1, 2, 3]]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([1, 0, 1], "'attention_mask' hides tokens in the middle of the row, which a teacher cannot leave out"),
        ([1, 1], r"'attention_mask' must be 3 zeros and ones, one per token, got a list of 2 \(1, \.\.\.\)"),
        ([1, 2, 1], "'attention_mask' must be 3 zeros and ones"),
    ],
)
def test_an_attention_mask_that_cannot_be_honoured_is_refused(mask: list[int], message: str) -> None:
    with pytest.raises(UsageError, match=f"^Row 0: {message}"):
        run([{"input_ids": [5, 6, 7], "attention_mask": mask}])


@pytest.mark.parametrize(
    "columns",
    [
        {"position_ids": [0, 1, 2, 0, 1]},
        {"seq_lengths": [3, 2]},
        {"position_ids": [0, 1, 2, 0, 1], "seq_lengths": [3, 2]},
    ],
)
def test_packed_documents_are_rows_of_one_row_of_the_split(columns: Row) -> None:
    other = {"input_ids": [4], **{name: [0] if name == "position_ids" else [1] for name in columns}}
    found = run([other, {"input_ids": [5, 6, 7, 8, 9], **columns}])
    assert found["input_ids"][:] == [[4], [5, 6, 7], [8, 9]]
    assert found["source_row"][:] == [0, 1, 1]
    assert warnings_of(found) == ["1 row (row 1): they became 2 rows, because they hold packed documents."]


def test_packed_documents_keep_their_completions_and_lose_their_padding() -> None:
    row = {
        "input_ids": [0, 5, 6, 7, 8, 0],
        "attention_mask": [0, 1, 1, 1, 1, 0],
        "position_ids": [1, 0, 1, 0, 1, 1],
        "labels": [-100, -100, 6, -100, 8, -100],
    }
    found = run([row], completion_only=True)
    assert (found["input_ids"][:], found["completion_mask"][:]) == ([[5, 6], [7, 8]], [[0, 1], [0, 1]])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"position_ids": [3, 4, 5, 6, 7]}, "its 'position_ids' do not count 0, 1, 2"),
        ({"position_ids": [0, 1, 1, 0, 1]}, "its 'position_ids' do not count 0, 1, 2"),
        ({"position_ids": [0, 1, 2, 0, 1], "seq_lengths": [2, 3]}, "its 'position_ids' do not count 0, 1, 2"),
        ({"position_ids": [0, 1]}, "'position_ids' must be one number per token, got a list of 2"),
        ({"seq_lengths": [3, 3]}, "'seq_lengths' must sum to the row's 5 tokens, got a list of 2"),
        ({"seq_lengths": [6, -1]}, "'seq_lengths' must sum to the row's 5 tokens, got a list of 2"),
    ],
)
def test_documents_whose_bounds_contradict_the_row_are_refused(columns: Row, message: str) -> None:
    with pytest.raises(UsageError, match=f"^Row 0: {message}"):
        run([{"input_ids": [5, 6, 7, 8, 9], **columns}])


def test_positions_that_only_count_are_no_packed_documents() -> None:
    """Left-padded rows have any numbers before their first token."""
    rows = [
        {"input_ids": [5, 6, 7], "position_ids": [0, 1, 2], "attention_mask": [1, 1, 1], "seq_lengths": [3]},
        {"input_ids": [0, 6, 7], "position_ids": [1, 0, 1], "attention_mask": [0, 1, 1], "seq_lengths": None},
    ]
    assert run(rows)["input_ids"][:] == [[5, 6, 7], [6, 7]]


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("labels", [-100, -100, 7, 8]),
        ("assistant_masks", [0, 0, 1, 1]),
        ("loss_mask", [0, 0, 1, 1]),
        ("completion_mask", [0, 0, 1, 1]),
    ],
)
def test_any_of_four_columns_says_what_the_completion_is(column: str, value: list[int]) -> None:
    found = run([{"input_ids": [5, 6, 7, 8], column: value}], completion_only=True)
    assert found["completion_mask"][:] == [[0, 0, 1, 1]]


def test_the_completion_of_a_padded_row_moves_along_with_its_tokens() -> None:
    row = {"input_ids": [0, 5, 6, 7], "attention_mask": [0, 1, 1, 1], "labels": [-100, -100, -100, 7]}
    found = run([row], completion_only=True)
    assert (found["input_ids"][0], found["completion_mask"][0]) == ([5, 6, 7], [0, 0, 1])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            [6, 7, -100],
            r"label 0 is 6, the row's token there 5\. Labels must be the row's own tokens, not shifted, or -100",
        ),
        ([-100, 6], "'labels' must be 3 token ids, one per token, got a list of 2"),
        (None, "'labels' must be 3 token ids, one per token, got nothing"),
    ],
)
def test_labels_that_are_not_the_rows_own_tokens_are_refused(labels: Any, message: str) -> None:
    with pytest.raises(UsageError, match=f"^Row 0: {message}"):
        run([{"input_ids": [5, 6, 7], "labels": labels}], completion_only=True)


# Conversations.


@pytest.mark.parametrize("as_text", [False, True], ids=["a list", "JSON text"])
def test_tools_go_into_every_rendering(with_tools: Any, as_text: bool) -> None:
    row = {"messages": [HELLO, ANSWER], "tools": json.dumps(TOOLS) if as_text else TOOLS}
    found = run([row], with_tools, completion_only=True)
    assert found["input_ids"][0] == rendered(with_tools, [HELLO, ANSWER], tools=TOOLS)
    answer = with_tools("Good day<|end|>")["input_ids"]
    assert sum(found["completion_mask"][0]) == len(answer)
    assert found["input_ids"][0][-len(answer) :] == answer


def test_rows_without_tools_beside_rows_with_tools_are_rendered_without(with_tools: Any) -> None:
    rows = [{"messages": [HELLO], "tools": json.dumps(TOOLS)}, {"messages": [HELLO], "tools": ""}]
    expected = [rendered(with_tools, [HELLO], tools=TOOLS), rendered(with_tools, [HELLO])]
    assert run(rows, with_tools)["input_ids"][:] == expected


def test_options_of_the_template_are_passed_on_row_by_row(with_tools: Any) -> None:
    rows = [{"messages": [HELLO], "chat_template_kwargs": {"effort": effort}} for effort in ("high", None)]
    expected = [rendered(with_tools, [HELLO], effort="high"), rendered(with_tools, [HELLO])]
    assert run(rows, with_tools)["input_ids"][:] == expected


def test_members_that_arrow_fills_in_are_taken_out_again(with_tools: Any) -> None:
    """In one column two calls with different arguments each have the other's too, as nothing."""
    chats = [
        [
            HELLO,
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
        ]
        for arguments in ({"city": "Oslo"}, {"zone": "CET"})
    ]
    split = datasets.Dataset.from_list([{"messages": chat} for chat in chats])
    filled = split[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert filled == {"city": "Oslo", "zone": None}
    assert run(split, with_tools)["input_ids"][:] == [rendered(with_tools, chat) for chat in chats]


def test_a_null_that_json_text_itself_names_stays(with_tools: Any) -> None:
    tools = [{"function": {"name": "weather", "parameters": {"city": {"default": None}}}}]
    found = run([{"messages": [HELLO], "tools": json.dumps(tools)}], with_tools)["input_ids"][0]
    assert found == rendered(with_tools, [HELLO], tools=tools)
    assert '"default": null' in with_tools.decode(found)


def test_arguments_that_are_json_text_are_not_encoded_twice(with_tools: Any) -> None:
    as_text, as_object = (
        [HELLO, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": given}}]}]
        for given in (json.dumps({"city": "Oslo"}), {"city": "Oslo"})
    )
    assert run([{"messages": as_text}], with_tools)["input_ids"][0] == rendered(with_tools, as_object)


@pytest.mark.parametrize("text", ["Oslo", "[1, 2]", "3", "null"])
def test_arguments_that_are_no_object_stay_the_text_they_are(with_tools: Any, text: str) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": text}}]}
    assert with_tools.decode(run([{"messages": [HELLO, call]}], with_tools)["input_ids"][0]) == (
        f"<|user|>Hello<|end|><|assistant|>f {json.dumps(text)}<|end|>"
    )


@pytest.mark.parametrize("content", [{"content": None}, {}], ids=["nothing", "no content"])
def test_a_call_of_a_tool_needs_no_content(with_tools: Any, content: Row) -> None:
    calls = {"tool_calls": [{"function": {"name": "f", "arguments": {"city": "Oslo"}}}]}
    found = run([{"messages": [HELLO, {"role": "assistant", **content, **calls}]}], with_tools)
    assert found["input_ids"][0] == rendered(with_tools, [HELLO, {"role": "assistant", "content": "", **calls}])


def test_parts_of_text_are_joined(with_tools: Any) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    found = run([{"messages": [{"role": "user", "content": parts}]}], with_tools)
    assert found["input_ids"][0] == rendered(with_tools, [HELLO])


@pytest.mark.parametrize("out", [{"weight": 0}, {"train": False}])
def test_a_turn_that_is_left_out_is_no_completion(with_tools: Any, out: Row) -> None:
    bad = {"role": "assistant", "content": "Bad"}
    found = run([{"messages": [HELLO, bad | out, HELLO, ANSWER]}], with_tools, completion_only=True)
    assert found["input_ids"][0] == rendered(with_tools, [HELLO, bad, HELLO, ANSWER])
    answer = with_tools("Good day<|end|>")["input_ids"]
    assert found["completion_mask"][0] == [0] * (len(found["input_ids"][0]) - len(answer)) + [1] * len(answer)


def test_a_turn_cannot_be_left_out_of_what_generation_blocks_mark() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE_WITH_GENERATION
    with pytest.raises(UsageError, match=r"^Row 0: only some of the assistant's messages are .* Remove the blocks"):
        run([{"messages": [HELLO, ANSWER | {"weight": 0}]}], tokenizer, completion_only=True)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tools", "[{", "'tools' is text that is not JSON: "),
        ("tools", "{}", "'tools' must be a list, or JSON text of it, got dict"),
        (
            "chat_template_kwargs",
            "[1]",
            "'chat_template_kwargs' must be an object, or JSON text of it, got a list of 1",
        ),
    ],
)
def test_what_a_row_gives_the_template_must_be_readable(with_tools: Any, column: str, value: str, message: str) -> None:
    with pytest.raises(UsageError, match=f"^Row 0: {message}"):
        run([{"messages": [HELLO], column: value}], with_tools)


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day"}]},
        {"conversations": [HELLO, ANSWER]},
        {"messages": json.dumps([HELLO, ANSWER])},
        {"messages": [HELLO, ANSWER], "conversations": [ANSWER, HELLO]},
    ],
    ids=["ShareGPT", "conversations", "JSON text", "messages come first"],
)
def test_conversations_are_read_as_people_have_them(with_tools: Any, row: Row) -> None:
    found = run([row], with_tools, completion_only=True)
    assert found["input_ids"][0] == rendered(with_tools, [HELLO, ANSWER])
    assert sum(found["completion_mask"][0]) == len(with_tools("Good day<|end|>")["input_ids"])


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("human", "user"),
        ("user", "user"),
        ("gpt", "assistant"),
        ("assistant", "assistant"),
        ("system", "system"),
        ("tool", "tool"),
        ("function", "tool"),
        ("observation", "tool"),
    ],
)
def test_every_name_of_a_speaker_has_its_role(with_tools: Any, speaker: str, role: str) -> None:
    found = run([{"conversations": [{"from": speaker, "value": "a"}]}], with_tools)["input_ids"][0]
    assert with_tools.decode(found) == f"<|{role}|>a<|end|>"


def test_what_a_shared_message_says_beside_its_text_counts(with_tools: Any) -> None:
    told = [("human", "a", None), ("gpt", "Bad", 0), ("human", "b", None), ("gpt", "Good day", 1)]
    chat = [{"from": speaker, "value": value, "weight": weight} for speaker, value, weight in told]
    found = run([{"conversations": chat}], with_tools, completion_only=True)
    assert sum(found["completion_mask"][0]) == len(with_tools("Good day<|end|>")["input_ids"])


def test_a_speaker_nobody_knows_is_refused(with_tools: Any) -> None:
    message = r"^Row 0, message 1: 'from' must be one of human, .*, got str 'bing'\.$"
    with pytest.raises(UsageError, match=message):
        run([{"conversations": [{"from": "human", "value": "a"}, {"from": "bing", "value": "b"}]}], with_tools)


def test_prompt_and_completion_may_be_messages(with_tools: Any) -> None:
    rows = [{"prompt": [HELLO], "completion": [ANSWER], "tools": json.dumps(TOOLS)}]
    found = run(rows, with_tools, completion_only=True)
    assert found["input_ids"][0] == rendered(with_tools, [HELLO, ANSWER], tools=TOOLS)
    asked = rendered(with_tools, [HELLO], tools=TOOLS, add_generation_prompt=True)
    assert found["completion_mask"][0] == [0] * len(asked) + [1] * (len(found["input_ids"][0]) - len(asked))
    assert run(rows, with_tools)["input_ids"][0] == found["input_ids"][0]


def test_only_completions_of_messages_need_a_fast_tokenizer(with_tools: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"prompt": [HELLO], "completion": [ANSWER]}]
    monkeypatch.setattr(type(with_tools), "is_fast", False)
    assert run(rows, with_tools)["input_ids"][0] == rendered(with_tools, [HELLO, ANSWER])
    with pytest.raises(UsageError, match=r"^--completion_only over messages needs a fast tokenizer"):
        run(rows, with_tools, completion_only=True)


def test_a_completion_begins_where_it_parts_from_the_generation_prompt() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE.replace("<|assistant|>{% endif %}", "<|assistant|><think>{% endif %}")
    found = run([{"prompt": [HELLO], "completion": [ANSWER]}], tokenizer, completion_only=True)
    assert sum(found["completion_mask"][0]) == len(tokenizer("Good day<|end|>")["input_ids"])


def test_a_template_that_rewrites_the_prompt_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}"
    with pytest.raises(
        UsageError, match=r"^Row 0, message 1: the chat template renders the messages before it differently"
    ):
        run([{"prompt": [HELLO], "completion": [ANSWER]}], tokenizer, completion_only=True)


def test_a_template_that_rewrites_what_was_asked_is_refused() -> None:
    """The answer is the last turn, so nothing that follows could give the template away."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ loop.revindex }}{{ m.content }}{% endfor %}"
    with pytest.raises(
        UsageError, match=r"^Row 0, message 1: the chat template renders the messages before it differently"
    ):
        run([{"messages": [HELLO, ANSWER]}], tokenizer, completion_only=True)


@pytest.mark.parametrize("name", ["tokenize", "tokenizer", "index", "chat"])
def test_unknown_template_options_end_in_one_line_or_change_nothing(with_tools: Any, name: str) -> None:
    row = {"messages": [HELLO], "chat_template_kwargs": {name: True}}
    if name == "tokenize":
        with pytest.raises(UsageError, match=r"^Row 0: chat_template_kwargs cannot set tokenize, "):
            run([row], with_tools)
    else:
        assert run([row], with_tools)["input_ids"][0] == rendered(with_tools, [HELLO])


@pytest.mark.parametrize("column", ["messages", "tools"])
def test_text_that_nests_too_deeply_ends_in_one_line(with_tools: Any, column: str) -> None:
    nested = "[" * 100_000 + "]" * 100_000
    hidden = f'[{{"role": "user", "content": "Hello", "more": {nested}}}]'
    row = {"messages": hidden} if column == "messages" else {"messages": [HELLO], "tools": nested}
    with pytest.raises(UsageError, match=rf"^Row 0: '{column}' is text that is not JSON: [^\n]*$"):
        run([row], with_tools)


# What is not used is said.


def test_columns_that_are_not_used_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run([{"input_ids": [5, 6], "labels": [-100, 6], "source": "web", "token_type_ids": [0, 0]}])
        run([{"prompt": "a", "completion": "b", "tools": "[]"}], make_tokenizer())
    assert "Columns not used: labels, source, token_type_ids." in caplog.messages
    assert "Columns not used: tools." in caplog.messages


def test_nothing_is_said_where_every_column_is_used(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run([{"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [-100, 6]}], completion_only=True)
    assert not [message for message in caplog.messages if "not used" in message]


def test_a_template_that_shows_the_teacher_no_tools_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHAT_TEMPLATE
    run([{"messages": [HELLO], "tools": json.dumps(TOOLS)}], tokenizer)
    assert "The rows have tools, but the teacher's chat template shows it none." in caplog.messages


def test_a_template_that_shows_the_teacher_its_tools_is_not_warned_of(
    with_tools: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run([{"messages": [HELLO], "tools": json.dumps(TOOLS)}], with_tools)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [HELLO]}, "--add_special_tokens, --append_eos"),
        ({"text": "a"}, "--chat_template_kwargs"),
        ({"input_ids": [1, 2]}, "--chat_template_kwargs, --add_special_tokens, --append_eos"),
    ],
)
def test_options_for_other_shapes_of_rows_are_named(
    with_tools: Any, row: Row, expected: str, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = copy.deepcopy(with_tools)
    tokenizer.eos_token = "<|end|>"
    given = {"chat_template_kwargs": JsonObject("{}"), "add_special_tokens": False, "append_eos": True}
    with caplog.at_level(logging.WARNING):
        run([row], tokenizer, **given)
    assert caplog.messages == [f"Not used for rows of this shape: {expected}."]
