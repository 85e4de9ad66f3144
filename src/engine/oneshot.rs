//! One installed encoder at work: texts wait in line, a step takes as many as fit, a request is answered when its last
//! text is done.
//!
//! ```text
//! submit ──> lines, one an account ──> step: a text of each account in turn, up to so many tokens ──> answers
//!              acme  [t t t] [t]         packed back to back, whatever their lengths
//!              bob   [t]
//! ```
//!
//! A thousand texts of one account delay another's single text by one turn. Nobody overtakes within an account, and a text
//! that does not fit into what is left of a step ends the step, so long ones are not starved by short ones.
//!
//! Takes `now`, has no threads; the loop is in `run.rs`, where its steps alternate with those of decoders.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crate::base::{AccountId, Error, Kind, ModelId, RequestId, Result, SlotId};
use crate::engine::refusal::unavailable;
use crate::engine::slot::SlotStatus;
use crate::metrics::EngineMetrics;
use crate::model::encoder::{EncodeBatch, Encoder, EncoderSpec, GpuEncoder, Tokens};
use crate::task::Pooling;

/// How much the newest step counts in the moving average of seconds a token.
const PACE_WEIGHT: f64 = 0.1;

/// Computes texts in one pass: an encoder on the CPU or on a GPU, or the simulated device of tests.
pub trait OneShot: Send {
    /// What a step and a text may have.
    fn limits(&self) -> OneShotLimits;

    /// `[texts, width]`: a vector for each text, or a number for each label.
    ///
    /// # Errors
    /// Any error means that the device cannot be trusted any more: the engine fails its requests and stops.
    fn forward(&mut self, batch: &EncodeBatch) -> Result<&[f32]>;
}

/// What a [`OneShot`] can take.
#[derive(Clone, Copy, Debug)]
pub struct OneShotLimits {
    /// Tokens in a step.
    pub rows: usize,
    /// Texts in a step.
    pub texts: usize,
    /// Tokens in a text; no more than in a step.
    pub text_rows: usize,
    /// Tokens are below this.
    pub vocab: usize,
    /// Numbers for each text.
    pub width: usize,
}

impl OneShotLimits {
    /// Of an encoder whose steps have so many rows and texts.
    fn of(spec: &EncoderSpec, (rows, texts): (usize, usize)) -> Self {
        Self { rows, texts, text_rows: spec.context(), vocab: spec.vocab, width: spec.width() }
    }
}

impl OneShot for Encoder {
    fn limits(&self) -> OneShotLimits {
        OneShotLimits::of(self.spec(), Self::limits(self))
    }

    fn forward(&mut self, batch: &EncodeBatch) -> Result<&[f32]> {
        Self::forward(self, batch)
    }
}

impl OneShot for GpuEncoder {
    fn limits(&self) -> OneShotLimits {
        OneShotLimits::of(self.spec(), Self::limits(self))
    }

    fn forward(&mut self, batch: &EncodeBatch) -> Result<&[f32]> {
        Self::forward(self, batch)
    }
}

/// A request on its way to the engine: texts in, numbers out.
pub struct Encode {
    /// Whose answer it is, for logs.
    pub request: RequestId,
    /// Who is served; turns go round between accounts.
    pub account: AccountId,
    /// Which loaded model.
    pub slot: SlotId,
    /// At least one, none of them empty.
    pub texts: Vec<Tokens>,
    /// How vectors are pooled; a head does not ask.
    pub pooling: Pooling,
    /// When the answer is worth nothing any more.
    pub deadline: Instant,
    /// When the call came in, for queue time.
    pub received: Instant,
    /// Where the answer goes, with room for one: `[texts, width]`, or why not. Dropping the receiver cancels.
    pub answer: flume::Sender<Result<Vec<f32>>>,
}

impl Encode {
    fn tokens(&self) -> usize {
        self.texts.iter().map(|text| text.ids.len()).sum()
    }
}

/// An encoder ready to run on a device.
pub struct OneShotSlot {
    /// Unique for this loaded version.
    pub slot: SlotId,
    /// Its catalog id, for logs.
    pub model: ModelId,
    /// Weights and work buffers.
    pub runner: Box<dyn OneShot>,
    /// Tokens computed in a step, though a longer text is computed in one.
    pub step_tokens: usize,
    /// Requests waiting, beyond which more fail with [`Kind::Busy`]; also the longest texts that may wait.
    pub max_queue: usize,
    /// Where to count.
    pub metrics: EngineMetrics,
}

