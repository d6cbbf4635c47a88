"""Chat prompts of a published model: messages -> text by the model's own template.

    about = read_template("models/smollm2")               # None where no template lies there
    render(about, [{"role": "user", "content": "Name a shelf."}])

`vocab.Vocab.chat` makes tokens of it. Templates are Jinja, as published models bring them in
tokenizer_config.json or chat_template.jinja; they run in Jinja's sandbox. Jinja comes with torch.
"""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pagellm.stage.config import PageLLMError
from pagellm.stage.files import read_json

__all__ = ["Message", "guarded", "read_template", "render"]


Message = dict[str, str]  # role: system, user or assistant; content: what is said


def read_template(path: str | Path) -> dict[str, str] | None:
    """`template` and the texts of `bos_token` and `eos_token`; None where there is no template.

    path  the directory of a published model
    """
    path = Path(path)
    config, beside = path / "tokenizer_config.json", path / "chat_template.jinja"
    about = read_json(config) if config.exists() else {}
    template = about.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in template}
        template = named.get("default")
    if beside.exists():
        template = beside.read_text(encoding="utf-8")
    if not template:
        return None
    found = {"template": str(template)}
    for name in ("bos_token", "eos_token"):
        token = about.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token:
            found[name] = str(token)
    return found


def guarded(messages: Sequence[Message], control: Sequence[str]) -> tuple[list[Message], str]:
    """Messages whose texts hold no control token, and the mark that was put into those that did.

    What a person wrote may look like the end of a turn. The mark, a character that stands in no
    message, breaks such texts up; whoever encodes takes it out again.

    Raises PageLLMError for a message without role or content.
    """
    for message in messages:
        if not all(isinstance(message.get(name), str) for name in ("role", "content")):
            raise PageLLMError(f"a message of a chat needs a role and a content: {message!r}")
    every = "".join(part for message in messages for part in message.values())
    mark = next(chr(c) for c in range(0xE000, 0xF8FF) if chr(c) not in every)
    out = []
    for message in messages:
        text = message["content"]
        for name in sorted(control, key=len, reverse=True):
            text = text.replace(name, name[0] + mark + name[1:])
        out.append({**message, "content": text})
    return out, mark


def render(about: dict[str, str], messages: Sequence[Message], more: bool = True) -> str:
    """The text of a chat.

    about  as from `read_template`
    more   end with what begins an answer
    Raises PageLLMError where the template refuses these messages, or is damaged.
    """
    from jinja2.exceptions import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str) -> None:
        raise PageLLMError(f"the model's chat template refuses these messages: {reason}")

    def now(form: str) -> str:
        return datetime.now().strftime(form)

    # The options that published templates are written for.
    jinja = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    tools: dict[str, Any] = {"raise_exception": refuse, "strftime_now": now}
    jinja.globals.update(tools)
    named = {"bos_token": "", "eos_token": ""} | {k: v for k, v in about.items() if k != "template"}
    try:
        template = jinja.from_string(about["template"])
        return template.render(messages=list(messages), add_generation_prompt=more, **named)
    except TemplateError as error:
        raise PageLLMError(f"the model's chat template cannot be rendered: {error}") from None
