//! Reading requests, as tables; and that no JSON whatever makes a reader panic.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::fields::Fields;
use super::{chat, classic, completions, responses};
use crate::base::{Kind, ModelId, Result};
use crate::config::{CatalogEntry, Price, ResultShape};
use crate::task::{Pooling, Prompt, Task, TextInput};

/// A text model of the catalog.
pub(super) fn entry(id: &str) -> CatalogEntry {
    CatalogEntry {
        id: ModelId::new(id),
        aliases: Vec::new(),
        task: Task::TextGeneration,
        shape: ResultShape::Classic,
        description: String::new(),
        context: 4096,
        max_tokens: 256,
        temperature: 0.6,
        dimensions: None,
        pooling: Pooling::Mean,
        truncate: true,
        flags: Vec::new(),
        price: Price::default(),
        rate_per_minute: 300,
        planned_deprecation: None,
        created_at: String::new(),
    }
}

#[derive(Clone, Copy, Debug)]
enum Wire {
    Chat,
    Completions,
    Responses,
    Run,
}

/// The inputs that a body turns into, one a prompt.
fn read(wire: Wire, body: &Value) -> Result<Vec<TextInput>> {
    let entry = entry("@cf/test/model");
    let fields = Fields::of(body)?;
    match wire {
        Wire::Chat => chat::parse(&fields, &entry).map(|request| vec![request.input]),
        Wire::Completions => completions::parse(&fields, &entry).map(|request| request.inputs),
        Wire::Responses => responses::parse(&fields, &entry).map(|request| vec![request.input]),
        Wire::Run => classic::parse(&fields, &entry).map(|request| vec![request.input]),
    }
}

/// What a prompt reads like: `system: … | user: …`, `raw: …`, `tokens: …`.
fn prompt(input: &TextInput) -> String {
    match &input.prompt {
        Prompt::Chat { messages, .. } => {
            let turns = messages.iter().map(|m| format!("{}: {}", json!(m.role).as_str().unwrap_or(""), m.content));
            turns.collect::<Vec<_>>().join(" | ")
        }
        Prompt::Raw(text) => format!("raw: {text}"),
        Prompt::Tokens(ids) => format!("tokens: {ids:?}"),
    }
}

#[track_caller]
fn reads(wire: Wire, body: Value, expected: &[&str]) {
    let inputs = read(wire, &body).unwrap_or_else(|error| panic!("{wire:?} {body}: {error:?}"));
    assert_eq!(inputs.iter().map(prompt).collect::<Vec<_>>(), expected, "{wire:?} {body}");
}

#[track_caller]
fn refuses(wire: Wire, body: Value, kind: Kind, param: &str) {
    match read(wire, &body) {
        Ok(_) => panic!("{wire:?} {body} was accepted"),
        Err(error) => {
            assert_eq!((error.kind(), error.param().unwrap_or("")), (kind, param), "{wire:?} {body}: {error:?}");
        }
    }
}

/// `body` with other fields on top.
fn with(mut body: Value, more: Value) -> Value {
    for (name, value) in more.as_object().unwrap() {
        body[name] = value.clone();
    }
    body
}

fn hello() -> Value {
    json!({ "messages": [{ "role": "user", "content": "hi" }] })
}

#[test]
fn chat_messages_are_read_in_every_form_clients_send() {
    let check = |messages: Value, expected: &str| reads(Wire::Chat, json!({ "messages": messages }), &[expected]);
    check(
        json!([{"role": "developer", "content": "be brief"}, {"role": "user", "content": "hi"}]),
        "system: be brief | user: hi",
    );
    check(
        json!([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]),
        "user: ab",
    );
    check(
        json!([{"role": "assistant", "content": null, "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "1", "tool_call_id": "x"}]),
        "assistant:  | tool: 1",
    );
    check(json!([{"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": 1}}]}]), "assistant: ");
    check(json!([{"role": "user", "content": "hi", "unknown": {"x": 1}}]), "user: hi");
}

