//! An answer that is coming, and those who read it.
//!
//! ```text
//!   attempt 1 ── begin ──> push push push ──> finish           readers, wherever they are: |c1 c2 c3 c4 …
//!      └ fails before begin ──> vacant ── one of those who wait ──> attempt 2 ── begin …        ^      ^
//!                                             └ fails as well: all who wait hear it         slowest  fastest
//! ```
//!
//! As long as the answer may be stored, all of it is kept and whoever asks for the same may join. One that may not be
//! stored (too large, or nobody wants it kept) keeps only what its readers still need: the writer waits for the fastest,
//! and whoever is too far behind it is cut off.
//!
//! Pure: locks and wakeups are in `fill.rs`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use crate::base::{Error, Kind};
use crate::cache::entry::Head;

/// How far the writer of an answer that is not stored may be ahead of its fastest reader, in bytes.
pub(super) const WINDOW: u64 = 1 << 20;
/// How often a crowd asks upstream at most.
const ATTEMPTS: usize = 2;

/// Why there is no answer, or only a part of one.
#[derive(Clone, Debug)]
pub enum FailedAnswer {
    /// An answer that says no, to be passed on as it came.
    Answer {
        /// Its status and headers.
        head: Arc<Head>,
        /// Its body.
        body: Bytes,
    },
    /// No answer at all: refused, reset, timed out.
    Error(Error),
    /// Whoever was to get the answer is gone without a word.
    Abandoned,
}

impl FailedAnswer {
    /// What a reader hears in the middle of an answer.
    fn error(&self) -> Error {
        match self {
            Self::Error(error) => error.clone(),
            Self::Answer { .. } | Self::Abandoned => {
                Error::new(Kind::Internal, "The answer broke off before its end: send the request again.")
            }
        }
    }
}

/// What a reader finds at the beginning.
pub(super) enum Beginning {
    Head(Arc<Head>),
    /// The attempt that is now this reader's.
    Lead(usize),
    Failed(FailedAnswer),
    Wait,
}

/// What a reader finds next.
pub(super) enum Next {
    Chunk(Bytes),
    End,
    Broken(Error),
    Wait,
}

/// What became of a chunk.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pushed {
    Taken,
    /// Not taken: the readers are behind.
    Full,
    /// Not taken: it is not stored, and nobody reads it.
    Unwanted,
}

enum Phase {
    /// Somebody is at it.
    Filling,
    /// The attempt may be taken over by one who waits.
    Vacant,
    Finished,
    Failed(FailedAnswer),
}

pub(super) struct Buffer {
    /// Most bytes of an answer that is stored.
    limit: u64,
    phase: Phase,
    attempt: usize,
    /// How attempts ended, for those whose they were.
    failures: [Option<FailedAnswer>; ATTEMPTS],
    head: Option<Arc<Head>>,
    keep: Option<Duration>,
    is_storable: bool,
    chunks: VecDeque<Bytes>,
    /// Which chunk is the first that is kept, and at which byte it begins.
    first: usize,
    start: u64,
    end: u64,
    readers: Vec<Option<Reader>>,
}

#[derive(Clone, Copy)]
struct Reader {
    chunk: usize,
    byte: u64,
    /// The attempt that was this reader's own: it hears how that one ended, and leads no other.
    leads: Option<usize>,
}

impl Buffer {
    pub(super) fn new(limit: u64) -> Self {
        Self {
            limit,
            phase: Phase::Filling,
            attempt: 0,
            failures: [const { None }; ATTEMPTS],
            head: None,
            keep: None,
            is_storable: true,
            chunks: VecDeque::new(),
            first: 0,
            start: 0,
            end: 0,
            readers: Vec::new(),
        }
    }

    /// Whether one more may join and read from the start.
    pub(super) fn is_open(&self) -> bool {
        self.is_storable && !matches!(self.phase, Phase::Failed(_))
    }

