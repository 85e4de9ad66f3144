//! Calling tools: how a family of models is told of them, and how it writes its calls.
//!
//!     messages + tools --prompt--> messages and variables as the model's template takes them
//!     answer           --parser--> text, calls, their arguments as they come
//!     tools, forced    --grammar-> what an answer may look like at all
//!
//! A model whose template knows no tools is told of them in its system text, and answers in plain JSON. The engine knows
//! nothing of any of this: to it an answer is text.

mod format;
mod grammar;
mod parser;
mod prompt;
mod scan;

pub use format::ToolFormat;
pub use parser::{CallParser, Piece};