#[test]
fn what_is_wrong_with_a_chat_is_said_by_field() {
    let bad = |more: Value, param: &str| refuses(Wire::Chat, with(hello(), more), Kind::BadInput, param);
    bad(json!({"messages": null}), "messages");
    bad(json!({"messages": []}), "messages");
    bad(json!({"messages": "hi"}), "messages");
    bad(json!({"messages": ["hi"]}), "messages.0");
    bad(json!({"messages": [{"role": "user"}]}), "messages.0.content");
    bad(json!({"messages": [{"content": "x"}]}), "messages.0.role");
    bad(json!({"messages": [{"role": "king", "content": "x"}]}), "messages.0.role");
    bad(json!({"messages": [{"role": "user", "content": 5}]}), "messages.0.content");
    bad(json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]}), "messages.0.content.0.text");
    bad(json!({"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]}), "messages.0.tool_calls.0.name");
    bad(json!({"messages": [{"role": "assistant", "tool_calls": ["x"]}]}), "messages.0.tool_calls.0");
    bad(
        json!({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 1}}]}]}),
        "messages.0.tool_calls.0.function.arguments",
    );
    bad(json!({"tools": [{"type": "function", "function": {"name": "a b"}}]}), "tools.0.function.name");
    bad(json!({"tool_choice": "required"}), "tool_choice");
    bad(json!({"temperature": "hot"}), "temperature");
    bad(json!({"temperature": -0.1}), "temperature");
    bad(json!({"top_p": 1.5}), "top_p");
    bad(json!({"max_tokens": 0}), "max_tokens");
    bad(json!({"max_completion_tokens": 1.5}), "max_completion_tokens");
    bad(json!({"n": 17}), "n");
    bad(json!({"stop": ""}), "stop");
    bad(json!({"stop": ["a", 1]}), "stop");
    bad(json!({"stop": vec!["x"; 17]}), "stop");
    bad(json!({"logit_bias": {"x": 1}}), "logit_bias");
    bad(json!({"logit_bias": {"5": 101}}), "logit_bias.5");
    bad(json!({"top_logprobs": 3}), "top_logprobs");
    bad(json!({"logprobs": true, "top_logprobs": 21}), "top_logprobs");
    bad(json!({"stream_options": {"include_usage": true}}), "stream_options");
    bad(json!({"options": {"rejectIfBusy": "yes"}}), "options.rejectIfBusy");
}

