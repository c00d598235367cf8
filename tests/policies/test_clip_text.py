"""CLIP's text encoder behind its cache; the network has random weights, and open_clip's own tokeniser."""

import copy
import importlib.util
import json
import sys

import numpy as np
import pytest
import torch

from vilma.policies import clip_text
from vilma.policies.clip_text import DIM, MODEL, ClipTextEncoder

needs_clip = pytest.mark.skipif(
    importlib.util.find_spec("open_clip") is None, reason="needs the extra language (open_clip)"
)


# ViT-B/32 with fewer and narrower layers; its vocabulary, context and width of embeddings.
SMALL = {
    "embed_dim": DIM,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="module", params=["small", pytest.param(MODEL, marks=pytest.mark.long)])
def random_weights(request, tmp_path_factory):
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("clip")
    (folder / "small.json").write_text(json.dumps(SMALL))
    open_clip.add_model_config(folder / "small.json")
    torch.manual_seed(0)
    network = open_clip.create_model(request.param, pretrained=None)
    torch.save(network.state_dict(), folder / "random.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_text, "MODEL", request.param)
        yield folder / "random.pt", network.eval(), open_clip.get_tokenizer(request.param)


@needs_clip
def test_path_through_open_clip(random_weights, tmp_path, monkeypatch):
    file, network, tokens = random_weights
    texts = ["lift the red cube", "open the drawer", "lift the red cube"]
    encoder = ClipTextEncoder(weights=str(file), cache=tmp_path)
    vectors = encoder(texts)
    with torch.no_grad():
        torch.testing.assert_close(vectors, network.encode_text(tokens(texts)), rtol=1e-4, atol=1e-4)
    assert not list(encoder.parameters()) and not encoder.state_dict()
    average = copy.deepcopy(encoder)
    assert not average._network and torch.equal(average(texts), vectors)
    assert len(list(encoder.folder.glob("*.npy"))) == 2
    # Now from disk: neither open_clip nor the weights are needed.
    monkeypatch.setitem(sys.modules, "open_clip", None)
    again = ClipTextEncoder(weights=file.name, cache=tmp_path)
    assert torch.equal(again(texts), vectors)
    with pytest.raises(
        ValueError, match=r"no CLIP embedding of 'close it' in .*[Rr]un `vilma cache-language"
    ):
        again(["close it"])


@needs_clip
def test_other_weights_of_the_same_name_are_refused(random_weights, tmp_path):
    file, network, _ = random_weights
    ClipTextEncoder(weights=str(file), cache=tmp_path)(["lift"])
    other = tmp_path / file.name
    torch.save({name: 1.5 * value for name, value in network.state_dict().items()}, other)
    with pytest.raises(ValueError, match="embeddings of other weights of the same name"):
        ClipTextEncoder(weights=str(other), cache=tmp_path)(["open"])


@needs_clip
def test_command(random_weights, tmp_path, capsys):
    from vilma.tools.cache_language import main

    texts = tmp_path / "texts.txt"
    texts.write_text("lift the cube\n\nopen the drawer\nlift the cube\n")
    assert main([str(texts), "--weights", str(random_weights[0]), "--cache", str(tmp_path)]) == 0
    assert "2 texts in" in capsys.readouterr().out
    again = ClipTextEncoder(weights=random_weights[0].name, cache=tmp_path)
    assert again(["open the drawer"]).shape == (1, DIM)


def written(folder, text, vector):
    import hashlib

    encoder = ClipTextEncoder(weights="openai", cache=folder)
    encoder.folder.mkdir(parents=True, exist_ok=True)
    file = encoder.folder / f"{hashlib.sha256(text.encode()).hexdigest()[:40]}.npy"
    np.save(file, vector)
    return encoder, file


def test_cached_embeddings_need_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    vector = np.arange(DIM, dtype=np.float32)
    encoder, _ = written(tmp_path, "lift", vector)
    assert torch.equal(encoder(["lift", "lift"]), torch.from_numpy(np.stack([vector, vector])))


@pytest.mark.parametrize(
    "vector", [np.zeros(7, np.float32), np.full(DIM, np.nan, np.float32), np.array(["text"] * DIM)]
)
def test_damaged_embeddings_are_not_zeros(tmp_path, vector):
    encoder, file = written(tmp_path, "lift", vector)
    with pytest.raises(ValueError, match=r"delete it, then run `vilma cache-language"):
        encoder(["lift"])
    file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"delete it, then run `vilma cache-language"):
        encoder(["lift"])


def test_what_to_run_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    encoder = ClipTextEncoder(cache=tmp_path)
    with pytest.raises(ValueError, match=r"no CLIP embedding of 'lift' in .*vilma cache-language DATA"):
        encoder(["lift"])
    with pytest.raises(ValueError, match="at least one word"):
        encoder([" "])
    with pytest.raises(ValueError, match="set text_dim to 512, not 64"):
        ClipTextEncoder(64)
