//! What another program than a test asks of the fake itself:
//!
//! - `GET /_fake/requests`: `{"open", "accepted", "requests": [{"method", "path", "query", "headers", "body", "connection",
//!   "answered", "closed_early": {"after_ms", "chunks"}}]}`
//! - `POST /_fake/script` with `{"path", "behaviours": ["503", "ok"]}`
//! - `POST /_fake/clear`
//!
//! These requests are not counted among the others.

use std::sync::atomic::Ordering;

use serde_json::{Value, json};

use super::answer::Answer;
use super::behaviour::Behaviour;
use super::connection::Request;
use super::{House, Seen};

pub fn answer(request: &Request, house: &House) -> Option<Answer> {
    let what = request.path.strip_prefix("/_fake/")?;
    Some(match (request.method.as_str(), what) {
        ("GET", "requests") => {
            let requests: Vec<Value> = house.seen.lock().iter().map(seen).collect();
            let (open, accepted) = (house.open.load(Ordering::Relaxed), house.accepted.load(Ordering::Relaxed));
            Answer::json(&json!({"open": open, "accepted": accepted, "requests": requests}))
        }
        ("POST", "script") => script(&request.body, house).map_or_else(|why| refusal(&why), |()| done()),
        ("POST", "clear") => {
            house.clear();
            done()
        }
        _ => refusal(&format!("there is no {} /_fake/{what}", request.method)),
    })
}

/// The fake was asked for something that it does not know.
pub fn refusal(why: &str) -> Answer {
    Answer::json(&json!({"error": {"message": why, "type": "fake_upstream"}})).status(400)
}

fn done() -> Answer {
    Answer::json(&json!({"done": true}))
}

fn script(body: &[u8], house: &House) -> Result<(), String> {
    let wanted = "a script is {\"path\": TEXT, \"behaviours\": [TEXT, …]}";
    let body: Value = serde_json::from_slice(body).map_err(|_| wanted)?;
    let (Some(path), Some(behaviours)) = (body["path"].as_str(), body["behaviours"].as_array()) else {
        return Err(wanted.into());
    };
    let parse = |text: &Value| Behaviour::parse(text.as_str().ok_or(wanted)?);
    let behaviours: Vec<Behaviour> = behaviours.iter().map(parse).collect::<Result<_, String>>()?;
    house.script(path, behaviours.into_iter());
    Ok(())
}

fn seen(seen: &Seen) -> Value {
    let closed = seen.closed_early.map(|closed| {
        let after = closed.at.duration_since(seen.at).as_millis() as u64;
        json!({"after_ms": after, "chunks": closed.chunks})
    });
    json!({
        "method": seen.method,
        "path": seen.path,
        "query": seen.query,
        "headers": seen.headers,
        "body": String::from_utf8_lossy(&seen.body),
        "connection": seen.connection,
        "answered": seen.answered.is_some(),
        "closed_early": closed,
    })
}
