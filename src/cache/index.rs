//! Which answers there are, where they lie, and which go first.
//!
//! ```text
//!              memory full                  segment dropped
//!   in memory ────────────> only on disk ───────────────────> gone       expired, purged, replaced, too many: gone at once
//!       ^                        │
//!       └────── asked for ───────┘
//! ```
//!
//! Two orders by last use, one for each of the two states. Hits do not come here: they leave their time at the entry,
//! and whoever is next to go is asked for it first (`used`), so one that was served since is put back in its place.
//!
//! Pure: holds no bytes, no clock and no files. What has to be done is said in `Changes`.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use crate::base::Millis;
use crate::cache::entry::{Record, Stamps};
use crate::cache::key::Digest;

/// Exact spellings that an entry is found under, at most; the oldest makes room.
const MAX_ALIASES: usize = 8;

/// What the index keeps to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) memory_bytes: u64,
    pub(super) entries: usize,
}

/// Where a frame lies on disk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Place {
    pub(super) segment: u32,
    pub(super) at: u64,
    pub(super) length: u64,
}

/// What a call to the index leaves to be done.
#[derive(Default, PartialEq, Eq, Debug)]
pub(super) struct Changes {
    /// To be taken out of the view.
    pub(super) forget: Vec<Digest>,
    /// Segments that hold nothing any more.
    pub(super) delete: Vec<u32>,
    /// Entries that had to make room in memory, or altogether.
    pub(super) evicted: u64,
    /// Entries that were too old.
    pub(super) expired: u64,
}

/// When an entry in memory was last served.
pub(super) type Used<'a> = &'a dyn Fn(&Digest) -> Millis;

/// By last use; the number tells apart what happened in the same millisecond.
type Rank = (Millis, u64);

struct Node {
    record: Record,
    rank: Rank,
    /// Bytes in memory, if it is there.
    memory: Option<u64>,
    place: Option<Place>,
    /// When it came to its place on disk.
    placed: Millis,
    /// Whether it has outlived a segment already.
    is_rewritten: bool,
    aliases: Vec<Digest>,
}

pub(super) struct Index {
    limits: Limits,
    nodes: HashMap<Digest, Node>,
    /// In memory, least recently used first.
    warm: BTreeMap<Rank, Digest>,
    /// Only on disk, likewise.
    cold: BTreeMap<Rank, Digest>,
    expiry: BTreeSet<(Millis, Digest)>,
    segments: BTreeMap<u32, Segment>,
    memory_bytes: u64,
    sequence: u64,
}

#[derive(Default)]
struct Segment {
    /// All that was written there; some have moved since.
    digests: Vec<Digest>,
    living: usize,
}

