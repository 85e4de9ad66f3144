//! The loop of a device's thread: take what callers say, then one step of each model that has work, round and round.
//!
//! ```text
//! ┌─> inbox (blocks only when all lanes are idle) ─> each busy lane: plan, compute, deliver ─> reap ─┐
//! └──────────────────────────────────── heartbeat ──────────────────────────────────────────────────┘
//! ```
//!
//! What callers may rely on:
//! - every request gets exactly one `Done` or `Failed`, as long as the thread lives. A channel that closes without either
//!   means that it died (a panic in a runner);
//! - a request for a slot that is not here (any more) gets `Failed(ModelUnavailable)`: look the model up again, a newer
//!   version may be serving;
//! - a runner's error fails every request of the thread with `Failed(EngineLost)` and ends it. Whoever holds its
//!   `JoinHandle` sees that and starts another.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};

use crate::base::{DeviceId, Error, Kind, Result, SlotId};
use crate::engine::lane::Lane;
use crate::engine::oneshot::{self, OneShotLane};
use crate::engine::refusal::unavailable;
use crate::engine::scribe::WORTH_A_WAKE;
use crate::engine::{Command, Engine, EngineStatus, SlotStatus};
use crate::task::Event;

/// Commands that wait for the thread; beyond that, [`Engine::tell`] is `Busy`.
const INBOX: usize = 256;
/// How often an idle thread shows that it lives.
const TICK: Duration = Duration::from_millis(500);

/// Starts the thread of a device. It ends after [`Command::Stop`], after a runner's error, or when every [`Engine`]
/// handle is gone and nothing is left to do.
///
/// # Errors
/// When the system has no thread left.
pub fn start(device: DeviceId) -> Result<(Engine, JoinHandle<()>)> {
    let (sender, inbox) = bounded(INBOX);
    let (heartbeat, started) = (Arc::new(AtomicU64::new(0)), Instant::now());
    let engine = Engine::new(device, sender, heartbeat.clone(), started);
    let thread = std::thread::Builder::new()
        .name(format!("engine-{device}"))
        .spawn(move || Loop { device, inbox, heartbeat, started, lanes: Vec::new(), draining: false }.run())
        .map_err(|error| Error::internal("the thread of a device could not be started").with_source(error))?;
    Ok((engine, thread))
}

struct Loop {
    device: DeviceId,
    inbox: Receiver<Command>,
    heartbeat: Arc<AtomicU64>,
    started: Instant,
    lanes: Vec<Busy>,
    /// Ends when all lanes are idle.
    draining: bool,
}

/// A lane, and who waits for its end.
struct Busy {
    lane: AnyLane,
    /// Dropped with the lane.
    done: Vec<flume::Sender<()>>,
}

/// The two kinds of lanes, which take turns on a device.
enum AnyLane {
    Text(Box<Lane>),
    OneShot(Box<OneShotLane>),
}

macro_rules! either {
    ($self:expr, $lane:ident => $body:expr) => {
        match $self {
            Self::Text($lane) => $body,
            Self::OneShot($lane) => $body,
        }
    };
}

impl AnyLane {
    fn id(&self) -> SlotId {
        either!(self, lane => lane.id())
    }

    fn is_idle(&self) -> bool {
        either!(self, lane => lane.is_idle())
    }

    fn is_retiring(&self) -> bool {
        either!(self, lane => lane.is_retiring())
    }

    fn retire(&mut self) {
        either!(self, lane => lane.retire());
    }

    fn fail(&mut self, error: &Error) {
        either!(self, lane => lane.fail(error));
    }

    fn status(&self) -> SlotStatus {
        either!(self, lane => lane.status())
    }

    fn step(&mut self) -> Result<()> {
        let begun = Instant::now();
        match self {
            Self::OneShot(lane) => lane.step(begun).map(|_| ()),
            Self::Text(lane) => {
                if lane.plan(begun) {
                    let planned = Instant::now();
                    lane.compute(&Instant::now)?;
                    let drawn = Instant::now();
                    lane.deliver(drawn);
                    lane.step_took(begun.elapsed(), drawn - planned);
                }
                Ok(())
            }
        }
    }
}

