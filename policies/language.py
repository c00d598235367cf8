"""Task text -> vector. Text encoders share one interface: ``forward(texts) -> (B, dim)``.

The encoder here needs no downloaded weights. Words, pairs of words and character n-grams are hashed; each
picks a fixed random direction, and a text is the normalised sum of its directions. Texts that share words
(or word stems) come out close, others nearly orthogonal.
"""

import re
import unicodedata
from collections import OrderedDict
from collections.abc import Sequence
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

_CACHE_SIZE = 10_000


class TextEncoder(nn.Module):
    """Interface: ``dim`` and ``forward(texts) -> (B, dim)`` on the device of the module."""

    dim: int

    def forward(self, texts: Sequence[str]) -> Tensor:
        raise NotImplementedError


class HashedTextEncoder(TextEncoder):
    """Hashed n-grams: a unit vector for each text, the same in every process and on every platform.

    The direction of an n-gram is the bits of its BLAKE2b digest as signs. Nothing is learned or stored.
    """

    def __init__(self, dim: int = 512):
        super().__init__()
        if dim < 32:
            raise ValueError(f"hashed texts need at least 32 dimensions to stay apart, got {dim}")
        self.dim = dim
        self._cache: OrderedDict[str, Tensor] = OrderedDict()
        self.register_buffer("_place", torch.empty(0), persistent=False)

    def forward(self, texts: Sequence[str]) -> Tensor:
        if isinstance(texts, str):
            raise ValueError(f"texts must be a list of strings, got the single string {texts!r}")
        rows = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        table = torch.stack([self._embed(text) for text in rows]).to(self._place.device)
        # A batch mostly repeats a few texts: one row each, then a gather.
        return table[torch.tensor([rows[text] for text in texts], device=table.device)]

    def _embed(self, text: str) -> Tensor:
        if text in self._cache:
            self._cache.move_to_end(text)
            return self._cache[text]
        total = np.zeros(self.dim, dtype=np.int64)
        for gram in ngrams(text):
            total += _signs(gram, self.dim)
        vector = total / np.sqrt(float(total @ total))
        self._cache[text] = torch.from_numpy(vector.astype(np.float32))
        if len(self._cache) > _CACHE_SIZE:
            self._cache.popitem(last=False)
        return self._cache[text]


def ngrams(text: str) -> list[str]:
    """The features of a text: words, neighbouring pairs, and character 3- and 4-grams of ``<word>``.

    Case, punctuation and spacing do not matter. ValueError for a text without words: an
    empty task would silently look like any other constant.
    """
    words = (
        re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()) if isinstance(text, str) else []
    )
    if not words:
        raise ValueError(f"a task text must contain at least one word, got {text!r}")
    grams = [f"w:{word}" for word in words]
    grams += [f"p:{first} {second}" for first, second in pairwise(words)]
    for word in words:
        padded = f"<{word}>"
        grams += [f"c:{padded[i : i + n]}" for n in (3, 4) for i in range(len(padded) - n + 1)]
    return grams


TEXT_ENCODERS = {"hashed": HashedTextEncoder}


def build_text_encoder(name: str, dim: int) -> TextEncoder:
    """The text encoder ``name`` with vectors of size ``dim``."""
    if name not in TEXT_ENCODERS:
        raise ValueError(f"unknown text encoder {name!r}; known: {', '.join(TEXT_ENCODERS)}")
    return TEXT_ENCODERS[name](dim)


def _signs(gram: str, dim: int) -> np.ndarray:
    """dim fixed random signs of a string."""
    blocks = (
        blake2b(gram.encode(), digest_size=64, salt=block.to_bytes(8, "little")).digest()
        for block in range(-(-dim // 512))
    )
    bits = np.unpackbits(np.frombuffer(b"".join(blocks), dtype=np.uint8))[:dim]
    return 2 * bits.astype(np.int64) - 1