impl Index {
    pub(super) fn new(limits: Limits) -> Self {
        Self {
            limits,
            nodes: HashMap::new(),
            warm: BTreeMap::new(),
            cold: BTreeMap::new(),
            expiry: BTreeSet::new(),
            segments: BTreeMap::new(),
            memory_bytes: 0,
            sequence: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.nodes.len()
    }

    pub(super) fn in_memory(&self) -> usize {
        self.warm.len()
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    pub(super) fn is_in_memory(&self, digest: &Digest) -> bool {
        self.nodes.get(digest).is_some_and(|node| node.memory.is_some())
    }

    /// A new entry, in memory (if it says how large it is there), on disk, or both. It replaces the one of the same key.
    pub(super) fn insert(
        &mut self,
        record: Record,
        memory: Option<u64>,
        place: Option<Place>,
        now: Millis,
        used: Used<'_>,
        changes: &mut Changes,
    ) {
        let memory = memory.filter(|bytes| *bytes <= self.limits.memory_bytes);
        // Before the old one leaves, which may be the last of the same segment.
        if let Some(place) = place {
            self.settle(record.digest, place);
        }
        self.remove(&record.digest, changes);
        if memory.is_none() && place.is_none() {
            return;
        }
        let rank = self.rank(now);
        let order = if memory.is_some() { &mut self.warm } else { &mut self.cold };
        order.insert(rank, record.digest);
        self.expiry.insert((record.expires, record.digest));
        self.memory_bytes += memory.unwrap_or_default();
        let node = Node { record, rank, memory, place, placed: now, is_rewritten: false, aliases: Vec::new() };
        self.nodes.insert(record.digest, node);
        self.make_room(used, changes);
    }

    /// Whether any entry is there.
    pub(super) fn lives_in(&self, segment: u32) -> bool {
        self.segments.contains_key(&segment)
    }

    /// What is known of an entry, and where it lies, if it is on disk.
    pub(super) fn find(&self, digest: &Digest) -> Option<(Record, Option<Place>)> {
        self.nodes.get(digest).map(|node| (node.record, node.place))
    }

    /// An entry on disk has been read.
    pub(super) fn load(&mut self, digest: &Digest, memory: u64, now: Millis, used: Used<'_>, changes: &mut Changes) {
        if memory > self.limits.memory_bytes {
            return;
        }
        let rank = self.rank(now);
        let Some(node) = self.nodes.get_mut(digest).filter(|node| node.memory.is_none()) else { return };
        self.cold.remove(&node.rank);
        self.warm.insert(rank, *digest);
        (node.rank, node.memory) = (rank, Some(memory));
        self.memory_bytes += memory;
        self.make_room(used, changes);
    }

    /// An entry in memory was asked for in these exact bytes. Returns whether the view should have it under them.
    pub(super) fn alias(&mut self, digest: &Digest, raw: Digest, changes: &mut Changes) -> bool {
        let Some(node) = self.nodes.get_mut(digest).filter(|node| node.memory.is_some()) else { return false };
        if raw == *digest || node.aliases.contains(&raw) {
            return false;
        }
        if node.aliases.len() == MAX_ALIASES {
            changes.forget.push(node.aliases.remove(0));
        }
        node.aliases.push(raw);
        true
    }

    /// Takes an entry out.
    pub(super) fn remove(&mut self, digest: &Digest, changes: &mut Changes) {
        let Some(node) = self.nodes.remove(digest) else { return };
        self.warm.remove(&node.rank);
        self.cold.remove(&node.rank);
        self.expiry.remove(&(node.record.expires, *digest));
        if let Some(memory) = node.memory {
            self.memory_bytes -= memory;
            changes.forget.push(*digest);
            changes.forget.extend(node.aliases);
        }
        if let Some(place) = node.place {
            self.leave(place, changes);
        }
    }

    /// Takes out an entry if it is too old.
    pub(super) fn expire(&mut self, digest: &Digest, now: Millis, changes: &mut Changes) {
        if self.nodes.get(digest).is_some_and(|node| node.record.expires <= now) {
            self.remove(digest, changes);
            changes.expired += 1;
        }
    }

    /// Takes out all that are too old.
    pub(super) fn sweep(&mut self, now: Millis, changes: &mut Changes) {
        while let Some((expires, digest)) = self.expiry.pop_first() {
            if expires > now {
                self.expiry.insert((expires, digest));
                return;
            }
            self.remove(&digest, changes);
            changes.expired += 1;
        }
    }

    /// Takes out all that may not be served any more.
    pub(super) fn retain(&mut self, is_current: impl Fn(&Stamps) -> bool, changes: &mut Changes) {
        let outdated = self.nodes.values().filter(|node| !is_current(&node.record.stamps));
        let outdated: Vec<Digest> = outdated.map(|node| node.record.digest).collect();
        outdated.iter().for_each(|digest| self.remove(digest, changes));
    }

    /// A segment goes, to make room on disk. Returns which of its entries are worth a second place: those in memory that
    /// were served since they were written, and have not been written twice.
    pub(super) fn drop_segment(&mut self, number: u32, used: Used<'_>, changes: &mut Changes) -> Vec<Digest> {
        let mut hot = Vec::new();
        for digest in self.segments.remove(&number).unwrap_or_default().digests {
            let Some(node) = self.nodes.get_mut(&digest).filter(|node| is_in(node, number)) else { continue };
            node.place = None;
            if node.memory.is_none() {
                changes.evicted += 1;
                self.remove(&digest, changes);
            } else if !node.is_rewritten && used(&digest) > node.placed {
                hot.push(digest);
            }
        }
        changes.delete.push(number);
        hot
    }

    /// An entry has got its second place.
    pub(super) fn rewritten(&mut self, digest: &Digest, place: Place, now: Millis) {
        let Some(node) = self.nodes.get_mut(digest) else { return };
        (node.place, node.placed, node.is_rewritten) = (Some(place), now, true);
        self.settle(*digest, place);
    }

    fn settle(&mut self, digest: Digest, place: Place) {
        let segment = self.segments.entry(place.segment).or_default();
        segment.digests.push(digest);
        segment.living += 1;
    }

    fn leave(&mut self, place: Place, changes: &mut Changes) {
        let Some(segment) = self.segments.get_mut(&place.segment) else { return };
        segment.living -= 1;
        if segment.living == 0 {
            self.segments.remove(&place.segment);
            changes.delete.push(place.segment);
        }
    }

    fn make_room(&mut self, used: Used<'_>, changes: &mut Changes) {
        while self.memory_bytes > self.limits.memory_bytes {
            let Some(digest) = self.least_used(used) else { return };
            changes.evicted += 1;
            if self.nodes.get(&digest).is_none_or(|node| node.place.is_none()) {
                self.remove(&digest, changes);
                continue;
            }
            let Some(node) = self.nodes.get_mut(&digest) else { return };
            self.warm.remove(&node.rank);
            self.cold.insert(node.rank, digest);
            self.memory_bytes -= node.memory.take().unwrap_or_default();
            changes.forget.push(digest);
            // Its spellings are learned again when it is asked for.
            changes.forget.append(&mut node.aliases);
        }
        while self.nodes.len() > self.limits.entries {
            let cold = self.cold.first_key_value().map(|(_, digest)| *digest);
            let Some(digest) = cold.or_else(|| self.least_used(used)) else { return };
            changes.evicted += 1;
            self.remove(&digest, changes);
        }
    }

    /// Of those in memory. Puts those in their place that were served since they were ranked.
    fn least_used(&mut self, used: Used<'_>) -> Option<Digest> {
        loop {
            let (rank, digest) = self.warm.first_key_value().map(|(rank, digest)| (*rank, *digest))?;
            let last = used(&digest);
            if last <= rank.0 {
                return Some(digest);
            }
            let later = self.rank(last);
            self.warm.remove(&rank);
            let Some(node) = self.nodes.get_mut(&digest) else { continue };
            node.rank = later;
            self.warm.insert(later, digest);
        }
    }

    fn rank(&mut self, at: Millis) -> Rank {
        self.sequence += 1;
        (at, self.sequence)
    }
}

fn is_in(node: &Node, segment: u32) -> bool {
    node.place.is_some_and(|place| place.segment == segment)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::key::Scope;

    fn digest(name: char) -> Digest {
        Digest([name as u8; 32])
    }

    fn record(name: char, expires: u64) -> Record {
        let stamps = [Some((Scope::gateway("a", if name.is_uppercase() { "upper" } else { "lower" }), 0)), None];
        Record { digest: digest(name), created: Millis(0), expires: Millis(expires), stamps }
    }

    fn names(digests: impl IntoIterator<Item = Digest>) -> String {
        digests.into_iter().map(|digest| char::from(digest.0[0])).collect()
    }

    /// An index that a line of words is done to; each word is an operation, and what it answers is written behind it.
    struct Played {
        index: Index,
        used: HashMap<Digest, Millis>,
        now: u64,
    }

    impl Played {
        fn new(memory_bytes: u64, entries: usize) -> Self {
            let index = Index::new(Limits { memory_bytes, entries });
            Self { index, used: HashMap::new(), now: 0 }
        }

        /// `+a` in memory, `+a@2` on disk in segment 2 as well, `@a@2` only there, `!a` a hit, `<a` read from disk, `-a`
        /// removed, `=ax` asked for as x, `#2` segment 2 dropped, `^a@3` rewritten, `t30` swept at 30, `purge` of all with
        /// small letters. Entries have 10 bytes (upper case: 40) and expire in the order of their letters, from 97 on.
        fn play(&mut self, word: &str) -> String {
            self.now += 1;
            let (now, mut changes) = (Millis(self.now), Changes::default());
            let mut letters = word.chars();
            let (sign, name) = (letters.next().unwrap(), letters.next().unwrap());
            let segment = word[1..].split_once('@').map(|(_, number)| number.parse().unwrap());
            let place = segment.map(|segment| Place { segment, at: 0, length: 10 });
            let bytes = if name.is_uppercase() { 40 } else { 10 };
            let known = self.used.clone();
            let used = |digest: &Digest| known.get(digest).copied().unwrap_or(Millis(0));
            let index = &mut self.index;
            let mut said = String::new();
            match sign {
                '+' => index.insert(record(name, name as u64), Some(bytes), place, now, &used, &mut changes),
                '@' => index.insert(record(name, name as u64), None, place, now, &used, &mut changes),
                '!' => drop(self.used.insert(digest(name), now)),
                '<' => index.load(&digest(name), bytes, now, &used, &mut changes),
                '-' => index.remove(&digest(name), &mut changes),
                '=' if index.alias(&digest(name), digest(letters.next().unwrap()), &mut changes) => said.push('y'),
                '=' => said.push('n'),
                '#' => {
                    let hot = index.drop_segment(name.to_digit(10).unwrap(), &used, &mut changes);
                    said = format!("hot[{}]", names(hot));
                }
                '^' => index.rewritten(&digest(name), place.unwrap(), now),
                't' => index.sweep(Millis(word[1..].parse().unwrap()), &mut changes),
                'p' => {
                    let lower = Scope::gateway("a", "lower");
                    index.retain(|stamps| stamps[0] != Some((lower, 0)), &mut changes);
                }
                _ => unreachable!("{word}"),
            }
            for (label, text) in [("forget", names(changes.forget)), ("delete", format!("{:?}", changes.delete))] {
                if text != "[]" && !text.is_empty() {
                    said.push_str(&format!(" {label} {text}"));
                }
            }
            said.trim().to_owned()
        }

        fn state(&self) -> String {
            let in_memory = self.index.warm.values().copied();
            format!("{}|{}", names(in_memory), names(self.index.cold.values().copied()))
        }

        fn audit(&self) {
            let index = &self.index;
            assert_eq!(index.warm.len() + index.cold.len(), index.nodes.len());
            assert_eq!(index.expiry.len(), index.nodes.len());
            assert_eq!(index.memory_bytes, index.nodes.values().filter_map(|node| node.memory).sum::<u64>());
            assert!(index.memory_bytes <= index.limits.memory_bytes && index.len() <= index.limits.entries);
            for (number, segment) in &index.segments {
                let living = index.nodes.values().filter(|node| is_in(node, *number)).count();
                assert_eq!(segment.living, living, "segment {number}");
                assert!(living > 0, "segment {number} should be gone");
            }
        }
    }

    /// Plays `script` (`word => answer` where there is one), and compares what is left: `in memory|only on disk`.
    fn check(memory_bytes: u64, entries: usize, script: &str, left: &str) {
        let mut played = Played::new(memory_bytes, entries);
        for line in script.split(',') {
            let (word, answer) = line.split_once("=>").unwrap_or((line, ""));
            assert_eq!(played.play(word.trim()), answer.trim(), "{line} in {script}");
            played.audit();
        }
        assert_eq!(played.state(), left, "{script}");
    }

    #[test]
    fn the_least_recently_served_makes_room_and_goes_to_disk_if_it_has_a_place_there() {
        check(30, 9, "+a, +b, +c, +d => forget a", "bcd|");
        check(30, 9, "+a, +b, +c, !a, +d => forget b", "cad|");
        check(30, 9, "+a, +b, +c, !a, !b, !c, +d => forget a", "bcd|");
        check(30, 9, "+a@1, +b, +c@1, +d => forget a, +e => forget b", "cde|a");
        check(30, 9, "+a@1, +b@1, +c@1, +d@1 => forget a, <a => forget b", "cda|b");
        check(30, 9, "+a, +b, +a => forget a, +c, +d => forget b", "acd|");
    }

    #[test]
    fn there_are_never_more_entries_than_allowed_and_those_only_on_disk_go_first() {
        check(99, 3, "+a, +b, +c, +d => forget a", "bcd|");
        check(99, 3, "+a, @b@1, @c@1, +d", "ad|c");
        check(99, 3, "@a@1, @b@2, @c@2, @d@2 => delete [1]", "|bcd");
        check(99, 3, "+a, +b, +c, !a, +d => forget b", "cad|");
    }

    #[test]
    fn what_is_larger_than_the_memory_is_on_disk_or_nowhere() {
        check(30, 9, "+a, +B", "a|");
        check(30, 9, "+a, +B@1", "a|B");
        check(30, 9, "+a, +B@1, <B", "a|B");
        check(30, 9, "+a@1, +B@1, -B, -a => forget a delete [1]", "|");
    }

    #[test]
    fn what_is_too_old_or_purged_is_gone_from_everywhere() {
        check(99, 9, "+a, +b@1, @c@1, t96", "ab|c");
        check(99, 9, "+a, +b@1, @c@1, t97 => forget a, t98 => forget b, t200 => delete [1]", "|");
        check(99, 9, "+a@1, +B, purge => forget a delete [1]", "B|");
        check(99, 9, "+B, @c@2, purge => delete [2]", "B|");
    }

    #[test]
    fn a_segment_is_gone_when_nothing_in_it_lives_and_its_served_entries_move_once() {
        check(99, 9, "+a@1, +a@2 => forget a delete [1]", "a|");
        check(99, 9, "+a@1, +a@1 => forget a, -a => forget a delete [1]", "|");
        let script = "+a@1, +b@1, @c@1, !a, #1 => hot[a] delete [1], ^a@2, !a, #2 => hot[] delete [2]";
        check(99, 9, script, "ab|");
        check(10, 9, "+a@1, !a, +b@2 => forget a, #1 => hot[] delete [1]", "b|");
        check(99, 9, "+a@1, +a@2 => forget a delete [1], #1 => hot[] delete [1]", "a|");
    }

    #[test]
    fn an_entry_is_found_in_the_last_eight_spellings_until_it_leaves_memory() {
        check(99, 9, "+a, =ax => y, =ax => n, =aa => n, =bx => n, -a => forget ax", "|");
        let seven = "+a, =a1 => y, =a2 => y, =a3 => y, =a4 => y, =a5 => y, =a6 => y, =a7 => y";
        check(99, 9, &format!("{seven}, =a8 => y, =a9 => y forget 1"), "a|");
        check(10, 9, "+a@1, =ax => y, +b => forget ax, =ax => n, <a => forget b, =ax => y", "a|");
    }
}
