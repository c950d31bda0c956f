"""The command that exports."""

from gdmd_lightning.cli import main


def test_export_command_prints_lines_that_load_the_pipeline(recorded_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["export", str(recorded_run / "checkpoints" / "last.ckpt"), "pipeline"])
    printed = capsys.readouterr().out
    assert "text_encoder_3=None, tokenizer_3=None" in printed
    exec(printed, {})
    assert (tmp_path / "picture.png").is_file()
    assert printed.split("\n", 1)[1].strip() in (tmp_path / "pipeline" / "README.md").read_text()
