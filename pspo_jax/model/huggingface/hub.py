"""Repositories of the hub: downloads, uploads, and a one-line error for each way in which the hub may refuse them.

The client is huggingface_hub, which keeps what it fetched in a cache. HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE
have the meaning that its documentation gives them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from pspo_jax.config.fields import ConfigError
from pspo_jax.system.storage import StorageError, exhausted

WAITS = (1.0, 5.0, 20.0)
"""Seconds to wait before a transfer that broke off is tried again. Files that are complete are not sent again."""
_BUSY = (408, 429, 500, 502, 503, 504)
"""HTTP status codes of a hub that may answer the same request later."""
_LOG_IN = "log in by hf auth login, or set HF_TOKEN"
_Result = TypeVar("_Result")


class Repository(NamedTuple):
    """A repository of the hub, and the config fields that name it."""

    id: str
    field: str
    """Field that holds the id, such as model.source."""
    revision: str | None = None
    """Branch, tag or commit; None = the main branch."""
    revision_field: str = "model.revision"
    kind: Literal["model", "dataset"] = "model"

    @property
    def where(self) -> str:
        """The field and its value, as messages begin."""
        return f"{self.field}={self.id}"

    @property
    def page(self) -> str:
        """Address of the repository's page."""
        return f"{_endpoint()}/{'datasets/' if self.kind == 'dataset' else ''}{self.id}"

    @property
    def by_hand(self) -> str:
        """What a user without a network can do."""
        kind = " --repo-type dataset" if self.kind == "dataset" else ""
        return f"download it elsewhere (hf download {self.id}{kind} --local-dir DIR) and name DIR"


def download(repo: Repository, patterns: Sequence[str]) -> Path:
    """The local folder of a repository's files; those that the cache has are not fetched again.

    A download that breaks off is tried again, at most three times. Without a network, the cache is enough if it has all
    of the files.

    Args:
      patterns: which files, as in fnmatch.
    Raises:
      ConfigError: there is no such repository or revision, it may not be read, or the cache has it not and the hub must
        not be asked.
      StorageError: the hub does not answer, or the files cannot be stored.
    """
    from huggingface_hub import snapshot_download

    def fetch() -> Path:
        return Path(snapshot_download(repo.id, repo_type=repo.kind, revision=repo.revision, allow_patterns=[*patterns]))

    def refused(error: Exception) -> Exception | None:
        return refusal(error, repo) or _unstored(error, repo.where)

    def broken(error: Exception) -> StorageError:
        if _never_reached(error):
            return _unreached(error, repo)
        return StorageError(
            f"{repo.where}: the download failed ({reason_of(error)}), also when it was tried again; the same command "
            "fetches what is missing"
        )

    return _tried(fetch, refused, broken, repo.where)


def incomplete(repo: Repository) -> ConfigError | StorageError:
    """The error of a cache that lacks files of a repository, although `download` took it for complete.

    The client does so where it never listed the repository's files and cannot do so now.
    """
    from huggingface_hub import errors, is_offline_mode

    if is_offline_mode() and (refused := refusal(errors.OfflineModeIsEnabled(), repo)) is not None:
        return refused
    return _unreached(ConnectionError("the cache lacks files of it"), repo)


def commit_of(repo: Repository) -> str | ConfigError | StorageError:
    """The commit that a repository's revision names; or, if the hub does not say it now, the error to raise.

    The caller may go on without the hub if it knows a commit from before.

    Raises:
      ConfigError: there is no such repository or revision, or it may not be read.
    """
    from huggingface_hub import HfApi

    try:
        return str(HfApi().repo_info(repo.id, repo_type=repo.kind, revision=repo.revision).sha)
    except _failures() as error:
        refused = refusal(error, repo)
        if refused is None:
            return _unreached(error, repo)
        if _cause(error, "OfflineModeIsEnabled"):
            return refused
        raise refused from error


def check_access(repo: Repository) -> None:
    """Raise ConfigError if this machine's account may not read a repository's files, as with a gated one."""
    from huggingface_hub import HfApi

    try:
        HfApi().auth_check(repo.id, repo_type=repo.kind)
    except _failures() as error:
        if (refused := refusal(error, repo)) is not None:
            raise refused from error


