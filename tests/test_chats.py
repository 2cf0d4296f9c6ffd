"""Conversations become what the teacher reads at every turn, whatever their chat template does with earlier turns."""

import functools
import importlib.util
import json
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
import pytest
import torch
from conftest import CHAT_TEMPLATE, ROOT, make_llama, make_tokenizer, save_teacher, write_jsonl
from families import assert_row_is_right
from transformers import AutoModelForCausalLM, AutoTokenizer

from logitgen import LogitsFile
from logitgen.config import Config
from logitgen.errors import UsageError
from logitgen.split.encoded import remarks
from logitgen.split.load import load_split
from logitgen.split.tokens import tokenize
from logitgen.values import JsonObject

Row = dict[str, Any]
trl = importlib.util.find_spec("trl")
assert trl
assert trl.origin
TEMPLATES = Path(trl.origin).parent / "chat_templates"
BAR = "\N{FULLWIDTH VERTICAL LINE}"


def user(content: str) -> Row:
    return {"role": "user", "content": content}


def said(content: str, **more: Any) -> Row:
    return {"role": "assistant", "content": content, **more}


CALL = said("", tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}])
RESULT = {"role": "tool", "name": "weather", "content": "sun"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "w",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "description": "c"}},
                "required": ["city"],
            },
        },
    }
]


def with_template(name_or_text: str) -> Any:
    tokenizer = make_tokenizer()
    file = TEMPLATES / f"{name_or_text}.jinja"
    tokenizer.chat_template = file.read_text(encoding="utf-8") if "{" not in name_or_text else name_or_text
    tokenizer.bos_token = tokenizer.bos_token or "<|user|>"
    return tokenizer


def run(rows: list[Row], tokenizer: Any, **options: Any) -> datasets.Dataset:
    config = Config(teacher="m", dataset="d", output="o.h5", **options)
    return tokenize(datasets.Dataset.from_list(rows), tokenizer, config)


def completions(found: datasets.Dataset, tokenizer: Any) -> list[list[str]]:
    """The texts of the captured stretches of every row."""
    texts = []
    for ids, mask in zip(found["input_ids"], found["completion_mask"], strict=True):
        marks = [0, *mask, 0]
        bounds = [place for place in range(len(marks) - 1) if marks[place] != marks[place + 1]]
        texts.append([tokenizer.decode(ids[a:b]) for a, b in zip(bounds[::2], bounds[1::2], strict=True)])
    return texts


def warnings_of(found: datasets.Dataset) -> list[str]:
    return [str(remark) for remark in remarks(found)]


def rendered(tokenizer: Any, messages: list[Row], **options: Any) -> list[int]:
    """The tokens as transformers renders them by itself."""
    return list(tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)["input_ids"])


# One row, or a row per turn.


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("qwen2_5", [["Yo<|im_end|>\n", "Sure<|im_end|>\n"]]),
        ("qwen3", [["<think>\n\n</think>\n\nYo<|im_end|>\n"], ["<think>\n\n</think>\n\nSure<|im_end|>\n"]]),
        ("qwen3_5_nothink", [["Yo<|im_end|>\n"], ["Sure<|im_end|>\n"]]),
        ("qwen3_8", [["\n</think>\n\nYo<|im_end|>\n", "\n</think>\n\nSure<|im_end|>\n"]]),
        ("gptoss", [[f"<|channel|>final<|message|>{text}<|return|>"] for text in ("Yo", "Sure")]),
        ("deepseek_r1_distill", [[f"{text}<{BAR}end▁of▁sentence{BAR}>" for text in ("Yo", "Sure")]]),
        ("deepseekv3", [[f"{text}<{BAR}end▁of▁sentence{BAR}>" for text in ("Yo", "Sure")]]),
        ("nemotron_3_nano", [["</think>Yo<|im_end|>\n", "</think>Sure<|im_end|>\n"]]),
        ("gemma3", [["Yo<end_of_turn>\n", "Sure<end_of_turn>\n"]]),
        ("phi3", [["Yo<|end|>\n<|end|>"], ["Sure<|end|>\n<|end|>"]]),
    ],
)
def test_every_turn_is_captured_as_the_teacher_reads_it(template: str, expected: list[list[str]]) -> None:
    tokenizer, chat = with_template(template), [user("Hi"), said("Yo"), user("More"), said("Sure")]
    found = run([{"messages": chat}], tokenizer, completion_only=True)
    assert completions(found, tokenizer) == expected
    assert found["source_row"][:] == [0] * len(expected)
    assert found["input_ids"][-1] == rendered(tokenizer, chat)
    if len(expected) > 1:
        assert found["input_ids"][0] == rendered(tokenizer, chat[:2])


