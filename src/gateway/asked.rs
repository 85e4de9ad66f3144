//! A call through a gateway, parsed and authenticated: who asks, through what, and what is to be tried.

use std::cell::OnceCell;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use actix_web::http::header::HeaderValue;
use bytes::Bytes;
use http::Method;

use crate::base::{AccountId, RequestId, Result};
use crate::gateway::bill::{self, Tally};
use crate::gateway::limits::Ruled;
use crate::gateway::options::Options;
use crate::gateway::pipe::Words;
use crate::gateway::step::{Step, Steps};
use crate::registry::{Gateway, View};
use crate::task::Usage;
use crate::vault::Caller;

/// Who is asking.
#[derive(Clone)]
pub struct Who {
    /// This request.
    pub id: RequestId,
    /// With which rights.
    pub caller: Caller,
    /// On whose bill the engine computes; `None`: it does not.
    pub engine: Option<Caller>,
    /// When its head arrived.
    pub received: Instant,
    /// Where the engine says what it used, when it is asked.
    pub tally: Option<Tally>,
}

/// A call, parsed and authenticated.
pub struct Ask {
    /// Who asks.
    pub who: Who,
    /// Whose gateway.
    pub account: AccountId,
    /// Through which.
    pub gateway: Arc<Gateway>,
    /// What the registry said when it came.
    pub view: Arc<View>,
    /// The operator's own rules that it falls under.
    pub ruled: Ruled,
    /// A token of ours was shown: stored keys may be used.
    pub trusted: bool,
    /// What is tried, one after the other. Asked for the next when the last one failed.
    pub plan: Plan,
    /// What was said for all of them.
    pub options: Rc<Options>,
    /// A step that is refused as a bad request is not the end either: the caller lists steps of its own.
    pub tries_all: bool,
    /// How the caller reads.
    pub words: Words,
    /// The provider in the address, or the name of the form.
    pub provider: Box<str>,
    /// What identifies the request: its method, path and query, and its body.
    pub method: Method,
    /// See `method`.
    pub endpoint: String,
    /// See `method`.
    pub body: Bytes,
    /// Of the body.
    pub content_type: Option<String>,
    /// What the caller's program calls itself.
    pub user_agent: Option<HeaderValue>,
    /// The caller's own credentials for providers: part of what identifies the request.
    pub credentials: Vec<u8>,
    /// See [`Ask::most`].
    pub most: OnceCell<Usage>,
}

/// The steps of a call.
pub struct Plan {
    /// The next one, made by who asks and through what; an error is a step that cannot be taken.
    pub next: Box<Next>,
    /// How many there are at most.
    pub most: usize,
}

/// See [`Plan::next`].
pub type Next = dyn FnMut(&Steps<'_>) -> Option<Result<Step>>;

impl Ask {
    /// What it may come to at most, as [`bill::most`] reads it, once.
    pub fn most(&self) -> Usage {
        *self.most.get_or_init(|| bill::most(&self.body))
    }

    /// What is tried next.
    pub fn next_step(&mut self) -> Option<Result<Step>> {
        let Self { account, gateway, view, trusted, plan, .. } = self;
        (plan.next)(&Steps { account, gateway, view, trusted: *trusted })
    }
}

impl Plan {
    /// One step after the other.
    pub fn list(steps: Vec<Result<Step>>) -> Self {
        let most = steps.len();
        let mut steps = steps.into_iter();
        Self { next: Box::new(move |_| steps.next()), most }
    }
}
