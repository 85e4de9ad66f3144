//! Datasets, evaluations, and the evaluators there are.

use super::*;
use crate::base::Error;
use crate::logs::Sums;
use crate::registry::Due;

/// What the official client sends for a new dataset.
fn dataset(name: &str, filters: Value) -> Value {
    json!({ "name": name, "enable": true, "filters": filters })
}

fn filter(key: &str, operator: &str, value: Value) -> Value {
    json!({ "key": key, "operator": operator, "value": value })
}

fn evaluation(name: &str, datasets: &[&Value], types: &[&str]) -> Value {
    let ids: Vec<_> = datasets.iter().map(|dataset| &dataset["id"]).collect();
    json!({ "name": name, "dataset_ids": ids, "evaluation_type_ids": types })
}

/// A registry with two gateways, in a folder that lives as long.
async fn two_gateways() -> (tempfile::TempDir, Peer) {
    let folder = tempfile::tempdir().unwrap();
    let peer = Peer::new(folder.path(), Fixed::default());
    for id in ["g", "h"] {
        peer.result(Post, "gateways", plain(id)).await;
    }
    (folder, peer)
}

const SETS: &str = "gateways/g/datasets";
const EVALUATIONS: &str = "gateways/g/evaluations";

#[actix::test]
async fn a_dataset_is_made_read_replaced_and_deleted() {
    let (_folder, peer) = two_gateways().await;
    let filters = json!([
        filter("provider", "eq", json!(["openai", "groq"])),
        filter("cost", "gt", json!([0.01])),
        filter("success", "eq", json!([true])),
    ]);
    let made = peer.result(Post, SETS, dataset("dear", filters.clone())).await;
    let golden = json!({
        "id": "ID",
        "account_id": "acme",
        "account_tag": "acme",
        "gateway_id": "g",
        "name": "dear",
        "enable": true,
        "filters": filters,
        "created_at": "NOW",
        "modified_at": "NOW",
    });
    assert_eq!(settled(made.clone()), golden);
    let path = format!("{SETS}/{}", made["id"].as_str().unwrap());
    assert_eq!(peer.result(Get, &path, Value::Null).await, made);
    // Another gateway's path does not lead to it.
    let elsewhere = path.replace("/g/", "/h/");
    for method in [Get, Delete] {
        peer.refused(method, &elsewhere, Value::Null, 404, 7002, "is not there").await;
    }
    let all = json!({ "name": "all", "enable": false, "filters": [] });
    peer.refused(Put, &elsewhere, all.clone(), 404, 7002, "is not there").await;
    let changed = peer.result(Put, &path, all).await;
    assert_eq!((&changed["name"], &changed["enable"], &changed["filters"]), (&json!("all"), &json!(false), &json!([])));
    assert_eq!((&changed["id"], &changed["created_at"]), (&made["id"], &made["created_at"]));
    assert_eq!(peer.result(Get, &path, Value::Null).await, changed);
    assert_eq!(peer.result(Delete, &path, Value::Null).await, changed);
    for (method, body) in [(Get, Value::Null), (Delete, Value::Null), (Put, dataset("x", json!([])))] {
        peer.refused(method, &path, body, 404, 7002, "is not there").await;
    }
    peer.refused(Get, &format!("{SETS}/nothing"), Value::Null, 404, 7002, "\"nothing\" is not there").await;
    peer.refused(Get, "gateways/none/datasets", Value::Null, 404, 7002, "\"none\" is not there").await;
    peer.refused(Delete, SETS, Value::Null, 405, 7001, "DELETE").await;
    peer.refused(Post, &path, json!({}), 405, 7001, "POST").await;
    peer.refused(Get, &format!("{path}/more"), Value::Null, 404, 7000, "No route").await;
}

