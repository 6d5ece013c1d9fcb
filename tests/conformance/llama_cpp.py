"""The tests of llama.cpp's server, unmodified, against this one.

They were written for servers that they start themselves, with models and options of their own;
here each finds a server that is running (their ``DEBUG_EXTERNAL``): the example model's, with a
key where a test has one, and with the chat template that a test names.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from expertd_inference.server.keys import digest
from tests.conformance.cases import Case, Outcome, Report, read_cases
from tests.conformance.outside import MODEL, Outside

VERSION = "0.3.36"
"""Of llama-cpp-python, whose source distribution has llama.cpp's."""
_PACKAGES = [
    *("pytest>=8.3,<9", "pytest-timeout", "filelock", "openai~=2.14.0", "requests", "wget"),
    *("numpy", "prometheus-client", "aiohttp"),
]
_KEY = "sk-this-is-the-secret-key"
_MODELS = ("test", "davinci-002", "gpt-3.5-turbo-instruct", "gpt-3.5-turbo", "gpt-4.1",
           "codellama70b")  # fmt: skip
"""Those that the tests name."""
_SECONDS_PER_CASE = 60
_NOT_RUN = {
    "test_embedding": "embeddings",
    "test_rerank": "ranking",
    "test_vision_api": "images",
    "test_lora": "llama.cpp's LoRA files",
    "test_slot_save": "slots saved to files",
    "test_kv_keep_only_active": "slots saved to files",
    "test_speculative": "a draft model",
    "test_mcp_servers": "llama-server's own tools and MCP",
    "test_tools_builtin": "llama-server's own tools and MCP",
    "test_proxy": "llama-server's own tools and MCP",
    "test_router": "llama-server's router of processes",
    "test_stream": "llama-server's router of processes",
    "test_sleep": "llama-server's sleep",
    "test_compat_gcp": "Google's /predict",
}
"""Files of tests, and what they are about that is not here."""
_LARGE_MODEL = {
    r"::test_(weather|calc_result|thoughts|hello_world|completion_stream_with_openai_library_st)": (
        "expects the sense of a model of gigabytes"
    ),
    r"::test_anthropic_thinking_with_reasoning_model": "a model that reasons",
}
"""Cases that no model answers as expected but a large one, which would have to be downloaded. Of
those that llama.cpp has downloads for, the others hold for any model."""
_TEMPLATES = {
    r"test_anthropic_thinking_history": "Qwen-Qwen3-0.6B",
    r"_real_model\[.*-chatml-": "chatml",
    r"_real_model\[.*/Meta-Llama-3\.1": "meta-llama-Llama-3.1-8B-Instruct",
    r"_real_model\[.*/gemma-2": "google-gemma-2-2b-it",
    r"_real_model\[.*/Phi-3\.5": "microsoft-Phi-3.5-mini-instruct",
    r"_real_model\[.*/Qwen2\.5": "Qwen-Qwen2.5-7B-Instruct",
    r"_real_model\[.*/Hermes-2-Pro": "NousResearch-Hermes-2-Pro-Llama-3-8B-tool_use",
    r"_real_model\[.*/Hermes-3": "NousResearch-Hermes-3-Llama-3.1-8B-tool_use",
    r"_real_model\[.*/functionary": "meetkai-functionary-medium-v3.2",
    r"_real_model\[.*/Llama-3\.2": "meta-llama-Llama-3.2-3B-Instruct",
    r"_real_model\[.*/DeepSeek-R1": "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
}
"""Chat templates that are not in a case's name; the first that matches counts. Where a case names
a model, it is the one that this model comes with, or that the case gives it."""
_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""The template that llama-server knows by this name."""
_NOT_APPLICABLE = {
    r"test_(chat_)?completion(_stream)?\[.*assert \d+ == \d+|test_completion_prompt_cache": (
        "counts or names tokens of its own model"
    ),
    r"cached_tokens.*assert \d+ == \d+|unified.*assert \d+ == \d+|tokenize_with_bos|'<s> ": (
        "counts or names tokens of its own model"
    ),
    r"stream_vs_non_stream|test_completion_with_tokens_input": (
        "llama-server's `--seed` and `--temp`, for requests that have none"
    ),
    r"test_nocache_long_input_prompt|test_ctx_shift_(enabled|disabled_short_prompt\[-1|.*long)": (
        "contexts of llama-server's own size, shifted"
    ),
    r"test_infill_with|test_with_qwen_model": (
        "filling gaps, for which the example model has no tokens"
    ),
    r"test_metrics_(disabled|prometheus|prompt_processed|predicted_total|embedding)": (
        "llama.cpp's names of metrics; here they are vLLM's"
    ),
    r"test_metrics_timings_on_prompt_progress": "`return_progress`: refused",
    r"test_n_probs_post.*assert 400 == 200": "`post_sampling_probs`: refused",
    r"test_ignore_eos_populates": "`ignore_eos` as biases of the tokens that end a text",
    r"test_cors_o.*'Access-Control": "names of headers in capitals; here they are in small letters",
    r"test_cors_origins_localhost_rejects.*403 == 200": "pages of other sites are refused by 403",
    r"test_reasoning.*Expected prompt|test_date_inside_prompt": (
        "variables of templates that llama.cpp adds to transformers'"
    ),
    r"match_regex": "expects words of its own model",
    r"assert '' is None|Expected non empty content delta": (
        "the first event of a stream has an empty content, as OpenAI's; llama-server's has null"
    ),
    r"__verbose": "llama-server's `__verbose`, for debugging",
    r"(timings_per_token|return_progress) is not supported|with_llama_telemetry": (
        "llama-server's telemetry in OpenAI's interface: refused"
    ),
    r"exceed_context_size_error": "the error has llama-server's numbers, and OpenAI's type",
    r"authentication_error": "the error has OpenAI's type",
    r"test_invalid_chat_completion_req\[messages7\]": (
        "two answers in a row: the chat template decides"
    ),
    r"(tool_result_with_image|vision_format).*400 == 500": "an image is refused by 400, not by 500",
    r"huggingface": "downloads",
    r"test_anthropic_empty_messages": "no messages: refused, as Anthropic does",
    r"test_server_models|test_server_model_aliases": "one model; here aliases are listed, too",
    r"test_server_multiple_addresses|test_no_ui|test_load_split_model": "options of llama-server",
    r"test_server_props": "a file of llama.cpp's format",
    r"test_server_slots|test_cancel_request|test_metrics_slots": "`/slots`: refused",
    r"test_correct_api_key": "`/completions` without `/v1` is OpenAI's here, not llama-server's",
    r"test_access_static_assets|test_cors_proxy": "llama-server's own pages",
    r"test_local_media_file": "images",
    r"test_apply_chat_template": "a chat template that llama-server knows by name",
}
"""What a case is called, and what its failure says: why it does not apply."""
_ORIGINS = (
    *("localhost", "web.mydomain.fr", "origin", "http://localhost", "http://localhost:8080"),
    *("http://127.0.0.1", "http://127.0.0.1:3000", "http://[::1]", "http://[::1]:3000"),
)
"""Pages that the tests let ask."""


@dataclass
class Group:
    """Cases that one server answers."""

    arguments: Sequence[str | Path] = ()
    template: Path | None = None
    cases: list[str] = field(default_factory=list)


def run(outside: Outside, sdist: Path | None) -> Report:
    """Raises SuiteError."""
    source = outside.source("llama_cpp_python", VERSION, sdist) / "vendor/llama.cpp"
    tests = source / "tools/server/tests"
    python = outside.python("llama", _PACKAGES)
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    listed = outside.run([*pytest, "--collect-only", "unit"], cwd=tests)
    left = [*not_run(_ids(listed))]
    skipped = {f"{case.file.replace('.', '/')}.py::{case.name}" for case in left}
    chosen = [id_ for id_ in _ids(listed) if id_ not in skipped]
    chatml = outside.folder / "chatml.jinja"
    chatml.write_text(_CHATML)
    templates = [chatml, *(source / "models/templates").glob("*.jinja")]
    groups = groups_of(chosen, templates, _keys(outside.folder))
    cases = list(left)
    for name, group in groups.items():
        outside.say(f"running its tests: {name}")
        report = outside.folder / "llama.xml"
        aliases = [part for model in _MODELS for part in ("--alias", f"{model}={MODEL}")]
        arguments = [*aliases, *group.arguments]
        with outside.served(*arguments, template=group.template) as server:
            port = server.url.rpartition(":")[2]
            outside.run_tests(
                [*pytest, f"--timeout={_SECONDS_PER_CASE}", f"--junitxml={report}", *group.cases],
                cwd=tests,
                environment={"DEBUG_EXTERNAL": "1", "PORT": port},
            )
        cases += read_cases(report, _NOT_APPLICABLE)
    return Report("llama.cpp's server tests, of llama-cpp-python", VERSION, cases)


def not_run(ids: Sequence[str]) -> Iterator[Case]:
    """Those of ``ids`` that are not tried, with the reason."""
    for id_ in ids:
        path, _, name = id_.partition("::")
        file = path.removesuffix(".py").replace("/", ".")
        large = (why for what, why in _LARGE_MODEL.items() if re.search(what, id_))
        reason = _NOT_RUN.get(Path(path).stem) or next(large, None)
        if reason is not None:
            yield Case(file, name, Outcome.NOT_APPLICABLE, reason)


def _ids(listed: str) -> list[str]:
    return [line for line in listed.splitlines() if re.match(r"unit/test_\w+\.py::", line)]


def groups_of(ids: Sequence[str], templates: Sequence[Path], keys: Path) -> dict[str, Group]:
    """By what the server has: a case's chat template, ``keys``, or only the example model."""
    # Names may begin with others.
    named = {path.stem: path for path in sorted(templates, key=lambda path: -len(path.stem))}
    origins = [part for origin in _ORIGINS for part in ("--cors-origin", origin)]
    groups: dict[str, Group] = {}
    for id_ in ids:
        template = next((name for name in named if f"[{name}-" in id_), None)
        others = (name for what, name in _TEMPLATES.items() if re.search(what, id_))
        template = next(others, template)
        if template is not None:
            group = groups.setdefault(f"template {template}", Group(template=named[template]))
        elif "test_security" in id_:
            group = groups.setdefault("with a key", Group(("--keys", keys, *origins)))
        else:
            group = groups.setdefault("the example model", Group())
        group.cases.append(id_)
    return groups


def _keys(folder: Path) -> Path:
    path = folder / "keys.toml"
    path.write_text(f'[keys.suite]\nsha256 = "{digest(_KEY)}"\n')
    return path
