//! The daemon through real sockets: one module a surface, one harness for all.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod auth;
mod batch;
mod binding;
mod cloudflare;
mod encode;
mod gateway;
mod harness;
mod limits;
mod lora;
mod openai;
mod scheduling;
mod structured;
mod tools;

#[path = "../upstream/mod.rs"]
mod upstream;
