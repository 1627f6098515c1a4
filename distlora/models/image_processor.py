"""What a model wants of an image: size and normalisation, by its own preprocessor_config.json."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor

from distlora.errors import UserError
from distlora.models.foreign import check_configs, quiet, readable
from distlora.models.hub import resolve_path
from distlora.models.loading import ModelChoice
from distlora.sentences import first_line

FILE = "preprocessor_config.json"

#: From images (Pillow's, in RGB) to what the model takes: float32 (images, channels, height, width).
Pixels = Callable[[Sequence[Any]], Tensor]


def load_image_processor(section: ModelChoice) -> Pixels:
    """The model's own preparation of images. It works on the CPU, with Pillow, whether torchvision is
    installed or not, because the two interpolate differently.

    Raises UserError if the model's directory does not say how.
    """
    directory = resolve_path(section.path)
    if not (directory / FILE).is_file():
        raise UserError(
            f"model.path={section.path}: no {FILE} in {directory}, which says how large the images "
            "are and how they are normalised; save the model's image processor there"
        )
    check_configs(section.path, directory)
    with readable(section.path, FILE), quiet():
        processor = AutoImageProcessor.from_pretrained(directory, backend="pil", trust_remote_code=False)
    return lambda images: processor(images=list(images), return_tensors="pt")["pixel_values"]


def check_pixels(model: nn.Module, pixels: Pixels, images: Sequence, path: str) -> None:
    """Raises UserError unless the model takes what `pixels` makes of images of any size.

    model: on the meta device. images: of different sizes. path: the model's, for the sentence.
    """
    try:
        shapes = {tuple(pixels([image]).shape) for image in images}
        if len(shapes) > 1:
            raise ValueError(
                "images of different shapes keep different sizes; set a crop, or height and width"
            )
        with torch.no_grad():
            model(pixel_values=torch.zeros(*shapes, dtype=model.dtype, device="meta"))
    except (ValueError, RuntimeError, TypeError, KeyError) as error:
        raise UserError(
            f"model.path={path}: the model does not take images as {FILE} makes them ({first_line(error)})"
        ) from error
