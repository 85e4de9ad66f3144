//! What decides an answer's next token: how it is drawn, what its grammar allows, and the ends that need no text to be seen.
//!
//! ```text
//!           ┌──────────── Answer ────────────┐        ┌─ Reply, with the scribe ─┐
//! draw ──> token ──> produced, seen, matcher, end? ──> text, stop strings, events ──> caller
//! ```
//!
//! All of it is known at once, so the next step never waits for text. Knows nothing of scheduling.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::base::{Error, RequestId};
use crate::engine::Submit;
use crate::engine::sampler::Draw;
use crate::engine::seen::Seen;
use crate::metrics::EngineMetrics;
use crate::model::Vocabulary;
use crate::model::grammar::Matcher;
use crate::task::{Event, Sampling};

/// A request being answered.
pub struct Answer {
    request: RequestId,
    /// Looked at, to see whether anybody still listens.
    events: flume::Sender<Event>,
    received: Instant,
    begun: Option<Instant>,
    deadline: Instant,
    sampling: Sampling,
    seed: u64,
    logprobs: Option<u32>,
    prompt_logprobs: Option<u32>,
    prompt_tokens: usize,
    vocabulary: Arc<Vocabulary>,
    choices: Vec<Choice>,
}

/// One of the answers.
struct Choice {
    /// Away while its masks are computed.
    matcher: Option<Box<Matcher>>,
    /// Kept only where draws look back.
    seen: Option<Mutex<Seen>>,
    produced: u32,
    complete: bool,
}

/// Whether a token is the last of its choice, as far as can be told without its text.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Last {
    /// Another may follow.
    No,
    /// An end token, which prints nothing.
    EndToken,
    /// The grammar allows nothing more.
    Whole,
    /// There may be no other: `max_tokens`, or the context window.
    Limit,
}

impl Answer {
    /// Keeps what draws need of a submission; the scheduler and the scribe get the rest. `vocabulary` says which tokens end
    /// an answer.
    pub fn new(submit: &Submit, vocabulary: Arc<Vocabulary>) -> Self {
        let seen = Seen::needed(&submit.sampling).then(|| Seen::new(&submit.prompt, &submit.sampling, &vocabulary));
        let choice = || Choice {
            matcher: submit.grammar.as_ref().map(|grammar| Box::new(grammar.matcher())),
            seen: seen.clone().map(Mutex::new),
            produced: 0,
            complete: false,
        };
        Self {
            request: submit.request,
            events: submit.events.clone(),
            received: submit.received,
            begun: None,
            deadline: submit.deadline,
            sampling: submit.sampling.clone(),
            seed: submit.seed,
            logprobs: submit.logprobs,
            prompt_logprobs: submit.prompt_logprobs,
            prompt_tokens: submit.prompt.len(),
            choices: (0..submit.choices).map(|_| choice()).collect(),
            vocabulary,
        }
    }

    /// Whose answer it is.
    pub fn request(&self) -> RequestId {
        self.request
    }

    /// Whether the caller went away.
    pub fn is_unwanted(&self) -> bool {
        self.events.is_disconnected()
    }

    /// Whether the answer is worth nothing any more.
    pub fn is_late(&self, now: Instant) -> bool {
        now >= self.deadline
    }

    /// How long it has been computed.
    pub fn service_time(&self, now: Instant) -> Duration {
        self.begun.map_or(Duration::ZERO, |begun| now.saturating_duration_since(begun))
    }

    /// Its first token is being computed, `cached` tokens of the prompt came out of the prefix cache.
    pub fn begin(&mut self, cached: usize, now: Instant, metrics: &EngineMetrics) {
        self.begun = Some(now);
        metrics.queue_time.observe(seconds(self.received, now));
        metrics.prefix_queries.inc_by(self.prompt_tokens as u64);
        metrics.prefix_hits.inc_by(cached as u64);
    }

    /// How the next token of a choice is drawn, or the one after some drafts.
    pub fn draw<'a>(&'a self, choice: u32, ahead: &'a [u32]) -> Draw<'a> {
        let of = &self.choices[choice as usize];
        Draw {
            sampling: &self.sampling,
            seed: self.seed.wrapping_add(u64::from(choice)),
            position: u64::from(of.produced) + ahead.len() as u64,
            seen: of.seen.as_ref(),
            ahead,
            logprobs: self.logprobs,
            mask: of.matcher.as_ref().map(|matcher| matcher.mask(ahead.len())),
            given: None,
        }
    }

