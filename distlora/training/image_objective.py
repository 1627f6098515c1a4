"""What is learned of images: a classifier's labels."""

from collections.abc import Sequence

import torch
from torch import nn

from distlora.data import (
    Encoded,
    ImageRows,
    ImageSample,
    blank_images,
    collate_images,
    image_labels,
    load_images,
)
from distlora.engine.protocol import Engine
from distlora.errors import UserError
from distlora.evaluation.scoring import label_scores
from distlora.models.image_processor import Pixels, check_pixels, load_image_processor
from distlora.models.loading import (
    attention_of,
    bare_model,
    check_sizes,
    head_parameters,
    load_config,
    load_model,
)
from distlora.models.losses import label_loss
from distlora.models.targets import Batch
from distlora.recipe.sections import Recipe
from distlora.tasks import get_task
from distlora.training.objective_base import Objective, refuse_packing


class ImageLabels(Objective):
    """A classifier learns the label of an image. `data.max_length` plays no part: all images are as large as
    the model's image processor makes them.
    """

    unit = "images"
    loss = staticmethod(label_loss)

    def __init__(self, recipe: Recipe):
        super().__init__(recipe)
        self.labels = image_labels(recipe.data)
        refuse_packing(recipe)
        if recipe.data.group_by_length:
            raise UserError(
                f"data.group_by_length: all images of the task {recipe.data.task} are of one size; set it to "
                "false"
            )
        if recipe.train.exact_match_samples:
            raise UserError(
                f"train.exact_match_samples: the task {recipe.data.task} generates no answers; set it to 0"
            )
        if recipe.train.neftune_alpha:
            raise UserError(
                "train.neftune_alpha is for embeddings of tokens, and images have none; set it to null"
            )

    def _rows(self, split: str) -> ImageRows:
        return ImageRows(self.recipe.data, split)

    def load_preprocessor(self) -> Pixels:
        return load_image_processor(self.recipe.model)

    def read(self, split: str, pixels: Pixels) -> Encoded:
        return load_images(self.recipe.data, split)

    def batch(self, samples: Sequence[ImageSample], pixels: Pixels, device: torch.device) -> Batch:
        return collate_images(samples, pixels, device, getattr(torch, self.recipe.model.dtype))

    def size(self, sample: ImageSample) -> int:
        return 1

    def load_config(self):
        return load_config(self.recipe.model, self.labels, images=True)

    def bare_model(self) -> nn.Module:
        model = bare_model(self.recipe.model, self.labels, images=True)
        check_pixels(model, self.load_preprocessor(), blank_images(), self.recipe.model.path)
        return model

    def check_sizes(self) -> dict[str, list[str]]:
        return check_sizes(self.recipe.model, self.labels, images=True)

    def load_model(self, other_sizes: dict[str, list[str]]) -> tuple[nn.Module, set[str]]:
        return load_model(self.recipe.model, self.labels, True, other_sizes)

    def attention(self) -> str:
        return attention_of(self.recipe.model, self.labels, images=True)

    def meta_sample(self, model: nn.Module, tokens: int = 2) -> Batch:
        """One image; tokens plays no part."""
        shape = self.load_preprocessor()(blank_images()[:1]).shape
        return {"pixel_values": torch.zeros(shape, dtype=model.dtype, device="meta")}

    def head(self, model: nn.Module) -> set[str]:
        return head_parameters(model)

    def score_names(self) -> tuple[str, ...]:
        return ("loss", *get_task(self.recipe.data.task).metrics)

    def evaluate(self, engine: Engine, pixels: Pixels, samples: Sequence[ImageSample]) -> dict[str, float]:
        metrics = get_task(self.recipe.data.task).metrics
        return label_scores(
            engine, samples, lambda part: self.batch(part, pixels, engine.comm.device),
            self.recipe.train.micro_batch_size, metrics,
        )  # fmt: skip
