"""Small files in the layouts in which prompt sets are published, read with a column and a tag."""

import json
from pathlib import Path

import pytest
import tiny
import yaml

from gdmd_lightning.callbacks.evaluation import GenerationEvaluation
from gdmd_lightning.cli import main
from gdmd_lightning.data.evaluation_prompts import read_evaluation_prompts
from gdmd_lightning.data.prompt_data import PromptDataModule
from gdmd_lightning.data.readers import open_source
from gdmd_lightning.errors import UserError
from gdmd_lightning.metrics.scores import RewardScore
from gdmd_lightning.studies import pipelines

PARTI = (
    "Prompt\tCategory\tChallenge\tNote\n"
    "a teapot\tArtifacts\tBasic\t\n"
    'a wall that says "open late"\tOutdoor Scenes\tWriting & Symbols\tnote\n'
    '"O P E N" in thick paint on a door\tArtifacts\tWriting & Symbols\t\n'
    '"a chair, red"\tArtifacts\tBasic\t"a ""note"" with\ta tab"\n'
)
DRAWBENCH = (
    'Prompts,Category\nA red dog.,Colors\n"A cup, a plate, and a fork.",Gary Marcus et al. \nTwo dogs.,Counting\n'
)
STYLES = {
    "anime": ["a knight", "a fox"],
    "concept-art": ["a tower", "a ship"],
    "paintings": ["a lake", "a hill"],
    "photo": ["a bus", "a man"],
}


def pairs(source: object, **options: str) -> list[tuple[str, str]]:
    return [(prompt.text, prompt.metadata["tag"]) for prompt in open_source(str(source), **options).read()]


def refusal(source: object, **options: str) -> str:
    with pytest.raises(UserError) as caught:
        list(open_source(str(source), **options).read())
    return str(caught.value).replace(f"{Path(str(source)).parent}/", "")


@pytest.fixture
def parti(tmp_path: Path) -> Path:
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text(PARTI)
    return path


@pytest.fixture
def hpdv2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The benchmark of HPDv2: a list of prompts for each style."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "benchmark"
    folder.mkdir()
    for style, prompts in STYLES.items():
        (folder / f"{style}.json").write_text(json.dumps(prompts))
    return folder


def test_partiprompts_are_read_by_category_or_challenge_with_their_quotes(parti: Path) -> None:
    found = pairs(parti, column="Prompt", tag="Category")
    assert found == [
        ("a teapot", "Artifacts"),
        ('a wall that says "open late"', "Outdoor Scenes"),
        ('"O P E N" in thick paint on a door', "Artifacts"),
        ("a chair, red", "Artifacts"),
    ]
    assert {tag for _, tag in pairs(parti, column="Prompt", tag="Challenge")} == {"Basic", "Writing & Symbols"}


def test_quoted_tsv_with_a_tab_inside_is_still_one_field(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text('prompt\tid\n"a\t""b"" c"\t1\n"d\ne"\t2\n')
    assert [prompt.text for prompt in open_source(str(tmp_path / "p.tsv")).read()] == ['a\t"b" c', "d\ne"]


def test_a_tsv_line_that_is_neither_quoted_nor_complete_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "p.tsv").write_text('prompt\tid\n"a" b\n')
    assert refusal(tmp_path / "p.tsv").startswith("p.tsv:2: broken TSV: ")
    (tmp_path / "p.csv").write_text('prompt,id\n"a" b,1\n')
    assert refusal(tmp_path / "p.csv").startswith("p.csv:2: broken CSV: ")


def test_drawbench_is_read_by_category(tmp_path: Path) -> None:
    (tmp_path / "drawbench.csv").write_text(DRAWBENCH)
    found = pairs(tmp_path / "drawbench.csv", column="Prompts", tag="Category")
    assert found == [
        ("A red dog.", "Colors"),
        ("A cup, a plate, and a fork.", "Gary Marcus et al."),
        ("Two dogs.", "Counting"),
    ]


