//! WebSockets of a gateway: universal calls over one, and a provider's own passed through.

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::http::HeaderValue;
use tokio_tungstenite::tungstenite::{Error, Message};

use super::Rig;

type Socket = tokio_tungstenite::WebSocketStream<tokio_tungstenite::MaybeTlsStream<tokio::net::TcpStream>>;

async fn open(rig: &Rig, path: &str, headers: &[(&'static str, &str)]) -> Result<Socket, Error> {
    let mut request = format!("ws://{}{path}", rig.daemon.addr).into_client_request().unwrap();
    for (name, value) in headers {
        request.headers_mut().insert(*name, HeaderValue::from_str(value).unwrap());
    }
    tokio_tungstenite::connect_async(request).await.map(|(socket, _)| socket)
}

async fn hear(socket: &mut Socket) -> Value {
    loop {
        match socket.next().await.unwrap().unwrap() {
            Message::Text(text) => return serde_json::from_str(&text).unwrap(),
            Message::Ping(_) | Message::Pong(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn create(event: &str, stream: bool, fake: &str) -> Message {
    let body = json!({ "type": "universal.create", "request": { "eventId": event, "provider": "openai", "endpoint": "chat/completions",
        "headers": { "Authorization": "Bearer k", "x-fake": fake },
        "query": { "model": "gpt-4o", "stream": stream, "messages": [{ "role": "user", "content": "one two three" }] } } });
    Message::text(body.to_string())
}

#[actix_web::test]
async fn calls_share_a_socket_and_are_told_apart_by_their_event() {
    let rig = Rig::with("[[gateway]]\nid = \"closed\"\n");
    let mut socket = open(&rig, "/v1/acme/closed", &[("cf-aig-authorization", "Bearer secret")]).await.unwrap();
    socket.send(create("slow", true, "gap=30; delay=100")).await.unwrap();
    socket.send(create("quick", false, "ok")).await.unwrap();
    let mut heard = Vec::new();
    while !heard.iter().any(|message: &Value| message["type"] == "universal.done") || heard.len() < 3 {
        heard.push(hear(&mut socket).await);
    }
    let quick = heard.iter().find(|message| message["metadata"]["eventId"] == "quick").unwrap();
    assert_eq!((&quick["type"], &quick["metadata"]["step"]), (&json!("universal.created"), &json!(0)), "{quick}");
    assert_eq!(quick["metadata"]["cacheStatus"], "MISS");
    assert_eq!(quick["metadata"]["logId"].as_str().unwrap().len(), 26);
    assert_eq!(quick["response"]["object"], "chat.completion", "{quick}");
    let slow: Vec<&Value> = heard.iter().filter(|message| message["metadata"]["eventId"] == "slow").collect();
    assert_eq!(slow[0]["type"], "universal.created");
    assert_eq!(slow.last().unwrap()["type"], "universal.done");
    let text: String =
        slow.iter().filter_map(|message| message["response"]["choices"][0]["delta"]["content"].as_str()).collect();
    assert!(text.contains("one two three"), "{slow:?}");
    // What cannot be done is an answer as well, and the socket lives on.
    socket.send(Message::text("{\"type\":\"nonsense\"}")).await.unwrap();
    assert_eq!(hear(&mut socket).await["type"], "universal.error");
    socket.send(create("again", false, "429")).await.unwrap();
    let limited = hear(&mut socket).await;
    assert_eq!(limited["metadata"]["status"], 429, "{limited}");
    drop(socket);
    rig.is_clean().await;
}

#[actix_web::test]
async fn who_leaves_hangs_up_on_everybody_upstream() {
    let rig = Rig::start();
    let mut socket = open(&rig, "/v1/acme/g", &[]).await.unwrap();
    for event in ["a", "b"] {
        socket.send(create(event, true, "chunks=1000; gap=20")).await.unwrap();
    }
    for _ in 0..8 {
        hear(&mut socket).await;
    }
    drop(socket);
    rig.upstream.until_closed_early(2).await;
    rig.is_clean().await;
}

#[actix_web::test]
async fn a_browser_hides_its_token_in_a_protocol() {
    let rig = Rig::with("[[gateway]]\nid = \"closed\"\n");
    let with = |protocol: &'static str| [("sec-websocket-protocol", protocol)];
    let mut socket = open(&rig, "/v1/acme/closed", &with("cf-aig-authorization.secret")).await.unwrap();
    socket.send(create("x", false, "ok")).await.unwrap();
    assert_eq!(hear(&mut socket).await["type"], "universal.created");
    for protocol in ["cf-aig-authorization.wrong", "other"] {
        let refused = open(&rig, "/v1/acme/closed", &with(protocol)).await;
        assert!(matches!(&refused, Err(Error::Http(response)) if response.status() == 401), "{protocol}: {refused:?}");
    }
}

#[actix_web::test]
async fn a_providers_own_socket_passes_both_ways() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (paths, seen) = std::sync::mpsc::channel();
    actix_web::rt::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let paths = paths.clone();
            actix_web::rt::spawn(async move {
                #[allow(clippy::result_large_err)]
                let callback = |request: &tokio_tungstenite::tungstenite::handshake::server::Request, response| {
                    paths.send((request.uri().to_string(), request.headers().clone())).unwrap();
                    Ok(response)
                };
                let mut socket = tokio_tungstenite::accept_hdr_async(stream, callback).await.unwrap();
                while let Some(Ok(message)) = socket.next().await {
                    if message.is_text() || message.is_binary() {
                        socket.send(message).await.unwrap();
                    }
                }
            });
        }
    });
    let rig = Rig::with(&format!(
        "[[provider]]\nslug = \"custom-live\"\nbase_url = \"http://127.0.0.1:{port}\"\nallow_private = true\n"
    ));
    let headers = [("authorization", "Bearer k"), ("sec-websocket-protocol", "realtime, cf-aig-authorization.secret")];
    let mut socket = match open(&rig, "/v1/acme/g/custom-live/realtime?model=m", &headers).await {
        // The echo answers no protocol, which this client minds and others do not.
        Err(Error::Protocol(_)) => open(&rig, "/v1/acme/g/custom-live/realtime?model=m", &headers[..1]).await.unwrap(),
        other => other.unwrap(),
    };
    for size in [1, 1000, 200_000] {
        socket.send(Message::binary(vec![7; size])).await.unwrap();
        assert_eq!(socket.next().await.unwrap().unwrap().into_data().len(), size);
    }
    socket.close(None).await.unwrap();
    while let Some(Ok(_)) = socket.next().await {}
    let (path, headers) = seen.recv().unwrap();
    assert_eq!(path, "/realtime?model=m");
    assert_eq!(headers["authorization"], "Bearer k");
    assert_eq!(
        headers.get("sec-websocket-protocol").map(HeaderValue::as_bytes),
        Some(&b"realtime"[..]),
        "our token stays here"
    );
    rig.is_clean().await;
}

/// A provider that answers each message with so many tokens in and out, as OpenAI's realtime API does.
async fn realtime() -> (u16, std::sync::mpsc::Receiver<bool>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (packed, seen) = std::sync::mpsc::channel();
    actix_web::rt::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let packed = packed.clone();
            actix_web::rt::spawn(async move {
                #[allow(clippy::result_large_err)]
                let callback = |request: &tokio_tungstenite::tungstenite::handshake::server::Request, response| {
                    packed.send(request.headers().contains_key("sec-websocket-extensions")).unwrap();
                    Ok(response)
                };
                let mut socket = tokio_tungstenite::accept_hdr_async(stream, callback).await.unwrap();
                while let Some(Ok(message)) = socket.next().await {
                    if !message.is_text() {
                        continue;
                    }
                    let done = json!({ "type": "response.done", "response": { "id": "r", "usage": {
                        "total_tokens": 130, "input_tokens": 100, "output_tokens": 30,
                        "input_token_details": { "text_tokens": 100, "cached_tokens": 40 } } } });
                    for said in [json!({ "type": "response.text.delta", "delta": "usage" }), done] {
                        if socket.send(Message::text(said.to_string())).await.is_err() {
                            return;
                        }
                    }
                }
            });
        }
    });
    (port, seen)
}

