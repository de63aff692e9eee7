"""The reference VLM: a small LLaVA trained from scratch by this project, its scenes, questions and scoring.

It answers questions about handwritten digits on cluttered pictures and was trained with every token in place,
so it shows what a token reduction method costs in accuracy where no large model can be run.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

WEIGHTS_SHA256 = "c685f4022615b83ec1fc003e631440c9c2f7f97e92ed4efca18264c1ee38aabf"
"""SHA-256 of weights/model.safetensors."""


def path() -> Path:
    """Folder of the weights, tokenizer and processor; FileNotFoundError if they are not installed."""
    folder = Path(__file__).parent / "weights"
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the reference VLM's weights are missing: {folder / 'model.safetensors'} does not exist;"
            " reinstall lightvlm, or train them with python -m lightvlm.reference_vlm.train"
        )
    return folder


def load(
    dtype: torch.dtype | None = None, attn_implementation: str = "sdpa"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load the model, in evaluation mode, and its processor.

    Args:
        dtype: of the weights; float32 if None (they are stored in float16).
        attn_implementation: as transformers takes it.
    """
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = path()
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype or torch.float32, attn_implementation=attn_implementation, local_files_only=True
    )
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)
