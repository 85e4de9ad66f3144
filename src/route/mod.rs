//! Dynamic routes: a checked graph of elements that decides which model a call goes to, and to which next.
//!
//!     elements (JSON) --parse--> Graph --walk(facts, limits)--> Walk: model to try
//!                                                                 |--failed--> its `fallback` --> next model, or none
//!                                                                 '--succeeded--> end
//!
//! `condition.rs` says whether a condition holds, `split.rs` which branch of a percentage a key takes, `walk.rs` goes through. Pure: limits
//! are asked of the caller, nothing is sent. Whether a target is healthy is not known here.

mod condition;
mod split;
mod walk;

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Map, Value};

use crate::base::{Error, Result};
use condition::{Condition, FactPath};
use split::Split;

pub use walk::{Facts, Step, Walk, Why};

/// Elements of a route at most.
pub const MAX_ELEMENTS: usize = 128;
/// Bytes of an element's id at most.
const MAX_ID: usize = 128;
/// Named branches of a percentage element at most, `else` not counted.
const MAX_BRANCHES: usize = 5;
/// A model may be given this long for its first byte at most.
const MAX_TIMEOUT_MS: u64 = 3_600_000;
/// Retries of one model at most; attempts end at five in any case.
const MAX_RETRIES: u64 = 5;

/// A route: elements that lead from one `start` to an `end`, without a circle. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Graph {
    nodes: Arc<[Node]>,
    start: usize,
}

#[derive(Debug)]
struct Node {
    id: Arc<str>,
    kind: NodeKind,
}

#[derive(Debug)]
enum NodeKind {
    Start { next: usize },
    Conditional { condition: Condition, yes: usize, no: usize },
    Percentage(Split),
    Rate { limit: LimitNode, success: usize, fallback: usize },
    Model { model: ModelNode, success: usize, fallback: usize },
    End,
}

/// A model that the route may try.
#[derive(Clone, PartialEq, Debug)]
pub struct ModelNode {
    /// The element's id.
    pub id: Arc<str>,
    /// A provider's slug.
    pub provider: Box<str>,
    /// The provider's name of the model.
    pub model: Box<str>,
    /// Milliseconds to the first byte; none: the gateway's.
    pub timeout_ms: Option<u64>,
    /// Tries after the first; none: the gateway's.
    pub retries: Option<u8>,
}

/// A limit on the way: so many requests, or so much money, in a window.
#[derive(Clone, PartialEq, Debug)]
pub struct LimitNode {
    /// The element's id. Counters belong to the route, this id and the key.
    pub id: Arc<str>,
    /// What is counted.
    pub counts: Counts,
    /// Requests, or US dollars.
    pub limit: f64,
    /// Seconds.
    pub window_s: u64,
    /// How windows move.
    pub technique: Technique,
    key: Option<FactPath>,
}

/// What a limit counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Counts {
    /// Requests.
    Requests,
    /// What they cost: a budget.
    Cost,
}

/// How the window of a limit moves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Technique {
    /// Windows lie end to end on the clock.
    Fixed,
    /// The window ends now.
    Sliding,
}

impl Graph {
    /// Checks and compiles the elements of a route.
    ///
    /// # Errors
    /// [`crate::base::Kind::BadInput`], naming the element: an unknown type, property or port; a port that leads nowhere, or that is missing; no `start`, no `end`, no `model`,
    /// or two `start`s; an element that cannot be reached; a circle; percentages of more than 100 together; a condition that is none.
    pub fn parse(elements: &Value) -> Result<Self> {
        let Some(elements) = elements.as_array() else {
            return Err(Error::bad_field("elements", "The elements of a route are an array of objects."));
        };
        if elements.is_empty() || elements.len() > MAX_ELEMENTS {
            let message = format!("A route has 1 to {MAX_ELEMENTS} elements, not {}.", elements.len());
            return Err(Error::bad_field("elements", message));
        }
        let mut places = HashMap::new();
        let mut ids = Vec::with_capacity(elements.len());
        for (at, element) in elements.iter().enumerate() {
            let id = element.get("id").and_then(Value::as_str).unwrap_or_default();
            if id.is_empty() || id.len() > MAX_ID {
                let message = format!("Element {at} needs an \"id\" of 1 to {MAX_ID} bytes.");
                return Err(Error::bad_field(format!("elements.{at}.id"), message));
            }
            if places.insert(id, at).is_some() {
                return Err(wrong(id, "its id is used twice."));
            }
            ids.push(Arc::<str>::from(id));
        }
        let nodes = elements.iter().zip(ids).map(|(element, id)| Element { element, id, places: &places }.node());
        let nodes: Arc<[Node]> = nodes.collect::<Result<Vec<_>>>()?.into();
        let start = start_of(&nodes)?;
        check_ways(&nodes, start)?;
        Ok(Self { nodes, start })
    }