#[test]
fn what_is_not_built_is_refused_and_what_is_off_is_not() {
    for wire in [Wire::Chat, Wire::Run] {
        let refused = |more: Value, param: &str| refuses(wire, with(hello(), more), Kind::Unsupported, param);
        refused(json!({"tools": [{"type": "web_search"}]}), "tools.0.type");
        refused(json!({"functions": [{"name": "f", "code": "x"}]}), "functions");
        refused(json!({"lora": "mine"}), "lora");
        refused(
            json!({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]}),
            "messages.0.content.0.type",
        );
        let off = json!({"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "lora": null, "functions": null});
        reads(wire, with(hello(), off), &["user: hi"]);
    }
    refuses(
        Wire::Responses,
        json!({"input": "x", "previous_response_id": "resp_1"}),
        Kind::Unsupported,
        "previous_response_id",
    );
    refuses(
        Wire::Responses,
        json!({"input": "x", "text": {"format": {"type": "json_schema"}}}),
        Kind::BadInput,
        "text.format.schema",
    );
    refuses(Wire::Completions, json!({"prompt": "x", "suffix": "y"}), Kind::Unsupported, "suffix");
    refuses(Wire::Completions, json!({"prompt": "x", "tools": [{"name": "f"}]}), Kind::Unsupported, "tools");
}

#[test]
fn every_parameter_arrives() {
    let body = with(
        hello(),
        json!({"temperature": 0, "top_p": 0.5, "top_k": -1, "min_p": 0.1, "seed": -7, "repetition_penalty": 1.1, "frequency_penalty": -2,
        "presence_penalty": 2, "logit_bias": {"5": -100}, "n": 3, "max_tokens": 9, "max_completion_tokens": 8.0, "stop": "END", "logprobs": true,
        "top_logprobs": 2, "ignore_eos": true, "chat_template_kwargs": {"enable_thinking": false}, "reasoning_effort": "low"}),
    );
    let input = read(Wire::Chat, &body).unwrap().remove(0);
    let s = &input.sampling;
    assert_eq!((s.temperature, s.top_p, s.top_k, s.min_p, s.seed), (0.0, 0.5, 0, 0.1, Some(-7i64 as u64)));
    assert_eq!((s.repetition_penalty, s.frequency_penalty, s.presence_penalty), (1.1, -2.0, 2.0));
    assert_eq!((&s.logit_bias, s.ignore_eos), (&vec![(5, -100.0)], true));
    assert_eq!((input.choices, input.max_tokens, input.logprobs), (3, Some(8), Some(2)));
    assert_eq!(input.stop, ["END"]);
    let Prompt::Chat { template_kwargs, .. } = &input.prompt else { panic!("a chat") };
    assert_eq!(Value::Object(template_kwargs.clone()), json!({"enable_thinking": false, "reasoning_effort": "low"}));

    let plain = read(Wire::Chat, &hello()).unwrap().remove(0);
    assert_eq!((plain.sampling.temperature, plain.max_tokens, plain.logprobs, plain.choices), (0.6, None, None, 1));
}

#[test]
fn sampling_parameters_go_by_the_names_of_other_servers_too() {
    let sampling = |more: Value| read(Wire::Chat, &with(hello(), more)).unwrap().remove(0).sampling;
    let dry = sampling(json!({"dry_multiplier": 0.8})).dry.unwrap();
    assert_eq!((dry.multiplier, dry.base, dry.allowed_length, dry.last_n), (0.8, 1.75, 2, None));
    assert_eq!(dry.breakers, ["\n", ":", "\"", "*"]);
    let dry = sampling(
        json!({"dry_multiplier": 1, "dry_base": 2, "dry_allowed_length": 4, "dry_penalty_last_n": 64, "dry_sequence_breakers": ["."]}),
    );
    let dry = dry.dry.unwrap();
    assert_eq!((dry.base, dry.allowed_length, dry.last_n, dry.breakers), (2.0, 4, Some(64), vec![".".to_owned()]));
    assert!(sampling(json!({"dry_multiplier": 0, "dry_base": 2})).dry.is_none());
    assert!(sampling(json!({"dry_multiplier": 1, "dry_penalty_last_n": 0})).dry.is_none());
    assert_eq!(sampling(json!({})).typical_p, 1.0);
    assert_eq!(sampling(json!({"typical_p": 0.3})).typical_p, 0.3);
    assert_eq!(sampling(json!({"repeat_penalty": 1.2})).repetition_penalty, 1.2);
    for (more, expected) in [
        (json!({}), None),
        (json!({"repeat_last_n": 64}), Some(64)),
        (json!({"penalty_last_n": 9, "repeat_last_n": 64}), Some(9)),
        (json!({"penalty_last_n": -1, "repeat_last_n": 64}), None),
        (json!({"penalty_last_n": 0}), Some(0)),
    ] {
        assert_eq!(sampling(more.clone()).penalty_last_n, expected, "{more}");
    }
    let bad = |more: Value, param: &str| refuses(Wire::Chat, with(hello(), more), Kind::BadInput, param);
    bad(json!({"typical_p": 1.1}), "typical_p");
    bad(json!({"repeat_penalty": 3}), "repeat_penalty");
    bad(json!({"repeat_last_n": -2}), "repeat_last_n");
    bad(json!({"penalty_last_n": 1.5}), "penalty_last_n");
    bad(json!({"dry_multiplier": -1}), "dry_multiplier");
    bad(json!({"dry_base": 0.5}), "dry_base");
    bad(json!({"dry_allowed_length": 0}), "dry_allowed_length");
    bad(json!({"dry_penalty_last_n": "all"}), "dry_penalty_last_n");
    bad(json!({"dry_sequence_breakers": [""]}), "dry_sequence_breakers");
    bad(json!({"dry_sequence_breakers": "none"}), "dry_sequence_breakers");
    bad(json!({"dry_sequence_breakers": vec!["x"; 33]}), "dry_sequence_breakers");
}

#[test]
fn completions_take_prompts_in_all_four_forms() {
    reads(Wire::Completions, json!({"prompt": "a"}), &["raw: a"]);
    reads(Wire::Completions, json!({"prompt": ["a", "b"]}), &["raw: a", "raw: b"]);
    reads(Wire::Completions, json!({"prompt": [1, 2]}), &["tokens: [1, 2]"]);
    reads(Wire::Completions, json!({"prompt": [[1], [2, 3]]}), &["tokens: [1]", "tokens: [2, 3]"]);
    refuses(Wire::Completions, json!({}), Kind::BadInput, "prompt");
    refuses(Wire::Completions, json!({"prompt": []}), Kind::BadInput, "prompt");
    refuses(Wire::Completions, json!({"prompt": {"a": 1}}), Kind::BadInput, "prompt");
    refuses(Wire::Completions, json!({"prompt": [1, "a"]}), Kind::BadInput, "prompt");
    refuses(Wire::Completions, json!({"prompt": [[1, -1]]}), Kind::BadInput, "prompt.0");
    refuses(Wire::Completions, json!({"prompt": vec!["x"; 65]}), Kind::BadInput, "prompt");
    refuses(Wire::Completions, json!({"prompt": vec!["x"; 20], "n": 7}), Kind::BadInput, "prompt");
}

#[test]
fn completions_compute_more_answers_than_they_give_and_look_at_the_prompt() {
    let input = |more: Value| read(Wire::Completions, &with(json!({"prompt": "x"}), more)).unwrap().remove(0);
    let best = input(json!({"n": 2, "best_of": 5}));
    assert_eq!((best.choices, best.logprobs), (5, Some(0)), "ranking needs log-probabilities");
    assert_eq!(input(json!({"best_of": 2, "logprobs": 3})).logprobs, Some(3));
    assert_eq!(input(json!({"n": 2, "best_of": 2, "stream": true})).logprobs, None);
    let bad = |more: Value, param: &str| {
        refuses(Wire::Completions, with(json!({"prompt": "x"}), more), Kind::BadInput, param);
    };
    bad(json!({"n": 3, "best_of": 2}), "best_of");
    bad(json!({"best_of": 17}), "best_of");
    bad(json!({"best_of": 2, "stream": true}), "best_of");
    bad(json!({"prompt": vec!["x"; 64], "best_of": 3}), "prompt");
    bad(json!({"prompt_logprobs": 21}), "prompt_logprobs");
    bad(json!({"prompt_logprobs": -1}), "prompt_logprobs");
    bad(json!({"prompt_logprobs": 1, "stream": true}), "prompt_logprobs");
    bad(json!({"max_tokens": 0}), "max_tokens");
    assert_eq!(input(json!({"prompt_logprobs": 2})).prompt_logprobs, Some(2));
    assert_eq!(input(json!({"logprobs": 2})).prompt_logprobs, None);
    assert_eq!(input(json!({"echo": true})).prompt_logprobs, None);
    let both = input(json!({"echo": true, "logprobs": 2, "prompt_logprobs": 1, "max_tokens": 0}));
    assert_eq!((both.prompt_logprobs, both.logprobs, both.max_tokens), (Some(2), Some(2), Some(0)));
    assert_eq!(read(Wire::Chat, &with(hello(), json!({"prompt_logprobs": 0}))).unwrap()[0].prompt_logprobs, Some(0));
    refuses(Wire::Run, with(hello(), json!({"prompt_logprobs": 1})), Kind::Unsupported, "prompt_logprobs");
    refuses(Wire::Responses, json!({"input": "x", "prompt_logprobs": 1}), Kind::Unsupported, "prompt_logprobs");
}

#[test]
fn native_inputs_are_exactly_one_of_prompt_and_messages() {
    reads(Wire::Run, json!({"prompt": "hi"}), &["user: hi"]);
    reads(Wire::Run, json!({"prompt": "hi", "raw": true}), &["raw: hi"]);
    reads(Wire::Run, hello(), &["user: hi"]);
    refuses(Wire::Run, json!({}), Kind::BadInput, "");
    refuses(Wire::Run, with(hello(), json!({"prompt": "x"})), Kind::BadInput, "");
    refuses(Wire::Run, json!({"prompt": ""}), Kind::BadInput, "prompt");
    refuses(Wire::Run, with(hello(), json!({"raw": true})), Kind::BadInput, "raw");
    refuses(Wire::Run, json!({"requests": [{"prompt": "x"}]}), Kind::BadInput, "requests");
    refuses(Wire::Run, json!({"prompt": "x", "top_k": 51}), Kind::BadInput, "top_k");
    refuses(Wire::Run, json!({"prompt": "x", "seed": 0}), Kind::BadInput, "seed");
    refuses(Wire::Run, json!({"prompt": "x", "n": 2}), Kind::Unsupported, "n");
    refuses(Wire::Run, json!({"prompt": "x", "raw": true, "tools": [{"name": "f"}]}), Kind::BadInput, "tools");
    assert!(read(Wire::Run, &json!({"prompt": "x", "tools": [{"name": "f"}]})).unwrap()[0].tools.is_some());
    let input = read(Wire::Run, &json!({"prompt": "x", "top_p": 1.7, "repetition_penalty": 0})).unwrap().remove(0);
    assert_eq!((input.sampling.top_p, input.sampling.repetition_penalty, input.sampling.temperature), (1.0, 1.0, 0.6));
}

#[test]
fn responses_take_a_string_or_items() {
    reads(Wire::Responses, json!({"input": "hi", "instructions": "be brief"}), &["system: be brief | user: hi"]);
    let items = json!([
        {"role": "user", "content": "a"},
        {"type": "reasoning", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "c"}]},
    ]);
    reads(Wire::Responses, json!({ "input": items }), &["user: a | assistant: b | user: c"]);
    refuses(Wire::Responses, json!({}), Kind::BadInput, "input");
    refuses(Wire::Responses, json!({"input": []}), Kind::BadInput, "input");
    refuses(Wire::Responses, json!({"input": [{"type": "reasoning"}]}), Kind::BadInput, "input");
    let called = json!([
        {"role": "user", "content": "a"},
        {"type": "function_call", "call_id": "x", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "y", "name": "g", "arguments": "{\"n\": 1}"},
        {"type": "function_call_output", "call_id": "y", "output": "two"},
        {"type": "function_call_output", "call_id": "x", "output": [{"type": "input_text", "text": "one"}]},
    ]);
    reads(Wire::Responses, json!({ "input": called }), &["user: a | assistant:  | tool: two | tool: one"]);
    let input = read(Wire::Responses, &json!({ "input": called })).unwrap().remove(0);
    let Prompt::Chat { messages, .. } = &input.prompt else { panic!("a chat") };
    assert_eq!(messages[1].tool_calls.as_ref().unwrap().as_array().unwrap().len(), 2, "calls in a row are one turn");
    assert_eq!(messages[2].name.as_deref(), Some("g"));
    refuses(
        Wire::Responses,
        json!({"input": [{"type": "function_call_output", "output": ""}]}),
        Kind::BadInput,
        "input.0.call_id",
    );
    refuses(Wire::Responses, json!({"input": [{"type": "custom_tool_call"}]}), Kind::Unsupported, "input.0.type");
    refuses(
        Wire::Responses,
        json!({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}),
        Kind::Unsupported,
        "input.0.content.0.type",
    );
}

