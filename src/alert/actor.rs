//! The actor that looks at the rules and sends couriers out, and the handle callers hold.
//!
//! ```text
//!   tick ──> source ──> Rules::step ──> Outbox ──> file ──> couriers, one a channel:  head ──send──> delivered: next
//!    ^                                                            ^                       └── failed: rest, again
//!    └── every                                                    └──────────────────────────────────┘
//! ```
//!
//! One thread: it may wait for the disk and for the source, and nobody waits for it. Of what a channel cannot take, 256 notices
//! wait; the oldest goes then and is counted. Where the disk cannot be written to, notices go out all the same: a full disk may
//! be what they are about.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;

use actix::prelude::*;
use serde::Serialize;
use tracing::{error, info, warn};

use super::courier::{ChannelStatus, Courier, Verdict};
use super::failure::Failure;
use super::keep::{Keep, Kept};
use super::notice::{Event, Notice};
use super::outbox::Outbox;
use super::rules::{Reading, RuleStatus, Rules};
use super::send::Sender;
use super::settings::{Channel, Measure, Settings};
use crate::base::{Error, Kind, Millis, Result};
use crate::net::client::Client;

/// Questions waiting at most; who asks waits in line behind it.
const MAILBOX: usize = 64;
/// Looks between two that count as time, at most.
const STEPS: u32 = 3;
/// What changes without anything being told is kept this often, in milliseconds.
const KEEP_EVERY: u64 = 60_000;
/// Where figures come from: asked on every look for each rule's measure, on the actor's thread. Nothing: there is no reading. A
/// measure of several things is answered with all of them, also those that are well: what is left out is not known to be well.
pub type Source = Box<dyn FnMut(&Measure, Millis) -> Vec<Reading> + Send>;

/// The module's whole outside. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Alerts {
    addr: Addr<AlertActor>,
}

/// How everything is.
#[derive(Clone, PartialEq, Debug, Serialize)]
pub struct Status {
    /// Rules, in their order.
    pub rules: Vec<RuleStatus>,
    /// Channels, in their order.
    pub channels: Vec<ChannelStatus>,
    /// What keeps alerts from working as they should, and what to do.
    pub trouble: Option<String>,
}

impl Alerts {
    /// Goes on where the folder says an earlier process left off, on a thread of its own.
    ///
    /// # Errors
    /// `BadInput` when something of the settings cannot be meant, or the folder cannot be used.
    pub fn start(settings: Settings, source: Source) -> Result<Self> {
        settings.check()?;
        let place = match &settings.folder {
            None => Place::Memory,
            Some(folder) => Place::open(folder.clone())?,
        };
        let arbiter = Arbiter::new();
        let addr = AlertActor::start_in_arbiter(&arbiter.handle(), move |ctx| {
            ctx.set_mailbox_capacity(MAILBOX);
            AlertActor::new(settings, source, place)
        });
        Ok(Self { addr })
    }

    /// How rules and channels are.
    ///
    /// # Errors
    /// `Internal` when the actor has died.
    pub async fn status(&self) -> Result<Status> {
        self.addr.send(GetStatus).await.map_err(dead)
    }

    /// Tells nobody of a rule until then, by the clock. What fires meanwhile and still does then is told then; that something
    /// is over is told at once if it was told that it began. On disk when this returns.
    ///
    /// # Errors
    /// `NotFound` when there is no such rule, `Busy` while another process watches; otherwise as [`Alerts::status`].
    pub async fn silence(&self, rule: &str, until: Millis) -> Result<()> {
        self.addr.send(Silence { rule: rule.to_owned(), until: Some(until) }).await.map_err(dead)?
    }

    /// Tells of a rule again. One that is not silenced is none the worse for it.
    ///
    /// # Errors
    /// As [`Alerts::silence`].
    pub async fn unsilence(&self, rule: &str) -> Result<()> {
        self.addr.send(Silence { rule: rule.to_owned(), until: None }).await.map_err(dead)?
    }

    /// Sends a message that nothing is wrong, at once and once.
    ///
    /// # Errors
    /// `NotFound` when there is no such channel; `Unreachable` with the reason when it was not delivered.
    pub async fn try_channel(&self, channel: &str) -> Result<()> {
        self.addr.send(TryChannel(channel.to_owned())).await.map_err(dead)?
    }