    /// All models that the route may try, in no particular order: what must exist before it is deployed.
    pub fn models(&self) -> impl Iterator<Item = &ModelNode> {
        self.nodes.iter().filter_map(|node| match &node.kind {
            NodeKind::Model { model, .. } => Some(model),
            _ => None,
        })
    }
}

impl LimitNode {
    /// The property of the call that is counted apart, as written: `metadata.user_id`. None: all calls together.
    pub fn key(&self) -> Option<&str> {
        self.key.as_ref().map(FactPath::as_str)
    }
}

impl Node {
    /// Where its ports lead.
    fn next(&self) -> Vec<usize> {
        match &self.kind {
            NodeKind::Start { next } => vec![*next],
            NodeKind::Conditional { yes, no, .. } => vec![*yes, *no],
            NodeKind::Percentage(split) => split.targets().collect(),
            NodeKind::Rate { success, fallback, .. } | NodeKind::Model { success, fallback, .. } => {
                vec![*success, *fallback]
            }
            NodeKind::End => Vec::new(),
        }
    }
}

/// An element as it was written.
struct Element<'e> {
    element: &'e Value,
    id: Arc<str>,
    places: &'e HashMap<&'e str, usize>,
}

impl<'e> Element<'e> {
    fn node(&self) -> Result<Node> {
        let kind = self.element.get("type").and_then(Value::as_str).unwrap_or_default();
        let kind = match kind {
            "start" => {
                let [next] = self.ports(["next"])?;
                NodeKind::Start { next }
            }
            "conditional" => {
                let [yes, no] = self.ports(["true", "false"])?;
                NodeKind::Conditional { condition: self.condition()?, yes, no }
            }
            "percentage" => NodeKind::Percentage(self.split()?),
            "rate" | "rate_limit" => {
                let [success, fallback] = self.ports(["success", "fallback"])?;
                NodeKind::Rate { limit: self.limit()?, success, fallback }
            }
            "model" => {
                let [success, fallback] = self.ports(["success", "fallback"])?;
                NodeKind::Model { model: self.model()?, success, fallback }
            }
            "end" => {
                self.ports([])?;
                NodeKind::End
            }
            "" => return Err(self.wrong("it needs a \"type\".")),
            other => {
                let types = "start, conditional, percentage, rate, rate_limit, model or end";
                return Err(self.wrong(&format!("its type is {other:?}, not {types}.")));
            }
        };
        Ok(Node { id: self.id.clone(), kind })
    }

    /// Exactly these ports, and where they lead.
    fn ports<const N: usize>(&self, names: [&str; N]) -> Result<[usize; N]> {
        let outputs = self.outputs()?;
        let unknown = outputs.and_then(|outputs| outputs.keys().find(|name| !names.contains(&name.as_str())));
        if let Some(unknown) = unknown {
            return Err(self.wrong(&format!("it has no output {unknown:?}; its outputs: {names:?}.")));
        }
        let mut targets = [0; N];
        for (target, name) in targets.iter_mut().zip(names) {
            *target = self.port(outputs, name)?;
        }
        Ok(targets)
    }