#[actix::test]
async fn what_is_wrong_with_a_dataset_is_told_with_the_filter_it_is_in() {
    let (_folder, peer) = two_gateways().await;
    let good = filter("provider", "eq", json!(["openai"]));
    for (wrong, words) in [
        (filter("status_code", "eq", json!([200])), "'filters.1.key' must be one of created_at, request_content_type"),
        (filter("cost", "neq", json!([1])), "'filters.1.operator' must be one of eq, contains, lt, gt, not \"neq\""),
        (filter("cost", "gt", json!([])), "'filters.1.value' must be a list"),
        (filter("cost", "gt", json!(1)), "'filters.1.value' must be a list"),
        (filter("cost", "gt", json!([null])), "'filters.1.value' must be a list"),
        (filter("cost", "gt", json!(["much"])), "filters.1: 'filters.value' must be a number, not \"much\""),
        (filter("tokens", "contains", json!([1])), "filters.1: 'filters.operator' contains is for texts"),
        (filter("created_at", "lt", json!(["soon"])), "filters.1: 'filters.value' must be a time such as"),
        (filter("success", "eq", json!(["maybe"])), "filters.1: 'filters.value' must be true or false"),
        (filter("feedback", "eq", json!([2])), "-1, 0 or 1"),
        (json!("cost"), "'filters.1.key' must be one of"),
    ] {
        peer.refused(Post, SETS, dataset("d", json!([good, wrong])), 400, 7001, words).await;
    }
    for (body, words) in [
        (json!({ "enable": true, "filters": [] }), "'name' is required"),
        (json!({ "name": "", "enable": true, "filters": [] }), "'name' must be a text of 1 to 256"),
        (json!({ "name": "d", "filters": [] }), "'enable' is required"),
        (json!({ "name": "d", "enable": "yes", "filters": [] }), "'enable' must be true or false"),
        (json!({ "name": "d", "enable": true }), "'filters' is required"),
        (json!({ "name": "d", "enable": true, "filters": {} }), "'filters' must be a list of"),
        (dataset("d", vec![good.clone(); 33].into()), "at most 32"),
        (dataset("d", json!([filter("model", "eq", vec![json!("x".repeat(1000)); 9].into())])), "8192 bytes"),
        (json!([]), "must be a JSON object"),
    ] {
        peer.refused(Post, SETS, body, 400, 7001, words).await;
    }
    // What is refused leaves what was there.
    let made = peer.result(Post, SETS, dataset("d", json!([good]))).await;
    let path = format!("{SETS}/{}", made["id"].as_str().unwrap());
    peer.refused(Put, &path, json!({ "name": "e" }), 400, 7001, "'enable' is required").await;
    assert_eq!(peer.result(Get, &path, Value::Null).await, made);
}

#[actix::test]
async fn a_gateway_has_ten_datasets_which_are_listed_page_by_page_and_found() {
    let (_folder, peer) = two_gateways().await;
    for at in 0..10 {
        let filters = json!([filter("model", "contains", json!([format!("llama-{at}")]))]);
        let mut body = dataset(&format!("set-{at}"), filters);
        body["enable"] = (at != 3).into();
        peer.result(Post, SETS, body).await;
    }
    peer.refused(Post, SETS, dataset("more", json!([])), 400, 7001, "at most 10 datasets: delete one first").await;
    // Another gateway has its own.
    peer.result(Post, "gateways/h/datasets", dataset("set-1", json!([]))).await;
    let id = peer.result(Get, SETS, Value::Null).await[4]["id"].as_str().unwrap().to_owned();
    let by_id = format!("search={}", id.to_uppercase());
    for (query, found, total) in [
        ("per_page=4", &["set-0", "set-1", "set-2", "set-3"][..], 10),
        ("per_page=4&page=3", &["set-8", "set-9"], 10),
        ("per_page=4&page=4", &[], 10),
        ("name=set-1", &["set-1"], 1),
        ("name=set", &[], 0),
        ("search=SET-7", &["set-7"], 1),
        ("search=llama-8", &["set-8"], 1),
        (by_id.as_str(), &["set-4"], 1),
        ("enable=false", &["set-3"], 1),
        ("enable=true&search=set-3", &[], 0),
    ] {
        let body = peer.good(Get, &format!("{SETS}?{query}"), Value::Null).await;
        let names: Vec<_> =
            body["result"].as_array().unwrap().iter().map(|set| set["name"].as_str().unwrap()).collect();
        assert_eq!((&names[..], &body["result_info"]["total_count"]), (found, &json!(total)), "{query}");
    }
    peer.refused(Get, &format!("{SETS}?page=0"), Value::Null, 400, 7001, "'page' must be from 1").await;
}

