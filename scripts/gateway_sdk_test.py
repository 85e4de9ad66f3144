#!/usr/bin/env python3
"""Uses the gateway through the official SDKs of OpenAI, Anthropic and Google, as its users do, and says what does not hold.

    scripts/gateway_sdk_test.py
    scripts/gateway_sdk_test.py --neurond target/release/neurond --fake target/release/examples/fake_upstream
    scripts/gateway_sdk_test.py --only errors,compat

Starts the fake upstream (`cargo build --release --example fake_upstream`) and the daemon in front of it, both on free ports of
loopback, with a configuration of its own in a temporary folder. The SDKs are installed into `.venv/gateway-sdk`, once, in the
versions below. Each check is a function whose name is what it proves: a line each, exit code 1 if one does not hold.

    SDK --> neurond /v1/{account}/{gateway}/{provider} --> fake upstream: answers `{provider} {model} heard: {last words}`

What a provider does wrong is told to the fake by the header `x-fake` of native calls, and by scripts for all others
(`tests/upstream/behaviour.rs`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SDKS = ["openai==3.57.0", "anthropic==2.14.0", "google-genai==3.6.1"]

ACCOUNT = "0123456789abcdef0123456789abcdef"
TOKEN = "token-of-the-gateway"
# What callers bring themselves, and what the gateway has stored for those who bring nothing.
OWN, STORED = "key-of-the-caller", "key-in-the-config"
PROVIDERS = ["openai", "anthropic", "google-ai-studio", "cohere", "groq", "mistral", "deepseek", "perplexity-ai", "azure-openai"]
# Models of the unified surface: those that have to be translated, and some that do not.
MODELS = ["openai/gpt-x", "anthropic/claude-x", "google-ai-studio/gemini-x", "cohere/command-x", "groq/llama-x",
          "mistral/small-x", "aws-bedrock/anthropic.claude-x-v1:0"]
LOCAL = "@cf/meta/llama-3.2-1b-instruct"

ASK = "What do lighthouses do?"
MESSAGES = [{"role": "user", "content": ASK}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["C", "F"]}},
    "required": ["city", "unit"],
}
ASK_WEATHER = "What is the weather in Oslo?"
WEATHER = {"city": "Oslo", "unit": "C"}


def run_with_sdks() -> None:
    """Goes on in an interpreter that has the SDKs."""
    home = ROOT / ".venv" / "gateway-sdk"
    python = home / "bin" / "python"
    if Path(sys.prefix) == home:
        return
    mark = home / "installed"
    if not mark.exists() or mark.read_text() != "\n".join(SDKS):
        print(f"installing {', '.join(SDKS)} into {home.relative_to(ROOT)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *SDKS], check=True)
        mark.write_text("\n".join(SDKS))
    os.execv(python, [str(python), __file__, *sys.argv[1:]])


if __name__ == "__main__":
    run_with_sdks()

import anthropic  # noqa: E402
import openai  # noqa: E402
from google import genai  # noqa: E402
from google.genai import errors as google_errors  # noqa: E402
from google.genai import types as google_types  # noqa: E402


class Process:
    """A program that runs until this one ends; what it writes to stderr is kept."""

    def __init__(self, name: str, command: list, **options) -> None:
        self.name = name
        self.child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
        )
        self.log: list[str] = []
        threading.Thread(target=self.read_log, daemon=True).start()

    def read_log(self) -> None:
        for line in self.child.stderr:
            self.log.append(line.rstrip())

    def fail(self, why: str) -> None:
        self.stop()
        sys.exit("\n".join([f"{self.name}: {why}; its last lines:", *self.log[-20:]]))

    def stop(self) -> None:
        self.child.terminate()
        try:
            self.child.wait(20)
        except subprocess.TimeoutExpired:
            self.child.kill()


class Fake(Process):
    """The upstream."""

    def __init__(self, program: Path) -> None:
        super().__init__("the fake upstream", [program])
        line = self.child.stdout.readline()
        if not line:
            self.fail("it did not start")
        self.url = json.loads(line)["url"]

    def requests(self) -> list[dict]:
        """What came since the last `clear`."""
        return fetch(f"{self.url}/_fake/requests")["requests"]

    def last(self) -> dict:
        """The last request, its headers by small names, its body as JSON if it is some."""
        request = self.requests()[-1]
        request["headers"] = {name.lower(): value for name, value in request["headers"]}
        try:
            request["body"] = json.loads(request["body"])
        except ValueError:
            pass
        return request

    def script(self, provider: str, *behaviours: str) -> None:
        fetch(f"{self.url}/_fake/script", {"path": f"/{provider}/", "behaviours": behaviours})

    def clear(self) -> None:
        fetch(f"{self.url}/_fake/clear", {})

    def wait_closed_early(self) -> dict:
        end = time.monotonic() + 10
        while True:
            closed = [request for request in self.requests() if request["closed_early"]]
            if closed:
                return closed[0]
            assert time.monotonic() < end, "the upstream never saw that the caller had hung up"
            time.sleep(0.01)


class Daemon(Process):
    """neurond, with every provider's address at the fake."""

    def __init__(self, program: Path, folder: Path, fake: Fake) -> None:
        config = folder / "neurond.toml"
        config.write_text(self.config(fake.url))
        bedrock = {"accessKeyId": "AKIDEXAMPLE", "secretAccessKey": STORED, "region": "us-east-1"}
        keys = {"KEY_FOR_TEST": STORED, "AWS_KEY_FOR_TEST": json.dumps(bedrock)}
        super().__init__(
            "neurond", [program, "serve", "--config", config], env={**os.environ, **keys, "STATE_DIRECTORY": str(folder / "state")}
        )
        # Nobody reads it.
        self.child.stdout.close()
        self.root = f"http://{self.wait_for('listening')['address']}"
        self.wait_for("ready")

    @staticmethod
    def config(upstream: str) -> str:
        parts = [
            '[server]\nlisten = "127.0.0.1:0"\n[log]\nformat = "json"\n',
            f'[[auth.token]]\nid = "test"\nsha256 = "{hashlib.sha256(TOKEN.encode()).hexdigest()}"\naccount = "{ACCOUNT}"\n',
            f'[[model]]\nid = "{LOCAL}"\npath = "sim:end_in=0,step_us=200"\ncontext = 4096\n',
            # The second one tries once more when a provider fails.
            f'[[gateway]]\nid = "plain"\n[[gateway]]\nid = "tries"\nretry_max_attempts = 3\nretry_delay = 1\nretry_backoff = "constant"\n',
        ]
        for slug in [*PROVIDERS, "aws-bedrock"]:
            key = "AWS_KEY_FOR_TEST" if slug == "aws-bedrock" else "KEY_FOR_TEST"
            parts.append(
                f'[[provider]]\nslug = "{slug}"\nbase_url = "{upstream}/{slug}"\nallow_private = true\nkey = {{ env = "{key}" }}\n'
            )
        return "".join(parts)

    def wait_for(self, message: str) -> dict:
        end = time.monotonic() + 60
        while time.monotonic() < end and self.child.poll() is None:
            for line in list(self.log):
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                fields = {**entry, **entry.get("fields", {})}
                if fields.get("message") == message:
                    return fields
            time.sleep(0.02)
        self.fail(f"it never said {message!r}")
        raise AssertionError


