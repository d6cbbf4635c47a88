"""Questions to a language model behind <url>/chat/completions, the OpenAI protocol.

    chat = Chat("http://127.0.0.1:8080/v1", "model", key)
    chat.ask({"messages": [...]}, read, gave_none)     what `read` makes of the Reply
    object_in(reply.text, "winner")                    the JSON object within an answer

What a server says is untrusted: an answer is read up to a size and a moment, and no redirect is
followed, so that the key reaches no other address. A key goes over https, or over http to this
machine. Only the standard library is needed.
"""

import http.client
import ipaddress
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from pagellm.stage.config import PageLLMError

__all__ = ["Chat", "GaveUp", "Refused", "Reply", "object_in"]

Said = TypeVar("Said")
LONGEST_ANSWER = 1 << 20  # bytes
MOST_READ = 10_000_000  # characters that are read in vain, in search of an object
BROKEN = (ValueError, KeyError, TypeError, IndexError, AttributeError)  # of a reply that is no chat


class Refused(PageLLMError):
    """The server does not take the question. status: of HTTP."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status


class GaveUp(PageLLMError):
    """No answer came in all attempts, or the budget is used up."""


@dataclass(frozen=True)
class Reply:
    """What a model said. finish: "stop", or "length" where it was cut off; tokens 0: not told."""

    text: str
    finish: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None


def split(url: str) -> urllib.parse.SplitResult | None:
    """The parts of an address; None if it is none."""
    try:
        parts = urllib.parse.urlsplit(url)
        return parts if parts.port != 0 else None
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether a host of an address is this machine: localhost, 127.0.0.0/8 or ::1."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.rstrip(".") == "localhost"


class Chat:
    """A model on a server.

    key      sent as a bearer token; empty: none. Refused for http:// to another machine
    budget   most requests that this object sends, repeats included
    retries  most repeats of one question after 408, 409, 429, 5xx or a broken connection; after 1,
             2, 4 ... seconds, or what Retry-After says
    timeout  seconds to wait for an answer, however slowly it comes
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "",
        budget: int = 1000,
        retries: int = 4,
        timeout: float = 60.0,
        sleep: Callable[[float], None] = time.sleep,
    ):
        parts, key = split(url), key.strip()
        if parts and (parts.username or parts.password or parts.query):
            raise PageLLMError(
                "--url holds a name, a password or a query, which would stand in files and logs\n"
                "  Give the plain address, and the key in the environment."
            )
        if not parts or parts.scheme not in ("http", "https") or not parts.hostname or not model:
            raise PageLLMError(
                f"--url {url!r}, --model {model!r}: want the address of a chat server, e.g. "
                "http://127.0.0.1:8080/v1, and the name of a model there"
            )
        if not (key.isascii() and key.isprintable()):
            raise PageLLMError(
                "the key holds letters that no header can carry, such as a line break\n"
                "  Set the environment variable that --key_env names anew."
            )
        if key and parts.scheme == "http" and not is_loopback(parts.hostname):
            raise PageLLMError(
                f"--url {url}: over http:// the key would go to {parts.hostname} unencrypted, "
                "and whoever is between could read it\n"
                "  Want https://, or a tunnel (ssh -L 8080:localhost:8080 HOST) and --url "
                "http://127.0.0.1:8080/v1; for a server that needs no key, --key_env NONE"
            )
        self.url, self.model, self.key = url.rstrip("/"), model, key
        self.budget, self.retries, self.timeout, self.sleep = budget, retries, timeout, sleep
        self.sent = 0

    def ask(
        self,
        body: dict,
        read: Callable[[Reply], Said],
        gave_none: Callable[[str], Said],
        again: int = 1,
    ) -> Said:
        """What `read` makes of the model's answer to a request; `model` is added to the request.

        read       raises ValueError, or the like, for an answer that is of no use
        gave_none  what to return after `again` + 1 answers of no use; it is told what was wrong
        Raises Refused (3xx, 4xx) and GaveUp.
        """
        raw, said, wait, useless = json.dumps({"model": self.model} | body).encode(), "", 0.0, 0
        for attempt in range(self.retries + 1):
            if attempt:
                self.sleep(wait)
            wait = 2.0**attempt
            if self.sent >= self.budget:
                raise GaveUp(
                    f"the budget of {self.budget} requests is used up; answers so far are kept, "
                    "and the same command with a larger --budget carries on"
                )
            self.sent += 1
            try:
                return read(self.send(raw))
            except urllib.error.HTTPError as error:
                with error:
                    text = self.hidden(error.read(500).decode(errors="replace"))
                said = f"{error.code} {text}"
                if error.code not in (408, 409, 429) and error.code < 500:
                    raise Refused(
                        f"{self.url} refuses: {said}\n  Mend --url, --model or the key.", error.code
                    ) from None
                after = error.headers.get("Retry-After", "")
                wait = min(float(after), 300.0) if after.isdigit() else wait
            except (OSError, http.client.HTTPException) as error:
                said = f"{type(error).__name__}: {error}"
            except BROKEN as error:
                said = self.hidden(f"{type(error).__name__}: {error}")
                useless += 1
                if useless > again or attempt == self.retries:
                    return gave_none(said)
        raise GaveUp(
            f"{self.url} gave no answer in {self.retries + 1} attempts; the last said: {said}\n"
            "  Answers so far are kept; the same command carries on."
        )

    def hidden(self, text: str) -> str:
        """A text without the key: some servers repeat it in their errors."""
        return text.replace(self.key, "***") if self.key else text

    def send(self, raw: bytes) -> Reply:
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self.key}"} if self.key else {}
        )
        request = urllib.request.Request(f"{self.url}/chat/completions", raw, headers)
        end = time.monotonic() + self.timeout
        with urllib.request.build_opener(NoRedirect).open(request, timeout=self.timeout) as reply:
            text = b""
            while part := reply.read1(1 << 16):
                text += part
                if len(text) > LONGEST_ANSWER:
                    raise ValueError(f"an answer of more than {LONGEST_ANSWER:,} bytes")
                if time.monotonic() > end:
                    raise TimeoutError(f"the answer took more than {self.timeout:g} s")
        return reply_of(json.loads(text))


def reply_of(value) -> Reply:
    choice, usage = value["choices"][0], value.get("usage") or {}
    text = choice["message"]["content"]
    if not isinstance(text, str):
        raise ValueError(f"content {text!r}")
    tokens = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    prompt, completion = (n if type(n) is int and n > 0 else 0 for n in tokens)
    return Reply(text, str(choice.get("finish_reason") or ""), prompt, completion)


def object_in(text: str, name: str, what: str = "object") -> dict:
    """The answer within a text: the last JSON object that has a field of this name.

    Servers that do not enforce a schema put it into a code fence, after reasoning, between
    sentences, or into an object of their own. Raises ValueError if there is none, and gives up on
    a text in which lists or objects begin without an end.
    """
    decoder, found, at, left = json.JSONDecoder(), None, text.find("{"), MOST_READ
    while at >= 0 and left > 0:
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:  # which counts the lines up to there
            end, left = at + 1, left - (error.pos - at) - error.pos // 100
        except (ValueError, RecursionError):  # a number of thousands of digits; too deep
            end, left = at + 1, left - MOST_READ // 100
        else:
            named = isinstance(value, dict) and name in value
            found, end = (value, end) if named else (found, at + 1)
        at = text.find("{", end)
    if found is None:
        raise ValueError(f"no {what} in {text[:80]!r}")
    return found
