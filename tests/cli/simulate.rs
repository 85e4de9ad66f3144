//! `neurond simulate`.

use serde_json::Value;

use crate::{Ran, neurond, run};

fn simulate(args: &[&str]) -> Ran {
    let folder = tempfile::tempdir().expect("folder");
    run(&mut neurond(folder.path(), &[&["simulate"], args].concat()))
}

fn figures(args: &[&str]) -> Value {
    let ran = simulate(&[args, &["--json", "-"]].concat()).succeeds();
    serde_json::from_str(&ran.out).expect("JSON")
}

#[test]
fn the_table_names_what_a_planner_asks_for() {
    let out = simulate(&["-n", "2", "-t", "10m"]).succeeds().out;
    for word in [
        "2 of Llama 3.3 70B",
        "output tokens/s",
        "devices busy",
        "found in the prefix cache",
        "preemptions",
        "fairness",
        "first token",
        "p99",
        "account-01",
        "flood",
        "neurons",
        "00:05",
    ] {
        assert!(out.contains(word), "{word} is not in {out}");
    }
}

#[test]
fn the_same_arguments_print_the_same_bytes() {
    let args = ["-n", "3", "-t", "10m", "--faults", "--set", "death_every_s=300", "--check", "--json", "-"];
    let [one, other] = [(); 2].map(|()| simulate(&args).succeeds().out);
    assert_eq!(one, other);
    let report: Value = serde_json::from_str(&one).expect("JSON");
    assert!(report["runs"][0]["deaths"].as_u64() > Some(0), "{report}");
    assert_ne!(simulate(&[&args[..], &["--seed", "2"]].concat()).succeeds().out, one);
}

#[test]
fn two_settings_stand_beside_each_other() {
    let args = ["-n", "2", "-t", "10m", "--compare", "devices=1,max_running=2"];
    let out = simulate(&args).succeeds().out;
    assert!(out.contains("as is") && out.contains("devices=1 max_running=2"), "{out}");
    let runs = figures(&args);
    assert_eq!(runs["runs"][0]["settings"]["devices"], 2);
    assert_eq!(runs["runs"][1]["settings"]["max_running"], 2);
    let busy = |at: usize| runs["runs"][at]["utilisation"].as_f64().expect("a number");
    assert!(busy(1) > busy(0), "{} {}", busy(1), busy(0));
}

#[test]
fn a_trace_is_replayed() {
    let folder = tempfile::tempdir().expect("folder");
    let rows: String = (0..50).map(|at| format!("{},team-{},{},20,shared,100\n", at / 2, at % 2, 150 + at)).collect();
    let text = format!("time_s,account,prompt_tokens,output_tokens,prefix,prefix_tokens\n{rows}");
    std::fs::write(folder.path().join("requests.csv"), text).expect("written");
    let trace = |args: &[&str]| {
        let args = [&["simulate", "-n", "1", "--trace", "requests.csv"], args].concat();
        run(&mut neurond(folder.path(), &args))
    };
    let report: Value = serde_json::from_str(&trace(&["--json", "-"]).succeeds().out).expect("JSON");
    let run = &report["runs"][0];
    assert_eq!((&run["requests"], &run["done"], &run["output_tokens"]), (&50.into(), &50.into(), &1000.into()));
    assert_eq!(run["accounts"][1]["account"], "team-1");
    // All but the first of each account find the six whole blocks of the prefix.
    assert_eq!(run["cached_tokens"], 48 * 96);
    assert!(run["wall_s"].as_f64() > Some(24.0));
    let fast: Value = serde_json::from_str(&trace(&["--speed", "10", "--json", "-"]).succeeds().out).expect("JSON");
    assert!(fast["runs"][0]["wall_s"].as_f64() < Some(4.0));
    std::fs::write(folder.path().join("requests.csv"), "time_s,prompt_tokens,output_tokens\n1,2\n").expect("written");
    trace(&[]).fails(2, &["requests.csv", "line 2", "output_tokens"]);
}

#[test]
fn everything_that_can_be_set_is_listed() {
    let out = simulate(&["--list"]).succeeds().out;
    for word in ["h100-llama-8b-fp8", "cpu-smollm2-135m", "agent", "max_running", "kv_bytes_per_token", "death_every_s"]
    {
        assert!(out.contains(word), "{word} is not in {out}");
    }
}

#[test]
fn wrong_settings_are_answered_with_a_remedy() {
    for (args, words) in [
        (&["--device", "h100"][..], &["h100-llama-8b-fp8"][..]),
        (&["--profile", "chatty"], &["rag"]),
        (&["--set", "max_runing=3"], &["--list"]),
        (&["--set", "running=3"], &["max_running"]),
        (&["--set", "rate"], &["NAME=VALUE"]),
        (&["--compare", "flood=2"], &["0 to 1"]),
        (&["--duration", "1w"], &["24h"]),
        (&["--trace", "missing.csv"], &["missing.csv"]),
        (&["--trace", "x", "--rate", "1"], &["cannot be used with"]),
        (&["--set", "memory_bytes=1e9"], &["no KV block fits"]),
    ] {
        simulate(args).fails(2, words);
    }
}