impl Loop {
    fn run(mut self) {
        tracing::debug!(device = %self.device, "engine started");
        loop {
            self.heartbeat.store(self.started.elapsed().as_millis() as u64, Ordering::Relaxed);
            if self.take_commands().is_break() {
                break;
            }
            if let Err(error) = self.step() {
                tracing::error!(device = %self.device, %error, ?error, "the device failed; its engine ends");
                let lost = Error::new(Kind::EngineLost, "The device of this model failed; try again in a moment.")
                    .with_retry_after(Duration::from_secs(2));
                self.fail(&lost);
                return;
            }
            self.lanes.retain(|busy| !(busy.lane.is_retiring() && busy.lane.is_idle()));
            if self.draining && self.is_idle() {
                break;
            }
        }
        self.fail(&shutting_down());
        tracing::debug!(device = %self.device, "engine ended");
    }

    fn is_idle(&self) -> bool {
        self.lanes.iter().all(|busy| busy.lane.is_idle())
    }

    /// Takes what is in the inbox; waits for it only when there is nothing to compute. Breaks when the thread is to end.
    fn take_commands(&mut self) -> ControlFlow<()> {
        if self.is_idle() && !self.draining {
            match self.inbox.recv_timeout(TICK) {
                Ok(command) => self.obey(command)?,
                Err(RecvTimeoutError::Timeout) => return ControlFlow::Continue(()),
                Err(RecvTimeoutError::Disconnected) => self.draining = true,
            }
        }
        // Bounded: a flood of submissions must not keep the lanes from their next step.
        for _ in 0..INBOX {
            match self.inbox.try_recv() {
                Ok(command) => self.obey(command)?,
                Err(_) => break,
            }
        }
        ControlFlow::Continue(())
    }

    fn obey(&mut self, command: Command) -> ControlFlow<()> {
        match command {
            Command::Submit(submit) => match find(&mut self.lanes, submit.slot) {
                _ if self.draining => refuse(&submit.events, shutting_down()),
                Some(AnyLane::Text(lane)) => lane.submit(*submit, Instant::now()),
                _ => refuse(&submit.events, unavailable()),
            },
            Command::Encode(encode) => match find(&mut self.lanes, encode.slot) {
                _ if self.draining => oneshot::refuse(&encode.answer, shutting_down()),
                Some(AnyLane::OneShot(lane)) => lane.submit(*encode),
                _ => oneshot::refuse(&encode.answer, unavailable()),
            },
            Command::InstallOneShot(slot) => {
                tracing::info!(device = %self.device, slot = slot.slot.0, model = %slot.model, "installed");
                let lane = AnyLane::OneShot(Box::new(OneShotLane::new(*slot)));
                self.lanes.push(Busy { lane, done: Vec::new() });
            }
            Command::Install(slot) => {
                tracing::info!(device = %self.device, slot = slot.slot.0, model = %slot.model, blocks = slot.runner.blocks(), "installed");
                self.lanes.push(Busy {
                    lane: AnyLane::Text(Box::new(Lane::new(*slot).with_scribe(WORTH_A_WAKE))),
                    done: Vec::new(),
                });
            }
            Command::Retire { slot, done } => {
                if let Some(busy) = self.lanes.iter_mut().find(|busy| busy.lane.id() == slot) {
                    busy.lane.retire();
                    busy.done.push(done);
                }
            }
            Command::Dump(reply) => {
                let status = EngineStatus { slots: self.lanes.iter().map(|busy| busy.lane.status()).collect() };
                for slot in &status.slots {
                    tracing::info!(
                        device = %self.device, slot = slot.slot.0, model = %slot.model, retiring = slot.retiring,
                        waiting = slot.waiting, running = slot.running, kv_used = slot.kv_used, kv_free = slot.kv_free,
                        steps = slot.steps, "slot"
                    );
                }
                // Whoever asked may have gone; the log has it.
                let _ = reply.try_send(status);
            }
            Command::Stop { drain: true } => self.draining = true,
            Command::Stop { drain: false } => return ControlFlow::Break(()),
        }
        ControlFlow::Continue(())
    }

    /// One step of each lane that has work: models on one device share it evenly by steps.
    fn step(&mut self) -> Result<()> {
        for busy in &mut self.lanes {
            if !busy.lane.is_idle() {
                busy.lane.step()?;
            }
        }
        Ok(())
    }

    /// Ends everything with this error: what is under way, and what still lies in the inbox.
    fn fail(&mut self, error: &Error) {
        self.lanes.iter_mut().for_each(|busy| busy.lane.fail(error));
        for command in self.inbox.try_iter() {
            match command {
                Command::Submit(submit) => refuse(&submit.events, error.clone()),
                Command::Encode(encode) => oneshot::refuse(&encode.answer, error.clone()),
                _ => {}
            }
        }
    }
}

