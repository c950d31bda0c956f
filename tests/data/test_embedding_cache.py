"""Embeddings on disk: computed once, read back bitwise equal, intact after any crash, of one model only."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from gdmd_lightning.data import embedding_cache, embeddings
from gdmd_lightning.data.embedding_cache import EmbeddingCache, EmbeddingStore, checksum, key_of
from gdmd_lightning.data.embeddings import PromptEmbeddings, fill
from gdmd_lightning.errors import UserError
from gdmd_lightning.files import temporary_name
from gdmd_lightning.latents import Conditioning

HERE = Path(__file__).parent
CPU = torch.device("cpu")
TEXTS = [f"prompt {n}" for n in range(10)]


class Words:
    """A family with random embeddings that depend only on the text; it records the texts it encodes."""

    def __init__(self):
        self.encoded = []

    def encode(self, texts):
        self.encoded += [list(texts)]
        draws = [torch.Generator().manual_seed(int(key_of(text)[:12], 16)) for text in texts]
        rows = torch.stack([torch.randn(4, 3, generator=draw) for draw in draws])
        return Conditioning(rows[:, :2], rows[:, 2], rows[:, 3].long())

    @property
    def empty(self):
        return Words().encode([""])


def filled(directory, texts, family, rank=0, **options):
    store = EmbeddingStore(str(directory), "words", rank)
    fill(store, family, texts, **{"batch_size": 2, "shard_size": 4, "rank": rank, **options})
    return store


def same(one, other):
    parts = [(getattr(one, name), getattr(other, name)) for name in ("sequence", "pooled", "ids")]
    return all((a is None) == (b is None) and (a is None or (a.dtype == b.dtype and a.equal(b))) for a, b in parts)


def run_here(code, *arguments):
    """Run Python code in a new process, with the names of this file imported."""
    code = f"import os, sys\nfrom test_embedding_cache import *\n{code}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent)))}
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=environment, text=True, stderr=subprocess.PIPE
    )


def files(directory, kind):
    return sorted(path.name for path in Path(directory).glob(f"*.{kind}"))


def test_cache_is_reused_by_a_second_run(tmp_path):
    filled(tmp_path, TEXTS, Words())
    family = Words()
    store = filled(tmp_path, TEXTS, family)
    rows = PromptEmbeddings(family, store=store)(TEXTS)
    assert family.encoded == []
    assert same(rows, Words().encode(TEXTS))


def test_fill_encodes_each_text_once_in_batches_and_files_of_the_given_size(tmp_path):
    family = Words()
    filled(tmp_path, TEXTS + TEXTS[::-1], family)
    assert [len(batch) for batch in family.encoded] == [2] * 5
    assert [text for batch in family.encoded for text in batch] == TEXTS
    assert len(files(tmp_path, "safetensors")) == 3


def test_fill_encodes_only_new_texts(tmp_path):
    filled(tmp_path, TEXTS[:6], Words())
    family = Words()
    filled(tmp_path, TEXTS, family)
    assert sorted(text for batch in family.encoded for text in batch) == TEXTS[6:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fields", [("sequence",), ("sequence", "pooled"), ("sequence", "ids"), embedding_cache.FIELDS])
def test_store_reads_bitwise_what_was_written(tmp_path, dtype, fields):
    parts = {"sequence": torch.randn(1, 5, 4), "pooled": torch.randn(1, 3), "ids": torch.randn(1, 5, 4)}
    row = Conditioning(**{name: parts[name].to(dtype) for name in fields})
    EmbeddingStore(str(tmp_path), "words").write({"déjà vu": row})
    assert same(EmbeddingStore(str(tmp_path), "words").read("déjà vu", CPU), row)


def test_read_embedding_does_not_depend_on_its_file(tmp_path):
    store = filled(tmp_path, TEXTS, Words())
    row = store.read(TEXTS[0], CPU)
    for path in tmp_path.glob("*"):
        with path.open("r+b") as file:
            file.write(bytes(path.stat().st_size))
    assert same(row, Words().encode(TEXTS[:1]))


# Several processes.


def fill_share(place, rank):
    def barrier():
        (place / f"here-{rank}").touch()
        last = time.monotonic() + 60
        while not all((place / f"here-{r}").exists() for r in (0, 1)):
            assert time.monotonic() < last
            time.sleep(0.02)

    family = Words()
    store = filled(place / "cache", TEXTS, family, rank, world_size=2, barrier=barrier)
    read = all(same(store.read(text, CPU), Words().encode([text])) for text in TEXTS)
    encoded = [text for batch in family.encoded for text in batch]
    (place / f"report-{rank}.json").write_text(json.dumps({"encoded": encoded, "read": read}))


@pytest.mark.slow
def test_two_processes_share_the_work_and_read_each_others_shards(tmp_path):
    running = [run_here("fill_share(Path(sys.argv[1]), int(sys.argv[2]))", tmp_path, rank) for rank in (0, 1)]
    stderr = [process.communicate(timeout=100)[1] for process in running]
    assert [process.returncode for process in running] == [0, 0], stderr
    one, other = (json.loads((tmp_path / f"report-{rank}.json").read_text()) for rank in (0, 1))
    assert one["encoded"]
    assert other["encoded"]
    assert sorted(one["encoded"] + other["encoded"]) == TEXTS
    assert one["read"]
    assert other["read"]


def test_fill_shares_do_not_depend_on_shards_already_seen(tmp_path):
    """Dividing by position among the missing texts would skip some if ranks start at different times."""
    early, late = Words(), Words()

    def fill_other_share():
        filled(tmp_path, TEXTS, late, 0, world_size=2)

    store = filled(tmp_path, TEXTS, early, 1, world_size=2, barrier=fill_other_share)
    assert store.missing(TEXTS) == []
    encoded = [[text for batch in family.encoded for text in batch] for family in (early, late)]
    assert all(encoded)
    assert sorted(encoded[0] + encoded[1]) == TEXTS


def test_fill_refuses_ranks_with_different_directories(tmp_path, monkeypatch):
    monkeypatch.setattr(embeddings, "PATIENCE", 0)
    with pytest.raises(UserError, match=r"lacks \d+ of 10 prompts .*set embedding_cache.directory to a directory that"):
        filled(tmp_path, TEXTS, Words(), world_size=2)


def test_store_reads_the_earlier_of_two_shards_with_the_same_prompt(tmp_path):
    row = Words().encode(["a"])
    first, second, early = (EmbeddingStore(str(tmp_path), "words", rank) for rank in (0, 1, 2))
    first.write({"a": row})
    early.refresh()
    second.write({"a": Conditioning(row.sequence + 1, row.pooled, row.ids)})
    early.refresh()
    for store in (first, second, early, EmbeddingStore(str(tmp_path), "words")):
        assert same(store.read("a", CPU), row)


# Crashes.


def test_interrupted_write_keeps_earlier_shards_and_leaves_no_file(tmp_path, monkeypatch):
    store = filled(tmp_path, TEXTS[:4], Words())

    def stop(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", stop)
        with pytest.raises(KeyboardInterrupt):
            fill(store, Words(), TEXTS, batch_size=2, shard_size=4)
    assert files(tmp_path, "part") == []
    family = Words()
    again = filled(tmp_path, TEXTS, family)
    assert sorted(text for batch in family.encoded for text in batch) == TEXTS[4:]
    assert same(PromptEmbeddings(family, store=again)(TEXTS), Words().encode(TEXTS))


@pytest.mark.slow
def test_killed_write_leaves_a_usable_cache(tmp_path):
    killed = run_here(
        "store = filled(sys.argv[1], TEXTS[:4], Words())\n"
        "os.fsync = lambda _: os.kill(os.getpid(), 9)\n"
        "fill(store, Words(), TEXTS, batch_size=2, shard_size=4)",
        tmp_path,
    )
    killed.communicate(timeout=100)
    assert killed.returncode == -9
    assert len(files(tmp_path, "part")) == 1
    assert len(files(tmp_path, "safetensors")) == 1
    EmbeddingStore(str(tmp_path), "words", rank=1)
    assert len(files(tmp_path, "part")) == 1, "the file of another rank must stay"
    family = Words()
    again = filled(tmp_path, TEXTS, family)
    assert files(tmp_path, "part") == []
    assert sorted(text for batch in family.encoded for text in batch) == TEXTS[4:]
    assert same(PromptEmbeddings(family, store=again)(TEXTS), Words().encode(TEXTS))


def test_unfinished_file_of_a_running_process_is_kept_for_a_day(tmp_path):
    host = temporary_name(tmp_path / "x").name.split("@")[1].removesuffix(".part")
    mine = tmp_path / f"00000.{os.getppid()}@{host}.part"
    far = tmp_path / "00000.1@elsewhere.part"
    for part in (mine, far):
        part.write_bytes(b"half")
    EmbeddingStore(str(tmp_path), "words")
    assert mine.exists()
    assert far.exists()
    yesterday = time.time() - 25 * 3600
    os.utime(far, (yesterday, yesterday))
    EmbeddingStore(str(tmp_path), "words")
    assert mine.exists()
    assert not far.exists()


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_shard_is_an_error_that_names_it(tmp_path, kept):
    filled(tmp_path, TEXTS[:4], Words())
    (name,) = files(tmp_path, "safetensors")
    os.truncate(tmp_path / name, kept if kept >= 0 else (tmp_path / name).stat().st_size - 1)
    with pytest.raises(UserError, match=r"not an intact safetensors file .*remove this file") as raised:
        EmbeddingStore(str(tmp_path), "words")
    assert str(raised.value).startswith(str(tmp_path / name))
    assert "\n" not in str(raised.value)


def test_every_flipped_byte_of_a_row_is_noticed_when_it_is_read(tmp_path):
    filled(tmp_path, TEXTS[:1], Words())
    (name,) = files(tmp_path, "safetensors")
    content = (tmp_path / name).read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    assert len(content) - begin == (2 * 3 + 3) * 4 + 3 * 8
    expected = r"the checksum of a row of .\w+. does not match.*remove this file"
    for place in range(begin, len(content)):
        (tmp_path / name).write_bytes(content[:place] + bytes([content[place] ^ 4]) + content[place + 1 :])
        with pytest.raises(UserError, match=expected) as raised:
            EmbeddingStore(str(tmp_path), "words").read(TEXTS[0], CPU)
    assert str(raised.value).startswith(str(tmp_path / name))


def test_row_of_another_shape_is_an_error_that_names_its_file(tmp_path):
    store = filled(tmp_path, TEXTS[:1], Words())
    store.write({TEXTS[1]: Conditioning(torch.zeros(1, 5, 3), torch.zeros(1, 3), torch.zeros(1, 3).long())})
    store.read(TEXTS[0], CPU)
    expected = r"a row of 'sequence' has shape \(1, 5, 3\), others have \(1, 2, 3\)"
    with pytest.raises(UserError, match=expected) as raised:
        store.read(TEXTS[1], CPU)
    assert str(raised.value).startswith(str(tmp_path / files(tmp_path, "safetensors")[-1]))


def test_checksum_depends_on_dtype_shape_and_bits():
    row = torch.tensor([[1.0, 2.0]])
    others = [row.view(torch.int32), row.T, row + 1]
    assert len({checksum(each) for each in [row, *others]}) == 4
    assert checksum(row) == checksum(torch.tensor([[1.0, 0.0, 2.0]])[:, ::2])


def test_shard_removed_during_a_run_is_an_error(tmp_path):
    store = filled(tmp_path, TEXTS[:4], Words())
    (name,) = files(tmp_path, "safetensors")
    (tmp_path / name).unlink()
    with pytest.raises(UserError, match=name):
        store.read(TEXTS[0], CPU)


FULL = """
import resource, signal
store = filled(sys.argv[1], TEXTS[:4], Words())
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    fill(store, Words(), TEXTS, batch_size=2, shard_size=4)
except UserError as error:
    sys.stderr.write(str(error))
    sys.exit(2)
