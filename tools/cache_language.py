"""Embed the task texts of a data set with CLIP, once: training and acting then need no CLIP.

The folder it prints can be copied; a policy finds it as `policy.text_cache`, by default in ~/.cache/vilma.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from vilma.policies.clip_text import ClipTextEncoder


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    texts = sorted({text for source in options.data for text in texts_of(source)})
    encoder = ClipTextEncoder(weights=options.weights, cache=options.cache)
    for text in texts:
        encoder.embed(text)
    print(f"{len(texts)} texts in {encoder.folder}")
    return 0


def texts_of(source: str) -> list[str]:
    """Texts of a .txt file (one a line), or the tasks of robomimic-layout files (a file, folder or glob)."""
    if source.endswith(".txt"):
        lines = Path(source).read_text().splitlines()
        return [line.strip() for line in lines if line.strip()]
    from vilma.datasets.robomimic import RobomimicConfig, RobomimicDataset

    config = RobomimicConfig(source, cameras=(), state_keys=(), images=False, depth=False, cache="none")
    texts = [text for text in RobomimicDataset(config).metadata["tasks"] if text]
    if not texts:
        raise ValueError(f"the episodes of {source} tell no task: list the texts in a .txt file, one a line")
    return texts


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vilma cache-language", description=__doc__)
    parser.add_argument(
        "data", nargs="+", help="robomimic-layout files or folders, or a .txt with a text a line"
    )
    parser.add_argument(
        "--weights", default="openai", help="open_clip's pretrained tag, or a file of weights (openai)"
    )
    parser.add_argument("--cache", metavar="DIR", help="folder of the embeddings ($VILMA_CACHE/clip)")
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