class Bench:
    """What a check needs: clients of all kinds, and a look at what reached the upstream."""

    def __init__(self, daemon: Daemon, fake: Fake) -> None:
        self.daemon, self.fake = daemon, fake
        self.auth = {"cf-aig-authorization": f"Bearer {TOKEN}"}
        self.openai = self.openai_at("openai")
        self.compat = self.openai_at("compat")
        self.unkeyed = self.openai_at("compat")
        self.anthropic = self.anthropic_at(self.base("anthropic"), api_key=OWN)
        self.google = genai.Client(
            api_key=OWN,
            http_options=google_types.HttpOptions(
                base_url=self.base("google-ai-studio"), api_version="v1beta", headers=self.auth, timeout=30_000,
                retry_options=google_types.HttpRetryOptions(attempts=1),
            ),
        )

    def base(self, provider: str, gateway: str = "plain") -> str:
        return f"{self.daemon.root}/v1/{ACCOUNT}/{gateway}/{provider}"

    def openai_at(self, provider: str, gateway: str = "plain", headers: dict | None = None) -> openai.OpenAI:
        headers = self.auth if headers is None else headers
        return openai.OpenAI(
            base_url=self.base(provider, gateway), api_key=OWN, default_headers=headers, max_retries=0, timeout=30
        )

    def compat_for(self, provider: str) -> openai.OpenAI:
        """The client for a provider's models. To Bedrock nothing is brought, so that the gateway signs with what it has."""
        return self.unkeyed if provider == "aws-bedrock" else self.compat

    def anthropic_at(self, base: str, **options) -> anthropic.Anthropic:
        return anthropic.Anthropic(base_url=base, default_headers=self.auth, max_retries=0, timeout=30, **options)

    def chat(self, client: openai.OpenAI | None = None, **fields):
        fields = {"model": "gpt-x", "messages": MESSAGES} | fields
        if client is self.unkeyed:
            fields["extra_headers"] = {"Authorization": openai.Omit()} | fields.get("extra_headers", {})
        return (client or self.openai).chat.completions.create(**fields)

    def message(self, client: anthropic.Anthropic | None = None, **fields):
        fields = {"model": "claude-x", "max_tokens": 100, "messages": MESSAGES} | fields
        return (client or self.anthropic).messages.create(**fields)

    def google_headers(self, fake: str) -> google_types.GenerateContentConfig:
        return google_types.GenerateContentConfig(http_options=google_types.HttpOptions(headers={"x-fake": fake}))