    fn outputs(&self) -> Result<Option<&'e Map<String, Value>>> {
        match self.element.get("outputs") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(outputs)) => Ok(Some(outputs)),
            Some(_) => Err(self.wrong("its \"outputs\" are an object.")),
        }
    }

    fn port(&self, outputs: Option<&Map<String, Value>>, name: &str) -> Result<usize> {
        let Some(output) = outputs.and_then(|outputs| outputs.get(name)) else {
            return Err(self.wrong(&format!("its output {name:?} is missing.")));
        };
        let Some(target) = output.get("elementId").and_then(Value::as_str) else {
            return Err(self.wrong(&format!("its output {name:?} needs an \"elementId\".")));
        };
        let Some(place) = self.places.get(target) else {
            return Err(self.wrong(&format!("its output {name:?} leads to {target:?}, which is no element.")));
        };
        Ok(*place)
    }

    fn property(&self, name: &str) -> Option<&'e Value> {
        self.element.get("properties")?.get(name).filter(|value| !value.is_null())
    }

    fn condition(&self) -> Result<Condition> {
        // The documentation has shown both names.
        let Some(written) = self.property("conditions").or_else(|| self.property("condition")) else {
            return Err(self.wrong("it needs \"conditions\"."));
        };
        Condition::parse(written).map_err(|why| self.wrong(&why))
    }

    fn split(&self) -> Result<Split> {
        let outputs = self.outputs()?;
        let mut branches = Vec::new();
        let mut sum = 0.0;
        for name in outputs.into_iter().flatten().map(|(name, _)| name).filter(|name| *name != "else") {
            let percent = name.strip_suffix('%').and_then(|digits| digits.trim().parse::<f64>().ok());
            let Some(percent) = percent.filter(|percent| (0.0..=100.0).contains(percent)) else {
                return Err(self.wrong(&format!("its output {name:?} is no percentage such as \"10%\", and not \"else\".")));
            };
            sum += percent;
            branches.push((name.as_str(), percent, self.port(outputs, name)?));
        }
        if branches.is_empty() || branches.len() > MAX_BRANCHES {
            return Err(self.wrong(&format!("it needs 1 to {MAX_BRANCHES} percentages, and \"else\".")));
        }
        // Thirds do not add up exactly.
        if sum > 100.0 + 1e-6 {
            return Err(self.wrong(&format!("its percentages are {sum} together, more than 100.")));
        }
        let rest = (100.0 - sum).max(0.0);
        let has_else = outputs.is_some_and(|outputs| outputs.contains_key("else"));
        if has_else || rest > 1e-6 {
            branches.push(("else", rest, self.port(outputs, "else")?));
        }
        let named = |place: usize| self.places.iter().find(|(_, at)| **at == place).map_or("", |(id, _)| *id);
        Ok(Split::new(&self.id, branches.iter().map(|(name, percent, place)| (*name, *percent, *place, named(*place)))))
    }

    fn limit(&self) -> Result<LimitNode> {
        let counts = match self.property("limitType").map(|kind| kind.as_str().unwrap_or_default()) {
            None | Some("count") => Counts::Requests,
            Some("cost") => Counts::Cost,
            Some(other) => return Err(self.wrong(&format!("its limitType is {other:?}, not \"count\" or \"cost\"."))),
        };
        let limit = self.property("limit").and_then(Value::as_f64).filter(|limit| *limit >= 0.0 && limit.is_finite());
        let Some(limit) = limit else { return Err(self.wrong("it needs a \"limit\" of 0 or more.")) };
        let window = self.property("window").or_else(|| self.property("interval"));
        let window = window.and_then(Value::as_f64).filter(|seconds| (1.0..=31_622_400.0).contains(seconds));
        let Some(window) = window else {
            return Err(self.wrong("it needs a \"window\" of 1 second to 366 days, in seconds."));
        };
        let technique = match self.property("technique").map(|technique| technique.as_str().unwrap_or_default()) {
            Some("sliding") => Technique::Sliding,
            None | Some("fixed") => Technique::Fixed,
            Some(other) => return Err(self.wrong(&format!("its technique is {other:?}, not \"fixed\" or \"sliding\"."))),
        };
        let key = match self.property("key") {
            None => None,
            Some(Value::String(path)) if path.is_empty() => None,
            Some(Value::String(path)) => Some(FactPath::parse(path).map_err(|why| self.wrong(&why))?),
            Some(_) => return Err(self.wrong("its \"key\" is a path such as \"metadata.user_id\".")),
        };
        Ok(LimitNode { id: self.id.clone(), counts, limit, window_s: window as u64, technique, key })
    }

    fn model(&self) -> Result<ModelNode> {
        let text = |name: &str| {
            let text = self.property(name).and_then(Value::as_str).filter(|text| !text.is_empty() && text.len() <= 256);
            text.map(Box::<str>::from).ok_or_else(|| self.wrong(&format!("it needs a {name:?}.")))
        };
        let number = |name: &str, most: u64| match self.property(name) {
            None => Ok(None),
            Some(value) => match value.as_f64().filter(|number| number.fract() == 0.0 && (0.0..=most as f64).contains(number)) {
                Some(number) => Ok(Some(number as u64)),
                None => Err(self.wrong(&format!("its {name:?} is a whole number from 0 to {most}."))),
            },
        };
        Ok(ModelNode {
            id: self.id.clone(),
            provider: text("provider")?,
            model: text("model")?,
            // Zero is how editors write "none".
            timeout_ms: number("timeout", MAX_TIMEOUT_MS)?.filter(|timeout| *timeout > 0),
            retries: number("retries", MAX_RETRIES)?.map(|retries| retries as u8),
        })
    }

    fn wrong(&self, why: &str) -> Error {
        wrong(&self.id, why)
    }
}

