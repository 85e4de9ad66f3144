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
