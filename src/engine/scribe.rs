//! Writes down what was drawn while the device computes the next step: text, stop strings, events.
//!
//! ```text
//! engine   deliver ─ page ─┐      plan ─ forward ─ sample ─┐ join            deliver ─ page ─┐
//!                          ↓                               ↑ page: who ended, buffers         ↓
//! scribe                   └─ tokens to text, to events ───┘                                  └─ …
//! ```
//!
//! A step is one [`Page`]: plain lines in buffers that go back and forth, so that handing a step over is one message, one
//! wake, and no allocation. The answers travel along, so nobody locks anything, and whoever has them may write: a page of a
//! few lines is written where it is, in less time than it takes to wake a thread. One page is out at most. The engine waits
//! for it after its forward pass, so a scribe that is behind holds the device up and never falls further back; a client that
//! is behind holds up nobody, since its channel has room for all.
//!
//! The engine knows of every end but one without a text: a stop string. The page brings it back, a step late at most. What
//! was computed for such a choice meanwhile is neither sent nor billed, and its blocks are free after that step.
//!
//! Without a thread, which is how simulations and tests want it, every page is written where it is: the same code, and
//! nothing depends on when threads run.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};

use crate::base::{Error, RequestId, Result};
use crate::engine::refusal::lost;
use crate::engine::reply::{Heard, Reply, Said};
use crate::engine::sampler::Drawn;
use crate::engine::scheduler::Planned;
use crate::engine::sequence::RequestKey;
use crate::metrics::EngineMetrics;

/// Lines from which on a page is handed over: about as many are written in the time that it takes to wake a thread. Figures:
/// `benches/scheduler.rs`.
pub(super) const WORTH_A_WAKE: usize = 16;

/// The engine's end of what is written.
pub(super) struct Scribe {
    /// Away with the page that is out.
    replies: Option<Box<Replies>>,
    thread: Option<Thread>,
    /// Lines of a page that is handed over, at least.
    least: usize,
    /// What is to be written next.
    page: Page,
    /// The buffers of the other page, while it is not out.
    spare: Option<Page>,
    stopped: Vec<Stopped>,
    metrics: EngineMetrics,
    /// Its thread died.
    lost: bool,
}

/// A page that is out, and all answers.
struct Work {
    page: Page,
    replies: Box<Replies>,
}

/// What one step has to say.
struct Page {
    /// When its tokens were drawn.
    drawn: Instant,
    lines: Vec<Line>,
    /// Rivals of the tokens, those of one line after the other.
    rivals: Vec<(u32, f32)>,
    /// It cannot wait for a later step.
    is_due: bool,
    /// Written by the scribe: choices that the engine does not know to be complete.
    stopped: Vec<Stopped>,
}

enum Line {
    /// A request was taken in.
    Open { request: RequestKey, reply: Option<Box<Reply>> },
    /// Its first token is computed, so many were cached.
    Begin { request: RequestKey, cached: u32 },
    /// The next token of its prompt, with as many rivals as are told.
    LookedUp { request: RequestKey, token: u32, logprob: f32, rank: u32, rivals: u32 },
    /// The next token of a choice.
    Said { part: Planned, said: Said, rivals: u32 },
    /// Nothing more will come; with an error if the caller is to hear one.
    End { request: RequestKey, error: Option<Box<Error>> },
}

/// A stop string ended a choice.
pub(super) struct Stopped {
    pub(super) part: Planned,
    pub(super) request: RequestId,
    /// When its last token was drawn.
    pub(super) drawn: Instant,
}

struct Thread {
    pages: Sender<Work>,
    back: Receiver<Work>,
    thread: Option<JoinHandle<()>>,
}

impl Scribe {
    pub(super) fn new(metrics: EngineMetrics) -> Self {
        Self {
            replies: Some(Box::new(Replies::new(metrics.clone()))),
            thread: None,
            least: 0,
            page: Page::new(),
            spare: None,
            stopped: Vec::new(),
            metrics,
            lost: false,
        }
    }

