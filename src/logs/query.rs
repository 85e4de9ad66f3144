//! What is asked of the log: a raw query string, or the filters of a data set, to plain data that the store understands.
//!
//! ```text
//! filters.key=cost&filters.operator=gt&filters.value=1 ─┐
//! filters=[{"key","operator","value"}] ─────────────────┼─> Filter: intervals of a column, or matches of texts
//! min_cost=1 (deprecated) ──────────────────────────────┘
//! ```
//!
//! Filters are ANDed, the values of one are ORed; `neq` with several values means none of them. What a record does not have is equal to
//! nothing. Units become the store's here: USD to micro-neurons, milliseconds to microseconds. Pure.

mod read;
#[cfg(test)]
mod tests;

use std::ops::RangeInclusive;

use serde_json::Value;

use crate::base::{LogId, Millis, Result};

pub(in crate::logs) use read::part_of_id;

/// Records of one page at most.
pub const MOST_PER_PAGE: u64 = 1000;
/// Records of one page where nothing is said.
pub const PER_PAGE: u64 = 20;
/// How far into a list a page may begin, and records of one limited deletion at most.
pub const DEEPEST: u64 = 1_000_000;

/// A number that every record has, or has not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Number {
    /// Milliseconds since 1970.
    At,
    /// HTTP status.
    Status,
    /// 0 or 1.
    Success,
    /// 0 or 1.
    Cached,
    /// Micro-neurons.
    Cost,
    /// Both ways together.
    Tokens,
    /// Read.
    TokensIn,
    /// Produced.
    TokensOut,
    /// Microseconds.
    Duration,
    /// 0 or 1.
    Authenticated,
}

impl Number {
    /// How many there are.
    pub const COUNT: usize = Self::Authenticated as usize + 1;
}

/// A text that a record has, or has not.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Text {
    /// Slug.
    Provider,
    /// As the provider names it.
    Model,
    /// What the model does: `text-generation`.
    ModelType,
    /// `http`, `websocket` …
    RequestType,
    /// Media type.
    RequestContentType,
    /// Media type.
    ResponseContentType,
    /// What the caller calls the call.
    Event,
    /// Who the caller's program says it is.
    UserAgent,
    /// `FLAG`, `BLOCK`.
    DlpAction,
}

impl Text {
    /// How many there are.
    pub const COUNT: usize = Self::DlpAction as usize + 1;
}

/// What a text is compared with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Match {
    /// It is this.
    Is(Box<str>),
    /// This is somewhere in it.
    Contains(Box<str>),
    /// It sorts before this.
    Below(Box<str>),
    /// It sorts behind this.
    Above(Box<str>),
}

/// What a filter looks at, and what it lets through: one of the values is enough.
#[derive(Clone, PartialEq, Debug)]
pub enum Test {
    /// A number in one of these intervals.
    Number(Number, Vec<RangeInclusive<u64>>),
    /// -1 as 0, 0 as 1, 1 as 2.
    Feedback(Vec<RangeInclusive<u64>>),
    /// A text.
    Text(Text, Vec<Match>),
    /// The name of any entry of the metadata.
    MetadataKey(Vec<Match>),
    /// The value of any entry of the metadata.
    MetadataValue(Vec<Match>),
    /// Ids in one of these intervals.
    Id(Vec<RangeInclusive<u128>>),
    /// Ids with these digits somewhere: each a number, and how many digits it has.
    IdPart(Vec<(u128, u32)>),
    /// All records, or none.
    Always(bool),
}

/// One condition.
#[derive(Clone, PartialEq, Debug)]
pub struct Filter {
    /// What lets a record through.
    pub test: Test,
    /// What lets it through keeps it out, and the other way round.
    pub is_negated: bool,
}

/// What a list is ordered by; what is equal is ordered by age.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// A number.
    Number(Number),
    /// A text.
    Text(Text),
    /// Thumbs down, none, thumbs up.
    Feedback,
}

/// See the top of this file.
#[derive(Clone, PartialEq, Debug)]
pub struct Query {
    /// All must let a record through.
    pub filters: Vec<Filter>,
    /// Text in ids, models, providers, events or the beginnings of bodies, in any case.
    pub search: Option<Box<str>>,
    /// What counts.
    pub order: Order,
    /// Newest or most first.
    pub is_descending: bool,
    /// From 1.
    pub page: u64,
    /// Records of a page.
    pub per_page: u64,
    /// Least and most of costs, durations and tokens are asked for too.
    pub meta_info: bool,
    /// How many to delete; `None`: all.
    pub limit: Option<u64>,
}

impl Default for Query {
    fn default() -> Self {
        Self {
            filters: Vec::new(),
            search: None,
            order: Order::Number(Number::At),
            is_descending: true,
            page: 1,
            per_page: PER_PAGE,
            meta_info: false,
            limit: None,
        }
    }
}

impl Query {
    /// Reads the query string of `GET` and `DELETE /logs`. Parameters that are not known are passed over.
    ///
    /// # Errors
    /// Names the parameter and what it may be.
    pub fn parse(raw: &str) -> Result<Self> {
        read::query(raw)
    }

    /// Only these filters: those of a data set.
    ///
    /// # Errors
    /// Names the filter and what it may be.
    pub fn of_filters(filters: &Value) -> Result<Self> {
        Ok(Self { filters: read::filters(filters)?, ..Self::default() })
    }

    /// How many records come before its page.
    pub fn skipped(&self) -> u64 {
        self.page.saturating_sub(1).saturating_mul(self.per_page)
    }
}

/// The lowest id of a moment.
pub fn first_id(at: Millis) -> u128 {
    u128::from(at.0) << 80
}

/// Every id that is this one.
fn is_id(id: LogId) -> RangeInclusive<u128> {
    id.number()..=id.number()
}
