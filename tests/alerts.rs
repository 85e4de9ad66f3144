//! Alerts to the outside: a real mail server, an HTTP receiver, servers that are down, and processes that are killed.
//!
//! ```text
//!   figures (a cell, or a file) ──> Alerts ──SMTP──> smtp_server.py ──> files
//!                                          └─HTTP──> Receiver ──> what it was given, and answers as it is told
//! ```
//!
//! The mail server is looked for in `$NEUROND_TEST_SMTP` and `target/test-smtp` (`scripts/fetch_smtp.sh`); without it those
//! tests say that they were skipped.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use neurond::alert::{
    Alerts, Channel, Filter, Login, Mail, Measure, Reading, Rule, Security, Settings, Slack, Source, To, Webhook, What,
};
use neurond::base::{Kind, Millis, Secret};
use neurond::net::client;
use serde_json::Value;

/// In a child: the folder it watches with.
const CHILD: &str = "NEUROND_TEST_ALERTS";
/// In a child: where it delivers.
const HOOK: &str = "NEUROND_TEST_ALERTS_HOOK";
const SECRET: &str = "shared secret";

#[test]
fn a_mail_arrives_by_each_kind_of_connection_and_only_with_the_right_password_and_authority() {
    for (security, named) in [(Security::StartTls, "starttls"), (Security::Tls, "tls"), (Security::Plain, "plain")] {
        let Some(server) = Smtp::start(named, 0) else { return };
        within(async {
            let figure = Figure::new(9.0);
            let alerts = start(None, vec![channel("ops", To::Mail(server.mail(security)))], &figure);
            until(|| server.mails().len() == 1).await;
            figure.set(0.0);
            until(|| server.mails().len() == 2).await;
            let (fired, resolved) = (server.mails().remove(0), server.mails().remove(1));
            for (mail, subject) in [
                (&fired, "Subject: [neurond] warning: device downtime is 9 s"),
                (&resolved, "Subject: [neurond] resolved: device downtime is 0 s again"),
            ] {
                assert!(mail.contains(subject), "{named}: {mail}");
                assert!(mail.contains("X-To: ops@example.com,boss@example.com"), "{named}: {mail}");
            }
            let id = |mail: &str, name: &str| {
                mail.lines().find_map(|line| line.strip_prefix(name)).map(|id| id.trim().to_owned())
            };
            assert_eq!(id(&resolved, "References:"), id(&fired, "Message-ID:"), "{named}: in one thread");
            alerts.try_channel("ops").await.unwrap();
            until(|| server.mails().len() == 3).await;
            assert!(server.mails()[2].contains("Nothing is wrong."), "{named}");
            // What must not work.
            let stranger = Login { user: "neurond".into(), password: Secret::new("guessed".into()) };
            let wrong = Mail { login: Some(stranger), ..server.mail(security) };
            refused(wrong, "535").await;
            refused(Mail { login: None, ..server.mail(security) }, "530").await;
            let to = |name: &str| Mail { to: vec![format!("{name}@example.com")], ..server.mail(security) };
            refused(to("refused"), "nobody of that name lives here").await;
            refused(to("later"), "come back later").await;
            if security != Security::Plain {
                refused(Mail { authorities: None, ..server.mail(security) }, "certificate").await;
            }
            if security == Security::StartTls {
                refused(Mail { security: Security::Plain, login: None, ..server.mail(security) }, "STARTTLS").await;
            }
            assert_eq!(server.mails().len(), 3, "{named}: nothing else was taken");
            let error = alerts.try_channel("nobody").await.unwrap_err();
            assert_eq!((error.kind(), error.message().contains("There are: ops.")), (Kind::NotFound, true), "{error}");
        });
    }
}

#[test]
fn a_server_that_is_down_holds_nobody_up_and_gets_everything_in_order_when_it_is_up_again() {
    let Some(mut server) = Smtp::start("starttls", 0) else { return };
    let receiver = Receiver::start(|_| 200);
    within(async {
        server.stop();
        let figure = Figure::new(9.0);
        let channels = vec![
            channel("mail", To::Mail(server.mail(Security::StartTls))),
            channel("hook", To::Webhook(receiver.hook(None))),
        ];
        let alerts = start(None, channels, &figure);
        until(|| receiver.events() == ["fired"]).await;
        figure.set(0.0);
        until(|| receiver.events() == ["fired", "resolved"]).await;
        eventually(|| async {
            let channels = alerts.status().await.unwrap().channels;
            (channels[0].error.is_some(), channels[1].delivered) == (true, 2)
        })
        .await;
        let status = alerts.status().await.unwrap();
        let (mail, hook) = (&status.channels[0], &status.channels[1]);
        assert_eq!((mail.waiting, mail.delivered, hook.waiting), (2, 0, 0));
        assert!(mail.error.as_ref().is_some_and(|why| why.contains("refused")), "{mail:?}");
        assert!(hook.error.is_none() && status.trouble.is_none(), "{status:?}");
        server.again();
        until(|| server.mails().len() == 2).await;
        let subjects: Vec<_> = server.mails().iter().map(|mail| mail.contains("] resolved: ")).collect();
        assert_eq!(subjects, [false, true]);
        eventually(|| async {
            let mail = alerts.status().await.unwrap().channels.remove(0);
            (mail.waiting, mail.delivered, mail.lost, mail.error) == (0, 2, 0, None)
        })
        .await;
    });
}

