//! `neurond check-config`, and the parts of `neurond serve` that end before anything is served.

use crate::{Ran, neurond, run};

fn check(config: &str, args: &[&str]) -> Ran {
    let folder = tempfile::tempdir().expect("folder");
    std::fs::write(folder.path().join("c.toml"), config).expect("written");
    std::fs::write(folder.path().join("m.gguf"), [0; 2_500]).expect("written");
    run(&mut neurond(folder.path(), &[&["check-config", "c.toml"], args].concat()))
}

const GOOD: &str = r#"
[server]
listen = "127.0.0.1:9100"
[auth]
anonymous = "local"
[[model]]
id = "@cf/meta/llama-3.2-1b-instruct"
path = "m.gguf"
"#;

#[test]
fn a_good_configuration_is_summed_up() {
    let out = check(GOOD, &[]).succeeds().out;
    for words in ["c.toml", "http://127.0.0.1:9100", "account local", "@cf/meta/llama-3.2-1b-instruct", "2.5 kB"] {
        assert!(out.contains(words), "{words} is not in {out}");
    }
    let out = check(GOOD, &["--listen", "127.0.0.1:9200"]).succeeds().out;
    assert!(out.contains("http://127.0.0.1:9200"), "flags win over the file: {out}");
}

#[test]
fn mistakes_name_key_value_and_remedy() {
    for (config, words) in [
        ("[server]\nlisten = \"nowhere\"\n", &["server.listen", "nowhere", "127.0.0.1:8080"][..]),
        ("[server]\nlistne = \"127.0.0.1:1\"\n", &["listne", "listen"]),
        ("[[model]]\nid = \"@cf/meta/llama-3.2-1b-instruct\"\npath = \"gone.gguf\"\n", &["gone.gguf", "neurond pull"]),
        ("[engine]\nthreads = 0\n", &["engine.threads", "0"]),
        ("not toml", &["c.toml", "line 1"]),
    ] {
        check(config, &[]).fails(2, words);
    }
    let folder = tempfile::tempdir().expect("folder");
    run(&mut neurond(folder.path(), &["check-config", "gone.toml"])).fails(2, &["gone.toml", "--config"]);
    run(&mut neurond(folder.path(), &["serve", "--config", "gone.toml"])).fails(2, &["gone.toml"]);
}

#[test]
fn warnings_fail_only_when_strict() {
    let nobody = "[server]\nlisten = \"127.0.0.1:9100\"\n";
    let ran = check(nobody, &[]).succeeds();
    assert!(ran.err.contains("warning: auth"), "{}", ran.err);
    check(nobody, &["--strict"]).fails(1, &["warning: auth"]);
    check(GOOD, &["--strict"]).succeeds();
}
