//! The loop of a device's thread: take what callers say, then one step of each model that has work, round and round.
//!
//!     ┌─> inbox (blocks only when all lanes are idle) ─> each busy lane: plan, compute, deliver ─> reap ─┐
//!     └──────────────────────────────────── heartbeat ──────────────────────────────────────────────────┘
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

use crate::base::{DeviceId, Error, Kind, Result};
use crate::engine::lane::{Lane, unavailable};
use crate::engine::{Command, Engine, EngineStatus};
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
    lane: Lane,
    /// Dropped with the lane.
    done: Vec<flume::Sender<()>>,
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
            Command::Submit(submit) => {
                let lane = self.lanes.iter_mut().find(|busy| busy.lane.id() == submit.slot);
                match lane {
                    _ if self.draining => refuse(&submit.events, shutting_down()),
                    Some(busy) => busy.lane.submit(*submit, Instant::now()),
                    None => refuse(&submit.events, unavailable()),
                }
            }
            Command::Install(slot) => {
                tracing::info!(device = %self.device, slot = slot.slot.0, model = %slot.model, blocks = slot.runner.blocks(), "installed");
                self.lanes.push(Busy { lane: Lane::new(*slot), done: Vec::new() });
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
            let begun = Instant::now();
            if busy.lane.is_idle() || !busy.lane.plan(begun) {
                continue;
            }
            busy.lane.compute()?;
            busy.lane.deliver(Instant::now());
            busy.lane.step_took(begun.elapsed());
        }
        Ok(())
    }

    /// Ends everything with this error: what is under way, and what still lies in the inbox.
    fn fail(&mut self, error: &Error) {
        self.lanes.iter_mut().for_each(|busy| busy.lane.fail(error));
        for command in self.inbox.try_iter() {
            if let Command::Submit(submit) = command {
                refuse(&submit.events, error.clone());
            }
        }
    }
}

fn refuse(events: &flume::Sender<Event>, error: Error) {
    // A receiver that is gone needs no answer.
    let _ = events.try_send(Event::Failed(error));
}

fn shutting_down() -> Error {
    Error::new(Kind::ShuttingDown, "The server is shutting down; try again in a moment.")
        .with_retry_after(Duration::from_secs(5))
}
