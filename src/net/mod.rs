//! What travels over a socket and is not HTTP itself. Knows nothing of models or calls.

pub mod sse;
