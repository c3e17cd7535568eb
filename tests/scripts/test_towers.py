import runpy
import sys

import pytest

from support.scripts import ROOT


@pytest.mark.slow
def test_models_by_name_are_masked_and_their_contract_is_checked_or_told_what_is_missing(
    monkeypatch, capsys
):
    names = [
        "EVA02-B-16",
        "PE-Core-T-16-384",
        "ViTamin-S",
        "RN50",
        "convnext_base",
        "MobileCLIP2-S0",
    ]
    monkeypatch.setattr(sys, "argv", ["towers.py", *names])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "towers.py"), run_name="__main__")
    assert ended.value.code == 0
    table, progress = capsys.readouterr()
    outcomes = dict(line.split(": ", 1) for line in progress.splitlines())
    assert [name for name in names if outcomes[name] == "masked"] == names[:3]
    assert [name for name in names if outcomes[name] == "regularized"] == names[3:5]
    assert "timm's FastVit" in outcomes["MobileCLIP2-S0"]
    assert "| timm `Eva` | 2 | masked | EVA02-B-16, PE-Core-T-16-384 |" in table
    assert "5 of 6 masked or regularized" in table