#[test]
fn a_receiver_that_fails_is_tried_again_and_one_that_refuses_only_a_few_times() {
    let failing = Receiver::start(|call| if call < 4 { 503 } else { 200 });
    let refusing = Receiver::start(|_| 400);
    within(async {
        let figure = Figure::new(9.0);
        let slack = Slack { url: Secret::new(failing.url()), allow_private: true };
        let channels =
            vec![channel("slack", To::Slack(slack)), channel("hook", To::Webhook(refusing.hook(Some(SECRET))))];
        let alerts = start(None, channels, &figure);
        eventually(|| async {
            let channels = alerts.status().await.unwrap().channels;
            (channels[0].delivered, channels[1].lost) == (1, 1)
        })
        .await;
        let status = alerts.status().await.unwrap();
        let (slack, hook) = (&status.channels[0], &status.channels[1]);
        assert_eq!((slack.waiting, slack.lost, failing.seen().len()), (0, 0, 5));
        assert_eq!((hook.waiting, hook.delivered, refusing.seen().len()), (0, 0, 8));
        assert_eq!(hook.error.as_deref(), Some("it answered 400: told to"));
        let text = &failing.seen()[4].document()["text"];
        assert_eq!(text, ":warning: warning: device downtime is 9 s");
        // Signed as documented, with an id that stays the same.
        let refused = refusing.seen();
        let ids: BTreeSet<_> = refused.iter().map(|seen| seen.header("x-neurond-delivery")).collect();
        assert_eq!(ids.len(), 1);
        for seen in &refused {
            let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, SECRET.as_bytes());
            let signed = [seen.header("x-neurond-timestamp").as_bytes(), b".", &seen.body].concat();
            let sum = ring::hmac::sign(&key, &signed);
            let expected: String = sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(seen.header("x-neurond-signature"), format!("sha256={expected}"));
            assert_eq!(seen.document()["id"], seen.header("x-neurond-delivery"));
        }
    });
}

#[test]
fn a_silence_and_what_waits_outlive_the_settings_and_a_private_address_must_be_allowed() {
    let receiver = Receiver::start(|_| 200);
    within(async {
        let folder = tempfile::tempdir().unwrap();
        let figure = Figure::new(0.0);
        let shut = Webhook { url: Secret::new("https://127.0.0.1:9/".into()), ..receiver.hook(None) };
        let shut = Webhook { allow_private: false, ..shut };
        let alerts = start(Some(folder.path()), vec![channel("hook", To::Webhook(shut))], &figure);
        alerts.silence("down", Millis(u64::MAX)).await.unwrap();
        let error = alerts.silence("up", Millis(u64::MAX)).await.unwrap_err();
        assert_eq!((error.kind(), error.message().contains("There are: down.")), (Kind::NotFound, true), "{error}");
        figure.set(9.0);
        eventually(|| async { !alerts.status().await.unwrap().rules[0].alerts.is_empty() }).await;
        let status = serde_json::to_value(alerts.status().await.unwrap()).unwrap();
        assert_eq!((&status["rules"][0]["state"], &status["channels"][0]["waiting"]), (&"silenced".into(), &0.into()));
        alerts.unsilence("down").await.unwrap();
        eventually(|| async { alerts.status().await.unwrap().channels[0].error.is_some() }).await;
        let status = alerts.status().await.unwrap();
        let error = status.channels[0].error.clone().unwrap();
        assert!(error.contains("127.0.0.1 is on a private address"), "{error}");
        let mut settings = settings(Some(folder.path()), vec![channel("hook", To::Webhook(receiver.hook(None)))]);
        settings.every = Duration::ZERO;
        assert_eq!(alerts.reconfigure(settings.clone()).await.unwrap_err().kind(), Kind::BadInput);
        settings.every = Duration::from_millis(20);
        alerts.reconfigure(settings).await.unwrap();
        until(|| receiver.events() == ["fired"]).await;
        figure.set(0.0);
        until(|| receiver.events() == ["fired", "resolved"]).await;
    });
}

