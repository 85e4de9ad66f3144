//! Three daemons that share limits through a store, one of which is killed, and a store that goes and comes back.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::harness::{Daemon, MODEL, PATIENCE, Setup, sim};

/// Of a team, in a window that ends after the test.
const REQUESTS: u64 = 300;
/// Of a team, in a month.
const NEURONS: f64 = 20.0;

/// A server as production has it, which is looked for as the ledger's own tests look for it.
pub struct Store {
    child: Option<Child>,
    pub port: u16,
    folder: tempfile::TempDir,
}

impl Store {
    pub fn start() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut store = Self { child: None, port, folder: tempfile::tempdir().unwrap() };
        store.again();
        store
    }

    pub fn again(&mut self) {
        let mut command = Command::new(program());
        command.args(["--bind", "127.0.0.1", "--port", &self.port.to_string(), "--save", "", "--appendonly", "yes"]);
        command.arg("--dir").arg(self.folder.path()).stdout(Stdio::null()).stderr(Stdio::null());
        self.child = Some(command.spawn().unwrap());
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(Instant::now() < deadline, "the store does not start");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Store {
    /// Stops it in the midst of what it does, or lets it go on.
    pub fn signal(&self, signal: i32) {
        let id = self.child.as_ref().unwrap().id();
        // SAFETY: a process of ours that was not waited for.
        assert_eq!(unsafe { libc::kill(id as i32, signal) }, 0);
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.kill();
    }
}

fn program() -> PathBuf {
    if let Some(named) = std::env::var_os("NEUROND_TEST_REDIS") {
        return named.into();
    }
    let fetched = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-redis/bin/valkey-server");
    let path = std::env::var_os("PATH").unwrap_or_default();
    let names = ["valkey-server", "redis-server"];
    let installed = std::env::split_paths(&path).flat_map(|folder| names.map(|name| folder.join(name)));
    let found = std::iter::once(fetched).chain(installed).find(|program| program.is_file());
    found.expect("no server for fleets: run scripts/fetch_redis.sh, or name a redis-server in NEUROND_TEST_REDIS")
}

fn config(store: &Store) -> String {
    // Whichever ends later; an hour at most, so that its counts do not survive a restart.
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let window_s = [3000, 3500].into_iter().max_by_key(|length| length - now % length).unwrap();
    let month_s = [20_000_000, 26_000_000].into_iter().max_by_key(|length| length - now % length).unwrap();
    format!(
        "{}[fleet]\nurl = \"redis://127.0.0.1:{}\"\ntimeout_ms = 1500\n\
         [limits]\ncatalog = \"off\"\n\
         [[limit]]\nname = \"rate\"\nby = [\"header:x-rate\"]\nrequests = {REQUESTS}\nwindow_s = {window_s}\n\
         [[limit]]\nname = \"budget\"\nby = [\"header:x-team\"]\nneurons = {NEURONS}\nwindow_s = {month_s}\n",
        sim(0, ""),
        store.port
    )
}

/// Calls of no team are each of one of their own.
static ALONE: AtomicU64 = AtomicU64::new(0);

/// One call; what one team has is nothing to another.
async fn call(client: &reqwest::Client, daemon: &Daemon, rate: &str, team: Option<&str>) -> reqwest::Response {
    let body = json!({"model": MODEL, "prompt": "once upon a time", "max_tokens": 20, "ignore_eos": true});
    let request = client.post(format!("{}/v1/completions", daemon.base)).header("x-rate", rate);
    let alone = ALONE.fetch_add(1, Ordering::Relaxed).to_string();
    request.header("x-team", team.unwrap_or(&alone)).json(&body).send().await.unwrap()
}

/// Calls from many at once at each daemon until none is answered for a while. Says how many were.
async fn drain(daemons: &[&Daemon], rate: &str, team: Option<&str>) -> u64 {
    let client = reqwest::Client::new();
    let caller = async |daemon: &Daemon| {
        let (mut answered, mut last) = (0, Instant::now());
        while last.elapsed() < Duration::from_secs(2) {
            let response = call(&client, daemon, rate, team).await;
            match response.status().as_u16() {
                200 => {
                    response.bytes().await.unwrap();
                    (answered, last) = (answered + 1, Instant::now());
                }
                429 => tokio::time::sleep(Duration::from_millis(20)).await,
                other => panic!("{other}: {}", response.text().await.unwrap()),
            }
        }
        answered
    };
    let callers = daemons.iter().flat_map(|daemon| [*daemon; 4]);
    join_all(callers.map(caller)).await.into_iter().sum()
}

/// Neurons that a daemon has written down.
async fn neurons(daemon: &Daemon) -> f64 {
    let url = format!("{}/client/v4/accounts/test/ai-gateway/usage", daemon.base);
    let told: Value = reqwest::get(url).await.unwrap().json().await.unwrap();
    let rows = told["result"]["rows"].as_array().unwrap_or_else(|| panic!("{told}"));
    rows.iter().map(|row| row["neurons"].as_f64().unwrap()).sum()
}

#[actix::test]
async fn three_daemons_share_a_limit_and_a_budget_through_kills_and_restarts() {
    let mut store = Store::start();
    let config = config(&store);
    let start = || Daemon::start(Setup { config: &config, env: &[] });
    let [one, two, three] = std::thread::scope(|scope| {
        [scope.spawn(start), scope.spawn(start), scope.spawn(start)].map(|started| started.join().unwrap())
    });

    assert_eq!(drain(&[&one, &two, &three], "a", None).await, REQUESTS);

    // A budget, and one that is killed while it takes of it.
    let before = [neurons(&one).await, neurons(&two).await, neurons(&three).await];
    let price = before.iter().sum::<f64>() / REQUESTS as f64;
    let client = reqwest::Client::new();
    for rate in 0..20 {
        assert_eq!(call(&client, &three, &format!("b{}", rate % 2), Some("b")).await.status(), 200);
    }
    let three = three.kill();
    let mut rates = 0;
    let mut spend = async |daemons: &[&Daemon]| {
        let mut all = 0;
        loop {
            rates += 1;
            match drain(daemons, &format!("c{rates}"), Some("b")).await {
                0 => break all,
                some => all += some,
            }
        }
    };
    let early = spend(&[&one, &two]).await;
    let three = Daemon::again(three);
    let late = spend(&[&one, &two, &three]).await;
    let after = [neurons(&one).await, neurons(&two).await, neurons(&three).await];
    let spent = after.iter().sum::<f64>() - before.iter().sum::<f64>();
    // The last call of each may take what it needs.
    assert!(spent <= NEURONS + 3.0 * price, "{spent}");
    assert!(spent > NEURONS - price, "{spent} after {early} and {late} calls at {price}");
    assert!((early as f64 * price) < NEURONS - 19.0 * price, "{early}: what the killed one took counts");

    // Without the store, calls that need a lease are refused, and say so.
    store.kill();
    let refused = loop {
        let response = call(&client, &one, "d", None).await;
        if response.status() != 200 {
            break response;
        }
    };
    assert_eq!((refused.status().as_u16(), refused.headers()["retry-after"].to_str().unwrap()), (503, "1"));
    let told = refused.text().await.unwrap();
    assert!(told.contains("shares limits"), "{told}");
    assert_eq!(one.metric(r#"neurond_fleet{what="up"}"#).await, 0.0);
    assert!(one.metric(r#"neurond_fleet{what="refused"}"#).await >= 1.0);
    store.again();
    let mut daemons = [one, two, three];
    for daemon in &mut daemons {
        daemon.wait_logs("the fleet's store answers: limits are shared", 2);
        assert_eq!(daemon.metric(r#"neurond_fleet{what="up"}"#).await, 1.0);
        assert_eq!(call(&client, daemon, "d", None).await.status(), 200);
        // What was used up before still is.
        assert_eq!(call(&client, daemon, "a", None).await.status(), 429);
        daemon.signal(libc::SIGUSR1);
        let health = daemon.wait_log("state: the ledger's disk").to_string();
        assert!(health.contains("is_up"), "{health}");
        daemon.signal(libc::SIGTERM);
        assert_eq!(daemon.wait_exit().code(), Some(0));
    }
}