def fetch(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(url, data=data), timeout=10) as answer:
        return json.load(answer)


def raised(call, *kinds: type[Exception]) -> Exception:
    """The exception of exactly one of these classes that a call ends with."""
    try:
        result = call()
    except Exception as error:
        assert type(error) in kinds, f"expected {[kind.__name__ for kind in kinds]}, not {type(error).__name__}: {error}"
        return error
    raise AssertionError(f"expected {[kind.__name__ for kind in kinds]}, but it answered {result}")


def said(provider: str, model: str, words: str = ASK) -> str:
    return f"{provider} {model} heard: {words}"


def same(have, expected) -> None:
    assert have == expected, f"\n  have     {have!r}\n  expected {expected!r}"


def text_of(chunks) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def finish_of(chunks) -> list[str]:
    return [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]


def calls_of(chunks) -> list[tuple[str, dict]]:
    calls: dict[int, dict] = {}
    for delta in (delta for chunk in chunks for choice in chunk.choices for delta in choice.delta.tool_calls or []):
        call = calls.setdefault(delta.index, {"name": "", "arguments": "", "id": delta.id})
        assert call["id"], "a call begins without an id"
        call["name"] += delta.function.name or ""
        call["arguments"] += delta.function.arguments or ""
    return [(call["name"], json.loads(call["arguments"])) for call in calls.values()]


# OpenAI's SDK on OpenAI's own surface.


def openai_chat_is_passed_on_and_the_gateways_headers_are_not(bench: Bench) -> None:
    answer = bench.chat(extra_headers={"cf-aig-metadata": '{"team":"x"}', "x-mine": "1"}, extra_body={"unknown_field": [1.50]})
    same(answer.choices[0].message.content, said("openai", "gpt-x"))
    same(answer.usage.prompt_tokens, len(ASK.split()))
    seen = bench.fake.last()
    same(seen["headers"]["authorization"], f"Bearer {OWN}")
    same(seen["headers"]["x-mine"], "1")
    same([name for name in seen["headers"] if name.startswith(("cf-aig", "cf-"))], [])
    same(seen["body"]["unknown_field"], [1.5])


def openai_streams_come_in_pieces_and_say_the_same(bench: Bench) -> None:
    started = time.monotonic()
    stream = bench.chat(stream=True, stream_options={"include_usage": True}, extra_headers={"x-fake": "gap=60"})
    chunks, first = [], None
    for chunk in stream:
        chunks.append(chunk)
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.monotonic() - started
    whole = time.monotonic() - started
    same(text_of(chunks), said("openai", "gpt-x"))
    same(finish_of(chunks), ["stop"])
    same(chunks[-1].usage.completion_tokens, len(said("openai", "gpt-x").split()))
    assert first < whole / 2, f"the first piece came after {first:.3f} s of {whole:.3f}"


def openai_calls_tools_whole_and_streamed(bench: Bench, client: openai.OpenAI | None = None, model: str = "gpt-x") -> None:
    tool = {"type": "function", "function": {"name": "weather", "description": "The weather.", "parameters": SCHEMA}}
    ask = {"model": model, "messages": [{"role": "user", "content": ASK_WEATHER}], "tools": [tool], "max_tokens": 100}
    choice = bench.chat(client, **ask).choices[0]
    (call,) = choice.message.tool_calls
    same((call.function.name, json.loads(call.function.arguments)), ("weather", WEATHER))
    same(choice.finish_reason, "tool_calls")
    chunks = list(bench.chat(client, **ask, stream=True))
    same(calls_of(chunks), [("weather", WEATHER)])
    same(finish_of(chunks), ["tool_calls"])
    # The result goes back, and is what was heard last.
    result = {"role": "tool", "tool_call_id": call.id, "content": "snow and wind"}
    ask["messages"] = [*ask["messages"], choice.message.model_dump(exclude_none=True), result]
    heard = bench.chat(client, **ask).choices[0].message.content
    assert heard and "snow and wind" in heard, heard