@pytest.mark.parametrize("name", ["test.txt", "test.txt.gz"])
def test_text_list_gets_the_name_of_its_file_as_tag(tmp_path: Path, name: str) -> None:
    import gzip

    content = b"a cat\na dog\n"
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert pairs(tmp_path / name, tag="file") == [("a cat", "test"), ("a dog", "test")]


def test_two_columns_with_the_name_of_the_prompts_are_refused(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    columns = [pyarrow.array(["a"]), pyarrow.array(["b"]), pyarrow.array(["c"])]
    parquet.write_table(pyarrow.table(columns, names=["prompt", "prompt", "tag"]), tmp_path / "p.parquet")
    (tmp_path / "p.csv").write_text("tag,prompt,tag\na,b,c\n")
    assert refusal(tmp_path / "p.parquet") == "p.parquet: 2 columns 'prompt'; rename all but one"
    assert refusal(tmp_path / "p.csv", tag="tag") == "p.csv:1: 2 columns 'tag'; rename all but one"
    assert [prompt.text for prompt in open_source(str(tmp_path / "p.csv")).read()] == ["b"]


def test_pickapic_captions_are_read_without_the_pictures_next_to_them(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = {"caption": ["a cat", "a dog", "a bus"], "jpg_0": [b"x" * 9] * 3, "has_label": [True] * 3, "set": [0, 1, 0]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "pickapic.parquet", row_group_size=2)
    assert pairs(tmp_path / "pickapic.parquet", column="caption", tag="set") == [
        ("a cat", "0"),
        ("a dog", "1"),
        ("a bus", "0"),
    ]
    (prompt,) = open_source(str(tmp_path / "pickapic.parquet"), column="caption", tag="set").read(2)
    assert (prompt.text, prompt.metadata) == ("a bus", {"tag": "0"})


def test_every_style_of_hpdv2_is_a_tag_and_count_takes_of_all_styles(hpdv2: Path) -> None:
    found = pairs(hpdv2, tag="file")
    assert found == [(text, style) for style, texts in STYLES.items() for text in texts]
    assert pairs(hpdv2 / "concept-art.json", tag="file") == [("a tower", "concept-art"), ("a ship", "concept-art")]
    few = read_evaluation_prompts(str(hpdv2), 4, tag="file")
    assert [prompt.metadata["tag"] for prompt in few] == list(STYLES)


def test_categories_of_a_hugging_face_data_set_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    features = datasets.Features(
        {"prompts": datasets.Value("string"), "category": datasets.ClassLabel(names=["Colors", "Text"])}
    )
    rows = datasets.Dataset.from_dict({"prompts": ["a", "b"], "category": [1, 0]}, features)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **_: rows.to_iterable_dataset())
    assert pairs("someone/drawbench", column="prompts", split="test", tag="category") == [
        ("a", "Text"),
        ("b", "Colors"),
    ]
    assert refusal("someone/drawbench", column="prompts", tag="file").startswith(
        "drawbench: tag: file needs prompt files; "
    )


def test_tag_is_added_to_the_metadata_of_objects(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "style": "x", "n": 3}\n')
    (prompt,) = open_source(str(tmp_path / "p.jsonl"), tag="n").read()
    assert prompt.metadata == {"prompt": "a", "style": "x", "n": 3, "tag": "3"}


@pytest.mark.parametrize(
    ("name", "content", "options", "expected"),
    [
        ("p.tsv", PARTI, {}, "p.tsv:1: no column 'prompt'; it has 'Prompt', 'Category', 'Challenge', 'Note'; "),
        ("p.tsv", PARTI, {"column": "Prompt", "tag": "Kind"}, "p.tsv:1: no column 'Kind'; it has 'Prompt', "),
        ("p.tsv", PARTI, {"column": "Prompt", "tag": "Note"}, "p.tsv:2: the tag is ''; each row needs a name"),
        ("p.txt", "a\n", {"tag": "style"}, "p.txt: a text file has no column 'style'; use tag: file"),
        ("p.json", '["a"]', {"tag": "style"}, "p.json:1: a string, which has no 'style'; use tag: file"),
        ("p.json", '[{"prompt": "a"}]', {"tag": "style"}, "p.json:1: no column 'style'; it has 'prompt'; set tag "),
        ("p.jsonl", '{"prompt": "a", "tag": [1]}', {"tag": "tag"}, "p.jsonl:1: the tag is [1]; "),
        ("p.jsonl", '{"prompt": "a", "tag": true}', {"tag": "tag"}, "p.jsonl:1: the tag is True; "),
    ],
)  # fmt: skip
def test_missing_column_or_tag_is_one_line(
    tmp_path: Path, name: str, content: str, options: dict[str, str], expected: str
) -> None:
    (tmp_path / name).write_text(content)
    assert refusal(tmp_path / name, **options).startswith(expected)


@pytest.mark.parametrize("options", [{"column": "text"}, {"split": "test"}, {"tag": "file"}])
@pytest.mark.parametrize("source", ["shapes", "geneval"])
def test_settings_of_files_are_refused_where_they_have_no_effect(source: str, options: dict[str, str]) -> None:
    (name,) = options
    with pytest.raises(UserError, match=f"^{source}: {name} is only for files and data sets; leave it out$"):
        read_evaluation_prompts(source, 6, **options)


def test_shapes_and_geneval_keep_their_own_tags() -> None:
    with pytest.raises(UserError, match=r"^geneval: its prompts have tags; leave tag out$"):
        open_source("geneval", split="test", tag="file")


def test_training_reads_partiprompts(parti: Path) -> None:
    data = PromptDataModule(str(parti), batch_size=4, group_size=1, column="Prompt", shuffle_buffer=0)
    assert next(iter(data.train_dataloader())).prompts[0].text == "a teapot"


def test_evaluation_reports_each_category(parti: Path, tiny_pipeline: Path, tmp_path: Path) -> None:
    options = {"prompts": str(parti), "column": "Prompt", "tag": "Challenge", "columns": 0, "score_teacher": False}
    tests = GenerationEvaluation([RewardScore(tiny.Brightness())], **options)
    trainer = tiny.train(tiny.module(tiny_pipeline), 1, callbacks=[tests], default_root_dir=tmp_path)
    found = {name for name in trainer.logged_metrics if name.startswith("eval/brightness/")}
    assert found == {f"eval/brightness/{task}" for task in ("overall", "Basic", "Writing & Symbols")}
    other = GenerationEvaluation([RewardScore(tiny.Brightness())], **{**options, "tag": "Category"})
    assert other.state_key != tests.state_key


def test_evaluate_draws_a_prompt_set_and_reports_its_tags(
    parti: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pipelines, "_load", lambda drawing, device: None)
    monkeypatch.setattr(pipelines, "_draw", lambda *_: Image.new("RGB", (4, 4)))
    reward = {"class_path": "RewardScore", "init_args": {"reward": {"class_path": "tiny.Brightness"}}}
    Path("scores.yaml").write_text(yaml.safe_dump({"scores": [reward], "column": "Prompt", "tag": "Challenge"}))
    main(["evaluate", "--pipeline=x=nowhere", f"--prompts={parti}", "--config=scores.yaml", "--out=out"])
    (row,) = json.loads(Path("out/scores.json").read_text())
    assert set(row["scores"]) == {f"brightness/{task}" for task in ("overall", "Basic", "Writing & Symbols")}
    assert row["prompts"] == 4


def test_evaluate_of_pictures_refuses_columns_of_prompts(complaint) -> None:
    for option in ("--column=x", "--split=x", "--tag=x"):
        assert complaint("evaluate", "--pictures=a=x", option).startswith(
            f"{option.partition('=')[0]}: only with --pipeline"
        )
