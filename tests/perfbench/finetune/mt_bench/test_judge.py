"""MT-Bench: answers in FastChat's format, and the judge, asked through a real server on the loopback."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from perfbench.cli import main
from perfbench.errors import TaskError
from perfbench.finetune.mt_bench import judge, questions
from perfbench.finetune.mt_bench.questions import Question

Reply = tuple[int, dict[str, str], bytes] | None


def completion(text: str) -> bytes:
    return json.dumps({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]}).encode()


class Server:
    """An endpoint on 127.0.0.1: `reply` makes an answer of a request's number (from 0) and body; None says nothing."""

    def __init__(self) -> None:
        self.reply: Callable[[int, dict[str, Any]], Reply] = lambda number, body: (200, {}, completion("[[7]]"))
        self.requests: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.hang = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
                server.requests.append((self.path, dict(self.headers), body))
                answer = server.reply(len(server.requests) - 1, body)
                if answer is None:
                    server.hang.wait(10)
                    return
                status, headers, content = answer
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def endpoint(self, **changes: Any) -> judge.Endpoint:
        return judge.Endpoint(self.url, "the-judge", **{"timeout_s": 5.0, "tries": 3, "wait_s": 0.01, **changes})

    def close(self) -> None:
        self.hang.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Server()
    yield server
    server.close()


