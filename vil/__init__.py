"""Vision-LSTM backbones. Importing this room registers the family with timm.

``timm.create_model("vil2_tiny_patch16_224")`` then works as for any other model of timm, and
``timm.list_models("vil*")`` names the family.
"""

if __name__ != "vilma.vil":
    raise ImportError(f"this room is vilma.vil; it was imported as {__name__!r}: use `import vilma.vil`")

from vilma.extras import require_timm

require_timm()

from .vision_lstm import VisionLSTM, checkpoint_filter_fn  # noqa: E402

__all__ = ["VisionLSTM", "checkpoint_filter_fn"]
