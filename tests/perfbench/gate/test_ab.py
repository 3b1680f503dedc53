"""`perfbench ab` from the refs to the exit code: on stand-in revisions that answer at once, and on the real code."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from perfbench.cli import main
from perfbench.errors import ComparisonError, PerfbenchError
from perfbench.gate import pairs as pairs_module
from perfbench.gate import revisions as revisions_module
from perfbench.gate.pairs import ARMS, ArmProcess, measure_pair, pair_slowdown
from perfbench.gate.revisions import Revision, repository_of, revisions
from perfbench.gate.same_code import imported_files, same_code
from tests.perfbench.gate.runs import ROOT

# Speaks the protocol of perfbench/ab_worker.py, and is as slow as its own revision's perfbench/speed.py says. Its
# checkout is laid out as perfbench was until version 0.1, with worker.py at the top.
WORKER = """
import hashlib, json, os, sys
from pathlib import Path
import perfbench.worker
from perfbench.speed import MS, OPERATIONS, STATUS, CRASH, CASES, ELSEWHERE

def emit(event, **fields):
    print(json.dumps({"event": event, **fields}), flush=True)

root = Path(__file__).resolve().parents[1]
job = json.loads(sys.stdin.readline())
if STATUS == "refused":
    emit("error", kind="bad_input", case=None, message=f"{root}/adapters: no such folder")
    sys.exit(1)
if job["prepare"]:
    for case in CASES:
        exact = {"aten_ops_per_decode_step": OPERATIONS}
        check = {"passed": STATUS == "ok"}
        emit("case", case=case, status=STATUS, reason=None, check=check, memory={}, adapters={}, exact=exact)
code = {}
for name, module in list(sys.modules.items()):
    if name.split(".")[0] == "perfbench" and getattr(module, "__file__", None):
        content = Path(module.__file__).read_bytes()
        blob = hashlib.sha1(b"blob %d\\0" % len(content) + content).hexdigest()
        code[os.path.relpath(module.__file__, root)] = blob
try:
    import gauge  # the package of test_packages_side_by_side, by which it is slower
    MS, versions = MS * gauge.FACTOR, {"gauge": gauge.VERSION}
except ImportError:
    versions = {}
emit("ready", cases=CASES, requests=2, device="cpu", code=code, root=ELSEWHERE or str(root), versions=versions)
for number, line in enumerate(sys.stdin):
    turn = json.loads(line)
    emit("phase", case=turn["case"], text="timing")
    if CRASH and number == 3:
        os.kill(os.getpid(), CRASH)
    ms = MS + 0.01 * (number % 7)
    sample = {"total_ms": 2 * ms, "ttft_ms": ms, "itl_ms": [ms], "decode_tokens_per_s": 2e3 / ms,
              "tokens_per_s": 2e3 / ms, "energy_mj": None, "void": None}
    emit("block", case=turn["case"], samples=[sample] * turn["repetitions"])