/// An encoder slot, installed.
pub struct OneShotLane {
    slot: OneShotSlot,
    limits: OneShotLimits,
    /// By arrival.
    jobs: BTreeMap<u64, Job>,
    arrivals: u64,
    /// Accounts with texts that wait, the next one first, and their jobs.
    lines: VecDeque<Line>,
    /// Tokens that wait.
    waiting: usize,
    batch: EncodeBatch,
    /// Whose texts the batch holds: job, and which of its texts.
    parts: Vec<(u64, usize)>,
    steps: u64,
    retiring: bool,
    /// Seconds a token, averaged.
    pace: f64,
}

struct Line {
    account: AccountId,
    jobs: VecDeque<u64>,
}

struct Job {
    encode: Encode,
    /// The first text that waits.
    next: usize,
    /// Texts that are computed.
    done: usize,
    /// `[texts, width]`
    out: Vec<f32>,
}

impl OneShotLane {
    /// Puts a slot to work.
    pub fn new(slot: OneShotSlot) -> Self {
        Self {
            limits: slot.runner.limits(),
            slot,
            jobs: BTreeMap::new(),
            arrivals: 0,
            lines: VecDeque::new(),
            waiting: 0,
            batch: EncodeBatch::default(),
            parts: Vec::new(),
            steps: 0,
            retiring: false,
            pace: 0.0,
        }
    }

    /// Which slot.
    pub fn id(&self) -> SlotId {
        self.slot.slot
    }

    /// Whether there is nothing to compute and nobody to answer.
    pub fn is_idle(&self) -> bool {
        self.jobs.is_empty()
    }

    /// Whether it takes no new requests.
    pub fn is_retiring(&self) -> bool {
        self.retiring
    }

    /// Takes no new requests from now on.
    pub fn retire(&mut self) {
        self.retiring = true;
    }

    /// Takes a request in, or answers why not.
    pub fn submit(&mut self, encode: Encode) {
        match self.fits(&encode) {
            Ok(()) => self.accept(encode),
            Err(error) => refuse(&encode.answer, error),
        }
        self.show();
    }

    fn fits(&self, encode: &Encode) -> Result<()> {
        if self.retiring {
            return Err(unavailable());
        }
        if encode.texts.is_empty() || encode.texts.iter().any(|text| text.ids.is_empty()) {
            return Err(Error::bad_input("There is nothing to encode: send at least one text that is not empty."));
        }
        if let Some(text) = encode.texts.iter().find(|text| text.ids.len() > self.limits.text_rows) {
            let (length, most) = (text.ids.len(), self.limits.text_rows);
            return Err(Error::new(Kind::ContextLength, format!("A text has {length} tokens, more than {most}.")));
        }
        let vocab = self.limits.vocab;
        if let Some(token) = encode.texts.iter().flat_map(|text| &text.ids).find(|&&token| token as usize >= vocab) {
            return Err(Error::bad_input(format!("A text holds token {token}, but the vocabulary has {vocab}.")));
        }
        // A request that finds nobody waiting is taken in whatever its size: it is bounded where it is parsed.
        let room = self.slot.max_queue.saturating_mul(self.limits.text_rows);
        if self.waiting > 0 && (self.jobs.len() >= self.slot.max_queue || self.waiting + encode.tokens() > room) {
            let wait = (self.pace * self.waiting as f64).ceil().clamp(1.0, 60.0);
            return Err(Error::new(Kind::Busy, "Capacity temporarily exceeded, please try again.")
                .with_retry_after(Duration::from_secs_f64(wait)));
        }
        Ok(())
    }

    fn accept(&mut self, encode: Encode) {
        let key = self.arrivals;
        self.arrivals += 1;
        self.waiting += encode.tokens();
        match self.lines.iter_mut().find(|line| line.account == encode.account) {
            Some(line) => line.jobs.push_back(key),
            None => self.lines.push_back(Line { account: encode.account.clone(), jobs: VecDeque::from([key]) }),
        }
        let out = vec![0.0; encode.texts.len() * self.limits.width];
        self.jobs.insert(key, Job { encode, next: 0, done: 0, out });
        self.slot.metrics.requests.inc();
    }