/// Any JSON, three levels deep.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "(?s).{0,12}".prop_map(Value::from),
        prop::sample::select(vec!["user", "text", "message", "function", "json_object", "auto", "disabled"])
            .prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 5, |inner| {
        let name = prop_oneof![
            prop::sample::select(vec![
                "role",
                "content",
                "type",
                "text",
                "include_usage",
                "rejectIfBusy",
                "7",
                "format",
                "effort"
            ])
            .prop_map(str::to_owned),
            "[a-z]{1,4}",
        ];
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
            prop::collection::vec((name, inner), 0..5).prop_map(|pairs| Value::Object(pairs.into_iter().collect())),
        ]
    })
}

const NAMES: &[&str] = &[
    "messages",
    "prompt",
    "input",
    "instructions",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "n",
    "max_tokens",
    "max_completion_tokens",
    "max_output_tokens",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "stream",
    "stream_options",
    "tools",
    "tool_choice",
    "response_format",
    "options",
    "echo",
    "best_of",
    "raw",
    "requests",
    "metadata",
    "text",
    "reasoning",
    "truncation",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "chat_template_kwargs",
    "reasoning_effort",
    "modalities",
    "typical_p",
    "prompt_logprobs",
    "penalty_last_n",
    "repeat_last_n",
    "dry_multiplier",
    "dry_base",
    "dry_allowed_length",
    "dry_penalty_last_n",
    "dry_sequence_breakers",
];

