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

pub use condition::Facts;
pub use walk::{Step, Walk, Why};

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
                return Err(
                    self.wrong(&format!("its output {name:?} is no percentage such as \"10%\", and not \"else\"."))
                );
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
            Some(other) => {
                return Err(self.wrong(&format!("its technique is {other:?}, not \"fixed\" or \"sliding\".")));
            }
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
            Some(value) => {
                match value.as_f64().filter(|number| number.fract() == 0.0 && (0.0..=most as f64).contains(number)) {
                    Some(number) => Ok(Some(number as u64)),
                    None => Err(self.wrong(&format!("its {name:?} is a whole number from 0 to {most}."))),
                }
            }
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
        return Err(Error::bad_field(
            "elements",
            "Every way through a route leads to an element of type \"end\": it is missing.",
        ));
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
mod tests;