#[actix::test]
async fn an_evaluation_waits_keeps_its_datasets_as_they_were_and_is_noted_when_it_is_over() {
    let (_folder, peer) = two_gateways().await;
    let set = peer.result(Post, SETS, dataset("one", json!([filter("cached", "eq", json!([false]))]))).await;
    let all = peer.result(Post, SETS, dataset("all", json!([]))).await;
    assert_eq!(peer.registry.due(), None);
    // What is named twice counts once.
    let made =
        peer.result(Post, EVALUATIONS, evaluation("e", &[&set, &all, &set], &["cost", "feedback", "cost"])).await;
    let result = |kind: &str| {
        json!({
            "id": "ID",
            "result_id": "ID",
            "evaluation_id": "ID",
            "evaluation_type_id": kind,
            "status": 0,
            "status_description": "waits to be run",
            "result": "",
            "total_logs": 0,
            "created_at": "NOW",
            "modified_at": "NOW",
        })
    };
    let golden = json!({
        "id": "ID",
        "account_id": "acme",
        "account_tag": "acme",
        "gateway_id": "g",
        "name": "e",
        "processed": false,
        "total_logs": 0,
        "datasets": [settled(set.clone()), settled(all.clone())],
        "results": [result("cost"), result("feedback")],
        "created_at": "NOW",
        "modified_at": "NOW",
    });
    assert_eq!(settled(made.clone()), golden);
    assert_eq!(made["datasets"], json!([set, all]));
    assert!(made["results"].as_array().unwrap().iter().all(|result| result["evaluation_id"] == made["id"]));

    let set_path = format!("{SETS}/{}", set["id"].as_str().unwrap());
    peer.result(Delete, &set_path, Value::Null).await;
    let path = format!("{EVALUATIONS}/{}", made["id"].as_str().unwrap());
    assert_eq!(peer.result(Get, &path, Value::Null).await, made);
    let due = peer.registry.due().unwrap();
    assert_eq!(
        (due.account.as_str(), due.gateway.as_str(), due.id.to_string().into()),
        ("acme", "g", made["id"].clone())
    );
    let sets: Vec<_> = due.sets().unwrap().iter().map(Vec::len).collect();
    assert_eq!(sets, [1, 0]);

    let sums = Sums { count: 4, cost: 400_000_000, duration: 1, liked: 1, disliked: 3 };
    peer.registry.evaluated(&due, Ok(sums)).await.unwrap();
    assert_eq!(peer.registry.due(), None);
    let done = peer.result(Get, &path, Value::Null).await;
    assert_eq!((&done["processed"], &done["total_logs"]), (&json!(true), &json!(4)));
    let told: Vec<_> = done["results"].as_array().unwrap().iter().collect();
    let told: Vec<_> =
        told.iter().map(|result| (&result["status"], &result["result"], &result["total_logs"])).collect();
    assert_eq!(told, [(&json!(1), &json!("0.0011"), &json!(4)), (&json!(1), &json!("0.25"), &json!(4))]);
    assert_eq!(peer.result(Delete, &path, Value::Null).await, done);
    peer.refused(Get, &path, Value::Null, 404, 7002, "is not there").await;
    // Over when it is gone: nothing to note, and nobody to tell.
    peer.registry.evaluated(&due, Ok(sums)).await.unwrap();
    assert_eq!(peer.result(Get, EVALUATIONS, Value::Null).await, json!([]));
}