    /// Bytes that are kept.
    pub(super) fn held(&self) -> u64 {
        self.end - self.start
    }

    /// One more reader; `leads` says whose attempt is its own. Returns its number.
    pub(super) fn join(&mut self, leads: Option<usize>) -> usize {
        // Whoever joins an answer whose beginning is gone is told so by the first chunk that is missing.
        let reader = Some(Reader { chunk: 0, byte: 0, leads });
        match self.readers.iter().position(Option::is_none) {
            Some(free) => {
                self.readers[free] = reader;
                free
            }
            None => {
                self.readers.push(reader);
                self.readers.len() - 1
            }
        }
    }

    /// A reader has gone.
    pub(super) fn leave(&mut self, reader: usize) {
        self.readers[reader] = None;
        if matches!(self.phase, Phase::Vacant) && !self.has_candidate() {
            self.give_up();
        }
    }

    /// How the answer begins, and how long it is kept; `None` if it is not to be stored.
    pub(super) fn begin(&mut self, head: Head, keep: Option<Duration>) {
        if self.head.is_some() || !matches!(self.phase, Phase::Filling) {
            return;
        }
        self.is_storable = keep.is_some() && is_success(head.status) && head.size() <= self.limit;
        self.keep = keep;
        self.head = Some(Arc::new(head));
    }

    /// One more chunk. `is_crowded`: answers that are under way take too much memory altogether, so this one is not stored.
    pub(super) fn push(&mut self, chunk: &Bytes, is_crowded: bool) -> Pushed {
        let Some(head) = self.head.as_ref().filter(|_| matches!(self.phase, Phase::Filling)) else {
            return Pushed::Unwanted;
        };
        let size = head.size() + self.end + chunk.len() as u64;
        self.is_storable &= size <= self.limit && !is_crowded;
        if !self.is_storable {
            let Some(fastest) = self.bytes_read().max() else { return Pushed::Unwanted };
            if self.end - fastest > WINDOW {
                return Pushed::Full;
            }
            self.trim(fastest);
        }
        self.end += chunk.len() as u64;
        self.chunks.push_back(chunk.clone());
        Pushed::Taken
    }

    /// The answer is not to be stored after all.
    pub(super) fn forbid(&mut self) {
        self.is_storable = false;
    }

    /// The answer is whole. Returns whether it is to be stored.
    pub(super) fn finish(&mut self) -> bool {
        if !matches!(self.phase, Phase::Filling) {
            return false;
        }
        if self.head.is_none() {
            self.fail(FailedAnswer::Abandoned);
            return false;
        }
        self.phase = Phase::Finished;
        self.is_storable
    }

    /// The answer is not coming, or not whole.
    pub(super) fn fail(&mut self, failure: FailedAnswer) {
        if !matches!(self.phase, Phase::Filling) {
            return;
        }
        self.failures[self.attempt] = Some(failure.clone());
        if self.head.is_some() || self.attempt + 1 == ATTEMPTS {
            self.phase = Phase::Failed(failure);
            return;
        }
        self.attempt += 1;
        self.vacate();
    }

    /// The attempt was handed to somebody who never began with it: it counts for nothing.
    pub(super) fn vacate(&mut self) {
        self.phase = Phase::Vacant;
        if !self.has_candidate() {
            self.give_up();
        }
    }

    /// One more header for those who come from now on, and for who finds the answer stored.
    pub(super) fn note(&mut self, name: &'static str, value: Bytes) {
        if let Some(head) = &mut self.head {
            Arc::make_mut(head).headers.push((name.into(), value));
        }
    }

    /// What a whole answer is stored as: head, chunks, how long.
    pub(super) fn whole(&self) -> Option<(Arc<Head>, Vec<Bytes>, Duration)> {
        if !self.is_storable || !matches!(self.phase, Phase::Finished) {
            return None;
        }
        Some((self.head.clone()?, self.chunks.iter().cloned().collect(), self.keep?))
    }