REASONED = [
    user("Hi"),
    said("Yo", reasoning_content="hm"),
    user("More"),
    said("Sure", reasoning_content="ok"),
]


@pytest.mark.parametrize("template", ["qwen3", "qwen3_5_think", "qwen3_6", "nemotron_3_super", "glm4moe", "gemma4_v5"])
def test_reasoning_that_later_turns_no_longer_see_is_captured_in_its_own_row(template: str) -> None:
    tokenizer = with_template(template)
    found = run([{"messages": REASONED}], tokenizer, completion_only=True)
    first, last = completions(found, tokenizer)
    assert "hm" in first[0]
    assert "ok" in last[0]
    assert "hm" not in tokenizer.decode(found["input_ids"][1])
    for turn, row in ((1, 0), (3, 1)):
        asked = rendered(tokenizer, REASONED[:turn], add_generation_prompt=True)
        assert found["input_ids"][row][: len(asked) - 4] == asked[:-4]  # the prompt may open a block of thought


def test_turns_that_stay_as_they_are_share_a_row_beside_one_that_does_not() -> None:
    """Qwen3 keeps the thoughts since the last question: those two turns are read alike."""
    tokenizer = with_template("qwen3")
    call = CALL | {"reasoning_content": "look"}
    chat = [*REASONED[:3], call, RESULT, said("Sunny", reasoning_content="nice")]
    found = run([{"messages": json.dumps(chat)}], tokenizer, completion_only=True)
    assert [len(texts) for texts in completions(found, tokenizer)] == [1, 2]
    assert found["input_ids"][:] == [rendered(tokenizer, chat[:2]), rendered(tokenizer, chat)]


def test_rows_that_became_several_are_counted_in_a_warning() -> None:
    rows = [{"messages": [user("Hi"), said("Yo")]}, {"messages": REASONED}, {"messages": REASONED}]
    found = run(rows, with_template("qwen3"), completion_only=True)
    assert found["source_row"][:] == [0, 1, 1, 2, 2]
    assert warnings_of(found) == [
        "2 rows (first: row 1): they became 4 rows, because the chat template renders earlier turns differently "
        "once later ones follow."
    ]


def test_a_conversation_is_one_row_where_all_of_it_counts() -> None:
    tokenizer = with_template("qwen3")
    assert run([{"messages": REASONED}], tokenizer)["input_ids"][:] == [rendered(tokenizer, REASONED)]


def test_a_turn_left_out_by_its_weight_has_no_row() -> None:
    tokenizer = with_template("qwen3")
    chat = [REASONED[0], REASONED[1] | {"weight": 0}, *REASONED[2:]]
    found = run([{"messages": chat}], tokenizer, completion_only=True)
    assert found["input_ids"][:] == [rendered(tokenizer, REASONED)]


def test_messages_behind_the_last_turn_stay_where_that_turn_does() -> None:
    tokenizer, chat = with_template("qwen2_5"), [user("Hi"), said("Yo"), user("More")]
    found = run([{"messages": chat}], tokenizer, completion_only=True)
    assert found["input_ids"][:] == [rendered(tokenizer, chat)]


def test_turns_of_a_prompt_are_no_completions() -> None:
    tokenizer = with_template("qwen3")
    found = run([{"prompt": REASONED[:3], "completion": REASONED[3:]}], tokenizer, completion_only=True)
    assert completions(found, tokenizer) == [["<think>\nok\n</think>\n\nSure<|im_end|>\n"]]
    assert found["input_ids"][:] == [rendered(tokenizer, REASONED)]


def test_a_conversation_without_a_turn_of_the_assistant_is_warned_of() -> None:
    rows = [{"prompt": [user("Hi")], "completion": [user("Yo")]}, {"prompt": [user("Hi")], "completion": [said("Yo")]}]
    found = run(rows, with_template("qwen3"), completion_only=True)
    assert warnings_of(found) == ["1 row (row 0): the conversation has no turn of the assistant to capture."]


# The end of a turn.


