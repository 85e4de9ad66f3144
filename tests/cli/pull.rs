//! `neurond pull`, against a hub on this machine.

use std::path::PathBuf;
use std::process::Command;

use crate::hub::{Faults, Hub, sha256};
use crate::{Ran, neurond, run};

/// Bytes that repeat nowhere, so that a wrong offset shows.
fn weights(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect()
}

struct Pull {
    hub: Hub,
    folder: tempfile::TempDir,
}

impl Pull {
    fn new(files: &[(&str, Vec<u8>)], faults: Faults) -> Self {
        Self { hub: Hub::start(files, faults), folder: tempfile::tempdir().expect("folder") }
    }

    fn command(&self, args: &[&str]) -> Command {
        neurond(self.folder.path(), &[&["pull", "--endpoint", &self.hub.url()], args].concat())
    }

    fn run(&self, args: &[&str]) -> Ran {
        run(&mut self.command(args))
    }

    fn path(&self, file: &str) -> PathBuf {
        self.folder.path().join("models/org/model").join(file)
    }

    #[track_caller]
    fn has(&self, file: &str, bytes: &[u8]) {
        let there = std::fs::read(self.path(file)).expect(file);
        assert_eq!(sha256(&there), sha256(bytes), "{file} has other bytes");
    }

    /// Everything in the model's folder, parts included.
    fn files(&self) -> Vec<String> {
        let entries = std::fs::read_dir(self.path("")).into_iter().flatten().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        names.sort();
        names
    }
}

fn repository() -> Vec<(&'static str, Vec<u8>)> {
    vec![
        ("README.md", b"read me".to_vec()),
        ("config.json", b"{}".to_vec()),
        ("model-00001-of-00002.safetensors", weights(300_000)),
        ("model-00002-of-00002.safetensors", weights(200_000)),
        ("model.safetensors.index.json", b"{\"weight_map\": {}}".to_vec()),
        ("pytorch_model.bin", weights(5000)),
        ("tokenizer.json", weights(4000)),
    ]
}

#[test]
fn a_model_comes_whole_verified_and_without_what_it_does_not_need() {
    let pull = Pull::new(&repository(), Faults::default());
    let ran = pull.run(&["org/model"]).succeeds();
    assert!(ran.err.contains("neurond serve --model model=models/org/model"), "{}", ran.err);
    let expected = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ];
    assert_eq!(pull.files(), expected);
    for (name, bytes) in repository().iter().filter(|(name, _)| expected.contains(name)) {
        pull.has(name, bytes);
    }
}

#[test]
fn what_is_here_is_not_fetched_again_unless_it_is_wrong() {
    let pull = Pull::new(&[("m.gguf", weights(100_000))], Faults::default());
    pull.run(&["org/model"]).succeeds();
    let again = pull.run(&["org/model"]).succeeds();
    assert!(again.err.contains("already here"), "{}", again.err);
    assert_eq!(pull.hub.offsets("m.gguf"), [0]);

    let mut damaged = weights(100_000);
    damaged[77] ^= 1;
    std::fs::write(pull.path("m.gguf"), damaged).expect("written");
    pull.run(&["org/model"]).succeeds();
    pull.has("m.gguf", &weights(100_000));
}

#[test]
fn a_cut_connection_goes_on_where_it_stopped() {
    let faults = Faults { cut_after: vec![40_000, 25_000, 0], busy: 1, ..Faults::default() };
    let pull = Pull::new(&[("m.gguf", weights(100_000))], faults);
    pull.run(&["org/model"]).succeeds();
    pull.has("m.gguf", &weights(100_000));
    let offsets = pull.hub.offsets("m.gguf");
    // Busy at first; then each answer begins where the bytes of the last one ended.
    assert_eq!(offsets[..2], [0, 0]);
    assert!(offsets[2] > 0 && offsets.is_sorted() && offsets.len() == 5, "{offsets:?}");
    assert_eq!(pull.files(), ["m.gguf"]);
}

#[test]
fn a_second_run_goes_on_where_the_first_gave_up() {
    let pull = Pull::new(&[("m.gguf", weights(100_000))], Faults::default());
    let part = pull.path(&format!("m.gguf.{:.16}.part", sha256(&weights(100_000))));
    std::fs::create_dir_all(pull.path("")).expect("created");
    std::fs::write(&part, &weights(100_000)[..60_000]).expect("written");
    pull.run(&["org/model"]).succeeds();
    assert_eq!(pull.hub.offsets("m.gguf"), [60_000]);
    pull.has("m.gguf", &weights(100_000));
    assert_eq!(pull.files(), ["m.gguf"]);
}

#[test]
fn a_part_of_other_content_is_not_built_upon() {
    let pull = Pull::new(&[("m.gguf", weights(100_000))], Faults::default());
    std::fs::create_dir_all(pull.path("")).expect("created");
    // Same name as ours would have, other bytes: found out at the end, and fetched from the start.
    let part = pull.path(&format!("m.gguf.{:.16}.part", sha256(&weights(100_000))));
    std::fs::write(&part, vec![9; 60_000]).expect("written");
    pull.run(&["org/model"]).succeeds();
    assert_eq!(pull.hub.offsets("m.gguf"), [60_000, 0]);
    pull.has("m.gguf", &weights(100_000));
}

