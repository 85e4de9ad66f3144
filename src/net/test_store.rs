//! A real server for tests, to be stopped, killed and started again.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::base::Secret;
use crate::net::redis::Address;

/// See the top of this file. Ends when it is dropped.
pub(crate) struct TestStore {
    child: Option<Child>,
    port: u16,
    folder: tempfile::TempDir,
    options: Vec<&'static str>,
}

impl TestStore {
    /// One that keeps nothing.
    pub(crate) fn start() -> Self {
        Self::with(&["--save", "", "--appendonly", "no"])
    }

    /// With options of the server's.
    pub(crate) fn with(options: &[&'static str]) -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let folder = tempfile::tempdir().unwrap();
        let mut store = Self { child: None, port, folder, options: options.to_vec() };
        store.again();
        store
    }

    /// Starts it again, with what it has kept.
    pub(crate) fn again(&mut self) {
        self.kill();
        let mut command = Command::new(program());
        command.args(["--bind", "127.0.0.1", "--port", &self.port.to_string(), "--dir"]).arg(self.folder.path());
        let child = command.args(&self.options).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        self.child = Some(child.unwrap());
        let deadline = Instant::now() + Duration::from_secs(20);
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(Instant::now() < deadline, "the store does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Stops it in the midst of what it does; connections stay.
    pub(crate) fn pause(&self) {
        self.signal(libc::SIGSTOP);
    }

    pub(crate) fn resume(&self) {
        self.signal(libc::SIGCONT);
    }

    fn signal(&self, signal: i32) {
        let id = self.child.as_ref().unwrap().id();
        // SAFETY: a process of ours that was not waited for.
        assert_eq!(unsafe { libc::kill(id as i32, signal) }, 0);
    }

    pub(crate) fn address(&self) -> Address {
        Address {
            urls: vec![Secret::new(format!("redis://127.0.0.1:{}", self.port))],
            password: None,
            is_cluster: false,
            authorities: None,
            timeout: Duration::from_millis(250),
        }
    }
}

impl Drop for TestStore {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The server's program: named, fetched, or installed.
fn program() -> PathBuf {
    if let Some(named) = std::env::var_os("NEUROND_TEST_REDIS") {
        return named.into();
    }
    let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-redis/bin/valkey-server");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let installed =
        std::env::split_paths(&path).flat_map(|folder| ["valkey-server", "redis-server"].map(|name| folder.join(name)));
    let found = std::iter::once(fetched).chain(installed).find(|program| program.is_file());
    found.expect("no server for fleets: run scripts/fetch_redis.sh, or name a redis-server in NEUROND_TEST_REDIS")
}