def write(path: Path, rows: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


PROMPTS = {
    "single-v1": "Q {question} A {answer}",
    "single-v1-multi-turn": "Q1 {question_1} A1 {answer_1} Q2 {question_2} A2 {answer_2}",
    "single-math-v1": "Q {question} R {ref_answer_1} A {answer}",
    "single-math-v1-multi-turn": "R2 {ref_answer_2} A1 {answer_1} A2 {answer_2}",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """FastChat's layout with two questions: one of writing, one of maths."""
    folder = tmp_path / "mt_bench"
    write(
        folder / "question.jsonl",
        [
            {"question_id": 1, "category": "writing", "turns": ["Write.", "Again."]},
            {"question_id": 2, "category": "math", "turns": ["1+1?", "2+2?"]},
        ],
    )
    write(
        folder / "reference_answer" / "gpt-4.jsonl",
        [{"question_id": 2, "model_id": "gpt-4", "choices": [{"index": 0, "turns": ["two", "four"]}]}],
    )
    write(
        folder / "judge_prompts.jsonl",
        [{"name": name, "system_prompt": f"system {name}", "prompt_template": text} for name, text in PROMPTS.items()],
    )
    return folder


@pytest.fixture
def answers(folder: Path, tmp_path: Path) -> Path:
    """Answers as `answer` writes them: `reply n` to the n-th prompt; the first has braces in it."""
    out = tmp_path / "model_answer" / "mine.jsonl"
    count = 0

    def generate(prompts: Sequence[str], where: Sequence[str]) -> list[str]:
        nonlocal count
        count += len(prompts)
        return [f" reply {count} {{answer}} to {len(prompt)}\n" for prompt in prompts]

    assert questions.answer(str(folder), out, "mine", generate, {"beams": 3}) == 2
    return out


def test_answers_are_in_fastchats_format(answers):
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [1, 2]
    assert list(lines[0]) == ["question_id", "answer_id", "model_id", "choices", "tstamp", "generate_params"]
    assert len({line["answer_id"] for line in lines}) == 2
    (choice,) = lines[0]["choices"]
    assert choice["index"] == 0
    assert [text.split(" {")[0] for text in choice["turns"]] == ["reply 2", "reply 4"]  # stripped
    assert not list(answers.parent.glob("*.part"))


@pytest.mark.parametrize("place", ["file/answers.jsonl", "folder"])
def test_a_place_that_cant_be_written_is_refused_before_anything_is_answered(folder, tmp_path, place):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()

    def generate(prompts, where):
        raise AssertionError("asked")

    with pytest.raises(TaskError, match="can't be written"):
        questions.answer(str(folder), tmp_path / place, "mine", generate, {})
    assert sorted(path.name for path in tmp_path.iterdir() if path != folder) == ["file", "folder"]


def interrupted(folder: Path, out: Path) -> None:
    """The first question is answered, then it ends."""
    calls = 0

    def generate(prompts: Sequence[str], where: Sequence[str]) -> list[str]:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise KeyboardInterrupt
        return ["first"] * len(prompts)

    with pytest.raises(KeyboardInterrupt):
        questions.answer(str(folder), out, "mine", generate, {"batch": 1}, "this model")


def test_answers_that_were_cut_off_go_on(folder, tmp_path):
    out, asked = tmp_path / "a.jsonl", []
    interrupted(folder, out)
    assert not out.exists()
    part = tmp_path / "a.jsonl.part"
    part.write_text(part.read_text() + '{"question_id": 2, "cho')

    def generate(prompts: Sequence[str], where: Sequence[str]) -> list[str]:
        asked.extend(where)
        return ["second"] * len(prompts)

    assert questions.answer(str(folder), out, "mine", generate, {"batch": 1}, "this model") == 2
    assert asked == [f"{folder}/question.jsonl:2, turn {turn}" for turn in (1, 2)]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["choices"][0]["turns"] for line in lines] == [["first"] * 2, ["second"] * 2]
    assert sorted(path.name for path in tmp_path.glob("*a.jsonl*")) == ["a.jsonl"]


@pytest.mark.parametrize("change", ["model", "settings", "questions", "damage"])
def test_answers_of_something_else_are_not_gone_on_with(folder, tmp_path, change):
    out = tmp_path / "a.jsonl"
    interrupted(folder, out)
    if change == "questions":
        write(folder / "question.jsonl", [{"question_id": 1, "category": "writing", "turns": ["Paint."]}])
    if change == "damage":
        out.with_name("a.jsonl.part").write_text("[]\n")
    settings = {"batch": 1, "beams": 2} if change == "settings" else {"batch": 1}
    with pytest.raises(TaskError, match=r"a.jsonl.part: expected answers of this very command .*; remove it"):
        questions.answer(
            str(folder), out, "mine", lambda *_: [], settings, "another" if change == "model" else "this model"
        )


def test_the_second_turn_sees_the_first_and_its_answer(folder, tmp_path):
    seen: list[tuple[str, str]] = []

    def generate(prompts: Sequence[str], where: Sequence[str]) -> list[str]:
        seen.extend(zip(prompts, where, strict=True))
        return ["done"] * len(prompts)

    questions.answer(str(folder), tmp_path / "a.jsonl", "mine", generate, {})
    assert seen[2][0].endswith(
        "### Instruction:\nWrite.\n\n### Response:\ndone\n\n### Instruction:\nAgain.\n\n### Response:"
    )
    assert seen[2][1] == f"{folder}/question.jsonl:1, turn 2"


def test_each_turn_is_rated_and_the_means_are_fastchats(server, folder, answers, tmp_path):
    ratings = iter(["Rating: [[5]]", "I say [[9.5]] and [[1]]", "[8]", "no rating"])
    server.reply = lambda number, body: (200, {}, completion(next(ratings)))
    out = tmp_path / "judgments.jsonl"
    said: list[str] = []
    found = judge.judge(str(folder), answers, out, server.endpoint(key="secret"), said.append)
    assert found == judge.Summary(score=7.5, turns={1: 6.5, 2: 9.5}, judged=4, unrated=1)
    assert said[0] == "question 1, turn 1: 5"
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    names = [line["judge"][1] for line in lines]
    assert names == ["single-v1", "single-v1-multi-turn", "single-math-v1", "single-math-v1-multi-turn"]
    assert [line["score"] for line in lines] == [5, 9.5, 8, -1]
    path, headers, body = server.requests[2]
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert body["model"] == "the-judge"
    assert body["temperature"] == 0
    first = json.loads(answers.read_text().splitlines()[1])["choices"][0]["turns"][0]
    assert body["messages"] == [
        {"role": "system", "content": "system single-math-v1"},
        {"role": "user", "content": f"Q 1+1? R two A {first}"},
    ]
    assert "{answer}" in first  # braces of an answer are no field


def test_the_prompts_may_stand_beside_the_folder_as_in_fastchat(server, folder, answers, tmp_path):
    (folder / "judge_prompts.jsonl").rename(folder.parent / "judge_prompts.jsonl")
    assert judge.judge(str(folder), answers, tmp_path / "judgments.jsonl", server.endpoint()).judged == 4
    (folder.parent / "judge_prompts.jsonl").unlink()
    with pytest.raises(TaskError, match=r"expected a file judge_prompts.jsonl; the folder has"):
        judge.judge(str(folder), answers, tmp_path / "judgments.jsonl", server.endpoint())


def test_it_goes_on_where_it_stopped(server, folder, answers, tmp_path):
    out = tmp_path / "judgments.jsonl"
    server.reply = lambda number, body: (200, {}, completion("[[6]]")) if number < 2 else (400, {}, b"out of credit")
    with pytest.raises(TaskError, match=r"question 2, turn 1: HTTP 400 Bad Request: out of credit; check"):
        judge.judge(str(folder), answers, out, server.endpoint())
    assert len(server.requests) == 3  # a request that is refused as wrong is not sent again
    with out.open("a") as file:
        file.write('{"judge": ["the-judge", "torn')
    server.reply = lambda number, body: (200, {}, completion("[[8]]"))
    found = judge.judge(str(folder), answers, out, server.endpoint())
    assert len(server.requests) == 5
    assert found == judge.Summary(score=7.0, turns={1: 7.0, 2: 7.0}, judged=4, unrated=0)
    assert judge.judge(str(folder), answers, out, server.endpoint()) == found
    assert len(server.requests) == 5


def test_judgments_of_others_are_not_taken_for_these(server, folder, answers, tmp_path):
    out = tmp_path / "judgments.jsonl"
    judge.judge(str(folder), answers, out, server.endpoint())
    kept = out.read_bytes()
    with pytest.raises(TaskError, match=r"judgments.jsonl:1: is a judgment by \['the-judge', 'single-v1'\], not other"):
        judge.judge(str(folder), answers, out, judge.Endpoint(server.url, "other"))
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    lines[0]["choices"][0]["turns"][1] = "changed"
    write(answers, lines)
    with pytest.raises(TaskError, match=r"judgments.jsonl:2: is a judgment of another answer; give another file"):
        judge.judge(str(folder), answers, out, server.endpoint())
    assert out.read_bytes() == kept


@pytest.mark.parametrize("status", [429, 500, 503])
def test_an_endpoint_that_is_busy_is_asked_again(server, status):
    server.reply = lambda number, body: (
        (status, {"Retry-After": "0"}, b"busy") if number < 2 else (200, {}, completion("[[3]]"))
    )
    assert judge.ask(server.endpoint(), "s", "u", "question 1") == "[[3]]"
    assert len(server.requests) == 3


def test_an_endpoint_that_stays_busy_is_one_line(server):
    server.reply = lambda number, body: (503, {}, b"still\nloading")
    with pytest.raises(TaskError) as caught:
        judge.ask(server.endpoint(), "s", "u", "question 1, turn 2")
    assert str(caught.value) == (
        f"judge {server.url}/chat/completions: question 1, turn 2: no answer in 3 tries, the last: "
        "HTTP 503 Service Unavailable: still loading; check that it runs, then give the same command to go on"
    )
    assert len(server.requests) == 3


def test_an_endpoint_that_says_nothing_is_left_after_the_timeout(server):
    server.reply = lambda number, body: None
    with pytest.raises(TaskError, match=r"no answer in 2 tries, the last: no answer in 0.2 s"):
        judge.ask(server.endpoint(timeout_s=0.2, tries=2), "s", "u", "question 1")


def test_an_endpoint_that_is_not_there(server):
    url = server.url
    server.close()
    with pytest.raises(TaskError, match=r"no answer in 2 tries, the last: .*refused; check that it runs"):
        judge.ask(judge.Endpoint(url, "m", tries=2, wait_s=0.01), "s", "u", "question 1")


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_is_not_followed_so_the_key_stays(server, status):
    server.reply = lambda number, body: (status, {"Location": "/elsewhere"}, b"")
    with pytest.raises(TaskError, match=f"HTTP {status}"):
        judge.ask(server.endpoint(key="secret"), "s", "u", "question 1")
    assert [path for path, _, _ in server.requests] == ["/v1/chat/completions"]


@pytest.mark.parametrize(
    "body", [b"<html>", b"{}", b'{"choices": []}', b'{"choices": [{"message": {"content": null}}]}']
)
def test_a_reply_of_another_kind_is_told(server, body):
    server.reply = lambda number, asked: (200, {}, body)
    with pytest.raises(TaskError, match=r"expected choices\[0\].message.content of a chat completion, got "):
        judge.ask(server.endpoint(), "s", "u", "question 1")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [("[[7]]", 7), ("x [[7.5]] y", 7.5), ("[4]", 4), ("[[0]]", -1), ("[[11]]", -1), ("7/10", -1), ("", -1)],
)
def test_ratings(reply, expected):
    assert judge.rating(reply) == expected


