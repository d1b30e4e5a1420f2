"""The model hub: which files a repository has, and one of them brought here. The only place that uses the network.

Knows huggingface_hub; does not know what is wanted of a repository, or where it goes."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Never, Protocol

from localmoe.errors import LocalMoeError, ResourceError, UsageError
from localmoe.files import FULL, shown

_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class RemoteFile:
    """As the hub describes it. sha256: of large files only."""

    name: str
    nbytes: int | None
    sha256: str | None = None


@dataclass(frozen=True)
class Listing:
    """A repository's files at a commit."""

    commit: str
    files: list[RemoteFile]


class Hub(Protocol):
    """Methods raise LocalMoeError when the network or the hub fails, and OSError when the disk does."""

    def listing(self, repo: str, revision: str | None) -> Listing: ...

    def fetch(self, repo: str, commit: str, name: str, folder: Path) -> None:
        """Bring a file to its name under the folder; until it is complete, it is not there."""


class HuggingFace:
    """The hub that HF_ENDPOINT names, with the user's own token. Honours HF_HUB_OFFLINE."""

    def __init__(self) -> None:
        # Tells the hub nothing but what is asked of it. Read when it is imported.
        os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
        try:
            import huggingface_hub
            from huggingface_hub import constants, errors, utils
        except ImportError:
            raise LocalMoeError("downloads need huggingface_hub; install it: pip install huggingface_hub") from None
        if constants.HF_HUB_OFFLINE:
            raise UsageError("HF_HUB_OFFLINE is set, so nothing is downloaded; unset it")
        self._hub: Any = huggingface_hub
        self._errors: Any = errors
        if not sys.stderr.isatty():
            quiet: Any = utils
            quiet.disable_progress_bars()

    def listing(self, repo: str, revision: str | None) -> Listing:
        try:
            info = self._hub.HfApi().model_info(repo, revision=revision, files_metadata=True)
        # It raises errors of a dozen libraries. They end here: each becomes one sentence.
        except Exception as cause:
            _fail(self._errors, repo, revision, cause)
        if not _COMMIT.fullmatch(info.sha or ""):
            raise LocalMoeError(f"{shown(repo)}: the hub names the commit {shown(info.sha)}, expected 40 hex digits")
        files = [RemoteFile(f.rfilename, f.size, f.lfs.sha256 if f.lfs else None) for f in info.siblings or []]
        return Listing(info.sha, files)

    def fetch(self, repo: str, commit: str, name: str, folder: Path) -> None:
        try:
            self._hub.hf_hub_download(repo, name, revision=commit, local_dir=folder)
        except Exception as cause:
            if isinstance(cause, OSError) and cause.errno in FULL:
                raise
            _fail(self._errors, repo, commit, cause)


def _fail(errors: Any, repo: str, revision: str | None, cause: Exception) -> Never:
    """Raises what the hub's error means to a user."""
    name = shown(repo)
    if isinstance(cause, errors.GatedRepoError):
        raise LocalMoeError(f"{name}: its owner asks for consent; give it on the hub, and set HF_TOKEN") from cause
    if isinstance(cause, errors.RevisionNotFoundError):
        raise UsageError(f"{name}: has no revision {shown(revision)}") from cause
    if isinstance(cause, errors.RepositoryNotFoundError):
        raise UsageError(f"{name}: is not on the hub, or private; check the name, and HF_TOKEN") from cause
    if isinstance(cause, OSError) and cause.errno in FULL:
        raise ResourceError(f"{name}: the disk is full; free some disk space and start again") from cause
    problem = shown(str(cause).strip().partition("\n")[0] or type(cause).__name__)
    raise LocalMoeError(f"{name}: the hub cannot be read ({problem}); the same command goes on where it was") from cause