#[test]
fn a_hub_that_ignores_ranges_still_delivers() {
    let faults = Faults { cut_after: vec![40_000], ignore_range: true, ..Faults::default() };
    let pull = Pull::new(&[("m.gguf", weights(100_000))], faults);
    pull.run(&["org/model"]).succeeds();
    pull.has("m.gguf", &weights(100_000));
}

#[test]
fn wrong_bytes_are_never_kept() {
    let pull = Pull::new(&[("m.gguf", weights(100_000))], Faults { wrong: 1, ..Faults::default() });
    pull.run(&["org/model"]).succeeds();
    pull.has("m.gguf", &weights(100_000));

    let pull = Pull::new(&[("m.gguf", weights(100_000))], Faults { wrong: 9, ..Faults::default() });
    pull.run(&["org/model"]).fails(1, &["SHA-256", "nothing was kept"]);
    assert!(pull.files().is_empty(), "{:?}", pull.files());
}

#[test]
fn a_hub_that_lists_names_only_is_asked_for_the_rest() {
    let faults = Faults { names_only: true, wrong: 1, ..Faults::default() };
    let pull = Pull::new(&[("m.gguf", weights(100_000)), ("config.json", b"{}".to_vec())], faults);
    let ran = pull.run(&["org/model", "--file", "*"]).succeeds();
    // The hash came with the redirect: the wrong bytes were noticed.
    assert_eq!(pull.hub.offsets("m.gguf"), [0, 0]);
    assert!(ran.err.contains("verified"), "{}", ran.err);
    pull.has("m.gguf", &weights(100_000));
    pull.has("config.json", b"{}");
}

#[test]
fn one_quantisation_is_taken_and_others_can_be_named() {
    let quantised = |name| (name, weights(2000));
    let files = [quantised("m-Q2_K.gguf"), quantised("m-Q8_0.gguf"), quantised("m-Q4_K_M.gguf")];
    let pull = Pull::new(&files, Faults::default());
    let ran = pull.run(&["org/model"]).succeeds();
    assert!(ran.err.contains("Q4_K_M of 3"), "{}", ran.err);
    assert_eq!(pull.files(), ["m-Q4_K_M.gguf"]);
    pull.run(&["org/model", "--file", "*Q2*", "--file", "*Q8*"]).succeeds();
    assert_eq!(pull.files(), ["m-Q2_K.gguf", "m-Q4_K_M.gguf", "m-Q8_0.gguf"]);
    pull.run(&["org/model", "--file", "*Q9*"]).fails(2, &["Q9", "m-Q8_0.gguf"]);
    let listed = pull.run(&["org/model@refs/pr/1", "--file", "*Q2*", "--list"]).succeeds().out;
    assert!(listed.contains("2.0 kB") && listed.contains(&sha256(&weights(2000))), "{listed}");
}

#[test]
fn refusals_say_what_to_do() {
    let pull = Pull::new(&[("m.gguf", weights(2000))], Faults { gated: true, ..Faults::default() });
    pull.run(&["org/model"]).fails(1, &["gated", "accept its terms at", "/org/model", "HF_TOKEN"]);
    pull.run(&["org/model", "--token", "other"]).fails(1, &["gated", "ask for access"]);
    run(pull.command(&["org/model"]).env("HF_TOKEN", "let-in")).succeeds();
    pull.run(&["org/nothing"]).fails(1, &["no org/nothing", "spelling"]);
    pull.hub.set(Faults::default());
    pull.run(&["org/model@v9"]).fails(1, &["revision", "branches"]);
    let pull = Pull::new(&[("pytorch_model.bin", weights(2000))], Faults::default());
    pull.run(&["org/model"]).fails(1, &["neither GGUF nor safetensors", "--file"]);
}

#[test]
fn a_disk_without_room_is_noticed_before_the_first_byte() {
    // The hub only claims the size; nothing of it is ever sent.
    let pull = Pull::new(&[("m.gguf", weights(2000))], Faults::default());
    let hub = crate::serve(|config: &mut actix_web::web::ServiceConfig| {
        let listing = || async {
            let file = serde_json::json!({"rfilename": "m.gguf", "size": 1u64 << 60});
            actix_web::HttpResponse::Ok().json(serde_json::json!({"sha": "c", "siblings": [file]}))
        };
        config.route("/api/models/org/model/revision/main", actix_web::web::get().to(listing));
    });
    let mut command = neurond(pull.folder.path(), &["pull", "org/model", "--endpoint", &hub.url()]);
    run(&mut command).fails(1, &["make room", "are free there"]);
}

#[test]
fn a_line_that_brings_nothing_is_given_up_and_what_came_is_kept() {
    let pull = Pull::new(&[("m.gguf", weights(100_000))], Faults { never_whole: true, ..Faults::default() });
    std::fs::create_dir_all(pull.path("")).expect("created");
    let part = pull.path(&format!("m.gguf.{:.16}.part", sha256(&weights(100_000))));
    std::fs::write(&part, &weights(100_000)[..60_000]).expect("written");
    pull.run(&["org/model", "--retries", "1"]).fails(1, &["given up", "60.0 kB are kept"]);
    assert_eq!(std::fs::metadata(part).expect("kept").len(), 60_000);
}