@pytest.mark.parametrize(
    "content",
    [
        '{"question_id": 1, "answer_id": "an answers file without an end of line"}',
        '{"question_id": 1, "answer_id": "x"}\n{"question_id": 2, "torn',
        "my notes",
        '{"judge": ["the-judge", "single-v1"], "question_id": [1], "turn": 1, "score": 3}\n',
    ],
)
def test_a_wrong_out_is_refused_and_loses_nothing(server, folder, answers, tmp_path, content):
    out = tmp_path / "mine.txt"
    out.write_text(content)
    with pytest.raises(TaskError, match=r"mine.txt"):
        judge.judge(str(folder), answers, out, server.endpoint())
    assert out.read_text() == content
    assert server.requests == []


@pytest.mark.parametrize("url", ["http://[::1", "http://x:port/v1", "127.0.0.1:8000"])
def test_an_address_that_is_none_is_refused(folder, answers, tmp_path, url):
    with pytest.raises(TaskError, match="expected an address such as"):
        judge.judge(str(folder), answers, tmp_path / "out.jsonl", judge.Endpoint(url, "m"))


def test_faults_in_the_files(server, folder, answers, tmp_path):
    out = tmp_path / "judgments.jsonl"

    def fault(pattern: str) -> None:
        with pytest.raises(TaskError, match=pattern):
            judge.judge(str(folder), answers, out, server.endpoint())

    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    write(answers, lines[:1])
    fault(r"mine.jsonl: expected 2 turns for question 2 \(.*question.jsonl:2\), got 0")
    write(answers, [{**lines[0], "choices": []}])
    fault(r"mine.jsonl:1: expected choices\[0\].turns")
    write(answers, lines)
    (folder / "reference_answer" / "gpt-4.jsonl").write_text("")
    fault(r"gpt-4.jsonl: no reference for question 2")
    write(folder / "question.jsonl", [{"question_id": 1, "category": "writing", "turns": ["x"]}] * 2)
    fault(r"question.jsonl:2: question_id 1 is that of .*question.jsonl:1 too")
    assert server.requests == []
    with pytest.raises(TaskError, match="expected an address such as"):
        judge.judge(str(folder), answers, out, judge.Endpoint("127.0.0.1:8000", "m"))


