#!/usr/bin/env python3
"""Uses a running daemon through the official `openai` and `cloudflare` SDKs, as its users do, and says what does not hold.

    scripts/sdk_test.py http://127.0.0.1:8080/v1
    scripts/sdk_test.py http://127.0.0.1:8080/v1 --model ID --token TOKEN --only chat,stream

Starts nothing: `scripts/test.sh sdk` starts a daemon and runs this. Needs the packages `openai` and `cloudflare`. Each check is a function
whose name is what it proves; the first model of the server is asked.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import traceback
import urllib.error
import urllib.request

import cloudflare
import openai

ASK = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
# Long enough to be interrupted.
TALK = [{"role": "user", "content": "Write a very long story about a lighthouse keeper and the sea."}]


# Account of callers without a token, as in configs/dev.toml.
ACCOUNT = "local"


class Server:
    """The daemon under test."""

    def __init__(self, url: str, model: str | None, token: str, wait: float) -> None:
        self.url = url.rstrip("/")
        self.root = re.sub(r"/v1$", "", self.url)
        self.client = openai.OpenAI(base_url=self.url, api_key=token, max_retries=0, timeout=300)
        self.cloudflare = cloudflare.Cloudflare(
            base_url=f"{self.root}/client/v4", api_token=token, max_retries=0, timeout=300
        )
        self.wait_until_ready(wait)
        self.model = model or self.client.models.list().data[0].id

    def get(self, path: str) -> str:
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(self.root + path, timeout=10) as answer:
            return answer.read().decode()

    def wait_until_ready(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while True:
            try:
                self.get("/health/ready")
                return
            except (OSError, urllib.error.URLError) as error:
                if time.monotonic() > end:
                    sys.exit(f"{self.root}/health/ready: {error}")
                time.sleep(0.2)

    def metric(self, name: str) -> float:
        """The sum of a series over its labels."""
        rows = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", self.get("/metrics"), re.M)
        assert rows, f"there is no series {name}"
        return sum(float(value) for value in rows)

    def chat(self, **fields):
        fields = {"model": self.model, "messages": ASK, "max_tokens": 24, "temperature": 0} | fields
        return self.client.chat.completions.create(**fields)


def refused(call, kind: type[Exception], *words: str) -> None:
    try:
        call()
    except kind as error:
        missing = [word for word in words if word.lower() not in str(error).lower()]
        assert not missing, f"{missing} not in {error}"
        return
    raise AssertionError(f"expected {kind.__name__}")


def text_of(chunks) -> str:
    return "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)


def models_are_listed(server: Server) -> None:
    models = server.client.models.list().data
    assert server.model in [model.id for model in models]
    assert all(model.object == "model" for model in models)


def chat_answers_with_usage(server: Server) -> None:
    answer = server.chat()
    assert answer.object == "chat.completion" and answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert "Paris" in answer.choices[0].message.content, answer.choices[0].message.content
    usage = answer.usage
    assert usage.prompt_tokens > 10 and 0 < usage.completion_tokens <= 24
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def max_tokens_ends_with_length_and_the_models_end_with_stop(server: Server) -> None:
    cut = server.chat(max_tokens=3)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 3)
    newer = server.chat(max_tokens=openai.NOT_GIVEN, max_completion_tokens=3)
    assert newer.usage.completion_tokens == 3
    whole = server.chat(max_tokens=200)
    assert whole.choices[0].finish_reason == "stop", whole.choices[0]


def a_stream_says_the_same_as_an_answer(server: Server) -> None:
    whole = server.chat()
    chunks = list(server.chat(stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    finish = [choice.finish_reason for chunk in chunks for choice in chunk.choices if choice.finish_reason]
    assert finish == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert len({chunk.id for chunk in chunks}) == 1


def a_stream_comes_in_pieces(server: Server) -> None:
    started = time.monotonic()
    first = None
    for chunk in server.chat(messages=TALK, max_tokens=64, stream=True):
        if first is None and chunk.choices and chunk.choices[0].delta.content:
            first = time.monotonic() - started
    whole = time.monotonic() - started
    assert first is not None and first < whole / 2, f"first token after {first}, end after {whole}"


def n_gives_as_many_answers(server: Server) -> None:
    answer = server.chat(n=3, temperature=1.0, seed=5, max_tokens=16)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1, "all choices are the same"
    chunks = list(server.chat(n=2, temperature=1.0, seed=5, max_tokens=8, stream=True))
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}


def a_seed_repeats_an_answer(server: Server) -> None:
    def ask(seed: int) -> str:
        return server.chat(messages=TALK, temperature=1.0, seed=seed, max_tokens=24).choices[0].message.content

    assert ask(7) == ask(7)
    assert len({ask(seed) for seed in range(4)}) > 1, "seeds make no difference"


def logprobs_are_probabilities_of_the_tokens_said(server: Server) -> None:
    choice = server.chat(logprobs=True, top_logprobs=3, max_tokens=8).choices[0]
    tokens = choice.logprobs.content
    assert len(tokens) == 8 or choice.finish_reason == "stop"
    assert "".join(token.token for token in tokens) == choice.message.content
    for token in tokens:
        assert token.logprob <= 0 and len(token.top_logprobs) == 3
        assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob >= token.top_logprobs[2].logprob
        # Greedy: what was said is what was likeliest.
        assert token.token == token.top_logprobs[0].token
        assert bytes(token.bytes).decode(errors="replace") == token.token


def stop_strings_end_an_answer_and_are_not_said(server: Server) -> None:
    whole = server.chat(max_tokens=24).choices[0].message.content
    stop = whole[len(whole) // 2 :][:4]
    cut = server.chat(max_tokens=24, stop=[stop]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)], (whole, stop, cut.message.content)
    assert cut.finish_reason == "stop"
    assert text_of(server.chat(max_tokens=24, stop=[stop], stream=True)) == cut.message.content


def logit_bias_and_penalties_change_the_answer(server: Server) -> None:
    plain = server.chat(messages=TALK, max_tokens=16).choices[0].message.content
    assert server.chat(messages=TALK, max_tokens=16, frequency_penalty=2.0, presence_penalty=2.0).choices
    # A token wanted above all others is said again and again.
    wanted = server.chat(messages=TALK, max_tokens=16, logit_bias={"260": 100}).choices[0].message.content
    assert wanted != plain and wanted[: len(wanted) // 2] * 2 == wanted, wanted


def completions_continue_a_text(server: Server) -> None:
    ask = {"model": server.model, "prompt": "One, two, three, four,", "max_tokens": 8, "temperature": 0}
    answer = server.client.completions.create(**ask)
    assert answer.object == "text_completion" and "five" in answer.choices[0].text, answer.choices[0].text
    pieces = server.client.completions.create(**ask, stream=True)
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == answer.choices[0].text
    several = server.client.completions.create(**ask | {"prompt": ["One, two,", "Red, green,"]})
    assert [choice.index for choice in several.choices] == [0, 1]


def responses_answer_and_stream(server: Server) -> None:
    ask = {"model": server.model, "input": ASK[0]["content"], "max_output_tokens": 24, "temperature": 0}
    answer = server.client.responses.create(**ask, instructions="You are brief.")
    assert answer.status in ("completed", "incomplete") and "Paris" in answer.output_text, answer.output_text
    assert answer.usage.input_tokens > 0 and answer.usage.output_tokens > 0
    plain = server.client.responses.create(**ask)
    events = list(server.client.responses.create(**ask, stream=True))
    kinds = [event.type for event in events]
    assert kinds[0] == "response.created" and kinds[-1] in ("response.completed", "response.incomplete"), kinds
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == plain.output_text


def a_conversation_is_remembered(server: Server) -> None:
    talk = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "My name is Marlene."},
        {"role": "assistant", "content": "Nice to meet you, Marlene!"},
        {"role": "user", "content": [{"type": "text", "text": "What is my name?"}]},
    ]
    assert "Marlene" in server.chat(messages=talk).choices[0].message.content


def the_cache_is_seen_in_the_usage(server: Server) -> None:
    long = [{"role": "user", "content": "The quick brown fox jumps over the lazy dog. " * 20 + str(time.time())}]
    server.chat(messages=long, max_tokens=2)
    usage = server.chat(messages=long, max_tokens=2).usage
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    assert 0 < cached < usage.prompt_tokens, usage


def unicode_survives(server: Server) -> None:
    ask = [{"role": "user", "content": "Repeat: «naïve café» 你好 🚀"}]
    text = text_of(server.chat(messages=ask, max_tokens=40, stream=True))
    # The token limit may cut an answer inside a character, which is left out then.
    assert text and "\ufffd" not in text, text


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}, "unit": {"enum": ["C", "F"]}},
            "required": ["city", "unit"],
        },
    },
}
ASK_WEATHER = [{"role": "user", "content": "What is the weather in Oslo?"}]


def arguments_hold(text: str) -> dict:
    arguments = json.loads(text)
    assert arguments["city"] in ("Paris", "Oslo") and arguments["unit"] in ("C", "F"), arguments
    return arguments


def a_required_call_is_made_and_its_result_is_read(server: Server) -> None:
    ask = {"messages": ASK_WEATHER, "tools": [WEATHER], "max_tokens": 100, "parallel_tool_calls": False}
    choice = server.chat(**ask, tool_choice="required").choices[0]
    assert choice.finish_reason == "tool_calls", choice
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.function.name == "get_weather" and call.id
    arguments_hold(call.function.arguments)
    named = {"type": "function", "function": {"name": "get_weather"}}
    again = server.chat(**ask, tool_choice=named).choices[0].message.tool_calls[0]
    assert again.function.name == "get_weather" and again.id != call.id
    result = {"role": "tool", "tool_call_id": call.id, "content": "Snow, -3 degrees"}
    answer = server.chat(messages=[*ASK_WEATHER, choice.message, result], tools=[WEATHER], max_tokens=40).choices[0]
    assert answer.message.content or answer.message.tool_calls, answer


def a_streamed_call_adds_up_to_the_whole_one(server: Server) -> None:
    ask = {"messages": ASK_WEATHER, "tools": [WEATHER], "max_tokens": 100, "tool_choice": "required"}
    whole = server.chat(**ask, parallel_tool_calls=False).choices[0].message.tool_calls
    calls: dict[int, dict] = {}
    finish = None
    for chunk in server.chat(**ask, parallel_tool_calls=False, stream=True):
        for choice in chunk.choices:
            finish = choice.finish_reason or finish
            assert not choice.delta.content
            for delta in choice.delta.tool_calls or []:
                call = calls.setdefault(delta.index, {"id": delta.id, "name": delta.function.name, "arguments": ""})
                call["arguments"] += delta.function.arguments or ""
    assert finish == "tool_calls" and len(calls) == len(whole) == 1
    assert (calls[0]["name"], calls[0]["arguments"]) == (whole[0].function.name, whole[0].function.arguments)
    assert calls[0]["id"].startswith("call_")
    # The SDK's own accumulator agrees.
    stream = server.client.chat.completions.stream(
        model=server.model, temperature=0, **ask, parallel_tool_calls=False
    )
    with stream as events:
        final = events.get_final_completion()
    assert final.choices[0].message.tool_calls[0].function.arguments == whole[0].function.arguments


def responses_call_functions(server: Server) -> None:
    tool = {"type": "function", **WEATHER["function"], "strict": False}
    ask = {"model": server.model, "tools": [tool], "tool_choice": "required", "max_output_tokens": 100, "temperature": 0}
    ask |= {"parallel_tool_calls": False}
    answer = server.client.responses.create(**ask, input=ASK_WEATHER)
    (call,) = [item for item in answer.output if item.type == "function_call"]
    arguments_hold(call.arguments)
    events = list(server.client.responses.create(**ask, input=ASK_WEATHER, stream=True))
    deltas = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    assert deltas == call.arguments
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert done.arguments == deltas
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "Snow"}
    ask |= {"tool_choice": "none"}
    said = server.client.responses.create(**ask, input=[*ASK_WEATHER, call.model_dump(exclude_none=True), result])
    bare = server.client.responses.create(**ask, input=ASK_WEATHER)
    assert said.output_text and said.usage.input_tokens > bare.usage.input_tokens


def mistakes_in_tools_name_the_field(server: Server) -> None:
    twice = [WEATHER, WEATHER]
    refused(lambda: server.chat(tools=twice), openai.BadRequestError, "tools.1.function.name")
    other = {"type": "function", "function": {"name": "other"}}
    refused(lambda: server.chat(tools=[WEATHER], tool_choice=other), openai.BadRequestError, "tool_choice")


def cloudflare_gets_arguments_as_objects(server: Server) -> None:
    flat = WEATHER["function"]
    result = server.cloudflare.ai.run(
        server.model, account_id=ACCOUNT, messages=ASK_WEATHER, tools=[flat], max_tokens=100,
        extra_body={"temperature": 0, "tool_choice": "required", "parallel_tool_calls": False},
    )
    (call,) = result["tool_calls"]
    assert call["name"] == "get_weather" and call["arguments"]["city"] in ("Paris", "Oslo"), call
    assert not result["response"] and "id" not in call, result


def a_model_that_writes_makes_no_vectors(server: Server) -> None:
    def embed():
        server.client.embeddings.create(model=server.model, input="x")

    refused(embed, openai.NotFoundError, "no such model", "or task")


def mistakes_name_the_field(server: Server) -> None:
    refused(lambda: server.chat(temperature=9), openai.BadRequestError, "temperature")
    refused(lambda: server.chat(messages=[]), openai.BadRequestError, "messages")
    refused(lambda: server.chat(model="no/such-model"), openai.NotFoundError, "no/such-model")
    long = [{"role": "user", "content": "word " * 20_000}]
    refused(lambda: server.chat(messages=long), openai.BadRequestError, "token")


def a_client_that_leaves_frees_its_place(server: Server) -> None:
    stream = server.chat(messages=TALK, max_tokens=2000, stream=True, extra_body={"ignore_eos": True})
    for index, _ in enumerate(stream):
        if index == 5:
            break
    assert server.metric("neurond_running") >= 1
    stream.close()
    nothing_runs(server)


def a_client_that_gives_up_frees_its_place(server: Server) -> None:
    impatient = server.client.with_options(timeout=1.0)

    def ask():
        impatient.chat.completions.create(
            model=server.model, messages=TALK, max_tokens=2000, extra_body={"ignore_eos": True}
        )

    refused(ask, openai.APITimeoutError)
    nothing_runs(server)


def nothing_runs(server: Server) -> None:
    end = time.monotonic() + 10
    while (running := server.metric("neurond_running")) > 0:
        assert time.monotonic() < end, f"{running} sequences still run"
        time.sleep(0.05)
    assert server.metric("neurond_kv_blocks_used") == 0


def cloudflare_runs_a_model_by_prompt_and_by_messages(server: Server) -> None:
    for ask in ({"prompt": ASK[0]["content"]}, {"messages": ASK}):
        result = server.cloudflare.ai.run(
            server.model, account_id=ACCOUNT, max_tokens=24, extra_body={"temperature": 0}, **ask
        )
        assert "Paris" in result["response"], result
        usage = result["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"], usage
        assert usage["neurons"] > 0, usage


def cloudflare_streams_native_events(server: Server) -> None:
    call = server.cloudflare.ai.with_streaming_response.run(
        server.model, account_id=ACCOUNT, messages=ASK, max_tokens=24, extra_body={"stream": True, "temperature": 0}
    )
    with call as answer:
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", lines[-1]
    events = [json.loads(line) for line in lines[:-1]]
    assert "Paris" in "".join(event["response"] for event in events), events
    assert len(events) > 5 and events[-1]["usage"]["completion_tokens"] > 0, events[-1]


def cloudflare_finds_models_and_their_schema(server: Server) -> None:
    models = server.cloudflare.ai.models.list(account_id=ACCOUNT, search=server.model)
    assert [model["name"] for model in models] == [server.model]
    schema = server.cloudflare.ai.models.schema.get(account_id=ACCOUNT, model=server.model)
    assert schema.input and schema.output


def cloudflare_errors_carry_their_codes(server: Server) -> None:
    def run(model: str, **fields):
        server.cloudflare.ai.run(model, account_id=ACCOUNT, **fields)

    refused(lambda: run("@cf/no/such", prompt="x"), cloudflare.BadRequestError, "5007")
    refused(lambda: run(server.model, prompt="x", max_tokens=100_000), cloudflare.BadRequestError, "5021", "context")
    refused(lambda: run(server.model, prompt="x", temperature=9), cloudflare.BadRequestError, "5006", "temperature")


CHECKS = [
    models_are_listed,
    chat_answers_with_usage,
    max_tokens_ends_with_length_and_the_models_end_with_stop,
    a_stream_says_the_same_as_an_answer,
    a_stream_comes_in_pieces,
    n_gives_as_many_answers,
    a_seed_repeats_an_answer,
    logprobs_are_probabilities_of_the_tokens_said,
    stop_strings_end_an_answer_and_are_not_said,
    logit_bias_and_penalties_change_the_answer,
    completions_continue_a_text,
    responses_answer_and_stream,
    a_conversation_is_remembered,
    the_cache_is_seen_in_the_usage,
    unicode_survives,
    a_required_call_is_made_and_its_result_is_read,
    a_streamed_call_adds_up_to_the_whole_one,
    responses_call_functions,
    mistakes_in_tools_name_the_field,
    cloudflare_gets_arguments_as_objects,
    a_model_that_writes_makes_no_vectors,
    mistakes_name_the_field,
    a_client_that_leaves_frees_its_place,
    a_client_that_gives_up_frees_its_place,
    cloudflare_runs_a_model_by_prompt_and_by_messages,
    cloudflare_streams_native_events,
    cloudflare_finds_models_and_their_schema,
    cloudflare_errors_carry_their_codes,
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url", help="base URL, ending in /v1")
    parser.add_argument("--model", help="default: the first the server lists")
    parser.add_argument("--token", default="none")
    parser.add_argument("--only", default="", help="comma-separated parts of names")
    parser.add_argument("--wait", type=float, default=60, help="seconds until the server must be ready")
    args = parser.parse_args()
    server = Server(args.url, args.model, args.token, args.wait)
    wanted = [part for part in args.only.split(",") if part]
    checks = [check for check in CHECKS if not wanted or any(part in check.__name__ for part in wanted)]
    failed = 0
    for check in checks:
        started = time.monotonic()
        try:
            check(server)
            word = "ok    "
        except Exception:
            failed += 1
            word = "FAILED"
            traceback.print_exc()
        print(f"{word} {time.monotonic() - started:6.2f} s  {check.__name__}", flush=True)
    print(f"{len(checks) - failed} of {len(checks)} checks hold with openai {openai.__version__}, "
          f"cloudflare {cloudflare.__version__} and {server.model}")
    return 1 if failed or not checks else 0


if __name__ == "__main__":
    sys.exit(main())
