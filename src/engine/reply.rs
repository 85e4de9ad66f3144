//! A request's way out: drawn tokens become text, text becomes events.
//!
//! ```text
//! token ─ detokenise ─> [ sent ........ | held: could begin a stop string ] ─> Text … Finish ─> Done
//! ```
//!
//! Text is sent as soon as it cannot be the beginning of a stop string any more. The stop string that is complete first
//! wins, the longest if several are at the same character, so where the answer is cut does not depend on how the model
//! happened to cut its tokens. Knows nothing of what is computed next; never waits, since the channel has room for every
//! event.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Instant;

use crate::base::{Error, RequestId};
use crate::engine::Submit;
use crate::engine::answer::{Last, seconds};
use crate::metrics::EngineMetrics;
use crate::model::{Detokenizer, Vocabulary};
use crate::task::{Event, FinishReason, PromptToken, Scored, TokenLogprob, Usage};

/// What a caller hears of its request.
pub(super) struct Reply {
    request: RequestId,
    events: flume::Sender<Event>,
    received: Instant,
    /// Log-probabilities are wanted.
    logprobs: bool,
    /// The prompt's tokens until they are sent, if they are wanted.
    prompt: Option<Vec<PromptToken>>,
    vocabulary: Arc<Vocabulary>,
    stops: Arc<Stops>,
    choices: Vec<Choice>,
    usage: Usage,
}

/// One of the answers.
struct Choice {
    writer: Writer,
    /// When its newest token was drawn.
    last: Option<Instant>,
    complete: bool,
}

/// A token that was drawn for a choice.
#[derive(Clone, Copy)]
pub(super) struct Said {
    pub(super) token: u32,
    pub(super) logprob: f32,
    /// Drafts that were verified along with it.
    pub(super) drafted: u32,
    /// It is a draft that came true.
    pub(super) accepted: bool,
    pub(super) last: Last,
}

/// What a token did to its choice.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Heard {
    /// Nothing that whoever drew it did not know.
    Known,
    /// It completed a stop string, and the choice.
    Stopped,
}

impl Reply {
    /// Keeps what is needed of a submission to answer it. `vocabulary` is what its tokens print.
    pub(super) fn new(submit: &Submit, vocabulary: &Arc<Vocabulary>) -> Self {
        let stops = Arc::new(Stops::new(&submit.stop));
        let writer = || Writer::new(vocabulary.clone(), stops.clone());
        Self {
            request: submit.request,
            events: submit.events.clone(),
            received: submit.received,
            logprobs: submit.logprobs.is_some(),
            prompt: submit.prompt_logprobs.and(submit.prompt.first()).map(|&token| {
                let first = PromptToken { token, bytes: vocabulary.piece(token).to_vec(), scored: None };
                let mut prompt = Vec::with_capacity(submit.prompt.len());
                prompt.push(first);
                prompt
            }),
            choices: (0..submit.choices).map(|_| Choice { writer: writer(), last: None, complete: false }).collect(),
            usage: Usage { prompt_tokens: submit.prompt.len() as u32, ..Usage::default() },
            vocabulary: vocabulary.clone(),
            stops,
        }
    }

    /// Whose answer it is.
    pub(super) fn request(&self) -> RequestId {
        self.request
    }

    /// So many tokens of the prompt came out of the prefix cache.
    pub(super) fn begin(&mut self, cached: u32) {
        self.usage.cached_tokens = cached;
    }

    /// The next token of the prompt was looked up.
    pub(super) fn looked_up(&mut self, token: u32, logprob: f32, rank: u32, top: &[(u32, f32)]) {
        let Some(prompt) = &mut self.prompt else { return };
        let scored = Some(Scored { logprob, rank, top: rivals(&self.vocabulary, top) });
        prompt.push(PromptToken { token, bytes: self.vocabulary.piece(token).to_vec(), scored });
    }

