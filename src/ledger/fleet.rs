//! The thread that asks the fleet's store for leases, and gives back.
//!
//! ```text
//!   calls that wait ─ wake ─┐
//!   some leases in turn ────┴─> asks ─ fleet.lua, many at once ─> heard ─> book ─> calls go on
//!
//!   lost ─ wait, connect, tell all there is ─ wait for others to do so ─> joined ─ error, or too late ─> lost
//! ```
//!
//! - **One round at a time**: what is wanted meanwhile goes with the next, so many calls cost one round trip.
//! - **Who joins tells first and takes later.** A store that was restarted may have lost the latest leases, or all of them. So
//!   whoever lost it tells what it has, and leases nothing until all others had the time to do the same.
//! - **An error is a loss.** A round of which nobody knows whether it was done is no harm: what is told next says all of it.
//! - Keys of one counter lie together, so a cluster is asked like one server.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, watch};
use tokio::time::{sleep, timeout};
use tracing::{error, info, warn};

use crate::base::{Error, Millis};
use crate::ledger::ask::{Ask, Heard, Place};
use crate::ledger::member::Member;
use crate::ledger::shared::{Link, Shared};
use crate::ledger::window::Span;
use crate::net::redis::{Address, Script, Store};

/// Leases are looked at so often.
const TICK: Duration = Duration::from_millis(50);
/// A look at all of them takes so many ticks.
const TICKS: usize = 4;
/// Leases that are looked at at once: at most.
const LOOKS: usize = 1024;
/// How often the store is asked whether it is still the same.
const PULSE: Duration = Duration::from_millis(500);
/// The first wait before a lost store is looked for; each next one is twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(25);
/// The longest one.
const LAST_WAIT: Duration = Duration::from_millis(250);
/// Clocks that differ by more are told of.
const CLOCK_OFF_MS: u64 = 1000;
/// Numbers that Lua counts exactly.
const EXACT: u64 = (1 << 53) - 1;
/// So long what calls take late may still be told of a long window, and of a short one.
const GRACE: (u64, u64) = (48 * 3_600_000, 60_000);

const FORGOTTEN: &str = "it has forgotten what it was told";

/// With whom counters are shared.
#[derive(Debug, Clone)]
pub struct Fleet {
    /// Where the store is. Its timeout is how long a call waits for a lease, too.
    pub store: Address,
    /// What the keys of this fleet begin with.
    pub name: String,
    /// Of what is left of a limit, a daemon leases at most this part ahead of need.
    pub share: f64,
    /// What becomes of calls without a lease while the store does not answer.
    pub on_loss: OnLoss,
}

/// What becomes of calls without a lease while the store does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnLoss {
    /// They are refused.
    Refuse,
    /// They go on, within limits that count for this daemon alone, and are told when it is back.
    Local,
}

/// See the top of this file.
pub(super) struct Keeper {
    shared: Arc<Shared>,
    fleet: Fleet,
    folder: Option<PathBuf>,
    member: Member,
    /// Of the last ask.
    count: u64,
    script: Script,
    pulse: Script,
    /// A number that the store made up when it was empty.
    store_is: Option<i64>,
    wake: Arc<Notify>,
    is_closing: Arc<AtomicBool>,
    rounds: watch::Sender<u64>,
}

/// Why a connection is given up.
enum Lost {
    Closed,
    Error(String),
}

impl Keeper {
    /// One for a ledger whose link is made at the same time.
    ///
    /// # Errors
    /// When the folder cannot be written to.
    pub(super) fn new(
        fleet: Fleet,
        folder: Option<PathBuf>,
    ) -> Result<(Link, impl FnOnce(Arc<Shared>) -> Self), Error> {
        fleet.store.check().map_err(|error| Error::bad_input(format!("The fleet's store: {error}.")))?;
        let member = match &folder {
            Some(folder) => Member::next(folder)
                .map_err(|error| Error::bad_input(format!("The ledger's folder {}: {error}.", folder.display())))?,
            None => Member::new(),
        };
        let (wake, is_closing) = (Arc::new(Notify::new()), Arc::new(AtomicBool::new(false)));
        let (rounds, seen) = watch::channel(0);
        let patience = fleet.store.timeout;
        let link = Link { wake: wake.clone(), rounds: seen, patience, is_closing: is_closing.clone() };
        let (script, pulse) = (Script::new(include_str!("fleet.lua")), Script::new(include_str!("pulse.lua")));
        let (count, store_is) = (0, None);
        let keeper = move |shared| Self {
            shared,
            fleet,
            folder,
            member,
            count,
            script,
            pulse,
            store_is,
            wake,
            is_closing,
            rounds,
        };
        Ok((link, keeper))
    }

    /// Works until it is closed.
    pub(super) fn run(mut self) {
        match tokio::runtime::Builder::new_current_thread().enable_all().build() {
            Ok(runtime) => runtime.block_on(self.keep()),
            Err(error) => error!(%error, "the fleet's thread cannot work: no leases are asked for"),
        }
    }

