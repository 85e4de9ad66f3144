//! Many native inputs in one request, of whatever the model does: answered at once, or put in line, computed when there is
//! room, and asked for later.
//!
//! ```text
//! {"requests": […]} ── now ───────────────────────────────────────────> {"responses": […], "usage"}
//!        └─ ?queueRequest=true ─> file ─> line ─> one by one ─> file ─> {"request_id"} ──> the same
//! ```
//!
//! A batch in line is a file from the first moment: its requests, then each response as it comes. So a crash or a restart
//! loses nothing that was answered, and what was not is computed again. The actor owns the line and the files being
//! written; readers of whole batches read the file themselves.

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::prelude::*;
use actix_web::{HttpResponse, web};
use futures_util::StreamExt;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};
use serde_json::{Value, json};
use tracing::{info, warn};

use crate::base::{AccountId, Error, KeyId, Kind, Millis, ModelId, Neurons, RequestId, Result};
use crate::config::{Budget, CatalogEntry, ResultShape};
use crate::gateway::{Call, Gateway, Terms};
use crate::http::answer::{self, UsageJson};
use crate::http::ask::{Ask, no_such_model};
use crate::http::chat;
use crate::http::classic::{ClassicResult, TASKS, parse, wrap};
use crate::http::fields::Fields;
use crate::http::{Services, encode, error, text};
use crate::metrics::Metrics;
use crate::store::Segment;
use crate::task::{Task, Usage};

/// Most requests in a batch that is answered at once, and how many of them at the same time.
const MOST_NOW: usize = 100;
const ABREAST_NOW: usize = 16;
/// Most requests in a batch that waits in line.
const MOST_QUEUED: usize = 10_000;
/// Most texts of a batch that is encoded, over all requests: a vector is some kilobytes of JSON.
const MOST_TEXTS: usize = 10_000;
/// Most bytes of a batch: a whole one is read into memory.
const MAX_BYTES: usize = 10_000_000;
/// How many requests of a batch are computed at the same time, and how many batches.
const ABREAST: usize = 8;
const BATCHES: usize = 2;
/// Batches kept, whole and in line; more are refused.
const MOST_BATCHES: usize = 1_000;
/// How long a batch is kept once it is whole, and how long it is tried.
const KEPT: Duration = Duration::from_secs(24 * 60 * 60);
/// How often old batches are looked for.
const SWEEP: Duration = Duration::from_secs(600);
/// Between two attempts at a request that found no room.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a response waits for the ledger's disk. After that it counts as charged: what has come so far is with the system.
const CHARGED: Duration = Duration::from_secs(30);
/// Between two attempts at a batch whose file could not be read or written.
const AGAIN: Duration = Duration::from_secs(30);
/// Attempts at a request that took too long.
const SLOW_ATTEMPTS: u32 = 3;
/// Served after everything that somebody waits for.
const PRIORITY: i8 = -100;
const MAILBOX: usize = 1024;

/// One of `responses`.
#[derive(Debug, Serialize, Deserialize)]
struct Response {
    /// Which of the requests, from 0.
    id: usize,
    /// As it was written once: vectors are long.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    result: Option<Box<RawValue>>,
    success: bool,
    #[serde(skip_serializing_if = "Option::is_none", default)]
    error: Option<Value>,
    external_reference: Option<String>,
}

#[derive(Serialize)]
struct Responses<'a> {
    responses: &'a [Response],
    usage: UsageJson,
}

/// Whose requests these are, and what limits them.
#[derive(Clone)]
struct Owner {
    account: AccountId,
    key: Option<KeyId>,
    terms: Terms,
}