proptest! {
    #[test]
    fn a_mutated_request_is_read_within_its_bounds_or_refused(
        changes in prop::collection::vec((prop::sample::select(NAMES), any_json()), 0..6),
        wire in prop::sample::select(vec![Wire::Chat, Wire::Completions, Wire::Responses, Wire::Run]),
        whole in any_json(),
    ) {
        let mut body = match wire {
            Wire::Chat => hello(),
            Wire::Completions | Wire::Run => json!({ "prompt": "hi" }),
            Wire::Responses => json!({ "input": "hi" }),
        };
        for (name, value) in changes {
            body[name] = value;
        }
        for body in [body, whole] {
            match read(wire, &body) {
                Ok(inputs) => {
                    prop_assert!(!inputs.is_empty());
                    for input in inputs {
                        prop_assert!((1..=16).contains(&input.choices));
                        prop_assert!(input.max_tokens.is_none_or(|tokens| tokens >= 1 || input.echo || input.prompt_logprobs.is_some()));
                        prop_assert!(input.stop.iter().all(|stop| !stop.is_empty()) && input.stop.len() <= 16);
                        prop_assert!((0.0..=5.0).contains(&input.sampling.temperature));
                        prop_assert!((0.0..=1.0).contains(&input.sampling.top_p));
                        prop_assert!(input.sampling.repetition_penalty > 0.0);
                        prop_assert!(input.sampling.dry.is_none_or(|dry| dry.base >= 1.0 && dry.allowed_length >= 1));
                        if let Prompt::Chat { messages, .. } = &input.prompt {
                            prop_assert!(!messages.is_empty());
                        }
                    }
                }
                Err(error) => {
                    prop_assert!(matches!(error.kind(), Kind::BadInput | Kind::Unsupported), "{:?}", error);
                    prop_assert!(!error.message().is_empty());
                }
            }
        }
    }
}
