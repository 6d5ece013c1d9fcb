from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from expertd_inference.server.chat.answer import ToolCall
from expertd_testing.server import Server, serving_http
from tests.inference.conftest import Make

TEMPLATE = """\
{%- for message in messages -%}
<{{ message.role }}>{{ message.content }}</{{ message.role }}>
{%- endfor -%}
{%- if add_generation_prompt -%}<assistant>{%- endif -%}
"""
VARIANTS = """
[variants.brief]
model = "example"
system = "Be brief."
temperature = 0
max_tokens = 3
stop = "~"
chat_template_kwargs = { enable_thinking = false }

[variants.coder]
chat_format = "qwen-coder"

[variants.mistral]
chat_format = "mistral"

[variants.gemma]
chat_format = "gemma4"

[variants.thinks]
chat_template = "thinks.jinja"
chat_format = "hermes"
reasoning_effort = "low"

[variants.orphan]
model = "gone"
"""


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a chat template; the example model has none."""
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="session")
def variants(template: Path) -> Path:
    """A file of variants of the example model, beside the template."""
    (template.parent / "thinks.jinja").write_text(f"{TEMPLATE}<think>\n")
    path = template.parent / "variants.toml"
    path.write_text(VARIANTS)
    return path


@pytest.fixture(scope="session")
def server(packed: Make, template: Path, variants: Path) -> Iterator[Server]:
    """The example model, served from its own daemon under the names example, alias, and others."""
    arguments = ["--embedded", packed("example", "4bit"), "--chat-template", template]
    arguments += ["--alias", "alias=example", "--exact", "--kv-tokens", "16384"]
    arguments += ["--variants", variants, "--alias", "short=brief"]
    with serving_http(*arguments) as started:
        yield started


@pytest.fixture
def http(server: Server) -> Iterator[httpx2.Client]:
    """Talks to it."""
    with httpx2.Client(base_url=server.url, timeout=60) as client:
        yield client


@pytest.fixture
def call_of_tool() -> ToolCall:
    """What a model asks for."""
    return ToolCall("c", "f", '{"a": 1}')
