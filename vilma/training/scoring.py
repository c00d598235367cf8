"""Scores of a classifier on a data set: accuracy, confusions, worst predictions; shares of several processes.

Shapes: B samples, K classes.
"""

import heapq
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from .distributed import to_device

__all__ = ["Scores", "Wrong", "gather", "score_classifier", "share_loader"]

WORST = 32


@dataclass(frozen=True, order=True)
class Wrong:
    """A wrong prediction: its loss, the sample, the true and the predicted class and their probabilities."""

    loss: float
    index: int
    label: int
    predicted: int
    p_label: float
    p_predicted: float


@dataclass
class Scores:
    """Sums over samples, so that those of several processes add up.

    Attributes:
        confusion: (K, K) counts of label x prediction.
        top: the five best classes of each sample by its index in the data set, where they are kept.
        unreadable: samples that could not be decoded and count nowhere.
    """

    confusion: np.ndarray
    top5: int = 0
    loss: float = 0.0
    unreadable: int = 0
    seconds: float = 0.0
    worst: list[Wrong] = field(default_factory=list)
    top: dict[int, list[int]] = field(default_factory=dict)

    @classmethod
    def empty(cls, classes: int) -> "Scores":
        return cls(np.zeros((classes, classes), np.int64))

    @property
    def count(self) -> int:
        return int(self.confusion.sum())

    def add(self, logits: Tensor, labels: Tensor, indices: Tensor, keep_top: bool = False) -> None:
        """logits (B, K); labels (B,), negative for an unreadable sample; indices (B,) in the data set."""
        readable = labels >= 0
        self.unreadable += int((~readable).sum())
        logits, labels, indices = logits[readable].float(), labels[readable], indices[readable]
        if not len(labels):
            return
        losses = F.cross_entropy(logits, labels, reduction="none")
        # Of equal logits the first wins, as in argmax: topk leaves that open.
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        predicted = logits.argmax(1)
        self.top5 += int((top == labels[:, None]).any(1).sum())
        self.loss += float(losses.double().sum())
        np.add.at(self.confusion, (labels.cpu().numpy(), predicted.cpu().numpy()), 1)
        if keep_top:
            top = torch.where(
                top[:, :1] == predicted[:, None], top, torch.cat([predicted[:, None], top[:, 1:]], 1)
            )
            self.top |= dict(zip(indices.tolist(), top.tolist()))
        probabilities = logits.softmax(1)
        for row in (predicted != labels).nonzero()[:, 0].tolist():
            label, guess = int(labels[row]), int(predicted[row])
            chances = float(probabilities[row, label]), float(probabilities[row, guess])
            wrong = Wrong(float(losses[row]), int(indices[row]), label, guess, *chances)
            (heapq.heappush if len(self.worst) < WORST else heapq.heappushpop)(self.worst, wrong)

    def merge(self, other: "Scores") -> None:
        self.confusion = self.confusion + other.confusion
        self.top5 += other.top5
        self.loss += other.loss
        self.unreadable += other.unreadable
        self.seconds = max(self.seconds, other.seconds)
        self.worst = heapq.nlargest(WORST, self.worst + other.worst)
        heapq.heapify(self.worst)
        self.top |= other.top

    def figures(self) -> dict[str, float]:
        """top1 and top5 as shares, loss, and images a second."""
        count = max(self.count, 1)
        return {
            "top1": float(np.trace(self.confusion)) / count,
            "top5": self.top5 / count,
            "loss": self.loss / count,
            "samples_per_s": (self.count + self.unreadable) / max(self.seconds, 1e-9),
        }

    def confusions(self, most: int = 20) -> list[tuple[int, int, int, int]]:
        """(label, predicted, count, samples of the label) of the most frequent confusions."""
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        totals = self.confusion.sum(1)
        order = np.argsort(-wrong, axis=None, kind="stable")[:most]
        pairs = [divmod(int(place), len(wrong)) for place in order]
        return [(a, b, int(wrong[a, b]), int(totals[a])) for a, b in pairs if wrong[a, b]]

    def describe(self, classes: Sequence[str], name: Callable[[int], str]) -> dict[str, Any]:
        """Everything as plain values, with names of classes and samples."""
        totals = self.confusion.sum(1)
        return {
            **self.figures(),
            "samples": self.count,
            "unreadable": self.unreadable,
            "seconds": self.seconds,
            "confusions": [
                {"label": classes[a], "predicted": classes[b], "count": n, "of": total}
                for a, b, n, total in self.confusions()
            ],
            "worst": [
                {
                    "index": w.index,
                    "name": name(w.index),
                    "label": classes[w.label],
                    "predicted": classes[w.predicted],
                    "p_label": w.p_label,
                    "p_predicted": w.p_predicted,
                    "loss": w.loss,
                }
                for w in sorted(self.worst, reverse=True)
            ],
            "recall": {
                classes[k]: float(self.confusion[k, k]) / int(totals[k])
                for k in range(len(totals))
                if totals[k]
            },
        }


@torch.no_grad()
def score_classifier(
    logits: Callable[[Tensor], Tensor],
    batches: Iterable[Mapping[str, Tensor]],
    classes: int,
    device: torch.device,
    precision: str = "fp32",
    keep_top: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> Scores:
    """Scores of ``logits(images) -> (B, K)`` over batches of ``image``, ``label`` and ``index``."""
    scores, begun = Scores.empty(classes), time.perf_counter()
    for batch in batches:
        batch = to_device(dict(batch), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = logits(batch["image"])
        scores.add(output, batch["label"], batch["index"], keep_top)
        if on_batch is not None:
            on_batch(len(batch["label"]))
    scores.seconds = time.perf_counter() - begun
    return scores


def share_loader(
    dataset: Dataset, batch_size: int, num_workers: int = 0, pin_memory: bool = False
) -> DataLoader:
    """This process's share of a data set, every sample in one process only."""
    rank, world = _place()
    return DataLoader(
        Subset(dataset, range(rank, len(dataset), world)),
        batch_size=batch_size,
        num_workers=num_workers,
        pin_memory=pin_memory,
        generator=torch.Generator(),  # its own draw must not move the global generator
    )


def gather(scores: Scores) -> Scores:
    """The sum over all processes, in each of them."""
    if _place()[1] == 1:
        return scores
    parts: list[Any] = [None] * _place()[1]
    torch.distributed.all_gather_object(parts, scores)
    total = parts[0]
    for part in parts[1:]:
        total.merge(part)
    return total


def _place() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
