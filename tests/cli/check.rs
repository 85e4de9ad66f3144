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
    let embeds = |gpus: &str| GOOD.replace("@cf/meta/llama-3.2-1b-instruct", "@cf/baai/bge-m3") + gpus;
    for (gpus, expected) in [("", "all, bf16"), ("gpus = [0, 2]", "0 2, bf16"), ("gpus = []", " -  ")] {
        let out = check(&embeds(gpus), &[]).succeeds().out;
        let row = out.lines().find(|line| line.starts_with("@cf/baai/bge-m3")).expect("a row");
        assert!(row.contains(expected), "{gpus}: {out}");
    }
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
fn a_number_of_ranks_is_held_against_the_model_file() {
    let model = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens/tiny-llama");
    let with = |ranks: usize| {
        let id = "@cf/huggingfacetb/smollm2-135m-instruct";
        format!("[auth]\nanonymous = \"local\"\n[[model]]\nid = {id:?}\npath = {model:?}\ntensor_parallel = {ranks}\n")
    };
    let out = check(&with(2), &["--threads", "2"]).succeeds().out;
    let row = out.lines().find(|line| line.starts_with("@cf/")).expect("a row");
    assert!(out.contains("ranks") && row.split_whitespace().any(|cell| cell == "2"), "{out}");
    let words = ["smollm2-135m-instruct", "tensor_parallel = 3 is not possible", "4 query heads", "1, 2 and 4 are"];
    check(&with(3), &[]).fails(2, &words);
    check(&GOOD.replace("path =", "tensor_parallel = 2\npath ="), &[]).fails(1, &["m.gguf"]);
    assert!(check(&with(4), &["--threads", "2"]).succeeds().err.contains("more than engine.threads = 2"));
}

#[test]
fn warnings_fail_only_when_strict() {
    let nobody = "[server]\nlisten = \"127.0.0.1:9100\"\n";
    let ran = check(nobody, &[]).succeeds();
    assert!(ran.err.contains("warning: auth"), "{}", ran.err);
    check(nobody, &["--strict"]).fails(1, &["warning: auth"]);
    check(GOOD, &["--strict"]).succeeds();
}