#[test]
fn a_source_that_panics_and_a_disk_that_cannot_be_written_to_are_told_of_and_stop_nothing() {
    let receiver = Receiver::start(|_| 200);
    within(async {
        let folder = tempfile::tempdir().unwrap();
        let figure = Figure::new(9.0);
        let mut settings = settings(Some(folder.path()), vec![channel("hook", To::Webhook(receiver.hook(None)))]);
        settings.rules.push(Rule::new(
            "broken",
            Measure { what: What::AllocationUsed, filter: Filter::default() },
            90.0,
        ));
        // In the way of the file.
        std::fs::create_dir_all(folder.path().join("kept/alerts.json/in the way")).unwrap();
        settings.folder = Some(folder.path().join("kept"));
        let error = Alerts::start(settings.clone(), figure.source()).unwrap_err();
        assert!(error.message().contains("name a folder that the daemon may write to"), "{error}");
        settings.folder = Some(folder.path().to_owned());
        let mut read = figure.source();
        let source = move |measure: &Measure, now| match measure.what {
            What::AllocationUsed => panic!("this source is broken"),
            _ => read(measure, now),
        };
        let alerts = Alerts::start(settings, Box::new(source)).unwrap();
        until(|| receiver.events() == ["fired"]).await;
        eventually(|| async { alerts.status().await.unwrap().trouble.is_some_and(|why| why.contains("the log says")) })
            .await;
        std::fs::remove_file(folder.path().join("alerts.json")).unwrap();
        std::fs::rename(folder.path().join("kept/alerts.json"), folder.path().join("alerts.json")).unwrap();
        figure.set(0.0);
        until(|| receiver.events() == ["fired", "resolved"]).await;
        eventually(|| async { alerts.status().await.unwrap().trouble.is_some_and(|why| why.contains("Make room")) })
            .await;
        let status = alerts.status().await.unwrap();
        assert_eq!((status.rules[1].value, status.rules[1].alerts.len()), (None, 0));
    });
}

