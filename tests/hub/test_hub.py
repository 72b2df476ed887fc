"""Uploads, by the real client, to a server that speaks the Hub's protocol: what arrives loads, bit for bit."""

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import close_session
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from hf_compress import Int8DynamicConfig, StructuredPruningConfig, prune, quantize
from hf_compress.cli.push import push
from hf_compress.hub.card_page import PLACEHOLDER
from hf_compress.hub.push import push_compressed
from tests.hub.hub_server import CUT, Fault, Hub
from tests.tiny_job import save_tiny_bert, tiny_tokenizer

ROOT = Path(__file__).parent.parent.parent
TEXTS = ["a good film", "the plot was very dull and bad"]
CARD = f"""---
license: mit
tags: [hf_compress]
---

# A model

`from_pretrained("{PLACEHOLDER}")`
"""
LOAD = """
import sys
import hf_compress
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

name, texts, output = sys.argv[1], sys.argv[2].split("|"), sys.argv[3]
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForSequenceClassification.from_pretrained(name)
save_file({"logits": model(**tokenizer(texts, padding=True, return_tensors="pt")).logits}, output)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A pruned and quantized model, in memory, and the folder that it was saved in, as several weight files."""
    folder = tmp_path_factory.mktemp("made")
    dense = AutoModelForSequenceClassification.from_pretrained(save_tiny_bert(folder / "dense"))
    batch = dict(tiny_tokenizer()(TEXTS, padding=True, return_tensors="pt"))
    model = prune(dense, StructuredPruningConfig(budget=0.6, multiple_of=4), data=[batch])
    model = quantize(model, Int8DynamicConfig())
    model.save_pretrained(folder / "model", max_shard_size=6000)
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "model" / "README.md").write_text(CARD)
    return model.eval(), folder / "model"


