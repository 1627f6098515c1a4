"""The two JSON files of a checkpoint, `manifest.json` and `state.json`: every field that is used is checked
before.
"""

import base64
import binascii
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from distlora.errors import UserError
from distlora.files.json_files import first_problem, parse_json, read_limited
from distlora.files.places import is_plain_name
from distlora.maths.rounding import Rounding

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"

#: Beyond 2⁵³ numbers are no whole numbers for other programs.
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)]


class NewerFormat(UserError):
    """A checkpoint that a newer version has written. It is not broken, and is not passed over."""


class _Checked(BaseModel):
    """Types as JSON has them; keys that are not known are of a later version, and are left alone."""

    model_config = ConfigDict(strict=True, extra="ignore")


# ---------------------------------------------------------------------- manifest.json


class ManifestEntry(_Checked):
    """Of one file: its size and its checksum."""

    bytes: Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Manifest(_Checked):
    """What a checkpoint consists of."""

    format: Annotated[int, Field(ge=1)]
    step: Count
    files: dict[str, ManifestEntry]

    @field_validator("files")
    @classmethod
    def _lie_in_the_checkpoint(cls, files: dict[str, ManifestEntry]) -> dict[str, ManifestEntry]:
        for name in files:
            if not is_plain_name(name):
                raise ValueError(f"{name[:80]} is no name of a file in the checkpoint")
        return files


def read_manifest(directory: Path) -> Manifest:
    """Raises OSError, and ValueError with the reason for a file that is damaged."""
    try:
        return Manifest.model_validate(parse_json(read_limited(directory / MANIFEST)))
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None


# ---------------------------------------------------------------------- state.json


class StoredModel(_Checked):
    """See `distlora.checkpoints.contents.describe_model`."""

    class_name: Annotated[str, Field(alias="class")]
    num_labels: Count | None = None
    labels: list[str | int | float | bool] | None = None
    problem_type: str | None = None
    pad_token_id: Count | None = None
    tied: dict[str, list[str]] = {}
    transposed: list[str] = []


class StoredEntry(_Checked):
    """Of the ledger; see `distlora.engine.ledger.Entry`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    number: Count
    rounding: Rounding
    columns: Annotated[int, Field(ge=1, le=1 << 31)]
    dtype: Literal["float32", "bfloat16", "float16"]
    beside: bool = False


class StoredRecomposition(_Checked):
    """See `distlora.recompose.recomposer.Recomposer.state`."""

    swaps: Count
    done: Count
    ended: bool
    born: dict[str, list[Annotated[int, Field(ge=-1, le=1 << 53)]]]
    origin: dict[str, list[Annotated[list[Count], Field(min_length=2, max_length=2)]]]
    reserves: dict[str, Count]
    switching: dict[str, Any]


class StoredState(_Checked):
    """See `distlora.checkpoints.save.save`. The fields with a default are missing in older checkpoints."""

    format: Annotated[int, Field(ge=1)]
    step: Count
    method: str
    settings: dict[str, Any] | None = None
    seed: Seed | None = None
    rank: Count
    targets: list[str]
    model: StoredModel
    optimizer_steps: Count
    identity: dict[str, Any]
    extra: dict[str, Any]
    ledger: dict[str, list[StoredEntry]] = {}
    weights: dict[str, Annotated[list[int], Field(min_length=2, max_length=2)]] = {}
    recompose: StoredRecomposition | None = None
    rng: dict[Literal["cpu", "cuda"], Annotated[list[str], Field(min_length=1)]]
    taken: Count | None = None
    engine_steps: Count | None = None

    @model_validator(mode="after")
    def _has_states_of_all_ranks(self) -> "StoredState":
        if "cpu" not in self.rng or len({len(of_ranks) for of_ranks in self.rng.values()}) != 1:
            raise ValueError("rng does not hold a state of each rank")
        try:
            for of_ranks in self.rng.values():
                for text in of_ranks:
                    base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise ValueError("rng holds what is not in base64") from None
        return self


def read_state(directory: Path, manifest: Manifest) -> dict[str, Any]:
    """The content of a checkpoint's `state.json`, as it is there.

    Raises OSError, NewerFormat, and ValueError with the reason for a file that is damaged or of another step.
    """
    content = parse_json(read_limited(directory / STATE))
    # One bit of one file may be wrong; it is a newer format only if both say so.
    if manifest.format > FORMAT and isinstance(content, dict) and content.get("format") == manifest.format:
        raise NewerFormat(
            f"{directory} is of format {manifest.format}, and this version of distlora reads checkpoints up "
            f"to format {FORMAT}; use a newer version"
        )
    try:
        state = StoredState.model_validate(content)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None
    if (manifest.format, state.format, state.step) != (FORMAT, FORMAT, manifest.step):
        raise ValueError(f"it is of another format or step than {MANIFEST} says")
    return content
