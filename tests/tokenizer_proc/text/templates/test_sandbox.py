"""Adapters' templates: each rendering ends in bounded time, whatever it does, and other templates still work."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.processes.watched import runs, wait_for

from engine.errors import InvalidRequest
from engine.messages import ChatMessage
from tokenizer_proc.text.templates.chat_template import ChatTemplate
from tokenizer_proc.text.templates.sandbox import Sandbox, SandboxedTemplate

GOOD = "{% for m in messages %}{{ bos_token }}[{{ m.role }}]{{ m.content }}{% endfor %}{{ extra | default('') }}"
HELLO = [ChatMessage("user", "hello"), ChatMessage("assistant", "hé")]


@pytest.fixture
def sandbox() -> Iterator[Sandbox]:
    made = Sandbox()
    yield made
    made.close()


def prompt(template: SandboxedTemplate, *messages: ChatMessage, **kwargs: str | bool) -> str:
    return asyncio.run(template.prompt(list(messages) or HELLO, **kwargs))  # type: ignore[arg-type]


def test_a_sandboxed_template_renders_as_in_process(sandbox: Sandbox) -> None:
    template, here = SandboxedTemplate(sandbox, GOOD, {"bos_token": "<s>"}), ChatTemplate(GOOD, {"bos_token": "<s>"})
    assert prompt(template) == here.render(HELLO) == "<s>[user]hello<s>[assistant]hé"
    assert prompt(template, extra="x") == here.render(HELLO, extra="x")
    going_on = {"add_generation_prompt": False, "continue_final_message": True}
    assert prompt(template, **going_on) == here.render(HELLO, **going_on)
    with pytest.raises(InvalidRequest, match="contradict"):
        prompt(template, continue_final_message=True)
    with pytest.raises(InvalidRequest, match="is empty"):
        asyncio.run(template.prompt([]))


def test_a_number_that_cannot_be_sent_is_refused(sandbox: Sandbox) -> None:
    with pytest.raises(InvalidRequest, match="cannot be sent"):
        prompt(SandboxedTemplate(sandbox, GOOD, {}), extra=1 << 70)  # type: ignore[arg-type]


OPENS = "{{ cycler.__init__.__globals__ }}"
HOSTILE = {
    "an endless loop": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(9999) %}{% endfor %}{% endfor %}"
        "{% endfor %}",
        "2 seconds of computing and 256 MiB",
    ),
    "a memory bomb": (
        "{% set ns = namespace(x='a' * 1000000) %}{% for i in range(40) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "memory|MemoryError",
    ),
    "a huge output": ("{% for i in range(90) %}{{ 'a' * 1000000 }}{% endfor %}", "more than|memory|MemoryError"),
    "an attribute": ("{{ ''.__class__.__mro__ }}", "unsafe|refuses this"),
    "globals": (OPENS, "unsafe|refuses this"),
    "a file": ("{% include '/etc/passwd' %}", "refuses this"),
    "its own words": ("{{ raise_exception('no roles') }}", "no roles"),
    "a wide number": ("{{ '%99999999d' % 1 }}", "too large"),
    "deep recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "refuses this|memory"),
    "half a character": ("{{ messages[0].content | replace('hello', '\\ud800') }}", "no valid text"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_refused_and_the_next_one_works(name: str, sandbox: Sandbox) -> None:
    source, said = HOSTILE[name]
    hostile = SandboxedTemplate(sandbox, source, {})
    good = SandboxedTemplate(sandbox, GOOD, {"bos_token": ""})

    async def both() -> tuple[object, str]:
        return await asyncio.gather(hostile.prompt(HELLO), good.prompt(HELLO), return_exceptions=True)  # type: ignore[return-value]

    refused, text = asyncio.run(both())
    assert isinstance(refused, InvalidRequest), refused
    assert refused.param == "messages"
    with pytest.raises(InvalidRequest, match=said):
        raise refused
    assert text == "[user]hello[assistant]hé"


@pytest.mark.parametrize("source", ["{% for %}", "{{", "{% set x = " + "(" * 5000 + ")" * 5000 + " %}"])
def test_a_template_that_cannot_be_compiled_is_refused_at_load(source: str, sandbox: Sandbox) -> None:
    with pytest.raises(InvalidRequest, match=r"the chat template|the adapter's chat template"):
        SandboxedTemplate(sandbox, source, {})
    assert prompt(SandboxedTemplate(sandbox, GOOD, {"bos_token": ""})) == "[user]hello[assistant]hé"


def test_the_renderer_is_a_process_that_can_open_nothing(sandbox: Sandbox) -> None:
    template = SandboxedTemplate(sandbox, GOOD, {})
    process_id = sandbox.process_id
    assert process_id is not None
    lines = Path(f"/proc/{process_id}/limits").read_text().splitlines()[1:]
    limits = {line[:25].strip(): line[25:].split()[0] for line in lines}
    assert limits["Max open files"] == limits["Max file size"] == limits["Max core file size"] == "0"
    assert int(limits["Max address space"]) < 2 << 30
    ended = os.pidfd_open(process_id)
    os.kill(process_id, signal.SIGKILL)
    assert select.select([ended], [], [], 10)[0], "the process does not end"
    os.close(ended)
    assert prompt(template).endswith("hé")
    assert sandbox.process_id not in (None, process_id)


PARENT = """
import threading
from engine.messages import ChatMessage
from tokenizer_proc.text.templates.sandbox import RenderJob, Sandbox
sandbox = Sandbox()
sandbox.render_in_thread(RenderJob("idle", {}, []))
print(sandbox.process_id, flush=True)
sandbox.render_in_thread(RenderJob("{% for i in range(10 ** 12) %}{% endfor %}", {}, [ChatMessage("user", "x")]))
"""


@pytest.mark.parametrize("source", ["idle", "endless"])
def test_renderer_ends_with_its_parent(source: str) -> None:
    program = PARENT if source == "endless" else PARENT.rpartition("sandbox.render")[0] + "threading.Event().wait()"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        renderer = int(parent.stdout.readline())
        assert runs(renderer)
        parent.kill()
    wait_for(lambda: not runs(renderer))
