"""An adapter in PEFT's files, whoever has written it."""

import hashlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from distlora.adapter.expert_layers import expert_weights
from distlora.adapter.linears import is_linear, shape_of
from distlora.errors import UserError
from distlora.exports.experts import ExpertEntry, expert_layer, from_peft
from distlora.exports.no_adapter import why_no_adapter
from distlora.exports.peft import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from distlora.exports.sources import MAGNITUDE_STEM, PREFIX
from distlora.files.atomic import sha256_of
from distlora.files.json_files import checked, parse_json, read_json
from distlora.files.tensors import TensorFiles
from distlora.maths.low_rank import LowRank

#: Beyond that, infinite and not a number.
LARGEST_ALPHA = 1e30
#: Bytes of a config at most.
LARGEST_CONFIG = 16 << 20
#: Characters of a pattern, and parts of it that may be repeated without end.
LONGEST_PATTERN, MOST_REPEATS = 500, 3
_A, _B = ".lora_A.weight", ".lora_B.weight"
#: Names with an adapter's own name in them, such as `lora_A.default.weight`.
_OF_STATE_DICT = re.compile(r"\.lora_[AB]\.[^.]+\.weight$|\.(?:modules_to_save|original_module)\.")


@dataclass(frozen=True)
class _Fields:
    """Of a config, what is used and not checked elsewhere."""

    base_model_name_or_path: str | None
    use_rslora: bool | None
    use_dora: bool | None
    target_parameters: list[str] | None


@dataclass(frozen=True)
class PeftFiles:
    """layers: (out, in) of every adapted layer, by its name in the bare model. magnitudes: the layers with
    trained row norms (DoRA). heads: shapes of the parameters that were trained whole. step: of the run that
    has exported it; 0 where the files do not say. experts: of the layers that are stacks of experts.
    """

    directory: Path
    config: dict[str, Any]
    files: TensorFiles
    layers: dict[str, tuple[int, int]]
    magnitudes: dict[str, str]
    heads: dict[str, tuple[int, ...]]
    step: int
    experts: dict[str, ExpertEntry] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of the content of both files."""
        names = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
        both = " ".join(sha256_of(self.directory / name) for name in names)
        return hashlib.sha256(both.encode()).hexdigest()

    def pair(self, layer: str) -> LowRank:
        """`W_trained = W0 + left @ right` in float32 (then scaled to the magnitude where there is one)."""
        factors = self.factors(layer)
        return LowRank(factors.left * self.scaling(layer), factors.right)

    def factors(self, layer: str) -> LowRank:
        """B and A as the files hold them, in float32: (out, r) and (r, in), with the experts before."""
        entry = self.experts.get(layer)
        module = layer if entry is None else entry.module
        a, b = (self.files.read(f"{PREFIX}{module}{side}").float() for side in (_A, _B))
        return LowRank(b, a) if entry is None else from_peft(LowRank(b, a), entry.count)

    def rank(self, layer: str) -> int:
        """Of a layer's pair, as the files hold it."""
        entry = self.experts.get(layer)
        module, count = (layer, 1) if entry is None else (entry.module, entry.count)
        return self.files.shape(f"{PREFIX}{module}{_A}")[0] // count

    def scaling(self, layer: str) -> float:
        """s in `W + s·B·A`."""
        rank = self.rank(layer)
        return float(_alpha(self.config, layer)) / (rank**0.5 if self.config.get("use_rslora") else rank)

    def stated(self, layer: str) -> tuple[Any, Any]:
        """The rank and the alpha that the config states for a layer."""
        return _of_pattern(self.config, "rank_pattern", layer, "r"), _alpha(self.config, layer)

    def magnitude(self, layer: str) -> Tensor:
        """(out,) float32."""
        return self.files.read(self.magnitudes[layer]).float().reshape(-1)

    def head(self, name: str) -> Tensor:
        return self.files.read(PREFIX + name)

    def refuse_other_model(self, model: nn.Module, path: str) -> None:
        """Raises UserError unless the model has these layers and heads in these shapes. path: the model's."""
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        base = self.config.get("base_model_name_or_path")
        hint = f" (it says {base})" if base and str(base) != path else ""
        other = f"{self.directory} is an adapter of another model{hint} than {path}"
        experts = expert_weights(model)
        for layer, shape in self.layers.items():
            if layer in self.experts:
                there = experts.get(layer)
                if there is None or (there.experts, there.shape) != (self.experts[layer].count, shape):
                    raise UserError(
                        f"{other}: this one has no {self.experts[layer].count} experts {layer} of {shape}"
                    )
                continue
            module = modules.get(layer)
            if module is None or not is_linear(module):
                raise UserError(f"{other}: this one has no linear layer {layer}")
            here = shape_of(module)
            if here != shape:
                raise UserError(f"{other}: its layer {layer} has the shape {shape}, and this one's {here}")
        shared = dict(model.named_parameters(remove_duplicate=False)).keys() - parameters.keys()
        for name, shape in self.heads.items():
            if name in shared:
                raise UserError(
                    f"{self.directory}: modules_to_save holds {name}, which {path} shares with another "
                    "module, and PEFT has trained a copy of it; merge the adapter into the model first"
                )
            there = parameters.get(name)  # under ZeRO-3 its own shape is that of a part
            found = None if there is None else tuple(getattr(there, "ds_shape", there.shape))
            if found != shape:
                what = f"has the shape {found}" if found else "is missing"
                raise UserError(f"{other}: its {name} has the shape {shape}, and this one's {what}")