#[test]
fn processes_that_are_killed_at_any_instant_neither_lose_a_notice_nor_fire_again() {
    if let Some(folder) = std::env::var_os(CHILD) {
        return watch(Path::new(&folder));
    }
    const KILLS: usize = 40;
    let folder = tempfile::tempdir().unwrap();
    let receiver = Receiver::start(|_| {
        // Long enough to be killed between a delivery and the note that it was made.
        std::thread::sleep(Duration::from_millis(15));
        200
    });
    let figure = |value: &str| std::fs::write(folder.path().join("figure"), value).unwrap();
    let child = || {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "processes_that_are_killed_at_any_instant_neither_lose_a_notice_nor_fire_again"]);
        command.env(CHILD, folder.path()).env(HOOK, receiver.url()).stdout(Stdio::null());
        Killed(command.spawn().unwrap())
    };
    let mut before = None;
    for round in 0..KILLS {
        figure(if round % 2 == 0 { "9" } else { "0" });
        let next = child();
        let (seen, began) = (receiver.seen().len(), Instant::now());
        // Every third time in the middle of a delivery, the others whenever it happens to be.
        let spell = Duration::from_millis(if round % 3 == 0 { 250 } else { (round as u64 * 37) % 120 });
        wait(|| began.elapsed() >= spell || (round % 3 == 0 && receiver.seen().len() > seen));
        // Both are killed, or the later one goes on for a while: it has waited for the other.
        drop(before.take());
        before = (round % 3 != 0).then_some(next);
    }
    drop(before);
    figure("0");
    let _steady = child();
    let kept = || std::fs::read_to_string(folder.path().join("kept/alerts.json")).unwrap();
    wait(|| kept().contains(r#""rules":{"alerts":{},"#) && kept().contains(r#""outbox":{"channels":{}}"#));
    // By alert, what it told, by id.
    let mut alerts: BTreeMap<String, BTreeMap<String, String>> = BTreeMap::new();
    let mut bodies: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for seen in receiver.seen() {
        let (notice, id) = (seen.document(), seen.header("x-neurond-delivery").to_owned());
        let text = |name: &str| notice[name].as_str().unwrap().to_owned();
        alerts.entry(text("alert")).or_default().insert(id.clone(), text("event"));
        let first = bodies.entry(id).or_insert_with(|| seen.body.clone());
        assert_eq!(*first, seen.body, "what is sent again is the same");
    }
    let (count, sent) = (bodies.len(), receiver.seen().len());
    eprintln!("{} alerts, {count} notices, {sent} deliveries, {KILLS} kills", alerts.len());
    assert!(alerts.len() >= 2, "{alerts:?}");
    for (alert, told) in &alerts {
        // One that had been forgotten would never be over, and its successor would have fired again.
        let whole = [(format!("{alert}-0"), "fired".to_owned()), (format!("{alert}-1"), "resolved".to_owned())];
        assert_eq!(*told, BTreeMap::from(whole));
    }
    assert!(sent <= count + KILLS, "one notice more a kill at most");
}

/// In a child: until it is killed.
fn watch(folder: &Path) {
    let url = Secret::new(std::env::var(HOOK).unwrap());
    let hook = Webhook { url, secret: None, allow_private: true };
    let mut settings = settings(Some(&folder.join("kept")), vec![channel("hook", To::Webhook(hook))]);
    settings.every = Duration::from_millis(5);
    let hour = Some(Duration::from_secs(3600));
    settings.rules = vec![Rule { repeat: None, ..rule("steady") }, Rule { repeat: hour, ..rule("loud") }];
    let figure = folder.join("figure");
    let source = move |_: &Measure, _| {
        let value = std::fs::read_to_string(&figure).ok().and_then(|text| text.parse::<f64>().ok());
        value.map(Reading::from).into_iter().collect()
    };
    actix::System::new().block_on(async {
        let _alerts = Alerts::start(settings, Box::new(source)).unwrap();
        std::future::pending::<()>().await;
    });
}

fn within(test: impl Future<Output = ()>) {
    actix::System::new().block_on(test);
}

fn settings(folder: Option<&Path>, channels: Vec<Channel>) -> Settings {
    let tls = client::Tls::new(None).unwrap();
    let http = client::Settings { connect_timeout: Duration::from_secs(5), allow_private: false, proxy: None, tls };
    Settings {
        rules: vec![Rule { repeat: None, ..rule("down") }],
        channels,
        folder: folder.map(Path::to_owned),
        every: Duration::from_millis(20),
        retry: Duration::from_millis(20),
        ..Settings::new(http)
    }
}

fn rule(name: &str) -> Rule {
    Rule::new(name, Measure { what: What::DeviceDown, filter: Filter::default() }, 5.0)
}

fn channel(name: &str, to: To) -> Channel {
    Channel { name: name.into(), to }
}

fn start(folder: Option<&Path>, channels: Vec<Channel>, figure: &Figure) -> Alerts {
    Alerts::start(settings(folder, channels), figure.source()).unwrap()
}

/// A channel that must not work, and why.
async fn refused(mail: Mail, why: &str) {
    let alerts = start(None, vec![channel("ops", To::Mail(mail))], &Figure::new(0.0));
    let error = alerts.try_channel("ops").await.unwrap_err();
    assert!(error.message().contains(why), "{why}: {error}");
    assert!(!error.message().contains("guessed"), "{error}");
}

/// What every measure reads.
#[derive(Clone)]
struct Figure(Arc<Mutex<f64>>);

impl Figure {
    fn new(value: f64) -> Self {
        Self(Arc::new(Mutex::new(value)))
    }

    fn set(&self, value: f64) {
        *self.0.lock().unwrap() = value;
    }

    fn source(&self) -> Source {
        let figure = self.clone();
        Box::new(move |_, _| vec![Reading::from(*figure.0.lock().unwrap())])
    }
}

/// The mail server.
struct Smtp {
    folder: tempfile::TempDir,
    program: PathBuf,
    security: &'static str,
    port: u16,
    child: Killed,
}

impl Smtp {
    fn start(security: &'static str, port: u16) -> Option<Self> {
        let named = std::env::var_os("NEUROND_TEST_SMTP").map(PathBuf::from);
        let usual = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/test-smtp");
        let Some(program) = named.into_iter().chain([usual]).find(|folder| folder.join("aiosmtpd").is_dir()) else {
            eprintln!(
                "skipped: no mail server ($NEUROND_TEST_SMTP or target/test-smtp): scripts/fetch_smtp.sh fetches it"
            );
            return None;
        };
        let folder = tempfile::tempdir().unwrap();
        let (child, port) = Self::spawn(&program, folder.path(), security, port);
        Some(Self { folder, program, security, port, child })
    }

    fn spawn(program: &Path, folder: &Path, security: &str, port: u16) -> (Killed, u16) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/alerts/smtp_server.py");
        let mut command = Command::new("python3");
        command.arg(script).arg(folder).args([&port.to_string(), security, "neurond", "pass word"]);
        command.env("PYTHONPATH", program).stdout(Stdio::piped());
        let log = folder.join("log");
        command.stderr(std::fs::File::create(&log).unwrap());
        let mut child = Killed(command.spawn().unwrap());
        let mut line = String::new();
        BufReader::new(child.0.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let port = line.trim().strip_prefix("port ").and_then(|port| port.parse().ok());
        (
            child,
            port.unwrap_or_else(|| panic!("the mail server did not start: {}", std::fs::read_to_string(log).unwrap())),
        )
    }

    fn stop(&mut self) {
        self.child.kill();
    }

    fn again(&mut self) {
        (self.child, _) = Self::spawn(&self.program, self.folder.path(), self.security, self.port);
    }

    fn mail(&self, security: Security) -> Mail {
        Mail {
            host: "127.0.0.1".into(),
            port: Some(self.port),
            security,
            login: Some(Login { user: "neurond".into(), password: Secret::new("pass word".into()) }),
            from: "neurond <neurond@example.com>".into(),
            to: vec!["ops@example.com".into(), "Boss <boss@example.com>".into()],
            authorities: Some(std::fs::read_to_string(self.folder.path().join("ca.pem")).unwrap()),
        }
    }

    /// Taken so far, in order, with lines that were folded put together.
    fn mails(&self) -> Vec<String> {
        let mut paths: Vec<_> = std::fs::read_dir(self.folder.path())
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_some_and(|end| end == "eml"))
            .collect();
        paths.sort();
        paths.iter().map(|path| std::fs::read_to_string(path).unwrap().replace("\r\n ", " ")).collect()
    }
}