def openai_responses_answer_stream_and_call(bench: Bench) -> None:
    responses = bench.openai.responses
    answer = responses.create(model="gpt-x", input=ASK)
    same(answer.output_text, said("openai", "gpt-x"))
    events = list(responses.create(model="gpt-x", input=ASK, stream=True))
    same("".join(event.delta for event in events if event.type == "response.output_text.delta"), answer.output_text)
    same((events[0].type, events[-1].type), ("response.created", "response.completed"))
    tool = {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": False}
    answer = responses.create(model="gpt-x", input=ASK_WEATHER, tools=[tool])
    (call,) = [item for item in answer.output if item.type == "function_call"]
    same(json.loads(call.arguments), WEATHER)


def openai_embeddings_are_vectors(bench: Bench) -> None:
    answer = bench.openai.embeddings.create(model="embed-x", input=["one", "two words"])
    same([entry.embedding[1] for entry in answer.data], [1.0, 2.0])


def openai_models_are_listed(bench: Bench) -> None:
    same([model.id for model in bench.openai.models.list()], ["fake-large", "fake-small"])


def openai_errors_are_those_of_the_provider(bench: Bench) -> None:
    for fake, kind in [
        ("400", openai.BadRequestError),
        ("401", openai.AuthenticationError),
        ("402", openai.APIStatusError),
        ("403", openai.PermissionDeniedError),
        ("404", openai.NotFoundError),
        ("429; retry-after=7", openai.RateLimitError),
        ("500", openai.InternalServerError),
        ("503; retry-after-ms=20", openai.InternalServerError),
    ]:
        for stream in (False, True):
            error = raised(lambda: bench.chat(stream=stream, extra_headers={"x-fake": fake}), kind)
            same(error.status_code, int(fake[:3]))
            assert error.body and "message" in error.body, f"{fake}: the provider's body did not come: {error}"
            for name, value in [("retry-after", "7"), ("retry-after-ms", "20")]:
                if f"{name}={value}" in fake:
                    same(error.response.headers.get(name), value)


def openai_hears_of_an_upstream_that_gives_no_answer(bench: Bench) -> None:
    for fake in ["reset", "close-early", "garbage", "reset-after=0"]:
        error = raised(
            lambda: bench.chat(extra_headers={"x-fake": fake}), openai.InternalServerError, openai.APIConnectionError
        )
        if isinstance(error, openai.InternalServerError):
            same(error.response.json()["internalCode"], 2005)


def openai_hears_of_a_stream_that_breaks_off(bench: Bench) -> None:
    for fake in ["reset-after=3", "close-after=3", "error-after=3"]:
        chunks = []

        def read() -> None:
            for chunk in bench.chat(stream=True, extra_headers={"x-fake": fake}):
                chunks.append(chunk)

        # An error event, not just a connection that ends.
        raised(read, openai.APIError)
        same(text_of(chunks), "openai gpt-x heard: ")
        same(finish_of(chunks), [])


def a_caller_that_hangs_up_ends_the_upstreams_work(bench: Bench) -> None:
    stream = bench.chat(stream=True, extra_headers={"x-fake": "gap=10; chunks=3000"})
    for _, _ in zip(range(4), stream):
        pass
    stream.close()
    closed = bench.fake.wait_closed_early()["closed_early"]
    assert closed["chunks"] < 300, closed
    bench.fake.clear()
    # Before the first byte, too.
    patient = bench.openai.with_options(timeout=0.5)
    raised(lambda: bench.chat(patient, extra_headers={"x-fake": "hang"}), openai.APITimeoutError)
    same(bench.fake.wait_closed_early()["closed_early"]["chunks"], 0)


def the_gateways_headers_say_what_it_did(bench: Bench) -> None:
    raw = bench.openai.chat.completions.with_raw_response.create(model="gpt-x", messages=MESSAGES)
    same(raw.headers["cf-aig-cache-status"], "MISS")
    same(len(raw.headers["cf-aig-log-id"]), 26)
    same((raw.headers["cf-aig-step"], raw.headers["cf-aig-provider"]), ("0", "openai"))
    same(raw.headers["openai-processing-ms"], "1")


def a_cached_answer_is_given_again_whole_and_streamed(bench: Bench) -> None:
    for stream in (False, True):
        ask = [{"role": "user", "content": f"Keep this, stream {stream}, {time.time_ns()}"}]
        said, statuses = [], []
        for _ in range(2):
            raw = bench.openai.chat.completions.with_raw_response.create(
                model="gpt-x", messages=ask, stream=stream, extra_headers={"cf-aig-cache-ttl": "600"}
            )
            statuses.append(raw.headers["cf-aig-cache-status"])
            answer = raw.parse()
            said.append(text_of(answer) if stream else answer.choices[0].message.content)
        same(statuses, ["MISS", "HIT"])
        same(said[0], said[1])
    same(len(bench.fake.requests()), 2)


def a_gateway_that_tries_again_hides_a_failure(bench: Bench) -> None:
    bench.fake.script("openai", "503", "reset", "ok")
    same(text_of(bench.chat(bench.openai_at("openai", "tries"), stream=True)), said("openai", "gpt-x"))
    same(len(bench.fake.requests()), 3)


def without_the_gateways_token_there_is_nothing(bench: Bench) -> None:
    for headers in ({}, {"cf-aig-authorization": "Bearer wrong"}):
        error = raised(lambda: bench.chat(bench.openai_at("openai", headers=headers)), openai.AuthenticationError)
        same(error.response.json()["internalCode"], 2009)
    same(bench.fake.requests(), [])


# Anthropic's SDK on Anthropic's own surface.


def anthropic_messages_are_passed_on(bench: Bench) -> None:
    answer = bench.message(system="Be brief.")
    same(answer.content[0].text, said("anthropic", "claude-x"))
    same((answer.usage.input_tokens, answer.stop_reason), (len(ASK.split()) + 2, "end_turn"))
    headers = bench.fake.last()["headers"]
    assert OWN in (headers.get("x-api-key", ""), headers.get("authorization", "").removeprefix("Bearer ")), headers
    assert "anthropic-version" in headers and "cf-aig-authorization" not in headers, headers


def anthropic_streams_say_the_same(bench: Bench) -> None:
    ask = {"model": "claude-x", "max_tokens": 100, "messages": MESSAGES}
    with bench.anthropic.messages.stream(**ask) as stream:
        same("".join(stream.text_stream), said("anthropic", "claude-x"))
        message = stream.get_final_message()
    same((message.stop_reason, message.usage.output_tokens), ("end_turn", len(said("anthropic", "claude-x").split())))


def anthropic_calls_tools_whole_and_streamed(bench: Bench, client: anthropic.Anthropic | None = None, model: str = "claude-x") -> None:
    ask = {"model": model, "max_tokens": 100, "messages": [{"role": "user", "content": ASK_WEATHER}]}
    ask["tools"] = [{"name": "weather", "description": "The weather.", "input_schema": SCHEMA}]
    answer = bench.message(client, **ask)
    (call,) = [block for block in answer.content if block.type == "tool_use"]
    same((call.name, call.input, answer.stop_reason), ("weather", WEATHER, "tool_use"))
    with (client or bench.anthropic).messages.stream(**ask) as stream:
        message = stream.get_final_message()
    same([block.input for block in message.content if block.type == "tool_use"], [WEATHER])
    same(message.stop_reason, "tool_use")
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "snow and wind"}]}
    said_before = {"role": "assistant", "content": [block.model_dump(exclude_none=True) for block in answer.content]}
    ask["messages"] = [*ask["messages"], said_before, result]
    texts = [block.text for block in bench.message(client, **ask).content if block.type == "text"]
    assert "snow and wind" in "".join(texts), texts


