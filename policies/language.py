"""Task text -> vector. Text encoders share one interface: ``forward(texts) -> (B, dim)``.

``clip`` (`vilma.policies.clip_text`) is the paper's; ``table`` learns a vector for each of a list of tasks;
``hashed`` needs neither weights nor a list. Its words, pairs of words and character n-grams are hashed; each
picks a fixed random direction, and a text is the normalised sum of its directions. Texts that share words
(or word stems) come out close, others nearly orthogonal.
"""

import difflib
import re
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Sequence
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
        return as_gather(texts, self._embed, self._place.device)

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


class TableTextEncoder(TextEncoder):
    """A learned vector for each of ``tasks``; other texts are refused. Case, punctuation and spacing do not
    matter. Vectors start from N(0, 1 / dim): about unit length, like the other encoders'."""

    def __init__(self, dim: int, tasks: Sequence[str]):
        super().__init__()
        if not tasks:
            raise ValueError("the table of tasks is empty: list them in policy.tasks, or use another encoder")
        self.dim = dim
        self.rows = {" ".join(_words(task)): row for row, task in enumerate(tasks)}
        if len(self.rows) < len(tasks):
            raise ValueError(f"policy.tasks names a task twice: {', '.join(tasks)}")
        self.vectors = nn.Embedding(len(tasks), dim)
        nn.init.normal_(self.vectors.weight, std=dim**-0.5)

    def no_weight_decay(self) -> set[str]:
        return {"vectors.weight"}

    def forward(self, texts: Sequence[str]) -> Tensor:
        rows = [self._row(text) for text in _list(texts)]
        return self.vectors(torch.tensor(rows, device=self.vectors.weight.device))

    def _row(self, text: str) -> int:
        key = " ".join(_words(text))
        if key not in self.rows:
            near = difflib.get_close_matches(key, self.rows, n=3)
            close = f"; close: {', '.join(near)}" if near else f"; it knows: {', '.join(self.rows)}"
            raise ValueError(f"the task {text!r} is not in the policy's table (policy.tasks){close}")
        return self.rows[key]


def as_gather(texts: Sequence[str], embed: Callable[[str], Tensor], device: torch.device) -> Tensor:
    """(B, dim) on ``device``: a row for each different text, then a gather: batches repeat a few."""
    rows = {text: i for i, text in enumerate(dict.fromkeys(_list(texts)))}
    table = torch.stack([embed(text) for text in rows]).to(device)
    return table[torch.tensor([rows[text] for text in texts], device=device)]


def ngrams(text: str) -> list[str]:
    """The features of a text: words, neighbouring pairs, and character 3- and 4-grams of ``<word>``.

    Case, punctuation and spacing do not matter. ValueError for a text without words: an
    empty task would silently look like any other constant.
    """
    words = _words(text)
    grams = [f"w:{word}" for word in words]
    grams += [f"p:{first} {second}" for first, second in pairwise(words)]
    for word in words:
        padded = f"<{word}>"
        grams += [f"c:{padded[i : i + n]}" for n in (3, 4) for i in range(len(padded) - n + 1)]
    return grams


def checked_text(text: str) -> str:
    """The text itself; ValueError for one without words."""
    _words(text)
    return text


TEXT_ENCODERS = ("hashed", "table", "clip")


def build_text_encoder(
    name: str,
    dim: int,
    *,
    tasks: Sequence[str] = (),
    weights: str = "openai",
    cache: str | None = None,
) -> TextEncoder:
    """The text encoder ``name`` with vectors of size ``dim``; tasks of ``table``, weights and cache of
    ``clip``."""
    if name == "hashed":
        return HashedTextEncoder(dim)
    if name == "table":
        return TableTextEncoder(dim, tasks)
    if name == "clip":
        from .clip_text import ClipTextEncoder

        return ClipTextEncoder(dim, weights, cache)
    raise ValueError(f"unknown text encoder {name!r}; known: {', '.join(TEXT_ENCODERS)}")


def _list(texts: Sequence[str]) -> Sequence[str]:
    if isinstance(texts, str):
        raise ValueError(f"texts must be a list of strings, got the single string {texts!r}")
    return texts


def _words(text: str) -> list[str]:
    words = (
        re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()) if isinstance(text, str) else []
    )
    if not words:
        raise ValueError(f"a task text must contain at least one word, got {text!r}")
    return words


def _signs(gram: str, dim: int) -> np.ndarray:
    """dim fixed random signs of a string."""
    blocks = (
        blake2b(gram.encode(), digest_size=64, salt=block.to_bytes(8, "little")).digest()
        for block in range(-(-dim // 512))
    )
    bits = np.unpackbits(np.frombuffer(b"".join(blocks), dtype=np.uint8))[:dim]
    return 2 * bits.astype(np.int64) - 1
