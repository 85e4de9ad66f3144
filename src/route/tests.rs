use serde_json::json;

use super::*;

/// An element in short: `to` is `port:element` pairs.
pub(super) fn element(id: &str, kind: &str, properties: Value, to: &str) -> Value {
    let outputs: Map<String, Value> = to
        .split_whitespace()
        .filter_map(|pair| pair.split_once(':'))
        .map(|(port, target)| (port.to_owned(), json!({"elementId": target})))
        .collect();
    json!({"id": id, "type": kind, "properties": properties, "outputs": outputs})
}

pub(super) fn model(id: &str, to: &str) -> Value {
    element(id, "model", json!({"provider": "openai", "model": id, "timeout": 1000, "retries": 2}), to)
}

fn start(to: &str) -> Value {
    element("s", "start", Value::Null, &format!("next:{to}"))
}

fn end() -> Value {
    json!({"id": "e", "type": "end"})
}

#[test]
fn a_wrong_route_is_refused_by_the_element_at_fault() {
    let check = |elements: Value, words: &str| {
        let error = Graph::parse(&elements).err().unwrap_or_else(|| panic!("{elements} was accepted"));
        assert!(error.message().contains(words), "{elements}: {error}");
    };
    let m = || model("m", "success:e fallback:e");
    let one = |odd: Value| json!([start("x"), odd, m(), end()]);
    check(json!({}), "array");
    check(json!([]), "1 to 128");
    check(json!(vec![end(); 200]), "1 to 128");
    check(json!([{"type": "start"}]), "Element 0 needs an \"id\"");
    check(json!([start("m"), m(), m(), end()]), "\"m\": its id is used twice");
    check(json!([m(), end()]), "\"start\": it is missing");
    check(json!([start("m"), element("t", "start", Value::Null, "next:m"), m(), end()]), "\"t\": it is a second");
    check(json!([start("m"), m()]), "\"m\": its output \"success\" leads to \"e\", which is no element");
    check(json!([start("a"), model("a", "success:a fallback:a")]), "\"end\": it is missing");
    check(json!([start("e"), end()]), "\"model\"");
    check(one(json!({"id": "x"})), "\"x\": it needs a \"type\"");
    check(one(json!({"id": "x", "type": "loop"})), "\"x\": its type is \"loop\"");
    check(one(json!({"id": "x", "type": "model", "outputs": []})), "\"x\": its \"outputs\" are an object");
    check(one(model("x", "success:e")), "\"x\": its output \"fallback\" is missing");
    check(one(model("x", "success:e fallback:m next:m")), "\"x\": it has no output \"next\"");
    check(
        one(json!({"id": "x", "type": "model", "outputs": {"success": {}, "fallback": {}}})),
        "needs an \"elementId\"",
    );
    check(one(model("x", "success:m fallback:m")), "\"x\": its output \"success\" must lead to");
    check(one(model("x", "success:e fallback:x")), "\"x\": a way leads from it back");
    check(one(model("x", "success:e fallback:s")), "\"x\": it leads back to the start");
    check(one(model("x", "success:e fallback:e")), "\"m\": no way leads to it");
    let cycle = json!([start("a"), model("a", "success:e fallback:b"), model("b", "success:e fallback:a"), end()]);
    check(cycle, "a way leads from it back");
    let rate = |properties: Value| one(element("x", "rate", properties, "success:m fallback:e"));
    check(rate(json!({"limit": -1, "window": 60})), "\"x\": it needs a \"limit\"");
    check(rate(json!({"limit": 1})), "\"x\": it needs a \"window\"");
    check(rate(json!({"limit": 1, "window": 0})), "\"x\": it needs a \"window\"");
    check(rate(json!({"limit": 1, "window": 60, "limitType": "tokens"})), "\"x\": its limitType");
    check(rate(json!({"limit": 1, "window": 60, "technique": "leaky"})), "\"x\": its technique");
    check(rate(json!({"limit": 1, "window": 60, "key": 5})), "\"x\": its \"key\"");
    check(rate(json!({"limit": 1, "window": 60, "key": "user"})), "\"x\": \"user\"");
    let odd = |properties: Value| one(element("x", "model", properties, "success:e fallback:m"));
    check(odd(json!({"provider": "openai"})), "\"x\": it needs a \"model\"");
    check(odd(json!({"provider": "", "model": "m"})), "\"x\": it needs a \"provider\"");
    check(odd(json!({"provider": "p", "model": "m", "timeout": 1.5})), "\"x\": its \"timeout\"");
    check(odd(json!({"provider": "p", "model": "m", "retries": 50})), "\"x\": its \"retries\"");
    let split = |to: &str| one(element("x", "percentage", Value::Null, to));
    check(split("else:m"), "\"x\": it needs 1 to 5 percentages");
    check(split("10%:m 20%:m 30%:m 1%:m 2%:m 3%:m else:m"), "\"x\": it needs 1 to 5 percentages");
    check(split("60%:m 50%:m else:m"), "\"x\": its percentages are 110 together");
    check(split("60%:m"), "\"x\": its output \"else\" is missing");
    check(split("half:m else:m"), "\"x\": its output \"half\" is no percentage");
    check(split("-1%:m else:m"), "\"x\": its output \"-1%\" is no percentage");
    check(split("NaN%:m else:m"), "\"x\": its output \"NaN%\" is no percentage");
    let conditional = |properties: Value| one(element("x", "conditional", properties, "true:m false:e"));
    check(conditional(json!({})), "\"x\": it needs \"conditions\"");
    check(conditional(json!({"conditions": {"metadata.a": {"$near": 1}}})), "\"x\": \"$near\" is no operator");
}

#[test]
fn both_names_of_everything_are_read() {
    let graph = Graph::parse(&json!([
        start("c"),
        element("c", "conditional", json!({"condition": {"metadata.plan": "paid"}}), "true:r false:q"),
        element("r", "rate_limit", json!({"limitType": "cost", "key": "metadata.user", "limit": 2.5, "interval": 3600, "technique": "sliding"}), "success:m fallback:e"),
        element("q", "rate", json!({"limit": 10, "window": 60}), "success:m fallback:e"),
        model("m", "success:e fallback:e"),
        end(),
    ]))
    .unwrap();
    let limits: Vec<_> = graph
        .nodes
        .iter()
        .filter_map(|node| match &node.kind {
            NodeKind::Rate { limit, .. } => {
                Some((limit.counts, limit.limit, limit.window_s, limit.technique, limit.key()))
            }
            _ => None,
        })
        .collect();
    assert_eq!(
        limits,
        [
            (Counts::Cost, 2.5, 3600, Technique::Sliding, Some("metadata.user")),
            (Counts::Requests, 10.0, 60, Technique::Fixed, None)
        ]
    );
    let models: Vec<_> = graph.models().map(|model| (&*model.id, model.timeout_ms, model.retries)).collect();
    assert_eq!(models, [("m", Some(1000), Some(2))]);
}

#[test]
fn a_long_route_of_many_crossing_ways_is_checked_in_no_time() {
    let mut elements = vec![start("c0"), end(), model("m", "success:e fallback:e")];
    for n in 0..100 {
        let next = if n == 99 { "m".to_owned() } else { format!("c{}", n + 1) };
        let to = format!("true:{next} false:{next}");
        elements.push(element(&format!("c{n}"), "conditional", json!({"conditions": {"model": "x"}}), &to));
    }
    assert!(Graph::parse(&Value::Array(elements)).is_ok());
}
