"""A model folder is found, or the message says what is wrong with it and where."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmkit.errors import MissingError
from llmkit.modeling.locate import BaseInfo, check_folder, find_base, find_folder, model_digest, saved_dtype


@pytest.fixture
def copy(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "models" / "tiny-llama"))


def test_a_misspelt_folder_brings_the_near_name(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parents[1])
    with pytest.raises(MissingError, match=r"Did you mean models/tiny-llama\?"):
        find_folder("./models/tiny-lama")


def test_a_hub_id_without_a_hub_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MissingError) as caught:
        find_folder("nobody/no-such-model")
    assert "no folder nobody/no-such-model" in str(caught.value)
    assert "hub" in str(caught.value)
    assert "path of a local model folder" in str(caught.value)


def test_a_folder_without_config_names_it_and_what_it_is(copy: Path) -> None:
    (copy / "config.json").unlink()
    with pytest.raises(MissingError, match=r"tiny-llama has no config.json"):
        check_folder(copy)
    run = copy.parent / "run"
    (run / "model").mkdir(parents=True)
    with pytest.raises(MissingError, match=r"folder of a run: name .*run/model"):
        check_folder(run)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_broken_config_is_refused(copy: Path, content: str) -> None:
    (copy / "config.json").write_text(content)
    with pytest.raises(MissingError, match=r"config.json"):
        check_folder(copy)


def test_missing_weights_are_named(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(MissingError, match=r"no weights"):
        check_folder(copy)


def test_a_missing_shard_is_named(copy: Path) -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(MissingError, match=r"1 of 2 weight files are missing, first model-00002-of-00002"):
        check_folder(copy)


@pytest.mark.parametrize("damage", ["cut", "empty", "header", "longer"])
def test_a_corrupted_safetensors_file_is_refused(copy: Path, damage: str) -> None:
    file = copy / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(
        {
            "cut": content[: len(content) // 2],
            "empty": b"",
            "header": b"\xff" * 16 + content[16:],
            "longer": content + b"0" * 10,
        }[damage]
    )
    with pytest.raises(MissingError, match=r"model.safetensors is damaged"):
        check_folder(copy)


def test_the_digest_follows_weights_and_config_only(copy: Path) -> None:
    before = model_digest(copy)
    (copy / "tokenizer_config.json").write_text("{}")
    assert model_digest(copy) == before
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(content))
    assert model_digest(copy) != before


def test_the_saved_type_is_read_from_the_headers(copy: Path) -> None:
    assert saved_dtype(copy) == "float32"


def test_a_base_is_found_where_it_moved_to(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy.parents[1])
    assert find_base("models/tiny-llama", "/gone/tiny-llama", None)[1] == Path("models/tiny-llama")
    with pytest.raises(MissingError, match=r"not at /gone/x nor at ./also/gone"):
        find_base("./also/gone", "/gone/x", None)


def test_base_info_survives_its_file(tmp_path: Path) -> None:
    info = BaseInfo("models/x", "/somewhere/models/x", "abc", 500, "bfloat16")
    info.write(tmp_path)
    assert BaseInfo.read(tmp_path) == info
    (tmp_path / "llmkit_base.json").write_text('{"name": 1}')
    with pytest.raises(MissingError, match="damaged"):
        BaseInfo.read(tmp_path)
