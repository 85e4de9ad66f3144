//! What is still to be told, channel by channel, in order.
//!
//! ```text
//!   push ──> [ oldest … newest ] ──head──> a courier ──delivered or given up──> remove
//! ```
//!
//! Pure and bounded. Knows nothing of how channels are reached.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::notice::{Event, Notice};

/// Notices that wait for one channel at most; the oldest goes then.
const MAX_WAITING: usize = 256;

/// See the top of this file.
#[derive(Clone, PartialEq, Default, Debug, Serialize, Deserialize)]
pub struct Outbox {
    channels: BTreeMap<String, VecDeque<Arc<Notice>>>,
}

impl Outbox {
    /// One more for a channel. Repetitions of the same alert that still wait make way: they would only say what this one says.
    /// Returns how many were lost because there was no room.
    pub fn push(&mut self, channel: &str, notice: Arc<Notice>) -> u64 {
        let waiting = self.channels.entry(channel.to_owned()).or_default();
        waiting.retain(|old| old.event != Event::Repeated || old.alert != notice.alert);
        waiting.push_back(notice);
        let excess = waiting.len().saturating_sub(MAX_WAITING);
        waiting.drain(..excess);
        excess as u64
    }

    /// What is next for a channel.
    pub fn head(&self, channel: &str) -> Option<&Arc<Notice>> {
        self.channels.get(channel)?.front()
    }

    /// Takes out what was delivered or given up.
    pub fn remove(&mut self, channel: &str, id: &str) {
        let Some(waiting) = self.channels.get_mut(channel) else { return };
        waiting.retain(|notice| notice.id != id);
        if waiting.is_empty() {
            self.channels.remove(channel);
        }
    }

    /// How many wait for a channel.
    pub fn waiting(&self, channel: &str) -> usize {
        self.channels.get(channel).map_or(0, VecDeque::len)
    }

    /// Forgets what waits for channels that are no more; returns how many that were.
    pub fn keep(&mut self, is_there: impl Fn(&str) -> bool) -> usize {
        let before: usize = self.channels.values().map(VecDeque::len).sum();
        self.channels.retain(|channel, _| is_there(channel));
        before - self.channels.values().map(VecDeque::len).sum::<usize>()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Millis;

    fn notice(alert: &str, number: u32, event: Event) -> Arc<Notice> {
        let id = format!("{alert}-{number}");
        Arc::new(Notice { id, alert: alert.into(), number, event, ..Notice::test(Millis(0)) })
    }

    fn waiting(outbox: &mut Outbox) -> Vec<String> {
        let mut ids = Vec::new();
        while let Some(head) = outbox.head("mail").cloned() {
            outbox.remove("mail", &head.id);
            ids.push(head.id.clone());
        }
        ids
    }

    #[test]
    fn notices_leave_in_their_order_and_only_the_last_repetition_does() {
        let mut outbox = Outbox::default();
        let events = [
            ("a", 0, Event::Fired),
            ("a", 1, Event::Repeated),
            ("b", 0, Event::Fired),
            ("a", 2, Event::Repeated),
            ("b", 1, Event::Repeated),
            ("b", 2, Event::Resolved),
        ];
        for (alert, number, event) in events {
            assert_eq!(outbox.push("mail", notice(alert, number, event)), 0);
        }
        outbox.push("slack", notice("c", 0, Event::Fired));
        assert_eq!(waiting(&mut outbox), ["a-0", "b-0", "a-2", "b-2"]);
        assert_eq!((outbox.waiting("mail"), outbox.waiting("slack"), outbox.head("none")), (0, 1, None));
        assert_eq!(outbox.keep(|channel| channel == "mail"), 1);
        assert_eq!(outbox, Outbox::default());
    }

    #[test]
    fn a_channel_that_is_down_for_long_loses_the_oldest_and_counts_them() {
        let mut outbox = Outbox::default();
        let lost: u64 = (0..300).map(|number| outbox.push("mail", notice("a", number, Event::Fired))).sum();
        let left = waiting(&mut outbox);
        assert_eq!((lost, left.len()), (44, MAX_WAITING));
        assert_eq!((left[0].as_str(), left[255].as_str()), ("a-44", "a-299"));
    }
}