fn find(lanes: &mut [Busy], slot: SlotId) -> Option<&mut AnyLane> {
    lanes.iter_mut().map(|busy| &mut busy.lane).find(|lane| lane.id() == slot)
}

fn refuse(events: &flume::Sender<Event>, error: Error) {
    // A receiver that is gone needs no answer.
    let _ = events.try_send(Event::Failed(error));
}

fn shutting_down() -> Error {
    Error::new(Kind::ShuttingDown, "The server is shutting down; try again in a moment.")
        .with_retry_after(Duration::from_secs(5))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::{AccountId, ModelId, RequestId};
    use crate::engine::oneshot::{Encode, OneShotSlot};
    use crate::engine::sim::{SimRunner, SimSpec};
    use crate::engine::sim_encoder::SimEncoder;
    use crate::engine::{ModelSlot, Submit};
    use crate::metrics::{EngineMetrics, Metrics};
    use crate::model::encoder::Tokens;
    use crate::task::{FinishReason, Pooling, Sampling, Usage};

    fn metrics() -> EngineMetrics {
        Metrics::new().engine(&ModelId::new("sim"), DeviceId(0))
    }

    fn slot(spec: SimSpec) -> ModelSlot {
        ModelSlot {
            slot: SlotId::next(),
            model: ModelId::new("sim"),
            vocabulary: SimRunner::vocabulary(),
            runner: Box::new(SimRunner::new(spec)),
            context: 512,
            step_tokens: 64,
            prefill_chunk: 32,
            max_running: 8,
            max_queue: 16,
            prefix_cache: true,
            prefill_stretch: 0.0,
            spill: None,
            speculation: Default::default(),
            draft: None,
            metrics: metrics(),
        }
    }

    fn spec() -> SimSpec {
        SimSpec { end_in: 0, ..SimSpec::default() }
    }

    fn install(engine: &Engine, slot: ModelSlot) -> SlotId {
        let id = slot.slot;
        engine.tell(Command::Install(Box::new(slot))).unwrap();
        id
    }

    fn submit(slot: SlotId, prompt: &str, max_tokens: u32) -> (Submit, flume::Receiver<Event>) {
        let (events, receiver) = flume::bounded(Submit::event_capacity(1, max_tokens));
        let submit = Submit {
            request: RequestId::random(),
            account: AccountId::new("a"),
            weight: 1,
            slot,
            prompt: prompt.bytes().map(u32::from).collect(),
            choices: 1,
            max_tokens,
            sampling: Sampling { temperature: 0.0, ..Sampling::default() },
            seed: 1,
            stop: Vec::new(),
            logprobs: None,
            grammar: None,
            prompt_logprobs: None,
            priority: 0,
            cache_salt: 0,
            adapter: None,
            drafts: None,
            expected: vec![],
            deadline: Instant::now() + Duration::from_secs(60),
            received: Instant::now(),
            vocabulary: None,
            events,
        };
        (submit, receiver)
    }

    /// All events of an answer as one line: text, finishes, and how it ended; `closed` if the channel just closed.
    fn answer(receiver: &flume::Receiver<Event>) -> String {
        let mut line = String::new();
        loop {
            match receiver.recv_timeout(Duration::from_secs(20)) {
                Ok(Event::Prompt(_)) => line += "prompt ",
                Ok(Event::Text { text, .. }) => line += &text,
                Ok(Event::Finish { reason, .. }) => line += &format!(" {}", reason.as_str()),
                Ok(Event::Done(usage)) => line += &format!(" done {}+{}", usage.prompt_tokens, usage.completion_tokens),
                Ok(Event::Failed(error)) => line += &format!(" {:?}", error.kind()),
                Ok(event @ Event::Tool { .. }) => panic!("an engine knows no tools: {event:?}"),
                Err(flume::RecvTimeoutError::Disconnected) => {
                    return if line.contains("done ") || line.contains(char::is_uppercase) {
                        line
                    } else {
                        line + " closed"
                    };
                }
                Err(flume::RecvTimeoutError::Timeout) => panic!("no answer after {line:?}"),
            }
        }
    }

    fn ask(engine: &Engine, slot: SlotId, prompt: &str, max_tokens: u32) -> flume::Receiver<Event> {
        let (submit, receiver) = submit(slot, prompt, max_tokens);
        engine.submit(submit).unwrap();
        receiver
    }

    fn status(engine: &Engine) -> EngineStatus {
        let (reply, status) = flume::bounded(1);
        engine.tell(Command::Dump(reply)).unwrap();
        status.recv_timeout(Duration::from_secs(20)).unwrap()
    }

    fn wait_until(what: &str, mut is_true: impl FnMut() -> bool) {
        let started = Instant::now();
        while !is_true() {
            assert!(started.elapsed() < Duration::from_secs(20), "never: {what}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    #[test]
    fn a_request_is_answered_and_the_thread_ends_when_all_handles_are_gone() {
        let (engine, thread) = start(DeviceId(3)).unwrap();
        assert_eq!(thread.thread().name(), Some("engine-3"));
        let slot = install(&engine, slot(spec()));
        let line = answer(&ask(&engine, slot, "hello", 7));
        assert!(line.ends_with(" length done 5+7"), "{line}");
        drop(engine);
        thread.join().unwrap();
    }

    #[test]
    fn two_models_share_a_device_and_a_drain_answers_everything() {
        let (engine, thread) = start(DeviceId(0)).unwrap();
        let slow = SimSpec { step_us: 500, ..spec() };
        let slots = [install(&engine, slot(slow.clone())), install(&engine, slot(slow))];
        let receivers: Vec<_> = (0..12).map(|at| ask(&engine, slots[at % 2], &format!("prompt {at}"), 200)).collect();
        engine.tell(Command::Stop { drain: true }).unwrap();
        let late = ask(&engine, slots[0], "late", 4);
        assert!(receivers.iter().all(|receiver| answer(receiver).contains(" length done ")));
        assert_eq!(answer(&late), " ShuttingDown");
        thread.join().unwrap();
        assert_eq!(engine.submit(submit(slots[0], "x", 1).0).unwrap_err().kind(), Kind::EngineLost);
    }

    #[test]
    fn a_hard_stop_fails_what_runs_and_what_waits_in_the_inbox() {
        let (engine, thread) = start(DeviceId(0)).unwrap();
        let slot = install(&engine, slot(SimSpec { step_us: 20_000, ..spec() }));
        let running = ask(&engine, slot, "running", 400);
        wait_until("it runs", || status(&engine).slots[0].running == 1);
        engine.tell(Command::Stop { drain: false }).unwrap();
        // The thread may be gone already; if it is not, the late one is answered.
        let (submit, late) = submit(slot, "late", 4);
        let taken = engine.submit(submit);
        assert!(answer(&running).ends_with(" ShuttingDown"));
        match taken {
            Ok(()) => assert!([" ShuttingDown", " closed"].contains(&answer(&late).as_str())),
            Err(error) => assert_eq!(error.kind(), Kind::EngineLost),
        }
        thread.join().unwrap();
    }

    #[test]
    fn a_retired_slot_finishes_its_work_then_goes() {
        let (engine, _thread) = start(DeviceId(0)).unwrap();
        let [old, new] = [(); 2].map(|()| install(&engine, slot(SimSpec { step_us: 1_000, ..spec() })));
        let running = ask(&engine, old, "running", 50);
        let (done, gone) = flume::bounded(1);
        engine.tell(Command::Retire { slot: old, done }).unwrap();
        assert_eq!(answer(&ask(&engine, old, "late", 4)), " ModelUnavailable");
        assert!(answer(&ask(&engine, new, "new", 4)).ends_with(" length done 3+4"));
        assert!(answer(&running).ends_with(" length done 7+50"));
        assert!(
            gone.recv_timeout(Duration::from_secs(20))
                .is_err_and(|error| error == flume::RecvTimeoutError::Disconnected)
        );
        assert_eq!(status(&engine).slots.len(), 1);
        assert_eq!(answer(&ask(&engine, old, "later", 4)), " ModelUnavailable");
    }

    #[test]
    fn retiring_an_unknown_slot_is_done_at_once() {
        let (engine, _thread) = start(DeviceId(0)).unwrap();
        let (done, gone) = flume::bounded::<()>(1);
        engine.tell(Command::Retire { slot: SlotId::next(), done }).unwrap();
        assert!(
            gone.recv_timeout(Duration::from_secs(20))
                .is_err_and(|error| error == flume::RecvTimeoutError::Disconnected)
        );
    }

    #[test]
    fn a_client_that_leaves_frees_its_blocks_while_others_go_on() {
        let (engine, _thread) = start(DeviceId(0)).unwrap();
        let slot = slot(SimSpec { step_us: 1_000, ..spec() });
        let metrics = slot.metrics.clone();
        let slot = install(&engine, slot);
        let stays = ask(&engine, slot, "stays", 300);
        drop(ask(&engine, slot, "leaves", 300));
        wait_until("the client's leaving is seen", || metrics.cancelled.get() == 1);
        let now = &status(&engine).slots[0];
        assert_eq!((now.running, now.waiting), (1, 0));
        assert!(answer(&stays).ends_with(" length done 5+300"));
        let now = &status(&engine).slots[0];
        assert_eq!((now.running, now.kv_used, now.kv_free), (0, 0, 1024));
    }

    #[test]
    fn a_deadline_ends_a_request_that_runs_and_one_that_waits() {
        let (engine, _thread) = start(DeviceId(0)).unwrap();
        let narrow = ModelSlot { max_running: 1, ..slot(SimSpec { step_us: 2_000, ..spec() }) };
        let slot = install(&engine, narrow);
        let receivers = [0, 1].map(|_| {
            let (mut submit, receiver) = submit(slot, "slow", 400);
            submit.deadline = Instant::now() + Duration::from_millis(60);
            engine.submit(submit).unwrap();
            receiver
        });
        let [runs, waits] = receivers.map(|receiver| answer(&receiver));
        assert!(runs.len() > " Timeout".len() && runs.ends_with(" Timeout"), "{runs}");
        assert_eq!(waits, " Timeout");
    }

    #[test]
    fn a_failing_device_fails_its_requests_and_ends_its_thread() {
        let (engine, thread) = start(DeviceId(0)).unwrap();
        let [broken, whole] = [SimSpec { fail_at: 5, ..spec() }, SimSpec { step_us: 1_000, ..spec() }];
        let [broken, whole] = [broken, whole].map(|spec| install(&engine, slot(spec)));
        let receivers = [ask(&engine, whole, "other model", 400), ask(&engine, broken, "this", 400)];
        for receiver in receivers {
            let line = answer(&receiver);
            assert!(line.ends_with(" EngineLost"), "{line}");
        }
        thread.join().unwrap();
        assert_eq!(engine.submit(submit(whole, "x", 1).0).unwrap_err().kind(), Kind::EngineLost);
    }

    #[test]
    fn a_panic_shows_at_the_join_handle_and_closes_all_channels() {
        let (engine, thread) = start(DeviceId(0)).unwrap();
        let slot = install(&engine, slot(SimSpec { panic_at: 3, ..spec() }));
        assert!(answer(&ask(&engine, slot, "this", 400)).ends_with(" closed"));
        assert!(thread.join().is_err());
    }

    #[test]
    fn texts_and_answers_share_a_device_and_its_end() {
        let (engine, thread) = start(DeviceId(0)).unwrap();
        let spec = SimSpec { step_us: 500, ..spec() };
        let decoder = install(&engine, slot(spec.clone()));
        let encoder = OneShotSlot {
            slot: SlotId::next(),
            model: ModelId::new("encoder"),
            runner: Box::new(SimEncoder::new(SimSpec { fail_at: 6, ..spec }, 4, 64)),
            step_tokens: 8,
            max_queue: 4,
            metrics: metrics(),
        };
        let slot = encoder.slot;
        engine.tell(Command::InstallOneShot(Box::new(encoder))).unwrap();
        let encode = |slot: SlotId, texts: usize| {
            let (answer, receiver) = flume::bounded(1);
            let encode = Encode {
                request: RequestId::random(),
                account: AccountId::new("a"),
                slot,
                texts: vec![Tokens { ids: vec![1; 8], second: 8 }; texts],
                pooling: Pooling::Mean,
                deadline: Instant::now() + Duration::from_secs(60),
                received: Instant::now(),
                answer,
            };
            engine.encode(encode).unwrap();
            move || receiver.recv_timeout(Duration::from_secs(20)).unwrap()
        };
        let text = ask(&engine, decoder, "beside it", 4);
        assert_eq!(encode(slot, 5)().unwrap().len(), 20);
        assert!(answer(&text).ends_with(" length done 9+4"));
        assert_eq!(encode(decoder, 1)().unwrap_err().kind(), Kind::ModelUnavailable, "no encoder");
        assert_eq!(answer(&ask(&engine, slot, "no decoder", 4)), " ModelUnavailable");
        assert_eq!(status(&engine).slots.iter().map(|slot| slot.steps).collect::<Vec<_>>()[1], 5);
        let text = ask(&engine, decoder, "with it", 400);
        assert_eq!(encode(slot, 1)().unwrap_err().kind(), Kind::EngineLost);
        assert!(answer(&text).ends_with(" EngineLost"));
        thread.join().unwrap();
    }

    #[test]
    fn an_idle_thread_shows_that_it_lives() {
        let (engine, _thread) = start(DeviceId(0)).unwrap();
        std::thread::sleep(2 * TICK);
        assert!(engine.silent_for() < 2 * TICK, "{:?}", engine.silent_for());
    }

    #[test]
    fn bad_submissions_are_told_why() {
        let (engine, _thread) = start(DeviceId(0)).unwrap();
        let slot = install(&engine, slot(spec()));
        let check = |change: &dyn Fn(&mut Submit), kind: &str| {
            let (mut submit, receiver) = submit(slot, "hello", 4);
            change(&mut submit);
            engine.submit(submit).unwrap();
            assert_eq!(answer(&receiver), kind);
        };
        check(&|submit| submit.prompt.clear(), " BadInput");
        check(&|submit| submit.prompt.push(257), " BadInput");
        check(&|submit| submit.max_tokens = 0, " BadInput");
        check(&|submit| submit.choices = 0, " BadInput");
        check(&|submit| submit.prompt = vec![1; 512], " ContextLength");
        check(&|submit| submit.slot = SlotId::next(), " ModelUnavailable");
    }

    #[test]
    fn an_answer_has_text_log_probabilities_stop_strings_and_usage() {
        let (engine, _thread) = start(DeviceId(0)).unwrap();
        let slot = install(&engine, slot(spec()));
        let collect = |change: &dyn Fn(&mut Submit)| {
            let (mut submit, receiver) = submit(slot, "a prompt of more than sixteen tokens", 40);
            change(&mut submit);
            engine.submit(submit).unwrap();
            let (mut text, mut tokens, mut finish, mut usage) = (String::new(), Vec::new(), None, Usage::default());
            for event in receiver.iter() {
                match event {
                    Event::Prompt(_) => panic!("nobody asked about the prompt"),
                    Event::Text { text: new, logprobs, .. } => {
                        text += &new;
                        tokens.extend(logprobs);
                    }
                    Event::Finish { reason, stop, .. } => finish = Some((reason, stop)),
                    Event::Done(done) => usage = done,
                    Event::Failed(error) => panic!("{error}"),
                    Event::Tool { .. } => panic!("an engine knows no tools"),
                }
            }
            (text, tokens, finish.unwrap(), usage)
        };
        let (whole, _, finish, usage) = collect(&|_| ());
        assert_eq!((whole.len(), finish), (40, (FinishReason::Length, None)));
        assert_eq!((usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens), (36, 0, 40));

        let stop = whole[17..20].to_owned();
        let at = whole.find(&stop).unwrap();
        let (text, tokens, finish, usage) = collect(&|submit| {
            submit.stop = vec![stop.clone()];
            submit.logprobs = Some(2);
        });
        assert_eq!((text.as_str(), finish), (&whole[..at], (FinishReason::Stop, Some(stop.clone()))));
        assert_eq!((usage.cached_tokens, usage.completion_tokens), (32, at as u32 + 3));
        assert_eq!(tokens.iter().flat_map(|token| token.bytes.clone()).collect::<Vec<_>>(), text.as_bytes());
        for token in tokens {
            assert_eq!((token.top.len(), token.top[0].0), (2, token.token), "greedy takes the best");
            assert!(token.logprob < 0.0 && token.logprob == token.top[0].2);
        }
        let ends = |submit: &mut Submit| submit.sampling.logit_bias = vec![(crate::engine::sim::END, 100.0)];
        let (text, _, finish, usage) = collect(&ends);
        assert_eq!((text.as_str(), finish, usage.completion_tokens), ("", (FinishReason::Stop, None), 1));
        let ignores = |submit: &mut Submit| (ends(submit), submit.sampling.ignore_eos = true).1;
        let (text, _, finish, usage) = collect(&ignores);
        assert_eq!((text.as_str(), finish, usage.completion_tokens), ("", (FinishReason::Length, None), 40));
    }
}