    /// One step: lets go of whoever left or is late, computes what is next, answers who is complete. Returns whether
    /// anything was computed.
    ///
    /// # Errors
    /// The runner's: nothing of this device can be trusted any more. [`OneShotLane::fail`] is all that may follow.
    pub fn step(&mut self, now: Instant) -> Result<bool> {
        self.let_go(now);
        self.plan(now);
        if self.parts.is_empty() {
            self.show();
            return Ok(false);
        }
        let begun = Instant::now();
        let width = self.limits.width;
        let numbers = self.slot.runner.forward(&self.batch)?;
        if numbers.len() != self.parts.len() * width {
            return Err(Error::internal("the encoder returned another number of texts than were asked for"));
        }
        for (&(key, text), numbers) in self.parts.iter().zip(numbers.chunks_exact(width)) {
            let Some(job) = self.jobs.get_mut(&key) else { continue };
            job.out[text * width..][..width].copy_from_slice(numbers);
            job.done += 1;
        }
        self.steps += 1;
        let (took, rows, metrics) = (begun.elapsed(), self.batch.rows(), &self.slot.metrics);
        self.pace += PACE_WEIGHT * (took.as_secs_f64() / rows as f64 - self.pace);
        metrics.steps.inc();
        metrics.prompt_tokens.inc_by(rows as u64);
        metrics.step_rows.observe(rows as f64);
        metrics.step_sequences.observe(self.parts.len() as f64);
        metrics.step_time.observe(took.as_secs_f64());
        self.answer();
        self.show();
        Ok(true)
    }

    fn let_go(&mut self, now: Instant) {
        let unfit = |job: &Job| job.encode.answer.is_disconnected() || job.encode.deadline <= now;
        let gone: Vec<u64> = self.jobs.iter().filter(|(_, job)| unfit(job)).map(|(&key, _)| key).collect();
        for key in gone {
            let Some(job) = self.drop_job(key) else { continue };
            if job.encode.answer.is_disconnected() {
                tracing::debug!(request = %job.encode.request, "cancelled: the caller went away");
                self.slot.metrics.cancelled.inc();
            } else {
                let late = "The deadline passed before all texts were encoded; send fewer or allow more time.";
                refuse(&job.encode.answer, Error::new(Kind::Timeout, late));
            }
        }
    }

    /// Takes a job out, with everything of it that waits.
    fn drop_job(&mut self, key: u64) -> Option<Job> {
        let job = self.jobs.remove(&key)?;
        self.waiting -= job.encode.texts[job.next..].iter().map(|text| text.ids.len()).sum::<usize>();
        self.lines.iter_mut().for_each(|line| line.jobs.retain(|&other| other != key));
        self.lines.retain(|line| !line.jobs.is_empty());
        Some(job)
    }

    /// Fills the batch.
    fn plan(&mut self, now: Instant) {
        self.batch.clear();
        self.parts.clear();
        let most = self.slot.step_tokens.min(self.limits.rows);
        while let Some(line) = self.lines.front_mut() {
            let key = line.jobs.front().copied();
            let Some((key, job)) = key.and_then(|key| Some((key, self.jobs.get_mut(&key)?))) else {
                // Lines hold jobs that are there, and are taken out when empty.
                debug_assert!(false, "a line without a job");
                self.lines.pop_front();
                continue;
            };
            let text = &job.encode.texts[job.next];
            let fits = self.batch.rows() + text.ids.len() <= most && self.parts.len() < self.limits.texts;
            if !fits && !self.parts.is_empty() {
                return;
            }
            if job.next == 0 {
                let waited = now.saturating_duration_since(job.encode.received);
                self.slot.metrics.queue_time.observe(waited.as_secs_f64());
            }
            self.batch.push(text, job.encode.pooling);
            self.parts.push((key, job.next));
            self.waiting -= text.ids.len();
            job.next += 1;
            if job.next == job.encode.texts.len() {
                line.jobs.pop_front();
            }
            if line.jobs.is_empty() {
                self.lines.pop_front();
            } else {
                self.lines.rotate_left(1);
            }
        }
    }

