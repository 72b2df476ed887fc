"""Uploads a saved model to the Hub: what belongs to it, in one commit, and again where an upload was cut off."""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import httpx2
from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi, get_token
from huggingface_hub.constants import DEFAULT_REVISION
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors import SafetensorError, safe_open

from hf_compress.hub.card_page import PLACEHOLDER

logger = logging.getLogger(__name__)

_SHARD = re.compile(r"model((?:\.[^-]+)?)-\d{5}-of-\d{5}\.safetensors")
_INDEX = re.compile(r"model\.safetensors\.index((?:\..+)?)\.json")
CARD_FILE, CONFIG_FILE = "README.md", "config.json"
# What belongs to a model. Anything else in its folder stays where it is, and is named.
_BELONGS = (
    CONFIG_FILE, CARD_FILE, "generation_config.json", "*.safetensors", "*.safetensors.index*.json", "tokenizer*",
    "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "*.model", "chat_template.*",
    "preprocessor_config.json", "processor_config.json", "recipe.yaml", "report.json", "LICENSE*", "NOTICE*",
    "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json", "?_*/config.json",
    "?_*/*.safetensors", "additional_chat_templates/*.jinja",
)  # fmt: skip
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
# Pickled too, but of a training and not of the model.
_TRAINING_STATE = ("training_args.bin", "optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth")
_TEXTS = ("*.json", "*.md", "*.yaml", "*.txt", "*.jinja")


@dataclass(frozen=True)
class Upload:
    """What was uploaded, or would be.

    Attributes:
        repo_id (`str`): The repository.
        revision (`str`): The branch.
        files (`dict[str, int]`): Bytes of each file, by its path in the repository.
        left_out (`list[str]`): Files and folders beside them that are no part of the model.
        url (`str` or `None`): Where the model is; `None` after a dry run.
        commit (`str` or `None`): Its commit; `None` after a dry run.
    """

    repo_id: str
    revision: str
    files: dict[str, int]
    left_out: list[str]
    url: str | None = None
    commit: str | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.files.values())

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON types, and the bytes of all files."""
        return asdict(self) | {"n_bytes": self.n_bytes}

    def __str__(self) -> str:
        return self.url or ""


def push_compressed(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    commit_message: str | None = None,
) -> Upload:
    """Uploads a saved model, its tokenizer and its card, in one commit.

    If it is cut off, nothing of it is visible there, and the same call completes it: files that arrived whole are not
    sent again. The repository is made if there is none, and the branch too.

    Args:
        folder (`str` or `Path`): What `save_pretrained` wrote, with the card of `write_card`. In the card that is
            uploaded, `repo_id` takes the place of the words that stand for it.
        repo_id (`str`): Where to: a name, or an organisation's or a user's and a name, such as `"me/my-model"`.
        private (`bool`, *optional*): Whether a new repository is private. By default, as the account has it.
        revision (`str`, *optional*): Branch. By default `main`.
        token (`str`, *optional*): With write access. By default, that of `hf auth login` or `HF_TOKEN`. It is
            neither logged nor stored, and a file that holds it is not uploaded.
        dry_run (`bool`, *optional*, defaults to `False`): Only say what would be uploaded; no network is needed.
        commit_message (`str`, *optional*): Title of the commit.

    Returns:
        `Upload`: Files and sizes, and where they are now; `str(upload)` is the address.

    Raises:
        ValueError: if the folder holds no saved model, weights that are pickled or lack a part, or the token; if the
            repository's name is none, its metadata are refused, or it is there and public where `private` is wanted.
        PermissionError: if the Hub does not know the token, or the token may not write there.
        ConnectionError: if the Hub cannot be reached, or the connection breaks and does not come back.
        OSError: if the Hub refuses for another reason, such as a commit at the same time.
    """
    folder, revision = Path(folder), revision or DEFAULT_REVISION
    _check_name(repo_id)
    contents, left_out = collect_files(folder, repo_id)
    files = {name: _size(content) for name, content in contents.items()}
    upload = Upload(repo_id, revision, files, left_out)
    if dry_run:
        return upload
    token = token or get_token()
    _check_secrets(contents, token)
    if CARD_FILE not in files:
        logger.warning(
            "%s holds no %s, so the model has no card there: hf_compress.hub.card.write_card makes one.",
            folder,
            CARD_FILE,
        )
    message = commit_message or "Upload a model compressed by hf_compress"
    api = HfApi(token=token, library_name="hf_compress")
    try:
        repo_id = _open_repository(api, repo_id, private, revision)
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        commit = api.create_commit(repo_id, operations, commit_message=message, revision=revision)
    except (OSError, RuntimeError, ValueError, httpx2.HTTPError) as error:
        # The client's own exception holds the request, and in it the token.
        raise _explain(error, api, upload, token) from None
    logger.info("Uploaded %d files, %.1f MB, to %s.", len(files), upload.n_bytes / 1e6, commit.repo_url)
    return _uploaded(upload, repo_id, commit)


def collect_files(folder: str | Path, repo_id: str) -> tuple[dict[str, Path | bytes], list[str]]:
    """What of a folder belongs to the model in it.

    Args:
        folder (`str` or `Path`): What `save_pretrained` wrote.
        repo_id (`str`): Where the model is going to be, which its card then says.

    Returns:
        `tuple[dict[str, Path | bytes], list[str]]`: Files by their path in the repository, and what is left out.

    Raises:
        ValueError: if it is no folder of a whole model with weights in safetensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {str(folder)!r}: give the one that `model.save_pretrained` wrote.")
    found = {path.relative_to(folder).as_posix(): path for path in _candidates(folder)}
    names = [name for name in found if any(_matches(name, pattern) for pattern in _BELONGS)]
    names = [name for name in names if not _is_of_earlier_save(name, names)]
    _check_model(folder, found, names)
    contents: dict[str, Path | bytes] = {name: found[name] for name in sorted(names)}
    if CARD_FILE in contents:
        contents[CARD_FILE] = found[CARD_FILE].read_bytes().replace(PLACEHOLDER.encode(), repo_id.encode())
    top = {name.split("/")[0] for name in names}
    return contents, sorted(path.name for path in folder.iterdir() if path.name not in top)


