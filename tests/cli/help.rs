//! What can be learnt without a server.

use crate::{neurond, run};

#[test]
fn help_shows_every_command_and_the_exit_codes() {
    let folder = tempfile::tempdir().expect("folder");
    let help = run(&mut neurond(folder.path(), &["--help"])).succeeds().out;
    for command in ["serve", "check-config", "chat", "models", "pull", "bench", "simulate", "completions"] {
        assert!(help.contains(&format!("\n  {command} ")), "{command} is not in {help}");
    }
    assert!(help.contains("Exit codes") && help.contains("70"), "{help}");
}

#[test]
fn wrong_usage_exits_2_and_suggests() {
    let folder = tempfile::tempdir().expect("folder");
    for (args, words) in [
        (&["chta"][..], &["chat"][..]),
        (&["bench", "--concurency", "1"], &["--concurrency"]),
        (&["bench", "--concurrency", "0"], &["above 0"]),
        (&["bench", "--rate", "1", "--concurrency", "2"], &["cannot be used with"]),
        (&["pull", "justaname"], &["ORG/MODEL"]),
        (&["chat", "--set", "temperature=warm", "Hi"], &["takes a number"]),
        (&["models", "--url", "ftp://x"], &["http://"]),
    ] {
        run(&mut neurond(folder.path(), args)).fails(2, words);
    }
}

#[test]
fn completions_know_the_commands() {
    let folder = tempfile::tempdir().expect("folder");
    for shell in ["bash", "zsh", "fish"] {
        let script = run(&mut neurond(folder.path(), &["completions", shell])).succeeds().out;
        assert!(script.contains("check-config") && script.contains("shared-prefix"), "{shell}: {script}");
    }
}
