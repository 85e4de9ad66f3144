//! What the engine thread is told, and the handle that tells it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{SendTimeoutError, Sender, TrySendError};

use crate::base::{DeviceId, Result, SlotId};
use crate::engine::oneshot::{Encode, OneShotSlot};
use crate::engine::refusal::{full, lost};
use crate::engine::slot::{EngineStatus, ModelSlot};
use crate::engine::submit::Submit;

/// A message to the engine thread.
pub enum Command {
    /// A new request.
    Submit(Box<Submit>),
    /// A new request for a model that answers in one pass.
    Encode(Box<Encode>),
    /// A model made ready elsewhere; takes requests from the next step on.
    Install(Box<ModelSlot>),
    /// The same for one that answers in one pass.
    InstallOneShot(Box<OneShotSlot>),
    /// Take no new requests for this slot, finish what it has, free it, then drop `done`.
    Retire {
        /// Which slot.
        slot: SlotId,
        /// Dropped when the slot is gone.
        done: flume::Sender<()>,
    },
    /// Write the state of every slot to the log and send it back.
    Dump(flume::Sender<EngineStatus>),
    /// Finish what is running if `drain`, else fail it; then end the thread.
    Stop {
        /// Whether running requests may end well.
        drain: bool,
    },
}

/// The handle of a device's thread.
#[derive(Clone)]
pub struct Engine {
    device: DeviceId,
    inbox: Sender<Command>,
    heartbeat: Arc<AtomicU64>,
    started: Instant,
    /// Calls that are on their way here.
    coming: Arc<AtomicUsize>,
}

/// A call on its way to an engine.
pub struct Coming(Arc<AtomicUsize>);

impl Drop for Coming {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Engine {
    /// For the thread's starter: the handle of an inbox. `heartbeat` is milliseconds since `started`, stored by the
    /// thread at least once a second while it lives.
    pub(super) fn new(device: DeviceId, inbox: Sender<Command>, heartbeat: Arc<AtomicU64>, started: Instant) -> Self {
        Self { device, inbox, heartbeat, started, coming: Arc::default() }
    }

    /// Which device.
    pub fn device(&self) -> DeviceId {
        self.device
    }

    /// Hands a request over; its events follow on its own channel. If the slot is not there any more, that is a
    /// `Failed` of `ModelUnavailable`: look the model up again, a newer version may be serving.
    ///
    /// # Errors
    /// `Busy` when the inbox is full, `EngineLost` when the thread is gone.
    pub fn submit(&self, submit: Submit) -> Result<()> {
        self.tell(Command::Submit(Box::new(submit)))
    }

    /// Hands texts over; the answer follows on their own channel, with the same meaning of errors.
    ///
    /// # Errors
    /// As [`Engine::submit`].
    pub fn encode(&self, encode: Encode) -> Result<()> {
        self.tell(Command::Encode(Box::new(encode)))
    }

    /// Sends any command without waiting.
    ///
    /// # Errors
    /// `Busy` when the inbox is full, `EngineLost` when the thread is gone.
    pub fn tell(&self, command: Command) -> Result<()> {
        self.inbox.try_send(command).map_err(|error| match error {
            TrySendError::Full(_) => full(),
            TrySendError::Disconnected(_) => lost(),
        })
    }

    /// Sends any command, waiting for room; never from an async thread.
    ///
    /// # Errors
    /// As [`Engine::tell`], `Busy` only after `patience`.
    pub fn tell_within(&self, command: Command, patience: Duration) -> Result<()> {
        self.inbox.send_timeout(command, patience).map_err(|error| match error {
            SendTimeoutError::Timeout(_) => full(),
            SendTimeoutError::Disconnected(_) => lost(),
        })
    }

    /// A call will come here, and counts until what this returns is dropped, or the call is sent: whatever is done before.
    pub fn expect(&self) -> Coming {
        self.coming.fetch_add(1, Ordering::Relaxed);
        Coming(self.coming.clone())
    }

    /// Calls that are on their way or sent and not looked at yet.
    pub fn backlog(&self) -> usize {
        self.coming.load(Ordering::Relaxed) + self.inbox.len()
    }

    /// How long ago the thread last came round its loop.
    pub fn silent_for(&self) -> Duration {
        let last = Duration::from_millis(self.heartbeat.load(Ordering::Relaxed));
        self.started.elapsed().saturating_sub(last)
    }
}
