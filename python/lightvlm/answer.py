"""``lightvlm generate``: answer a question about images with a model of transformers and a method on it."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .catalogue import make_plan, parse_options

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image
    from transformers import PretrainedConfig

REFERENCE = "reference"
"""The name under which ``--model`` finds the reference VLM."""
_DTYPES = ("auto", "float32", "float16", "bfloat16")
_ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="ID_OR_DIR",
        help=f"folder or hub id of a VLM of transformers; {REFERENCE!r} is the one shipped here",
    )
    parser.add_argument(
        "--image", required=True, action="append", metavar="FILE", help="may be given several times"
    )
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument(
        "--method", default="lightvlm", metavar="NAME", help="see `lightvlm methods`; default %(default)s"
    )
    parser.add_argument(
        "--keep", type=float, metavar="R", help="final share of each image's tokens, in (0, 1]"
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method; may be given several times",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default %(default)s")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=_DTYPES,
        help="of the weights; auto: as stored, but float16 becomes float32 on a CPU",
    )
    parser.add_argument(
        "--device", default=None, help="cpu, cuda or cuda:N; default: a GPU where one is usable"
    )
    parser.add_argument("--attention", default="sdpa", choices=_ATTENTIONS,
                        help="implementation of transformers; default %(default)s")  # fmt: skip


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Returns {"text", "new_tokens", "report"}; what is cheap to check is checked before anything is loaded."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if not args.prompt.strip():
        raise ValueError("--prompt must not be empty")
    options = parse_options(args.option)
    if args.keep is not None:
        options["keep"] = args.keep
    plan = make_plan(args.method, options)
    images = [read_image(name) for name in args.image]
    device = pick_device(args.device)
    folder, config = find_model(args.model)

    import torch
    from transformers import AutoModelForImageTextToText

    from .processing import encode, load_processor
    from .runtime import attach

    processor = load_processor(folder, config)
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=_dtype(args.dtype, config, device), attn_implementation=args.attention
    )
    model = model.eval().to(device)
    encoded = encode(processor, images, args.prompt).to(device, model.dtype)
    known = inspect.signature(model.forward).parameters  # older versions do without mm_token_type_ids
    inputs = {name: value for name, value in encoded.items() if name in known}
    with attach(model, plan) as handle, torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
    new = tokens[:, inputs["input_ids"].shape[1] :]
    text = processor.batch_decode(new, skip_special_tokens=True)[0].strip()
    return {"text": text, "new_tokens": int(new.shape[1]), "report": handle.report().to_dict()}


def show(result: dict[str, Any]) -> None:
    """Print the answer and the report."""
    from .report import Report

    print(f"{result['text']}\n\n{result['new_tokens']} new tokens\n{Report(**result['report'])}")


def read_image(name: str) -> Image:
    """An image file in RGB, turned the way its camera says.

    Raises:
        ValueError: no such file, or none that Pillow reads.
    """
    from PIL import Image, ImageOps

    if not Path(name).is_file():
        raise ValueError(f"--image: no such file: {name}")
    try:
        with Image.open(name) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"--image: {name} cannot be read as an image: {error}") from error


def pick_device(name: str | None) -> torch.device:
    """The device of that name, or the first GPU that torch can use, or the CPU.

    Raises:
        ValueError: no such device here.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        found = f"torch {torch.__version__} finds {torch.cuda.device_count()} GPUs"
        raise ValueError(f"--device {name} cannot be used: {found}")
    return device


def find_model(name: str) -> tuple[str, PretrainedConfig]:
    """Where ``from_pretrained`` finds the model that ``--model`` names, and its configuration.

    Raises:
        ValueError: no such folder, a folder without a model, or a model lightvlm does not know.
    """
    from transformers import AutoConfig

    from .models import supported_classes

    if name == REFERENCE:
        from .reference_vlm import path

        name = str(path())
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"--model: {name} is no model folder: it has no config.json")
        name = str(folder)
    elif folder.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"--model: no such folder: {name}")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"--model: cannot read the configuration of {name}: {error}") from error
    classes = getattr(config, "architectures", None) or []
    if classes and not set(classes) & set(supported_classes()):
        known = ", ".join(supported_classes())
        raise ValueError(
            f"--model: {name} is a {classes[0]}, which lightvlm does not know; supported: {known}"
        )
    return name, config


def _dtype(name: str, config: PretrainedConfig, device: torch.device) -> torch.dtype | str:
    import torch

    if name != "auto":
        found: torch.dtype = getattr(torch, name)
        return found
    stored = getattr(config, "dtype", None)
    return torch.float32 if device.type == "cpu" and stored in (torch.float16, "float16") else "auto"
