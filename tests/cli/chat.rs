//! `neurond chat`: one question, pipes, and a whole conversation on a real terminal.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::openai::{Mood, OpenAi};
use crate::{Ran, neurond, ran, run};

fn chat(server: &OpenAi, args: &[&str]) -> (tempfile::TempDir, Command) {
    let folder = tempfile::tempdir().expect("folder");
    let command = neurond(folder.path(), &[&["chat", "--url", &server.url()], args].concat());
    (folder, command)
}

fn piped(command: &mut Command, text: &str) -> Ran {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("starts");
    child.stdin.take().expect("a pipe").write_all(text.as_bytes()).expect("written");
    ran(child.wait_with_output().expect("ends"))
}

#[test]
fn one_question_prints_the_answer_and_nothing_else() {
    let server = OpenAi::start(Mood::Well);
    let (_folder, mut command) = chat(&server, &["--system", "Be brief.", "--set", "temperature=0.5", "Hi there"]);
    let ran = run(&mut command).succeeds();
    assert_eq!((ran.out.as_str(), ran.err.as_str()), ("w0 w1 w2 w3 w4 \n", ""));
    let seen = server.seen();
    assert_eq!(seen[0]["model"], "tiny");
    assert_eq!(seen[0]["temperature"], 0.5);
    assert_eq!(
        seen[0]["messages"],
        json!([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi there"}])
    );
}

#[test]
fn a_pipe_is_the_question_or_follows_it() {
    let server = OpenAi::start(Mood::Well);
    for (args, asked) in [(&[][..], "piped words"), (&["Summarise"], "Summarise\n\npiped words")] {
        let (_folder, mut command) = chat(&server, args);
        piped(&mut command, "piped words\n").succeeds();
        assert_eq!(server.seen().last().expect("asked")["messages"][0]["content"], asked);
    }
    let (_folder, mut command) = chat(&server, &[]);
    piped(&mut command, "").fails(2, &["nothing to ask"]);
}

#[test]
fn failures_are_told_and_what_was_said_is_kept() {
    for (mood, out, words) in [
        (Mood::Busy, "", &["429", "the queue is full", "in a moment"][..]),
        (Mood::CutOff, "w0 w1 \n", &["broke off"]),
        (Mood::GivesUp, "w0 w1 \n", &["the device is gone"]),
    ] {
        let server = OpenAi::start(mood);
        let (_folder, mut command) = chat(&server, &["--model", "tiny", "Hi"]);
        let ran = run(&mut command).fails(1, words);
        assert_eq!(ran.out, out, "{mood:?}");
    }
}

/// A conversation on a pseudo-terminal.
struct Talk {
    child: std::process::Child,
    screen: std::sync::mpsc::Receiver<Vec<u8>>,
    keys: std::fs::File,
    shown: String,
}

impl Talk {
    fn begin(mut command: Command) -> Self {
        let (ours, theirs) = terminal();
        command.env("TERM", "xterm").env("NO_COLOR", "1");
        let stdio = || Stdio::from(theirs.try_clone().expect("cloned"));
        command.stdin(stdio()).stdout(stdio()).stderr(stdio());
        // SAFETY: only async-signal-safe calls; they give the child its own session with this terminal.
        unsafe {
            std::os::unix::process::CommandExt::pre_exec(&mut command, || {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY, 0);
                Ok(())
            });
        }
        let child = command.spawn().expect("starts");
        drop(command);
        drop(theirs);
        let (send, screen) = std::sync::mpsc::channel();
        let mut reader = ours.try_clone().expect("cloned");
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(read) = std::io::Read::read(&mut reader, &mut bytes) {
                if read == 0 || send.send(bytes[..read].to_vec()).is_err() {
                    break;
                }
            }
        });
        Self { child, screen, keys: ours, shown: String::new() }
    }

    fn type_keys(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).expect("typed");
    }

    /// Types a line once there is a prompt to type it at.
    #[track_caller]
    fn enters(&mut self, line: &str) {
        // A terminal is told about pasting each time a line is about to be read.
        self.awaits("\x1b[?2004h");
        self.type_keys(&format!("{line}\r"));
    }

    /// Waits until the screen, from what was awaited last on, shows these words.
    #[track_caller]
    fn awaits(&mut self, words: &str) {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(at) = self.shown.find(words) {
                self.shown.drain(..at + words.len());
                return;
            }
            let left = end.saturating_duration_since(Instant::now());
            match self.screen.recv_timeout(left) {
                Ok(bytes) => self.shown.push_str(&String::from_utf8_lossy(&bytes)),
                Err(_) => panic!("{words:?} did not appear in: {:?}", self.shown),
            }
        }
    }

    #[track_caller]
    fn ends_with(mut self, code: i32) {
        let end = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = self.child.try_wait().expect("waited") {
                assert_eq!(status.code(), Some(code));
                return;
            }
            assert!(Instant::now() < end, "the program did not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn terminal() -> (std::fs::File, std::fs::File) {
    use std::os::fd::FromRawFd;
    let (mut ours, mut theirs) = (0, 0);
    // SAFETY: openpty fills two descriptors that nobody else owns; the unused arguments may be null.
    unsafe {
        let made =
            libc::openpty(&mut ours, &mut theirs, std::ptr::null_mut(), std::ptr::null_mut(), std::ptr::null_mut());
        assert_eq!(made, 0, "no pseudo-terminal");
        (std::fs::File::from_raw_fd(ours), std::fs::File::from_raw_fd(theirs))
    }
}

#[test]
fn a_conversation_remembers_obeys_orders_and_ends() {
    let server = OpenAi::start(Mood::Well);
    let (folder, command) = chat(&server, &[]);
    let mut talk = Talk::begin(command);
    talk.awaits("tiny at");
    talk.enters("first");
    talk.awaits("w4");
    talk.awaits("tokens/s");
    talk.enters("/system Be brief.");
    talk.enters("/set max_tokens 3");
    talk.enters("second");
    talk.awaits("w2");
    talk.awaits("tokens/s");
    let body = server.seen().pop().expect("asked");
    let said: Vec<Value> =
        body["messages"].as_array().expect("messages").iter().map(|m| m["content"].clone()).collect();
    assert_eq!(said, ["Be brief.", "first", "w0 w1 w2 w3 w4 ", "second"]);
    assert_eq!(body["max_tokens"], 3);

    talk.enters("/retry");
    talk.awaits("tokens/s");
    assert_eq!(server.seen()[2], server.seen()[1]);

    for line in ["/multi", "one", "two", "."] {
        talk.enters(line);
    }
    talk.awaits("tokens/s");
    assert_eq!(server.seen()[3]["messages"][5]["content"], "one\ntwo");

    talk.enters("/save talk.json");
    talk.awaits("written to talk.json");
    let saved: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.path().join("talk.json")).expect("saved")).expect("JSON");
    assert_eq!(saved["messages"].as_array().expect("messages").len(), 7);

    talk.enters("/usage");
    talk.awaits("4 answers");
    talk.enters("/model other");
    talk.awaits("now talking to other");
    talk.enters("/reset");
    talk.enters("third");
    talk.awaits("tokens/s");
    let body = server.seen().pop().expect("asked");
    assert_eq!((&body["model"], &body["messages"][1]["content"]), (&json!("other"), &json!("third")));
    talk.enters("/nonsense");
    talk.awaits("/help lists");
    talk.enters("/quit");
    talk.ends_with(0);

    let history = std::fs::read_to_string(folder.path().join(".local/state/neurond/chat_history")).expect("a history");
    assert!(history.contains("first"), "{history}");
}

#[test]
fn ctrl_c_stops_the_answer_and_not_the_program() {
    let server = OpenAi::start(Mood::Endless);
    let (_folder, command) = chat(&server, &[]);
    let mut talk = Talk::begin(command);
    talk.awaits("> ");
    talk.type_keys("go on\r");
    talk.awaits("w5");
    talk.type_keys("\x03");
    talk.awaits("stopped");
    talk.awaits("> ");
    // At the prompt it drops what was typed; Ctrl-D leaves.
    talk.type_keys("half a line\x03");
    talk.awaits("> ");
    talk.type_keys("\x04");
    talk.ends_with(0);
    assert_eq!(server.seen().len(), 1);
}