/// Answers all requests of the body, or puts them in line.
pub(super) async fn run(
    services: &Services,
    ask: &Ask,
    entry: &Arc<CatalogEntry>,
    fields: &Fields<'_>,
    reject_if_busy: bool,
    queue: bool,
) -> Result<HttpResponse> {
    let requests = requests(fields, if queue { MOST_QUEUED } else { MOST_NOW })?;
    let texts = requests.iter().map(encode::count).sum::<usize>();
    if entry.task != Task::TextGeneration && texts > MOST_TEXTS {
        return Err(fields.wrong("requests", &format!("may hold {MOST_TEXTS} texts altogether, not {texts}")));
    }
    let owner = Owner { account: ask.caller.account.clone(), key: ask.caller.key.clone(), terms: ask.terms.clone() };
    if queue {
        let batches = services.batches.as_ref().ok_or_else(no_folder)?;
        let head = Head {
            account: owner.account,
            key: owner.key,
            budget: owner.terms.budget,
            model: entry.id.clone(),
            submitted: Millis::now(),
            requests: requests.to_vec(),
        };
        let id = batches.submit(head).await?;
        let queued = json!({ "status": "queued", "request_id": id, "model": entry.id });
        return wrap(ask.surface, &queued, Neurons::ZERO);
    }
    let priority = text::priority(fields)?;
    let work = requests.iter().enumerate().map(|(at, request)| {
        let (gateway, owner, entry) = (&services.gateway, owner.clone(), entry.clone());
        async move {
            let job = Job { batch: None, at, request, priority, reject_if_busy };
            let outcome = one(gateway, &owner, &entry, &job).await;
            (at, request, outcome)
        }
    });
    let done: Vec<_> = futures_util::stream::iter(work).buffered(ABREAST_NOW).collect().await;
    // Nobody was served: the client should hear that as it would of one request.
    if let Some(full) = done.iter().map(|(.., outcome)| outcome.as_ref().err()).collect::<Option<Vec<_>>>()
        && let Some(error) = full.iter().find(|error| matches!(error.kind(), Kind::Busy | Kind::ShuttingDown))
    {
        return Err((*error).clone());
    }
    let (mut responses, mut usage, mut neurons) = (Vec::new(), Usage::default(), Neurons::ZERO);
    for (at, request, outcome) in done {
        let (response, used, cost) = respond(ask.id, at, request, outcome);
        responses.push(response);
        usage = answer::sum(usage, used);
        neurons = neurons + cost;
    }
    let usage = UsageJson::new(&usage, neurons);
    wrap(ask.surface, &Responses { responses: &responses, usage }, neurons)
}

/// What became of a batch that was put in line.
pub(super) async fn poll(services: &Services, ask: &Ask, fields: &Fields<'_>) -> Result<HttpResponse> {
    let batches = services.batches.as_ref().ok_or_else(no_folder)?;
    let text = fields.required_text("request_id")?;
    let unknown =
        || Error::new(Kind::NotFound, "No batch with this request_id: it is unknown, or was kept for its day.");
    let id = RequestId::parse(text).ok_or_else(unknown)?;
    let status = match batches.look(id, ask.caller.account.clone()).await?.ok_or_else(unknown)? {
        Found::Queued => "queued",
        Found::Running => "running",
        Found::Whole(path) => {
            let batch = web::block(move || Batch::read(&path))
                .await
                .map_err(|error| Error::internal("a batch was not read").with_source(error))??;
            let usage = UsageJson::new(&batch.usage, batch.neurons);
            // It was charged while it was computed: asking costs nothing.
            return wrap(ask.surface, &Responses { responses: &batch.responses, usage }, Neurons::ZERO);
        }
    };
    wrap(ask.surface, &json!({ "status": status, "request_id": id }), Neurons::ZERO)
}

fn no_folder() -> Error {
    Error::unsupported(
        "This server keeps no batches (`batch.folder` is not set): send `requests` without `queueRequest`.",
    )
    .with_param("queueRequest")
}

fn requests<'a>(fields: &Fields<'a>, most: usize) -> Result<&'a [Value]> {
    let Some(requests) = fields.array("requests")? else { return Err(fields.missing("requests")) };
    let inside = ["prompt", "messages", "text", "contexts", "query"];
    if let Some(name) = inside.into_iter().find(|name| fields.has(name)) {
        return Err(fields.wrong("requests", &format!("goes without `{name}`: that is in each of the requests")));
    }
    if !(1..=most).contains(&requests.len()) {
        let words = format!("must hold 1 to {most} requests, not {}", requests.len());
        return Err(fields.wrong("requests", &words));
    }
    if let Some(at) = requests.iter().position(|request| !request.is_object()) {
        return Err(fields.wrong(&format!("requests.{at}"), "must be an object"));
    }
    Ok(requests)
}

/// A request of a batch about to be answered.
struct Job<'a> {
    /// The batch in line that it is of: its requests keep their ids through a restart, so that none is billed twice.
    batch: Option<RequestId>,
    at: usize,
    request: &'a Value,
    priority: i8,
    reject_if_busy: bool,
}

