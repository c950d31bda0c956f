"""Files that are no files, or that would fill the memory, are refused in one line; every limit has its place."""

import gzip
import json
import os
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from gdmd_lightning.data import lines
from gdmd_lightning.data.readers import open_source
from gdmd_lightning.data.rows import DEEPEST, LONGEST_PROMPT
from gdmd_lightning.errors import LONGEST, UserError

NAMES = ["p.txt", "p.jsonl", "p.json", "p.csv", "p.tsv", "p.parquet", "p.txt.gz", "p.json.gz"]
MB = 1_000_000


def texts(path: Path, start: int = 0) -> list[str]:
    return [prompt.text for prompt in open_source(str(path)).read(start)]


def error_of(path: Path) -> str:
    """The error when reading the whole file, which must be one short line, without the name of the folder."""
    with pytest.raises(UserError) as caught:
        texts(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= LONGEST
    return str(caught.value).replace(f"{path.parent}/", "")


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(str(path))


def make_link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (make_pipe, "a named pipe"),
        (make_socket, "a socket"),
        (make_link_to_zeros, "a device"),
        (Path.mkdir, "a directory"),
    ],
)
@pytest.mark.timeout(10)
def test_only_regular_files_are_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[[Path], None], kind: str
) -> None:
    # The path of a socket may have 107 characters.
    monkeypatch.chdir(tmp_path)
    path = Path(name)
    make(path)
    monkeypatch.setattr("builtins.open", lambda *_: pytest.fail("opened"))
    assert error_of(path).endswith(f"{name}: {kind}, not a file; write the prompts to a regular file")


def test_file_replaced_by_a_pipe_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("one\n")
    source = open_source(str(path))
    path.unlink()
    make_pipe(path)
    with pytest.raises(UserError, match="a named pipe, not a file"):
        list(source.read())


@pytest.mark.parametrize("name", NAMES)
def test_impossible_paths_are_errors(tmp_path: Path, name: str) -> None:
    assert "cannot be read: File name too long" in error_of(tmp_path / f"{'x' * 5_000}{name}")
    with pytest.raises(UserError, match="cannot be read: embedded null byte"):
        open_source(f"\0{name}")
    (tmp_path / "file").touch()
    assert "cannot be read: Not a directory" in error_of(tmp_path / "file" / name)


@pytest.mark.parametrize("source", ["x" * 5_000, "x/" * 5_000, "\0", "a\0/b"])
def test_impossible_names_are_errors(source: str) -> None:
    with pytest.raises(UserError, match="unknown kind of prompt source") as caught:
        open_source(source)
    assert len(str(caught.value)) <= LONGEST


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p.json", "p.csv", "p.txt.gz"])
def test_unreadable_file_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).touch()

    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", denied)
    assert error_of(tmp_path / name) == f"{name}: cannot be read: Permission denied"


# What does not fit into memory.


def long_line(head: bytes, tail: bytes = b"") -> bytes:
    return head + b"x" * (10 * MB) + tail


