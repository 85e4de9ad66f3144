//! The text of an answer while it streams: searched across chunks and events, bytes released as they came.
//!
//!     chunk --> queue of raw bytes ----------------------------------------release--> out
//!                 |  frame: where events end                                 ^
//!                 '--delta: what each adds--> window a part --search--> how far it is safe
//!                                                               '--match--> cut: nothing of its event leaves
//!
//! A blocking rule's match may begin in text that is here and end in text that is not. So an event stays until as much text of its
//! choice stands behind it as the longest match could need, at most the bytes that the caller allows; flags hold nothing back. Whatever
//! holds text back is released when its choice ends. What is still held when a match is found never leaves, since it may be the
//! beginning of another.
//!
//! Matches longer than that are not seen, and nor are those across parts of one choice that alternate at every token (thoughts and answer): both are what a bound
//! costs. An event that much of the stream has passed leaves in any case, lest a choice that was given up hold all others.
//!
//! With a schema the text of each choice is also kept, and validated when the choice ends, before the event that says so is released.

use std::collections::VecDeque;

use bytes::Bytes;
use serde_json::Value;

use super::delta::{self, Kind, Part, Step};
use super::frame::{Frames, TooLarge};
use super::text::{is_media, unescaped};
use super::{Action, Finding, Guard, Side};

/// Bytes of the stream behind an event that make it leave.
const MAX_BEHIND: u64 = 512 << 10;
/// Bytes of an answer that must be whole to be looked at, at most.
const MAX_WHOLE: usize = 32 << 20;
/// Bytes of one choice's text that are kept for a schema, at most.
const MAX_TEXT: usize = 8 << 20;
/// Choices and parts that are open at the same time, at most.
const MAX_PARTS: usize = 1024;
/// The place in findings.
const STREAM: &str = "the stream";

/// Looks at one answer on its way to the client.
///
/// Events (SSE, JSON lines, AWS's frames) leave one by one; an answer of any other form is held until [`StreamGuard::finish`] and looked at as a
/// whole, sound and pictures pass. After a finding the stream is over: the caller tells the client so in its dialect, and closes.
pub struct StreamGuard {
    state: State,
}

enum State {
    /// Nothing to look for.
    Idle,
    Live(Box<Live>),
    Whole {
        guard: Guard,
        content_type: String,
        held: Vec<Bytes>,
        bytes: usize,
        flags: Vec<Finding>,
    },
    Cut {
        finding: Finding,
        flags: Vec<Finding>,
    },
}

impl StreamGuard {
    pub(super) fn new(guard: &Guard, content_type: &str, hold: usize) -> Self {
        if guard.ignores_responses() || is_media(content_type) {
            return Self { state: State::Idle };
        }
        let state = match Frames::of(content_type) {
            Some(frames) => State::Live(Box::new(Live::new(guard.clone(), frames, hold))),
            None => State::Whole {
                guard: guard.clone(),
                content_type: content_type.to_owned(),
                held: Vec::new(),
                bytes: 0,
                flags: Vec::new(),
            },
        };
        Self { state }
    }

    /// Whether chunks pass unseen, so that the caller may leave the guard out.
    pub fn is_idle(&self) -> bool {
        matches!(self.state, State::Idle)
    }

    /// Takes the next bytes, and appends to `out` what may leave.
    ///
    /// # Errors
    /// What was found. `out` has all that stood before it; nothing follows.
    pub fn feed(&mut self, chunk: Bytes, out: &mut Vec<Bytes>) -> Result<(), Finding> {
        let outcome = match &mut self.state {
            State::Idle => {
                out.push(chunk);
                return Ok(());
            }
            State::Cut { finding, .. } => return Err(finding.clone()),
            State::Live(live) => live.feed(chunk, out),
            State::Whole { guard, held, bytes, .. } => {
                *bytes += chunk.len();
                held.push(chunk);
                if *bytes <= MAX_WHOLE {
                    return Ok(());
                }
                if guard.0.response.fails_open() {
                    out.append(held);
                    self.state = State::Idle;
                    return Ok(());
                }
                Err(guard.0.response.broken("the answer is too large to be looked at".to_owned()))
            }
        };
        self.cut(outcome)
    }