"""
SPEED = "MS, OPERATIONS, STATUS, CRASH, CASES, ELSEWHERE = {}\n"
SAME = '100.0, 7, "ok", False, ["c/none", "c/lora"], ""'
PYPROJECT = '[project]\nname = "perfbench"\nversion = "0"\ndependencies = []\n'


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(repository: Path, tag: str, **files: str) -> None:
    for name, text in files.items():
        (repository / "perfbench" / f"{name}.py").write_text(text)
    git(repository, "add", "-A")
    git(repository, "commit", "--quiet", "--allow-empty", "-m", tag)
    git(repository, "tag", tag)


def new_repository(folder: Path) -> Path:
    """It, with what every stand-in revision has, and no commit yet."""
    git(folder, "init", "--quiet", "--initial-branch=main")
    (folder / "perfbench").mkdir()
    (folder / "scenario.yaml").write_text("{}\n")
    (folder / "pyproject.toml").write_text(PYPROJECT)
    return folder


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-in revisions, one tag each."""
    folder = new_repository(tmp_path_factory.mktemp("repository"))
    commit(folder, "before-ab", __init__="", cli="", worker="", speed="")
    commit(folder, "base", ab_worker=WORKER, speed=SPEED.format(SAME))
    for tag, new in {
        "slower": SAME.replace("100.0", "110.0"),
        "far-faster": SAME.replace("100.0", "40.0"),
        "one-more": SAME.replace("7", "8"),
        "crashing": SAME.replace("False", "11"),
        "hanging": SAME.replace("False", "19"),  # SIGSTOP
        "failing": SAME.replace('"ok"', '"check_failed"'),
        "refusing": SAME.replace('"ok"', '"refused"'),
        "without-lora": SAME.replace(', "c/lora"', ""),
        "elsewhere": SAME.replace('""', '"/somewhere/else"'),
    }.items():
        commit(folder, tag, speed=SPEED.format(new))
    commit(folder, "not-starting", ab_worker="import no_such_module\n", speed=SPEED.format(SAME))
    commit(
        folder,
        "rewriting",
        ab_worker="import perfbench.speed\n"
        + WORKER.replace("content = Path(module.__file__).read_bytes()", 'content = b"another file"'),
    )
    commit(folder, "again", ab_worker=f"{WORKER}# Other code that does the same.\n")
    commit(folder, "elsewhere-only", cli="# Nothing that the worker imports.\n")
    (folder / "pyproject.toml").write_text("[project\n")
    commit(folder, "broken-toml")
    (folder / "pyproject.toml").write_text(PYPROJECT.replace("[]", '["no-such-thing @ file:///no/such/thing.whl"]'))
    commit(folder, "not-building")
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "constraints.txt").write_text("six==1.16.0\n")
    commit(folder, "constrained")
    git(folder, "checkout", "--quiet", "again")
    return folder


@pytest.fixture(autouse=True)
def in_the_repository(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)


def ab(candidate: str, out: Path, *more: str, baseline: str = "base") -> int:
    arguments = ["ab", "--baseline", baseline, f"--candidate={candidate}", "scenario.yaml", "--out", str(out)]
    return main([*arguments, "--pairs", "8", "--blocks", "2", *more])


@pytest.mark.parametrize(
    ("candidate", "code", "words"),
    [
        ("again", 0, "PASS: 2 exact figures hold; decode_tokens_per_s no worse"),
        ("slower", 1, "FAIL: 2 cases (*): decode_tokens_per_s: slower by +10.0%"),
        ("far-faster", 1, "FAIL: 2 cases (*): decode_tokens_per_s: implausible gain"),
        ("one-more", 1, "FAIL: c/none: aten_ops_per_decode_step: 7 -> 8"),
        ("crashing", 1, "crashed (the process ended with exit code -11; see worker.log) in the candidate"),
        ("failing", 1, "FAIL: c/none: check failed in the candidate"),
        ("without-lora", 1, "FAIL: c/lora: missing in the candidate"),
        ("refusing", 2, "): adapters: no such folder"),
        ("elsewhere", 2, "got code of /somewhere/else"),
        ("rewriting", 2, "is not that of the commit"),
        ("not-starting", 2, "No module named 'no_such_module'"),
        ("before-ab", 2, "older than `perfbench ab`"),
        ("broken-toml", 2, "broken-toml: can't be built: pyproject.toml"),
        ("not-building", 2, "not-building: can't be built: "),
        ("no-such-ref", 2, "no-such-ref: no such commit"),
        ("--upload-pack=x", 2, "no such commit"),
    ],
)
def test_what_becomes_of_a_candidate(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str], candidate: str, code: int, words: str
) -> None:
    assert ab(candidate, tmp_path / "out") == code
    said = capsys.readouterr()
    assert words in said.out.splitlines()[0], said
    assert "Traceback" not in said.err
    assert git(repository, "worktree", "list").count("\n") == 0, "the worktrees are removed"


def test_a_baseline_that_crashes_is_our_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ab("again", tmp_path / "out", baseline="crashing") == 4
    assert capsys.readouterr().out.startswith("HARNESS FAULT: the ")