    /// Answers the jobs of the batch that are complete.
    fn answer(&mut self) {
        for &(key, _) in &self.parts {
            if self.jobs.get(&key).is_none_or(|job| job.done < job.encode.texts.len()) {
                continue;
            }
            let Some(job) = self.jobs.remove(&key) else { continue };
            let metrics = &self.slot.metrics;
            metrics.finished_stop.inc();
            metrics.request_time.observe(job.encode.received.elapsed().as_secs_f64());
            // A receiver that is gone needs no answer.
            let _ = job.encode.answer.try_send(Ok(job.out));
        }
    }

    /// Ends every request with this error.
    pub fn fail(&mut self, error: &Error) {
        while let Some((_, job)) = self.jobs.pop_first() {
            refuse(&job.encode.answer, error.clone());
        }
        self.lines.clear();
        self.waiting = 0;
        self.show();
    }

    fn texts_waiting(&self) -> usize {
        self.jobs.values().map(|job| job.encode.texts.len() - job.next).sum()
    }

    /// Sets the gauges.
    fn show(&self) {
        self.slot.metrics.queue.set(self.texts_waiting() as i64);
    }

    /// For dumps.
    pub fn status(&self) -> SlotStatus {
        SlotStatus {
            slot: self.slot.slot,
            model: self.slot.model.clone(),
            retiring: self.retiring,
            waiting: self.texts_waiting(),
            running: 0,
            kv_used: 0,
            kv_free: 0,
            steps: self.steps,
        }
    }
}

