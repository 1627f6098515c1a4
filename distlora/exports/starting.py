"""A run that starts from somebody's LoRA in PEFT's files: what of it is taken over, and what is refused.

The adapter decides the rank, the alpha and the layers. Where the recipe sets one of them, too, it must be the
same. Dropout, and everything of training, is the recipe's. The weights are those of the recipe's model.
"""

from collections.abc import Collection

from torch import nn

from distlora.adapter.targets import in_short
from distlora.errors import UserError
from distlora.exports.no_adapter import why_no_adapter
from distlora.exports.peft import ADAPTER_CONFIG
from distlora.exports.peft_files import PeftFiles, read_peft
from distlora.files.user_paths import user_path
from distlora.methods import Factors, Method, StartsFromAdapter, magnitude_of, registry, start_of

#: Starts after which PEFT keeps other weights than the pretrained ones beside the pair.
_CHANGED_WEIGHTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
#: Settings under which a layer of PEFT's computes something else than `W + s·B·A`.
_OTHER_LAYERS = (
    "trainable_token_indices", "megatron_config", "velora_config", "monteclora_config", "kasa_config",
    "use_qalora", "use_bdlora", "arrow_config",
)  # fmt: skip


class Start:
    """The adapter of a method whose `from` names it. Reads headers; tensors one layer at a time.

    Raises UserError for what is no such adapter, and for what it has and a method cannot take over.
    """

    def __init__(self, directory: str):
        place = user_path(directory, "method.from")
        problem = why_no_adapter(directory, place)
        if problem is not None:
            raise UserError(f"method.from={directory}{problem}")
        self.files: PeftFiles = read_peft(place)
        self._config = place / ADAPTER_CONFIG
        self._refuse_other_forms()
        self.rank, self.alpha = self._one_form()

    @property
    def layers(self) -> list[str]:
        return list(self.files.layers)

    def _refuse_other_forms(self) -> None:
        config = self.files.config
        start = config.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGED_WEIGHTS):
            raise UserError(
                f"{self._config}: init_lora_weights={start} keeps other weights than the model's beside the "
                "adapter; convert it with PEFT (path_initial_model_for_weight_conversion) to start from it"
            )
        for key in _OTHER_LAYERS:
            if config.get(key):
                raise UserError(f"{self._config}: {key} is set, which no method here has; merge the adapter")
        for name in self.files.files.names:
            if not _is_float(self.files, name):
                raise UserError(f"{self.files.directory}: {name} holds no floating-point numbers")

    def _one_form(self) -> tuple[int, float]:
        """The rank and the alpha of all layers."""
        found: dict[tuple[int, float], str] = {}
        for layer in self.layers:
            stated, alpha = self.files.stated(layer)
            rank = self.files.rank(layer)
            if stated != rank:
                raise UserError(
                    f"{self._config}: it says rank {stated} of layer {layer}, whose tensors have rank {rank} "
                    "(r, rank_pattern); export the adapter again"
                )
            if not alpha > 0:
                raise UserError(
                    f"{self._config}: the alpha of layer {layer} is {alpha:g}; wanted a number above 0"
                )
            found.setdefault((rank, float(alpha)), layer)
        if len(found) > 1:
            (first, one), (second, other) = list(found.items())[:2]
            raise UserError(
                f"{self._config}: rank_pattern or alpha_pattern gives {one} rank {first[0]}, alpha "
                f"{first[1]:g} and {other} rank {second[0]}, alpha {second[1]:g}; a run has one rank and one "
                "alpha for all layers"
            )
        return next(iter(found))

    # ------------------------------------------------------------------ what it says of a run

    def fitted(self, method: StartsFromAdapter) -> Method:
        """The method with the adapter's rank and alpha. Raises UserError where it is of another kind, or has
        set other ones.
        """
        config, given = self.files.config, method.model_fields_set
        form = bool(config.get("use_rslora")), bool(config.get("use_dora"))
        if form != method.peft_form:
            names = [name for name, cls in registry().items() if getattr(cls, "peft_form", None) == form]
            instead = f"set method.name to {names[0]}" if names else "no method here is both; merge it"
            raise UserError(
                f"{self._config}: use_rslora={str(form[0]).lower()} and use_dora={str(form[1]).lower()} is "
                f"not method {method.name}; {instead}"
            )
        for key, own in (("rank", self.rank), ("alpha", self.alpha)):
            asked = getattr(method, key)
            if key in given and asked is not None and asked != own:
                raise UserError(
                    f"method.{key} is {asked:g}, and the adapter that the run starts from "
                    f"({self.files.directory}) has {own:g}; leave it out, or set it to that"
                )
        return method.model_copy(update={"rank": self.rank, "alpha": self.alpha})

    def check_model(self, model: nn.Module, path: str) -> None:
        """Raises UserError unless the model, with or without its weights, has the adapter's layers and heads.
        path: what the message calls the model.
        """
        self.files.refuse_other_model(model, path)

    def check_layers(self, chosen: Collection[str]) -> None:
        """Raises UserError unless the layers that a run adapts are those of the adapter."""
        own, chosen = set(self.layers), set(chosen)
        if own == chosen:
            return
        lacks, more = sorted(own - chosen), sorted(chosen - own)
        which = f"also means {in_short(more)}" if more else f"leaves out {in_short(lacks)}"
        raise UserError(
            f"targets {which}, other than the adapter that the run starts from ({self.files.directory}); "
            "leave targets out, so that they are the adapter's"
        )

    def check_heads(self, trained: Collection[str]) -> None:
        """Raises UserError for a parameter that the adapter holds whole and the run does not train."""
        for name in sorted(set(self.files.heads) - set(trained)):
            raise UserError(
                f"{self._config}: modules_to_save holds {name}, which this run does not train whole; "
                "merge the adapter into the model first"
            )

    def factors(self, layer: str, method: Method) -> Factors:
        """What the layer starts with: float32, on the CPU. Raises UserError for numbers that are not
        finite.
        """
        pair = self.files.factors(layer)
        found = {method.path[0]: pair.right, method.path[-1]: pair.left}
        magnitude = magnitude_of(method)
        if magnitude is not None:
            found[magnitude] = self.files.magnitude(layer)
        for tensor in found.values():
            if not tensor.isfinite().all():
                raise UserError(
                    f"{self.files.directory}: layer {layer} has numbers that are infinite or not a number"
                )
        return found


def _is_float(files: PeftFiles, name: str) -> bool:
    try:
        return files.files.dtype(name).is_floating_point
    except KeyError:  # a dtype that only packed weights have
        return False


def start_from(method: Method) -> Start | None:
    """The adapter that a method starts from; None where its `from` is not set. Errors: as of `Start`."""
    directory = start_of(method)
    return None if directory is None else Start(directory)


def without_start(method: Method) -> Method:
    """The same method, for what is done with its factors once they were trained."""
    return method if start_of(method) is None else method.model_copy(update={"from": None})