def anthropic_counts_tokens(bench: Bench) -> None:
    same(bench.anthropic.messages.count_tokens(model="claude-x", messages=MESSAGES).input_tokens, len(ASK.split()))


def anthropic_errors_are_those_of_the_provider(bench: Bench) -> None:
    for status, kind, word in [
        (400, anthropic.BadRequestError, "invalid_request_error"),
        (401, anthropic.AuthenticationError, "authentication_error"),
        (403, anthropic.PermissionDeniedError, "permission_error"),
        (404, anthropic.NotFoundError, "not_found_error"),
        (429, anthropic.RateLimitError, "rate_limit_error"),
        (500, anthropic.InternalServerError, "api_error"),
    ]:
        error = raised(lambda: bench.message(extra_headers={"x-fake": f"{status}; retry-after=3"}), kind)
        same((error.status_code, error.body["error"]["type"]), (status, word))
        same(error.response.headers["retry-after"], "3")
    try:
        bench.message(extra_headers={"x-fake": "529"})
        raise AssertionError("529 was taken for an answer")
    except anthropic.APIStatusError as error:
        same((error.status_code, error.body["error"]["type"]), (529, "overloaded_error"))


def anthropic_hears_of_a_stream_that_breaks_off(bench: Bench) -> None:
    for fake in ["reset-after=3", "close-after=3", "error-after=3"]:
        texts, ends = [], []
        try:
            for event in bench.message(stream=True, extra_headers={"x-fake": fake}):
                if event.type == "content_block_delta":
                    texts.append(event.delta.text)
                if event.type in ("message_delta", "message_stop"):
                    ends.append(event)
            raise AssertionError(f"{fake}: the stream ended as if it were whole")
        except anthropic.APIError:
            pass
        same(("".join(texts), ends), ("anthropic claude-x heard: ", []))