    /// The stream has ended as it should: looks at what was held back, and releases it. A stream that broke off is just dropped.
    ///
    /// # Errors
    /// As [`StreamGuard::feed`].
    pub fn finish(&mut self, out: &mut Vec<Bytes>) -> Result<(), Finding> {
        let outcome = match &mut self.state {
            State::Idle => return Ok(()),
            State::Cut { finding, .. } => return Err(finding.clone()),
            State::Live(live) => live.finish(out),
            State::Whole { guard, content_type, held, flags, .. } => {
                let body = held.concat();
                let verdict = guard.response(&body, content_type);
                *flags = verdict.flags;
                match verdict.blocked {
                    Some(finding) => Err(finding),
                    None => {
                        out.append(held);
                        Ok(())
                    }
                }
            }
        };
        self.cut(outcome)
    }

    /// What rules noted so far, each once.
    pub fn flags(&self) -> &[Finding] {
        match &self.state {
            State::Idle => &[],
            State::Live(live) => &live.flags,
            State::Whole { flags, .. } | State::Cut { flags, .. } => flags,
        }
    }

    fn cut(&mut self, outcome: Result<(), Finding>) -> Result<(), Finding> {
        if let Err(finding) = &outcome {
            let flags = self.flags().to_vec();
            self.state = State::Cut { finding: finding.clone(), flags };
        }
        outcome
    }
}

struct Live {
    guard: Guard,
    frames: Frames,
    /// Bytes that came and did not leave, and their place in the stream.
    raw: VecDeque<Bytes>,
    sent: u64,
    got: u64,
    /// Where the last whole event begins and ends.
    event: (u64, u64),
    data: Vec<u8>,
    /// Texts that are not safe yet, in the order they came.
    marks: VecDeque<Mark>,
    choices: Vec<Choice>,
    next_choice: u64,
    /// Text that must stand behind an event.
    hold: u64,
    /// Text that is looked at again when more comes.
    keep: usize,
    flags: Vec<Finding>,
    /// The stream could not be read on, and nothing depends on it.
    is_deaf: bool,
}

/// A text of an event that may belong to a match.
struct Mark {
    /// Where its event begins, in the stream.
    start: u64,
    /// Where its event ends.
    end: u64,
    choice: u64,
    /// Text of the choice when it had come.
    total: u64,
}

/// One choice that has not ended.
struct Choice {
    /// Never used twice, unlike its number.
    id: u64,
    number: u64,
    total: u64,
    windows: Vec<Window>,
    /// Its text, for the schema.
    answer: String,
}

/// The end of a part's text.
struct Window {
    part: Part,
    text: String,
    /// Bytes at the front that are only there to be looked back at.
    context: usize,
}

impl Live {
    fn new(guard: Guard, frames: Frames, most: usize) -> Self {
        let span = |wanted: fn(Action) -> bool| {
            let rules = guard.0.response.rules.iter().filter(|rule| wanted(rule.action));
            rules.map(|rule| rule.span.unwrap_or(most).min(most)).max().unwrap_or(0)
        };
        let hold = span(|action| action == Action::Block) as u64;
        let keep = span(|_| true);
        Self {
            guard,
            frames,
            raw: VecDeque::new(),
            sent: 0,
            got: 0,
            event: (0, 0),
            data: Vec::new(),
            marks: VecDeque::new(),
            choices: Vec::new(),
            next_choice: 0,
            hold,
            keep,
            flags: Vec::new(),
            is_deaf: false,
        }
    }

