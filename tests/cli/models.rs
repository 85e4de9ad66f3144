//! `neurond models`.

use serde_json::Value;

use crate::openai::{Mood, OpenAi};
use crate::{neurond, run};

#[test]
fn models_of_a_server_are_listed_for_people_and_for_programs() {
    let folder = tempfile::tempdir().expect("folder");
    let server = OpenAi::start(Mood::Well);
    let table = run(&mut neurond(folder.path(), &["models", "--url", &server.url()])).succeeds().out;
    let tiny = table.lines().find(|line| line.starts_with("tiny")).expect("a row");
    assert_eq!(
        tiny.split_whitespace().collect::<Vec<_>>(),
        ["tiny", "Text", "Generation", "yes", "8192", "2457", "/", "18252"]
    );
    let json = run(&mut neurond(folder.path(), &["models", "--json", "--url", &server.url()])).succeeds().out;
    let json: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json[1]["id"], "other");
}

#[test]
fn without_a_server_the_way_to_start_one_is_told() {
    let folder = tempfile::tempdir().expect("folder");
    // Port 1 of this machine answers nobody.
    run(&mut neurond(folder.path(), &["models", "--url", "http://127.0.0.1:1"]))
        .fails(1, &["cannot reach http://127.0.0.1:1/v1", "neurond serve"]);
}

#[test]
fn a_token_opens_a_guarded_server() {
    let folder = tempfile::tempdir().expect("folder");
    let server = OpenAi::start(Mood::Guarded);
    let ask = || neurond(folder.path(), &["models", "--url", &server.url()]);
    run(&mut ask()).fails(1, &["401", "who are you?", "--token"]);
    run(ask().env("NEUROND_TOKEN", "secret")).succeeds();
    run(ask().env("OPENAI_API_KEY", "secret")).succeeds();
    run(ask().args(["--token", "secret"])).succeeds();
    let help = run(neurond(folder.path(), &["models", "--help"]).env("NEUROND_TOKEN", "secret")).succeeds().out;
    assert!(!help.contains("secret"), "help must not show tokens: {help}");
}

#[test]
fn local_models_need_no_server() {
    let folder = tempfile::tempdir().expect("folder");
    let weights = folder.path().join("models/org/m.gguf");
    std::fs::create_dir_all(weights.parent().expect("a folder")).expect("created");
    std::fs::write(&weights, [0; 1500]).expect("written");
    let table = run(&mut neurond(folder.path(), &["models", "--local"])).succeeds().out;
    assert!(table.contains("models/org/m.gguf") && table.contains("1.5 kB"), "{table}");
    let all = run(&mut neurond(folder.path(), &["models", "--local", "--all"])).succeeds().out;
    assert!(all.contains("@cf/meta/llama-3.1-8b-instruct"), "{all}");
}
