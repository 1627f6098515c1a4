"""An export on the Hugging Face hub."""

import json
from pathlib import Path, PurePath

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from distlora.errors import UserError
from distlora.files.problems import is_of_the_disk
from distlora.sentences import first_line

#: Keys by which files of an export name the model under it.
_BASE_KEYS = {"adapter_config.json": "base_model_name_or_path", "config.json": "_name_or_path"}


def check_upload(name: str, private: bool = False) -> None:
    """Raises UserError where an upload cannot begin: the name is none, nobody is logged in, the hub is turned
    off, or what shall be private would be public. Only for the last the hub is asked.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"--push {name}: no repository can have this name; give OWNER/NAME") from None
    if is_offline_mode():
        raise UserError(f"--push {name}: HF_HUB_OFFLINE is set; unset it, or leave --push out")
    if not get_token():
        raise UserError(f"--push {name}: there is no token for the hub; run `hf auth login`, or set HF_TOKEN")
    if private and _is_public(name):
        raise UserError(
            f"--push {name} --private: this repository exists and is public; make it private in its settings "
            "on the hub, or take another name"
        )


def _is_public(name: str) -> bool:
    """Whether the repository is there, and everybody can read it."""
    try:
        return not HfApi().repo_info(name, repo_type="model").private
    except RepositoryNotFoundError:
        return False
    except Exception as error:  # as in `upload`
        raise UserError(f"--push {name} --private: {_why_no_upload(error)}") from error


def upload(directory: Path, name: str, private: bool = False) -> str:
    """Sends all files of a directory to the repository of models `name`, which is made if it is not there.
    private: of one that is made. Returns its address. A directory of this machine under which the base model
    lies is not sent: only its last part.

    Raises UserError, in one sentence, for every way in which that can fail; the files stay where they are.
    """
    check_upload(name, private)
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, repo_type="model", exist_ok=True)
        api.create_commit(
            address.repo_id, _operations(directory), commit_message="Export of distlora", repo_type="model"
        )
    except Exception as error:  # the hub's own, its HTTP client's, its transfer library's, the system's
        raise UserError(f"--push {name}: {_why_no_upload(error)}; the export is in {directory}") from error
    return str(address)


def _operations(directory: Path) -> list[CommitOperationAdd]:
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return [CommitOperationAdd(path.relative_to(directory).as_posix(), _content(path)) for path in files]


def _content(path: Path) -> Path | bytes:
    """A file of an export as others may see it."""
    key = _BASE_KEYS.get(path.name)
    if key is None:
        return path
    config = json.loads(path.read_bytes())
    base = config.get(key)
    if not isinstance(base, str) or not base.startswith(("/", "~", ".")):
        return path
    return json.dumps(config | {key: PurePath(base).name}, indent=1).encode()


def _why_no_upload(error: Exception) -> str:
    """What a failed upload means, and what the user can do about it."""
    response = getattr(error, "response", None) if isinstance(error, HfHubHTTPError) else None
    status = getattr(response, "status_code", None)
    if status == 401:
        return "the hub does not accept the token; run `hf auth login`, or set HF_TOKEN to one that can write"
    if status == 403:
        return "the token may not write there; take one that can, or a name of your own"
    if status == 404:
        return "the hub knows no such owner or repository; give OWNER/NAME, with an owner that the token has"
    if status is not None:
        return f"the hub answers {status} ({first_line(error)}); try again later"
    if isinstance(error, OSError) and is_of_the_disk(error):
        return f"the files cannot be read ({error.strerror})"
    return f"{constants.ENDPOINT} cannot be reached ({first_line(error)}); check the network"