def test_a_turn_without_an_end_mark_ends_with_the_mark_of_the_next_speaker() -> None:
    tokenizer, chat = with_template("glm4moe"), [user("Hi"), CALL, RESULT, said("Sunny"), user("Ok"), said("Bye")]
    found = run([{"messages": json.dumps(chat)}], tokenizer, completion_only=True)
    call = "\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>"
    assert completions(found, tokenizer) == [
        [f"\n<think></think>{call}<|observation|>", *(f"\n<think></think>\n{t}<|user|>" for t in ("Sunny", "Bye"))]
    ]
    whole = tokenizer.apply_chat_template(chat, tokenize=False)
    assert tokenizer.decode(found["input_ids"][0]) == f"{whole}<|user|>"


def test_a_template_with_an_end_mark_gets_no_other() -> None:
    tokenizer = with_template(CHAT_TEMPLATE)
    found = run([{"messages": [user("Hi"), said("Yo")]}], tokenizer, completion_only=True)
    assert tokenizer.decode(found["input_ids"][0]) == "<|user|>Hi<|end|><|assistant|>Yo<|end|>"


# What a template leaves out, and the forms it reads.


@pytest.mark.parametrize(
    ("template", "message", "warning"),
    [
        ("deepseek_r1_distill", said("<think>hm</think>Yo"), "leaves out part of a message's content"),
        ("qwen2_5", said("Yo", reasoning_content="hm"), "leaves out the reasoning of a message"),
        ("lfm2", CALL, "leaves out a tool call"),
    ],
)
@pytest.mark.parametrize("completion_only", [False, True])
def test_what_a_template_leaves_out_is_warned_of_and_counted(
    template: str, message: Row, warning: str, completion_only: bool
) -> None:
    rows = [{"messages": json.dumps(chat)} for chat in ([user("Hi"), said("Yo")], *[[user("Hi"), message]] * 2)]
    for _ in ("anew", "from the cache"):
        found = run(rows, with_template(template), completion_only=completion_only)
        assert warnings_of(found) == [f"2 rows (first: row 1): the chat template {warning}."]


@pytest.mark.parametrize("template", ["qwen3", "qwen3_6", "glm4moe", "nemotron_3_nano"])
def test_thoughts_a_template_only_moves_are_not_warned_of(template: str) -> None:
    chat = [user(" Hi "), said("<think>\nhm\n</think>\n\nYo")]
    assert not warnings_of(run([{"messages": chat}], with_template(template)))


@pytest.mark.parametrize("template", ["smolvlm", "idefics3", "llava_next"])
def test_a_template_that_reads_only_parts_gets_parts(template: str) -> None:
    tokenizer = with_template(template)
    found = run([{"messages": [user("Hello"), said("Good day")]}], tokenizer)
    parts = [
        message | {"content": [{"type": "text", "text": message["content"]}]}
        for message in (user("Hello"), said("Good day"))
    ]
    assert found["input_ids"][0] == rendered(tokenizer, parts)
    assert "Hello" in tokenizer.decode(found["input_ids"][0])


@pytest.mark.parametrize("as_text", [False, True], ids=["object", "text"])
@pytest.mark.parametrize(("template", "wants_text"), [("deepseekv3", True), ("qwen2_5", False), ("llama3_1", False)])
def test_arguments_reach_a_template_in_the_form_it_reads(template: str, wants_text: bool, as_text: bool) -> None:
    tokenizer = with_template(template)

    def call(text: bool) -> Row:
        arguments: Any = {"city": "Oslo"}
        function = {"name": "weather", "arguments": json.dumps(arguments) if text else arguments}
        return said("", tool_calls=[{"type": "function", "function": function}])

    found = run([{"messages": json.dumps([user("Hi"), call(as_text)])}], tokenizer)
    assert found["input_ids"][0] == rendered(tokenizer, [user("Hi"), call(wants_text)])
    assert "Oslo" in tokenizer.decode(found["input_ids"][0])


# Options of the template.


