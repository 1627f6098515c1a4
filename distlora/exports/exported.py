"""An earlier export as a source of another one."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from distlora.checkpoints.stored import Count, StoredModel
from distlora.errors import UserError
from distlora.exports.experts import from_peft, peft_module
from distlora.exports.sources import MAGNITUDE_STEM, PREFIX
from distlora.files.json_files import first_problem, parse_json
from distlora.files.tensors import TensorFiles
from distlora.maths.low_rank import LowRank

WEIGHTS = "adapter_model.safetensors"


class About(BaseModel):
    """What an export notes in its file of weights."""

    model_config = ConfigDict(strict=True, extra="ignore")

    step: Count
    model: StoredModel
    stacked: list[str] = []
    experts: dict[str, Annotated[int, Field(ge=1, le=1 << 20)]] = {}


def _about(directory: Path, metadata: dict[str, str]) -> dict[str, Any]:
    try:
        content = parse_json(metadata["distlora"])
        About.model_validate(content)
        return content
    except KeyError:
        reason = "it does not say of which run"
    except ValidationError as error:
        reason = first_problem(error)
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{directory / WEIGHTS} was not exported by this program, or is damaged ({reason})")


class AdapterSource:
    """The PEFT files of an earlier export. Alpha is the rank there, so the pair is B and A as they are."""

    def __init__(self, directory: Path):
        """Raises UserError for files that no run has exported, or that are damaged."""
        self._files = TensorFiles(directory, WEIGHTS.removesuffix(".safetensors"), {WEIGHTS})
        about = _about(directory, self._files.metadata(WEIGHTS))
        self.step, self.model, self.stacked = about["step"], about["model"], set(about.get("stacked", ()))
        self.layers, self.heads = {}, {}
        self._norms: dict[str, str] = {}
        self._experts: dict[str, int] = about.get("experts", {})
        modules = {peft_module(layer, self._experts): layer for layer in self._experts}
        self._module = {layer: module for module, layer in modules.items()}
        for name in self._files.names:
            layer, ending = name.removeprefix(PREFIX), ".lora_A.weight"
            if MAGNITUDE_STEM in layer:
                self._norms[layer.partition(MAGNITUDE_STEM)[0]] = name
            elif layer.endswith(ending):
                module = layer.removesuffix(ending)
                layer = modules.get(module, module)
                self.layers[layer] = self._pair_shape(directory, module, self._experts.get(layer))
            elif not layer.endswith(".lora_B.weight"):
                self.heads[layer] = self._files.shape(name)
        for others in self.model.get("tied", {}).values():  # the same tensors under their other names
            for other in others:
                self.heads.pop(other, None)
        self.targets, self.magnitudes = list(self.layers), set(self._norms)

    def _pair_shape(self, directory: Path, module: str, experts: int | None) -> tuple[int, ...]:
        a, b = (self._files.shape(f"{PREFIX}{module}.lora_{side}.weight") for side in "AB")
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] < 1 or a[0] % (experts or 1):
            raise UserError(f"{directory}: A {a} and B {b} of {module} do not fit together; export it again")
        return (a[0] // (experts or 1), *([experts] if experts else []), b[0], a[1])

    def low_rank(self, layer: str) -> LowRank:
        module = self._module.get(layer, layer)
        a, b = (self._files.read(f"{PREFIX}{module}.lora_{side}.weight").float() for side in "AB")
        pair = LowRank(b, a)
        return from_peft(pair, self._experts[layer]) if layer in self._experts else pair

    def magnitude(self, layer: str) -> Tensor:
        return self._files.read(self._norms[layer]).float()

    def read(self, head: str) -> Tensor:
        return self._files.read(PREFIX + head)
