//! Datasets and evaluations, from the calls they are about to what is told of them.

use std::path::Path;
use std::time::{Duration, Instant};

use reqwest::Method;
use serde_json::{Value, json};

use super::records::manage;
use super::told::folders;
use super::{Rig, question};
use crate::harness::Answer;

/// As results are written: twelve digits behind the point.
const TWO_THIRDS: f64 = 0.666_666_666_667;

/// A rig that keeps what the API tells and records of calls, in folders below this one, and has a second gateway `h`.
fn keeping(folder: &Path, more: &str) -> Rig {
    let records = folder.join("records");
    let more = format!("{more}[[gateway]]\nid = \"h\"\nauthentication = false\n");
    Rig::made(&more, true, move |config| config.records.folder = Some(records))
}

async fn good(rig: &Rig, method: Method, path: &str, body: Value) -> Value {
    let answer = manage(rig, method.clone(), path, body).await;
    assert_eq!((answer.status, &answer.json()["success"]), (200, &json!(true)), "{method} {path}: {answer:?}");
    answer.json()["result"].take()
}

async fn dataset(rig: &Rig, gateway: &str, name: &str, filters: Value) -> Value {
    let body = json!({ "name": name, "enable": true, "filters": filters });
    good(rig, Method::POST, &format!("gateways/{gateway}/datasets"), body).await
}

/// Made, and waited for.
async fn evaluated(rig: &Rig, gateway: &str, datasets: &[&Value]) -> Value {
    let ids: Vec<_> = datasets.iter().map(|dataset| &dataset["id"]).collect();
    let types = ["cost", "speed", "feedback"];
    let body = json!({ "name": "all three", "dataset_ids": ids, "evaluation_type_ids": types });
    let path = format!("gateways/{gateway}/evaluations");
    let made = good(rig, Method::POST, &path, body).await;
    assert_eq!((&made["processed"], &made["results"][0]["status"]), (&json!(false), &json!(0)), "{made}");
    processed(rig, &format!("{path}/{}", made["id"].as_str().unwrap())).await
}