    async fn keep(&mut self) {
        let (mut wait, mut is_told) = (FIRST_WAIT, false);
        while !self.is_closing() {
            let lost = match self.fleet.store.open().await {
                Ok(mut store) => match self.join(&mut store).await {
                    Ok(()) => {
                        info!(fleet = self.fleet.name, "the fleet's store answers: limits are shared");
                        (wait, is_told) = (FIRST_WAIT, false);
                        self.lease(&mut store).await
                    }
                    Err(lost) => lost,
                },
                Err(error) => Lost::Error(error.to_string()),
            };
            let Lost::Error(error) = lost else { break };
            if !std::mem::replace(&mut is_told, true) {
                warn!(%error, on_loss = ?self.fleet.on_loss, "the fleet's store does not answer: what is leased is used up, then it is as `on_loss` says");
            }
            self.lost(Some(&error));
            let _ = timeout(wait, self.wake.notified()).await;
            wait = (wait * 2).min(LAST_WAIT);
        }
        self.lost(None);
    }

    /// Tells the store what this daemon has, and waits until others have, too.
    async fn join(&mut self, store: &mut Store) -> Result<(), Lost> {
        store.load(&self.script).await.map_err(lost)?;
        self.store_is = None;
        self.pulse(store).await?;
        let mut rest = self.shared.fleet(|book, _| book.leases().map_or(0, |leases| leases.len())).unwrap_or(0);
        while rest > 0 {
            self.round(store, LOOKS).await?;
            rest = rest.saturating_sub(LOOKS);
        }
        // Others learn of a loss as late as that, if they can.
        let settled = Instant::now() + PULSE + LAST_WAIT + self.fleet.store.timeout * 2;
        while let Some(left) = settled.checked_duration_since(Instant::now()) {
            if self.is_closing() {
                return Ok(());
            }
            sleep(left.min(TICK)).await;
            self.round(store, self.looks()).await?;
        }
        self.shared.fleet(|book, health| {
            book.leases().into_iter().for_each(|leases| leases.joined());
            (health.is_up, health.fault) = (true, None);
        });
        Ok(())
    }

    async fn lease(&mut self, store: &mut Store) -> Lost {
        let (mut ticked, mut pulsed) = (Instant::now(), Instant::now());
        while !self.is_closing() {
            let _ = timeout(TICK.saturating_sub(ticked.elapsed()), self.wake.notified()).await;
            let mut looks = 0;
            if ticked.elapsed() >= TICK {
                (ticked, looks) = (Instant::now(), self.looks());
            }
            let mut done = self.round(store, looks).await;
            if done.is_ok() && pulsed.elapsed() >= PULSE {
                pulsed = Instant::now();
                done = self.pulse(store).await;
            }
            if let Err(lost) = done {
                return lost;
            }
        }
        self.shared.fleet(|book, _| book.leases().into_iter().for_each(|leases| leases.leave()));
        let mut rest = self.shared.fleet(|book, _| book.leases().map_or(0, |leases| leases.len())).unwrap_or(0);
        while rest > 0 {
            if let Err(lost) = self.round(store, LOOKS).await {
                return lost;
            }
            rest = rest.saturating_sub(LOOKS);
        }
        Lost::Closed
    }

    /// Asks for what is wanted, and for so many leases in turn.
    async fn round(&mut self, store: &mut Store, looks: usize) -> Result<(), Lost> {
        let now = Millis::now();
        let asked = self.shared.fleet(|book, health| {
            let asks = book.asks(now, looks);
            let leases = book.leases()?;
            health.asks += asks.len() as u64;
            health.rounds += u64::from(!asks.is_empty());
            health.leases = leases.len() as u64;
            Some((asks, leases.asked()))
        });
        let Some(Some((asks, round))) = asked else { return Err(Lost::Closed) };
        let mut words = Vec::with_capacity(asks.len());
        for ask in &asks {
            self.count += 1;
            words.push(self.words(ask, now));
        }
        let answers = join_all(words.iter().map(|(keys, arguments)| {
            let (mut store, script) = (store.clone(), &self.script);
            async move { store.run(script, keys, arguments).await }
        }));
        let answers = timeout(self.fleet.store.timeout, answers).await;
        let answers = answers.map_err(|_| lost("it does not answer in time"))?;
        let mut heard = Vec::with_capacity(asks.len());
        for (ask, answer) in asks.iter().zip(answers) {
            match heard_of(ask, &answer.map_err(lost)?) {
                Some(one) => heard.push(one),
                None => return Err(self.renamed()),
            }
        }
        let now = Millis::now();
        let is_remembered = self.shared.fleet(|book, _| {
            // All of them, whatever the first says.
            let mut is_remembered = true;
            heard.iter().for_each(|heard| is_remembered &= book.hear(heard, now));
            is_remembered
        });
        if is_remembered != Some(true) {
            return Err(lost(FORGOTTEN));
        }
        self.rounds.send_replace(round);
        Ok(())
    }