    /// Sends what a token makes certain. Whatever was drawn behind the end of its choice is not part of the answer.
    pub(super) fn say(
        &mut self,
        choice: u32,
        said: &Said,
        top: &[(u32, f32)],
        drawn: Instant,
        metrics: &EngineMetrics,
    ) -> Heard {
        let &Said { token, last, .. } = said;
        if self.choices[choice as usize].complete {
            return Heard::Known;
        }
        if self.usage.completion_tokens == 0 {
            metrics.ttft.observe(seconds(self.received, drawn));
        }
        if let Some(prompt) = self.prompt.take() {
            self.send(Event::Prompt(prompt));
        }
        let of = &mut self.choices[choice as usize];
        if let Some(before) = of.last.replace(drawn) {
            metrics.inter_token.observe(seconds(before, drawn));
        }
        metrics.generation_tokens.inc();
        metrics.accepted_tokens.inc_by(u64::from(said.accepted));
        self.usage.completion_tokens += 1;
        self.usage.drafted_tokens += said.drafted;
        self.usage.accepted_tokens += u32::from(said.accepted);
        let mut stop = None;
        if last != Last::EndToken {
            let logprob = self.logprobs.then(|| TokenLogprob {
                token,
                bytes: self.vocabulary.piece(token).to_vec(),
                logprob: said.logprob,
                top: rivals(&self.vocabulary, top),
            });
            stop = of.writer.push(token, logprob);
        }
        of.complete = stop.is_some() || last != Last::No;
        let complete = of.complete;
        if complete && stop.is_none() {
            // Cut by a limit, the beginning of a character is left out; a model that stops inside one gets its mark.
            of.writer.finish(last == Last::EndToken);
        }
        let (text, logprobs) = of.writer.release();
        if !text.is_empty() || !logprobs.is_empty() {
            self.send(Event::Text { choice, text, logprobs, usage: self.usage });
        }
        if !complete {
            return Heard::Known;
        }
        let reason = if stop.is_none() && last == Last::Limit { FinishReason::Length } else { FinishReason::Stop };
        match reason {
            FinishReason::Stop | FinishReason::ToolCalls => metrics.finished_stop.inc(),
            FinishReason::Length => metrics.finished_length.inc(),
        }
        let text = stop.map(|at| self.stops.0[at].text.clone());
        self.send(Event::Finish { choice, reason, stop: text });
        if stop.is_some() { Heard::Stopped } else { Heard::Known }
    }

    /// Whether all choices are complete.
    pub(super) fn is_complete(&self) -> bool {
        self.choices.iter().all(|choice| choice.complete)
    }

    /// All choices are complete; the last token was `drawn` then.
    pub(super) fn done(self, drawn: Instant, metrics: &EngineMetrics) {
        metrics.request_time.observe(seconds(self.received, drawn));
        self.send(Event::Done(self.usage));
    }

    /// The request failed; what was sent stands.
    pub(super) fn fail(self, error: Error) {
        self.send(Event::Failed(error));
    }

    fn send(&self, event: Event) {
        if let Err(flume::TrySendError::Full(_)) = self.events.try_send(event) {
            // Only a submission whose channel is smaller than `Submit::event_capacity` gets here.
            tracing::error!(request = %self.request, "an event found no room in its channel and was lost");
        }
    }
}

fn rivals(vocabulary: &Vocabulary, top: &[(u32, f32)]) -> Vec<(u32, Vec<u8>, f32)> {
    top.iter().map(|&(token, logprob)| (token, vocabulary.piece(token).to_vec(), logprob)).collect()
}

/// Stop strings, prepared for matching a byte at a time.
struct Stops(Vec<Stop>);

struct Stop {
    text: String,
    /// `back[n]`: the longest beginning of the string that is also the end of its first `n` bytes, itself left out.
    back: Vec<u32>,
}

impl Stops {
    fn new(texts: &[String]) -> Self {
        Self(texts.iter().filter(|text| !text.is_empty()).map(|text| Stop::new(text)).collect())
    }
}

impl Stop {
    fn new(text: &str) -> Self {
        let mut stop = Self { text: text.to_owned(), back: vec![0; text.len() + 1] };
        for (at, &byte) in text.as_bytes().iter().enumerate().skip(1) {
            stop.back[at + 1] = stop.advance(stop.back[at], byte);
        }
        stop
    }

    /// How many bytes of the string the text ends with after `byte`, if it ended with `matched` before.
    fn advance(&self, mut matched: u32, byte: u8) -> u32 {
        loop {
            if self.text.as_bytes().get(matched as usize) == Some(&byte) {
                return matched + 1;
            }
            if matched == 0 {
                return 0;
            }
            matched = self.back[matched as usize];
        }
    }
}

