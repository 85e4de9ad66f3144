//! What is told of calls afterwards: records, sums, usage, through the management API.

use reqwest::Method;
use serde_json::{Value, json};

use super::{Rig, question, streamed};
use crate::harness::Answer;

/// A rig that keeps records, and the folder that they are in.
fn keeping(more: &str) -> (tempfile::TempDir, Rig) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_owned();
    let rig = Rig::made(more, false, move |config| config.records.folder = Some(path));
    (folder, rig)
}

pub(super) async fn manage(rig: &Rig, method: Method, path: &str, body: Value) -> Answer {
    let url = rig.daemon.url(&format!("/client/v4/accounts/acme/ai-gateway/{path}"));
    let request = reqwest::Client::new().request(method, url).bearer_auth("secret");
    Answer::of(if body.is_null() { request } else { request.json(&body) }).await
}

async fn list(rig: &Rig, query: &str) -> Value {
    let answer = manage(rig, Method::GET, &format!("gateways/g/logs?{query}"), Value::Null).await;
    assert_eq!(answer.status, 200, "{query}: {answer:?}");
    answer.json()
}

/// All files below a folder, as text.
fn files(folder: &std::path::Path) -> String {
    let mut text = String::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            text += &files(&path);
        } else {
            text += &String::from_utf8_lossy(&std::fs::read(&path).unwrap());
        }
    }
    text
}