/// Answers one request: its result, what it used and what it cost.
async fn one(
    gateway: &Gateway,
    owner: &Owner,
    entry: &Arc<CatalogEntry>,
    job: &Job<'_>,
) -> Result<(Box<RawValue>, Usage, Neurons)> {
    let fields = Fields::at(job.request, format!("requests.{}", job.at))?;
    if fields.bool("stream")? == Some(true) {
        return Err(fields.wrong("stream", "is not available in a batch"));
    }
    if entry.task != Task::TextGeneration {
        let encode = async |input| gateway.encode(call(owner, entry, job, Arc::new(input))).await;
        let result = encode::native(encode, entry, &fields).await?;
        let (usage, neurons) = (result.usage(), result.neurons());
        return Ok((result.into_raw().await?, usage, neurons));
    }
    let mut input = parse(&fields, entry)?.input;
    input.priority = input.priority.min(job.priority);
    let json = input.grammar.as_ref().is_some_and(|grammar| grammar.is_json());
    let call = call(owner, entry, job, input);
    let id = call.id;
    let answer = gateway.serve(call).await?.collect().await?;
    let result = match entry.shape {
        ResultShape::Classic => to_raw(&ClassicResult::new(&answer, entry, json)?),
        ResultShape::Chat => to_raw(&chat::Shape::new(id, entry).completion(&answer)),
    };
    Ok((result?, answer.usage, answer.neurons))
}

/// A request of a batch as a call of its own.
fn call<Input>(owner: &Owner, entry: &Arc<CatalogEntry>, job: &Job<'_>, input: Input) -> Call<Input> {
    // Each counts as a request where somebody waits for it: a minute's limit is one of work.
    let terms = Terms { is_once: job.batch.is_some(), ..owner.terms.clone() };
    Call {
        terms,
        id: job.batch.map_or_else(RequestId::random, |batch| batch.of(job.at)),
        account: owner.account.clone(),
        key: owner.key.clone(),
        entry: entry.clone(),
        input,
        affinity: None,
        reject_if_busy: job.reject_if_busy,
        received: Instant::now(),
    }
}

fn to_raw(result: &impl Serialize) -> Result<Box<RawValue>> {
    to_raw_value(result).map_err(|error| Error::internal("an answer does not serialise").with_source(error))
}

fn respond(
    id: RequestId,
    at: usize,
    request: &Value,
    outcome: Result<(Box<RawValue>, Usage, Neurons)>,
) -> (Response, Usage, Neurons) {
    let external_reference = request.get("external_reference").and_then(Value::as_str).map(str::to_owned);
    match outcome {
        Ok((result, usage, neurons)) => {
            let result = Some(result);
            (Response { id: at, result, success: true, error: None, external_reference }, usage, neurons)
        }
        Err(failure) => {
            let error = Some(error::native(id, &failure));
            let response = Response { id: at, result: None, success: false, error, external_reference };
            (response, Usage::default(), Neurons::ZERO)
        }
    }
}

/// A frame of a batch's file.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Frame {
    Head(Head),
    Response { response: Response, usage: Usage, neurons: u64 },
    Whole { at: Millis },
}

/// What was asked, and by whom.
#[derive(Serialize, Deserialize)]
struct Head {
    account: AccountId,
    key: Option<KeyId>,
    /// Of that key, when it was put in line.
    #[serde(default)]
    budget: Budget,
    model: ModelId,
    submitted: Millis,
    requests: Vec<Value>,
}

/// A batch's file, read.
#[derive(Default)]
struct Batch {
    head: Option<Head>,
    responses: Vec<Response>,
    usage: Usage,
    neurons: Neurons,
    whole: Option<Millis>,
}

impl Batch {
    fn read(path: &Path) -> Result<Self> {
        let mut batch = Self::default();
        Segment::read(path, |frame| batch.hear(frame)).map_err(|error| on_disk(path, error))?;
        Ok(batch)
    }

    fn hear(&mut self, frame: &[u8]) {
        match serde_json::from_slice(frame) {
            Ok(Frame::Head(head)) => self.head = Some(head),
            Ok(Frame::Response { response, usage, neurons }) => {
                self.responses.push(response);
                self.usage = answer::sum(self.usage, usage);
                self.neurons = self.neurons + Neurons::from_micro(neurons);
            }
            Ok(Frame::Whole { at }) => self.whole = Some(at),
            Err(error) => warn!(%error, "a frame of a batch is of another version and was passed over"),
        }
    }
}

fn on_disk(path: &Path, error: std::io::Error) -> Error {
    warn!(path = %path.display(), %error, "a batch could not be read or written");
    Error::internal("a batch could not be read or written").with_source(error)
}

/// The line of batches: the handle.
#[derive(Clone)]
pub struct Batches {
    addr: Addr<BatchActor>,
}

