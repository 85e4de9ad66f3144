//! What a choice has read and said, for draws that look back: penalties over a window of tokens, and DRY.
//!
//! ```text
//! history   [ prompt ........... | answer .......... ]   push at the end
//! window               [ the newest n .............. ]   counted, token by token
//! repeats        a b c d … a b e … x a b ?               "a b" again: neither d nor e now
//! ```
//!
//! Both move along with the text, so a draw finds them ready: one entry for each token that loses something, never a
//! pass over the vocabulary. They move back as well, which is what rows that stand on drafts need: a few tokens forward, a
//! look, and back again, in place.

use std::collections::HashMap;
use std::sync::Arc;

use crate::model::Vocabulary;
use crate::task::{Dry, Sampling};

/// No place.
const NONE: u32 = u32::MAX;

/// The tokens of a prompt and an answer, as far as draws look at them.
#[derive(Clone, Debug)]
pub struct Seen {
    /// Left out in front: a prompt that nothing looks at.
    history: Vec<u32>,
    /// Tokens of `history` that belong to the prompt.
    prompt: usize,
    window: Option<Window>,
    repeats: Option<Repeats>,
}

/// A token inside the window of the penalties.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Counted {
    /// Which.
    pub token: u32,
    /// How often it occurs in the window, at least once.
    pub times: u32,
    /// How often within the answer's part of the window.
    pub answered: u32,
}

impl Seen {
    /// Whether these parameters look at past tokens at all.
    pub fn needed(sampling: &Sampling) -> bool {
        Window::needed(sampling) || sampling.dry.is_some()
    }

    /// The state before the first token of an answer.
    pub fn new(prompt: &[u32], sampling: &Sampling, vocabulary: &Arc<Vocabulary>) -> Self {
        // Frequency and presence look at the answer only.
        let looks_at_prompt = sampling.repetition_penalty != 1.0 || sampling.dry.is_some();
        let history = if looks_at_prompt { prompt.to_vec() } else { Vec::new() };
        let window = Window::needed(sampling).then(|| Window::new(&history, sampling));
        let repeats = sampling.dry.as_ref().map(|dry| Repeats::new(&history, dry, vocabulary.clone()));
        Self { prompt: history.len(), history, window, repeats }
    }

    /// One more token of the answer.
    pub fn push(&mut self, token: u32) {
        self.history.push(token);
        if let Some(window) = &mut self.window {
            window.push(&self.history, self.prompt);
        }
        if let Some(repeats) = &mut self.repeats {
            repeats.push(&self.history);
        }
    }

    /// Looks at it as it will be behind these tokens, if they come true: for rows that stand on drafts.
    pub fn behind<R>(&mut self, ahead: &[u32], look: impl FnOnce(&Self) -> R) -> R {
        if ahead.is_empty() {
            return look(self);
        }
        self.repeats.iter_mut().for_each(|repeats| repeats.trying = true);
        ahead.iter().for_each(|&token| self.push(token));
        let seen = look(self);
        ahead.iter().for_each(|_| self.pop());
        if let Some(repeats) = &mut self.repeats {
            repeats.trying = false;
            repeats.find(&self.history);
        }
        seen
    }

    /// Takes the newest token back.
    fn pop(&mut self) {
        if let Some(window) = &mut self.window {
            window.pop(&self.history, self.prompt);
        }
        if let Some(repeats) = &mut self.repeats {
            repeats.pop(&self.history);
        }
        self.history.pop();
    }

    /// The tokens that penalties look at, each once, in no particular order.
    pub fn counted(&self) -> &[Counted] {
        self.window.as_ref().map_or(&[], |window| &window.tokens)
    }

    /// The tokens that would carry on a repeat, each once, with the length of the longest they would.
    pub fn repeats(&self) -> &[(u32, u32)] {
        self.repeats.as_ref().map_or(&[], |repeats| &repeats.found)
    }
}

/// How often each of the newest tokens occurs.
#[derive(Clone, Debug)]
struct Window {
    length: usize,
    /// The repetition penalty looks at the prompt too.
    whole: bool,
    tokens: Vec<Counted>,
    at: HashMap<u32, u32>,
}

impl Window {
    fn needed(sampling: &Sampling) -> bool {
        let Sampling { repetition_penalty, frequency_penalty, presence_penalty, penalty_last_n, .. } = sampling;
        let any = *repetition_penalty != 1.0 || *frequency_penalty != 0.0 || *presence_penalty != 0.0;
        any && *penalty_last_n != Some(0)
    }

