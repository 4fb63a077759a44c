"""The Hugging Face Hub: is it in reach? If not, work from the cache at once instead of after minutes of retries."""

import functools
import threading

import huggingface_hub

from emoft import private
from emoft.data.sources import is_folder
from emoft.errors import UserError, warn
from emoft.hints import python

PROBE_SECONDS = 4


@functools.cache
def go_offline_if_unreachable() -> str:
    """Ask the Hub for a sign of life, once; without one, put the libraries into their offline mode, with a warning.

    Returns:
        Why the Hub is out of reach, or an empty text.
    """
    if huggingface_hub.is_offline_mode():
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    address = huggingface_hub.HfApi().endpoint
    answer: list[str] = []

    def probe() -> None:
        try:
            response = huggingface_hub.get_session().head(address, timeout=PROBE_SECONDS)
            answer.append("" if response.status_code < 500 else f"it answers with status {response.status_code}")
        except Exception as error:  # whatever the network does, the answer is the same: out of reach
            answer.append(f"{error}" or type(error).__name__)

    # In a thread, because looking up a name can take longer than any time-out of a request.
    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS + 1)
    reason = answer[0] if answer else f"no answer within {PROBE_SECONDS} seconds"
    if reason:
        private.go_offline()
        warn(f"{address} is out of reach ({reason}): using the cache")
    return reason


def is_local(name: str, what: str, flag: str) -> bool:
    """Tell a folder from a Hub id, and look for the Hub in the second case; see `sources.is_folder`.

    Raises:
        UserError: the name is a path to nowhere.
    """
    if is_folder(name, what, flag):
        return True
    go_offline_if_unreachable()
    return False


def not_found(name: str, what: str, flag: str, error: Exception) -> UserError:
    """Return the error for something the Hub does not give, with what to do instead."""
    reason = go_offline_if_unreachable()
    if reason:
        return UserError(
            f"--{flag} {name}: no such folder, not in the cache, and the Hub is out of reach ({reason});"
            f" go online, or name a local folder, or train by {python()} train.py --config demo, which needs no network"
        )
    cause = str(error).strip().partition("\n")[0] or "no reason given"
    return UserError(
        f"--{flag} {name}: no such folder, and no {what} to be had from the Hub ({type(error).__name__}: {cause});"
        " check the spelling, or name another"
    )