async fn processed(rig: &Rig, path: &str) -> Value {
    let began = Instant::now();
    loop {
        let evaluation = good(rig, Method::GET, path, Value::Null).await;
        if evaluation["processed"] == true {
            return evaluation;
        }
        assert!(began.elapsed() < Duration::from_secs(10), "not within 10 s: {evaluation}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// `(result, total_logs)` of cost, speed and feedback, which must all be done.
fn results(evaluation: &Value) -> [(Option<f64>, u64); 3] {
    ["cost", "speed", "feedback"].map(|kind| {
        let all = evaluation["results"].as_array().unwrap();
        let result = all.iter().find(|result| result["evaluation_type_id"] == kind).unwrap();
        assert_eq!(result["status"], 1, "{result}");
        assert_eq!(result["evaluation_id"], evaluation["id"], "{result}");
        (result["result"].as_str().unwrap().parse().ok(), result["total_logs"].as_u64().unwrap())
    })
}

/// Six calls through `g`, of which one goes elsewhere and one fails, and one through `h`; thumbs for three of them.
async fn calls(rig: &Rig) {
    let ask =
        json!({ "model": "claude-sonnet-4-5", "max_tokens": 9, "messages": [{ "role": "user", "content": "x" }] });
    assert_eq!(Answer::of(rig.post("anthropic/v1/messages", &[], &ask)).await.status, 200);
    assert_eq!(Answer::of(rig.chat(&[("x-fake", "status=500")], &question("bad"))).await.status, 500);
    for (text, thumb) in
        [("one", json!(1)), ("two two", json!(1)), ("three three three", json!(-1)), ("four", json!(0))]
    {
        let answer = Answer::of(rig.chat(&[], &question(text))).await;
        assert_eq!(answer.status, 200, "{answer:?}");
        let path = format!("gateways/g/logs/{}", answer.header("cf-aig-log-id"));
        good(rig, Method::PATCH, &path, json!({ "feedback": thumb })).await;
    }
    let url = rig.daemon.url("/v1/acme/h/openai/chat/completions");
    let elsewhere = Answer::of(reqwest::Client::new().post(url).bearer_auth("sk-own").json(&question("five"))).await;
    assert_eq!(elsewhere.status, 200, "{elsewhere:?}");
    rig.is_clean().await;
}

#[actix_web::test]
async fn an_evaluation_says_of_the_logs_of_its_datasets_what_their_records_say() {
    let (folder, more) = folders("");
    let rig = keeping(folder.path(), &more);
    calls(&rig).await;
    let openai = json!({ "key": "provider", "operator": "eq", "value": ["openai"] });
    let well = json!({ "key": "success", "operator": "eq", "value": [true] });
    let judged = json!({ "key": "feedback", "operator": "gt", "value": [0] });
    let none = json!({ "key": "model", "operator": "contains", "value": ["no such model"] });
    let good_ones = dataset(&rig, "g", "good ones", json!([openai, well])).await;
    let liked = dataset(&rig, "g", "liked", json!([judged])).await;
    let all = dataset(&rig, "g", "all", json!([])).await;
    let nothing = dataset(&rig, "g", "nothing", json!([none])).await;

    // The same from the list of records.
    let query = "gateways/g/logs?per_page=50&provider=openai&success=true";
    let records = good(&rig, Method::GET, query, Value::Null).await;
    let numbers = |field: &str| -> Vec<f64> {
        records.as_array().unwrap().iter().map(|record| record[field].as_f64().unwrap()).collect()
    };
    let average = |field: &str| numbers(field).iter().sum::<f64>() / numbers(field).len() as f64;
    assert_eq!(numbers("cost").len(), 4);

    let [cost, speed, feedback] = results(&evaluated(&rig, "g", &[&good_ones]).await);
    assert_eq!((cost.1, speed.1, feedback), (4, 4, (Some(TWO_THIRDS), 3)));
    let (told, wanted) = (cost.0.unwrap(), average("cost"));
    assert!(wanted > 0.0 && (told - wanted).abs() < 1e-10, "records are rounded: {told} {wanted}");
    let (told, wanted) = (speed.0.unwrap(), average("duration"));
    assert!((told - wanted).abs() <= 1.0, "records have whole milliseconds: {told} {wanted}");

    // Logs that are in several datasets count once; those of another gateway nowhere.
    for (sets, logs, feedback) in [
        (vec![&liked], 2, (Some(1.0), 2)),
        (vec![&good_ones, &liked], 4, (Some(TWO_THIRDS), 3)),
        (vec![&all, &good_ones, &liked, &nothing], 6, (Some(TWO_THIRDS), 3)),
    ] {
        let evaluation = evaluated(&rig, "g", &sets).await;
        let [cost, speed, thumbs] = results(&evaluation);
        assert_eq!((evaluation["total_logs"].as_u64(), cost.1, speed.1, thumbs), (Some(logs), logs, logs, feedback));
    }
    assert_eq!(results(&evaluated(&rig, "g", &[&nothing]).await), [(None, 0); 3]);
    let others = dataset(&rig, "h", "all", json!([])).await;
    let evaluation = evaluated(&rig, "h", &[&others]).await;
    assert_eq!((evaluation["total_logs"].as_u64(), results(&evaluation)[2]), (Some(1), (None, 0)));

    let listed = good(&rig, Method::GET, "gateways/g/evaluations?processed=true&per_page=50", Value::Null).await;
    assert_eq!(listed.as_array().unwrap().len(), 5);
    let path = format!("gateways/g/evaluations/{}", listed[0]["id"].as_str().unwrap());
    assert_eq!(good(&rig, Method::DELETE, &path, Value::Null).await, listed[0]);
    assert_eq!(manage(&rig, Method::GET, &path, Value::Null).await.status, 404);
}

#[actix_web::test]
async fn who_may_ask_and_what_is_wrong_is_told_as_by_all_of_the_management_api() {
    let (folder, more) = folders("");
    let rig = keeping(folder.path(), &more);
    let all = dataset(&rig, "g", "all", json!([])).await;
    let types = good(&rig, Method::GET, "evaluation-types?order_by=name&order_by_direction=asc", Value::Null).await;
    let names: Vec<_> = types.as_array().unwrap().iter().map(|kind| kind["name"].clone()).collect();
    assert_eq!(names, ["Cost", "Human feedback", "Speed"]);
    let wrong = json!([{ "key": "success", "operator": "eq", "value": [true] }, { "key": "cost", "operator": "gt", "value": ["x"] }]);
    let nobody = "00000000-0000-4000-8000-000000000000";
    for (method, path, body, status, code, words) in [
        (
            Method::POST,
            "gateways/g/datasets",
            json!({ "name": "d", "enable": true, "filters": wrong }),
            400,
            7001,
            "filters.1: 'filters.value' must be a number",
        ),
        (
            Method::PUT,
            "gateways/g/datasets/x",
            json!({ "name": "d", "enable": true, "filters": [] }),
            404,
            7002,
            "not there",
        ),
        (Method::GET, "gateways/none/datasets", Value::Null, 404, 7002, "not there"),
        (Method::PATCH, "gateways/g/datasets", json!({}), 405, 7001, "PATCH"),
        (
            Method::POST,
            "gateways/g/evaluations",
            json!({ "name": "e", "dataset_ids": [nobody], "evaluation_type_ids": ["cost"] }),
            400,
            7001,
            "'dataset_ids' must be ids of this gateway's datasets",
        ),
        (
            Method::POST,
            "gateways/h/evaluations",
            json!({ "name": "e", "dataset_ids": [all["id"]], "evaluation_type_ids": ["cost"] }),
            400,
            7001,
            "'dataset_ids' must be ids of this gateway's datasets",
        ),
        (Method::GET, "gateways/g/evaluations/x", Value::Null, 404, 7002, "not there"),
        (Method::GET, "evaluation-types?order_by=size", Value::Null, 400, 7001, "such as name"),
    ] {
        let answer = manage(&rig, method.clone(), path, body).await;
        let told = answer.json();
        assert_eq!((answer.status, &told["errors"][0]["code"]), (status, &json!(code)), "{method} {path}: {told}");
        assert!(told["errors"][0]["message"].as_str().unwrap().contains(words), "{method} {path}: {told}");
        assert_eq!((&told["success"], &told["result"]), (&json!(false), &Value::Null), "{method} {path}: {told}");
    }
    // Nobody else's token leads here, and another account has none of it.
    let get = |account: &str, token: &str| {
        let url = rig.daemon.url(&format!("/client/v4/accounts/{account}/ai-gateway/gateways/g/datasets"));
        Answer::of(reqwest::Client::new().get(url).bearer_auth(token))
    };
    assert_eq!(get("acme", "other").await.status, 401);
    assert_eq!(get("bobs", "other").await.json()["result"], json!([]));
}

#[actix_web::test]
async fn without_records_there_is_nothing_to_evaluate_and_whoever_asks_is_told() {
    let (_folder, more) = folders("");
    let rig = Rig::kept(&more);
    let all = dataset(&rig, "g", "all", json!([])).await;
    let body = json!({ "name": "e", "dataset_ids": [all["id"]], "evaluation_type_ids": ["cost"] });
    let answer = manage(&rig, Method::POST, "gateways/g/evaluations", body).await;
    assert_eq!((answer.status, &answer.json()["errors"][0]["code"]), (404, &json!(7002)), "{answer:?}");
    assert!(answer.text.contains("logs.keep"), "{answer:?}");
    assert_eq!(good(&rig, Method::GET, "gateways/g/evaluations", Value::Null).await, json!([]));
}

#[actix_web::test]
async fn a_gateway_takes_its_datasets_and_evaluations_with_it() {
    let (folder, more) = folders("");
    let rig = keeping(folder.path(), &more);
    let gateway = json!({
        "id": "made", "cache_invalidate_on_update": true, "cache_ttl": 0, "collect_logs": true,
        "rate_limiting_interval": 0, "rate_limiting_limit": 0,
    });
    good(&rig, Method::POST, "gateways", gateway.clone()).await;
    let all = dataset(&rig, "made", "all", json!([])).await;
    assert_eq!(evaluated(&rig, "made", &[&all]).await["total_logs"], 0);
    good(&rig, Method::DELETE, "gateways/made", Value::Null).await;
    for path in ["gateways/made/datasets", "gateways/made/evaluations"] {
        assert_eq!(manage(&rig, Method::GET, path, Value::Null).await.status, 404, "{path}");
    }
    good(&rig, Method::POST, "gateways", gateway).await;
    for path in ["gateways/made/datasets", "gateways/made/evaluations"] {
        assert_eq!(good(&rig, Method::GET, path, Value::Null).await, json!([]), "{path}");
    }
}

#[actix_web::test]
async fn what_was_evaluated_outlives_a_crash_and_what_was_not_is_run_again() {
    let (folder, more) = folders("");
    let rig = keeping(folder.path(), &more);
    calls(&rig).await;
    let all = dataset(&rig, "g", "all", json!([])).await;
    let done = evaluated(&rig, "g", &[&all]).await;
    let lost = evaluated(&rig, "g", &[&all]).await;
    rig.daemon.services.relays.logs.store().unwrap().flush().unwrap();

    // What a kill leaves behind between the making of the second one and its end.
    let (copy, more) = folders("");
    for part in ["registry", "records"] {
        copied(&folder.path().join(part), &copy.path().join(part));
    }
    let file = copy.path().join("registry/acme.json");
    let mut book: Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
    let left = &mut book["book"]["evaluations"][1];
    assert_eq!(left["id"], lost["id"]);
    (left["processed"], left["total_logs"]) = (false.into(), 0.into());
    for result in left["results"].as_array_mut().unwrap() {
        (result["status"], result["result"], result["total_logs"]) = ("waiting".into(), "".into(), 0.into());
    }
    std::fs::write(&file, book.to_string()).unwrap();

    let again = keeping(copy.path(), &more);
    let path = |evaluation: &Value| format!("gateways/g/evaluations/{}", evaluation["id"].as_str().unwrap());
    let rerun = processed(&again, &path(&lost)).await;
    assert_eq!((results(&rerun), rerun["total_logs"].as_u64()), (results(&lost), Some(6)));
    assert_eq!(good(&again, Method::GET, &path(&done), Value::Null).await, done);
    assert_eq!(good(&again, Method::GET, "gateways/g/datasets", Value::Null).await, json!([all]));
}

fn copied(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let (path, name) = entry.map(|entry| (entry.path(), entry.file_name())).unwrap();
        match path.is_dir() {
            true => copied(&path, &to.join(name)),
            false => std::fs::copy(&path, to.join(name)).map(drop).unwrap(),
        }
    }
}
