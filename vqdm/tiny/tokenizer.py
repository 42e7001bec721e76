"""A real CLIPTokenizer whose merges make every word of a world one token."""

import itertools
from collections import Counter

from transformers import CLIPTokenizer

from vqdm.tiny.captions import vocabulary
from vqdm.tiny.scenes import TINY
from vqdm.tiny.world import World

MAX_TOKENS = TINY.max_tokens


def _byte_alphabet() -> list[str]:
    """CLIP's printable stand-ins for the 256 bytes, in CLIP's order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]


def _learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding, run until every word is one token."""
    pieces = [[*word[:-1], word[-1] + "</w>"] for word in words]
    merges = []
    while any(len(word) > 1 for word in pieces):
        pairs = Counter(pair for word in pieces for pair in itertools.pairwise(word))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merge(word, best) for word in pieces]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def build_tokenizer(world: World = TINY) -> CLIPTokenizer:
    """Build the tokenizer: all bytes, all bytes that end a word, then the merges, so that no text is unknown."""
    alphabet = _byte_alphabet()
    merges = _learn_merges(vocabulary(world))
    tokens = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=world.max_tokens)