# Google's SDK on AI Studio's surface.


def google_content_is_passed_on_and_streamed(bench: Bench) -> None:
    answer = bench.google.models.generate_content(model="gemini-x", contents=ASK)
    same(answer.text, said("google-ai-studio", "gemini-x"))
    same(answer.usage_metadata.prompt_token_count, len(ASK.split()))
    same(bench.fake.last()["headers"]["x-goog-api-key"], OWN)
    chunks = list(bench.google.models.generate_content_stream(model="gemini-x", contents=ASK))
    same("".join(chunk.text or "" for chunk in chunks), answer.text)
    assert len(chunks) > 4, "the stream came in one piece"


def google_calls_tools(bench: Bench) -> None:
    function = google_types.FunctionDeclaration(name="weather", description="The weather.", parameters_json_schema=SCHEMA)
    config = google_types.GenerateContentConfig(
        tools=[google_types.Tool(function_declarations=[function])],
        automatic_function_calling=google_types.AutomaticFunctionCallingConfig(disable=True),
    )
    answer = bench.google.models.generate_content(model="gemini-x", contents=ASK_WEATHER, config=config)
    same([(call.name, call.args) for call in answer.function_calls], [("weather", WEATHER)])


def google_embeds_and_counts(bench: Bench) -> None:
    same(bench.google.models.count_tokens(model="gemini-x", contents=ASK).total_tokens, len(ASK.split()))
    answer = bench.google.models.embed_content(model="embed-x", contents=["two words"])
    same(answer.embeddings[0].values[1], 2.0)


def google_errors_are_those_of_the_provider(bench: Bench) -> None:
    for status, kind, word in [
        (400, google_errors.ClientError, "INVALID_ARGUMENT"),
        (403, google_errors.ClientError, "PERMISSION_DENIED"),
        (429, google_errors.ClientError, "RESOURCE_EXHAUSTED"),
        (500, google_errors.ServerError, "INTERNAL"),
        (503, google_errors.ServerError, "UNAVAILABLE"),
    ]:
        config = bench.google_headers(str(status))
        ask = {"model": "gemini-x", "contents": ASK, "config": config}
        error = raised(lambda: bench.google.models.generate_content(**ask), kind)
        same((error.code, error.status), (status, word))
        error = raised(lambda: list(bench.google.models.generate_content_stream(**ask)), kind)
        same(error.code, status)


# OpenAI's SDK for everybody's models.


def compat_says_the_same_for_every_provider_whole_and_streamed(bench: Bench) -> None:
    for name in MODELS:
        provider, model = name.split("/", 1)
        ask = {"model": name, "max_tokens": 100, "messages": [{"role": "system", "content": "Be brief."}, *MESSAGES]}
        answer = bench.chat(bench.compat_for(provider), **ask)
        expected = said(provider, model)
        same((name, answer.choices[0].message.content, answer.choices[0].finish_reason), (name, expected, "stop"))
        tokens = (len(ASK.split()) + 2, len(expected.split()))
        same((name, answer.usage.prompt_tokens, answer.usage.completion_tokens), (name, *tokens))
        chunks = list(bench.chat(bench.compat_for(provider), **ask, stream=True, stream_options={"include_usage": True}))
        same((name, text_of(chunks), finish_of(chunks)), (name, expected, ["stop"]))
        usage = [chunk.usage for chunk in chunks if chunk.usage][-1]
        same((name, usage.prompt_tokens, usage.completion_tokens), (name, *tokens))
        same((name, len({chunk.id for chunk in chunks})), (name, 1))
        # Usage is not sent to who did not ask for it, however it was found out.
        unasked = list(bench.chat(bench.compat_for(provider), **ask, stream=True))
        same((name, [chunk for chunk in unasked if not chunk.choices]), (name, []))


def compat_gives_each_provider_its_key_in_its_own_header(bench: Bench) -> None:
    for name in MODELS:
        provider = name.split("/")[0]
        bench.chat(bench.compat_for(provider), model=name, max_tokens=10)
        headers = bench.fake.last()["headers"]
        if provider == "aws-bedrock":
            assert headers["authorization"].startswith("AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE/"), headers
            assert "x-amz-date" in headers, headers
            continue
        own = {"anthropic": "x-api-key", "google-ai-studio": "x-goog-api-key"}.get(provider, "authorization")
        same((name, headers[own].removeprefix("Bearer ")), (name, OWN))
        assert own == "authorization" or "authorization" not in headers, headers