/// What a caller may know of a batch.
#[derive(Debug)]
enum Found {
    Queued,
    Running,
    Whole(PathBuf),
}

impl Batches {
    /// Opens the folder, puts what was not finished in line again, and works on it from now on.
    ///
    /// # Errors
    /// `BadInput` when the folder cannot be made or read.
    pub fn start(folder: &Path, gateway: Gateway) -> Result<Self> {
        let unusable = |error: std::io::Error| {
            let name = folder.display();
            Error::bad_input(format!("batch.folder = {name}: {error}; name a folder that the daemon may write to"))
        };
        std::fs::create_dir_all(folder).map_err(unusable)?;
        let metrics = &gateway.metrics;
        let mut known = HashMap::new();
        let mut line: Vec<(Millis, RequestId)> = Vec::new();
        for file in std::fs::read_dir(folder).map_err(unusable)? {
            let path = file.map_err(unusable)?.path();
            let Some(id) = id_of(&path) else { continue };
            let mut batch = Batch::default();
            let log = Segment::open(&path, |frame| batch.hear(frame)).map_err(unusable)?;
            let Some(head) = batch.head else {
                // It was never promised to anybody.
                std::fs::remove_file(&path).map_err(unusable)?;
                continue;
            };
            let state = match batch.whole {
                Some(at) => State::Whole { at },
                None => State::Queued,
            };
            if batch.whole.is_none() {
                line.push((head.submitted, id));
                // A file may have been written to by a process that was stopped between two responses.
                let answered: HashSet<usize> = batch.responses.iter().map(|response| response.id).collect();
                metrics.batch_requests_waiting.add(head.requests.len().saturating_sub(answered.len()) as i64);
            }
            known.insert(id, Known { account: head.account, state, log: batch.whole.is_none().then_some(log) });
        }
        line.sort_by_key(|&(submitted, _)| submitted);
        if !line.is_empty() {
            info!(batches = line.len(), "batches go on where they were");
        }
        let folder = folder.to_path_buf();
        let line = line.into_iter().map(|(_, id)| id).collect();
        let arbiter = Arbiter::new();
        let addr = BatchActor::start_in_arbiter(&arbiter.handle(), |ctx| {
            ctx.set_mailbox_capacity(MAILBOX);
            BatchActor { folder, gateway, known, line, running: 0 }
        });
        Ok(Self { addr })
    }

    async fn submit(&self, head: Head) -> Result<RequestId> {
        self.addr.send(Submit(head)).await.map_err(dead)?
    }

    async fn look(&self, id: RequestId, account: AccountId) -> Result<Option<Found>> {
        self.addr.send(Look { id, account }).await.map_err(dead)
    }
}

fn dead(error: MailboxError) -> Error {
    Error::internal("The line of batches is not answering.").with_source(error)
}

/// A batch's file is named after it.
fn path_of(folder: &Path, id: RequestId) -> PathBuf {
    folder.join(format!("{id}.batch"))
}

fn id_of(path: &Path) -> Option<RequestId> {
    let name = path.file_name()?.to_str()?.strip_suffix(".batch")?;
    RequestId::parse(name)
}

struct BatchActor {
    folder: PathBuf,
    gateway: Gateway,
    known: HashMap<RequestId, Known>,
    /// First come, first served.
    line: VecDeque<RequestId>,
    running: usize,
}

struct Known {
    account: AccountId,
    state: State,
    /// While it is written to.
    log: Option<Segment>,
}

#[derive(Clone, Copy)]
enum State {
    Queued,
    Running,
    Whole { at: Millis },
}

impl State {
    /// As callers and metrics call it.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Running => "running",
            Self::Whole { .. } => "whole",
        }
    }
}

impl Actor for BatchActor {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Self::Context) {
        self.show();
        self.sweep();
        ctx.run_interval(SWEEP, |this, _| this.sweep());
        self.work(ctx);
    }
}

impl BatchActor {
    /// Forgets what was kept long enough.
    fn sweep(&mut self) {
        let now = Millis::now();
        let folder = &self.folder;
        self.known.retain(|&id, known| {
            let State::Whole { at } = known.state else { return true };
            if now.0.saturating_sub(at.0) < KEPT.as_millis() as u64 {
                return true;
            }
            let path = path_of(folder, id);
            std::fs::remove_file(&path).map_err(|error| on_disk(&path, error)).is_err()
        });
        self.show();
    }