def refusal(error: BaseException, repo: Repository) -> ConfigError | None:
    """The one-line error of a request that the hub would refuse again; None if the same request may pass later."""
    missing = "no such folder" if repo.kind == "model" else "no such file or folder"
    revision = f" at {repo.revision_field}={repo.revision}" if repo.revision else ""
    if _cause(error, "HFValidationError"):
        return ConfigError(
            f"{repo.where}: {missing}, and no hub id either, such as Qwen/Qwen2.5-0.5B; name one of them"
        )
    if _cause(error, "OfflineModeIsEnabled"):
        return ConfigError(
            f"{repo.where}: {missing}, and HF_HUB_OFFLINE forbids to ask the hub, whose cache {_cache()} "
            f"lacks files of it{revision}; unset HF_HUB_OFFLINE, or {repo.by_hand}"
        )
    if _cause(error, "RevisionNotFoundError"):
        return ConfigError(
            f"{repo.revision_field}={repo.revision}: {repo.id} has no such branch, tag or commit; {_revisions(repo)}"
        )
    status = _status(error)
    if _cause(error, "GatedRepoError"):
        if status == 401:
            return ConfigError(
                f"{repo.where}: is gated, and this machine is not logged in; accept its terms at {repo.page}, then "
                f"{_LOG_IN}"
            )
        return ConfigError(
            f"{repo.where}: is gated, and the account of this machine's token may not read it; ask for access at "
            f"{repo.page}, or {_LOG_IN} as another account"
        )
    if _cause(error, "RepositoryNotFoundError"):
        who = f"may be private: {_LOG_IN}" if not _logged_in() else "is private to another account"
        return ConfigError(
            f"{repo.where}: {missing}, and the hub shows no {repo.kind} of this id; check the spelling, or it {who}"
        )
    if status == 401:
        return ConfigError(f"{repo.where}: the hub does not accept the token of this machine; {_LOG_IN} anew")
    if status is not None and status not in _BUSY:
        return ConfigError(f"{repo.where}: the hub refuses it ({reason_of(error)}); see {repo.page}")
    return None


def create_repository(name: str, private: bool) -> str:
    """The full id of a repository for models, which is made if it does not exist.

    Args:
      name: OWNER/NAME, or NAME for the account of this machine's token.
      private: whether only its owner may see it.
    Raises:
      ConfigError: the id is none, the token may not write there, or a public repository has to be private.
      StorageError: the hub does not answer.
    """
    from huggingface_hub import HfApi

    where = f"--push-to {name}"
    api = HfApi()

    def create() -> str:
        made = api.create_repo(name, private=private or None, exist_ok=True)
        return str(made.repo_id)

    def broken(error: Exception) -> StorageError:
        return StorageError(f"{where}: the hub {_endpoint()} cannot be reached ({reason_of(error)}); try again later")

    full = _tried(create, lambda error: _push_refusal(error, where), broken, where)
    if private and not api.repo_info(full).private:
        raise ConfigError(
            f"--private: {full} exists already and is public; make it private at {_endpoint()}/{full}/settings, or "
            "push to another id"
        )
    return full


def upload(folder: Path, full_id: str, message: str) -> str:
    """Upload a folder as one commit of a repository that exists, and return the address of its page.

    Args:
      message: the commit's message.
    Raises:
      ConfigError: the token may not write there, or the hub refuses the files.
      StorageError: the hub does not answer, or the connection broke off four times.
    """
    from huggingface_hub import HfApi

    where = f"--push-to {full_id}"
    kept = f"the export itself is in {folder}, and hf upload {full_id} {folder} . sends it"

    def send() -> None:
        HfApi().upload_folder(repo_id=full_id, folder_path=folder, commit_message=message)

    def refused(error: Exception) -> ConfigError | None:
        found = _push_refusal(error, where)
        return None if found is None else ConfigError(f"{found}; {kept}")

    def broken(error: Exception) -> StorageError:
        return StorageError(f"{where}: the upload failed ({reason_of(error)}), also when it was tried again; {kept}")

    _tried(send, refused, broken, where)
    return f"{_endpoint()}/{full_id}"