def test_a_candidate_that_hangs_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pairs_module, "SILENT_S", 2.0)
    assert ab("hanging", tmp_path / "out") == 1
    assert "crashed (said nothing for 2 s; see worker.log) in the candidate" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_session_that_is_ended_leaves_nothing(repository: Path, tmp_path: Path, number: signal.Signals) -> None:
    """While an arm is silent, which is when a timer runs that waits for half an hour."""
    with _session(tmp_path) as session:
        session.send_signal(number)
        _, said = session.communicate(timeout=60)
    assert session.returncode == 130
    assert said.splitlines()[-1] == "perfbench: interrupted"
    assert git(repository, "worktree", "list").count("\n") == 0
    assert list((tmp_path / "temporary").iterdir()) == []


def test_what_a_killed_session_leaves_is_swept_by_the_next(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _session(tmp_path) as session:
        arms = psutil.Process(session.pid).children(recursive=True)
        session.kill()
        session.wait()
    for arm in arms:
        arm.kill()
    psutil.wait_procs(arms, timeout=20)
    assert git(repository, "worktree", "list").count("\n") == 2
    git(repository, "worktree", "add", "--quiet", "--detach", str(tmp_path / "mine"), "base")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    monkeypatch.setattr("tempfile.tempdir", None)
    with revisions(repository, {"baseline": "base"}, tmp_path / "cache"):
        assert git(repository, "worktree", "list").count("\n") == 2, "this session's, and the user's own"
    assert "mine" in git(repository, "worktree", "list")
    assert list((tmp_path / "temporary").iterdir()) == []
    git(repository, "worktree", "remove", str(tmp_path / "mine"))


@contextmanager
def _session(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`perfbench ab` of a candidate that hangs, once it does."""
    (tmp_path / "temporary").mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")}
    arguments = ["ab", "--baseline", "base", "--candidate=hanging", "scenario.yaml", "--out", str(tmp_path / "out")]
    command = [sys.executable, "-P", "-m", "perfbench", *arguments, "--pairs", "8", "--blocks", "2"]

    def undisturbed() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=undisturbed
    ) as session:
        try:
            while not any(_is_stopped(arm) for arm in psutil.Process(session.pid).children()):
                assert session.poll() is None
                time.sleep(0.02)
            yield session
        finally:
            session.kill()


def _is_stopped(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):  # git, which has ended meanwhile
        return process.status() == psutil.STATUS_STOPPED
    return False


def test_an_exact_failure_needs_no_pair(tmp_path: Path) -> None:
    assert ab("one-more", tmp_path / "out") == 1
    assert not (tmp_path / "out" / "pairs.jsonl").exists()


def test_every_pair_is_kept_and_every_format_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    writes = (f"--write=json={tmp_path / 'r.json'}", f"--write=pytest-benchmark={tmp_path / 'p'}")
    assert ab("slower", out, *writes) == 1
    pairs = [json.loads(line) for line in (out / "pairs.jsonl").read_text().splitlines()]
    assert [pair["batch"] for pair in pairs] == ["first"] * 8 + ["fresh"] * 8
    assert {len(pair["blocks"]) for pair in pairs} == {4}
    assert "clocks" not in pairs[0]["blocks"][0], "a CPU says nothing of its clock"
    assert pair_slowdown(pairs[0], "decode_tokens_per_s", ["c/lora"], "candidate") == pytest.approx(0.0953, abs=1e-3)
    report = json.loads((tmp_path / "r.json").read_text())
    assert any("fresh batch: 8 pairs" in note for note in report["notes"])
    shown = [one for one in report["findings"] if one["status"] == "shown" and one["figure"] == "ttft_ms"]
    assert [one["case"] for one in shown] == ["c/none", "c/lora"]
    assert all(one["change"] == pytest.approx(0.1, abs=0.01) for one in shown)
    assert len(json.loads((tmp_path / "p").read_text())["benchmarks"]) == 2


def test_only_the_cases_of_primary_figures_are_timed(tmp_path: Path) -> None:
    rules = tmp_path / "policy.yaml"
    rules.write_text("timed: {primary: [{figure: ttft_ms, cases: '*/lora'}]}")
    assert ab("slower", tmp_path / "out", "--policy", str(rules), "--record", "--pairs", "1") == 0
    (pair,) = map(json.loads, (tmp_path / "out" / "pairs.jsonl").read_text().splitlines())
    assert {block["case"] for block in pair["blocks"]} == {"c/lora"}
    rules.write_text("timed: {primary: [{figure: ttft_ms, cases: '*/no-such'}]}")
    assert ab("slower", tmp_path / "out2", "--policy", str(rules)) == 2


@pytest.mark.parametrize(("baseline", "candidate"), [("base", "base"), ("again", "elsewhere-only")])
def test_the_same_code_passes_at_once_and_what_was_compared_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], baseline: str, candidate: str
) -> None:
    writes = [f"--write={name}={tmp_path / name}" for name in ("json", "junit", "pytest-benchmark")]
    assert ab(candidate, tmp_path / "out", *writes, baseline=baseline) == 0
    said = capsys.readouterr()
    assert said.out.startswith("PASS: both sides are the same, so nothing was measured (--even-if-same ")
    told = " ".join(said.out.split())
    assert re.search(r"the 4 files .* can import \(\w{12}\), the packages .* \(\w{16}\), and scenario.yaml \(", told)
    assert list((tmp_path / "out").iterdir()) == [], "no process was started"
    assert json.loads((tmp_path / "json").read_text())["verdict"] == "pass"
    assert not (tmp_path / "pytest-benchmark").exists()


def test_other_packages_are_not_the_same(tmp_path: Path, repository: Path) -> None:
    """One code under other constraints; an environment without packages takes no network."""
    refs = {"baseline": "elsewhere-only", "candidate": "constrained"}
    with revisions(repository, refs, tmp_path / "environments") as arms:
        assert imported_files(arms["baseline"]) == imported_files(arms["candidate"])
        assert same_code(arms, repository / "scenario.yaml", []) is None
        twice = dict.fromkeys(arms, arms["baseline"])
        assert same_code(twice, repository / "scenario.yaml", []) != same_code(
            twice, repository / "scenario.yaml", ["x"]
        )


def test_the_same_code_is_measured_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ab("base", tmp_path / "out", "--even-if-same") == 0
    said = capsys.readouterr().out
    assert said.startswith("PASS: 2 exact figures hold; decode_tokens_per_s")
    assert "both revisions load the same code" in said
    assert ab("base", tmp_path / "recorded", "--record", "--even-if-same", "--pairs", "1") == 0
    assert ab("base", tmp_path / "refused", "--record", "--pairs", "1") == 2
    assert "add --even-if-same" in capsys.readouterr().out


def test_recorded_pairs_are_not_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ab("slower", tmp_path / "out", "--record", "--pairs", "2") == 0
    assert (tmp_path / "out" / "pairs.jsonl").read_text().count("\n") == 2
    assert "they were not judged" in capsys.readouterr().out


def test_changes_that_are_not_committed_are_told(
    tmp_path: Path, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "note.txt").write_text("x")
    try:
        assert ab("HEAD", tmp_path / "out", "--record", "--pairs", "1") == 0
    finally:
        (repository / "note.txt").unlink()
    assert "not committed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--pairs", "7"], "7 pairs: expected at least 8"),
        (["--policy", "none.yaml"], "none.yaml: no such file"),
    ],
)
def test_bad_options_are_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert ab("again", tmp_path / "out", *arguments) == 2
    assert words in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_tail_is_refused_before_anything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A block has some steps; a tail takes a hundred."""
    (tmp_path / "policy.yaml").write_text("timed: {primary: [{figure: itl_p95_ms}]}")
    assert ab("again", tmp_path / "out", "--policy", str(tmp_path / "policy.yaml")) == 2
    said = capsys.readouterr().out
    assert "itl_p95_ms: expected a figure of every repetition (did you mean 'itl_ms'" in said
    assert not (tmp_path / "out").exists()


def test_a_used_out_and_a_missing_scenario_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x").write_text("mine")
    assert ab("again", tmp_path) == 2
    assert "has files in it" in capsys.readouterr().out
    assert main(["ab", "--baseline", "base", "no.yaml", "--out", str(tmp_path / "out")]) == 2
    assert "no.yaml: no such file" in capsys.readouterr().out


def test_it_runs_in_a_checkout_only(tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match="not in a git checkout"):
        repository_of(tmp_path)
    git(tmp_path, "init", "--quiet")
    assert repository_of(tmp_path) == tmp_path.resolve()


def test_other_dependencies_get_an_environment_that_is_kept(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A revision that asks for other packages: an empty list of them builds without a network."""
    git(repository, "checkout", "--quiet", "not-building")
    try:
        cache = tmp_path / "environments"
        with revisions(repository, {"baseline": "again", "candidate": "base"}, cache) as found:
            pythons = {one.python for one in found.values()}
            (python,) = pythons
            assert python != Path(sys.executable)
            done = subprocess.run([python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True)
            assert done.stdout.startswith(str(cache))
        monkeypatch.setattr(revisions_module, "_build", lambda *_: pytest.fail("built again"))
        with revisions(repository, {"candidate": "base"}, cache) as found:
            assert found["candidate"].python == python
    finally:
        git(repository, "checkout", "--quiet", "again")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two versions of a package, of which the second makes the stand-in a tenth slower."""
    folder = tmp_path_factory.mktemp("wheels")
    write_wheel(folder, "gauge", "1.0", "FACTOR, VERSION = 1.0, '1.0'\n")
    write_wheel(folder, "gauge", "2.0", "FACTOR, VERSION = 1.1, '2.0'\n")
    write_wheel(folder, "needle", "1.0", "", "Requires-Dist: gauge==1.0\n")
    return folder


def write_wheel(folder: Path, name: str, version: str, code: str, more: str = "") -> None:
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        about = f"{name}-{version}.dist-info"
        wheel.writestr(f"{name}.py", code)
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{more}")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.mark.parametrize(("old", "new", "code"), [("1.0", "2.0", 1), ("2.0", "1.0", 0)])
def test_packages_side_by_side(
    tmp_path: Path, wheels: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, code: int
) -> None:
    """Of one commit: each side runs in an environment of its own, and the report says what differs."""
    for name, version in (("old", old), ("new", new)):
        lines = f"# offline\n--no-index\n--find-links {wheels}\ngauge=={version}  # the one that is meant\n"
        (tmp_path / f"{name}.txt").write_text(lines)
    assert ab(str(tmp_path / "new.txt"), tmp_path / "out", baseline=str(tmp_path / "old.txt")) == code
    said = capsys.readouterr()
    assert f"packages that differ: gauge {old} -> {new}" in said.out
    assert "slower by +10.0%" in said.out.splitlines()[0] or code == 0
    assert "making an environment with its packages, once" in said.err


def test_one_requirement_is_a_side(tmp_path: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside it HEAD as it is; a package that the constraints hold back is let go."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with revisions(Path.cwd(), {"baseline": "HEAD", "candidate": "gauge>=1.5"}, tmp_path / "environments") as arms:
        done = subprocess.run(
            [arms["candidate"].python, "-c", "import gauge; print(gauge.VERSION)"], capture_output=True
        )
        assert done.stdout == b"2.0\n"
        assert arms["candidate"].commit == arms["baseline"].commit
        assert arms["candidate"].label.startswith("gauge>=1.5 (")
        assert arms["baseline"].python == Path(sys.executable)


def test_packages_that_exclude_each_other_are_named(
    tmp_path: Path, wheels: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "both.txt"
    file.write_text(f"--no-index\n--find-links {wheels}\nneedle==1.0\ngauge==2.0\n")
    assert ab(str(file), tmp_path / "out") == 2
    said = capsys.readouterr().out.splitlines()[0]
    assert "needle 1.0 depends on gauge==1.0" in said
    assert "name also what holds the package back" in said


# A user's own benchmark, the one of the documentation: what it may leave out it leaves out.
OWN = (ROOT / "docs" / "examples" / "own_benchmark.py").read_text(encoding="utf-8")


@pytest.mark.parametrize(("ms", "code"), [(100.0, 0), (110.0, 1)])
def test_a_command_is_a_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ms: float, code: int
) -> None:
    """In a folder that is no checkout, with no code of perfbench's on either side."""
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "scenario.yaml").write_text("whatever the command reads\n")
    monkeypatch.chdir(tmp_path)
    sides = [f"command: {sys.executable} own.py {value}" for value in (ms, 100.0)]
    assert ab(sides[0], tmp_path / "out", "--write", f"json={tmp_path / 'report.json'}", baseline=sides[1]) == code
    said = capsys.readouterr().out
    assert ("slower by +10.0%" in said.splitlines()[0]) is bool(code)
    assert "load the same code" not in said, "of commands nothing is known"
    assert "own.py 100.0" in (tmp_path / "report.json").read_text()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('say(event="ready"', "print('hello'); say(event=\"ready\"", "expected a line of JSON, got 'hello'"),
        ('cases=["chat"], ', "", "ready: 'cases' is a required property"),
        ('"ttft_ms": ms, ', "", "block.samples.0: 'ttft_ms' is a required property"),
        ('"total_ms": 2 * ms', '"total_ms": "soon"', "block.samples.0.total_ms: 'soon' is not of type 'number'"),
        ('{"passed": True}', "None", "case.check: None is not of type 'object'"),
        ("import sys\n", "import sys\n\nsys.exit(7)\n", "can't be measured: the process ended with exit code 7"),
    ],
)
def test_a_command_that_speaks_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], old: str, new: str, words: str
) -> None:
    assert OWN.count(old) == 1
    (tmp_path / "own.py").write_text(OWN.replace(old, new))
    (tmp_path / "scenario.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    side = f"command: {sys.executable} own.py 100"
    assert ab(side, tmp_path / "out", baseline=side) == 2
    said = capsys.readouterr()
    assert words in said.out.splitlines()[0]
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("command: no-such-program-of-ours", "no such command"),
        ("command:", "no such command"),
        ("command: sh -c 'x", "a shell can't read it (No closing quotation)"),
        ("torch==2.twelve, x", "torch==2.twelve, x: expected a requirement such as torch==2.12.*, got"),
        ("no/such/requirements.txt", "no/such/requirements.txt: no such file"),
        ("nosuchthing-of-ours==1.0", "can't be built"),
        ("HEAD~1000", "HEAD~1000: no such commit"),
    ],
)
def test_a_side_that_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert ab(text, tmp_path / "out") == 2
    assert words in capsys.readouterr().out.splitlines()[0]
    assert not (tmp_path / "out").exists(), "nothing is left of it"


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, and `one-more` with one operation more in a step."""
    return planted(tmp_path_factory.mktemp("real"), "one-more", "tokens = tokens + 0")


def planted(folder: Path, tag: str, statement: str) -> Path:
    """The code under test as a repository of its own: `base`, and a commit `tag` whose decode step begins with it."""
    git(folder, "init", "--quiet", "--initial-branch=main")
    for name in ("methods", "kernels", "scenarios", "perfbench"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, folder / name)
    commit(folder, "base")
    decoder = folder / "perfbench" / "runtimes" / "static" / "decoder.py"
    head = re.compile(r'    def step\(self, tokens.*?\n        """.*?"""\n', re.DOTALL)
    source, places = head.subn(lambda found: f"{found[0]}        {statement}\n", decoder.read_text())
    assert places == 1
    decoder.write_text(source)
    commit(folder, tag)
    return folder


STATIC = "llama-tiny-fp32-cpu/static/p6-n3-b1-q2-t2-r2-distinct/lora-eager"
TINY = """\
backbone: llama-tiny
dtype: fp32
device: cpu
runtime: [transformers, static]
methods: [lora]
workload: {prompt_tokens: 6, new_tokens: 3, requests: 2, tenants: 2}
warmup: 1
"""


def test_an_operation_planted_in_the_decode_step_is_caught(
    real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real code: a process of each revision, checked and counted; the runtime with the operation fails alone."""
    monkeypatch.chdir(real)
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = ["ab", "--baseline", "base", "--candidate", "one-more", str(tmp_path / "tiny.yaml")]
    written = tmp_path / "report.json"
    assert main([*arguments, "--out", str(tmp_path / "out"), "--write", f"json={written}"]) == 1, capsys.readouterr()
    failed = [one for one in json.loads(written.read_text())["findings"] if one["status"] == "fail"]
    assert {(one["case"].split("/")[1], one["figure"]) for one in failed} == {("static", "aten_ops_per_decode_step")}
    assert {one["candidate"] - one["baseline"] for one in failed} == {1}
    assert len(failed) == 2