def test_a_template_can_be_given_as_a_file(tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(CHAT_TEMPLATE, encoding="utf-8")
    bare, whole = make_tokenizer(), with_template(CHAT_TEMPLATE)
    bare.chat_template = None
    found = run([{"messages": [user("Hi")]}], bare, chat_template=str(file))
    assert found["input_ids"][0] == rendered(whole, [user("Hi")])


def test_a_template_can_be_chosen_by_its_name() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {
        "default": CHAT_TEMPLATE,
        "loud": CHAT_TEMPLATE.replace("['content']", "['content'] | upper"),
    }
    rows = [{"messages": [user("Hi")]}]
    texts = [
        tokenizer.decode(run(rows, tokenizer, **chosen)["input_ids"][0]) for chosen in ({}, {"chat_template": "loud"})
    ]
    assert texts == ["<|user|>Hi<|end|>", "<|user|>HI<|end|>"]


def test_rows_with_tools_get_the_template_for_tools() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": "{{ tools | length }}" + CHAT_TEMPLATE}
    rows = [{"messages": [user("Hi")], "tools": tools} for tools in (json.dumps(TOOLS), None)]
    texts = [tokenizer.decode(ids) for ids in run(rows, tokenizer)["input_ids"]]
    assert texts == ["1<|user|>Hi<|end|>", "<|user|>Hi<|end|>"]


@pytest.mark.parametrize(
    ("own", "chosen", "message"),
    [
        (None, None, r"The rows are messages, but the tokenizer of m has no chat template\. .*--chat_template FILE"),
        (CHAT_TEMPLATE, "nowhere.jinja", r"--chat_template nowhere\.jinja is not a file\.$"),
        ({"a": "x", "b": "y"}, "c", r"--chat_template c is not a file nor one of the tokenizer's templates: a, b\.$"),
        (
            {"a": "x", "b": "y"},
            None,
            r".* several chat templates and no default\. Choose one with --chat_template: a, b",
        ),
    ],
)
def test_a_template_that_cannot_be_found_is_refused(own: Any, chosen: str | None, message: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = own
    with pytest.raises(UsageError, match=f"^{message}"):
        run([{"messages": [user("Hi")]}], tokenizer, chat_template=chosen)


def test_options_of_the_template_hold_for_every_row_and_a_rows_own_win() -> None:
    tokenizer = with_template("qwen3")
    rows = [{"messages": [user("Hi")], "chat_template_kwargs": own} for own in (None, '{"enable_thinking": true}')]
    given = JsonObject('{"enable_thinking": false}')
    found = run([row | {"messages": [user("Hi"), said("Yo")]} for row in rows], tokenizer, chat_template_kwargs=given)
    assert found["input_ids"][0] == rendered(tokenizer, [user("Hi"), said("Yo")], enable_thinking=False)
    gpt = with_template("gptoss")
    found = run([{"messages": [user("Hi")]}], gpt, chat_template_kwargs=JsonObject('{"reasoning_effort": "high"}'))
    assert "Reasoning: high" in gpt.decode(found["input_ids"][0])


@pytest.mark.parametrize(
    ("template", "shown"), [("gptoss", "2026-01-31"), ("llama3_2", "31 Jan 2026"), ("muse_glimmer", "2026-01-31")]
)
def test_a_template_prints_the_date_of_the_run(template: str, shown: str) -> None:
    tokenizer = with_template(template)
    found = run([{"messages": [user("Hi"), said("Yo")]}], tokenizer, chat_template_date="2026-01-31")
    text = tokenizer.decode(found["input_ids"][0])
    assert shown in text
    today = date.today()
    assert today.isoformat() not in text
    assert today.strftime("%d %b %Y") not in text


def test_a_date_that_the_template_computes_is_refused() -> None:
    tokenizer = with_template("{% set format = '%Y' %}{{ strftime_now(format) }}" + CHAT_TEMPLATE)
    with pytest.raises(UsageError, match=r"^The chat template prints today's date in a format that it computes"):
        run([{"messages": [user("Hi")]}], tokenizer)


def test_a_column_of_messages_can_be_named() -> None:
    tokenizer = with_template(CHAT_TEMPLATE)
    found = run([{"dialog": [user("Hi")], "text": "no"}], tokenizer, messages_column="dialog")
    assert found["input_ids"][0] == rendered(tokenizer, [user("Hi")])
    with pytest.raises(
        UsageError, match=r"^--messages_column talk is not a column; the split has columns dialog\. Name one of them\.$"
    ):
        run([{"dialog": [user("Hi")]}], tokenizer, messages_column="talk")


# All templates that TRL ships, single and several turns, with reasoning and tools.

NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))
SINGLE = [user("Hi"), said("Yo")]
CHATS = {
    "one turn": SINGLE,
    "several turns": [*SINGLE, user("More"), said("Sure")],
    "with reasoning": REASONED,
    "with tool calls": [user("Hi"), CALL, RESULT, said("Sunny")],
}
IN_PARTS = ("smolvlm", "idefics3", "llava_next")
WITH_TEXT_ARGUMENTS = ("deepseekv3",)


