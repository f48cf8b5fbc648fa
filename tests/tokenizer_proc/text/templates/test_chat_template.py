"""Chat templates render as transformers renders them; refusals carry the template's own message."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jinja2
import pytest
import transformers
from fixtures.models import small_tokenizers

from engine.errors import ConfigError, InvalidRequest
from engine.messages import ChatMessage
from tokenizer_proc.text.templates.chat_template import ChatTemplate
from tokenizer_proc.text.tokenizer import Tokenizer

CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
LLAMA3 = """{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = "" %}
{%- endif %}
{{- "<|h|>system<|/h|>\n\n" + system + "<|e|>" }}
{%- for message in messages %}
    {%- if message.role not in ["user", "assistant"] %}{% continue %}{% endif %}
    {{- '<|h|>' + message['role'] + '<|/h|>\n\n' + message['content'] | trim + '<|e|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|h|>assistant<|/h|>\n\n' }}
{%- endif %}
"""
MISTRAL = """{{ bos_token }}{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('roles must alternate user/assistant/...') }}
{% endif %}
{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}
{% elif m['role'] == 'assistant' %}{% generation %}{{ ' ' + m['content'] + eos_token }}{% endgeneration %}
{% endif %}{% endfor %}"""
THINKING = """{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}
{{ m | tojson }}{{ m.content | tojson(indent=2) }}
{% if loop.last and tools is none %}!{% endif %}{% endfor %}{{ ns.n }}
{% if enable_thinking is defined and enable_thinking %}<think>{% endif %}{{ strftime_now("%Y") }}"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "thinking": THINKING}

CHATS = [
    [("user", "Hi <there> & 'you' \"é\"")],
    [("user", "  one "), ("assistant", " two "), ("user", "three\n")],
    [("system", "be brief "), ("user", "why?")],
    [("user", "tell"), ("assistant", "Once upon a ")],
]


def messages(chat: list[tuple[str, str]]) -> list[ChatMessage]:
    return [ChatMessage(role, content) for role, content in chat]


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> transformers.PreTrainedTokenizerBase:
    path = small_tokenizers.save(small_tokenizers.byte_level(), tmp_path_factory.mktemp("chat"))
    return transformers.AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("chat", CHATS, ids=range(len(CHATS)))
@pytest.mark.parametrize(
    ("name", "how"),
    [(name, how) for name in TEMPLATES for how in ("prompt", "plain", "continue")][:-1],
)  # the last template shows a message twice, so that its continuation is ambiguous
def test_templates_render_as_in_transformers(
    oracle: transformers.PreTrainedTokenizerBase, name: str, chat: list[tuple[str, str]], how: str
) -> None:
    template = ChatTemplate(TEMPLATES[name], {"bos_token": "<s>", "eos_token": "</s>"})
    options = {"add_generation_prompt": how == "prompt", "continue_final_message": how == "continue"}
    theirs = [{"role": role, "content": content} for role, content in chat]
    expected, refusal = None, ""
    try:
        expected = oracle.apply_chat_template(
            theirs, chat_template=TEMPLATES[name], tokenize=False, enable_thinking=True, **options
        )
    except jinja2.TemplateError as error:
        refusal = str(error)
    if expected is not None:
        assert template.render(messages(chat), enable_thinking=True, **options) == expected
        return
    with pytest.raises(InvalidRequest, match=re.escape(refusal)) as ours:
        template.render(messages(chat), enable_thinking=True, **options)
    assert ours.value.param == "messages"


def test_transformers_refuses_somewhere_too() -> None:
    with pytest.raises(InvalidRequest, match="roles must alternate"):
        ChatTemplate(MISTRAL, {"bos_token": "", "eos_token": ""}).render(messages(CHATS[2]))


def test_a_developer_is_the_system_where_the_template_has_none() -> None:
    asked = messages([("developer", "be brief"), ("user", "why?")])
    assert ChatTemplate(CHATML).render(asked) == ChatTemplate(CHATML).render(messages(CHATS[2])).replace(
        "brief ", "brief"
    )
    own = "{% for m in messages %}{% if m.role == 'developer' %}!{% endif %}{{ m.content }};{% endfor %}"
    assert ChatTemplate(own).render(asked) == "!be brief;why?;"


def test_tool_calls_need_a_template_that_has_them() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    asked = [ChatMessage("assistant", "", tool_calls=[call]), ChatMessage("tool", "2", tool_call_id="1")]
    with pytest.raises(InvalidRequest, match="no tool calls"):
        ChatTemplate(CHATML).render(asked)
    own = (
        "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        "{{ c.function.arguments | tojson }}{% endfor %}{{ m.tool_call_id }}{% endfor %}"
    )
    assert ChatTemplate(own).render(asked) == 'add{"a": 1}1'


def test_a_template_cannot_reach_other_objects() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidRequest, match="unsafe"):
        template.render(messages(CHATS[0]))
    with pytest.raises(InvalidRequest):
        ChatTemplate("{{ messages.append(1) }}").render(messages(CHATS[0]))


def test_without_a_template_a_chat_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="--chat-template"):
        ChatTemplate.load(tmp_path).render(messages(CHATS[0]))


def test_contradicting_options_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="contradict"):
        ChatTemplate(CHATML).render(messages(CHATS[0]), add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(InvalidRequest, match="empty"):
        ChatTemplate(CHATML).render([])


def test_templates_are_found_in_files_and_configs(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "plain"}))
    assert ChatTemplate.load(tmp_path).source == "plain"
    named = [{"name": "tool_use", "template": "tool"}, {"name": "default", "template": "usual"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.load(tmp_path).source == "usual"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert ChatTemplate.load(tmp_path).source == "file"
    (tmp_path / "mine.jinja").write_text("mine")
    assert ChatTemplate.load(tmp_path, str(tmp_path / "mine.jinja")).source == "mine"
    assert ChatTemplate.load(tmp_path, "{{ messages }}").source == "{{ messages }}"
    config.write_text(json.dumps({"chat_template": named[:1]}))
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match="tool_use"):
        ChatTemplate.load(tmp_path)


def test_bad_templates_end_the_launch(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="neither a file nor"):
        ChatTemplate.load(tmp_path, "missing.jinja")
    with pytest.raises(ConfigError, match="not valid jinja"):
        ChatTemplate.load(tmp_path, "{% if %}")


def test_special_tokens_come_from_the_tokenizer(tmp_path: Path) -> None:
    path = small_tokenizers.save(small_tokenizers.byte_level(), tmp_path)
    tokenizer = Tokenizer.load(path)
    template = ChatTemplate.load(path, "{{ bos_token }}|{{ eos_token }}", tokenizer.special_tokens)
    assert template.render(messages(CHATS[0])) == "<s>|</s>"
