"""An export on the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi, constants, get_token, is_offline_mode
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from distlora.errors import UserError
from distlora.files.problems import is_of_the_disk
from distlora.sentences import first_line


def check_upload(name: str) -> None:
    """Raises UserError where an upload cannot begin: the name is none, nobody is logged in, or the hub is
    turned off. Asks nobody.
    """
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise UserError(f"--push {name}: no repository can have this name; give OWNER/NAME") from None
    if is_offline_mode():
        raise UserError(f"--push {name}: HF_HUB_OFFLINE is set; unset it, or leave --push out")
    if not get_token():
        raise UserError(f"--push {name}: there is no token for the hub; run `hf auth login`, or set HF_TOKEN")


def upload(directory: Path, name: str, private: bool = False) -> str:
    """Sends all files of a directory to the repository of models `name`, which is made if it is not there.
    private: of one that is made. Returns its address.

    Raises UserError, in one sentence, for every way in which that can fail; the files stay where they are.
    """
    check_upload(name)
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, repo_type="model", exist_ok=True)
        api.upload_folder(
            repo_id=str(address.repo_id), folder_path=directory, repo_type="model",
            commit_message="Export of distlora",
        )  # fmt: skip
    except Exception as error:  # the hub's own, its HTTP client's, its transfer library's, the system's
        raise UserError(f"--push {name}: {_why_no_upload(error)}; the export is in {directory}") from error
    return str(address)


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
