#!/usr/bin/env python3
"""Uses the gateway through the official SDKs of OpenAI, Anthropic, Google and AWS, and manages it through
Cloudflare's, as its users do, and says what does not hold.

    scripts/gateway_sdk_test.py
    scripts/gateway_sdk_test.py --neurond target/release/neurond --fake target/release/examples/fake_upstream
    scripts/gateway_sdk_test.py --only errors,compat

Starts the fake upstream (`cargo build --release --example fake_upstream`) and the daemon in front of it, both on free ports of
loopback, with a configuration of its own in a temporary folder. The SDKs are installed into `.venv/gateway-sdk`, once, in the
versions below. Each check is a function whose name is what it proves: a line each, exit code 1 if one does not hold.

    SDK --> neurond /v1/{account}/{gateway}/{provider} --> fake upstream: answers `{provider} {model} heard: {last words}`
    cloudflare --> neurond /client/v4/accounts/{account}/ai-gateway: an answer that is not of the SDK's types fails

What a provider does wrong is told to the fake by the header `x-fake` of native calls, and by scripts for all others
(`tests/upstream/behaviour.rs`).
"""

from __future__ import annotations

import argparse
import contextlib
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
SDKS = ["openai==3.57.0", "anthropic==2.14.0", "google-genai==3.6.1", "botocore==1.44.8", "cloudflare==5.9.0"]

