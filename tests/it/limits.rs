//! Clients that mean harm, or act as if: each gets a clear answer or is cut off, and the daemon goes on.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use neurond::base::Phase;
use serde_json::json;
use socket2::SockRef;

use crate::harness::{Answer, CLASSIC, Daemon};

const CHAT: &str = "/v1/chat/completions";

/// Everything that comes back on a fresh connection until the server closes it.
fn raw(daemon: &Daemon, request: &[u8]) -> String {
    let mut socket = TcpStream::connect(daemon.addr).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    // The server may answer and close before it has read everything.
    let _ = socket.write_all(request);
    let mut answer = Vec::new();
    let _ = socket.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

fn post(body: &[u8]) -> Vec<u8> {
    let mut request = format!(
        "POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    )
    .into_bytes();
    request.extend_from_slice(body);
    request
}

async fn still_serves(daemon: &Daemon) {
    assert_eq!(daemon.get("/v1/models").await.status, 200);
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_refused_announced_or_not() {
    let daemon = Daemon::start(|config| config.server.max_body_bytes = 1 << 20);
    let big = vec![b' '; 10 << 20];
    let answer = raw(&daemon, &post(&big));
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    assert!(answer.contains("request_too_large") && answer.contains("1048576 bytes"), "{answer}");

    let mut chunked = format!("POST {CHAT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n").into_bytes();
    for _ in 0..40 {
        chunked.extend_from_slice(b"10000\r\n");
        chunked.extend_from_slice(&[b' '; 0x10000]);
        chunked.extend_from_slice(b"\r\n");
    }
    chunked.extend_from_slice(b"0\r\n\r\n");
    let answer = raw(&daemon, &chunked);
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
    still_serves(&daemon).await;
}

#[tokio::test]
async fn a_prompt_of_ten_megabytes_within_the_limit_is_read_and_answered() {
    let daemon = Daemon::start(|config| config.server.max_body_bytes = 32 << 20);
    let body = json!({"model": "@cf/no/such-model", "messages": [{"role": "user", "content": "x".repeat(10 << 20)}]});
    let answer = daemon.post(CHAT, body).await;
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (404, &json!("model_not_found")));
    still_serves(&daemon).await;
}

#[tokio::test]
async fn what_is_not_json_in_utf8_is_refused_with_the_reason() {
    let daemon = Daemon::start(|_| {});
    let check = |body: &[u8], reason: &str| {
        let answer = raw(&daemon, &post(body));
        assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains(reason), "{answer}");
        assert!(answer.contains("content-type: application/json\r\n"), "{answer}");
    };
    check(b"{\"model\": \"\xff\xfe\"}", "not UTF-8");
    check(b"{\"model\": ", "not JSON");
    check(b"", "empty");
    check(b"[1, 2]", "must be a JSON object");
    check("[".repeat(200_000).as_bytes(), "recursion limit");
    check("{\"a\":".repeat(200_000).as_bytes(), "recursion limit");
    still_serves(&daemon).await;
}

#[tokio::test]
async fn a_client_of_one_byte_a_moment_is_told_to_hurry_and_cut_off() {
    // The server's clock for heads is half a second coarse.
    let daemon = Daemon::start(|config| config.server.read_timeout = Duration::from_millis(1_500));
    let drip = |bytes: &[u8]| {
        let mut socket = TcpStream::connect(daemon.addr).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let start = Instant::now();
        for byte in bytes {
            if socket.write_all(&[*byte]).is_err() || start.elapsed() > Duration::from_secs(4) {
                break;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        let mut answer = Vec::new();
        let _ = socket.read_to_end(&mut answer);
        (String::from_utf8_lossy(&answer).into_owned(), start.elapsed())
    };
    let (answer, _) = drip(&post(&[b' '; 100])[..60]);
    assert!(answer.starts_with("HTTP/1.1 408 "), "the head: {answer}");

    let mut socket = TcpStream::connect(daemon.addr).unwrap();
    let request = post(&[b' '; 100]);
    socket.write_all(&request[..request.len() - 50]).unwrap();
    let mut answer = String::new();
    let start = Instant::now();
    socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let _ = socket.read_to_string(&mut answer);
    assert!(answer.starts_with("HTTP/1.1 408 ") && answer.contains("timeout"), "the body: {answer}");
    assert!(start.elapsed() < Duration::from_secs(9), "{:?}", start.elapsed());
    still_serves(&daemon).await;
}

#[tokio::test]
async fn a_client_that_never_reads_is_cut_off_by_the_kernel() {
    let daemon = Daemon::start(|config| config.server.write_timeout = Duration::from_millis(500));
    let mut socket = TcpStream::connect(daemon.addr).unwrap();
    SockRef::from(&socket).set_recv_buffer_size(4096).unwrap();
    socket.set_nonblocking(true).unwrap();
    daemon.eventually("the connection is counted", |daemon| daemon.metric("neurond_http_connections") == 1.0).await;
    // Answers pile up in the server's socket until it is full; from then on nothing is taken.
    let start = Instant::now();
    let request = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n".repeat(64);
    while start.elapsed() < Duration::from_secs(20) {
        match socket.write(&request) {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => std::thread::sleep(Duration::from_millis(20)),
            Err(_) => break,
        }
    }
    assert!(start.elapsed() < Duration::from_secs(15), "cut off after {:?}", start.elapsed());
    daemon.eventually("the connection is gone", |daemon| daemon.metric("neurond_http_connections") == 0.0).await;
    still_serves(&daemon).await;
}

#[tokio::test]
async fn a_thousand_connections_at_once_are_all_answered() {
    let daemon = Daemon::start(|config| config.server.max_connections = 256);
    let calls = (0..1_000).map(|_| {
        let request = reqwest::Client::new().post(daemon.url(CHAT)).header("connection", "close");
        tokio::spawn(Answer::of(
            request.json(&json!({"model": CLASSIC, "messages": [{"role": "user", "content": "hi"}]})),
        ))
    });
    let calls: Vec<_> = calls.collect();
    for call in calls {
        let answer = call.await.unwrap();
        assert_eq!(answer.status, 404, "not loaded: {answer:?}");
    }
    daemon.eventually("all connections are closed", |daemon| daemon.metric("neurond_http_connections") == 0.0).await;
    assert_eq!(daemon.metric("neurond_http_in_flight"), 0.0);
    still_serves(&daemon).await;
}

#[tokio::test]
async fn garbage_on_the_socket_is_not_http() {
    let daemon = Daemon::start(|_| {});
    for garbage in [&b"\x16\x03\x01\x02\x00\x01"[..], b"GET\r\n\r\n", b"\0\0\0\0\r\n\r\n", b"POST / HTTP/9.9\r\n\r\n"] {
        let answer = raw(&daemon, garbage);
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    still_serves(&daemon).await;
}

#[tokio::test]
async fn a_draining_server_sends_new_requests_elsewhere_and_closes() {
    let daemon = Daemon::start(|_| {});
    let client = reqwest::Client::new();
    assert_eq!(Answer::of(client.get(daemon.url("/v1/models"))).await.status, 200);
    daemon.enter(Phase::Draining);
    let answer = Answer::of(client.get(daemon.url("/v1/models"))).await;
    assert_eq!((answer.status, &answer.json()["error"]["code"]), (503, &json!("shutting_down")));
    assert_eq!((answer.header("retry-after"), answer.header("connection")), ("1", "close"));
    let answer = daemon.get("/health/ready").await;
    assert_eq!((answer.status, &answer.json()["reasons"][0]), (503, &json!("the daemon is draining")));
    assert_eq!(daemon.get("/health/live").await.status, 200);

    // An idle kept-alive connection must not hold the drain up.
    let idle = TcpStream::connect(daemon.addr).unwrap();
    let start = Instant::now();
    daemon.stop().await;
    assert!(start.elapsed() < Duration::from_secs(3), "stopped after {:?}", start.elapsed());
    assert!(TcpStream::connect(daemon.addr).is_err());
    drop(idle);
}
