//! The lines of a segment as a table: a column a field, a row a line.
//!
//! ```text
//! {"Id":"01…","CreatedAt":"2025-…","Cost":0.1,"Metadata":{"user":"ann"},…}  ──>  text, time, number, … ; objects as the text that they are
//! ```
//!
//! What a line holds is decided where lines are made; here it is only turned. So what is sealed stays as it is, a JSON text.

use std::collections::HashMap;
use std::io;

use serde_json::value::RawValue;

use super::parquet::{self, Column, Kind};
use crate::base::{Error, Result};

type Fields<'a> = HashMap<&'a str, &'a RawValue>;

/// What is behind a dot lies in the object before it. All may be null, should a spool of another version lack one.
const COLUMNS: [(&str, Kind); 47] = [
    ("Id", Kind::Text),
    ("CreatedAt", Kind::Time),
    ("Account", Kind::Text),
    ("Gateway", Kind::Text),
    ("Token", Kind::Text),
    ("RequestId", Kind::Text),
    ("EventId", Kind::Text),
    ("Provider", Kind::Text),
    ("Model", Kind::Text),
    ("ModelType", Kind::Text),
    ("Endpoint", Kind::Text),
    ("StatusCode", Kind::Integer),
    ("Success", Kind::Flag),
    ("Cached", Kind::Flag),
    ("CacheStatus", Kind::Text),
    ("RateLimited", Kind::Flag),
    ("Duration", Kind::Integer),
    ("TokensIn", Kind::Integer),
    ("TokensOut", Kind::Integer),
    ("Cost", Kind::Real),
    ("CustomCost", Kind::Flag),
    ("SavedCost", Kind::Real),
    ("Step", Kind::Integer),
    ("RequestType", Kind::Text),
    ("RequestContentType", Kind::Text),
    ("ResponseContentType", Kind::Text),
    ("RequestSize", Kind::Integer),
    ("ResponseSize", Kind::Integer),
    ("Feedback", Kind::Integer),
    ("Score", Kind::Real),
    ("UserAgent", Kind::Text),
    ("Authentication", Kind::Flag),
    ("Wholesale", Kind::Flag),
    ("Byok", Kind::Flag),
    ("Attempts", Kind::Text),
    ("Error", Kind::Text),
    ("Findings", Kind::Text),
    ("UsageMetadata.CachedTokensIn", Kind::Integer),
    ("Timings.FirstByte", Kind::Real),
    ("Timings.Total", Kind::Real),
    ("RequestBodyComplete", Kind::Flag),
    ("ResponseBodyComplete", Kind::Flag),
    ("Metadata", Kind::Text),
    ("RequestBody", Kind::Text),
    ("RequestBodyEncoding", Kind::Text),
    ("ResponseBody", Kind::Text),
    ("ResponseBodyEncoding", Kind::Text),
];

/// See the top of this file.
pub(super) struct Table {
    columns: Vec<Column>,
    effort: u32,
}

impl Table {
    /// An empty one, whose pages will be compressed with so much effort.
    pub(super) fn new(effort: u32) -> Self {
        Self { columns: COLUMNS.into_iter().map(Column::new).collect(), effort }
    }

    /// Takes a line.
    ///
    /// # Errors
    /// If it is none of ours.
    pub(super) fn push(&mut self, line: &[u8]) -> Result<()> {
        let fields: Fields<'_> = serde_json::from_slice(line).map_err(|error| unfit("the line", &error))?;
        let (mut group, mut inner) = (None, Fields::new());
        for column in &mut self.columns {
            let (parent, name) = column.name();
            if let Some(parent) = parent.filter(|_| parent != group) {
                let object = fields.get(parent).map(|raw| serde_json::from_str::<Option<Fields<'_>>>(raw.get()));
                inner = object.transpose().map_err(|error| unfit(parent, &error))?.flatten().unwrap_or_default();
            }
            group = parent;
            let value = if parent.is_some() { inner.get(name) } else { fields.get(name) };
            put(column, value.map_or("null", |raw| raw.get())).map_err(|error| unfit(name, &*error))?;
            column.turn(self.effort).map_err(|error| unfit(name, &error))?;
        }
        Ok(())
    }

    /// The file.
    ///
    /// # Errors
    /// If it cannot be compressed.
    pub(super) fn finish(self) -> io::Result<Vec<u8>> {
        parquet::finish(self.columns, self.effort)
    }
}

fn put(column: &mut Column, json: &str) -> Result<(), Box<dyn std::error::Error>> {
    if json == "null" {
        column.null();
        return Ok(());
    }
    match column.kind() {
        Kind::Flag => column.flag(json.parse()?),
        // Counts are unsigned; none comes near the bound.
        Kind::Integer => column.integer(json.parse::<i128>()?.clamp(i64::MIN.into(), i64::MAX.into()) as i64),
        Kind::Real => column.real(json.parse()?),
        Kind::Time => {
            let moment: jiff::Timestamp = serde_json::from_str::<&str>(json)?.parse()?;
            column.integer(moment.as_millisecond());
        }
        Kind::Text if json.starts_with('"') => column.text(&serde_json::from_str::<String>(json)?),
        Kind::Text => column.text(json),
    }
    Ok(())
}

fn unfit(what: &str, error: &dyn std::fmt::Display) -> Error {
    Error::internal(format!("{what} of a log record cannot be put into a table: {error}"))
}

#[cfg(test)]
#[path = "table_test.rs"]
mod tests;