def compat_calls_tools_of_every_provider(bench: Bench) -> None:
    for name in MODELS:
        try:
            openai_calls_tools_whole_and_streamed(bench, bench.compat_for(name.split("/")[0]), name)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def compat_streams_several_calls_behind_words(bench: Bench) -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
    ask = {"messages": [{"role": "user", "content": ASK_WEATHER}], "tools": [tool], "max_tokens": 100, "stream": True}
    for name in MODELS:
        provider = name.split("/")[0]
        bench.fake.script(provider, "calls=2; talk")
        chunks = list(bench.chat(bench.compat_for(provider), model=name, **ask))
        same((name, calls_of(chunks)), (name, [("weather", WEATHER)] * 2))
        # Cohere's words before a call are a plan, which has no place in OpenAI's answer.
        if provider != "cohere":
            same((name, text_of(chunks)), (name, "Let me look."))


def compat_ends_with_length_at_the_limit(bench: Bench) -> None:
    for name in MODELS:
        provider, model = name.split("/", 1)
        client = bench.compat_for(provider)
        choice = bench.chat(client, model=name, max_tokens=2).choices[0]
        same((name, choice.message.content, choice.finish_reason), (name, f"{provider} {model} ", "length"))
        chunks = list(bench.chat(client, model=name, max_tokens=2, stream=True))
        same((name, text_of(chunks), finish_of(chunks)), (name, f"{provider} {model} ", ["length"]))


def compat_errors_keep_their_status_whatever_the_provider(bench: Bench) -> None:
    for name in MODELS:
        provider = name.split("/")[0]
        for status, kind in [(400, openai.BadRequestError), (429, openai.RateLimitError), (500, openai.InternalServerError)]:
            for stream in (False, True):
                bench.fake.script(provider, f"{status}; retry-after=3")
                ask = {"model": name, "max_tokens": 10, "stream": stream}
                error = raised(lambda: bench.chat(bench.compat_for(provider), **ask), kind)
                same((name, error.status_code, error.response.headers.get("retry-after")), (name, status, "3"))


def compat_hears_of_streams_that_break_off(bench: Bench) -> None:
    for name in MODELS:
        provider, model = name.split("/", 1)
        for fake in ["reset-after=3", "close-after=3", "error-after=3", "garbage-after=3"]:
            bench.fake.clear()
            bench.fake.script(provider, fake)
            chunks = []

            def read() -> None:
                for chunk in bench.chat(bench.compat_for(provider), model=name, max_tokens=100, stream=True):
                    chunks.append(chunk)

            if fake == "garbage-after=3" and provider in ("openai", "groq", "mistral"):
                # It speaks the caller's dialect: what is garbage is the caller's to say.
                continue
            try:
                raised(read, openai.APIError)
            except AssertionError as error:
                raise AssertionError(f"{name}, {fake}: {error}") from error
            same((name, fake, text_of(chunks), finish_of(chunks)), (name, fake, f"{provider} {model} heard: ", []))


def compat_serves_the_local_models_as_well(bench: Bench) -> None:
    answer = bench.chat(bench.compat, model=f"workers-ai/{LOCAL}", max_tokens=8)
    assert answer.choices[0].message.content and answer.usage.completion_tokens > 0, answer
    chunks = list(bench.chat(bench.compat, model=f"workers-ai/{LOCAL}", max_tokens=8, stream=True))
    assert text_of(chunks) and len(finish_of(chunks)) == 1, chunks
    same(bench.fake.requests(), [])


# The surfaces that know accounts by their token; providers get the stored keys.


def rest_chat_uses_stored_keys(bench: Bench) -> None:
    client = openai.OpenAI(
        base_url=f"{bench.daemon.root}/client/v4/accounts/{ACCOUNT}/ai/v1", api_key=TOKEN, max_retries=0, timeout=30
    )
    answer = bench.chat(client, model="openai/gpt-x", extra_headers={"cf-aig-gateway-id": "plain"})
    same(answer.choices[0].message.content, said("openai", "gpt-x"))
    same(bench.fake.last()["headers"]["authorization"], f"Bearer {STORED}")


def messages_speak_anthropic_for_everybodys_models(bench: Bench) -> None:
    surfaces = [
        bench.daemon.root,
        f"{bench.daemon.root}/client/v4/accounts/{ACCOUNT}/ai",
        f"{bench.daemon.root}/client/v4/accounts/{ACCOUNT}/ai/v1",
    ]
    for base in surfaces:
        for credentials in ({"api_key": TOKEN}, {"auth_token": TOKEN}):
            client = anthropic.Anthropic(base_url=base, max_retries=0, timeout=30, **credentials)
            for name in ["anthropic/claude-x", "openai/gpt-x", "google-ai-studio/gemini-x"]:
                provider, model = name.split("/", 1)
                answer = bench.message(client, model=name)
                same((base, name, answer.content[0].text), (base, name, said(provider, model)))
                headers = bench.fake.last()["headers"]
                assert not any(TOKEN in value for value in headers.values()), f"our token reached {provider}: {headers}"
                assert any(STORED in value for value in headers.values()), f"the stored key did not reach {provider}"


