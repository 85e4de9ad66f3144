//! A server that speaks just enough of the OpenAI API, records what it was asked, and fails on demand.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use actix_web::web::{Bytes, Data, Json, ServiceConfig};
use actix_web::{HttpRequest, HttpResponse, web};
use futures_util::StreamExt;
use serde_json::{Value, json};

use crate::{Serving, serve};

/// How the server answers.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Mood {
    /// As it should.
    Well,
    /// Every token takes this many milliseconds.
    Slowly(u64),
    /// The connection ends after two tokens.
    CutOff,
    /// 429 with a message.
    Busy,
    /// An error event after two tokens.
    GivesUp,
    /// Every odd request is refused.
    EveryOther,
    /// 401 unless the token is `secret`.
    Guarded,
    /// Never ends an answer.
    Endless,
}

pub struct OpenAi {
    serving: Serving,
    seen: Arc<Mutex<Vec<Value>>>,
}

struct State {
    mood: Mood,
    seen: Arc<Mutex<Vec<Value>>>,
}

impl OpenAi {
    pub fn start(mood: Mood) -> Self {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let state = Data::new(State { mood, seen: seen.clone() });
        let serving = serve(move |config: &mut ServiceConfig| {
            config
                .app_data(state.clone())
                .app_data(web::JsonConfig::default().limit(1 << 24))
                .route("/v1/models", web::get().to(models))
                .route("/v1/chat/completions", web::post().to(chat))
                .route("/v1/completions", web::post().to(completions))
                .route("/v1/embeddings", web::post().to(embeddings));
        });
        Self { serving, seen }
    }

    pub fn url(&self) -> String {
        self.serving.url() + "/v1"
    }

    /// The bodies of all completion requests so far.
    pub fn seen(&self) -> Vec<Value> {
        self.seen.lock().expect("not poisoned").clone()
    }
}

async fn models(state: Data<State>, request: HttpRequest) -> HttpResponse {
    if let Some(refusal) = refuse(&state, &request) {
        return refusal;
    }
    HttpResponse::Ok().json(json!({"object": "list", "data": [
        {"id": "tiny", "object": "model", "created": 0, "owned_by": "test", "task": "Text Generation", "loaded": true,
         "context_window": 8192, "price": {"input": 2457, "output": 18252}},
        {"id": "other", "object": "model", "created": 0, "owned_by": "test"},
    ]}))
}

/// A token a word, and two around each text.
async fn embeddings(state: Data<State>, body: Json<Value>) -> HttpResponse {
    state.seen.lock().expect("not poisoned").push(body.0.clone());
    let texts = body["input"].as_array().expect("texts");
    let words = |text: &Value| text.as_str().expect("text").split_whitespace().count();
    let tokens = texts.iter().map(words).sum::<usize>() + 2 * texts.len();
    HttpResponse::Ok().json(json!({
        "object": "list", "model": body["model"], "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        "data": texts.iter().map(|_| json!({"object": "embedding", "embedding": "AAAAAA=="})).collect::<Vec<_>>(),
    }))
}

fn refuse(state: &State, request: &HttpRequest) -> Option<HttpResponse> {
    let token = request.headers().get("authorization").and_then(|value| value.to_str().ok());
    let refused = state.mood == Mood::Guarded && token != Some("Bearer secret");
    refused.then(|| HttpResponse::Unauthorized().json(json!({"error": {"message": "who are you?"}})))
}

async fn chat(state: Data<State>, request: HttpRequest, body: Json<Value>) -> HttpResponse {
    answer(state, request, body.into_inner(), true)
}

async fn completions(state: Data<State>, request: HttpRequest, body: Json<Value>) -> HttpResponse {
    answer(state, request, body.into_inner(), false)
}

/// Answers with `w0 w1 w2 …`, `max_tokens` words or five; a prompt costs ten tokens and one more for each word.
fn answer(state: Data<State>, request: HttpRequest, body: Value, chat: bool) -> HttpResponse {
    let number = {
        let mut seen = state.seen.lock().expect("not poisoned");
        seen.push(body.clone());
        seen.len()
    };
    if let Some(refusal) = refuse(&state, &request) {
        return refusal;
    }
    let mood = state.mood;
    if mood == Mood::Busy || mood == Mood::EveryOther && number % 2 == 1 {
        return HttpResponse::TooManyRequests().json(json!({"error": {"message": "the queue is full"}}));
    }
    let words = match chat {
        true => body["messages"].as_array().expect("messages").iter().map(|message| count(&message["content"])).sum(),
        false => count(&body["prompt"]),
    };
    let tokens = if mood == Mood::Endless { 1_000_000 } else { body["max_tokens"].as_u64().unwrap_or(5) };
    let usage = json!({"prompt_tokens": words + 10, "completion_tokens": tokens, "total_tokens": words + 10 + tokens});

    let piece = move |text: &str, finish: Value| match chat {
        true => json!({"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}]}),
        false => json!({"choices": [{"index": 0, "text": text, "finish_reason": finish}]}),
    };
    let event = |data: &Value| Bytes::from(format!("data: {data}\n\n"));
    let pause = match mood {
        Mood::Slowly(millis) => millis,
        Mood::Endless => 10,
        _ => 0,
    };
    let text = futures_util::stream::iter(0..tokens).then(move |index| async move {
        tokio::time::sleep(Duration::from_millis(pause)).await;
        Ok::<_, std::io::Error>(event(&piece(&format!("w{index} "), Value::Null)))
    });
    let role = json!({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]});
    let mut end = vec![Ok(event(&piece("", json!("length"))))];
    if body["stream_options"]["include_usage"] == true {
        end.push(Ok(event(&json!({"choices": [], "usage": usage}))));
    }
    end.push(Ok(Bytes::from_static(b"data: [DONE]\n\n")));
    let begin = futures_util::stream::iter([Ok(event(&role))]);
    let mut response = HttpResponse::Ok();
    let response = response.content_type("text/event-stream");
    match mood {
        Mood::CutOff => {
            // After a moment: what was written just before would be cut off as well.
            let cut = futures_util::stream::once(async {
                tokio::time::sleep(Duration::from_millis(100)).await;
                Err(std::io::Error::other("cut"))
            });
            response.streaming(begin.chain(text.take(2)).chain(cut))
        }
        Mood::GivesUp => {
            let error = event(&json!({"error": {"message": "the device is gone"}}));
            response.streaming(begin.chain(text.take(2)).chain(futures_util::stream::iter([Ok(error)])))
        }
        _ => response.streaming(begin.chain(text).chain(futures_util::stream::iter(end))),
    }
}

fn count(text: &Value) -> u64 {
    text.as_str().expect("text").split_whitespace().count() as u64
}
