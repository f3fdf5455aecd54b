"""What the names of a graph's tensors say: which two are one state, which carries data."""

import enum
import re
from typing import Final, NamedTuple

_BEFORE: Final = {"in", "input", "inputs", "prev", "previous", "past", "old", "init", "initial", "i", "before", "tm"}
_AFTER: Final = {"out", "output", "outputs", "next", "new", "present", "updated", "update", "upd", "o", "after"}
_EITHER: Final = {"cur", "curr", "current", "final", "last", "n", "t"}
_PLAIN: Final = {"in", "input", "inputs", "out", "output", "outputs"}
_DIRECTIONS: Final = _BEFORE | _AFTER | _EITHER
_STATE: Final = re.compile(
    "[hc]|hidden|hid|cell|states?|caches?|past|present|mem(ory)?|buf(fer)?|carry|rnn|lstm|gru|ctx|context|key|value|kv|"
    "hist(ory)?|recurrent"
)
_DATA: Final = re.compile(
    "[xy]|data|audio|feat(ure)?s?|frames?|chunk|signal|wav(e|eform)?|spec(trum|trogram)?|mix|noisy|speech|mic|fbank|mel|"
    "obs(ervation)?|tokens?|ids|src|samples?|pcm|mag|sequence|logits?|prob(s|ability)?|pred(iction)?|enh(anced)?|clean|"
    "denoised|mask|gains?|scores?|result|action|far|near|ref(erence)?"
)
_BESIDE: Final = re.compile("vad|l?snr|loudness|energy|confidence|aux")
_LENGTH: Final = re.compile("len|lens|length|lengths")
_RESET: Final = re.compile("first|starts?|reset|begin|dones?|terminals?")
_SYNONYMS: Final = {"hidden": "h", "hid": "h", "cell": "c", "states": "state", "caches": "cache"}
_MADE: Final = re.compile(r"onnx::.*|\d+|getitem(_\d+)?|Identity(_\d+)?|StatefulPartitionedCall|serving_default_.*")
_GLUED: Final = re.compile(
    "([hcsmz])([xyntio]|in|out|prev|next|old|new|init)"
)  # hx and hy, hn, ht, hi and ho, hin and hout
_WORDS: Final = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")


class Likeness(enum.IntEnum):
    """How much two names look like one tensor's, before and after a step."""

    NONE = 0
    LOOSE = 1  # alike but for a number that one of them lacks, or a synonym
    FULL = 2  # alike in all but words such as `in` and `out`, numbers of layers included


class Name(NamedTuple):
    """A name taken apart.

    Attributes:
        words: Its words and numbers without those of direction (`in`, `next`): a state's two names have the same.
        directed: Whether there were words of direction.
    """

    words: tuple[str, ...]
    directed: bool

    @property
    def letters(self) -> tuple[str, ...]:
        """The words without numbers and in one vocabulary; `state` adds nothing to another word."""
        found = tuple(_SYNONYMS.get(word, word) for word in self.words if not word.isdigit())
        return tuple(word for word in found if word != "state") or found

    @property
    def numbers(self) -> tuple[str, ...]:
        """The numbers."""
        return tuple(word for word in self.words if word.isdigit())


def read_name(name: str) -> Name:
    """Take a name apart; a name that an exporter made up has no words."""
    every = _all_words(name)
    kept = [word for word in every if word not in _DIRECTIONS]
    if every[:3] == ["past", "key", "values"]:  # transformers' past_key_values.0.key is continued by present.0.key
        kept = kept[2:]
    if not any(word.isalpha() for word in kept):  # `h_in`'s `in` is a direction, `input_2`'s is all there is
        kept = [word for word in kept if word.isdigit()] if len(every) > len(kept) else kept
    directed = len(kept) < len(every)
    for at, word in enumerate(kept):
        if found := _GLUED.fullmatch(word):
            kept[at], directed = found[1], True
    return Name(tuple(kept), directed)


def likeness(before: str, after: str) -> Likeness:
    """How much an output's name looks like the next value of an input."""
    one, other = read_name(before), read_name(after)
    if not one.words or not other.words:
        return Likeness.NONE
    if one.words == other.words and before != after:
        return Likeness.FULL if one.letters else Likeness.LOOSE
    if not one.letters or one.letters != other.letters:
        return Likeness.NONE
    counted = (one.numbers, other.numbers) == (("0",), ("1",)) and not one.directed and not other.directed  # h0 to h1
    return (
        Likeness.LOOSE
        if counted or one.numbers == other.numbers or () in (one.numbers, other.numbers)
        else Likeness.NONE
    )


def is_state(name: str) -> bool:
    """Whether a name speaks of a state."""
    return any(_STATE.fullmatch(word) for word in (*_all_words(name), *read_name(name).words))


def is_data(name: str) -> bool:
    """Whether a name speaks of data, and not of a state; `input` alone does, `input_2` says nothing."""
    every = _all_words(name)
    plain = bool(every) and all(word in _PLAIN for word in every)
    return not is_state(name) and (plain or is_beside(name) or any(_DATA.fullmatch(word) for word in every))


def is_beside(name: str) -> bool:
    """Whether a name speaks of data that is given beside the answer proper: how loud it was, whether anybody spoke."""
    return any(_BESIDE.fullmatch(word) for word in _all_words(name))


def is_length(name: str) -> bool:
    """Whether a name speaks of how much of the data is valid: `length`, `seq_lens`; `cache_len` is a state's."""
    return not is_state(name) and any(_LENGTH.fullmatch(word) for word in _all_words(name))


def is_reset(name: str) -> bool:
    """Whether a name speaks of a flag that begins a session anew: `is_first`, `episode_starts`."""
    return not is_state(name) and any(_RESET.fullmatch(word) for word in _all_words(name))


def _all_words(name: str) -> list[str]:
    name = re.sub(r":\d+$", "", name)
    return [] if _MADE.fullmatch(name) else [word.lower() for word in _WORDS.findall(name)]