def test_a_real_pair_is_timed(real: Path, tmp_path: Path) -> None:
    """Three fresh processes of the real code, their code proved their own, each timed in every block."""
    (tmp_path / "tiny.yaml").write_text(TINY)
    job = {"scenario": str(tmp_path / "tiny.yaml"), "set": [], "case": "*/static/*", "threads": 1}
    with revisions(real, {"baseline": "base", "candidate": "one-more"}, tmp_path) as arms:
        assert same_code(arms, tmp_path / "tiny.yaml", []) is None
        assert same_code(dict.fromkeys(arms, arms["baseline"]), tmp_path / "tiny.yaml", [])
        with (
            (tmp_path / "log").open("wb") as log,
            ArmProcess("baseline", arms["baseline"], log) as process,
        ):
            loaded = process.begin({**job, "prepare": True, "only": None}).code
        assert loaded.items() <= (imported_files(arms["baseline"]) or {}).items(), "what is loaded was compared"
        pair = measure_pair(
            arms,
            {**job, "prepare": False, "only": [STATIC]},
            [STATIC],
            2,
            blocks=3,
            repetitions=2,
            seed="0",
            log=tmp_path / "log",
        )
    assert len(pair["blocks"]) == 3
    assert len({tuple(block["order"]) for block in pair["blocks"]}) == 3
    assert all(block[arm]["decode_tokens_per_s"] > 0 for block in pair["blocks"] for arm in ARMS)