def _candidates(folder: Path) -> Iterator[Path]:
    for path in folder.iterdir():
        if path.is_file():
            yield path
        elif path.is_dir():
            yield from (inner for inner in path.iterdir() if inner.is_file())


def _matches(name: str, pattern: str) -> bool:
    # A star of fnmatch crosses folders.
    return name.count("/") == pattern.count("/") and fnmatch(name, pattern)


def _check_model(folder: Path, found: dict[str, Path], names: list[str]) -> None:
    pickled = [
        name
        for name in found
        if any(_matches(name, pattern) for pattern in _PICKLES)
        and not any(_matches(name, pattern) for pattern in _TRAINING_STATE)
    ]
    if pickled:
        raise ValueError(
            f"{folder} holds {', '.join(sorted(pickled))}: such files are pickled, and loading them runs what is in "
            "them, so they are not uploaded. Save the model again with `save_pretrained`, which writes safetensors, "
            "and delete them."
        )
    if CONFIG_FILE not in names:
        raise ValueError(
            f"{folder} holds no {CONFIG_FILE}, so it is no saved model: give the folder that `model.save_pretrained` "
            "wrote, of a run the one of its last step."
        )
    if not any(name.endswith(".safetensors") for name in names):
        raise ValueError(
            f"{folder} holds no weights (*.safetensors): save the model there again with `save_pretrained`."
        )
    for name in names:
        if name.endswith(".safetensors"):
            _check_whole(folder, name, found[name])
    _check_shards(folder, found, names)


def _is_of_earlier_save(name: str, names: list[str]) -> bool:
    """Whether this is a shard or an index beside weights in one file, which is what `from_pretrained` reads."""
    part = _INDEX.fullmatch(name) or _SHARD.fullmatch(name)
    return part is not None and f"model{part[1]}.safetensors" in names


def _check_shards(folder: Path, found: dict[str, Path], names: list[str]) -> None:
    variants = {shard[1] for name in names if (shard := _SHARD.fullmatch(name))}
    lacking = sorted({f"model.safetensors.index{variant}.json" for variant in variants} - set(names))
    if lacking:
        raise ValueError(f"{folder} lacks {lacking[0]}, without which its shards cannot be loaded: save it again.")
    for index in filter(_INDEX.fullmatch, names):
        missing = sorted(set(json.loads(found[index].read_text())["weight_map"].values()) - set(names))
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which {index} names: save the model there again.")


