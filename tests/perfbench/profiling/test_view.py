"""`perfbench view`: what is served, to whom, and what a real browser makes of it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest

from perfbench.cli import main
from perfbench.errors import TraceError
from perfbench.profiling import view

EVIL = "<script>alert('x')</script>"
EVENTS = {"traceEvents": [
    {"ph": "X", "cat": "user_annotation", "name": EVIL, "ts": 1, "dur": 20, "pid": 1, "tid": 1},
    {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 2, "dur": 5, "pid": 1, "tid": 1},
]}  # fmt: skip


@contextmanager
def serving(folder: Path) -> Iterator[view.Server]:
    with view.Server(view.pages(folder), 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def get(server: view.Server, path: str, **headers: str) -> tuple[HTTPResponse, str]:
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request("GET", path, headers=headers)
    response = connection.getresponse()
    body = response.read().decode(errors="replace")
    connection.close()
    return response, body


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """A folder with one trace, made elsewhere, that has a hostile name."""
    (tmp_path / "a&b.pt.trace.json").write_text(json.dumps(EVENTS))
    return tmp_path


def test_a_profile_is_served_whole(profiled: tuple[Path, str]) -> None:
    folder, _ = profiled
    with serving(folder) as server:
        _, page = get(server, "/")
        for expected in ("A decode step takes", "<table>", "lora ms", "Where the time goes", "/memory/1.svg"):
            assert expected in page
        for address in re.findall(r'(?:src|href)="([^"]+)"', page):
            response, body = get(server, address.split("#")[0])
            assert response.status == 200, address
            assert body
        assert page.index("lora-eager</a>") < page.index("none-eager</a>"), "the case is shown first"
        content = json.loads(get(server, "/timeline/0.json")[1])
        assert content["name"] == "lora-eager"
        assert {"name": "lora / prefill"} in content["shared"]["frames"]


def test_traces_of_others_are_shown_and_their_names_escaped(traces: Path) -> None:
    with serving(traces) as server:
        _, page = get(server, "/")
        assert "a&amp;b" in page
        assert "<table>" not in page
        response, content = get(server, "/timeline/0.json")
        assert response.getheader("Content-Type") == "application/json"
        assert response.getheader("X-Content-Type-Options") == "nosniff"
        assert EVIL in [frame["name"] for frame in json.loads(content)["shared"]["frames"]]
    hostile = traces / "profile.json"
    hostile.write_text(json.dumps({"schema_version": 1, "case": EVIL, "decode_steps": 1, "arms": {EVIL: {
        "check": {"status": "check_failed", "reason": EVIL}, "breakdown": {}, "unprofiled_decode_step_ms": 1,
        "decode_step_spread": 0, "replays": False, "peak_bytes": 1, "trace": EVIL, "memory_picture": "../../etc/passwd",
    }}}))  # fmt: skip
    with serving(traces) as server:
        _, page = get(server, "/")
        assert EVIL not in page
        assert "&lt;script&gt;" in page
        assert get(server, "/memory/0.svg")[0].status == 404


def test_only_this_machine_is_answered_and_only_what_is_listed(traces: Path) -> None:
    with serving(traces) as server:
        assert server.server_address[0] == "127.0.0.1"
        assert get(server, "/", Host="evil.example")[0].status == 403
        assert get(server, "/", Host=f"localhost:{server.server_port}")[0].status == 200
        for path in ("/../../etc/passwd", "/speedscope/../view.py", "/speedscope/", "/profile.json", "//etc/passwd"):
            assert get(server, path)[0].status == 404
        policy = get(server, "/")[0].getheader("Content-Security-Policy") or ""
        assert "default-src 'none'" in policy
        assert "http" not in policy
        assert "*" not in policy


def test_a_port_in_use_is_refused(traces: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(traces) as server:
        assert main(["view", str(traces), "--no-browser", "--port", str(server.server_port)]) == 2
    said = capsys.readouterr().err
    assert f"--port {server.server_port}: is in use; leave --port out" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("port", ["70000", "-1", "http"])
def test_what_is_no_port_is_refused(port: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["view", str(tmp_path), f"--port={port}"])
    assert leave.value.code == 2
    assert "expected a port" in capsys.readouterr().err


@pytest.mark.parametrize(
    "profile", ["", "[]", "null", '{"schema_version": 2}', '{"schema_version": 1, "arms": {"x": {}}}', '{"arms": 3}']
)
def test_a_torn_profile_is_refused(traces: Path, profile: str) -> None:
    (traces / "profile.json").write_text(profile)
    with pytest.raises(TraceError, match=r"profile\.json: .*profile again"):
        view.pages(traces)


def test_a_trace_of_something_else_is_refused(tmp_path: Path) -> None:
    events = [{"ph": "X", "cat": "Trace", "name": "x", "ts": 1, "dur": 1}]
    (tmp_path / "x.trace.json").write_text(json.dumps({"traceEvents": events}))
    with pytest.raises(TraceError, match="no operator, annotation or kernel"):
        view.pages(tmp_path)


def test_tensorboard_where_it_is_not_says_what_is_missing(
    profiled: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = {"tensorboard": "2.21.0", "torch-tb-profiler": "0.4.3", "pandas": "0.9"}
    plugin = ["pandas>=1.0.0", "tensorboard!=2.1.0,>=1.15", "boto3; extra == 's3'"]
    needs = {"torch-tb-profiler": plugin, "tensorboard": []}

    def version(name: str) -> str:
        if name not in versions:
            raise view.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    def requires(name: str) -> list[str]:
        version(name)
        return needs[name]

    monkeypatch.setattr(view.importlib.metadata, "version", version)
    monkeypatch.setattr(view.importlib.metadata, "requires", requires)
    with pytest.raises(TraceError, match=r"torch-tb-profiler needs pandas>=1.0.0, 0.9 is installed; pip install"):
        view.tensorboard(profiled[0], 0)
    del versions["pandas"]
    with pytest.raises(TraceError, match=r"needs pandas>=1.0.0, which is not installed"):
        view.tensorboard(profiled[0], 0)
    versions["pandas"] = "3.1"
    assert view._missing("torch-tb-profiler") == []
    del versions["tensorboard"]
    with pytest.raises(TraceError, match="tensorboard is not installed"):
        view.tensorboard(profiled[0], 0)


def test_the_vendored_viewer_is_whole_and_has_its_licences() -> None:
    folder = view.VIEWER / "speedscope"
    index = (folder / "index.html").read_text()
    for name in re.findall(r'(?:src|href)="([^"]+)"', index):
        assert (folder / name).is_file(), name
    assert "MIT License" in (folder / "LICENSE").read_text()
    assert "Open Font License" in (folder / "source-code-pro.LICENSE.md").read_text()
    assert sum(path.stat().st_size for path in folder.iterdir()) < 700_000


# What a page says when it fails: errors of scripts, and of what it could not load.
FAILURE = re.compile(r"Uncaught|Refused|violates|Failed to load|ERR_|TypeError|alert", re.IGNORECASE)


def browse(url: str, folder: Path) -> tuple[str, list[str], set[str]]:
    """(the page as the browser has made it, its failures, the hosts it asked for) from a headless chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs a browser: no chromium on PATH")
    log = folder / "net.json"
    done = subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-default-apps",
         f"--user-data-dir={folder / 'browser'}", f"--log-net-log={log}", "--enable-logging=stderr",
         "--virtual-time-budget=20000", "--timeout=40000", "--dump-dom", url],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    asked = set()
    for event in json.loads(log.read_text(errors="replace"))["events"]:
        about = event.get("params", {})
        # The browser has requests of its own (updates, accounts), which no page initiated.
        if "url" in about and about.get("initiator", "").startswith("http://127.0.0.1"):
            asked.add("/".join(about["url"].split("/")[:3]))
    return done.stdout, [line for line in console if FAILURE.search(line)], asked