#[actix_web::test]
async fn what_a_realtime_socket_takes_is_charged_as_it_is_told_and_a_budget_ends_it() {
    let (port, packed) = realtime().await;
    let provider =
        format!("[[provider]]\nslug = \"deepseek\"\nbase_url = \"http://127.0.0.1:{port}\"\nallow_private = true\n");
    let usage = neurond::task::Usage {
        prompt_tokens: 100,
        cached_tokens: 40,
        completion_tokens: 30,
        ..neurond::task::Usage::default()
    };
    let tariffs = neurond::config::Tariffs::load(None).unwrap();
    let each = tariffs.charge("deepseek", "deepseek-chat", &usage).unwrap();
    let rig = Rig::made(&provider, false, move |config| {
        // Enough for three.
        config.auth.tokens[0].budget.cost_per_month =
            Some(neurond::base::Neurons::from_micro(each.micro() * 2 + each.micro() / 2));
    });
    let path = "/v1/acme/g/deepseek/realtime?model=deepseek-chat";
    let plain = [("authorization", "Bearer k"), ("sec-websocket-extensions", "permessage-deflate")];
    let own = [plain[0], ("cf-aig-authorization", "Bearer secret")];
    let row = async |requests: u64| {
        for _ in 0..400 {
            let rows = rig.daemon.rows().await;
            if let Some((_, row)) =
                rows.iter().find(|(who, row)| who.model.as_str() == "deepseek-chat" && row.requests == requests)
            {
                return *row;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        panic!("no row of {requests}: {:?}", rig.daemon.rows().await);
    };
    // Without a token of ours there is no budget. Each answer is charged while the socket is open.
    let mut socket = open(&rig, path, &plain).await.unwrap();
    assert!(!packed.recv().unwrap(), "compressed it could not be read");
    for round in 1..=2u64 {
        socket.send(Message::text("{}")).await.unwrap();
        for _ in 0..2 {
            assert!(socket.next().await.unwrap().unwrap().is_text());
        }
        let row = row(round).await;
        assert_eq!(
            (row.prompt_tokens, row.cached_tokens, row.completion_tokens),
            (100 * round, 40 * round, 30 * round)
        );
        assert_eq!(row.cost.micro(), each.micro() * round);
    }
    socket.close(None).await.unwrap();
    while let Some(Ok(_)) = socket.next().await {}
    rig.is_clean().await;
    // With one, what is left after the third is nothing.
    let mut socket = open(&rig, path, &own).await.unwrap();
    let mut answers = 0;
    let closed = loop {
        if answers % 2 == 0 {
            socket.send(Message::text("{}")).await.unwrap();
        }
        match socket.next().await.unwrap().unwrap() {
            Message::Close(frame) => break frame.unwrap(),
            message => assert!(message.is_text(), "{message:?}"),
        }
        answers += 1;
        assert!(answers <= 6, "it goes on without money");
    };
    assert_eq!(answers, 6);
    assert_eq!(u16::from(closed.code), 1008);
    assert!(closed.reason.contains("budget of ada a month"), "{}", closed.reason);
    let refused = open(&rig, path, &own).await;
    assert!(matches!(&refused, Err(Error::Http(response)) if response.status() == 429), "{refused:?}");
    rig.is_clean().await;
}
