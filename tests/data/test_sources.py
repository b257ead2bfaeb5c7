"""Sources and readers: every kind of file, every kind of damage."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

from llmkit.data.readers import read_file
from llmkit.data.rows import BadRow, RawRow
from llmkit.data.settings import DataSettings, SourceSettings
from llmkit.data.sources import digest, eval_sources, read, train_sources
from llmkit.errors import DataError, MissingError

ROWS = [{"prompt": "a\nb", "completion": '한국어, "quoted"'}, {"prompt": "c", "completion": "d"}]
Write = Callable[..., str]


def rows_of(path: str | Path) -> list[dict[str, Any]]:
    found = list(read_file(str(path)))
    assert all(isinstance(row, RawRow) for row in found), found
    return [row.data for row in found if isinstance(row, RawRow)]


def ids_of(path: str | Path) -> list[str]:
    return [row.row_id.removeprefix(f"{path}:") for row in read_file(str(path))]


def write_kind(folder: Path, kind: str) -> Path:
    path = folder / f"rows{kind}"
    packed = kind.endswith(".gz")
    text = {
        ".jsonl": "".join(json.dumps(row) + "\n" for row in ROWS),
        ".json": json.dumps(ROWS),
        ".csv": 'prompt,completion\n"a\nb","한국어, ""quoted"""\nc,d\n',
        ".tsv": 'prompt\tcompletion\n"a\nb"\t"한국어, ""quoted"""\nc\td\n',
    }.get(kind.removesuffix(".gz"))
    if text is not None:
        raw = text.encode()
        path.write_bytes(gzip.compress(raw) if packed else raw)
    elif kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind == ".feather":
        feather.write_feather(pa.Table.from_pylist(ROWS), str(path))
    else:
        table = pa.Table.from_pylist(ROWS)
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    return path


@pytest.mark.parametrize(
    "kind", [".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".json.gz", ".csv.gz", ".parquet", ".feather", ".arrow"]
)
def test_every_kind_of_file_gives_the_same_rows(kind: str, tmp_path: Path) -> None:
    path = write_kind(tmp_path, kind)
    assert rows_of(path) == ROWS
    assert ids_of(path) == (["2", "4"] if ".csv" in kind or ".tsv" in kind else ["1", "2"])


def test_json_under_data_and_lines_of_json_under_the_wrong_name(tmp_path: Path) -> None:
    under = tmp_path / "under.json"
    under.write_text(json.dumps({"data": ROWS}), encoding="utf-8")
    lines = tmp_path / "lines.json"
    lines.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    assert rows_of(under) == ROWS
    assert rows_of(lines) == ROWS


def test_text_file_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text("one\n\ntwo\n", encoding="utf-8")
    assert rows_of(path) == [{"text": "one\n\ntwo\n"}]


def test_damaged_lines_are_bad_rows_with_number_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    deep = b"[" * 100_000 + b"]" * 100_000
    lines = [b'\xef\xbb\xbf{"a": 1}', b'{"a": ', b"[1]", b'{"a": "\xff"}', b"", b"   ", deep, b"NaN", b'{"a": "x\0"}']
    path.write_bytes(b"\n".join(lines))
    found = list(read_file(str(path)))
    assert isinstance(found[0], RawRow) and found[0].data == {"a": 1}
    bad = {row.row_id.rsplit(":", 1)[1]: row.reason for row in found if isinstance(row, BadRow)}
    assert list(bad) == ["2", "3", "4", "7", "8", "9"]
    assert "invalid JSON at column" in bad["2"]
    assert "a list, not an object" in bad["3"]
    assert "invalid UTF-8 at byte 8" in bad["4"]
    assert "nested too deeply" in bad["7"]
    assert "not an object" in bad["8"]
    assert "invalid JSON" in bad["9"]


def test_damaged_csv_rows_are_bad_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b'a,b\n1,2\n1\n1,2,3\n\xff,2\n"x"y,2\n3,4\n"never closed,5\n6,7\n')
    found = list(read_file(str(path)))
    assert [row.data for row in found if isinstance(row, RawRow)] == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]
    bad = {row.row_id.rsplit(":", 1)[1]: row.reason for row in found if isinstance(row, BadRow)}
    assert list(bad) == ["3", "4", "5", "6", "8"]
    assert bad["3"] == "1 fields where the header names 2"
    assert bad["5"] == "invalid UTF-8"
    assert "lines 8 to 9" in bad["8"]