fn wrong(id: &str, why: &str) -> Error {
    Error::bad_field(format!("elements.{id}"), format!("Element {id:?}: {why}"))
}

fn start_of(nodes: &[Node]) -> Result<usize> {
    let mut starts = (0..nodes.len()).filter(|at| matches!(nodes[*at].kind, NodeKind::Start { .. }));
    let Some(start) = starts.next() else {
        return Err(Error::bad_field("elements", "A route begins at an element of type \"start\": it is missing."));
    };
    if let Some(second) = starts.next() {
        return Err(wrong(&nodes[second].id, "it is a second \"start\"."));
    }
    Ok(start)
}

/// Follows all ways from the start: no circle, every element on one of them, an end and a model among them.
fn check_ways(nodes: &[Node], start: usize) -> Result<()> {
    #[derive(Clone, Copy, PartialEq)]
    enum Seen {
        Not,
        OnTheWay,
        Done,
    }
    fn follow(nodes: &[Node], at: usize, seen: &mut [Seen]) -> Result<()> {
        match seen[at] {
            Seen::Done => return Ok(()),
            Seen::OnTheWay => return Err(wrong(&nodes[at].id, "a way leads from it back to itself.")),
            Seen::Not => {}
        }
        seen[at] = Seen::OnTheWay;
        // Not deeper than there are elements, which are few.
        for next in nodes[at].next() {
            if matches!(nodes[next].kind, NodeKind::Start { .. }) {
                return Err(wrong(&nodes[at].id, "it leads back to the start."));
            }
            follow(nodes, next, seen)?;
        }
        seen[at] = Seen::Done;
        Ok(())
    }
    if !nodes.iter().any(|node| matches!(node.kind, NodeKind::End)) {
        return Err(Error::bad_field("elements", "Every way through a route leads to an element of type \"end\": it is missing."));
    }
    if !nodes.iter().any(|node| matches!(node.kind, NodeKind::Model { .. })) {
        return Err(Error::bad_field("elements", "A route needs an element of type \"model\"."));
    }
    let mut seen = vec![Seen::Not; nodes.len()];
    follow(nodes, start, &mut seen)?;
    if let Some(lost) = seen.iter().position(|seen| *seen == Seen::Not) {
        return Err(wrong(&nodes[lost].id, "no way leads to it from the start."));
    }
    for node in nodes {
        // An answer is there: nothing else could be done with it.
        if let NodeKind::Model { success, .. } = node.kind
            && !matches!(nodes[success].kind, NodeKind::End)
        {
            return Err(wrong(&node.id, "its output \"success\" must lead to an element of type \"end\"."));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
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
        check(one(json!({"id": "x", "type": "model", "outputs": {"success": {}, "fallback": {}}})), "needs an \"elementId\"");
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
                NodeKind::Rate { limit, .. } => Some((limit.counts, limit.limit, limit.window_s, limit.technique, limit.key())),
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
}