def row_of(kind: str) -> Row:
    return {"messages": json.dumps(CHATS[kind])} | ({"tools": json.dumps(TOOLS)} if kind == "with tool calls" else {})


def directly(tokenizer: Any, name: str, kind: str, num_messages: int) -> str:
    """Render the beginning of a conversation as transformers does by itself, in the form that the template reads."""
    chat = json.loads(json.dumps(CHATS[kind][:num_messages]))
    for message in chat:
        if name.removesuffix("_training") in IN_PARTS:
            message["content"] = [{"type": "text", "text": message["content"]}]
        for call in message.get("tool_calls", ()) if name in WITH_TEXT_ARGUMENTS else ():
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    given = {"tools": TOOLS} if kind == "with tool calls" else {}
    return str(tokenizer.apply_chat_template(chat, tokenize=False, **given))


@functools.cache
def captured(name: str, kind: str) -> datasets.Dataset | None:
    """The rows of a conversation with one of TRL's templates, or None where it is refused."""
    try:
        return run([row_of(kind)], with_template(name), completion_only=True)
    except UsageError:
        return None


@pytest.mark.parametrize("kind", CHATS)
@pytest.mark.parametrize("name", NAMES)
def test_every_row_is_what_the_template_itself_renders(name: str, kind: str) -> None:
    """And every turn is captured once, with all that it says and nothing that the user says."""
    tokenizer, found = with_template(name), captured(name, kind)
    if found is None:
        with pytest.raises(jinja2.TemplateError):
            directly(tokenizer, name, kind, len(CHATS[kind]))
        return
    beginnings = []
    for end, message in enumerate(CHATS[kind], start=1):
        if message["role"] == "assistant":
            beginnings.append(directly(tokenizer, name, kind, end))
    beginnings += [f"{text}<|{role}|>" for text in beginnings for role in ("user", "observation")]
    assert {tokenizer.decode(ids) for ids in found["input_ids"]} <= set(beginnings)
    turns = [text for texts in completions(found, tokenizer) for text in texts]
    spoken = [message["content"] for message in CHATS[kind] if message["role"] == "assistant"]
    assert len(turns) == len(spoken)
    for text, content in zip(turns, spoken, strict=True):
        assert content in text
        assert "Hi" not in text
        assert "More" not in text
        assert "sun" not in text


def outcome(name: str, kind: str) -> str:
    found = captured(name, kind)
    if found is None:
        return "refused"
    return "1 row" if len(found) == 1 else f"{len(found)} rows"


def test_the_table_of_templates_in_the_documentation_is_true() -> None:
    kinds = list(CHATS)[1:]
    table: dict[tuple[str, ...], list[str]] = {}
    for name in NAMES:
        if not name.endswith("_training"):
            table.setdefault(tuple(outcome(name, kind) for kind in kinds), []).append(name)
    expected = [f"| {', '.join(names)} | {' | '.join(outcomes)} |" for outcomes, names in sorted(table.items())]
    lines = (ROOT / "docs/data.md").read_text(encoding="utf-8").splitlines()
    start = lines.index(f"| templates | {' | '.join(kinds)} |")
    assert lines[start + 2 : start + 2 + len(expected) + 1] == [*expected, ""]


# Through to the file.


def save_with_template(folder: Path, name: str) -> Path:
    return save_teacher(folder / "teacher", make_llama(), with_template(name))


def assert_row_is_a_direct_pass(teacher: Path, row: Row) -> None:
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    with torch.no_grad():
        logits_TV = model(torch.from_numpy(row["input_ids"].astype(np.int64))[None]).logits[0]
    assert_row_is_right(row, logits_TV.log_softmax(-1))