def test_damaged_containers_are_data_errors(tmp_path: Path) -> None:
    for kind in (".jsonl.gz", ".csv.gz", ".json.gz", ".parquet", ".feather", ".arrow", ".json"):
        path = write_kind(tmp_path, kind)
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(DataError, match=r"damaged|invalid JSON"):
            list(read_file(str(path)))
    path.write_bytes("text".encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        list(read_file(str(path)))
    with pytest.raises(DataError, match="unknown kind of file"):
        read_file("rows.docx")


def test_missing_file_names_key_path_and_near_files(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("{}\n", encoding="utf-8")
    settings = DataSettings(
        train=[str(tmp_path / "train.jsonl"), str(tmp_path / "trian.jsonl")], eval=str(tmp_path / "*.csv")
    )
    with pytest.raises(DataError) as caught:
        digest(settings)
    message = str(caught.value)
    assert "data.train[1]" in message and "trian.jsonl does not exist" in message
    assert "Files there: train.jsonl" in message
    assert "data.eval: no file matches" in message
    assert caught.value.exit_code == 3


def test_glob_and_folder_are_sorted(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.jsonl.gz", "notes.bin"):
        raw = json.dumps({"text": name}).encode()
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    (source,) = train_sources(DataSettings(train=str(tmp_path / "*.jsonl")))
    assert [Path(name).name for name in source.files()] == ["a.jsonl", "b.jsonl"]
    (folder,) = train_sources(DataSettings(train=str(tmp_path)))
    assert [row.data["text"] for row in read(folder) if isinstance(row, RawRow)] == ["a.jsonl", "b.jsonl", "c.jsonl.gz"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data file"):
        train_sources(DataSettings(train=str(tmp_path / "empty")))[0].files()


def test_folder_saved_by_datasets_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "saved"))
    (source,) = train_sources(DataSettings(train=str(tmp_path / "saved")))
    assert [row.data for row in read(source) if isinstance(row, RawRow)] == ROWS


def test_uri_is_read_through_fsspec(tmp_path: Path, write_jsonl: Write) -> None:
    import fsspec

    path = write_jsonl(ROWS)
    (source,) = train_sources(DataSettings(train=f"file://{tmp_path}/*.jsonl"))
    assert source.files() == [f"file://{path}"]
    assert [row.data for row in read(source) if isinstance(row, RawRow)] == ROWS
    memory = fsspec.filesystem("memory")
    memory.pipe("/llmkit-test/rows.jsonl", Path(path).read_bytes())
    settings = DataSettings(train="memory://llmkit-test/rows.jsonl")
    before = digest(settings)
    assert len(list(read(train_sources(settings)[0]))) == 2
    memory.pipe("/llmkit-test/rows.jsonl", b'{"prompt": "x", "completion": "y"}')
    assert digest(settings) != before
    with pytest.raises(DataError, match=r"data\.train: memory://llmkit-test/none\.jsonl does not exist"):
        digest(DataSettings(train="memory://llmkit-test/none.jsonl"))
    with pytest.raises((DataError, MissingError)):
        digest(DataSettings(train="nosuch://x/y.jsonl"))


def test_hub_id_offline_says_that_it_is_neither_file_nor_reachable_and_what_to_do() -> None:
    settings = DataSettings(train="some-org/some-name")
    assert train_sources(settings)[0].is_hub
    with pytest.raises(MissingError, match=r"data\.train: some-org/some-name is no file here") as caught:
        digest(settings)
    advice = str(caught.value).splitlines()[-1]
    assert advice.startswith("HF_HUB_OFFLINE is set: unset it")
    assert "`hf download some-org/some-name --repo-type dataset --local-dir data/some-name`" in advice
    assert "data/some-name/**/train*.parquet" in advice
    with pytest.raises(MissingError, match="split train"):
        list(read(train_sources(settings)[0]))


def test_digest_follows_the_content(write_jsonl: Write) -> None:
    path = write_jsonl(ROWS)
    settings = DataSettings(train=path, eval=SourceSettings(path=path))
    first = digest(settings)
    assert list(first) == [path] and first[path].startswith("sha256:")
    write_jsonl(ROWS[:1])
    assert digest(settings)[path] != first[path]


def test_sources_take_format_and_columns_of_their_own() -> None:
    settings = DataSettings(
        train=["a.jsonl", SourceSettings(path="b.jsonl", weight=0.5, format="alpaca", columns={"output": "o"})],
        format="text",
        columns={"text": "body"},
    )
    first, second = train_sources(settings)
    assert (first.format, first.columns, first.weight) == ("text", {"text": "body"}, 1.0)
    assert (second.key, second.format, second.columns, second.weight) == (
        "data.train[1]",
        "alpaca",
        {"output": "o"},
        0.5,
    )
    assert eval_sources(settings) == []


def test_digest_loads_nothing_heavy(write_jsonl: Write) -> None:
    import subprocess

    code = (
        "import sys; from llmkit.data.sources import digest; from llmkit.data.settings import DataSettings; "
        f"print(len(digest(DataSettings(train={write_jsonl(ROWS)!r})))); "
        "print([m for m in ('numpy', 'pyarrow', 'torch', 'transformers', 'datasets', 'fsspec') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split("\n")[:2] == ["1", "[]"]