    /// Lends out what follows a choice's grammar, if it has one.
    pub fn take_matcher(&mut self, choice: u32) -> Option<Box<Matcher>> {
        self.choices[choice as usize].matcher.take()
    }

    /// Takes back what was lent out.
    pub fn return_matcher(&mut self, choice: u32, matcher: Box<Matcher>) {
        self.choices[choice as usize].matcher = Some(matcher);
    }

    /// Why no token could be drawn for a choice.
    pub fn no_token(&self, choice: u32) -> Error {
        match &self.choices[choice as usize].matcher {
            Some(matcher) => matcher.error().cloned().unwrap_or_else(|| {
                Error::bad_input("Every token that the grammar allows next is forbidden by `logit_bias`.")
            }),
            None => Error::internal("the model's logits hold no number"),
        }
    }

    /// How a token of the prompt is looked up.
    pub fn look_up(&self, token: u32) -> Draw<'_> {
        let logprobs = self.prompt_logprobs;
        Draw {
            sampling: &self.sampling,
            seed: 0,
            position: 0,
            seen: None,
            ahead: &[],
            logprobs,
            mask: None,
            given: Some(token),
        }
    }

    /// A choice has one more token; `full` says that there may be none after it.
    pub fn accept(&mut self, choice: u32, token: u32, full: bool) -> Last {
        let of = &mut self.choices[choice as usize];
        of.produced += 1;
        if let Some(seen) = &mut of.seen {
            seen.get_mut().push(token);
        }
        let whole = of.matcher.as_mut().map(|matcher| {
            matcher.accept(token);
            matcher.is_complete()
        });
        // Under a grammar the end token is allowed only where the answer is whole.
        let ends = self.vocabulary.is_end(token) && (whole.is_some() || !self.sampling.ignore_eos);
        let last = match (ends, whole) {
            (true, _) => Last::EndToken,
            (false, Some(true)) => Last::Whole,
            _ if full => Last::Limit,
            _ => Last::No,
        };
        of.complete = last != Last::No;
        last
    }

    /// A choice is complete: its text says so.
    pub fn complete(&mut self, choice: u32) {
        self.choices[choice as usize].complete = true;
    }

    /// Whether a choice is known to be complete.
    pub fn is_complete(&self, choice: u32) -> bool {
        self.choices[choice as usize].complete
    }
}

/// How long it took.
pub(super) fn seconds(from: Instant, to: Instant) -> f64 {
    to.saturating_duration_since(from).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_draw_of_a_request_has_a_random_number_of_its_own() {
        let (events, _receiver) = flume::bounded(Submit::event_capacity(2, 9));
        let now = Instant::now();
        let submit = Submit {
            request: RequestId::random(),
            account: crate::base::AccountId::new("a"),
            weight: 1,
            slot: crate::base::SlotId::next(),
            prompt: vec![1, 2],
            choices: 2,
            max_tokens: 9,
            sampling: Sampling { presence_penalty: 1.0, ..Sampling::default() },
            seed: u64::MAX,
            stop: vec![],
            logprobs: None,
            grammar: None,
            prompt_logprobs: None,
            priority: 0,
            cache_salt: 0,
            adapter: None,
            drafts: None,
            expected: vec![],
            deadline: now,
            received: now,
            vocabulary: None,
            events,
        };
        let mut answer = Answer::new(&submit, Arc::new(Vocabulary::new([b"a", b"b"], vec![])));
        let number = |draw: Draw<'_>| (draw.seed, draw.position);
        let numbers = |answer: &Answer| [0, 1].map(|choice| number(answer.draw(choice, &[])));
        assert_eq!(numbers(&answer), [(u64::MAX, 0), (0, 0)]);
        assert_eq!(number(answer.draw(1, &[1, 1])), (0, 2), "a row behind two drafts");
        assert_eq!(answer.accept(1, 1, false), Last::No);
        assert_eq!(numbers(&answer), [(u64::MAX, 0), (0, 1)]);
        assert_eq!(answer.accept(1, 1, true), Last::Limit, "the last token completes a choice");
        assert_eq!([0, 1].map(|choice| answer.is_complete(choice)), [false, true]);
    }
}