LONG = {
    "text": ("p.txt", long_line(b"one\n"), "p.txt:2: the line has more than 1,000,000 bytes"),
    "line of an object": (
        "p.jsonl",
        long_line(b'{"prompt": "a"}\n\n{"prompt": "'),
        "p.jsonl:3: the line has more than",
    ),
    "string of a list": ("p.json", long_line(b'["a",\n"'), "p.json:2: the item has more than 1,000,000 bytes"),
    "open string": ("p.json", b'["a",\n"' + b"x " * (5 * MB), "p.json:2: the item has more than"),
    "object of a list": (
        "p.json",
        b'["a",\n{"prompt": [' + (b'"' + b"x" * 9_996 + b'",\n') * 1_000,
        "p.json:2: the item has more than",
    ),
    "field": ("p.csv", long_line(b"prompt\na\n"), "p.csv:3: the line has more than"),
    "many fields": ("p.tsv", b"prompt\na\n" + b"\t" * (10 * MB), "p.tsv:3: the line has more than"),
    "record of many lines": (
        "p.csv",
        b"id,prompt\n1,a\n" + (b'"' + b"b" * 996 + b'\n",') * 10_000,
        "p.csv:3: the record has more than 1,000,000 bytes",
    ),
    "open quote": ("p.csv", b'prompt\na\n"b' + b"\nc" * (5 * MB), "p.csv:"),
}


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("case", LONG)
def test_endless_line_or_row_is_found_in_little_memory(tmp_path: Path, case: str, packed: bool) -> None:
    name, body, message = LONG[case]
    path = tmp_path / (f"{name}.gz" if packed else name)
    path.write_bytes(gzip.compress(body, 1) if packed else body)
    tracemalloc.start()
    try:
        found = error_of(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.startswith(message.replace(name, path.name))
    assert peak < 12 * MB


def test_line_of_the_greatest_length_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    line = json.dumps({"prompt": "a", "notes": ""})
    whole = line.replace('""', f'"{"x" * (lines.LONGEST_LINE - len(line) - 1)}"') + "\n"
    assert len(whole) == lines.LONGEST_LINE
    path.write_text(whole + "\n" + whole)
    assert texts(path) == ["a", "a"]
    path.write_text("\n" + whole.replace("x", "xx", 1))
    assert error_of(path).startswith("p.jsonl:2: the line has more than 1,000,000 bytes")


@pytest.mark.parametrize(("name", "place"), [("p.txt", "2"), ("p.jsonl", "2"), ("p.json", "2"), ("p.csv", "3")])
def test_prompt_has_a_greatest_length(tmp_path: Path, name: str, place: str) -> None:
    from test_readers import WRITERS

    write = WRITERS[name.removeprefix("p.")] if name != "p.json" else WRITERS["strings.json"]
    path = tmp_path / name
    write(path, ["a", "é" * LONGEST_PROMPT])
    assert texts(path) == ["a", "é" * LONGEST_PROMPT]
    write(path, ["a", "é" * (LONGEST_PROMPT + 1)])
    found = error_of(path).replace("p.json:1", "p.json:2")  # the whole list is on one line
    assert found.startswith(f"{name}:{place}: the prompt has 10,001 characters; a prompt may have 10,000")


def test_long_value_of_many_rows_of_parquet_is_in_memory_once(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "p.parquet"
    rows = pyarrow.DictionaryArray.from_arrays([0] * 1_000, ["x" * (5 * MB)])
    parquet.write_table(pyarrow.table({"prompt": rows}), path, compression="zstd")
    pool = pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    default = pyarrow.default_memory_pool()
    pyarrow.set_memory_pool(pool)
    try:
        assert error_of(path).startswith("p.parquet:row 1: the prompt has 5,000,000 characters")
    finally:
        pyarrow.set_memory_pool(default)
    assert pool.max_memory() < 100 * MB  # 5,000 MB as plain values


def test_row_group_of_long_prompts_is_refused_before_it_is_read(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "p.parquet"
    table = pyarrow.table({"id": ["a"] * 3, "prompt": ["x" * (2 * MB)] * 3})
    parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert error_of(path).startswith("p.parquet:row group 1: 6,000,")
    parquet.write_table(pyarrow.table({"other": ["x" * (2 * MB)], "prompt": ["a"]}), path)
    assert texts(path) == ["a"]


# Structure.


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (b"[" * 5_000 + b"]" * 5_000, f"more than {DEEPEST} lists or objects inside each other"),
        (b"[" * 400_000, f"more than {DEEPEST} lists or objects inside each other"),
        (b'{"a":' * 60 + b"1" + b"}" * 60, f"more than {DEEPEST} lists or objects inside each other"),
        (b"1" * 5_000, "a number has too many digits"),
        (b'"\\u0000"', None),
    ],
    ids=["deep", "open", "objects", "digits", "metadata may have a NUL"],
)
def test_deep_or_huge_json_is_an_error(tmp_path: Path, value: bytes, message: str | None) -> None:
    row = b'{"prompt": "b", "x": ' + value + b"}"
    for name, body in {"p.jsonl": b'{"prompt": "a"}\n' + row, "p.json": b'["a",\n' + row + b"]"}.items():
        (tmp_path / name).write_bytes(body)
        if message is None:
            assert texts(tmp_path / name) == ["a", "b"]
        else:
            assert error_of(tmp_path / name).startswith(f"{name}:2: {message}")


def test_depth_up_to_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a", "x": ' + "[" * (DEEPEST - 1) + "1" + "]" * (DEEPEST - 1) + "}")
    assert texts(path) == ["a"]
    path.write_text('{"prompt": "a", "x": ' + "[" * DEEPEST + "1" + "]" * DEEPEST + "}")
    assert "inside each other" in error_of(path)


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("p.txt", b"a\ncat\0s\n"),
        ("p.jsonl", b'{"prompt": "a"}\n{"prompt": "cat\\u0000"}\n'),
        ("p.json", b'["a",\n"cat\\u0000"]\n'),
        ("p.csv", b"prompt\ncat\0s\n"),
    ],
)
def test_nul_in_a_prompt_is_an_error(tmp_path: Path, name: str, body: bytes) -> None:
    (tmp_path / name).write_bytes(body)
    assert error_of(tmp_path / name).startswith(f"{name}:2: a NUL at character 4 of the prompt")


