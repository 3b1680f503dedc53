"""`perfbench view`: a profile in the browser, served on the loopback only; nothing on the page comes from a network.

Free of torch.
"""

from __future__ import annotations

import errno
import importlib.metadata
import json
import subprocess
import sys
import webbrowser
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from perfbench.errors import TraceError
from perfbench.files import strict_json
from perfbench.profiling import profile_table, speedscope, trace
from perfbench.profiling.profile_schema import problem_of_profile
from perfbench.profiling.view_page import Timeline, render

HOST = "127.0.0.1"
VIEWER = Path(__file__).parent / "viewer"
# Suffix -> content type of the viewer's files.
SPEEDSCOPE = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".woff2": "font/woff2",
    ".png": "image/png",
    ".ico": "image/x-icon",
}
# The browser itself refuses whatever a page would load from elsewhere. speedscope makes its styles as it runs, and
# brings C++ names into readable form with a WebAssembly module that it holds inside.
POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self'; connect-src 'self'; frame-src 'self'; base-uri 'none'; "
    "form-action 'none'"
)


@dataclass(frozen=True)
class Page:
    """One address: its content and what it is."""

    content_type: str
    body: bytes


def pages(folder: Path) -> dict[str, Page]:
    """Path -> page of everything that is served for `folder`; traces that can't be shown are named on the first one.
    TraceError where there is none to show."""
    found: dict[str, Page] = {}
    profile = _profile(folder)
    timelines: list[Timeline] = []
    faults: list[TraceError] = []
    for number, file in enumerate(_in_order(trace.find(folder), profile)):
        name = file.name.split(".trace.json")[0].removesuffix(".pt") or file.name
        try:
            content = _chart(file, name)
        except TraceError as error:
            faults.append(error)
            continue
        found[f"/timeline/{number}.json"] = Page("application/json", json.dumps(content).encode())
        found[f"/trace/{number}"] = Page("application/octet-stream", file.read_bytes())
        address = f"/speedscope/index.html#profileURL={quote(f'/timeline/{number}.json')}"
        timelines.append(Timeline(name, address, f"/trace/{number}", file.name))
    if not timelines:
        raise faults[0]
    for path in (VIEWER / "speedscope").iterdir():
        if path.suffix in SPEEDSCOPE:
            found[f"/speedscope/{path.name}"] = Page(SPEEDSCOPE[path.suffix], path.read_bytes())
    found["/page.css"] = Page(SPEEDSCOPE[".css"], (VIEWER / "page.css").read_bytes())
    pictures = {}
    for number, (label, arm) in enumerate((profile or {"arms": {}})["arms"].items()):
        picture = folder / Path(arm["memory_picture"]).name
        if picture.is_file():
            # As an image a picture can run no script, whatever it holds.
            found[f"/memory/{number}.svg"] = Page("image/svg+xml", picture.read_bytes())
            pictures[label] = f"/memory/{number}.svg"
    html = render(folder.resolve().name, timelines, profile, pictures, list(map(str, faults)))
    return {"/": Page(SPEEDSCOPE[".html"], html.encode()), **found}


def _chart(file: Path, name: str) -> dict[str, Any]:
    """A trace as speedscope reads it. TraceError."""
    content = speedscope.convert(trace.read(file).events, name)
    if not content["profiles"]:
        raise TraceError(f"{file}: no operator, annotation or kernel in it; was it made by torch's profiler?")
    return content


def _in_order(files: list[Path], profile: Mapping[str, Any] | None) -> list[Path]:
    """The trace of the profiled case first, which the page shows at once."""
    traces = [arm["trace"] for arm in profile["arms"].values()] if profile else []
    return sorted(files, key=lambda file: -traces.index(file.name) if file.name in traces else 1)


def _profile(folder: Path) -> dict[str, Any] | None:
    """What profile.json says; None where there is none, as for traces that torch's own handler wrote. TraceError."""
    file = folder / profile_table.PROFILE
    if not file.is_file():
        return None
    try:
        profile: dict[str, Any] = strict_json.parse(file.read_bytes())
        version = profile["schema_version"]
        if version != profile_table.SCHEMA_VERSION:
            expected = profile_table.SCHEMA_VERSION
            raise TraceError(f"{file}: expected schema_version {expected}, got {version!r}; profile again")
        if problem := problem_of_profile(profile):
            raise TraceError(f"{file}: {problem}; profile again")
        profile_table.tables(profile), profile_table.answer(profile)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError) as error:
        raise TraceError(f"{file}: not a whole profile ({type(error).__name__}: {error}); profile again") from None
    return profile


class Server(ThreadingHTTPServer):
    """Serves pages on the loopback; to others, and under another host's name, nothing."""

    daemon_threads = True

    def __init__(self, content: Mapping[str, Page], port: int):
        """`port` 0 is any that is free. TraceError where the port can't be had."""
        self.content = content
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            why = "is in use" if error.errno == errno.EADDRINUSE else f"can't be used ({error.strerror})"
            raise TraceError(f"--port {port}: {why}; leave --port out for one that is free") from None

    @property
    def url(self) -> str:
        """The address of the first page."""
        return f"http://{HOST}:{self.server_port}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of a page is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        """The page of that path, or 404; 403 to a request that names another host (DNS rebinding)."""
        host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        page = self.server.content.get(urlsplit(self.path).path)
        if host not in (HOST, "localhost"):
            self.send_error(403, "only for this machine")
        elif page is None:
            self.send_error(404)
        else:
            self.send_response(200)
            self.send_header("Content-Type", page.content_type)
            self.send_header("Content-Length", str(len(page.body)))
            self.send_header("Content-Security-Policy", POLICY)
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(page.body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged."""


def serve(folder: Path, port: int, *, browser: bool) -> int:
    """Serves `folder` until Ctrl-C and returns 0. TraceError for a folder or port that can't be used."""
    server = Server(pages(folder), port)
    with server:
        print(f"{folder}: {server.url} (this machine only; Ctrl-C ends it)", flush=True)
        if browser and not webbrowser.open(server.url):
            print("no browser was found: open that address yourself", file=sys.stderr)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


def tensorboard(folder: Path, port: int) -> int:
    """Runs TensorBoard on the folder's log until it ends; its exit code. TraceError where it is not installed."""
    log = folder / "tensorboard"
    if not log.is_dir():
        trace.find(folder)
        raise TraceError(f"{folder}: expected a TensorBoard log, {log}; `perfbench profile` makes one")
    missing = _missing("tensorboard") + _missing("torch-tb-profiler")
    if missing:
        raise TraceError(
            f"--tensorboard: {'; '.join(missing)}; pip install tensorboard torch-tb-profiler, or leave "
            f"--tensorboard out: perfbench's own page needs neither"
        )
    print("torch-tb-profiler is no longer developed, and its page loads a chart library from a public host: without "
          "a network it stays empty", file=sys.stderr)  # fmt: skip
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log), "--host", HOST, "--port", str(port)]
    return subprocess.run(command).returncode


def _missing(package: str) -> list[str]:
    """What keeps an installed `package` from running: itself, or requirements that are absent or of other versions."""
    from packaging.requirements import Requirement

    try:
        requirements = importlib.metadata.requires(package) or []
    except importlib.metadata.PackageNotFoundError:
        return [f"{package} is not installed"]
    problems = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            problems.append(f"{package} needs {requirement}, which is not installed")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            problems.append(f"{package} needs {requirement}, {version} is installed")
    return problems
