"""A model repository on the Hub, through huggingface_hub: what is there, and putting there what is missing."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from utils.hub.bundle import METADATA_FILE, File, Part
from utils.hub.facts import LAST_FOLDER
from utils.preflight.hub import answers

if TYPE_CHECKING:
    from huggingface_hub import RepoFile

OURS = (".gitattributes",)  # what the Hub itself puts into a new repository


class HubError(ValueError):
    """The Hub refused, or did not answer: one line, with the remedy. What was uploaded before stays there."""


class Repository:
    """`owner/name`, as it was when it was last looked at. `files` is None if there is no such repository."""

    def __init__(self, name: str) -> None:
        """Raises HubError for a name that the Hub does not take."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import disable_progress_bars, validate_repo_id

        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise HubError(f"--repo {name}: {error}") from error
        if name.count("/") != 1:
            raise HubError(f"--repo {name}: give owner/name")
        if not sys.stderr.isatty():  # a log keeps to whole lines
            disable_progress_bars()
        self.name, self._api = name, HfApi()
        self.endpoint = self._api.endpoint
        self.files: dict[str, RepoFile] | None = None

    def check_access(self) -> None:
        """Raise HubError if nobody is logged in."""
        from huggingface_hub import get_token

        if get_token() is None:
            raise HubError("no access token for the Hub: run `hf auth login`, or set HF_TOKEN to one that may write")

    def look(self) -> None:
        """See what is there. Raises HubError."""
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import RepositoryNotFoundError

        with self._refusals():
            try:
                tree = list(self._api.list_repo_tree(self.name, recursive=True))
            except RepositoryNotFoundError:
                self.files = None
                return
        self.files = {item.path: item for item in tree if isinstance(item, RepoFile)}

    def check_owner(self, metadata: bytes) -> None:
        """Raise HubError if the repository holds something else than these runs. Call `look` before."""
        if self.files is None or not set(self.files) - set(OURS):
            return
        if METADATA_FILE not in self.files:
            raise HubError(f"{self.name} already holds something that is no run of this program; choose another --repo")
        theirs, ours = self._metadata(), json.loads(metadata)["runs"]
        foreign = sorted(set(theirs) - set(ours))
        if foreign:
            raise HubError(
                f"{self.name} also holds {', '.join(foreign)}; give these runs too, or choose another --repo"
            )
        other = sorted(place for place in theirs if theirs[place].get("id") != ours[place]["id"])
        if other:
            raise HubError(f"{self.name} already holds another run in {', '.join(other)}; choose another --repo")

    def _metadata(self) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder, self._refusals():
            path = self._api.hf_hub_download(self.name, METADATA_FILE, local_dir=folder)
            content = Path(path).read_bytes()
        try:
            runs = json.loads(content)["runs"]
            return {place: dict(run) for place, run in runs.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise HubError(f"{self.name}: its {METADATA_FILE} is not of this program; choose another --repo") from error

    def missing(self, part: Part) -> list[File]:
        """The files of the part that are not there, or not the same."""
        there = self.files or {}
        return [file for file in part.files if file.place not in there or not _is_same(file, there[file.place])]

    def left_over(self, parts: Sequence[Part]) -> list[str]:
        """What an earlier upload put there and this one does not: other weights beside ours, or a whole last/."""
        ours = {file.place for part in parts for file in part.files}
        folders = {PurePosixPath(place).parent for place in ours if place.endswith(".safetensors")}
        weights = (".safetensors", ".safetensors.index.json")

        def is_left_over(place: str) -> bool:
            folder = PurePosixPath(place).parent
            was_last = folder.name == LAST_FOLDER and folder.parent in folders
            return place not in ours and (was_last or (place.endswith(weights) and folder in folders))

        return [place for place in self.files or {} if is_left_over(place)]

    def create(self, private: bool) -> None:
        """Make the repository if it is not there. Raises HubError."""
        with self._refusals():
            self._api.create_repo(self.name, private=private, exist_ok=True)

    def commit(self, title: str, files: Sequence[File], gone: Sequence[str] = ()) -> None:
        """Put the files there as one commit. Raises HubError."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations = [CommitOperationAdd(file.place, file.content) for file in files]
        operations += [CommitOperationDelete(place) for place in gone]
        with self._refusals():
            self._api.create_commit(self.name, operations, commit_message=title)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn what huggingface_hub raises into one line. Its errors do not hold the token."""
        from huggingface_hub.errors import HfHubHTTPError, HTTPError  # the second: the base of its HTTP client's errors

        if not answers(self.endpoint):
            raise HubError(f"{self.endpoint} does not answer; the same command goes on with what is missing")
        try:
            yield
        except HfHubHTTPError as error:
            status = error.response.status_code
            reason = error.server_message or str(error).strip().splitlines()[0]
            remedy = {
                401: "; the access token is not valid: `hf auth login`",
                402: "; the account has no room for this: free some, or pay",
                403: "; the access token may not write there, or the account's storage is full",
                413: "; the account has no room for this",
                429: "; wait, and run the same command again",
            }.get(status, "; the same command goes on with what is missing")
            raise HubError(f"{self.endpoint} refused ({status}): {reason}{remedy}") from error
        except (HTTPError, OSError, ValueError) as error:  # a large file that is refused is a ValueError
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise HubError(f"{self.endpoint}: {reason}; the same command goes on with what is missing") from error


def _is_same(file: File, there: RepoFile) -> bool:
    """Whether the file there has the same content, by the hash that the Hub keeps of it."""
    if there.size != file.size:
        return False
    if there.lfs is not None:
        return _digest(file, hashlib.sha256()) == there.lfs.sha256
    return _digest(file, hashlib.sha1(b"blob %d\0" % file.size)) == there.blob_id  # as git counts


def _digest(file: File, algorithm: Any) -> str:
    if isinstance(file.content, bytes):
        algorithm.update(file.content)
        return algorithm.hexdigest()
    with file.content.open("rb") as content:
        while piece := content.read(1 << 20):
            algorithm.update(piece)
    return algorithm.hexdigest()
