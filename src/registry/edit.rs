//! Changes of whole books: sealing everything anew.

use super::book::{Book, header_name, setting_name};
use crate::base::Result;
use crate::config::gateway::each_secret;
use crate::vault::seal::{Sealer, is_sealed};

/// Puts every secret under the sealer's current key; says how many were not.
///
/// # Errors
/// When one does not open. The book may have changed in part then.
pub(super) fn reseal(account: &str, book: &mut Book, sealer: &Sealer) -> Result<usize> {
    let mut count = 0;
    let mut renew = |name: &[&str], sealed: &mut String| -> Result<()> {
        if let Some(fresh) = sealer.reseal(name, sealed)? {
            *sealed = fresh;
            count += 1;
        }
        Ok(())
    };
    for key in &mut book.keys {
        let mut sealed = std::mem::take(&mut key.sealed);
        let outcome = renew(&key.seal_name(account), &mut sealed);
        key.sealed = sealed;
        outcome?;
    }
    for provider in &mut book.providers {
        let id = provider.id.to_string();
        for (name, sealed) in &mut provider.headers {
            renew(&header_name(account, &id, name), sealed)?;
        }
    }
    for (id, gateway) in &mut book.gateways {
        each_secret(&mut gateway.fields, |label, sealed| {
            debug_assert!(is_sealed(sealed), "books hold no open secret");
            renew(&setting_name(account, id, label), sealed)
        })?;
    }
    Ok(count)
}