def test_the_rows_of_a_conversation_are_captured_as_direct_forward_passes(
    capture: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = save_with_template(tmp_path, "qwen3")
    rows = write_jsonl(tmp_path / "d.jsonl", [{"messages": SINGLE}, {"messages": REASONED}])
    file = LogitsFile(capture(teacher=teacher, dataset=rows, completion_only=True))
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    expected = [rendered(tokenizer, chat) for chat in (SINGLE, REASONED[:2], REASONED)]
    assert [file.row(number)["input_ids"].tolist() for number in range(len(file))] == expected
    assert file.arrays["source_row"].tolist() == [0, 1, 1]
    for number in range(len(file)):
        assert len(file.row(number)["positions"])
        assert_row_is_a_direct_pass(teacher, file.row(number))


def test_packed_documents_are_captured_as_direct_forward_passes(
    capture: Callable[..., Path], teacher: Path, tmp_path: Path
) -> None:
    rows = [{"input_ids": [5, 6, 7, 8, 9], "position_ids": [0, 1, 2, 0, 1]}]
    file = LogitsFile(capture(teacher=teacher, dataset=write_jsonl(tmp_path / "d.jsonl", rows)))
    assert [file.row(number)["input_ids"].tolist() for number in (0, 1)] == [[5, 6, 7], [8, 9]]
    assert file.arrays["source_row"].tolist() == [0, 0]
    for number in (0, 1):
        assert_row_is_a_direct_pass(teacher, file.row(number))


def test_a_run_that_goes_on_another_day_keeps_the_date_of_its_first_start(
    capture: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = save_with_template(tmp_path, "llama3_2")
    rows = write_jsonl(tmp_path / "d.jsonl", [{"messages": SINGLE}])
    path = capture(teacher=teacher, dataset=rows, chat_template_date="2020-02-29")
    before = path.read_bytes()
    assert LogitsFile(path).attributes["chat_template_date"] == "2020-02-29"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "elsewhere"))
    assert capture(teacher=teacher, dataset=rows).read_bytes() == before
    assert "Nothing is left to do." in (tmp_path / "logs" / "rank_0.log").read_text()
    with pytest.raises(UsageError, match=r"chat_template_date 2020-02-29 and 2020-03-01"):
        capture(teacher=teacher, dataset=rows, chat_template_date="2020-03-01")


def test_a_file_whose_rows_print_no_date_holds_none(capture: Callable[..., Path], tmp_path: Path) -> None:
    teacher = save_with_template(tmp_path, "llama3_2")
    texts = write_jsonl(tmp_path / "d.jsonl", [{"text": "some words"}])
    attributes = LogitsFile(capture(teacher=teacher, dataset=texts)).attributes
    assert (attributes["chat_template_date"], attributes["chat_template_fingerprint"]) == ("", "")


def test_other_options_of_the_template_are_another_run(capture: Callable[..., Path], tmp_path: Path) -> None:
    teacher = save_with_template(tmp_path, "qwen3")
    rows = write_jsonl(tmp_path / "d.jsonl", [{"messages": SINGLE}])
    capture(teacher=teacher, dataset=rows)
    with pytest.raises(UsageError, match=r"the chat template or its options"):
        capture(teacher=teacher, dataset=rows, chat_template=TEMPLATES / "qwen2_5.jinja")


# Borders of turns, found by an attack on them.


def test_an_answer_keeps_the_character_it_shares_with_the_thought_a_prompt_opens() -> None:
    tokenizer = with_template("deepseek_r1_distill")
    tokenizer.add_tokens(["<think>", f"<{BAR}Assistant{BAR}>"], special_tokens=True)
    found = run([{"messages": [user("Hi"), said("<b>x")]}], tokenizer, completion_only=True)
    assert completions(found, tokenizer) == [[f"<b>x<{BAR}end▁of▁sentence{BAR}>"]]


@pytest.mark.parametrize(
    "template",
    [
        "{% if add_generation_prompt %}<|user|>{% endif %}" + CHAT_TEMPLATE,
        "{% if not add_generation_prompt %}T{% endif %}" + CHAT_TEMPLATE,
    ],
)
def test_a_prompt_that_changes_the_beginning_of_the_text_is_refused(template: str) -> None:
    with pytest.raises(UsageError, match=r"^Row 0, message 1: the chat template renders the messages before it diff"):
        run([{"messages": [user("Hi secret"), said("Yo")]}], with_template(template), completion_only=True)


