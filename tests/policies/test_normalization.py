import pytest
import torch

from vilma.policies.normalization import Normalizer

DATA = torch.tensor([[0.0, -3.0, 0.82], [1.0, 5.0, 0.82], [0.5, 1.0, 0.82], [0.25, 0.0, 0.82]])


def statistics(data=DATA):
    moments = {
        "mean": data.mean(0),
        "std": data.std(0, correction=0),
        "min": data.amin(0),
        "max": data.amax(0),
    }
    return {key: value.tolist() for key, value in moments.items()}


def test_mean_std():
    out = Normalizer("mean_std", 3, statistics=statistics()).normalize(DATA)
    torch.testing.assert_close(out[:, :2].mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(out[:, :2].std(0, correction=0), torch.ones(2))


def test_min_max():
    out = Normalizer("min_max", 3, statistics=statistics()).normalize(DATA)
    assert out[:, :2].amin(0).tolist() == [-1, -1]
    assert out[:, :2].amax(0).tolist() == [1, 1]


@pytest.mark.parametrize("mode", ["mean_std", "min_max", "none"])
def test_round_trip(mode):
    normalizer = Normalizer(mode, 3, statistics=statistics())
    torch.testing.assert_close(normalizer.unnormalize(normalizer.normalize(DATA)), DATA)


@pytest.mark.parametrize("mode", ["mean_std", "min_max"])
@pytest.mark.parametrize("wobble", [0.0, 1e-9])
def test_a_constant_maps_to_zero_and_back_to_itself(mode, wobble):
    values = statistics()
    values["max"][2] += wobble
    values["std"][2] = wobble
    normalizer = Normalizer(mode, 3, statistics=values)
    other = torch.tensor([[0.5, 0.0, 1.7]])
    assert normalizer.normalize(other)[0, 2] == 0
    assert normalizer.unnormalize(torch.full((1, 3), 4.0))[0, 2].item() == pytest.approx(0.82)
    assert normalizer.normalize(DATA).isfinite().all()


def test_a_rarely_moving_dimension_is_finite():
    data = torch.zeros(1000, 1)
    data[0] = 1e-3
    out = Normalizer("mean_std", 1, statistics=statistics(data)).normalize(data)
    assert out.isfinite().all()
    assert out.std(correction=0).item() == pytest.approx(1, rel=1e-3)


def test_out_of_range_share():
    normalizer = Normalizer("min_max", 3, statistics=statistics())
    values = torch.tensor([[0.5, 5.0, 0.82], [1.5, 6.0, 0.82], [-0.5, 0.0, 0.9], [0.1, float("nan"), 0.82]])
    torch.testing.assert_close(normalizer.out_of_range(values), torch.tensor([0.5, 0.5, 0.25]))


def test_buffers_stay_out_of_the_state_dict():
    assert not Normalizer("min_max", 3, statistics=statistics()).state_dict()


def test_errors():
    with pytest.raises(ValueError, match=r"no statistics for action .*set_statistics"):
        Normalizer("min_max", 3, "action").normalize(DATA)
    with pytest.raises(ValueError, match="unknown mode 'zscore'; modes: mean_std"):
        Normalizer("zscore", 3)
    with pytest.raises(ValueError, match=r"last dimension must be 2, got shape \(4, 3\)"):
        Normalizer("none", 2).normalize(DATA)
    with pytest.raises(ValueError, match="must hold 2 values"):
        Normalizer("min_max", 2, statistics=statistics())
    with pytest.raises(ValueError, match="lack 'std'"):
        Normalizer("min_max", 3, statistics={"mean": [0, 0, 0]})
    with pytest.raises(ValueError, match="mean of action is not finite"):
        Normalizer("min_max", 3, "action", statistics=statistics() | {"mean": [0, float("nan"), 0]})
