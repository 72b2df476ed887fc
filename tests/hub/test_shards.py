"""What of a folder with shards is uploaded: what `from_pretrained` reads of it, and nothing else."""

import pytest
from transformers import AutoModelForSequenceClassification

from hf_compress.hub.push import push_compressed
from tests.tiny_job import save_tiny_bert


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return AutoModelForSequenceClassification.from_pretrained(save_tiny_bert(tmp_path_factory.mktemp("tiny")))


def test_shards_of_an_earlier_save_stay_where_they_are(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size=6000)
    shards = {path.name: path.read_bytes() for path in tmp_path.glob("*-of-*")}
    model.save_pretrained(tmp_path)
    for name, content in shards.items():
        (tmp_path / name).write_bytes(content)
    upload = push_compressed(tmp_path, "me/tiny", dry_run=True)
    assert [name for name in upload.files if ".safetensors" in name] == ["model.safetensors"]
    assert set(upload.left_out) == {"model.safetensors.index.json", *shards}


def test_shards_of_a_variant_go_with_their_index(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size=6000, variant="small")
    index = tmp_path / "model.safetensors.index.small.json"
    upload = push_compressed(tmp_path, "me/tiny", dry_run=True)
    assert index.name in upload.files
    assert upload.left_out == []
    index.unlink()
    with pytest.raises(ValueError, match=f"lacks {index.name}"):
        push_compressed(tmp_path, "me/tiny", dry_run=True)