    /// An ask in the words of `fleet.lua`.
    fn words(&self, ask: &Ask, now: Millis) -> (Vec<String>, Vec<String>) {
        let name = &self.fleet.name;
        let counter = match (&ask.place, ask.span) {
            (Place::Window(id, _), Span::Millis(length)) => format!("{name}:{{{id:032x}:{length}}}"),
            (Place::Window(id, _), Span::Month) => format!("{name}:{{{id:032x}:month}}"),
            (Place::Allocation(account), _) => {
                // Whatever stands in it.
                format!("{name}:{{allocation:{}}}", &blake3::hash(account.as_str().as_bytes()).to_hex()[..32])
            }
        };
        let keys = (0..3).map(|back| format!("{counter}:{}", ask.index.saturating_sub(back))).collect();
        let daemon = match ask.epoch {
            0 => self.member.name.clone(),
            epoch => format!("{}/{}/{epoch}", self.member.name, self.member.process),
        };
        let exact = |value: u64| value.min(EXACT).to_string();
        let (overlap, length) = ask.fade.unwrap_or((0, 0));
        let grace = if ask.span.is_durable() { GRACE.0 } else { GRACE.1 };
        let forgotten = ask.span.start(ask.index.saturating_add(3)).0.saturating_add(grace).saturating_sub(now.0);
        let arguments = vec![
            daemon,
            self.member.process.to_string(),
            self.count.to_string(),
            u8::from(ask.adopts).to_string(),
            exact(ask.keep),
            exact(ask.need),
            exact(ask.ahead),
            ask.limit.map_or("-1".to_owned(), exact),
            overlap.to_string(),
            length.to_string(),
            self.fleet.share.to_string(),
            exact(forgotten.max(1)),
        ];
        (keys, arguments)
    }

    /// Whether the store is the one that was told, and what its clock says.
    async fn pulse(&mut self, store: &mut Store) -> Result<(), Lost> {
        let began = Millis::now();
        let key = format!("{}:{{store}}", self.fleet.name);
        let mine = (uuid::Uuid::new_v4().as_u128() as u64 & EXACT).to_string();
        let answer = timeout(self.fleet.store.timeout, store.run(&self.pulse, &[key], &[mine])).await;
        let answer = answer.map_err(|_| lost("it does not answer in time"))?.map_err(lost)?;
        let (&[is, seconds, micros], ours) = (&answer[..], Millis::now()) else {
            return Err(lost("it answers something else"));
        };
        if *self.store_is.get_or_insert(is) != is {
            return Err(lost(FORGOTTEN));
        }
        // Somewhere between the two it was read.
        let theirs = u64::try_from(seconds * 1000 + micros / 1000).unwrap_or(0);
        let off = began.0.saturating_sub(theirs).max(theirs.saturating_sub(ours.0));
        let before = self.shared.fleet(|_, health| std::mem::replace(&mut health.clock_off_ms, off)).unwrap_or(0);
        if off > CLOCK_OFF_MS && before <= CLOCK_OFF_MS {
            warn!(
                off_ms = off,
                "this clock and that of the fleet's store differ: windows begin at different times; set the clocks"
            );
        }
        Ok(())
    }

    /// Somebody else asks under this name.
    fn renamed(&mut self) -> Lost {
        error!("another daemon has this one's name in the fleet: its ledger folder was copied; this one takes another");
        if let Err(error) = self.member.rename(self.folder.as_deref()) {
            error!(%error, "the new name cannot be written down");
        }
        self.count = 0;
        lost("another daemon has this one's name")
    }

    fn lost(&self, error: Option<&str>) {
        let round = self.shared.fleet(|book, health| {
            health.losses += u64::from(health.is_up && error.is_some());
            health.is_up = false;
            health.fault = error.map(Into::into);
            let leases = book.leases()?;
            leases.parted();
            Some(leases.asked())
        });
        // Whoever waits looks again.
        self.rounds.send_replace(round.flatten().unwrap_or(u64::MAX));
    }

    fn looks(&self) -> usize {
        let leases = self.shared.fleet(|book, _| book.leases().map_or(0, |leases| leases.len()));
        leases.unwrap_or(0).div_ceil(TICKS).min(LOOKS)
    }

    fn is_closing(&self) -> bool {
        self.is_closing.load(Ordering::Relaxed)
    }
}

fn lost(error: impl ToString) -> Lost {
    Lost::Error(error.to_string())
}

/// What the store said; `None`: somebody else asks under this name.
fn heard_of(ask: &Ask, answer: &[i64]) -> Option<Heard> {
    let number = |at: usize| answer.get(at).and_then(|value| u64::try_from(*value).ok()).unwrap_or(0);
    (number(0) == 1).then(|| Heard {
        place: ask.place.clone(),
        index: ask.index,
        epoch: ask.epoch,
        grant: number(1),
        others: number(2),
        carried: number(3),
        before: number(4),
        is_short: number(5) == 1,
        is_hungry: number(6) == 1,
        is_known: number(7) == 1,
    })
}

#[cfg(test)]
#[path = "fleet_test.rs"]
mod tests;