    /// How it begins, for one reader.
    pub(super) fn beginning(&mut self, reader: usize) -> Beginning {
        let leads = self.leads(reader);
        if let Some(failure) = self.own_failure(leads) {
            return Beginning::Failed(failure.clone());
        }
        if let Some(head) = &self.head {
            return Beginning::Head(head.clone());
        }
        match &self.phase {
            Phase::Failed(failure) => Beginning::Failed(failure.clone()),
            Phase::Vacant if leads.is_none() => {
                self.phase = Phase::Filling;
                if let Some(reader) = &mut self.readers[reader] {
                    reader.leads = Some(self.attempt);
                }
                Beginning::Lead(self.attempt)
            }
            _ => Beginning::Wait,
        }
    }

    /// What comes next, for one reader.
    pub(super) fn next(&mut self, reader: usize) -> Next {
        let leads = self.leads(reader);
        if let Some(failure) = self.own_failure(leads).filter(|_| self.head.is_none()) {
            return Next::Broken(failure.error());
        }
        let Some(reader) = &mut self.readers[reader] else { return Next::End };
        let Some(at) = reader.chunk.checked_sub(self.first) else {
            return Next::Broken(Error::new(
                Kind::Aborted,
                "The answer came faster than it was read and is too large to be kept: read faster.",
            ));
        };
        if let Some(chunk) = self.chunks.get(at) {
            reader.chunk += 1;
            reader.byte += chunk.len() as u64;
            return Next::Chunk(chunk.clone());
        }
        match &self.phase {
            Phase::Finished => Next::End,
            Phase::Failed(failure) => Next::Broken(failure.error()),
            // It did not ask how the answer begins, so it would never lead.
            Phase::Vacant if leads.is_none() => Next::Broken(FailedAnswer::Abandoned.error()),
            Phase::Filling | Phase::Vacant => Next::Wait,
        }
    }

    /// Whether the writer may be waiting for readers.
    pub(super) fn has_window(&self) -> bool {
        !self.is_storable
    }

    fn leads(&self, reader: usize) -> Option<usize> {
        self.readers[reader].and_then(|reader| reader.leads)
    }

    fn own_failure(&self, leads: Option<usize>) -> Option<&FailedAnswer> {
        self.failures[leads?].as_ref()
    }

    /// Whether somebody waits who has led no attempt yet.
    fn has_candidate(&self) -> bool {
        self.readers.iter().flatten().any(|reader| reader.leads.is_none())
    }

    fn give_up(&mut self) {
        let last = self.failures.iter().rev().flatten().next();
        self.phase = Phase::Failed(last.cloned().unwrap_or(FailedAnswer::Abandoned));
    }

    fn bytes_read(&self) -> impl Iterator<Item = u64> {
        self.readers.iter().flatten().map(|reader| reader.byte)
    }

    /// Forgets what all have read, and what the fastest has read and nobody else will in time.
    fn trim(&mut self, fastest: u64) {
        let slowest = self.bytes_read().min().unwrap_or(fastest);
        while let Some(chunk) = self.chunks.front() {
            let until = self.start + chunk.len() as u64;
            if until > slowest && (until > fastest || self.held() <= self.limit) {
                return;
            }
            (self.start, self.first) = (until, self.first + 1);
            self.chunks.pop_front();
        }
    }
}

