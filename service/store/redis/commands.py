"""What is said to Redis: keys, the script of compare-and-set, and commands as bytes.

    stepcast:{<key>}      string: the record
    stepcast:{<key>}:c    hash: side records by name

The braces put both into one slot of a cluster.
"""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha1
from typing import Any, Final, cast

import numpy as np
from hiredis import pack_command

from ...records.block import Block, Bytes, Outbox
from ...records.layout import TOKEN
from .. import Write

PREFIX: Final = "stepcast:{"
ROWS: Final = 64  # of a block, that one command changes at most: with more, Redis pauses longer and nothing is saved
WRITES: Final = 16  # edits of one command: their records may be of any size
_FEW: Final = 12  # records that are written by hand sooner than numpy's calls fill a frame
_MOST_FRAMES: Final = 8
_FRAME_BYTES: Final = 4 << 20  # of records; more are written one by one, so that little memory is kept for frames

_SCRIPT: Final = f"""
local key, at, applied, last = 1, 1, {{}}, #ARGV
--TELLING
while at <= last do
  local main, expect, record, ttl, sides = KEYS[key], ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  key, at = key + 1, at + 4
  local side, count = nil, 0
  if sides ~= '' then side, count, key = KEYS[key], tonumber(sides), key + 1 end
  local behind = at + 2 * math.abs(count)
  if redis.call('GETRANGE', main, {TOKEN.start}, {TOKEN.stop - 1}) ~= expect then
    applied[#applied + 1] = 0
  else
    applied[#applied + 1] = 1
    if record == '' then redis.call('UNLINK', main)
    elseif ttl == '' then redis.call('SET', main, record)
    else redis.call('SET', main, record, 'PX', ttl) end
    if side then
      if record == '' or count < 0 then redis.call('UNLINK', side) end
      count = math.abs(count)
      if record ~= '' then
        for j = at, at + 2 * count - 2, 2 do redis.call('HSET', side, ARGV[j], ARGV[j + 1]) end
        if ttl == '' then redis.call('PERSIST', side) else redis.call('PEXPIRE', side, ttl) end
      end
    end
  end
  at = behind
  --TELL
end
return applied
"""
"""Per session in ARGV: token expected ('': none), record ('': forget), ms to live ('': for ever), number of side
records to set (negative: they are the first; 0: there are some, give them the time to live; '': none, and no key for
them), then name and bytes of each. In KEYS: the record's and, where there is a number, that of the side records.
Returns 1 where it was applied. SET is the first change, since Redis asks for free memory only at a script's first one.

A session without side records has one key in its commands: in a cluster, commands of two are refused while their slot
moves if one of them is not there. What a session that was evicted or deleted from outside has left under the second
key is forgotten when side records are first set."""

_TELLING: Final = """
local fields, rows, sink, group, keep, deletes = unpack(ARGV, #ARGV - 5)
fields, rows = tonumber(fields), tonumber(rows)
last = #ARGV - 6 - rows * (fields + 2)
local letter = last + 1
"""
_TELL: Final = """
  if applied[#applied] == 1 then
    if keep == '0' then redis.call('XADD', sink, '*', unpack(ARGV, letter + 2, letter + 1 + fields))
    else redis.call('XADD', sink, 'MAXLEN', '~', keep, '*', unpack(ARGV, letter + 2, letter + 1 + fields)) end
    redis.call('XACK', ARGV[letter], group, ARGV[letter + 1])
    if deletes == '1' then redis.call('XDEL', ARGV[letter], ARGV[letter + 1]) end
  end
  letter = letter + 2 + fields
"""
"""The same with a letter for each session behind all of them: stream, entry, then the sink's fields; and at the end the
number of those, that of the letters, and the outbox. Where the record is replaced, the letter goes into the sink and
the entry is acknowledged; KEYS ends with the streams."""


def pack(*words: str | bytes | int) -> bytes:
    """A command in Redis' protocol."""
    packed: bytes = pack_command(cast(Any, words))
    return packed


SCRIPT: Final = _SCRIPT.replace("--TELLING", "").replace("--TELL", "")
TELLING_SCRIPT: Final = _SCRIPT.replace("--TELLING", _TELLING).replace("--TELL", _TELL)
LESSONS: Final = tuple(pack("SCRIPT", "LOAD", script) for script in (SCRIPT, TELLING_SCRIPT))
_SHA, _TELLING_SHA = (sha1(text.encode(), usedforsecurity=False).hexdigest() for text in (SCRIPT, TELLING_SCRIPT))


def main(key: str) -> str:
    """Where Redis keeps a session's record."""
    return f"{PREFIX}{key}}}"


def side(key: str) -> str:
    """Where Redis keeps a session's side records."""
    return f"{PREFIX}{key}}}:c"


def change(writes: Sequence[Write]) -> bytes:
    """One command for several writes."""
    keys: list[str] = []
    values: list[bytes | str] = []
    for key, expect, record, ttl_s, sides, touch_sides in writes:
        count = f"{len(sides) if touch_sides else -len(sides)}" if sides else "0" if touch_sides else ""
        keys += (main(key), side(key)) if count else (main(key),)
        values += (expect or b"", record or b"", _ttl(ttl_s), count)
        for name, data in (sides or {}).items():
            values += (name, data)
    return pack("EVALSHA", _SHA, len(keys), *keys, *values)


