"""Images with labels: CIFAR-10, the data sets of SRLoRA's paper (arXiv 2505.12433), and any others."""

from dataclasses import dataclass, field

from distlora.tasks.base import Task


@dataclass(frozen=True)
class ImageTask(Task):
    """An image, and the label to predict.

    columns: for "image" and "label", the names that the column has in the various copies of the data set.
    labels: the names of the labels, in the order of their numbers; empty if the recipe or the folders of the
    images name them. metrics: names from `distlora.tasks.metrics` that are reported beside the loss.
    """

    columns: dict[str, tuple[str, ...]] = field(
        default_factory=lambda: {"image": ("image", "img"), "label": ("label",)}
    )
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)


_CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck"
_STL10 = "airplane bird car cat deer dog horse monkey ship truck"
_CIFAR100 = """
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can
    castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin
    elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard
    lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear
    pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal
    shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank
    telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm
"""

TASKS: dict[str, ImageTask] = {
    "cifar10": ImageTask(labels=tuple(_CIFAR10.split()), path="uoft-cs/cifar10"),
    "cifar100": ImageTask(
        columns={"image": ("img", "image"), "label": ("fine_label", "label")},
        labels=tuple(_CIFAR100.split()),
        path="uoft-cs/cifar100",
    ),
    "stl10": ImageTask(labels=tuple(_STL10.split()), path="tanganke/stl10"),
    "mnist": ImageTask(labels=tuple("0123456789"), path="ylecun/mnist"),
    "images": ImageTask(),
}
