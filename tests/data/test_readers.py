"""Every kind of prompt source can be read from any row, and errors name the broken place."""

import csv
import gzip
import json
import sys
import tracemalloc
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from gdmd_lightning.data.readers import open_source
from gdmd_lightning.errors import UserError
from gdmd_lightning.shapes.captions import TASK_WEIGHTS, prompts

TEXTS = ["a red circle", 'two "big" squares, both blue', "ein Fuß", "雨の中の猫", "a dog"]


def write_txt(path: Path, texts: list[str]) -> None:
    path.write_text("\n".join(texts), encoding="utf-8")


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"prompt": text, "tag": "t"}) + "\n" for text in texts), encoding="utf-8")


def write_csv(path: Path, texts: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["id", "prompt"], *([i, text] for i, text in enumerate(texts))])


def write_parquet(path: Path, texts: list[str]) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"id": list(range(len(texts))), "prompt": texts})
    parquet.write_table(table, path, row_group_size=2)


def write_tsv(path: Path, texts: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, "excel-tab").writerows([["id", "prompt"], *([i, text] for i, text in enumerate(texts))])


def write_json(path: Path, texts: list[str]) -> None:
    path.write_text(json.dumps([{"prompt": text, "tag": "t"} for text in texts], indent=1), encoding="utf-8")


def write_strings(path: Path, texts: list[str]) -> None:
    path.write_text(json.dumps(texts), encoding="utf-8")


def compressed(write: Callable[[Path, list[str]], None]) -> Callable[[Path, list[str]], None]:
    def write_gz(path: Path, texts: list[str]) -> None:
        write(path, texts)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return write_gz


WRITERS = {
    "txt": write_txt,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "tsv": write_tsv,
    "json": write_json,
    "strings.json": write_strings,
    "parquet": write_parquet,
}
WRITERS |= {f"{name}.gz": compressed(write) for name, write in WRITERS.items() if name != "parquet"}