    fn feed(&mut self, chunk: Bytes, out: &mut Vec<Bytes>) -> Result<(), Finding> {
        let before = self.got;
        self.got += chunk.len() as u64;
        self.raw.push_back(chunk.clone());
        let mut at = 0;
        while !self.is_deaf {
            match self.frames.next(&chunk, &mut at, &mut self.data) {
                Ok(true) => {}
                Ok(false) => break,
                Err(TooLarge) if self.guard.0.response.fails_open() => self.is_deaf = true,
                Err(TooLarge) => {
                    let safe = self.safe();
                    self.release(safe, out);
                    return Err(self.guard.0.response.broken("the stream cannot be read".to_owned()));
                }
            }
            self.take_event(before + at as u64, out)?;
        }
        let safe = if self.is_deaf { self.got } else { self.safe() };
        self.release(safe, out);
        Ok(())
    }

    fn finish(&mut self, out: &mut Vec<Bytes>) -> Result<(), Finding> {
        let safe = self.safe();
        self.frames.rest(&mut self.data);
        self.take_event(self.got, out)?;
        let outcome = self.step(Step::CloseAll);
        self.release(if outcome.is_ok() { self.got } else { safe }, out);
        outcome
    }

    /// Looks at the event that ends here, whose data is complete. If it is cut, only what was safe without it leaves.
    fn take_event(&mut self, end: u64, out: &mut Vec<Bytes>) -> Result<(), Finding> {
        let safe = self.safe();
        self.event = (self.event.1, end);
        let data = std::mem::take(&mut self.data);
        let outcome = self.look(&data);
        self.data = data;
        self.data.clear();
        if outcome.is_err() {
            self.release(safe, out);
        }
        outcome
    }

    fn look(&mut self, data: &[u8]) -> Result<(), Finding> {
        if data.is_empty() {
            return Ok(());
        }
        if data == b"[DONE]" {
            return self.step(Step::CloseAll);
        }
        let Ok(event) = serde_json::from_slice::<Value>(data) else {
            let raw = String::from_utf8_lossy(data);
            let content = Part { choice: 0, kind: Kind::Content, index: 0 };
            if raw.contains('\\') {
                self.step(Step::Whole(0, &unescaped(&raw)))?;
            }
            return self.step(Step::Text(content, &raw));
        };
        let mut outcome = Ok(());
        delta::steps(&event, &mut |step| {
            if outcome.is_ok() {
                outcome = self.step(step);
            }
        });
        outcome
    }

    fn step(&mut self, step: Step) -> Result<(), Finding> {
        match step {
            Step::Text(part, text) => self.text(part, text),
            Step::Whole(_, text) => self.whole(text),
            Step::Close(number) => self.close(number),
            Step::CloseAll => {
                while let Some(number) = self.choices.first().map(|choice| choice.number) {
                    self.close(number)?;
                }
                Ok(())
            }
        }
    }

    fn text(&mut self, part: Part, text: &str) -> Result<(), Finding> {
        let side = &self.guard.0.response;
        let open: usize = self.choices.iter().map(|choice| choice.windows.len()).sum();
        let choice = match self.choices.iter().position(|choice| choice.number == part.choice) {
            Some(at) => &mut self.choices[at],
            None if open >= MAX_PARTS => return side.cannot("the answer has too many parts"),
            None => {
                self.next_choice += 1;
                let id = self.next_choice;
                self.choices.push(Choice {
                    id,
                    number: part.choice,
                    total: 0,
                    windows: Vec::new(),
                    answer: String::new(),
                });
                let last = self.choices.len() - 1;
                &mut self.choices[last]
            }
        };
        let window = match choice.windows.iter().position(|window| window.part == part) {
            Some(at) => &mut choice.windows[at],
            None if open >= MAX_PARTS => return side.cannot("the answer has too many parts"),
            None => {
                choice.windows.push(Window { part, text: String::new(), context: 0 });
                let last = choice.windows.len() - 1;
                &mut choice.windows[last]
            }
        };
        if side.schema.is_some() && part.kind == Kind::Content {
            if choice.answer.len() + text.len() > MAX_TEXT {
                return side.cannot("the answer is too large to be validated");
            }
            choice.answer.push_str(text);
        }
        choice.total += text.len() as u64;
        if side.rules.is_empty() {
            return Ok(());
        }
        window.text.push_str(text);
        if self.hold > 0 {
            let (start, end) = self.event;
            self.marks.push_back(Mark { start, end, choice: choice.id, total: choice.total });
        }
        window.search(side, self.hold, false, &mut self.flags)?;
        window.trim(self.keep);
        Ok(())
    }

