import hashlib
import inspect
import subprocess
import sys

import pytest
import torch

from vilma.policies.language import HashedTextEncoder, build_text_encoder, ngrams


def test_unit_vectors_by_similarity():
    texts = ["lift the red cube", "lift the green cube", "close the drawer", "lift the red cube"]
    vectors = HashedTextEncoder()(texts)
    assert vectors.shape == (4, 512)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(4))
    assert torch.equal(vectors[0], vectors[3])
    likeness = vectors @ vectors.T
    assert 0.3 < likeness[0, 1] < 0.95
    assert likeness[0, 2] < likeness[0, 1] - 0.2


def digest():
    vectors = HashedTextEncoder()(["lift the red cube", "Öffne die Schublade"])
    return hashlib.sha256(vectors.numpy().astype("<f4").tobytes()).hexdigest()


def test_same_in_every_process():
    # The value itself: an embedding that changed would make saved policies read other words.
    assert digest() == "cc3875a2a61a13ffe8953a76a28786e7f2c3cbef8692fdf8385552b1781a19d6"
    code = (
        f"import hashlib\nfrom vilma.policies.language import HashedTextEncoder\n{inspect.getsource(digest)}"
    )
    other = subprocess.run(
        [sys.executable, "-c", code + "print(digest())"],
        env={"PYTHONHASHSEED": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert other.stdout.strip() == digest()


def test_case_spacing_and_punctuation_do_not_matter():
    encoder = HashedTextEncoder(64)
    a, b = encoder(["Lift the cube.", "  lift   the CUBE"])
    assert torch.equal(a, b)
    assert not torch.equal(*encoder(["cube on table", "table on cube"]))


def test_ngrams():
    assert ngrams("Go on") == [
        "w:go",
        "w:on",
        "p:go on",
        "c:<go",
        "c:go>",
        "c:<go>",
        "c:<on",
        "c:on>",
        "c:<on>",
    ]


@pytest.mark.parametrize("text", ["", "  ", "?!", None])
def test_a_text_without_words_is_refused(text):
    with pytest.raises(ValueError, match="at least one word, got"):
        HashedTextEncoder()(["lift", text])


def test_table_of_tasks():
    torch.manual_seed(0)
    encoder = build_text_encoder("table", 16, tasks=("lift the cube", "Open the drawer"))
    a, b, c = encoder(["Lift the cube.", "open the  drawer", "lift the cube"])
    assert torch.equal(a, c) and not torch.equal(a, b)
    assert 0.5 < a.norm() < 1.6
    a.sum().backward()
    assert encoder.vectors.weight.grad[0].eq(1).all() and encoder.vectors.weight.grad[1].eq(0).all()
    with pytest.raises(
        ValueError, match=r"'lift the can' is not in the policy's table .*; close: lift the cube"
    ):
        encoder(["lift the can"])
    with pytest.raises(ValueError, match="it knows: lift the cube, open the drawer"):
        encoder(["xyz"])
    with pytest.raises(ValueError, match="names a task twice"):
        build_text_encoder("table", 16, tasks=("lift", "Lift!"))
    with pytest.raises(ValueError, match=r"list them in policy\.tasks"):
        build_text_encoder("table", 16)


def test_errors():
    with pytest.raises(ValueError, match="unknown text encoder 'bert'; known: hashed, table, clip"):
        build_text_encoder("bert", 512)
    with pytest.raises(ValueError, match="single string 'lift'"):
        HashedTextEncoder()("lift")


def test_larger_than_one_digest():
    vectors = HashedTextEncoder(1000)(["lift the red cube"])
    assert vectors.shape == (1, 1000)
    assert not torch.equal(vectors[0, :488], vectors[0, 512:])