    fn new(prompt: &[u32], sampling: &Sampling) -> Self {
        let mut window = Self {
            length: sampling.penalty_last_n.map_or(usize::MAX, |n| n as usize),
            whole: sampling.repetition_penalty != 1.0,
            tokens: Vec::new(),
            at: HashMap::new(),
        };
        if window.whole {
            let newest = &prompt[prompt.len().saturating_sub(window.length)..];
            newest.iter().for_each(|&token| window.enter(token, false));
        }
        window
    }

    fn push(&mut self, history: &[u32], prompt: usize) {
        if let Some(place) = self.left_out(history, prompt) {
            self.leave(history[place], place >= prompt);
        }
        self.enter(history[history.len() - 1], true);
    }

    /// The reverse, with the newest token still there.
    fn pop(&mut self, history: &[u32], prompt: usize) {
        self.leave(history[history.len() - 1], true);
        if let Some(place) = self.left_out(history, prompt) {
            self.enter(history[place], place >= prompt);
        }
    }

    /// The token that the newest one pushes out of the window.
    fn left_out(&self, history: &[u32], prompt: usize) -> Option<usize> {
        let place = history.len().checked_sub(self.length.checked_add(1)?)?;
        (self.whole || place >= prompt).then_some(place)
    }

    fn enter(&mut self, token: u32, answer: bool) {
        let at = *self.at.entry(token).or_insert_with(|| {
            self.tokens.push(Counted { token, times: 0, answered: 0 });
            self.tokens.len() as u32 - 1
        });
        let entry = &mut self.tokens[at as usize];
        entry.times += 1;
        entry.answered += u32::from(answer);
    }

    fn leave(&mut self, token: u32, answer: bool) {
        let Some(&at) = self.at.get(&token) else { return };
        let entry = &mut self.tokens[at as usize];
        entry.times -= 1;
        entry.answered -= u32::from(answer);
        if entry.times == 0 {
            self.at.remove(&token);
            self.tokens.swap_remove(at as usize);
            if let Some(moved) = self.tokens.get(at as usize) {
                self.at.insert(moved.token, at);
            }
        }
    }
}

/// What the end of the text repeats of what stands before it.
///
/// `lengths[p]` says how many tokens up to place `p` are the same as those up to the end. With one more token it is one
/// more than its left neighbour's was, where the token is the same, else 0: so only the places of the new token and of
/// the one before it are touched, which are chained.
#[derive(Clone, Debug)]
struct Repeats {
    window: usize,
    allowed: u32,
    breakers: Arc<Breakers>,
    /// By place: where the same token stands before it.
    before: Vec<u32>,
    /// By token: where it stands last.
    newest: HashMap<u32, u32>,
    lengths: Vec<u32>,
    /// Places of tokens that complete a breaker, ascending.
    breaks: Vec<u32>,
    found: Vec<(u32, u32)>,
    /// While tokens are tried: what they changed in `lengths`, as place and value, and where the changes of each begin.
    tried: Vec<(u32, u32)>,
    marks: Vec<u32>,
    trying: bool,
    /// Work memory.
    text: Vec<u8>,
}

impl Repeats {
    fn new(prompt: &[u32], dry: &Dry, vocabulary: Arc<Vocabulary>) -> Self {
        let mut repeats = Self {
            window: dry.last_n.map_or(usize::MAX, |n| n as usize),
            allowed: dry.allowed_length,
            breakers: Arc::new(Breakers::new(&dry.breakers, vocabulary)),
            before: Vec::new(),
            newest: HashMap::new(),
            lengths: Vec::new(),
            breaks: Vec::new(),
            found: Vec::new(),
            tried: Vec::new(),
            marks: Vec::new(),
            trying: false,
            text: Vec::new(),
        };
        (1..=prompt.len()).for_each(|end| repeats.chain(&prompt[..end]));
        repeats.measure(prompt);
        repeats.find(prompt);
        repeats
    }