    /// Other rules and channels from now on. Rules that keep their names go on as they are, and so does what waits for
    /// channels that keep theirs. The folder stays what it was at the start.
    ///
    /// # Errors
    /// As [`Alerts::start`]; everything stays as it was then.
    pub async fn reconfigure(&self, settings: Settings) -> Result<()> {
        settings.check()?;
        self.addr.send(Reconfigure(settings)).await.map_err(dead)
    }

    /// Keeps how everything is: for the end of the process. What is not delivered yet is, after the next start.
    ///
    /// # Errors
    /// As [`Alerts::status`].
    pub async fn flush(&self) -> Result<()> {
        self.addr.send(Flush).await.map_err(dead)
    }
}

fn dead(error: MailboxError) -> Error {
    Error::internal("The keeper of alerts is not answering.").with_source(error)
}

/// Where it is kept what was told.
enum Place {
    Memory,
    /// Another process watches still.
    Taken(PathBuf),
    Ours(Keep, Option<Kept>),
}

impl Place {
    fn open(folder: PathBuf) -> Result<Self> {
        Ok(match Keep::open(&folder)? {
            Some((keep, kept)) => Self::Ours(keep, Some(kept)),
            None => Self::Taken(folder),
        })
    }
}

struct AlertActor {
    settings: Settings,
    source: Source,
    place: Place,
    rules: Rules,
    outbox: Outbox,
    couriers: Vec<Courier>,
    /// Changes with the couriers: what those before them report is no news of these.
    generation: u32,
    client: Client,
    kept_at: Millis,
    disk: Option<String>,
    has_panicked: bool,
}

impl Actor for AlertActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.restore();
        self.pump(ctx);
        ctx.run_later(self.settings.every, Self::tick);
    }
}

impl AlertActor {
    fn new(settings: Settings, source: Source, place: Place) -> Self {
        let client = Client::new(settings.http.clone());
        let rules = Rules::new(settings.rules.clone(), Default::default(), settings.every.saturating_mul(STEPS));
        let mut actor = Self {
            settings,
            source,
            place,
            rules,
            outbox: Outbox::default(),
            couriers: Vec::new(),
            generation: 0,
            client,
            kept_at: Millis(0),
            disk: None,
            has_panicked: false,
        };
        actor.hire();
        actor
    }

    /// Couriers for the channels of the settings, which were checked.
    fn hire(&mut self) {
        self.generation += 1;
        let courier = |channel: &Channel| {
            let sender = Sender::new(&channel.to).inspect_err(|error| error!(channel = channel.name, %error)).ok()?;
            Some(Courier::new(&channel.name, sender))
        };
        self.couriers = self.settings.channels.iter().filter_map(courier).collect();
    }

    /// Goes on with what was kept, once.
    fn restore(&mut self) {
        let Place::Ours(_, kept) = &mut self.place else { return };
        let Some(Kept { rules, outbox, .. }) = kept.take() else { return };
        self.rules = Rules::new(self.settings.rules.clone(), rules, self.settings.every.saturating_mul(STEPS));
        self.outbox = outbox;
        self.drop_strangers();
    }

    fn drop_strangers(&mut self) {
        let channels = &self.settings.channels;
        let gone = self.outbox.keep(|name| channels.iter().any(|channel| channel.name == name));
        if gone > 0 {
            warn!(notices = gone, "alerts for channels that are no more are not delivered");
        }
    }

    fn tick(&mut self, ctx: &mut Context<Self>) {
        ctx.run_later(self.settings.every, Self::tick);
        self.client.sweep();
        if let Place::Taken(folder) = &self.place {
            match Place::open(folder.clone()) {
                Ok(Place::Ours(keep, kept)) => self.place = Place::Ours(keep, kept),
                // Until the predecessor has left, or the folder can be used again.
                _ => return,
            }
            self.restore();
        }
        self.look(Millis::now());
        self.pump(ctx);
    }

