//! Who used what: every call is reserved by estimate before it runs and settled by use when it ends.
//!
//!     reserve(claim) -> Reservation --settle(used)--> sums by account, model and day
//!                            '--dropped-----------> released, nothing charged
//!
//! The book is owned by one actor on a thread of its own, so that balances never disagree with themselves. It lives in
//! memory: a restart begins with an empty book.

mod actor;
mod book;

pub use actor::{Ledger, Reservation};
pub use book::{AccountTotals, Book, Claim, Row};
