"""Check the opcodes of a pickle before anything reads it.

Python's own reader trusts its input: a few bytes make it reserve gigabytes, hash one tuple for hours or overflow the C stack.
This module goes through the opcodes first. It makes no object, and it takes time and memory in proportion to the file.
"""

import functools
import pickle
import pickletools
import re

MAX_TUPLE = 1000  # parts of a tuple, those of the tuples inside it included: a key of a dict is hashed part by part
MAX_INTEGER = 32  # bytes of an integer; digits of one written as text are at most three times as many
MAX_NUMBER_KEYS = 10_000  # keys that are numbers, which can be chosen so that all of them collide
BATCH = 16  # caption rows that are skipped together


class RefusedPickle(ValueError):
    """The pickle asks for something a feature file has no use for; the message names it."""


# What an opcode does to the stack. The stack here holds one integer per value: the number of parts of a tuple, or one of these.
_TEXT, _NUMBER, _OTHER = -1, -2, 0
_PUSH_TEXT = "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8"
_PUSH_NUMBER = "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT"
_FILL_DICT = {"SETITEM": 1, "SETITEMS": 1, "DICT": 0, "ADDITEMS": 1}
_POP_TO_MARK = {"APPENDS": 1, "LIST": 0, "OBJ": 0, "INST": 0, "POP_MARK": None}
_REPLACE = {"REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3, "STACK_GLOBAL": 2, "BINPERSID": 1, "APPEND": 2, "BUILD": 2}
_REFUSED = "EXT1 EXT2 EXT4 NEXT_BUFFER READONLY_BUFFER FROZENSET"
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3, "EMPTY_TUPLE": 0}
_LENGTH_BYTES = {pickletools.TAKEN_FROM_ARGUMENT1: 1, pickletools.TAKEN_FROM_ARGUMENT4: 4, pickletools.TAKEN_FROM_ARGUMENT4U: 4,
                 pickletools.TAKEN_FROM_ARGUMENT8U: 8}  # fmt: skip


def _effect(name):
    """Name what an opcode does, with a number that belongs to it."""
    if name in _PUSH_TEXT.split():
        return "push", _TEXT
    if name in _PUSH_NUMBER.split():
        return "push", _NUMBER
    if name in _POP_TO_MARK:
        return "pop to mark", _POP_TO_MARK[name]
    if name in _FILL_DICT:
        return "dict", _FILL_DICT[name]
    if name in _REPLACE:
        return "replace", _REPLACE[name]
    if name in _TUPLES:
        return "tuple", _TUPLES[name]
    if name in _REFUSED.split():
        return "refuse", 0
    if name in ("PROTO", "FRAME"):
        return "nothing", 0
    for effect in ("MEMOIZE", "MARK", "TUPLE", "POP", "DUP", "STOP"):
        if name == effect:
            return effect, 0
    if name in ("GET", "BINGET", "LONG_BINGET"):
        return "get", 0
    if name in ("PUT", "BINPUT", "LONG_BINPUT"):
        return "put", 0
    return "push", _OTHER


def _table():
    """Describe every opcode byte: (name, argument's size or how it is found, effect, number); None for bytes that are none."""
    table = [None] * 256
    for opcode in pickletools.opcodes:
        table[ord(opcode.code)] = (opcode.name, opcode.arg.n if opcode.arg else 0, *_effect(opcode.name))
    return table


_OPCODES = _table()


@functools.lru_cache(8)
def _plain_rows(protocol, bits):
    """Make the expression for BATCH dicts whose keys are texts and whose values are texts, numbers, None or references.

    Such dicts are nearly all of a feature file, and a regular expression passes them twenty times as fast as Python code.
    `bits` is what the number of a memo entry may have.
    """
    high = (1 << bits) - 1

    def byte(number):
        return re.escape(bytes([number]))

    index = rb"..[\x00-" + byte(min(high >> 16, 255)) + rb"]\x00" if high < 1 << 24 else rb"...[\x00-" + byte(high >> 24) + rb"]"
    if protocol >= 4:
        memo = rb"\x94?+"
        text = rb"\x8c(?:" + b"|".join(byte(length) + b".{%d}" % length for length in range(1, 256)) + rb")" + memo
    else:
        memo = rb"(?:r" + index + rb"|q.)?+"
        text = rb"X(?:" + b"|".join(byte(length) + rb"\x00\x00\x00.{%d}" % length for length in range(256)) + rb")" + memo
    value = rb"(?:J....|K.|M..|" + text + rb"|h.|N|\x88|\x89|G.{8}|j....)"
    row = rb"\}" + memo + rb"\((?:(?:h.|" + text + rb"|j....)" + value + rb")++u"
    return re.compile(b"(?>" + row + b"){%d}" % BATCH, re.DOTALL)


def check_opcodes(data, start=0):
    """Check one pickle without reading it.

    Args:
        data: bytes, memoryview or mmap that holds the pickle.
        start: where it starts.

    Returns:
        (end, longest): the position behind its STOP, and the length of its longest text in bytes (255 where none is longer).

    Raises:
        RefusedPickle: reading it would take time or memory out of proportion to its size.
        pickle.UnpicklingError, EOFError: it is damaged.
    """
    try:
        return _Checker(data, start).run()
    except IndexError:
        if start < len(data):
            raise pickle.UnpicklingError("an opcode that takes more than there is") from None
        raise EOFError("ends too early") from None