@pytest.fixture(params=WRITERS)
def prompt_file(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    path = tmp_path / f"prompts.{request.param}"
    WRITERS[request.param](path, TEXTS)
    return str(path)


def texts(source: str, start: int = 0, **options: str) -> list[str]:
    return [prompt.text for prompt in open_source(source, **options).read(start)]


def error_of(path: Path, **options: str) -> str:
    """The error when reading the whole file, which must be one line, without the name of the folder."""
    with pytest.raises(UserError) as caught:
        texts(str(path), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{path.parent}/", "")


@pytest.mark.parametrize("start", range(len(TEXTS) + 3))
def test_file_can_be_read_from_any_row(prompt_file: str, start: int) -> None:
    assert texts(prompt_file, start) == TEXTS[start:]


def test_file_counts_its_rows(prompt_file: str) -> None:
    assert open_source(prompt_file).count() == len(TEXTS)


def test_text_file_skips_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf\r\none\r\n \t\r\n\r\n  two  \r\nthree\r\n\r\n")
    assert texts(str(path)) == ["one", "two", "three"]
    assert texts(str(path), 1) == ["two", "three"]
    assert open_source(str(path)).count() == 3


def test_byte_order_mark_is_removed(tmp_path: Path) -> None:
    for name, body in {"p.csv": "prompt\none\n", "p.jsonl": '{"prompt": "one"}\n'}.items():
        (tmp_path / name).write_text(body, encoding="utf-8-sig")
        assert texts(str(tmp_path / name)) == ["one"]


def test_geneval_line_becomes_the_metadata_unchanged(tmp_path: Path) -> None:
    line = {"tag": "counting", "include": [{"class": "dog", "count": 2}], "exclude": [], "prompt": "two dogs"}
    path = tmp_path / "geneval.jsonl"
    path.write_text(json.dumps(line) + "\n")
    (prompt,) = open_source(str(path)).read(0)
    assert (prompt.text, prompt.metadata) == ("two dogs", line)


def test_prompt_can_be_in_another_column(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("caption,id\none,1\n")
    (tmp_path / "p.jsonl").write_text('{"caption": "one"}\n')
    assert texts(str(tmp_path / "p.csv"), column="caption") == ["one"]
    assert texts(str(tmp_path / "p.jsonl"), column="caption") == ["one"]


def test_csv_record_can_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text('id,prompt\n1,"a cat,\non a mat"\n\n2,b\n')
    assert texts(str(path)) == ["a cat,\non a mat", "b"]
    assert texts(str(path), 1) == ["b"]


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("p.txt", b"", "p.txt: there is no prompt in it"),
        ("p.txt", b"\n \n\n", "p.txt: there is no prompt in it"),
        ("p.txt", b"one\n\nFu\xdf\n", "p.txt:3: not UTF-8 (byte 0xdf at position 3 of the line)"),
        ("p.txt", "one\n".encode("utf-16"), "p.txt:1: not UTF-8"),
        ("p.txt", "one\n\u00a0\n".encode(), "p.txt:2: the prompt is empty"),
        ("p.jsonl", b"", "p.jsonl: there is no prompt in it"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "b"\n', "p.jsonl:2: broken JSON at column 15: Expecting ','"),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n\n{"text": "b", "id": 1}\n',
            "p.jsonl:3: no column 'prompt'; it has 'text', 'id'",
        ),
        ("p.jsonl", b'{"prompt": "a"}\n"b"\n', "p.jsonl:2: a JSON str; each line must be an object"),
        ("p.jsonl", b'{"prompt": 3}\n', "p.jsonl:1: the prompt is of type int"),
        ("p.jsonl", b'{"prompt": null}\n', "p.jsonl:1: the prompt is missing"),
        ("p.jsonl", b'{"prompt": "  "}\n', "p.jsonl:1: the prompt is empty"),
        ("p.jsonl", b'{"prompt": "cat \\ud83d"}\n', "p.jsonl:1: half a surrogate pair at character 5"),
        ("p.csv", b"", "p.csv: there is no prompt in it"),
        ("p.csv", b"id,prompt\n", "p.csv: there is no prompt in it"),
        ("p.csv", b"id,text\n1,a\n", "p.csv:1: no column 'prompt'; it has 'id', 'text'"),
        ("p.csv", b"id,prompt\n1,a\n2,b, c\n", "p.csv:3: 3 fields where the header has 2"),
        ("p.csv", b"id,prompt\n1,a\n2\n", "p.csv:3: 1 fields where the header has 2"),
        ("p.csv", b"id,prompt\n1,a\n2,\n", "p.csv:3: the prompt is empty"),
        ("p.csv", b'prompt\na\n""\n', "p.csv:3: the prompt is empty"),
        ("p.csv", b'id,prompt\n1,a\n2,"b\n3,c\n', "p.csv:4: broken CSV: unexpected end of data"),
        ("p.csv", b"id,prompt\n1,a\n2,\xff\n", "p.csv:3: not UTF-8"),
        ("p.parquet", b"PAR1 no, it is not PAR1", "p.parquet: not a readable parquet file"),
        (
            "p.tsv",
            b"id\tprompt\n1\ta\n2\tb\tc\n",
            "p.tsv:3: 3 fields where the header has 2; put prompts that contain a tab",
        ),
        ("p.tsv", b'prompt\n"a\n', "p.tsv:2: broken TSV: unexpected end of data"),
        (
            "p.yml",
            b"prompt\na\n",
            "p.yml: unknown kind of prompt source; give a .txt, .jsonl, .json, .csv, .tsv, .parquet",
        ),
        ("p.parquet.gz", b"", "p.parquet.gz: unknown kind of prompt source"),
        ("p.json", b" \n", "p.json: there is no prompt in it"),
        ("p.json", b"[ ]\n", "p.json: there is no prompt in it"),
        ("p.json", b'\n{"prompt": "a"}\n', "p.json:2: not a JSON list; the file must be one list"),
        ("p.json", b'[\n{"prompt": 3}]', "p.json:2: the prompt is of type int"),
        ("p.json", b'["a",\n"b"]\n["c"]', "p.json:3: more text after the list"),
        ("p.json", b'["a",\n"b"\n"c"]', "p.json:3: broken JSON: expected ',' or ']', found '\"'"),
        ("p.json", b'["a",\n"b"\n', "p.json:3: broken JSON: expected ',' or ']', found 'the end of the file'"),
        ("p.json", b'["a",\n"b\n', "p.json:2: broken JSON: Invalid control character at"),
        ("p.json", b'["a",\n"b', "p.json:2: broken JSON: Unterminated string starting at"),
        ("p.json", b'["a",\n{"prompt": 1,,}]', "p.json:2: broken JSON: "),
        ("p.json", b'["a",\n3]', "p.json:2: an item is not a string or an object"),
        ("p.json", b'["a",\n]', "p.json:2: an item is not a string or an object"),
        ("p.json", b'["a",\n\n{"text": "b"}]', "p.json:3: no column 'prompt'; it has 'text'"),
        ("p.json", b'["a",\n""]', "p.json:2: the prompt is empty"),
        ("p.json", b'["a",\n"Fu\xdf"]', "p.json:2: not UTF-8 (byte 0xdf)"),
        ("p.json", b'["a",\n"Fu\xc3', "p.json:2: not UTF-8 (byte 0xc3)"),
    ],
)
def test_broken_file_is_an_error_that_names_the_place(tmp_path: Path, name: str, body: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(body)
    assert error_of(tmp_path / name).startswith(message)


def test_broken_parquet_table_is_an_error_that_names_the_row(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "p.parquet"
    invalid = pyarrow.array([b"ok", b"Fu\xdf"], pyarrow.binary()).view(pyarrow.string())
    for column, values, message in [
        ("text", ["a"], "p.parquet: no column 'prompt'; it has 'text'"),
        ("prompt", pyarrow.array([], pyarrow.string()), "p.parquet: there is no prompt in it"),
        ("prompt", ["a", "b", None], "p.parquet:row 3: the prompt is missing (null)"),
        ("prompt", [1, 2], "p.parquet:row 1: the prompt is of type int"),
        ("prompt", invalid, "p.parquet:row 2: not UTF-8"),
    ]:
        parquet.write_table(pyarrow.table({column: values}), path, row_group_size=2)
        assert error_of(path).startswith(message)


def test_truncated_parquet_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    write_parquet(path, TEXTS)
    path.write_bytes(path.read_bytes()[:-20])
    assert error_of(path).startswith("p.parquet: not a readable parquet file")


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.csv", "p.tsv", "p.json", "p.parquet", "p.txt.gz"])
def test_missing_file_is_an_error(tmp_path: Path, name: str) -> None:
    assert error_of(tmp_path / name).startswith(f"{name}: no such file")


@pytest.mark.parametrize("source", ["shape", "prompts", "data/prompts.xlsx", "../data/prompts", "/data/prompts", ""])
def test_typo_in_a_name_does_not_reach_the_network(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: pytest.fail("used the network"))
    with pytest.raises(UserError, match="unknown kind of prompt source"):
        open_source(source)


# The csv parser is slow under tracemalloc, so its file has fewer lines.
@pytest.mark.parametrize(("write", "thousands"), [(write_txt, 400), (write_jsonl, 300), (write_csv, 100)])
@pytest.mark.slow
def test_large_file_is_read_in_little_memory(
    tmp_path: Path, write: Callable[[Path, list[str]], None], thousands: int
) -> None:
    path = tmp_path / f"prompts.{write.__name__.removeprefix('write_')}"
    write(path, [f"prompt number {i} of a long corpus" for i in range(1_000)])
    header, lines = (b"id,prompt\n", 1) if write is write_csv else (b"", 0)
    block = b"".join(path.read_bytes().splitlines(keepends=True)[lines:]).rstrip() + b"\n"
    with path.open("wb") as file:
        file.write(header)
        for _ in range(thousands):
            file.write(block)
    source = open_source(str(path))
    tracemalloc.start()
    try:
        read = sum(1 for _ in source.read(thousands * 900))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert read == thousands * 100
    assert peak < 5e5 < path.stat().st_size / 5


def test_parquet_skips_row_groups_without_reading_them(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "p.parquet"
    texts_ = [f"prompt {i}" for i in range(1_000)]
    parquet.write_table(pyarrow.table({"prompt": texts_}), path, row_group_size=100, use_dictionary=False)
    groups = parquet.ParquetFile(path).metadata
    first, last = (groups.row_group(i).column(0).data_page_offset for i in (0, 8))
    source = open_source(str(path))
    body = path.read_bytes()
    path.write_bytes(body[:first] + b"\xff" * (last - first) + body[last:])
    assert [prompt.text for prompt in source.read(850)] == texts_[850:]
    with pytest.raises(UserError, match="not a readable parquet file"):
        list(source.read(750))


def test_shapes_prompts_follow_the_task_weights() -> None:
    drawn = list(islice(open_source("shapes", seed=3).read(0), 3_000))
    assert drawn == list(islice(open_source("shapes", seed=3).read(0), 3_000))
    assert drawn[:50] != list(islice(open_source("shapes", seed=4).read(0), 50))
    for task, weight in TASK_WEIGHTS.items():
        of_task = [prompt for prompt in drawn if prompt.metadata["tag"] == task]
        assert {prompt.text for prompt in of_task} <= {prompt.text for prompt in prompts(task, "train")}
        assert len(of_task) / 3_000 == pytest.approx(weight / sum(TASK_WEIGHTS.values()), abs=0.03)


def test_any_row_of_shapes_is_reached_directly() -> None:
    source = open_source("shapes")
    assert next(source.read(10**15)) == next(source.read(10**15))
    assert list(islice(source.read(0), 10, 20)) == list(islice(source.read(10), 10))


def test_unknown_split_of_shapes_is_an_error() -> None:
    with pytest.raises(UserError, match=r"shapes: no split 'validation'; its splits are train and test"):
        open_source("shapes", split="validation")


@pytest.fixture
def dataset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local folder that ``datasets`` can load, with two files in its split."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "prompts"
    folder.mkdir()
    write_jsonl(folder / "train-0.jsonl", TEXTS[:2])
    write_jsonl(folder / "train-1.jsonl", TEXTS[2:])
    return folder


def test_hugging_face_folder_can_be_read_from_any_row(dataset_folder: Path) -> None:
    source = open_source(str(dataset_folder))
    assert [[prompt.text for prompt in source.read(start)] for start in range(7)] == [TEXTS[i:] for i in range(7)]
    assert source.count() == len(TEXTS)


def test_hugging_face_data_set_is_loaded_by_name_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls = []

    def load_dataset(name: str, **options: object) -> datasets.IterableDataset:
        calls.append((name, options))
        return datasets.Dataset.from_dict({"prompt": TEXTS, "id": [0] * len(TEXTS)}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert texts("someone/prompts-v1.5", split="validation") == TEXTS
    assert calls == [("someone/prompts-v1.5", {"split": "validation", "streaming": True})]


def test_hugging_face_errors_become_user_errors(dataset_folder: Path) -> None:
    with pytest.raises(UserError, match=r"prompts/train-0.jsonl:1: no column 'caption'; it has 'prompt', 'tag'"):
        open_source(str(dataset_folder), column="caption")
    with pytest.raises(UserError, match=r"prompts: no split 'nowhere'; its splits are 'train'"):
        open_source(str(dataset_folder), split="nowhere")
    write_jsonl(dataset_folder / "train-1.jsonl", ["a", " "])
    with pytest.raises(UserError, match=r"prompts/train-1.jsonl:2: the prompt is empty"):
        list(open_source(str(dataset_folder)).read(0))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            "Dataset 'a/b' is a gated dataset on the Hub. You must be authenticated to access it.",
            "accept its license at https://huggingface.co/datasets/a/b, then run: hf auth login",
        ),
        (
            "Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.",
            "check its name; if it is private, run: hf auth login",
        ),
        (ConnectionError("Couldn't reach 'a/b' on the Hub"), "check the connection, or give a file"),
        (RuntimeError("word " * 400), "give a readable organization/name with a split 'train', or a file"),
    ],
    ids=["gated", "absent", "offline", "another"],
)
def test_hub_error_is_one_line_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, error: str | Exception, expected: str
) -> None:
    from datasets.exceptions import DatasetNotFoundError

    def load_dataset(*_: object, **__: object) -> None:
        raise DatasetNotFoundError(error) if isinstance(error, str) else error

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        open_source("a/b")
    message = str(caught.value)
    assert message.startswith("a/b: cannot be read as a Hugging Face data set: ")
    assert message.endswith(f"; {expected}")
    assert len(message) <= 500
    if isinstance(error, RuntimeError):
        assert " word ...; give" in message


@pytest.mark.parametrize("source", ["a/b", "."])
def test_missing_datasets_library_is_one_line(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"'datasets', which is not installed; run: pip install datasets$"):
        open_source(source)
