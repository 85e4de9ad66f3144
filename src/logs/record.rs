//! One call as it is told afterwards: plain data that the gateway fills in when a call has ended.

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::base::{AccountId, KeyId, LogId, Millis, Neurons, RequestId, TraceContext};
use crate::task::{Task, Usage};

/// What the cache did for a call.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CacheUse {
    /// It was not asked.
    Off,
    /// It had no answer.
    Miss,
    /// It had one.
    Hit,
    /// Somebody else's was on its way.
    Coalesced,
}

impl CacheUse {
    /// All there are, in order.
    pub const ALL: [Self; 4] = [Self::Off, Self::Miss, Self::Hit, Self::Coalesced];

    /// Its name in metrics and the log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Miss => "miss",
            Self::Hit => "hit",
            Self::Coalesced => "coalesced",
        }
    }

    /// Whether no upstream was asked for this caller.
    pub fn is_hit(self) -> bool {
        matches!(self, Self::Hit | Self::Coalesced)
    }
}

/// A word of a record. Most are short enough to lie in it: what is allocated by a call is freed by the log's thread, and both wait for memory
/// that the other has just written.
pub type Text = compact_str::CompactString;

/// A body, or its beginning.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Body {
    /// What is kept of it.
    pub kept: Bytes,
    /// Bytes that went over the wire, kept or not.
    pub size: u64,
}

impl Body {
    /// Whether all of it is kept.
    pub fn is_complete(&self) -> bool {
        self.kept.len() as u64 == self.size
    }
}

/// See the top of this file.
#[derive(Clone, PartialEq, Debug)]
pub struct Record {
    /// Its id, which sorts by time; `None`: the call is counted, but not to be logged.
    pub id: Option<LogId>,
    /// The request.
    pub request: RequestId,
    /// When its head arrived.
    pub at: Millis,
    /// Whose gateway.
    pub account: AccountId,
    /// Which of its tokens was shown.
    pub key: Option<KeyId>,
    /// Through which gateway.
    pub gateway: Arc<str>,
    /// Canonical slug of the provider that answered, or was tried last; empty where none was.
    pub provider: Text,
    /// As the provider names it.
    pub model: Text,
    /// What the model does, where that is known.
    pub task: Option<Task>,
    /// Path at the provider, without host and query.
    pub path: Text,
    /// Status that the caller got; 499 where it left before.
    pub status: u16,
    /// A whole answer of a status under 400.
    pub success: bool,
    /// What the cache did.
    pub cache: CacheUse,
    /// From the head of the request to the last byte of the answer, in microseconds.
    pub duration_us: u64,
    /// To the first byte of the answer, in microseconds.
    pub first_byte_us: Option<u64>,
    /// What the upstream counted; `None`: it did not say.
    pub usage: Option<Usage>,
    /// What the call cost, in the one unit; 1,000 neurons are 0.011 USD. Nothing for hits.
    pub cost: Neurons,
    /// The caller named the price.
    pub custom_cost: bool,
    /// What a hit would have cost; nothing where it was answered while the first was still being written.
    pub saved: Neurons,
    /// Which step answered, from 0.
    pub step: u16,
    /// `http`, `websocket`, `universal` …
    pub request_type: Cow<'static, str>,
    /// Media type of the request.
    pub request_content_type: Option<Text>,
    /// Media type of the answer.
    pub response_content_type: Option<Text>,
    /// What the caller sent along: a JSON object of at most five entries, as text.
    pub metadata: Option<Text>,
    /// Where the call stands in a trace of its caller's; `None`: it begins one.
    pub trace: Option<TraceContext>,
    /// Zero data retention was asked for: no trace has bodies.
    pub zero_retention: bool,
    /// What the caller calls the call.
    pub event: Option<Text>,
    /// Who the caller's program says it is.
    pub user_agent: Option<Text>,
    /// A token of ours was shown.
    pub authenticated: bool,
    /// A stored key stood in for the caller's.
    pub stored_key: bool,
    /// What was tried, as in `cf-aig-attempts`.
    pub attempts: Text,
    /// Why it did not end well, in a word.
    pub why: Option<Cow<'static, str>>,
    /// Names of the rules that found something.
    pub findings: Vec<Box<str>>,
    /// What was asked.
    pub asked: Body,
    /// What was answered.
    pub answered: Body,
}