#[actix::test]
async fn evaluations_are_due_in_the_order_they_were_made_until_one_fails_or_is_done() {
    let (_folder, peer) = two_gateways().await;
    let mut ids = Vec::new();
    for gateway in ["h", "g", "h"] {
        let path = format!("gateways/{gateway}");
        let set = peer.result(Post, &format!("{path}/datasets"), dataset("all", json!([]))).await;
        let made = peer.result(Post, &format!("{path}/evaluations"), evaluation(gateway, &[&set], &["speed"])).await;
        ids.push(made["id"].as_str().unwrap().to_owned());
        tokio::time::sleep(std::time::Duration::from_millis(2)).await;
    }
    let first = peer.registry.due().unwrap();
    assert_eq!((first.id.to_string(), first.gateway.as_str()), (ids[0].clone(), "h"));
    peer.registry.evaluated(&first, Err(Error::internal("the disk is gone"))).await.unwrap();
    let failed = peer.result(Get, &format!("gateways/h/evaluations/{}", ids[0]), Value::Null).await;
    assert_eq!((&failed["processed"], &failed["results"][0]["status"]), (&json!(true), &json!(2)));
    assert_eq!(failed["results"][0]["status_description"], "the disk is gone");
    assert_eq!(peer.registry.due().map(|due: Due| due.id.to_string()), Some(ids[1].clone()));
    // A gateway takes its own with it.
    peer.result(Delete, "gateways/g", Value::Null).await;
    assert_eq!(peer.registry.due().map(|due| due.id.to_string()), Some(ids[2].clone()));
    peer.result(Post, "gateways", plain("g")).await;
    for path in [SETS, EVALUATIONS] {
        assert_eq!(peer.result(Get, path, Value::Null).await, json!([]), "a new gateway of an old name has none");
    }
    for (query, names) in [("processed=true", 1), ("processed=false", 1), ("name=h", 2), ("search=H", 2), ("name=g", 0)]
    {
        let list = peer.result(Get, &format!("gateways/h/evaluations?{query}"), Value::Null).await;
        assert_eq!(list.as_array().unwrap().len(), names, "{query}");
    }
}

#[actix::test]
async fn what_is_wrong_with_an_evaluation_is_told() {
    let (_folder, peer) = two_gateways().await;
    let set = peer.result(Post, SETS, dataset("one", json!([]))).await;
    let mut off = dataset("off", json!([]));
    off["enable"] = false.into();
    let off = peer.result(Post, SETS, off).await;
    let elsewhere = peer.result(Post, "gateways/h/datasets", dataset("one", json!([]))).await;
    let nobody = json!({ "id": "00000000-0000-4000-8000-000000000000" });
    for (body, words) in [
        (evaluation("e", &[&elsewhere], &["cost"]), "'dataset_ids' must be ids of this gateway's datasets"),
        (evaluation("e", &[&set, &nobody], &["cost"]), "not \"00000000"),
        (evaluation("e", &[&off], &["cost"]), "is switched off: set its 'enable' to true first"),
        (evaluation("e", &[], &["cost"]), "'dataset_ids' must be a list of 1 to 10 ids"),
        (evaluation("e", &[&set], &[]), "'evaluation_type_ids' must be a list of 1 to 3 ids"),
        (
            evaluation("e", &[&set], &["wit"]),
            "'evaluation_type_ids' must be some of cost, speed, feedback, not \"wit\"",
        ),
        (json!({ "name": "e", "dataset_ids": [7], "evaluation_type_ids": ["cost"] }), "'dataset_ids' must be a list"),
        (json!({ "name": "e", "dataset_ids": "x", "evaluation_type_ids": ["cost"] }), "'dataset_ids' must be a list"),
        (json!({ "name": "e", "evaluation_type_ids": ["cost"] }), "'dataset_ids' is required"),
        (json!({ "name": "e", "dataset_ids": [set["id"]] }), "'evaluation_type_ids' is required"),
        (json!({ "dataset_ids": [set["id"]], "evaluation_type_ids": ["cost"] }), "'name' is required"),
    ] {
        peer.refused(Post, EVALUATIONS, body, 400, 7001, words).await;
    }
    assert_eq!(peer.registry.due(), None);
    peer.refused(Get, &format!("{EVALUATIONS}/nothing"), Value::Null, 404, 7002, "\"nothing\" is not there").await;
    peer.refused(Get, "gateways/none/evaluations", Value::Null, 404, 7002, "\"none\" is not there").await;
    peer.refused(Put, &format!("{EVALUATIONS}/x"), json!({}), 405, 7001, "PUT").await;
    peer.refused(Get, &format!("{EVALUATIONS}/x/y"), Value::Null, 404, 7000, "No route").await;
    for at in 0..100 {
        peer.result(Post, EVALUATIONS, evaluation(&at.to_string(), &[&set], &["cost"])).await;
    }
    peer.refused(Post, EVALUATIONS, evaluation("e", &[&set], &["cost"]), 400, 7001, "at most 100 evaluations").await;
}