ACCOUNT = "0123456789abcdef0123456789abcdef"
TOKEN = "token-of-the-gateway"
# Of one who may call models and manage nothing, and of another account.
SMALL_TOKEN, OTHER_TOKEN = "token-without-admin", "token-of-somebody-else"
OTHER = "fedcba9876543210fedcba9876543210"
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
import botocore  # noqa: E402
import botocore.session  # noqa: E402
import cloudflare  # noqa: E402
import openai  # noqa: E402
from botocore.auth import SigV4Auth  # noqa: E402
from botocore.awsrequest import AWSRequest  # noqa: E402
from botocore.config import Config  # noqa: E402
from botocore.credentials import Credentials  # noqa: E402
from botocore.eventstream import ChecksumMismatch  # noqa: E402
from botocore.exceptions import ClientError, EventStreamError  # noqa: E402
from google import genai  # noqa: E402
from google.genai import errors as google_errors  # noqa: E402
from google.genai import types as google_types  # noqa: E402
from urllib3.exceptions import ProtocolError  # noqa: E402


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
        self.again = lambda: Daemon(program, folder, fake)
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

    def killed(self) -> Daemon:
        """Another one in its place, with what is on the disk: this one gets no time to write anything."""
        self.child.kill()
        self.child.wait()
        return self.again()

    @staticmethod
    def config(upstream: str) -> str:
        parts = [
            '[server]\nlisten = "127.0.0.1:0"\n[log]\nformat = "json"\n',
            token("test", TOKEN, ACCOUNT),
            token("small", SMALL_TOKEN, ACCOUNT) + 'scopes = ["run", "gateway"]\n',
            token("other", OTHER_TOKEN, OTHER),
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


def token(id: str, secret: str, account: str) -> str:
    return f'[[auth.token]]\nid = "{id}"\nsha256 = "{hashlib.sha256(secret.encode()).hexdigest()}"\naccount = "{account}"\n'


class Bench:
    """What a check needs: clients of all kinds, and a look at what reached the upstream."""

    def __init__(self, daemon: Daemon, fake: Fake) -> None:
        self.daemon, self.fake = daemon, fake
        self.auth = {"cf-aig-authorization": f"Bearer {TOKEN}"}
        self.management = self.managed_by(TOKEN).ai_gateway
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

    def restart(self) -> None:
        self.__init__(self.daemon.killed(), self.fake)

    def managed_by(self, token: str) -> cloudflare.Cloudflare:
        base = f"{self.daemon.root}/client/v4"
        return cloudflare.Cloudflare(api_token=token, base_url=base, max_retries=0, timeout=30, _strict_response_validation=True)

    def plain_http(self, method: str, path: str, body: dict | None = None) -> dict:
        """What the SDK has no function for, over its own connection and with its errors."""
        call = getattr(self.managed_by(TOKEN), method)
        return call(f"/accounts/{ACCOUNT}/ai-gateway/{path}", cast_to=object, **({} if body is None else {"body": body}))["result"]

    @contextlib.contextmanager
    def gateway(self, id: str, **fields):
        """A gateway for the time of a check."""
        try:
            yield self.management.create(account_id=ACCOUNT, id=id, **PLAIN | fields)
        finally:
            self.management.delete(id, account_id=ACCOUNT)

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

    def bedrock(self, own: bool = False, fake: str = ""):
        """botocore's client, which signs with a key of its own or not at all."""
        config = Config(retries={"total_max_attempts": 1}, proxies={}, signature_version=None if own else botocore.UNSIGNED)
        client = botocore.session.Session().create_client(
            "bedrock-runtime", region_name="us-east-1", endpoint_url=f"{self.base('aws-bedrock')}/bedrock-runtime/us-east-1",
            aws_access_key_id="AKIDTHEIRS", aws_secret_access_key=OWN, config=config,
        )

        def add(request, **_) -> None:
            for name, value in {**self.auth, "x-fake": fake or "ok"}.items():
                request.headers[name] = value

        # Behind the signature, which must not be over them.
        client.meta.events.register("before-send.bedrock-runtime", add)
        return client

    def google_headers(self, fake: str) -> google_types.GenerateContentConfig:
        return google_types.GenerateContentConfig(http_options=google_types.HttpOptions(headers={"x-fake": fake}))


# What every gateway has to say.
PLAIN = {
    "cache_invalidate_on_update": True, "cache_ttl": 0, "collect_logs": True, "rate_limiting_interval": 0, "rate_limiting_limit": 0,
}


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


# AWS's SDK on Bedrock's surface.

CLAUDE = "anthropic.claude-x-v1:0"
CONVERSE = {"modelId": CLAUDE, "messages": [{"role": "user", "content": [{"text": ASK}]}]}


def stream_text(events) -> str:
    return "".join(event["contentBlockDelta"]["delta"].get("text", "") for event in events if "contentBlockDelta" in event)


def bedrock_converses_streams_and_invokes_for_who_signs_and_who_does_not(bench: Bench) -> None:
    for own in (False, True):
        client = bench.bedrock(own)
        answer = client.converse(**CONVERSE, inferenceConfig={"maxTokens": 100})
        same(answer["output"]["message"]["content"], [{"text": said("aws-bedrock", CLAUDE)}])
        same((answer["stopReason"], answer["usage"]["inputTokens"]), ("end_turn", len(ASK.split())))
        events = list(client.converse_stream(**CONVERSE)["stream"])
        same(stream_text(events), said("aws-bedrock", CLAUDE))
        same([event["messageStop"]["stopReason"] for event in events if "messageStop" in event], ["end_turn"])
        body = json.dumps({"anthropic_version": "bedrock-2023-05-31", "max_tokens": 100, "messages": MESSAGES})
        answer = json.loads(client.invoke_model(modelId=CLAUDE, body=body)["body"].read())
        same(answer["content"][0]["text"], said("aws-bedrock", CLAUDE))
        pieces = client.invoke_model_with_response_stream(modelId=CLAUDE, body=body)["body"]
        pieces = [json.loads(event["chunk"]["bytes"]) for event in pieces]
        same("".join(piece["delta"].get("text", "") for piece in pieces if piece["type"] == "content_block_delta"), answer["content"][0]["text"])
        for request in bench.fake.requests():
            headers = {name.lower(): value for name, value in request["headers"]}
            assert f"Credential={'AKIDTHEIRS' if own else 'AKIDEXAMPLE'}/" in headers["authorization"], headers
            same([name for name in headers if name.startswith("cf-")], [])
        bench.fake.clear()


def bedrock_hears_signatures_as_botocore_makes_them(bench: Bench) -> None:
    client = bench.bedrock()
    arn = "arn:aws:bedrock:us-east-1:123456789012:inference-profile/us.x-v1:0"
    client.converse(**CONVERSE)
    client.converse(**{**CONVERSE, "modelId": arn})
    client.converse_stream(**CONVERSE)
    client.invoke_model(modelId=CLAUDE, body=b'{"prompt": "\\u00e9"}', trace="ENABLED")
    bench.chat(bench.unkeyed, model=f"aws-bedrock/{CLAUDE}", max_tokens=10)
    requests = bench.fake.requests()
    same(len(requests), 5)
    for request in requests:
        headers = {name.lower(): value for name, value in request["headers"]}
        covered = headers["authorization"].split("SignedHeaders=")[1].split(",")[0].split(";")
        assert {"host", "x-amz-date"} <= set(covered), covered
        again = AWSRequest(
            method=request["method"], url=f"http://{headers['host']}{request['path']}", data=request["body"].encode(),
            headers={name: headers[name] for name in covered if name != "host"},
        )
        again.context["timestamp"] = headers["x-amz-date"]
        signer = SigV4Auth(Credentials("AKIDEXAMPLE", STORED), "bedrock", "us-east-1")
        signature = signer.signature(signer.string_to_sign(again, signer.canonical_request(again)), again)
        same((request["path"], headers["authorization"].split("Signature=")[1]), (request["path"], signature))


def bedrock_errors_are_those_of_the_provider(bench: Bench) -> None:
    for status, word in [
        (400, "ValidationException"),
        (403, "UnrecognizedClientException"),
        (404, "ResourceNotFoundException"),
        (429, "ThrottlingException"),
        (500, "InternalServerException"),
        (503, "ServiceUnavailableException"),
    ]:
        client = bench.bedrock(fake=str(status))
        for call in (client.converse, client.converse_stream):
            answer = raised_by_aws(lambda: call(**CONVERSE))
            same((answer["ResponseMetadata"]["HTTPStatusCode"], answer["Error"]["Code"]), (status, word))


def bedrock_hears_of_a_stream_that_breaks_off(bench: Bench) -> None:
    for fake in ["error-after=3", "garbage-after=3", "reset-after=3"]:
        events = []

        def read() -> None:
            for event in bench.bedrock(fake=fake).converse_stream(**CONVERSE)["stream"]:
                events.append(event)

        raised(read, EventStreamError, ChecksumMismatch, ProtocolError)
        same((fake, stream_text(events)), (fake, f"aws-bedrock {CLAUDE} heard: "))
        assert not any("messageStop" in event for event in events), events


def raised_by_aws(call) -> dict:
    try:
        call()
    except ClientError as error:
        return error.response
    raise AssertionError("it answered")


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


# Cloudflare's SDK on the management API. What is made there serves at once, and is on the disk when it is answered.


def cloudflare_gateways_are_made_read_changed_and_deleted(bench: Bench) -> None:
    api = bench.management
    settings = {
        "authentication": True, "cache_ttl": 300, "retry_max_attempts": 3, "retry_delay": 10, "retry_backoff": "linear",
        "rate_limiting_interval": 60, "rate_limiting_limit": 1000, "rate_limiting_technique": "sliding", "log_management": 20_000,
        "log_management_strategy": "DELETE_OLDEST", "log_classification": True, "zdr": True, "byok_only": True,
        "dlp": {"enabled": True, "action": "FLAG", "profiles": ["names"]},
        "spend_limits": {"enabled": True, "rules": [{
            "id": "r", "enabled": True, "limit": 5, "limitType": "cost", "window": 3600, "technique": "fixed",
            "model": {"mode": "filter", "values": ["gpt-x"]},
        }]},
    }
    made = api.create(account_id=ACCOUNT, id="shop", **PLAIN | settings)
    have = made.to_dict(mode="json")
    for key, value in settings.items():
        same((key, have[key]), (key, value))
    same((made.id, made.is_default, made.created_at), ("shop", False, made.modified_at))
    same(api.get("shop", account_id=ACCOUNT).to_dict(), made.to_dict())
    changed = api.update("shop", account_id=ACCOUNT, **PLAIN | {"cache_ttl": 120})
    # What an older client does not know, and leaves out, it does not switch off.
    same((changed.cache_ttl, changed.retry_max_attempts, changed.authentication), (120, 3, True))
    same(changed.created_at, made.created_at)
    assert changed.modified_at >= made.modified_at, changed
    same([gateway.to_dict() for gateway in api.list(account_id=ACCOUNT) if gateway.id == "shop"], [changed.to_dict()])
    same(api.delete("shop", account_id=ACCOUNT).id, "shop")
    raised(lambda: api.get("shop", account_id=ACCOUNT), cloudflare.NotFoundError)
    assert "shop" not in [gateway.id for gateway in api.list(account_id=ACCOUNT)]


def cloudflare_keeps_the_secrets_of_settings_to_itself(bench: Bench) -> None:
    trace = {"url": "https://traces.example/v1", "headers": {"x-key": "hush-1"}, "authorization": "hush-2", "content_type": "json"}
    with bench.gateway("traced", otel=[trace]) as made:
        got = bench.management.get("traced", account_id=ACCOUNT)
        shown = json.dumps([made.to_dict(mode="json"), got.to_dict(mode="json")])
        assert "hush" not in shown and trace["url"] in shown, shown


def cloudflare_lists_come_page_by_page(bench: Bench) -> None:
    names = [f"page-{number:02}" for number in range(11)]
    found = lambda **query: bench.management.list(account_id=ACCOUNT, **query)
    with contextlib.ExitStack() as stack:
        for name in reversed(names):
            stack.enter_context(bench.gateway(name))
        first = found(per_page=4, search="PAGE-")
        same([gateway.id for gateway in first.result], names[:4])
        info = first.result_info.to_dict()
        same([info[key] for key in ("page", "per_page", "count", "total_count")], [1, 4, 4, 11])
        # The SDK goes on to the other pages by itself.
        same([gateway.id for gateway in first], names)
        same([gateway.id for gateway in found(page=3, per_page=4, search="page-").result], names[8:])
        same([gateway.id for gateway in found(search="page-07")], ["page-07"])
    same(list(found(search="page-")), [])


def cloudflare_shows_the_gateways_of_the_file_as_well(bench: Bench) -> None:
    assert {"plain", "tries"} <= {gateway.id for gateway in bench.management.list(account_id=ACCOUNT)}
    same(bench.management.get("tries", account_id=ACCOUNT).retry_max_attempts, 3)


def a_gateway_serves_from_its_making_to_its_end(bench: Bench) -> None:
    with_token, without = bench.openai_at("openai", "brief"), bench.openai_at("openai", "brief", headers={})
    error = raised(lambda: bench.chat(with_token), openai.BadRequestError)
    same(error.response.json()["internalCode"], 2001)
    with bench.gateway("brief", authentication=True):
        same(bench.chat(with_token).choices[0].message.content, said("openai", "gpt-x"))
        raised(lambda: bench.chat(without), openai.AuthenticationError)
        bench.management.update("brief", account_id=ACCOUNT, **PLAIN, authentication=False)
        same(bench.chat(without).choices[0].message.content, said("openai", "gpt-x"))
    raised(lambda: bench.chat(with_token), openai.BadRequestError)


def a_gateways_update_empties_its_cache(bench: Bench) -> None:
    def status() -> str:
        chat = bench.openai_at("openai", "kept").chat.completions.with_raw_response
        return chat.create(model="gpt-x", messages=MESSAGES).headers["cf-aig-cache-status"]

    def update(**fields) -> None:
        bench.management.update("kept", account_id=ACCOUNT, **PLAIN | {"cache_ttl": 600} | fields)

    with bench.gateway("kept", cache_ttl=600):
        same([status(), status()], ["MISS", "HIT"])
        update()
        same([status(), status()], ["MISS", "HIT"])
        update(cache_invalidate_on_update=False)
        same(status(), "HIT")
        update(cache_ttl=0)
        same(status(), "MISS")


def urls_of_gateways_are_what_sdks_are_pointed_at(bench: Bench) -> None:
    url = bench.management.urls.get("openai", account_id=ACCOUNT, gateway_id="plain")
    same(url, bench.base("openai"))
    client = openai.OpenAI(base_url=url, api_key=OWN, default_headers=bench.auth, max_retries=0, timeout=30)
    same(bench.chat(client).choices[0].message.content, said("openai", "gpt-x"))


def provider_keys_go_in_stand_in_and_never_come_out(bench: Bench) -> None:
    first, second, third = "sk-first-of-the-test-0001", "sk-second-of-the-test-0002", "sk-third-of-the-test-0003"
    where = {"gateway_id": "keys", "account_id": ACCOUNT}
    to_openai = {**where, "provider_slug": "openai"}

    def sent(**headers: str) -> str:
        """The key that the provider gets when the caller brings none."""
        bench.chat(bench.openai_at("openai", "keys"), extra_headers={"Authorization": openai.Omit()} | headers)
        return bench.fake.last()["headers"]["authorization"].removeprefix("Bearer ")

    with bench.gateway("keys", authentication=True):
        same(sent(), STORED)
        keys = bench.management.provider_configs
        create = keys.with_raw_response.create
        raw = create(**to_openai, alias="first", default_config=True, secret=first, rate_limit=1000, rate_limit_period=60)
        made = raw.parse()
        same((made.alias, made.gateway_id, made.provider_slug, made.default_config), ("first", "keys", "openai", True))
        same((made.secret_preview, made.rate_limit, made.rate_limit_period), ("***0001", 1000, 60))
        keys.create(**to_openai, alias="second", default_config=False, secret=second)
        path = f"gateways/keys/provider_configs/{made.id}"
        shown = [raw.text(), keys.with_raw_response.list(**where).text(), json.dumps(bench.plain_http("get", path))]
        assert not any("of-the-test" in text for text in shown), shown
        same([key.alias for key in keys.list(**where, per_page=1)], ["first", "second"])
        same((sent(), sent(**{"cf-aig-byok-alias": "second"})), (first, second))
        error = raised(lambda: sent(**{"cf-aig-byok-alias": "third"}), openai.BadRequestError)
        same(error.response.json()["internalCode"], 2040)
        # The same secret under another name, by its id.
        keys.create(**to_openai, alias="third", default_config=False, secret_id=made.secret_id)
        same(sent(**{"cf-aig-byok-alias": "third"}), first)
        # The SDK cannot change or delete keys.
        bench.plain_http("put", path, {"secret": third})
        same((sent(), sent(**{"cf-aig-byok-alias": "third"})), (third, first))
        # A caller's own key goes before all of them.
        bench.chat(bench.openai_at("openai", "keys"), extra_headers={"cf-aig-byok-alias": "second"})
        same(bench.fake.last()["headers"]["authorization"], f"Bearer {OWN}")
        bench.plain_http("delete", path)
        same(sent(), STORED)
    # With a gateway its keys are gone.
    with bench.gateway("keys"):
        same(list(bench.management.provider_configs.list(**where)), [])


def custom_providers_are_made_read_changed_and_deleted(bench: Bench) -> None:
    api = bench.management.custom_providers

    def refusal() -> str:
        error = raised(lambda: bench.chat(bench.openai_at("custom-ours")), openai.BadRequestError).response.json()
        same((error["internalCode"], bench.fake.requests()), (2008, []))
        return error["message"]

    # The fake's own address: a call that went there would be seen.
    about = {
        "name": "Of ours", "slug": "ours", "base_url": bench.fake.url.replace("http://", "https://") + "/v1",
        "description": "Runs below the stairs.", "link": "https://ours.example",
    }
    made = api.create(account_id=ACCOUNT, **about, headers='{"x-key": "hush"}')
    have = made.to_dict(mode="json")
    same({key: have[key] for key in about}, about)
    same((made.enable, json.loads(made.headers)), (False, {"x-key": "***"}))
    same(api.get(made.id, account_id=ACCOUNT).to_dict(), made.to_dict())
    for query, count in [
        ({"search": "ours"}, 1), ({"search": "OF OURS"}, 1), ({"search": made.id}, 1), ({"search": "theirs"}, 0),
        ({"enable": True}, 0), ({"enable": False}, 1), ({"beta": True}, 0),
    ]:
        same((query, len(list(api.list(account_id=ACCOUNT, **query)))), (query, count))
    # As long as it is switched off, nobody can call it.
    assert "private" not in refusal(), refusal()
    # The SDK cannot change them.
    changed = bench.plain_http("patch", f"custom-providers/{made.id}", {"enable": True, "description": "Moved upstairs."})
    same((changed["enable"], changed["description"], changed["name"]), (True, "Moved upstairs.", "Of ours"))
    # It is looked for now, but at a private address, which only the file can allow.
    assert "is on a private address" in refusal(), refusal()
    same(api.delete(made.id, account_id=ACCOUNT).slug, "ours")
    raised(lambda: api.get(made.id, account_id=ACCOUNT), cloudflare.NotFoundError)
    assert "private" not in refusal(), refusal()


def routes_answer_with_the_version_that_is_deployed(bench: Bench) -> None:
    api, where = bench.management.dynamic_routing, {"gateway_id": "routed", "account_id": ACCOUNT}

    def answers(name: str = "support") -> str:
        return bench.chat(bench.openai_at("compat", "routed"), model=f"dynamic/{name}").choices[0].message.content

    with bench.gateway("routed"):
        route = api.create(**where, name="support", elements=route_to("gpt-one"))
        one = route.version.version_id
        same((route.name, route.gateway_id, route.deployment.version_id, route.version.active), ("support", "routed", one, "true"))
        same(json.loads(route.version.data), route_to("gpt-one"))
        same(answers(), said("openai", "gpt-one"))
        same(api.get(route.id, **where).to_dict(), route.to_dict())
        # A new version counts when it is deployed, not before.
        draft = api.create_version(route.id, **where, elements=route_to("gpt-two"))
        same([element.id for element in draft.elements], ["begin", "ask", "end"])
        versions = api.list_versions(route.id, **where).data.versions
        same([version.active for version in versions], ["false", "true"])
        two = versions[0].version_id
        got = api.get_version(two, **where, id=route.id)
        same((got.version_id, got.active, json.loads(got.data)), (two, "false", route_to("gpt-two")))
        same(answers(), said("openai", "gpt-one"))
        api.create_deployment(route.id, **where, version_id=two)
        same(answers(), said("openai", "gpt-two"))
        api.create_deployment(route.id, **where, version_id=one)
        same(answers(), said("openai", "gpt-one"))
        deployments = api.list_deployments(route.id, **where).data.deployments
        same([deployment.version_id for deployment in deployments], [one, two, one])
        renamed = api.update(route.id, **where, name="help").route
        same((renamed.id, renamed.name, answers("help")), (route.id, "help", said("openai", "gpt-one")))
        raised(answers, openai.BadRequestError)
        other = api.create(**where, name="other", elements=route_to("gpt-three"))
        same([route.name for route in api.list(**where).data.routes], ["other", "help"])
        same([route.id for route in api.list(**where, page=2, per_page=1).data.routes], [route.id])
        same(api.delete(route.id, **where).id, route.id)
        same([route.id for route in api.list(**where).data.routes], [other.id])
        raised(lambda: answers("help"), openai.BadRequestError)


def route_to(model: str) -> list[dict]:
    asked = {"provider": "openai", "model": model, "timeout": 10_000, "retries": 1}
    end = {"elementId": "end"}
    return [
        {"id": "begin", "type": "start", "outputs": {"next": {"elementId": "ask"}}},
        {"id": "ask", "type": "model", "properties": asked, "outputs": {"success": end, "fallback": end}},
        {"id": "end", "type": "end", "outputs": {}},
    ]


def log_records_are_listed_read_changed_and_deleted(bench: Bench) -> None:
    logs, where = bench.management.logs, {"gateway_id": "told", "account_id": ACCOUNT}
    with bench.gateway("told"):
        client = bench.openai_at("openai", "told")
        price = {"cf-aig-custom-cost": json.dumps({"total_cost": 0.25})}
        answer = client.chat.completions.with_raw_response.create(model="gpt-x", messages=MESSAGES, extra_headers=price)
        bench.chat(client)
        raised(lambda: bench.chat(client, extra_headers={"x-fake": "status=400"}), openai.BadRequestError)
        log = answer.headers["cf-aig-log-id"]
        dear = {"key": "cost", "operator": "gt", "value": [0.1]}
        ours = {"key": "provider", "operator": "eq", "value": ["openai", "groq"]}
        listed = logs.list(**where, meta_info=True)
        same((len(list(listed)), listed.result_info.to_dict()["total_count"]), (3, 3))
        for query, count in [({"filters": [dear]}, 1), ({"filters": [dear, ours]}, 1), ({"success": False}, 1), ({"per_page": 1}, 3)]:
            same((query, len(list(logs.list(**where, **query)))), (query, count))
        got = logs.get(log, **where)
        same((got.id, got.provider, got.model, got.cost, got.custom_cost), (log, "openai", "gpt-x", 0.25, True))
        assert isinstance(got.duration, int) and got.duration >= 0, got
        same(logs.request(log, **where)["model"], "gpt-x")
        same(logs.response(log, **where)["choices"][0]["message"]["content"], said("openai", "gpt-x"))
        logs.edit(log, **where, feedback=1, score=90)
        same(len(list(logs.list(**where, filters=[{"key": "feedback", "operator": "eq", "value": [1]}]))), 1)
        logs.delete(**where, filters=[dear])
        raised(lambda: logs.get(log, **where), cloudflare.NotFoundError)
        same(len(list(logs.list(**where))), 2)
    # Metadata is an object, as it is upstream; the SDK's types say text, so it is read as it comes.
    with bench.gateway("tagged"):
        tagged = {"cf-aig-metadata": json.dumps({"team": "red", "n": 7})}
        bench.chat(bench.openai_at("openai", "tagged"), extra_headers=tagged)
        bench.chat(bench.openai_at("openai", "tagged"))
        red = {"key": "metadata.value", "operator": "eq", "value": ["red"]}
        team = {"key": "metadata.key", "operator": "eq", "value": ["team"]}
        raw = logs.with_raw_response.list(gateway_id="tagged", account_id=ACCOUNT, filters=[red, team])
        same([record["metadata"] for record in raw.http_response.json()["result"]], [{"team": "red", "n": 7}])


def datasets_are_made_read_replaced_listed_and_deleted(bench: Bench) -> None:
    api, us = bench.management.datasets, {"account_id": ACCOUNT}
    filters = [
        {"key": "provider", "operator": "eq", "value": ["openai", "groq"]},
        {"key": "cost", "operator": "gt", "value": [0.5]},
        {"key": "success", "operator": "eq", "value": [True]},
    ]
    with bench.gateway("sets"):
        made = api.create("sets", **us, name="dear", enable=True, filters=filters)
        same((made.name, made.enable, made.gateway_id, made.created_at), ("dear", True, "sets", made.modified_at))
        same([filter.to_dict() for filter in made.filters], filters)
        same(api.get(made.id, **us, gateway_id="sets").to_dict(), made.to_dict())
        changed = api.update(made.id, **us, gateway_id="sets", name="all", enable=False, filters=[])
        same((changed.id, changed.name, changed.enable, changed.filters), (made.id, "all", False, []))
        for number in range(1, 10):
            api.create("sets", **us, name=f"set-{number}", enable=True, filters=filters[:1])
        raised(lambda: api.create("sets", **us, name="more", enable=True, filters=[]), cloudflare.BadRequestError)
        first = api.list("sets", **us, per_page=4)
        same((len(first.result), first.result_info.total_count), (4, 10))
        # The SDK goes on to the other pages by itself.
        same([dataset.name for dataset in first], ["all", *(f"set-{number}" for number in range(1, 10))])
        for query, names in [({"name": "set-2"}, ["set-2"]), ({"enable": False}, ["all"]), ({"search": "SET-7"}, ["set-7"])]:
            same([dataset.name for dataset in api.list("sets", **us, **query)], names)
        same(api.delete(made.id, **us, gateway_id="sets").to_dict(), changed.to_dict())
        raised(lambda: api.get(made.id, **us, gateway_id="sets"), cloudflare.NotFoundError)


def evaluations_say_what_the_logs_of_datasets_cost_took_and_were_liked(bench: Bench) -> None:
    api, us = bench.management, {"account_id": ACCOUNT}
    types = {kind.type: kind.id for kind in api.evaluation_types.list(**us, order_by="name", order_by_direction="asc")}
    same(list(types), ["cost", "feedback", "speed"])
    same([kind.name for kind in api.evaluation_types.list(**us, per_page=1)], ["Cost", "Speed", "Human feedback"])
    with bench.gateway("judged"):
        where = {**us, "gateway_id": "judged"}
        for feedback in (1, 1, -1, None):
            answer = bench.openai_at("openai", "judged").chat.completions.with_raw_response.create(
                model="gpt-x", messages=MESSAGES, extra_headers={"cf-aig-custom-cost": '{"per_token_in": 0.001, "per_token_out": 0.002}'}
            )
            if feedback is not None:
                api.logs.edit(answer.headers["cf-aig-log-id"], **where, feedback=feedback)
        dataset = api.datasets.create(
            "judged", **us, name="well", enable=True, filters=[{"key": "success", "operator": "eq", "value": [True]}]
        )
        made = api.evaluations.create(
            "judged", **us, name="first", dataset_ids=[dataset.id], evaluation_type_ids=list(types.values())
        )
        same((made.name, made.processed, made.gateway_id), ("first", False, "judged"))
        same([one.to_dict() for one in made.datasets], [dataset.to_dict()])
        end = time.monotonic() + 10
        while not (done := api.evaluations.get(made.id, **where)).processed:
            assert time.monotonic() < end, done
            time.sleep(0.01)
        same((done.total_logs, [one.to_dict() for one in done.datasets]), (4, [dataset.to_dict()]))
        results = {result.evaluation_type_id: result for result in done.results}
        same([results[types[kind]].total_logs for kind in ("cost", "speed", "feedback")], [4, 4, 3])
        same({(result.status, result.evaluation_id) for result in done.results}, {(1, made.id)})
        records = list(api.logs.list("judged", **us, per_page=50))
        assert len(records) == 4 and all(record.cost for record in records), records
        for kind, field in (("cost", "cost"), ("speed", "duration")):
            average = sum(getattr(record, field) or 0 for record in records) / 4
            # Records have whole milliseconds.
            assert abs(float(results[types[kind]].result) - average) <= (1 if kind == "speed" else 1e-11), (kind, results, average)
        assert abs(float(results[types["feedback"]].result) - 2 / 3) < 1e-9, results
        # What was done is there when the daemon was killed.
        bench.restart()
        api = bench.management
        same([one.to_dict() for one in api.evaluations.list("judged", **us, processed=True, name="first")], [done.to_dict()])
        same(api.evaluations.delete(made.id, **where).to_dict(), done.to_dict())
        raised(lambda: api.evaluations.get(made.id, **where), cloudflare.NotFoundError)


def management_errors_are_the_exceptions_of_their_status(bench: Bench) -> None:
    api, us, nobody = bench.management, {"account_id": ACCOUNT}, "00000000-0000-4000-8000-000000000000"
    small, wrong, other = (bench.managed_by(token).ai_gateway for token in (SMALL_TOKEN, "wrong", OTHER_TOKEN))
    key = {**us, "alias": "a", "default_config": True, "provider_slug": "openai", "secret": "sk-1"}
    provider = {**us, "name": "x", "slug": "x"}
    not_there, bad = (cloudflare.NotFoundError, 7002), (cloudflare.BadRequestError, 7001)
    unknown, forbidden = (cloudflare.AuthenticationError, 10000), (cloudflare.PermissionDeniedError, 10000)
    with bench.gateway("taken"):
        routes, way = api.dynamic_routing, {**us, "gateway_id": "taken"}
        route = routes.create(**way, name="way", elements=route_to("gpt-x"))
        cases = [
            (not_there, lambda: api.get("nowhere", **us)),
            (not_there, lambda: api.update("nowhere", **us, **PLAIN)),
            (not_there, lambda: api.delete("nowhere", **us)),
            (not_there, lambda: api.urls.get("openai", **us, gateway_id="nowhere")),
            (not_there, lambda: api.provider_configs.create("nowhere", **key)),
            (not_there, lambda: api.custom_providers.get(nobody, **us)),
            (not_there, lambda: api.custom_providers.delete(nobody, **us)),
            (not_there, lambda: routes.get(nobody, **way)),
            (not_there, lambda: routes.get_version(nobody, **way, id=route.id)),
            (not_there, lambda: routes.create_deployment(route.id, **way, version_id=nobody)),
            (not_there, lambda: api.datasets.get(nobody, **way)),
            (not_there, lambda: api.datasets.update(nobody, **way, name="x", enable=True, filters=[])),
            (not_there, lambda: api.datasets.delete(nobody, **way)),
            (not_there, lambda: api.datasets.list("nowhere", **us)),
            (not_there, lambda: api.evaluations.get(nobody, **way)),
            (not_there, lambda: api.evaluations.delete(nobody, **way)),
            (bad, lambda: api.datasets.create("taken", **us, name="x", enable=True, filters=[
                {"key": "cost", "operator": "contains", "value": [1]}])),
            (bad, lambda: api.evaluations.create(
                "taken", **us, name="x", dataset_ids=[nobody], evaluation_type_ids=["cost"])),
            (bad, lambda: api.evaluation_types.list(**us, order_by="size")),
            # A name that is taken is a bad one: there is no 409.
            (bad, lambda: api.create(**us, id="taken", **PLAIN)),
            (bad, lambda: routes.create(**way, name="way", elements=route_to("gpt-x"))),
            (bad, lambda: api.create(**us, id="two words", **PLAIN)),
            (bad, lambda: api.create(**us, id="x", **PLAIN | {"cache_ttl": -1})),
            (bad, lambda: api.create(**us, id="x", **PLAIN, retry_max_attempts=6)),
            (bad, lambda: api.create(**us, id="x", **PLAIN, retry_backoff="random")),
            # What the file says is changed there.
            (bad, lambda: api.update("plain", **us, **PLAIN)),
            (bad, lambda: api.delete("plain", **us)),
            (bad, lambda: api.custom_providers.create(**provider, base_url="http://x.example")),
            (bad, lambda: api.provider_configs.create("taken", **key | {"provider_slug": "nobodys"})),
            (bad, lambda: routes.create(**way, name="half", elements=route_to("gpt-x")[:1])),
            (bad, lambda: api.list(**us, page=0)),
            (unknown, lambda: wrong.list(**us)),
            (forbidden, lambda: small.list(**us)),
            (forbidden, lambda: small.create(**us, id="x", **PLAIN)),
            # A token of another account is as good as none.
            (unknown, lambda: other.list(**us)),
        ]
        for number, ((kind, code), call) in enumerate(cases):
            try:
                error = raised(call, kind)
                same([entry.code for entry in error.errors], [code])
                assert error.errors[0].message, error.response.text
            except AssertionError as problem:
                raise AssertionError(f"case {number}: {problem}") from problem
        # Another account does not see it.
        raised(lambda: other.get("taken", account_id=OTHER), cloudflare.NotFoundError)


def what_was_made_is_there_when_the_daemon_was_killed(bench: Bench) -> None:
    where = {"gateway_id": "lasting", "account_id": ACCOUNT}
    secret, unkeyed = "sk-lasting-0123456789", {"Authorization": openai.Omit()}

    def shown() -> list[dict]:
        api = bench.management
        return [
            api.get("lasting", account_id=ACCOUNT).to_dict(),
            *(provider.to_dict() for provider in api.custom_providers.list(account_id=ACCOUNT, search="lasting")),
            *(key.to_dict() for key in api.provider_configs.list(**where)),
            *(route.to_dict() for route in api.dynamic_routing.list(**where).data.routes),
        ]

    with bench.gateway("lasting", cache_ttl=120):
        api = bench.management
        provider = api.custom_providers.create(account_id=ACCOUNT, name="L", slug="lasting", base_url="https://ours.example")
        api.provider_configs.create(**where, alias="a", default_config=True, provider_slug="openai", secret=secret)
        route = api.dynamic_routing.create(**where, name="way", elements=route_to("gpt-one"))
        api.dynamic_routing.create_version(route.id, **where, elements=route_to("gpt-two"))
        before = shown()
        same(len(before), 4)
        bench.restart()
        same(shown(), before)
        answer = bench.chat(bench.openai_at("compat", "lasting"), model="dynamic/way", extra_headers=unkeyed)
        same(answer.choices[0].message.content, said("openai", "gpt-one"))
        same(bench.fake.last()["headers"]["authorization"], f"Bearer {secret}")
        bench.management.custom_providers.delete(provider.id, account_id=ACCOUNT)
    # And what was deleted stays so.
    bench.restart()
    raised(lambda: bench.management.get("lasting", account_id=ACCOUNT), cloudflare.NotFoundError)
    same(list(bench.management.custom_providers.list(account_id=ACCOUNT, search="lasting")), [])


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
    bedrock_converses_streams_and_invokes_for_who_signs_and_who_does_not,
    bedrock_hears_signatures_as_botocore_makes_them,
    bedrock_errors_are_those_of_the_provider,
    bedrock_hears_of_a_stream_that_breaks_off,
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
    cloudflare_gateways_are_made_read_changed_and_deleted,
    cloudflare_keeps_the_secrets_of_settings_to_itself,
    cloudflare_lists_come_page_by_page,
    cloudflare_shows_the_gateways_of_the_file_as_well,
    a_gateway_serves_from_its_making_to_its_end,
    a_gateways_update_empties_its_cache,
    urls_of_gateways_are_what_sdks_are_pointed_at,
    provider_keys_go_in_stand_in_and_never_come_out,
    custom_providers_are_made_read_changed_and_deleted,
    routes_answer_with_the_version_that_is_deployed,
    log_records_are_listed_read_changed_and_deleted,
    datasets_are_made_read_replaced_listed_and_deleted,
    evaluations_say_what_the_logs_of_datasets_cost_took_and_were_liked,
    management_errors_are_the_exceptions_of_their_status,
    what_was_made_is_there_when_the_daemon_was_killed,
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
        bench = Bench(Daemon(args.neurond.resolve(), Path(folder), fake), fake)
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
            print("neurond's last lines:", *bench.daemon.log[-20:], sep="\n  ", file=sys.stderr)
        bench.daemon.stop()
        fake.stop()
    print(f"{len(checks) - failed} of {len(checks)} checks hold with openai {openai.__version__}, anthropic {anthropic.__version__}, "
          f"google-genai {genai.__version__}, botocore {botocore.__version__}, cloudflare {cloudflare.__version__}")
    return 1 if failed or not checks else 0


if __name__ == "__main__":
    sys.exit(main())
