"""A chat model behind an OpenAI-compatible URL: asked with retries, within a limit, and cached."""

import hashlib
import http.client
import json
import os
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit, urlunsplit

from steerlens.errors import FileError, InputError, WorkerError, in_one_line
from steerlens.files import read_whole, strict_json, write_json, write_whole
from steerlens.validation import Count, NotNegative, Positive, checked

PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""HTTP statuses after which the same request may succeed."""
LONGEST_WAIT = 60.0
"""Seconds that an endpoint may ask to be left alone between two attempts."""
MAX_ANSWER = 1 << 20
"""Bytes of an answer that are read."""
_PATH = "/chat/completions"


@checked
@dataclass(frozen=True, eq=False)
class Endpoint:
    """A chat model behind an OpenAI-compatible URL. Its key is in no error, record or cache.

    Args:
        url: Such as "https://api.openai.com/v1"; by default `STEERLENS_JUDGE_URL`.
        model: What the endpoint calls it; by default `STEERLENS_JUDGE_MODEL`.
        key: By default `STEERLENS_JUDGE_KEY`; none is sent where there is none.
        cache: A folder that keeps each answer under its request's hash; by default they are kept
            as long as this object.
        max_requests: The most that are sent, attempts counted.
        attempts: At one request, while it fails in a way that may pass.
        timeout: Seconds of silence after which an attempt has failed.
        backoff: Seconds before the second attempt, doubled before each further one.

    Raises:
        InputError: No URL or model is given, or the URL or the key cannot be used.

    Examples:
        >>> from steerlens.measure.scorers import Endpoint
        >>> Endpoint("http://127.0.0.1:8000/v1", "small", key="secret")
        Endpoint(url='http://127.0.0.1:8000/v1', model='small', ...)
    """

    url: str = ""
    model: str = ""
    key: Any = field(default="", repr=False)  # not checked as others are: that would show it
    cache: Path | None = None
    max_requests: Count = 1000
    attempts: Count = 5
    timeout: Positive = 60.0
    backoff: NotNegative = 1.0
    tally: Counter[str] = field(default_factory=Counter, init=False, repr=False)
    _answers: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    _lock: Any = field(default_factory=threading.Lock, init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("url", "model", "key"):
            variable = f"STEERLENS_JUDGE_{name.upper()}"
            value = getattr(self, name) or os.environ.get(variable, "")
            value = value.strip() if isinstance(value, str) else "\0"
            if not value and name != "key":
                raise InputError(f"no {name} of a judge is given; set {variable}, or give {name}=")
            object.__setattr__(self, name, value)
        if not (self.key.isascii() and self.key.isprintable()) or " " in self.key:
            raise InputError(
                "the judge's key is no text, or holds other characters than a key has; see what "
                "STEERLENS_JUDGE_KEY is set to"
            )
        _ = self._address

    @property
    def _address(self) -> SplitResult:
        try:
            parts = urlsplit(self.url)
            is_fit = parts.scheme in ("http", "https") and bool(parts.hostname)
            is_fit = is_fit and parts.port != 0 and "@" not in parts.netloc and not parts.query
        except ValueError:
            is_fit = False
        if not is_fit:  # not shown, as it may hold a password
            raise InputError(
                "the judge's URL cannot be used; expected one like https://HOST/v1, without a "
                "password or a query (the key is STEERLENS_JUDGE_KEY)"
            )
        path = parts.path.rstrip("/")
        return parts._replace(path=path if path.endswith(_PATH) else path + _PATH, fragment="")

    @property
    def record(self) -> dict[str, Any]:
        """Who was asked and how often: requests that were sent, and answers that were there."""
        return {
            "url": urlunsplit(self._address),
            "model": self.model,
            "temperature": 0,
            **self.tally,
        }

    def is_known(self, text: str, repeat: int = 0) -> bool:
        """Whether the answer is there already."""
        return self._kept(*self._request(text, repeat)) is not None

    def ask(self, text: str, *, repeat: int = 0, is_answer: Callable[[str], bool] = bool) -> str:
        """What the model says to a text, at temperature 0.

        Args:
            text: Said as the user.
            repeat: Another number is another request of the same text.
            is_answer: Whether an answer is worth keeping.

        Raises:
            WorkerError: The endpoint refuses, all attempts failed, or `max_requests` are sent.
            FileError: The cache cannot be read or written.
        """
        body, name = self._request(text, repeat)
        kept = self._kept(body, name)
        if kept is not None:
            self._count("n_cached")
            return kept
        answer = self._sent(json.dumps(body).encode())
        if is_answer(answer):
            self._answers[name] = answer
            if self.cache is not None:
                self._write(self.cache, name, {"request": body, "answer": answer})
        return answer

    def _request(self, text: str, repeat: int) -> tuple[dict[str, Any], str]:
        """The body of a request, and the sha256 under which its answer is kept."""
        messages = [{"role": "user", "content": text}]
        body = {"model": self.model, "messages": messages, "temperature": 0}
        told = json.dumps([urlunsplit(self._address), body, repeat], sort_keys=True)
        return body, hashlib.sha256(told.encode()).hexdigest()

    def _kept(self, body: dict[str, Any], name: str) -> str | None:
        if name in self._answers or self.cache is None:
            return self._answers.get(name)
        path = self.cache / f"{name}.json"
        if not path.exists():
            return None
        with suppress(ValueError, KeyError, TypeError):
            record = strict_json(read_whole(path, FileError).decode())
            if record["request"] == body and isinstance(record["answer"], str):
                self._answers[name] = record["answer"]
                return self._answers[name]
        raise FileError(f"{str(path)!r} is no answer of a judge to this request; remove it")

    def _write(self, folder: Path, name: str, record: dict[str, Any]) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / f"{name}.json", lambda path: write_json(record, path))
        except OSError as error:
            raise FileError(
                f"cannot write to the judge's cache {str(folder)!r}: {error.strerror or error}"
            ) from error

    def _count(self, what: str) -> None:
        with self._lock:
            self.tally[what] += 1

    def _sent(self, body: bytes) -> str:
        reason = ""
        for attempt in range(self.attempts):
            with self._lock:
                if self.tally["n_requests"] >= self.max_requests:
                    raise WorkerError(
                        f"the judge was sent {self.max_requests} requests, the most allowed; "
                        f"allow more{f' (the last one failed: {reason})' if reason else ''}"
                    )
                self.tally["n_requests"] += 1
            try:
                return self._once(body)
            except _PassingError as error:
                reason, wait = str(error), max(self.backoff * 2**attempt, error.wait)
            if attempt + 1 < self.attempts:
                time.sleep(min(wait, LONGEST_WAIT))
        raise WorkerError(
            f"the judge at {self._host} failed {self.attempts} times: {reason}; try again later, "
            "or see STEERLENS_JUDGE_URL"
        )

    def _once(self, body: bytes) -> str:
        """One attempt. Raises `_PassingError` where another may succeed."""
        request = urllib.request.Request(
            urlunsplit(self._address), data=body, headers={"Content-Type": "application/json"}
        )
        if self.key:  # not carried along to where a redirection leads
            request.add_unredirected_header("Authorization", f"Bearer {self.key}")
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                content = response.read(MAX_ANSWER)
        except urllib.error.HTTPError as error:
            said = f"HTTP {error.code} ({self._without_key(_start_of(error))})"
            if error.code in PASSING:
                raise _PassingError(said, _seconds(error.headers.get("Retry-After"))) from None
            raise WorkerError(
                f"the judge at {self._host} refuses: {said}; see STEERLENS_JUDGE_URL, "
                "STEERLENS_JUDGE_KEY and STEERLENS_JUDGE_MODEL"
            ) from None
        except (OSError, http.client.HTTPException) as error:
            raise _PassingError(self._without_key(in_one_line(error))[:200]) from None
        try:
            answer = strict_json(content.decode())["choices"][0]["message"]["content"]
            if not isinstance(answer, str):
                raise TypeError
        except (ValueError, LookupError, TypeError):
            said = self._without_key(" ".join(content.decode(errors="replace").split()))[:100]
            raise _PassingError(f"no chat completion, but {said!r}") from None
        return self._without_key(answer)

    @property
    def _host(self) -> str:
        return str(self._address.hostname)

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "[key]") if self.key else text


class _PassingError(Exception):
    """An attempt failed in a way that may pass; `wait` is how many seconds were asked for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def _start_of(error: urllib.error.HTTPError) -> str:
    with suppress(OSError, http.client.HTTPException):
        return " ".join(error.read(2000).decode(errors="replace").split())[:200]
    return str(error.reason)


def _seconds(given: str | None) -> float:
    """Of a header that asks to wait; 0 where it names no number."""
    return float(given) if given and given.strip().isdigit() else 0.0