"""


@pytest.mark.slow
def test_full_disk_is_a_one_line_error_and_keeps_earlier_shards(tmp_path):
    """A limit on file sizes makes the kernel refuse a write halfway, as on a full disk."""
    process = run_here(FULL, tmp_path)
    stderr = process.communicate(timeout=100)[1]
    assert process.returncode == 2, stderr
    line = stderr.splitlines()[-1]
    assert line.startswith(f"{tmp_path}: cannot write ")
    assert "File too large" in line
    assert files(tmp_path, "part") == []
    assert len(files(tmp_path, "safetensors")) == 1
    family = Words()
    filled(tmp_path, TEXTS, family)
    assert sorted(text for batch in family.encoded for text in batch) == TEXTS[4:]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_full_disk_error_gives_the_reason(tmp_path, monkeypatch):
    store = EmbeddingStore(str(tmp_path), "words")
    opened = Path.open

    def full(self, *options, **named):
        return opened(Path("/dev/full") if self.suffix == ".part" else self, *options, **named)

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(UserError, match=r"cannot write .*: No space left on device"):
        store.write({"a": Words().encode(["a"])})


def test_fill_refuses_a_disk_without_room_before_encoding(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(1, 1, 100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    family = Words()
    with pytest.raises(UserError, match=r"10 prompts of 60 bytes each need 600 bytes; 100 bytes are free"):
        filled(tmp_path, TEXTS, family)
    assert family.encoded == []


def test_store_refuses_a_path_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write here: File exists"):
        EmbeddingStore(str(tmp_path / "file"), "words")


# Only one model.


def test_store_refuses_embeddings_of_another_model(tmp_path):
    filled(tmp_path, TEXTS, Words())
    with pytest.raises(UserError, match=r"contains embeddings of another model.*a separate directory") as raised:
        EmbeddingStore(str(tmp_path), "letters")
    assert str(raised.value).startswith(str(tmp_path))


def test_store_refuses_a_directory_of_model_weights(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="contains safetensors files that are not embeddings"):
        EmbeddingStore(str(tmp_path), "words")


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"shard_size": 0}, {"most": -1}, {"directory": " "}])
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match=rf"(embedding_cache|EmbeddingCache)\.{next(iter(wrong))}: "):
        EmbeddingCache(**{"directory": "cache", **wrong})
