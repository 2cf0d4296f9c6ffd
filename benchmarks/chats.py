"""Conversations turned into tokens and completions, against rendering and tokenising each once.

    python -m benchmarks.chats --teacher FOLDER --rows 10000

A chat has `--turns` turns. One template renders earlier turns alike whatever follows, so a chat is one row. The other
drops the thoughts of earlier turns, so every turn of the assistant has a row of its own.
"""

import time
from functools import partial

import datasets
import numpy as np
from transformers import AutoTokenizer

from benchmarks.harness import Row, Spread, in_turns, parse, write_report
from benchmarks.head import seconds_of
from logitgen.config import Config
from logitgen.split.tokens import tokenize

_SAID = "{% if m.thought and loop.last %}<think>{{ m.thought }}</think>{% endif %}{{ m.content }}<|im_end|>\n"
_START = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
_END = "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {"keeps": _START + _SAID.replace(" and loop.last", "") + _END, "forgets": _START + _SAID + _END}
AUTHORS = {"role": "user"}, {"role": "assistant", "thought": "some words of thought"}


def make_chats(num_chats: int, num_turns: int) -> list[Row]:
    """Make up chats whose messages have some 30 words each."""
    words = np.random.default_rng(0).choice(["alpha", "beta", "gamma", "delta", "epsilon"], (num_chats, num_turns, 30))
    return [
        {"messages": [AUTHORS[turn % 2] | {"content": " ".join(said)} for turn, said in enumerate(chat)]}
        for chat in words
    ]


def main() -> None:
    """Measure the ways in turns, for both templates."""
    options = parse(__doc__, teacher=str, rows=10_000, turns=10, rounds=2)
    datasets.disable_progress_bars()
    tokenizer, chats = AutoTokenizer.from_pretrained(options.teacher), make_chats(options.rows, options.turns)
    split, table = datasets.Dataset.from_list(chats), []

    def once() -> None:
        texts = [tokenizer.apply_chat_template(chat["messages"], tokenize=False) for chat in chats]
        for start in range(0, len(texts), 1000):
            tokenizer(texts[start : start + 1000], add_special_tokens=False)

    def ours(**how: bool) -> datasets.Dataset:
        split._fingerprint = f"chats {time.time()}"  # nothing is cached
        return tokenize(split, tokenizer, Config(teacher="none", dataset="none", output="none", **how))

    for name, template in TEMPLATES.items():
        tokenizer.chat_template = template
        ways = {"once, by hand": once, "whole chats": ours, "completions": partial(ours, completion_only=True)}
        found = in_turns({way: partial(seconds_of, call) for way, call in ways.items()}, options.rounds)
        num_rows = dict.fromkeys(ways, options.rows) | {"completions": len(ours(completion_only=True))}
        table += [
            {
                "template": name,
                "way": way,
                "rows": num_rows[way],
                "chats/s": Spread.of([options.rows / value for value in seconds]),
                "time, by hand = 1": Spread.of(seconds, found["once, by hand"]),
            }
            for way, seconds in found.items()
        ]
    write_report(options.output, "chats", table, {"time, by hand = 1": ".2f"})


if __name__ == "__main__":
    main()