    /// Has pages of at least so many lines written on a thread from now on; if there is one to be had.
    pub(super) fn move_out(&mut self, least: usize) {
        self.least = least;
        match Thread::start() {
            Ok(thread) => self.thread = Some(thread),
            Err(error) => tracing::warn!(%error, "a thread to write answers on could not be started"),
        }
    }

    /// A request was taken in.
    pub(super) fn open(&mut self, request: RequestKey, reply: Reply) {
        self.page.lines.push(Line::Open { request, reply: Some(Box::new(reply)) });
    }

    /// Its first token is being computed, `cached` tokens of the prompt came out of the prefix cache.
    pub(super) fn begin(&mut self, request: RequestKey, cached: usize) {
        self.page.lines.push(Line::Begin { request, cached: cached as u32 });
    }

    /// The next token of its prompt was looked up.
    pub(super) fn looked_up(&mut self, request: RequestKey, token: u32, drawn: &Drawn) {
        let rivals = self.page.rivals(drawn);
        let line = Line::LookedUp { request, token, logprob: drawn.logprob, rank: drawn.rank, rivals };
        self.page.push(line);
    }

    /// A token was drawn for a choice.
    pub(super) fn say(&mut self, part: Planned, said: Said, drawn: &Drawn) {
        let rivals = self.page.rivals(drawn);
        self.page.push(Line::Said { part, said, rivals });
    }

    /// A request is over before all its choices are complete: with an error, or because nobody listens.
    pub(super) fn end(&mut self, request: RequestKey, error: Option<Error>) {
        self.page.push(Line::End { request, error: error.map(Box::new) });
    }

    /// Writes what there is to write, or has it written, if anything has to be written now. Waits while the page before is
    /// being written.
    pub(super) fn post(&mut self, drawn: Instant) {
        if !self.page.is_due {
            return;
        }
        self.page.drawn = drawn;
        self.take_back(true);
        let Some(mut replies) = self.replies.take() else { return };
        if self.page.lines.len() >= self.least
            && let Some(thread) = &self.thread
        {
            let page = std::mem::replace(&mut self.page, self.spare.take().unwrap_or_else(Page::new));
            match thread.pages.send(Work { page, replies }) {
                Ok(()) => return,
                Err(unsent) => Work { page: self.page, replies } = unsent.into_inner(),
            }
            self.lose();
        }
        replies.write(&mut self.page);
        self.replies = Some(replies);
        self.stopped.append(&mut self.page.stopped);
    }

    /// Whoever was ended by a stop string since the last time, as far as that is known without waiting.
    pub(super) fn collect(&mut self) {
        self.take_back(false);
    }

    /// Waits until all that was handed over is written.
    ///
    /// # Errors
    /// The thread died: nobody will hear anything any more.
    pub(super) fn join(&mut self) -> Result<()> {
        self.take_back(true);
        if self.lost { Err(Error::internal("the thread that writes a model's answers died")) } else { Ok(()) }
    }

    /// The next choice that a stop string has ended.
    pub(super) fn next_stopped(&mut self) -> Option<Stopped> {
        self.stopped.pop()
    }

    fn take_back(&mut self, wait: bool) {
        let (Some(thread), None) = (&self.thread, &self.replies) else { return };
        let work = match thread.back.try_recv() {
            Err(TryRecvError::Empty) if !wait => return,
            Err(TryRecvError::Empty) => {
                let started = Instant::now();
                let work = thread.back.recv().ok();
                self.metrics.scribe_wait.observe(started.elapsed().as_secs_f64());
                work
            }
            work => work.ok(),
        };
        match work {
            Some(Work { mut page, replies }) => {
                self.stopped.append(&mut page.stopped);
                self.spare = Some(page);
                self.replies = Some(replies);
            }
            None => {
                // It has told everybody whose answer it had. What is left is said from here.
                self.replies = Some(Box::new(Replies::new(self.metrics.clone())));
                self.lose();
            }
        }
    }

    fn lose(&mut self) {
        self.lost = true;
        self.thread = None;
    }
}

impl Page {
    fn new() -> Self {
        Self { drawn: Instant::now(), lines: Vec::new(), rivals: Vec::new(), is_due: false, stopped: Vec::new() }
    }

