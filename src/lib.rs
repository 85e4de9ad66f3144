//! neurond turns a GPU box into Workers AI and AI Gateway: one daemon that serves open models itself, fronts every other
//! provider, and bills both in neurons. `docs/ARCHITECTURE.md` is the map; the modules below are its floors, bottom up.

// The pictures at the head of many files are indented text, not Rust.
#![allow(rustdoc::invalid_rust_codeblocks)]

pub mod base;
pub mod task;

pub mod config;
pub mod guard;
pub mod kernel;
pub mod metrics;
pub mod net;
pub mod route;
pub mod store;

pub mod alert;
pub mod cache;
pub mod fallback;
pub mod ledger;
pub mod logs;
pub mod model;
pub mod provider;
pub mod vault;

pub mod engine;
pub mod registry;

pub mod adapters;
pub mod supervisor;

pub mod gateway;
pub mod http;
pub mod simulate;

pub mod app;
pub mod cli;
pub mod signal;
pub mod telemetry;