def test_messages_list_a_few_of_many_columns(tmp_path: Path) -> None:
    columns = [f"column{i}" for i in range(300)]
    (tmp_path / "p.csv").write_text(",".join(columns) + "\n")
    (tmp_path / "p.jsonl").write_text(json.dumps(dict.fromkeys(columns, "a")))
    for name in ("p.csv", "p.jsonl"):
        found = error_of(tmp_path / name)
        assert found.startswith(f"{name}:1: no column 'prompt'; it has 'column0', 'column1', ")
        assert found.endswith(" and 292 more; set column to one of them, or rename it")


# gzip.


@pytest.mark.parametrize("name", ["p.txt.gz", "p.jsonl.gz", "p.json.gz", "p.csv.gz"])
def test_broken_gzip_is_an_error_after_the_last_whole_row(tmp_path: Path, name: str) -> None:
    from test_readers import WRITERS

    path = tmp_path / name
    WRITERS[name.removeprefix("p.")](path, [f"prompt number {i * i}" for i in range(5_000)])
    whole = path.read_bytes()
    for body, message in [
        (whole[:-20], "broken gzip: Compressed file ended before the end-of-stream marker"),
        (whole[:-8] + bytes(8), "broken gzip: CRC check failed"),
        (whole + b"more", "broken gzip: Not a gzipped file"),
    ]:
        path.write_bytes(body)
        assert f": {message}" in error_of(path)
    # Damaged data can also decompress to something that is not a prompt.
    path.write_bytes(whole[:2_000] + bytes(200) + whole[2_200:])
    assert error_of(path).startswith(f"{name}:")
    path.write_bytes(b"a red circle\n")
    assert error_of(path).startswith(f"{name}:1: broken gzip: Not a gzipped file (b'a '); compress or copy the file")


def test_gzip_of_blanks_is_read_in_little_memory(tmp_path: Path) -> None:
    bombs = {"p.txt.gz": b"one\n" + b"\n" * (MB // 2), "p.json.gz": b'["one"' + b" " * (20 * MB) + b"]"}
    for name, body in bombs.items():
        (tmp_path / name).write_bytes(gzip.compress(body, 1))
        tracemalloc.start()
        try:
            assert texts(tmp_path / name) == ["one"]
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 6 * MB


# Line endings and pieces.


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["lf", "crlf", "cr"])
@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 16])
def test_lines_end_alike_wherever_the_file_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str, chunk: int
) -> None:
    monkeypatch.setattr(lines, "CHUNK", chunk)
    expected = ["one é", "two", "three 雨"]
    for name, body in {
        "p.txt": "\ufeffone é\n\n \ntwo\nthree 雨",
        "p.jsonl": '\ufeff{"prompt": "one é"}\n\n{"prompt": "two"}\n{"prompt": "three 雨"}\n',
        "p.csv": '\ufeffid,prompt\n1,"one é"\n\n2,two\n3,three 雨\n',
        "p.tsv": "\ufeffid\tprompt\n1\tone é\n2\ttwo\n3\tthree 雨",
        "p.json": '\ufeff[\n{"prompt": "one é"},\n"two" ,\n "three 雨"\n]\n',
    }.items():
        path = tmp_path / name
        path.write_bytes(body.replace("\n", end).encode())
        assert texts(path) == expected
        assert texts(path, 1) == expected[1:]
        assert open_source(str(path)).count() == 3
    path = tmp_path / "p.txt"
    path.write_bytes(f"one{end}{end}two\0".encode())
    assert error_of(path).startswith("p.txt:3: a NUL")


def test_csv_keeps_line_breaks_inside_quotes(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b'prompt\r\n"a cat,\r\non a mat"\r\nb\r\n')
    assert texts(tmp_path / "p.csv") == ["a cat,\r\non a mat", "b"]


@pytest.mark.parametrize("body", [b"\xef\xbb\xbfone\n\n \t\ntwo\r\n\r\nthree", b"one\rtwo\r\rthree\r"])
def test_folder_of_text_files_has_the_rows_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "prompts"
    folder.mkdir()
    for name in ("train-0.txt", "train-1.txt"):
        (folder / name).write_bytes(body)
    (folder / "test.txt").write_text("only for tests")
    rows = ["one", "two", "three"] * 2
    assert [texts(folder, start) for start in range(8)] == [rows[start:] for start in range(8)]
    assert open_source(str(folder)).count() == 6
    (folder / "train-1.txt").write_bytes(body + b"\nFu\xdf")
    assert error_of(folder).startswith("prompts/train-1.txt:")