/// The text of one choice: what is certain, what is held back, and the log-probabilities that belong to it.
struct Writer {
    detokenizer: Detokenizer,
    stops: Arc<Stops>,
    /// How much of each stop string the text ends with.
    matched: Vec<u32>,
    /// Text not sent yet.
    text: String,
    /// Of `text`, bytes that may be sent.
    certain: usize,
    /// Bytes sent.
    sent: usize,
    /// Where each token's text begins, and whether it has any.
    logprobs: VecDeque<(usize, bool, TokenLogprob)>,
}

impl Writer {
    fn new(vocabulary: Arc<Vocabulary>, stops: Arc<Stops>) -> Self {
        Self {
            detokenizer: Detokenizer::new(vocabulary),
            matched: vec![0; stops.0.len()],
            stops,
            text: String::new(),
            certain: 0,
            sent: 0,
            logprobs: VecDeque::new(),
        }
    }

    /// Appends a token. Returns which stop string is complete, if one is; the text ends before it then.
    fn push(&mut self, token: u32, logprob: Option<TokenLogprob>) -> Option<usize> {
        let from = self.text.len();
        self.detokenizer.push(token, &mut self.text);
        if let Some(logprob) = logprob {
            self.logprobs.push_back((self.sent + from, !logprob.bytes.is_empty(), logprob));
        }
        if self.stops.0.is_empty() {
            self.certain = self.text.len();
            return None;
        }
        for (at, &byte) in self.text.as_bytes().iter().enumerate().skip(from) {
            let mut complete: Option<usize> = None;
            for (which, (stop, matched)) in self.stops.0.iter().zip(&mut self.matched).enumerate() {
                *matched = stop.advance(*matched, byte);
                let longer = complete.is_none_or(|other| stop.text.len() > self.stops.0[other].text.len());
                if *matched as usize == stop.text.len() && longer {
                    complete = Some(which);
                }
            }
            if let Some(which) = complete {
                self.text.truncate(at + 1 - self.stops.0[which].text.len());
                self.certain = self.text.len();
                let end = self.sent + self.certain;
                self.logprobs.retain(|&(start, ..)| start < end);
                return complete;
            }
        }
        let held = self.matched.iter().max().copied().unwrap_or(0);
        self.certain = self.text.len() - held as usize;
        None
    }

    /// The answer ends here: nothing held back can become anything else. `marked`: an unfinished character shows as U+FFFD.
    fn finish(&mut self, marked: bool) {
        if marked {
            self.detokenizer.finish(&mut self.text);
        }
        // Tokens whose text is left out have their log-probabilities all the same.
        self.logprobs.iter_mut().for_each(|(_, shows, _)| *shows = false);
        self.certain = self.text.len();
    }

