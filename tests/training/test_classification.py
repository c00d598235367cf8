"""The classifier that is trained: mixing, stochastic depth and losses by sample; scores by plain counts."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.layers import DropPath
from torch._dynamo.testing import CompileCounter

from vilma.training.classification import Classifier, DistillConfig, LossConfig, MixConfig, Teacher
from vilma.training.images import AugmentConfig, SampledDropPath, sample_drop_paths, set_draws
from vilma.training.scoring import Scores, score_classifier

CLASSES = tuple("abcde")
AUGMENT = AugmentConfig(size=32)


def backbone(drop_path: float = 0.0, classes: int = 5):
    torch.manual_seed(0)
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    return timm.create_model(
        "deit_tiny_patch16_224", num_classes=classes, drop_path_rate=drop_path, **options
    )


def batch(samples: int = 8) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {
        "image": torch.randint(0, 256, (samples, 3, 32, 32), dtype=torch.uint8, generator=generator),
        "label": torch.randint(0, 5, (samples,), generator=generator),
        "seed": torch.randint(0, 2**62, (samples,), generator=generator),
    }


def parts(whole: dict, count: int) -> list[dict]:
    return [dict(zip(whole, values)) for values in zip(*(v.chunk(count) for v in whole.values()))]


def test_a_batch_gives_the_losses_of_its_parts():
    """Mixed in groups, dropped by sample: the parts may lie in several processes."""
    model = Classifier(backbone(0.5), CLASSES, AUGMENT, MixConfig(0.8, 1.0, group=4)).train()
    whole = batch(16)
    loss, _ = model(copy.deepcopy(whole))
    for count in (2, 4):
        losses = []
        for part in parts(copy.deepcopy(whole), count):
            torch.manual_seed(count)  # what a process draws by itself must not matter
            np.random.seed(count)
            losses.append(model(part)[0].item())
        assert np.mean(losses) == pytest.approx(float(loss), rel=1e-6)
    whole["seed"] += 1
    assert float(model(whole)[0]) != pytest.approx(float(loss), rel=1e-4)


def test_groups_are_mixed_as_timm_mixes_a_batch():
    model = Classifier(backbone(), CLASSES, AUGMENT, MixConfig(0.8, 1.0, group=4))
    whole = batch(8)
    images = model.normalize(whole["image"])
    mixed, targets = model.mixed(images.clone(), whole["label"], whole["seed"])
    mixer = Mixup(0.8, 1.0, label_smoothing=0.0, num_classes=5)
    for k in (0, 4):
        np.random.seed(int(whole["seed"][k]) & 0xFFFFFFFF)
        expected = mixer(images[k : k + 4].clone(), whole["label"][k : k + 4])
        assert torch.equal(mixed[k : k + 4], expected[0]) and torch.equal(targets[k : k + 4], expected[1])
    assert not torch.equal(mixed[:4], images[:4])
    with pytest.raises(ValueError, match=r"6 samples at once, which groups of mix\.group 4"):
        model.mixed(images[:6], whole["label"][:6], whole["seed"][:6])
    with pytest.raises(ValueError, match="an even number"):
        MixConfig(group=3)


def test_stochastic_depth_keeps_the_rate_and_the_mean():
    layer = SampledDropPath(0.25).train()
    set_draws([layer], torch.arange(4000), torch.device("cpu"))
    kept = layer(torch.ones(4000, 2, 3))
    assert kept.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert float((kept[:, 0, 0] > 0).float().mean()) == pytest.approx(0.75, abs=0.03)
    assert torch.equal(layer.eval()(torch.ones(3, 2)), torch.ones(3, 2))


def test_every_drop_path_of_a_model_is_replaced():
    model = backbone(0.2)
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath) and m.drop_prob]
    made = sample_drop_paths(model)
    assert [layer.rate for layer in made] == rates and len(rates) == 4
    assert not any(isinstance(m, DropPath) for m in model.modules())


def test_losses():
    whole = batch()
    plain = Classifier(backbone(), CLASSES, AUGMENT)
    logits = plain.logits(whole["image"])
    loss, logs = plain(whole)
    assert float(loss) == pytest.approx(float(F.cross_entropy(logits, whole["label"])), rel=1e-6)
    assert float(logs["accuracy"]) == float((logits.argmax(1) == whole["label"]).float().mean())
    smooth = Classifier(backbone(), CLASSES, AUGMENT, loss=LossConfig("ce", 0.1))(whole)[0]
    expected = F.cross_entropy(logits, whole["label"], label_smoothing=0.1)
    assert float(smooth) == pytest.approx(float(expected), rel=1e-6)
    binary = Classifier(backbone(), CLASSES, AUGMENT, loss=LossConfig("bce"))(whole)[0]
    expected = F.binary_cross_entropy_with_logits(logits, F.one_hot(whole["label"], 5).float())
    assert float(binary) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_distillation(kind):
    torch.manual_seed(3)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 5))
    teacher = Teacher(net, (0.5,) * 3, (0.25,) * 3)
    config = DistillConfig("any", kind=kind, alpha=0.25, temperature=2.0)
    model = Classifier(backbone(), CLASSES, AUGMENT, distill=config, teacher=teacher)
    whole = batch()
    loss, _ = model(whole)
    logits = model.logits(whole["image"])
    guide = net((whole["image"] / 255 - 0.5) / 0.25)
    if kind == "hard":
        term = F.cross_entropy(logits, guide.argmax(1))
    else:
        p, q = (guide / 2).softmax(1), (logits / 2).softmax(1)
        term = 4 * (p * (p.log() - q.log())).sum(1).mean()
    expected = 0.75 * F.cross_entropy(logits, whole["label"]) + 0.25 * term
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    assert not any("teacher" in name for name in model.state_dict())
    assert copy.deepcopy(model).teacher is teacher


def test_another_number_of_classes_is_an_error():
    with pytest.raises(ValueError, match=r"5 classes, model\.num_classes is 7"):
        Classifier(backbone(classes=7), CLASSES, AUGMENT)


def test_a_checkpoint_is_read_by_timm_and_keeps_the_classes(tmp_path):
    from vilma.tools._backbone import load_backbone

    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
    model = Classifier(backbone(0.1), CLASSES, AUGMENT, options={**options, "drop_path_rate": 0.1}).eval()
    model.save_pretrained(tmp_path)
    loaded = load_backbone(str(tmp_path))
    assert loaded.classes == CLASSES and loaded.data["input_size"] == (3, 32, 32)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.model(x), model.backbone(x))


def test_scores_against_plain_counts():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, 7, generator=generator)
    labels = torch.randint(0, 7, (60,), generator=generator)
    labels[5] = -1
    sets = [
        {"image": logits[k : k + 16], "label": labels[k : k + 16], "index": torch.arange(60)[k : k + 16]}
        for k in range(0, 60, 16)
    ]
    scores = score_classifier(lambda x: x, sets, 7, torch.device("cpu"), keep_top=True)
    rows = [(row, int(label)) for row, label in zip(logits.tolist(), labels) if label >= 0]
    ranked = [sorted(range(7), key=lambda k, row=row: -row[k]) for row, _ in rows]
    truth = [label for _, label in rows]
    figures = scores.figures()
    assert figures["top1"] == np.mean([r[0] == t for r, t in zip(ranked, truth)])
    assert figures["top5"] == np.mean([t in r[:5] for r, t in zip(ranked, truth)])
    nll = [math.log(sum(map(math.exp, row))) - row[label] for row, label in rows]
    assert figures["loss"] == pytest.approx(np.mean(nll), rel=1e-5)
    assert scores.unreadable == 1 and scores.count == 59
    assert scores.top[59] == ranked[-1][:5]
    worst = max((n, t, r[0]) for n, t, r in zip(nll, truth, ranked) if r[0] != t)
    described = scores.describe([f"c{k}" for k in range(7)], lambda i: f"image {i}")
    assert described["worst"][0]["loss"] == pytest.approx(worst[0], rel=1e-5)
    assert described["worst"][0]["label"] == f"c{worst[1]}"
    pairs = [(t, r[0]) for r, t in zip(ranked, truth) if r[0] != t]
    first = described["confusions"][0]
    assert first["count"] == max(pairs.count(p) for p in pairs)
    halves = Scores.empty(7)
    for part in (sets[:2], sets[2:]):
        halves.merge(score_classifier(lambda x: x, part, 7, torch.device("cpu")))
    assert np.array_equal(halves.confusion, scores.confusion)
    assert sorted(halves.worst) == sorted(scores.worst) and halves.figures()["loss"] == figures["loss"]


def test_a_compiled_model_is_compiled_once():
    """Draws of each update are inputs of the compiled backbone, not a reason to compile it again."""
    counter = CompileCounter()
    model = Classifier(backbone(0.5), CLASSES, AUGMENT, MixConfig(0.8, 1.0, group=4)).train()
    plain = copy.deepcopy(model)
    model.compile(backend=counter)
    for seed in range(3):
        whole = batch()
        whole["seed"] += seed
        assert model(copy.deepcopy(whole))[0].item() == pytest.approx(plain(whole)[0].item(), rel=1e-6)
    assert counter.frame_count == 1
