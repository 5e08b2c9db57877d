#!/usr/bin/env python3
"""docs/settings.md, made from the settings that train_gpt.py declares: one declaration each, from which checks and --help follow too.

    settings_page.py            write the page
    settings_page.py --check    say whether it is up to date: exit code 1 if it is not
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from command_line import OneLineParser

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/settings.md"
sys.path.insert(0, str(ROOT))

HEAD = """# Settings

This page is made by `tools/settings_page.py` from `train_gpt.py`; `python train_gpt.py --help` prints the same.

Every setting is an environment variable. The names are those of pull request #640, whose README command (68 variables) runs
unchanged. A misspelt name, a name that other scripts have for a setting (`EVAL_STRIDE`, `LEARNING_RATE`), a value that does not
parse or lies outside its range, and a combination that makes no sense stop the run in one line that names the variable, the value
and what was expected; the exit code is then 2. Names that other programs may have set for themselves (`BATCH_SIZE`, `LR`) are
warned of. The log's line `settings` says which settings differ from the defaults, and whether they come from the environment, a
preset (a launch script names in PRESET_SETTINGS what it took from one), the tokenizer or the artifact. Switches are 0 or 1. A
setting of a switch that is off has no effect. VOCAB_SIZE, where nobody says it, is the tokenizer's.

*Model* marks what defines the model: an artifact holds these settings, and with `EVAL_ONLY=1` they come from there. A number
after a meaning, such as #126, names the pull request that a setting comes from; [systems.md](systems.md) says what those are.
Presets are plain files in `configs/`; by hand: `set -a; . configs/pr640.env; set +a`.

The run ends, and the schedules with it, when MAX_WALLCLOCK_SECONDS or ITERATIONS is reached first:
progress = max(elapsed / MAX_WALLCLOCK_SECONDS, step / ITERATIONS). Any number of processes that divides the sequences of a step
works (512 by default); another one is refused with the nearest valid ones.
"""
COLUMNS = "| setting | default | may be | meaning | model |\n|---|---|---|---|---|\n"


def page() -> str:
    """The text of docs/settings.md."""
    import train_gpt

    parts = [HEAD]
    for f in dataclasses.fields(train_gpt.Config):
        default, allowed, meaning = train_gpt.describe(f)
        if f.metadata["group"]:
            parts.append(f"\n## {f.metadata['group']}\n\n{COLUMNS}")
        default = f"`{default}`" if default else "(date and time)" if f.name == "run_id" else "(empty)"
        parts.append(f"| `{f.name.upper()}` | {default} | {allowed} | {meaning} | {'yes' if f.metadata['model'] else ''} |\n")
    return "".join(parts)


def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    args, text = parser.parse_args(arguments), page()
    if args.check:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == text:
            return 0
        print("docs/settings.md is out of date: run tools/settings_page.py", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
