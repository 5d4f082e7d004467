"""Records that were cut, shuffled and scribbled on: a page and a status come of what is whole, never a traceback."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from test_loggers import play

from safe_lr.commands.watch import Status
from safe_lr.comparison import write_comparison
from safe_lr.loggers import JsonlLogger, read_jsonl
from safe_lr.report import write_report

ODD = [None, True, "x", -1, 0, 1e400, float("nan"), 10**400, [], {}, "\ud800", 1.5, -1e300, 1e-320]
SCRIPT = "<script>alert(1)</script>"
LINES = [
    *(b"\x00", b"null", b"3", b'"x"', b"[]", b"{}", b"\xff\xfe", b'{"kind":["step"]}', b'{"kind":{}}'),
    *(b'{"kind":"step","step":1e999,"lr":1}', b'{"kind":"step","step":5.5,"lr":"x"}', b'{"kind":"step","step":true}'),
    *(b'{"kind":"summary","summary":[]}', b'{"kind":"summary","summary":{"measurements":null,"failures":3}}'),
    b'{"kind":"run","config":[1]}',
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("record") / "run.jsonl"
    play([JsonlLogger(path)], 150)
    return path


def spoilt(lines: list[bytes], r: random.Random) -> list[bytes]:
    """A few changes: a value, a key, a cut, a foreign line, a line twice, a line less; now and then another order."""
    lines = list(lines)
    if r.random() < 0.3:
        r.shuffle(lines)
    lines = lines[: r.randint(1, len(lines))]
    for _ in range(r.randint(1, 12)):
        k = r.randrange(len(lines))
        change = r.choice(["value", "value", "value", "key", "cut", "foreign", "twice", "less"])
        if change in ("value", "key"):
            lines[k] = _scribbled(lines[k], r, change)
        elif change == "cut":
            lines[k] = lines[k][: r.randrange(len(lines[k]) + 1)]
        elif change == "less":
            lines = [*lines[:k], *lines[k + 1 :]] or lines
        else:
            lines.insert(k, lines[k] if change == "twice" else r.choice(LINES))
    return lines


def _scribbled(line: bytes, r: random.Random, change: str) -> bytes:
    try:
        record = json.loads(line)
    except ValueError:
        return line
    if not isinstance(record, dict) or not record:
        return line
    part: dict[str, Any] = r.choice(
        [record, *(inner for inner in record.values() if isinstance(inner, dict) and inner)]
    )
    key = r.choice(list(part))
    if change == "key":
        del part[key]
    else:
        part[key] = r.choice([*ODD, SCRIPT])
    return json.dumps(record).encode()


@pytest.mark.parametrize("seed", range(4))
def test_what_is_whole_is_shown_and_nothing_breaks(seed: int, whole: Path, tmp_path: Path) -> None:
    r, path, pages = random.Random(seed), tmp_path / "spoilt.jsonl", 0
    lines = whole.read_bytes().splitlines()
    for _ in range(40):
        found = spoilt(lines, r)
        path.write_bytes(b"\n".join(found))
        status = Status()
        for line in found:
            status.take(line)
        assert str(status) and json.dumps(status.to_dict())
        try:
            page = write_report(path, tmp_path / "spoilt.html").read_text(encoding="utf-8")
        except ValueError as error:
            if "not a safe_lr record" in str(error):
                continue
            raise
        pages += 1
        assert SCRIPT not in page
        assert SCRIPT not in write_comparison([path, whole], tmp_path / "both.html").read_text(encoding="utf-8")
    assert pages > 20


def test_lines_that_several_programs_wrote_come_in_the_order_of_steps(whole: Path, tmp_path: Path) -> None:
    lines = whole.read_bytes().splitlines()
    head = [line for line in lines if b'"kind":"run"' in line]
    rest = [line for line in lines if line not in head]
    path = tmp_path / "shuffled.jsonl"
    random.Random(0).shuffle(rest)
    path.write_bytes(b"\n".join([*head, *rest]))
    found, ordered = read_jsonl(path), read_jsonl(whole)
    assert [row["step"] for row in found.rows] == [row["step"] for row in ordered.rows]
    assert [decision.step for decision in found.decisions] == [decision.step for decision in ordered.decisions]