    fn look(&mut self, now: Millis) {
        let source = &mut self.source;
        let mut has_panicked = false;
        let mut ask = |measure: &Measure| {
            catch_unwind(AssertUnwindSafe(|| source(measure, now))).unwrap_or_else(|_| {
                has_panicked = true;
                Vec::new()
            })
        };
        let readings: Vec<_> = self.rules.rules().map(|rule| ask(&rule.measure)).collect();
        self.has_panicked = has_panicked;
        let notices = self.rules.step(now, &readings);
        let is_news = !notices.is_empty();
        notices.into_iter().for_each(|notice| self.post(notice));
        // A clock that was set back must not keep anything from being kept.
        if is_news || now.0.abs_diff(self.kept_at.0) >= KEEP_EVERY {
            self.keep(now);
        }
    }

    /// Into the outboxes of its rule's channels.
    fn post(&mut self, notice: Notice) {
        let Notice { rule, id, event, .. } = &notice;
        let title = notice.title();
        match event {
            Event::Resolved => info!(rule, id, title, "alert"),
            _ => warn!(rule, id, title, "alert"),
        }
        let notice = Arc::new(notice);
        let wanted = self.rules.rules().find(|rule| rule.name == notice.rule).map(|rule| rule.channels.as_slice());
        let is_wanted = |name: &String| wanted.is_none_or(|names| names.is_empty() || names.contains(name));
        for courier in self.couriers.iter_mut().filter(|courier| is_wanted(&courier.status.channel)) {
            let lost = self.outbox.push(&courier.status.channel, notice.clone());
            if lost > 0 {
                warn!(channel = courier.status.channel, lost, "too many alerts wait: the oldest are not delivered");
            }
            courier.status.lost += lost;
        }
    }

    fn keep(&mut self, now: Millis) {
        let Place::Ours(keep, _) = &mut self.place else { return };
        self.kept_at = now;
        let written = keep.write(&Kept::new(self.rules.saved(), self.outbox.clone()));
        self.disk = written.map_err(|error| error.to_string()).err();
        if let Some(error) = &self.disk {
            error!(error, "alerts cannot be kept on disk: after a crash they may be told again");
        }
    }

    /// Sends out every courier that is free and has something to deliver.
    fn pump(&mut self, ctx: &mut Context<Self>) {
        let generation = self.generation;
        for (index, courier) in self.couriers.iter_mut().enumerate().filter(|(_, courier)| courier.is_free) {
            let Some(notice) = self.outbox.head(&courier.status.channel).cloned() else { continue };
            courier.is_free = false;
            let (sender, client) = (courier.sender.clone(), self.client.clone());
            let instance = self.settings.instance.clone();
            let channel = courier.status.channel.clone();
            let delivery = async move {
                let outcome = sender.send(&notice, &instance, &client).await;
                (notice.id.clone(), channel, outcome)
            };
            ctx.spawn(fut::wrap_future::<_, Self>(delivery).map(move |(id, channel, outcome), this, ctx| {
                let index = (generation == this.generation).then_some(index);
                this.returned(index, &channel, &id, outcome, ctx);
            }));
        }
    }

    /// A courier is back; without a place, it is one of those before.
    fn returned(
        &mut self,
        index: Option<usize>,
        channel: &str,
        id: &str,
        outcome: Result<(), Failure>,
        ctx: &mut Context<Self>,
    ) {
        let now = Millis::now();
        let courier = index.and_then(|index| self.couriers.get_mut(index));
        let verdict = match courier {
            Some(courier) => courier.returned(id, outcome, self.settings.retry, now),
            None if outcome.is_ok() => Verdict::Done,
            None => return,
        };
        match verdict {
            Verdict::Done => {
                self.outbox.remove(channel, id);
                self.keep(now);
                self.pump(ctx);
            }
            Verdict::Rest(rest) => {
                let generation = self.generation;
                ctx.run_later(rest, move |this, ctx| {
                    let courier = index.filter(|_| generation == this.generation);
                    if let Some(courier) = courier.and_then(|index| this.couriers.get_mut(index)) {
                        courier.is_free = true;
                    }
                    this.pump(ctx);
                });
            }
        }
    }

    fn status(&self) -> Status {
        let channels = self.couriers.iter().map(|courier| {
            let waiting = self.outbox.waiting(&courier.status.channel);
            ChannelStatus { waiting, ..courier.status.clone() }
        });
        Status { rules: self.rules.status(Millis::now()), channels: channels.collect(), trouble: self.trouble() }
    }

