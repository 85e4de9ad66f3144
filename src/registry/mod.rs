//! What the gateway was told: gateways, custom providers, stored keys, routes, datasets and evaluations, by the file and by the management
//! API.
//!
//!     neurond.toml ──> Fixed ───────────────────┐ wins
//!     management API ──admin──> actor ──sync──> │ <folder>/<account>.json, secrets sealed
//!                                │              v
//!                                └──swap──> Arc<View>: all compiled, secrets open, read by every call
//!
//! One actor changes things, one after the other, and answers when a change is on disk; the snapshot follows. The request path reads
//! the snapshot and compiles nothing. Neither sends a request nor knows HTTP: `admin` takes paths and values and returns values.

mod actor;
mod admin;
mod book;
mod edit;
mod evaluation;
mod folder;
mod offline;
mod view;

pub use actor::Registry;
pub use admin::{Method, Reply};
pub use evaluation::Due;
pub use offline::{KeyLine, KeyName, Offline};
pub use view::{CustomProvider, DeployedRoute, Gateway, StoredKey, View, check};

#[cfg(test)]
mod tests;
