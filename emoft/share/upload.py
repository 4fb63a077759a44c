"""The upload of a trained model to the Hugging Face Hub: all files in one commit, or nothing."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from emoft.data.hub import TOKENIZER_FILES
from emoft.errors import UserError
from emoft.files import CARD_FILE, FORMAT_FILE, RESULTS_FILE, WEIGHTS_FILE
from emoft.hints import python
from emoft.terminal import Bar

FILES = ("config.json", "generation_config.json", WEIGHTS_FILE, FORMAT_FILE, CARD_FILE, RESULTS_FILE, *TOKENIZER_FILES)
REASONS = {
    401: "the Hub knows no such token: log in by `hf auth login`, or set HF_TOKEN to a token that may write",
    403: "this token may not write there: take one that may, or another name",
    404: "there is no such owner, or this token may not see it",
    409: "somebody changed it meanwhile",
}


def upload(folder: Path, name: str, private: bool = False) -> str:
    """Upload the model of a folder and return its address.

    Args:
        folder: that train.py wrote.
        name: OWNER/NAME on the Hub, made if it is not there.
        private: whether a new one is for its owner alone.

    Raises:
        UserError: it could not be uploaded; nothing here has changed, and the command to repeat is told.
    """
    api = huggingface_hub.HfApi()
    try:
        with Bar(f"Uploading {folder} to {name}"):
            api.create_repo(name, private=private, exist_ok=True)
            present = [file for file in FILES if (folder / file).exists()]
            api.upload_folder(
                repo_id=name, folder_path=folder, allow_patterns=present, commit_message="Upload a model made by emoft"
            )
    except (HfHubHTTPError, LocalTokenNotFoundError, HFValidationError, OSError, RuntimeError) as error:
        raise UserError(
            f"{folder} could not be uploaded to {name} ({_reason(error)}); nothing is lost, repeat it by: {python()} -m"
            f" emoft.share {folder} {name}"
        ) from None
    except Exception as error:
        # Of the line: the library sends requests by one package or another, each with errors of its own.
        if not type(error).__module__.startswith(("httpx", "requests", "urllib3")):
            raise
        raise UserError(
            f"{folder} could not be uploaded to {name} (the connection broke: {type(error).__name__}); nothing is lost,"
            f" repeat it by: {python()} -m emoft.share {folder} {name}"
        ) from None
    return f"{api.endpoint}/{name}"


def _reason(error: Exception) -> str:
    """Return why, in a line that holds no token."""
    if isinstance(error, LocalTokenNotFoundError):
        return REASONS[401]
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in REASONS:
        return REASONS[status]
    if status:
        return f"the Hub answers with status {status}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