    fn push(&mut self, history: &[u32]) {
        if self.trying {
            self.marks.push(self.tried.len() as u32);
        }
        self.chain(history);
        let (end, start) = (history.len() - 1, self.start(history));
        // From the end to the front, so that each left neighbour still says what was true before this token.
        let mut place = self.before[end];
        while place != NONE && place as usize >= start {
            let at = place as usize;
            self.set(at, 1 + if at == 0 { 0 } else { self.lengths[at - 1] });
            place = self.before[at];
        }
        // The places of the token before end nothing any more, unless they were just counted anew.
        if end > 0 && history[end - 1] != history[end] {
            let mut place = self.before[end - 1];
            while place != NONE && place as usize + 1 >= start {
                self.set(place as usize, 0);
                place = self.before[place as usize];
            }
        }
        self.find(history);
    }

    /// The reverse of a push while trying, with the newest token still there; `found` is left as it is.
    fn pop(&mut self, history: &[u32]) {
        let from = self.marks.pop().unwrap_or(0) as usize;
        // A place may have been changed twice.
        for (place, length) in self.tried.drain(from..).rev() {
            self.lengths[place as usize] = length;
        }
        let place = history.len() - 1;
        self.lengths.pop();
        match self.before.pop() {
            Some(before) if before != NONE => drop(self.newest.insert(history[place], before)),
            _ => drop(self.newest.remove(&history[place])),
        }
        self.breaks.pop_if(|last| *last as usize == place);
    }

    fn set(&mut self, place: usize, length: u32) {
        if self.trying {
            self.tried.push((place as u32, self.lengths[place]));
        }
        self.lengths[place] = length;
    }

    /// Where the window begins.
    fn start(&self, history: &[u32]) -> usize {
        history.len().saturating_sub(self.window)
    }

    /// Takes note of the last token.
    fn chain(&mut self, history: &[u32]) {
        let place = history.len() - 1;
        let before = self.newest.insert(history[place], place as u32);
        self.before.push(before.unwrap_or(NONE));
        self.lengths.push(0);
        if self.breakers.end_in(history, &mut self.text) {
            self.breaks.push(place as u32);
        }
    }

    /// All lengths from nothing, in one pass (the Z algorithm, from the end).
    fn measure(&mut self, history: &[u32]) {
        self.lengths.fill(0);
        let (start, all) = (self.start(history), history.len());
        let count = all - start;
        // The match that reaches furthest back: where it ends, counted from the end of the text, and where it stops.
        let (mut from, mut to) = (0, 0);
        for back in 1..count {
            let mut length = 0;
            if back < to {
                length = (to - back).min(self.lengths[all - 1 - (back - from)] as usize);
            }
            while back + length < count && history[all - 1 - length] == history[all - 1 - back - length] {
                length += 1;
            }
            if back + length > to {
                (from, to) = (back, back + length);
            }
            self.lengths[all - 1 - back] = length as u32;
        }
    }

    /// Which token would carry on which repeat.
    fn find(&mut self, history: &[u32]) {
        self.found.clear();
        let Some(end) = history.len().checked_sub(1) else { return };
        let start = self.start(history);
        let unbroken = end as u32 - self.breaks.last().map_or(0, |&place| place);
        let unbroken = unbroken + u32::from(self.breaks.is_empty());
        let mut place = self.before[end];
        while place != NONE && place as usize >= start {
            let at = place as usize;
            let length = self.lengths[at].min((at - start) as u32 + 1).min(unbroken);
            if length >= self.allowed {
                let next = history[at + 1];
                match self.found.last_mut() {
                    Some((token, longest)) if *token == next => *longest = length.max(*longest),
                    _ => self.found.push((next, length)),
                }
            }
            place = self.before[at];
        }
        self.found.sort_unstable_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
        self.found.dedup_by_key(|&mut (token, _)| token);
    }
}

/// Texts across which no repeat is followed, looked for at the end of a text of tokens.
#[derive(Debug)]
struct Breakers {
    texts: Vec<Vec<u8>>,
    longest: usize,
    vocabulary: Arc<Vocabulary>,
}

impl Breakers {
    fn new(texts: &[String], vocabulary: Arc<Vocabulary>) -> Self {
        let texts: Vec<Vec<u8>> =
            texts.iter().filter(|text| !text.is_empty()).map(|text| text.clone().into()).collect();
        Self { longest: texts.iter().map(Vec::len).max().unwrap_or(0), texts, vocabulary }
    }

