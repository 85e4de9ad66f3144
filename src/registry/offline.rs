//! Stored keys while no daemon has the folder: listed, set, removed, sealed anew under another master key.

use std::collections::BTreeMap;
use std::path::Path;

use super::admin::keys;
use super::book::Book;
use super::edit::{Bench, ensure_default};
use super::folder::Folder;
use super::view::DEFAULT;
use crate::base::{Error, Kind, Millis, Result, Secret};
use crate::config::gateway::canonical;
use crate::vault::seal::Sealer;

/// The registry of a daemon that does not run.
pub struct Offline {
    folder: Folder,
    books: BTreeMap<String, Book>,
    broken: BTreeMap<String, String>,
}

/// Which key.
#[derive(Clone, Debug)]
pub struct KeyName {
    /// Whose.
    pub account: String,
    /// Of which gateway.
    pub gateway: String,
    /// For which provider.
    pub provider: String,
    /// Under which alias.
    pub alias: String,
}

/// A stored key, but for the key itself.
#[derive(Clone, Debug)]
pub struct KeyLine {
    /// Which; the provider's slug is canonical.
    pub name: KeyName,
    /// Meant when a call names no alias.
    pub default: bool,
    /// Its last letters, if it is long.
    pub preview: String,
    /// When it was stored.
    pub modified: Millis,
}

impl Offline {
    /// Takes the folder, as long as this lives.
    ///
    /// # Errors
    /// `BadInput` when a daemon has it, or it cannot be read.
    pub fn open(folder: &Path) -> Result<Self> {
        let folder = Folder::open(folder)?;
        let found = folder.read()?;
        Ok(Self { folder, books: found.books, broken: found.broken })
    }

    /// All stored keys, whether a daemon has the folder or not, and what could not be read.
    ///
    /// # Errors
    /// When the folder cannot be read.
    pub fn list(folder: &Path) -> Result<(Vec<KeyLine>, Vec<String>)> {
        let found = Folder::peek(folder, "it is only listed").read()?;
        let lines = found.books.iter().flat_map(|(account, book)| {
            book.keys.iter().map(move |key| KeyLine {
                name: KeyName {
                    account: account.clone(),
                    gateway: key.gateway.clone(),
                    provider: key.provider.clone(),
                    alias: key.alias.clone(),
                },
                default: key.default,
                preview: key.preview.clone(),
                modified: key.modified,
            })
        });
        Ok((lines.collect(), found.broken.into_values().collect()))
    }

    /// Whether an account has made such a gateway, or has it anyway.
    pub fn has_gateway(&self, account: &str, id: &str) -> bool {
        id == DEFAULT || self.books.get(account).is_some_and(|book| book.gateways.contains_key(id))
    }

    /// Stores a key; says whether it took the place of another.
    ///
    /// # Errors
    /// `BadInput` when a name is none, and what sealing and the disk say.
    pub fn set(&mut self, name: &KeyName, default: bool, secret: &Secret<String>, sealer: &Sealer) -> Result<bool> {
        let KeyName { account, gateway, provider, alias } = name;
        self.whole(account)?;
        let mut book = self.books.get(account).cloned().unwrap_or_default();
        let bench = Bench { account, sealer, now: Millis::now() };
        let replaced = book.key(gateway, provider, alias).is_some();
        if gateway == DEFAULT {
            ensure_default(&mut book, &bench);
        }
        keys::put(&mut book, &bench, gateway, provider, alias, default, secret)?;
        self.keep(account, book)?;
        Ok(replaced)
    }

    /// Removes a key.
    ///
    /// # Errors
    /// `NotFound` when there is none of this name, and what the disk says.
    pub fn remove(&mut self, name: &KeyName) -> Result<()> {
        let KeyName { account, gateway, provider, alias } = name;
        self.whole(account)?;
        let mut book = self.books.get(account).cloned().unwrap_or_default();
        let before = book.keys.len();
        book.keys.retain(|key| !(key.is(gateway, provider) && key.alias == *alias));
        if book.keys.len() == before {
            let provider = canonical(provider);
            let message = format!("account {account}, gateway {gateway}: no key of {provider} with alias {alias:?}");
            return Err(Error::new(Kind::NotFound, message));
        }
        self.keep(account, book)
    }

    /// Seals everything anew that the sealer's current key did not seal, account by account; says how many secrets.
    ///
    /// # Errors
    /// When one does not open, or an account cannot be read or written. What was done before stays done: both keys are needed
    /// until this has come to its end.
    pub fn reseal(&mut self, sealer: &Sealer) -> Result<usize> {
        if let Some((account, _)) = self.broken.first_key_value() {
            self.whole(account)?;
        }
        let mut count = 0;
        for (account, book) in &mut self.books {
            let fresh = super::edit::reseal(account, book, sealer).map_err(|error| error.context(account))?;
            if fresh > 0 {
                self.folder.write(account, book)?;
                count += fresh;
            }
        }
        Ok(count)
    }

    fn keep(&mut self, account: &str, book: Book) -> Result<()> {
        self.folder.write(account, &book)?;
        self.books.insert(account.to_owned(), book);
        Ok(())
    }

    fn whole(&self, account: &str) -> Result<()> {
        match self.broken.get(account) {
            None => Ok(()),
            Some(reason) => Err(Error::bad_input(format!("{reason}; repair it, or move it away"))),
        }
    }
}
