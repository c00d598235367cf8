"""What frozen features are worth: nearest neighbours and a linear classifier.

Shapes: N training samples, M test samples, D features, K classes.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .distributed import to_device

__all__ = ["collect_features", "knn_accuracy", "linear_accuracy"]

PENALTIES = tuple(10.0**k for k in range(-6, 3))


@torch.no_grad()
def collect_features(
    features: Callable[[Tensor], Tensor],
    batches: Iterable[Mapping[str, Tensor]],
    device: torch.device,
    precision: str = "fp32",
    on_batch: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor, int]:
    """Features (N, D) float32 and labels (N,) of batches, and how many samples could not be decoded."""
    kept, labels, unreadable = [], [], 0
    for batch in batches:
        batch = to_device(dict(batch), device)
        readable = batch["label"] >= 0
        unreadable += int((~readable).sum())
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            output = features(batch["image"])
        kept.append(output[readable].float())
        labels.append(batch["label"][readable])
        if on_batch is not None:
            on_batch(len(readable))
    return torch.cat(kept), torch.cat(labels), unreadable


def knn_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    neighbours: Sequence[int] = (20, 10, 100),
    temperature: float = 0.07,
    chunk: int = 256,
) -> dict[int, float]:
    """Accuracy of votes weighted by cosine similarity (DINO, arXiv 2104.14294), by number of neighbours."""
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    train, test = F.normalize(train, dim=1), F.normalize(test, dim=1)
    neighbours = [min(k, len(train)) for k in neighbours]
    right = dict.fromkeys(neighbours, 0)
    for some, labels in zip(test.split(chunk), test_labels.split(chunk)):
        similarity, index = (some @ train.T).topk(max(neighbours), dim=1)
        votes = F.one_hot(train_labels[index], classes) * (similarity / temperature).exp()[..., None]
        for k in right:
            right[k] += int((votes[:, :k].sum(1).argmax(1) == labels).sum())
    return {k: count / len(test) for k, count in right.items()}


def linear_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    penalties: Sequence[float] = PENALTIES,
) -> tuple[float, float]:
    """Accuracy of multinomial logistic regression on standardised features, and the penalty it took.

    The penalty (on half the squared weights, beside the mean loss) is chosen on every fifth training sample,
    then all are fitted.
    """
    mean, std = train.mean(0), train.std(0).clamp_min(1e-6)
    train, test = (train - mean) / std, (test - mean) / std
    classes = int(max(train_labels.max(), test_labels.max())) + 1
    penalty = penalties[0]
    if len(penalties) > 1:
        order = torch.argsort(train_labels, stable=True)  # every fifth of each class
        held_out = torch.zeros(len(train), dtype=torch.bool, device=train.device)
        held_out[order[::5]] = True
        fit, check = (train[~held_out], train_labels[~held_out]), (train[held_out], train_labels[held_out])
        scores = [_accuracy(_fit(*fit, classes, p), *check) for p in penalties]
        penalty = penalties[max(range(len(penalties)), key=scores.__getitem__)]
    return _accuracy(_fit(train, train_labels, classes, penalty), test, test_labels), penalty


def _fit(x: Tensor, y: Tensor, classes: int, penalty: float) -> tuple[Tensor, Tensor]:
    weight = torch.zeros(x.shape[1], classes, device=x.device, requires_grad=True)
    bias = torch.zeros(classes, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=200, history_size=20, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight + bias, y) + 0.5 * penalty * (weight**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def _accuracy(model: tuple[Tensor, Tensor], x: Tensor, y: Tensor) -> float:
    weight, bias = model
    return float(((x @ weight + bias).argmax(1) == y).float().mean())
