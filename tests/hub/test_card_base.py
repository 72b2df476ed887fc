"""What a card says of the base: its name, its license, and no path of this machine."""

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from hf_compress.hub.card_base import Base, hub_name, is_local, read_base, shown_name, without_paths
from tests.hub.hub_server import Blob, Hub, Repository
from tests.hub.test_card import BASE_CARD


@pytest.mark.parametrize(
    "content", ["---\nlicense: [mit", "no metadata", "---\nlicense: 3\nlanguage: [en, de]\n---\n"]
)
def test_cards_that_say_nothing(tmp_path, content):
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "README.md").write_text(content)
    assert read_base(str(tmp_path / "bert")) == Base("bert")


def test_a_card_on_the_hub(tmp_path, monkeypatch):
    with Hub().running() as hub:
        hub.repositories |= {"org/bert": Repository(), "org/bare": Repository()}
        hub.repositories["org/bert"].commit("main", {"README.md": Blob(BASE_CARD.encode(), False)}, "A card")
        for name, value in (
            ("ENDPOINT", hub.endpoint),
            ("HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"),
            ("HF_HUB_OFFLINE", False),
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
        ):
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.endpoint)
        close_session()
        assert read_base("org/bert") == Base("org/bert", "org/bert", "apache-2.0", language="en")
        assert read_base("org/bare") == Base("org/bare", "org/bare")
        assert read_base("org/missing") == Base("org/missing", "org/missing")
    # The copy on this machine is enough afterwards.
    assert read_base("org/bert").license == "apache-2.0"
    assert read_base("org/bare").license is None
    close_session()


@pytest.mark.parametrize(
    ("name", "shown", "on_hub"),
    [
        ("org/bert", "org/bert", True),
        ("bert", "bert", True),
        ("/a/b/bert", "bert", False),
        ("./bert", "bert", False),
        ("../x/bert/", "bert", False),
        ("~/bert", "bert", False),
        ("data/train.csv", "train.csv", False),
        (r"C:\models\bert", "bert", False),
    ],
)
def test_names_and_paths(name, shown, on_hub):
    assert (shown_name(name), is_local(name)) == (shown, not on_hub)
    assert hub_name(name) == (name if on_hub else None)


def test_what_is_no_name():
    assert hub_name("BBC News") is None
    assert not is_local("BBC News")


def test_paths_are_taken_out_and_nothing_else(tmp_path):
    patterns = [r"encoder\.layer\.0\..*", r".*\.query"]
    others = ["org/bert", "a/b of texts", "https://a.b/c", 1, None, *patterns]
    value = {"a": [str(tmp_path / "x" / "y"), *others], "b": {"c": "text"}}
    assert without_paths(value) == value | {"a": ["./y", *others]}
    assert without_paths(without_paths(value)) == without_paths(value)
