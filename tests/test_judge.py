"""A judge behind an endpoint: a local server that answers, fails, is silent, or talks nonsense."""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steerlens.errors import FileError, InputError, WorkerError
from steerlens.measure.scorers import Endpoint, Judge, Ratings, Written
from steerlens.measure.scorers.judge import PROMPTS, agreement_of, rating_in

KEY = "sk-secret-0123456789"
Reply = tuple[int, bytes] | float
"""A status and a body, or the seconds to be silent."""


def completion(content: Any) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"content": content}}]}).encode()


class Server(ThreadingHTTPServer):
    """Answers each request as `reply` says, and keeps what was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[dict[str, Any]] = []
        self.reply: Callable[[int, str], Reply] = lambda n, text: completion("2")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        server: Any = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server.asked.append({"path": self.path, "key": self.headers["Authorization"], **body})
        reply = server.reply(len(server.asked), body["messages"][0]["content"])
        if isinstance(reply, float):
            time.sleep(reply)
            return
        self.send_response(reply[0])
        self.send_header("Content-Length", str(len(reply[1])))
        self.end_headers()
        self.wfile.write(reply[1])

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("no_proxy", "*")
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.01,))
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def endpoint(server: Server, **options: Any) -> Endpoint:
    return Endpoint(server.url, "small", key=KEY, **{"backoff": 0.01, **options})


def said(text: str, prompt: str = "How was it?") -> Written:
    return Written(prompt, text, (1,), (4,), ended=True)


def aspect_of(text: str) -> str:
    """Which aspect a judge was asked about."""
    [aspect] = [a for a, prompt in PROMPTS.items() if text.startswith(prompt[:25])]
    return aspect


def rated(server: Server, **ratings: int) -> None:
    server.reply = lambda n, text: completion(str(ratings[aspect_of(text)]))


# What is asked and what is made of it


def test_each_aspect_is_asked_for_and_the_harmonic_mean_taken(server: Server) -> None:
    rated(server, concept=2, instruction=1, fluency=2)
    judge = Judge("good cheer {with braces}", endpoint(server))
    assert judge([said("so {warm}"), said("  ")]) == pytest.approx([1.5, math.nan], nan_ok=True)
    assert [(a["path"], a["key"], a["model"], a["temperature"]) for a in server.asked] == [
        ("/v1/chat/completions", f"Bearer {KEY}", "small", 0)
    ] * 3
    by_aspect = {aspect_of(a["messages"][0]["content"]): a["messages"] for a in server.asked}
    texts = {aspect: messages[0]["content"] for aspect, messages in by_aspect.items()}
    assert all("<text>\nso {warm}\n</text>" in text for text in texts.values())
    assert [a for a, text in texts.items() if "good cheer {with braces}" in text] == ["concept"]
    assert [a for a, text in texts.items() if "How was it?" in text] == ["instruction"]
    assert judge.record == {
        "concept": "good cheer {with braces}",
        "prompts": PROMPTS,
        "url": f"{server.url}/chat/completions",
        "model": "small",
        "temperature": 0,
        "n_requests": 3,
    }


@pytest.mark.parametrize(
    ("ratings", "overall"),
    [
        ((2, 2, 2), 2),
        ((1, 2, 2), 1.5),
        ((2, 0, 2), 0),
        ((1, 1, 2), 1.2),
        ((2, math.nan, 0), math.nan),
    ],
)
def test_the_harmonic_mean(ratings: tuple[float, float, float], overall: float | None) -> None:
    expected = math.nan if overall is None else overall
    assert Ratings(*ratings).overall == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("answer", "rating"),
    [("2", 2), (" 1.\n", 1), ("**0**", 0), ("Rating: [[2]]", 2), ("score = 1", 1), ("2.0", 2)]
    + [("<think>2? 1?</think>\n1", 1)]
    + [(odd, math.nan) for odd in ("", "3", "12", "1 or 2", "2/2", "-", "1.5", "two")],
)
def test_only_a_rating_is_one(answer: str, rating: float) -> None:
    assert rating_in(answer) == pytest.approx(rating, nan_ok=True)


def test_answers_without_a_rating_are_undefined_and_told(server: Server) -> None:
    server.reply = lambda n, text: completion("2" if "warm" in text else "lovely")
    judge = Judge("cheer", endpoint(server))
    with pytest.warns(UserWarning, match=r"3 of 6 answers .* such as 'lovely'"):
        assert judge([said("warm"), said("cold")]) == pytest.approx([2, math.nan], nan_ok=True)
    # They are not kept: only these are asked for again.
    server.reply = lambda n, text: completion("1")
    assert judge([said("warm"), said("cold")]) == [2, 1]
    assert len(server.asked) == 9
    server.reply = lambda n, text: completion("lovely")
    with pytest.raises(WorkerError, match=r"3 of 3 answers .* take another model"):
        judge([said("other")])


# Failures


def test_what_may_pass_is_tried_again(server: Server) -> None:
    replies: list[Reply] = [(500, b"busy"), (429, b""), (200, b"<html>"), completion(None), 0.3]
    server.reply = lambda n, text: replies[n - 1] if n <= len(replies) else completion("2")
    asked = endpoint(server, attempts=6, timeout=0.1)
    assert asked.ask("a text") == "2"
    assert len(server.asked) == asked.tally["n_requests"] == 6


@pytest.mark.parametrize(
    ("reply", "attempts", "told"),
    [
        ((500, b"busy " + KEY.encode()), 2, r"failed 2 times: HTTP 500 \(busy \[key\]\)"),
        ((200, b"nonsense " + KEY.encode()), 2, r"no chat completion, but 'nonsense \[key\]'"),
        ((200, b'{"choices": []}'), 2, "no chat completion"),
        (0.2, 2, "timed out"),
        ((401, b"bad key " + KEY.encode()), 1, r"refuses: HTTP 401 \(bad key \[key\]\)"),
        ((404, b""), 1, "refuses: HTTP 404.*STEERLENS_JUDGE_MODEL"),
        ((307, b""), 1, "refuses: HTTP 307"),
    ],
)
def test_what_does_not_pass_is_told_without_the_key(
    server: Server, reply: Reply, attempts: int, told: str
) -> None:
    server.reply = lambda n, text: reply
    with pytest.raises(WorkerError, match=told) as raised:
        Judge("cheer", endpoint(server, attempts=2, timeout=0.05), at_once=1)([said("warm")])
    assert len(server.asked) == attempts
    assert all(asked["key"] == f"Bearer {KEY}" for asked in server.asked)  # which it did have
    shown: Any = raised.value
    while shown is not None:
        assert KEY not in str(shown)
        shown = None if shown.__suppress_context__ else shown.__cause__ or shown.__context__


def test_nothing_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    nobody = Endpoint("http://127.0.0.1:9/v1", "small", attempts=2, backoff=0.0)
    with pytest.raises(WorkerError, match=r"127\.0\.0\.1 failed 2 times: .*refused"):
        nobody.ask("a text")


def test_a_failure_stops_what_was_not_sent(server: Server) -> None:
    server.reply = lambda n, text: (400, b"")
    with pytest.raises(WorkerError, match="400"):
        Judge("cheer", endpoint(server), at_once=2)([said(f"text {i}") for i in range(20)])
    assert len(server.asked) <= 2


def test_no_more_requests_than_allowed(server: Server) -> None:
    judge = Judge("cheer", endpoint(server, max_requests=5))
    with pytest.raises(InputError, match=r"6 requests .* for 2 texts, and 5 of 5 .*max_requests"):
        judge([said("warm"), said("cold")])
    assert server.asked == []
    assert judge([said("warm")]) == [2]
    assert judge([said("warm")]) == [2]  # known
    server.reply = lambda n, text: (500, b"busy")
    with pytest.raises(WorkerError, match=r"sent 5 requests, .* \(the last one failed: HTTP 500"):
        judge.endpoint.ask("one more")
    assert len(server.asked) == 5


# The key, the environment and the cache


def test_the_environment_says_what_is_not_given(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("URL", "MODEL", "KEY"):
        monkeypatch.delenv(f"STEERLENS_JUDGE_{name}", raising=False)
    with pytest.raises(InputError, match="set STEERLENS_JUDGE_URL, or give url="):
        Judge("cheer")
    monkeypatch.setenv("STEERLENS_JUDGE_URL", f"{server.url}/chat/completions/")
    with pytest.raises(InputError, match="set STEERLENS_JUDGE_MODEL"):
        Judge("cheer")
    monkeypatch.setenv("STEERLENS_JUDGE_MODEL", "small")
    assert Judge("cheer")([said("warm")]) == [2]
    monkeypatch.setenv("STEERLENS_JUDGE_KEY", f"{KEY}\n")
    assert Judge("cheer")([said("warm")]) == [2]
    assert [asked["key"] for asked in server.asked] == [None] * 3 + [f"Bearer {KEY}"] * 3
    assert {asked["path"] for asked in server.asked} == {"/v1/chat/completions"}
    with pytest.raises(InputError, match="told the concept"):
        Judge(" ")


@pytest.mark.parametrize("key", [f"{KEY}\nx", f"{KEY} x", f"{KEY}é", KEY.encode(), [KEY]])
def test_a_key_that_cannot_be_sent_is_refused_unseen(key: Any) -> None:
    with pytest.raises(InputError, match="STEERLENS_JUDGE_KEY") as raised:
        Endpoint("http://127.0.0.1:9", "small", key=key)
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    "url",
    [f"https://user:{KEY}@host/v1", f"https://host/v1?key={KEY}", f"file:///{KEY}", KEY]
    + [f"http://[{KEY}", f"http://host:{KEY}/"],
)
def test_a_url_that_cannot_be_used_is_refused_unseen(url: str) -> None:
    with pytest.raises(InputError, match=r"URL cannot be used; expected one like https") as raised:
        Endpoint(url, "small")
    assert KEY not in str(raised.value)


def test_answers_are_cached_by_their_request_without_the_key(
    server: Server, tmp_path: Path
) -> None:
    rated(server, concept=2, instruction=1, fluency=2)
    cache = tmp_path / "answers"
    first = Judge("cheer", endpoint(server, cache=cache))
    assert first([said("warm")]) == [1.5]
    files = list(cache.iterdir())
    assert len(files) == 3
    assert not any(KEY in path.read_text() for path in files)
    assert KEY not in json.dumps(first.record) + repr(first)
    server.reply = lambda n, text: (500, b"")
    again = Judge("cheer", endpoint(server, cache=cache, attempts=1))
    assert again([said("warm")]) == [1.5]
    assert (again.record["n_cached"], len(server.asked)) == (3, 3)
    # Another text, concept, model or repeat is another request.
    for judge, text, repeat in [
        (again, "cold", 0),
        (again, "warm", 1),
        (Judge("gloom", again.endpoint), "warm", 0),
        (Judge("cheer", Endpoint(server.url, "large", cache=cache, attempts=1)), "warm", 0),
    ]:
        with pytest.raises(WorkerError, match="500"):
            judge.rate([said(text)], repeat=repeat)
    for content in ("{", '{"request": 1, "answer": "2"}', "[]"):
        for path in files:
            path.write_text(content)
        fresh = Judge("cheer", endpoint(server, cache=cache))
        with pytest.raises(FileError, match="no answer of a judge to this request; remove it"):
            fresh([said("warm")])
    (tmp_path / "file").touch()
    rated(server, concept=2, instruction=1, fluency=2)
    with pytest.raises(FileError, match="cannot write to the judge's cache"):
        Judge("cheer", endpoint(server, cache=tmp_path / "file"))([said("warm")])


# Agreement with itself


def test_a_tenth_is_rated_again(server: Server) -> None:
    texts = [said(f"text {i}") for i in range(20)]
    judge = Judge("cheer", endpoint(server), at_once=1)
    server.reply = lambda n, text: completion(str(n % 3))
    judge(texts)
    server.reply = lambda n, text: completion("1" if aspect_of(text) == "concept" else str(n % 3))
    found = judge.agreement(texts)
    again = [asked["messages"][0]["content"] for asked in server.asked[60:]]
    assert (found.n_ratings, len(again)) == (6, 6)
    assert {text.partition("<text>\n")[2].partition("\n")[0] for text in again} == {
        *("text 0", "text 10")
    }
    # Requests 1-3 and 31-33 gave 1, 2, 0 each; 61-66 give 1 for the concept, else n % 3.
    expected = agreement_of([1, 2, 0, 1, 2, 0], [1, 2, 0, 1, 2, 0])
    assert found == expected == (6, 1, 1, pytest.approx(1))


def test_agreement_by_hand() -> None:
    first, second = [0, 1, 2, 2, 1, 0], [0, 1, 2, 1, 1, 2]
    found = agreement_of(first, second)
    chance = (2 * 1 + 2 * 3 + 2 * 2) / 36
    assert found.share_equal == pytest.approx(4 / 6)
    assert found.kappa == pytest.approx((4 / 6 - chance) / (1 - chance))
    assert found.correlation == pytest.approx(float(np.corrcoef(first, second)[0, 1]))
    for undefined in (agreement_of([1, 1], [1, 1]), agreement_of([], [])):
        assert math.isnan(undefined.kappa)
        assert math.isnan(undefined.correlation)
    assert agreement_of([1, 1], [1, 1]).share_equal == 1