def read_peft(directory: Path) -> PeftFiles:
    """Raises UserError for files that are missing, broken, half written, or no LoRA."""
    problem = why_no_adapter(str(directory), directory)
    if problem is not None:
        raise UserError(f"{directory}{problem}")
    config = _config(directory)
    if not (directory / ADAPTER_WEIGHTS).is_file():
        pickled = directory / "adapter_model.bin"
        if pickled.exists():
            raise UserError(
                f"{pickled} may hold programs, and is not loaded; save the adapter as {ADAPTER_WEIGHTS} "
                "(PEFT: save_pretrained(safe_serialization=True))"
            )
        raise UserError(
            f"{directory} has no {ADAPTER_WEIGHTS}: it is half written, or in a format that is not loaded"
        )
    try:
        files = TensorFiles(directory, ADAPTER_WEIGHTS.removesuffix(".safetensors"), {ADAPTER_WEIGHTS})
        shapes = {name: files.shape(name) for name in files.names}
        _refuse_whole_numbers(files)
        step, copies = _about(files.metadata(ADAPTER_WEIGHTS).get("distlora"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise UserError(f"{directory / ADAPTER_WEIGHTS} is broken ({error}); export it again") from error
    layers, magnitudes, heads, experts = {}, {}, {}, {}
    for name, shape in shapes.items():
        inner = name.removeprefix(PREFIX)
        if inner.endswith((_A, _B)):
            module = inner.removesuffix(_A).removesuffix(_B)
            shape = _shape(directory, module, shapes)
            layer = None if _is_linear(config, module) else expert_layer(config, module)
            layers[layer or module] = shape
            if layer:
                experts[layer] = _experts(directory, config, layer, module, shapes)
        elif MAGNITUDE_STEM in inner:
            magnitudes[inner.partition(MAGNITUDE_STEM)[0]] = name
        elif _OF_STATE_DICT.search(inner):
            raise UserError(
                f"{directory}: {name} is called as in a model's state_dict; write the adapter with PEFT's "
                "save_pretrained, which leaves the adapter's own name out"
            )
        elif ".base_layer." in inner:
            raise UserError(
                f"{directory}: {name} is the model's own weight under the adapter, which PEFT writes where a "
                "vocabulary was resized; write it with save_embedding_layers=False, or merge the adapter"
            )
        elif "lora_" in inner:
            raise UserError(f"{directory}: {name} belongs to no linear layer, which is not supported")
        elif inner not in copies:
            heads[inner] = shape
    if not layers:
        raise UserError(f"{directory} adapts no layer; export it again")
    if magnitudes and magnitudes.keys() != layers.keys():
        raise UserError(f"{directory}: some layers have magnitudes and others none; it is half written")
    for layer in layers:
        _check_alpha(directory / ADAPTER_CONFIG, config, layer)
    for layer, name in magnitudes.items():
        if math.prod(shapes[name]) != layers[layer][0]:
            raise UserError(
                f"{directory}: the magnitudes {shapes[name]} of layer {layer} do not fit its "
                f"{layers[layer][0]} rows; export it again"
            )
    return PeftFiles(directory, config, files, layers, magnitudes, heads, step, experts)


def _is_linear(config: dict[str, Any], module: str) -> bool:
    """Whether PEFT's files hold the pair of a layer under this name, as opposed to that of experts in it."""
    modules, weights = config.get("target_modules"), config.get("target_parameters")
    return any(
        isinstance(target, str) and f".{name}".endswith(f".{target}")
        for name, targets in ((module, modules), (f"{module}.weight", weights))
        for target in (targets if isinstance(targets, list) else [])
    )


def _refuse_whole_numbers(files: TensorFiles) -> None:
    """Raises ValueError for tensors that cannot be weights."""
    for name in files.names:
        if not files.dtype(name).is_floating_point:
            raise ValueError(f"its tensor {name} is of {files.dtype(name)}")


def _experts(
    directory: Path, config: dict[str, Any], layer: str, module: str, shapes: dict[str, tuple[int, ...]]
) -> ExpertEntry:
    rows, rank = shapes[f"{PREFIX}{module}{_A}"][0], _of_pattern(config, "rank_pattern", layer, "r")
    if type(rank) is not int or rank < 1 or rows % rank:
        raise UserError(
            f"{directory / ADAPTER_CONFIG}: the rank of {layer} is {json.dumps(rank)[:40]}, into which its "
            f"{rows} rows cannot be divided (r, rank_pattern); export the adapter again"
        )
    return ExpertEntry(module, rows // rank)


def _about(about: str | None) -> tuple[int, set[str]]:
    """The step that an export has noted in the file, 0 where there is none, and the names of parameters that
    repeat another one. Raises ValueError."""
    content = {} if about is None else parse_json(about)
    step = content.get("step", 0) if isinstance(content, dict) else None
    if type(step) is not int or step < 0:
        raise ValueError(f"its metadata says distlora={about[:60]}")
    model = content.get("model")
    shared = model.get("tied", {}) if isinstance(model, dict) else {}
    if not isinstance(shared, dict) or not all(isinstance(names, list) for names in shared.values()):
        raise ValueError(f"its metadata says distlora={about[:60]}")
    return step, {str(name) for names in shared.values() for name in names}


def _config(directory: Path) -> dict[str, Any]:
    path = directory / ADAPTER_CONFIG
    try:
        config = read_json(path, LARGEST_CONFIG, unique=False)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON ({error}); export the adapter again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise UserError(f"{path}: peft_type is {str(kind)[:40]}; only LORA (and DoRA) is loaded")
    try:
        checked(_Fields, {name: config.get(name) for name in _Fields.__dataclass_fields__})
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); export the adapter again") from None
    unsupported: dict[str, Callable[[Any], bool]] = {
        "lora_bias": bool, "bias": lambda value: value not in (None, "none"),
        "layer_replication": bool, "alora_invocation_tokens": bool,
    }  # fmt: skip
    for key, is_set in unsupported.items():
        if is_set(config.get(key)):
            raise UserError(
                f"{path}: {key}={str(config[key])[:40]} is not supported; merge the adapter first"
            )
    for key in ("rank_pattern", "alpha_pattern"):
        _check_patterns(path, key, config.get(key))
    return config


def _check_patterns(path: Path, key: str, patterns: Any) -> None:
    """Raises UserError unless these are numbers by patterns of names, or none."""
    if not isinstance(patterns, dict | None):
        raise UserError(f"{path}: {key} has no number for each pattern; export the adapter again")
    for pattern in patterns or ():
        try:
            _refuse_slow(pattern)
            re.compile(_at_the_end(pattern))
        except (re.error, ValueError, OverflowError, RecursionError) as error:
            raise UserError(
                f"{path}: {key} has {pattern!r}, which is no pattern ({error}); export the adapter again"
            ) from None


def _refuse_slow(pattern: str) -> None:
    """Raises ValueError for a pattern of a stranger that could take very long on a name."""
    repeats = re.sub(r"\\.|\[[^\]]*\]", "", pattern)
    count = sum(map(repeats.count, "*+{"))
    if (
        len(pattern) > LONGEST_PATTERN
        or count > MOST_REPEATS
        or (count > 1 and re.search(r"\)[*+{]", repeats))
    ):
        raise ValueError("it is too long, or repeats too much")


def _check_alpha(path: Path, config: dict[str, Any], layer: str) -> None:
    """Raises UserError unless a layer's alpha is a number."""
    alpha = _alpha(config, layer)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < LARGEST_ALPHA:
        raise UserError(
            f"{path}: the alpha of layer {layer} is {json.dumps(alpha)[:40]} and no number "
            "(lora_alpha, alpha_pattern); export the adapter again"
        )


def _shape(directory: Path, layer: str, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int]:
    a, b = (shapes.get(f"{PREFIX}{layer}{side}") for side in (_A, _B))
    if a is None or b is None:
        raise UserError(f"{directory}: layer {layer} has only one of A and B; it is half written")
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise UserError(f"{directory}: A {a} and B {b} of layer {layer} do not fit together; export it again")
    if a[0] == 0:
        raise UserError(f"{directory}: layer {layer} has the rank 0; export it again")
    return b[0], a[1]


def _alpha(config: dict[str, Any], layer: str) -> Any:
    return _of_pattern(config, "alpha_pattern", layer, "lora_alpha")


def _of_pattern(config: dict[str, Any], patterns: str, layer: str, usual: str) -> Any:
    """PEFT's rule: the first pattern that matches the end of the name, else the usual one."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(_at_the_end(pattern), layer):
            return value
    return config.get(usual, 8)


def _at_the_end(pattern: str) -> str:
    return rf"(.*\.)?({pattern})$"


def digest_of_weights(directory: Path) -> str:
    """Of a model's files: names, sizes, and the ends of each, so that large ones are not read whole."""
    digest, ends = hashlib.sha256(), 1 << 20
    for path in sorted([*directory.glob("*.safetensors"), directory / "config.json"]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            digest.update(file.read(ends))
            file.seek(max(0, size - ends))
            digest.update(file.read(ends))
    return digest.hexdigest()
