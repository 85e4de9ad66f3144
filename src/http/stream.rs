//! Deliveries to a response body: events are rendered as they come, what has piled up goes out in one write.
//!
//!     Delivery 0 --+
//!     Delivery 1 --+--> Render (one a surface) --> sse::Encoder --> socket
//!
//! Dropping the body, which is what a vanished client leads to, drops the deliveries and so cancels the work.

use std::convert::Infallible;
use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use actix_web::HttpResponse;
use actix_web::body::{BodySize, MessageBody};
use bytes::Bytes;
use futures_util::stream::{BoxStream, SelectAll, StreamExt, select_all, unfold};
use tokio::time::{Instant, Sleep, sleep};

use crate::base::{Error, Neurons};
use crate::gateway::Delivery;
use crate::http::answer;
use crate::net::sse::Encoder;
use crate::task::{Event, FinishReason, PromptToken, TokenLogprob, ToolDelta, Usage};

/// A sign of life goes out when there has been nothing to say for this long.
const PING: Duration = Duration::from_secs(15);
/// Most events rendered into one write.
const BATCH: usize = 64;

/// How a surface writes the events of an answer. Choices count through over all prompts of a request.
pub(super) trait Render: 'static {
    /// Before anything else.
    fn begin(&mut self, out: &mut Encoder);
    /// What the model thinks of the prompt of these choices, before their text.
    fn prompt(&mut self, _choices: Range<u32>, _tokens: &[PromptToken], _out: &mut Encoder) {}
    /// New text of a choice.
    fn text(&mut self, choice: u32, text: &str, logprobs: &[TokenLogprob], out: &mut Encoder);
    /// New of a call of a tool: the newest call of a choice, counted from 0.
    fn tool(&mut self, choice: u32, call: u32, delta: &ToolDelta, out: &mut Encoder);
    /// A choice is complete.
    fn finish(&mut self, choice: u32, reason: FinishReason, stop: Option<&str>, out: &mut Encoder);
    /// Everything is complete.
    fn done(&mut self, usage: &Usage, neurons: Neurons, out: &mut Encoder);
    /// It broke off; nothing follows.
    fn failed(&mut self, error: &Error, out: &mut Encoder);
}

/// Streams the events of one request's calls; `choices` is how many answers each call gives.
pub(super) fn response(deliveries: Vec<Delivery>, choices: u32, render: impl Render) -> HttpResponse {
    let calls = deliveries.len();
    let source =
        select_all(deliveries.into_iter().enumerate().map(|(i, delivery)| batches(i as u32 * choices, delivery)));
    let mut out = Encoder::default();
    let mut render = render;
    render.begin(&mut out);
    HttpResponse::Ok()
        .content_type("text/event-stream")
        .insert_header(("cache-control", "no-cache"))
        // Proxies that buffer would turn a stream into one late lump.
        .insert_header(("x-accel-buffering", "no"))
        .body(Body {
            source,
            render,
            out,
            open: calls,
            choices,
            usage: Usage::default(),
            neurons: Neurons::ZERO,
            over: false,
            ping: Box::pin(sleep(PING)),
        })
}

/// What a call has to say at once.
struct Batch {
    first_choice: u32,
    events: Vec<Event>,
    /// Final if the events end with `Done`.
    neurons: Neurons,
}

fn batches(first_choice: u32, delivery: Delivery) -> BoxStream<'static, Batch> {
    unfold(delivery, move |mut delivery| async move {
        let mut events = vec![delivery.next().await?];
        while events.len() < BATCH {
            let Some(event) = delivery.next_ready() else { break };
            events.push(event);
        }
        Some((Batch { first_choice, events, neurons: delivery.neurons() }, delivery))
    })
    .boxed()
}

struct Body<R> {
    source: SelectAll<BoxStream<'static, Batch>>,
    render: R,
    out: Encoder,
    /// Calls that have not said `Done` yet.
    open: usize,
    /// Answers that each call gives.
    choices: u32,
    usage: Usage,
    neurons: Neurons,
    over: bool,
    ping: Pin<Box<Sleep>>,
}

// Nothing in it is pinned in place: the stream and the timer are boxed.
impl<R> Unpin for Body<R> {}

impl<R: Render> Body<R> {
    fn render(&mut self, batch: Batch) {
        let Batch { first_choice, events, neurons } = batch;
        for event in events {
            match event {
                Event::Prompt(tokens) => {
                    let choices = first_choice..first_choice + self.choices;
                    self.render.prompt(choices, &tokens, &mut self.out);
                }
                Event::Text { choice, text, logprobs, .. } => {
                    self.render.text(first_choice + choice, &text, &logprobs, &mut self.out);
                }
                Event::Tool { choice, call, delta } => {
                    self.render.tool(first_choice + choice, call, &delta, &mut self.out);
                }
                Event::Finish { choice, reason, stop } => {
                    self.render.finish(first_choice + choice, reason, stop.as_deref(), &mut self.out);
                }
                Event::Done(usage) => {
                    self.usage = answer::sum(self.usage, usage);
                    self.neurons = self.neurons + neurons;
                    self.open -= 1;
                    if self.open == 0 {
                        self.render.done(&self.usage, self.neurons, &mut self.out);
                        self.over = true;
                    }
                }
                Event::Failed(error) => {
                    self.render.failed(&error, &mut self.out);
                    self.over = true;
                    // The other prompts of the request are worth nothing without this one.
                    self.source.clear();
                    return;
                }
            }
        }
    }
}

impl<R: Render> MessageBody for Body<R> {
    type Error = Infallible;

    fn size(&self) -> BodySize {
        BodySize::Stream
    }

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Infallible>>> {
        let this = self.get_mut();
        while !this.over {
            match this.source.poll_next_unpin(cx) {
                Poll::Ready(Some(batch)) => {
                    this.render(batch);
                    if this.out.len() >= 16 * 1024 {
                        break;
                    }
                }
                // Every delivery ends with `Done` or `Failed`, so this is not reached with calls open.
                Poll::Ready(None) => this.over = true,
                Poll::Pending => break,
            }
        }
        if !this.out.is_empty() {
            this.ping.as_mut().reset(Instant::now() + PING);
            return Poll::Ready(Some(Ok(this.out.take())));
        }
        if this.over {
            return Poll::Ready(None);
        }
        // A timer that has gone off must be asked again after its reset, or nobody would wake us for the next one.
        while this.ping.as_mut().poll(cx).is_ready() {
            this.ping.as_mut().reset(Instant::now() + PING);
            this.out.comment("ping");
        }
        if this.out.is_empty() { Poll::Pending } else { Poll::Ready(Some(Ok(this.out.take()))) }
    }
}
