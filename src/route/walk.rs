//! A call's way through a route, model by model, with what was decided where.
//!
//!     start -> conditional -> percentage -> rate -> model --failed--> rate -> model --succeeded--> end
//!                                                   (try)                   (try)
//!
//! A walk owns its place in the graph and borrows nothing, so it may wait for an upstream between two steps. It always ends: a route has
//! no circle.

use std::fmt;
use std::sync::Arc;

use super::condition::Facts;
use super::{Graph, LimitNode, ModelNode, Node, NodeKind};
use crate::base::Millis;

/// Asked at each limit on the way, with the value of its key (empty: none): whether the call is within it, and if so counted.
pub type Limits<'l> = &'l mut dyn FnMut(&LimitNode, &str) -> bool;

/// A call on its way.
#[derive(Debug)]
pub struct Walk {
    nodes: Arc<[Node]>,
    /// The model to try; none at the end.
    at: Option<usize>,
    steps: Vec<Step>,
    refused: Option<usize>,
}

/// An element on the way.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// Its id.
    pub element: Arc<str>,
    /// What was decided there.
    pub why: Why,
    /// When.
    pub at: Millis,
}

/// What was decided at an element.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Why {
    /// The way begins.
    Start,
    /// Whether the condition held.
    Condition(bool),
    /// The branch that the call's key belongs to.
    Share(Box<str>),
    /// Whether the call was within the limit.
    Within(bool),
    /// The model was tried.
    Try,
    /// The model failed.
    Failed,
    /// The model answered.
    Answered,
    /// The way ends.
    End,
}

impl Graph {
    /// Goes from the start to the first model.
    pub fn walk(&self, facts: &Facts, limits: Limits) -> Walk {
        let mut walk = Walk { nodes: self.nodes.clone(), at: None, steps: Vec::new(), refused: None };
        walk.go(self.start, facts, limits);
        walk
    }
}

impl Walk {
    /// The model to try now; none if the way has ended.
    pub fn model(&self) -> Option<&ModelNode> {
        match &self.nodes[self.at?].kind {
            NodeKind::Model { model, .. } => Some(model),
            _ => None,
        }
    }

    /// The model at hand failed: goes on through its `fallback` to the next, if there is one.
    pub fn failed(&mut self, facts: &Facts, limits: Limits) -> Option<&ModelNode> {
        let at = self.at.take()?;
        if let NodeKind::Model { fallback, .. } = self.nodes[at].kind {
            self.note(at, Why::Failed, facts.now);
            self.go(fallback, facts, limits);
        }
        self.model()
    }

    /// The model at hand answered: the way ends.
    pub fn succeeded(&mut self, now: Millis) {
        let Some(at) = self.at.take() else { return };
        if let NodeKind::Model { success, .. } = self.nodes[at].kind {
            self.note(at, Why::Answered, now);
            self.note(success, Why::End, now);
        }
    }

    /// The last limit that the call was not within: the reason, where the way ended without a model.
    pub fn refused(&self) -> Option<&LimitNode> {
        match &self.nodes[self.refused?].kind {
            NodeKind::Rate { limit, .. } => Some(limit),
            _ => None,
        }
    }

    /// The way so far.
    pub fn steps(&self) -> &[Step] {
        &self.steps
    }

    fn go(&mut self, from: usize, facts: &Facts, limits: Limits) {
        let nodes = self.nodes.clone();
        let mut at = from;
        loop {
            let (why, next) = match &nodes[at].kind {
                NodeKind::Start { next } => (Why::Start, *next),
                NodeKind::Conditional { condition, yes, no } => {
                    let holds = condition.holds(facts);
                    (Why::Condition(holds), if holds { *yes } else { *no })
                }
                NodeKind::Percentage(split) => {
                    let (name, next) = split.pick(facts.key);
                    (Why::Share(name.into()), next)
                }
                NodeKind::Rate { limit, success, fallback } => {
                    let key = limit.key.as_ref().map(|path| path.key(facts)).unwrap_or_default();
                    let is_within = limits(limit, &key);
                    if !is_within {
                        self.refused = Some(at);
                    }
                    (Why::Within(is_within), if is_within { *success } else { *fallback })
                }
                NodeKind::Model { .. } => {
                    self.note(at, Why::Try, facts.now);
                    self.at = Some(at);
                    return;
                }
                NodeKind::End => {
                    self.note(at, Why::End, facts.now);
                    return;
                }
            };
            self.note(at, why, facts.now);
            at = next;
        }
    }