def test_in_a_real_browser_the_trace_is_on_the_page_and_nothing_comes_from_a_network(
    profiled: tuple[Path, str], tmp_path: Path
) -> None:
    with serving(profiled[0]) as server:
        page, failures, asked = browse(server.url, tmp_path)
        assert failures == []
        assert asked == {server.url.rstrip("/")}
        assert "Where the time goes" in page
        (address,) = re.findall(r'<iframe name="timeline" src="([^"]+)"', page)
        viewer, failures, asked = browse(server.url.rstrip("/") + address.replace("&amp;", "&"), tmp_path)
    assert failures == []
    assert asked == {server.url.rstrip("/")}
    # speedscope writes the name of the chart into its head once it has read it.
    assert "lora-eager, host thread" in viewer
    assert viewer.count("<canvas") >= 2


def test_the_browser_check_fails_for_a_page_that_loads_from_elsewhere(
    traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, addresses = view.render, []

    def planted(*arguments: Any) -> str:
        return real(*arguments).replace("</body>", f'<img src="{addresses[0]}a.png"></body>')

    with serving(traces) as elsewhere:
        addresses.append(elsewhere.url)
        monkeypatch.setattr(view, "render", planted)
        with serving(traces) as server:
            _, failures, asked = browse(server.url, tmp_path)
        assert failures, "the policy stops it, and the browser says so"
        assert elsewhere.url.rstrip("/") not in asked
        monkeypatch.setattr(view, "POLICY", view.POLICY.replace("img-src 'self'", "img-src *"))
        with serving(traces) as server:
            assert elsewhere.url.rstrip("/") in browse(server.url, tmp_path)[2]


def test_a_bad_trace_does_not_hide_the_good_ones(traces: Path) -> None:
    good = (traces / "a&b.pt.trace.json").read_bytes()
    (traces / "Z<b>.trace.json").write_bytes(good[:-20])
    with serving(traces) as server:
        _, page = get(server, "/")
        assert "a&amp;b" in page
        assert "Not shown: " in page
        assert "Z&lt;b&gt;.trace.json: not a whole JSON file" in page
        for address in re.findall(r'(?:src|href)="([^"]+)"', page):
            assert get(server, address.split("#")[0])[0].status == 200, address
    (traces / "a&b.pt.trace.json").unlink()
    with pytest.raises(TraceError, match="not a whole JSON file"):
        view.pages(traces)


@pytest.mark.parametrize("wrong", [None, "x", -1, True, [], {}, 1e300, {"a": {}}], ids=repr)
def test_anything_in_the_place_of_anything_in_a_profile_is_one_line(
    profiled: tuple[Path, str], tmp_path: Path, wrong: Any
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(profiled[0], folder)
    file = folder / "profile.json"
    profile = json.loads(file.read_text())
    arm = next(iter(profile["arms"]))
    phase = next(iter(profile["arms"][arm]["breakdown"]))
    places: list[list[str]] = [[key] for key in profile]
    places += [["arms", arm], *(["arms", arm, key] for key in profile["arms"][arm])]
    places += [["arms", arm, "check", "status"], ["arms", arm, "breakdown", phase]]
    total = profile["arms"][arm]["breakdown"][phase]["total"]
    places += [["arms", arm, "breakdown", phase, "total", key] for key in total]
    refused = []
    for place in places:
        changed = json.loads(file.read_text())
        inside = changed
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = wrong
        try:
            view._profile(_with(folder, json.dumps(changed)))
        except TraceError as error:
            refused.append(str(error))
    assert len(refused) >= 8
    assert all(line.isprintable() and line.endswith("profile again") for line in refused)


def _with(folder: Path, content: str) -> Path:
    beside = folder / "beside"
    beside.mkdir(exist_ok=True)
    (beside / "profile.json").write_text(content)
    return beside


@pytest.mark.parametrize("event", [{"ts": float("nan")}, {"dur": float("inf")}, {"dur": -1}, {"name": 3}, {"ts": "1"}])
def test_a_trace_with_impossible_times_is_one_line(tmp_path: Path, event: dict[str, Any]) -> None:
    planted = {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 2, "dur": 5, "pid": 1, "tid": 1} | event
    (tmp_path / "a.pt.trace.json").write_text(json.dumps({"traceEvents": [*EVENTS["traceEvents"], planted]}))
    with pytest.raises(TraceError, match="an event without a name or a time"):
        view.pages(tmp_path)
