"""A finished folder uploaded to the hub, as a model repository."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented there, not in __all__

from ..models.text_folder import first_line


def is_repository_name(name: str) -> bool:
    """Return whether the hub may have a repository of this name, owner/name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name


def require_token() -> None:
    """Raise ValueError where the hub's client has no token to upload with."""
    if get_token() is None:
        raise ValueError("--push needs a token of the hub that may write: run hf auth login, or set HF_TOKEN")


def push(folder: Path, name: str, *, private: bool) -> str:
    """Upload a folder in one commit and return the address of the repository.

    Args:
        folder: what is uploaded; files of the repository that it does not have stay.
        name: owner/name; made when there is none.
        private: whether nobody but its owner may read it; else as the owner's account has it by default.

    Raises ValueError where it is not uploaded; the folder stays as it is.
    """
    api = HfApi()
    kept = f"{folder} was written whole and is kept, but not uploaded to {name}"
    try:
        address = api.create_repo(name, private=private or None, exist_ok=True)
        is_public = private and not api.repo_info(name).private
        if not is_public:
            api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload an export of textlock")
    except Exception as error:  # the client, its HTTP library and the file system raise what they like
        again = f"hf upload {name} {folder}" + " --private" * private
        raise ValueError(f"{kept}: {first_line(error)}; to try again without another export: {again}") from error
    if is_public:
        raise ValueError(f"{kept}: that model exists and is public; make it private on the hub, or choose another name")
    return str(address)