def touch(key: str, ttl_s: float | None) -> bytes:
    """Gives a session's side records their time to live."""
    return pack("PERSIST", side(key)) if ttl_s is None else pack("PEXPIRE", side(key), _ttl(ttl_s))


class Frames:
    """Makes the commands of blocks; arguments of many sessions are written side by side, column by column."""

    def __init__(self) -> None:
        self._frame = lru_cache(_MOST_FRAMES)(_frame)

    def commands(self, block: Block, parts: Sequence[range], touch_sides: bool) -> list[bytes]:
        """One command for each of `parts`, rows of a block."""
        if block.outbox is not None:
            return [_told(block, part, touch_sides) for part in parts]
        sides = b"0" if touch_sides else b""
        begin = block.place if block.stays and isinstance(block.place, list) else _heads(block.keys, parts, bool(sides))
        if block.stays:
            block.place = begin  # the commands of the next block of these keys begin the same
        end = _end(block.ttl_s, sides)
        pieces: Sequence[bytes | memoryview]
        if len(block) <= _FEW or block.new.nbytes > _FRAME_BYTES:
            rows = _rows(block.expected(), block.records(), end)
            pieces = rows if len(rows) == len(parts) else [b"".join(rows[part.start : part.stop]) for part in parts]
        else:
            frame = self._filled(block, end)
            text, width = frame.data.cast("B"), frame.shape[1]
            pieces = [text[part.start * width : part.stop * width] for part in parts]
        return [b"".join(pair) for pair in zip(begin, pieces, strict=True)]

    def _filled(self, block: Block, end: bytes) -> Bytes:
        """(B, bytes of a row)."""
        (count, width), tokens = block.new.shape, block.tokens
        token_bytes = 0 if tokens is None else tokens.shape[1]
        frame = self._frame(1 << (count - 1).bit_length(), token_bytes, width, end)[:count]
        token_at, record_at = len(b"$16\r\n"), frame.shape[1] - len(end) - 2 - width
        frame[:, record_at : record_at + width] = block.new
        if tokens is not None:
            frame[:, token_at : token_at + token_bytes] = tokens
        return frame


def _told(block: Block, part: range, touch_sides: bool) -> bytes:
    """The command of some rows of a block with letters."""
    outbox, letters = cast(Outbox, block.outbox), block.letters[part.start : part.stop]
    sides = "0" if touch_sides else ""
    keys: list[str | bytes] = []
    for key in block.keys[part.start : part.stop]:
        keys += (main(key), side(key)) if sides else (main(key),)
    keys += (outbox.sink, *{letter.stream for letter in letters})
    words: list[str | bytes | int] = ["EVALSHA", _TELLING_SHA, len(keys), *keys]
    ttl, records, expected = _ttl(block.ttl_s), block.records(), block.expected()
    for row in part:
        words += (expected[row], records[row], ttl, sides)
    for letter in letters:
        words += (letter.stream, letter.entry, *letter.fields)
    words += (len(letters[0].fields), len(letters), outbox.sink, outbox.group, outbox.keep, int(outbox.deletes))
    return pack(*words)


def _frame(count: int, token_bytes: int, width: int, end: bytes) -> Bytes:
    """Rows as _rows makes them, without their tokens and records."""
    (row,) = _rows([bytes(token_bytes)], [bytes(width)], end)
    return np.tile(np.frombuffer(row, np.uint8), (count, 1))


def _heads(keys: Sequence[str], parts: Sequence[range], with_sides: bool) -> list[bytes]:
    """How the commands begin, each for some of the keys."""
    names = [main(key).encode() for key in keys]
    texts = [b"$%d\r\n%s\r\n" % (len(name), name) for name in names]
    if with_sides:
        texts = [text + b"$%d\r\n%s:c\r\n" % (len(name) + 2, name) for text, name in zip(texts, names, strict=True)]
    if len(parts) == len(texts):
        start = _start(1, with_sides)
        return [start + text for text in texts]
    return [b"".join((_start(len(part), with_sides), *texts[part.start : part.stop])) for part in parts]


@lru_cache(256)
def _start(count: int, with_sides: bool) -> bytes:
    """What stands before the keys of so many sessions."""
    names = 2 * count if with_sides else count
    words = 3 + names + 4 * count
    return b"*%d\r\n$7\r\nEVALSHA\r\n$40\r\n%s\r\n%s" % (words, _SHA.encode(), _word(b"%d" % names))


def _rows(tokens: Sequence[bytes], records: Sequence[bytes], end: bytes) -> list[bytes]:
    """Each session's arguments."""
    return [
        b"$%d\r\n%s\r\n$%d\r\n%s\r\n%s" % (len(token), token, len(record), record, end)
        for token, record in zip(tokens, records, strict=True)
    ]


@lru_cache(256)
def _end(ttl_s: float | None, sides: bytes) -> bytes:
    """The last arguments of a session: its time to live, and what there is to do with side records."""
    return _word(_ttl(ttl_s)) + _word(sides)


def _word(value: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(value), value)


def _ttl(ttl_s: float | None) -> bytes:
    return b"" if ttl_s is None else b"%d" % max(1, int(ttl_s * 1000))