def _check_whole(folder: Path, name: str, file: Path) -> None:
    try:
        with safe_open(file, "np"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{folder}/{name} is cut off or damaged ({error}): save the model there again.") from None


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(
            f"{repo_id!r} is no name of a repository ({error}): give a name, or a user's or an organisation's and a "
            "name, such as me/my-model."
        ) from None


def _check_secrets(contents: dict[str, Path | bytes], token: str | None) -> None:
    """Nothing that is uploaded may hold the token."""
    for name, content in contents.items():
        if token and any(fnmatch(name, pattern) for pattern in _TEXTS):
            text = content if isinstance(content, bytes) else content.read_bytes()
            if token.encode() in text:
                raise ValueError(f"{name} holds your access token, which everybody could read there: take it out.")


def _size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def _open_repository(api: HfApi, repo_id: str, private: bool | None, revision: str) -> str:
    """Makes the repository and the branch where they are missing; returns the repository's whole name."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    # The Hub says nothing where the repository was there before.
    if private is not None and api.model_info(repo_id, expand=["private"]).private != private:
        state, wanted = ("public", "private") if private else ("private", "public")
        raise ValueError(
            f"{repo_id} is there already and {state}, and {wanted} is asked for: change that in its settings on the "
            "Hub, give another name, or leave private out."
        )
    if revision != DEFAULT_REVISION and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    return repo_id


def _uploaded(upload: Upload, repo_id: str, commit: CommitInfo) -> Upload:
    is_main = upload.revision == DEFAULT_REVISION
    url = str(commit.repo_url) if is_main else f"{commit.repo_url}/tree/{upload.revision}"
    return Upload(repo_id, upload.revision, upload.files, upload.left_out, url, commit.oid)


# What went wrong


def _explain(error: Exception, api: HfApi, upload: Upload, token: str | None) -> Exception:
    """What the Hub or the connection did, and what to do about it, without the token."""
    cause = error
    # Of a file, the client says only that its upload failed.
    while isinstance(cause, RuntimeError) and cause.__cause__ is not None:
        cause = cause.__cause__
    to = f"{upload.repo_id} on {api.endpoint}"
    if isinstance(cause, HfHubHTTPError):
        said = _without(token, " ".join((cause.server_message or str(cause)).split()))
        return _refusal(cause.response.status_code, said, to, upload, token)
    if isinstance(cause, httpx2.HTTPError):
        return ConnectionError(
            f"The upload to {to} was cut off ({_without(token, str(cause)) or type(cause).__name__}). Nothing of it "
            "is visible there. Repeat the same command: files that arrived whole are not sent again."
        )
    text = _without(token, str(cause))
    if isinstance(cause, RuntimeError):
        return OSError(f"The upload to {to} failed: {text}. Repeat the same command.")
    return cause if text == str(cause) else (ValueError if isinstance(cause, ValueError) else OSError)(text)


def _refusal(status: int, said: str, to: str, upload: Upload, token: str | None) -> Exception:
    if status == 401:
        what = "it does not know your token" if token else "you are not logged in"
        return PermissionError(
            f"The Hub refused the upload to {to}: {what} (401: {said}). Log in with `hf auth login`, or set HF_TOKEN "
            "to a token with write access from https://huggingface.co/settings/tokens."
        )
    if status == 403:
        return PermissionError(
            f"The Hub refused the upload to {to}: your token may not write there (403: {said}). Take a token with "
            f"write access to {upload.repo_id.split('/')[0]}, or another name."
        )
    if status == 404:
        return FileNotFoundError(
            f"The Hub does not find {to}, revision {upload.revision} (404: {said}): check the name, and that your "
            "token may read it."
        )
    if status in (409, 412):
        return OSError(
            f"The Hub refused the upload to {to}: something else was written to {upload.revision} at the same time "
            f"({status}: {said}). Repeat the same command: files that arrived whole are not sent again."
        )
    hint = "wait a while, and repeat the same command" if status == 429 or status >= 500 else "see what it says"
    return OSError(f"The Hub refused the upload to {to} ({status}: {said}): {hint}.")


def _without(token: str | None, text: str) -> str:
    return text.replace(token, "***") if token else text