#[actix::test]
async fn the_evaluators_are_three_and_stay_what_they_are() {
    let (_folder, peer) = two_gateways().await;
    let types = peer.result(Get, "evaluation-types", Value::Null).await;
    let first = json!({
        "id": "cost",
        "name": "Cost",
        "type": "cost",
        "description": "What a request costs on average, in USD",
        "enable": true,
        "mandatory": false,
        "created_at": "2026-01-01T00:00:00.000Z",
        "modified_at": "2026-01-01T00:00:00.000Z",
    });
    assert_eq!(types[0], first);
    for (query, ids) in [
        ("", &["cost", "speed", "feedback"][..]),
        ("order_by=name", &["cost", "feedback", "speed"]),
        ("order_by=type&order_by_direction=desc", &["speed", "feedback", "cost"]),
        ("order_by_direction=desc&per_page=2", &["feedback", "speed"]),
        ("per_page=2&page=2", &["feedback"]),
        ("page=2", &[]),
    ] {
        let body = peer.good(Get, &format!("evaluation-types?{query}"), Value::Null).await;
        let found: Vec<_> =
            body["result"].as_array().unwrap().iter().map(|kind| kind["id"].as_str().unwrap()).collect();
        assert_eq!((&found[..], &body["result_info"]["total_count"]), (ids, &json!(3)), "{query}");
    }
    for (query, words) in [("order_by=size", "such as name"), ("order_by_direction=up", "asc or desc")] {
        peer.refused(Get, &format!("evaluation-types?{query}"), Value::Null, 400, 7001, words).await;
    }
    peer.refused(Post, "evaluation-types", json!({}), 405, 7001, "POST").await;
    peer.refused(Get, "evaluation-types/cost", Value::Null, 404, 7000, "No route").await;
}

#[actix::test]
async fn datasets_of_a_gateway_of_the_file_are_the_accounts_own() {
    let folder = tempfile::tempdir().unwrap();
    let peer = Peer::new(folder.path(), fixed(&[("prod", None, json!({}))], &[]));
    let set = peer.result(Post, "gateways/prod/datasets", dataset("all", json!([]))).await;
    peer.result(Post, "gateways/prod/evaluations", evaluation("e", &[&set], &["cost"])).await;
    assert_eq!(peer.registry.due().map(|due| due.gateway), Some("prod".into()));
    let other = Peer { registry: peer.registry.clone(), account: AccountId::new("bobs") };
    for path in ["gateways/prod/datasets", "gateways/prod/evaluations"] {
        assert_eq!(other.result(Get, path, Value::Null).await, json!([]), "{path}");
    }
    // What was made is there after a restart, and still due.
    let before = (peer.result(Get, "gateways/prod/evaluations", Value::Null).await, peer.registry.due());
    let copy = tempfile::tempdir().unwrap();
    std::fs::copy(folder.path().join("acme.json"), copy.path().join("acme.json")).unwrap();
    let again = Peer::new(copy.path(), fixed(&[("prod", None, json!({}))], &[]));
    assert_eq!((again.result(Get, "gateways/prod/evaluations", Value::Null).await, again.registry.due()), before);
    assert_eq!(again.result(Get, "gateways/prod/datasets", Value::Null).await, json!([set]));
}