#[actix_web::test]
async fn each_call_is_listed_with_what_it_was_and_what_it_cost_and_read_as_it_went() {
    let (_folder, rig) = keeping("");
    let metadata = ("cf-aig-metadata", r#"{"user":"ann","plan":"free"}"#);
    let whole = Answer::of(rig.chat(&[metadata, ("user-agent", "tests/1")], &question("one"))).await;
    let stream = Answer::of(rig.chat(&[("cf-aig-cache-ttl", "600")], &streamed("two"))).await;
    let hit = Answer::of(rig.chat(&[("cf-aig-cache-ttl", "600")], &streamed("two"))).await;
    let failed = Answer::of(rig.chat(&[("x-fake", "status=500")], &question("three"))).await;
    let silent = Answer::of(rig.chat(&[("cf-aig-collect-log", "false")], &question("four"))).await;
    let bare = Answer::of(rig.chat(&[("cf-aig-collect-log-payload", "false")], &question("five"))).await;
    assert_eq!((whole.status, stream.status, hit.status, failed.status, silent.status), (200, 200, 200, 500, 200));
    assert_eq!(hit.header("cf-aig-cache-status"), "HIT");
    rig.is_clean().await;

    let all = list(&rig, "per_page=50&order_by=created_at&order_by_direction=asc&meta_info=true").await;
    assert_eq!((all["result_info"]["total_count"].clone(), all["result"].as_array().unwrap().len()), (json!(5), 5));
    let id = |answer: &Answer| answer.header("cf-aig-log-id").to_owned();
    let detail = async |id: &str| {
        let answer = manage(&rig, Method::GET, &format!("gateways/g/logs/{id}"), Value::Null).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        answer.json()["result"].clone()
    };
    let record = detail(&id(&whole)).await;
    let usage = &whole.json()["usage"];
    for (field, value) in [
        ("provider", json!("openai")),
        ("model", json!("gpt-4o-mini")),
        ("path", json!("chat/completions")),
        ("status_code", json!(200)),
        ("success", json!(true)),
        ("cached", json!(false)),
        ("tokens_in", usage["prompt_tokens"].clone()),
        ("tokens_out", usage["completion_tokens"].clone()),
        ("custom_cost", json!(false)),
        ("step", json!(0)),
        ("metadata", json!({ "user": "ann", "plan": "free" })),
        ("request_head_complete", json!(true)),
    ] {
        assert_eq!(record[field], value, "{field} of {record}");
    }
    assert!(record["cost"].as_f64().unwrap() > 0.0 && record["duration"].as_f64().unwrap() >= 0.0, "{record}");
    assert!(record["request_head"].as_str().unwrap().contains("one"), "{record}");

    let stored = manage(&rig, Method::GET, &format!("gateways/g/logs/{}/response", id(&stream)), Value::Null).await;
    assert_eq!(stored.text, stream.text, "a stream is kept byte for byte");
    assert!(stored.header("content-type").starts_with("text/event-stream"));
    let cached = detail(&id(&hit)).await;
    assert_eq!((cached["cached"].clone(), cached["cost"].clone()), (json!(true), json!(0)), "{cached}");
    let paid = detail(&id(&stream)).await["cost"].clone();
    assert!(paid.as_f64().unwrap() > 0.0 && cached["saved_cost"] == paid, "{paid} {cached}");
    assert_eq!(hit.header("neurond-cost"), "", "what it cost is nobody else's");
    assert!(record["duration"].is_u64(), "clients read a whole number: {record}");
    assert_eq!(detail(&id(&failed)).await["success"], json!(false));
    assert_eq!(detail(&id(&bare)).await["response_head"], json!(""));

    for (query, count) in [
        ("filters.key=success&filters.operator=eq&filters.value=false", 1),
        ("filters.key=cached&filters.operator=eq&filters.value=true", 1),
        ("filters.key=metadata.key&filters.operator=eq&filters.value=user", 1),
        (
            "filters.key=status_code&filters.operator=gt&filters.value=399&filters.key=provider&filters.operator=eq&filters.value=openai&filters.value=groq",
            1,
        ),
        ("filters.key=provider&filters.operator=eq&filters.value=groq", 0),
        ("search=five", 1),
        ("model=gpt-4o-mini&success=true", 4),
    ] {
        let found = list(&rig, query).await;
        // The body that was not to be kept cannot be found by its words.
        let expected = if query == "search=five" { 0 } else { count };
        assert_eq!(found["result_info"]["total_count"], json!(expected), "{query}: {found}");
    }
    let wrong = manage(
        &rig,
        Method::GET,
        "gateways/g/logs?filters.key=nonsense&filters.operator=eq&filters.value=1",
        Value::Null,
    );
    let wrong = wrong.await;
    assert_eq!((wrong.status, wrong.json()["errors"][0]["code"].clone()), (400, json!(7001)), "{wrong:?}");
    let elsewhere = manage(&rig, Method::GET, "gateways/none/logs", Value::Null).await;
    assert_eq!((elsewhere.status, elsewhere.json()["errors"][0]["code"].clone()), (404, json!(7002)));
}

#[actix_web::test]
async fn a_record_takes_feedback_and_is_deleted_by_what_it_is() {
    let (_folder, rig) = keeping("");
    let first = Answer::of(rig.chat(&[], &question("one"))).await.header("cf-aig-log-id").to_owned();
    Answer::of(rig.post(
        "anthropic/v1/messages",
        &[],
        &json!({ "model": "claude-sonnet-4-5", "max_tokens": 9,
        "messages": [{ "role": "user", "content": "x" }] }),
    ))
    .await;
    rig.is_clean().await;
    let patch = async |body: Value| manage(&rig, Method::PATCH, &format!("gateways/g/logs/{first}"), body).await;
    let patched = patch(json!({ "feedback": -1, "score": 70, "metadata": { "why": "wrong" } })).await;
    assert_eq!(patched.status, 200, "{patched:?}");
    let record = patched.json()["result"].clone();
    assert_eq!(
        (&record["feedback"], &record["score"], &record["metadata"]),
        (&json!(-1), &json!(70), &json!({ "why": "wrong" }))
    );
    for wrong in [json!({ "feedback": 2 }), json!({ "score": 101 }), json!({ "metadata": "x" }), json!({ "cost": 1 })] {
        assert_eq!(patch(wrong.clone()).await.status, 400, "{wrong}");
    }
    assert_eq!(
        list(&rig, "filters.key=feedback&filters.operator=eq&filters.value=-1").await["result_info"]["total_count"],
        1
    );
    let gone = manage(
        &rig,
        Method::DELETE,
        "gateways/g/logs?filters.key=provider&filters.operator=eq&filters.value=openai",
        Value::Null,
    );
    assert_eq!(gone.await.status, 200);
    let left = list(&rig, "").await;
    assert_eq!(
        (left["result_info"]["total_count"].clone(), left["result"][0]["provider"].clone()),
        (json!(1), json!("anthropic"))
    );
    assert_eq!(manage(&rig, Method::GET, &format!("gateways/g/logs/{first}"), Value::Null).await.status, 404);
}

#[actix_web::test]
async fn secrets_are_taken_out_before_anything_touches_the_disk_and_callers_still_get_them() {
    let (folder, rig) = keeping("[[redact]]\nname = \"customer\"\npattern = \"KD-[0-9]{6}\"\n");
    let secrets =
        ["sk-proj-abcdefghijklmnopqrstuvwxyz0123456789ABCD", "ann.lee@example.com", "4242 4242 4242 4242", "KD-123456"];
    let text = format!("my key is {} and I am {}, card {}, number {}", secrets[0], secrets[1], secrets[2], secrets[3]);
    let echo = format!("says={text}");
    for body in [question(&text), streamed(&text)] {
        let answer = Answer::of(rig.chat(&[], &body)).await;
        assert_eq!(answer.status, 200, "{answer:?}");
    }
    // The upstream says it piece by piece.
    let said = Answer::of(
        rig.chat(&[("x-fake", &echo), ("cf-aig-metadata", r#"{"mail":"ann.lee@example.com"}"#)], &streamed("x")),
    )
    .await;
    assert_eq!(said.status, 200);
    rig.is_clean().await;
    let all = list(&rig, "").await;
    assert_eq!(all["result_info"]["total_count"], json!(3));
    assert!(!all.to_string().contains("ann.lee"), "{all}");
    for record in all["result"].as_array().unwrap() {
        for side in ["request", "response"] {
            let path = format!("gateways/g/logs/{}/{side}", record["id"].as_str().unwrap());
            let body = manage(&rig, Method::GET, &path, Value::Null).await.text;
            for secret in secrets {
                assert!(!body.contains(secret), "{side} holds {secret}: {body}");
            }
        }
    }
    let kept = files(folder.path());
    assert!(secrets.iter().all(|secret| !kept.contains(secret)), "on disk");
    assert!(
        String::from_utf8_lossy(&rig.upstream.requests()[0].body).contains(secrets[0]),
        "what goes to the provider is not changed"
    );
}

#[actix_web::test]
async fn sums_are_those_of_the_calls_and_usage_is_the_ledgers() {
    let (_folder, rig) = keeping("");
    for _ in 0..3 {
        Answer::of(rig.chat(&[("cf-aig-cache-ttl", "600")], &question("same"))).await;
    }
    Answer::of(rig.chat(&[("x-fake", "status=503")], &question("bad"))).await;
    rig.is_clean().await;
    let sums = manage(&rig, Method::GET, "analytics?from=1h&group_by=provider,model", Value::Null).await;
    assert_eq!(sums.status, 200, "{sums:?}");
    let row = sums.json()["result"]["rows"][0].clone();
    assert_eq!((row["count"].clone(), row["dimensions"]["provider"].clone()), (json!(4), json!("openai")), "{row}");
    assert_eq!(
        (row["sum"]["cachedRequests"].clone(), row["sum"]["requests5xx"].clone()),
        (json!(2), json!(1)),
        "{row}"
    );
    assert!(row["quantiles"]["latencyP95"].as_f64().is_some() && row["sum"]["cost"].as_f64().unwrap() > 0.0, "{row}");
    let usage = manage(&rig, Method::GET, "usage", Value::Null).await;
    assert_eq!(usage.status, 200, "{usage:?}");
    let told = usage.json()["result"].clone();
    assert_eq!(
        (told["rows"][0]["requests"].clone(), told["rows"][0]["provider"].clone()),
        (json!(1), json!("openai")),
        "{told}"
    );
    let (one, other) = (told["rows"][0]["cost_usd"].as_f64().unwrap(), row["sum"]["cost"].as_f64().unwrap());
    assert!((one - other).abs() < 1e-12, "{one} {other}");
    assert_eq!(manage(&rig, Method::GET, "analytics?from=nonsense", Value::Null).await.status, 400);
    assert_eq!(manage(&rig, Method::GET, "usage?from=nonsense", Value::Null).await.status, 400);
    let refused = reqwest::Client::new().get(rig.daemon.url("/client/v4/accounts/acme/ai-gateway/usage"));
    assert_eq!(Answer::of(refused.bearer_auth("other")).await.status, 401, "not for another account's token");
}