    /// Takes what is certain: text, and the log-probabilities of the tokens that it begins or shows. A token without
    /// text of its own follows the one before it.
    fn release(&mut self) -> (String, Vec<TokenLogprob>) {
        let rest = self.text.split_off(self.certain);
        let text = std::mem::replace(&mut self.text, rest);
        self.sent += self.certain;
        self.certain = 0;
        let due = |&(start, shows, _): &(usize, bool, TokenLogprob)| start < self.sent || !shows && start == self.sent;
        let count = self.logprobs.iter().take_while(|entry| due(entry)).count();
        (text, self.logprobs.drain(..count).map(|(.., logprob)| logprob).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Feeds pieces as tokens `0..`, with `stops`; the result lists what each step sends with its log-probabilities'
    /// token ids, and the stop string that ended it.
    fn check(pieces: &[&[u8]], stops: &[&str], expected: &str) {
        let vocabulary = Arc::new(Vocabulary::new(pieces.iter(), vec![]));
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut writer = Writer::new(vocabulary.clone(), Arc::new(Stops::new(&stops)));
        let mut steps = Vec::new();
        let mut show = |writer: &mut Writer| {
            let (text, logprobs) = writer.release();
            let tokens: Vec<_> = logprobs.iter().map(|logprob| logprob.token.to_string()).collect();
            steps.push(format!("{text}:{}", tokens.join(",")));
        };
        let mut stopped = None;
        for token in 0..pieces.len() as u32 {
            let bytes = vocabulary.piece(token).to_vec();
            stopped = writer.push(token, Some(TokenLogprob { token, bytes, logprob: 0.0, top: vec![] }));
            show(&mut writer);
            if stopped.is_some() {
                break;
            }
        }
        if stopped.is_none() {
            writer.finish(true);
            show(&mut writer);
        }
        let end = stopped.map_or("end".into(), |at| format!("stop {}", stops[at]));
        assert_eq!(format!("{} | {end}", steps.join(" | ")), expected, "{pieces:?} {stops:?}");
    }

    #[test]
    fn text_without_stop_strings_leaves_at_once() {
        check(&[b"a", b"bc"], &[], "a:0 | bc:1 | : | end");
    }

    #[test]
    fn only_what_could_begin_a_stop_string_is_held_back() {
        check(
            &[b"one <", b"|e", b"x two"],
            &["<|end|>"],
            "one :0 |  | <|ex two:1,2 | : | end".replace("  |", " : |").as_str(),
        );
        check(&[b"ab", b"ab", b"c"], &["abc"], ": | ab:0 | : | stop abc");
        check(&[b"aab", b"aa"], &["aac"], "aab:0 | : | aa:1 | end");
    }

    #[test]
    fn a_stop_string_is_cut_exactly_even_across_tokens() {
        check(&[b"x EN", b"D y"], &["END"], "x :0 | : | stop END");
        check(&[b"x END y"], &["END"], "x :0 | stop END");
        check(&[b"END"], &["END"], ": | stop END");
        check(&["grün".as_bytes(), "e ü".as_bytes()], &["ne"], "grü:0 | : | stop ne");
        check(&[b"\xc3", b"\xbcx"], &["üx"], ": | : | stop üx");
    }

    #[test]
    fn the_stop_string_that_is_complete_first_wins_and_the_longest_among_equals() {
        check(&[b"abcd"], &["abcd", "bc"], "a:0 | stop bc");
        check(&[b"abcd"], &["cd", "bcd"], "a:0 | stop bcd");
        check(&[b"a", b"b", b"c", b"d"], &["abcd", "bc"], ": | : | a:0 | stop bc");
    }

    #[test]
    fn log_probabilities_leave_with_the_text_that_their_token_begins() {
        check(&[b"a", b"\xf0\x9f", b"\x98\x80", b"b"], &[], "a:0 | : | 😀:1,2 | b:3 | : | end");
        check(&[b"a", b"", b"b"], &[], "a:0 | :1 | b:2 | : | end");
        check(&[b"ab", b"\xe2\x82"], &[], "ab:0 | : | \u{fffd}:1 | end");
        check(&[b"ok E", b"N", b"Q"], &["END"], "ok :0 | : | ENQ:1,2 | : | end");
    }

    #[test]
    fn where_an_answer_is_cut_does_not_depend_on_how_its_tokens_are_cut() {
        let (text, stops) = ("aabaabaaabcabacabab", ["aaabc", "abab", "caba"].map(str::to_owned));
        let whole = |cuts: u32| {
            let mut pieces: Vec<Vec<u8>> = vec![vec![]];
            for (at, byte) in text.bytes().enumerate() {
                pieces.last_mut().unwrap().push(byte);
                if cuts >> at & 1 == 1 {
                    pieces.push(vec![]);
                }
            }
            let vocabulary = Arc::new(Vocabulary::new(pieces.iter(), vec![]));
            let mut writer = Writer::new(vocabulary, Arc::new(Stops::new(&stops)));
            let mut out = String::new();
            for token in 0..pieces.len() as u32 {
                let stop = writer.push(token, None);
                out += &writer.release().0;
                if stop.is_some() {
                    return (out, stop);
                }
            }
            panic!("no stop")
        };
        for cuts in 0..4096 {
            assert_eq!(whole(cuts * 61), ("aabaab".to_owned(), Some(0)));
        }
    }

    #[test]
    fn an_answer_cut_inside_a_character_ends_before_it_and_keeps_the_log_probabilities() {
        let vocabulary = Arc::new(Vocabulary::new([b"ab".as_slice(), b"\xe2\x82"], vec![]));
        let mut writer = Writer::new(vocabulary, Arc::new(Stops::new(&[])));
        let logprob = |token| TokenLogprob { token, bytes: vec![1], logprob: 0.0, top: vec![] };
        for token in 0..2 {
            writer.push(token, Some(logprob(token)));
        }
        writer.finish(false);
        let (text, logprobs) = writer.release();
        assert_eq!((text.as_str(), logprobs.len()), ("ab", 2));
    }
}