/// A part of something is no answer to those who ask for all of it.
fn is_success(status: u16) -> bool {
    (200..300).contains(&status) && status != 206
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP: Option<Duration> = Some(Duration::from_secs(60));

    fn head(status: u16) -> Head {
        Head { status, headers: vec![("a".into(), Bytes::from("bc"))] }
    }

    fn chunk(length: usize) -> Bytes {
        vec![b'.'; length].into()
    }

    fn failed(message: &str) -> FailedAnswer {
        FailedAnswer::Error(Error::internal(message))
    }

    /// What a reader finds at the beginning, in a word.
    fn beginning(buffer: &mut Buffer, reader: usize) -> String {
        match buffer.beginning(reader) {
            Beginning::Head(head) => head.status.to_string(),
            Beginning::Lead(attempt) => format!("lead {attempt}"),
            Beginning::Failed(failure) => format!("failed {}", failure.error()),
            Beginning::Wait => "wait".to_owned(),
        }
    }

    fn next(buffer: &mut Buffer, reader: usize) -> String {
        match buffer.next(reader) {
            Next::Chunk(chunk) => chunk.len().to_string(),
            Next::End => "end".to_owned(),
            Next::Broken(_) => "broken".to_owned(),
            Next::Wait => "wait".to_owned(),
        }
    }

    #[test]
    fn of_a_crowd_one_takes_over_and_a_second_failure_is_for_all() {
        let mut buffer = Buffer::new(100);
        let own = buffer.join(Some(0));
        let crowd = [buffer.join(None), buffer.join(None), buffer.join(None)];
        assert_eq!(beginning(&mut buffer, own), "wait");
        buffer.fail(failed("one"));
        assert!(buffer.is_open());
        assert_eq!(beginning(&mut buffer, own), "failed one");
        assert_eq!(crowd.map(|reader| beginning(&mut buffer, reader)), ["lead 1", "wait", "wait"]);
        buffer.fail(failed("two"));
        assert!(!buffer.is_open());
        assert_eq!(crowd.map(|reader| beginning(&mut buffer, reader)), ["failed two"; 3]);
        assert_eq!(beginning(&mut buffer, own), "failed one");
    }

    #[test]
    fn the_second_attempt_is_read_by_all_but_the_caller_of_the_first() {
        let mut buffer = Buffer::new(100);
        let (own, other) = (buffer.join(Some(0)), buffer.join(None));
        buffer.fail(failed("one"));
        assert_eq!(beginning(&mut buffer, other), "lead 1");
        buffer.begin(head(200), KEEP);
        assert_eq!(buffer.push(&chunk(3), false), Pushed::Taken);
        assert!(buffer.finish());
        assert_eq!([beginning(&mut buffer, other), beginning(&mut buffer, own)], ["200", "failed one"]);
        assert_eq!([next(&mut buffer, other), next(&mut buffer, other)], ["3", "end"]);
    }

    #[test]
    fn a_failure_that_nobody_else_waits_for_ends_it() {
        let check = |others: usize, leave: bool, is_open: bool| {
            let mut buffer = Buffer::new(100);
            let own = buffer.join(Some(0));
            let others: Vec<usize> = (0..others).map(|_| buffer.join(None)).collect();
            buffer.fail(failed("one"));
            if leave {
                others.iter().for_each(|other| buffer.leave(*other));
            }
            assert_eq!(buffer.is_open(), is_open, "{others:?} {leave}");
            assert_eq!(beginning(&mut buffer, own), "failed one");
        };
        check(0, false, false);
        check(1, false, true);
        check(2, true, false);
    }

    #[test]
    fn an_attempt_that_never_reached_anybody_does_not_count() {
        let mut buffer = Buffer::new(100);
        let crowd = [buffer.join(None), buffer.join(None)];
        buffer.vacate();
        assert_eq!(crowd.map(|reader| beginning(&mut buffer, reader)), ["lead 0", "wait"]);
        buffer.fail(failed("one"));
        assert_eq!(crowd.map(|reader| beginning(&mut buffer, reader)), ["failed one", "lead 1"]);
        let mut alone = Buffer::new(100);
        alone.vacate();
        assert!(!alone.is_open());
    }

    #[test]
    fn only_whole_good_answers_of_a_bearable_size_are_stored() {
        let check = |status: u16, keep: Option<Duration>, size: usize, is_crowded: bool, is_stored: bool| {
            let mut buffer = Buffer::new(100);
            buffer.join(Some(0));
            buffer.begin(head(status), keep);
            assert_eq!(buffer.push(&chunk(size), is_crowded), Pushed::Taken);
            assert!(buffer.whole().is_none());
            assert_eq!(buffer.is_open(), is_stored);
            let why = format!("{status} {keep:?} {size} {is_crowded}");
            assert_eq!(buffer.finish(), is_stored, "{why}");
            assert_eq!(buffer.whole().is_some(), is_stored, "{why}");
        };
        check(200, KEEP, 97, false, true);
        check(299, KEEP, 1, false, true);
        check(200, KEEP, 98, false, false);
        check(200, None, 1, false, false);
        check(200, KEEP, 1, true, false);
        check(206, KEEP, 1, false, false);
        check(199, KEEP, 1, false, false);
        check(300, KEEP, 1, false, false);
        check(500, KEEP, 1, false, false);
        let mut broken = Buffer::new(100);
        broken.begin(head(200), KEEP);
        broken.push(&chunk(1), false);
        broken.fail(failed("reset"));
        assert!(!broken.finish() && broken.whole().is_none());
        let mut empty = Buffer::new(100);
        assert!(!empty.finish() && !empty.is_open(), "it never began");
    }

    #[test]
    fn readers_of_a_broken_answer_hear_so_after_what_there_was() {
        let mut buffer = Buffer::new(100);
        let (own, other) = (buffer.join(Some(0)), buffer.join(None));
        buffer.begin(head(200), KEEP);
        buffer.push(&chunk(1), false);
        buffer.fail(failed("reset"));
        for reader in [own, other] {
            assert_eq!([next(&mut buffer, reader), next(&mut buffer, reader)], ["1", "broken"]);
        }
        assert_eq!(beginning(&mut buffer, other), "200");
    }

    #[test]
    fn the_writer_waits_for_the_fastest_and_whoever_is_too_slow_is_cut_off() {
        let limit = 4 * WINDOW;
        let mut buffer = Buffer::new(limit);
        let (fast, slow) = (buffer.join(Some(0)), buffer.join(None));
        buffer.begin(head(200), None);
        let part = chunk(WINDOW as usize);
        let mut read = 0;
        for pushed in 0..9 {
            assert_eq!(buffer.push(&part, false), Pushed::Taken, "{pushed}");
            assert_eq!(buffer.push(&chunk(1), false), Pushed::Taken, "exactly a window ahead");
            assert_eq!(buffer.push(&chunk(1), false), Pushed::Full);
            while next(&mut buffer, fast) != "wait" {
                read += 1;
            }
            assert!(buffer.held() <= limit + WINDOW + 2, "{}", buffer.held());
        }
        assert_eq!(read, 18);
        assert_eq!(next(&mut buffer, slow), "broken");
        buffer.leave(slow);
        assert_eq!(buffer.push(&chunk(1), false), Pushed::Taken);
        assert_eq!(buffer.held(), 1, "what all have read is not kept");
        assert_eq!(next(&mut buffer, fast), "1");
        buffer.leave(fast);
        assert_eq!(buffer.push(&chunk(1), false), Pushed::Unwanted);
    }

    #[test]
    fn an_answer_that_may_be_stored_needs_no_reader_until_it_is_too_large() {
        let mut buffer = Buffer::new(100);
        buffer.begin(head(200), KEEP);
        assert_eq!(buffer.push(&chunk(90), false), Pushed::Taken);
        let late = buffer.join(None);
        assert_eq!(buffer.push(&chunk(90), false), Pushed::Taken);
        assert!(!buffer.is_open());
        assert_eq!([next(&mut buffer, late), next(&mut buffer, late)], ["90", "90"]);
        buffer.leave(late);
        assert_eq!(buffer.push(&chunk(1), false), Pushed::Unwanted);
    }
}
