"""docs/settings.md says what the code says."""

from __future__ import annotations

import dataclasses

import settings_page

import train_gpt


def test_the_page_is_up_to_date():
    assert settings_page.PAGE.read_text(encoding="utf-8") == settings_page.page(), "run tools/settings_page.py"
    assert settings_page.main(["--check"]) == 0


def test_every_setting_has_a_row_with_its_meaning_under_a_heading():
    text = settings_page.page()
    for f in dataclasses.fields(train_gpt.Config):
        assert text.count(f"| `{f.name.upper()}` |") == 1 and f.metadata["meaning"] in text, f.name
    assert text.index("## Run") < text.index("| `RUN_ID` |") < text.index("## Budget")


def test_an_old_page_is_named_and_left_alone(tmp_path, monkeypatch, capsys):
    old = tmp_path / "settings.md"
    old.write_text("old")
    monkeypatch.setattr(settings_page, "PAGE", old)
    assert settings_page.main(["--check"]) == 1 and "out of date" in capsys.readouterr().err and old.read_text() == "old"
    assert settings_page.main([]) == 0 and settings_page.main(["--check"]) == 0