def test_a_first_turn_of_the_assistant_is_found_behind_words_of_the_system() -> None:
    template = "SYS Assistant: is meant\n{% for m in messages %}Assistant:{{ m.content }}</s>{% endfor %}"
    tokenizer = with_template(template + "{% if add_generation_prompt %}Assistant:{% endif %}")
    found = run([{"messages": [said("Yo")]}], tokenizer, completion_only=True)
    assert completions(found, tokenizer) == [["Yo</s>"]]
    with pytest.raises(UsageError, match=r"^Row 0: the conversation begins with the assistant, and the chat template"):
        run([{"messages": [said("Yo")]}], with_template(template), completion_only=True)


def test_arguments_that_a_template_writes_as_they_are_stay_json() -> None:
    template = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.arguments }}{% endfor %}{% endfor %}"
    )
    tokenizer = with_template(template)
    found = run([{"messages": json.dumps([user("Hi"), CALL])}], tokenizer)
    assert tokenizer.decode(found["input_ids"][0]) == '{"city": "Oslo"}'


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        ('strftime_now ( "%Y-%m-%d" )', "2026-01-31"),
        (r"strftime_now('%Y\n%m')", "2026\n01"),
        ("strftime_now('%d %b') if strftime_now is defined else 'never'", "31 Jan"),
    ],
)
def test_a_date_is_fixed_however_a_template_asks_for_it(call: str, shown: str) -> None:
    tokenizer = with_template("{{ " + call + " }}")
    found = run([{"messages": [user("Hi")]}], tokenizer, chat_template_date="2026-01-31")
    assert tokenizer.decode(found["input_ids"][0]) == shown


def test_a_date_by_another_name_is_refused() -> None:
    tokenizer = with_template("{% set now = strftime_now %}{{ now('%Y') }}")
    with pytest.raises(UsageError, match=r"^The chat template prints today's date in a format that it computes"):
        run([{"messages": [user("Hi")]}], tokenizer)


def test_a_null_that_was_written_is_kept_and_one_of_arrow_is_not(tmp_path: Path) -> None:
    def calling(**arguments: Any) -> list[Row]:
        return [said("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": arguments}}])]

    tokenizer, config = with_template("qwen2_5"), Config(teacher="m", dataset=str(tmp_path / "rows.jsonl"), output="o")
    chats = [calling(city="Oslo"), calling(city="Oslo", unit=None), calling(city="Oslo", unit="K")]
    expected = [rendered(tokenizer, chat) for chat in chats]
    assert len(set(map(tuple, expected))) == 3
    assert run([{"messages": json.dumps(chat)} for chat in chats], tokenizer)["input_ids"][:] == expected
    rows = [{"messages": chat} for chat in chats]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    found = tokenize(load_split(config), tokenizer, config)
    assert found["input_ids"][:] == expected
    (warning,) = warnings_of(found)
    assert warning.startswith("1 row (row 1): tools, tool calls or other objects have null members, which the chat")
    found = run(rows, tokenizer)
    assert found["input_ids"][:] == [expected[0], expected[0], expected[2]]
    assert not warnings_of(found)


@pytest.mark.parametrize("out", [{"weight": "0"}, {"train": 0}, {"train": "false"}])
def test_a_turn_can_be_left_out_in_several_words(out: Row) -> None:
    tokenizer = with_template(CHAT_TEMPLATE)
    chat = [user("Hi"), said("Bad", **out), user("Hi"), said("Yo")]
    found = run([{"messages": chat}], tokenizer, completion_only=True)
    assert completions(found, tokenizer) == [["Yo<|end|>"]]


def test_names_of_sharegpt_are_understood_as_roles_too() -> None:
    tokenizer = with_template(CHAT_TEMPLATE)
    chat = [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Yo"}]
    found = run([{"messages": chat}], tokenizer, completion_only=True)
    assert completions(found, tokenizer) == [["Yo<|end|>"]]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": '[{"role": "user", "content": "a\\ud800b"}]'},
        {"messages": '[{"from": ["x"], "value": "y"}]'},
    ],
)
def test_hostile_messages_end_in_one_line(row: Row) -> None:
    with pytest.raises(UsageError, match=r"^Row 0"):
        run([row], with_template(CHAT_TEMPLATE))


def test_rows_saved_for_another_library_are_read_as_lists() -> None:
    split = datasets.Dataset.from_list([{"input_ids": [5, 6], "attention_mask": [1.0, 0.0]}]).with_format("numpy")
    found = tokenize(split, None, Config(teacher="m", dataset="d", output="o.h5"))
    assert found["input_ids"][:] == [[5]]
