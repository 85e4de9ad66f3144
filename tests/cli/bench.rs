//! `neurond bench`.

use std::collections::HashSet;

use serde_json::Value;

use crate::openai::{Mood, OpenAi};
use crate::{Ran, neurond, run};

fn bench(server: &OpenAi, args: &[&str]) -> Ran {
    let folder = tempfile::tempdir().expect("folder");
    run(&mut neurond(folder.path(), &[&["bench", "--url", &server.url()], args].concat()))
}

fn figures(server: &OpenAi, args: &[&str]) -> Value {
    let ran = bench(server, &[args, &["--json", "-"]].concat()).succeeds();
    serde_json::from_str(&ran.out).expect("JSON")
}

fn between(value: &Value, low: f64, high: f64) {
    let value = value.as_f64().expect("a number");
    assert!((low..=high).contains(&value), "{value} is not within {low} to {high}");
}

#[test]
fn latencies_and_throughput_are_what_the_server_does() {
    let server = OpenAi::start(Mood::Slowly(20));
    let json = figures(&server, &["-c", "1,4", "-n", "8", "--output-tokens", "10", "--warmup", "1"]);
    for (level, clients) in [(0, 1.0), (1, 4.0)] {
        let level = &json["levels"][level];
        assert_eq!((&level["ok"], &level["failed"]), (&8.into(), &0.into()));
        assert_eq!(level["output_tokens"], 80);
        between(&level["ttft_ms"]["p50"], 20.0, 60.0);
        between(&level["inter_token_ms"]["p50"], 20.0, 40.0);
        between(&level["end_to_end_ms"]["p50"], 200.0, 500.0);
        between(&level["output_tokens_per_s"], 20.0 * clients, 50.0 * clients);
    }
}

#[test]
fn prompts_have_the_length_asked_for_and_are_all_different() {
    let server = OpenAi::start(Mood::Well);
    let json = figures(&server, &["-c", "2", "-n", "10", "--input-tokens", "100", "--output-tokens", "2"]);
    // The server counts ten tokens for its template and one a word: calibration has to find that out.
    assert_eq!(json["levels"][0]["prompt_tokens"], 1000);
    let seen = server.seen();
    let firsts: HashSet<String> = seen
        .iter()
        .map(|body| body["messages"][0]["content"].as_str().expect("text").split(' ').take(5).collect::<String>())
        .collect();
    assert_eq!(firsts.len(), seen.len(), "a prompt was used twice");
    assert!(seen.iter().all(|body| body["ignore_eos"] == true && body["stream_options"]["include_usage"] == true));
}

#[test]
fn texts_become_vectors_in_batches_of_the_size_and_length_asked_for() {
    let server = OpenAi::start(Mood::Well);
    let args = ["--endpoint", "embeddings", "--batch", "8", "-c", "2", "-n", "6", "--input-tokens", "50"];
    let json = figures(&server, &args);
    let level = &json["levels"][0];
    assert_eq!((&json["endpoint"], &json["batch"], &level["ok"]), (&"embeddings".into(), &8.into(), &6.into()));
    assert_eq!((&level["texts"], &level["prompt_tokens"]), (&48.into(), &(48 * 50).into()));
    let seen = server.seen();
    let texts: Vec<&Value> = seen.iter().flat_map(|body| body["input"].as_array().expect("texts")).collect();
    let different: HashSet<&str> = texts.iter().map(|text| text.as_str().expect("text")).collect();
    assert_eq!(different.len(), texts.len(), "a text was used twice");
    let table = bench(&server, &args).succeeds().out;
    assert!(table.contains("texts/s"), "{table}");
}

#[test]
fn a_shared_prefix_is_shared() {
    let server = OpenAi::start(Mood::Well);
    let args = ["-c", "1", "-n", "4", "--warmup", "0", "--input-tokens", "100", "--shared-prefix", "60"];
    figures(&server, &args);
    let seen = server.seen();
    let text = |index: usize| seen[index]["messages"][0]["content"].as_str().expect("text").to_owned();
    let (one, other) = (text(2), text(3));
    let common = one.split(' ').zip(other.split(' ')).take_while(|(a, b)| a == b).count();
    assert!((60..63).contains(&common), "{common}");
    bench(&server, &["--shared-prefix", "200"]).fails(2, &["--input-tokens"]);
}

#[test]
fn the_same_seed_asks_the_same() {
    let server = OpenAi::start(Mood::Well);
    let args = ["-c", "1", "-n", "3", "--seed", "7", "--endpoint", "completions", "--output-tokens", "1"];
    figures(&server, &args);
    let first: Vec<_> = server.seen();
    figures(&server, &args);
    assert_eq!(server.seen()[first.len()..], first[..]);
}

#[test]
fn failures_are_counted_by_kind_beside_the_answers() {
    let server = OpenAi::start(Mood::EveryOther);
    let args = ["-c", "1", "-n", "6", "--warmup", "0", "--output-tokens", "1"];
    let folder = tempfile::tempdir().expect("folder");
    let prompts = folder.path().join("prompts.txt");
    std::fs::write(&prompts, "one\ntwo\n").expect("written");
    let prompts = ["--prompt-file", prompts.to_str().expect("UTF-8")];
    let json = figures(&server, &[&args[..], &prompts].concat());
    let level = &json["levels"][0];
    assert_eq!((&level["ok"], &level["failed"]), (&3.into(), &3.into()));
    assert_eq!(level["failures"]["status 429"]["count"], 3);
    assert_eq!(server.seen()[1]["messages"][0]["content"], "two");
}

#[test]
fn a_server_that_answers_nobody_is_a_failure() {
    let server = OpenAi::start(Mood::CutOff);
    bench(&server, &["-c", "1", "-n", "2", "--warmup", "0"]).fails(1, &["broke off"]);
}

#[test]
fn arrivals_at_a_rate_do_not_wait_for_answers() {
    let server = OpenAi::start(Mood::Slowly(50));
    // An answer takes half a second; forty a second arrive. A closed loop of one would need ten seconds.
    let json = figures(&server, &["--rate", "40", "-n", "20", "--output-tokens", "10", "--warmup", "0"]);
    let level = &json["levels"][0];
    assert_eq!(level["ok"], 20);
    between(&level["wall_s"], 0.5, 4.0);
}

#[test]
fn a_run_for_a_time_ends_in_time() {
    let server = OpenAi::start(Mood::Slowly(5));
    let args = ["-c", "3", "--duration", "1", "--output-tokens", "10", "--warmup", "0"];
    let json = figures(&server, &args);
    between(&json["levels"][0]["wall_s"], 1.0, 2.0);
    between(&json["levels"][0]["ok"], 15.0, 60.0);
}

#[test]
fn the_table_names_its_columns() {
    let server = OpenAi::start(Mood::Well);
    let out = bench(&server, &["-c", "2", "-n", "4", "--output-tokens", "4"]).succeeds().out;
    for word in ["output tok/s", "time to first token", "between tokens", "p99", "end to end"] {
        assert!(out.contains(word), "{word} is not in {out}");
    }
}
