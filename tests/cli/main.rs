//! The command line as a user meets it: the real program, run against servers that live in this test.

#![allow(clippy::expect_used)]

mod bench;
mod chat;
mod check;
mod help;
mod hub;
mod models;
mod openai;
mod pull;
mod simulate;

use std::path::Path;
use std::process::{Command, Output, Stdio};

/// What a run of the program left behind.
struct Ran {
    code: i32,
    out: String,
    err: String,
}

/// `neurond` with these arguments, in a folder of its own and without anything of the surrounding environment.
fn neurond(folder: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_neurond"));
    command.args(args).current_dir(folder).env_clear().env("HOME", folder).stdin(Stdio::null());
    command
}

fn run(command: &mut Command) -> Ran {
    ran(command.output().expect("the program starts"))
}

fn ran(output: Output) -> Ran {
    Ran {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

impl Ran {
    #[track_caller]
    fn succeeds(self) -> Self {
        assert_eq!(self.code, 0, "stdout: {}\nstderr: {}", self.out, self.err);
        self
    }

    #[track_caller]
    fn fails(self, code: i32, words: &[&str]) -> Self {
        assert_eq!(self.code, code, "stdout: {}\nstderr: {}", self.out, self.err);
        for word in words {
            assert!(self.err.contains(word), "{word:?} is not in: {}", self.err);
        }
        self
    }
}

/// An HTTP server on a free port of this machine, for as long as the value lives.
struct Serving {
    address: std::net::SocketAddr,
    handle: actix_web::dev::ServerHandle,
}

fn serve<F>(app: F) -> Serving
where
    F: Fn(&mut actix_web::web::ServiceConfig) + Clone + Send + 'static,
{
    let (started, address) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        actix_web::rt::System::new().block_on(async move {
            let server = actix_web::HttpServer::new(move || actix_web::App::new().configure(app.clone()))
                .workers(1)
                .disable_signals()
                .shutdown_timeout(0)
                .bind("127.0.0.1:0")
                .expect("a free port");
            let address = server.addrs()[0];
            let server = server.run();
            started.send((address, server.handle())).expect("the test waits");
            server.await.expect("served");
        });
    });
    let (address, handle) = address.recv().expect("the server starts");
    Serving { address, handle }
}

impl Serving {
    fn url(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // Sent at once; nobody needs to wait for it.
        std::mem::drop(self.handle.stop(false));
    }
}