def messages_stream_and_call_tools_for_everybodys_models(bench: Bench) -> None:
    client = anthropic.Anthropic(base_url=bench.daemon.root, auth_token=TOKEN, max_retries=0, timeout=30)
    for name in ["anthropic/claude-x", "openai/gpt-x", "google-ai-studio/gemini-x", "cohere/command-x"]:
        provider, model = name.split("/", 1)
        with client.messages.stream(model=name, max_tokens=100, messages=MESSAGES) as stream:
            same((name, "".join(stream.text_stream)), (name, said(provider, model)))
            message = stream.get_final_message()
        same((name, message.stop_reason), (name, "end_turn"))
        same((name, message.usage.output_tokens), (name, len(said(provider, model).split())))
        try:
            anthropic_calls_tools_whole_and_streamed(bench, client, name)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


CHECKS = [
    openai_chat_is_passed_on_and_the_gateways_headers_are_not,
    openai_streams_come_in_pieces_and_say_the_same,
    openai_calls_tools_whole_and_streamed,
    openai_responses_answer_stream_and_call,
    openai_embeddings_are_vectors,
    openai_models_are_listed,
    openai_errors_are_those_of_the_provider,
    openai_hears_of_an_upstream_that_gives_no_answer,
    openai_hears_of_a_stream_that_breaks_off,
    a_caller_that_hangs_up_ends_the_upstreams_work,
    the_gateways_headers_say_what_it_did,
    a_cached_answer_is_given_again_whole_and_streamed,
    a_gateway_that_tries_again_hides_a_failure,
    without_the_gateways_token_there_is_nothing,
    anthropic_messages_are_passed_on,
    anthropic_streams_say_the_same,
    anthropic_calls_tools_whole_and_streamed,
    anthropic_counts_tokens,
    anthropic_errors_are_those_of_the_provider,
    anthropic_hears_of_a_stream_that_breaks_off,
    google_content_is_passed_on_and_streamed,
    google_calls_tools,
    google_embeds_and_counts,
    google_errors_are_those_of_the_provider,
    compat_says_the_same_for_every_provider_whole_and_streamed,
    compat_gives_each_provider_its_key_in_its_own_header,
    compat_calls_tools_of_every_provider,
    compat_streams_several_calls_behind_words,
    compat_ends_with_length_at_the_limit,
    compat_errors_keep_their_status_whatever_the_provider,
    compat_hears_of_streams_that_break_off,
    compat_serves_the_local_models_as_well,
    rest_chat_uses_stored_keys,
    messages_speak_anthropic_for_everybodys_models,
    messages_stream_and_call_tools_for_everybodys_models,
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    release = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "release"
    parser.add_argument("--neurond", type=Path, default=release / "neurond", help="the daemon")
    parser.add_argument("--fake", type=Path, default=release / "examples" / "fake_upstream", help="the fake upstream")
    parser.add_argument("--only", default="", help="comma-separated parts of names")
    args = parser.parse_args()
    for program in (args.neurond, args.fake):
        if not program.is_file():
            sys.exit(f"there is no {program}: build it, or name it")
    wanted = [part for part in args.only.split(",") if part]
    checks = [check for check in CHECKS if not wanted or any(part in check.__name__ for part in wanted)]
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        fake = Fake(args.fake.resolve())
        daemon = Daemon(args.neurond.resolve(), Path(folder), fake)
        bench = Bench(daemon, fake)
        for check in checks:
            fake.clear()
            started = time.monotonic()
            try:
                check(bench)
                word = "ok    "
            except Exception:
                failed += 1
                word = "FAILED"
                traceback.print_exc()
            print(f"{word} {time.monotonic() - started:6.2f} s  {check.__name__}", flush=True)
        if failed:
            print("neurond's last lines:", *daemon.log[-20:], sep="\n  ", file=sys.stderr)
        daemon.stop()
        fake.stop()
    print(f"{len(checks) - failed} of {len(checks)} checks hold with openai {openai.__version__}, "
          f"anthropic {anthropic.__version__}, google-genai {genai.__version__}")
    return 1 if failed or not checks else 0


if __name__ == "__main__":
    sys.exit(main())
