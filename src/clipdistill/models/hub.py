"""Files on the Hugging Face hub: from the local cache when they are there, and never a surprise download.

What is not on this machine is announced before it is fetched; without a network that is one clear error, not a series
of retries.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from clipdistill.errors import InputError

logger = logging.getLogger("clipdistill")
_PROBE_SECONDS = 5.0


def offline() -> bool:
    """Whether the environment forbids the hub (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)."""
    import huggingface_hub.constants

    # read anew: the library looks once, when it is imported
    values = [os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")]
    return huggingface_hub.constants.HF_HUB_OFFLINE or any(v.upper() in ("1", "ON", "YES", "TRUE") for v in values)


def cached(repository: str, filename: str) -> Path | None:
    """The local copy of a file of a hub repository, or None."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, filename, cache_dir=constants.HF_HUB_CACHE)
    except HFValidationError as error:
        raise InputError(f"'{repository}' is not a name on the Hugging Face hub (owner/name): {error}") from error
    return Path(found) if isinstance(found, str) else None


def fetch(repository: str, filenames: Sequence[str], what: str) -> Path:
    """The first of `filenames` in the repository: from the cache, else downloaded after saying so.

    `what` names the thing for the user ("the weights of ViT-B-16/laion400m_e32"). Raises InputError when it is not
    cached and the hub is forbidden or out of reach, and when the repository has none of the files.
    """
    for filename in filenames:
        local = cached(repository, filename)
        if local is not None:
            return local
    require_network(what, repository)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    for filename in filenames:
        try:
            return Path(hf_hub_download(repository, filename))
        except EntryNotFoundError:
            continue
        except GatedRepoError as error:
            raise InputError(
                f"{what}: the hub repository '{repository}' asks for consent: visit its page first"
            ) from error
        except RepositoryNotFoundError as error:
            raise InputError(f"{what}: the hub has no repository '{repository}' that you may read") from error
        except Exception as error:  # the client raises many kinds for interrupted transfers
            raise InputError(f"{what}: the download from the hub failed ({type(error).__name__}): try again") from error
    raise InputError(f"{what}: the hub repository '{repository}' has none of {', '.join(filenames)}")


def list_files(repository: str, what: str) -> list[str]:
    """The names of all files of a hub repository. Needs the network; raises InputError without."""
    from huggingface_hub import list_repo_files
    from huggingface_hub.errors import RepositoryNotFoundError

    require_network(what, repository)
    try:
        return list(list_repo_files(repository))
    except RepositoryNotFoundError as error:
        raise InputError(f"{what}: the hub has no repository '{repository}' that you may read") from error
    except Exception as error:
        raise InputError(f"{what}: the hub could not be asked for '{repository}' ({type(error).__name__})") from error


def require_network(what: str, repository: str) -> None:
    """Say that `what` has to be fetched, or raise InputError when it cannot be."""
    if offline():
        raise InputError(
            f"{what} must be fetched from the Hugging Face hub ({repository}), which HF_HUB_OFFLINE forbids here: "
            "unset it, or give the path of a local copy"
        )
    if not reachable():
        raise InputError(
            f"{what} must be fetched from the Hugging Face hub ({repository}), which cannot be reached from here: "
            "connect to the network, or give the path of a local copy"
        )
    logger.warning("%s is not on this machine: fetching it from the Hugging Face hub (%s)", what, repository)


def reachable() -> bool:
    """Whether the hub answers within a few seconds, through the proxies of the environment if there are any."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_PROBE_SECONDS)
    except Exception:  # any failure of the connection means the same here
        return False
    return True
