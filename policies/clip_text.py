"""CLIP's text encoder, frozen, through open_clip; its embeddings are kept on disk.

The network (63 M parameters, never trained) is no part of the policy: it is loaded only for a text whose
embedding is not in the cache. A data set's texts are embedded once with ``vilma cache-language``; training
and acting then need neither open_clip nor the weights.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vilma.extras import require

from .language import TextEncoder, as_gather, checked_text

MODEL, DIM = "ViT-B-32-quickgelu", 512


def default_cache() -> Path:
    """``$VILMA_CACHE/clip``, by default below ``~/.cache/vilma``."""
    return Path(os.environ.get("VILMA_CACHE", Path.home() / ".cache" / "vilma")) / "clip"


class ClipTextEncoder(TextEncoder):
    """Pooled text features of CLIP ViT-B/32 (arXiv 2103.00020), not normalised: (B, 512).

    weights: a pretrained tag of open_clip ("openai") or a file of its state dict. cache: folder of the
    embeddings, by default `default_cache`; each lies in a file named by a hash of weights and text.

    ``forward`` raises ValueError, saying what to run, for a text that is neither in the cache nor can be
    embedded here.
    """

    def __init__(self, dim: int = DIM, weights: str = "openai", cache: str | Path | None = None):
        super().__init__()
        if dim != DIM:
            raise ValueError(f"CLIP's text features have {DIM} dimensions: set text_dim to {DIM}, not {dim}")
        self.dim = dim
        self.weights = weights
        self.folder = (default_cache() if cache is None else Path(cache)) / f"{MODEL}_{Path(weights).name}"
        self._known: dict[str, Tensor] = {}
        self._network: list[nn.Module] = []  # in a list: a frozen network is not a part of the policy
        self.register_buffer("_place", torch.empty(0), persistent=False)

    def forward(self, texts: Sequence[str]) -> Tensor:
        return as_gather(texts, self.embed, self._place.device)

    def __getstate__(self) -> dict[str, Any]:
        """Without the network: the copy that a moving average keeps never needs it."""
        return {**self.__dict__, "_network": []}

    def embed(self, text: str) -> Tensor:
        """(512,) float32 on the CPU: from memory, from disk, or computed and written to disk."""
        text = checked_text(text)
        if text not in self._known:
            file = self.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.npy"
            self._known[text] = self._read(file) if file.is_file() else self._compute(text, file)
        return self._known[text]

    def _read(self, file: Path) -> Tensor:
        try:
            vector = np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file} cannot be read ({error}): delete it, then {_WAY}") from error
        if vector.shape != (self.dim,) or vector.dtype.kind != "f" or not np.isfinite(vector).all():
            raise ValueError(f"{file} holds no embedding of {self.dim} numbers: delete it, then {_WAY}")
        return torch.from_numpy(vector.astype(np.float32))

    @torch.no_grad()
    def _compute(self, text: str, file: Path) -> Tensor:
        try:
            network, tokens = self._load()
        except Exception as error:  # not installed, no weights, no network: the way out is the same
            raise ValueError(
                f"there is no CLIP embedding of {text!r} in {self.folder}, and it cannot be made here "
                f"({type(error).__name__}: {error}). {_WAY[0].upper()}{_WAY[1:]}"
            ) from error
        vector = network.encode_text(tokens([text]))[0].float()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claim()
        partial = file.with_suffix(f".{os.getpid()}.npy")
        np.save(partial, vector.numpy())
        os.replace(partial, file)
        return vector

    def _load(self):
        open_clip = require("open_clip", "language")
        if not self._network:
            is_file = os.sep in self.weights or Path(self.weights).is_file()
            if is_file and not Path(self.weights).is_file():
                raise FileNotFoundError(f"no such file: {self.weights}")
            network = open_clip.create_model(MODEL, pretrained=self.weights, require_pretrained=True)
            self._network.append(network.float().eval().requires_grad_(False))
        return self._network[0], open_clip.get_tokenizer(MODEL)

    def _claim(self) -> None:
        """Embeddings of other weights must not end up beside those that are there."""
        note = self.folder / "weights.json"
        probe = self._network[0].encode_text(torch.zeros(1, 77, dtype=torch.long))[0, :4].tolist()
        if not note.is_file():  # several processes of a training may write it at once
            partial = note.with_suffix(f".{os.getpid()}")
            partial.write_text(json.dumps({"model": MODEL, "weights": self.weights, "probe": probe}))
            os.replace(partial, note)
        elif not np.allclose(json.loads(note.read_text())["probe"], probe, rtol=1e-3, atol=1e-4):
            raise ValueError(
                f"{self.folder} holds embeddings of other weights of the same name: use another cache folder"
            )


_WAY = (
    "run `vilma cache-language DATA --weights WEIGHTS` where open_clip (pip install 'vilma[language]') and "
    "the weights are, and name its folder with policy.text_cache; or set policy.text_encoder to hashed"
)