    fn trouble(&self) -> Option<String> {
        if let Place::Taken(folder) = &self.place {
            let name = folder.display();
            return Some(format!(
                "Another process watches with the folder {name}; this one goes on when that has ended."
            ));
        }
        if let Some(error) = &self.disk {
            let words = "What was told cannot be kept on disk, so that after a crash it may be told again";
            return Some(format!("{words}: {error}. Make room, or make alerts.folder writable."));
        }
        self.has_panicked.then(|| "A figure could not be computed; the log says where. Please report it.".to_owned())
    }

    fn courier(&self, channel: &str) -> Result<&Courier> {
        let courier = self.couriers.iter().find(|courier| courier.status.channel == channel);
        courier.ok_or_else(|| {
            let names = self.couriers.iter().map(|courier| courier.status.channel.as_str()).collect::<Vec<_>>();
            let words = format!("There is no channel \"{channel}\". There are: {}.", names.join(", "));
            Error::new(Kind::NotFound, words)
        })
    }
}

#[derive(Message)]
#[rtype(result = "Status")]
struct GetStatus;

#[derive(Message)]
#[rtype(result = "Result<()>")]
struct Silence {
    rule: String,
    /// `None`: no longer.
    until: Option<Millis>,
}

#[derive(Message)]
#[rtype(result = "Result<()>")]
struct TryChannel(String);

#[derive(Message)]
#[rtype(result = "()")]
struct Reconfigure(Settings);

#[derive(Message)]
#[rtype(result = "()")]
struct Flush;

impl Handler<GetStatus> for AlertActor {
    type Result = MessageResult<GetStatus>;
    fn handle(&mut self, _: GetStatus, _: &mut Context<Self>) -> Self::Result {
        MessageResult(self.status())
    }
}

impl Handler<Silence> for AlertActor {
    type Result = Result<()>;
    fn handle(&mut self, Silence { rule, until }: Silence, _: &mut Context<Self>) -> Result<()> {
        if let (Place::Taken(_), Some(trouble)) = (&self.place, self.trouble()) {
            return Err(Error::new(Kind::Busy, trouble));
        }
        let is_known = match until {
            Some(until) => self.rules.silence(&rule, until),
            None => self.rules.unsilence(&rule),
        };
        if !is_known {
            let names = self.rules.rules().map(|rule| rule.name.as_str()).collect::<Vec<_>>();
            let words = format!("There is no rule \"{rule}\". There are: {}.", names.join(", "));
            return Err(Error::new(Kind::NotFound, words));
        }
        info!(rule, ?until, "a silence was changed");
        self.keep(Millis::now());
        Ok(())
    }
}

impl Handler<TryChannel> for AlertActor {
    type Result = ResponseFuture<Result<()>>;
    fn handle(&mut self, TryChannel(channel): TryChannel, _: &mut Context<Self>) -> Self::Result {
        let sender = match self.courier(&channel) {
            Ok(courier) => courier.sender.clone(),
            Err(error) => return Box::pin(async { Err(error) }),
        };
        let (instance, client) = (self.settings.instance.clone(), self.client.clone());
        Box::pin(async move {
            let outcome = sender.send(&Notice::test(Millis::now()), &instance, &client).await;
            let wrong = |failure: Failure| {
                Error::new(Kind::Unreachable, format!("The channel \"{channel}\" did not take it: {}.", failure.why))
            };
            outcome.map_err(wrong)
        })
    }
}

impl Handler<Reconfigure> for AlertActor {
    type Result = ();
    fn handle(&mut self, Reconfigure(settings): Reconfigure, ctx: &mut Context<Self>) {
        self.rules = Rules::new(settings.rules.clone(), self.rules.saved(), settings.every.saturating_mul(STEPS));
        self.client = Client::new(settings.http.clone());
        self.settings = settings;
        self.hire();
        self.drop_strangers();
        self.keep(Millis::now());
        self.pump(ctx);
    }
}

impl Handler<Flush> for AlertActor {
    type Result = ();
    fn handle(&mut self, _: Flush, _: &mut Context<Self>) {
        self.keep(Millis::now());
    }
}