class _Checker:
    """The state of one pass over a pickle."""

    def __init__(self, data, start):
        self.data, self.position, self.size = data, start, len(data)
        self.stack, self.marks, self.memo = [], [], {}
        self.longest, self.number_keys = 255, 0
        self.skipped = False  # rows were skipped: numbers of memo entries are no longer known
        self.late = _TEXT  # the worst value put into the memo since then: a tuple, else a number, else text
        protocol = data[start + 1] if data[start] == 0x80 else 0
        self.rows = _plain_rows(min(protocol, 4), min(max(self.size, 1 << 16).bit_length(), 32))

    def run(self):
        """Go through the opcodes up to STOP; see check_opcodes."""
        data, stack, opcodes = self.data, self.stack, _OPCODES
        match, zeros = self.rows.match, [0] * BATCH
        while True:
            code = data[self.position]
            if code == 0x7D:  # EMPTY_DICT: perhaps plain rows
                rows = match(data, self.position)
                if rows:
                    self.position = rows.end()
                    self.skipped = True
                    stack += zeros
                    continue
            if opcodes[code] is None:
                raise pickle.UnpicklingError(f"byte {code:#x} at {self.position} is no opcode")
            name, length, effect, number = opcodes[code]
            argument = self.position + 1
            self.position = argument + length if length >= 0 else self._end_of_argument(name, argument, length)
            if self.position > self.size:
                raise EOFError("ends too early")
            if effect == "MEMOIZE":
                self._put(len(self.memo))
            elif effect == "push":
                stack.append(number)
            elif effect == "get":
                index = data[argument] if code == 0x68 else self._index(name, argument)  # BINGET, by far the most frequent
                stack.append(self._worse(self.memo.get(index, _TEXT), self.late) if self.skipped else self.memo.get(index, _OTHER))
            elif effect == "MARK":
                self.marks.append(len(stack))
            elif effect == "STOP":
                return self.position, self.longest
            else:
                self._other(name, effect, number, argument)

    def _end_of_argument(self, name, argument, length):
        """Find the end of an argument that says its own length, or that ends with its line."""
        if length == pickletools.UP_TO_NEWLINE:
            end = argument
            for _ in range(2 if name in ("GLOBAL", "INST") else 1):
                end = self.data.find(b"\n", end) + 1
                if not end:
                    raise EOFError("ends too early")
            if name in ("INT", "LONG", "GET", "PUT", "FLOAT") and end - argument > 3 * MAX_INTEGER:
                raise RefusedPickle(f"a number of {end - argument} digits")
            count = end - argument
        else:
            start = argument + _LENGTH_BYTES[length]
            count = int.from_bytes(self.data[argument:start], "little")
            if name in ("LONG1", "LONG4") and count > MAX_INTEGER:
                raise RefusedPickle(f"an integer of {count} bytes")
            end = start + count
        if end > self.size:
            raise EOFError(f"ends too early: {name} of {count} bytes")
        if _OPCODES[self.data[argument - 1]][3] == -1:
            self.longest = max(self.longest, count)
        return end

    def _index(self, name, argument):
        """Read the number of a memo entry."""
        content = self.data[argument : self.position]
        return int(content) if name in ("GET", "PUT") else int.from_bytes(content, "little")

    def _put(self, index):
        """Remember the weight of the value on top of the stack."""
        if not 0 <= index <= self.size:
            raise RefusedPickle(f"entry {index} of a memo in {self.size} bytes")
        if self.skipped:
            self.late = self._worse(self.late, self.stack[-1])
        else:
            self.memo[index] = self.stack[-1]

    def _worse(self, one, other):
        """Choose the value that costs more as a key of a dict."""
        heavier = max(one, other)
        return heavier if heavier > 0 else min(one, other)

    def _since_mark(self):
        """Take what stands above the last mark off the stack."""
        mark = self.marks.pop()
        taken = self.stack[mark:]
        del self.stack[mark:]
        return taken

    def _take(self, count):
        """Take `count` values off the stack."""
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise pickle.UnpicklingError("an opcode that takes more than there is")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def _other(self, name, effect, number, argument):
        """Follow an opcode that is rarer than those in `run`."""
        stack = self.stack
        if effect in ("tuple", "TUPLE"):
            parts = self._since_mark() if effect == "TUPLE" else self._take(number)
            weight = 1 + len(parts) + sum(part for part in parts if part > 0)
            if weight > MAX_TUPLE:
                raise RefusedPickle(f"a tuple of {weight} parts")
            stack.append(weight)
        elif effect == "dict":
            items = self._take(2) if name == "SETITEM" else self._since_mark()
            self.number_keys += items[:: 1 if name == "ADDITEMS" else 2].count(_NUMBER)
            if self.number_keys > MAX_NUMBER_KEYS:
                raise RefusedPickle(f"more than {MAX_NUMBER_KEYS} keys that are numbers")
            self._take(number)
            stack.append(_OTHER)
        elif effect == "replace":
            self._take(number)
            stack.append(_OTHER)
        elif effect == "pop to mark":
            self._since_mark()
            if number is not None:
                self._take(number)
                stack.append(_OTHER)
        elif effect == "put":
            self._put(self._index(name, argument))
        elif effect == "POP" and self.marks and self.marks[-1] == len(stack):
            self.marks.pop()
        elif effect == "POP":
            self._take(1)
        elif effect == "DUP":
            stack.append(stack[-1])
        elif effect == "refuse":
            raise RefusedPickle(f"the opcode {name}")