    /// Whether the last token completes one of them, which may have begun in tokens before it.
    fn end_in(&self, history: &[u32], text: &mut Vec<u8>) -> bool {
        let Some((&token, before)) = history.split_last() else { return false };
        let piece = self.vocabulary.piece(token);
        if piece.is_empty() || self.texts.is_empty() {
            return false;
        }
        let (mut first, mut bytes) = (before.len(), 0);
        // Tokens that print nothing are passed over, but not without end.
        while first > 0 && bytes + 1 < self.longest && before.len() - first < 4 * self.longest {
            first -= 1;
            bytes += self.vocabulary.piece(before[first]).len();
        }
        text.clear();
        before[first..].iter().for_each(|&token| text.extend_from_slice(self.vocabulary.piece(token)));
        let from = text.len();
        text.extend_from_slice(piece);
        self.texts.iter().any(|breaker| {
            let first = (from + 1).saturating_sub(breaker.len());
            text.get(first..).is_some_and(|text| text.windows(breaker.len()).any(|part| part == breaker))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Tokens are the letters `a..=z` from 0 on, then a line feed.
    fn vocabulary() -> Arc<Vocabulary> {
        Arc::new(Vocabulary::new((b'a'..=b'z').chain([b'\n']).map(|byte| [byte]), vec![]))
    }

    fn tokens(text: &str) -> Vec<u32> {
        text.bytes().map(|byte| if byte == b'\n' { 26 } else { u32::from(byte - b'a') }).collect()
    }

    fn said(mut seen: Seen, answer: &str) -> Seen {
        tokens(answer).into_iter().for_each(|token| seen.push(token));
        seen
    }

    fn dry(allowed_length: u32, last_n: Option<u32>, breakers: &[&str]) -> Sampling {
        let breakers = breakers.iter().map(|&text| text.to_owned()).collect();
        let dry = Dry { multiplier: 0.8, base: 1.75, allowed_length, last_n, breakers };
        Sampling { dry: Some(dry), ..Sampling::default() }
    }

    /// What would be repeated after `prompt` and `answer`, as `token length`.
    fn check(sampling: &Sampling, prompt: &str, answer: &str, expected: &str) {
        let seen = said(Seen::new(&tokens(prompt), sampling, &vocabulary()), answer);
        let found = seen.repeats().iter().map(|&(token, length)| format!("{} {length}", (b'a' + token as u8) as char));
        assert_eq!(found.collect::<Vec<_>>().join(", "), expected, "{prompt:?} {answer:?}");
    }

    #[test]
    fn what_would_carry_on_a_repeat_is_found_with_the_length_of_the_longest() {
        let plain = dry(2, None, &[]);
        check(&plain, "abcdeab", "", "c 2");
        check(&plain, "abcd", "eabc", "d 3");
        check(&plain, "abcabdxab", "", "c 2, d 2");
        check(&plain, "xabcyabczab", "c", "y 3, z 3");
        check(&plain, "abcxbcybc", "", "x 2, y 2");
        check(&plain, "abc", "x", "");
        check(&plain, "", "", "");
        check(&plain, "aaaa", "a", "a 4");
        check(&dry(1, None, &[]), "ab", "a", "b 1");
        check(&dry(3, None, &[]), "abcdeab", "", "");
    }

    #[test]
    fn a_repeat_ends_at_the_window_and_at_a_breaker() {
        check(&dry(2, Some(7), &[]), "abcdab", "c", "d 3");
        check(&dry(2, Some(6), &[]), "abcdab", "c", "d 2");
        check(&dry(2, Some(5), &[]), "abcdab", "c", "");
        check(&dry(1, None, &["\n"]), "ab\ncxab\n", "c", "x 1");
        check(&dry(1, None, &["\n"]), "abxab", "\n", "");
        check(&dry(1, None, &[]), "ab\ncxab\n", "c", "x 4");
        // A breaker over two tokens breaks where it is complete.
        check(&dry(1, None, &["bc"]), "abcdxabc", "d", "x 1");
        check(&dry(1, None, &["bc", "zzzz"]), "abcdxab", "c", "");
    }

    #[test]
    fn the_window_counts_what_is_in_it() {
        let counted = |penalty_last_n, repetition_penalty, prompt: &str, answer: &str| {
            let sampling =
                Sampling { penalty_last_n, repetition_penalty, presence_penalty: 1.0, ..Sampling::default() };
            let seen = said(Seen::new(&tokens(prompt), &sampling, &vocabulary()), answer);
            let mut counted = seen.counted().to_vec();
            counted.sort();
            let show = |of: &Counted| format!("{}{}{}", (b'a' + of.token as u8) as char, of.times, of.answered);
            counted.iter().map(show).collect::<Vec<_>>().join(" ")
        };
        assert_eq!(counted(None, 1.5, "aab", "bc"), "a20 b21 c11");
        assert_eq!(counted(None, 1.0, "aab", "bc"), "b11 c11", "only the repetition penalty looks at the prompt");
        assert_eq!(counted(Some(3), 1.5, "aab", "bc"), "b21 c11");
        assert_eq!(counted(Some(3), 1.5, "aab", ""), "a20 b10");
        assert_eq!(counted(Some(2), 1.5, "aab", "bc"), "b11 c11");
        assert_eq!(counted(Some(2), 1.0, "", "aabc"), "b11 c11");
        assert_eq!(counted(Some(1), 1.0, "a", ""), "");
    }

    #[test]
    fn nothing_is_kept_where_nothing_is_looked_at() {
        let plain = Sampling::default();
        assert!(!Seen::needed(&plain));
        assert!(!Seen::needed(&Sampling { presence_penalty: 1.0, penalty_last_n: Some(0), ..plain.clone() }));
        let answer_only = Sampling { presence_penalty: 1.0, ..plain };
        assert!(Seen::needed(&answer_only));
        assert!(Seen::new(&[1, 2, 3], &answer_only, &vocabulary()).history.is_empty());
        assert!(Seen::needed(&dry(2, None, &[])));
    }

    /// The same by looking at every pair of places.
    fn slowly(history: &[u32], prompt: usize, sampling: &Sampling) -> (Vec<Counted>, Vec<(u32, u32)>) {
        let window = |length: Option<u32>| history.len().saturating_sub(length.map_or(usize::MAX, |n| n as usize));
        let mut counted: Vec<Counted> = Vec::new();
        for (place, &token) in history.iter().enumerate().skip(window(sampling.penalty_last_n)) {
            if !counted.iter().any(|of| of.token == token) {
                counted.push(Counted { token, times: 0, answered: 0 });
            }
            let of = counted.iter_mut().find(|of| of.token == token).unwrap();
            of.times += 1;
            of.answered += u32::from(place >= prompt);
        }
        counted.sort();
        let dry = sampling.dry.as_ref().unwrap();
        let start = window(dry.last_n);
        let mut repeats: std::collections::BTreeMap<u32, u32> = Default::default();
        for at in start + 1..history.len() {
            let same = |back: usize| {
                back <= at - start
                    && back <= history.len()
                    && history[at - back] == history[history.len() - back]
                    && history[history.len() - back] != 26
            };
            let length = (1..).take_while(|&back| same(back)).count() as u32;
            if length >= dry.allowed_length {
                let longest = repeats.entry(history[at]).or_default();
                *longest = length.max(*longest);
            }
        }
        (counted, repeats.into_iter().collect())
    }

    proptest! {
        #[test]
        fn state_carried_along_is_what_a_count_from_nothing_gives(
            prompt in prop::collection::vec(prop_oneof![0u32..3, Just(26)], 0..30),
            answer in prop::collection::vec(prop_oneof![6 => 0u32..3, 1 => Just(26)], 0..40),
            last_n in prop_oneof![Just(None), (1u32..20).prop_map(Some)],
            allowed in 1u32..4,
            drafts in prop::collection::vec(prop_oneof![6 => 0u32..3, 1 => Just(26)], 0..8),
        ) {
            let sampling = Sampling {
                repetition_penalty: 1.1,
                penalty_last_n: last_n,
                ..dry(allowed, last_n, &["\n"])
            };
            let mut seen = Seen::new(&prompt, &sampling, &vocabulary());
            let mut history = prompt.clone();
            let state = |seen: &Seen| {
                let mut counted = seen.counted().to_vec();
                counted.sort();
                (counted, seen.repeats().to_vec())
            };
            for token in answer {
                seen.push(token);
                history.push(token);
                prop_assert_eq!(state(&seen), slowly(&history, prompt.len(), &sampling));
                // A look ahead and back.
                let known = history.len();
                history.extend(&drafts);
                let behind = seen.behind(&drafts, state);
                prop_assert_eq!(behind, slowly(&history, prompt.len(), &sampling));
                history.truncate(known);
                prop_assert_eq!(state(&seen), slowly(&history, prompt.len(), &sampling));
            }
        }
    }
}
