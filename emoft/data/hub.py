"""The Hugging Face Hub: a model there becomes a folder here, and without the Hub the cache serves, at once."""

import errno
import functools
import threading
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RevisionNotFoundError
from huggingface_hub.utils.tqdm import tqdm

from emoft import private
from emoft.data.sources import is_folder
from emoft.errors import UserError, warn
from emoft.files import FORMAT_FILE, VOCABULARY_FILES
from emoft.hints import python
from emoft.terminal import Bar

PROBE_SECONDS = 4  # for a sign of life
ANSWER_SECONDS = 8  # for what the Hub knows of a repository
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *VOCABULARY_FILES,
)
# Of a model's repository, which may hold the same weights in five formats.
MODEL_FILES = (
    *("config.json", "generation_config.json", FORMAT_FILE),
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
    *TOKENIZER_FILES,
)
CANNOT_WRITE = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG),  # no room
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EIO),
)
DENIED = (401, 403, 404)  # a repository that one may not see looks like one that is not there


@functools.cache
def go_offline_if_unreachable() -> str:
    """Ask the Hub for a sign of life, once; without one, put the libraries into their offline mode, with a warning.

    Returns:
        Why the Hub is out of reach, or an empty text.
    """
    if huggingface_hub.is_offline_mode():
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    answer: list[str] = []

    def probe() -> None:
        try:
            address = huggingface_hub.HfApi().endpoint
            status = huggingface_hub.get_session().head(address, timeout=PROBE_SECONDS).status_code
            answer.append(f"it answers with status {status}" if status == 429 or status >= 500 else "")
        except Exception as error:  # whatever the network does, the answer is the same: out of reach
            answer.append(f"{error}" or type(error).__name__)

    # In a thread, because looking up a name can take longer than any time-out of a request.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 1)
    reason = answer[0] if answer else f"no answer within {PROBE_SECONDS} seconds"
    if reason:
        _go_offline(reason)
    return reason


def _go_offline(reason: str) -> None:
    private.go_offline()
    warn(f"{huggingface_hub.HfApi().endpoint} is out of reach ({reason}): using the cache")


@functools.cache
def ask(name: str, what: str, flag: str, revision: str) -> str:
    """Ask the Hub whether it has a repository, once. If it cannot tell, go on without it.

    The libraries would ask too, but again and again, for minutes, where the answer is that one asks too often, and they
    take the sign-in page of a network for an answer.

    Args:
        name: of the repository.
        what: "model", "tokenizer" or "data set".
        flag: that names it, without dashes.
        revision: a branch, a tag, or a commit.

    Returns:
        Why the Hub is out of reach, or an empty text.

    Raises:
        UserError: it has none of that name, or not that revision, or does not show it.
    """
    if reason := go_offline_if_unreachable():
        return reason
    try:
        huggingface_hub.HfApi().repo_info(
            name, repo_type="dataset" if what == "data set" else "model", revision=revision, timeout=ANSWER_SECONDS
        )
        return ""
    except RevisionNotFoundError:
        prefix = flag.partition("_")[0]
        raise UserError(
            f"--{prefix}_revision {revision}: {name} has none of that name on the Hub, name a branch, a tag or a commit"
        ) from None
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in DENIED:
            raise not_found(name, what, flag, error) from None
        reason = f"it answers with status {status}"
    except HFValidationError as error:  # a name that no repository can have
        raise not_found(name, what, flag, error) from None
    except ValueError:  # it is no JSON
        reason = "what answers there is not the Hub, perhaps the sign-in page of a network"
    except Exception as error:  # whatever the network does, the answer is the same: out of reach
        reason = f"{error}" or type(error).__name__
    if not huggingface_hub.is_offline_mode():
        _go_offline(reason)
    return reason


@functools.cache
def model_folder(name: str, flag: str, revision: str = "main") -> Path:
    """Return the folder of a model or tokenizer: the one of that name, or that of the cache, filled from the Hub.

    Args:
        name: as the user wrote it.
        flag: that names it, without dashes: "model_name_or_path" or "tokenizer_name".
        revision: a branch, a tag, or a commit, on the Hub.

    Raises:
        UserError: there is none, or it cannot be downloaded.
    """
    what, files = ("tokenizer", TOKENIZER_FILES) if flag == "tokenizer_name" else ("model", MODEL_FILES)
    if is_folder(name, what, flag):
        if revision != "main":
            raise UserError(
                f"--{flag} {name} is a folder, which has no revision {revision}: leave --model_revision away"
            )
        return Path(name)
    reason = ask(name, what, flag, revision)
    try:
        with Bar(f"Downloading {name}", "B") as bar:
            folder = huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(files),
                local_files_only=bool(reason),
                tqdm_class=_counting_into(bar),
            )
    except Exception as error:  # the library raises dozens of types for what is one case to the user
        raise not_found(name, what, flag, error, reason) from None
    return Path(folder)


def _counting_into(bar: Bar) -> type[tqdm]:
    """Return what the library takes for its bars: none of them is shown, and the bytes of one count for ours."""

    class Counting(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self.counts = options.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> None:
            if self.counts:
                bar.total = int(self.total or 0)
                bar.advance(int(n or 0))

    return Counting


def not_found(name: str, what: str, flag: str, error: Exception, reason: str = "") -> UserError:
    """Return the error for something that is not to be had, with what to do instead.

    Args:
        name: of it.
        what: "model", "tokenizer" or "data set".
        flag: that names it, without dashes.
        error: what the libraries say.
        reason: why the Hub is out of reach, if it is.
    """
    if reason:
        return UserError(
            f"--{flag} {name}: no such folder, not in the cache, and the Hub is out of reach ({reason});"
            f" go online, or name a local folder, or train by {python()} train.py --config demo, which needs no network"
        )
    if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
        return UserError(
            f"--{flag} {name} cannot be kept in the cache, {huggingface_hub.constants.HF_HUB_CACHE}: {error.strerror};"
            " make room, or name another folder by the variable HF_HOME; whole files are kept"
        )
    cause = str(error).strip().partition("\n")[0] or "no reason given"
    of_the_line = type(error).__module__.startswith("httpx")  # by whichever version of it the library sends requests
    if of_the_line or isinstance(error, ConnectionError | TimeoutError):
        return UserError(
            f"--{flag} {name}: the download broke off ({type(error).__name__}: {cause}); run the same command again,"
            " which keeps the files that are whole"
        )
    hidden = ", or, if it is private or gated, set HF_TOKEN to a token that may read it"
    return UserError(
        f"--{flag} {name}: no such folder, and no {what} to be had from the Hub ({type(error).__name__}: {cause});"
        f" check the spelling{hidden if isinstance(error, HfHubHTTPError) else ', or name another'}"
    )