def test_the_commands(server, folder, answers, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "mine")
    command = ["mtbench", "judge", str(answers), "--questions", str(folder), "--out", str(tmp_path / "j.jsonl")]
    command += ["--model", "m", "--key-variable", "MY_KEY"]
    assert main([*command, "--url", server.url]) == 0
    said = capsys.readouterr()
    assert said.out == "mean rating by m: 7.00 (turn 1: 7.00, turn 2: 7.00); 4 judged, 0 without a rating\n"
    assert server.requests[0][1]["Authorization"] == "Bearer mine"
    assert main([*command, "--url", "nowhere"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_real_model_answers(stories260k, folder, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    command = ["mtbench", "answer", str(stories260k), "--questions", str(folder), "--out", str(out), "--device", "cpu"]
    assert main([*command, "--new-tokens", "6"]) == 0
    assert capsys.readouterr().out == f"{out}: 2 answers of answers\n"
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(line["choices"][0]["turns"]) for line in lines] == [2, 2]
    assert lines[0]["generate_params"] == {"do_sample": False, "beams": 3, "new_tokens": 6, "batch": 4}
    kept = out.read_bytes()
    assert main([*command, "--new-tokens", "500"]) == 2
    assert "question.jsonl:1, turn 1: prompt and answer may take" in capsys.readouterr().err
    assert out.read_bytes() == kept


def test_the_real_prompts_are_filled_as_fastchat_fills_them(test_data):
    """FastChat uses str.format."""
    folder = test_data / "mt_bench"
    lines = (folder / "judge_prompts.jsonl").read_text().splitlines()
    templates = {row["name"]: row["prompt_template"] for row in map(json.loads, lines)}
    question = Question(1, "math", ("one?", "two?"), "x:1")
    turns, reference = ["a {x}", "b"], ["r1", "r2"]
    fields = {
        "question": "one?", "question_1": "one?", "question_2": "two?", "answer": "a {x}", "answer_1": "a {x}",
        "answer_2": "b", "ref_answer_1": "r1", "ref_answer_2": "r2",
    }  # fmt: skip
    for name in PROMPTS:
        assert judge._fill(templates[name], question, turns, reference) == templates[name].format(**fields)


def test_the_real_questions_and_references_are_read(test_data):
    folder = str(test_data / "mt_bench")
    asked = {question.question_id: question for question in questions.questions(folder)}
    assert len(asked) == 80
    assert {len(question.turns) for question in asked.values()} == {2}
    assert len(judge._references(folder, asked)) == 30
