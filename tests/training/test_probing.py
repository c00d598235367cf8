"""Probes of frozen features against plain loops and scikit-learn."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from vilma.training.probing import collect_features, knn_accuracy, linear_accuracy


@pytest.fixture
def sets():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 6, generator=generator)
    labels = torch.arange(120) % 4
    x = 3.0 + centres[labels] + torch.randn(120, 6, generator=generator)
    return x[:90], labels[:90], x[90:], labels[90:]


def test_nearest_neighbours(sets):
    train, train_labels, test, test_labels = (s.numpy() for s in sets)
    right = {5: 0, 9: 0}
    for x, label in zip(test, test_labels):
        cosines = [float(x @ y / np.linalg.norm(x) / np.linalg.norm(y)) for y in train]
        order = sorted(range(90), key=lambda k, c=cosines: -c[k])
        for count in right:
            votes = [0.0] * 4
            for k in order[:count]:
                votes[train_labels[k]] += math.exp(cosines[k] / 0.07)
            right[count] += int(np.argmax(votes) == label)
    found = knn_accuracy(*sets, neighbours=(5, 9), chunk=7)
    assert found == {k: n / 30 for k, n in right.items()} and found[5] > 0.4


def test_linear_classifier_is_scikit_learns(sets):
    train, train_labels, test, test_labels = (s.numpy() for s in sets)
    mean, std = train.mean(0), train.std(0, ddof=1)
    for penalty in (1e-3, 0.5):
        peer = LogisticRegression(C=1 / (90 * penalty), max_iter=1000, tol=1e-8)
        peer.fit((train - mean) / std, train_labels)
        expected = peer.score((test - mean) / std, test_labels)
        assert linear_accuracy(*sets, penalties=[penalty])[0] == pytest.approx(expected, abs=1e-6)


def test_the_penalty_is_chosen_without_the_test_set(sets):
    train, train_labels, test, test_labels = sets
    first = linear_accuracy(train, train_labels, test, test_labels)
    other = linear_accuracy(train, train_labels, test, 3 - test_labels)
    assert first[1] == other[1] and first[0] > 0.5


def test_unreadable_samples_have_no_features():
    batches = [{"image": torch.ones(3, 2), "label": torch.tensor([1, -1, 0])}]
    features, labels, unreadable = collect_features(lambda x: 2 * x, batches, torch.device("cpu"))
    assert features.shape == (2, 2) and labels.tolist() == [1, 0] and unreadable == 1
