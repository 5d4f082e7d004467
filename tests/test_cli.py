"""The command `safe-lr`: what it writes, and what it says where something is to be mended."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_loggers import play

from safe_lr.__main__ import main
from safe_lr.loggers import JsonlLogger


@pytest.fixture
def record(tmp_path: Path) -> Path:
    path = tmp_path / "decisions.jsonl"
    play([JsonlLogger(path)], 120)
    return path


def test_report_writes_the_page_and_says_where(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = record.parent / "pages" / "report.html"
    assert main(["report", str(record), "-o", str(out)]) == 0
    assert out.read_text().startswith("<!doctype html>")
    assert capsys.readouterr() == (f"The report is in {out}\n", "")


def test_the_page_goes_beside_the_record_by_default(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(record)]) == 0
    assert record.with_suffix(".html").is_file()
    assert str(record.with_suffix(".html")) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("", "holds nothing, not a safe_lr record"),
        ("step,lr\n0,0.1\n", "holds 2 lines of something else, not a safe_lr record"),
    ],
)
def test_a_bad_file_is_one_line_and_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, message: str
) -> None:
    path = tmp_path / "foreign.csv"
    if content is not None:
        path.write_text(content)
    assert main(["report", str(path), "-o", str(tmp_path / "out.html")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("safe-lr: error: ")
    assert message in err
    assert str(path) in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out.html").exists()


def test_a_page_that_cannot_be_written(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(record), "-o", str(record.parent)]) == 2
    assert "Is a directory" in capsys.readouterr().err
    assert main(["report", str(record), "-o", str(record)]) == 2
    assert "would replace its own source" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["repot"], ["report"]])
def test_wrong_usage_is_status_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: safe-lr" in capsys.readouterr().err


def test_help_has_an_example_that_works(record: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["report", "--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out.splitlines()
    example, _ = [line for line in printed if line.startswith("example: safe-lr ")]
    arguments = example.removeprefix("example: safe-lr ").split()
    assert main([str(record.parent / word) if "." in word else word for word in arguments]) == 0
    assert (record.parent / "report.html").is_file()


def test_the_module_is_the_command(record: Path) -> None:
    command = [sys.executable, "-m", "safe_lr", "report", str(record)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"The report is in {record.with_suffix('.html')}\n"