/// A process that does not outlive its test.
struct Killed(Child);

impl Killed {
    fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Killed {
    fn drop(&mut self) {
        self.kill();
    }
}

/// An HTTP server that keeps what it is given.
struct Receiver {
    port: u16,
    seen: Arc<Mutex<Vec<Seen>>>,
}

#[derive(Clone)]
struct Seen {
    head: String,
    body: Vec<u8>,
}

impl Receiver {
    /// `answer`: the status for a call, counted from 0. Calls are answered one after the other.
    fn start(answer: impl Fn(usize) -> u16 + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let kept = seen.clone();
        // Ends with the process of the tests.
        std::thread::spawn(move || {
            for mut socket in listener.incoming().flatten() {
                let Some(call) = read(&mut socket) else { continue };
                let number = kept.lock().unwrap().len();
                kept.lock().unwrap().push(call);
                let status = answer(number);
                let _ = write!(socket, "HTTP/1.1 {status} x\r\nContent-Length: 7\r\nConnection: close\r\n\r\ntold to");
            }
        });
        Self { port, seen }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}/hook", self.port)
    }

    fn hook(&self, secret: Option<&str>) -> Webhook {
        let secret = secret.map(|secret| Secret::new(secret.to_owned()));
        Webhook { url: Secret::new(self.url()), secret, allow_private: true }
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    fn events(&self) -> Vec<String> {
        self.seen().iter().map(|seen| seen.document()["event"].as_str().unwrap().to_owned()).collect()
    }
}

impl Seen {
    fn document(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }

    fn header(&self, name: &str) -> &str {
        let mut lines = self.head.lines().filter_map(|line| line.split_once(": "));
        lines.find(|(known, _)| known.eq_ignore_ascii_case(name)).map(|(_, value)| value).unwrap()
    }
}

/// A whole call; a caller that was killed halfway made none.
fn read(socket: &mut TcpStream) -> Option<Seen> {
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        socket.read_exact(&mut byte).ok()?;
        head.push(byte[0]);
    }
    let call = Seen { head: String::from_utf8(head).ok()?, body: Vec::new() };
    let mut body = vec![0; call.header("content-length").parse().ok()?];
    socket.read_exact(&mut body).ok()?;
    Some(Seen { body, ..call })
}

/// Waits for something that will come true.
async fn until(is_true: impl Fn() -> bool) {
    eventually(|| async { is_true() }).await;
}

async fn eventually<Answer: Future<Output = bool>>(is_true: impl Fn() -> Answer) {
    let began = Instant::now();
    while !is_true().await {
        assert!(began.elapsed() < Duration::from_secs(60), "it did not come true");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn wait(is_true: impl Fn() -> bool) {
    let began = Instant::now();
    while !is_true() {
        assert!(began.elapsed() < Duration::from_secs(60), "it did not come true");
        std::thread::sleep(Duration::from_millis(1));
    }
}