def _push_refusal(error: Exception, where: str) -> ConfigError | None:
    """The one-line error of an upload that the hub would refuse again."""
    if _cause(error, "HFValidationError"):
        return ConfigError(f"{where}: is no hub id; write OWNER/NAME, of letters, digits, '-', '_' and '.'")
    if _cause(error, "OfflineModeIsEnabled"):
        return ConfigError(f"{where}: HF_HUB_OFFLINE forbids to ask the hub; unset it, or leave --push-to out")
    status = _status(error)
    if status == 401:
        state = "does not accept the token of this machine" if _logged_in() else "needs a token to write"
        return ConfigError(f"{where}: the hub {state}; {_LOG_IN}")
    if status in (403, 404):
        return ConfigError(
            f"{where}: the account of this machine's token may not write there; name one of its own ids, or {_LOG_IN} "
            "as another account, with a token that may write"
        )
    if status is not None and status not in _BUSY:
        return ConfigError(f"{where}: the hub refuses it ({reason_of(error)}); change what it names")
    return None


def _tried(
    act: Callable[[], _Result],
    refused: Callable[[Exception], Exception | None],
    broken: Callable[[Exception], StorageError],
    where: str,
) -> _Result:
    """The result of `act`, which is called again after an error that may pass.

    Args:
      refused: the error to raise at once; None = the same request may pass later.
      broken: the error to raise in the end.
      where: begins the line that tells of another attempt.
    """
    for wait in (*WAITS, None):
        try:
            return act()
        except _failures() as error:
            if (final := refused(error)) is not None:
                raise final from error
            if wait is None or _never_reached(error):
                raise broken(error) from error
            print(f"{where}: {reason_of(error)}; it is tried again in {wait:g} s", file=sys.stderr)
        time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def _failures() -> tuple[type[Exception], ...]:
    """Types of the errors that a request to the hub may end with."""
    from huggingface_hub import errors

    xet = getattr(errors, "XetDownloadError", RuntimeError)  # hf_xet's own errors are RuntimeErrors
    return errors.HTTPError, errors.HFValidationError, xet, OSError, RuntimeError


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that led to it."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__


def _cause(error: BaseException, name: str) -> bool:
    """Whether an error, or one that led to it, is of a class of huggingface_hub's errors."""
    from huggingface_hub import errors

    return any(isinstance(cause, getattr(errors, name, ())) for cause in _chain(error))


def _status(error: BaseException) -> int | None:
    """The HTTP status that the hub answered with; None if it did not answer."""
    from huggingface_hub.errors import HfHubHTTPError

    return next((int(e.response.status_code) for e in _chain(error) if isinstance(e, HfHubHTTPError)), None)


def _never_reached(error: BaseException) -> bool:
    """Whether no connection to the hub came about at all, so that another attempt would be in vain."""
    return _status(error) is None and (_cause(error, "LocalEntryNotFoundError") or "Connect" in type(error).__name__)


def reason_of(error: BaseException) -> str:
    """The first error of a chain in one short line."""
    status = _status(error)
    if status is not None:
        told = next((e.response.headers.get("X-Error-Message") for e in _chain(error) if hasattr(e, "response")), None)
        return f"HTTP status {status}{f', {told[:120]}' if told else ''}"
    *_, first = _chain(error)
    return " ".join(str(first).split())[:200] or type(first).__name__


def _unreached(error: BaseException, repo: Repository) -> StorageError:
    """The error of a hub that does not answer, while the cache has not all of the files either."""
    missing = "no such folder" if repo.kind == "model" else "no such file or folder"
    return StorageError(
        f"{repo.where}: {missing}, and the hub {_endpoint()} cannot be reached ({reason_of(error)}); once it answers, "
        f"the same command carries on; without a network, {repo.by_hand}"
    )


def _unstored(error: Exception, where: str) -> Exception | None:
    """The one-line error of a cache that cannot be written; None for an error of another kind."""
    if not isinstance(error, OSError) or isinstance(error, ConnectionError) or error.errno is None:
        return None
    return exhausted(error) or ConfigError(
        f"{where}: the cache {_cache()} cannot be written ({error.strerror}); set HF_HOME to a folder that can be "
        "written"
    )


def _revisions(repo: Repository) -> str:
    """What to do about a wrong revision, with those that there are."""
    from huggingface_hub import HfApi

    try:
        refs = HfApi().list_repo_refs(repo.id, repo_type=repo.kind)
    except _failures():
        return f"see {repo.page}, or drop it for the main branch"
    names = [ref.name for ref in (*refs.branches, *refs.tags)]
    more = f" and {len(names) - 6} more" if len(names) > 6 else ""
    return f"choose among {', '.join(names[:6])}{more}, or drop it for the main branch"


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _logged_in() -> bool:
    """Whether this machine has a token for the hub."""
    from huggingface_hub import get_token

    return get_token() is not None