/// Answers a request that is not computed.
pub(super) fn refuse(answer: &flume::Sender<Result<Vec<f32>>>, error: Error) {
    // A receiver that is gone needs no answer.
    let _ = answer.try_send(Err(error));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::DeviceId;
    use crate::engine::sim::SimSpec;
    use crate::engine::sim_encoder::SimEncoder;
    use crate::metrics::Metrics;

    type Answer = flume::Receiver<Result<Vec<f32>>>;

    fn lane(step_tokens: usize, max_queue: usize) -> OneShotLane {
        OneShotLane::new(OneShotSlot {
            slot: SlotId::next(),
            model: ModelId::new("sim"),
            runner: Box::new(SimEncoder::new(SimSpec::default(), 4, 100)),
            step_tokens,
            max_queue,
            metrics: Metrics::new().engine(&ModelId::new("sim"), DeviceId(0)),
        })
    }

    /// A request of texts of these lengths.
    fn encode(lane: &OneShotLane, account: &str, lengths: &[usize], now: Instant) -> (Encode, Answer) {
        let (answer, receiver) = flume::bounded(1);
        let text = |&length: &usize| Tokens { ids: vec![length as u32; length], second: length as u32 };
        let encode = Encode {
            request: RequestId::random(),
            account: AccountId::new(account),
            slot: lane.id(),
            texts: lengths.iter().map(text).collect(),
            pooling: Pooling::Mean,
            deadline: now + Duration::from_secs(9),
            received: now,
            answer,
        };
        (encode, receiver)
    }

    fn submit(lane: &mut OneShotLane, account: &str, lengths: &[usize], now: Instant) -> Answer {
        let (encode, receiver) = encode(lane, account, lengths, now);
        lane.submit(encode);
        receiver
    }

    fn kind(answer: &Answer) -> Option<Kind> {
        answer.try_recv().ok().and_then(Result::err).map(|error| error.kind())
    }

    /// Requests of accounts, and what each step then holds: account and lengths, in order.
    fn check(step_tokens: usize, requests: &[(&str, &[usize])], expected: &[&str]) {
        let (mut lane, now) = (lane(step_tokens, 64), Instant::now());
        let answers: Vec<Answer> =
            requests.iter().map(|(account, lengths)| submit(&mut lane, account, lengths, now)).collect();
        let mut steps = Vec::new();
        while !lane.is_idle() {
            assert!(lane.step(now).unwrap());
            let part = |&(key, text): &(u64, usize)| {
                let (account, lengths) = requests[key as usize];
                format!("{account}{}", lengths[text])
            };
            steps.push(lane.parts.iter().map(part).collect::<Vec<_>>().join(" "));
        }
        assert_eq!(steps, expected);
        assert_eq!((lane.waiting, lane.lines.len()), (0, 0));
        for (answer, (_, lengths)) in answers.iter().zip(requests) {
            let numbers = answer.try_recv().unwrap().unwrap();
            // The simulated device says the text's length first.
            let lengths: Vec<f32> = lengths.iter().map(|&length| length as f32).collect();
            assert_eq!(numbers.chunks_exact(4).map(|numbers| numbers[0]).collect::<Vec<_>>(), lengths);
        }
    }

    #[test]
    fn a_step_takes_what_fits_in_order_of_arrival() {
        check(16, &[("a", &[5, 6]), ("a", &[4, 2, 9])], &["a5 a6 a4", "a2 a9"]);
        check(16, &[("a", &[5, 12, 1])], &["a5", "a12 a1"]);
    }

    #[test]
    fn a_text_longer_than_a_step_is_a_step_of_its_own() {
        check(8, &[("a", &[3, 40, 3])], &["a3", "a40", "a3"]);
    }

    #[test]
    fn accounts_take_turns_text_by_text() {
        check(9, &[("a", &[3, 3, 3, 3, 3]), ("b", &[3]), ("c", &[3, 3])], &["a3 b3 c3", "a3 c3 a3", "a3 a3"]);
    }

    #[test]
    fn whoever_left_or_is_late_is_not_computed() {
        let (mut lane, now) = (lane(8, 64), Instant::now());
        drop(submit(&mut lane, "a", &[8, 8], now));
        let late = submit(&mut lane, "a", &[8], now - Duration::from_secs(10));
        let stays = submit(&mut lane, "b", &[8], now);
        assert!(lane.step(now).unwrap());
        assert!(lane.is_idle());
        assert_eq!(kind(&late), Some(Kind::Timeout));
        assert!(stays.try_recv().unwrap().is_ok());
        let metrics = &lane.slot.metrics;
        assert_eq!((metrics.cancelled.get(), metrics.prompt_tokens.get(), metrics.queue.get()), (1, 8, 0));
        assert_eq!((metrics.requests.get(), metrics.finished_stop.get(), metrics.steps.get()), (3, 1, 1));
        assert!(!lane.step(now).unwrap(), "nothing left to do");
    }

    #[test]
    fn one_that_left_after_its_first_step_frees_the_rest() {
        let (mut lane, now) = (lane(8, 64), Instant::now());
        let leaves = submit(&mut lane, "a", &[8, 8, 8], now);
        assert!(lane.step(now).unwrap());
        drop(leaves);
        assert!(!lane.step(now).unwrap());
        assert_eq!((lane.is_idle(), lane.waiting), (true, 0));
    }

    #[test]
    fn a_full_queue_says_so_and_what_cannot_be_is_refused() {
        let (mut lane, now) = (lane(8, 2), Instant::now());
        let check = |lane: &mut OneShotLane, lengths: &[usize], expected: Kind| {
            assert_eq!(kind(&submit(lane, "a", lengths, now)), Some(expected), "{lengths:?}");
        };
        check(&mut lane, &[], Kind::BadInput);
        check(&mut lane, &[3, 0], Kind::BadInput);
        check(&mut lane, &[101], Kind::ContextLength);
        // More than may wait, but nobody waits.
        let large = submit(&mut lane, "a", &[100; 5], now);
        check(&mut lane, &[1], Kind::Busy);
        lane.fail(&Error::new(Kind::EngineLost, "gone"));
        assert_eq!(kind(&large), Some(Kind::EngineLost));
        let _two = [submit(&mut lane, "a", &[1], now), submit(&mut lane, "b", &[1], now)];
        check(&mut lane, &[1], Kind::Busy);
        lane.retire();
        check(&mut lane, &[1], Kind::ModelUnavailable);
        assert!(lane.step(now).unwrap() && lane.is_idle(), "what it has, it finishes");
        let (mut unknown, answer) = encode(&lane, "a", &[1], now);
        unknown.texts[0].ids[0] = 5000;
        let mut lane = OneShotLane { retiring: false, ..lane };
        lane.submit(unknown);
        assert_eq!(kind(&answer), Some(Kind::BadInput));
    }
}