    /// Sets the gauges of batches.
    fn show(&self) {
        for state in ["queued", "running", "whole"] {
            let count = self.known.values().filter(|known| known.state.as_str() == state).count();
            self.gateway.metrics.batches.with_label_values(&[state]).set(count as i64);
        }
    }

    /// Begins with the next batches in line.
    fn work(&mut self, ctx: &mut Context<Self>) {
        while self.running < BATCHES
            && let Some(id) = self.line.pop_front()
        {
            let Some(known) = self.known.get_mut(&id) else { continue };
            known.state = State::Running;
            self.running += 1;
            let (gateway, path, actor) = (self.gateway.clone(), path_of(&self.folder, id), ctx.address());
            actix::spawn(async move {
                let outcome = compute(&gateway, id, &path, &actor).await;
                if let Err(error) = &outcome {
                    warn!(batch = %id, %error, "a batch cannot go on and is tried again in half a minute");
                }
                // The actor outlives its tasks, or nobody is left to tell.
                actor.do_send(Over { id, whole: outcome.is_ok() });
            });
        }
        self.show();
    }
}

/// Answers what is not answered yet, several requests at a time, and hands each response to the actor.
async fn compute(gateway: &Gateway, id: RequestId, path: &Path, actor: &Addr<BatchActor>) -> Result<()> {
    let path = path.to_path_buf();
    let read = tokio::task::spawn_blocking(move || Batch::read(&path)).await;
    let batch = read.map_err(|error| Error::internal("a batch was not read").with_source(error))??;
    let head = batch.head.ok_or_else(|| Error::internal("a batch has lost its head"))?;
    let answered: HashSet<usize> = batch.responses.iter().map(|response| response.id).collect();
    // The operator's rules are about requests that somebody waits for; money is money.
    let terms = Terms { budget: head.budget, ..Terms::default() };
    let owner = Owner { account: head.account.clone(), key: head.key.clone(), terms };
    let end = head.submitted.0 + KEPT.as_millis() as u64;
    let left = head.requests.iter().enumerate().filter(|(at, _)| !answered.contains(at));
    let work = left.map(|(at, request)| {
        let (owner, model) = (&owner, &head.model);
        async move {
            let under_way = UnderWay::begin(&gateway.metrics);
            let response = respond(id, at, request, patiently(gateway, owner, model, (id, at), request, end).await);
            (response, under_way)
        }
    });
    let mut work = futures_util::stream::iter(work).buffer_unordered(ABREAST);
    while let Some(((response, usage, neurons), under_way)) = work.next().await {
        let outcome = if response.success { "done" } else { "failed" };
        // Nothing is answered for good before it is charged for good: a request whose response is lost is run again under its
        // id, and not charged again; one whose charge is lost would never be.
        let _ = tokio::time::timeout(CHARGED, gateway.ledger.flush()).await;
        actor
            .send(Answered { id, frame: Frame::Response { response, usage, neurons: neurons.micro() } })
            .await
            .map_err(dead)??;
        under_way.answered(outcome);
    }
    Ok(())
}

/// A request that is not waiting and not on disk yet. Dropped before it is, it waits again: for the next start.
struct UnderWay<'a> {
    metrics: &'a Metrics,
    is_answered: bool,
}

impl<'a> UnderWay<'a> {
    fn begin(metrics: &'a Metrics) -> Self {
        metrics.batch_requests_waiting.dec();
        metrics.batch_requests_running.inc();
        Self { metrics, is_answered: false }
    }

    fn answered(mut self, outcome: &str) {
        self.is_answered = true;
        self.metrics.batch_requests.with_label_values(&[outcome]).inc();
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.metrics.batch_requests_running.dec();
        if !self.is_answered {
            self.metrics.batch_requests_waiting.inc();
        }
    }
}

/// Tries again where waiting helps, until the batch is a day old.
async fn patiently(
    gateway: &Gateway,
    owner: &Owner,
    model: &ModelId,
    (id, at): (RequestId, usize),
    request: &Value,
    end: u64,
) -> Result<(Box<RawValue>, Usage, Neurons)> {
    let mut slow = 0;
    loop {
        let catalog = gateway.config.get().catalog.clone();
        let entry = catalog.resolve(model.as_str()).filter(|entry| TASKS.contains(&entry.task)).cloned();
        let entry = entry.ok_or_else(|| no_such_model(&catalog, model.as_str()))?;
        let job = Job { batch: Some(id), at, request, priority: PRIORITY, reject_if_busy: false };
        let error = match one(gateway, owner, &entry, &job).await {
            Ok(answer) => return Ok(answer),
            Err(error) => error,
        };
        slow += u32::from(error.kind() == Kind::Timeout);
        let helps = match error.kind() {
            Kind::Busy | Kind::ModelUnavailable | Kind::EngineLost | Kind::ShuttingDown | Kind::RateLimited => true,
            Kind::Timeout => slow < SLOW_ATTEMPTS,
            _ => false,
        };
        if !helps || Millis::now().0 >= end {
            return Err(error);
        }
        tokio::time::sleep(error.retry_after().map_or(PATIENCE, |wait| wait.max(PATIENCE))).await;
    }
}