@pytest.fixture
def folder(made, tmp_path):
    """A folder of its own to push."""
    return Path(shutil.copytree(made[1], tmp_path / "model"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The server, which the client in this process takes for the Hub, and knows the token of."""
    with Hub().running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setenv("HF_TOKEN", hub.token)
        close_session()
        yield hub
        close_session()


def bytes_of(folder):
    """What should arrive of a folder."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found | {"README.md": found["README.md"].replace(PLACEHOLDER.encode(), b"me/tiny")}


def arrived(hub, name="me/tiny", revision="main"):
    return {path: blob.content for path, blob in hub.repositories[name].files(revision).items()}


# What arrives


def test_loads_in_a_fresh_process_as_it_was(hub, made, tmp_path):
    model, folder = made
    push_compressed(folder, "me/tiny", private=True)
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(ROOT),
    }
    words = [sys.executable, "-c", LOAD, "me/tiny", "|".join(TEXTS), str(tmp_path / "logits.safetensors")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = model(**tiny_tokenizer()(TEXTS, padding=True, return_tensors="pt")).logits
    assert torch.equal(load_file(tmp_path / "logits.safetensors")["logits"], expected)
    assert hub.asked("GET", "/resolve/.*safetensors")


def test_what_is_private_needs_the_token(hub, folder, tmp_path):
    push_compressed(folder, "me/tiny", private=True)
    assert Path(hf_hub_download("me/tiny", "config.json")).read_bytes() == bytes_of(folder)["config.json"]
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("me/tiny", "config.json", cache_dir=tmp_path / "other", token=False)


@pytest.mark.parametrize("part_size", [1000, 1_000_000])
def test_files_arrive_whole_in_one_commit(hub, folder, part_size):
    hub.part_size = part_size
    upload = push_compressed(folder, "me/tiny", commit_message="A title")
    assert arrived(hub) == bytes_of(folder)
    assert len([name for name in arrived(hub) if name.endswith(".safetensors")]) > 1
    assert upload.files == {name: len(content) for name, content in bytes_of(folder).items()}
    assert hub.repositories["me/tiny"].messages == ["A title"]
    assert str(upload) == f"{hub.endpoint}/me/tiny"
    assert upload.commit == hub.repositories["me/tiny"].branches["main"]
    assert bool(hub.asked("PUT", "/storage/[0-9a-f]+/1$")) == (part_size == 1000)


def test_the_same_again_changes_nothing(hub, folder):
    first = push_compressed(folder, "me/tiny")
    sent = len(hub.asked("PUT", "storage"))
    again = push_compressed(folder, "me/tiny")
    assert again == first
    assert len(hub.asked("PUT", "storage")) == sent
    assert len(hub.repositories["me/tiny"].messages) == 1


def test_a_name_alone_is_the_users_own(hub, folder):
    assert push_compressed(folder, "tiny").repo_id == "me/tiny"


def test_a_branch_and_privacy_are_passed_on(hub, folder):
    upload = push_compressed(folder, "me/tiny", revision="a/b", private=True)
    repository = hub.repositories["me/tiny"]
    assert repository.is_private
    assert arrived(hub, revision="a/b") == bytes_of(folder)
    assert arrived(hub) == {}
    assert upload.url == f"{hub.endpoint}/me/tiny/tree/a/b"
    # The branch is there now.
    assert push_compressed(folder, "me/tiny", revision="a/b", private=True).commit == upload.commit


@pytest.mark.parametrize(("first", "then"), [(False, True), (True, False)])
def test_a_repository_that_is_there_is_not_what_was_asked_for(hub, folder, first, then):
    push_compressed(folder, "me/tiny", private=first)
    with pytest.raises(ValueError, match="me/tiny is there already and"):
        push_compressed(folder, "me/tiny", private=then)
    assert len(hub.repositories["me/tiny"].messages) == 1


def test_metadata_that_the_hub_refuses(hub, folder):
    (folder / "README.md").write_text(CARD.replace("mit", "my own license"))
    with pytest.raises(ValueError, match="license"):
        push_compressed(folder, "me/tiny")
    assert arrived(hub) == {}


# Refusals, and the call after them


def refusal(hub, folder, *, match, kind, **arguments):
    """Pushes, expects an error, and returns its text."""
    with pytest.raises(kind, match=match) as found:
        push_compressed(folder, arguments.pop("repo_id", "me/tiny"), **arguments)
    assert found.value.__suppress_context__
    return str(found.value)


def test_a_token_that_is_not_known(hub, folder):
    text = refusal(hub, folder, match="401.*hf auth login", kind=PermissionError, token="hf_wrongWRONG")
    assert "does not know your token" in text
    assert "hf_wrong" not in text


def test_no_token(hub, folder, monkeypatch, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    refusal(hub, folder, match="you are not logged in", kind=PermissionError)


def test_a_token_without_the_right_to_write(hub, folder):
    refusal(hub, folder, match="403.*write access to other", kind=PermissionError, repo_id="other/tiny")


@pytest.mark.parametrize("status", [409, 412])
def test_a_commit_at_the_same_time(hub, folder, status):
    hub.faults.append(Fault("POST", "/commit/main", status, message="A commit happened since."))
    refusal(hub, folder, match=f"same time.*{status}: A commit happened since", kind=OSError)
    sent = len(hub.asked("PUT", "storage"))
    push_compressed(folder, "me/tiny")
    assert arrived(hub) == bytes_of(folder)
    assert len(hub.asked("PUT", "storage")) == sent


def test_the_hub_is_down(hub, folder):
    hub.faults.append(Fault("POST", "/preupload/", 503, times=99, message="maintenance"))
    refusal(hub, folder, match="503: maintenance.*wait a while", kind=OSError)


def test_nobody_answers(folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refusal(None, folder, match="me/tiny on http://127.0.0.1:9 was cut off", kind=ConnectionError, token="hf_token")


@pytest.mark.parametrize("part_size", [1000, 1_000_000])
def test_a_connection_that_is_cut_in_the_middle_of_a_file(hub, folder, part_size):
    hub.part_size = part_size
    hub.faults.append(Fault("PUT", "storage", CUT))
    push_compressed(folder, "me/tiny")
    assert hub.faults[0].times == 0
    assert arrived(hub) == bytes_of(folder)


@pytest.mark.parametrize("part_size", [1000, 1_000_000])
def test_a_connection_that_stays_cut(hub, folder, part_size):
    hub.part_size = part_size
    last = sorted(folder.glob("*.safetensors"))[-1]
    oid = hashlib.sha256(last.read_bytes()).hexdigest()
    hub.faults.append(Fault("PUT", oid, CUT, times=99))
    refusal(hub, folder, match="cut off.*Repeat the same command", kind=ConnectionError)
    assert arrived(hub) == {}
    there = set(hub.large)
    assert there
    assert oid not in there
    hub.faults.clear()
    hub.requests.clear()
    push_compressed(folder, "me/tiny")
    assert arrived(hub) == bytes_of(folder)
    assert not [path for path in hub.asked("PUT", "storage") if path.split("/")[2] in there]


@pytest.mark.parametrize("kind", [RuntimeError, OSError, ValueError])
def test_other_errors_of_the_client(hub, folder, monkeypatch, kind):
    def fail(*args, **kwargs):
        raise kind(f"broken with {hub.token}")

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", fail)
    text = refusal(hub, folder, match=r"broken with \*\*\*", kind=OSError if kind is RuntimeError else kind)
    assert hub.token not in text


def test_the_token_is_nowhere(hub, folder, caplog, capfd, monkeypatch):
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    client = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(client, "propagate", True)
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, "huggingface_hub")
    hub.faults.append(Fault("POST", "/commit/", 409))
    text = refusal(hub, folder, match="409", kind=OSError)
    upload = push_compressed(folder, "me/tiny")
    shown = "".join(capfd.readouterr())
    assert caplog.text
    for place in (text, shown, caplog.text, repr(upload), json.dumps(upload.to_dict())):
        assert hub.token not in place
    for content in (*arrived(hub).values(), *bytes_of(folder).values()):
        assert hub.token.encode() not in content


def test_a_server_that_repeats_the_token(hub, folder):
    hub.faults.append(Fault("POST", "/commit/", 409, message=f"not with {hub.token}"))
    text = refusal(hub, folder, match=r"not with \*\*\*", kind=OSError)
    assert hub.token not in text


def test_a_file_that_holds_the_token_stays_here(hub, folder):
    (folder / "README.md").write_text(CARD + hub.token)
    with pytest.raises(ValueError, match="README.md holds your access token") as found:
        push_compressed(folder, "me/tiny")
    assert hub.token not in str(found.value)
    assert not hub.requests


# Folders


def test_what_is_no_part_of_the_model_stays_here(folder):
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"state")
    for name in ("training_args.bin", ".env", "notes.txt", "recipe.yaml", "report.json"):
        (folder / name).write_text("{}")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    upload = push_compressed(folder, "me/tiny", dry_run=True)
    assert upload.left_out == [".env", "checkpoint-3", "notes.txt", "training_args.bin"]
    assert {"recipe.yaml", "report.json", "1_Pooling/config.json"} <= set(upload.files)
    assert upload.n_bytes == sum(upload.files.values())
    assert upload.url is upload.commit is None


def _empty(folder):
    for path in folder.iterdir():
        path.unlink()


def _without_config(folder):
    (folder / "config.json").unlink()


def _without_weights(folder):
    for path in folder.glob("*.safetensors*"):
        path.unlink()


def _without_a_shard(folder):
    next(folder.glob("*-of-*.safetensors")).unlink()


def _cut_off(folder):
    shard = next(folder.glob("*-of-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])


def _pickled(folder):
    (folder / "pytorch_model.bin").write_bytes(b"pickled")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (shutil.rmtree, "There is no folder"),
        (_empty, "no config.json"),
        (_without_config, "no config.json"),
        (_without_weights, "no weights.*save_pretrained"),
        (_without_a_shard, "lacks model-0"),
        (lambda folder: (folder / "model.safetensors.index.json").unlink(), "lacks model.safetensors.index.json"),
        (_cut_off, "cut off or damaged .*save the model there again"),
        (_pickled, "pytorch_model.bin.*pickled.*save_pretrained"),
    ],
)
def test_folders_that_are_refused(hub, folder, spoil, match):
    spoil(folder)
    with pytest.raises(ValueError, match=match):
        push_compressed(folder, "me/tiny")
    assert not hub.requests


@pytest.mark.parametrize("name", ["a/b/c", "me/", "me/tiny model", "-x", "/tmp/model"])
def test_names_that_are_refused(hub, folder, name):
    with pytest.raises(ValueError, match="no name of a repository"):
        push_compressed(folder, name)
    assert not hub.requests


def test_a_model_without_a_card(hub, folder, caplog):
    (folder / "README.md").unlink()
    push_compressed(folder, "me/tiny")
    assert "holds no README.md" in caplog.text


# The command


@pytest.fixture
def command():
    app = typer.Typer()
    app.command()(push)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_command_line(hub, folder, command):
    done = command(folder, "me/tiny", "--private", "--revision", "small", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["commit"] == hub.repositories["me/tiny"].branches["small"]
    assert said["files"] == {name: len(content) for name, content in bytes_of(folder).items()}
    assert hub.repositories["me/tiny"].is_private
    assert hub.token not in done.output


def test_command_line_without_doing_it(hub, folder, command):
    done = command(folder, "me/tiny", "--dry-run")
    assert done.exit_code == 0
    assert "nothing was uploaded" in done.stdout
    assert all(path.name in done.stdout for path in folder.iterdir())
    assert not hub.requests
