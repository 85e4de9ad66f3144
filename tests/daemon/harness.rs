//! Starts the real binary on a free port of the loopback interface and reads its log, one JSON object a line.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long anything may take before a test gives up.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The simulated model answers under an id of the built-in catalog.
pub const MODEL: &str = "@cf/meta/llama-3.2-1b-instruct";

pub struct Daemon {
    child: Child,
    log: Arc<Mutex<Vec<Value>>>,
    pub base: String,
    pub dir: tempfile::TempDir,
}

/// Settings of one daemon under test.
pub struct Setup<'a> {
    /// TOML behind the head that every test shares.
    pub config: &'a str,
    /// Environment of the process.
    pub env: &'a [(&'a str, &'a str)],
}

/// A simulated model that takes `delay_ms` a step and never ends by itself; `more` are further settings of the device.
pub fn sim(delay_ms: u32, more: &str) -> String {
    let step_us = delay_ms * 1000;
    format!(
        r#"
[[model]]
id = "@cf/meta/llama-3.2-1b-instruct"
path = "sim:end_in=0,step_us={step_us}{more}"
context = 4096
"#
    )
}

impl Daemon {
    pub fn start(setup: Setup<'_>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("neurond.toml");
        write_config(&config, setup.config);
        Self::launch(dir, setup.env)
    }

    /// Kills it, as a machine that fails does, and says what it had: [`Daemon::again`] goes on with that.
    pub fn kill(mut self) -> tempfile::TempDir {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap())
    }

    /// One that goes on with what another had.
    pub fn again(dir: tempfile::TempDir) -> Self {
        Self::launch(dir, &[])
    }

    fn launch(dir: tempfile::TempDir, env: &[(&str, &str)]) -> Self {
        let config = dir.path().join("neurond.toml");
        let mut child = Command::new(env!("CARGO_BIN_EXE_neurond"))
            .arg("serve")
            .arg("--config")
            .arg(&config)
            // What it keeps is its own: other tests' daemons run beside it.
            .env("XDG_STATE_HOME", dir.path())
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log: Arc<Mutex<Vec<Value>>> = Arc::default();
        let (lines, stderr) = (log.clone(), child.stderr.take().unwrap());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let entry = serde_json::from_str(&line).unwrap_or_else(|_| Value::String(line.clone()));
                lines.lock().unwrap().push(entry);
            }
        });
        let mut daemon = Self { child, log, base: String::new(), dir };
        let listening = daemon.wait_log("listening");
        daemon.base = format!("http://{}", field(&listening, "address").as_str().unwrap());
        daemon.wait_log("ready");
        daemon
    }

    pub fn config_path(&self) -> PathBuf {
        self.dir.path().join("neurond.toml")
    }

    /// Replaces the configuration file; the next HUP reads it.
    pub fn rewrite_config(&self, config: &str) {
        write_config(&self.config_path(), config);
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    pub fn signal(&self, signal: i32) {
        // SAFETY: the child is ours and has not been waited for.
        assert_eq!(unsafe { libc::kill(self.pid(), signal) }, 0);
    }

    /// All log entries so far whose message is this.
    pub fn logged(&self, message: &str) -> Vec<Value> {
        let log = self.log.lock().unwrap();
        log.iter().filter(|entry| field(entry, "message") == message).cloned().collect()
    }

    /// Waits for the first entry with this message.
    pub fn wait_log(&mut self, message: &str) -> Value {
        self.wait_logs(message, 1).remove(0)
    }

    /// Waits until `count` entries with this message are there.
    pub fn wait_logs(&mut self, message: &str, count: usize) -> Vec<Value> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let found = self.logged(message);
            if found.len() >= count {
                return found;
            }
            let ended = self.child.try_wait().unwrap();
            assert!(
                Instant::now() < deadline && ended.is_none(),
                "no {message:?} in the log (ended: {ended:?}): {:#?}",
                self.log.lock().unwrap()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn wait_exit(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "still running: {:#?}", self.log.lock().unwrap());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub async fn metrics(&self) -> String {
        reqwest::get(format!("{}/metrics", self.base)).await.unwrap().text().await.unwrap()
    }

    /// The value of one series, 0 where it is absent.
    pub async fn metric(&self, series: &str) -> f64 {
        let text = self.metrics().await;
        let line = text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ').map(str::to_owned));
        line.map_or(0.0, |value| value.parse().unwrap())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A field of a log entry, wherever the formatter puts it.
pub fn field(entry: &Value, name: &str) -> Value {
    let nested = entry.get("fields").and_then(|fields| fields.get(name));
    nested.or_else(|| entry.get(name)).cloned().unwrap_or(Value::Null)
}

fn write_config(path: &Path, config: &str) {
    let head = r#"
[server]
listen = "127.0.0.1:0"
drain_timeout_ms = 20000
[auth]
anonymous = "test"
[log]
format = "json"
filter = "info"
"#;
    std::fs::write(path, format!("{head}{config}")).unwrap();
}