#[derive(Message)]
#[rtype(result = "Result<RequestId>")]
struct Submit(Head);

#[derive(Message)]
#[rtype(result = "Option<Found>")]
struct Look {
    id: RequestId,
    account: AccountId,
}

#[derive(Message)]
#[rtype(result = "Result<()>")]
struct Answered {
    id: RequestId,
    frame: Frame,
}

#[derive(Message)]
#[rtype(result = "()")]
struct Over {
    id: RequestId,
    whole: bool,
}

impl Handler<Submit> for BatchActor {
    type Result = Result<RequestId>;

    fn handle(&mut self, Submit(head): Submit, ctx: &mut Context<Self>) -> Self::Result {
        if self.known.len() >= MOST_BATCHES {
            self.sweep();
        }
        if self.known.len() >= MOST_BATCHES {
            let message = format!("{MOST_BATCHES} batches are kept already, each for a day; send this one later.");
            return Err(Error::new(Kind::Busy, message).with_retry_after(SWEEP));
        }
        let (id, account, requests) = (RequestId::random(), head.account.clone(), head.requests.len());
        let frame = to_bytes(&Frame::Head(head))?;
        if frame.len() > MAX_BYTES {
            return Err(Error::new(
                Kind::TooLarge,
                format!("A batch may have {MAX_BYTES} bytes, not {}.", frame.len()),
            ));
        }
        let path = path_of(&self.folder, id);
        let log = Segment::create(&path).and_then(|mut log| log.append(&frame).map(|()| log));
        let log = log.map_err(|error| on_disk(&path, error))?;
        self.known.insert(id, Known { account, state: State::Queued, log: Some(log) });
        self.line.push_back(id);
        self.gateway.metrics.batch_requests_waiting.add(requests as i64);
        self.work(ctx);
        Ok(id)
    }
}

impl Handler<Look> for BatchActor {
    type Result = Option<Found>;

    fn handle(&mut self, Look { id, account }: Look, _: &mut Context<Self>) -> Self::Result {
        let known = self.known.get(&id).filter(|known| known.account == account)?;
        Some(match known.state {
            State::Queued => Found::Queued,
            State::Running => Found::Running,
            State::Whole { .. } => Found::Whole(path_of(&self.folder, id)),
        })
    }
}

impl Handler<Answered> for BatchActor {
    type Result = Result<()>;

    fn handle(&mut self, Answered { id, frame }: Answered, _: &mut Context<Self>) -> Self::Result {
        let Some(log) = self.known.get_mut(&id).and_then(|known| known.log.as_mut()) else { return Ok(()) };
        log.append(&to_bytes(&frame)?).map_err(|error| on_disk(&path_of(&self.folder, id), error))
    }
}

impl Handler<Over> for BatchActor {
    type Result = ();

    fn handle(&mut self, Over { id, whole }: Over, ctx: &mut Context<Self>) {
        self.running -= 1;
        if let Some(known) = self.known.get_mut(&id) {
            let at = Millis::now();
            let closed = whole && known.log.as_mut().is_some_and(|log| close(log, &path_of(&self.folder, id), at));
            if closed {
                (known.state, known.log) = (State::Whole { at }, None);
            } else {
                known.state = State::Queued;
                ctx.run_later(AGAIN, move |this, ctx| {
                    this.line.push_back(id);
                    this.work(ctx);
                });
            }
        }
        self.work(ctx);
    }
}

/// Whether the file says now that the batch is whole.
fn close(log: &mut Segment, path: &Path, at: Millis) -> bool {
    let frame = to_bytes(&Frame::Whole { at });
    let written = frame.and_then(|frame| log.append(&frame).map_err(|error| on_disk(path, error)));
    written.is_ok()
}

fn to_bytes(frame: &Frame) -> Result<Vec<u8>> {
    serde_json::to_vec(frame).map_err(|error| Error::internal("a batch does not serialise").with_source(error))
}
