//! How often the limits of dynamic routes were passed: counters by route, element and key, in windows on the clock.
//!
//!     key --> the window now, and the one before --> count, or weighted count --> within? then one more
//!
//! Exact within this process: whoever asks has counted when it hears yes. Counters of windows that are over are forgotten.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::base::Millis;
use crate::route::{Counts, LimitNode, Technique};

/// Counters at most; beyond it those of the oldest windows go first.
const MAX_COUNTERS: usize = 100_000;

/// The counters of all routes. Clones share them.
#[derive(Clone, Default)]
pub struct RouteLimits(Arc<Mutex<HashMap<u64, Counter>>>);

/// One key's counts.
#[derive(Clone, Copy, Default)]
struct Counter {
    /// Number of the window.
    window: u64,
    /// Ends then, the next one included.
    until: u64,
    now: f64,
    before: f64,
}

impl RouteLimits {
    /// Whether one more call is within the limit; if so it is counted. `route` and `key` name the counter.
    ///
    /// A budget refuses nobody: what a call costs is not known before there are prices.
    pub fn pass(&self, route: &str, limit: &LimitNode, key: &str, now: Millis) -> bool {
        if limit.counts == Counts::Cost {
            return true;
        }
        let length = limit.window_s.max(1) * 1000;
        let window = now.0 / length;
        let mut counters = self.0.lock();
        if counters.len() >= MAX_COUNTERS {
            counters.retain(|_, counter| counter.until > now.0);
            if counters.len() >= MAX_COUNTERS {
                // Still too many keys at once: the ones that end first.
                let mut ends: Vec<u64> = counters.values().map(|counter| counter.until).collect();
                let (_, middle, _) = ends.select_nth_unstable(MAX_COUNTERS / 2);
                let middle = *middle;
                counters.retain(|_, counter| counter.until > middle);
            }
        }
        let counter = counters.entry(name(route, limit, key)).or_default();
        if counter.window != window {
            counter.before = if counter.window + 1 == window { counter.now } else { 0.0 };
            (counter.window, counter.now) = (window, 0.0);
        }
        counter.until = (window + 2) * length;
        let carried = match limit.technique {
            Technique::Fixed => 0.0,
            Technique::Sliding => counter.before * (1.0 - (now.0 % length) as f64 / length as f64),
        };
        if carried + counter.now + 1.0 > limit.limit {
            return false;
        }
        counter.now += 1.0;
        true
    }
}

fn name(route: &str, limit: &LimitNode, key: &str) -> u64 {
    use std::hash::{DefaultHasher, Hash, Hasher};
    let mut hasher = DefaultHasher::new();
    (route, &*limit.id, key).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::route::{Facts, Graph};

    /// The limit of a route that has one.
    fn limit(technique: &str) -> LimitNode {
        let elements = json!([
            { "id": "s", "type": "start", "outputs": { "next": { "elementId": "r" } } },
            { "id": "r", "type": "rate", "properties": { "limitType": "count", "limit": 2, "window": 60, "technique": technique },
              "outputs": { "success": { "elementId": "m" }, "fallback": { "elementId": "e" } } },
            { "id": "m", "type": "model", "properties": { "provider": "openai", "model": "x" },
              "outputs": { "success": { "elementId": "e" }, "fallback": { "elementId": "e" } } },
            { "id": "e", "type": "end" },
        ]);
        let graph = Graph::parse(&elements).unwrap();
        let (null, mut found) = (json!(null), None);
        let facts = Facts { body: &null, headers: &[], metadata: &null, model: "", key: 0, now: Millis(0) };
        graph.walk(&facts, &mut |limit, _| {
            found = Some(limit.clone());
            true
        });
        found.unwrap()
    }

    #[test]
    fn a_window_lets_in_as_many_as_it_may_for_each_key() {
        let check = |technique: &str, calls: &[(u64, &str, bool)]| {
            let (limits, limit) = (RouteLimits::default(), limit(technique));
            for (at, key, within) in calls {
                assert_eq!(limits.pass("r", &limit, key, Millis(at * 1000)), *within, "{technique} {key} at {at}");
            }
        };
        check(
            "fixed",
            &[
                (1, "a", true),
                (2, "a", true),
                (3, "a", false),
                (3, "b", true),
                (60, "a", true),
                (119, "a", true),
                (119, "a", false),
            ],
        );
        // Of two in the window before, one and a half still count a quarter into the next.
        check(
            "sliding",
            &[(10, "a", true), (20, "a", true), (75, "a", false), (91, "a", true), (92, "a", false), (300, "a", true)],
        );
    }

    #[test]
    fn routes_do_not_share_counters() {
        let (limits, limit) = (RouteLimits::default(), limit("fixed"));
        for route in ["a", "b"] {
            assert!(limits.pass(route, &limit, "", Millis(0)) && limits.pass(route, &limit, "", Millis(0)), "{route}");
            assert!(!limits.pass(route, &limit, "", Millis(0)), "{route}");
        }
    }
}