def test_a_scenario_of_several_workloads_is_refused(tmp_path: Path) -> None:
    from perfbench.ab_worker import _plan

    (tmp_path / "tiny.yaml").write_text(TINY.replace("requests: 2", "requests: [2, 3]"))
    job = {"scenario": str(tmp_path / "tiny.yaml"), "set": [], "case": None, "threads": 1, "prepare": True}
    with pytest.raises(PerfbenchError, match="expected one backbone, dtype, quantisation and workload, got 2"):
        _plan(job)
    comparisons, settings = _plan(job | {"case": "*-q3-*"})
    assert [one.workload.requests for one in comparisons] == [3, 3]
    assert settings["prepared"] == {}


def test_what_the_front_of_perfbench_offers_to_users_is_not_what_a_worker_imports(tmp_path: Path) -> None:
    """The front and what it imports at once count, and not what those import inside functions."""
    git(tmp_path, "init", "--quiet")
    (tmp_path / "perfbench").mkdir()
    later = "def run():\n    from perfbench import {}\n"
    front = {"__init__": "from perfbench.api import run\n", "api": later.format("report"), "report": ""}
    worker = {"ab_worker": later.format("session"), "session": "NAME = 'perfbench.by_name'\n", "by_name": ""}
    commit(tmp_path, "one", **front, **worker)
    here = Revision("one", git(tmp_path, "rev-parse", "HEAD"), tmp_path, Path(sys.executable), "")
    names = {Path(path).stem for path in imported_files(here) or ()}
    assert names == {"__init__", "api", "ab_worker", "session", "by_name"}
    commit(tmp_path, "two", session="this is no Python\n")
    broken = Revision("two", git(tmp_path, "rev-parse", "HEAD"), tmp_path, Path(sys.executable), "")
    assert imported_files(broken) is None
