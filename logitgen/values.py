"""Values of options that are more than a number or a text: each is read from one word, or refused in one line."""

import argparse
import json
import re
import sys
from decimal import Decimal


class TokenBudget(int):
    """A number of tokens. The word `auto` is stored as the largest number, for as many as fit."""

    def __new__(cls, text: str) -> "TokenBudget":
        """Read the value of the option.

        Raises:
            ArgumentTypeError: It is neither a whole number nor `auto`.
        """
        try:
            return super().__new__(cls, sys.maxsize if text == "auto" else text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"expected a whole number or auto, got '{text}'") from error

    @property
    def is_auto(self) -> bool:
        """True if the number is still to be found."""
        return self == sys.maxsize


_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?) ?(?:([kmgt]i?)?b)?", re.IGNORECASE)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class FileSize(int):
    """A size in bytes, written as 200GB, 1.5TB, 800MiB or plain bytes."""

    def __new__(cls, text: str) -> "FileSize":
        """Read the value of the option.

        Raises:
            ArgumentTypeError: It is no size. A unit without its B is none: it may be meant in either system.
        """
        match = _SIZE.fullmatch(str(text))
        if not match:
            raise argparse.ArgumentTypeError(f"expected a size such as 200GB, 800MiB or plain bytes, got '{text:.80}'")
        return super().__new__(cls, int(Decimal(match[1]) * _UNITS[(match[2] or "").lower()]))


class Layers(str):
    """Numbers of layers, written as 2,16,30 in ascending order: equal for equal layers."""

    def __new__(cls, text: str) -> "Layers":
        """Read the value of the option.

        Raises:
            ArgumentTypeError: It is no such list, or names a layer twice.
        """
        if not re.fullmatch(r" *[0-9]{1,6} *(, *[0-9]{1,6} *)*", text, re.ASCII):
            raise argparse.ArgumentTypeError(f"expected numbers of layers from 0 on, such as 2,16,30, got '{text:.80}'")
        numbers = sorted(map(int, text.split(",")))
        if len(set(numbers)) < len(numbers):
            raise argparse.ArgumentTypeError(f"expected every layer once, got '{text:.80}'")
        return super().__new__(cls, ",".join(map(str, numbers)))


class JsonObject(str):
    """JSON text of an object, with its names in order: equal for equal objects."""

    def __new__(cls, text: str) -> "JsonObject":
        """Read the value of the option.

        Raises:
            ArgumentTypeError: It is not JSON, or not an object.
        """
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise argparse.ArgumentTypeError(f"expected a JSON object, got '{text:.80}' ({error})") from error
        if not isinstance(value, dict):
            raise argparse.ArgumentTypeError(f"expected a JSON object, got '{text:.80}'")
        return super().__new__(cls, json.dumps(value, sort_keys=True))