    fn note(&mut self, at: usize, why: Why, now: Millis) {
        self.steps.push(Step { element: self.nodes[at].id.clone(), why, at: now });
    }
}

/// The way in one line, for a log or a header: `start, plan true, split 10%, gpt try, gpt failed, claude try`.
impl fmt::Display for Walk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, step) in self.steps.iter().enumerate() {
            let comma = if at == 0 { "" } else { ", " };
            write!(f, "{comma}{step}")?;
        }
        Ok(())
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Ids are the operator's, but this goes into headers.
        for letter in self.element.chars() {
            write!(f, "{}", if letter.is_ascii_graphic() && letter != ',' { letter } else { '_' })?;
        }
        match &self.why {
            Why::Start | Why::End => Ok(()),
            Why::Condition(holds) => write!(f, " {holds}"),
            Why::Share(name) => write!(f, " {name}"),
            Why::Within(true) => f.write_str(" within"),
            Why::Within(false) => f.write_str(" over"),
            Why::Try => f.write_str(" try"),
            Why::Failed => f.write_str(" failed"),
            Why::Answered => f.write_str(" answered"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;
    use crate::route::tests::{element, model};

    fn support() -> Graph {
        Graph::parse(&json!([
            element("start", "start", Value::Null, "next:plan"),
            element("plan", "conditional", json!({"conditions": {"metadata.plan": "paid"}}), "true:budget false:split"),
            element(
                "budget",
                "rate",
                json!({"limitType": "cost", "key": "metadata.user", "limit": 5, "window": 86400}),
                "success:big fallback:split"
            ),
            element("split", "percentage", Value::Null, "100%:small else:other"),
            model("big", "success:end fallback:small"),
            model("small", "success:end fallback:last"),
            model("other", "success:end fallback:end"),
            element("last", "rate", json!({"limit": 1, "window": 60}), "success:local fallback:end"),
            model("local", "success:end fallback:end"),
            json!({"id": "end", "type": "end"}),
        ]))
        .unwrap()
    }

    fn check(metadata: Value, over: &[&str], failures: usize, expected: &str) {
        let facts =
            Facts { body: &Value::Null, headers: &[], metadata: &metadata, model: "dynamic/x", key: 7, now: Millis(5) };
        let mut asked = Vec::new();
        let mut limits = |limit: &LimitNode, key: &str| {
            asked.push(format!("{}={key}", limit.id));
            !over.contains(&&*limit.id)
        };
        let mut walk = support().walk(&facts, &mut limits);
        for _ in 0..failures {
            walk.failed(&facts, &mut limits);
        }
        let refused = walk.refused().map(|limit| limit.id.to_string());
        walk.succeeded(Millis(9));
        let words = format!("{walk} | {} | {}", asked.join(" "), refused.unwrap_or_default());
        assert_eq!(words, expected);
    }

    #[test]
    fn a_call_goes_where_its_facts_lead_and_the_way_is_kept() {
        check(json!({}), &[], 0, "start, plan false, split 100%, small try, small answered, end |  | ");
        check(
            json!({"plan": "paid", "user": 3}),
            &[],
            0,
            "start, plan true, budget within, big try, big answered, end | budget=3 | ",
        );
        check(
            json!({"plan": "paid"}),
            &["budget"],
            1,
            "start, plan true, budget over, split 100%, small try, small failed, last within, local try, local answered, end | budget= last= | budget",
        );
        check(
            json!({"plan": "paid", "user": "u"}),
            &["last"],
            2,
            "start, plan true, budget within, big try, big failed, small try, small failed, last over, end | budget=u last= | last",
        );
        check(
            json!({}),
            &[],
            9,
            "start, plan false, split 100%, small try, small failed, last within, local try, local failed, end | last= | ",
        );
    }

    #[test]
    fn each_step_is_noted_with_its_time() {
        let mut facts =
            Facts { body: &Value::Null, headers: &[], metadata: &Value::Null, model: "m", key: 7, now: Millis(5) };
        let mut walk = support().walk(&facts, &mut |_, _| true);
        assert_eq!(walk.model().map(|model| &*model.model), Some("small"));
        facts.now = Millis(8);
        assert_eq!(walk.failed(&facts, &mut |_, _| true).map(|model| &*model.model), Some("local"));
        walk.succeeded(Millis(9));
        assert_eq!(walk.model(), None);
        assert_eq!(walk.failed(&facts, &mut |_, _| true), None);
        let times: Vec<_> = walk.steps().iter().map(|step| step.at.0).collect();
        assert_eq!(times, [5, 5, 5, 5, 8, 8, 8, 9, 9]);
    }

    /// A route of `kinds.len()` elements, each of which leads to later ones only.
    fn route_of(kinds: &[(u8, u8, u8)]) -> Value {
        let name = |at: usize| if at >= kinds.len() { "m".to_owned() } else { format!("n{at}") };
        let later = |at: usize, by: u8| name(at + 1 + usize::from(by) % 3);
        let mut elements = vec![element("s", "start", Value::Null, "next:n0")];
        for (at, (kind, one, two)) in kinds.iter().enumerate() {
            // The first port goes to the next element, so that all are reached.
            let (next, far) = (name(at + 1), later(at, one ^ two));
            let id = name(at);
            elements.push(match kind % 4 {
                0 => element(
                    &id,
                    "conditional",
                    json!({"conditions": {"body.x": {"$gt": one}}}),
                    &format!("true:{next} false:{far}"),
                ),
                1 => element(&id, "percentage", Value::Null, &format!("{}%:{next} else:{far}", one % 101)),
                2 => element(&id, "rate", json!({"limit": 1, "window": 1}), &format!("success:{next} fallback:{far}")),
                _ => model(&id, &format!("success:end fallback:{next}")),
            });
        }
        elements.push(model("m", "success:end fallback:end"));
        elements.push(element("end", "end", Value::Null, ""));
        Value::Array(elements)
    }

    proptest! {
        #[test]
        fn a_walk_always_ends(
            kinds in prop::collection::vec((any::<u8>(), any::<u8>(), any::<u8>()), 1..60),
            x in any::<u8>(),
            key in any::<u64>(),
            seed in any::<u64>(),
        ) {
            let graph = Graph::parse(&route_of(&kinds)).unwrap();
            let body = json!({"x": x});
            let facts = Facts { body: &body, headers: &[], metadata: &Value::Null, model: "m", key, now: Millis(0) };
            let mut bits = seed;
            let mut limits = |_: &LimitNode, _: &str| {
                bits = bits.rotate_left(1);
                bits & 1 == 0
            };
            let mut walk = graph.walk(&facts, &mut limits);
            let mut tried = Vec::new();
            while let Some(model) = walk.model() {
                prop_assert!(!tried.contains(&model.id), "{} is tried twice", model.id);
                tried.push(model.id.clone());
                walk.failed(&facts, &mut limits);
            }
            prop_assert_eq!(tried.last().map(|id| &**id), Some("m"));
            prop_assert_eq!(walk.steps().last().map(|step| &step.why), Some(&Why::End));
            prop_assert!(walk.steps().len() <= 2 * (kinds.len() + 3));
        }
    }
}
