//! What travels over a socket: events, calls to other servers, and how those are signed. Knows nothing of models or calls.

pub mod client;
pub mod gather;
pub mod redis;
pub mod sigv4;
pub mod sse;
pub mod vertex;

#[cfg(test)]
pub(crate) mod test_store;
