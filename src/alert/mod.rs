//! Tells people when something is wrong, while it lasts, and when it is over.
//!
//! ```text
//!   source ──readings──> Rules ──notices──> Outbox ──> one file, on disk ──then──> a courier a channel ──> mail
//!   (figures)   every    pure               pure,        both together            tries again,      ──> Slack
//!               tick                        bounded                               holds nobody up   ──> webhook
//! ```
//!
//! What is told is on disk before anybody is told, so that a crash at any instant neither loses a notice nor makes a rule
//! fire again. A crash between a delivery and the note that it was made sends that one notice twice, under the same id.
//! Where figures come from is not known here: the source is asked for what a [`Measure`] names.

mod actor;
mod check;
mod courier;
mod failure;
mod keep;
mod mail;
mod notice;
mod outbox;
mod rules;
mod send;
mod settings;
mod slack;
mod webhook;

pub use actor::{Alerts, Source, Status};
pub use courier::ChannelStatus;
pub use rules::{AlertStatus, Reading, RuleStatus, State};
pub use settings::{
    Channel, Errors, Filter, Login, Mail, Measure, Rule, Security, Settings, Severity, Slack, To, Unit, Webhook, What,
};