    fn push(&mut self, line: Line) {
        self.lines.push(line);
        self.is_due = true;
    }

    fn rivals(&mut self, drawn: &Drawn) -> u32 {
        self.rivals.extend_from_slice(&drawn.top);
        drawn.top.len() as u32
    }

    fn clear(&mut self) {
        self.lines.clear();
        self.rivals.clear();
        self.is_due = false;
    }
}

/// All answers that are being written.
struct Replies {
    /// By the scheduler's request key.
    open: Vec<Option<Box<Reply>>>,
    metrics: EngineMetrics,
}

impl Replies {
    fn new(metrics: EngineMetrics) -> Self {
        Self { open: Vec::new(), metrics }
    }

    /// Does what a page says and leaves it empty, but for who was stopped. Lines about somebody who is not here are about
    /// somebody who has ended: a stop string came before what the engine had to say.
    fn write(&mut self, page: &mut Page) {
        let (drawn, mut rivals) = (page.drawn, page.rivals.as_slice());
        let mut next_rivals = |count: u32| rivals.split_off(..count as usize).unwrap_or_default();
        for line in &mut page.lines {
            match line {
                Line::Open { request, reply } => {
                    let at = *request as usize;
                    self.open.resize_with(self.open.len().max(at + 1), || None);
                    self.open[at] = reply.take();
                }
                Line::Begin { request, cached } => {
                    if let Some(reply) = self.reply(*request) {
                        reply.begin(*cached);
                    }
                }
                Line::LookedUp { request, token, logprob, rank, rivals } => {
                    let rivals = next_rivals(*rivals);
                    if let Some(reply) = self.reply(*request) {
                        reply.looked_up(*token, *logprob, *rank, rivals);
                    }
                }
                Line::Said { part, said, rivals } => {
                    let rivals = next_rivals(*rivals);
                    let slot = self.open.get_mut(part.request as usize);
                    let Some(slot) = slot else { continue };
                    let Some(reply) = slot else { continue };
                    if reply.say(part.choice, said, rivals, drawn, &self.metrics) == Heard::Stopped {
                        page.stopped.push(Stopped { part: *part, request: reply.request(), drawn });
                    }
                    if reply.is_complete()
                        && let Some(reply) = slot.take()
                    {
                        reply.done(drawn, &self.metrics);
                    }
                }
                Line::End { request, error } => {
                    let reply = self.open.get_mut(*request as usize).and_then(Option::take);
                    if let (Some(reply), Some(error)) = (reply, error.take()) {
                        reply.fail(*error);
                    }
                }
            }
        }
        page.clear();
    }

    fn reply(&mut self, request: RequestKey) -> Option<&mut Reply> {
        self.open.get_mut(request as usize)?.as_deref_mut()
    }

    /// Ends whoever is being answered, and whoever was to be.
    fn fail(&mut self, page: &mut Page, error: &Error) {
        let coming = page.lines.iter_mut().filter_map(|line| match line {
            Line::Open { reply, .. } => reply.take(),
            _ => None,
        });
        for reply in self.open.iter_mut().filter_map(Option::take).chain(coming) {
            reply.fail(error.clone());
        }
    }
}

impl Thread {
    fn start() -> std::io::Result<Self> {
        let (pages, inbox) = bounded::<Work>(1);
        let (outbox, back) = bounded(1);
        let work = move || {
            for Work { mut page, mut replies } in inbox {
                // The engine must hear of a panic, and callers before it goes on to others.
                if catch_unwind(AssertUnwindSafe(|| replies.write(&mut page))).is_err() {
                    tracing::error!("the thread that writes a model's answers panicked");
                    return replies.fail(&mut page, &lost());
                }
                if outbox.send(Work { page, replies }).is_err() {
                    return;
                }
            }
        };
        let thread = std::thread::Builder::new().name("neurond-scribe".to_owned()).spawn(work)?;
        Ok(Self { pages, back, thread: Some(thread) })
    }
}

impl Drop for Thread {
    fn drop(&mut self) {
        // The thread ends with the channel that feeds it, once it has written what is in there.
        self.pages = bounded(0).0;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