    fn whole(&mut self, text: &str) -> Result<(), Finding> {
        let side = &self.guard.0.response;
        let mut verdict = super::Verdict { flags: std::mem::take(&mut self.flags), blocked: None };
        side.scan(&STREAM, text, &mut verdict);
        self.flags = verdict.flags;
        match verdict.blocked {
            Some(finding) => Err(finding),
            None => Ok(()),
        }
    }

    /// Nothing more comes of a choice: what might have been a match is one, and its text is whole.
    fn close(&mut self, number: u64) -> Result<(), Finding> {
        let side = &self.guard.0.response;
        let Some(at) = self.choices.iter().position(|choice| choice.number == number) else { return Ok(()) };
        let choice = &mut self.choices[at];
        for window in &mut choice.windows {
            window.search(side, self.hold, true, &mut self.flags)?;
        }
        if let Some(schema) = &side.schema {
            schema.text(&choice.answer).map_err(|what| side.broken(what))?;
        }
        self.choices.remove(at);
        Ok(())
    }

    /// How far the stream may leave.
    fn safe(&mut self) -> u64 {
        while let Some(mark) = self.marks.front() {
            let choice = self.choices.iter().find(|choice| choice.id == mark.choice);
            let is_passed = choice.is_none_or(|choice| choice.total - mark.total >= self.hold);
            if !is_passed && self.event.1 - mark.end < MAX_BEHIND {
                break;
            }
            self.marks.pop_front();
        }
        // With a schema the last event stays until the next one, or the end, says that the text goes on.
        let end = if self.guard.0.response.schema.is_some() { self.event.0 } else { self.event.1 };
        self.marks.front().map_or(end, |mark| mark.start.min(end))
    }

    fn release(&mut self, end: u64, out: &mut Vec<Bytes>) {
        while self.sent < end {
            let Some(front) = self.raw.front_mut() else { return };
            let wanted = end - self.sent;
            if front.len() as u64 <= wanted {
                self.sent += front.len() as u64;
                out.extend(self.raw.pop_front().filter(|bytes| !bytes.is_empty()));
            } else {
                out.push(front.split_to(wanted as usize));
                self.sent = end;
            }
        }
    }
}

impl Window {
    /// Looks for all rules.
    fn search(&self, side: &Side, hold: u64, at_end: bool, flags: &mut Vec<Finding>) -> Result<(), Finding> {
        if !side.set.is_match_at(&self.text, self.context) {
            return Ok(());
        }
        for index in &side.set.matches_at(&self.text, self.context) {
            let rule = &side.rules[index];
            let Some(found) = rule.regex.find_at(&self.text, self.context) else { continue };
            // `\b` or `$` at the end of what is here: the next character decides. It is waited for as long as nothing of the match has left.
            let is_held = (self.text.len() - found.start()) as u64 <= hold;
            let is_open = rule.looks && found.end() == self.text.len() && !at_end;
            match rule.action {
                Action::Block if is_open && is_held => {}
                Action::Block => return Err(side.finding(rule, STREAM.to_owned())),
                Action::Flag if is_open || flags.iter().any(|flag| flag.rule == rule.name) => {}
                Action::Flag => flags.push(side.finding(rule, STREAM.to_owned())),
            }
        }
        Ok(())
    }

    /// Drops what no later match can begin in, but for one character to look back at.
    fn trim(&mut self, keep: usize) {
        let Some(mut cut) = self.text.len().checked_sub(keep).filter(|cut| *cut > 0) else { return };
        while !self.text.is_char_boundary(cut) {
            cut -= 1;
        }
        let context = self.text[..cut].chars().next_back().map_or(0, char::len_utf8);
        self.text.drain(..cut - context);
        self.context = context;
    }
}

#[cfg(test)]
#[path = "stream_test.rs"]
mod tests;
